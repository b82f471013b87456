#include "core/tensor.h"

#include <dlfcn.h>

#include <array>

#include "core/cuda_runtime.h"

// Present from torch 2.13 on; null on older ones.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace prefkern {

namespace sd = torch::stable::detail;

std::string shape_text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

const char* dtype_name(ScalarType t) { return torch::headeronly::toString(t); }

std::string device_text(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another device type";
}

DType float_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double:
      if (t.is_cpu()) return DType::f64;
      break;
    default: break;
  }
  fail("TypeError", name, " has dtype ", dtype_name(t.scalar_type()), " on ", device_text(t),
       "; accepted: float32, bfloat16, float16, and float64 on the CPU");
}

void check_same_device(const Tensor& t, const char* name, const Tensor& reference, const char* reference_name) {
  check_value(device_text(t) == device_text(reference), name, " is on ", device_text(t), " but ", reference_name, " is on ",
              device_text(reference), "; they must be on the same device");
}

std::string with_reason(const std::string& message) {
  if (message.find("API call failed at") == std::string::npos) return message;
  const char* why = &torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  return std::string("prefkern: a PyTorch operation failed: ") +
         (why && *why ? why : "the reason is on stderr (" + message + ")");
}

Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& like) {
  // Straight to the allocator: the boxed aten::empty costs three times as much, and a call allocates several outputs.
  std::array<int64_t, 3> strides{};
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= shape.begin()[i]) strides[i] = step;
  AtenTensorHandle handle = nullptr;
  const auto dtype = torch::headeronly::ScalarType(type);
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides.data(),
                                                  static_cast<int32_t>(dtype), static_cast<int32_t>(like.device().type()),
                                                  like.is_cpu() ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor zeros(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& like) {
  Tensor t = empty(shape, type, like);
  return torch::stable::zero_(t);
}

Tensor index_rows(const Tensor& t, const Tensor& rows) {
  std::array<StableIValue, 3> stack{sd::from(t), sd::from(int64_t(0)), sd::from(rows)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return sd::to<Tensor>(stack[0]);
}

void scatter_rows(Tensor& into, const Tensor& rows, const Tensor& values) {
  std::array<StableIValue, 4> stack{sd::from(into), sd::from(int64_t(0)), sd::from(rows), sd::from(values)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_copy_", "", stack.data(), TORCH_ABI_VERSION));
  (void)sd::to<Tensor>(stack[0]);  // the returned handle is ours to release
}

void* cuda_symbol(const char* name) {
  // torch's libraries are loaded RTLD_LOCAL and are no dependency of ours: ask the loaded copy, never load one.
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

void* current_stream(const Tensor& t) {
  if (!t.is_cuda()) return nullptr;
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get = reinterpret_cast<GetStream>(cuda_symbol("aoti_torch_get_current_cuda_stream"));
  if (!get) fail("RuntimeError", "this PyTorch has no CUDA support (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}

void check_cuda(int error) {
  if (__builtin_expect(error != 0, 0)) fail("RuntimeError", "a prefkern CUDA kernel failed: ", cuda_error_string(error));
}

}  // namespace prefkern
