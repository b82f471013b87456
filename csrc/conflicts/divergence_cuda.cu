// The CUDA walk of divergence.h: a block takes a pair, a thread four tokens of each at a time, until one differs.
#include "conflicts/divergence.h"
#include "core/sequence.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 128, kBatch = 4;

struct Least {
  __device__ __forceinline__ int64_t operator()(int64_t x, int64_t y) const { return x < y ? x : y; }
};
struct Most {
  __device__ __forceinline__ int64_t operator()(int64_t x, int64_t y) const { return x > y ? x : y; }
};

// How many of n tokens count, or -1. Every thread of the block asks.
__device__ __forceinline__ int64_t kept_length(const uint8_t* mask, int64_t n) {
  if (!mask) return n;
  int64_t kept = 0, last = 0;
  for (int64_t t = threadIdx.x; t < n; t += kThreads)
    if (mask[t]) {
      kept++;
      last = t + 1;
    }
  kept = block_reduce<kThreads>(kept, int64_t(0), Add());
  last = block_reduce<kThreads>(last, int64_t(0), Most());
  return kept == last ? kept : -1;
}

template <class T> __global__ void __launch_bounds__(kThreads) divergence_kernel(const DivergenceArgs<T> args) {
  const int64_t row = blockIdx.x;
  const bool known = layout_holds<kThreads>(args.layout_a) && layout_holds<kThreads>(args.layout_b);
  if (!known) {
    if (threadIdx.x == 0) args.position[row] = -1;
    return;
  }
  const int64_t first_a = sequence_begin(args.layout_a, row), first_b = sequence_begin(args.layout_b, row);
  const int64_t n_a = kept_length(args.mask_a ? args.mask_a + first_a : nullptr, sequence_end(args.layout_a, row) - first_a);
  const int64_t n_b = kept_length(args.mask_b ? args.mask_b + first_b : nullptr, sequence_end(args.layout_b, row) - first_b);
  const int64_t n = n_a < n_b ? n_a : n_b;  // -1 where one of them is
  const T *a = args.ids_a + first_a, *b = args.ids_b + first_b;
  int64_t position = n;
  for (int64_t tile = 0; tile < n && position == n; tile += kThreads * kBatch) {
#pragma unroll
    for (int j = kBatch - 1; j >= 0; j--) {
      const int64_t t = tile + j * kThreads + threadIdx.x;
      if (t < n && a[t] != b[t]) position = t;
    }
    position = block_reduce<kThreads>(position, n, Least());
  }
  if (threadIdx.x == 0) args.position[row] = position;
}

template <class T> int launch(const DivergenceArgs<T>& args, void* stream) {
  if (args.layout_a.sequences == 0) return 0;
  const dim3 grid(static_cast<unsigned>(args.layout_a.sequences));
  PK_LAUNCH(divergence_kernel<T>, grid, dim3(kThreads), static_cast<cudaStream_t>(stream), args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_first_divergence(const DivergenceArgs<int32_t>& args, void* stream) { return launch(args, stream); }
int cuda_first_divergence(const DivergenceArgs<int64_t>& args, void* stream) { return launch(args, stream); }

}  // namespace prefkern
