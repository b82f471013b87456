// The CUDA walk of pooling.h. A block takes one step of a sequence and 512 bytes of features; each of its warps looks at 32
// tokens at a time, a ballot tells which belong to the step, and of those a lane reads 16 bytes each. So features are read
// once, however many steps there are, and only step ids are read again by every block; what the warps have added up is joined
// in order. Backwards a warp writes the row of a token.
//
// Numbers that are no hidden states have one feature: there a lane takes a token.
#include "core/sequence.cuh"
#include "sequence/pooling.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;

struct Steps {
  int64_t b, begin, end;
  int64_t step;
  __device__ __forceinline__ Steps(const PoolArgs<float>& a, bool known)
      : b(blockIdx.x / a.steps),
        begin(known ? sequence_begin(a.layout, b) : 0),
        end(known ? sequence_end(a.layout, b) : 0),
        step(blockIdx.x % a.steps + 1) {}
};

// Where the features of a sequence's first token are; those of the others follow at a fixed distance.
template <class T> __device__ __forceinline__ const T* first_row(const PoolArgs<float>& a, const Steps& s) {
  return static_cast<const T*>(a.values) + (s.begin < s.end ? row_offset(a.rows, s.begin) : 0);
}

__device__ __forceinline__ float result(float sum, int64_t count, bool wrong) {
  return wrong ? __builtin_nanf("") : count == 0 ? 0.0f : pooled_mean(sum, float(count));
}

// PACKED: rows are aligned to 16 bytes and so many bytes long.
template <class T, bool PACKED> __global__ void __launch_bounds__(kThreads) forward_kernel(const PoolArgs<float> a) {
  constexpr int N = kPackSize<T>, kTile = kWarp * N;
  PK_SMEM(double, partial, kWarps* kTile);
  const bool known = layout_holds<kThreads>(a.layout);
  const Steps s(a, known);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = int64_t(blockIdx.y) * kTile, here = a.features - first < kTile ? a.features - first : kTile;
  const T* rows = first_row<T>(a, s) + first;
  double sum[N] = {};
  int64_t count = 0;
  int wrong = !known;
  for (int64_t chunk = s.begin + warp * kWarp; chunk < s.end; chunk += kThreads) {
    const int64_t step = chunk + lane < s.end ? token_step(a, chunk + lane) : 0;
    wrong |= step < 0;
    const unsigned bits = __ballot_sync(kAll, step == s.step);
    count += __popc(bits);
    if (bits == 0) continue;
    float some[N] = {};  // of 32 tokens at most
#pragma unroll 8
    for (int k = 0; k < kWarp; k++) {
      if (!(bits >> k & 1)) continue;
      const T* row = rows + (chunk + k - s.begin) * a.rows.inner_stride;
      if (PACKED) {
        if (lane * N >= here) continue;
        const Pack<T, N> x = load_pack(row + lane * N);
#pragma unroll
        for (int j = 0; j < N; j++) some[j] += to_float(x.v[j]);
      } else {
#pragma unroll
        for (int j = 0; j < N; j++)
          if (lane + j * kWarp < here) some[j] += to_float(row[lane + j * kWarp]);
      }
    }
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] += double(some[j]);
  }
#pragma unroll
  for (int j = 0; j < N; j++) partial[warp * kTile + (PACKED ? lane * N + j : lane + j * kWarp)] = sum[j];
  count = block_reduce<kThreads>(lane == 0 ? count : int64_t(0), int64_t(0), Add());  // and the array is complete
  wrong = block_reduce<kThreads>(wrong, 0, Add());
  for (int f = threadIdx.x; f < here; f += kThreads) {
    double total = 0;
    for (int w = 0; w < kWarps; w++) total += partial[w * kTile + f];
    a.means[blockIdx.x * a.features + first + f] = result(float(total), count, wrong != 0);
  }
  if (blockIdx.y == 0 && threadIdx.x == 0) a.counts[blockIdx.x] = wrong ? -1 : count;
}

template <class T> __global__ void __launch_bounds__(kThreads) value_kernel(const PoolArgs<float> a) {
  const bool known = layout_holds<kThreads>(a.layout);
  const Steps s(a, known);
  const T* values = first_row<T>(a, s);
  float sum = 0;
  int64_t count = 0;
  int wrong = !known;
  for (int64_t i = s.begin + threadIdx.x; i < s.end; i += kThreads) {
    const int64_t step = token_step(a, i);
    wrong |= step < 0;
    if (step != s.step) continue;
    sum += to_float(values[(i - s.begin) * a.rows.inner_stride]);
    count++;
  }
  const double total = block_reduce<kThreads>(double(sum), 0.0, Add());
  count = block_reduce<kThreads>(count, int64_t(0), Add());
  wrong = block_reduce<kThreads>(wrong, 0, Add());
  if (threadIdx.x != 0) return;
  a.means[blockIdx.x] = result(float(total), count, wrong != 0);
  a.counts[blockIdx.x] = wrong ? -1 : count;
}

