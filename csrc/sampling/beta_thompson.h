// Which prompts to roll out next: for each of M prompts a draw p of Beta(alpha + 1, beta + 1), what p is worth
// (math/thompson.h), and the k prompts that are worth most; of equal ones, the first. For the CPU and for CUDA.
//
// A draw depends on (seed, step, prompt) alone. On the CPU the counts are read once, utilities are never written to memory, and
// a thread keeps at most 2 k candidates. On CUDA the kernel writes the utilities, and the op sorts them.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "math/thompson.h"

namespace prefkern {

template <class S> struct ThompsonArgs {
  int64_t count = 0;  // M < 2^32
  const S *alpha = nullptr, *beta = nullptr;  // [M] counts, finite, in [0, kMostEvidence]
  const uint8_t* eligible = nullptr;  // [M]; null: all are
  ThompsonUtility utility = ThompsonUtility::p1mp2;
  ThompsonMode mode = ThompsonMode::thompson;
  uint64_t seed = 0;
  uint32_t step = 0;
  S* draws = nullptr;  // [M]: p, or with mode mean its expectation; null when not wanted
  S* utilities = nullptr;  // CUDA: [M]; -infinity where not eligible, NaN where a count is wrong
  int64_t k = 0;  // CPU
  int64_t* ids = nullptr;  // CPU: [k], utilities falling
  S* top = nullptr;  // CPU: [k] their utilities
  // CPU: [2] how many prompts are eligible, and the first of them with a wrong count, or -1. ids and top are written only if
  // there are k and no count is wrong.
  int64_t* found = nullptr;
};

PK_API void cpu_beta_thompson(const ThompsonArgs<float>& args);
PK_API void cpu_beta_thompson(const ThompsonArgs<double>& args);
PK_API int cuda_beta_thompson(const ThompsonArgs<float>& args, void* stream);  // enqueues; returns a cudaError_t

// Counts after a step: those of the selected prompts become lam1 count + successes and lam1 count + failures, all others
// lam2 count. In place; no prompt is selected twice.
template <class S> struct BetaUpdateArgs {
  int64_t count = 0, selected = 0;  // M, B
  S *alpha = nullptr, *beta = nullptr;  // [M]
  const int64_t* ids = nullptr;  // [B]; on CUDA ascending
  const int64_t* order = nullptr;  // CUDA: [B] where in successes and rollouts each id's are; null: where it is itself
  const S *successes = nullptr, *rollouts = nullptr;  // [B]
  double lam1 = 0, lam2 = 1;
  S* scratch = nullptr;  // [2 B]
};

PK_API void cpu_beta_update(const BetaUpdateArgs<float>& args);
PK_API void cpu_beta_update(const BetaUpdateArgs<double>& args);
// Ids outside [0, M) are passed over; an id that comes twice, and successes outside [0, n], make their prompt's counts NaN.
PK_API int cuda_beta_update(const BetaUpdateArgs<float>& args, void* stream);

}  // namespace prefkern
