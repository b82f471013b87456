// C = op(A) op(B) (+ C) in float32, of which only as many rows, or as many products per element, are worked on as a number in
// device memory says: a grid that covers everything finds there how far to go, and nobody waits for the number.
// bfloat16 and float16, on compute capability 9.0, with CUTLASS (hopper_gemm_cuda.cu).
#pragma once
#include "core/common.h"

namespace prefkern {

// What is bounded by `count`, and how op(A) and op(B) lie in memory.
enum class BoundedProduct : int32_t {
  rows_nt = 0,  // the m of A [m, k] B^T, with B [n, k]
  rows_nn = 1,  // the m of A [m, k] B, with B [k, n]
  depth_tn = 2  // the k of A^T B, with A [k, m], B [k, n]
};

struct BoundedGemmArgs {
  BoundedProduct product = BoundedProduct::rows_nt;
  DType dtype = DType::bf16;
  int64_t m = 0, n = 0, k = 0;
  const void *a = nullptr, *b = nullptr;
  int64_t a_stride = 0, b_stride = 0, c_stride = 0;  // elements from one row in memory to the next
  float* c = nullptr;
  bool accumulate = false;
  // Bounded to *count - first, at least 0. Rows of C may be written up to the next multiple of 256, from rows of A up to there;
  // a bounded k is rounded up to the next multiple of 64, and is at least that unless C is added to: A and B hold zeros there.
  const int64_t* count = nullptr;
  int64_t first = 0;
};

PK_API bool gemm_bounded_takes(const BoundedGemmArgs& args);  // types, strides and addresses
// Enqueues on `stream`; returns a cudaError_t. Needs hopper_device() and a build with CUTLASS.
PK_API int cuda_gemm_bounded(const BoundedGemmArgs& args, void* stream);

}  // namespace prefkern
