// The CUDA walk of runs.h. First a block per sequence counts its tokens. Then every row has two warps, one per direction.
// A warp takes 32 of its row's tokens, a lane each, and goes through the rows of the other sign until every lane has found
// its token or none is left; the run ends at the first lane that has not. Rows are found by their sorted ids, 32 of the
// group at a time. No shared memory, no atomics, groups of any size, and a warp stops where its own run does.
//
// Weights are one thread per token.
#include "conflicts/runs.h"
#include "core/groups.cuh"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kAtOnce = 4;
constexpr unsigned kAll = 0xffffffffu;

template <class T> __global__ void __launch_bounds__(kThreads) length_kernel(const ConflictArgs<T> a) {
  const int64_t row = blockIdx.x;
  const bool valid = sequence_valid(a.layout, row) && a.advantages[row] == a.advantages[row];
  const int64_t begin = valid ? sequence_begin(a.layout, row) : 0, n = valid ? sequence_end(a.layout, row) - begin : 0;
  int64_t kept = n, last = n;
  if (a.mask) {
    kept = last = 0;
    for (int64_t t = threadIdx.x; t < n; t += kThreads) {
      if (!a.mask[begin + t]) continue;
      kept++;
      last = t + 1;
    }
    kept = block_reduce<kThreads>(kept, int64_t(0), Add());
    last = block_reduce<kThreads>(last, int64_t(0), [](int64_t x, int64_t y) { return x > y ? x : y; });
  }
  if (threadIdx.x == 0) a.length[row] = valid && kept == last ? kept : -1;
}

template <class T> __global__ void __launch_bounds__(kThreads) runs_kernel(const ConflictArgs<T> a) {
  const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp, at = warp / 2;
  const bool backward = warp % 2 != 0;
  const int lane = threadIdx.x % kWarp;
  if (at >= a.layout.sequences) return;  // a whole warp at a time
  const int64_t first = group_start(a.group, at), end = group_end(a.group, a.layout.sequences, at), row = a.order[at];

  bool bad = false;
  for (int64_t k = first + lane; k < end; k += kWarp) bad |= a.length[a.order[k]] < 0;
  bad = __any_sync(kAll, bad) != 0;
  const float advantage = a.advantages[row];
  // A warp of the group may have marked this row already; its length is of no use then.
  const int64_t length = bad ? 0 : a.length[row];
  const int64_t start = bad ? 0 : sequence_begin(a.layout, row) + (backward ? length - 1 : 0);
  int64_t run = 0;
  bool goes_on = advantage != 0;
  while (goes_on && run < length) {
    const int64_t t = run + lane;
    const bool inside = t < length;
    const T mine = inside ? a.tokens[backward ? start - t : start + t] : T(0);
    unsigned found = __ballot_sync(kAll, !inside);  // what lies past the end needs no other row
    for (int64_t k = first + lane; k - lane < end && found != kAll; k += kWarp) {
      int64_t other_start = 0, other_length = 0;
      if (k < end) {
        const int64_t other = a.order[k];
        const float sign = a.advantages[other];
        if (advantage > 0 ? sign < 0 : sign > 0) {
          other_length = a.length[other];
          other_start = sequence_begin(a.layout, other) + (backward ? other_length - 1 : 0);
        }
      }
      unsigned others = __ballot_sync(kAll, other_length > run);
      while (others != 0 && found != kAll) {
        bool same = false;
#pragma unroll
        for (int u = 0; u < kAtOnce; u++) {
          const int source = others != 0 ? __ffs(static_cast<int>(others)) - 1 : 0;
          const int64_t s = __shfl_sync(kAll, other_start, source), n = __shfl_sync(kAll, other_length, source);
          if (others != 0 && inside && t < n) same |= a.tokens[backward ? s - t : s + t] == mine;
          others &= others - 1;
        }
        found |= __ballot_sync(kAll, same);
      }
    }
    const int step = found == kAll ? kWarp : __ffs(static_cast<int>(~found)) - 1;
    run += step;
    goes_on = step == kWarp;
  }
  if (lane != 0) return;
  (backward ? a.backward : a.forward)[row] = run < length ? run : length;
  if (bad && !backward) a.length[row] = -1;
}

template <class T> int launch_runs(const ConflictArgs<T>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  PK_LAUNCH(length_kernel<T>, dim3(static_cast<unsigned>(a.layout.sequences)), dim3(kThreads), s, a);
  const dim3 grid(static_cast<unsigned>(ceil_div(2 * a.layout.sequences, kThreads / kWarp)));
  PK_LAUNCH(runs_kernel<T>, grid, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

// The sequence of token i, or -1 for a token that is in none, or in one that is not inside the tokens.
__device__ __forceinline__ int64_t sequence_of(const SequenceLayout& layout, int64_t i) {
  if (!layout.cu_seqlens) return i / layout.padded_length;
  int64_t inside = 0, outside = layout.sequences;  // the last sequence that begins at or before i lies in between
  while (outside - inside > 1) {
    const int64_t middle = (inside + outside) / 2;
    if (sequence_begin(layout, middle) <= i) inside = middle;
    else outside = middle;
  }
  const bool found = layout.sequences > 0 && sequence_valid(layout, inside);
  return found && sequence_begin(layout, inside) <= i && i < sequence_end(layout, inside) ? inside : -1;
}

__global__ void __launch_bounds__(kThreads) weights_kernel(const ConflictWeightArgs<float> a) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.layout.tokens; i += threads) {
    const int64_t row = sequence_of(a.layout, i);
    float weight = __builtin_nanf("");
    if (row >= 0) {
      const auto w = row_weights(a.rule, a.advantages[row], a.forward[row], a.backward[row], a.length[row]);
      weight = conflict_weight(w, i - sequence_begin(a.layout, row));
    }
    a.weights[i] = weight;
  }
}

}  // namespace

int cuda_conflict_runs(const ConflictArgs<int32_t>& a, void* stream) { return launch_runs(a, stream); }
int cuda_conflict_runs(const ConflictArgs<int64_t>& a, void* stream) { return launch_runs(a, stream); }

int cuda_conflict_weights(const ConflictWeightArgs<float>& a, void* stream) {
  if (a.layout.tokens == 0) return 0;
  const int64_t blocks = ceil_div(a.layout.tokens, kThreads), most = 4096;
  PK_LAUNCH(weights_kernel, dim3(static_cast<unsigned>(blocks < most ? blocks : most)), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
