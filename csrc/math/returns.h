// Recursions that run backwards through a sequence of rewards r and values V:
//   returns    R_t = r_t + gamma R_{t+1}
//   advantages A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t  (GAE)
// Both are y_t = x_t + c y_{t+1} with y = 0 behind the last token. V behind the last token is 0 where the sequence is
// finished, and else what Bootstrap says: repeat is the last value once more (EGAE), critic a value that is given.
//
// A stretch of tokens acts on what comes from behind it as an affine map. Maps compose, so that a warp can work on all
// tokens of a stretch at once. Everything is in double: a product of thousands of c's, and differences of values.
#pragma once
#include "core/elementary.h"

namespace prefkern {

enum class Bootstrap : int32_t { repeat = 0, critic = 1, zero = 2 };

struct ReturnsRule {
  Bootstrap bootstrap = Bootstrap::zero;
  double gamma = 1, decay = 1;  // decay: the c above
};

inline namespace PK_ISA {

struct AffineMap {  // y -> add + factor y
  double add = 0, factor = 1;
};
PK_HD double apply(const AffineMap& m, double y) { return m.add + m.factor * y; }
PK_HD AffineMap compose(const AffineMap& outer, const AffineMap& inner) {
  return {outer.add + outer.factor * inner.add, outer.factor * inner.factor};
}

// With gamma 1 exactly r where the next value is the last one repeated.
PK_HD double td_error(double gamma, double reward, double value, double next_value) {
  return gamma == 1 ? reward + (next_value - value) : reward + gamma * next_value - value;
}

}  // namespace PK_ISA
}  // namespace prefkern
