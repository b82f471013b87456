// The CUDA walk of sequence_sums.h: a block takes a sequence, threads read neighbouring tokens, and what they add up is
// joined in double in a fixed order. The mean of the backward counts the mask of its sequence first. Where places matter, a
// ballot per warp and a sum over the warps tell how many tokens that count lie before each.
#include "core/sequence.cuh"
#include "sequence/sequence_sums.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kBatch = 4;  // a thread's tokens that are added in float before they are in double

__device__ __forceinline__ bool counts(const SequenceSumArgs<float>& a, int64_t i) { return !a.mask || a.mask[i] != 0; }

// next: how many tokens count before the tile, afterwards before the one behind it. All threads of the block come here.
struct Places {
  int64_t mine[kBatch];
  __device__ __forceinline__ void find(const bool (&keep)[kBatch], int64_t& next) {
    constexpr int warps = kThreads / kWarp;
    PK_SMEM(int, kept, kBatch* warps);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    unsigned ballots[kBatch];
    __syncthreads();  // the array may still be read for the tile before
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      ballots[j] = __ballot_sync(0xffffffffu, keep[j]);
      if (lane == 0) kept[j * warps + warp] = __popc(ballots[j]);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kBatch; j++)
      for (int w = 0; w < warps; w++) {
        if (w == warp) mine[j] = next + __popc(ballots[j] & ((1u << lane) - 1));
        next += kept[j * warps + w];
      }
  }
};

__device__ __forceinline__ float placed_weight(const SequenceSumArgs<float>& a, int64_t i, int64_t place, int64_t head) {
  const double weight = place_weight(a.place, place, head, decay_power(a.place.decay, place));
  return float(a.weights ? double(a.weights[i]) * weight : weight);
}

__device__ __forceinline__ float difference(const SequenceSumArgs<float>& a, int64_t i) {
  return a.minus ? a.values[i] - a.minus[i] : a.values[i];
}

template <TokenTransform F, bool PLACED>
__global__ void __launch_bounds__(kThreads) forward_kernel(const SequenceSumArgs<float> a) {
  const int64_t b = blockIdx.x;
  const bool known = layout_holds<kThreads>(a.layout);
  const TokenSpan span = known ? token_span(a, b) : TokenSpan{};
  if (!span.valid) {
    if (threadIdx.x == 0) a.sums[b] = __builtin_nanf("");
    return;
  }
  double sum = 0, tokens = 0;
  int64_t next = 0;
  for (int64_t tile = span.begin; tile < span.end; tile += kThreads * kBatch) {
    const int64_t first = tile + threadIdx.x;
    bool keep[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; j++) keep[j] = first + j * kThreads < span.end && counts(a, first + j * kThreads);
    Places places;
    if (PLACED) places.find(keep, next);
    float batch = 0;
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int64_t i = first + j * kThreads;
      if (!keep[j]) continue;
      const float f = token_value<F>(difference(a, i));
      if (PLACED) batch += f * placed_weight(a, i, places.mine[j], span.head);
      else batch += a.weights ? f * a.weights[i] : f;
      tokens += 1;
    }
    sum += batch;
  }
  sum = block_reduce<kThreads>(sum, 0.0, Add());
  tokens = block_reduce<kThreads>(tokens, 0.0, Add());
  if (threadIdx.x == 0) a.sums[b] = float(sum * sequence_scale(a.mean, static_cast<int64_t>(tokens)));
}

__device__ __forceinline__ void fill(float* p, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) p[i] = value;
}

template <TokenTransform F, bool PLACED>
__global__ void __launch_bounds__(kThreads) backward_kernel(const SequenceSumArgs<float> a) {
  const int64_t b = blockIdx.x;
  if (!layout_holds<kThreads>(a.layout)) return fill_share<kThreads>(a.grad, a.layout.tokens, __builtin_nanf(""));
  const int64_t begin = sequence_begin(a.layout, b), end = sequence_end(a.layout, b);
  const TokenSpan span = token_span(a, b);
  if (!span.valid) return fill(a.grad, begin, end, __builtin_nanf(""));
  fill(a.grad, begin, span.begin, 0);
  fill(a.grad, span.end, end, 0);
  double tokens = double(span.end - span.begin);
  if (a.mean && a.mask) {
    tokens = 0;
    for (int64_t i = span.begin + threadIdx.x; i < span.end; i += kThreads) tokens += a.mask[i] != 0;
    tokens = block_reduce<kThreads>(tokens, 0.0, Add());
  }
  const float g = float(double(a.upstream[b]) * sequence_scale(a.mean, static_cast<int64_t>(tokens)));
  int64_t next = 0;
  for (int64_t tile = span.begin; tile < span.end; tile += kThreads * kBatch) {
    const int64_t first = tile + threadIdx.x;
    bool keep[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; j++) keep[j] = first + j * kThreads < span.end && counts(a, first + j * kThreads);
    Places places;
    if (PLACED) places.find(keep, next);
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int64_t i = first + j * kThreads;
      if (i >= span.end) continue;
      float slope = 0;
      if (keep[j]) {
        slope = F == TokenTransform::none ? 1.0f : token_slope<F>(difference(a, i));
        if (PLACED) slope *= placed_weight(a, i, places.mine[j], span.head);
        else if (a.weights) slope *= a.weights[i];
      }
      a.grad[i] = slope == 0 ? 0.0f : slope * g;
    }
  }
}

template <TokenTransform F> void forward(const SequenceSumArgs<float>& a, dim3 grid, cudaStream_t s) {
  if (places_matter(a)) PK_LAUNCH((forward_kernel<F, true>), grid, dim3(kThreads), s, a);
  else PK_LAUNCH((forward_kernel<F, false>), grid, dim3(kThreads), s, a);
}
template <TokenTransform F> void backward(const SequenceSumArgs<float>& a, dim3 grid, cudaStream_t s) {
  if (places_matter(a)) PK_LAUNCH((backward_kernel<F, true>), grid, dim3(kThreads), s, a);
  else PK_LAUNCH((backward_kernel<F, false>), grid, dim3(kThreads), s, a);
}

}  // namespace

int cuda_sequence_sums(const SequenceSumArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(a.layout.sequences));
  if (a.transform == TokenTransform::exp) forward<TokenTransform::exp>(a, grid, s);
  else forward<TokenTransform::none>(a, grid, s);
  return static_cast<int>(cudaGetLastError());
}

int cuda_sequence_sums_backward(const SequenceSumArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(a.layout.sequences));
  if (a.transform == TokenTransform::exp) backward<TokenTransform::exp>(a, grid, s);
  else backward<TokenTransform::none>(a, grid, s);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
