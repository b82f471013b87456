// What is summed over the tokens of a sequence, w f(x - y), and its derivative in x: f is the identity or exp.
//
// V is float, double, or a vector of float.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class TokenTransform : int32_t { none = 0, exp = 1 };

inline namespace PK_ISA {

template <TokenTransform F, class V> PK_HD V token_value(V x) { return F == TokenTransform::exp ? vexp(x) : x; }
template <TokenTransform F, class V> PK_HD V token_slope(V x) { return F == TokenTransform::exp ? vexp(x) : splat<V>(1); }

// What a sequence's sum, or the gradient of it, is multiplied by. Without tokens that is 0.
PK_HD double sequence_scale(bool mean, int64_t tokens) { return tokens == 0 ? 0.0 : mean ? 1.0 / double(tokens) : 1.0; }

}  // namespace PK_ISA
}  // namespace prefkern
