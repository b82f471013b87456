// Advantages of rewards against the others of their group: mean m, standard deviation s, size n.
//   grpo              A = (r - m) / (s + eps)
//   dr_grpo           A = r - m
//   rloo              A = r - (n m - r) / (n - 1) = n / (n - 1) (r - m)
//   opo               A = r - sum(l r) / sum(l), l the lengths
//   mad               A = n (r - m) / (sum |r - m| + eps)
//   pass_at_k         A = (max - second) / (s + eps) for the best, the first of equals; 0 for the others
//   pass_at_k_no_std  the same without the divisor
// All are (r - center) * scale. A group of one: 0; or, with singleton = reward, the same formulas with m = 0 and s = 1; or,
// with calibrate, what they give with the virtual samples: `virtual_count` more rewards of `virtual_value` that join m and s
// of grpo and dr_grpo, in closed form.
//
// The variance is that of the deviations from the mean, never E[r^2] - m^2, and everything is summed in double. So a group
// of equal float rewards c adds up to n c without rounding, its mean is c, its deviations are 0, and sum (r - m)^2 == 0
// exactly when max == min. For double rewards refine_mean gives the same; sums of several rewards compare max and min.
//
// Then what a whole batch does to them (Moments), the difficulty of questions, and pairs of samples.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class AdvantageEstimator : int32_t { grpo = 0, dr_grpo, rloo, opo, mad, pass_at_k, pass_at_k_no_std };
enum class SingletonRule : int32_t { zero = 0, reward = 1, calibrate = 2 };
enum class NanRule : int32_t { error = 0, zero = 1, ignore = 2 };
enum class BatchRule : int32_t { none = 0, std, seq, token, nonzero };

struct AdvantageRule {
  AdvantageEstimator estimator = AdvantageEstimator::grpo;
  SingletonRule singleton = SingletonRule::zero;
  int32_t ddof = 1;
  double eps = 1e-6;
  double virtual_value = 1, virtual_count = 0;
};

