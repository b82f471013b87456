// The CPU walk of pair_loss.h: a vector of pairs at a time. Which formula it is stays the same for all of them, so that the
// branches cost nothing. Sums are kept in vectors for the pairs of a call and then added in double.
#include "preference/pair_loss_cpu.h"

#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

// Lanes [0, count) of a vector; the others are `fill`.
template <class V, class S> PK_HD V load_some(const S* p, int64_t count, S fill) {
  constexpr int64_t L = Lanes<V>::count;
  if (count == L) return Mem<V>::load(p);
  S some[L];
  for (int64_t j = 0; j < L; j++) some[j] = j < count ? p[j] : fill;
  return Mem<V>::load(some);
}
// Those lanes of [0, count) whose byte is not 0, or without bytes all of them.
template <class V> PK_HD typename Keep<V>::Type keep_some(const uint8_t* p, int64_t count) {
  constexpr int64_t L = Lanes<V>::count;
  if (count == L) return p ? Keep<V>::load(p) : V{} == V{};
  uint8_t some[L];
  for (int64_t j = 0; j < L; j++) some[j] = j < count && (!p || p[j] != 0);
  return Keep<V>::load(some);
}
template <class V, class S> PK_HD void store_some(S* p, V v, int64_t count) {
  constexpr int64_t L = Lanes<V>::count;
  if (count == L) return Mem<V>::store(p, v);
  S some[L];
  Mem<V>::store(some, v);
  for (int64_t j = 0; j < count && j < L; j++) p[j] = some[j];
}

template <class V, class S> PK_HD V optional(const S* p, int64_t i, int64_t count, S fill) {
  return p ? load_some<V>(p + i, count, fill) : splat<V>(fill);
}
template <class V, class S> PK_HD V number(const S* p, bool each, double otherwise, int64_t i, int64_t count) {
  if (!p) return splat<V>(S(otherwise));
  return each ? load_some<V>(p + i, count, S(otherwise)) : splat<V>(*p);
}

// DPO of pairs that all count alike: what is asked for most often, compiled without everything else.
template <class S> bool is_plain(const PreferenceArgs<S>& a) {
  const PreferenceOptions& o = a.options;
  return o.kind == PreferenceKind::sigmoid && o.score == ScoreKind::reverse_kl && o.average == LengthAverage::none &&
         o.clip > 1.7976931348623157e308 && !a.mask && !a.weight && !a.desirable;
}

