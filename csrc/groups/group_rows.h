// Group ids of an op's tensors in the form its kernel takes.
#pragma once
#include "core/arguments.h"
#include "groups/group_folds.h"

namespace prefkern {

inline GroupRows group_rows(const GroupIds& groups, int64_t count) { return {count, groups.ids, groups.order}; }

// [B] and of a type that is computed in.
inline DType rows_dtype(const Tensor& t, const char* name) {
  const DType type = float_dtype(t, name);
  check_type(type == accumulator(type), name, " has dtype ", dtype_name(t.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  check_value(t.dim() == 1, name, " has shape ", shape_text(t), "; expected [B]");
  return type;
}

// [B] of the same type and device.
inline Tensor checked_rows(const Tensor& t, const char* name, const Tensor& rows, const char* rows_name) {
  check_type(t.scalar_type() == rows.scalar_type(), name, " has dtype ", dtype_name(t.scalar_type()), "; that of ", rows_name,
             ", ", dtype_name(rows.scalar_type()), ", is expected");
  return checked_tokens(t, name, rows, rows_name, rows.scalar_type());
}

}  // namespace prefkern
