// Losses of preference pairs and of single judged responses, with their derivatives.
//
// x = logp - ref_logp of a response, divided by its length n before or after the score where asked for; s = score(x):
//   reverse_kl x;  forward_kl 1 - e^-x;  js log 2 - log(1 + e^-x);  alpha (1 - e^(-alpha x)) / alpha;  log_odds x - log(1 - e^x);
//   chi x + e^x;  exp e^x. Exponents are held at exp_cap, with gradient 0 above.
// With u_w = scale beta s_w of the chosen response, u_l = scale rejected_beta s_l of the rejected one, z = u_w - u_l - offset,
// l(t) = -log sigmoid(t), q = sigmoid, e the label smoothing, t_w and t_l targets, f the factor, c the parameter of the kind:
//   sigmoid       (1 - e) l(z) + e l(-z) = l(z) + e z;  robust ((1 - e) l(z) - e l(-z)) / (1 - 2 e) = l(z) - e z / (1 - 2 e)
//   hinge         max(0, 1 - z);  squared z^2;  exponential e^-z;  truncated_quadratic max(0, 1 - z)^2;  savage q(-z)^2;  linear -z
//   exo           q log(q / (1 - e)) + (1 - q) log((1 - q) / e) of q(z)
//   nca           l(u_w) + l(-u_w) / 2 + l(-u_l) / 2;  bco l(u_w - offset) + l(offset - u_l)
//   targets       f ((u_w - t_w)^2 + (u_l - t_l)^2);  cal_dpo sigmoid + targets
//   apo_zero      1 - q(u_w) + q(u_l);  apo_down q(u_w) + 1 - q(z)
//   discopop      (1 - m) l(z) + m e^-z, m = q(z / c)
//   dpop          sigmoid of z - c max(0, -u_w);  focal -q^c log q of q(z)
//   rao_kupper    l(z - log c), and for a tie that + l(-z - log c) - log(c^2 - 1)
//   davidson      log(1 + e^-z + 2 c e^(-z/2)), and for a tie that + z / 2 - log 2c
//   asft          -c a_w + f (l(u_w) + l(-u_l)), a_w the x of the chosen response
// z is held in [-clip, clip], with gradient 0 outside. Of one response, v = u - offset if it is desirable, else offset - u:
//   kto 1 - q(v);  bco l(v);  squared (u - offset)^2 / 2. The factor multiplies all three.
//
// V is float, double, or a vector of float, for which comparisons and ?: work lane by lane.
#pragma once
#include "math/exponential.h"

