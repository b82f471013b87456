// Every operator of prefkern on one screen. torch.ops.prefkern.<name>; python/prefkern/ops has the documented functions,
// the fake (meta) implementations and the autograd formulas. CPU and CUDA share each implementation, which picks the
// kernels by the device of its tensors.
#include "advantages/ops.h"
#include "logprobs/ops.h"
#include "policy/ops.h"

using namespace prefkern;

STABLE_TORCH_LIBRARY(prefkern, m) {
  // ---- logprobs: outputs and needs are the bit sets of logprobs/ops.h; results are (logp, entropy, lse, sum_sq_probs,
  // mean_logit, is_top1, stats). The _fwd form has no autograd formula: what runs where nothing needs a gradient.
  m.def(
      "linear_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, float temperature, "
      "float softcap, float logit_scale, int ignore_index, int outputs, int chunk_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
      "float temperature, float softcap, float logit_scale, int ignore_index, int outputs, int chunk_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_backward(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor hidden, Tensor weight, Tensor targets, "
      "Tensor? bias, Tensor? row_temperature, Tensor entropy, Tensor stats, float temperature, float softcap, float logit_scale, "
      "int ignore_index, int needs, int chunk_bytes) -> (Tensor, Tensor, Tensor)");
  m.def(
      "logits_logprobs(Tensor logits, Tensor targets, Tensor? row_temperature, float temperature, float softcap, "
      "float logit_scale, int ignore_index, int outputs, bool inplace_backward) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "logits_logprobs_fwd(Tensor logits, Tensor targets, Tensor? row_temperature, float temperature, float softcap, "
      "float logit_scale, int ignore_index, int outputs, bool inplace_backward) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "logits_logprobs_backward(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor logits, Tensor targets, "
      "Tensor? row_temperature, Tensor entropy, Tensor stats, float temperature, float softcap, float logit_scale, "
      "int ignore_index) -> Tensor");
  m.def(
      "logits_logprobs_backward_(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor(a!) logits, Tensor targets, "
      "Tensor? row_temperature, Tensor entropy, Tensor stats, float temperature, float softcap, float logit_scale, "
      "int ignore_index) -> ()");

  // ---- advantages: estimator and singleton are the enumerations of math/advantages.h; results are (advantages, mean,
  // std, count), each [B]. Rewards are constants: no gradient.
  m.def(
      "group_advantages(Tensor rewards, Tensor group, int estimator, float eps, int singleton) -> (Tensor, Tensor, Tensor, Tensor)");

  // ---- policy: kind, agg and kl are the enumerations of math/policy.h (kl counted from its first penalty), flags those of
  // policy/ops.h; results are (loss, metrics, unnormalised, inverse_norm). Only logp has a gradient. The _fwd form has no
  // autograd formula. level and mode are the enumerations of math/importance.h; results are constants.
  m.def(
      "policy_loss(Tensor logp, Tensor? old_logp, Tensor? advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? ref_logp, "
      "Tensor? token_weight, Tensor? lows, Tensor? highs, Tensor? anchor, Tensor? entropy, Tensor? norm_tensor, int kind, "
      "int agg, int kl, int flags, float eps_low, float eps_high, float dual_clip, float delta, float tau_pos, float tau_neg, "
      "float clamp_low, float clamp_high, float beta, float kl_clamp, float anchor_gamma, float scale, float norm, "
      "bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "policy_loss_fwd(Tensor logp, Tensor? old_logp, Tensor? advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? ref_logp, "
      "Tensor? token_weight, Tensor? lows, Tensor? highs, Tensor? anchor, Tensor? entropy, Tensor? norm_tensor, int kind, "
      "int agg, int kl, int flags, float eps_low, float eps_high, float dual_clip, float delta, float tau_pos, float tau_neg, "
      "float clamp_low, float clamp_high, float beta, float kl_clamp, float anchor_gamma, float scale, float norm, "
      "bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("policy_loss_backward(Tensor g_loss, Tensor unnormalised, Tensor inverse_norm) -> Tensor");
  m.def(
      "importance_weights(Tensor old_logp, Tensor rollout_logp, Tensor? mask, Tensor? cu_seqlens, int level, int mode, "
      "float clip_min, float clip_max, float log_clamp, bool normalize) -> Tensor");
  m.def(
      "off_policy_mask(Tensor advantages, Tensor logp, Tensor rollout_logp, Tensor? mask, Tensor? cu_seqlens, float threshold) "
      "-> Tensor");
}

#define PK_REGISTER(key)                                                              \
  STABLE_TORCH_LIBRARY_IMPL(prefkern, key, m) {                                       \
    m.impl("linear_logprobs", PK_OP(linear_logprobs));                                \
    m.impl("linear_logprobs_fwd", PK_OP(linear_logprobs));                            \
    m.impl("linear_logprobs_backward", PK_OP(linear_logprobs_backward));              \
    m.impl("logits_logprobs", PK_OP(logits_logprobs));                                \
    m.impl("logits_logprobs_fwd", PK_OP(logits_logprobs));                            \
    m.impl("logits_logprobs_backward", PK_OP(logits_logprobs_backward));              \
    m.impl("logits_logprobs_backward_", PK_OP(logits_logprobs_backward_inplace));     \
    m.impl("group_advantages", PK_OP(group_advantages));                              \
    m.impl("policy_loss", PK_OP(policy_loss));                                        \
    m.impl("policy_loss_fwd", PK_OP(policy_loss));                                    \
    m.impl("policy_loss_backward", PK_OP(policy_loss_backward));                      \
    m.impl("importance_weights", PK_OP(importance_weights));                          \
    m.impl("off_policy_mask", PK_OP(off_policy_mask));                                \
  }
PK_REGISTER(CPU)
PK_REGISTER(CUDA)
