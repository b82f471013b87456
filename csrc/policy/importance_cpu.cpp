// The CPU walk of importance.h: one sequence after the other, a vector of tokens at a time. Sums are kept in double.
#include "policy/importance_cpu.h"

#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

// Calls f(i, a, b, keep, count) with the values of tokens [i, i + count), count lanes of them, and which of them count;
// after every tile, and at the end, flush().
template <class V, class S, class F, class G>
PK_HD void each_vector(const S* a, const S* b, const uint8_t* mask, int64_t n, const F& f, const G& flush) {
  constexpr int64_t L = Lanes<V>::count, tile = 4096;
  int64_t i = 0;
  uint8_t flags[L];
  for (int64_t j = 0; j < L; j++) flags[j] = 1;
  for (; i + L <= n; i += L) {
    f(i, Mem<V>::load(a + i), Mem<V>::load(b + i), Keep<V>::load(mask ? mask + i : flags), L);
    if ((i + L) % tile == 0) flush();
  }
  if (i < n) {
    S some_a[L] = {}, some_b[L] = {};
    for (int64_t j = 0; j < L; j++) {
      flags[j] = j < n - i && (!mask || mask[i + j]);
      some_a[j] = j < n - i ? a[i + j] : 0;
      some_b[j] = j < n - i ? b[i + j] : 0;
    }
    f(i, Mem<V>::load(some_a), Mem<V>::load(some_b), Keep<V>::load(flags), n - i);
  }
  flush();
}

// Sums in double of what is added up in vectors.
template <class V> struct Sums {
  V sum = {}, tokens = {};
  double total = 0, count = 0;
  PK_HD void flush() {
    total += lane_sum(sum);
    count += lane_sum(tokens);
    sum = tokens = V{};
  }
};

template <class V, class S> PK_HD void store_some(S* to, V v, int64_t count) {
  constexpr int64_t L = Lanes<V>::count;
  if (count == L) return Mem<V>::store(to, v);
  S values[L];
  Mem<V>::store(values, v);
  for (int64_t j = 0; j < count && j < L; j++) to[j] = values[j];
}

template <class V>
void weights(const WeightArgs<typename Lanes<V>::Scalar>& a, double* sums, int64_t first, int64_t last) {
  using S = typename Lanes<V>::Scalar;
  using Mask = typename Keep<V>::Type;
  const WeightRule<S> rule = weight_rule<S>(a.options);
  const V zero = {}, one = splat<V>(1);
  for (int64_t b = first; b < last; b++) {
    const int64_t begin = sequence_begin(a.layout, b), n = sequence_end(a.layout, b) - begin;
    const S *old = a.old_logp + begin, *rollout = a.rollout_logp + begin;
    const uint8_t* mask = a.mask ? a.mask + begin : nullptr;
    S* out = a.weights + begin;
    Sums<V> sums_of;
    const bool each = a.options.level == WeightLevel::token;
    each_vector<V>(
        old, rollout, mask, n,
        [&](int64_t i, V x, V y, Mask keep, int64_t count) {
          V u = keep ? x - y : zero;
          if (each) {
            u = keep ? importance_weight(rule, u) : zero;
            store_some(out + i, u, count);
          }
          sums_of.sum += u;
          sums_of.tokens += keep ? one : zero;
        },
        [&] { sums_of.flush(); });
    double sum = sums_of.total, tokens = sums_of.count;
    if (!each) {
      const S w = importance_weight(rule, S(sequence_log_weight(a.options.level, sum, tokens)));
      const V of_all = splat<V>(w);
      each_vector<V>(
          old, rollout, mask, n,
          [&](int64_t i, V, V, Mask keep, int64_t count) { store_some(out + i, keep ? of_all : zero, count); }, [] {});
      sum = tokens > 0 ? double(w) : 0;
      tokens = tokens > 0 ? 1 : 0;
    }
    sums[2 * b] = sum;
    sums[2 * b + 1] = tokens;
  }
}

template <class V>
void scale(typename Lanes<V>::Scalar* weights, typename Lanes<V>::Scalar factor, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) weights[i] = weights[i] == 0 ? 0 : weights[i] * factor;
}

template <class V> void keep(const OffPolicyArgs<typename Lanes<V>::Scalar>& a, int64_t first, int64_t last) {
  using Mask = typename Keep<V>::Type;
  const V zero = {}, one = splat<V>(1);
  for (int64_t b = first; b < last; b++) {
    const int64_t begin = sequence_begin(a.layout, b), n = sequence_end(a.layout, b) - begin;
    Sums<V> sums;
    each_vector<V>(
        a.logp + begin, a.rollout_logp + begin, a.mask ? a.mask + begin : nullptr, n,
        [&](int64_t, V x, V y, Mask counts, int64_t) {
          sums.sum += counts ? mismatch(x, y) : zero;
          sums.tokens += counts ? one : zero;
        },
        [&] { sums.flush(); });
    a.keep[b] = keep_sequence(double(a.advantages[b]), sums.total, sums.count, a.threshold);
  }
}

}  // namespace

extern const ImportanceCpu importance_cpu;
const ImportanceCpu importance_cpu = {&weights<VecF>, &weights<double>, &scale<VecF>,
                                      &scale<double>, &keep<VecF>,      &keep<double>};

}  // namespace PK_ISA
}  // namespace prefkern
