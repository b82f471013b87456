// Functions that shard_merge_cpu.cpp exports once per instruction set.
#pragma once
#include "logprobs/shard_merge.h"

namespace prefkern {
struct ShardMergeCpu {
  void (*f32)(const ShardMergeArgs<float>&, int64_t row_begin, int64_t row_end);
  void (*f64)(const ShardMergeArgs<double>&, int64_t row_begin, int64_t row_end);
};
}  // namespace prefkern
