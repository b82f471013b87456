// The inner loss of a learned policy update (LPG) and the cell of its recurrent network.
//
// Loss of a row: s log(p + e) q + a sum_w y (log(y + e) - log(t + e)), with the probability p of the action, its adjustment q, the
// prediction y and its target t (distributions over W), the sign s and the weight a, e = 1e-8. Over N rows the mean. First
// derivatives, to be multiplied by c, the upstream gradient over N:
//   p: s q / (p + e)    y: a (log(y + e) - log(t + e) + y / (y + e))    q: s log(p + e)    t: -a y / (t + e)
// Second ones, of the sum over these four times what comes from above them, follow from their slopes.
//
// Cell, from input gates g and products P = U h: u = sig(g_r + P_r), z = sig(g_z + P_z), m = P_n + b, n = tanh(g_n + u m),
// h' = n + z (h - n).
//
// V is float, double, or a vector of float, for which comparisons and ?: work lane by lane.
#pragma once
#include "core/elementary.h"
#include "math/exponential.h"

namespace prefkern {

constexpr double kLpgEps = 1e-8;  // keeps the logarithm of 0 at -18.4

struct LpgRule {
  double alpha = 0.5;  // a
  double sign = 1;  // s
};

inline namespace PK_ISA {

// ---- inner loss -------------------------------------------------------------------------------------------------------
template <class V> PK_HD V lpg_shifted(V x) {
  using S = typename Lanes<V>::Scalar;
  return x + S(kLpgEps);
}

template <class V> PK_HD V lpg_policy(V p, V q) { return vlog(lpg_shifted(p)) * q; }
template <class V> PK_HD V lpg_divergence(V y, V target) { return y * (vlog(lpg_shifted(y)) - vlog(lpg_shifted(target))); }

// By the probability and by its adjustment; by the prediction and by its target. Without c and the factors s and a.
template <class V> struct LpgPair {
  V first, second;
};
template <class V> PK_HD LpgPair<V> lpg_policy_slopes(V p, V q) {
  const V shifted = lpg_shifted(p);
  return {q / shifted, vlog(shifted)};
}
template <class V> PK_HD LpgPair<V> lpg_divergence_slopes(V y, V target) {
  const V shifted = lpg_shifted(y), below = lpg_shifted(target);
  return {vlog(shifted) - vlog(below) + y / shifted, -y / below};
}

// What comes back to the two from above their slopes, and the sum itself, which is the derivative by c.
template <class V> struct LpgSecond {
  V sum, first, second;
};
template <class V> PK_HD LpgSecond<V> lpg_policy_second(V p, V q, V above_first, V above_second) {
  const V inverse = 1 / lpg_shifted(p), steep = above_first * inverse;
  const LpgPair<V> slopes = lpg_policy_slopes(p, q);
  return {above_first * slopes.first + above_second * slopes.second, inverse * (above_second - steep * q), steep};
}
template <class V> PK_HD LpgSecond<V> lpg_divergence_second(V y, V target, V above_first, V above_second) {
  using S = typename Lanes<V>::Scalar;
  const V inverse = 1 / lpg_shifted(y), below = 1 / lpg_shifted(target);
  const LpgPair<V> slopes = lpg_divergence_slopes(y, target);
  return {above_first * slopes.first + above_second * slopes.second,
          above_first * (inverse + inverse * inverse * S(kLpgEps)) - above_second * below,
          below * (above_second * (y * below) - above_first)};
}

// ---- cell -------------------------------------------------------------------------------------------------------------
template <class V> struct GruCell {
  V reset, keep, fresh, inner, hidden;  // u, z, n, m, h'
};
template <class V> PK_HD GruCell<V> gru_cell(V g_r, V g_z, V g_n, V p_r, V p_z, V p_n, V bias, V hidden) {
  GruCell<V> c;
  V slope;
  sigmoid(g_r + p_r, c.reset, slope);
  sigmoid(g_z + p_z, c.keep, slope);
  c.inner = p_n + bias;
  c.fresh = vtanh(g_n + c.reset * c.inner);
  c.hidden = c.fresh + c.keep * (hidden - c.fresh);
  return c;
}

// Gradients by the gates, by m, and by h apart from what comes to it through the products.
template <class V> struct GruGradient {
  V g_r, g_z, g_n, inner, hidden;
};
template <class V> PK_HD GruGradient<V> gru_cell_backward(V grad, V reset, V keep, V fresh, V inner, V hidden) {
  GruGradient<V> d;
  d.hidden = grad * keep;
  d.g_z = grad * (hidden - fresh) * keep * (1 - keep);
  d.g_n = grad * (1 - keep) * (1 - fresh * fresh);
  d.inner = d.g_n * reset;
  d.g_r = d.inner * inner * (1 - reset);
  return d;
}

}  // namespace PK_ISA
}  // namespace prefkern
