// The CUDA walk of pair_walk.h: a warp takes a row and goes through its group, in double. Every pair is looked at twice, from
// its winner and from its loser, and so nothing has to be added atomically. The block that finishes last (an integer counter
// tells) adds the losses and numbers of pairs of all rows in a fixed order: no second launch, equal bits every time.
#include "core/groups.cuh"
#include "groups/pair_walk.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

struct RowSums {
  double loss = 0, pairs = 0, grad = 0;
};

template <class Members>
__device__ __forceinline__ RowSums look(const PairArgs<float>& a, const Members& members, int64_t row, int lane) {
  const int64_t level = a.levels[row];
  const double score = pair_score(a.scores[row], level);
  RowSums sums;
  if (level < 1) sums.loss = sums.grad = score;
  members.for_members(lane, [&](int64_t other) {
    const int64_t other_level = a.levels[other];
    if (level == other_level) return;
    const double other_score = pair_score(a.scores[other], other_level);
    if (level < other_level) {
      const PairTerm t = pair_term(a.rule, score, level, other_score, other_level);
      sums.loss += t.loss;
      sums.pairs += 1;
      sums.grad += t.winner_grad;
    } else if (a.unnormalised) {
      sums.grad += pair_term(a.rule, other_score, other_level, score, level).loser_grad;
    }
  });
  return {warp_sum(sums.loss), warp_sum(sums.pairs), warp_sum(sums.grad)};
}

__global__ void __launch_bounds__(kThreads) pairs_kernel(const PairArgs<float> a) {
  const int64_t at = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (at < a.rows.count) {  // a whole warp at a time
    const int64_t* ids = a.rows.ids;
    const int64_t row = a.rows.order ? a.rows.order[at] : at;
    RowSums sums;
    if (a.rows.order) {
      const int64_t begin = group_start(ids, at);
      sums = look(a, SortedMembers{a.rows.order, begin, group_end(ids, a.rows.count, begin)}, row, lane);
    } else {
      sums = look(a, ScannedMembers{ids, a.rows.count, ids[at]}, row, lane);
    }
    if (lane == 0) {
      a.partials[2 * row] = sums.loss;
      a.partials[2 * row + 1] = sums.pairs;
      if (a.unnormalised) a.unnormalised[row] = float(sums.grad);
    }
  }

  PK_SMEM(int, is_last, 1);
  __threadfence();  // the partials above are visible before the count is
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(a.finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();

  double loss = 0, pairs = 0;
  const volatile double* partials = a.partials;  // other blocks' writes: not from a stale cache line
  for (int64_t row = threadIdx.x; row < a.rows.count; row += kThreads) {
    loss += partials[2 * row];
    pairs += partials[2 * row + 1];
  }
  loss = block_reduce<kThreads>(loss, 0.0, Add());
  pairs = block_reduce<kThreads>(pairs, 0.0, Add());
  if (threadIdx.x == 0) {
    *a.loss = float(pair_mean(loss, pairs));
    *a.pairs = static_cast<int64_t>(pairs);
  }
}

__global__ void __launch_bounds__(kThreads) backward_kernel(const PairGradArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < a.count) a.grad[i] = float(pair_grad(double(a.unnormalised[i]), double(*a.upstream), double(*a.pairs)));
}

}  // namespace

int cuda_level_pairs(const PairArgs<float>& a, void* stream) {
  if (a.rows.count == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows.count, kThreads / kWarp)));
  PK_LAUNCH(pairs_kernel, grid, dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_level_pairs_backward(const PairGradArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  PK_LAUNCH(backward_kernel, dim3(static_cast<unsigned>(ceil_div(a.count, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
