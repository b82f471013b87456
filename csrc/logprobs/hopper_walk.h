// linear_logprobs' forward through the kernel of hopper_forward.h.
#pragma once
#include "logprobs/linear_head.h"

namespace prefkern {

// Whether this call takes that kernel: the device, the types, the options and the addresses allow it, and so does cuda_forward().
bool takes_hopper(const Head& h, int64_t outputs);
// Writes the outputs, or where there are none leaves the rows' state [7, N].
void hopper_walk(const Head& h, int64_t outputs, const HeadOutputs* out, const OptTensor& state);

}  // namespace prefkern
