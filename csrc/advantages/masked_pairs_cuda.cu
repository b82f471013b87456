// The CUDA walk of masked_pairs.h: a warp per sample goes through its group; then, if asked for, another one for the spread
// of the samples that were kept, and one block for the factor of the batch.
#include "advantages/masked_pairs.h"
#include "advantages/moments.cuh"
#include "core/groups.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kBlock = 512;

__device__ __forceinline__ int64_t warp_index() { return int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; }

__device__ __forceinline__ void write(const MaskedPairArgs<float>& a, int64_t row, double value) {
  if (a.renormalise) a.values[row] = value;
  else a.advantages[row] = float(value);
}

__global__ void __launch_bounds__(kThreads) pairs_kernel(const MaskedPairArgs<float> a) {
  const int64_t at = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (at >= a.count) return;
  with_members(a.group, a.order, a.count, at, [&](int64_t row, const auto& members) {
    const double r = double(a.rewards[row]), q = double(a.scores[row]);
    double n = 0, rewards = 0, all = 0, sum = 0, differ = 0, left = 0, squares = 0;
    members.for_members(lane, [&](int64_t j) {
      const double d = r - double(a.rewards[j]), gap = q - double(a.scores[j]);
      const bool differs = d != 0, counts = differs && pair_counts(a.mode, d, gap, a.tau);
      n += 1;
      rewards += double(a.rewards[j]);
      differ += differs;
      left += counts;
      const double poison = 0.0 * gap + 0.0 * d;  // NaN for what is not finite
      all += d + poison;
      sum += (counts ? d : 0.0) + poison;
    });
    n = warp_sum(n);
    const double mean = group_mean(warp_sum(rewards), n);
    all = warp_sum(all);
    sum = warp_sum(sum);
    differ = warp_sum(differ);
    left = warp_sum(left);
    members.for_members(lane, [&](int64_t j) {
      const double d = double(a.rewards[j]) - mean;
      squares += d * d;
    });
    squares = warp_sum(squares);
    if (lane != 0) return;
    a.kept[row] = left > 0;
    a.masked[row] = int64_t(differ - left);
    const double total = !a.whole_samples ? sum : left > 0 ? all : 0.0 * all;
    if (a.sigma_of_kept) a.values[row] = total;
    else write(a, row, pair_advantage(total, n, vsqrt(squares / freedom(n, a.ddof)), a.eps));
  });
}

__global__ void __launch_bounds__(kThreads) kept_kernel(const MaskedPairArgs<float> a) {
  const int64_t at = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (at >= a.count) return;
  with_members(a.group, a.order, a.count, at, [&](int64_t row, const auto& members) {
    double n = 0, kept = 0, rewards = 0, squares = 0;
    members.for_members(lane, [&](int64_t j) {
      n += 1;
      if (!a.kept[j]) return;
      kept += 1;
      rewards += double(a.rewards[j]);
    });
    n = warp_sum(n);
    kept = warp_sum(kept);
    const double mean = warp_sum(rewards) / kept;
    members.for_members(lane, [&](int64_t j) {
      if (!a.kept[j]) return;
      const double d = double(a.rewards[j]) - mean;
      squares += d * d;
    });
    squares = warp_sum(squares);
    if (lane == 0) write(a, row, pair_advantage(a.values[row], n, kept_sigma(kept, squares, a.ddof), a.eps));
  });
}

__global__ void __launch_bounds__(kBlock) renormalise_kernel(const MaskedPairArgs<float> a) {
  double out = 0;
  for (int64_t i = threadIdx.x; i < a.count; i += kBlock) out += a.masked[i] > 0 && !a.kept[i];
  const double factor = renormalisation(double(a.count), block_reduce<kBlock>(out, 0.0, Add{}));
  for (int64_t i = threadIdx.x; i < a.count; i += kBlock) a.advantages[i] = float(a.values[i] * factor);
}

}  // namespace

int cuda_masked_pairs(const MaskedPairArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kThreads / kWarp)));
  PK_LAUNCH(pairs_kernel, grid, dim3(kThreads), s, a);
  if (a.sigma_of_kept) PK_LAUNCH(kept_kernel, grid, dim3(kThreads), s, a);
  if (a.renormalise) PK_LAUNCH(renormalise_kernel, dim3(1), dim3(kBlock), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
