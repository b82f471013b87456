// One step of gru.h on CUDA: a thread per row and hidden unit. Products are the caller's.
#include "core/cuda.cuh"
#include "meta/gru.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ bool terminal(const GruArgs<float>& a, int64_t row, int64_t step) {
  return a.done && a.done[row * a.steps + step] != 0;
}

__global__ void __launch_bounds__(kThreads) forward_kernel(const GruArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, h = a.hidden;
  if (i >= a.rows * h) return;
  const int64_t row = i / h, j = i % h, token = row * a.steps + a.step;
  const float *gates = a.gates + token * 3 * h + j, *product = a.product + row * 3 * h + j;
  const auto c = gru_cell(gates[0], gates[h], gates[2 * h], product[0], product[h], product[2 * h], a.bias[j], a.carry[i]);
  a.out[token * h + j] = c.hidden;
  a.carry[i] = a.step > 0 && terminal(a, row, a.step - 1) ? 0.0f : c.hidden;
  if (!a.saved) return;
  float* saved = a.saved + token * 4 * h + j;
  saved[0] = c.reset;
  saved[h] = c.keep;
  saved[2 * h] = c.fresh;
  saved[3 * h] = c.inner;
}

__global__ void __launch_bounds__(kThreads) backward_kernel(const GruArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, h = a.hidden;
  if (i >= a.rows * h) return;
  const int64_t row = i / h, j = i % h, token = row * a.steps + a.step, at = token * h + j;
  const float* saved = a.saved + token * 4 * h + j;
  const float hidden = a.step + 1 == a.steps || terminal(a, row, a.step) ? 0.0f : a.out[at + h];
  float grad = a.grad_out[at];
  if (a.step > 0 && !terminal(a, row, a.step - 1)) grad += a.carry[i] + a.product[i];
  const auto d = gru_cell_backward(grad, saved[0], saved[h], saved[2 * h], saved[3 * h], hidden);
  float* gates = a.grad_gates + token * 3 * h + j;
  gates[0] = d.g_r;
  gates[h] = d.g_z;
  gates[2 * h] = d.g_n;
  a.grad_inner[at] = d.inner;
  a.before[at] = hidden;
  a.carry[i] = d.hidden;
}

// A block per 32 columns, whose warps take turns with the rows.
__global__ void __launch_bounds__(kThreads) column_sums_kernel(const ColumnSumArgs<float> a) {
  constexpr int kWarps = kThreads / kWarp;
  PK_SMEM(double, partial, kThreads);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  double sum = 0;
  if (column < a.columns)
    for (int64_t row = warp; row < a.rows; row += kWarps) sum += double(a.values[row * a.columns + column]);
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= a.columns) return;
  for (int w = 1; w < kWarps; w++) sum += partial[w * kWarp + lane];
  a.sums[column] = float(sum);
}

}  // namespace

int cuda_gru_forward_step(const GruArgs<float>& a, void* stream) {
  if (a.rows * a.hidden == 0) return 0;
  PK_LAUNCH(forward_kernel, dim3(static_cast<unsigned>(ceil_div(a.rows * a.hidden, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_gru_backward_step(const GruArgs<float>& a, void* stream) {
  if (a.rows * a.hidden == 0) return 0;
  PK_LAUNCH(backward_kernel, dim3(static_cast<unsigned>(ceil_div(a.rows * a.hidden, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_column_sums(const ColumnSumArgs<float>& a, void* stream) {
  if (a.columns == 0) return 0;
  PK_LAUNCH(column_sums_kernel, dim3(static_cast<unsigned>(ceil_div(a.columns, kWarp))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
