// Losses over a list of scored items, over two groups of them, and of a skew-symmetric score of two embeddings.
//
// Lists. With u = beta s, labels v, and the logistic loss l(m) = -log sigmoid(m), dl/dm = -sigmoid(-m):
//   plackett_luce  sum_k l(u_k - E_k), E_k = logsumexp of u over the items with a lower label; 0 for the lowest
//   lambda         sum over v_i > v_j of w_ij l(u_i - u_j), w_ij = |G_i - G_j| |1/log(1 + r_i) - 1/log(1 + r_j)|, a constant,
//                  with the gain G = 2^v - 1 or v and the rank r from 1
//   uniform        the same with w = 1;  rrhf: with w = 1 and relu(-m) in place of l
//   exo            sum_i p_i (log p_i - log t_i), with p = softmax(u) and the target t; d/du_i = p_i (f_i - sum p f), f = log p/t
//   infonca        -sum_i t_i log p_i; d/du_i = p_i - t_i
//   nca            sum_i t_i l(u_i) + l(-u_i) / n
//   lire           -sum_i p_i v_i; d/du_i = -p_i (v_i - sum p v)
// The target is softmax(v / T), or 1 - e for the best label and e for the others, each shared out evenly.
//
// Groups. With the means W, L of winners and losers and D = beta (W - L): l(D) + lam c Var(winners).
//
// Skew. s = sum_l s_l (a_2l b_2l+1 - a_2l+1 b_2l) of embeddings a, b, divided by their length or not; loss l((s - m) / tau).
//
// V is float, double, or a vector of float, for which comparisons and ?: work lane by lane.
#pragma once
#include "core/elementary_more.h"
#include "math/exponential.h"