inline namespace PK_ISA {

constexpr double kInfinity = __builtin_huge_val();

// A group's statistics, and its advantages as (r - center) * scale. V: double, or a vector with a group in each lane.
template <class V> struct MomentsOf {
  V mean, std, center, scale;
};
using GroupMoments = MomentsOf<double>;

// NaN when the sum is infinite: no plausible number comes of an infinite reward.
template <class V> PK_HD V group_mean(V sum, V n) { return sum / n + 0.0 * sum; }

// Second step of the mean, for rewards whose sum rounds: the deviations from `mean` are small, and exact where they cancel.
PK_HD double refine_mean(double mean, double sum_of_deviations, double n) { return mean + sum_of_deviations / n; }

// max(n - ddof, 1)
template <class V> PK_HD V freedom(V n, double ddof) {
  const V free = n - ddof, one = V{} + 1.0;
  return free > 1.0 ? free : one;
}

// grpo, dr_grpo and rloo without virtual samples. n as a number. No branches: over an array of groups this becomes vector
// code.
template <class V> PK_HD MomentsOf<V> group_moments(const AdvantageRule& rule, V n, V mean, V sum_sq_deviations) {
  const bool grpo = rule.estimator == AdvantageEstimator::grpo, rloo = rule.estimator == AdvantageEstimator::rloo;
  const bool keep = rule.singleton == SingletonRule::reward;  // what a group of one gets
  const V zero = V{}, one = V{} + 1.0, no_mean = 0.0 * mean;  // NaN stays NaN
  const V std = vsqrt(sum_sq_deviations * (1.0 / freedom(n, rule.ddof))), own_std = n == 1.0 ? one : std;
  const V divisor = grpo ? (keep ? own_std : std) + rule.eps : rloo ? freedom(n, 1) : one;
  const V scale = (rloo ? n : one) / divisor;
  const V spread = sum_sq_deviations == 0.0 ? zero : scale;  // eps may be 0
  const V kept_center = n == 1.0 ? no_mean : mean, kept_scale = n == 1.0 ? scale : spread;
  return {mean, std, keep ? kept_center : mean, keep ? kept_scale : spread};
}

// grpo and dr_grpo with virtual samples.
PK_HD GroupMoments virtual_moments(const AdvantageRule& rule, double n, double mean, double sum_sq_deviations) {
  const GroupMoments plain = group_moments(rule, n, mean, sum_sq_deviations);
  const bool apply = (n != 1) | (rule.singleton == SingletonRule::calibrate);
  const double total = n + rule.virtual_count, towards = rule.virtual_value - mean;
  const double squares = sum_sq_deviations + towards * (n * rule.virtual_count / total) * towards;
  const double std = vsqrt(squares / freedom(total, rule.ddof));
  const double scale = rule.estimator == AdvantageEstimator::grpo ? 1.0 / (std + rule.eps) : 1.0;
  return {mean, plain.std, apply ? mean + towards * (rule.virtual_count / total) : plain.center,
          apply ? (squares == 0 ? 0.0 : scale) : plain.scale};
}

PK_HD double advantage(const GroupMoments& g, double reward) { return (reward - g.center) * g.scale; }

// ---- any estimator --------------------------------------------------------------------------------------------------
// What a group adds up to. Only rewards that take part count, all but in `rows`.
struct GroupSums {
  double rows = 0, n = 0, sum = 0, low = kInfinity, high = -kInfinity;  // first pass
  double tokens = 0, weighted = 0;                                      // opo: sum l, sum l r
  double squares = 0, deviations = 0;                                   // second pass: sum (r - m)^2, sum |r - m|
  double second = -kInfinity;                                           // pass_at_k: the largest but the best
};

PK_HD bool finds_best(AdvantageEstimator e) {
  return e == AdvantageEstimator::pass_at_k || e == AdvantageEstimator::pass_at_k_no_std;
}
PK_HD bool group_is_equal(const GroupSums& s) { return s.low == s.high && 0.0 * s.sum == 0; }
PK_HD double group_mean(const GroupSums& s) { return group_is_equal(s) ? s.low : group_mean(s.sum, s.n); }

// For pass_at_k the result is that of the best row.
PK_HD GroupMoments group_estimate(const AdvantageRule& rule, const GroupSums& s) {
  const double mean = group_mean(s), squares = group_is_equal(s) ? 0.0 : s.squares;
  GroupMoments g = rule.virtual_count > 0 ? virtual_moments(rule, s.n, mean, squares) : group_moments(rule, s.n, mean, squares);
  const bool alone = s.n == 1, equal = squares == 0;
  if (s.n < 2 && s.rows > 1) {  // the others are NaN
    g.scale = 0;
    return g;
  }
  const double divided = 1.0 / ((alone ? 1.0 : g.std) + rule.eps);  // for groups of one that keep their reward
  switch (rule.estimator) {
    case AdvantageEstimator::opo:
      if (!equal) g.center = s.weighted / s.tokens + 0.0 * mean;
      break;
    case AdvantageEstimator::mad:
      if (!equal) g.scale = s.n / (s.deviations + rule.eps);
      else if (g.scale != 0) g.scale = divided;
      break;
    case AdvantageEstimator::pass_at_k:
    case AdvantageEstimator::pass_at_k_no_std:
      if (!alone) g.center = s.second + 0.0 * mean;
      if (rule.estimator == AdvantageEstimator::pass_at_k && g.scale != 0) g.scale = divided;
      break;
    default: break;
  }
  return g;
}

// ---- a batch --------------------------------------------------------------------------------------------------------
// Number (or weight), mean, and sum of squares about the mean.
struct Moments {
  double n = 0, mean = 0, squares = 0;
};

// Of two disjoint parts (Chan, Golub and LeVeque).
PK_HD Moments merge(const Moments& a, const Moments& b) {
  const double n = a.n + b.n, d = b.mean - a.mean;
  if (!(b.n != 0)) return a;
  if (!(a.n != 0)) return b;
  return {n, a.mean + d * (b.n / n), a.squares + b.squares + d * d * (a.n * b.n / n)};
}

enum class MomentsMode : int32_t { seq = 0, token = 1 };

// Values turn into (v - center) * scale:
//   seq    center mean, scale 1 / (std + eps), std with ddof 1
//   token  center mu = sum v / (n + 1e-8), scale 1 / sqrt(var + eps), var = sum (v - mu)^2 / (n + 1e-8) n / (n - 1)
struct Affine {
  double center, scale;
};
PK_HD Affine batch_affine(MomentsMode mode, const Moments& m, double eps) {
  if (mode == MomentsMode::token) {
    if (!(m.n >= 2)) return {0, __builtin_nan("")};
    const double mu = m.n * m.mean / (m.n + 1e-8), shift = m.mean - mu;
    const double var = (m.squares + m.n * shift * shift) / (m.n + 1e-8) * (m.n / (m.n - 1));
    const double divisor = vsqrt(var + eps);
    return {mu, divisor == 0 ? 0.0 : 1.0 / divisor};
  }
  const double divisor = vsqrt(m.squares / freedom(m.n, 1)) + eps;
  return {m.mean, divisor == 0 ? 0.0 : 1.0 / divisor};
}

// What the batch rule of group_advantages takes the moments of (of the advantage a and the combined reward r), with which
// weight, and what it makes of them.
PK_HD double batch_value(BatchRule rule, double a, double r) {
  return rule == BatchRule::std ? r : rule == BatchRule::nonzero ? double(r != 0) : a;
}
PK_HD Affine batch_affine(BatchRule rule, const Moments& m, double eps) {
  if (rule == BatchRule::nonzero) {  // B / max(1, those that are not 0)
    const double nonzero = double(int64_t(m.n * m.mean + 0.5));
    return {0.0 * m.mean, m.n / (nonzero > 1 ? nonzero : 1.0)};
  }
  Affine f = batch_affine(rule == BatchRule::token ? MomentsMode::token : MomentsMode::seq, m, eps);
  if (rule == BatchRule::std) f.center = 0.0 * f.center;  // centred by group already
  return f;
}

// ---- questions ------------------------------------------------------------------------------------------------------
// The exponent of a valid question's weight, from the mean of its main rewards.
PK_HD double question_difficulty(double mean, double temperature, double tol, bool zero_as_easy) {
  const bool zero = zero_as_easy && mean <= tol && -mean <= tol;
  return -(zero ? 1.0 : mean) / temperature;
}

// ---- pairs ----------------------------------------------------------------------------------------------------------
enum class PairMode : int32_t { gap = 0, abs = 1 };

// Whether two samples of one group with different rewards lie far enough apart.
PK_HD bool pair_counts(PairMode mode, double difference, double gap, double tau) {
  const double distance = mode == PairMode::gap ? (difference > 0 ? gap : -gap) : (gap < 0 ? -gap : gap);
  return distance >= tau;
}

}  // namespace PK_ISA
}  // namespace prefkern
