// What every room of csrc uses: export and host/device markers, element types, and where a token sits in memory.
// Torch-free and free of standard-library code, so that it can be compiled for any instruction set and by nvcc.
#pragma once
#include <stdint.h>

#define PK_API __attribute__((visibility("default")))

#if defined(__CUDACC__)
#define PK_HD __host__ __device__ __forceinline__
#else
#define PK_HD inline __attribute__((always_inline))
#endif

// Inline functions of the headers live in a namespace of their own per instruction set. Were they shared, the linker
// could keep the AVX-512 copy for everybody, and an older CPU would meet an illegal instruction.
#ifndef PK_ISA
#define PK_ISA host
#endif

namespace prefkern {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Row r of a matrix starts (r / inner) * outer_stride + (r % inner) * inner_stride elements after its base. This covers
// [N, V] and a slice like logits[:, :-1] of [B, T, V] without a copy. Columns are always adjacent.
struct RowMap {
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
};

inline namespace PK_ISA {
PK_HD int64_t row_offset(const RowMap& map, int64_t row) {
  return row / map.inner * map.outer_stride + row % map.inner * map.inner_stride;
}

PK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
}  // namespace PK_ISA

}  // namespace prefkern
