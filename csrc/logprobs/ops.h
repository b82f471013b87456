// Operators of this room, as registered in library.cpp.
#pragma once
#include "core/tensor.h"

namespace prefkern {

// Bits of `outputs`.
enum HeadOutput : int64_t {
  kEntropy = 1,
  kLse = 2,
  kSumSqProbs = 4,
  kMeanLogit = 8,
  kIsTop1 = 16,
  kSaveStats = 32,  // row maximum and log2 of the sum, for the backward
};
// Bits of `needs` in linear_logprobs_backward.
enum HeadGrad : int64_t { kGradHidden = 1, kGradWeight = 2, kGradBias = 4 };

// logp, entropy, lse, sum_sq_probs, mean_logit, is_top1, stats [2, N]; what is not asked for has no elements.
using HeadOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

HeadOutputs linear_logprobs(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                            OptTensor row_temperature, double temperature, double softcap, double logit_scale,
                            int64_t ignore_index, int64_t outputs, int64_t chunk_bytes);

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse,
                                                            const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                            OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                                                            const Tensor& stats, double temperature, double softcap,
                                                            double logit_scale, int64_t ignore_index, int64_t needs,
                                                            int64_t chunk_bytes);

HeadOutputs logits_logprobs(const Tensor& logits, const Tensor& targets, OptTensor row_temperature, double temperature,
                            double softcap, double logit_scale, int64_t ignore_index, int64_t outputs,
                            bool inplace_backward);  // checks that the logits can take their gradient

Tensor logits_logprobs_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& logits,
                                const Tensor& targets, OptTensor row_temperature, const Tensor& entropy, const Tensor& stats,
                                double temperature, double softcap, double logit_scale, int64_t ignore_index);

// The same into the logits' own memory.
void logits_logprobs_backward_inplace(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, Tensor logits,
                                      const Tensor& targets, OptTensor row_temperature, const Tensor& entropy,
                                      const Tensor& stats, double temperature, double softcap, double logit_scale,
                                      int64_t ignore_index);

}  // namespace prefkern
