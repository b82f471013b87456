// The CUDA walk of token_loss.h: one launch forward, one backward, no atomics on results.
//
// A block takes a sequence, or, where sequences are few and long, a slice of one; threads read four tokens at a time. The
// block adds up its sums in a fixed order and leaves them in a row of `partials`. The block that finishes last (an integer
// counter tells) adds the rows, again in a fixed order, and writes loss and metrics: no second launch, equal bits every
// time. A block that needs its sequence's token count reads the whole mask of the sequence first, one byte per token.
#include "core/cuda.cuh"
#include "policy/token_loss.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kPack = 4;

// Adds up kPolicySums values per thread over the block, minimum and maximum included; thread k < kPolicySums returns the
// total of value k. By warps first, then by the number of the warp.
template <class T> __device__ __forceinline__ T reduce_sums(T (&v)[kPolicySums]) {
  PK_SMEM(T, partial, kWarps * kPolicySums);
  const auto merge = [](int k, T a, T b) {
    return k == kMinRatio ? (b < a ? b : a) : k == kMaxRatio ? (b > a ? b : a) : a + b;
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kPolicySums; k++) {
    for (int offset = 16; offset > 0; offset >>= 1) v[k] = merge(k, v[k], __shfl_xor_sync(0xffffffffu, v[k], offset));
    if (lane == 0) partial[warp * kPolicySums + k] = v[k];
  }
  __syncthreads();
  T total = 0;
  if (threadIdx.x < kPolicySums) {
    const int k = static_cast<int>(threadIdx.x);
    total = partial[k];
    for (int w = 1; w < kWarps; w++) total = merge(k, total, partial[w * kPolicySums + k]);
  }
  return total;
}

template <class T> __device__ __forceinline__ void clear_sums(T (&v)[kPolicySums]) {
#pragma unroll
  for (int k = 0; k < kPolicySums; k++) v[k] = 0;
  v[kMinRatio] = T(__builtin_huge_valf());
}

__device__ __forceinline__ bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Four elements from p on, in one load where `packed`.
template <class T> __device__ __forceinline__ Pack<T, kPack> load4(const T* p) {
  return *reinterpret_cast<const Pack<T, kPack>*>(p);
}

__device__ __forceinline__ int64_t count_tokens(const uint8_t* mask, int64_t begin, int64_t end) {
  int count = 0;
  const int64_t first_pack = aligned(mask, kPack) ? ceil_div(begin, kPack) : end, last_pack = end / kPack;
  if (first_pack >= last_pack) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) count += mask[i] != 0;
  } else {
    for (int64_t i = begin + threadIdx.x; i < first_pack * kPack; i += kThreads) count += mask[i] != 0;
    for (int64_t p = first_pack + threadIdx.x; p < last_pack; p += kThreads) {
      const Pack<uint8_t, kPack> m = load4(mask + p * kPack);
#pragma unroll
      for (int j = 0; j < kPack; j++) count += m.v[j] != 0;
    }
    for (int64_t i = last_pack * kPack + threadIdx.x; i < end; i += kThreads) count += mask[i] != 0;
  }
  return block_reduce<kThreads>(count, 0, Add());
}

// One block's part of a sequence: adds to `v`, writes the gradient.
template <PolicyKind KIND, KlKind KL> struct Walk {
  const PolicyArgs<float>& a;
  const PolicyRule<float> rule;
  const float advantage, weight;
  float (&v)[kPolicySums];

  __device__ __forceinline__ float token(float logp, float old_logp, float ref_logp, float token_advantage, bool keep) {
    if (!keep) return 0.0f;
    const float adv = a.token_advantages ? token_advantage : advantage;
    const PolicyTerm<float> t = policy_term<KIND, KL>(rule, logp - old_logp, adv, ref_logp - logp);
    v[kSumLoss] += t.loss;
    v[kSumLow] += t.low;
    v[kSumHigh] += t.high;
    v[kSumDual] += t.dual;
    v[kSumRatio] += t.ratio;
    v[kSumApproxKl] += t.approx_kl;
    v[kSumKl] += t.kl;
    v[kSumTokens] += 1;
    v[kMinRatio] = vmin(t.ratio, v[kMinRatio]);
    v[kMaxRatio] = vmax(t.ratio, v[kMaxRatio]);
    return t.grad * weight;
  }
  __device__ __forceinline__ void one(int64_t i) {
    const bool keep = !a.mask || a.mask[i] != 0;
    const float g = token(a.logp[i], a.old_logp[i], KL != KlKind::none ? a.ref_logp[i] : 0.0f,
                          a.token_advantages ? a.advantages[i] : 0.0f, keep);
    if (a.grad) a.grad[i] = g;
  }
  __device__ __forceinline__ void four(int64_t i) {
    Pack<uint8_t, kPack> mask = {{1, 1, 1, 1}};
    if (a.mask) mask = load4(a.mask + i);
    Pack<float, kPack> out = {}, none = {};
    if (mask.v[0] | mask.v[1] | mask.v[2] | mask.v[3]) {
      const Pack<float, kPack> logp = load_pack(a.logp + i), old_logp = load_pack(a.old_logp + i);
      const Pack<float, kPack> ref_logp = KL != KlKind::none ? load_pack(a.ref_logp + i) : none;
      const Pack<float, kPack> advantages = a.token_advantages ? load_pack(a.advantages + i) : none;
#pragma unroll
      for (int j = 0; j < kPack; j++)
        out.v[j] = token(logp.v[j], old_logp.v[j], ref_logp.v[j], advantages.v[j], mask.v[j] != 0);
    }
    if (a.grad) *reinterpret_cast<Pack<float, kPack>*>(a.grad + i) = out;
  }
  __device__ __forceinline__ void run(int64_t begin, int64_t end) {
    const bool packed = aligned16(a.logp) && aligned16(a.old_logp) && aligned16(a.ref_logp) && aligned(a.mask, kPack) &&
                        (!a.token_advantages || aligned16(a.advantages)) && aligned16(a.grad);
    // Packs are those of the whole array: a packed sequence may begin anywhere.
    const int64_t first_pack = ceil_div(begin, kPack), last_pack = end / kPack;
    if (!packed || first_pack >= last_pack) {
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) one(i);
      return;
    }
    if (begin + threadIdx.x < first_pack * kPack) one(begin + threadIdx.x);
    for (int64_t p = first_pack + threadIdx.x; p < last_pack; p += kThreads) four(p * kPack);
    if (last_pack * kPack + threadIdx.x < end) one(last_pack * kPack + threadIdx.x);
  }
};

