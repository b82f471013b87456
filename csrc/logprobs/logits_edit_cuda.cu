// The CUDA walk of logits_edit.h: one block of threads per row.
#include "core/cuda.cuh"
#include "logprobs/logits_edit.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

template <class T> __device__ __forceinline__ float rounded(const RoundArgs& a, float x, int64_t col) {
  return to_float(narrow<T>(a.bias ? x + a.bias[col] : x));
}

template <class T> __global__ void __launch_bounds__(kThreads) round_kernel(const RoundArgs a) {
  constexpr int P = kPackSize<float>;
  float* z = a.logits + int64_t(blockIdx.x) * a.cols;
  const int64_t packs = aligned16(z) ? a.cols / P : 0;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    Pack<float, P> pack = load_pack(z + i * P);
#pragma unroll
    for (int j = 0; j < P; j++) pack.v[j] = rounded<T>(a, pack.v[j], i * P + j);
    store_pack(z + i * P, pack);
  }
  for (int64_t col = packs * P + threadIdx.x; col < a.cols; col += kThreads) z[col] = rounded<T>(a, z[col], col);
}

}  // namespace

int cuda_round_logits(const RoundArgs& a, void* stream) {
  if (a.rows == 0 || a.cols == 0) return 0;
  if (a.to != DType::bf16 && a.to != DType::f16) return static_cast<int>(cudaErrorInvalidValue);
  const dim3 grid(static_cast<unsigned>(a.rows)), block(kThreads);
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.to == DType::bf16) PK_LAUNCH(round_kernel<bf16_t>, grid, block, s, a);
  else PK_LAUNCH(round_kernel<f16_t>, grid, block, s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
