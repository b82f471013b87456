// The matrix product of the CPU kernels, and what gemm_cpu.cpp exports of it, for one thread, once per instruction set.
#pragma once
#include "core/common.h"

namespace prefkern {

// Pointers to the first element that is aligned to 64 bytes, of space for kAlignment elements more than are needed.
constexpr int64_t kAlignment = 16;
inline float* aligned(float* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(float); }

// C = alpha op(A) op(B) (+ C), row-major, added up in float. A and B may be narrower: they are widened as they are packed.
struct GemmArgs {
  int64_t m = 0, n = 0, k = 0;  // C is [m, n]
  const void *a = nullptr, *b = nullptr;
  int64_t a_stride = 0, b_stride = 0;             // elements from one row to the next, as they lie in memory
  bool a_transposed = false, b_transposed = false;  // A lies as [k, m] and not as [m, k]; B as [n, k] and not as [k, n]
  DType a_type = DType::f32, b_type = DType::f32;   // f32, bf16 or f16
  float* c = nullptr;
  int64_t c_stride = 0;
  bool accumulate = false;
  float alpha = 1;
  // bfloat16 A and B, with the elements of a dot product adjacent in both (A as [m, k], B as [n, k]), are multiplied two by two:
  // the same products, added up in another order. It pays where the CPU has an instruction for it.
  bool pairs = false;
  float* workspace = nullptr;  // GemmCpu::workspace(m, n, k) elements of the thread's own, aligned to 64 bytes
  // Called as soon as rows [row, row + rows) and columns [col, col + cols) of C are complete, while they are in cache.
  void (*done)(void* context, int64_t row, int64_t rows, int64_t col, int64_t cols) = nullptr;
  void* context = nullptr;
};

struct GemmCpu {
  void (*multiply)(const GemmArgs&);
  int64_t (*workspace)(int64_t m, int64_t n, int64_t k);  // a multiple of 64 bytes
  int64_t tile_rows, tile_cols;     // C is made in register tiles of this size
  bool fast;   // worth using: the registers are wide enough to be ahead of a library
  bool pairs;  // and there is an instruction for pairs of bfloat16
};

// Whether float products on the CPU are this library's own: with AVX2 or AVX-512 on AMD's CPUs, where they were measured to pay; on
// others no figure says so. PREFKERN_CPU_GEMM=own|library decides otherwise; it is read once.
PK_API bool own_gemm();

// The same by torch's threads, each with a workspace of its own: that of `args` is not looked at, nor is `done`.
PK_API void cpu_multiply(const GemmArgs& args);

}  // namespace prefkern
