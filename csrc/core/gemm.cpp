#include "core/gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/gemm_cpu.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace prefkern {

PK_ISA_TABLE(GemmCpu, gemm_cpu)

const GemmCpu& gemm_of_isa() { return gemm_cpu(); }

bool own_gemm() {
  static const bool own = [] {
    const char* wanted = std::getenv("PREFKERN_CPU_GEMM");
    if (wanted && !std::strcmp(wanted, "own")) return true;
    if (wanted && !std::strcmp(wanted, "library")) return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    return gemm_cpu().fast && __builtin_cpu_is("amd");
#else
    return false;
#endif
  }();
  return own;
}

namespace {

// Fewer multiplications than this are not worth sharing out.
constexpr int64_t kProductsPerThread = 1 << 21;

// C as a grid of blocks, one per thread, that packs least: every column of blocks packs A once more, every row of them B.
struct Grid {
  int64_t rows = 1, cols = 1;  // blocks
};
Grid share_out(int64_t m, int64_t n, int64_t threads) {
  Grid best;
  int64_t least = 0;
  for (int64_t cols = 1; cols <= threads; cols++) {
    const int64_t rows = threads / cols, packed = m * cols + n * rows;
    const bool more = rows * cols > best.rows * best.cols, as_many = rows * cols == best.rows * best.cols;
    if (cols == 1 || more || (as_many && packed < least)) {
      best = {rows, cols};
      least = packed;
    }
  }
  return best;
}

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
  const bool wide = a.type.value_or(type) == type && b.type.value_or(type) == type;

  if (type == DType::f32 && (!wide || own_gemm())) {
    GemmArgs g{m, n, k, a.data, b.data, a.stride, b.stride, a.transposed, b.transposed};
    g.a_type = a.type.value_or(type);
    g.b_type = b.type.value_or(type);
    g.c = static_cast<float*>(c);
    g.c_stride = c_stride;
    g.accumulate = accumulate;
    g.alpha = static_cast<float>(alpha);
    g.pairs = gemm_cpu().pairs && g.a_type == DType::bf16 && g.b_type == DType::bf16 && !a.transposed && b.transposed;
    return cpu_multiply(g);
  }
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

void cpu_multiply(const GemmArgs& g) {
  const GemmCpu& cpu = gemm_cpu();
  const int64_t enough = g.m * g.n * g.k / kProductsPerThread + 1;
  const Grid grid = share_out(g.m, g.n, std::min<int64_t>(num_threads(), enough));
  const int64_t blocks = grid.rows * grid.cols;
  const int64_t rows = ceil_div(ceil_div(g.m, grid.rows), cpu.tile_rows) * cpu.tile_rows;
  const int64_t cols = ceil_div(ceil_div(g.n, grid.cols), cpu.tile_cols) * cpu.tile_cols;
  const int64_t per_block = cpu.workspace(rows, cols, g.k);
  const std::unique_ptr<float[]> space(new float[blocks * per_block + kAlignment]);
  float* workspace = aligned(space.get());
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t row = block / grid.cols * rows, col = block % grid.cols * cols;
      GemmArgs part = g;
      part.m = std::min(rows, g.m - row);
      part.n = std::min(cols, g.n - col);
      if (part.m <= 0 || part.n <= 0) continue;
      const auto from = [](const void* p, DType type, int64_t elements) {
        return static_cast<const char*>(p) + elements * element_size(type);
      };
      part.a = from(g.a, g.a_type, g.a_transposed ? row : row * g.a_stride);
      part.b = from(g.b, g.b_type, g.b_transposed ? col * g.b_stride : col);
      part.c = g.c + row * g.c_stride + col;
      part.done = nullptr;
      part.workspace = workspace + block * per_block;
      cpu.multiply(part);
    }
  });
}

void gemm(const Tensor& on_device_of, DType ab_type, int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, void* c,
          DType c_type, int64_t c_stride, bool accumulate, double alpha) {
  if (m == 0 || n == 0) return;
  (on_device_of.is_cuda() ? cuda_gemm : cpu_gemm)(ab_type, m, n, k, a, b, c, c_type, c_stride, accumulate, alpha);
}

}  // namespace prefkern
