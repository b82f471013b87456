// Group statistics and advantages in one call, for the CPU and for CUDA. Groups are given by one id per reward: any
// values, in any order, groups of any sizes. A group is always summed in the order of its members in memory, so results
// do not depend on the number of threads.
//
// S is the element type: float, or double on the CPU. Statistics are in double either way.
#pragma once
#include "core/common.h"
#include "math/advantages.h"

namespace prefkern {

template <class S> struct GroupArgs {
  AdvantageRule rule;
  int64_t count = 0;                // B
  const S* rewards = nullptr;
  const int64_t* group = nullptr;   // ids; on CUDA with `order`: sorted
  const int64_t* order = nullptr;   // CUDA: row of each sorted id (a stable sort); null: ids are in the order of the rows
  // Outputs, [B] each.
  S *advantages = nullptr, *mean = nullptr, *std = nullptr;
  int64_t* sizes = nullptr;
};

// Rows from which sorting the ids first pays on CUDA; below, every row looks at every id.
constexpr int64_t kSortGroupsAbove = 4096;

// Index of the first reward that is not finite, or -1. Its group's rows are NaN.
PK_API int64_t cpu_group_advantages(const GroupArgs<float>& args);
PK_API int64_t cpu_group_advantages(const GroupArgs<double>& args);

// Enqueue on `stream`; returns a cudaError_t. Groups with a reward that is not finite come out NaN.
PK_API int cuda_group_advantages(const GroupArgs<float>& args, void* stream);

}  // namespace prefkern
