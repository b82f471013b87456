// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// [sequences]: sums or means of weights * f(values - minus), over the tokens from starts to ends. tail_weight belongs to head.
// transform and bootstrap: enumerations by value.
Tensor sequence_reduce(const Tensor& values, OptTensor mask, OptTensor cu_seqlens, OptTensor minus, OptTensor weights,
                       int64_t transform, bool mean, OptTensor starts, OptTensor ends, OptTensor head, double tail_weight,
                       double decay);
Tensor sequence_reduce_backward(const Tensor& g, const Tensor& values, OptTensor mask, OptTensor cu_seqlens, OptTensor minus,
                                OptTensor weights, int64_t transform, bool mean, OptTensor starts, OptTensor ends,
                                OptTensor head, double tail_weight, double decay);

// (means [sequences, n_steps] or [sequences, n_steps, features], counts [sequences, n_steps]). step_ids: ids, or a bool mask.
std::tuple<Tensor, Tensor> step_pool(const Tensor& values, const Tensor& step_ids, OptTensor cu_seqlens, int64_t n_steps,
                                     bool clamp);
// dtype: that of the result, an enumeration by value.
Tensor step_pool_backward(const Tensor& g, const Tensor& counts, const Tensor& step_ids, OptTensor cu_seqlens, bool clamp,
                          int64_t dtype);

Tensor discounted_returns(const Tensor& rewards, OptTensor mask, OptTensor cu_seqlens, double gamma);
Tensor segmented_returns(const Tensor& rewards, const Tensor& segment, const Tensor& order, double gamma);

// advantages, returns.
std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, OptTensor mask, OptTensor lengths,
                               OptTensor cu_seqlens, OptTensor finished, OptTensor last_values, double gamma, double lam,
                               int64_t bootstrap);

}  // namespace prefkern
