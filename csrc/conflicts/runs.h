// Conflict runs and the weights made of them, for the CPU and for CUDA. A token of row i is in conflict if a row of its
// group whose advantage has the other sign has the same token at the same place. A row's forward run is how far it is in
// conflict from its first token on; its backward run is the same for rows that are read from their last tokens back.
//
// T is the type of the tokens: int64_t or int32_t. Nothing is as large as the vocabulary or the tokens.
#pragma once
#include "core/common.h"
#include "core/sequence.h"
#include "math/conflicts.h"

namespace prefkern {

template <class T> struct ConflictArgs {
  SequenceLayout layout;
  const T* tokens = nullptr;
  const float* advantages = nullptr;     // [B]; only the sign matters. One of the two is null.
  const double* advantages64 = nullptr;  // CPU only
  const int64_t* group = nullptr;        // ids [B]; sorted on CUDA
  const int64_t* order = nullptr;        // CUDA: row of each sorted id
  const uint8_t* mask = nullptr;         // shaped like tokens; null: every token counts
  // Outputs, [B] each. Rows with advantage 0 have no runs.
  int64_t *forward = nullptr, *backward = nullptr, *length = nullptr;
};

// S is the type of advantages and weights: float, or double on the CPU.
template <class S> struct ConflictWeightArgs {
  ConflictRule rule;
  SequenceLayout layout;
  const S* advantages = nullptr;  // [B]
  const int64_t *forward = nullptr, *backward = nullptr, *length = nullptr;  // [B]
  S* weights = nullptr;           // [tokens]
};

// The first row whose mask is not a run of True from its first token on, or -1.
PK_API int64_t cpu_conflict_runs(const ConflictArgs<int32_t>& args);
PK_API int64_t cpu_conflict_runs(const ConflictArgs<int64_t>& args);
PK_API void cpu_conflict_weights(const ConflictWeightArgs<float>& args);
PK_API void cpu_conflict_weights(const ConflictWeightArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A group with such a row, with a NaN advantage or with a sequence outside the
// tokens has runs 0 and lengths -1, and its weights are NaN.
PK_API int cuda_conflict_runs(const ConflictArgs<int32_t>& args, void* stream);
PK_API int cuda_conflict_runs(const ConflictArgs<int64_t>& args, void* stream);
PK_API int cuda_conflict_weights(const ConflictWeightArgs<float>& args, void* stream);

}  // namespace prefkern
