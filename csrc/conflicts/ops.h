// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// forward, backward, length: int64 [B].
std::tuple<Tensor, Tensor, Tensor> conflict_runs(const Tensor& tokens, const Tensor& advantages, const Tensor& group,
                                                 OptTensor mask, OptTensor cu_seqlens);

// Shaped like tokens; float32, or float64 for float64 advantages. combine is the enumeration of math/conflicts.h.
Tensor conflict_weights(const Tensor& tokens, const Tensor& advantages, const Tensor& forward, const Tensor& backward,
                        const Tensor& length, OptTensor cu_seqlens, double w_pos, double w_neg, int64_t combine);

// int64 [B]: the length of the common prefix of each pair.
Tensor first_divergence(const Tensor& ids_a, const Tensor& ids_b, OptTensor mask_a, OptTensor mask_b, OptTensor cu_seqlens_a,
                        OptTensor cu_seqlens_b);

}  // namespace prefkern
