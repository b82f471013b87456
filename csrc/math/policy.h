// Token-level policy objectives, to be minimised, and the penalty that keeps a policy near its reference.
//
// With d = logp - old_logp and the advantage A, a constant, rho = exp(clamp(lr, clamp_low, clamp_high)) where the log-ratio
// lr is d, or a mean of the sequence (gspo, gspo_token, gmpo). Where a bound of rho, of lr or of the penalty is passed, its
// gradient is 0; at the bound itself it flows.
//   clip        l = -A min(max(rho, lower), upper), dl/dlogp = -A rho. The bounds are 1 - eps_low and dual_clip where A < 0,
//               else 0 and 1 + eps_high; delta, a bound of the unclipped ratio, only moves the upper ones
//   cispo       l = -w A logp, dl/dlogp = -w A, with the constant w = clip(rho, 1 - eps_low, 1 + eps_high)
//   reinforce   l = -A logp, dl/dlogp = -A
//   sapo        l = -A (4 / tau) q, dl/dlogp = -4 A q (1 - q) rho, with q = sigmoid(tau (rho - 1))
//   gspo        clip with lr the mean of d; a loss per sequence: every token has it, and an equal part of its gradient
//   gspo_token  the same value; dl/dlogp = -A rho
//   gmpo        l = -A rho, with lr the mean of d bounded on the side that A pushes to; gradient as for gspo
//   anchors     l = -A q, dl/dlogp = -A q (1 - q), with q = p / (p + g) = sigmoid(logp - log g); or reinforce ("nll")
// Penalty, with x = ref_logp - logp:
//   k1 = -x, abs = |x|, k2 = x^2 / 2, k3 = e^x - 1 - x; dk3/dlogp = 1 - e^x = -(k3 + x). "Plus" takes the gradient of k2, -x.
//
// V is float, double, or a vector of float, for which comparisons and ?: work lane by lane.
#pragma once
#include "math/exponential.h"

