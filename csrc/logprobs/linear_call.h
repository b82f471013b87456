// What the forward and the backward of a linear head do before they walk: the arguments, checked; the rows that count; the plan.
#pragma once
#include "logprobs/linear_walk.h"

namespace prefkern {

// What the arguments were found to be.
struct Checked {
  Tensor targets;
  OptTensor row_temperature;
  std::optional<KeptTokens> keep;
  DType acc;
  int64_t rows;
  bool nothing;  // counts, or there are no columns
  OptTensor active;  // the rows that count, where not all do and somebody may ask
};

Checked check(const HeadInputs& in);

// How a walk over so many rows of this head is cut.
ChunkPlan plan_of(const Head& h, int64_t rows, int64_t chunk_bytes, bool backward);
// The head of the rows that count, with its plan. A forward that keeps its logits takes the blocks of its backward.
Head head_of(const HeadInputs& in, const Checked& c, const Tensor& hidden, bool backward);

// The upstream gradient of log-probs, without those of targets that are not kept.
OptTensor of_kept_targets(const OptTensor& g, const std::optional<KeptTokens>& keep, const Tensor& targets);

template <class F> void for_blocks(const Head& h, F&& body) {
  for (int64_t v = 0; v < h.vocab; v += h.plan.vocab_block)
    for (int64_t r = 0; r < h.rows; r += h.plan.row_chunk)
      body(v, std::min(h.plan.vocab_block, h.vocab - v), r, std::min(h.plan.row_chunk, h.rows - r));
}

}  // namespace prefkern
