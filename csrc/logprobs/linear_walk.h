// The walks behind linear_logprobs and behind a range of its vocabulary.
#pragma once
#include "logprobs/linear_saved.h"

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
// The same, and `saved`: logits [N * V] in their kept type, or row gradients [K, N, H] in the accumulator type.
HeadOutputs head_forward_saving(const HeadInputs& in, int64_t outputs, Save save, Tensor& saved);
// [7, N]: the rows' state (load_state) after this range.
Tensor head_state(const HeadInputs& in, int64_t outputs);
// From the logits that head_forward_saving kept, or without them.
HeadGrads head_backward(const HeadInputs& in, const UpstreamInputs& upstream, const Tensor& entropy, const Tensor& stats,
                        int64_t needs, const OptTensor& kept = std::nullopt);
// The gradient of hidden from the row gradients of a forward with these outputs, in this type.
Tensor head_row_backward(const UpstreamInputs& upstream, const Tensor& gradients, int64_t outputs, DType type);

}  // namespace prefkern
