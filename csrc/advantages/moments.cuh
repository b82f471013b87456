// Moments over a block: two passes in double, added in a fixed order.
#pragma once
#include "core/cuda.cuh"
#include "math/advantages.h"

namespace prefkern {
inline namespace PK_ISA {

// Of value(i) with weight(i) over [begin, end); what has no weight is not looked at. Every thread gets them.
template <int THREADS, class Weight, class Value>
__device__ __forceinline__ Moments block_moments(int64_t begin, int64_t end, Weight&& weight, Value&& value) {
  Moments m;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
    const double w = weight(i);
    if (w == 0) continue;
    m.n += w;
    sum += w * value(i);
  }
  m.n = block_reduce<THREADS>(m.n, 0.0, Add{});
  sum = block_reduce<THREADS>(sum, 0.0, Add{});
  if (m.n == 0) return m;
  m.mean = sum / m.n;
  for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
    const double w = weight(i);
    if (w == 0) continue;
    const double d = value(i) - m.mean;
    m.squares += w * d * d;
  }
  m.squares = block_reduce<THREADS>(m.squares, 0.0, Add{});
  return m;
}

}  // namespace PK_ISA
}  // namespace prefkern
