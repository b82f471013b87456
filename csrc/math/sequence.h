// What is summed over the tokens of a sequence, w f(x - y), and its derivative in x: f is the identity or exp. What a token
// weighs for its place: with p tokens that count before it, decay^p, times the tail's weight unless p < head.
//
// V is float, double, or a vector of float.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class TokenTransform : int32_t { none = 0, exp = 1 };

struct PlaceRule {
  double tail = 1, decay = 1;
};

inline namespace PK_ISA {

template <TokenTransform F, class V> PK_HD V token_value(V x) { return F == TokenTransform::exp ? vexp(x) : x; }
template <TokenTransform F, class V> PK_HD V token_slope(V x) { return F == TokenTransform::exp ? vexp(x) : splat<V>(1); }

// decay^place; 0^0 is 1.
PK_HD double decay_power(double decay, int64_t place) {
  double power = 1;
  if (decay == 1) return power;
  for (double square = decay; place > 0; place >>= 1, square *= square)
    if (place & 1) power *= square;
  return power;
}
// power: decay_power of this place, which a walk from token to token knows already.
PK_HD double place_weight(const PlaceRule& rule, int64_t place, int64_t head, double power) {
  return place < head ? power : power * rule.tail;
}

// What a sequence's sum, or the gradient of it, is multiplied by. Without tokens that is 0.
PK_HD double sequence_scale(bool mean, int64_t tokens) { return tokens == 0 ? 0.0 : mean ? 1.0 / double(tokens) : 1.0; }

}  // namespace PK_ISA
}  // namespace prefkern
