// x0_loss and its gradient; ddim_invert_step.
#include <cmath>

#include "diffusion/clean_latents.h"
#include "diffusion/latent_tensors.h"

namespace prefkern {
namespace {

void check_kind(int64_t kind, double c) {
  check_value(kind >= 0 && kind < kX0Kinds, "kind is ", kind, "; accepted: 0, 1");
  check_value(c > 0 && std::isfinite(c), "c is ", c, "; it must be finite and positive");
}

template <class Args>
void fill(Args& a, LatentTensors& tensors, const Tensor& pred, const Tensor& x, const Tensor& target,
          const Tensor& coefficients, int64_t kind, double c) {
  a.kind = X0Kind(kind);
  a.c = c;
  a.dtype = tensors.dtype();
  a.rows = tensors.rows();
  a.length = tensors.length();
  a.pred = tensors.latents(pred, "pred");
  a.x = tensors.latents(x, "x");
  a.target = tensors.latents(target, "target");
  a.coefficients = tensors.coefficients(coefficients, 2);
}

}  // namespace

Tensor x0_loss(const Tensor& pred, const Tensor& x, const Tensor& target, const Tensor& coefficients, int64_t kind,
               int64_t reduction, double c) {
  LatentTensors tensors(pred, "pred");
  check_kind(kind, c);
  check_reduction(reduction);
  const OnDevice guard(pred);
  const Tensor loss = tensors.result(reduction), scratch = tensors.scratch(1);
  const auto filled = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.loss)>;
    fill(a, tensors, pred, x, target, coefficients, kind, c);
    a.reduction = LatentReduction(reduction);
    a.sums = mutable_data<double>(scratch);
    a.finished = reinterpret_cast<uint32_t*>(a.sums + scratch.numel() - 1);
    a.loss = mutable_data<S>(loss);
    return a;
  };
  if (tensors.wide()) cpu_x0_loss(filled(X0LossArgs<double>()));
  else if (pred.is_cuda()) check_cuda(cuda_x0_loss(filled(X0LossArgs<float>()), current_stream(pred)));
  else cpu_x0_loss(filled(X0LossArgs<float>()));
  return loss;
}

Tensor x0_loss_backward(const Tensor& g_loss, const Tensor& pred, const Tensor& x, const Tensor& target,
                        const Tensor& coefficients, int64_t kind, int64_t reduction, double c) {
  LatentTensors tensors(pred, "pred");
  check_kind(kind, c);
  check_reduction(reduction);
  const OnDevice guard(pred);
  const Tensor grad = empty({tensors.rows(), tensors.length()}, pred.scalar_type(), pred);
  const auto filled = [&](auto a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.upstream)>>;
    fill(a, tensors, pred, x, target, coefficients, kind, c);
    a.per_row = LatentReduction(reduction) == LatentReduction::none;
    a.share = LatentReduction(reduction) == LatentReduction::mean ? 1 / double(a.rows) : 1;
    a.upstream = tensors.upstream<S>(g_loss, reduction);
    a.grad = grad.mutable_data_ptr();
    return a;
  };
  if (tensors.wide()) cpu_x0_loss_backward(filled(X0GradArgs<double>()));
  else if (pred.is_cuda()) check_cuda(cuda_x0_loss_backward(filled(X0GradArgs<float>()), current_stream(pred)));
  else cpu_x0_loss_backward(filled(X0GradArgs<float>()));
  return grad;
}

Tensor ddim_invert_step(const Tensor& x, const Tensor& e1, OptTensor e2, const Tensor& coefficients) {
  LatentTensors tensors(x, "x");
  const OnDevice guard(x);
  const Tensor out = empty({tensors.rows(), tensors.length()}, x.scalar_type(), x);
  LatentStepArgs a;
  a.dtype = tensors.dtype();
  a.rows = tensors.rows();
  a.length = tensors.length();
  a.x = tensors.latents(x, "x");
  a.e1 = tensors.latents(e1, "e1");
  a.e2 = tensors.latents(e2, "e2");
  a.coefficients = tensors.coefficients(coefficients, e2 ? 3 : 2);
  a.out = out.mutable_data_ptr();
  if (x.is_cuda()) check_cuda(cuda_latent_step(a, current_stream(x)));
  else cpu_latent_step(a);
  return out;
}

}  // namespace prefkern
