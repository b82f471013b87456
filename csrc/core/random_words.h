// Random words (core/philox.h) as lanes beside real numbers of type V: float, double, or on the CPU a vector of floats.
#pragma once
#include "core/elementary.h"
#include "core/philox.h"
#if !defined(__CUDACC__) && !defined(PK_SIMT)
#include "core/philox_lanes.h"
#endif

namespace prefkern {
inline namespace PK_ISA {

// negate_if: -x where the lowest bit of a word is set.
template <class V> struct Words {
  using Unsigned = uint32_t;
  using Signed = int32_t;
  static PK_HD V real(int32_t x) { return V(x); }
  static PK_HD V negate_if(uint32_t word, V x) { return word & 1u ? -x : x; }
};
PK_HD bool any_lane(bool m) { return m; }

#if !defined(__CUDACC__) && !defined(PK_SIMT)
template <> struct Words<VecF> {
  using Unsigned = VecU;
  using Signed = VecI;
  static PK_HD VecF real(VecI x) { return __builtin_convertvector(x, VecF); }
  static PK_HD VecF negate_if(VecU word, VecF x) { return reinterpret_cast<VecF>(reinterpret_cast<VecU>(x) ^ (word << 31)); }
};
PK_HD bool any_lane(VecI m) {
  int32_t any = 0;
  for (int i = 0; i < kLanes; i++) any |= m[i];
  return any != 0;
}
#endif

}  // namespace PK_ISA
}  // namespace prefkern
