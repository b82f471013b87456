// Vectors at the end of an array, for the CPU kernels of this room: lanes behind the end hold `rest`, and are not written.
#pragma once
#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {

template <class V, class S> PK_HD V load_some(const S* p, int64_t count, S rest) {
  constexpr int64_t L = Lanes<V>::count;
  if (count >= L) return Mem<V>::load(p);
  S some[L];
  for (int64_t lane = 0; lane < L; lane++) some[lane] = lane < count ? p[lane] : rest;
  return Mem<V>::load(some);
}

template <class V, class S> PK_HD void store_some(S* p, int64_t count, V v) {
  constexpr int64_t L = Lanes<V>::count;
  if (count >= L) return Mem<V>::store(p, v);
  S some[L];
  Mem<V>::store(some, v);
  for (int64_t lane = 0; lane < L && lane < count; lane++) p[lane] = some[lane];
}

}  // namespace PK_ISA
}  // namespace prefkern
