// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// loss [], metrics [kPolicyMetrics], each token's gradient before normalisation (shaped like logp; no elements unless
// with_grad), and the normaliser's inverse []. Enumerations by value; dual_clip and ratio_clamp are infinite for none.
using PolicyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

PolicyOutputs policy_loss(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, OptTensor mask,
                          OptTensor cu_seqlens, OptTensor ref_logp, int64_t kind, int64_t agg, int64_t kl, double eps_low,
                          double eps_high, double dual_clip, double beta, double ratio_clamp, bool with_grad);

Tensor policy_loss_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& inverse_norm);

}  // namespace prefkern
