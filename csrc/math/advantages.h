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
#include "core/elementary.h"

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
PK_HD double group_mean(double sum, double n) { return sum / n + 0.0 * sum; }

// Second step of the mean, for rewards whose sum rounds: the deviations from `mean` are small, and exact where they cancel.
PK_HD double refine_mean(double mean, double sum_of_deviations, double n) { return mean + sum_of_deviations / n; }

// n as a number. No branches: over an array of groups this becomes vector code.
PK_HD GroupMoments group_moments(const AdvantageRule& rule, double n, double mean, double sum_sq_deviations) {
  const bool grpo = rule.estimator == AdvantageEstimator::grpo, rloo = rule.estimator == AdvantageEstimator::rloo;
  const bool reward = (n == 1) & (rule.singleton == SingletonRule::reward);
  const double others = n > 1 ? n - 1 : 1.0;
  const double std = vsqrt(sum_sq_deviations / others);
  const double divisor = grpo ? (reward ? 1.0 : std) + rule.eps : rloo ? others : 1.0;
  const double scale = (rloo ? n : 1.0) / divisor;
  const bool equal = (sum_sq_deviations == 0) & !reward;
  return {mean, std, reward ? 0.0 * mean : mean, equal ? 0.0 : scale};  // eps may be 0; NaN stays NaN
}

PK_HD double advantage(const GroupMoments& g, double reward) { return (reward - g.center) * g.scale; }

}  // namespace PK_ISA
}  // namespace prefkern
