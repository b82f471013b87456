// Rows of a batch by the id of their group: any int64 ids, in any order, groups of any sizes.
//
// On the CPU: group_index. On CUDA the ids are sorted, stably, by torch (sort_ids in core/arguments.h), a warp or block
// takes one sorted position, leaves unless a group begins there, and finds the end by group_end.
#pragma once
#include <vector>

#include "core/common.h"

namespace prefkern {

// CUDA: up to so many rows the kernel looks through the ids itself, beyond they are sorted first.
constexpr int64_t kScanIdsUpTo = 4096;

// Group k has the rows order[offsets[k]] .. order[offsets[k + 1] - 1], in the order in which they lie in memory. Groups
// come in the order of their first rows.
struct GroupIndex {
  std::vector<int64_t> order, offsets;
  int64_t groups() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

PK_API GroupIndex group_index(const int64_t* ids, int64_t count);

}  // namespace prefkern
