// The kernels of compact_rows.h. One block finds the places: it goes over the rows once, 4096 at a time, which for the rows of a
// batch takes microseconds where the products take milliseconds.
#include "core/cuda.cuh"
#include "logprobs/compact_rows.h"

namespace prefkern {
namespace {

constexpr int kThreads = 1024, kEach = 4, kWarps = kThreads / kWarp, kRowThreads = 128;

__global__ void __launch_bounds__(kThreads) compact_kernel(const CompactArgs a) {
  PK_SMEM(int, sums, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t before = 0;
  for (int64_t first = 0; first < a.rows; first += kThreads * kEach) {
    const int64_t own = first + int64_t(threadIdx.x) * kEach;
    bool active[kEach];
    int mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      active[i] = own + i < a.rows && a.targets[own + i] != a.ignore_index;
      mine += active[i];
    }
    int upto = mine;  // of the warp's lanes up to this one
    for (int offset = 1; offset < kWarp; offset <<= 1) {
      const int other = __shfl_up_sync(0xffffffffu, upto, offset);
      if (lane >= offset) upto += other;
    }
    if (lane == kWarp - 1) sums[warp] = upto;
    __syncthreads();
    int lower = 0, all = 0;
    for (int w = 0; w < kWarps; w++) {
      const int sum = sums[w];
      lower += w < warp ? sum : 0;
      all += sum;
    }
    __syncthreads();  // before the next round writes them
    int64_t to = before + lower + upto - mine;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (own + i >= a.rows) continue;
      a.place[own + i] = active[i] ? to : -1;
      if (active[i]) a.index[to++] = own + i;
    }
    before += all;
  }
  for (int64_t i = before + threadIdx.x; i < a.rows; i += kThreads) a.index[i] = -1;
  if (threadIdx.x == 0) *a.count = before;
}

__global__ void __launch_bounds__(kRowThreads) gather_rows_kernel(const GatherRowsArgs a) {
  const int64_t i = blockIdx.x;
  if (i >= compact_end(*a.count)) return;
  const int64_t from = a.index[i];
  const auto* in = static_cast<const char*>(a.in) + (from < 0 ? 0 : from) * a.in_stride;
  auto* out = static_cast<char*>(a.out) + i * a.bytes;
  if (a.bytes % 16 == 0 && aligned16(in) && aligned16(out)) {
    for (int64_t b = int64_t(threadIdx.x) * 16; b < a.bytes; b += kRowThreads * 16) {
      const Pack<float, 4> zero{};
      store_pack(reinterpret_cast<float*>(out + b), from < 0 ? zero : load_pack(reinterpret_cast<const float*>(in + b)));
    }
    return;
  }
  for (int64_t b = threadIdx.x; b < a.bytes; b += kRowThreads) out[b] = from < 0 ? char(0) : in[b];
}

__global__ void __launch_bounds__(kRowThreads) gather_vectors_kernel(const GatherVectorsArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= a.rows) return;
  const int64_t from = a.index[i];
  a.out_targets[i] = from < 0 ? a.ignore_index : a.targets[from];
  const float* in[kCompactVectors] = {a.row_max, a.row_log2_sum, a.entropy, a.g_logp, a.g_entropy, a.g_lse, a.temperature};
#pragma unroll
  for (int v = 0; v < kCompactVectors; v++)
    if (in[v]) a.out[v * a.rows + i] = from < 0 ? float(v == kCompactVectors - 1) : in[v][from];
}

template <class O> __global__ void __launch_bounds__(kRowThreads) scatter_rows_kernel(const ScatterRowsArgs a) {
  const int64_t row = blockIdx.x, from = a.place[row];
  const float* in = a.in + (from < 0 ? 0 : from) * a.width;
  O* out = static_cast<O*>(a.out) + row * a.width;
  for (int64_t col = threadIdx.x; col < a.width; col += kRowThreads) out[col] = narrow<O>(from < 0 ? 0.0f : in[col]);
}

template <class O> int scatter(const ScatterRowsArgs& a, cudaStream_t stream) {
  PK_LAUNCH((scatter_rows_kernel<O>), dim3(static_cast<unsigned>(a.rows)), dim3(kRowThreads), stream, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_compact(const CompactArgs& a, void* stream) {
  PK_LAUNCH(compact_kernel, dim3(1), dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_gather_rows(const GatherRowsArgs& a, void* stream) {
  if (a.rows == 0 || a.bytes == 0) return 0;
  PK_LAUNCH(gather_rows_kernel, dim3(static_cast<unsigned>(a.rows)), dim3(kRowThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_gather_vectors(const GatherVectorsArgs& a, void* stream) {
  if (a.rows == 0) return 0;
  PK_LAUNCH(gather_vectors_kernel, dim3(static_cast<unsigned>(ceil_div(a.rows, kRowThreads))), dim3(kRowThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_scatter_rows(const ScatterRowsArgs& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case DType::f32: return scatter<float>(a, s);
    case DType::bf16: return scatter<bf16_t>(a, s);
    case DType::f16: return scatter<f16_t>(a, s);
    case DType::f64: break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace prefkern
