// The CUDA walk of sequence_sums.h: a block takes a sequence, threads read neighbouring tokens, and what they add up is
// joined in double in a fixed order. The mean of the backward counts the mask of its sequence first.
#include "core/sequence.cuh"
#include "sequence/sequence_sums.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kBatch = 4;  // a thread's tokens that are added in float before they are in double

__device__ __forceinline__ bool counts(const SequenceSumArgs<float>& a, int64_t i) { return !a.mask || a.mask[i] != 0; }

__device__ __forceinline__ float difference(const SequenceSumArgs<float>& a, int64_t i) {
  return a.minus ? a.values[i] - a.minus[i] : a.values[i];
}

template <TokenTransform F> __global__ void __launch_bounds__(kThreads) forward_kernel(const SequenceSumArgs<float> a) {
  const int64_t b = blockIdx.x;
  if (!layout_holds<kThreads>(a.layout)) {
    if (threadIdx.x == 0) a.sums[b] = __builtin_nanf("");
    return;
  }
  const int64_t end = sequence_end(a.layout, b);
  double sum = 0, tokens = 0;
  for (int64_t first = sequence_begin(a.layout, b) + threadIdx.x; first < end; first += kThreads * kBatch) {
    float batch = 0;
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      const int64_t i = first + j * kThreads;
      if (i >= end || !counts(a, i)) continue;
      const float f = token_value<F>(difference(a, i));
      batch += a.weights ? f * a.weights[i] : f;
      tokens += 1;
    }
    sum += batch;
  }
  sum = block_reduce<kThreads>(sum, 0.0, Add());
  tokens = block_reduce<kThreads>(tokens, 0.0, Add());
  if (threadIdx.x == 0) a.sums[b] = float(sum * sequence_scale(a.mean, static_cast<int64_t>(tokens)));
}

template <TokenTransform F> __global__ void __launch_bounds__(kThreads) backward_kernel(const SequenceSumArgs<float> a) {
  const int64_t b = blockIdx.x;
  if (!layout_holds<kThreads>(a.layout)) return fill_share<kThreads>(a.grad, a.layout.tokens, __builtin_nanf(""));
  const int64_t begin = sequence_begin(a.layout, b), end = sequence_end(a.layout, b);
  double tokens = double(end - begin);
  if (a.mean && a.mask) {
    tokens = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) tokens += a.mask[i] != 0;
    tokens = block_reduce<kThreads>(tokens, 0.0, Add());
  }
  const float g = float(double(a.upstream[b]) * sequence_scale(a.mean, static_cast<int64_t>(tokens)));
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    float slope = 0;
    if (counts(a, i)) {
      slope = F == TokenTransform::none ? 1.0f : token_slope<F>(difference(a, i));
      if (a.weights) slope *= a.weights[i];
    }
    a.grad[i] = slope == 0 ? 0.0f : slope * g;
  }
}

}  // namespace

int cuda_sequence_sums(const SequenceSumArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(a.layout.sequences));
  if (a.transform == TokenTransform::exp) PK_LAUNCH(forward_kernel<TokenTransform::exp>, grid, dim3(kThreads), s, a);
  else PK_LAUNCH(forward_kernel<TokenTransform::none>, grid, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_sequence_sums_backward(const SequenceSumArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(a.layout.sequences));
  if (a.transform == TokenTransform::exp) PK_LAUNCH(backward_kernel<TokenTransform::exp>, grid, dim3(kThreads), s, a);
  else PK_LAUNCH(backward_kernel<TokenTransform::none>, grid, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
