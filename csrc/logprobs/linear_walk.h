// The walks behind linear_logprobs and behind a range of its vocabulary.
#pragma once
#include "logprobs/linear_head.h"

namespace prefkern {

// A call's arguments, as they were given.
struct HeadInputs {
  const Tensor &hidden, &weight, &targets;
  const OptTensor &bias, &row_temperature;
  HeadOptions options;
  int64_t chunk_bytes;
  HeadExtras extras = {};
  std::optional<VocabRange> range = std::nullopt;  // where the weight is a part; it may then have no rows
};

// Without elements where not asked for. Of a range, the gradient of hidden is in the accumulator type: others are to be added.
struct HeadGrads {
  Tensor hidden, weight, bias, lora_a, lora_b;
};

struct UpstreamInputs {
  const OptTensor &logp, &entropy, &lse;
};

HeadOutputs head_forward(const HeadInputs& in, int64_t outputs);
// [7, N]: the rows' state (load_state) after this range.
Tensor head_state(const HeadInputs& in, int64_t outputs);
HeadGrads head_backward(const HeadInputs& in, const UpstreamInputs& upstream, const Tensor& entropy, const Tensor& stats,
                        int64_t needs);

}  // namespace prefkern