namespace prefkern {

enum class ListKind : int32_t { plackett_luce, lambda, uniform, exo, infonca, nca, rrhf, lire };
enum class ListGain : int32_t { exp2, linear };
enum class ListRank : int32_t { labels, scores };
constexpr int32_t kListKinds = 8;

struct ListRule {
  ListKind kind = ListKind::plackett_luce;
  ListGain gain = ListGain::exp2;
  ListRank rank = ListRank::labels;
  bool per_pair = false;  // divide by the number of pairs with v_i > v_j
  double beta = 1;
  double temperature = 1;
  double smoothing = -1;  // e; negative for softmax(v / T)
};

struct GroupPreferenceRule {
  double beta = 0.1, lam = 1;
  int64_t ddof = 0;
  bool scale_variance = false;  // c = beta^2 instead of 1
};

struct SkewRule {
  double tau = 0.1;
  bool normalize = true, with_loss = true;
};

// What rows are made into, and what a row leaves: its loss, whether it counts, and two values whose means are metrics.
enum class RowReduction : int32_t { mean, sum, none };
enum RowSum : int { kRowLoss, kRowCounts, kRowFirst, kRowSecond, kRowSums };
enum RowMetric : int { kMetricCount, kMetricFirst, kMetricSecond, kRowMetrics };

inline namespace PK_ISA {

template <class V> PK_HD V magnitude(V x) { return vmax(x, -x); }

// ---- lists ------------------------------------------------------------------------------------------------------------
PK_HD bool list_of_pairs(ListKind k) { return k == ListKind::lambda || k == ListKind::uniform || k == ListKind::rrhf; }
PK_HD bool list_has_gain(const ListRule& r) { return r.kind == ListKind::lambda && r.gain == ListGain::exp2; }

constexpr double kMostExp2Label = 30;
// Whether an item that counts may have this label.
PK_HD bool label_valid(const ListRule& r, double label) {
  return label - label == 0 && !(list_has_gain(r) && label > kMostExp2Label);
}
// One of an item that does not count: it compares to nothing.
PK_HD float no_label() { return __builtin_nanf(""); }

template <class V> PK_HD V list_gain(ListGain gain, V label) { return gain == ListGain::exp2 ? exp2_any(label) - 1 : label; }
PK_HD double list_discount(double rank) { return 1 / vlog(1 + rank); }

// Of an ordered pair: loss nll, and p what it falls by per margin.
template <ListKind kind, class V> PK_HD Logistic<V> list_pair_loss(V margin) {
  if constexpr (kind == ListKind::rrhf) {
    const V zero = {}, one = splat<V>(1);
    return {zero, margin < 0 ? one : (margin == margin ? zero : margin), margin >= 0 ? zero : -margin, zero};
  } else {
    return logistic(margin);
  }
}

// A sum of exponentials relative to its largest exponent; nothing has been added while the sum is 0.
template <class V> struct ExpSum {
  V top = {}, sum = {};
};
template <class V> PK_HD void add_exp(ExpSum<V>& a, V x, decltype(V{} == V{}) counts) {
  const auto up = (x > a.top) | (a.sum == 0);
  const V e = vexp(-magnitude(x - a.top));
  const V top = up ? x : a.top, sum = up ? a.sum * e + 1 : a.sum + e;
  a.top = counts ? top : a.top;
  a.sum = counts ? sum : a.sum;
}

// The margin of an item over the logsumexp of those below it: beyond any doubt where there are none.
template <class V> PK_HD V luce_margin(V u, V top, V log_sum, decltype(V{} == V{}) none) {
  return none ? splat<V>(1e30f) : (u - top) - log_sum;
}

// What softmax kinds know of a list before they look at its items.
template <class V> struct ListSoftmax {
  V top, log_sum, inverse_sum;  // of u
  V label_top, label_log_sum, label_inverse_sum;  // of the labels over the temperature
  V best, other, log_best, log_other;  // the target of a best item and of another one, with smoothing
  V inverse_items;
};
// From the sums of exp(u - top) and exp((label - label_top) / T), and how many items have the best label.
template <class V, class S>
PK_HD ListSoftmax<V> list_softmax(const ListRule& r, V items, V top, V exps, V label_top, V label_exps, V best) {
  const V one = splat<V>(1), rest = items - best;
  const S e = S(r.smoothing);
  const auto any = best > 0, soft = label_exps > 0;
  const V sum = any ? exps : one, label_sum = soft ? label_exps : one;
  ListSoftmax<V> l;
  l.top = top, l.log_sum = vlog(sum), l.inverse_sum = one / sum;
  l.label_top = label_top, l.label_log_sum = vlog(label_sum), l.label_inverse_sum = one / label_sum;
  l.best = (1 - e) / (any ? best : one), l.other = e / (rest > 0 ? rest : one);
  l.log_best = vlog(l.best), l.log_other = vlog(l.other);
  l.inverse_items = one / (any ? items : one);
  return l;
}

template <class V> struct ListTarget {
  V value, log;
};
template <class V, class S>
PK_HD ListTarget<V> list_target(const ListRule& r, const ListSoftmax<V>& l, S inverse_temperature, V label, V label_exp) {
  if (r.smoothing >= 0) {
    const auto best = label == l.label_top;
    return {best ? l.best : l.other, best ? l.log_best : l.log_other};
  }
  return {label_exp * l.label_inverse_sum, (label - l.label_top) * inverse_temperature - l.label_log_sum};
}

// The loss of one item, and its derivative in u. For exo and lire the latter is p (f - sum of the losses): slope is p f, weight p.
template <class V> struct ListItem {
  V loss, slope, weight;
};
template <ListKind kind, class V, class S>
PK_HD ListItem<V> list_item(const ListRule& r, const ListSoftmax<V>& l, S inverse_temperature, V u, V label, V exp_u,
                            V label_exp) {
  const V zero = {}, p = exp_u * l.inverse_sum;
  if constexpr (kind == ListKind::lire) {
    const V term = -p * label;
    return {term, term, p};
  } else {
    const ListTarget<V> t = list_target(r, l, inverse_temperature, label, label_exp);
    if constexpr (kind == ListKind::nca) {
      const Logistic<V> g = logistic(u);
      return {t.value * g.nll + g.opposite * l.inverse_items, g.q * l.inverse_items - t.value * g.p, zero};
    } else {
      const V log_p = (u - l.top) - l.log_sum;
      if constexpr (kind == ListKind::exo) {
        const V term = p * (log_p - t.log);
        return {term, term, p};
      } else {
        return {-t.value * log_p, p - t.value, zero};
      }
    }
  }
}

// ---- two groups -------------------------------------------------------------------------------------------------------
template <class V> struct GroupPreference {
  V preference, variance;  // the two terms, the second without lam
  V winner, winner_slope, loser;  // derivatives: of a winner winner + winner_slope (s - mean), of a loser loser
  V loss;
};
template <class V, class S>
PK_HD GroupPreference<V> group_preference(const GroupPreferenceRule& r, V winners, V losers, V winner_mean, V loser_mean,
                                          V sum_sq_deviations) {
  const S beta = S(r.beta), lam = S(r.lam), ddof = S(r.ddof), scale = S(r.scale_variance ? r.beta * r.beta : 1.0);
  const V zero = {};
  const auto several = winners > ddof;
  const V divisor = several ? winners - ddof : splat<V>(1);
  const Logistic<V> g = logistic((winner_mean - loser_mean) * beta);
  const V variance = several ? sum_sq_deviations * scale / divisor : sum_sq_deviations * S(0);
  const V slope = several ? 2 * lam * scale / divisor : zero;
  return {g.nll, variance, -(g.p * beta) / winners, slope, g.p * beta / losers, g.nll + variance * lam};
}

// ---- skew-symmetric score ---------------------------------------------------------------------------------------------
// 1 / max(length, 1e-12), or 1, from the sum of squares; and whether the length has a derivative.
template <class V, class S> PK_HD V inverse_length(bool normalize, V sum_sq) {
  const V floor = splat<V>(S(1e-12)), one = splat<V>(1);
  return normalize ? one / vmax(floor, sqrt_any(sum_sq)) : one;
}
template <class V, class S> PK_HD auto has_length(bool normalize, V sum_sq) {
  const V floor = splat<V>(normalize ? S(1e-12) : S(__builtin_inf()));
  return sqrt_any(sum_sq) > floor;
}
// Rounded products: with a fused one, a over b would not be minus b over a.
template <class V> PK_HD V skew_block(V a0, V a1, V b0, V b1) { return rounded_product(a0, b1) - rounded_product(a1, b0); }

// ---- reduction --------------------------------------------------------------------------------------------------------
// What the sum over the rows is divided by. A norm that is negative or NaN makes everything NaN.
PK_HD double row_divisor(RowReduction reduction, bool has_norm, double norm, double counted) {
  if (reduction != RowReduction::mean) return 1;
  if (!has_norm) return counted;
  return norm >= 0 ? norm : double(__builtin_nanf(""));
}
PK_HD double row_quotient(double sum, double divisor) { return divisor == 0 ? 0.0 * sum : sum / divisor; }
template <class S> PK_HD S row_gradient(S unnormalised, S factor) { return unnormalised == 0 ? S(0) : unnormalised * factor; }

}  // namespace PK_ISA
}  // namespace prefkern
