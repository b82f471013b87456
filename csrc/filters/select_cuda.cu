// The CUDA walk of select.h: a fixed number of launches, none of which waits for the host. A block counts the digits of its
// share of the values in shared memory and adds them to the counts of all; atomics on integers, so that the order does not
// matter. The block that finishes last (a counter tells) finds the digit of the wanted value in the sums: three launches
// and the value is known.
//
// A fourth launch finds the value above it, between which and it a quantile may lie, or counts how many values equal to it
// each block has, so that of those the first ones can be kept.
#include "core/cuda.cuh"
#include "filters/select.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kPasses = OrderKey<float>::passes, kDigitsPerThread = kDigits / kThreads;
using Count = unsigned long long;

// What is known of the wanted value, in the workspace, which starts out as zeros.
struct State {
  Count nans;           // among the values that count; no histogram has them
  Count values;         // that count and are not NaN
  Count rank;           // of the wanted one among them
  Count wanted;         // how many are to be kept
  Count below, equal;   // how many are less than, and equal to, what is known of it
  uint32_t key;         // its digits that are known
  uint32_t above;       // ~ the least key above it
  uint32_t finished[kPasses + 1];  // blocks
};
static_assert(sizeof(State) <= kSelectStateWords * 8, "the workspace has no room for it");

struct Workspace {
  Count* histograms;
  State* state;
  Count* ties;  // per block
};
__device__ __forceinline__ Workspace workspace(const SelectArgs<float>& a) {
  auto* words = reinterpret_cast<Count*>(a.workspace);
  return {words, reinterpret_cast<State*>(words + kPasses * kDigits), words + kPasses * kDigits + kSelectStateWords};
}

// A block's share of the values: [begin, end).
struct Share {
  int64_t begin, end;
};
__device__ __forceinline__ Share share(int64_t count) {
  const int64_t each = ceil_div(ceil_div(count, gridDim.x), kThreads) * kThreads, begin = blockIdx.x * each;
  return {begin < count ? begin : count, begin + each < count ? begin + each : count};
}

__device__ __forceinline__ bool counts(const SelectArgs<float>& a, int64_t i) { return !a.mask || a.mask[i] != 0; }

