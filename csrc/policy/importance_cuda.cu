// The CUDA walk of importance.h. Where sums are needed, of a sequence's log-ratio or of all weights, a first launch leaves
// those of each block's slice in `partials`, and the block that finishes last (an integer counter tells) joins them in a
// fixed order. The weights are written by a launch of their own, a thread per token.
#include "core/cuda.cuh"
#include "policy/importance.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256;

// What the last block leaves after the weights of the sequences.
enum Scratch : int { kFactor, kBroken, kScratch };

__device__ __forceinline__ bool counts(const uint8_t* mask, int64_t i) { return !mask || mask[i] != 0; }

// Sums of value(i) over the tokens of this block's slice that count, and how many do, to `partials`; a layout that is
// wrong leaves NaN. Returns whether this block is the last one: it sees the partials of all.
template <class F>
__device__ __forceinline__ bool sum_slices(const SequenceLayout& layout, const uint8_t* mask, int64_t slices, float* partials,
                                           uint32_t* finished, const F& value) {
  const int64_t sequence = blockIdx.x / slices, slice = blockIdx.x % slices;
  float sum = 0, count = 0;
  if (sequence_valid(layout, sequence)) {
    const int64_t begin = sequence_begin(layout, sequence), n = sequence_end(layout, sequence) - begin;
    const int64_t share = ceil_div(n, slices), last = (slice + 1) * share < n ? (slice + 1) * share : n;
    for (int64_t i = begin + slice * share + threadIdx.x; i < begin + last; i += kThreads) {
      if (!counts(mask, i)) continue;
      sum += value(i);
      count += 1;
    }
  } else {
    count = __builtin_nanf("");
  }
  sum = block_reduce<kThreads>(sum, 0.0f, Add());
  count = block_reduce<kThreads>(count, 0.0f, Add());
  PK_SMEM(int, is_last, 1);
  if (threadIdx.x == 0) {
    partials[2 * int64_t(blockIdx.x)] = sum;
    partials[2 * int64_t(blockIdx.x) + 1] = count;
    __threadfence();  // the partials above are visible before the count is
    is_last[0] = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last[0]) __threadfence();
  return is_last[0] != 0;
}

// The sums of all slices of a sequence. Other blocks' writes: not from a stale cache line.
__device__ __forceinline__ void read_sequence(const volatile float* partials, int64_t slices, int64_t sequence, double& sum,
                                              double& count) {
  sum = count = 0;
  for (int64_t k = sequence * slices; k < (sequence + 1) * slices; k++) {
    sum += partials[2 * k];
    count += partials[2 * k + 1];
  }
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const WeightArgs<float> a) {
  const WeightRule<float> rule = weight_rule<float>(a.options);
  const bool each = a.options.level == WeightLevel::token;
  const auto value = [&](int64_t i) {
    const float u = a.old_logp[i] - a.rollout_logp[i];
    return each ? importance_weight(rule, u) : u;
  };
  if (!sum_slices(a.layout, a.mask, a.slices, a.partials, a.finished, value)) return;
  double total = 0, counted = 0, broken = 0;
  for (int64_t b = threadIdx.x; b < a.layout.sequences; b += kThreads) {
    double sum, count;
    read_sequence(a.partials, a.slices, b, sum, count);
    broken += count != count;
    if (!each) {
      a.row_weights[b] = importance_weight(rule, static_cast<float>(sequence_log_weight(a.options.level, sum, count)));
      sum = count > 0 ? a.row_weights[b] : 0;
      count = count > 0 ? 1 : 0;
    }
    total += sum;
    counted += count;
  }
  total = block_reduce<kThreads>(total, 0.0, Add());
  counted = block_reduce<kThreads>(counted, 0.0, Add());
  broken = block_reduce<kThreads>(broken, 0.0, Add());
  if (threadIdx.x != 0) return;
  float* scratch = a.row_weights + a.layout.sequences;
  scratch[kFactor] = a.options.normalize ? static_cast<float>(inverse_mean(total, counted)) : 1.0f;
  scratch[kBroken] = broken > 0 ? 1.0f : 0.0f;
}

// A grid over all tokens, which needs no layout.
__global__ void __launch_bounds__(kThreads) token_kernel(const WeightArgs<float> a) {
  const WeightRule<float> rule = weight_rule<float>(a.options);
  const float factor = a.options.normalize ? a.row_weights[a.layout.sequences + kFactor] : 1.0f;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.layout.tokens; i += threads) {
    const float w = counts(a.mask, i) ? importance_weight(rule, a.old_logp[i] - a.rollout_logp[i]) : 0.0f;
    a.weights[i] = w == 0 ? 0.0f : w * factor;
  }
}

// A block per slice of a sequence; where the layout is wrong the blocks fill everything with NaN.
__global__ void __launch_bounds__(kThreads) sequence_kernel(const WeightArgs<float> a) {
  const float* scratch = a.row_weights + a.layout.sequences;
  if (scratch[kBroken] != 0) {
    const int64_t threads = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.layout.tokens; i += threads)
      a.weights[i] = __builtin_nanf("");
    return;
  }
  const int64_t sequence = blockIdx.x / a.slices, slice = blockIdx.x % a.slices;
  const int64_t begin = sequence_begin(a.layout, sequence), n = sequence_end(a.layout, sequence) - begin;
  const int64_t share = ceil_div(n, a.slices), last = (slice + 1) * share < n ? (slice + 1) * share : n;
  const float w = a.row_weights[sequence], scaled = w == 0 ? 0.0f : w * scratch[kFactor];
  for (int64_t i = begin + slice * share + threadIdx.x; i < begin + last; i += kThreads)
    a.weights[i] = counts(a.mask, i) ? scaled : 0.0f;
}

__global__ void __launch_bounds__(kThreads) keep_kernel(const OffPolicyArgs<float> a) {
  const auto value = [&](int64_t i) { return mismatch(a.logp[i], a.rollout_logp[i]); };
  if (!sum_slices(a.layout, a.mask, a.slices, a.partials, a.finished, value)) return;
  double broken = 0;
  for (int64_t b = threadIdx.x; b < a.layout.sequences; b += kThreads) {
    double sum, count;
    read_sequence(a.partials, a.slices, b, sum, count);
    broken += count != count;
    a.keep[b] = keep_sequence(a.advantages[b], sum, count, a.threshold);
  }
  broken = block_reduce<kThreads>(broken, 0.0, Add());
  if (broken == 0) return;
  for (int64_t b = threadIdx.x; b < a.layout.sequences; b += kThreads) a.keep[b] = 0;
}

}  // namespace

int cuda_importance_weights(const WeightArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0 || a.layout.tokens == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 by_slice(static_cast<unsigned>(a.layout.sequences * a.slices)), block(kThreads);
  const bool each = a.options.level == WeightLevel::token;
  if (!each || a.options.normalize) PK_LAUNCH(sum_kernel, by_slice, block, s, a);
  if (each) {
    const int64_t blocks = ceil_div(a.layout.tokens, kThreads), most = 8192;
    PK_LAUNCH(token_kernel, dim3(static_cast<unsigned>(blocks < most ? blocks : most)), block, s, a);
  } else {
    PK_LAUNCH(sequence_kernel, by_slice, block, s, a);
  }
  return static_cast<int>(cudaGetLastError());
}

int cuda_off_policy_mask(const OffPolicyArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  PK_LAUNCH(keep_kernel, dim3(static_cast<unsigned>(a.layout.sequences * a.slices)), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
