// The CUDA walk of greedy_select.h: a warp takes a vector, lane l its elements l, l + 32, ...; first for the norms, then, a block
// per seed, for the cosines of every step, of which each warp keeps the lowest score it has seen.
#include "core/cuda.cuh"
#include "diversity/greedy_select.h"
#include "math/diversity.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
static_assert(kWarp == kGreedySums, "the order of a sum");
using Key = unsigned long long;
constexpr Key kNone = ~Key(0);

// Keys ascend with the score, and where that is equal with the candidate.
__device__ __forceinline__ Key key_of(float score, int64_t candidate) {
  const float s = score + 0.0f;  // -0 is 0
  uint32_t bits;
  memcpy(&bits, &s, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return Key(bits) << 32 | Key(candidate);
}
struct Least {
  __device__ __forceinline__ Key operator()(Key a, Key b) const { return a < b ? a : b; }
};

template <class T> __global__ void __launch_bounds__(kThreads) norms_kernel(const GreedyArgs<float> a, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;  // a whole warp at a time
  const int lane = threadIdx.x % kWarp;
  const T* x = static_cast<const T*>(a.embeddings) + row * a.width;
  double sum = 0;
  for (int64_t k = lane; k < a.width; k += kWarp) sum += double(to_float(x[k])) * double(to_float(x[k]));
  sum = warp_sum(sum);
  if (lane == 0) a.inverse_norms[row] = float(inverse_norm(vsqrt(sum)));
}

template <class T> __global__ void __launch_bounds__(kThreads) select_kernel(const GreedyArgs<float> a) {
  const int64_t q = blockIdx.x, first_row = a.own_embeddings ? q * a.candidates : 0;
  const T* embeddings = static_cast<const T*>(a.embeddings) + first_row * a.width;
  const float* inverses = a.inverse_norms + first_row;
  const int64_t* types = a.type_id + (a.own_types ? q * a.candidates : 0);
  const int64_t* quotas = a.quotas + (a.own_quotas ? q * a.types : 0);
  float* scores = a.scores + q * a.candidates;
  int64_t* chosen = a.chosen + q * a.size;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  PK_SMEM(int64_t, room, kMostTypes);
  int64_t total = 0;
  int wrong = 0;
  for (int64_t c = threadIdx.x; c < a.types; c += kThreads) {
    const int64_t quota = quotas[c];
    room[c] = quota;
    wrong |= quota < 0 || quota > a.candidates;
    total += quota < 0 || quota > a.candidates ? 0 : quota;
  }
  for (int64_t i = threadIdx.x; i < a.candidates; i += kThreads)
    wrong |= types[i] < 0 || types[i] >= a.types || !(inverses[i] > 0);
  for (int64_t s = threadIdx.x; s < a.size; s += kThreads) chosen[s] = -1;
  total = block_reduce<kThreads>(total, int64_t(0), Add());
  wrong = block_reduce<kThreads>(wrong, 0, Add());  // and all of the block's writes are seen
  int64_t last = a.seed[q];
  if (wrong || total > a.size || last < 0 || last >= a.candidates || room[types[last]] < 1) return;

  for (int64_t step = 0;; step++) {
    __syncthreads();  // the room of the last step has been read
    if (threadIdx.x == 0) {
      chosen[step] = last;
      room[types[last]]--;
    }
    __syncthreads();
    if (step + 1 == total) return;
    const T* u = embeddings + last * a.width;
    const float inverse = inverses[last];
    Key lowest = kNone;
    for (int64_t i = warp; i < a.candidates; i += kWarps) {
      const float before = step == 0 ? 0.0f : scores[i];
      if (i == last || (step > 0 && taken(before))) {
        if (lane == 0) scores[i] = kTaken;
        continue;
      }
      const T* x = embeddings + i * a.width;
      float sum = 0;
      for (int64_t k = lane; k < a.width; k += kWarp) sum = add_rounded(to_float(x[k]) * (to_float(u[k]) * inverse), sum);
      sum = warp_reduce(sum, Add());
      const float score = fold_cosine(sum * inverses[i], before, step == 0, a.maximum);
      if (lane == 0) scores[i] = score;
      if (room[types[i]] > 0) lowest = Least()(lowest, key_of(score, i));
    }
    lowest = block_reduce<kThreads>(lowest, kNone, Least());
    if (lowest == kNone) {  // fewer candidates than the quotas ask for
      for (int64_t s = threadIdx.x; s < a.size; s += kThreads) chosen[s] = -1;
      return;
    }
    last = static_cast<int64_t>(lowest & 0xffffffffu);
  }
}

template <class T> int launch(const GreedyArgs<float>& a, void* stream) {
  const int64_t rows = (a.own_embeddings ? a.seeds : 1) * a.candidates;
  const auto s = static_cast<cudaStream_t>(stream);
  PK_LAUNCH(norms_kernel<T>, dim3(static_cast<unsigned>(ceil_div(rows, kWarps))), dim3(kThreads), s, a, rows);
  PK_LAUNCH(select_kernel<T>, dim3(static_cast<unsigned>(a.seeds)), dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_greedy_select(const GreedyArgs<float>& a, void* stream) {
  if (a.seeds == 0) return 0;
  switch (a.dtype) {
    case DType::bf16: return launch<bf16_t>(a, stream);
    case DType::f16: return launch<f16_t>(a, stream);
    default: return launch<float>(a, stream);
  }
}

}  // namespace prefkern