// Whether all other blocks have come here before; what they wrote until then can be read.
__device__ __forceinline__ bool last_block(uint32_t* finished) {
  PK_SMEM(int, is_last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  const bool last = is_last[0] != 0;
  if (last) __threadfence();
  return last;
}

// The digit of the wanted value from the counts of all blocks. One block; the rank is set in the first pass.
__device__ __forceinline__ void choose_digit(const SelectArgs<float>& a, const Workspace& w, int pass, bool largest) {
  const volatile Count* histogram = w.histograms + pass * kDigits;  // other blocks' writes: not from a stale cache line
  PK_SMEM(Count, sums, kThreads);
  Count mine = 0;
  for (int k = 0; k < kDigitsPerThread; k++) mine += histogram[threadIdx.x * kDigitsPerThread + k];
  sums[threadIdx.x] = mine;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {  // inclusive sums
    const Count left = static_cast<int>(threadIdx.x) >= distance ? sums[threadIdx.x - distance] : 0;
    __syncthreads();
    sums[threadIdx.x] += left;
    __syncthreads();
  }
  PK_SMEM(Count, rank, 1);
  if (threadIdx.x == 0) {
    if (pass == 0) {
      const Count n = sums[kThreads - 1];
      w.state->values = n;
      w.state->wanted = largest_count(a.fraction, static_cast<int64_t>(n));
      if (largest) w.state->rank = n - w.state->wanted;
      else if (n > 0) w.state->rank = static_cast<Count>(quantile_position(a.q, static_cast<int64_t>(n), a.interpolation).rank);
    }
    rank[0] = w.state->rank - w.state->below;
  }
  __syncthreads();
  Count before = sums[threadIdx.x] - mine;
  if (before <= rank[0] && rank[0] < sums[threadIdx.x]) {  // one thread, or none if no value is wanted
    int d = static_cast<int>(threadIdx.x) * kDigitsPerThread;
    while (before + histogram[d] <= rank[0]) before += histogram[d++];
    w.state->key |= static_cast<uint32_t>(d) << digit_shift<float>(pass);
    w.state->below += before;
    w.state->equal = histogram[d];
  }
}

__global__ void __launch_bounds__(kThreads) digit_kernel(const SelectArgs<float> a, int pass, bool largest) {
  const Workspace w = workspace(a);
  PK_SMEM(uint32_t, bins, kDigits);
  for (int d = threadIdx.x; d < kDigits; d += kThreads) bins[d] = 0;
  __syncthreads();
  const uint32_t chosen = w.state->key;
  const Share s = share(a.count);
  Count nans = 0;
  for (int64_t i = s.begin + threadIdx.x; i < s.end; i += kThreads) {
    if (!counts(a, i)) continue;
    const float x = a.values[i];
    if (x != x) {
      nans++;
      continue;
    }
    const uint32_t key = order_key(x);
    if (digits_match<float>(key, chosen, pass)) atomicAdd(&bins[digit<float>(key, pass)], 1u);
  }
  __syncthreads();
  Count* histogram = w.histograms + pass * kDigits;
  for (int d = threadIdx.x; d < kDigits; d += kThreads)
    if (bins[d] != 0) atomicAdd(&histogram[d], Count(bins[d]));
  if (pass == 0 && nans != 0) atomicAdd(&w.state->nans, nans);
  if (last_block(&w.state->finished[pass])) choose_digit(a, w, pass, largest);
}

__global__ void __launch_bounds__(kThreads) quantile_kernel(const SelectArgs<float> a) {
  const Workspace w = workspace(a);
  const State state = *w.state;  // written by launches before
  const bool nothing = state.values == 0 || state.nans != 0;
  QuantilePosition at{0, 0.0};
  if (!nothing) at = quantile_position(a.q, static_cast<int64_t>(state.values), a.interpolation);
  const bool needs_next = at.weight != 0 && state.rank + 1 >= state.below + state.equal;
  if (needs_next) {
    const Share s = share(a.count);
    uint32_t above = 0;
    for (int64_t i = s.begin + threadIdx.x; i < s.end; i += kThreads) {
      if (!counts(a, i)) continue;
      const uint32_t key = order_key(a.values[i]);
      if (key > state.key && ~key > above) above = ~key;
    }
    above = block_reduce<kThreads>(above, 0u, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
    if (threadIdx.x == 0) atomicMax(&w.state->above, above);
  }
  if (!last_block(&w.state->finished[kPasses]) || threadIdx.x != 0) return;
  const uint32_t above = *const_cast<const volatile uint32_t*>(&w.state->above);
  const float low = order_value<float>(state.key), high = needs_next ? order_value<float>(~above) : low;
  *a.quantile = nothing ? __builtin_nanf("") : interpolate(low, high, at.weight);
}

__global__ void __launch_bounds__(kThreads) ties_kernel(const SelectArgs<float> a) {
  const Workspace w = workspace(a);
  const float least = order_value<float>(w.state->key);
  const Share s = share(a.count);
  Count equal = 0;
  if (w.state->wanted != 0)
    for (int64_t i = s.begin + threadIdx.x; i < s.end; i += kThreads) equal += counts(a, i) && a.values[i] == least;
  equal = block_reduce<kThreads>(equal, Count(0), Add());
  if (threadIdx.x == 0) w.ties[blockIdx.x] = equal;
}

// Keeps what is above the least wanted value, and of those equal to it the first ones, in the order of memory.
__global__ void __launch_bounds__(kThreads) largest_kernel(const SelectArgs<float> a) {
  const Workspace w = workspace(a);
  const State state = *w.state;
  const float least = state.wanted != 0 ? order_value<float>(state.key) : __builtin_nanf("");
  const Count ties = state.wanted - (state.values - state.below - state.equal);  // to keep
  Count before = 0;                                                              // equal values so far
  for (unsigned b = threadIdx.x; b < blockIdx.x; b += kThreads) before += w.ties[b];
  before = block_reduce<kThreads>(before, Count(0), Add());
  const Share s = share(a.count);
  const bool all = state.wanted == 0 || before + w.ties[blockIdx.x] <= ties, none = before >= ties;
  if (all || none) {
    for (int64_t i = s.begin + threadIdx.x; i < s.end; i += kThreads) {
      const float x = a.values[i];
      a.keep[i] = counts(a, i) && (all ? x >= least : x > least);
    }
    return;
  }
  constexpr int warps = kThreads / 32;
  PK_SMEM(int, warp_ties, warps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t first = s.begin; first < s.end; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool here = i < s.end && counts(a, i);
    const float x = here ? a.values[i] : 0.0f;
    const bool tie = here && x == least;
    const unsigned in_warp = __ballot_sync(0xffffffffu, tie);
    if (lane == 0) warp_ties[warp] = __popc(in_warp);
    __syncthreads();
    Count rank = before + static_cast<Count>(__popc(in_warp & ((1u << lane) - 1)));
    for (int k = 0; k < warps; k++) {
      if (k < warp) rank += warp_ties[k];
      before += warp_ties[k];
    }
    if (i < s.end) a.keep[i] = tie ? rank < ties : here && x > least;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) from_kernel(const SelectArgs<float> a) {
  const float least = *a.quantile;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.count; i += threads)
    a.keep[i] = counts(a, i) && a.values[i] >= least;
}

dim3 grid(const SelectArgs<float>& a) { return dim3(static_cast<unsigned>(select_blocks(a.count))); }

void find_value(const SelectArgs<float>& a, bool largest, cudaStream_t s) {
  for (int pass = 0; pass < kPasses; pass++) PK_LAUNCH(digit_kernel, grid(a), dim3(kThreads), s, a, pass, largest);
}

}  // namespace

int cuda_quantile(const SelectArgs<float>& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  find_value(a, false, s);
  PK_LAUNCH(quantile_kernel, grid(a), dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_keep_largest(const SelectArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  find_value(a, true, s);
  PK_LAUNCH(ties_kernel, grid(a), dim3(kThreads), s, a);
  PK_LAUNCH(largest_kernel, grid(a), dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_keep_from(const SelectArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const int64_t blocks = ceil_div(a.count, kThreads), most = 4096;
  PK_LAUNCH(from_kernel, dim3(static_cast<unsigned>(blocks < most ? blocks : most)), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