// Pairs [i, i + n). ALL: n is a whole vector.
template <class V, bool PLAIN, bool ALL>
PK_HD void some_pairs(const PreferenceArgs<typename Lanes<V>::Scalar>& a, const PreferenceOptions& options,
                      const PreferenceRule<typename Lanes<V>::Scalar>& rule, int64_t i, int64_t rest,
                      V (&total)[kPreferenceSums]) {
  using S = typename Lanes<V>::Scalar;
  using Mask = LanesIf<V>;
  const int64_t n = ALL ? Lanes<V>::count : rest;
  const V zero = {}, one = splat<V>(1), nan = splat<V>(S(__builtin_nan("")));
  PreferenceOptions o = options;
  if (PLAIN) {  // known when this is compiled
    o.kind = PreferenceKind::sigmoid;
    o.score = ScoreKind::reverse_kl;
    o.average = LengthAverage::none;
  }
  const Mask keep = PLAIN && ALL ? zero == zero : keep_some<V>(a.mask ? a.mask + i : nullptr, n);
  PairOptions<V> pair;
  pair.scale = number<V>(a.scale, a.each & kEachScale, o.scale, i, n);
  pair.offset = number<V>(a.offset, a.each & kEachOffset, o.offset, i, n);
  pair.smoothing = number<V>(a.smoothing, a.each & kEachSmoothing, o.smoothing, i, n);
  pair.chosen_target = number<V>(a.chosen_target, a.each & kEachChosenTarget, o.chosen_target, i, n);
  pair.rejected_target = number<V>(a.rejected_target, a.each & kEachRejectedTarget, o.rejected_target, i, n);
  pair.tie = !PLAIN && a.tie ? keep_some<V>(a.tie + i, n) : Mask();
  const Response<V> chosen = {load_some<V>(a.chosen + i, n, S(0)), optional<V>(a.ref_chosen, i, n, S(0)),
                              optional<V>(PLAIN ? nullptr : a.chosen_length, i, n, S(1))};
  const V weight = PLAIN ? one : optional<V>(a.weight, i, n, S(1));
  PreferenceTerm<V> t;
  Mask desirable = Mask();
  if (!PLAIN && a.desirable) {
    desirable = keep_some<V>(a.desirable + i, n);
    t = response_term(o, rule, pair, desirable, chosen);
  } else {
    const Response<V> rejected = {load_some<V>(a.rejected + i, n, S(0)), optional<V>(a.ref_rejected, i, n, S(0)),
                                  optional<V>(PLAIN ? nullptr : a.rejected_length, i, n, S(1))};
    t = preference_term(o, rule, pair, chosen, rejected);
    t.loss = smoothing_valid(o.kind, pair.smoothing) ? t.loss : nan;
  }
  const Mask counts = PLAIN ? keep : keep & (weight != S(0));  // 0 times an infinite loss is 0
  t.loss = counts ? t.loss * weight : zero;
  if (a.losses) store_some(a.losses + i, t.loss, n);
  if (a.grads) {
    store_some(a.grads + i, counts ? t.chosen_grad * weight : zero, n);
    if (PLAIN || !a.desirable) store_some(a.grads + a.pairs + i, counts ? t.rejected_grad * weight : zero, n);
  }
  const V count = keep ? one : zero;
  total[kPairLoss] += t.loss;
  total[kPairWeight] += keep ? weight : zero;
  total[kPairCapped] += t.capped ? count : zero;
  total[kPairCount] += count;
  if (!PLAIN && a.desirable) {
    total[kPairChosenCount] += desirable ? count : zero;
    total[kPairChosen] += (keep & desirable) ? t.chosen_reward : zero;
    total[kPairRejected] += (keep & (desirable == Mask())) ? t.chosen_reward : zero;
    total[kPairCorrect] += (desirable ? t.chosen_reward > 0 : t.chosen_reward < 0) ? count : zero;
  } else {
    total[kPairChosen] += keep ? t.chosen_reward : zero;
    total[kPairRejected] += keep ? t.rejected_reward : zero;
    total[kPairCorrect] += t.chosen_reward > t.rejected_reward ? count : zero;
  }
}

template <class V, bool PLAIN>
void pairs(const PreferenceArgs<typename Lanes<V>::Scalar>& a, double* sums, int64_t begin, int64_t end) {
  constexpr int64_t L = Lanes<V>::count;
  const auto rule = preference_rule<typename Lanes<V>::Scalar>(a.options);
  V total[kPreferenceSums] = {};
  int64_t i = begin;
  for (; i + L <= end; i += L) some_pairs<V, PLAIN, true>(a, a.options, rule, i, L, total);
  if (i < end) some_pairs<V, PLAIN, false>(a, a.options, rule, i, end - i, total);
  for (int k = 0; k < kPreferenceSums; k++) sums[k] = lane_sum(total[k]);
}

template <class V>
void pairs_any(const PreferenceArgs<typename Lanes<V>::Scalar>& a, double* sums, int64_t begin, int64_t end) {
  is_plain(a) ? pairs<V, true>(a, sums, begin, end) : pairs<V, false>(a, sums, begin, end);
}

template <class V>
void backward(const PreferenceGradArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  for (int64_t side = 0; side < a.sides; side++) {
    const S* from = a.unnormalised + side * a.pairs;
    S* to = a.grad + side * a.pairs;
    for (int64_t i = begin; i < end; i += L) {
      const int64_t n = end - i < L ? end - i : L;
      const V upstream = number<V>(a.upstream, a.vector, 1.0, i, n);
      store_some(to + i, preference_grad(load_some<V>(from + i, n, S(0)), upstream * *a.inverse_norm), n);
    }
  }
}

}  // namespace

extern const PairLossCpu pair_loss_cpu;
const PairLossCpu pair_loss_cpu = {&pairs_any<VecF>, &pairs_any<double>, &backward<VecF>, &backward<double>};

}  // namespace PK_ISA
}  // namespace prefkern
