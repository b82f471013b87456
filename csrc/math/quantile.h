// Order statistics: floats as integers of the same order, and which of the sorted values a quantile lies between.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class Interpolation : int32_t { linear = 0, lower = 1, higher = 2 };

// Integers are found a digit at a time, the highest first.
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
template <class S> struct OrderKey;
template <> struct OrderKey<float> {
  using Type = uint32_t;
  using Signed = int32_t;
  static constexpr int passes = 3;
};
template <> struct OrderKey<double> {
  using Type = uint64_t;
  using Signed = int64_t;
  static constexpr int passes = 6;
};

inline namespace PK_ISA {

// Ascending with x, from -inf to inf; both zeros are one. Not for NaN.
template <class S> PK_HD typename OrderKey<S>::Type order_key(S x) {
  using Key = typename OrderKey<S>::Type;
  using Signed = typename OrderKey<S>::Signed;
  x += S(0);  // -0 becomes 0
  Signed bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  constexpr int top = 8 * sizeof(Key) - 1;
  return Key(bits) ^ (Key(bits >> top) | Key(1) << top);  // of a negative number all bits are turned, else the highest
}
template <class S> PK_HD S order_value(typename OrderKey<S>::Type key) {
  using Key = typename OrderKey<S>::Type;
  constexpr int top = 8 * sizeof(Key) - 1;
  const Key bits = key ^ (key >> top ? Key(1) << top : ~Key(0));
  S x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Where the digit of pass p begins, and its value.
template <class S> PK_HD int digit_shift(int pass) {
  const int shift = int(8 * sizeof(S)) - kDigitBits * (pass + 1);
  return shift > 0 ? shift : 0;
}
template <class S> PK_HD uint32_t digit(typename OrderKey<S>::Type key, int pass) {
  const int rest = int(8 * sizeof(S)) - kDigitBits * pass;
  return uint32_t(key >> digit_shift<S>(pass)) & ((1u << (rest < kDigitBits ? rest : kDigitBits)) - 1);
}
// Whether the digits before those of this pass are those of `chosen`.
template <class S> PK_HD bool digits_match(typename OrderKey<S>::Type key, typename OrderKey<S>::Type chosen, int pass) {
  return pass == 0 || (key ^ chosen) >> digit_shift<S>(pass - 1) == 0;
}

// x >= 0, or the integer that it is but for the rounding of the product it comes from: 0.07 * 100 is 7.
PK_HD double whole(double x) {
  const double nearest = double(int64_t(x + 0.5)), off = x > nearest ? x - nearest : nearest - x;
  return off <= 0x1p-50 * x ? nearest : x;
}

// How many of n values are the largest `fraction` of them.
PK_HD int64_t largest_count(double fraction, int64_t n) {
  const double exact = whole(fraction * double(n));
  const int64_t down = int64_t(exact), up = down + (exact > double(down));
  return up < n ? up : n;
}

// The q-quantile of n > 0 sorted values lies at q (n - 1): `weight` of the way from value `rank` to the next.
struct QuantilePosition {
  int64_t rank;
  double weight;
};
PK_HD QuantilePosition quantile_position(double q, int64_t n, Interpolation interpolation) {
  const double at = whole(q * double(n - 1));
  const int64_t rank = int64_t(at);
  const double weight = at - double(rank);
  if (interpolation == Interpolation::linear) return {rank, weight};
  return {interpolation == Interpolation::higher && weight > 0 ? rank + 1 : rank, 0.0};
}

template <class S> PK_HD S interpolate(S low, S high, double weight) {
  if (weight == 0 || low == high) return low;
  const double a = low, b = high, difference = b - a;
  if (difference == __builtin_inf()) {
    // Of infinite ends, their sum: the finite end does not matter. Of finite ones, the difference overflowed.
    if (a == -__builtin_inf() || b == __builtin_inf()) return S(a + b);
    return S(a * (1 - weight) + b * weight);
  }
  return S(weight < 0.5 ? a + weight * difference : b - difference * (1 - weight));
}

}  // namespace PK_ISA
}  // namespace prefkern
