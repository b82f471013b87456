// The CUDA walk of gp_posterior.h: a block takes 8 candidates and solves for them in shared memory, 16 rows at a time: of each
// row and candidate a thread forms the kernel, and takes off what is solved already; then the 16 rows finish one after another.
#include "core/cuda.cuh"
#include "gaussian/gp_posterior.h"

namespace prefkern {
namespace {

constexpr int kTile = 8, kRows = 16, kThreads = kTile * kRows;

__device__ __forceinline__ double squared_distance(const GpPosteriorArgs& a, const double* x, const double* u) {
  double sum = 0;
  for (int64_t d = 0; d < a.dims; d++) {
    const double difference = (x[d] - u[d]) * a.inverse_length[d * a.length_step];
    sum += difference * difference;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) posterior_kernel(const GpPosteriorArgs a) {
  PK_SMEM(double, v, kGpCudaPoints* kTile);
  PK_SMEM(double, mean_of, kThreads);
  PK_SMEM(double, explained_of, kThreads);
  const int c = threadIdx.x % kTile, r = threadIdx.x / kTile;
  const int64_t candidate = int64_t(blockIdx.x) * kTile + c;
  const bool inside = candidate < a.candidates;
  const double* x = a.inputs + (inside ? candidate : 0) * a.dims;
  double mean = 0, explained = 0;
  for (int64_t first = 0; first < a.points; first += kRows) {
    const int64_t i = first + r;
    const bool counts = i < a.points;
    const double* l = a.factor + (counts ? i : 0) * a.stride;
    double value = 0;
    if (counts) {
      const double k = a.variance * covariance(a.kernel, squared_distance(a, x, a.unique + i * a.dims));
      value = a.counts ? k * sqrt(double(a.counts[i])) : k;
      for (int64_t j = 0; j < first; j++) value -= l[j] * v[j * kTile + c];
    }
    for (int step = 0; step < kRows; step++) {
      if (counts && r == step) {
        value /= l[i];
        v[i * kTile + c] = value;
      }
      __syncthreads();
      if (counts && r > step) value -= l[first + step] * v[(first + step) * kTile + c];
    }
    if (counts) {
      mean += value * a.weights[i];
      explained += value * value;
    }
  }
  mean_of[threadIdx.x] = mean;
  explained_of[threadIdx.x] = explained;
  __syncthreads();
  if (r != 0 || !inside) return;
  for (int other = 1; other < kRows; other++) {
    mean += mean_of[other * kTile + c];
    explained += explained_of[other * kTile + c];
  }
  a.mean[candidate] = mean;
  a.var[candidate] = variance_left(a.variance, explained);
}

}  // namespace

int cuda_gp_posterior(const GpPosteriorArgs& a, void* stream) {
  if (a.candidates == 0) return 0;
  PK_LAUNCH(posterior_kernel, dim3(static_cast<unsigned>(ceil_div(a.candidates, kTile))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
