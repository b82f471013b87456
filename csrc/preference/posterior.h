// How likely the label of each pair is right, given its margin and its annotator's reliability, for the CPU and for CUDA:
// elementwise. Formula: math/preference.h. S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"

namespace prefkern {

template <class S> struct PosteriorArgs {
  int64_t pairs = 0, annotators = 1;
  const S *margin = nullptr, *reliability = nullptr;  // [pairs], [annotators]
  const int64_t* annotator = nullptr;                 // [pairs]; null: the first one's
  S* posterior = nullptr;                             // [pairs]
};

PK_API void cpu_label_posterior(const PosteriorArgs<float>& args);
PK_API void cpu_label_posterior(const PosteriorArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. An id that is none and a reliability outside [0, 1] come out NaN.
PK_API int cuda_label_posterior(const PosteriorArgs<float>& args, void* stream);

}  // namespace prefkern
