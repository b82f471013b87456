// The CPU walk of listwise.h, a list per lane (row_tile.h). An item that does not count has no label (NaN), which compares to nothing, and
// nothing else has to know of it. The order of a list is found by counting, for every item, those that come before it: K^2
// comparisons without a branch cost less than sorting.
#include "lists/listwise_cpu.h"

#include "lists/row_tile.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

// u, labels, gradient; the others depend on the kind.
enum Array : int { kU, kLabel, kGrad, kRank, kGain, kTop, kSlope, kSorted };

template <class V> PK_HD Mask<V> counts(V label) { return label == label; }

// Of a list: loss and gradient (in the tile), before they are set to 0 where there is nothing to compare.
template <class V> struct ListSums {
  V loss = {}, items = {}, best = {}, worst = {}, top = {}, top_label = {};
};

template <class V> void load(const Tile<V>& t, const ListArgs<typename Lanes<V>::Scalar>& a, int64_t first, int64_t last) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const int64_t row = first * t.items, rows = last - first;
  t.load(kU, a.scores + row, rows, t.items, t.items);
  if (a.labels) t.load(kLabel, a.labels + row, rows, t.items, t.items);
  else
    for (int64_t i = 0; i < t.items; i++) t.set(kLabel, i, splat<V>(S(-i)));
  if (a.mask) {
    S *u = t.array(kU), *label = t.array(kLabel);
    for (int64_t lane = 0; lane < rows && lane < L; lane++)
      for (int64_t i = 0; i < t.items; i++)
        if (!a.mask[row + lane * t.items + i]) u[i * L + lane] = 0, label[i * L + lane] = S(no_label());
  }
  const S beta = S(a.rule.beta);
  for (int64_t i = 0; i < t.items; i++) t.set(kU, i, t.get(kU, i) * beta);
}

template <class V> PK_HD ListSums<V> look(const Tile<V>& t) {
  const V zero = {}, one = splat<V>(1);
  ListSums<V> s;
  for (int64_t i = 0; i < t.items; i++) {
    const V label = t.get(kLabel, i), u = t.get(kU, i);
    const Mask<V> keep = counts(label), fresh = keep & (s.items == 0);
    s.best = keep & ((label > s.best) | fresh) ? label : s.best;
    s.worst = keep & ((label < s.worst) | fresh) ? label : s.worst;
    const Mask<V> higher = keep & ((u > s.top) | fresh);
    s.top = higher ? u : s.top;
    s.top_label = higher ? label : s.top_label;
    s.items += keep ? one : zero;
  }
  return s;
}

// The rank of every item from 1 by `key`, the higher the better; of equal ones the first comes first.
template <class V> PK_HD void rank(const Tile<V>& t, int key, bool needs_label) {
  const V zero = {}, one = splat<V>(1);
  for (int64_t i = 0; i < t.items; i++) {
    const V mine = t.get(key, i);
    V before = one;
    for (int64_t j = 0; j < i; j++) {
      const V other = t.get(key, j);
      const Mask<V> counted = needs_label ? (other >= mine) & counts(t.get(kLabel, j)) : other >= mine;
      before += counted ? one : zero;
    }
    for (int64_t j = i + 1; j < t.items; j++) {
      const V other = t.get(key, j);
      const Mask<V> counted = needs_label ? (other > mine) & counts(t.get(kLabel, j)) : other > mine;
      before += counted ? one : zero;
    }
    t.set(kRank, i, before);
  }
}

// ---- all pairs --------------------------------------------------------------------------------------------------------
template <class V> PK_HD void lambda_weights(const Tile<V>& t, const ListRule& rule,
                                             const typename Lanes<V>::Scalar* discounts) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  rank(t, rule.rank == ListRank::labels ? kLabel : kU, rule.rank == ListRank::scores);
  S* ranks = t.array(kRank);
  for (int64_t i = 0; i < t.items * L; i++) ranks[i] = discounts[int64_t(ranks[i])];
  for (int64_t i = 0; i < t.items; i++) t.set(kGain, i, list_gain(rule.gain, t.get(kLabel, i)));
}

