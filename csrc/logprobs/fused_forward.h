// The forward of a linear head on the CPU with the fold in the product's epilogue: rows of logits are folded as soon as they are
// made, while they are in the thread's own L2 cache, and nothing of them is kept. Threads meet twice in a call, and not at every
// block.
#pragma once
#include "logprobs/linear_head.h"

namespace prefkern {

// Whether it is for this head: own_gemm(), float accumulators, and nothing to be done to logits before the fold.
bool fuses_forward(const Head& h);
// Writes the outputs, or where there are none the rows' state [7, N].
void fused_forward(const Head& h, int64_t outputs, const HeadOutputs* out, const OptTensor& state);

}  // namespace prefkern
