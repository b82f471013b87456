// Checks of arguments that the ops of this room share.
#pragma once
#include "core/arguments.h"

namespace prefkern {

// Of a type that is computed in.
inline DType computed_type(const Tensor& t, const char* name) {
  const DType type = float_dtype(t, name);
  check_type(type == accumulator(type), name, " has dtype ", dtype_name(t.scalar_type()),
             "; accepted: float32, and float64 on the CPU");
  return type;
}

// `t`, shaped like `shaped`, with the type and the device of `like`, which is called `like_name`; contiguous.
inline Tensor alike(const Tensor& t, const char* name, const Tensor& shaped, const char* like_name, const Tensor& like) {
  check_type(t.scalar_type() == like.scalar_type(), name, " has dtype ", dtype_name(t.scalar_type()), "; ", like_name,
             " has dtype ", dtype_name(like.scalar_type()), ", so the same is expected");
  check_same_device(t, name, like, like_name);
  check_value(same_shape(t, shaped), name, " has shape ", shape_text(t), "; ", like_name, " has shape ", shape_text(shaped),
              ", so the same is expected");
  return to_contiguous(t);
}

}  // namespace prefkern
