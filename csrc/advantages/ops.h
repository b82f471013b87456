// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// advantages, mean, std (float32, or float64 for float64 rewards), count (int64); each [B].
std::tuple<Tensor, Tensor, Tensor, Tensor> group_advantages(const Tensor& rewards, const Tensor& group, int64_t estimator,
                                                            double eps, int64_t singleton);

}  // namespace prefkern
