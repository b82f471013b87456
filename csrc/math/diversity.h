// Scalar formulas of greedy selection by cosine similarity; for host and device.
#pragma once
#include "core/common.h"

namespace prefkern {
inline namespace PK_ISA {

// Inside these bounds a norm, its inverse and a vector over its norm are normal numbers in float32.
constexpr double kLeastNorm = 1e-30, kMostNorm = 1e30;

// NaN outside, where a cosine says nothing.
PK_HD double inverse_norm(double norm) {
  return norm >= kLeastNorm && norm <= kMostNorm ? 1 / norm : double(__builtin_nanf(""));
}

// A candidate's score once its cosine with another chosen one is known; `first`: with the first.
template <class S> PK_HD S fold_cosine(S cosine, S score, bool first, bool maximum) {
  if (first) return cosine;
  return (maximum ? cosine > score : cosine < score) ? cosine : score;
}

// The score of what has been chosen: above every cosine, rounding included.
constexpr float kTaken = 4.0f;
template <class S> PK_HD bool taken(S score) { return score == S(kTaken); }

}  // namespace PK_ISA
}  // namespace prefkern
