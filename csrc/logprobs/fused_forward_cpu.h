// Functions that fused_forward_cpu.cpp exports once per instruction set.
#pragma once
#include "logprobs/logits_fold.h"

namespace prefkern {

// A plain row, raw logits with at most a factor, is folded per vector lane: as many softmaxes as a vector has lanes, joined at the
// end of a span, so that a slice of a row costs its exponentials and little else.
struct LaneFoldArgs {
  FoldArgs<float> fold;     // of a slice; its state is written at the end of the span
  float* lanes = nullptr;   // of the rows of the slice, `lane_state` each
};

struct FusedForwardCpu {
  int64_t lane_state;  // elements a row has between the slices of a span
  void (*begin)(const LaneFoldArgs&, int64_t row_begin, int64_t row_end);
  void (*fold)(const LaneFoldArgs&, int64_t row_begin, int64_t row_end);
  void (*end)(const LaneFoldArgs&, int64_t row_begin, int64_t row_end);
};

}  // namespace prefkern