template <PolicyKind KIND, KlKind KL> __global__ void __launch_bounds__(kThreads) policy_kernel(const PolicyArgs<float> a) {
  const int64_t sequence = blockIdx.x / a.slices, slice = blockIdx.x % a.slices;
  float v[kPolicySums];
  clear_sums(v);
  if (sequence_valid(a.layout, sequence)) {
    const int64_t begin = sequence_begin(a.layout, sequence), n = sequence_end(a.layout, sequence) - begin;
    const int64_t share = ceil_div(ceil_div(n, a.slices), kPack) * kPack;
    const int64_t first = slice * share < n ? slice * share : n, last = first + share < n ? first + share : n;
    int64_t tokens = n;
    if (a.mask && a.options.agg == Aggregation::seq_mean_token_mean) tokens = count_tokens(a.mask, begin, begin + n);
    const float advantage = a.token_advantages ? 0.0f : a.advantages[sequence];
    const float weight = sequence_weight<float>(a.options.agg, double(tokens));
    Walk<KIND, KL>{a, policy_rule<float>(a.options), advantage, weight, v}.run(begin + first, begin + last);
    v[kSumLoss] *= weight;
    if (threadIdx.x == 0) v[kSumSequences] = slice == 0 && tokens > 0 ? 1.0f : 0.0f;
  } else {
    v[kSumTokens] = v[kSumSequences] = __builtin_nanf("");
  }
  const float mine = reduce_sums(v);
  if (threadIdx.x < kPolicySums) a.partials[int64_t(blockIdx.x) * kPolicySums + threadIdx.x] = mine;

  PK_SMEM(int, is_last, 1);
  __threadfence();  // the partials above are visible before the count is
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = atomicAdd(a.finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();

  double total[kPolicySums];
  clear_sums(total);
  const volatile float* partials = a.partials;  // other blocks' writes: not from a stale cache line
  for (int64_t b = threadIdx.x; b < gridDim.x; b += kThreads) {
#pragma unroll
    for (int k = 0; k < kPolicySums; k++) {
      const double x = partials[b * kPolicySums + k];
      if (k == kMinRatio) total[k] = x < total[k] ? x : total[k];
      else if (k == kMaxRatio) total[k] = x > total[k] ? x : total[k];
      else total[k] += x;
    }
  }
  const double all = reduce_sums(total);
  PK_SMEM(double, sums, kPolicySums);
  if (threadIdx.x < kPolicySums) sums[threadIdx.x] = all;
  __syncthreads();
  if (threadIdx.x == 0) policy_finish(sums, a.options.agg, a.loss, a.metrics, a.inverse_norm);
}

__global__ void __launch_bounds__(kThreads) backward_kernel(const PolicyGradArgs<float> a) {
  const float upstream = *a.upstream, inverse_norm = *a.inverse_norm;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t packs = aligned16(a.unnormalised) && aligned16(a.grad) ? a.tokens / kPack : 0;
  for (int64_t p = thread; p < packs; p += threads) {
    Pack<float, kPack> g = load_pack(a.unnormalised + p * kPack);
#pragma unroll
    for (int j = 0; j < kPack; j++) g.v[j] = policy_grad(g.v[j], upstream, inverse_norm);
    *reinterpret_cast<Pack<float, kPack>*>(a.grad + p * kPack) = g;
  }
  for (int64_t i = packs * kPack + thread; i < a.tokens; i += threads)
    a.grad[i] = policy_grad(a.unnormalised[i], upstream, inverse_norm);
}

}  // namespace

int cuda_policy_loss(const PolicyArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(a.layout.sequences * a.slices));
  if (a.options.kl == KlKind::k3) PK_LAUNCH((policy_kernel<PolicyKind::clip, KlKind::k3>), grid, dim3(kThreads), s, a);
  else PK_LAUNCH((policy_kernel<PolicyKind::clip, KlKind::none>), grid, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_policy_loss_backward(const PolicyGradArgs<float>& a, void* stream) {
  if (a.tokens == 0) return 0;
  const int64_t blocks = ceil_div(ceil_div(a.tokens, kPack), kThreads), most = 4096;
  PK_LAUNCH(backward_kernel, dim3(static_cast<unsigned>(blocks < most ? blocks : most)), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
