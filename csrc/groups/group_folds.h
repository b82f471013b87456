// Reductions and normalisation over the rows of each group, for the CPU and for CUDA. Groups are given by one id per row: any
// values, in any order, of any sizes. A group is always gone through in the same order, in double, so results do not depend
// on threads.
//
// S is the element type: float, or double on the CPU.
#pragma once
#include "core/common.h"
#include "core/groups.h"
#include "math/groups.h"

namespace prefkern {

// Which rows belong together. CUDA: ids in the order of the rows, or sorted, with the row of each in `order`.
struct GroupRows {
  int64_t count = 0;
  const int64_t* ids = nullptr;
  const int64_t* order = nullptr;
};

template <class S> struct GroupReduceArgs {
  GroupReduction reduction = GroupReduction::sum;
  GroupRows rows;
  const S* values = nullptr;
  const uint8_t* mask = nullptr;  // 0 = does not count; null = all count
  S* result = nullptr;            // of each row's group, whether or not the row counts
};

// z, and what the gradient needs to know: (s + eps)^-1 and the slope of math/groups.h, of each row's group.
template <class S> struct NormalizeArgs {
  NormalizeRule rule;
  GroupRows rows;
  const S* x = nullptr;
  S *z = nullptr, *scale = nullptr, *slope = nullptr;
};
template <class S> struct NormalizeGradArgs {
  GroupRows rows;
  const S *upstream = nullptr, *z = nullptr, *scale = nullptr, *slope = nullptr;
  S* grad = nullptr;
};

PK_API void cpu_group_reduce(const GroupReduceArgs<float>& args);
PK_API void cpu_group_reduce(const GroupReduceArgs<double>& args);
PK_API void cpu_group_normalize(const NormalizeArgs<float>& args);
PK_API void cpu_group_normalize(const NormalizeArgs<double>& args);
PK_API void cpu_group_normalize_backward(const NormalizeGradArgs<float>& args);
PK_API void cpu_group_normalize_backward(const NormalizeGradArgs<double>& args);

// Enqueue on `stream`; return a cudaError_t.
PK_API int cuda_group_reduce(const GroupReduceArgs<float>& args, void* stream);
PK_API int cuda_group_normalize(const NormalizeArgs<float>& args, void* stream);
PK_API int cuda_group_normalize_backward(const NormalizeGradArgs<float>& args, void* stream);

}  // namespace prefkern
