#include "core/gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

namespace prefkern {
namespace {

Tensor view(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, ScalarType type) {
  const std::array<int64_t, 2> sizes{rows, cols}, strides{row_stride, col_stride};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

Tensor view(const Matrix& x, int64_t rows, int64_t cols, ScalarType type) {
  return x.transposed ? view(x.data, rows, cols, 1, x.stride, type) : view(x.data, rows, cols, x.stride, 1, type);
}

void cpu_gemm(DType type, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, void* c, DType c_type,
              int64_t c_stride, bool accumulate, double alpha) {
  if (c_type != type) fail("RuntimeError", "the CPU multiplies into the type of the factors only");
  const ScalarType st = scalar_type(type);
  const Tensor ta = view(a, m, k, st), tb = view(b, k, n, st), tc = view(c, m, n, c_stride, 1, st);
  // With beta = 0 nothing of C is read.
  TORCH_ERROR_CODE_CHECK(accumulate || alpha != 1.0
                             ? aoti_torch_cpu_addmm_out(tc.get(), tc.get(), ta.get(), tb.get(), accumulate ? 1.0 : 0.0, alpha)
                             : aoti_torch_cpu_mm_out(tc.get(), ta.get(), tb.get()));
}

// Values of cuBLAS' public enums; they are part of its ABI.
enum : int {
  kOpN = 0,
  kOpT = 1,
  kR32F = 0,
  kR16F = 2,
  kR16BF = 14,
  kCompute32F = 68,
  kCompute32FPedantic = 69,
  kGemmDefault = -1
};

int cuda_type(DType type) { return type == DType::bf16 ? kR16BF : type == DType::f16 ? kR16F : kR32F; }

void cuda_gemm(DType type, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, void* c, DType c_type,
               int64_t c_stride, bool accumulate, double scale) {
  using GetHandle = AOTITorchError (*)(void**);
  using GemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
                         void*, int, int, int, int);
  static const auto get_handle = reinterpret_cast<GetHandle>(cuda_symbol("torch_get_current_cuda_blas_handle"));
  static const auto gemm_ex = reinterpret_cast<GemmEx>(cuda_symbol("cublasGemmEx"));
  if (!get_handle || !gemm_ex) fail("RuntimeError", "cuBLAS was not found through this PyTorch");
  void* handle = nullptr;  // bound to the current stream of the current device, with torch's workspace
  TORCH_ERROR_CODE_CHECK(get_handle(&handle));
  const int ab = cuda_type(type);
  // float32 inputs are multiplied in float32 even where the process allows TF32: log-probs promise 1e-4.
  const int compute = type == DType::f32 ? kCompute32FPedantic : kCompute32F;
  const float alpha = static_cast<float>(scale), beta = accumulate ? 1.0f : 0.0f;
  // cuBLAS is column-major: C^T = op(B)^T op(A)^T.
  const int status =
      gemm_ex(handle, b.transposed ? kOpT : kOpN, a.transposed ? kOpT : kOpN, int(n), int(m), int(k), &alpha, b.data, ab,
              int(b.stride), a.data, ab, int(a.stride), &beta, c, cuda_type(c_type), int(c_stride), compute, kGemmDefault);
  if (status != 0) fail("RuntimeError", "cublasGemmEx failed with status ", status);
}

}  // namespace

void gemm(const Tensor& on_device_of, DType ab_type, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, void* c,
          DType c_type, int64_t c_stride, bool accumulate, double alpha) {
  if (m == 0 || n == 0) return;
  (on_device_of.is_cuda() ? cuda_gemm : cpu_gemm)(ab_type, m, n, k, a, b, c, c_type, c_stride, accumulate, alpha);
}

}  // namespace prefkern
