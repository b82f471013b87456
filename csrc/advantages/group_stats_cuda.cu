// The CUDA walk of group_stats.h: one launch, a warp per group or row, no atomics; a second one for a batch rule.
//
// Up to kScanIdsUpTo rows a warp takes one row and looks through all ids for the members of its group: 32 KiB of
// ids stay in the L1 cache, and nothing has to be sorted or counted first. Beyond that, ids come sorted with the row of
// each; a warp takes one sorted position, leaves unless a group begins there, finds the end by search and writes the
// whole group. Either way 32 lanes add the members in a fixed order, in double, and equal input gives equal bits.
//
// The batch stage is one block: some thousand rows in double, which its caches hold.
#include "advantages/group_stats.h"
#include "advantages/moments.cuh"
#include "core/groups.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kBatchThreads = 512;

// ---- from members to an estimate ------------------------------------------------------------------------------------

struct GroupResult {
  GroupMoments moments;
  double low, high;
  int64_t size;  // of those that take part
  int64_t best;  // the only row that gets an advantage; -1: all do
};

// One plain column (plain_rule).
template <class Members> __device__ __forceinline__ GroupResult reduce_plain(const GroupArgs<float>& a, const Members& members,
                                                                             int lane) {
  double sum = 0, n = 0, squares = 0;
  members.for_members(lane, [&](int64_t row) {
    sum += double(a.rewards[row]);
    n += 1;
  });
  n = warp_sum(n);
  const double mean = group_mean(warp_sum(sum), n);
  members.for_members(lane, [&](int64_t row) {
    const double d = double(a.rewards[row]) - mean;
    squares += d * d;
  });
  squares = warp_sum(squares);
  const GroupMoments m =
      a.rule.virtual_count > 0 ? virtual_moments(a.rule, n, mean, squares) : group_moments(a.rule, n, mean, squares);
  return {m, 0, 0, static_cast<int64_t>(n), -1};
}

template <class Members> __device__ GroupResult reduce_column(const GroupArgs<float>& a, const Members& members, int lane,
                                                              int64_t column) {
  const bool opo = a.rule.estimator == AdvantageEstimator::opo, finds = finds_best(a.rule.estimator);
  GroupSums s;
  members.for_members(lane, [&](int64_t row) {
    const double r = estimated_reward(a, row, column);
    s.rows += 1;
    if (!takes_part(a, r)) return;
    s.n += 1;
    s.sum += r;
    s.low = r < s.low ? r : s.low;
    s.high = r > s.high ? r : s.high;
    if (opo) {
      const double length = row_length(a, row);
      s.tokens += length;
      s.weighted += length * r;
    }
  });
  s.rows = warp_sum(s.rows);
  s.n = warp_sum(s.n);
  s.sum = warp_sum(s.sum);
  s.low = warp_reduce(s.low, [](double x, double y) { return x < y ? x : y; });
  s.high = warp_reduce(s.high, [](double x, double y) { return x > y ? x : y; });
  if (opo) {
    s.tokens = warp_sum(s.tokens);
    s.weighted = warp_sum(s.weighted);
  }
  int64_t best = a.count;
  if (finds) {
    members.for_members(lane, [&](int64_t row) {
      if (row < best && estimated_reward(a, row, column) == s.high) best = row;
    });
    best = warp_reduce(best, [](int64_t x, int64_t y) { return x < y ? x : y; });
  }
  const double mean = group_mean(s);
  members.for_members(lane, [&](int64_t row) {
    const double r = estimated_reward(a, row, column);
    if (!takes_part(a, r)) return;
    const double d = r - mean;
    s.squares += d * d;
    s.deviations += d < 0 ? -d : d;
    if (row != best && r > s.second) s.second = r;
  });
  s.squares = warp_sum(s.squares);
  s.deviations = warp_sum(s.deviations);
  if (finds) s.second = warp_reduce(s.second, [](double x, double y) { return x > y ? x : y; });
  const bool none = s.n == 0;
  const double nothing = __builtin_nan("");
  GroupMoments m = group_estimate(a.rule, s);
  if (none) m.mean = m.std = nothing;
  return {m, none ? nothing : s.low, none ? nothing : s.high, static_cast<int64_t>(s.n), finds ? best : -1};
}

__device__ __forceinline__ double row_advantage(const GroupResult& g, double reward, int64_t row) {
  return g.best < 0 || g.best == row ? advantage(g.moments, reward) : 0.0 * g.moments.center;
}

