// The backward of linear_logprobs over the rows that contribute, moved together on the device: 3 products of as many rows as
// there are of them, with no wait for their number.
#pragma once
#include "logprobs/linear_walk.h"

namespace prefkern {

// Whether this call takes it: what the device, the types, the options and the addresses allow, and cuda_backward() says. The
// targets of the head are ignore_index for rows that do not contribute.
bool takes_compact_backward(const Head& h);
HeadGrads compact_backward(const Head& h, const GradArgs<float>& upstream, int64_t needs);

}  // namespace prefkern
