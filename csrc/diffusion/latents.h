// How kernels of this room find latents, numbers per row, and how they cut their work: a row of D elements into slices that do
// not depend on who works on them, so that sums are the same bits for any number of threads.
#pragma once
#include "core/common.h"

namespace prefkern {

// Row b starts b * stride elements after data; its elements are adjacent.
struct LatentRows {
  const void* data = nullptr;
  int64_t stride = 0;
};

// One number per row, of float or of double.
struct RowNumbers {
  const void* data = nullptr;
  bool wide = false;
};

inline namespace PK_ISA {
template <class T> PK_HD const T* latent_row(const LatentRows& rows, int64_t b) {
  return static_cast<const T*>(rows.data) + b * rows.stride;
}
PK_HD double row_number(const RowNumbers& numbers, int64_t b, double otherwise) {
  if (!numbers.data) return otherwise;
  return numbers.wide ? static_cast<const double*>(numbers.data)[b] : double(static_cast<const float*>(numbers.data)[b]);
}
}  // namespace PK_ISA

// Elements of a slice.
constexpr int64_t kCpuSlice = 1 << 14, kCudaSlice = 1 << 13;

}  // namespace prefkern
