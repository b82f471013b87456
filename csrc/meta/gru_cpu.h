// Functions that gru_cpu.cpp exports once per instruction set: step `step` of the rows [first, last), whose product and carry begin
// at those of `first`.
#pragma once
#include "meta/gru.h"

namespace prefkern {

struct GruCpu {
  void (*forward_f32)(const GruArgs<float>&, int64_t step, int64_t first, int64_t last, const float* product, float* carry);
  void (*forward_f64)(const GruArgs<double>&, int64_t step, int64_t first, int64_t last, const double* product, double* carry);
  void (*backward_f32)(const GruArgs<float>&, int64_t step, int64_t first, int64_t last, const float* product, float* carry);
  void (*backward_f64)(const GruArgs<double>&, int64_t step, int64_t first, int64_t last, const double* product, double* carry);
  // C [m, n] = A [m, k] B [k, n] (+ C), rows of A `a_stride` and of C n apart. For double alone, which has no other product here.
  void (*multiply_f64)(int64_t m, int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b, double* c,
                       bool accumulate);
};
}  // namespace prefkern
