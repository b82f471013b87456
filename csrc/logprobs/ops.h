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
// Bits of `needs` in linear_logprobs_backward; the last two in linear_logprobs_ext_backward only.
enum HeadGrad : int64_t { kGradHidden = 1, kGradWeight = 2, kGradBias = 4, kGradLoraA = 8, kGradLoraB = 16 };

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

// The same with inputs that few calls have. lora_a [r, H] and lora_b [V, r]: a low-rank update of the weight.
// logits_dtype: 0 for logits as they are accumulated; 1 or 2 rounds them to bfloat16 or float16. Row i keeps the tokens
// keep_ids[keep_offsets[i]] to before keep_ids[keep_offsets[i + 1]], ascending; all others count as logits of -inf.
HeadOutputs linear_logprobs_ext(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                                OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets,
                                OptTensor keep_ids, double temperature, double softcap, double logit_scale,
                                int64_t ignore_index, double lora_scale, int64_t logits_dtype, int64_t outputs,
                                int64_t chunk_bytes);

// Gradients of hidden, weight, bias, lora_a and lora_b.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_ext_backward(
    OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    OptTensor bias, OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets, OptTensor keep_ids,
    const Tensor& entropy, const Tensor& stats, double temperature, double softcap, double logit_scale, int64_t ignore_index,
    double lora_scale, int64_t logits_dtype, int64_t needs, int64_t chunk_bytes);

// The same with `saved`, which spares the backward its own logits. save 1: the raw logits, [N * V], in the type they are rounded to
// or that of hidden; save 2, of a frozen head on the CPU, without lora: the gradients of logp, entropy and lse, as far as they are
// outputs, in hidden, [K, N, H] in the accumulator type. outputs has kSaveStats.
using SavingOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
SavingOutputs linear_logprobs_saving(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                                     OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets,
                                     OptTensor keep_ids, double temperature, double softcap, double logit_scale,
                                     int64_t ignore_index, double lora_scale, int64_t logits_dtype, int64_t outputs,
                                     int64_t chunk_bytes, int64_t save);

// From saved logits; chunk_bytes is that of the forward.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_kept_backward(
    OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    OptTensor bias, OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets, OptTensor keep_ids,
    const Tensor& entropy, const Tensor& stats, const Tensor& logits, double temperature, double softcap, double logit_scale,
    int64_t ignore_index, double lora_scale, int64_t logits_dtype, int64_t needs, int64_t chunk_bytes);

// The gradient of hidden from saved row gradients, in `dtype`, a DType.
Tensor linear_logprobs_u_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& gradients,
                                  int64_t outputs, int64_t dtype);

// A chunk of rows whose logits are kept until the loss says what their gradient is, so that they are computed once. All of
// the vocabulary, block after block, goes to `workspace`, which holds at least N * V elements of the accumulator type;
// the backward, with the same arguments and the same workspace, overwrites it. d_hidden [N, H] and d_bias [V] have the
// accumulator type, and so has d_weight [V, H], or, where it is written rather than added to, the type of the weight. A row whose
// upstream gradients are all 0 contributes nothing, whatever it holds; on the CPU it costs nothing either.
HeadOutputs linear_chunk(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                         OptTensor row_temperature, Tensor workspace, double temperature, double softcap, double logit_scale,
                         int64_t ignore_index, int64_t outputs);

void linear_chunk_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& hidden, const Tensor& weight,
                           const Tensor& targets, OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                           const Tensor& stats, Tensor workspace, OptTensor d_hidden, OptTensor d_weight, OptTensor d_bias,
                           double temperature, double softcap, double logit_scale, int64_t ignore_index,
                           bool accumulate);  // into d_weight and d_bias

// linear_logprobs of a vocabulary that is cut into ranges of rows of the weight, as several processes hold it: the fold of one
// range, the join of all of them, and the backward of one range.
//
// `weight` and `bias` are rows [first_col, first_col + V_r) of a head of `vocab` rows; V_r may be 0. `targets` are ids in the
// whole vocabulary. The state [7, N], in the accumulator type, is that of logits_fold.h; rows that are ignored hold the state of
// no columns.
Tensor linear_shard(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                    OptTensor row_temperature, double temperature, double softcap, double logit_scale, int64_t ignore_index,
                    int64_t outputs, int64_t chunk_bytes, int64_t first_col, int64_t vocab);

// states [R, 7, N], the ranges in ascending order.
HeadOutputs merge_linear_shards(const Tensor& states, const Tensor& targets, OptTensor row_temperature, double temperature,
                                double softcap, double logit_scale, int64_t ignore_index, int64_t outputs, int64_t vocab);

// With the entropy and stats of the whole vocabulary: the range's share of d_hidden [N, H], in the accumulator type, to be
// summed over the ranges; d_weight [V_r, H] and d_bias [V_r] in their own types.
std::tuple<Tensor, Tensor, Tensor> linear_shard_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse,
                                                         const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                         OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                                                         const Tensor& stats, double temperature, double softcap,
                                                         double logit_scale, int64_t ignore_index, int64_t needs,
                                                         int64_t chunk_bytes, int64_t first_col, int64_t vocab);

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
