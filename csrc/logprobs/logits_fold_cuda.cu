// The CUDA walk of logits_fold.h: one block of threads per row, one read of the row.
//
// fold: every thread keeps online softmax statistics of the elements it meets (16-byte streaming loads, several in flight;
// one rescale per 16 logits, and only when the maximum moves); the block then joins them in a fixed order, so equal input
// gives equal bits. The maximum, the sums for entropy and sum p^2, and the target's logit come out of that one pass.
//
// grad: the row is taken in tiles, which are read into registers before their result is written; so the gradient may
// overwrite the logits. It may also shrink to 2-byte elements at the start of its own row: then the block waits in between.
//
// Both are bound by instructions as much as by memory: rows without bias and softcap have a path of their own.
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

// Adds COUNT transformed logits to a thread's statistics.
template <bool ENTROPY, bool EXTRA, int COUNT>
__device__ __forceinline__ void add_logits(Partial& p, const float (&pre)[COUNT], float k) {
  float m = pre[0];
#pragma unroll
  for (int i = 1; i < COUNT; i++) m = max_number(pre[i], m);
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

// A pack of a row, however it lies in memory: which thread takes which columns does not depend on it, and so equal rows give
// equal bits.
template <class T> __device__ __forceinline__ Pack<T, kPackSize<T>> load_columns(const T* x, bool aligned) {
  if (aligned) return load_pack(x);
  Pack<T, kPackSize<T>> pack;
#pragma unroll
  for (int j = 0; j < kPackSize<T>; j++) pack.v[j] = x[j];
  return pack;
}

// How many packs a thread has in flight: 16 logits.
template <class T> constexpr int kGroup = 16 / kPackSize<T>;

// PLAIN: neither bias nor softcap, and an aligned row.
template <bool PLAIN, class T, int THREADS, bool ENTROPY, bool EXTRA>
__device__ __forceinline__ Partial fold_row(const LogitBlock<float>& b, const T* x, float k, int64_t target) {
  constexpr int P = kPackSize<T>, G = kGroup<T>;
  Partial p{kMinusInf<float>, {}, kMinusInf<float>};
  const bool aligned = PLAIN || aligned16(x);
  const auto pre_at = [&](T raw, int64_t col) {
    return PLAIN ? to_float(raw) : pre_logit(b.transform, to_float(raw), b.transform.bias ? b.transform.bias[col] : 0.0f);
  };
  const auto look_for_ties = [&](float pre, int64_t col) {
    if (EXTRA && col < target) p.best_before = vmax(pre, p.best_before);
  };
  const int packs = static_cast<int>(b.cols / P);
  int i = threadIdx.x;
  for (; i + (G - 1) * THREADS < packs; i += G * THREADS) {
    Pack<T, P> raw[G];
#pragma unroll
    for (int g = 0; g < G; g++) raw[g] = load_columns(x + int64_t(i + g * THREADS) * P, aligned);
    float pre[G * P];
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
      for (int j = 0; j < P; j++) {
        const int64_t col = int64_t(i + g * THREADS) * P + j;
        pre[g * P + j] = pre_at(raw[g].v[j], col);
        look_for_ties(pre[g * P + j], col);
      }
    add_logits<ENTROPY, EXTRA>(p, pre, k);
  }
  for (; i < packs; i += THREADS) {
    const Pack<T, P> raw = load_columns(x + int64_t(i) * P, aligned);
    float pre[P];
#pragma unroll
    for (int j = 0; j < P; j++) {
      pre[j] = pre_at(raw.v[j], int64_t(i) * P + j);
      look_for_ties(pre[j], int64_t(i) * P + j);
    }
    add_logits<ENTROPY, EXTRA>(p, pre, k);
  }
  const int64_t last = int64_t(packs) * P + threadIdx.x;
  if (last < b.cols) {
    const float pre[1] = {pre_at(x[last], last)};
    look_for_ties(pre[0], last);
    add_logits<ENTROPY, EXTRA>(p, pre, k);
  }
  return p;
}

__device__ __forceinline__ bool is_plain_row(const LogitTransform<float>& t, const void* x) {
  return is_plain(t) && aligned16(x);
}

template <class T, int THREADS, bool ENTROPY, bool EXTRA>
__global__ void __launch_bounds__(THREADS) fold_kernel(const FoldArgs<float> a) {
  const LogitBlock<float>& b = a.block;
  const int64_t row = blockIdx.x;
  const int64_t target_id = b.targets[row];
  const bool ignored = target_id == b.ignore_index;
  const bool valid = target_id >= 0 && target_id < b.vocab;
  const float factor = logit_factor(b.transform, row), k = factor * float(kLog2E);
  const int64_t target = target_id - b.first_col;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.logits_map, row);

  Partial p{kMinusInf<float>, {}, kMinusInf<float>};
  if (!ignored)
    p = is_plain_row(b.transform, x) ? fold_row<true, T, THREADS, ENTROPY, EXTRA>(b, x, k, target)
                                     : fold_row<false, T, THREADS, ENTROPY, EXTRA>(b, x, k, target);
  p = join_block<THREADS>(p, MergePartials{k});
  if (threadIdx.x != 0) return;

  SoftmaxRow<float> s{kMinusInf<float>, 0, 0, 0, 0, __builtin_nanf(""), kMinusInf<float>};
  if (!a.first) s = load_state(a, row);
  if (!ignored && valid && target >= 0 && target < b.cols)
    s.target_pre = pre_logit(b.transform, to_float(x[target]), b.transform.bias ? b.transform.bias[target] : 0.0f);
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

__device__ __forceinline__ SoftmaxGrad<float> grad_of_row(const GradArgs<float>& a, int64_t row) {
  return softmax_grad(a.row_max[row], a.row_log2_sum[row], logit_factor(a.block.transform, row),
                      a.g_entropy ? a.entropy[row] : 0.0f, a.g_logp ? a.g_logp[row] : 0.0f,
                      a.g_entropy ? a.g_entropy[row] : 0.0f, a.g_lse ? a.g_lse[row] : 0.0f);
}

// The gradient of one logit. Rounded before the target's part is added, wherever that is done: equal bits on every path.
template <bool PLAIN>
__device__ __forceinline__ float grad_of_logit(const LogitTransform<float>& t, const SoftmaxGrad<float>& g, float raw,
                                               int64_t col, int64_t target) {
  const float pre = PLAIN ? raw : pre_logit(t, raw, t.bias ? t.bias[col] : 0.0f);
  float d = softmax_grad_value(g, pre);
  if (col == target) d = add_rounded(d, g.target);
  return PLAIN ? d : d * pre_logit_slope(t, pre);
}

template <class T, class O, int THREADS> __global__ void __launch_bounds__(THREADS) grad_kernel(const GradArgs<float> a) {
  static_assert(sizeof(O) <= sizeof(T), "in place, a row may only shrink");
  constexpr bool shrinks = sizeof(O) < sizeof(T);
  constexpr int P = kPackSize<T>, G = kGroup<T>;
  const LogitBlock<float>& b = a.block;
  const int64_t row = blockIdx.x;
  if (a.compact_count && row >= compact_end(*a.compact_count - a.compact_first)) return;
  const T* x = static_cast<const T*>(a.logits) + row_offset(a.logits_map, row);
  O* out = static_cast<O*>(a.grad) + row_offset(a.grad_map, row);
  const bool ignored = b.targets[row] == b.ignore_index;
  const bool packed = is_plain_row(b.transform, x) && reinterpret_cast<uintptr_t>(out) % (P * sizeof(O)) == 0;
  const int packs = packed ? static_cast<int>(b.cols / P) : 0;

  if (ignored) {
    for (int i = threadIdx.x; i < packs; i += THREADS) *reinterpret_cast<Pack<O, P>*>(out + int64_t(i) * P) = Pack<O, P>{};
    for (int64_t col = int64_t(packs) * P + threadIdx.x; col < b.cols; col += THREADS) out[col] = narrow<O>(0.0f);
    return;
  }
  const int64_t target = b.targets[row] - b.first_col;
  const SoftmaxGrad<float> g = grad_of_row(a, row);
  // Every thread runs every round, so that all of them reach the barriers. Where the gradient is as wide as the logits, a thread
  // overwrites only what it has read itself.
  for (int first = 0; first < packs; first += G * THREADS) {
    Pack<T, P> in[G];
#pragma unroll
    for (int k = 0; k < G; k++) {
      const int i = first + k * THREADS + int(threadIdx.x);
      if (i < packs) in[k] = load_pack(x + int64_t(i) * P);
    }
    if (shrinks) __syncthreads();
#pragma unroll
    for (int k = 0; k < G; k++) {
      const int i = first + k * THREADS + int(threadIdx.x);
      if (i >= packs) continue;
      float d[P];
#pragma unroll
      for (int j = 0; j < P; j++) d[j] = softmax_grad_value(g, to_float(in[k].v[j]));
      const int64_t at = target - int64_t(i) * P;
      if (at >= 0 && at < P) {
#pragma unroll
        for (int j = 0; j < P; j++)
          if (j == at) d[j] = add_rounded(d[j], g.target);
      }
      *reinterpret_cast<Pack<O, P>*>(out + int64_t(i) * P) = narrow_pack<O>(d);
    }
  }
  if (packed) {
    for (int64_t first = int64_t(packs) * P; first < b.cols; first += THREADS) {
      const int64_t col = first + threadIdx.x;
      const float raw = col < b.cols ? to_float(x[col]) : 0.0f;
      if (shrinks) __syncthreads();
      if (col < b.cols) out[col] = narrow<O>(grad_of_logit<true>(b.transform, g, raw, col, target));
    }
    return;
  }
  for (int64_t first = 0; first < b.cols; first += THREADS) {
    const int64_t col = first + threadIdx.x;
    const float raw = col < b.cols ? to_float(x[col]) : 0.0f;
    if (shrinks) __syncthreads();
    if (col < b.cols) out[col] = narrow<O>(grad_of_logit<false>(b.transform, g, raw, col, target));
  }
}

// The gradient of the bias: sums down the columns, before the gradient of the logits is narrowed. Threads of a warp take
// adjacent columns, warps take rows in turn.
constexpr int kBiasWarps = 16;

__global__ void __launch_bounds__(kBiasWarps* kWarp) bias_kernel(const GradArgs<float> a) {
  PK_SMEM(float, sums, kBiasWarps* kWarp);
  const LogitBlock<float>& b = a.block;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t col = int64_t(blockIdx.x) * kWarp + lane;
  float sum = 0;
  if (col < b.cols) {
    for (int64_t row = warp; row < b.rows; row += kBiasWarps) {
      if (b.targets[row] == b.ignore_index) continue;
      const float raw = static_cast<const float*>(a.logits)[row_offset(a.logits_map, row) + col];
      sum += grad_of_logit<false>(b.transform, grad_of_row(a, row), raw, col, b.targets[row] - b.first_col);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || col >= b.cols) return;
  for (int w = 1; w < kBiasWarps; w++) sum += sums[w * kWarp + lane];
  a.d_bias[col] = a.add_to_bias ? a.d_bias[col] + sum : sum;
}

template <class T, bool ENTROPY, bool EXTRA> void launch_fold(const FoldArgs<float>& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.block.rows));
  // No more threads than the row can use.
  if (a.block.cols >= 8192) PK_LAUNCH((fold_kernel<T, 512, ENTROPY, EXTRA>), grid, dim3(512), stream, a);
  else PK_LAUNCH((fold_kernel<T, 128, ENTROPY, EXTRA>), grid, dim3(128), stream, a);
}

template <class T> int fold(const FoldArgs<float>& a, cudaStream_t stream) {
  if (a.extra) launch_fold<T, true, true>(a, stream);
  else if (a.entropy) launch_fold<T, true, false>(a, stream);
  else launch_fold<T, false, false>(a, stream);
  return static_cast<int>(cudaGetLastError());
}

template <class T, class O> int grad(const GradArgs<float>& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.block.rows));
  if (a.block.cols >= 8192) PK_LAUNCH((grad_kernel<T, O, 512>), grid, dim3(512), stream, a);
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

int cuda_grad_bias(const GradArgs<float>& a, void* stream) {
  if (a.block.cols == 0) return 0;
  if (a.block.dtype != DType::f32 || !a.d_bias) return static_cast<int>(cudaErrorInvalidValue);
  PK_LAUNCH(bias_kernel, dim3(static_cast<unsigned>(ceil_div(a.block.cols, kWarp))), dim3(kBiasWarps * kWarp),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
