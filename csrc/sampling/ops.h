// Operators of this room, as registered in library.cpp.
#pragma once
#include <tuple>

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

// ids int64 [k], their utilities [k], and the draws [M], or [0] when not wanted; utility and mode are the enumerations of
// math/thompson.h.
std::tuple<Tensor, Tensor, Tensor> beta_thompson_topk(const Tensor& alpha, const Tensor& beta, OptTensor eligible, int64_t k,
                                                      int64_t utility, int64_t mode, int64_t seed, int64_t step,
                                                      bool with_draws);
void decayed_beta_update(const Tensor& alpha, const Tensor& beta, const Tensor& ids, const Tensor& successes,
                         const Tensor& rollouts, double lam1, double lam2);

// int64 [n]: how much of the surplus each prompt is given. On the CPU; method is that of sampling/budget.h.
Tensor knapsack_allocate(const Tensor& utilities, int64_t surplus, int64_t method);

}  // namespace prefkern
