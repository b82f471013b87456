// The CUDA walk of moments.h: a block per part, which stays in its caches between the two passes; one thread block merges
// the parts, each thread its share in order, then pairwise. Normalising is one elementwise pass.
#include "advantages/moments.h"
#include "advantages/moments.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) moments_kernel(const MomentsArgs<float> a, double* into) {
  const int64_t begin = int64_t(blockIdx.x) * kMomentsPart,
                end = begin + kMomentsPart < a.count ? begin + kMomentsPart : a.count;
  const Moments m = block_moments<kThreads>(
      begin, end, [&](int64_t i) { return moments_weight(a, i); }, [&](int64_t i) { return double(a.values[i]); });
  if (threadIdx.x == 0) write_moments(into + 3 * int64_t(blockIdx.x), m);
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeArgs a) {
  PK_SMEM(double, shared, 3 * kThreads);
  double* const mine = shared + 3 * threadIdx.x;
  Moments m;
  for (int64_t p = threadIdx.x; p < a.count; p += kThreads) m = merge(m, read_moments(a.parts + 3 * p));
  write_moments(mine, m);
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) write_moments(mine, merge(read_moments(mine), read_moments(mine + 3 * half)));
    __syncthreads();
  }
  if (threadIdx.x == 0) write_moments(a.moments, read_moments(shared));
}

__global__ void __launch_bounds__(kThreads) normalize_kernel(const BatchNormalizeArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.count) return;
  const Affine f = batch_affine(a.mode, read_moments(a.moments), a.eps);
  a.out[i] = !a.mask || a.mask[i] ? float((double(a.values[i]) - f.center) * f.scale) : 0.0f;
}

}  // namespace

int cuda_batch_moments(const MomentsArgs<float>& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t parts = a.count > 0 ? ceil_div(a.count, kMomentsPart) : 1;
  PK_LAUNCH(moments_kernel, dim3(static_cast<unsigned>(parts)), dim3(kThreads), s, a, parts == 1 ? a.moments : a.parts);
  if (parts > 1) PK_LAUNCH(merge_kernel, dim3(1), dim3(kThreads), s, MergeArgs{parts, a.parts, a.moments});
  return static_cast<int>(cudaGetLastError());
}

int cuda_merge_moments(const MergeArgs& a, void* stream) {
  PK_LAUNCH(merge_kernel, dim3(1), dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_batch_normalize(const BatchNormalizeArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kThreads)));
  PK_LAUNCH(normalize_kernel, grid, dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
