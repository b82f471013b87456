// The CUDA walk of logits_fold.h: one block of threads per row, one read of the row.
//
// fold: every thread keeps online softmax statistics of the elements it meets (16-byte streaming loads, one rescale per
// pack and only when the maximum moves); the block then joins them in a fixed order, so equal input gives equal bits. The
// maximum, the sums for entropy and sum p^2, and the target's logit come out of that one pass.
//
// grad: the row is taken in tiles. A tile is read into registers, the block waits, and only then writes its result; so
// the gradient may overwrite the logits, and may shrink to 2-byte elements at the start of its own row.
#include "core/cuda.cuh"
#include "logprobs/logits_fold.h"

namespace prefkern {
namespace {

struct Partial {
  float max;
  SoftmaxSums<float> sums;
  float best_before;
};

struct MergePartials {
  float base2_factor;
  __device__ __forceinline__ Partial operator()(Partial a, const Partial& b) const {
    softmax_merge(a.max, a.sums, b.max, b.sums, base2_factor);
    a.best_before = vmax(a.best_before, b.best_before);
    return a;
  }
};

// Shuffles move 4 bytes at a time; a Partial is passed field by field.
__device__ __forceinline__ Partial shuffle_xor(const Partial& p, int offset) {
  const auto get = [&](float v) { return __shfl_xor_sync(0xffffffffu, v, offset); };
  return {get(p.max), {get(p.sums.s), get(p.sums.u), get(p.sums.q), get(p.sums.x)}, get(p.best_before)};
}

template <int THREADS> __device__ __forceinline__ Partial join_block(Partial p, const MergePartials& merge) {
  constexpr int warps = THREADS / 32;
  PK_SMEM(Partial, partials, warps);
  // Both lanes of a pair must merge in the same order, or they would end with different bits.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 16; offset > 0; offset >>= 1) {
    const Partial other = shuffle_xor(p, offset);
    p = lane & offset ? merge(other, p) : merge(p, other);
  }
  if (lane == 0) partials[warp] = p;
  __syncthreads();
  p = lane < warps ? partials[lane] : Partial{kMinusInf<float>, {}, kMinusInf<float>};
  for (int offset = 16; offset > 0; offset >>= 1) {
    const Partial other = shuffle_xor(p, offset);
    p = lane & offset ? merge(other, p) : merge(p, other);
  }
  return p;
}

// Adds COUNT transformed logits of adjacent columns to a thread's statistics.
template <bool ENTROPY, bool EXTRA, int COUNT>
__device__ __forceinline__ void add_pack(Partial& p, const float (&pre)[COUNT], float k, int64_t col, int64_t target) {
  float m = pre[0];
#pragma unroll
  for (int i = 1; i < COUNT; i++) m = vmax(pre[i], m);
  if (EXTRA) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (col + i < target) p.best_before = vmax(pre[i], p.best_before);
  }
  if (m > p.max) {
    softmax_rescale(p.sums, p.max, m, k);
    p.max = m;
  }
  if (p.max == kMinusInf<float>) {  // only -inf or NaN so far
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (pre[i] != pre[i]) p.sums.s = pre[i];
      if (EXTRA) p.sums.x += pre[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) softmax_add<ENTROPY, EXTRA>(p.sums, pre[i], p.max, k);
}

__device__ __forceinline__ float bias_at(const LogitTransform<float>& t, int64_t col) { return t.bias ? t.bias[col] : 0.0f; }

template <class T, int THREADS, bool ENTROPY, bool EXTRA>
__global__ void __launch_bounds__(THREADS) fold_kernel(const FoldArgs<float> a) {
  const LogitBlock<float>& b = a.block;
  const int64_t row = blockIdx.x;
  const int64_t target_id = b.targets[row];
  const bool ignored = target_id == b.ignore_index;
  const bool valid = target_id >= 0 && target_id < b.vocab;
  const float factor = logit_factor(b.transform, row), k = factor * float(kLog2E);
  const int64_t target = target_id - b.first_col;

  Partial p{kMinusInf<float>, {}, kMinusInf<float>};
  if (!ignored) {
    const T* x = static_cast<const T*>(a.logits) + row_offset(a.logits_map, row);
    constexpr int P = kPackSize<T>;
    // Elements before the first 16-byte boundary, whole packs, and the rest.
    const int64_t misaligned = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
    const int64_t head = misaligned < b.cols ? misaligned : b.cols;
    const int64_t packs = (b.cols - head) / P, tail = head + packs * P;
    const auto add_one = [&](int64_t col) {
      const float pre[1] = {pre_logit(b.transform, to_float(x[col]), bias_at(b.transform, col))};
      add_pack<ENTROPY, EXTRA>(p, pre, k, col, target);
    };
    if (threadIdx.x < head) add_one(threadIdx.x);
    for (int64_t i = threadIdx.x; i < packs; i += THREADS) {
      const int64_t col = head + i * P;
      const Pack<T, P> pack = load_pack(x + col);
      float pre[P];
#pragma unroll
      for (int j = 0; j < P; j++) pre[j] = pre_logit(b.transform, to_float(pack.v[j]), bias_at(b.transform, col + j));
      add_pack<ENTROPY, EXTRA>(p, pre, k, col, target);
    }
    if (tail + threadIdx.x < b.cols) add_one(tail + threadIdx.x);
  }
  p = join_block<THREADS>(p, MergePartials{k});
  if (threadIdx.x != 0) return;

  SoftmaxRow<float> s{kMinusInf<float>, 0, 0, 0, 0, __builtin_nanf(""), kMinusInf<float>};
  if (!a.first) s = load_state(a, row);
  if (!ignored && valid && target >= 0 && target < b.cols) {
    const T* x = static_cast<const T*>(a.logits) + row_offset(a.logits_map, row);
    s.target_pre = pre_logit(b.transform, to_float(x[target]), bias_at(b.transform, target));
  }
  SoftmaxSums<float> sums{s.s, s.u, s.q, s.x};
  softmax_merge(s.max, sums, p.max, p.sums, k);
  s = {s.max, sums.s, sums.u, sums.q, sums.x, s.target_pre, vmax(s.best_before, p.best_before)};
  if (!a.last) return store_state(a, row, s);
  SoftmaxOutputs<float> o{};
  if (!ignored) {
    if (!valid) s.s = __builtin_nanf("");  // every output of the row turns NaN
    o = softmax_finish(s, factor, b.vocab);
    if (!valid) o.mean_logit = o.sum_sq_probs = s.s;
  }
  write_outputs(a, row, o, ignored ? 0.0f : s.max);
}

template <class O> __device__ __forceinline__ O from_float(float x) { return static_cast<O>(x); }

template <class T, class O, int THREADS> __global__ void __launch_bounds__(THREADS) grad_kernel(const GradArgs<float> a) {
  static_assert(sizeof(O) <= sizeof(T), "in place, a row may only shrink");
  const LogitBlock<float>& b = a.block;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.logits_map, row);
  O* out = static_cast<O*>(a.grad) + row_offset(a.grad_map, row);
  const int64_t target = b.targets[row] - b.first_col;
  const bool ignored = b.targets[row] == b.ignore_index;
  const SoftmaxGrad<float> g =
      softmax_grad(a.row_max[row], a.row_log2_sum[row], logit_factor(b.transform, row), a.g_entropy ? a.entropy[row] : 0.0f,
                   a.g_logp ? a.g_logp[row] : 0.0f, a.g_entropy ? a.g_entropy[row] : 0.0f, a.g_lse ? a.g_lse[row] : 0.0f);
  const auto value = [&](float raw, int64_t col) {
    const float pre = pre_logit(b.transform, raw, bias_at(b.transform, col));
    const float d = softmax_grad_value(g, pre) + (col == target ? g.target : 0.0f);
    return ignored ? 0.0f : d * pre_logit_slope(b.transform, pre);
  };

