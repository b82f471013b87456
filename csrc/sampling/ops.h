// Operators of this room, as registered in library.cpp.
#pragma once
#include <tuple>

#include "core/tensor.h"

namespace prefkern {

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