// The last sequence that begins at the token or before it.
__device__ __forceinline__ int64_t sequence_of(const SequenceLayout& l, int64_t token) {
  if (!l.cu_seqlens) return token / l.padded_length;
  int64_t low = 0, high = l.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (l.cu_seqlens[middle] <= token) low = middle;
    else high = middle;
  }
  return low;
}

// What the features of a token get: upstream / count, or `fill` alike for all of them.
struct Share {
  const float* upstream = nullptr;
  float count = 1, fill = 0;
  __device__ __forceinline__ Share(const PoolArgs<float>& a, int64_t token) {
    const int64_t b = sequence_of(a.layout, token), step = token_step(a, token);
    if (a.counts[b * a.steps] < 0) fill = __builtin_nanf("");  // an id of the sequence is wrong
    else if (step > 0) {
      upstream = a.upstream + (b * a.steps + step - 1) * a.features;
      count = float(a.counts[b * a.steps + step - 1]);
    }
  }
  __device__ __forceinline__ float operator()(int64_t f) const { return upstream ? pooled_mean(upstream[f], count) : fill; }
};

template <class T, bool PACKED> __global__ void __launch_bounds__(kThreads) backward_kernel(const PoolArgs<float> a) {
  constexpr int N = kPackSize<T>;
  T* const grad = static_cast<T*>(a.grad);
  if (!layout_holds<kThreads>(a.layout))
    return fill_share<kThreads>(grad, a.layout.tokens * a.features, static_cast<T>(__builtin_nanf("")));
  const int64_t token = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (token >= a.layout.tokens) return;
  const Share share(a, token);
  T* const row = grad + token * a.features;
  const int lane = threadIdx.x % kWarp;
  if (PACKED) {
    for (int64_t f = lane * N; f < a.features; f += kWarp * N) {
      Pack<T, N> out;
#pragma unroll
      for (int j = 0; j < N; j++) out.v[j] = static_cast<T>(share(f + j));
      store_pack(row + f, out);
    }
  } else {
    for (int64_t f = lane; f < a.features; f += kWarp) row[f] = static_cast<T>(share(f));
  }
}

template <class T> __global__ void __launch_bounds__(kThreads) value_backward_kernel(const PoolArgs<float> a) {
  T* const grad = static_cast<T*>(a.grad);
  if (!layout_holds<kThreads>(a.layout)) return fill_share<kThreads>(grad, a.layout.tokens, static_cast<T>(__builtin_nanf("")));
  const int64_t token = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (token < a.layout.tokens) grad[token] = static_cast<T>(Share(a, token)(0));
}

template <class T> void forward(const PoolArgs<float>& a, cudaStream_t s) {
  constexpr int N = kPackSize<T>;
  const auto means = static_cast<unsigned>(a.layout.sequences * a.steps);
  if (a.features == 1) {
    PK_LAUNCH(value_kernel<T>, dim3(means), dim3(kThreads), s, a);
    return;
  }
  const dim3 grid(means, static_cast<unsigned>(ceil_div(a.features > 0 ? a.features : 1, kWarp * N)));
  const bool packed =
      aligned16(a.values) && a.features % N == 0 && a.rows.outer_stride % N == 0 && a.rows.inner_stride % N == 0;
  if (packed) PK_LAUNCH((forward_kernel<T, true>), grid, dim3(kThreads), s, a);
  else PK_LAUNCH((forward_kernel<T, false>), grid, dim3(kThreads), s, a);
}

template <class T> void backward(const PoolArgs<float>& a, cudaStream_t s) {
  if (a.features == 1) {
    const dim3 grid(static_cast<unsigned>(ceil_div(a.layout.tokens, kThreads)));
    PK_LAUNCH(value_backward_kernel<T>, grid, dim3(kThreads), s, a);
    return;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(a.layout.tokens, kWarps)));
  const bool packed = aligned16(a.grad) && a.features % kPackSize<T> == 0;
  if (packed) PK_LAUNCH((backward_kernel<T, true>), grid, dim3(kThreads), s, a);
  else PK_LAUNCH((backward_kernel<T, false>), grid, dim3(kThreads), s, a);
}

}  // namespace

int cuda_pool(const PoolArgs<float>& a, void* stream) {
  if (a.layout.sequences == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::bf16) forward<bf16_t>(a, s);
  else if (a.dtype == DType::f16) forward<f16_t>(a, s);
  else forward<float>(a, s);
  return static_cast<int>(cudaGetLastError());
}

int cuda_pool_backward(const PoolArgs<float>& a, void* stream) {
  if (a.layout.tokens == 0 || a.features == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == DType::bf16) backward<bf16_t>(a, s);
  else if (a.dtype == DType::f16) backward<f16_t>(a, s);
  else backward<float>(a, s);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
