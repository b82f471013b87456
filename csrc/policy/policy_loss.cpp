// policy_loss: a clipped policy objective over padded [B, T] or packed [N] tokens, with its metrics and gradient.
#include <cmath>
#include <type_traits>

#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "policy/ops.h"
#include "policy/token_loss.h"

namespace prefkern {
namespace {

DType loss_dtype(const Tensor& logp) {
  const DType type = float_dtype(logp, "logp");
  check_type(type == accumulator(type), "logp has dtype ", dtype_name(logp.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  return type;
}

PolicyOptions checked_options(int64_t kind, int64_t agg, int64_t kl, double eps_low, double eps_high, double dual_clip,
                              double beta, double ratio_clamp, bool has_ref) {
  check_value(kind == 0, "kind is ", kind, "; accepted: 0");
  check_value(agg >= 0 && agg <= 1, "agg is ", agg, "; accepted: 0, 1");
  check_value(kl == 0, "kl is ", kl, "; accepted: 0");
  check_value(eps_low >= 0 && eps_low < 1, "eps_low is ", eps_low, "; it must be at least 0 and less than 1");
  check_value(eps_high >= 0 && std::isfinite(eps_high), "eps_high is ", eps_high, "; it must be finite and not negative");
  check_value(dual_clip > 1, "dual_clip is ", dual_clip, "; it must be greater than 1, or None");
  check_value(beta >= 0 && std::isfinite(beta), "beta is ", beta, "; it must be finite and not negative");
  check_value(beta == 0 || has_ref, "beta is ", beta, " but ref_logp is None; a penalty needs a reference");
  check_value(ratio_clamp > 0, "ratio_clamp is ", ratio_clamp, "; it must be positive, or None");
  const KlKind penalty = has_ref ? KlKind::k3 : KlKind::none;
  return {PolicyKind(kind), penalty, Aggregation(agg), eps_low, eps_high, dual_clip, beta, ratio_clamp};
}

template <class S>
void run(const PolicyOptions& options, const SequenceLayout& layout, const Tensor& logp, const Tensor& old_logp,
         const OptTensor& ref_logp, const Tensor& advantages, bool token_advantages, const OptTensor& mask, bool with_grad,
         const PolicyOutputs& out) {
  PolicyArgs<S> a;
  a.options = options;
  a.layout = layout;
  a.logp = data<S>(logp);
  a.old_logp = data<S>(old_logp);
  a.ref_logp = data_or_null<S>(ref_logp);
  a.advantages = data<S>(advantages);
  a.token_advantages = token_advantages;
  a.mask = data_or_null<uint8_t>(mask);
  a.loss = mutable_data<S>(std::get<0>(out));
  a.metrics = mutable_data<S>(std::get<1>(out));
  if (with_grad) a.grad = mutable_data<S>(std::get<2>(out));
  a.inverse_norm = mutable_data<S>(std::get<3>(out));
  if constexpr (std::is_same_v<S, float>) {
    if (logp.is_cuda()) {
      a.slices = policy_slices(layout);
      const int64_t sums = layout.sequences * a.slices * kPolicySums;
      const Tensor scratch = zeros({sums + 1}, ScalarType::Float, logp);
      a.partials = mutable_data<float>(scratch);
      a.finished = reinterpret_cast<uint32_t*>(a.partials + sums);
      return check_cuda(cuda_policy_loss(a, current_stream(logp)));
    }
  }
  cpu_policy_loss(a);
}

}  // namespace

PolicyOutputs policy_loss(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, OptTensor mask,
                          OptTensor cu_seqlens, OptTensor ref_logp, int64_t kind, int64_t agg, int64_t kl, double eps_low,
                          double eps_high, double dual_clip, double beta, double ratio_clamp, bool with_grad) {
  const DType dtype = loss_dtype(logp);
  const PolicyOptions options =
      checked_options(kind, agg, kl, eps_low, eps_high, dual_clip, beta, ratio_clamp, ref_logp.has_value());
  const OnDevice guard(logp);
  if (cu_seqlens) cu_seqlens = to_contiguous(*cu_seqlens);
  const SequenceLayout layout = checked_layout(logp, "logp", cu_seqlens);

  const ScalarType st = logp.scalar_type();
  const Tensor lp = to_contiguous(logp), old = checked_tokens(old_logp, "old_logp", logp, "logp", st);
  if (ref_logp) ref_logp = checked_tokens(*ref_logp, "ref_logp", logp, "logp", st);
  mask = checked_mask(mask, logp, "logp");
  float_dtype(advantages, "advantages");
  check_same_device(advantages, "advantages", logp, "logp");
  const bool per_token = same_shape(advantages, logp);
  check_value(per_token || (advantages.dim() == 1 && advantages.size(0) == layout.sequences), "advantages has shape ",
              shape_text(advantages), "; expected [", layout.sequences, "] (one per sequence) or ", shape_text(logp),
              " (one per token)");
  const Tensor adv = to_contiguous(cast(advantages, logp.scalar_type()));

  const bool nothing = logp.is_cuda() && layout.sequences == 0;  // no block would write the results
  const auto make = [&](std::initializer_list<int64_t> shape) {
    return nothing ? zeros(shape, st, logp) : empty(shape, st, logp);
  };
  const PolicyOutputs out{make({}), make({kPolicyMetrics}),
                          !with_grad        ? empty({0}, st, logp)
                          : logp.dim() == 2 ? make({logp.size(0), logp.size(1)})
                                            : make({logp.size(0)}),
                          make({})};
  if (nothing) return out;
  dtype == DType::f64 ? run<double>(options, layout, lp, old, ref_logp, adv, per_token, mask, with_grad, out)
                      : run<float>(options, layout, lp, old, ref_logp, adv, per_token, mask, with_grad, out);
  return out;
}

Tensor policy_loss_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse_norm) {
  const DType dtype = float_dtype(unnormalised, "unnormalised");
  const ScalarType st = unnormalised.scalar_type();
  check_type(dtype == accumulator(dtype) && g_loss.scalar_type() == st && inverse_norm.scalar_type() == st,
             "g_loss, unnormalised and inverse_norm have dtypes ", dtype_name(g_loss.scalar_type()), ", ", dtype_name(st),
             " and ", dtype_name(inverse_norm.scalar_type()), "; one of float32 and float64 is expected for all");
  check_value(g_loss.numel() == 1 && inverse_norm.numel() == 1, "g_loss and inverse_norm have shapes ", shape_text(g_loss),
              " and ", shape_text(inverse_norm), "; expected one element each");
  check_same_device(g_loss, "g_loss", unnormalised, "unnormalised");
  check_same_device(inverse_norm, "inverse_norm", unnormalised, "unnormalised");
  const OnDevice guard(unnormalised);
  const Tensor g = to_contiguous(unnormalised), grad = torch::stable::empty_like(g);
  const auto fill = [&](auto& a) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(a.unnormalised)>>;
    a.tokens = g.numel();
    a.unnormalised = data<S>(g);
    a.upstream = data<S>(g_loss);
    a.inverse_norm = data<S>(inverse_norm);
    a.grad = mutable_data<S>(grad);
  };
  if (dtype == DType::f64) {
    PolicyGradArgs<double> a;
    fill(a);
    cpu_policy_loss_backward(a);
  } else {
    PolicyGradArgs<float> a;
    fill(a);
    g.is_cuda() ? check_cuda(cuda_policy_loss_backward(a, current_stream(g))) : cpu_policy_loss_backward(a);
  }
  return grad;
}

}  // namespace prefkern
