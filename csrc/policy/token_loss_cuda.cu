// The CUDA walk of token_loss.h: one launch forward, one backward, no atomics on results. A kind with a ratio of the
// sequence has a launch before, in which the same blocks leave the sums of their slices.
//
// A block takes a sequence, or, where sequences are few and long, a slice of one; threads read four tokens at a time. The
// block adds up its sums in a fixed order and leaves them in a row of `partials`. The block that finishes last (an integer
// counter tells) adds the rows, again in a fixed order, and writes loss and metrics: no second launch, equal bits every
// time. A block that needs its sequence's token count reads the whole mask of the sequence first, one byte per token.
// What a token may have of its own (advantage, weight, bounds, entropy) is known by its pointer: a branch that no two
// threads take differently.
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

// The arrays that have one value per token, null where there is none.
enum TokenArray : int { kLogp, kOldLogp, kRefLogp, kAdvantage, kWeight, kEpsLow, kEpsHigh, kEntropyOf, kTokenArrays };

// What a block's tokens share: their sequence, or a slice of it.
struct Block {
  const float* of[kTokenArrays];
  PolicyRule<float> rule;
  PolicyRow<float> row;
  float advantage, token_weight;  // where tokens have none of their own
  PolicyKind kind;
  bool bounds_valid;
  int64_t begin, n;       // of the sequence
  int64_t first, last;    // of the slice
};

__device__ __forceinline__ Block make_block(const PolicyArgs<float>& a, int64_t sequence, int64_t slice) {
  const auto own = [](const float* p, bool per_token) { return per_token ? p : nullptr; };
  Block b = {{a.logp, a.old_logp, a.ref_logp, own(a.advantages, a.token_advantages), own(a.weights, a.token_weights),
              own(a.eps_low, a.token_eps_low), own(a.eps_high, a.token_eps_high), a.entropy}};
  const PolicyOptions options = sequence_options(a, sequence);
  b.rule = policy_rule<float>(options);
  b.row = PolicyRow<float>();
  b.kind = options.kind;
  b.bounds_valid = bounds_valid(options.kind, options.eps_low, options.eps_high);
  b.advantage = a.advantages && !a.token_advantages ? a.advantages[sequence] : -1.0f;
  b.token_weight = a.weights && !a.token_weights ? a.weights[sequence] : 1.0f;
  b.begin = sequence_begin(a.layout, sequence);
  b.n = sequence_end(a.layout, sequence) - b.begin;
  const int64_t share = ceil_div(ceil_div(b.n, a.slices), kPack) * kPack;
  const int64_t first = slice * share < b.n ? slice * share : b.n, last = first + share < b.n ? first + share : b.n;
  b.first = b.begin + first;
  b.last = b.begin + last;
  return b;
}

