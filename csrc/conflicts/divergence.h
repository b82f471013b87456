// Where the tokens of two sequences first differ, for pairs of sequences, for the CPU and for CUDA: the length of their common
// prefix. T is the type of the tokens: int64_t or int32_t.
#pragma once
#include "core/common.h"
#include "core/sequence.h"

namespace prefkern {

template <class T> struct DivergenceArgs {
  SequenceLayout layout_a, layout_b;                    // with equally many sequences
  const T *ids_a = nullptr, *ids_b = nullptr;
  const uint8_t *mask_a = nullptr, *mask_b = nullptr;   // a run of True from the first token on; null: every token counts
  int64_t* position = nullptr;                          // [sequences]
};

// A row whose mask is not such a run: 2 * row, plus 1 if it is that of b. -1: none.
PK_API int64_t cpu_first_divergence(const DivergenceArgs<int32_t>& args);
PK_API int64_t cpu_first_divergence(const DivergenceArgs<int64_t>& args);

// Enqueue on `stream`; return a cudaError_t. A pair with such a row, or with a wrong layout, gets -1.
PK_API int cuda_first_divergence(const DivergenceArgs<int32_t>& args, void* stream);
PK_API int cuda_first_divergence(const DivergenceArgs<int64_t>& args, void* stream);

}  // namespace prefkern
