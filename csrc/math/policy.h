// Token-level policy objectives, to be minimised, and the penalty that keeps a policy near its reference.
//
// With d = logp - old_logp, rho = exp(clamp(d, -C, C)) and the advantage A, a constant:
//   clip  l = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high)), and l = min(l, -A c) where A < 0, if a dual bound c is set
//         dl/dlogp = -A rho; 0 where a bound of rho, or of d, is passed. At the bound itself the gradient flows.
// In other words l = -A min(max(rho, lower), upper): the bounds are 1 - eps_low and c where A < 0, else 0 and 1 + eps_high.
//   k3    e^x - 1 - x with x = ref_logp - logp,  dk3/dlogp = 1 - e^x = -(k3 + x)
//
// V is float, double, or a vector of float, for which comparisons and ?: work lane by lane.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class PolicyKind : int32_t { clip = 0 };
enum class KlKind : int32_t { none = 0, k3 = 1 };
enum class Aggregation : int32_t { token_mean = 0, seq_mean_token_mean = 1 };

// Infinity stands for a bound that is not wanted.
struct PolicyOptions {
  PolicyKind kind = PolicyKind::clip;
  KlKind kl = KlKind::none;
  Aggregation agg = Aggregation::token_mean;
  double eps_low = 0.2, eps_high = 0.2, dual_clip = __builtin_inf(), beta = 0, ratio_clamp = 20;
};

// What is gathered over tokens: sums, and at the end of the list a minimum and a maximum.
enum PolicySum : int {
  kSumLoss,
  kSumLow,
  kSumHigh,
  kSumDual,
  kSumRatio,
  kSumApproxKl,
  kSumKl,
  kSumTokens,
  kSumSequences,
  kMinRatio,
  kMaxRatio,
  kPolicySums
};
// Metrics, in the order in which they are returned.
enum PolicyMetric : int {
  kClipFractionLow,
  kClipFractionHigh,
  kClipFractionDual,
  kRatioMean,
  kRatioMin,
  kRatioMax,
  kApproxKl,
  kKl,
  kTokens,
  kPolicyMetrics
};

