// Mean and variance of a Gaussian process at M candidates, from the Cholesky factor L of its q unique points: the rows of the
// kernel matrix, their scaling, the triangular solution and two sums, a few candidates at a time. Formulas: math/gaussian.h.
//
//     v = L^-1 S k(U, x),  S = diag(sqrt(counts)) or 1,   mean = v . weights,   var = max(0, variance - v . v)
//
// Everything is double. Scratch is O(q) times the few candidates: nothing of size q x M exists.
#pragma once
#include "core/common.h"
#include "math/gaussian.h"

namespace prefkern {

struct GpPosteriorArgs {
  GpKernel kernel = GpKernel::rbf;
  double variance = 1;
  int64_t points = 0, dims = 0, candidates = 0;  // q, d, M
  int64_t stride = 0;                            // between rows of the factor
  int64_t length_step = 0;                       // between the inverse lengths of dimensions: 0 or 1
  const double *factor = nullptr, *weights = nullptr;     // [q, q], of which the lower triangle is read; [q]
  const double *unique = nullptr, *inputs = nullptr;      // [q, d], [M, d]
  const double* inverse_length = nullptr;                 // [d] or [1]
  const int64_t* counts = nullptr;                        // [q], not negative; null: S = 1
  double *mean = nullptr, *var = nullptr;                 // [M]
};

constexpr int64_t kGpCudaPoints = 512;  // more do not fit the shared memory of a block

PK_API void cpu_gp_posterior(const GpPosteriorArgs& args);

// Enqueues; returns a cudaError_t. At most kGpCudaPoints points.
PK_API int cuda_gp_posterior(const GpPosteriorArgs& args, void* stream);

}  // namespace prefkern
