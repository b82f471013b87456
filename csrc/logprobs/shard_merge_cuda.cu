// The CUDA walk of shard_merge.h: a thread per row; the arrays of a state lie row next to row, so a warp reads them whole.
#include "core/cuda.cuh"
#include "logprobs/shard_merge.h"

namespace prefkern {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) merge_kernel(const ShardMergeArgs<float> a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < a.rows.block.rows) merge_row(a, row);
}

}  // namespace

int cuda_merge_shards(const ShardMergeArgs<float>& a, void* stream) {
  if (a.rows.block.rows == 0) return 0;
  PK_LAUNCH(merge_kernel, dim3(static_cast<unsigned>(ceil_div(a.rows.block.rows, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
