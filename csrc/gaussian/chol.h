// What keeps a Cholesky factor up to date in place, in O(q^2): one more row and column of the matrix, or a change of rank one.
// The factor L of the leading size x size part is the lower triangle of a preallocated array; what is above the diagonal is never
// read or written. Everything is double. Formulas: math/gaussian.h.
#pragma once
#include "core/common.h"

namespace prefkern {

struct CholArgs {
  int64_t size = 0, stride = 0;  // of L before the call; between its rows
  double* factor = nullptr;
  const double* vector = nullptr;  // append: the new row of the matrix, [size + 1] with its diagonal; rank1: w, [size]
  double sigma = 1;  // rank1
  double* pivot = nullptr;  // [1]: the new squared diagonal, or the smallest of all
};

constexpr int64_t kCholCudaPoints = 512;

// Where the matrix would not stay positive definite, *pivot is the first squared diagonal that is not positive. On the CPU the
// factor has not changed then; on CUDA its diagonal is NaN from there on.
PK_API void cpu_chol_append(const CholArgs& args);
PK_API void cpu_chol_rank1(const CholArgs& args);

// Enqueue; return a cudaError_t. size below, or for rank1 at most, kCholCudaPoints.
PK_API int cuda_chol_append(const CholArgs& args, void* stream);
PK_API int cuda_chol_rank1(const CholArgs& args, void* stream);

}  // namespace prefkern
