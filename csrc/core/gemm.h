// C = alpha op(A) op(B) (+ C), row-major, accumulated in float (double for double).
//
// On the CPU by gemm_cpu.h where own_gemm() says so, else by the library torch was built with. On CUDA by cuBLAS through torch's
// own handle and workspace; A and B may then be bfloat16 or float16 with C in float32, which no public torch call offers together
// with accumulation into C; or C in their type, rounded once.
#pragma once
#include <optional>

#include "core/gemm_cpu.h"
#include "core/tensor.h"

namespace prefkern {

struct Matrix {
  const void* data;
  int64_t stride;  // elements from one row to the next
  bool transposed;  // use it as its transpose
  std::optional<DType> type = std::nullopt;  // if it is narrower than the other factor: for own_gemm() alone
};

const GemmCpu& gemm_of_isa();

// A is [m, k] and B [k, n] after transposition; C is [m, n].
void gemm(const Tensor& on_device_of, DType ab_type, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, void* c,
          DType c_type, int64_t c_stride, bool accumulate, double alpha = 1.0);

}  // namespace prefkern
