// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// scale sum_i weights[i] N(seed, first_row + i, first_element + e), and add_to. Shaped like add_to and of its dtype; without it
// [n], float32, or float64 for float64 weights; with it n may be -1. The 64 bits of seed are taken as they are.
Tensor seeded_normal_combine(const Tensor& weights, OptTensor add_to, int64_t seed, int64_t n, int64_t first_row,
                             int64_t first_element, double scale);

// The same added to x, which is contiguous.
void seeded_normal_combine_inplace(Tensor x, const Tensor& weights, int64_t seed, int64_t first_row, int64_t first_element,
                                   double scale);

// x += mu N(seed, row, first_element + e).
void seeded_normal_add_inplace(Tensor x, int64_t seed, int64_t row, int64_t first_element, double mu);

}  // namespace prefkern
