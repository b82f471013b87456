// What a kernel does about cu_seqlens, which nobody has looked at before the launch.
#pragma once
#include "core/cuda.cuh"
#include "core/sequence.h"

namespace prefkern {
inline namespace PK_ISA {

// Whether the sequences cover all tokens, one after the other. Every thread of the block asks, and gets the same answer.
template <int THREADS> __device__ __forceinline__ bool layout_holds(const SequenceLayout& l) {
  if (!l.cu_seqlens) return true;
  int wrong = 0;
  for (int64_t b = threadIdx.x; b < l.sequences; b += THREADS) wrong += !sequence_valid(l, b);
  return block_reduce<THREADS>(wrong, 0, Add()) == 0;
}

// With a wrong layout nobody knows whose tokens are whose: the blocks of a grid share out all of them.
template <int THREADS, class S> __device__ __forceinline__ void fill_share(S* p, int64_t n, S value) {
  const int64_t share = ceil_div(n, gridDim.x), first = blockIdx.x * share, last = first + share < n ? first + share : n;
  for (int64_t i = first + threadIdx.x; i < last; i += THREADS) p[i] = value;
}

}  // namespace PK_ISA
}  // namespace prefkern
