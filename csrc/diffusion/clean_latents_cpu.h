// Functions that clean_latents_cpu.cpp exports once per instruction set.
#pragma once
#include "diffusion/clean_latents.h"

namespace prefkern {

struct CleanLatentsCpu {
  // Slice i is slice i % slices of row i / slices.
  void (*sums_f32)(const X0LossArgs<float>&, int64_t begin, int64_t end);
  void (*sums_f64)(const X0LossArgs<double>&, int64_t begin, int64_t end);
  void (*gradient_f32)(const X0GradArgs<float>&, int64_t begin, int64_t end);
  void (*gradient_f64)(const X0GradArgs<double>&, int64_t begin, int64_t end);
  void (*step)(const LatentStepArgs&, int64_t begin, int64_t end);
};
}  // namespace prefkern
