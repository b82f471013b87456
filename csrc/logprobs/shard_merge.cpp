// CPU entry points: pick the instruction set, share the rows out over torch's threads.
#include "logprobs/shard_merge.h"

#include "core/isa.h"
#include "core/parallel.h"
#include "logprobs/shard_merge_cpu.h"

namespace prefkern {

PK_ISA_TABLE(ShardMergeCpu, shard_merge_cpu)

namespace {

constexpr int64_t kStatesPerTask = 1 << 11;

template <class S> void over_rows(const ShardMergeArgs<S>& args, void (*body)(const ShardMergeArgs<S>&, int64_t, int64_t)) {
  parallel_for(0, args.rows.block.rows, ceil_div(kStatesPerTask, args.shards),
               [&](int64_t begin, int64_t end) { body(args, begin, end); });
}

}  // namespace

void cpu_merge_shards(const ShardMergeArgs<float>& args) { over_rows(args, shard_merge_cpu().f32); }
void cpu_merge_shards(const ShardMergeArgs<double>& args) { over_rows(args, shard_merge_cpu().f64); }

}  // namespace prefkern
