// How the CPU kernels of this room hold rows: as many at a time as a vector has lanes, a row per lane, so that a formula reads
// as if there were one. Rows are transposed into scratch, arrays of `items` vectors.
#pragma once
#include "core/simd.h"

namespace prefkern {
inline namespace PK_ISA {

template <class V> using Mask = decltype(V{} == V{});

template <class V> struct Tile {
  using S = typename Lanes<V>::Scalar;
  static constexpr int64_t L = Lanes<V>::count;
  int64_t items, stride;
  S* base;

  PK_HD S* array(int a) const { return base + a * stride; }
  PK_HD V get(int a, int64_t i) const { return Mem<V>::load(base + a * stride + i * L); }
  PK_HD void set(int a, int64_t i, V v) const { Mem<V>::store(base + a * stride + i * L, v); }

  // Rows of `columns` elements, `step` apart; a lane without a row gets the first one's, and whatever comes of it is dropped.
  PK_HD void load(int a, const S* from, int64_t rows, int64_t columns, int64_t step) const {
    const S* row[L];
    for (int64_t lane = 0; lane < L; lane++) row[lane] = from + (lane < rows ? lane * step : 0);
    S* to = array(a);
    for (int64_t i = 0; i < columns; i++)
      for (int64_t lane = 0; lane < L; lane++) to[i * L + lane] = row[lane][i];
  }
  PK_HD void store(int a, S* to, int64_t rows, int64_t columns) const {
    const S* from = array(a);
    for (int64_t lane = 0; lane < rows && lane < L; lane++)
      for (int64_t i = 0; i < columns; i++) to[lane * columns + i] = from[i * L + lane];
  }
};

// One value per row.
template <class V, class F> PK_HD void each_lane(V v, int64_t rows, const F& f) {
  typename Lanes<V>::Scalar values[Lanes<V>::count];
  Mem<V>::store(values, v);
  for (int64_t lane = 0; lane < rows && lane < Lanes<V>::count; lane++) f(lane, values[lane]);
}

}  // namespace PK_ISA
}  // namespace prefkern