inline namespace PK_ISA {

// The options in the form a token needs.
template <class S> struct PolicyRule {
  S low, high, dual, clamp, ratio_floor, ratio_ceiling, beta;
};

template <class S> PK_HD PolicyRule<S> policy_rule(const PolicyOptions& o) {
  const S clamp = S(o.ratio_clamp);
  return {S(1 - o.eps_low), S(1 + o.eps_high), S(o.dual_clip), clamp, vexp(-clamp), vexp(clamp), S(o.beta)};
}

template <class V> using LanesIf = decltype(V() < V());  // what ?: takes: bool, or one integer per lane

template <class V> struct PolicyTerm {
  V loss, grad;                   // grad: dloss/dlogp
  LanesIf<V> low, high, dual;     // whether that bound holds the loss
  V ratio, approx_kl, kl;
};

// e^x, and where |x| < kExpTail also tail = e^x - 1 - x = x^2 (1/2! + x/3! + ...). Vectors on the CPU have their own.
template <class V> PK_HD V exp_tail(V x, V& tail) {
  constexpr int terms = sizeof(V) == 8 ? 13 : 6;
  constexpr double inverse_factorial[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,     1.0 / 720,
                                          1.0 / 5040,      1.0 / 40320,      1.0 / 362880,     1.0 / 3628800, 1.0 / 39916800,
                                          1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
  V series = V(inverse_factorial[terms - 1]);
  for (int k = terms - 2; k >= 0; k--) series = series * x + V(inverse_factorial[k]);
  tail = x * x * series;
  return vexp(x);
}

// e^x - 1 - x. Subtracting loses nothing where the result is not small, and where it is there is `tail`: relative error
// <= 3e-6 in float, 1e-14 in double.
template <class V> PK_HD V exp_minus_1_minus(V x, V exp_x, V tail) {
  using S = typename Lanes<V>::Scalar;
  return (x < S(kExpTail)) & (x > S(-kExpTail)) ? tail : (exp_x - S(1)) - x;
}

template <class V, class S> PK_HD void clip_objective(const PolicyRule<S>& rule, V a, V ratio, PolicyTerm<V>& t) {
  const V none = splat<V>(0);
  const V lower = a < S(0) ? splat<V>(rule.low) : none, upper = a < S(0) ? splat<V>(rule.dual) : splat<V>(rule.high);
  const LanesIf<V> below = ratio < lower;
  const LanesIf<V> above = ratio > upper;
  t.loss = -a * vmin(upper, vmax(lower, ratio));  // a ratio that is NaN passes both
  t.grad = below | above ? a - a : -a * ratio;    // 0, but NaN for an advantage that is not finite
  t.low = below;
  t.high = above & (a > S(0));
  t.dual = above & (a < S(0));
}

// to_ref = ref_logp - logp; not looked at without a reference.
template <PolicyKind KIND, KlKind KL, class V, class S>
PK_HD PolicyTerm<V> policy_term(const PolicyRule<S>& rule, V d, V a, V to_ref) {
  PolicyTerm<V> t;
  V tail;
  const V exp_d = exp_tail(d, tail);
  t.ratio = vmin(splat<V>(rule.ratio_ceiling), vmax(splat<V>(rule.ratio_floor), exp_d));
  if (KIND == PolicyKind::clip) clip_objective(rule, a, t.ratio, t);
  t.grad = (d > rule.clamp) | (d < -rule.clamp) ? a - a : t.grad;
  t.approx_kl = exp_minus_1_minus(d, exp_d, tail);
  t.kl = splat<V>(0);
  if (KL == KlKind::k3) {
    const V exp_x = exp_tail(to_ref, tail);
    t.kl = exp_minus_1_minus(to_ref, exp_x, tail);
    if (rule.beta != 0) {  // else an infinite penalty would be 0 * inf
      t.loss = t.loss + t.kl * rule.beta;
      t.grad = t.grad - (t.kl + to_ref) * rule.beta;
    }
  }
  return t;
}

// Weight of a sequence's tokens before the global division.
template <class S> PK_HD S sequence_weight(Aggregation agg, double tokens) {
  return agg == Aggregation::token_mean ? S(1) : S(1 / (tokens + 1e-8));
}

// Loss, metrics, and what the gradient is to be multiplied by. An empty mask gives zeros. A count that is NaN stands for
// a layout that is wrong and makes everything NaN.
template <class S> PK_HD void policy_finish(const double* sum, Aggregation agg, S* loss, S* metrics, S* inverse_norm) {
  const double tokens = sum[kSumTokens], norm = agg == Aggregation::token_mean ? tokens : sum[kSumSequences];
  const double per_token = tokens == 0 ? 0.0 : 1 / tokens;
  *loss = norm == 0 ? S(0) : S(sum[kSumLoss] / norm);
  *inverse_norm = norm == 0 ? S(0) : S(1 / norm);
  const double ratio_mean = sum[kSumRatio] * per_token;
  const bool plain = tokens > 0 && ratio_mean == ratio_mean;  // a minimum or maximum alone does not see NaN
  metrics[kClipFractionLow] = S(sum[kSumLow] * per_token);
  metrics[kClipFractionHigh] = S(sum[kSumHigh] * per_token);
  metrics[kClipFractionDual] = S(sum[kSumDual] * per_token);
  metrics[kRatioMean] = S(ratio_mean);
  metrics[kRatioMin] = plain ? S(sum[kMinRatio]) : S(ratio_mean);
  metrics[kRatioMax] = plain ? S(sum[kMaxRatio]) : S(ratio_mean);
  metrics[kApproxKl] = S(sum[kSumApproxKl] * per_token);
  metrics[kKl] = S(sum[kSumKl] * per_token);
  metrics[kTokens] = S(tokens);
}

// The gradient of one token: its unnormalised gradient g times upstream / norm. What was 0 stays 0 whatever comes from
// upstream, except that a wrong layout (inverse_norm NaN) spares nothing.
template <class V, class S> PK_HD V policy_grad(V g, S upstream, S inverse_norm) {
  if (inverse_norm != inverse_norm) return splat<V>(inverse_norm);
  return g == S(0) ? splat<V>(0) : g * (upstream * inverse_norm);
}

}  // namespace PK_ISA
}  // namespace prefkern
