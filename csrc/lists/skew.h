// A skew-symmetric score of two embeddings, alone or with its logistic loss, and the mean score of each embedding of a list
// against all of them, for the CPU and for CUDA. Formulas: math/lists.h. No table of all pairs is formed: the mean of the scores
// is the score against the mean.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "lists/row_loss.h"

namespace prefkern {

template <class S> struct SkewArgs {
  SkewRule rule;
  int64_t width = 0;  // of an embedding, 2k
  const S *left = nullptr, *right = nullptr;  // [rows, 2k]
  const S *scales = nullptr, *margin = nullptr;  // [rows, k], [rows]; null: 1, 0
  S *left_grad = nullptr, *right_grad = nullptr, *scales_grad = nullptr;  // of the row's loss; null when not wanted
  RowLoss<S> out;  // without a loss that of a row is its score; metrics: rows, mean probability, share of positive scores
};

template <class S> struct SkewMeansArgs {
  SkewRule rule;
  int64_t lists = 0, items = 0, width = 0;
  const S *embeddings = nullptr, *scales = nullptr;  // [lists, items, 2k], [lists, k]
  const uint8_t* mask = nullptr;  // [lists, items]
  S* means = nullptr;  // [lists, items]; 0 where an item does not count
  S* scratch = nullptr;  // CUDA: [lists, 2k]
};

PK_API void cpu_skew(const SkewArgs<float>& args);
PK_API void cpu_skew(const SkewArgs<double>& args);
PK_API void cpu_skew_means(const SkewMeansArgs<float>& args);
PK_API void cpu_skew_means(const SkewMeansArgs<double>& args);

// Enqueue; return a cudaError_t.
PK_API int cuda_skew(const SkewArgs<float>& args, void* stream);
PK_API int cuda_skew_means(const SkewMeansArgs<float>& args, void* stream);

}  // namespace prefkern
