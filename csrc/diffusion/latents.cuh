// Elements of rows in CUDA kernels: 16 bytes at once where every row begins at a multiple of 16, else one by one.
#pragma once
#include "core/cuda.cuh"
#include "diffusion/latents.h"

namespace prefkern {
inline namespace PK_ISA {

constexpr int kLatentThreads = 256;

template <class T> __device__ __forceinline__ bool rows_aligned(const LatentRows& rows) {
  return aligned16(rows.data) && (rows.stride * int64_t(sizeof(T))) % 16 == 0;
}

template <class T> using LatentPack = float[kPackSize<T>];

// Elements from `at` on; those from `end` on are 0.
template <class T> __device__ __forceinline__ void load_elements(const T* row, int64_t at, int64_t end, bool aligned,
                                                                 LatentPack<T>& to) {
  constexpr int P = kPackSize<T>;
  if (aligned && at + P <= end) {
    const Pack<T, P> pack = load_pack(row + at);
#pragma unroll
    for (int j = 0; j < P; j++) to[j] = to_float(pack.v[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < P; j++) to[j] = at + j < end ? to_float(row[at + j]) : 0.0f;
}

template <class T> __device__ __forceinline__ void store_elements(T* row, int64_t at, int64_t end, bool aligned,
                                                                  const LatentPack<T>& from) {
  constexpr int P = kPackSize<T>;
  if (aligned && at + P <= end) {
    store_pack(row + at, narrow_pack<T, P>(from));
    return;
  }
#pragma unroll
  for (int j = 0; j < P; j++)
    if (at + j < end) row[at + j] = narrow<T>(from[j]);
}

// Where a block works: slice `slice` of row `row`, elements [first, end).
struct LatentSlice {
  int64_t row, slice, first, end;
};
__device__ __forceinline__ LatentSlice latent_slice(int64_t length) {
  const int64_t slices = ceil_div(length, kCudaSlice), at = blockIdx.x, first = at % slices * kCudaSlice;
  return {at / slices, at % slices, first, first + kCudaSlice < length ? first + kCudaSlice : length};
}

// f(at) for every run of elements that this thread has.
template <class T, class F> __device__ __forceinline__ void each_run(const LatentSlice& s, const F& f) {
  constexpr int P = kPackSize<T>;
  for (int64_t at = s.first + int64_t(threadIdx.x) * P; at < s.end; at += int64_t(kLatentThreads) * P) f(at);
}

// True in every thread of the block that finishes last, after the others' sums have become visible. All threads ask.
__device__ __forceinline__ bool last_block(uint32_t* finished) {
  PK_SMEM(int, is_last, 1);
  __threadfence();  // the sums are visible before the count is
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  const bool last = is_last[0] != 0;
  __threadfence();
  return last;
}

}  // namespace PK_ISA
}  // namespace prefkern
