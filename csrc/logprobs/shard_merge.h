// Joins the row states of a vocabulary's column ranges and writes the outputs: what fold_logits does after its last block,
// where the blocks were folded by several processes. The ranges are joined in ascending order, so whoever joins the same
// states gets the same bits.
#pragma once
#include "logprobs/logits_fold.h"

namespace prefkern {

template <class S> struct ShardMergeArgs {
  FoldArgs<S> rows;  // block.rows, vocab, targets, ignore_index and transform, the state of the first range, the outputs
  int64_t shards = 0;  // at least 1
  int64_t shard_stride = 0;  // elements from one range's state to the next
};

inline namespace PK_ISA {

// A target outside the vocabulary gives NaN: on the CPU none comes here.
template <class S> PK_HD void merge_row(const ShardMergeArgs<S>& m, int64_t row) {
  const FoldArgs<S>& a = m.rows;
  const LogitBlock<S>& b = a.block;
  const int64_t target = b.targets[row];
  if (target == b.ignore_index) return write_outputs(a, row, SoftmaxOutputs<S>{}, S(0));
  const S factor = logit_factor(b.transform, row), k = factor * S(kLog2E);
  SoftmaxRow<S> joined = load_state(a, row);
  for (int64_t i = 1; i < m.shards; i++) joined = softmax_join(joined, load_state(a, row + i * m.shard_stride), k);
  const bool valid = target >= 0 && target < b.vocab;
  if (!valid) joined.s = S(__builtin_nanf(""));
  SoftmaxOutputs<S> o = softmax_finish(joined, factor, b.vocab);
  if (!valid) o.mean_logit = o.sum_sq_probs = joined.s;
  write_outputs(a, row, o, joined.max);
}

}  // namespace PK_ISA

PK_API void cpu_merge_shards(const ShardMergeArgs<float>& args);
PK_API void cpu_merge_shards(const ShardMergeArgs<double>& args);

// Enqueues on `stream`; returns a cudaError_t.
PK_API int cuda_merge_shards(const ShardMergeArgs<float>& args, void* stream);

}  // namespace prefkern
