// The CUDA walk of inner_loss.h: a thread takes a row, whose distributions are short, and a block kLpgBlock of them. The block
// that finishes last (an integer counter tells) adds up what all have left, in a fixed order.
#include "core/cuda.cuh"
#include "meta/inner_loss.h"

namespace prefkern {
namespace {

constexpr int kThreads = kLpgBlock;

struct Sums {
  double policy = 0, divergence = 0;
};

// Of all rows, in one block, which is told so; every thread of that block gets them.
__device__ __forceinline__ bool sum_up(const LpgArgs<float>& a, double policy, double divergence, Sums& total) {
  PK_SMEM(int, is_last, 1);
  policy = block_reduce<kThreads>(policy, 0.0, Add());
  divergence = block_reduce<kThreads>(divergence, 0.0, Add());
  if (threadIdx.x == 0) {
    a.sums[int64_t(blockIdx.x) * kLpgSums + kLpgPolicy] = policy;
    a.sums[int64_t(blockIdx.x) * kLpgSums + kLpgDivergence] = divergence;
    __threadfence();  // the sums are visible before the count is
    is_last[0] = atomicAdd(a.finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return false;
  __threadfence();
  const volatile double* from = a.sums;  // other blocks' writes: not from a stale cache line
  Sums mine;
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
    mine.policy += from[block * kLpgSums + kLpgPolicy];
    mine.divergence += from[block * kLpgSums + kLpgDivergence];
  }
  total.policy = block_reduce<kThreads>(mine.policy, 0.0, Add());
  total.divergence = block_reduce<kThreads>(mine.divergence, 0.0, Add());
  return true;
}

struct Row {
  int64_t index, action;
  bool exists, known;
  float p, q;
  __device__ __forceinline__ explicit Row(const LpgArgs<float>& a)
      : index(int64_t(blockIdx.x) * kThreads + threadIdx.x), exists(index < a.rows) {
    action = exists ? a.taken[index] : 0;
    known = exists && action >= 0 && action < a.actions;
    // Of an action that there is not nothing may be read, and everything that has to do with it is NaN.
    p = known ? a.probs[index * a.actions + action] : exists ? __builtin_nanf("") : 1.0f;
    q = exists ? a.adjustment[index] : 0.0f;
  }
  __device__ __forceinline__ void write_probs(const LpgArgs<float>& a, float value) const {
    const float others = known ? 0.0f : __builtin_nanf("");
    for (int64_t k = 0; k < a.actions; k++) a.probs_grad[index * a.actions + k] = k == action ? value : others;
  }
};

__global__ void __launch_bounds__(kThreads) loss_kernel(const LpgArgs<float> a) {
  const Row r(a);
  double policy = 0;
  float divergence = 0;
  if (r.exists) {
    policy = double(lpg_policy(r.p, r.q));
    const float *y = a.y + r.index * a.width, *target = a.target + r.index * a.width;
    for (int64_t w = 0; w < a.width; w++) divergence += lpg_divergence(y[w], target[w]);
  }
  Sums total;
  if (!sum_up(a, policy, double(divergence), total) || threadIdx.x != 0) return;
  const double rows = double(a.rows);
  *a.out = float((a.rule.sign * total.policy + a.rule.alpha * total.divergence) / rows);
  a.terms[0] = float(total.policy / rows);
  a.terms[1] = float(total.divergence / rows);
}

__global__ void __launch_bounds__(kThreads) gradients_kernel(const LpgArgs<float> a) {
  const Row r(a);
  if (!r.exists) return;
  const double c = double(*a.upstream) / double(a.rows);
  const float of_policy = float(c * a.rule.sign), of_divergence = float(c * a.rule.alpha);
  const auto slopes = lpg_policy_slopes(r.p, r.q);
  if (a.probs_grad) r.write_probs(a, of_policy * slopes.first);
  if (a.adjustment_grad) a.adjustment_grad[r.index] = of_policy * slopes.second;
  if (!a.y_grad && !a.target_grad) return;
  for (int64_t i = r.index * a.width; i < (r.index + 1) * a.width; i++) {
    const auto both = lpg_divergence_slopes(a.y[i], a.target[i]);
    if (a.y_grad) a.y_grad[i] = of_divergence * both.first;
    if (a.target_grad) a.target_grad[i] = of_divergence * both.second;
  }
}

__global__ void __launch_bounds__(kThreads) second_kernel(const LpgArgs<float> a) {
  const Row r(a);
  const double c = double(*a.upstream) / double(a.rows);
  const float of_policy = float(c * a.rule.sign), of_divergence = float(c * a.rule.alpha);
  double policy = 0;
  float divergence = 0;
  if (r.exists) {
    const float above_p = a.above_probs && r.known ? a.above_probs[r.index * a.actions + r.action] : 0.0f;
    const auto d = lpg_policy_second(r.p, r.q, above_p, a.above_adjustment ? a.above_adjustment[r.index] : 0.0f);
    policy = double(d.sum);
    if (a.probs_grad) r.write_probs(a, of_policy * d.first);
    if (a.adjustment_grad) a.adjustment_grad[r.index] = of_policy * d.second;
    for (int64_t i = r.index * a.width; i < (r.index + 1) * a.width; i++) {
      const auto both = lpg_divergence_second(a.y[i], a.target[i], a.above_y ? a.above_y[i] : 0.0f,
                                              a.above_target ? a.above_target[i] : 0.0f);
      divergence += both.sum;
      if (a.y_grad) a.y_grad[i] = of_divergence * both.first;
      if (a.target_grad) a.target_grad[i] = of_divergence * both.second;
    }
  }
  Sums total;
  if (!sum_up(a, policy, double(divergence), total) || threadIdx.x != 0) return;
  *a.out = float((a.rule.sign * total.policy + a.rule.alpha * total.divergence) / double(a.rows));
}

int launch(void (*kernel)(LpgArgs<float>), const LpgArgs<float>& a, void* stream) {
  if (a.rows == 0) return 0;
  PK_LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(a.rows, kThreads))), dim3(kThreads), static_cast<cudaStream_t>(stream),
            a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cuda_lpg_loss(const LpgArgs<float>& a, void* stream) { return launch(loss_kernel, a, stream); }
int cuda_lpg_gradients(const LpgArgs<float>& a, void* stream) { return launch(gradients_kernel, a, stream); }
int cuda_lpg_second(const LpgArgs<float>& a, void* stream) { return launch(second_kernel, a, stream); }

}  // namespace prefkern
