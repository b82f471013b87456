// The inner loss of a learned policy update over N rows (math/meta.h), its gradients, and the gradients of those, for the CPU and
// for CUDA. Each is one pass: what a row gives stays in registers. Sums are added in double, in blocks of kLpgBlock rows whatever
// the threads.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "math/meta.h"

namespace prefkern {

constexpr int64_t kLpgBlock = 256;  // rows
enum LpgSum : int { kLpgPolicy, kLpgDivergence, kLpgSums };

template <class S> struct LpgArgs {
  LpgRule rule;
  int64_t rows = 0, actions = 0, width = 0;  // N, A, W
  const S* probs = nullptr;  // [N, A]
  const int64_t* taken = nullptr;  // [N], in [0, A); on CUDA another one makes its row NaN
  const S *y = nullptr, *target = nullptr;  // [N, W]
  const S* adjustment = nullptr;  // [N]
  double* sums = nullptr;  // [blocks of rows, kLpgSums] of scratch
  uint32_t* finished = nullptr;  // CUDA: a counter that must be 0
  S* out = nullptr;  // [1], the loss; of second derivatives that by the upstream gradient
  S* terms = nullptr;  // [2], forward: the means of log(p + e) q and of the divergence

  // Backwards. Gradients are null where nobody wants them.
  const S* upstream = nullptr;  // [1]
  S *probs_grad = nullptr, *y_grad = nullptr, *adjustment_grad = nullptr, *target_grad = nullptr;
  // Second derivatives: what comes from above the four gradients; null for 0.
  const S *above_probs = nullptr, *above_y = nullptr, *above_adjustment = nullptr, *above_target = nullptr;
};

PK_API void cpu_lpg_loss(const LpgArgs<float>& args);
PK_API void cpu_lpg_loss(const LpgArgs<double>& args);
PK_API void cpu_lpg_gradients(const LpgArgs<float>& args);
PK_API void cpu_lpg_gradients(const LpgArgs<double>& args);
PK_API void cpu_lpg_second(const LpgArgs<float>& args);
PK_API void cpu_lpg_second(const LpgArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t.
PK_API int cuda_lpg_loss(const LpgArgs<float>& args, void* stream);
PK_API int cuda_lpg_gradients(const LpgArgs<float>& args, void* stream);
PK_API int cuda_lpg_second(const LpgArgs<float>& args, void* stream);

}  // namespace prefkern
