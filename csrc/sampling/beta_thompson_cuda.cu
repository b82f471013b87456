// The CUDA walk of beta_thompson.h: a thread per prompt. Draws first, the largest afterwards: the op sorts what is written here,
// stably, so that of equal utilities the first prompt wins, and nothing waits for the host.
#include "core/cuda.cuh"
#include "sampling/beta_thompson.h"

namespace prefkern {
namespace {

constexpr int kThreads = 256, kMostBlocks = 4096;

__global__ void __launch_bounds__(kThreads) thompson_kernel(const ThompsonArgs<float> a) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.count; i += threads) {
    const bool eligible = !a.eligible || a.eligible[i] != 0;
    float draw = __builtin_nanf(""), utility = draw;
    if (eligible || a.draws) {
      const float alpha = a.alpha[i], beta = a.beta[i];
      const bool good = alpha >= 0 && alpha <= float(kMostEvidence) && beta >= 0 && beta <= float(kMostEvidence);
      if (good && a.mode == ThompsonMode::mean) {
        draw = (alpha + 1) / ((alpha + 1) + (beta + 1));
        utility = expected_thompson_utility(a.utility, alpha + 1, beta + 1);
      } else if (good) {
        draw = beta_draw<float>(alpha, beta, a.seed, a.step, uint32_t(i));
        utility = thompson_utility(a.utility, draw);
      }
      if (a.draws) a.draws[i] = draw;
    }
    a.utilities[i] = eligible ? utility : -__builtin_inff();
  }
}

// The new counts of the selected prompts, of which the old ones are still there.
__global__ void __launch_bounds__(kThreads) selected_kernel(const BetaUpdateArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.selected) return;
  const int64_t id = a.ids[i], from = a.order ? a.order[i] : i;
  if (id < 0 || id >= a.count) return;
  const bool twice = (i > 0 && a.ids[i - 1] == id) || (i + 1 < a.selected && a.ids[i + 1] == id);
  const float s = a.successes[from], n = a.rollouts[from], lam1 = float(a.lam1);
  const bool good = !twice && s >= 0 && s <= n && n < __builtin_inff();
  a.scratch[2 * i] = good ? lam1 * a.alpha[id] + s : __builtin_nanf("");
  a.scratch[2 * i + 1] = good ? lam1 * a.beta[id] + (n - s) : __builtin_nanf("");
}

__global__ void __launch_bounds__(kThreads) decay_kernel(const BetaUpdateArgs<float> a) {
  const float lam2 = float(a.lam2);
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.count; i += threads) {
    a.alpha[i] *= lam2;
    a.beta[i] *= lam2;
  }
}

__global__ void __launch_bounds__(kThreads) scatter_kernel(const BetaUpdateArgs<float> a) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.selected) return;
  const int64_t id = a.ids[i];
  if (id < 0 || id >= a.count) return;
  a.alpha[id] = a.scratch[2 * i];
  a.beta[id] = a.scratch[2 * i + 1];
}

dim3 blocks_for(int64_t count) {
  const int64_t blocks = ceil_div(count, kThreads);
  return dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
}

}  // namespace

int cuda_beta_thompson(const ThompsonArgs<float>& a, void* stream) {
  if (a.count == 0) return 0;
  PK_LAUNCH(thompson_kernel, blocks_for(a.count), dim3(kThreads), static_cast<cudaStream_t>(stream), a);
  return static_cast<int>(cudaGetLastError());
}

int cuda_beta_update(const BetaUpdateArgs<float>& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 selected(static_cast<unsigned>(ceil_div(a.selected, kThreads)));
  if (a.selected > 0) PK_LAUNCH(selected_kernel, selected, dim3(kThreads), s, a);
  if (a.count > 0 && a.lam2 != 1) PK_LAUNCH(decay_kernel, blocks_for(a.count), dim3(kThreads), s, a);
  if (a.selected > 0) PK_LAUNCH(scatter_kernel, selected, dim3(kThreads), s, a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace prefkern
