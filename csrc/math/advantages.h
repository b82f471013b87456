// Advantages of rewards against the others of their group: mean m, standard deviation s (ddof 1), size n.
//   grpo     A = (r - m) / (s + eps)
//   dr_grpo  A = r - m
//   rloo     A = r - (n m - r) / (n - 1) = n / (n - 1) (r - m)
// A group of one: 0, or, with singleton = reward, the same formulas with m = 0 and s = 1 (rloo: r).
//
// The variance is that of the deviations from the mean, never E[r^2] - m^2, and everything is summed in double. So a group
// of equal float rewards c adds up to n c without rounding, its mean is c, its deviations are 0, and sum (r - m)^2 == 0
// exactly when max == min. For double rewards refine_mean gives the same.
#pragma once
#include "core/common.h"

namespace prefkern {

enum class AdvantageEstimator : int32_t { grpo = 0, dr_grpo = 1, rloo = 2 };
enum class SingletonRule : int32_t { zero = 0, reward = 1 };

struct AdvantageRule {
  AdvantageEstimator estimator = AdvantageEstimator::grpo;
  SingletonRule singleton = SingletonRule::zero;
  double eps = 1e-6;
};

inline namespace PK_ISA {

// A group's statistics, and its advantages as (r - center) * scale.
struct GroupMoments {
  double mean, std, center, scale;
};

// NaN when the sum is infinite: no plausible number comes of an infinite reward.
PK_HD double group_mean(double sum, int64_t n) { return sum / double(n) + 0.0 * sum; }

// Second step of the mean, for rewards whose sum rounds: the deviations from `mean` are small, and exact where they cancel.
PK_HD double refine_mean(double mean, double sum_of_deviations, int64_t n) { return mean + sum_of_deviations / double(n); }

PK_HD GroupMoments group_moments(const AdvantageRule& rule, int64_t n, double mean, double sum_sq_deviations) {
  const double std = n > 1 ? __builtin_sqrt(sum_sq_deviations / double(n - 1)) : sum_sq_deviations;
  GroupMoments g{mean, std, mean, 1.0};
  const bool reward = n == 1 && rule.singleton == SingletonRule::reward;
  if (reward) g.center = 0.0 * mean;  // NaN stays NaN
  switch (rule.estimator) {
    case AdvantageEstimator::grpo: g.scale = 1.0 / ((reward ? 1.0 : std) + rule.eps); break;
    case AdvantageEstimator::dr_grpo: break;
    case AdvantageEstimator::rloo: g.scale = n > 1 ? double(n) / double(n - 1) : 1.0; break;
  }
  if (sum_sq_deviations == 0 && !reward) g.scale = 0.0;  // eps may be 0
  return g;
}

PK_HD double advantage(const GroupMoments& g, double reward) { return (reward - g.center) * g.scale; }

}  // namespace PK_ISA
}  // namespace prefkern
