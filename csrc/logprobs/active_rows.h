// The rows of a backward that contribute to it: those whose upstream gradients are not all exactly 0. Prompts, padding,
// clipped tokens and groups without variance are rows of the others.
#pragma once
#include "core/common.h"

namespace prefkern {

// out[row] = targets[row] where a gradient that is given is not 0 (NaN is not), else ignore_index.
template <class S> struct ActiveTargetsArgs {
  int64_t rows = 0;
  const int64_t* targets = nullptr;
  int64_t ignore_index = -100;
  const S *g_logp = nullptr, *g_entropy = nullptr, *g_lse = nullptr;  // null = zero
  int64_t* out = nullptr;
};

inline namespace PK_ISA {

template <class S> PK_HD int64_t active_target(const ActiveTargetsArgs<S>& a, int64_t row) {
  const bool active =
      (a.g_logp && a.g_logp[row] != 0) || (a.g_entropy && a.g_entropy[row] != 0) || (a.g_lse && a.g_lse[row] != 0);
  return active ? a.targets[row] : a.ignore_index;
}

}  // namespace PK_ISA

PK_API void cpu_active_targets(const ActiveTargetsArgs<float>& args);
PK_API void cpu_active_targets(const ActiveTargetsArgs<double>& args);
// Enqueues on `stream`; returns a cudaError_t.
PK_API int cuda_active_targets(const ActiveTargetsArgs<float>& args, void* stream);

// In place, rows of a matrix in host memory: row from[k] to row k; and back, row k to row to[k] of `total`, all others 0.
// The indices ascend.
void cpu_compact_rows(void* matrix, int64_t row_bytes, const int64_t* from, int64_t rows);
void cpu_spread_rows(void* matrix, int64_t row_bytes, const int64_t* to, int64_t rows, int64_t total);

}  // namespace prefkern
