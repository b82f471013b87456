// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// loss [], metrics [kPolicyMetrics], each token's gradient before normalisation (shaped like logp; no elements unless
// with_grad), and the normaliser's inverse [].
using PolicyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What `flags` of policy_loss may hold.
enum PolicyFlag : int64_t { kKlRatio = 1, kAnchorNll = 2 };

// Enumerations by value, kl counted from the first estimate. dual_clip, delta, kl_clamp and the clamps are infinite for
// none, norm is negative for none, scale 0 for the default. lows, highs and norm_tensor stand in for eps_low, eps_high, norm.
PolicyOutputs policy_loss(const Tensor& logp, OptTensor old_logp, OptTensor advantages, OptTensor mask, OptTensor cu_seqlens,
                          OptTensor ref_logp, OptTensor token_weight, OptTensor lows, OptTensor highs, OptTensor anchor,
                          OptTensor entropy, OptTensor norm_tensor, int64_t kind, int64_t agg, int64_t kl, int64_t flags,
                          double eps_low, double eps_high, double dual_clip, double delta, double tau_pos, double tau_neg,
                          double clamp_low, double clamp_high, double beta, double kl_clamp, double anchor_gamma, double scale,
                          double norm, bool with_grad);

Tensor policy_loss_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse_norm);
void policy_loss_backward_inplace(const Tensor& g_loss, Tensor unnormalised, const Tensor& inverse_norm);

// Level and mode are those of math/importance.h; bounds are infinite for none.
Tensor importance_weights(const Tensor& old_logp, const Tensor& rollout_logp, OptTensor mask, OptTensor cu_seqlens,
                          int64_t level, int64_t mode, double clip_min, double clip_max, double log_clamp, bool normalize);
Tensor off_policy_mask(const Tensor& advantages, const Tensor& logp, const Tensor& rollout_logp, OptTensor mask,
                       OptTensor cu_seqlens, double threshold);

}  // namespace prefkern
