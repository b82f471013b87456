// The loss of two groups of scored responses to one prompt, winners and losers, and its gradient: their means are compared, the
// spread of the winners is penalised. For the CPU and for CUDA; formulas: math/lists.h. A row without a winner or without a
// loser has loss 0 and does not count.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "lists/row_loss.h"

namespace prefkern {

template <class S> struct GroupPreferenceArgs {
  GroupPreferenceRule rule;
  int64_t items = 0;  // G
  const S* scores = nullptr;  // [rows, G]
  const uint8_t *winner = nullptr, *mask = nullptr;  // [rows, G]; mask null = all count
  S* unnormalised = nullptr;  // [rows, G] derivative of the row's loss; null when not wanted
  RowLoss<S> out;  // metrics: rows that count, mean of both terms
};

PK_API void cpu_group_preference(const GroupPreferenceArgs<float>& args);
PK_API void cpu_group_preference(const GroupPreferenceArgs<double>& args);
PK_API int cuda_group_preference(const GroupPreferenceArgs<float>& args, void* stream);  // enqueues; returns a cudaError_t

}  // namespace prefkern
