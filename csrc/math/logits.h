// From a raw product x = h . w_v to the logit z whose softmax is taken, and back:
//   y = x + b_v,   c = softcap * tanh(scale * y / softcap)  (or scale * y),   z = c / temperature.
// Kernels work on `pre`, the value before the last multiplication, and keep that multiplier apart: z = pre * factor.
// With no softcap the multiplier holds scale and temperature, and a plain row needs no extra arithmetic at all.
#pragma once
#include "core/elementary.h"

namespace prefkern {

// softcap == 0 means none. bias is indexed by column of the block, row_temperature by row; either may be null.
template <class S> struct LogitTransform {
  S scale = 1, softcap = 0, temperature = 1;
  const S* bias = nullptr;
  const S* row_temperature = nullptr;
  // A raw logit of -inf is a token that cannot be drawn, and stays at -inf under a softcap, which would raise it to -softcap.
  bool masked = false;
};

inline namespace PK_ISA {

template <class S> PK_HD bool is_plain(const LogitTransform<S>& t) { return t.bias == nullptr && t.softcap == 0; }

// z = pre * factor. Rows with a temperature that is not positive come out NaN.
template <class S> PK_HD S logit_factor(const LogitTransform<S>& t, int64_t row) {
  const S tau = t.row_temperature ? t.row_temperature[row] : t.temperature;
  const S factor = (t.softcap != 0 ? S(1) : t.scale) / tau;
  return tau > 0 ? factor : S(__builtin_nanf(""));
}

template <class V, class S> PK_HD V pre_logit(const LogitTransform<S>& t, V x, V bias) {
  const V y = x + bias;
  if (t.softcap == 0) return y;
  const V capped = vtanh(y * (t.scale / t.softcap)) * t.softcap;
  if (!t.masked) return capped;
  return x == splat<V>(-__builtin_inff()) ? x : capped;
}

// d pre / d x as a function of pre.
template <class V, class S> PK_HD V pre_logit_slope(const LogitTransform<S>& t, V pre) {
  if (t.softcap == 0) return splat<V>(1);
  const V r = pre * (1 / t.softcap), slope = (1 - r * r) * t.scale;
  if (!t.masked) return slope;
  return pre == splat<V>(-__builtin_inff()) ? V{} : slope;
}

}  // namespace PK_ISA
}  // namespace prefkern
