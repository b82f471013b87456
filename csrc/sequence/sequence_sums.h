// Weighted sums or means over the tokens of each sequence, sum_t w f(x - y), for the CPU and for CUDA, and their gradient
// in x. Tokens outside the mask add nothing, whatever they hold, and get the gradient 0.
//
// A sequence is always added up in the same order, so results do not depend on threads. S is the element type: float, or
// double on the CPU.
#pragma once
#include "core/common.h"
#include "core/sequence.h"
#include "math/sequence.h"

namespace prefkern {

template <class S> struct SequenceSumArgs {
  TokenTransform transform = TokenTransform::none;
  bool mean = false;
  SequenceLayout layout;
  const S *values = nullptr, *minus = nullptr, *weights = nullptr;  // x, y (null: 0) and w (null: 1), one per token
  const uint8_t* mask = nullptr;                                    // 0 = does not count; null = all count
  S* sums = nullptr;                                                // forward: [sequences]
  const S* upstream = nullptr;                                      // backward: [sequences], and the result, [tokens]
  S* grad = nullptr;
};

PK_API void cpu_sequence_sums(const SequenceSumArgs<float>& args);
PK_API void cpu_sequence_sums(const SequenceSumArgs<double>& args);
PK_API void cpu_sequence_sums_backward(const SequenceSumArgs<float>& args);
PK_API void cpu_sequence_sums_backward(const SequenceSumArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A layout that is wrong makes everything NaN.
PK_API int cuda_sequence_sums(const SequenceSumArgs<float>& args, void* stream);
PK_API int cuda_sequence_sums_backward(const SequenceSumArgs<float>& args, void* stream);

}  // namespace prefkern
