// linear_logprobs: log-probabilities of targets under softmax(hidden @ weight.T), with no [N, V] tensor anywhere. How:
// linear_walk.cpp.
#include "logprobs/linear_walk.h"

namespace prefkern {

HeadOutputs linear_logprobs(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                            OptTensor row_temperature, double temperature, double softcap, double logit_scale,
                            int64_t ignore_index, int64_t outputs, int64_t chunk_bytes) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  return head_forward({hidden, weight, targets, bias, row_temperature, options, chunk_bytes}, outputs);
}

std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse,
                                                            const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                            OptTensor bias, OptTensor row_temperature, const Tensor& entropy,
                                                            const Tensor& stats, double temperature, double softcap,
                                                            double logit_scale, int64_t ignore_index, int64_t needs,
                                                            int64_t chunk_bytes) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const HeadGrads g = head_backward({hidden, weight, targets, bias, row_temperature, options, chunk_bytes},
                                    {g_logp, g_entropy, g_lse}, entropy, stats, needs);
  return {g.hidden, g.weight, g.bias};
}

HeadOutputs linear_logprobs_ext(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                                OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets,
                                OptTensor keep_ids, double temperature, double softcap, double logit_scale,
                                int64_t ignore_index, double lora_scale, int64_t logits_dtype, int64_t outputs,
                                int64_t chunk_bytes) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const HeadExtras extras{lora_a, lora_b, lora_scale, logits_dtype, keep_offsets, keep_ids};
  return head_forward({hidden, weight, targets, bias, row_temperature, options, chunk_bytes, extras}, outputs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_ext_backward(
    OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    OptTensor bias, OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets, OptTensor keep_ids,
    const Tensor& entropy, const Tensor& stats, double temperature, double softcap, double logit_scale, int64_t ignore_index,
    double lora_scale, int64_t logits_dtype, int64_t needs, int64_t chunk_bytes) {
  if (!lora_a) needs &= ~int64_t(kGradLoraA | kGradLoraB);
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const HeadExtras extras{lora_a, lora_b, lora_scale, logits_dtype, keep_offsets, keep_ids};
  const HeadGrads g = head_backward({hidden, weight, targets, bias, row_temperature, options, chunk_bytes, extras},
                                    {g_logp, g_entropy, g_lse}, entropy, stats, needs);
  return {g.hidden, g.weight, g.bias, g.lora_a, g.lora_b};
}

SavingOutputs linear_logprobs_saving(const Tensor& hidden, const Tensor& weight, const Tensor& targets, OptTensor bias,
                                     OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets,
                                     OptTensor keep_ids, double temperature, double softcap, double logit_scale,
                                     int64_t ignore_index, double lora_scale, int64_t logits_dtype, int64_t outputs,
                                     int64_t chunk_bytes, int64_t save) {
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const HeadExtras extras{lora_a, lora_b, lora_scale, logits_dtype, keep_offsets, keep_ids};
  Tensor saved;
  const HeadOutputs out = head_forward_saving({hidden, weight, targets, bias, row_temperature, options, chunk_bytes, extras},
                                              outputs, Save(save), saved);
  return std::tuple_cat(out, std::tuple<Tensor>(saved));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs_kept_backward(
    OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    OptTensor bias, OptTensor row_temperature, OptTensor lora_a, OptTensor lora_b, OptTensor keep_offsets, OptTensor keep_ids,
    const Tensor& entropy, const Tensor& stats, const Tensor& logits, double temperature, double softcap, double logit_scale,
    int64_t ignore_index, double lora_scale, int64_t logits_dtype, int64_t needs, int64_t chunk_bytes) {
  if (!lora_a) needs &= ~int64_t(kGradLoraA | kGradLoraB);
  const HeadOptions options{temperature, softcap, logit_scale, ignore_index};
  const HeadExtras extras{lora_a, lora_b, lora_scale, logits_dtype, keep_offsets, keep_ids};
  const HeadGrads g = head_backward({hidden, weight, targets, bias, row_temperature, options, chunk_bytes, extras},
                                    {g_logp, g_entropy, g_lse}, entropy, stats, needs, logits);
  return {g.hidden, g.weight, g.bias, g.lora_a, g.lora_b};
}

Tensor linear_logprobs_u_backward(OptTensor g_logp, OptTensor g_entropy, OptTensor g_lse, const Tensor& gradients,
                                  int64_t outputs, int64_t dtype) {
  return head_row_backward({g_logp, g_entropy, g_lse}, gradients, outputs, DType(dtype));
}

}  // namespace prefkern
