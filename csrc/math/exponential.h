// Exponentials, logarithms and the logistic function without cancellation, for formulas of several rooms.
//
// V is float, double, or a vector of float, for which comparisons and ?: work lane by lane.
#pragma once
#include "core/elementary.h"

namespace prefkern {
inline namespace PK_ISA {

template <class V> using LanesIf = decltype(V() < V());  // what ?: takes: bool, or one integer per lane

// e^x, and where |x| < kExpTail also tail = e^x - 1 - x = x^2 (1/2! + x/3! + ...). Vectors on the CPU have their own.
template <class V> PK_HD V exp_tail(V x, V& tail) {
  constexpr int terms = sizeof(V) == 8 ? 13 : 6;
  constexpr double inverse_factorial[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,     1.0 / 720,
                                          1.0 / 5040,      1.0 / 40320,      1.0 / 362880,     1.0 / 3628800, 1.0 / 39916800,
                                          1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
  V series = V(inverse_factorial[terms - 1]);
  for (int k = terms - 2; k >= 0; k--) series = series * x + V(inverse_factorial[k]);
  tail = x * x * series;
  return vexp(x);
}

// e^x - 1 - x. Subtracting loses nothing where the result is not small, and where it is there is `tail`: relative error
// <= 3e-6 in float, 1e-14 in double.
template <class V> PK_HD V exp_minus_1_minus(V x, V exp_x, V tail) {
  using S = typename Lanes<V>::Scalar;
  return (x < S(kExpTail)) & (x > S(-kExpTail)) ? tail : (exp_x - S(1)) - x;
}

// q = sigmoid(z) and its derivative q (1 - q), for every z.
template <class V> PK_HD void sigmoid(V z, V& q, V& slope) {
  using S = typename Lanes<V>::Scalar;
  const V e = vexp(-vmax(z, -z)), inverse = splat<V>(1) / (e + S(1));
  q = z < S(0) ? e * inverse : inverse;
  slope = e * inverse * inverse;
}

// e^x - 1.
template <class V> PK_HD V vexpm1(V x) {
  using S = typename Lanes<V>::Scalar;
  V tail;
  const V e = exp_tail(x, tail);
  return (x < S(kExpTail)) & (x > S(-kExpTail)) ? x + tail : e - S(1);
}

// 2 artanh(s) for |s| <= 1/3 in float: a polynomial in s^2, fitted for least relative error (4e-9) with the constant term fixed.
template <class V> PK_HD V artanh_twice(V s) {
  const V t = s * s;
  return s * 2 + s * (t * (0.66666316f + t * (0.40024854f + t * (0.27961419f + t * 0.28174657f))));
}

// log(1 + u) for -1/2 <= u <= 1, which loses nothing where u is small: relative error <= 2.5e-7 in float.
template <class V> PK_HD V log1p_near(V u) { return artanh_twice(u / (u + 2)); }
PK_HD double log1p_near(double u) { return vlog1p(u); }

// log(1 - e^a) for a <= 0; -infinity at 0, NaN above.
template <class V> PK_HD V log1mexp(V a) {
  using S = typename Lanes<V>::Scalar;
  return a < S(-0.6931471805599453) ? log1p_near(-vexp(a)) : vlog(-vexpm1(a));
}

// sigmoid(z), sigmoid(-z), -log sigmoid(z) and -log sigmoid(-z), for every z, from one exponential and, in float, one division.
template <class V> struct Logistic {
  V q, p, nll, opposite;
};
template <class V> PK_HD Logistic<V> logistic(V z) {
  const V zero = {}, e = vexp(-vmax(z, -z)), r = 1 / ((1 + e) * (2 + e));
  const V tail = artanh_twice(e * (1 + e) * r), near = (2 + e) * r, far = e * near;
  const LanesIf<V> negative = z < 0;
  return {negative ? far : near, negative ? near : far, vmax(-z, zero) + tail, vmax(z, zero) + tail};
}
PK_HD Logistic<double> logistic(double z) {
  const double e = vexp(-vmax(z, -z)), tail = vlog1p(e), near = 1 / (1 + e), far = e / (1 + e);
  return {z < 0 ? far : near, z < 0 ? near : far, vmax(-z, 0.0) + tail, vmax(z, 0.0) + tail};
}

}  // namespace PK_ISA
}  // namespace prefkern
