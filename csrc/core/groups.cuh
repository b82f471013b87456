// Groups on the device, a warp at a time. Few rows: the warp of a row looks through all ids for the members of its group
// (32 KiB of ids stay in the L1 cache, and nothing has to be sorted first). Many rows: ids come sorted in ascending order
// with the row of each, and a group is a range of sorted positions.
#pragma once
#include "core/cuda.cuh"

namespace prefkern {
inline namespace PK_ISA {

__device__ __forceinline__ bool group_begins(const int64_t* sorted, int64_t at) {
  return at == 0 || sorted[at - 1] != sorted[at];
}

// Both look near before they look far: groups are small beside the batch.

// One past the last position of the group that `begin` is in.
__device__ __forceinline__ int64_t group_end(const int64_t* sorted, int64_t count, int64_t begin) {
  int64_t inside = begin, step = 1;  // the last position known to be in the group, the first known not to be
  while (inside + step < count && sorted[inside + step] == sorted[begin]) {
    inside += step;
    step *= 2;
  }
  int64_t outside = inside + step < count ? inside + step : count;
  while (outside - inside > 1) {
    const int64_t middle = (inside + outside) / 2;
    if (sorted[middle] == sorted[begin]) inside = middle;
    else outside = middle;
  }
  return outside;
}

// The first position of the group that `at` is in.
__device__ __forceinline__ int64_t group_start(const int64_t* sorted, int64_t at) {
  int64_t inside = at, step = 1;
  while (inside - step >= 0 && sorted[inside - step] == sorted[at]) {
    inside -= step;
    step *= 2;
  }
  int64_t outside = inside - step > -1 ? inside - step : -1;
  while (inside - outside > 1) {
    const int64_t middle = (inside + outside) / 2;
    if (sorted[middle] == sorted[at]) inside = middle;
    else outside = middle;
  }
  return inside;
}

// The rows of a group: for_members calls f(row) for a lane's share of them, always the same one, whoever asks.
struct ScannedMembers {
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
struct SortedMembers {
  const int64_t* order;
  int64_t begin, end;
  template <class F> __device__ __forceinline__ void for_members(int lane, F&& f) const {
    for (int64_t i = begin + lane; i < end; i += kWarp) f(order[i]);
  }
};

// f(row, members of its group) for row `at`, or for the row at sorted position `at` if there is an order.
template <class F>
__device__ __forceinline__ void with_members(const int64_t* ids, const int64_t* order, int64_t count, int64_t at, F&& f) {
  if (!order) return f(at, ScannedMembers{ids, count, ids[at]});
  const int64_t begin = group_start(ids, at);
  f(order[at], SortedMembers{order, begin, group_end(ids, count, begin)});
}

}  // namespace PK_ISA
}  // namespace prefkern
