// The weight of a token in a completion with a forward run of f tokens and a backward run of b, of n in all: w_pos where
// the advantage is positive, w_neg where it is negative, if the token t is in a run (t < f, or t >= n - b); where it is in
// both, once that or its square. Other tokens, and those of a completion with advantage 0, get 1.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class ConflictCombine : int32_t { max_once = 0, product = 1 };

struct ConflictRule {
  ConflictCombine combine = ConflictCombine::max_once;
  double w_pos = 2, w_neg = 0;
};

inline namespace PK_ISA {

template <class S> struct RowWeights {
  int64_t forward, backward_from, length;
  S once, twice, outside;  // in one run, in both, in none
};

// A negative length marks a completion of which nothing is known: all its weights are NaN, as they are where the
// advantage is NaN.
template <class S> PK_HD RowWeights<S> row_weights(const ConflictRule& rule, S advantage, int64_t forward, int64_t backward,
                                                   int64_t length) {
  const S once = advantage > 0 ? S(rule.w_pos) : advantage < 0 ? S(rule.w_neg) : S(1);
  const S twice = rule.combine == ConflictCombine::product ? once * once : once;
  if (length >= 0 && advantage == advantage) return {forward, length - backward, length, once, twice, S(1)};
  const S nan = S(__builtin_nanf(""));
  return {0, 0, INT64_MAX, nan, nan, nan};
}

template <class S> PK_HD S conflict_weight(const RowWeights<S>& row, int64_t t) {
  const bool first = t < row.forward, last = t >= row.backward_from;
  const S weight = first && last ? row.twice : first || last ? row.once : row.outside;
  return t < row.length ? weight : S(0);
}

}  // namespace PK_ISA
}  // namespace prefkern