// A pair is looked at once, whichever of the two wins.
template <ListKind kind, bool with_grad, class V>
PK_HD void pairs(const Tile<V>& t, const ListRule& rule, const typename Lanes<V>::Scalar* discounts, ListSums<V>& sums) {
  const V zero = {}, one = splat<V>(1);
  if constexpr (kind == ListKind::lambda) lambda_weights(t, rule, discounts);
  V found = zero;
  for (int64_t i = 0; i < t.items; i++) {
    const V u = t.get(kU, i), label = t.get(kLabel, i), gain = t.get(kGain, i), discount = t.get(kRank, i);
    V loss = zero, grad = zero, here = zero;
    for (int64_t j = 0; j < i; j++) {
      const V other = t.get(kLabel, j), difference = u - t.get(kU, j);
      const Mask<V> wins = label > other, either = wins | (other > label);
      const auto p = list_pair_loss<kind>(wins ? difference : -difference);
      V weighted = p.nll, slope = p.p;
      if constexpr (kind == ListKind::lambda) {
        const V weight = magnitude(gain - t.get(kGain, j)) * magnitude(discount - t.get(kRank, j));
        weighted *= weight;
        slope *= weight;
      }
      loss += either ? weighted : zero;
      here += either ? one : zero;
      if constexpr (with_grad) {
        slope = either ? (wins ? slope : -slope) : zero;
        grad -= slope;
        t.set(kGrad, j, t.get(kGrad, j) + slope);
      }
    }
    sums.loss += loss;
    found += here;
    if constexpr (with_grad) t.set(kGrad, i, grad);
  }
  if (!rule.per_pair) return;
  const V share = one / (found > 0 ? found : one);
  sums.loss *= share;
  if constexpr (with_grad)
    for (int64_t i = 0; i < t.items; i++) t.set(kGrad, i, t.get(kGrad, i) * share);
}

// ---- Plackett-Luce ----------------------------------------------------------------------------------------------------
// The list in the order of its labels: u to kSorted, labels to kGain; what does not count comes last.
template <class V> PK_HD void sort(const Tile<V>& t) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  rank(t, kLabel, false);
  const S *u = t.array(kU), *label = t.array(kLabel), *ranks = t.array(kRank);
  S *sorted = t.array(kSorted), *sorted_label = t.array(kGain);
  for (int64_t i = 0; i < t.items * L; i++) sorted[i] = 0, sorted_label[i] = S(no_label());
  for (int64_t i = 0; i < t.items; i++)
    for (int64_t lane = 0; lane < L; lane++) {
      const int64_t from = i * L + lane;
      if (label[from] != label[from]) continue;
      const int64_t to = (int64_t(ranks[from]) - 1) * L + lane;
      sorted[to] = u[from];
      sorted_label[to] = label[from];
    }
}

// From the lowest item up: `lower` is the logsumexp of what has a lower label, `all` of that and of equal ones so far. From the
// highest down: a row is below the items of higher labels, each of which adds sigmoid(-m) exp(u - E); `above` is the sum over
// them relative to E of the labels right above, the largest.
template <bool with_grad, class V> PK_HD void plackett_luce(const Tile<V>& t, ListSums<V>& sums) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const V zero = {};
  sort(t);
  ExpSum<V> lower, all;
  V next = splat<V>(S(no_label()));
  for (int64_t p = t.items - 1; p >= 0; p--) {
    const V label = t.get(kGain, p), u = t.get(kSorted, p);
    const Mask<V> keep = counts(label), fresh = label != next;
    lower.top = fresh ? all.top : lower.top;
    lower.sum = fresh ? all.sum : lower.sum;
    const auto none = lower.sum == 0;
    const V log_sum = none ? zero : vlog(lower.sum);
    const auto g = logistic(luce_margin(u, lower.top, log_sum, none));
    sums.loss += keep ? g.nll : zero;
    t.set(kTop, p, lower.top);
    t.set(kLabel, p, log_sum);  // labels are not needed any more
    t.set(kSlope, p, keep ? g.p : zero);
    add_exp(all, u, keep);
    next = label;
  }
  if constexpr (with_grad) {
    V above = zero, pending = zero, top = zero, log_sum = zero;
    for (int64_t p = 0; p < t.items; p++) {
      const V label = t.get(kGain, p), u = t.get(kSorted, p), slope = t.get(kSlope, p);
      if (p > 0) {
        const auto fresh = label != t.get(kGain, p - 1);
        const V new_top = t.get(kTop, p - 1), new_log_sum = t.get(kLabel, p - 1);
        const V moved = above == 0 ? zero : above * vexp((new_top - top) + (new_log_sum - log_sum));
        above = fresh ? moved + pending : above;
        top = fresh ? new_top : top;
        log_sum = fresh ? new_log_sum : log_sum;
        pending = fresh ? zero : pending;
      }
      pending += slope;
      t.set(kSorted, p, (above == 0 ? zero : above * vexp((u - top) - log_sum)) - slope);
    }
    const S *ranks = t.array(kRank), *sorted = t.array(kSorted);
    S* grad = t.array(kGrad);
    for (int64_t i = 0; i < t.items; i++)
      for (int64_t lane = 0; lane < L; lane++) grad[i * L + lane] = sorted[(int64_t(ranks[i * L + lane]) - 1) * L + lane];
  }
}

