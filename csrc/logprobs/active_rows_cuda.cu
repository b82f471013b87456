// The CUDA walk of active_rows.h: one thread per row.
#include "core/cuda.cuh"
#include "logprobs/active_rows.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) active_targets_kernel(const ActiveTargetsArgs<float> a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < a.rows) a.out[row] = active_target(a, row);
}

}  // namespace

int cuda_active_targets(const ActiveTargetsArgs<float>& a, void* stream) {
  if (a.rows == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kThreads))), block(kThreads);
  PK_LAUNCH(active_targets_kernel, grid, block, static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
