// The CUDA walk of seeded_normal.h: a thread makes the four numbers of a block for every row, and adds them up in registers. The
// weights pass through shared memory, a piece at a time.
#include "core/cuda.cuh"
#include "core/philox.h"
#include "math/normal.h"
#include "sampling/seeded_normal.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kWeights = 1024;

template <class T> __global__ void __launch_bounds__(kThreads) normal_kernel(const NormalArgs<float> a, bool aligned) {
  PK_SMEM(float, weights, kWeights);
  const int64_t block = a.first_element / 4 + int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float sum[4] = {0, 0, 0, 0};
  for (int64_t first = 0; first < a.rows; first += kWeights) {
    const int n = static_cast<int>(a.rows - first < kWeights ? a.rows - first : kWeights);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) weights[i] = a.weights ? a.weights[first + i] : 1.0f;
    __syncthreads();
    for (int i = 0; i < n; i++) {
      const PhiloxWords w =
          philox(a.seed, uint32_t(block), uint32_t(uint64_t(block) >> 32), uint32_t(a.first_row + first + i), 0);
      const NormalPair<float> p = normal_pair<float>(w.word[0], w.word[1]), q = normal_pair<float>(w.word[2], w.word[3]);
      sum[0] += p.first * weights[i];
      sum[1] += p.second * weights[i];
      sum[2] += q.first * weights[i];
      sum[3] += q.second * weights[i];
    }
  }
  const int64_t at = 4 * block - a.first_element;
  const T* add_to = static_cast<const T*>(a.add_to);
  T* out = static_cast<T*>(a.out);
  if (aligned && at + 4 <= a.count) {
    using Four = Pack<T, 4>;
    Four four;
    if (add_to) four = *reinterpret_cast<const Four*>(add_to + at);
#pragma unroll
    for (int k = 0; k < 4; k++) four.v[k] = narrow<T>((add_to ? to_float(four.v[k]) : 0.0f) + sum[k] * a.scale);
    *reinterpret_cast<Four*>(out + at) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int64_t j = at + k;
    if (j >= 0 && j < a.count) out[j] = narrow<T>((add_to ? to_float(add_to[j]) : 0.0f) + sum[k] * a.scale);
  }
}

__global__ void __launch_bounds__(kThreads) words_kernel(const PhiloxArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.blocks) return;
  const uint64_t block = uint64_t(a.first_block + i);
  const PhiloxWords w = philox(a.seed, uint32_t(block), uint32_t(block >> 32), uint32_t(a.row), 0);
  for (int j = 0; j < 4; j++) a.words[4 * i + j] = w.word[j];
}

template <class T> int launch(const NormalArgs<float>& a, cudaStream_t stream) {
  const int64_t first = a.first_element / 4, last = (a.first_element + a.count - 1) / 4 + 1;
  const auto aligned_to_four = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0; };
  const bool aligned = a.first_element % 4 == 0 && aligned_to_four(a.out) && aligned_to_four(a.add_to);
  PK_LAUNCH(normal_kernel<T>, dim3(static_cast<unsigned>(ceil_div(last - first, kThreads))), dim3(kThreads), stream, a,
            aligned);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_seeded_normal(const NormalArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case DType::f32: return launch<float>(a, s);
    case DType::bf16: return launch<bf16_t>(a, s);
    case DType::f16: return launch<f16_t>(a, s);
    case DType::f64: break;
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

int cuda_philox_words(const PhiloxArgs& a, void* stream) {
  if (a.blocks == 0) return 0;
  PK_LAUNCH(words_kernel, dim3(static_cast<unsigned>(ceil_div(a.blocks, kThreads))), dim3(kThreads),
            static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
