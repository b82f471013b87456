// The tensors that the ops of this room take: any floating type, widened to double on whatever device they are.
#pragma once
#include <algorithm>
#include <cmath>

#include "core/tensor.h"

namespace prefkern {

inline Tensor widened(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half: return cast(t, ScalarType::Double);
    default:
      fail("TypeError", name, " has dtype ", dtype_name(t.scalar_type()), "; accepted: float64, float32, bfloat16, float16");
  }
}

// Rows of a matrix that are adjacent numbers, however far apart they lie.
inline bool has_plain_rows(const Tensor& t) {
  return (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
}
inline int64_t row_step(const Tensor& t) { return std::max(t.stride(0), t.size(1)); }

}  // namespace prefkern
