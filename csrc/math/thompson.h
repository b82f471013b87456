// Draws from beta posteriors, and what a prompt of success probability p is worth to a group of rollouts.
//
// V is float, double, or a vector of float: a lane is a prompt. Words are those of Philox for (seed, step, prompt), the same on
// every device; what is computed of them is equal up to rounding, so that once in some ten million draws a device accepts a
// proposal that another rejects.
#pragma once
#include "core/elementary_more.h"
#include "math/exponential.h"
#include "math/turns.h"

namespace prefkern {

enum class ThompsonUtility : int32_t { p1mp2 = 0, p1mp = 1 };
enum class ThompsonMode : int32_t { thompson = 0, mean = 1 };

constexpr double kMostEvidence = 1e30;  // counts beyond would overflow float
constexpr int kMostProposals = 64;  // a proposal is rejected once in twenty times at most: never reached
constexpr uint32_t kThompsonStream = 0x42657461u;  // the last word of the counter: other uses of a seed get other numbers

inline namespace PK_ISA {

// p (1 - p)^2, largest at 1/3, or p (1 - p), the variance of a reward, largest at 1/2.
template <class V> PK_HD V thompson_utility(ThompsonUtility utility, V p) {
  const V q = 1 - p, variance = p * q;
  return utility == ThompsonUtility::p1mp2 ? variance * q : variance;
}

// Its expectation under Beta(a, b), with S = a + b: a b (b + 1) / (S (S + 1) (S + 2)) and a b / (S (S + 1)), as products of
// quotients that do not overflow.
template <class V> PK_HD V expected_thompson_utility(ThompsonUtility utility, V a, V b) {
  const V s = a + b, variance = (a / s) * (b / (s + 1));
  return utility == ThompsonUtility::p1mp2 ? variance * ((b + 1) / (s + 2)) : variance;
}

// ---- from words to numbers ------------------------------------------------------------------------------------------------
// In (0, 1], of 31 bits.
template <class V> PK_HD V unit_number(typename Words<V>::Unsigned w) {
  using S = typename Lanes<V>::Scalar;
  return (Words<V>::real(typename Words<V>::Signed(w >> 1)) + S(0.5)) * S(0x1p-31);
}

// Of 2 pi w / 2^32.
template <class V> PK_HD Direction<V> uniform_direction(typename Words<V>::Unsigned w) {
  using S = typename Lanes<V>::Scalar;
  using I = typename Words<V>::Signed;
  const auto quarter = nearest_quarter(w);
  return direction<V>(quarter, Words<V>::real(I(beyond_quarter(w, quarter))) * S(0x1p-32));
}

// log(1 + t) - t + t^2/2 - t^3/3 for t > -1, which is -t^4/4 + t^5/5 - ...
template <class V> PK_HD V log1p_beyond_cubic(V t, V one_plus_t) {
  using S = typename Lanes<V>::Scalar;
  constexpr int last = sizeof(S) == 8 ? 30 : 16;
  V series = splat<V>(S(-1.0 / last));
  for (int k = last - 1; k >= 4; k--) series = series * t + S((k % 2 ? 1.0 : -1.0) / k);
  const V t2 = t * t, direct = vlog(one_plus_t) - t + t2 * (S(0.5) - t * S(1.0 / 3));
  return (t < S(0.25)) & (t > S(-0.25)) ? series * t2 * t2 : direct;
}

// ---- draws ----------------------------------------------------------------------------------------------------------------
// Marsaglia and Tsang (2000): for a shape >= 1, with d = shape - 1/3, c = 1 / sqrt(9 d), x normal and u uniform, d v with
// v = (1 + c x)^3 is a gamma variate if v > 0 and log u < x^2/2 + d (1 - v + log v). With t = c x the right-hand side is
// 3 d (log(1 + t) - t + t^2/2 - t^3/3): written like that it loses no digits where the shape is large.
template <class V> struct GammaProposal {
  V d, c;
  PK_HD explicit GammaProposal(V shape) {
    using S = typename Lanes<V>::Scalar;
    d = shape - S(1.0 / 3);
    c = 1 / sqrt_any(d * 9);
  }
  PK_HD LanesIf<V> accepts(V x, V u, V& v) const {
    using S = typename Lanes<V>::Scalar;
    const V t = c * x, w = t + 1, x2 = x * x;
    v = w * w * w;
    const LanesIf<V> positive = w > 0, at_once = positive & (u < 1 - x2 * x2 * S(0.0331)), unclear = positive & (at_once == 0);
    if (!any_lane(unclear)) return at_once;
    const V log_ratio = log1p_beyond_cubic(t, positive ? w : splat<V>(1)) * d * 3;
    return at_once | (unclear & (vlog(u) < log_ratio));
  }
};

// p of Beta(alpha + 1, beta + 1); NaN for counts that are negative, beyond kMostEvidence or no numbers.
template <class V> PK_HD V beta_draw(V alpha, V beta, uint64_t seed, uint32_t step, typename Words<V>::Unsigned prompt) {
  using S = typename Lanes<V>::Scalar;
  using Word = typename Words<V>::Unsigned;
  constexpr S most = S(kMostEvidence);
  const LanesIf<V> good = (alpha >= 0) & (alpha <= most) & (beta >= 0) & (beta <= most);
  const V zero = {}, first_shape = (good ? alpha : zero) + 1, second_shape = (good ? beta : zero) + 1;
  const GammaProposal<V> first(first_shape), second(second_shape);
  V first_v = zero, second_v = zero;
  LanesIf<V> first_open = good, second_open = good;
  const Word none = prompt ^ prompt;
  for (uint32_t attempt = 0; attempt < uint32_t(kMostProposals) && any_lane(first_open | second_open); attempt++) {
    const auto words = philox(seed, none + attempt, prompt, none + step, none + kThompsonStream);
    const V radius = sqrt_any(vlog(unit_number<V>(words.word[0])) * -2);
    const Direction<V> d = uniform_direction<V>(words.word[1]);
    V v;
    const LanesIf<V> first_taken = first_open & first.accepts(radius * d.cosine, unit_number<V>(words.word[2]), v);
    first_v = first_taken ? v : first_v;
    first_open = first_open & (first_taken == 0);
    const LanesIf<V> second_taken = second_open & second.accepts(radius * d.sine, unit_number<V>(words.word[3]), v);
    second_v = second_taken ? v : second_v;
    second_open = second_open & (second_taken == 0);
  }
  const V x = first.d * first_v, y = second.d * second_v;
  return good ? x / (x + y) : splat<V>(S(__builtin_nan("")));
}

}  // namespace PK_ISA
}  // namespace prefkern