namespace prefkern {

enum class PreferenceKind : int32_t {
  sigmoid,
  hinge,
  squared,
  exo,
  nca,
  bco,
  targets,
  apo_zero,
  apo_down,
  discopop,
  dpop,
  focal,
  rao_kupper,
  davidson,
  exponential,
  truncated_quadratic,
  savage,
  cal_dpo,
  linear,
  asft,
  robust
};
enum class UnpairedKind : int32_t { kto, bco, squared };
enum class ScoreKind : int32_t { reverse_kl, forward_kl, js, alpha, log_odds, chi, exp };
enum class LengthAverage : int32_t { none, logp, score };

constexpr int32_t kPreferenceKinds = 21, kUnpairedKinds = 3, kScoreKinds = 7,
                  kLengthAverages = 3;  // that a caller may choose from

// Infinity stands for a bound that is not wanted. parameter: c above.
struct PreferenceOptions {
  PreferenceKind kind = PreferenceKind::sigmoid;
  UnpairedKind unpaired = UnpairedKind::kto;
  ScoreKind score = ScoreKind::reverse_kl;
  LengthAverage average = LengthAverage::none;
  double beta = 0.1, rejected_beta = 0.1, chosen_reward = 0.1, rejected_reward = 0.1, scale = 1, offset = 0, smoothing = 0;
  double chosen_target = 0, rejected_target = 0, alpha = 0.5, exp_cap = 80, max_p = __builtin_inf(), parameter = 1;
  double clip = __builtin_inf(), factor = 1, chosen_weight = 1, rejected_weight = 1;
};

// What is gathered over pairs. Single responses count as chosen where they are desirable, else as rejected.
enum PreferenceSum : int {
  kPairLoss,
  kPairWeight,
  kPairChosen,
  kPairRejected,
  kPairCorrect,
  kPairCapped,
  kPairCount,
  kPairChosenCount,
  kPreferenceSums
};
// Metrics, in the order in which they are returned.
enum PreferenceMetric : int { kChosenReward, kRejectedReward, kRewardMargin, kAccuracy, kCapped, kPairs, kPreferenceMetrics };
// What the sum of losses is divided by: the pairs that count, the sum of their weights, or nothing.
enum class PairReduction : int32_t { mean, weighted_mean, sum, none };

inline namespace PK_ISA {

// The options in the form that a pair needs.
template <class S> struct PreferenceRule {
  S beta, rejected_beta, chosen_reward, rejected_reward, alpha, exp_cap, max_log_p, max_p_odds, parameter;
  S log_parameter, tie_constant, clip, factor, asft_limit;
};

template <class S> PK_HD PreferenceRule<S> preference_rule(const PreferenceOptions& o) {
  PreferenceRule<S> r;
  const double alpha = o.score == ScoreKind::forward_kl ? 1.0 : o.alpha;
  r.beta = S(o.beta), r.rejected_beta = S(o.rejected_beta);
  r.chosen_reward = S(o.chosen_reward), r.rejected_reward = S(o.rejected_reward);
  r.alpha = S(alpha), r.exp_cap = S(o.exp_cap);
  const bool bounded = o.max_p < 1;
  r.max_log_p = bounded ? S(vlog(o.max_p)) : S(__builtin_inf());
  r.max_p_odds = bounded ? S(vlog1p(-o.max_p)) : S(0);
  r.parameter = S(o.parameter);
  r.log_parameter = o.parameter > 0 ? S(vlog(o.parameter)) : S(0);
  r.tie_constant = S(0);
  if (o.kind == PreferenceKind::rao_kupper) r.tie_constant = S(vlog(o.parameter * o.parameter - 1));
  if (o.kind == PreferenceKind::davidson) r.tie_constant = S(vlog(2 * o.parameter));
  r.clip = S(o.clip), r.factor = S(o.factor);
  r.asft_limit = o.beta == 1 ? S(1) : o.beta > 1 ? S(0) : S(__builtin_inf());
  return r;
}

// A score, 0 where the policy is the reference if it is a divergence's, and its derivative in x.
template <class V> struct Score {
  V value, slope;
  LanesIf<V> capped;
};

template <class V, class S> PK_HD Score<V> preference_score(ScoreKind kind, const PreferenceRule<S>& rule, V x) {
  const V one = splat<V>(1), zero = splat<V>(0);
  switch (kind) {
    case ScoreKind::forward_kl:
    case ScoreKind::alpha: {
      const V wanted = x * -rule.alpha;
      const LanesIf<V> capped = wanted > rule.exp_cap;
      const V less_1 = vexpm1(capped ? splat<V>(rule.exp_cap) : wanted);
      return {-less_1 / rule.alpha, capped ? zero : less_1 + S(1), capped};
    }
    case ScoreKind::js: {
      const Logistic<V> l = logistic(x);
      return {splat<V>(S(0.6931471805599453)) - l.nll, l.p, LanesIf<V>()};
    }
    case ScoreKind::log_odds: {
      const LanesIf<V> capped = x > rule.max_log_p;
      const V below = capped ? splat<V>(S(-1)) : x;  // log and quotient of something harmless
      return {x - (capped ? splat<V>(rule.max_p_odds) : log1mexp(below)), capped ? one : -one / vexpm1(below), capped};
    }
    case ScoreKind::chi:
    case ScoreKind::exp: {
      const LanesIf<V> capped = x > rule.exp_cap;
      const V e = vexp(capped ? splat<V>(rule.exp_cap) : x), slope = capped ? zero : e;
      if (kind == ScoreKind::exp) return {e, slope, capped};
      return {x + e, slope + S(1), capped};
    }
    default: return {x, x == x ? one : x, LanesIf<V>()};
  }
}

// What a pair brings along beside its log-ratios.
template <class V> struct PairOptions {
  V scale, offset, smoothing, chosen_target, rejected_target;
  LanesIf<V> tie;
};
// Loss, and its derivatives in u_w, u_l and, for asft alone, directly in x of the chosen response.
template <class V> struct PairLoss {
  V loss, chosen, rejected, direct;
};

// e z, where no smoothing asks nothing of an infinite margin.
template <class V> PK_HD V smoothed(V smoothing, V z) {
  using S = typename Lanes<V>::Scalar;
  return smoothing == S(0) ? splat<V>(0) : smoothing * z;
}

// slope_x: derivative of the chosen response's score, which asft needs in a limit.
template <class V, class S>
PK_HD PairLoss<V> pair_loss(PreferenceKind kind, const PreferenceRule<S>& rule, const PairOptions<V>& o, V x, V slope_x, V u_w,
                            V u_l, V margin) {
  const V zero = splat<V>(0), one = splat<V>(1);
  const V least = splat<V>(-rule.clip), most = splat<V>(rule.clip);
  const LanesIf<V> clipped = (margin > rule.clip) | (margin < -rule.clip);
  const V z = vmin(most, vmax(least, margin));  // NaN passes both
  V loss = zero, dz = zero, chosen = zero, rejected = zero, direct = zero;
  switch (kind) {
    case PreferenceKind::sigmoid:
    case PreferenceKind::robust:
    case PreferenceKind::cal_dpo: {
      const Logistic<V> l = logistic(z);
      const V e = kind == PreferenceKind::robust ? -o.smoothing / (one - o.smoothing * S(2)) : o.smoothing;
      loss = l.nll + smoothed(e, z);
      dz = e - l.p;
      break;
    }
    case PreferenceKind::hinge:
      loss = vmax(zero, one - z);
      dz = z < S(1) ? -one : (z == z ? zero : z);
      break;
    case PreferenceKind::squared:
      loss = z * z;
      dz = z * S(2);
      break;
    case PreferenceKind::exo: {
      const Logistic<V> l = logistic(z);
      const V log_keep = vlog1p(-o.smoothing), log_flip = vlog(o.smoothing), opposite = l.opposite;
      loss = l.q * (-l.nll - log_keep) + l.p * (-opposite - log_flip);
      dz = l.q * l.p * (z - log_keep + log_flip);
      break;
    }
    case PreferenceKind::nca: {
      const Logistic<V> w = logistic(u_w), l = logistic(u_l);
      loss = w.nll + (w.opposite + l.opposite) * S(0.5);
      chosen = w.q * S(0.5) - w.p;
      rejected = l.q * S(0.5);
      break;
    }
    case PreferenceKind::bco: {
      const V v_l = u_l - o.offset;
      const Logistic<V> w = logistic(u_w - o.offset), l = logistic(-v_l);
      loss = w.nll + l.nll;
      chosen = -w.p;
      rejected = l.p;
      break;
    }
    case PreferenceKind::targets: break;
    case PreferenceKind::apo_zero: {
      const Logistic<V> w = logistic(u_w), l = logistic(u_l);
      loss = w.p + l.q;
      chosen = -w.q * w.p;
      rejected = l.q * l.p;
      break;
    }
    case PreferenceKind::apo_down: {
      const Logistic<V> w = logistic(u_w), l = logistic(z);
      const V pull = l.q * l.p;
      loss = w.q + l.p;
      // q p of u_w less that of z, which are nearly equal where u_w is near z or -z
      chosen = clipped ? w.q * w.p : (w.q - l.q) * (w.p - l.q);
      rejected = clipped ? zero : pull;
      break;
    }
    case PreferenceKind::discopop: {
      const Logistic<V> l = logistic(z), m = logistic(z / rule.parameter);
      const V tail = vexp(-m.nll - z);  // m e^-z
      loss = (m.p == S(0) ? zero : m.p * l.nll) + tail;
      dz = (m.p == S(0) ? zero : m.p * (tail - m.q * l.nll) / rule.parameter) - m.p * l.p - tail;
      break;
    }
    case PreferenceKind::dpop: {
      const LanesIf<V> below = u_w < S(0);
      const V penalised = below ? z + u_w * rule.parameter : z;
      const Logistic<V> l = logistic(penalised);
      loss = l.nll + smoothed(o.smoothing, penalised);
      dz = o.smoothing - l.p;
      chosen = below ? dz * rule.parameter : zero;
      break;
    }
    case PreferenceKind::focal: {
      const Logistic<V> l = logistic(z);
      const V damped = vexp(l.nll * -rule.parameter);  // q^c
      loss = damped * l.nll;
      dz = -l.p * damped * (one - l.nll * rule.parameter);
      break;
    }
    case PreferenceKind::rao_kupper: {
      const Logistic<V> win = logistic(z - rule.log_parameter), lose = logistic(-z - rule.log_parameter);
      loss = win.nll + (o.tie ? lose.nll - rule.tie_constant : zero);
      dz = (o.tie ? lose.p : zero) - win.p;
      break;
    }
    case PreferenceKind::davidson: {
      const V half = z * S(0.5), size = vmax(half, -half), t = vexp(-size), ties = t * (rule.parameter * S(2));
      const V others = t * t + ties, small = t * t + t * rule.parameter, large = one + t * rule.parameter;
      loss = size - half + vlog1p(others) + (o.tie ? half - rule.tie_constant : zero);
      dz = (o.tie ? splat<V>(S(0.5)) : zero) - (half < S(0) ? large : small) / (one + others);
      break;
    }
    case PreferenceKind::exponential:
      loss = vexp(-z);
      dz = -loss;
      break;
    case PreferenceKind::truncated_quadratic: {
      const V short_of = vmax(zero, one - z);
      loss = short_of * short_of;
      dz = short_of * S(-2);
      break;
    }
    case PreferenceKind::savage: {
      const Logistic<V> l = logistic(z);
      loss = l.p * l.p;
      dz = loss * l.q * S(-2);
      break;
    }
    case PreferenceKind::linear:
      loss = -z;
      dz = z == z ? -one : z;
      break;
    case PreferenceKind::asft: {
      const Logistic<V> w = logistic(u_w), l = logistic(-u_l);
      loss = (w.nll + l.nll) * rule.factor - x * rule.parameter;
      // At x = 0 u_w is infinite and its share 0, but their product has a limit.
      direct = ((x == S(0)) & (x <= rule.max_log_p) ? splat<V>(-rule.asft_limit) : w.p * slope_x * o.scale * -rule.beta) *
                   rule.factor -
               rule.parameter;
      rejected = l.p * rule.factor;
      break;
    }
  }
  dz = clipped ? zero : dz;
  if (kind == PreferenceKind::targets || kind == PreferenceKind::cal_dpo) {
    const V w = u_w - o.chosen_target, l = u_l - o.rejected_target;
    loss = loss + (w * w + l * l) * rule.factor;
    chosen = chosen + w * (rule.factor * S(2));
    rejected = rejected + l * (rule.factor * S(2));
  }
  return {loss, chosen + dz, rejected - dz, direct};
}

// Of one response: loss and its derivative in u.
template <class V, class S>
PK_HD void unpaired_loss(UnpairedKind kind, const PreferenceRule<S>& rule, LanesIf<V> desirable, V u, V offset, V& loss,
                         V& du) {
  const V away = u - offset;
  if (kind == UnpairedKind::squared) {
    loss = away * away * (rule.factor * S(0.5));
    du = away * rule.factor;
    return;
  }
  const Logistic<V> l = logistic(desirable ? away : -away);
  const V slope = kind == UnpairedKind::kto ? l.q * l.p : l.p;
  loss = (kind == UnpairedKind::kto ? l.p : l.nll) * rule.factor;
  du = (desirable ? -slope : slope) * rule.factor;
}

// What a response brings along: its log-probs and its length, which is 1 unless there is one.
template <class V> struct Response {
  V logp, ref_logp, length;
};

template <class V> struct PreferenceTerm {
  V loss, chosen_grad, rejected_grad, chosen_reward, rejected_reward;
  LanesIf<V> capped;
};

// The score of a response, and what of the derivative in x goes to its log-prob.
template <class V> struct Scored {
  Score<V> score;
  V x, share;
};
template <class V, class S>
PK_HD Scored<V> response_score(const PreferenceOptions& o, const PreferenceRule<S>& rule, const Response<V>& r) {
  Scored<V> s;
  s.x = r.logp - r.ref_logp;
  s.share = o.average == LengthAverage::none ? splat<V>(1) : splat<V>(1) / r.length;
  if (o.average == LengthAverage::logp) s.x = s.x * s.share;
  s.score = preference_score(o.score, rule, s.x);
  if (o.average == LengthAverage::score) s.score.value = s.score.value * s.share;
  return s;
}

template <class V, class S>
PK_HD PreferenceTerm<V> preference_term(const PreferenceOptions& o, const PreferenceRule<S>& rule, const PairOptions<V>& pair,
                                        const Response<V>& chosen, const Response<V>& rejected) {
  const Scored<V> w = response_score(o, rule, chosen), l = response_score(o, rule, rejected);
  const V s_w = w.score.value, s_l = l.score.value;
  const V margin = rule.beta == rule.rejected_beta ? (s_w - s_l) * rule.beta : s_w * rule.beta - s_l * rule.rejected_beta;
  const V by_w = pair.scale * rule.beta, by_l = pair.scale * rule.rejected_beta;
  const PairLoss<V> p =
      pair_loss(o.kind, rule, pair, w.x, w.score.slope, s_w * by_w, s_l * by_l, margin * pair.scale - pair.offset);
  PreferenceTerm<V> t;
  t.loss = p.loss;
  t.chosen_grad = (o.kind == PreferenceKind::asft ? p.direct : p.chosen * by_w * w.score.slope) * w.share;
  t.rejected_grad = p.rejected * by_l * l.score.slope * l.share;
  t.chosen_reward = s_w * rule.chosen_reward;
  t.rejected_reward = s_l * rule.rejected_reward;
  t.capped = w.score.capped | l.score.capped;
  return t;
}

// Of one response: its loss, gradient and reward in the place of the chosen one's.
template <class V, class S>
PK_HD PreferenceTerm<V> response_term(const PreferenceOptions& o, const PreferenceRule<S>& rule, const PairOptions<V>& pair,
                                      LanesIf<V> desirable, const Response<V>& response) {
  const Scored<V> r = response_score(o, rule, response);
  const V s = r.score.value, by = pair.scale * rule.beta;
  V loss, du;
  unpaired_loss(o.unpaired, rule, desirable, s * by, pair.offset, loss, du);
  const V weight = desirable ? splat<V>(S(o.chosen_weight)) : splat<V>(S(o.rejected_weight)), zero = splat<V>(0);
  return {loss * weight, du * by * r.score.slope * r.share * weight, zero, s * rule.chosen_reward, zero, r.score.capped};
}

// How likely a label is right: p eta / (p eta + (1 - p)(1 - eta)) with p = sigmoid(d) and the annotator's reliability eta, which
// at 0 and 1 would leave nothing to doubt. As sigmoid(d + logit eta) nothing underflows.
PK_HD double label_posterior(double d, double eta) {
  const double least = 1e-6, most = 1 - 1e-6, held = eta < least ? least : eta > most ? most : eta;
  const double z = d + vlog(held) - vlog1p(-held), e = vexp(z > 0 ? -z : z);
  return eta >= 0 && eta <= 1 ? (z > 0 ? 1.0 : e) / (1 + e) : __builtin_nan("");
}

// Whether a lane's options are such that its loss means something; others come out NaN.
template <class V> PK_HD LanesIf<V> smoothing_valid(PreferenceKind kind, V e) {
  using S = typename Lanes<V>::Scalar;
  if (kind == PreferenceKind::exo) return (e > S(0)) & (e < S(1));
  if (kind == PreferenceKind::robust) return (e >= S(0)) & (e < S(0.5));
  return (e >= S(0)) & (e <= S(1));
}

PK_HD double preference_norm(PairReduction reduction, const double* sums, bool given, double norm) {
  if (given) return norm >= 0 && norm <= 1.7976931348623157e308 ? norm : __builtin_nan("");
  if (reduction == PairReduction::mean) return sums[kPairCount];
  return reduction == PairReduction::weighted_mean ? sums[kPairWeight] : 1.0;
}

// Loss, metrics, and what the gradient is to be multiplied by. Nothing that counts gives zeros.
template <class S>
PK_HD void preference_finish(const double* sums, bool unpaired, double norm, S* loss, S* metrics, S* inverse_norm) {
  const auto share = [](double sum, double count) { return S(count > 0 ? sum / count : 0.0); };
  const double count = sums[kPairCount], chosen = unpaired ? sums[kPairChosenCount] : count;
  const double inverse = norm == 0 ? 0.0 : 1 / norm;
  if (loss) *loss = S(inverse == 0 ? 0.0 : sums[kPairLoss] * inverse);
  *inverse_norm = S(inverse);
  metrics[kChosenReward] = share(sums[kPairChosen], chosen);
  metrics[kRejectedReward] = share(sums[kPairRejected], unpaired ? count - chosen : count);
  metrics[kRewardMargin] = metrics[kChosenReward] - metrics[kRejectedReward];
  metrics[kAccuracy] = share(sums[kPairCorrect], count);
  metrics[kCapped] = S(sums[kPairCapped]);
  metrics[kPairs] = S(count);
}

// What was 0 stays 0, whatever comes from upstream.
template <class V> PK_HD V preference_grad(V unnormalised, V factor) {
  using S = typename Lanes<V>::Scalar;
  return unnormalised == S(0) ? splat<V>(0) : unnormalised * factor;
}

}  // namespace PK_ISA
}  // namespace prefkern