// A walk over the tokens of a block that count: calls token(values, keep) of DERIVED, which returns the gradient.
template <PolicyKind KIND, Penalty PENALTY, bool GENERAL, class DERIVED> struct Walk {
  const PolicyArgs<float>& a;
  const Block& block;

  __device__ __forceinline__ bool has(int k) const {
    if (k == kLogp) return true;
    if (k == kOldLogp) return !is_anchor(KIND);
    if (k == kRefLogp) return PENALTY == Penalty::k3 || (PENALTY == Penalty::any && block.of[k]);
    return GENERAL && block.of[k];
  }
  __device__ __forceinline__ PolicyToken<float> make_token(const float (&value)[kTokenArrays]) const {
    PolicyToken<float> t;
    t.logp = value[kLogp];
    t.d = is_anchor(KIND) ? 0.0f : value[kLogp] - value[kOldLogp];
    t.to_ref = value[kRefLogp] - value[kLogp];
    t.advantage = has(kAdvantage) ? value[kAdvantage] : block.advantage;
    t.weight = has(kWeight) ? value[kWeight] : block.token_weight;
    t.own_bounds = has(kEpsLow) || has(kEpsHigh);
    t.eps_low = has(kEpsLow) ? value[kEpsLow] : block.rule.eps_low;
    t.eps_high = has(kEpsHigh) ? value[kEpsHigh] : block.rule.eps_high;
    if (t.own_bounds && !bounds_valid(KIND, t.eps_low, t.eps_high)) t.advantage = __builtin_nanf("");
    return t;
  }
  __device__ __forceinline__ float call(const float (&value)[kTokenArrays], bool keep) {
    return keep ? static_cast<DERIVED*>(this)->token(value) : 0.0f;
  }
  __device__ __forceinline__ void one(int64_t i) {
    float value[kTokenArrays];
#pragma unroll
    for (int k = 0; k < kTokenArrays; k++) value[k] = has(k) ? block.of[k][i] : 0.0f;
    const float g = call(value, !a.mask || a.mask[i] != 0);
    if (DERIVED::writes && a.grad) a.grad[i] = g;
  }
  __device__ __forceinline__ void four(int64_t i) {
    Pack<uint8_t, kPack> mask = {{1, 1, 1, 1}};
    if (a.mask) mask = load4(a.mask + i);
    Pack<float, kPack> out = {}, packs[kTokenArrays] = {};
    if (mask.v[0] | mask.v[1] | mask.v[2] | mask.v[3]) {
#pragma unroll
      for (int k = 0; k < kTokenArrays; k++)
        if (has(k)) packs[k] = load_pack(block.of[k] + i);
#pragma unroll
      for (int j = 0; j < kPack; j++) {
        float value[kTokenArrays];
#pragma unroll
        for (int k = 0; k < kTokenArrays; k++) value[k] = packs[k].v[j];
        out.v[j] = call(value, mask.v[j] != 0);
      }
    }
    if (DERIVED::writes && a.grad) *reinterpret_cast<Pack<float, kPack>*>(a.grad + i) = out;
  }
  __device__ __forceinline__ void run() {
    const int64_t begin = block.first, end = block.last;
    bool packed = aligned(a.mask, kPack) && aligned16(a.grad);
    for (int k = 0; k < kTokenArrays; k++) packed = packed && (!has(k) || aligned16(block.of[k]));
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

// Adds to `v`, writes the gradient times `weight`.
template <PolicyKind KIND, Penalty PENALTY, bool GENERAL>
struct LossWalk : Walk<KIND, PENALTY, GENERAL, LossWalk<KIND, PENALTY, GENERAL>> {
  static constexpr bool writes = true;
  const float weight;
  float (&v)[kPolicySums];

  __device__ __forceinline__ LossWalk(const PolicyArgs<float>& a, const Block& block, float weight, float (&v)[kPolicySums])
      : Walk<KIND, PENALTY, GENERAL, LossWalk>{a, block}, weight(weight), v(v) {}
  __device__ __forceinline__ float token(const float (&value)[kTokenArrays]) {
    const PolicyTerm<float> t = policy_term<KIND, PENALTY, GENERAL>(this->block.rule, this->block.row, this->make_token(value));
    v[kSumLoss] += t.loss;
    v[kSumLow] += t.low;
    v[kSumHigh] += t.high;
    v[kSumDual] += t.dual;
    v[kSumRatio] += t.ratio;
    v[kSumApproxKl] += t.approx_kl;
    v[kSumKl] += t.kl;
    v[kSumEntropy] += value[kEntropyOf];
    v[kSumTokens] += 1;
    if (!is_anchor(KIND)) {
      v[kSumRatioTokens] += 1;
      v[kMinRatio] = vmin(t.ratio, v[kMinRatio]);
      v[kMaxRatio] = vmax(t.ratio, v[kMaxRatio]);
    }
    return t.grad * weight;
  }
};

// Adds up what a ratio of the sequence is made of.
template <PolicyKind KIND> struct RowWalk : Walk<KIND, Penalty::any, true, RowWalk<KIND>> {
  static constexpr bool writes = false;
  float sums[kPolicyRowSums] = {};

  __device__ __forceinline__ RowWalk(const PolicyArgs<float>& a, const Block& block)
      : Walk<KIND, Penalty::any, true, RowWalk>{a, block} {}
  __device__ __forceinline__ float token(const float (&value)[kTokenArrays]) {
    const PolicyToken<float> t = this->make_token(value);
    sums[kRowLogRatio] += sequence_log_ratio<KIND>(t.d, t.advantage, t.eps_low, t.eps_high);
    sums[kRowWeight] += t.weight;
    sums[kRowTokens] += 1;
    if (this->block.rule.kl_ratio) {
      float kl, grad;
      kl_term<Penalty::any>(this->block.rule, t.to_ref, kl, grad);
      sums[kRowKl] += kl;
    }
    return 0;
  }
};

template <PolicyKind KIND> __global__ void __launch_bounds__(kThreads) row_kernel(const PolicyArgs<float> a) {
  const int64_t sequence = blockIdx.x / a.slices, slice = blockIdx.x % a.slices;
  if (!sequence_valid(a.layout, sequence)) return;
  const Block block = make_block(a, sequence, slice);
  if (is_anchor(block.kind)) return;
  RowWalk<KIND> walk(a, block);
  walk.run();
#pragma unroll
  for (int k = 0; k < kPolicyRowSums; k++) {
    const float sum = block_reduce<kThreads>(walk.sums[k], 0.0f, Add());
    if (threadIdx.x == 0) a.row_partials[int64_t(blockIdx.x) * kPolicyRowSums + k] = sum;
  }
}

// The sums of all slices of a sequence; every thread gets them. There are no more slices than threads.
__device__ __forceinline__ PolicyRow<float> read_row(const PolicyArgs<float>& a, PolicyKind kind, int64_t sequence) {
  double sums[kPolicyRowSums];
#pragma unroll
  for (int k = 0; k < kPolicyRowSums; k++) {
    const bool mine = threadIdx.x < a.slices;
    const double x = mine ? a.row_partials[(sequence * a.slices + threadIdx.x) * kPolicyRowSums + k] : 0.0;
    sums[k] = block_reduce<kThreads>(x, 0.0, Add());
  }
  return policy_row<float>(kind, sums);
}

template <PolicyKind KIND, Penalty PENALTY, bool GENERAL>
__global__ void __launch_bounds__(kThreads) policy_kernel(const PolicyArgs<float> a) {
  const int64_t sequence = blockIdx.x / a.slices, slice = blockIdx.x % a.slices;
  float v[kPolicySums];
  clear_sums(v);
  if (sequence_valid(a.layout, sequence)) {
    Block block = make_block(a, sequence, slice);
    int64_t tokens = block.n;
    if (a.mask && weight_needs_count(a.options.agg)) tokens = count_tokens(a.mask, block.begin, block.begin + block.n);
    const float weight = block.bounds_valid ? sequence_weight<float>(a.options.agg, double(tokens)) : __builtin_nanf("");
    if (GENERAL && block.kind == PolicyKind::anchor_shaped) {
      LossWalk<PolicyKind::anchor_shaped, PENALTY, GENERAL>(a, block, weight, v).run();
    } else if (GENERAL && block.kind == PolicyKind::anchor_nll) {
      LossWalk<PolicyKind::anchor_nll, PENALTY, GENERAL>(a, block, weight, v).run();
    } else {
      if (ratio_of_sequence(KIND)) block.row = read_row(a, KIND, sequence);
      LossWalk<KIND, PENALTY, GENERAL>(a, block, weight, v).run();
    }
    v[kSumLoss] = v[kSumTokens] > 0 ? v[kSumLoss] * weight : 0.0f;
  } else {
    v[kSumTokens] = v[kSumRatioTokens] = __builtin_nanf("");
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
      else if (k != kSumSequences) total[k] += x;
    }
    if (b % a.slices != 0) continue;
    int64_t slices_seen = 0;  // a sequence has tokens if one of its slices has
    while (slices_seen < a.slices && partials[(b + slices_seen) * kPolicySums + kSumTokens] == 0) slices_seen++;
    total[kSumSequences] += slices_seen < a.slices;
  }
  const double all = reduce_sums(total);
  PK_SMEM(double, sums, kPolicySums);
  if (threadIdx.x < kPolicySums) sums[threadIdx.x] = all;
  __syncthreads();
  if (threadIdx.x == 0) policy_finish(sums, norm_of(a, sums), a.loss, a.metrics, a.inverse_norm);
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

template <PolicyKind KIND> void launch(const PolicyArgs<float>& a, dim3 grid, cudaStream_t s) {
  if constexpr (ratio_of_sequence(KIND)) PK_LAUNCH(row_kernel<KIND>, grid, dim3(kThreads), s, a);
  PK_LAUNCH((policy_kernel<KIND, Penalty::any, true>), grid, dim3(kThreads), s, a);
}

}  // namespace

int cuda_policy_loss(const PolicyArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(a.layout.sequences * a.slices)), block(kThreads);
  if (is_plain(a)) {
    if (a.options.kl == KlKind::none) PK_LAUNCH((policy_kernel<PolicyKind::clip, Penalty::none, false>), grid, block, s, a);
    else PK_LAUNCH((policy_kernel<PolicyKind::clip, Penalty::k3, false>), grid, block, s, a);
    return static_cast<int>(cudaGetLastError());
  }
  switch (a.options.kind) {
    case PolicyKind::clip: launch<PolicyKind::clip>(a, grid, s); break;
    case PolicyKind::cispo: launch<PolicyKind::cispo>(a, grid, s); break;
    case PolicyKind::reinforce: launch<PolicyKind::reinforce>(a, grid, s); break;
    case PolicyKind::sapo: launch<PolicyKind::sapo>(a, grid, s); break;
    case PolicyKind::gspo: launch<PolicyKind::gspo>(a, grid, s); break;
    case PolicyKind::gspo_token: launch<PolicyKind::gspo_token>(a, grid, s); break;
    case PolicyKind::gmpo: launch<PolicyKind::gmpo>(a, grid, s); break;
    case PolicyKind::none: launch<PolicyKind::none>(a, grid, s); break;
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
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
