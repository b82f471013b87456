// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// The options of group_advantages: enumerations of math/advantages.h as numbers; combine 0 adds the columns up first.
struct GroupOptions {
  int64_t estimator, singleton, ddof, combine, nan, virtual_count, batch;
  double eps, virtual_value, batch_eps;
};

// Token counts [rows] as contiguous int64, on the device of `rows_of`.
Tensor checked_lengths(const Tensor& lengths, const Tensor& rows_of, const char* rows_name);

// Advantages [B], float32, or float64 for float64 rewards.
Tensor group_advantages(const Tensor& rewards, const Tensor& group, const OptTensor& weights, const OptTensor& lengths,
                        int64_t estimator, int64_t singleton, int64_t ddof, double eps, int64_t combine, int64_t nan,
                        double virtual_value, int64_t virtual_count, int64_t batch, double batch_eps);

// The same, and mean, std, count (int64), min, max where their bit, 0 to 4, is set in `outputs`; [0] where not.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_advantages_stats(
    const Tensor& rewards, const Tensor& group, const OptTensor& weights, const OptTensor& lengths, int64_t estimator,
    int64_t singleton, int64_t ddof, double eps, int64_t combine, int64_t nan, double virtual_value, int64_t virtual_count,
    int64_t batch, double batch_eps, int64_t outputs);

// Moments (n, mean, sum of squares about the mean), float64 [3]: of everything in `values`, weighted by a bool or floating
// tensor of its shape; and of several parts, [R, 3].
Tensor batch_moments(const Tensor& values, const OptTensor& weights);
Tensor merge_moments(const Tensor& moments);
Tensor batch_normalize(const Tensor& values, const Tensor& moments, const OptTensor& mask, int64_t mode, double eps);

// weights [B], valid [B] (bool), scale [].
std::tuple<Tensor, Tensor, Tensor> question_weights(const Tensor& rewards, const Tensor& group, const OptTensor& lengths,
                                                    const OptTensor& main_rewards, double temperature, double tol,
                                                    bool zero_accuracy_as_easy);

// advantages [B], kept [B] (bool), masked_pairs [B] (int64).
std::tuple<Tensor, Tensor, Tensor> pair_masked_advantages(const Tensor& rewards, const Tensor& scores, const Tensor& group,
                                                          double tau, int64_t mode, int64_t level, double eps, int64_t ddof,
                                                          int64_t sigma, bool renormalise);

}  // namespace prefkern
