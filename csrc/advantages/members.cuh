// The members of a group, shared out over the 32 lanes of a warp: by looking through all ids, or by sorted positions.
#pragma once
#include "core/groups.cuh"

namespace prefkern {
inline namespace PK_ISA {

constexpr int kWarp = 32;

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

// The first position of the group that `at` is in.
__device__ __forceinline__ int64_t group_begin(const int64_t* sorted, int64_t at) {
  int64_t outside = -1, inside = at;
  while (inside - outside > 1) {
    const int64_t middle = (outside + inside + 1) / 2;  // outside + 1 .. inside - 1, for outside = -1 too
    if (sorted[middle] == sorted[at]) inside = middle;
    else outside = middle;
  }
  return inside;
}

// f(row, members of its group) for row `at`, or for the row at sorted position `at` if there is an order.
template <class F>
__device__ __forceinline__ void with_members(const int64_t* ids, const int64_t* order, int64_t count, int64_t at, F&& f) {
  if (!order) return f(at, Scan{ids, count, ids[at]});
  const int64_t begin = group_begin(ids, at);
  f(order[at], Segment{order, begin, group_end(ids, count, begin)});
}

}  // namespace PK_ISA
}  // namespace prefkern
