// diffusion_pair_loss: the preference loss of pairs of denoised latents, its gradient, and mean squared errors by themselves.
#include <cmath>

#include "diffusion/latent_tensors.h"
#include "diffusion/pair_errors.h"

namespace prefkern {
namespace {

template <class S> void launch(const DiffusionPairArgs<S>& a, const Tensor& on) {
  if constexpr (sizeof(S) == 4)
    if (on.is_cuda()) return check_cuda(cuda_diffusion_pairs(a, current_stream(on)));
  cpu_diffusion_pairs(a);
}
template <class S> void launch(const DiffusionGradArgs<S>& a, const Tensor& on) {
  if constexpr (sizeof(S) == 4)
    if (on.is_cuda()) return check_cuda(cuda_diffusion_pairs_backward(a, current_stream(on)));
  cpu_diffusion_pairs_backward(a);
}

template <class S> void set_scratch(DiffusionPairArgs<S>& a, const Tensor& scratch) {
  a.sums = mutable_data<double>(scratch);
  a.finished = reinterpret_cast<uint32_t*>(a.sums + scratch.numel() - 1);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> diffusion_pair_loss(const Tensor& pred_w, const Tensor& pred_l, const Tensor& target,
                                                       OptTensor target_l, OptTensor ref_w, OptTensor ref_l,
                                                       OptTensor ref_error_w, OptTensor ref_error_l, OptTensor weight,
                                                       int64_t kind, int64_t reduction, double beta, double factor,
                                                       bool negative) {
  LatentTensors tensors(pred_w, "pred_w");
  check_value(kind >= 0 && kind < kDiffusionKinds, "kind is ", kind, "; accepted: 0 to ", kDiffusionKinds - 1);
  check_reduction(reduction);
  check_value(beta > 0 && std::isfinite(beta), "beta is ", beta, "; it must be finite and positive");
  check_value(factor > 0 && std::isfinite(factor), "factor is ", factor, "; it must be finite and positive");
  const bool refs = ref_w && ref_l, errors = ref_error_w && ref_error_l;
  check_value(refs ? !ref_error_w && !ref_error_l : errors && !ref_w && !ref_l,
              "either both ref_w and ref_l are expected, or both ref_mse_w and ref_mse_l, and not the others");
  const OnDevice guard(pred_w);
  const Tensor loss = tensors.result(reduction), metrics = empty({kDiffusionMetrics}, tensors.result_type(), pred_w);
  const Tensor slopes = empty({tensors.rows()}, tensors.result_type(), pred_w), scratch = tensors.scratch(kDiffusionSums);
  const auto run = [&](auto a) {
    using S = std::remove_pointer_t<decltype(a.loss)>;
    a.rule = {DiffusionKind(kind), beta, factor, negative};
    a.reduction = LatentReduction(reduction);
    a.dtype = tensors.dtype();
    a.pairs = tensors.rows();
    a.length = tensors.length();
    a.pred_w = tensors.latents(pred_w, "pred_w");
    a.pred_l = tensors.latents(pred_l, "pred_l");
    a.target_w = tensors.latents(target, "target");
    a.target_l = target_l ? tensors.latents(*target_l, "target_l") : a.target_w;
    a.ref_w = tensors.latents(ref_w, "ref_w");
    a.ref_l = tensors.latents(ref_l, "ref_l");
    a.ref_error_w = tensors.numbers(ref_error_w, "ref_mse_w");
    a.ref_error_l = tensors.numbers(ref_error_l, "ref_mse_l");
    a.weight = tensors.numbers(weight, "weight");
    a.loss = mutable_data<S>(loss);
    a.metrics = mutable_data<S>(metrics);
    a.slopes = mutable_data<S>(slopes);
    set_scratch(a, scratch);
    launch(a, pred_w);
  };
  if (tensors.wide()) run(DiffusionPairArgs<double>());
  else run(DiffusionPairArgs<float>());
  return {loss, metrics, slopes};
}

Tensor diffusion_pair_loss_backward(const Tensor& g_loss, const Tensor& slopes, const Tensor& pred_w, const Tensor& pred_l,
                                    const Tensor& target, OptTensor target_l, int64_t reduction, int64_t needs) {
  LatentTensors tensors(pred_w, "pred_w");
  check_reduction(reduction);
  check_value(needs >= 0 && needs <= (kNeedsWinner | kNeedsLoser), "needs is ", needs, "; accepted: 0 to 3");
  const OnDevice guard(pred_w);
  const int64_t rows = tensors.rows(), length = tensors.length(), count = (needs & 1) + (needs >> 1);
  const Tensor grads = empty({count, rows, length}, pred_w.scalar_type(), pred_w);
  const auto run = [&](auto a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.slopes)>>;
    a.dtype = tensors.dtype();
    a.pairs = rows;
    a.length = length;
    a.pred_w = tensors.latents(pred_w, "pred_w");
    a.pred_l = tensors.latents(pred_l, "pred_l");
    a.target_w = tensors.latents(target, "target");
    a.target_l = target_l ? tensors.latents(*target_l, "target_l") : a.target_w;
    a.per_pair = LatentReduction(reduction) == LatentReduction::none;
    a.share = LatentReduction(reduction) == LatentReduction::mean ? 1 / double(rows) : 1;
    a.slopes = tensors.upstream<S>(slopes, int64_t(LatentReduction::none), "slopes");
    a.upstream = tensors.upstream<S>(g_loss, reduction);
    char* const memory = static_cast<char*>(grads.mutable_data_ptr());
    if (needs & kNeedsWinner) a.grad_w = memory;
    if (needs & kNeedsLoser) a.grad_l = memory + (count - 1) * rows * length * element_size(tensors.dtype());
    launch(a, pred_w);
  };
  if (tensors.wide()) run(DiffusionGradArgs<double>());
  else run(DiffusionGradArgs<float>());
  return grads;
}

Tensor diffusion_mse(const Tensor& pred, const Tensor& target) {
  LatentTensors tensors(pred, "pred");
  const OnDevice guard(pred);
  const Tensor errors = empty({tensors.rows()}, ScalarType::Double, pred), scratch = tensors.scratch(kDiffusionSums);
  const auto run = [&](auto a) {
    a.dtype = tensors.dtype();
    a.pairs = tensors.rows();
    a.length = tensors.length();
    a.pred_w = tensors.latents(pred, "pred");
    a.target_w = a.target_l = tensors.latents(target, "target");
    a.errors = mutable_data<double>(errors);
    set_scratch(a, scratch);
    launch(a, pred);
  };
  if (tensors.wide()) run(DiffusionPairArgs<double>());
  else run(DiffusionPairArgs<float>());
  return errors;
}

}  // namespace prefkern
