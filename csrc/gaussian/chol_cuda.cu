// The CUDA walk of chol.h: one block, a column of the factor after another, whose rows are shared out over the threads.
#include "core/cuda.cuh"
#include "gaussian/chol.h"
#include "math/gaussian.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) append_kernel(const CholArgs a) {
  PK_SMEM(double, w, kCholCudaPoints);  // what is left of the new row
  const int64_t n = a.size;
  double* row = a.factor + n * a.stride;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) w[i] = a.vector[i];
  __syncthreads();
  double squares = 0;
  for (int64_t j = 0; j < n; j++) {
    const double l = w[j] / a.factor[j * a.stride + j];
    squares += l * l;
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      if (i > j) w[i] -= a.factor[i * a.stride + j] * l;
    if (threadIdx.x == 0) row[j] = l;
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const double pivot = a.vector[n] - squares;
  row[n] = pivot > 0 ? vsqrt(pivot) : __builtin_nan("");
  *a.pivot = pivot;
}

__global__ void __launch_bounds__(kThreads) rank1_kernel(const CholArgs a) {
  PK_SMEM(double, w, kCholCudaPoints);
  PK_SMEM(double, diagonal, kCholCudaPoints);  // as it was
  const int64_t n = a.size;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    w[i] = a.vector[i];
    diagonal[i] = a.factor[i * a.stride + i];
  }
  __syncthreads();
  double beta = 1, smallest = __builtin_inf(), bad = 0;
  bool failed = false;
  for (int64_t j = 0; j < n; j++) {
    RankOneStep s = rank_one_step(a.sigma, w[j] / diagonal[j], beta);
    const double pivot = diagonal[j] * diagonal[j] * (s.beta / beta);
    if (!failed && !(pivot > 0)) failed = true, bad = pivot;
    if (failed) s.keep = s.add = __builtin_nan("");
    smallest = pivot < smallest ? pivot : smallest;
    beta = s.beta;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      if (i <= j) continue;
      double& entry = a.factor[i * a.stride + j];
      w[i] -= s.p * entry;
      entry = s.keep * entry + s.add * w[i];
    }
    if (threadIdx.x == 0) a.factor[j * a.stride + j] = diagonal[j] * s.keep;
    __syncthreads();
  }
  if (threadIdx.x == 0) *a.pivot = failed ? bad : smallest;
}

}  // namespace

int cuda_chol_append(const CholArgs& a, void* stream) {
  PK_LAUNCH(append_kernel, dim3(1), dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_chol_rank1(const CholArgs& a, void* stream) {
  PK_LAUNCH(rank1_kernel, dim3(1), dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
