// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// (mean [M], var [M]), float64. kernel is the enumeration of math/gaussian.h by value; inverse_length [1] or [d].
std::tuple<Tensor, Tensor> gp_unique_posterior(const Tensor& factor, const Tensor& weights, const Tensor& unique,
                                               const Tensor& inputs, OptTensor counts, const Tensor& inverse_length,
                                               int64_t kernel, double variance);

// `factor` in place; the pivot of chol.h, []. A negative size of chol_rank1 is that of the array.
Tensor chol_append(Tensor factor, const Tensor& row, int64_t size);
Tensor chol_rank1(Tensor factor, const Tensor& vector, double sigma, int64_t size);

}  // namespace prefkern
