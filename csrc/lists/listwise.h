// The loss of lists of K scored items and its gradient, for the CPU and for CUDA. Formulas: math/lists.h. Memory is O(K) per
// list: no matrix of pairs. A list without two items that count and whose labels differ has loss 0 and does not count.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "lists/row_loss.h"

namespace prefkern {

template <class S> struct ListArgs {
  ListRule rule;
  int64_t items = 0;              // K
  const S *scores = nullptr, *labels = nullptr;  // [rows, K]; labels null: the first item is the best
  const uint8_t* mask = nullptr;  // [rows, K], 0 = does not count; null = all count
  S* unnormalised = nullptr;      // [rows, K] derivative of the row's loss; null when not wanted
  RowLoss<S> out;  // metrics: lists that count, share of them whose highest score has the best label, items of one
  float* scratch = nullptr;  // CUDA, plackett_luce and lambda: [rows, K, 3]
};

PK_API void cpu_listwise(const ListArgs<float>& args);
PK_API void cpu_listwise(const ListArgs<double>& args);

// Enqueues; returns a cudaError_t. A label that is not finite, or too large for its gain, makes its list NaN.
PK_API int cuda_listwise(const ListArgs<float>& args, void* stream);

}  // namespace prefkern