  constexpr int P = kPackSize<T>;
  const bool packed = aligned16(x) && reinterpret_cast<uintptr_t>(out) % (P * sizeof(O)) == 0;
  const int64_t packs = packed ? b.cols / P : 0;
  // Every thread runs every round, so that all of them reach the barriers.
  for (int64_t first = 0; first < packs; first += THREADS) {
    const int64_t i = first + threadIdx.x;
    Pack<T, P> in;
    if (i < packs) in = load_pack(x + i * P);
    __syncthreads();
    if (i < packs) {
      Pack<O, P> result;
#pragma unroll
      for (int j = 0; j < P; j++) result.v[j] = from_float<O>(value(to_float(in.v[j]), i * P + j));
      *reinterpret_cast<Pack<O, P>*>(out + i * P) = result;
    }
  }
  for (int64_t first = packs * P; first < b.cols; first += THREADS) {
    const int64_t col = first + threadIdx.x;
    const float raw = col < b.cols ? to_float(x[col]) : 0.0f;
    __syncthreads();
    if (col < b.cols) out[col] = from_float<O>(value(raw, col));
  }
}

template <class T, bool ENTROPY, bool EXTRA> void launch_fold(const FoldArgs<float>& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.block.rows));
  // Enough threads to keep about 8 packs each in flight, no more than the row can use.
  if (a.block.cols >= 16384) PK_LAUNCH((fold_kernel<T, 512, ENTROPY, EXTRA>), grid, dim3(512), stream, a);
  else if (a.block.cols >= 2048) PK_LAUNCH((fold_kernel<T, 256, ENTROPY, EXTRA>), grid, dim3(256), stream, a);
  else PK_LAUNCH((fold_kernel<T, 64, ENTROPY, EXTRA>), grid, dim3(64), stream, a);
}

template <class T> int fold(const FoldArgs<float>& a, cudaStream_t stream) {
  if (a.extra) launch_fold<T, true, true>(a, stream);
  else if (a.entropy) launch_fold<T, true, false>(a, stream);
  else launch_fold<T, false, false>(a, stream);
  return static_cast<int>(cudaGetLastError());
}

template <class T, class O> int grad(const GradArgs<float>& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.block.rows));
  if (a.block.cols >= 4096) PK_LAUNCH((grad_kernel<T, O, 512>), grid, dim3(512), stream, a);
  else PK_LAUNCH((grad_kernel<T, O, 128>), grid, dim3(128), stream, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_fold_logits(const FoldArgs<float>& a, void* stream) {
  if (a.block.rows == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.block.dtype) {
    case DType::f32: return fold<float>(a, s);
    case DType::bf16: return fold<bf16_t>(a, s);
    case DType::f16: return fold<f16_t>(a, s);
    case DType::f64: break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

int cuda_grad_logits(const GradArgs<float>& a, void* stream) {
  if (a.block.rows == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.block.dtype == DType::f32) {
    if (a.grad_dtype == DType::f32) return grad<float, float>(a, s);
    if (a.grad_dtype == DType::bf16) return grad<float, bf16_t>(a, s);
    if (a.grad_dtype == DType::f16) return grad<float, f16_t>(a, s);
  }
  if (a.block.dtype == DType::bf16 && a.grad_dtype == DType::bf16) return grad<bf16_t, bf16_t>(a, s);
  if (a.block.dtype == DType::f16 && a.grad_dtype == DType::f16) return grad<f16_t, f16_t>(a, s);
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace prefkern
