// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// [sequences]: sums or means of weights * f(values - minus). transform and bootstrap: enumerations by value.
Tensor sequence_reduce(const Tensor& values, OptTensor mask, OptTensor cu_seqlens, OptTensor minus, OptTensor weights,
                       int64_t transform, bool mean);
Tensor sequence_reduce_backward(const Tensor& g, const Tensor& values, OptTensor mask, OptTensor cu_seqlens, OptTensor minus,
                                OptTensor weights, int64_t transform, bool mean);

Tensor discounted_returns(const Tensor& rewards, OptTensor mask, OptTensor cu_seqlens, double gamma);
Tensor segmented_returns(const Tensor& rewards, const Tensor& segment, const Tensor& order, double gamma);

// advantages, returns.
std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, OptTensor mask, OptTensor lengths,
                               OptTensor cu_seqlens, OptTensor finished, OptTensor last_values, double gamma, double lam,
                               int64_t bootstrap);

}  // namespace prefkern
