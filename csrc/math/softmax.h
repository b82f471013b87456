// One-pass statistics of a softmax over z = pre * factor, and its gradient. Exponentials are taken in base 2:
//   t = (pre - max) * factor * log2(e),   s = sum 2^t,   u = sum t 2^t,   q = sum 4^t,   p = 2^t / s.
// The row maximum and log2(s) stay apart to the end: their sum, the log-sum-exp, would cancel at large offsets.
#pragma once
#include "core/elementary.h"

namespace prefkern {

// The sums a row is folded into, for one accumulator (a vector of lanes, or a CUDA thread).
template <class V> struct SoftmaxSums {
  V s = {}, u = {}, q = {}, x = {};
};

// A folded row. target_pre is NaN until the target column was met; best_before is the largest pre left of the target.
template <class S> struct SoftmaxRow {
  S max, s, u, q, x, target_pre, best_before;
};

template <class S> struct SoftmaxOutputs {
  S logp, entropy, lse, sum_sq_probs, mean_logit, log2_sum;
  bool is_top1;
};

// Gradient of a row with respect to pre: p * (constant + slope * log2 p), plus `target` at the target column.
template <class S> struct SoftmaxGrad {
  S max, base2_factor, log2_sum, constant, slope, target;
};

inline namespace PK_ISA {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
template <class S> constexpr S kMinusInf = -__builtin_inff();

// Below this exponent 2^t is exactly 0; clamping there keeps t * 2^t at 0 for logits of -inf. NaN passes.
template <class S> PK_HD constexpr S exponent_floor() { return sizeof(S) == 8 ? S(-1100) : S(kFlushExponent); }
template <class V> PK_HD V clamp_exponent(V t) { return vmax_nan(splat<V>(exponent_floor<typename Lanes<V>::Scalar>()), t); }

// Adds one element with the exponent t and e = 2^t.
template <bool ENTROPY, bool EXTRA, class V> PK_HD void softmax_add_power(SoftmaxSums<V>& a, V pre, V t, V e) {
  a.s += e;
  if (ENTROPY) a.u += e * t;
  if (EXTRA) {
    a.q += e * e;
    a.x += pre;
  }
}
// Adds one element; max must be finite and at least as large as every element added.
template <bool ENTROPY, bool EXTRA, class V, class S>
PK_HD void softmax_add(SoftmaxSums<V>& a, V pre, S max, S base2_factor) {
  const V t = clamp_exponent((pre - max) * base2_factor);
  softmax_add_power<ENTROPY, EXTRA>(a, pre, t, exp2_flush(t));
}

// Moves sums by 2^shift.
template <class V, class S> PK_HD void softmax_shift(SoftmaxSums<V>& a, S shift, S power) {
  a.u = (a.u + a.s * shift) * power;
  a.s = a.s * power;
  a.q = a.q * (power * power);
}
// Moves sums taken against old_max to new_max >= old_max; new_max must be finite.
template <class V, class S> PK_HD void softmax_rescale(SoftmaxSums<V>& a, S old_max, S new_max, S base2_factor) {
  const S shift = clamp_exponent((old_max - new_max) * base2_factor);
  softmax_shift(a, shift, exp2_flush(shift));
}

// Joins two partial rows. An empty part has max = -inf and zero sums.
template <class S> PK_HD void softmax_merge(S& max, SoftmaxSums<S>& a, S other_max, SoftmaxSums<S> b, S base2_factor) {
  const S joint = vmax(max, other_max);
  if (joint != kMinusInf<S>) {
    softmax_rescale(a, max, joint, base2_factor);
    softmax_rescale(b, other_max, joint, base2_factor);
  }
  max = joint;
  a.s += b.s;
  a.u += b.u;
  a.q += b.q;
  a.x += b.x;
}

// Joins the rows of two column ranges, `b` right of `a`. The target lies in one of them at most: a row that has it twice, as
// ranges that overlap give, turns NaN.
template <class S> PK_HD SoftmaxRow<S> softmax_join(const SoftmaxRow<S>& a, const SoftmaxRow<S>& b, S base2_factor) {
  SoftmaxSums<S> sums{a.s, a.u, a.q, a.x};
  S max = a.max;
  softmax_merge(max, sums, b.max, SoftmaxSums<S>{b.s, b.u, b.q, b.x}, base2_factor);
  const bool in_a = a.target_pre == a.target_pre, in_b = b.target_pre == b.target_pre, twice = in_a && in_b;
  const S nan = S(__builtin_nanf("")), target_pre = in_a ? a.target_pre : b.target_pre;
  if (twice) sums.s = nan;
  return {max, sums.s, sums.u, sums.q, sums.x, twice ? nan : target_pre, in_a ? a.best_before : vmax(b.best_before, a.max)};
}

// log p_y = ln2 ((pre_y - max) f - log2 s);  H = ln2 (log2 s - u / s);  lse = max * factor + ln2 log2 s;
// sum p^2 = q / s^2. Rounding may not push logp above 0 or H below 0. A row of -inf only, or with NaN, gives NaN.
template <class S> PK_HD SoftmaxOutputs<S> softmax_finish(const SoftmaxRow<S>& row, S factor, int64_t vocab) {
  SoftmaxOutputs<S> out;
  const S base2_factor = factor * S(kLog2E);
  out.log2_sum = vlog2(row.s);
  const S logp = S(kLn2) * ((row.target_pre - row.max) * base2_factor - out.log2_sum);
  out.logp = logp > 0 ? S(0) : logp;
  const S entropy = S(kLn2) * (out.log2_sum - row.u / row.s);
  out.entropy = entropy < 0 ? S(0) : entropy;
  out.lse = row.max * factor + S(kLn2) * out.log2_sum;
  out.sum_sq_probs = row.q / (row.s * row.s);
  out.mean_logit = row.x / S(vocab) * factor;
  out.is_top1 = row.target_pre >= row.max && row.target_pre > row.best_before;
  return out;
}

// d(g_logp log p_y + g_ent H + g_lse lse)/dz_v = g_logp (1[v=y] - p_v) - g_ent p_v (log p_v + H) + g_lse p_v.
template <class S>
PK_HD SoftmaxGrad<S> softmax_grad(S max, S log2_sum, S factor, S entropy, S g_logp, S g_entropy, S g_lse) {
  return {max,
          factor * S(kLog2E),
          log2_sum,
          factor * (g_lse - g_logp - g_entropy * entropy),
          -factor * g_entropy * S(kLn2),
          factor * g_logp};
}

template <class V, class S> PK_HD V softmax_grad_value(const SoftmaxGrad<S>& g, V pre) {
  const V log2_p = clamp_exponent((pre - g.max) * g.base2_factor - g.log2_sum);
  return exp2_flush(log2_p) * (log2_p * g.slope + g.constant);
}

}  // namespace PK_ISA
}  // namespace prefkern
