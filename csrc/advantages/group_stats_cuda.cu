// The CUDA walk of group_stats.h: one launch, a warp per group or row, no atomics, no scratch memory.
//
// Up to kSortGroupsAbove rows a warp takes one row and looks through all ids for the members of its group: 32 KiB of
// ids stay in the L1 cache, and nothing has to be sorted or counted first. Beyond that, ids come sorted with the row of
// each; a warp takes one sorted position, leaves unless a group begins there, finds the end by binary search and writes
// the whole group. Either way 32 lanes add the members in a fixed order, in double, and equal input gives equal bits.
#include "advantages/group_stats.h"
#include "core/groups.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kWarp = 32;

__device__ __forceinline__ double warp_sum(double v) {
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Rows whose id is `id`. f(row) is called for a lane's share of them.
struct Scan {
  const int64_t* ids;
  int64_t count, id;
  template <class F> __device__ __forceinline__ void for_members(int lane, F&& f) const {
    const int64_t pairs = aligned16(ids) ? count / 2 : 0;
    for (int64_t i = lane; i < pairs; i += kWarp) {
      const Pack<int64_t, 2> two = reinterpret_cast<const Pack<int64_t, 2>*>(ids)[i];
      if (two.v[0] == id) f(2 * i);
      if (two.v[1] == id) f(2 * i + 1);
    }
    for (int64_t i = 2 * pairs + lane; i < count; i += kWarp)
      if (ids[i] == id) f(i);
  }
};

// Sorted positions [begin, end).
struct Segment {
  const int64_t* order;
  int64_t begin, end;
  template <class F> __device__ __forceinline__ void for_members(int lane, F&& f) const {
    for (int64_t i = begin + lane; i < end; i += kWarp) f(order[i]);
  }
};

struct GroupResult {
  GroupMoments moments;
  int64_t size;
};

template <class Members> __device__ __forceinline__ GroupResult reduce_group(const GroupArgs<float>& a, const Members& members,
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
  return {group_moments(a.rule, n, mean, warp_sum(squares)), static_cast<int64_t>(n)};
}

__device__ __forceinline__ void write_row(const GroupArgs<float>& a, int64_t row, const GroupResult& g) {
  a.advantages[row] = float(advantage(g.moments, double(a.rewards[row])));
  a.mean[row] = float(g.moments.mean);
  a.std[row] = float(g.moments.std);
  a.sizes[row] = g.size;
}

__device__ __forceinline__ int64_t warp_index() { return int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; }

__global__ void __launch_bounds__(kThreads) scan_kernel(const GroupArgs<float> a) {
  const int64_t row = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (row >= a.count) return;  // a whole warp at a time
  const GroupResult g = reduce_group(a, Scan{a.group, a.count, a.group[row]}, lane);
  if (lane == 0) write_row(a, row, g);
}

__global__ void __launch_bounds__(kThreads) segment_kernel(const GroupArgs<float> a) {
  const int64_t begin = warp_index();
  const int lane = threadIdx.x % kWarp;
  if (begin >= a.count) return;
  if (!group_begins(a.group, begin)) return;
  const int64_t outside = group_end(a.group, a.count, begin);
  const Segment members{a.order, begin, outside};
  const GroupResult g = reduce_group(a, members, lane);
  members.for_members(lane, [&](int64_t row) { write_row(a, row, g); });
}

}  // namespace

int cuda_group_advantages(const GroupArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kThreads / kWarp)));
  if (a.order) PK_LAUNCH(segment_kernel, grid, dim3(kThreads), s, a);
  else PK_LAUNCH(scan_kernel, grid, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
