// The CPU walk of shard_merge.h: row by row.
#include "logprobs/shard_merge_cpu.h"

namespace prefkern {
inline namespace PK_ISA {
namespace {

template <class S> void merge_rows(const ShardMergeArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) merge_row(a, row);
}

}  // namespace

extern const ShardMergeCpu shard_merge_cpu;
const ShardMergeCpu shard_merge_cpu = {&merge_rows<float>, &merge_rows<double>};

}  // namespace PK_ISA
}  // namespace prefkern