__device__ __forceinline__ void write_statistics(const GroupArgs<float>& a, int64_t at, const GroupResult& g) {
  if (a.mean) a.mean[at] = float(g.moments.mean);
  if (a.std) a.std[at] = float(g.moments.std);
  if (a.min) a.min[at] = float(g.low);
  if (a.max) a.max[at] = float(g.high);
  if (a.sizes) a.sizes[at] = g.size;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t warp_index() { return int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; }

// What a row adds up to: a finished advantage, or what the batch stage takes. `any`: whether a column of it takes part.
__device__ __forceinline__ void write_row(const GroupArgs<float>& a, int64_t row, double sum, bool any) {
  if (a.batch == BatchRule::none) a.advantages[row] = float(any ? sum : 0.0);
  else a.values[row] = any ? sum : kLeftOut;
}

template <bool PLAIN> __global__ void __launch_bounds__(kThreads) scan_kernel(const GroupArgs<float> a) {
  const int64_t row = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (row >= a.count) return;  // a whole warp at a time
  const ScannedMembers members{a.group, a.count, a.group[row]};
  if (PLAIN) {
    const GroupResult g = reduce_plain(a, members, lane);
    if (lane != 0) return;
    a.advantages[row] = float(advantage(g.moments, double(a.rewards[row])));
    write_statistics(a, row, g);
    return;
  }
  const int64_t columns = estimated_columns(a);
  double sum = 0;
  bool any = false;
  for (int64_t k = 0; k < columns; k++) {
    const GroupResult g = reduce_column(a, members, lane, k);
    const double r = estimated_reward(a, row, k);
    if (takes_part(a, r)) {
      any = true;
      sum += estimated_weight(a, k) * row_advantage(g, r, row);
    }
    if (lane == 0) write_statistics(a, row * columns + k, g);
  }
  if (lane == 0) write_row(a, row, sum, any);
}

template <bool PLAIN> __global__ void __launch_bounds__(kThreads) segment_kernel(const GroupArgs<float> a) {
  const int64_t begin = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (begin >= a.count) return;
  if (!group_begins(a.group, begin)) return;
  const SortedMembers members{a.order, begin, group_end(a.group, a.count, begin)};
  if (PLAIN) {
    const GroupResult g = reduce_plain(a, members, lane);
    members.for_members(lane, [&](int64_t row) {
      a.advantages[row] = float(advantage(g.moments, double(a.rewards[row])));
      write_statistics(a, row, g);
    });
    return;
  }
  // A lane meets the same rows in every column: it alone reads and writes their sums in `values`.
  const int64_t columns = estimated_columns(a);
  for (int64_t k = 0; k < columns; k++) {
    const GroupResult g = reduce_column(a, members, lane, k);
    const double weight = estimated_weight(a, k);
    members.for_members(lane, [&](int64_t row) {
      const double r = estimated_reward(a, row, k), before = k == 0 ? kLeftOut : a.values[row];
      const bool takes = takes_part(a, r), any = takes || before != kLeftOut;
      const double sum = (before == kLeftOut ? 0.0 : before) + (takes ? weight * row_advantage(g, r, row) : 0.0);
      if (k + 1 == columns) write_row(a, row, sum, any);
      else a.values[row] = any ? sum : kLeftOut;
      write_statistics(a, row * columns + k, g);
    });
  }
}

__global__ void __launch_bounds__(kBatchThreads) batch_kernel(const GroupArgs<float> a) {
  const Moments m = block_moments<kBatchThreads>(
      0, a.count, [&](int64_t i) { return batch_weight(a, i); }, [&](int64_t i) { return batch_value(a, i); });
  const Affine f = batch_affine(a.batch, m, a.batch_eps);
  for (int64_t i = threadIdx.x; i < a.count; i += kBatchThreads) a.advantages[i] = batch_result(a, f, i);
}

}  // namespace

int cuda_group_advantages(const GroupArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kThreads / kWarp)));
  const bool plain = plain_rule(a) && a.nan == NanRule::error;
  if (a.order && plain) PK_LAUNCH(segment_kernel<true>, grid, dim3(kThreads), s, a);
  else if (a.order) PK_LAUNCH(segment_kernel<false>, grid, dim3(kThreads), s, a);
  else if (plain) PK_LAUNCH(scan_kernel<true>, grid, dim3(kThreads), s, a);
  else PK_LAUNCH(scan_kernel<false>, grid, dim3(kThreads), s, a);
  if (a.batch != BatchRule::none) PK_LAUNCH(batch_kernel, dim3(1), dim3(kBatchThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
