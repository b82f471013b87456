// The CUDA walk of returns.h: a warp takes a sequence or a segment, tile by tile from its end.
//
// A lane has a few neighbouring tokens of the tile. First it learns what value follows its own: that of the next lane to
// the right with a token that counts (a ballot tells which), else the one carried over from the tile before. Then its
// tokens are one affine map, five shuffles compose the maps of all lanes behind it, and the carry goes through.
#include "core/groups.cuh"
#include "core/sequence.cuh"
#include "sequence/returns.h"

namespace prefkern {
namespace {

constexpr int kThreads = 128, kItems = 4, kTile = kWarp * kItems;
constexpr unsigned kAll = 0xffffffffu;

struct Tokens {
  const ReturnsArgs<float>& a;
  __device__ __forceinline__ bool counts(int64_t i) const { return !a.mask || a.mask[i] != 0; }
  __device__ __forceinline__ double reward(int64_t i) const { return a.rewards[i]; }
  __device__ __forceinline__ double value(int64_t i) const { return a.values[i]; }
  __device__ __forceinline__ void store(int64_t i, double advantage, double value) const {
    a.advantages[i] = float(advantage);
    if (a.returns) a.returns[i] = float(advantage + value);
  }
  __device__ __forceinline__ void fill(int64_t i, float x) const {
    a.advantages[i] = x;
    if (a.returns) a.returns[i] = x;
  }
};

struct SegmentRows {
  const SegmentedArgs<float>& a;
  __device__ __forceinline__ bool counts(int64_t) const { return true; }
  __device__ __forceinline__ double reward(int64_t i) const { return a.rewards[a.rows[i]]; }
  __device__ __forceinline__ double value(int64_t) const { return 0; }
  __device__ __forceinline__ void store(int64_t i, double x, double) const { a.returns[a.rows[i]] = float(x); }
  __device__ __forceinline__ void fill(int64_t i, float x) const { a.returns[a.rows[i]] = x; }
};

// next_value: V behind the last token; with `repeat`, that of the last token.
template <bool VALUES, class At>
__device__ __forceinline__ void scan(const ReturnsRule& rule, const At& at, int64_t begin, int64_t end, bool repeat,
                                     double next_value) {
  const int lane = threadIdx.x % kWarp;
  double carry = 0;
  for (int64_t tile = ceil_div(end - begin, kTile) - 1; tile >= 0; tile--) {
    const int64_t first = begin + tile * kTile + lane * kItems;
    bool keep[kItems];
    double x[kItems], v[kItems];
#pragma unroll
    for (int j = 0; j < kItems; j++) {
      keep[j] = first + j < end && at.counts(first + j);
      x[j] = keep[j] ? at.reward(first + j) : 0.0;
      v[j] = VALUES && keep[j] ? at.value(first + j) : 0.0;
    }
    if (VALUES) {
      bool any = false;
      double mine = 0;  // the value of this lane's first token that counts
#pragma unroll
      for (int j = kItems - 1; j >= 0; j--) {
        any |= keep[j];
        mine = keep[j] ? v[j] : mine;
      }
      const unsigned lanes = __ballot_sync(kAll, any), behind = lane == kWarp - 1 ? 0u : lanes & (kAll << (lane + 1));
      const double theirs = __shfl_sync(kAll, mine, behind ? __ffs(static_cast<int>(behind)) - 1 : lane);
      double next = behind ? theirs : next_value;
      bool own = !behind && repeat;
#pragma unroll
      for (int j = kItems - 1; j >= 0; j--) {
        if (!keep[j]) continue;
        x[j] = td_error(rule.gamma, x[j], v[j], own ? v[j] : next);
        next = v[j];
        own = false;
      }
      const double leftmost = __shfl_sync(kAll, mine, lanes ? __ffs(static_cast<int>(lanes)) - 1 : lane);
      next_value = lanes ? leftmost : next_value;
      repeat &= lanes == 0;
    }
    AffineMap map;
#pragma unroll
    for (int j = kItems - 1; j >= 0; j--)
      if (keep[j]) map = compose({x[j], rule.decay}, map);
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const AffineMap right{__shfl_down_sync(kAll, map.add, offset), __shfl_down_sync(kAll, map.factor, offset)};
      if (lane + offset < kWarp) map = compose(map, right);
    }
    const double here = apply(map, carry), right = __shfl_down_sync(kAll, here, 1);
    double y = lane == kWarp - 1 ? carry : right;
    carry = __shfl_sync(kAll, here, 0);
#pragma unroll
    for (int j = kItems - 1; j >= 0; j--) {
      if (keep[j]) {
        y = apply({x[j], rule.decay}, y);
        at.store(first + j, y, v[j]);
      } else if (first + j < end) {
        at.fill(first + j, 0.0f);
      }
    }
  }
}

__device__ __forceinline__ int64_t warp_index() { return int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; }

template <class At> __device__ __forceinline__ void fill(const At& at, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin + threadIdx.x % kWarp; i < end; i += kWarp) at.fill(i, value);
}

template <bool VALUES> __global__ void __launch_bounds__(kThreads) returns_kernel(const ReturnsArgs<float> a) {
  if (!layout_holds<kThreads>(a.layout)) {
    fill_share<kThreads>(a.advantages, a.layout.tokens, __builtin_nanf(""));
    if (a.returns) fill_share<kThreads>(a.returns, a.layout.tokens, __builtin_nanf(""));
    return;
  }
  const int64_t b = warp_index();
  if (b >= a.layout.sequences) return;  // a whole warp at a time
  const Tokens at{a};
  const int64_t begin = sequence_begin(a.layout, b), limit = sequence_end(a.layout, b);
  const int64_t length = a.lengths ? a.lengths[b] : limit - begin;
  if (length < 0 || length > limit - begin) return fill(at, begin, limit, __builtin_nanf(""));
  fill(at, begin + length, limit, 0.0f);
  const bool cut = VALUES && a.finished && !a.finished[b];
  const double last = cut && a.rule.bootstrap == Bootstrap::critic ? double(a.last_values[b]) : 0.0;
  scan<VALUES>(a.rule, at, begin, begin + length, cut && a.rule.bootstrap == Bootstrap::repeat, last);
}

__global__ void __launch_bounds__(kThreads) segmented_kernel(const SegmentedArgs<float> a) {
  const int64_t begin = warp_index();
  if (begin >= a.count || !group_begins(a.segment, begin)) return;
  const int64_t end = group_end(a.segment, a.count, begin);
  const SegmentRows at{a};
  int twice = 0;
  for (int64_t i = begin + threadIdx.x % kWarp; i + 1 < end; i += kWarp) twice |= a.place[i] == a.place[i + 1];
  if (__any_sync(kAll, twice)) return fill(at, begin, end, __builtin_nanf(""));
  ReturnsRule rule;
  rule.gamma = rule.decay = a.gamma;
  scan<false>(rule, at, begin, end, false, 0);
}

}  // namespace

int cuda_returns(const ReturnsArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.layout.sequences, kThreads / kWarp)));
  if (a.values) PK_LAUNCH(returns_kernel<true>, grid, dim3(kThreads), s, a);
  else PK_LAUNCH(returns_kernel<false>, grid, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_segmented_returns(const SegmentedArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.count, kThreads / kWarp)));
  PK_LAUNCH(segmented_kernel, grid, dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
