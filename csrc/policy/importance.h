// Importance weights per token, and the choice of sequences by their mismatch, for the CPU and for CUDA. Formulas:
// math/importance.h. Sums are formed per sequence (CPU) or block (CUDA) and added in a fixed order.
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "core/sequence.h"
#include "math/importance.h"

namespace prefkern {

// Outside the mask weights are 0.
template <class S> struct WeightArgs {
  WeightOptions options;
  SequenceLayout layout;
  const S *old_logp = nullptr, *rollout_logp = nullptr;  // [tokens]
  const uint8_t* mask = nullptr;                         // [tokens], 0 = does not count; null = all count
  S* weights = nullptr;                                  // [tokens]
  // CUDA: how many blocks share a sequence; [sequences * slices, 2] and [sequences + 2] of scratch; a counter that is 0.
  int64_t slices = 1;
  float *partials = nullptr, *row_weights = nullptr;
  uint32_t* finished = nullptr;
};

template <class S> struct OffPolicyArgs {
  SequenceLayout layout;
  double threshold = 0;
  const S* advantages = nullptr;                         // [sequences]
  const S *logp = nullptr, *rollout_logp = nullptr;      // [tokens]
  const uint8_t* mask = nullptr;
  uint8_t* keep = nullptr;                               // [sequences]
  int64_t slices = 1;
  float* partials = nullptr;  // [sequences * slices, 2]
  uint32_t* finished = nullptr;
};

PK_API void cpu_importance_weights(const WeightArgs<float>& args);
PK_API void cpu_importance_weights(const WeightArgs<double>& args);
PK_API void cpu_off_policy_mask(const OffPolicyArgs<float>& args);
PK_API void cpu_off_policy_mask(const OffPolicyArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. Of a layout that is wrong all weights of sequences come out NaN, and no
// sequence is kept.
PK_API int cuda_importance_weights(const WeightArgs<float>& args, void* stream);
PK_API int cuda_off_policy_mask(const OffPolicyArgs<float>& args, void* stream);

}  // namespace prefkern
