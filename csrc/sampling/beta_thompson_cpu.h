// Functions that beta_thompson_cpu.cpp exports once per instruction set.
#pragma once
#include "sampling/beta_thompson.h"

namespace prefkern {

// Writes the utilities of prompts [begin, end), -infinity where not eligible, and the draws that are wanted. Returns the first
// eligible prompt with a wrong count, or -1.
template <class S> using ThompsonWalk = int64_t (*)(const ThompsonArgs<S>&, S* utilities, int64_t begin, int64_t end);

struct BetaThompsonCpu {
  ThompsonWalk<float> f32;
  ThompsonWalk<double> f64;
};
}  // namespace prefkern
