// Joins the parts that the tiles of a head's GEMM left. Parts of a tile lie row next to row: 32 threads take adjacent rows, and 8
// such groups a share of the tiles each. The shares are joined in ascending order, so equal parts give equal bits.
#include "core/cuda.cuh"
#include "logprobs/tile_fold.h"

namespace prefkern {
namespace {

constexpr int kShares = 8;

struct Part {
  float max, s, u;
};

__device__ __forceinline__ void join(Part& a, const Part& b, float k) {
  SoftmaxSums<float> sums{a.s, a.u, 0, 0};
  softmax_merge(a.max, sums, b.max, SoftmaxSums<float>{b.s, b.u, 0, 0}, k);
  a.s = sums.s;
  a.u = sums.u;
}

__global__ void __launch_bounds__(kWarp* kShares) merge_tiles_kernel(const TileMergeArgs a) {
  PK_SMEM(Part, shares, kWarp * kShares);
  const LogitBlock<float>& b = a.tiles.block;
  const int lane = threadIdx.x % kWarp, share = threadIdx.x / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarp + lane;
  const bool within = row < b.rows;
  const int64_t target_id = within ? b.targets[row] : b.ignore_index;
  const bool ignored = target_id == b.ignore_index;
  const float factor = within ? logit_factor(b.transform, row) : 1.0f, k = factor * float(kLog2E);

  Part p{kMinusInf<float>, 0, 0};
  if (!ignored) {
    const int64_t each = ceil_div(a.count, kShares), begin = share * each;
    const int64_t end = begin + each < a.count ? begin + each : a.count;
    for (int64_t tile = begin; tile < end; tile++) {
      const float* part = a.tiles.parts + tile * kTileParts * b.rows + row;
      join(p, {part[0], part[b.rows], part[2 * b.rows]}, k);
    }
  }
  shares[threadIdx.x] = p;
  __syncthreads();
  if (share != 0 || !within) return;
  for (int i = 1; i < kShares; i++) join(p, shares[i * kWarp + lane], k);

  const int64_t target = target_id - b.first_col;
  const bool valid = target_id >= 0 && target_id < b.vocab, here = !ignored && valid && target >= 0 && target < b.cols;
  SoftmaxRow<float> s{p.max, p.s, p.u, 0, 0, here ? a.tiles.target_pre[row] : __builtin_nanf(""), kMinusInf<float>};
  if (!a.rows.last) return store_state(a.rows, row, s);
  SoftmaxOutputs<float> o{};
  if (!ignored) {
    if (!valid) s.s = __builtin_nanf("");  // every output of the row turns NaN
    o = softmax_finish(s, factor, b.vocab);
  }
  write_outputs(a.rows, row, o, ignored ? 0.0f : s.max);
}

}  // namespace

int cuda_merge_tiles(const TileMergeArgs& a, void* stream) {
  if (a.tiles.block.rows == 0) return 0;
  PK_LAUNCH(merge_tiles_kernel, dim3(static_cast<unsigned>(ceil_div(a.tiles.block.rows, kWarp))), dim3(kWarp * kShares),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
