// Cosines and sines of turns that random words stand for.
//
// V is float, double, or a vector of float.
#pragma once
#include "core/random_words.h"

namespace prefkern {
inline namespace PK_ISA {

template <class V> struct Direction {
  V cosine, sine;
};

// cos and sin of 2 pi (quarters / 4 + x), x at most an eighth of a turn: their Taylor polynomials in x, which quarters exchange
// and negate. In float each has an error <= 1.2e-7.
template <class V> PK_HD Direction<V> direction(typename Words<V>::Unsigned quarters, V x) {
  using S = typename Lanes<V>::Scalar;
  constexpr int terms = sizeof(S) == 8 ? 9 : 5;
  // (2 pi)^k / k!, with signs
  constexpr double turn = 6.283185307179586477, c2 = -turn * turn / 2, s3 = turn * c2 / 3, c4 = turn * -s3 / 4,
                   s5 = turn * c4 / 5, c6 = turn * -s5 / 6, s7 = turn * c6 / 7, c8 = turn * -s7 / 8, s9 = turn * c8 / 9,
                   c10 = turn * -s9 / 10, s11 = turn * c10 / 11, c12 = turn * -s11 / 12, s13 = turn * c12 / 13,
                   c14 = turn * -s13 / 14, s15 = turn * c14 / 15, c16 = turn * -s15 / 16, s17 = turn * c16 / 17,
                   c18 = turn * -s17 / 18;
  constexpr double of_cosine[] = {1, c2, c4, c6, c8, c10, c12, c14, c16, c18};
  constexpr double of_sine[] = {turn, s3, s5, s7, s9, s11, s13, s15, s17};
  const V x2 = x * x;
  V c = splat<V>(S(of_cosine[terms])), s = splat<V>(S(of_sine[terms - 1]));
  for (int k = terms - 1; k >= 0; k--) c = S(of_cosine[k]) + x2 * c;
  for (int k = terms - 2; k >= 0; k--) s = S(of_sine[k]) + x2 * s;
  s = s * x;
  const auto odd = (quarters & 1u) != 0u;
  return {Words<V>::negate_if((quarters + 1u) >> 1, odd ? s : c), Words<V>::negate_if(quarters >> 1, odd ? c : s)};
}

// The nearest quarter of word / 2^32 turns, and what remains: in [-2^29, 2^29).
template <class U> PK_HD U nearest_quarter(U word) { return (word + 0x20000000u) >> 30; }
template <class U> PK_HD U beyond_quarter(U word, U quarter) { return word - (quarter << 30); }

}  // namespace PK_ISA
}  // namespace prefkern
