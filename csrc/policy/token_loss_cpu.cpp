// The CPU walk of token_loss.h: one sequence after the other, a vector of tokens at a time.
//
// The mask of a sequence is counted first. That gives the weight its tokens need, skips sequences without tokens, and
// frees those without padding from the mask. Inside, a vector of tokens that all count takes no select at all, one of
// which none counts is not even loaded. Sums stay in registers for a tile and are then added in double, so that long
// sequences lose nothing.
#include "policy/token_loss_cpu.h"

#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

constexpr int64_t kTile = 4096;

enum class Cover { none, some, all };
template <int N> PK_HD Cover cover(const uint8_t* p) {
  if (N < 4) return *p ? Cover::all : Cover::none;
  constexpr int words = N < 4 ? 1 : N / 4;
  uint32_t w[words];
  __builtin_memcpy(w, p, 4 * words);
  uint32_t any = 0, all = 0x01010101u;
  for (uint32_t x : w) {
    any |= x;
    all &= x;
  }
  return any == 0 ? Cover::none : all == 0x01010101u ? Cover::all : Cover::some;
}

PK_HD int64_t count_tokens(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  constexpr int64_t block = 128;  // so many bytes may be added up in a byte
  for (int64_t first = 0; first < n; first += block) {
    const int64_t last = first + block < n ? first + block : n;
    uint8_t here = 0;
    for (int64_t i = first; i < last; i++) here = static_cast<uint8_t>(here + (mask[i] != 0));
    count += here;
  }
  return count;
}

PK_HD double lane_sum(double v) { return v; }
PK_HD double lane_sum(VecF v) {
  double s = 0;
  for (int i = 0; i < kLanes; i++) s += v[i];
  return s;
}
PK_HD double lane_min(double v) { return v; }
PK_HD double lane_min(VecF v) { return -reduce_max(-v); }

template <class V> struct TileSums {
  V loss = {}, low = {}, high = {}, dual = {}, ratio = {}, approx_kl = {}, kl = {};
  V min = splat<V>(__builtin_inff()), max = {};

  PK_HD void add(const PolicyTerm<V>& t, V ratio_if_kept, V ratio_or_inf) {
    const V one = splat<V>(1);
    low = t.low ? low + one : low;
    high = t.high ? high + one : high;
    dual = t.dual ? dual + one : dual;
    loss += t.loss;
    ratio += ratio_if_kept;
    approx_kl += t.approx_kl;
    kl += t.kl;
    min = vmin(ratio_or_inf, min);
    max = vmax(ratio_if_kept, max);
  }
  PK_HD void flush(double* sums) {
    sums[kSumLoss] += lane_sum(loss);
    sums[kSumLow] += lane_sum(low);
    sums[kSumHigh] += lane_sum(high);
    sums[kSumDual] += lane_sum(dual);
    sums[kSumRatio] += lane_sum(ratio);
    sums[kSumApproxKl] += lane_sum(approx_kl);
    sums[kSumKl] += lane_sum(kl);
    sums[kMinRatio] = vmin(lane_min(min), sums[kMinRatio]);
    sums[kMaxRatio] = vmax(double(reduce_max(max)), sums[kMaxRatio]);
    *this = TileSums();
  }
};

// The arrays from some token on.
template <class S> struct Tokens {
  const S *logp, *old_logp, *ref_logp, *advantages;
  const uint8_t* mask;
  S* grad;
};

