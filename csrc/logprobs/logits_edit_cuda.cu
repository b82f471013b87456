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

// A tile of the row at a time: its kept columns are marked, and -inf goes to all others. Whether ids ascend decides only which
// of them are met, not where anything is read or written.
constexpr int64_t kTile = 8192;

template <class T, class I> __global__ void __launch_bounds__(kThreads) keep_kernel(const KeepArgs<float> a) {
  PK_SMEM(uint8_t, marked, kTile);
  const LogitBlock<float>& b = a.block;
  const LogitTransform<float>& t = b.transform;
  const int64_t row = blockIdx.x;
  const bool last = b.first_col + b.cols == b.vocab;
  if (b.targets[row] == b.ignore_index) {
    if (a.mean_logit && last && threadIdx.x == 0) a.mean_logit[row] = 0;
    return;
  }
  T* z = static_cast<T*>(a.logits) + row * b.cols;
  const I* ids = static_cast<const I*>(a.kept.ids);
  const IdRange range = ids_of_row(a.kept, row);
  const float lowest = b.dtype == DType::f16 ? kLowestF16 : kLowestBf16;
  float sum = 0;
  for (int64_t tile = 0; tile < b.cols; tile += kTile) {
    const int64_t n = b.cols - tile < kTile ? b.cols - tile : kTile, first = b.first_col + tile;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) marked[i] = 0;
    __syncthreads();
    for (int64_t i = first_not_below(ids, range, first) + threadIdx.x; i < range.end; i += kThreads) {
      const int64_t id = ids[i];
      if (id >= first + n) break;
      if (id < first) continue;
      const int64_t col = id - b.first_col;
      marked[col - tile] = 1;
      const float raw = to_float(z[col]), x = kept_logit(t, raw, lowest);
      if (x != raw && raw == raw) z[col] = narrow<T>(x);
      if (a.mean_logit) sum += pre_logit(t, x, t.bias ? t.bias[col] : 0.0f);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      if (!marked[i]) z[tile + i] = narrow<T>(kMinusInf<float>);
    __syncthreads();
  }
  if (!a.mean_logit) return;
  sum = block_reduce<kThreads>(sum, 0.0f, Add());
  if (threadIdx.x != 0) return;
  const float total = (b.first_col > 0 ? a.mean_logit[row] : 0.0f) + sum;
  a.mean_logit[row] = last ? total / float(range.end - range.begin) * logit_factor(t, row) : total;
}

template <class I> __global__ void __launch_bounds__(kThreads) upstream_kernel(const KeptUpstreamArgs<float> a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < a.rows) a.out[row] = keeps<I>(a.kept, row, a.targets[row]) ? a.g[row] : 0.0f;
}

template <class T> int keep(const KeepArgs<float>& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.block.rows)), block(kThreads);
  if (a.kept.wide) PK_LAUNCH((keep_kernel<T, int64_t>), grid, block, stream, a);
  else PK_LAUNCH((keep_kernel<T, int32_t>), grid, block, stream, a);
  return static_cast<int>(cudaGetLastError());
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

int cuda_keep_logits(const KeepArgs<float>& a, void* stream) {
  if (a.block.rows == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.block.dtype) {
    case DType::f32: return keep<float>(a, s);
    case DType::bf16: return keep<bf16_t>(a, s);
    case DType::f16: return keep<f16_t>(a, s);
    case DType::f64: break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

int cuda_kept_upstream(const KeptUpstreamArgs<float>& a, void* stream) {
  if (a.rows == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kThreads))), block(kThreads);
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.kept.wide) PK_LAUNCH(upstream_kernel<int64_t>, grid, block, s, a);
  else PK_LAUNCH(upstream_kernel<int32_t>, grid, block, s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
