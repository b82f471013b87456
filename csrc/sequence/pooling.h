// Means of values or of hidden states over the tokens of each step of each sequence, for the CPU and for CUDA, and their
// gradient. Pooling under a mask is the case of one step. Values are read once; nothing as large as they are is made but the
// gradient, which has their type. Tokens of no step are not read, and get the gradient 0.
//
// S is the type of sums and means: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "core/sequence.h"
#include "math/pooling.h"

namespace prefkern {

template <class S> struct PoolArgs {
  SequenceLayout layout;
  int64_t features = 1, steps = 1;
  bool clamp = false;
  DType dtype = DType::f32;         // of values and of the gradient
  RowMap rows;                      // where the features of a token begin in values
  const void* values = nullptr;
  const int64_t* ids = nullptr;     // one per token; one of the two is null
  const uint8_t* mask = nullptr;    // 0: no step, else step 1
  S* means = nullptr;               // [sequences, steps, features]; 0 for a step without tokens
  int64_t* counts = nullptr;        // [sequences, steps], how many tokens; an input of the backward
  const S* upstream = nullptr;      // backward: shaped like means, and the result, [tokens, features]
  void* grad = nullptr;
};

inline namespace PK_ISA {

template <class S> PK_HD int64_t token_step(const PoolArgs<S>& a, int64_t i) {
  return a.ids ? pooled_step(a.ids[i], a.steps, a.clamp) : a.mask[i] != 0;
}

}  // namespace PK_ISA

// No id may be refused.
PK_API void cpu_pool(const PoolArgs<float>& args);
PK_API void cpu_pool(const PoolArgs<double>& args);
PK_API void cpu_pool_backward(const PoolArgs<float>& args);
PK_API void cpu_pool_backward(const PoolArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t. A layout that is wrong makes everything NaN and counts -1; an id that is, its
// sequence.
PK_API int cuda_pool(const PoolArgs<float>& args, void* stream);
PK_API int cuda_pool_backward(const PoolArgs<float>& args, void* stream);

}  // namespace prefkern
