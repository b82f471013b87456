// Functions that pair_errors_cpu.cpp exports once per instruction set.
#pragma once
#include "diffusion/pair_errors.h"

namespace prefkern {

struct PairErrorsCpu {
  // Slice i is slice i % slices of pair i / slices.
  void (*sums_f32)(const DiffusionPairArgs<float>&, int64_t begin, int64_t end);
  void (*sums_f64)(const DiffusionPairArgs<double>&, int64_t begin, int64_t end);
  void (*gradient_f32)(const DiffusionGradArgs<float>&, int64_t begin, int64_t end);
  void (*gradient_f64)(const DiffusionGradArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
