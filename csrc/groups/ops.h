// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// [B]: the reduction of each row's group, float32, or float64 for float64 values. reduction: GroupReduction by value.
Tensor group_reduce(const Tensor& values, const Tensor& group, OptTensor mask, int64_t reduction);

// z, and for the backward (s + eps)^-1 and a slope, all [B].
std::tuple<Tensor, Tensor, Tensor> group_normalize(const Tensor& x, const Tensor& group, double eps, int64_t ddof,
                                                   bool sigma_grad);
Tensor group_normalize_backward(const Tensor& g, const Tensor& group, const Tensor& z, const Tensor& scale,
                                const Tensor& slope);

// loss [], pairs [] int64, and the derivative of the sum over pairs, [B] (no elements unless with_grad).
std::tuple<Tensor, Tensor, Tensor> level_pairs(const Tensor& scores, const Tensor& group, const Tensor& levels, double beta,
                                               double anisotropy, bool per_response, bool with_grad);
Tensor level_pairs_backward(const Tensor& g_loss, const Tensor& unnormalised, const Tensor& pairs);

}  // namespace prefkern
