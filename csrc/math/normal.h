// Standard normal numbers from random words, two from two by the method of Box and Muller: with u = (a + 1/2) 2^-32 and
// v = (b + 1/2) 2^-32,
//     sqrt(-2 ln u) cos(2 pi v),   sqrt(-2 ln u) sin(2 pi v).
// In float within 1e-6 of these definitions for every pair of words: neither u nor v is ever rounded to a float, which would lose
// most of what is near u = 1. The logarithm is taken of 1 - (1 - u) there, and whole eighths of a turn leave v as integers.
// V is float, or on the CPU a vector of floats; double, also a CPU type, takes the C library's functions.
#pragma once
#include "core/elementary_more.h"
#include "math/turns.h"

namespace prefkern {
inline namespace PK_ISA {

template <class V> struct NormalPair {
  V first, second;
};

// -2 ln u, with a relative error <= 2e-7. u is m 2^n with m in [sqrt 1/2, sqrt 2), ln m is 2 artanh((m - 1) / (m + 1)) by its
// series, and for n = 0, where u is above sqrt 1/2, m - 1 is u - 1 without an error.
template <class V> PK_HD V minus_two_log(typename Words<V>::Unsigned word) {
  using I = typename Words<V>::Signed;
  constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // n times the first is exact
  const auto upper = I(word) < 0;
  const auto rest = upper ? ~word : word;
  const V w = (Words<V>::real(I(rest)) + 0.5f) * 0x1p-32f;  // u or 1 - u, whichever is smaller
  const V u = upper ? 1.0f - w : w;
  I bits;
  __builtin_memcpy(&bits, &u, sizeof bits);
  const I exponent = (bits - 0x3f3504f3) & -0x800000, n = exponent >> 23, mantissa = bits - exponent;  // of sqrt 1/2
  V m;
  __builtin_memcpy(&m, &mantissa, sizeof m);
  const V e = Words<V>::real(n), f = n == 0 ? -w : m - 1.0f;
  const V s = f / (f + 2.0f), s2 = s * s;
  const V series = s * s2 * (-1.33333333f + s2 * (-0.8f + s2 * (-0.571428571f + s2 * -0.444444444f)));
  return e * (-2 * ln2_high) + (e * (-2 * ln2_low) + (s * -4.0f + series));
}

// Of 2 pi v.
template <class V> PK_HD Direction<V> normal_direction(typename Words<V>::Unsigned word) {
  using I = typename Words<V>::Signed;
  const auto quarter = nearest_quarter(word);
  return direction<V>(quarter, Words<V>::real(I(beyond_quarter(word, quarter)) * 2 + 1) * 0x1p-33f);
}

template <class V> PK_HD NormalPair<V> normal_pair(typename Words<V>::Unsigned a, typename Words<V>::Unsigned b) {
  const V radius = sqrt_any(minus_two_log<V>(a));
  const Direction<V> d = normal_direction<V>(b);
  return {radius * d.cosine, radius * d.sine};
}

// On the CPU alone.
inline NormalPair<double> normal_pair64(uint32_t a, uint32_t b) {
  constexpr double turn = 6.283185307179586477;
  const double radius = __builtin_sqrt(-2 * __builtin_log((a + 0.5) * 0x1p-32)), angle = turn * ((b + 0.5) * 0x1p-32);
  return {radius * __builtin_cos(angle), radius * __builtin_sin(angle)};
}

}  // namespace PK_ISA
}  // namespace prefkern
