// Sums on the CPU that keep what small differences leave: a few elements per lane are added in their own type, and those sums in
// double. How many, and in which order, does not depend on how the work is shared out.
#pragma once
#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {

constexpr int64_t kSumBlock = 512;  // elements between two additions in double

template <class V> struct Totals;
template <> struct Totals<double> {
  double total = 0;
  PK_HD void add(double v) { total += v; }
  PK_HD double sum() const { return total; }
};
template <> struct Totals<VecF> {
  VecD low = {}, high = {};
  PK_HD void add(VecF v) {
    typedef float Half __attribute__((vector_size(kWide * 4)));
    Half parts[2];
    __builtin_memcpy(parts, &v, sizeof v);
    low += __builtin_convertvector(parts[0], VecD);
    high += __builtin_convertvector(parts[1], VecD);
  }
  PK_HD double sum() const {
    double s = 0;
    for (int i = 0; i < kWide; i++) s += low[i] + high[i];
    return s;
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
