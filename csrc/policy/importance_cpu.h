// Functions that importance_cpu.cpp exports once per instruction set.
#pragma once
#include "policy/importance.h"

namespace prefkern {
struct ImportanceCpu {
  // sums: [sequences, 2], of the weights and of how many there are.
  void (*weights_f32)(const WeightArgs<float>&, double* sums, int64_t begin, int64_t end);
  void (*weights_f64)(const WeightArgs<double>&, double* sums, int64_t begin, int64_t end);
  void (*scale_f32)(float* weights, float factor, int64_t begin, int64_t end);
  void (*scale_f64)(double* weights, double factor, int64_t begin, int64_t end);
  void (*keep_f32)(const OffPolicyArgs<float>&, int64_t begin, int64_t end);
  void (*keep_f64)(const OffPolicyArgs<double>&, int64_t begin, int64_t end);
};
}  // namespace prefkern