namespace prefkern {

// The anchors are what a sequence of an unknown behaviour policy has instead of the kind of the call.
enum class PolicyKind : int32_t { clip, cispo, reinforce, sapo, gspo, gspo_token, gmpo, none, anchor_shaped, anchor_nll };
enum class KlKind : int32_t { none, k1, abs, k2, k3, k1_plus, abs_plus, k3_plus };
enum class Aggregation : int32_t {
  token_mean,
  seq_mean_token_mean,
  seq_mean_token_sum,
  seq_mean_token_sum_norm,
  token_sum,
  trl_grpo,
  trl_dr_grpo
};
// What a kernel is compiled for: no penalty, plain k3, or whatever the options say.
enum class Penalty { none, k3, any };

constexpr int32_t kPolicyKinds = 8, kKlKinds = 8, kAggregations = 7;  // that a caller may choose from

// Infinity stands for a bound that is not wanted, a negative norm for the count of what is there.
struct PolicyOptions {
  PolicyKind kind = PolicyKind::clip;
  KlKind kl = KlKind::none;
  Aggregation agg = Aggregation::token_mean;
  bool kl_ratio = false, anchor_nll = false;
  double eps_low = 0.2, eps_high = 0.2, dual_clip = __builtin_inf(), delta = __builtin_inf(), tau_pos = 1, tau_neg = 1.05;
  double beta = 0, kl_clamp = __builtin_inf(), clamp_low = -20, clamp_high = 20, anchor_gamma = 0.1, scale = 1, norm = -1;
};

// What is gathered over tokens: sums, and at the end of the list a minimum and a maximum. Anchors have no ratio.
enum PolicySum : int {
  kSumLoss,
  kSumLow,
  kSumHigh,
  kSumDual,
  kSumRatio,
  kSumApproxKl,
  kSumKl,
  kSumEntropy,
  kSumTokens,
  kSumRatioTokens,
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
  kEntropy,
  kTokens,
  kSequences,
  kPolicyMetrics
};
// What a sequence's ratio is made of: sums over its tokens.
enum PolicyRowSum : int { kRowLogRatio, kRowWeight, kRowKl, kRowTokens, kPolicyRowSums };

inline namespace PK_ISA {

PK_HD constexpr bool ratio_of_sequence(PolicyKind k) {
  return k == PolicyKind::gspo || k == PolicyKind::gspo_token || k == PolicyKind::gmpo;
}
// Whether the loss is one of the sequence, so that each token has an equal part of its gradient.
PK_HD constexpr bool loss_of_sequence(PolicyKind k) { return k == PolicyKind::gspo || k == PolicyKind::gmpo; }
PK_HD constexpr bool is_anchor(PolicyKind k) { return k == PolicyKind::anchor_shaped || k == PolicyKind::anchor_nll; }

// The options in the form a token needs: bounds of the ratio (low, high, dual) and of its logarithm.
template <class S> struct PolicyRule {
  S low, high, dual, clamp_low, clamp_high, ratio_floor, ratio_ceiling, beta;
  S eps_low, eps_high, dual_clip, delta, tau_pos, tau_neg, kl_clamp, log_gamma;
  KlKind kl;
  bool kl_ratio;
};

PK_HD bool bounds_valid(PolicyKind kind, double eps_low, double eps_high) {
  const double most = kind == PolicyKind::gmpo ? 1.7976931348623157e308 : 1.0;  // gmpo's are bounds of a logarithm
  return eps_low >= 0 && eps_low <= most && eps_high >= 0 && eps_high <= 1.7976931348623157e308;
}

template <class V, class S>
PK_HD void ratio_bounds(V eps_low, V eps_high, S dual_clip, S delta, V& low, V& high, V& dual) {
  const V limit = splat<V>(delta), top = eps_high + S(1);
  low = splat<V>(1) - eps_low;
  high = vmin(limit, top);
  dual = vmin(splat<V>(dual_clip), vmax(limit, top));
}

template <class S> PK_HD PolicyRule<S> policy_rule(const PolicyOptions& o) {
  PolicyRule<S> r;
  r.eps_low = S(o.eps_low), r.eps_high = S(o.eps_high), r.dual_clip = S(o.dual_clip), r.delta = S(o.delta);
  r.clamp_low = S(o.clamp_low), r.clamp_high = S(o.clamp_high);
  r.ratio_floor = vexp(r.clamp_low), r.ratio_ceiling = vexp(r.clamp_high);
  r.tau_pos = S(o.tau_pos), r.tau_neg = S(o.tau_neg);
  r.beta = S(o.beta), r.kl_clamp = S(o.kl_clamp), r.log_gamma = vlog2(S(o.anchor_gamma)) * S(0.69314718055994531);
  r.kl = o.kl, r.kl_ratio = o.kl_ratio;
  ratio_bounds<S>(r.eps_low, r.eps_high, r.dual_clip, r.delta, r.low, r.high, r.dual);
  r.low = S(1 - o.eps_low);  // rounded once
  return r;
}

// What a token brings along. Where not own_bounds, eps_low and eps_high are those of the rule.
template <class V> struct PolicyToken {
  V logp, d, advantage, to_ref;  // to_ref = ref_logp - logp; not looked at without a reference
  V weight, eps_low, eps_high;
  bool own_bounds;
};

// What a sequence brings along: its log-ratio before the clamp, and parts of a token in the gradient of the log-ratio,
// times what the sequence's loss (share) or its penalty (kl_share) adds up to.
template <class S> struct PolicyRow {
  S log_ratio, ratio, share, kl_share;
};

template <class V> struct PolicyTerm {
  V loss, grad;                   // grad: dloss/dlogp
  LanesIf<V> low, high, dual;     // whether that bound holds the loss
  V ratio, approx_kl, kl;
};

// Estimate of KL(policy || reference) and its derivative by logp.
template <Penalty PENALTY, class V, class S> PK_HD void kl_term(const PolicyRule<S>& rule, V x, V& value, V& grad) {
  V tail;
  if (PENALTY == Penalty::k3 || rule.kl == KlKind::k3 || rule.kl == KlKind::k3_plus) {
    const V exp_x = exp_tail(x, tail);
    value = exp_minus_1_minus(x, exp_x, tail);
    grad = -(value + x);
  } else if (rule.kl == KlKind::k1 || rule.kl == KlKind::k1_plus) {
    value = -x;
    grad = x == x ? splat<V>(1) : x;
  } else if (rule.kl == KlKind::abs || rule.kl == KlKind::abs_plus) {
    value = vmax(x, -x);
    grad = x < S(0) ? splat<V>(1) : (x > S(0) ? splat<V>(-1) : x);
  } else {
    value = x * x * S(0.5);
    grad = -x;
  }
  if (PENALTY == Penalty::k3) return;
  const V most = splat<V>(rule.kl_clamp);
  grad = (value > most) | (value < -most) ? splat<V>(0) : grad;
  value = vmin(most, vmax(-most, value));  // NaN passes both
  if (rule.kl >= KlKind::k1_plus) grad = -x;
}

template <class V, class S> PK_HD void clip_objective(V a, V ratio, V low, V high, V dual, PolicyTerm<V>& t) {
  const V none = splat<V>(0);
  const V lower = a < S(0) ? low : none, upper = a < S(0) ? dual : high;
  const LanesIf<V> below = ratio < lower;
  const LanesIf<V> above = ratio > upper;
  t.loss = -a * vmin(upper, vmax(lower, ratio));  // a ratio that is NaN passes both
  t.grad = below | above ? a - a : -a * ratio;    // 0, but NaN for an advantage that is not finite
  t.low = below;
  t.high = above & (a > S(0));
  t.dual = above & (a < S(0));
}

// What a token adds to its sequence's log-ratio.
template <PolicyKind KIND, class V> PK_HD V sequence_log_ratio(V d, V a, V eps_low, V eps_high) {
  using S = typename Lanes<V>::Scalar;
  if (KIND != PolicyKind::gmpo) return d;
  const V bounded = a > S(0) ? (d > eps_high ? eps_high : d) : (d < -eps_low ? -eps_low : d);
  return a == S(0) ? splat<V>(0) : bounded;
}

template <class S> PK_HD PolicyRow<S> policy_row(PolicyKind kind, const double* sums) {
  const double n = sums[kRowTokens], inverse = kind == PolicyKind::gmpo ? 1 / (n + 1e-8) : 1 / (n < 1 ? 1 : n);
  const S log_ratio = S(sums[kRowLogRatio] * inverse);
  return {log_ratio, vexp(log_ratio), S(sums[kRowWeight] * inverse), S(sums[kRowKl] * inverse)};
}

// GENERAL: with weights, bounds of its own and a penalty that the ratio multiplies; `row` is looked at by sequence kinds.
template <PolicyKind KIND, Penalty PENALTY, bool GENERAL, class V, class S>
PK_HD PolicyTerm<V> policy_term(const PolicyRule<S>& rule, const PolicyRow<S>& row, const PolicyToken<V>& in) {
  constexpr bool of_sequence = ratio_of_sequence(KIND);
  const V a = in.advantage, d = in.d, zero = splat<V>(0);
  PolicyTerm<V> t = {zero, zero, LanesIf<V>(), LanesIf<V>(), LanesIf<V>(), zero, zero, zero};
  LanesIf<V> outside = LanesIf<V>();
  if (!is_anchor(KIND)) {
    V tail;
    const V exp_d = exp_tail(d, tail), lr = of_sequence ? splat<V>(row.log_ratio) : d;
    t.approx_kl = exp_minus_1_minus(d, exp_d, tail);
    t.ratio = vmin(splat<V>(rule.ratio_ceiling), vmax(splat<V>(rule.ratio_floor), of_sequence ? splat<V>(row.ratio) : exp_d));
    outside = (lr > rule.clamp_high) | (lr < rule.clamp_low);
  }
  V low = splat<V>(rule.low), high = splat<V>(rule.high), dual = splat<V>(rule.dual);
  if (GENERAL && in.own_bounds) ratio_bounds(in.eps_low, in.eps_high, rule.dual_clip, rule.delta, low, high, dual);
  if (KIND == PolicyKind::clip || KIND == PolicyKind::gspo || KIND == PolicyKind::gspo_token) {
    clip_objective<V, S>(a, t.ratio, low, high, dual, t);
    t.grad = outside ? a - a : t.grad;
  } else if (KIND == PolicyKind::cispo) {
    t.low = t.ratio < low;
    t.high = t.ratio > high;
    t.grad = -a * vmin(high, vmax(low, t.ratio));
    t.loss = t.grad * in.logp;
  } else if (KIND == PolicyKind::reinforce || KIND == PolicyKind::anchor_nll) {
    t.grad = -a;
    t.loss = t.grad * in.logp;
  } else if (KIND == PolicyKind::sapo) {
    const V tau = a > S(0) ? splat<V>(rule.tau_pos) : splat<V>(rule.tau_neg);
    V gate, slope;
    sigmoid(tau * (t.ratio - S(1)), gate, slope);
    t.loss = a * S(-4) / tau * gate;
    t.grad = (slope == S(0)) | outside ? a - a : a * S(-4) * slope * t.ratio;  // an infinite ratio has slope 0
  } else if (KIND == PolicyKind::gmpo) {
    t.low = (a < S(0)) & (d < -in.eps_low);
    t.high = (a > S(0)) & (d > in.eps_high);
    t.loss = -a * t.ratio;
    t.grad = t.low | t.high | outside ? a - a : t.loss;
  } else if (KIND == PolicyKind::anchor_shaped) {
    V q, slope;
    sigmoid(in.logp - rule.log_gamma, q, slope);
    t.loss = -a * q;
    t.grad = -a * slope;
  }
  if (GENERAL && KIND != PolicyKind::none) {
    t.loss = t.loss * in.weight;
    t.grad = t.grad * (loss_of_sequence(KIND) ? splat<V>(row.share) : in.weight);
  }
  if (PENALTY == Penalty::none || (PENALTY == Penalty::any && rule.kl == KlKind::none)) return t;
  V grad;
  kl_term<PENALTY>(rule, in.to_ref, t.kl, grad);
  if (rule.beta == 0) return t;  // else an infinite penalty would be 0 * inf
  if (GENERAL && rule.kl_ratio && !is_anchor(KIND)) {
    t.loss = t.loss + t.kl * t.ratio * rule.beta;
    const V by_ratio = outside ? zero : t.ratio * (loss_of_sequence(KIND) ? splat<V>(row.kl_share) : t.kl);
    t.grad = t.grad + (grad * t.ratio + by_ratio) * rule.beta;
  } else {
    t.loss = t.loss + t.kl * rule.beta;
    t.grad = t.grad + grad * rule.beta;
  }
  return t;
}

// Weight of a sequence's tokens before the global division.
template <class S> PK_HD S sequence_weight(Aggregation agg, double tokens) {
  if (agg == Aggregation::seq_mean_token_mean) return S(1 / (tokens + 1e-8));
  return agg == Aggregation::trl_grpo ? S(1 / (tokens < 1 ? 1 : tokens)) : S(1);
}
PK_HD bool weight_needs_count(Aggregation agg) {
  return agg == Aggregation::seq_mean_token_mean || agg == Aggregation::trl_grpo;
}

// What the sum of losses is divided by. `norm`, where given (options.norm, or *norm), replaces the count in it.
PK_HD double policy_norm(const double* sum, const PolicyOptions& o, int64_t sequences, bool given, double norm) {
  const double tokens = sum[kSumTokens], nan = __builtin_nan("");
  if (tokens != tokens || (given && !(norm >= 0 && norm <= 1.7976931348623157e308))) return nan;
  double count = norm;
  if (!given) {
    switch (o.agg) {
      case Aggregation::token_mean: count = tokens; break;
      case Aggregation::token_sum: count = 1; break;
      case Aggregation::trl_grpo:
      case Aggregation::trl_dr_grpo: count = double(sequences); break;
      default: count = sum[kSumSequences];
    }
  }
  return o.agg == Aggregation::seq_mean_token_sum_norm || o.agg == Aggregation::trl_dr_grpo ? count * o.scale : count;
}

// Loss, metrics, and what the gradient is to be multiplied by. An empty mask gives zeros. A count that is NaN stands for
// a layout that is wrong and makes everything NaN.
template <class S> PK_HD void policy_finish(const double* sum, double norm, S* loss, S* metrics, S* inverse_norm) {
  const double tokens = sum[kSumTokens], ratios = sum[kSumRatioTokens];
  const double per_token = tokens == 0 ? 0.0 : 1 / tokens, per_ratio = ratios == 0 ? 0.0 : 1 / ratios;
  *loss = norm == 0 ? S(0) : S(sum[kSumLoss] / norm);
  *inverse_norm = norm == 0 ? S(0) : S(1 / norm);
  const double ratio_mean = sum[kSumRatio] * per_ratio;
  const bool plain = ratios > 0 && ratio_mean == ratio_mean;  // a minimum or maximum alone does not see NaN
  metrics[kClipFractionLow] = S(sum[kSumLow] * per_ratio);
  metrics[kClipFractionHigh] = S(sum[kSumHigh] * per_ratio);
  metrics[kClipFractionDual] = S(sum[kSumDual] * per_ratio);
  metrics[kRatioMean] = S(ratio_mean);
  metrics[kRatioMin] = plain ? S(sum[kMinRatio]) : S(ratio_mean);
  metrics[kRatioMax] = plain ? S(sum[kMaxRatio]) : S(ratio_mean);
  metrics[kApproxKl] = S(sum[kSumApproxKl] * per_ratio);
  metrics[kKl] = S(sum[kSumKl] * per_token);
  metrics[kEntropy] = S(sum[kSumEntropy] * per_token);
  metrics[kTokens] = S(tokens);
  metrics[kSequences] = S(tokens == tokens ? sum[kSumSequences] : tokens);
}

// The gradient of one token: its unnormalised gradient g times upstream / norm. What was 0 stays 0 whatever comes from
// upstream, except that a wrong layout (inverse_norm NaN) spares nothing.
template <class V, class S> PK_HD V policy_grad(V g, S upstream, S inverse_norm) {
  if (inverse_norm != inverse_norm) return splat<V>(inverse_norm);
  return g == S(0) ? splat<V>(0) : g * (upstream * inverse_norm);
}

}  // namespace PK_ISA
}  // namespace prefkern
