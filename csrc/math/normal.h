// Standard normal numbers from random words, two from two by the method of Box and Muller: with u = (a + 1/2) 2^-32 and
// v = (b + 1/2) 2^-32,
//     sqrt(-2 ln u) cos(2 pi v),   sqrt(-2 ln u) sin(2 pi v).
// In float within 1e-6 of these definitions for every pair of words: neither u nor v is ever rounded to a float, which would lose
// most of what is near u = 1. The logarithm is taken of 1 - (1 - u) there, and whole eighths of a turn leave v as integers.
// V is float, or on the CPU a vector of floats; double, also a CPU type, takes the C library's functions.
#pragma once
#include "core/elementary_more.h"

namespace prefkern {
inline namespace PK_ISA {

// Words beside real numbers of type V.
template <class V> struct Words;
template <> struct Words<float> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
  static PK_HD float real(int32_t x) { return static_cast<float>(x); }
};
#if !defined(__CUDACC__) && !defined(PK_SIMT)
template <> struct Words<VecF> {
  using Unsigned = VecU;
  using Signed = VecI;
  static PK_HD VecF real(VecI x) { return __builtin_convertvector(x, VecF); }
};
#endif

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

// cos(2 pi v) and sin(2 pi v), each with an error <= 1.2e-7: quarters of a turn exchange the two and turn their signs; what
// remains, at most an eighth, goes into their Taylor polynomials, in turns.
template <class V> PK_HD NormalPair<V> unit_circle(typename Words<V>::Unsigned word) {
  using U = typename Words<V>::Unsigned;
  using I = typename Words<V>::Signed;
  constexpr double turn = 6.283185307179586477, turn2 = turn * turn;
  constexpr float s1 = float(turn), s3 = float(-turn2 * turn / 6), s5 = float(turn2 * turn2 * turn / 120),
                  s7 = float(-turn2 * turn2 * turn2 * turn / 5040), s9 = float(turn2 * turn2 * turn2 * turn2 * turn / 362880);
  constexpr float c2 = float(-turn2 / 2), c4 = float(turn2 * turn2 / 24), c6 = float(-turn2 * turn2 * turn2 / 720),
                  c8 = float(turn2 * turn2 * turn2 * turn2 / 40320),
                  c10 = float(-turn2 * turn2 * turn2 * turn2 * turn2 / 3628800);
  const U quarter = (word + 0x20000000u) >> 30;
  const I rest = I(word - (quarter << 30));  // in [-2^29, 2^29)
  const V x = Words<V>::real(rest * 2 + 1) * 0x1p-33f, x2 = x * x;
  const V sine = x * (s1 + x2 * (s3 + x2 * (s5 + x2 * (s7 + x2 * s9))));
  const V cosine = 1.0f + x2 * (c2 + x2 * (c4 + x2 * (c6 + x2 * (c8 + x2 * c10))));
  const auto odd = (quarter & 1u) != 0u;
  const V first = odd ? sine : cosine, second = odd ? cosine : sine;
  U first_bits, second_bits;
  __builtin_memcpy(&first_bits, &first, sizeof first);
  __builtin_memcpy(&second_bits, &second, sizeof second);
  first_bits ^= ((quarter + 1u) & 2u) << 30;
  second_bits ^= (quarter & 2u) << 30;
  NormalPair<V> p;
  __builtin_memcpy(&p.first, &first_bits, sizeof first_bits);
  __builtin_memcpy(&p.second, &second_bits, sizeof second_bits);
  return p;
}

template <class V> PK_HD NormalPair<V> normal_pair(typename Words<V>::Unsigned a, typename Words<V>::Unsigned b) {
  const V radius = sqrt_any(minus_two_log<V>(a));
  const NormalPair<V> p = unit_circle<V>(b);
  return {radius * p.first, radius * p.second};
}

#if !defined(__CUDACC__) && !defined(PK_SIMT)
PK_HD NormalPair<double> normal_pair64(uint32_t a, uint32_t b) {
  constexpr double turn = 6.283185307179586477;
  const double radius = __builtin_sqrt(-2 * __builtin_log((a + 0.5) * 0x1p-32)), angle = turn * ((b + 0.5) * 0x1p-32);
  return {radius * __builtin_cos(angle), radius * __builtin_sin(angle)};
}
#endif

}  // namespace PK_ISA
}  // namespace prefkern
