// importance_weights and off_policy_mask over padded [B, T] or packed [N] tokens: what corrects for, or leaves out, tokens
// that the trainer would have sampled with another probability.
#include <cmath>

#include "core/arguments.h"
#include "core/cuda_runtime.h"
#include "policy/importance.h"
#include "policy/ops.h"
#include "policy/token_loss.h"

namespace prefkern {
namespace {

template <class S> void run(WeightArgs<S> a, const Tensor& old, const Tensor& rollout, const OptTensor& mask,
                            const Tensor& out) {
  a.old_logp = data<S>(old);
  a.rollout_logp = data<S>(rollout);
  a.mask = data_or_null<uint8_t>(mask);
  a.weights = mutable_data<S>(out);
  if constexpr (std::is_same_v<S, float>) {
    if (old.is_cuda()) {
      a.slices = policy_slices(a.layout);
      const int64_t sums = a.layout.sequences * a.slices * 2, rows = a.layout.sequences + 2;
      const Tensor scratch = zeros({sums + rows + 1}, ScalarType::Float, old);
      a.partials = mutable_data<float>(scratch);
      a.row_weights = a.partials + sums;
      a.finished = reinterpret_cast<uint32_t*>(a.row_weights + rows);
      return check_cuda(cuda_importance_weights(a, current_stream(old)));
    }
  }
  cpu_importance_weights(a);
}

template <class S>
void run(OffPolicyArgs<S> a, const Tensor& advantages, const Tensor& logp, const Tensor& rollout, const OptTensor& mask,
         const Tensor& out) {
  a.advantages = data<S>(advantages);
  a.logp = data<S>(logp);
  a.rollout_logp = data<S>(rollout);
  a.mask = data_or_null<uint8_t>(mask);
  a.keep = mutable_data<uint8_t>(out);
  if constexpr (std::is_same_v<S, float>) {
    if (logp.is_cuda()) {
      a.slices = policy_slices(a.layout);
      const int64_t sums = a.layout.sequences * a.slices * 2;
      const Tensor scratch = zeros({sums + 1}, ScalarType::Float, logp);
      a.partials = mutable_data<float>(scratch);
      a.finished = reinterpret_cast<uint32_t*>(a.partials + sums);
      return check_cuda(cuda_off_policy_mask(a, current_stream(logp)));
    }
  }
  cpu_off_policy_mask(a);
}

Tensor like(const Tensor& t, ScalarType type) {
  return t.dim() == 2 ? empty({t.size(0), t.size(1)}, type, t) : empty({t.numel()}, type, t);
}

}  // namespace

Tensor importance_weights(const Tensor& old_logp, const Tensor& rollout_logp, OptTensor mask, OptTensor cu_seqlens,
                          int64_t level, int64_t mode, double clip_min, double clip_max, double log_clamp, bool normalize) {
  const ScalarType st = scalar_type(accumulator(float_dtype(old_logp, "old_logp")));
  check_value(level >= 0 && level <= 2, "level is ", level, "; accepted: 0, 1, 2");
  check_value(mode >= 0 && mode <= 1, "mode is ", mode, "; accepted: 0, 1");
  check_value(clip_max > 0, "clip_max is ", clip_max, "; it must be positive, or None");
  check_value(clip_min <= clip_max, "clip_min is ", clip_min, " and clip_max is ", clip_max, "; the first must not be larger");
  check_value(log_clamp > 0, "log_clamp is ", log_clamp, "; it must be positive, or None");
  const OnDevice guard(old_logp);
  if (cu_seqlens) cu_seqlens = to_contiguous(*cu_seqlens);
  const WeightOptions options{WeightLevel(level), WeightMode(mode), normalize, clip_min, clip_max, log_clamp};
  const SequenceLayout layout = checked_layout(old_logp, "old_logp", cu_seqlens);
  const Tensor old = to_contiguous(cast(old_logp, st)),
               rollout = checked_tokens(rollout_logp, "rollout_logp", old, "old_logp", st);
  mask = checked_mask(mask, old, "old_logp");
  const Tensor out = like(old, st);
  st == ScalarType::Double ? run<double>(WeightArgs<double>{options, layout}, old, rollout, mask, out)
                           : run<float>(WeightArgs<float>{options, layout}, old, rollout, mask, out);
  return out;
}

Tensor off_policy_mask(const Tensor& advantages, const Tensor& logp, const Tensor& rollout_logp, OptTensor mask,
                       OptTensor cu_seqlens, double threshold) {
  const ScalarType st = scalar_type(accumulator(float_dtype(logp, "old_logp")));
  check_value(!std::isnan(threshold), "threshold is ", threshold, "; it must be a number");
  const OnDevice guard(logp);
  if (cu_seqlens) cu_seqlens = to_contiguous(*cu_seqlens);
  const SequenceLayout layout = checked_layout(logp, "old_logp", cu_seqlens);
  float_dtype(advantages, "advantages");
  check_same_device(advantages, "advantages", logp, "old_logp");
  check_value(advantages.dim() == 1 && advantages.size(0) == layout.sequences, "advantages has shape ", shape_text(advantages),
              "; expected [", layout.sequences, "]");
  const Tensor lp = to_contiguous(cast(logp, st)), rollout = checked_tokens(rollout_logp, "rollout_logp", lp, "old_logp", st);
  const Tensor adv = to_contiguous(cast(advantages, st)), out = empty({layout.sequences}, ScalarType::Bool, lp);
  mask = checked_mask(mask, lp, "old_logp");
  st == ScalarType::Double ? run<double>(OffPolicyArgs<double>{layout, threshold}, adv, lp, rollout, mask, out)
                           : run<float>(OffPolicyArgs<float>{layout, threshold}, adv, lp, rollout, mask, out);
  return out;
}

}  // namespace prefkern
