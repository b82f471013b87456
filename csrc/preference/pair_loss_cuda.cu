// The CUDA walk of pair_loss.h: a thread takes a pair at a time. A block leaves its sums in a row of `partials`, and the one
// that finishes last (an integer counter tells) adds the rows in a fixed order and writes loss and metrics: one launch,
// equal bits every time.
#include "core/cuda.cuh"
#include "preference/pair_loss.h"

namespace prefkern {
namespace {

constexpr int kThreads = int(kPairsPerBlock);

__device__ __forceinline__ float optional(const float* p, int64_t i, float fill) { return p ? p[i] : fill; }
__device__ __forceinline__ float number(const float* p, bool each, double otherwise, int64_t i) {
  return p ? p[each ? i : 0] : static_cast<float>(otherwise);
}

__device__ __forceinline__ void add_pair(const PreferenceArgs<float>& a, const PreferenceRule<float>& rule, int64_t i,
                                         float (&v)[kPreferenceSums]) {
  const PreferenceOptions& o = a.options;
  const bool keep = !a.mask || a.mask[i] != 0;
  const float weight = keep ? optional(a.weight, i, 1.0f) : 0.0f;
  PreferenceTerm<float> t = {0, 0, 0, 0, 0, false};
  bool desirable = false;
  if (keep) {
    const PairOptions<float> pair = {number(a.scale, a.each & kEachScale, o.scale, i),
                                     number(a.offset, a.each & kEachOffset, o.offset, i),
                                     number(a.smoothing, a.each & kEachSmoothing, o.smoothing, i),
                                     number(a.chosen_target, a.each & kEachChosenTarget, o.chosen_target, i),
                                     number(a.rejected_target, a.each & kEachRejectedTarget, o.rejected_target, i),
                                     a.tie && a.tie[i] != 0};
    const Response<float> chosen = {a.chosen[i], optional(a.ref_chosen, i, 0.0f), optional(a.chosen_length, i, 1.0f)};
    if (a.desirable) {
      desirable = a.desirable[i] != 0;
      t = response_term(o, rule, pair, desirable, chosen);
    } else {
      const Response<float> rejected = {a.rejected[i], optional(a.ref_rejected, i, 0.0f), optional(a.rejected_length, i, 1.0f)};
      t = preference_term(o, rule, pair, chosen, rejected);
      if (!smoothing_valid(o.kind, pair.smoothing)) t.loss = __builtin_nanf("");
    }
  }
  const bool counts = keep && weight != 0;  // 0 times an infinite loss is 0
  t.loss = counts ? t.loss * weight : 0.0f;
  if (a.losses) a.losses[i] = t.loss;
  if (a.grads) {
    a.grads[i] = counts ? t.chosen_grad * weight : 0.0f;
    if (!a.desirable) a.grads[a.pairs + i] = counts ? t.rejected_grad * weight : 0.0f;
  }
  if (!keep) return;
  v[kPairLoss] += t.loss;
  v[kPairWeight] += weight;
  v[kPairCapped] += t.capped;
  v[kPairCount] += 1;
  if (a.desirable) {
    v[kPairChosenCount] += desirable;
    v[kPairChosen] += desirable ? t.chosen_reward : 0.0f;
    v[kPairRejected] += desirable ? 0.0f : t.chosen_reward;
    v[kPairCorrect] += desirable ? t.chosen_reward > 0 : t.chosen_reward < 0;
  } else {
    v[kPairChosen] += t.chosen_reward;
    v[kPairRejected] += t.rejected_reward;
    v[kPairCorrect] += t.chosen_reward > t.rejected_reward;
  }
}

__global__ void __launch_bounds__(kThreads) pair_kernel(const PreferenceArgs<float> a) {
  const PreferenceRule<float> rule = preference_rule<float>(a.options);
  float v[kPreferenceSums] = {};
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.pairs; i += threads) add_pair(a, rule, i, v);
  for (int k = 0; k < kPreferenceSums; k++) {
    const float sum = block_reduce<kThreads>(v[k], 0.0f, Add());
    if (threadIdx.x == 0) a.partials[int64_t(blockIdx.x) * kPreferenceSums + k] = sum;
  }

  PK_SMEM(int, is_last, 1);
  if (threadIdx.x == 0) {
    __threadfence();  // the partials above are visible before the count is
    is_last[0] = atomicAdd(a.finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();

  const volatile float* partials = a.partials;  // other blocks' writes: not from a stale cache line
  PK_SMEM(double, sums, kPreferenceSums);
  for (int k = 0; k < kPreferenceSums; k++) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < gridDim.x; b += kThreads) sum += partials[b * kPreferenceSums + k];
    sum = block_reduce<kThreads>(sum, 0.0, Add());
    if (threadIdx.x == 0) sums[k] = sum;
  }
  if (threadIdx.x == 0)
    preference_finish(sums, a.desirable != nullptr, a.losses ? 1.0 : norm_of(a, sums), a.loss, a.metrics, a.inverse_norm);
}

__global__ void __launch_bounds__(kThreads) backward_kernel(const PreferenceGradArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.pairs) return;
  const float factor = a.upstream[a.vector ? i : 0] * *a.inverse_norm;
  for (int64_t side = 0; side < a.sides; side++)
    a.grad[side * a.pairs + i] = preference_grad(a.unnormalised[side * a.pairs + i], factor);
}

}  // namespace

int cuda_preference_loss(const PreferenceArgs<float>& a, void* stream) {
  if (a.pairs == 0) return 0;
  PK_LAUNCH(pair_kernel, dim3(static_cast<unsigned>(preference_blocks(a.pairs))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_preference_loss_backward(const PreferenceGradArgs<float>& a, void* stream) {
  if (a.pairs == 0) return 0;
  PK_LAUNCH(backward_kernel, dim3(static_cast<unsigned>(ceil_div(a.pairs, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
