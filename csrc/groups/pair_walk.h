// Loss and gradient of all pairs of rows of a group whose levels differ, for the CPU and for CUDA, without a list of pairs: a
// row has its derivative over all pairs it is in. Losses are added in a fixed order.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "groups/group_folds.h"

namespace prefkern {

template <class S> struct PairArgs {
  PairRule rule;
  GroupRows rows;
  const S* scores = nullptr;
  const int64_t* levels = nullptr;  // 1 is the best
  S* unnormalised = nullptr;  // [rows] derivative of the sum over pairs; null when not wanted
  S* loss = nullptr;  // [1] mean over the pairs
  int64_t* pairs = nullptr;  // [1] how many there are
  // CUDA: [rows, 2] losses and pairs of each row, and a counter that must be 0.
  double* partials = nullptr;
  uint32_t* finished = nullptr;
};

template <class S> struct PairGradArgs {
  int64_t count = 0;
  const S *unnormalised = nullptr, *upstream = nullptr;  // [count], [1]
  const int64_t* pairs = nullptr;  // [1]
  S* grad = nullptr;
};

PK_API void cpu_level_pairs(const PairArgs<float>& args);
PK_API void cpu_level_pairs(const PairArgs<double>& args);
PK_API void cpu_level_pairs_backward(const PairGradArgs<float>& args);
PK_API void cpu_level_pairs_backward(const PairGradArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A level below 1 makes the loss NaN, and the gradient in its group.
PK_API int cuda_level_pairs(const PairArgs<float>& args, void* stream);
PK_API int cuda_level_pairs_backward(const PairGradArgs<float>& args, void* stream);

}  // namespace prefkern
