// The gradient of row_loss.h on CUDA: a thread per element.
#include "core/cuda.cuh"
#include "lists/row_loss.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) gradient_kernel(const RowGradArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.rows * a.columns) return;
  a.grad[i] = row_gradient(a.unnormalised[i], a.upstream[a.per_row ? i / a.columns : 0] * *a.inverse);
}

}  // namespace

int cuda_row_gradient(const RowGradArgs<float>& a, void* stream) {
  if (a.rows * a.columns == 0) return 0;
  PK_LAUNCH(gradient_kernel, dim3(static_cast<unsigned>(ceil_div(a.rows * a.columns, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
