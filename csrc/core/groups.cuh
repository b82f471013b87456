// Groups on the device: ids sorted in ascending order, one warp or block per group.
#pragma once
#include "core/cuda.cuh"

namespace prefkern {
inline namespace PK_ISA {

__device__ __forceinline__ bool group_begins(const int64_t* sorted, int64_t at) {
  return at == 0 || sorted[at - 1] != sorted[at];
}

// One past the last position of the group that begins at `begin`.
__device__ __forceinline__ int64_t group_end(const int64_t* sorted, int64_t count, int64_t begin) {
  int64_t inside = begin, outside = count;  // the last position known to be in the group, the first known not to be
  while (outside - inside > 1) {
    const int64_t middle = (inside + outside) / 2;
    if (sorted[middle] == sorted[begin]) inside = middle;
    else outside = middle;
  }
  return outside;
}

// The first position of the group that `at` is in.
__device__ __forceinline__ int64_t group_first(const int64_t* sorted, int64_t at) {
  int64_t outside = -1, inside = at;
  while (inside - outside > 1) {
    const int64_t middle = outside + (inside - outside) / 2;
    if (sorted[middle] == sorted[at]) inside = middle;
    else outside = middle;
  }
  return inside;
}

}  // namespace PK_ISA
}  // namespace prefkern
