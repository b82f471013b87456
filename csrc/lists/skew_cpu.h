// Functions that skew_cpu.cpp exports once per instruction set.
#pragma once
#include "lists/skew.h"

namespace prefkern {

constexpr int64_t kSkewArrays = 6;  // scratch: so many arrays of the larger of 2k and K, times kMostLanes

struct SkewCpu {
  void (*rows_f32)(const SkewArgs<float>&, float* scratch, int64_t begin, int64_t end);
  void (*rows_f64)(const SkewArgs<double>&, double* scratch, int64_t begin, int64_t end);
  void (*means_f32)(const SkewMeansArgs<float>&, float* scratch, int64_t begin, int64_t end);
  void (*means_f64)(const SkewMeansArgs<double>&, double* scratch, int64_t begin, int64_t end);
};
}  // namespace prefkern
