// Every operator of prefkern on one screen. torch.ops.prefkern.<name>; python/prefkern/ops has the documented functions,
// the fake (meta) implementations and the autograd formulas. CPU and CUDA share each implementation, which picks the
// kernels by the device of its tensors.
#include "advantages/ops.h"
#include "conflicts/ops.h"
#include "filters/ops.h"
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

  // ---- conflicts: runs are (forward, backward, length), int64 [B]; combine is the enumeration of math/conflicts.h.
  m.def(
      "conflict_runs(Tensor tokens, Tensor advantages, Tensor group, Tensor? mask, Tensor? cu_seqlens) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "conflict_weights(Tensor tokens, Tensor advantages, Tensor forward, Tensor backward, Tensor length, Tensor? cu_seqlens, "
      "float w_pos, float w_neg, int combine) -> Tensor");

  // ---- filters: interpolation is the enumeration of math/quantile.h; rule as in filters/ops.h. No gradients.
  m.def("masked_quantile(Tensor values, Tensor? mask, float q, int interpolation) -> Tensor");
  m.def("top_quantile_mask(Tensor values, Tensor? mask, float fraction, int rule) -> Tensor");

  // ---- policy: kind, agg and kl are the enumerations of math/policy.h (kl counted from its first penalty); results are
  // (loss, metrics, unnormalised, inverse_norm). Only logp has a gradient. The _fwd form has no autograd formula.
  m.def(
      "policy_loss(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? ref_logp, int kind, "
      "int agg, int kl, float eps_low, float eps_high, float dual_clip, float beta, float ratio_clamp, bool with_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "policy_loss_fwd(Tensor logp, Tensor old_logp, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? ref_logp, "
      "int kind, int agg, int kl, float eps_low, float eps_high, float dual_clip, float beta, float ratio_clamp, bool with_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("policy_loss_backward(Tensor g_loss, Tensor unnormalised, Tensor inverse_norm) -> Tensor");
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
    m.impl("conflict_runs", PK_OP(conflict_runs));                                    \
    m.impl("conflict_weights", PK_OP(conflict_weights));                              \
    m.impl("masked_quantile", PK_OP(masked_quantile));                                \
    m.impl("top_quantile_mask", PK_OP(top_quantile_mask));                            \
    m.impl("policy_loss", PK_OP(policy_loss));                                        \
    m.impl("policy_loss_fwd", PK_OP(policy_loss));                                    \
    m.impl("policy_loss_backward", PK_OP(policy_loss_backward));                      \
  }
PK_REGISTER(CPU)
PK_REGISTER(CUDA)