// ---- softmax kinds ----------------------------------------------------------------------------------------------------
// Leaves exp(u - top) in kTop and that of the labels in kGain.
template <class V> PK_HD ListSoftmax<V> softmax(const Tile<V>& t, const ListRule& rule, const ListSums<V>& sums) {
  using S = typename Lanes<V>::Scalar;
  const V zero = {}, one = splat<V>(1);
  const S inverse = S(1 / rule.temperature);
  const bool soft = rule.smoothing < 0 && rule.kind != ListKind::lire;
  V exps = zero, label_exps = zero, best = zero;
  for (int64_t i = 0; i < t.items; i++) {
    const V label = t.get(kLabel, i);
    const Mask<V> keep = counts(label);
    const V e = keep ? vexp(t.get(kU, i) - sums.top) : zero;
    exps += e;
    t.set(kTop, i, e);
    const V of_label = soft ? (keep ? vexp((label - sums.best) * inverse) : zero) : zero;
    label_exps += of_label;
    t.set(kGain, i, of_label);
    best += label == sums.best ? one : zero;
  }
  return list_softmax<V, S>(rule, sums.items, sums.top, exps, sums.best, label_exps, best);
}

template <ListKind kind, class V> PK_HD void softmax_list(const Tile<V>& t, const ListRule& rule, ListSums<V>& sums) {
  using S = typename Lanes<V>::Scalar;
  const V zero = {};
  const S inverse = S(1 / rule.temperature);
  const ListSoftmax<V> l = softmax(t, rule, sums);
  for (int64_t i = 0; i < t.items; i++) {
    const V label = t.get(kLabel, i);
    const Mask<V> keep = counts(label);
    const ListItem<V> item = list_item<kind>(rule, l, inverse, t.get(kU, i), label, t.get(kTop, i), t.get(kGain, i));
    sums.loss += keep ? item.loss : zero;
    t.set(kGrad, i, keep ? item.slope : zero);
    t.set(kRank, i, keep ? item.weight : zero);
  }
  if constexpr (kind == ListKind::exo || kind == ListKind::lire)
    for (int64_t i = 0; i < t.items; i++) t.set(kGrad, i, t.get(kGrad, i) - t.get(kRank, i) * sums.loss);
}

// ---- lists ------------------------------------------------------------------------------------------------------------
template <bool with_grad, class V>
PK_HD void one_tile(const Tile<V>& t, const ListRule& rule, const typename Lanes<V>::Scalar* discounts, ListSums<V>& sums) {
  switch (rule.kind) {
    case ListKind::plackett_luce: return plackett_luce<with_grad>(t, sums);
    case ListKind::lambda: return pairs<ListKind::lambda, with_grad>(t, rule, discounts, sums);
    case ListKind::uniform: return pairs<ListKind::uniform, with_grad>(t, rule, discounts, sums);
    case ListKind::rrhf: return pairs<ListKind::rrhf, with_grad>(t, rule, discounts, sums);
    case ListKind::exo: return softmax_list<ListKind::exo>(t, rule, sums);
    case ListKind::infonca: return softmax_list<ListKind::infonca>(t, rule, sums);
    case ListKind::nca: return softmax_list<ListKind::nca>(t, rule, sums);
    case ListKind::lire: return softmax_list<ListKind::lire>(t, rule, sums);
  }
}

template <class V>
void lists(const ListArgs<typename Lanes<V>::Scalar>& a, const typename Lanes<V>::Scalar* discounts,
           typename Lanes<V>::Scalar* scratch, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const V zero = {}, one = splat<V>(1);
  const Tile<V> t{a.items, (a.items + 1) * L, scratch};
  const S beta = S(a.rule.beta);
  for (int64_t first = begin; first < end; first += L) {
    const int64_t last = first + L < end ? first + L : end;
    load(t, a, first, last);
    ListSums<V> sums = look(t);
    a.unnormalised ? one_tile<true>(t, a.rule, discounts, sums) : one_tile<false>(t, a.rule, discounts, sums);
    const Mask<V> compares = sums.best > sums.worst;
    const int64_t rows = last - first;
    double* to = a.out.sums + first * kRowSums;
    each_lane(compares ? sums.loss : zero, rows, [&](int64_t lane, S x) { to[lane * kRowSums + kRowLoss] = double(x); });
    each_lane(compares ? one : zero, rows, [&](int64_t lane, S x) { to[lane * kRowSums + kRowCounts] = double(x); });
    each_lane(compares & (sums.top_label == sums.best) ? one : zero, rows,
              [&](int64_t lane, S x) { to[lane * kRowSums + kRowFirst] = double(x); });
    each_lane(compares ? sums.items : zero, rows, [&](int64_t lane, S x) { to[lane * kRowSums + kRowSecond] = double(x); });
    if (!a.unnormalised) continue;
    for (int64_t i = 0; i < t.items; i++) t.set(kGrad, i, compares ? t.get(kGrad, i) * beta : zero);
    t.store(kGrad, a.unnormalised + first * t.items, rows, t.items);
    if (a.mask)
      for (int64_t i = first * t.items; i < last * t.items; i++)
        if (!a.mask[i]) a.unnormalised[i] = 0;
  }
}

}  // namespace

extern const ListwiseCpu listwise_cpu;
const ListwiseCpu listwise_cpu = {&lists<VecF>, &lists<double>};

}  // namespace PK_ISA
}  // namespace prefkern
