// The torch side of an op: argument checks, typed pointers, allocation, current stream. Only <op>.cpp files include this.
//
// Checks throw std::runtime_error with a prefix that python/prefkern/ops/_call.py turns into the Python exception type:
// the stable ABI carries no other type across.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/common.h"

namespace prefkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// ---- errors ---------------------------------------------------------------------------------------------------------
template <class... A> [[noreturn]] void fail(const char* kind, const A&... parts) {
  std::ostringstream text;
  text << kind << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
template <class... A> void check_value(bool ok, const A&... parts) {
  if (__builtin_expect(!ok, 0)) fail("ValueError", parts...);
}
template <class... A> void check_type(bool ok, const A&... parts) {
  if (__builtin_expect(!ok, 0)) fail("TypeError", parts...);
}

std::string shape_text(const Tensor& t);
const char* dtype_name(ScalarType t);
std::string device_text(const Tensor& t);

// The element type of `name`, or a TypeError that lists what is accepted. float64 is a CPU type.
DType float_dtype(const Tensor& t, const char* name);
// Same device as `reference`, or a ValueError naming both.
void check_same_device(const Tensor& t, const char* name, const Tensor& reference, const char* reference_name);

// Wraps an op so that an ATen failure inside it keeps its reason (older targets of the stable ABI drop it).
std::string with_reason(const std::string& message);
template <auto F> struct Guarded;
template <class R, class... A, R (*F)(A...)> struct Guarded<F> {
  static R call(A... args) {
    try {
      return F(static_cast<A>(args)...);
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(with_reason(e.what()));
    }
  }
};
#define PK_OP(function) TORCH_BOX(&::prefkern::Guarded<&function>::call)

// ---- tensors --------------------------------------------------------------------------------------------------------
inline ScalarType scalar_type(DType t) {
  switch (t) {
    case DType::f32: return ScalarType::Float;
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
    case DType::f64: return ScalarType::Double;
  }
  return ScalarType::Float;
}
inline int64_t element_size(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
inline DType accumulator(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& like);
Tensor zeros(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& like);
inline Tensor cast(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }
inline Tensor to_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Tensor index_rows(const Tensor& t, const Tensor& rows);                          // t[rows]
void scatter_rows(Tensor& into, const Tensor& rows, const Tensor& values);       // into[rows] = values

template <class S> const S* data(const Tensor& t) { return static_cast<const S*>(t.const_data_ptr()); }
template <class S> S* mutable_data(const Tensor& t) { return static_cast<S*>(t.mutable_data_ptr()); }
template <class S> const S* data_or_null(const OptTensor& t) { return t.has_value() ? data<S>(*t) : nullptr; }

// ---- CUDA -----------------------------------------------------------------------------------------------------------
void* current_stream(const Tensor& t);      // of the tensor's device; null for CPU tensors
void check_cuda(int error);                 // 0, or the error's text as an exception
void* cuda_symbol(const char* name);        // a function of torch's CUDA library or what it links; null without one

// Makes the tensor's device current while in scope; nothing for CPU tensors.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    if (t.is_cuda()) guard_.emplace(t.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace prefkern
