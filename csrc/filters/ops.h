// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// 0-d; float32, or float64 for float64 values. interpolation is the enumeration of math/quantile.h.
Tensor masked_quantile(const Tensor& values, OptTensor mask, double q, int64_t interpolation);

// bool, shaped like values. rule: 0 keeps exactly the largest `fraction`, 1 everything from the quantile 1 - fraction on.
Tensor top_quantile_mask(const Tensor& values, OptTensor mask, double fraction, int64_t rule);

}  // namespace prefkern