template <PolicyKind KIND, KlKind KL, bool TOKEN_ADVANTAGES, class V> struct Walk {
  using S = typename Lanes<V>::Scalar;
  static constexpr int64_t L = Lanes<V>::count;
  const PolicyRule<S> rule;
  const S advantage, weight;  // of the whole sequence
  TileSums<V> sums;

  template <bool MASKED> PK_HD void step(const Tokens<S>& at, int64_t i) {
    V d = Mem<V>::load(at.logp + i) - Mem<V>::load(at.old_logp + i), x = {};
    V a = TOKEN_ADVANTAGES ? Mem<V>::load(at.advantages + i) : splat<V>(advantage);
    if (KL != KlKind::none) x = Mem<V>::load(at.ref_logp + i) - Mem<V>::load(at.logp + i);
    if (!MASKED) {
      const PolicyTerm<V> t = policy_term<KIND, KL>(rule, d, a, x);
      sums.add(t, t.ratio, t.ratio);
      if (at.grad) Mem<V>::store(at.grad + i, t.grad * weight);
      return;
    }
    // Lanes that do not count get d = A = x = 0, which adds nothing but a ratio of 1.
    const V zero = {};
    const typename Keep<V>::Type keep = Keep<V>::load(at.mask + i);
    d = keep ? d : zero;
    a = keep ? a : zero;
    x = keep ? x : zero;
    const PolicyTerm<V> t = policy_term<KIND, KL>(rule, d, a, x);
    sums.add(t, keep ? t.ratio : zero, keep ? t.ratio : splat<V>(__builtin_inff()));
    if (at.grad) Mem<V>::store(at.grad + i, keep ? t.grad * weight : zero);
  }

  // Tokens [i, i + count), count < L, by way of a vector that is filled up with tokens that do not count.
  PK_HD void rest(const Tokens<S>& at, int64_t i, int64_t count) {
    S logp[L] = {}, old_logp[L] = {}, ref_logp[L] = {}, advantages[L] = {}, grad[L];
    uint8_t mask[L] = {};
    for (int64_t k = 0; k < L && k < count; k++) {
      logp[k] = at.logp[i + k];
      old_logp[k] = at.old_logp[i + k];
      if (KL != KlKind::none) ref_logp[k] = at.ref_logp[i + k];
      if (TOKEN_ADVANTAGES) advantages[k] = at.advantages[i + k];
      mask[k] = at.mask ? at.mask[i + k] : 1;
    }
    step<true>({logp, old_logp, ref_logp, advantages, mask, grad}, 0);
    if (at.grad)
      for (int64_t k = 0; k < count; k++) at.grad[i + k] = grad[k];
  }

  PK_HD void run(const Tokens<S>& at, int64_t n, double* out) {
    static_assert(kTile % L == 0, "only the last tile may have a rest");
    for (int64_t i = 0; i < n;) {
      const int64_t stop = i + kTile < n ? i + kTile : n;
      if (at.mask) {
        for (; i + L <= stop; i += L) {
          const Cover c = cover<int(L)>(at.mask + i);
          if (c == Cover::all) step<false>(at, i);
          else if (c == Cover::some) step<true>(at, i);
          else if (at.grad) Mem<V>::store(at.grad + i, V{});
        }
      } else {
        for (; i + L <= stop; i += L) step<false>(at, i);
      }
      if (i < stop) rest(at, i, stop - i);
      i = stop;
      sums.flush(out);
    }
  }
};

template <class T> PK_HD T* from(T* p, int64_t i) { return p ? p + i : nullptr; }

template <PolicyKind KIND, KlKind KL, bool TOKEN_ADVANTAGES, class V>
void sequence(const PolicyArgs<typename Lanes<V>::Scalar>& a, double* sums, int64_t b) {
  using S = typename Lanes<V>::Scalar;
  for (int k = 0; k < kPolicySums; k++) sums[k] = k == kMinRatio ? __builtin_inf() : 0;
  const int64_t begin = sequence_begin(a.layout, b), n = sequence_end(a.layout, b) - begin;
  const uint8_t* mask = from(a.mask, begin);
  const int64_t tokens = mask ? count_tokens(mask, n) : n;
  S* grad = from(a.grad, begin);
  if (tokens == 0) {
    if (grad) __builtin_memset(grad, 0, n * sizeof(S));
    return;
  }
  sums[kSumTokens] = double(tokens);
  sums[kSumSequences] = 1;
  const S weight = sequence_weight<S>(a.options.agg, double(tokens));
  const S* advantages = TOKEN_ADVANTAGES ? a.advantages + begin : nullptr;
  const uint8_t* mask_if_needed = tokens == n ? nullptr : mask;
  const Tokens<S> at{a.logp + begin, a.old_logp + begin, from(a.ref_logp, begin), advantages, mask_if_needed, grad};
  Walk<KIND, KL, TOKEN_ADVANTAGES, V> walk{policy_rule<S>(a.options), TOKEN_ADVANTAGES ? S(0) : a.advantages[b], weight, {}};
  walk.run(at, n, sums);
  sums[kSumLoss] *= double(weight);
}

template <class V> void sequences(const PolicyArgs<typename Lanes<V>::Scalar>& a, double* sums, int64_t begin, int64_t end) {
  constexpr PolicyKind clip = PolicyKind::clip;
  const bool k3 = a.options.kl == KlKind::k3, each = a.token_advantages;
  const auto body = k3 ? (each ? &sequence<clip, KlKind::k3, true, V> : &sequence<clip, KlKind::k3, false, V>)
                       : (each ? &sequence<clip, KlKind::none, true, V> : &sequence<clip, KlKind::none, false, V>);
  for (int64_t b = begin; b < end; b++) body(a, sums + b * kPolicySums, b);
}

template <class V> void backward(const PolicyGradArgs<typename Lanes<V>::Scalar>& a, int64_t begin, int64_t end) {
  using S = typename Lanes<V>::Scalar;
  constexpr int64_t L = Lanes<V>::count;
  const S upstream = *a.upstream, inverse_norm = *a.inverse_norm;
  int64_t i = begin;
  for (; i + L <= end; i += L) Mem<V>::store(a.grad + i, policy_grad(Mem<V>::load(a.unnormalised + i), upstream, inverse_norm));
  for (; i < end; i++) a.grad[i] = policy_grad(a.unnormalised[i], upstream, inverse_norm);
}

}  // namespace

extern const TokenLossCpu token_loss_cpu;
const TokenLossCpu token_loss_cpu = {&sequences<VecF>, &sequences<double>, &backward<VecF>, &backward<double>};

}  // namespace PK_ISA
}  // namespace prefkern
