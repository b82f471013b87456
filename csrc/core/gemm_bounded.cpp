#include "core/gemm_bounded.h"

namespace prefkern {

bool gemm_bounded_takes(const BoundedGemmArgs& a) {
  constexpr int64_t limit = int64_t(1) << 31;  // sizes reach the kernel as int
  const auto aligned = [](const void* data, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0;
  };
  return (a.dtype == DType::bf16 || a.dtype == DType::f16) && a.m < limit && a.n < limit && a.k > 0 && a.k < limit &&
         aligned(a.a, 2 * a.a_stride) && aligned(a.b, 2 * a.b_stride) && aligned(a.c, 4 * a.c_stride);
}

}  // namespace prefkern
