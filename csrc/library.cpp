// Every operator of prefkern on one screen. torch.ops.prefkern.<name>; python/prefkern/ops has the documented functions,
// the fake (meta) implementations and the autograd formulas. CPU and CUDA share each implementation, which picks the
// kernels by the device of its tensors.
#include "advantages/ops.h"
#include "groups/ops.h"
#include "conflicts/ops.h"
#include "diversity/ops.h"
#include "diffusion/ops.h"
#include "filters/ops.h"
#include "gaussian/ops.h"
#include "lists/ops.h"
#include "logprobs/ops.h"
#include "meta/ops.h"
#include "policy/ops.h"
#include "preference/ops.h"
#include "sampling/ops.h"
#include "sequence/ops.h"

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
  // With inputs that few calls have: the plain op stays as quick to call as it is.
  m.def(
      "linear_logprobs_ext(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, Tensor? lora_a, "
      "Tensor? lora_b, Tensor? keep_offsets, Tensor? keep_ids, float temperature, float softcap, float logit_scale, "
      "int ignore_index, float lora_scale, int logits_dtype, int outputs, int chunk_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_ext_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
      "Tensor? lora_a, Tensor? lora_b, Tensor? keep_offsets, Tensor? keep_ids, float temperature, float softcap, "
      "float logit_scale, int ignore_index, float lora_scale, int logits_dtype, int outputs, int chunk_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_ext_backward(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor hidden, Tensor weight, "
      "Tensor targets, Tensor? bias, Tensor? row_temperature, Tensor? lora_a, Tensor? lora_b, Tensor? keep_offsets, "
      "Tensor? keep_ids, Tensor entropy, Tensor stats, float temperature, float softcap, float logit_scale, int ignore_index, "
      "float lora_scale, int logits_dtype, int needs, int chunk_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // And with what the backward needs not compute again; save is Save of logprobs/linear_saved.h.
  m.def(
      "linear_logprobs_saving(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
      "Tensor? lora_a, Tensor? lora_b, Tensor? keep_offsets, Tensor? keep_ids, float temperature, float softcap, "
      "float logit_scale, int ignore_index, float lora_scale, int logits_dtype, int outputs, int chunk_bytes, int save) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_saving_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
      "Tensor? lora_a, Tensor? lora_b, Tensor? keep_offsets, Tensor? keep_ids, float temperature, float softcap, "
      "float logit_scale, int ignore_index, float lora_scale, int logits_dtype, int outputs, int chunk_bytes, int save) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_kept_backward(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor hidden, Tensor weight, "
      "Tensor targets, Tensor? bias, Tensor? row_temperature, Tensor? lora_a, Tensor? lora_b, Tensor? keep_offsets, "
      "Tensor? keep_ids, Tensor entropy, Tensor stats, Tensor logits, float temperature, float softcap, float logit_scale, "
      "int ignore_index, float lora_scale, int logits_dtype, int needs, int chunk_bytes) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprobs_u_backward(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor gradients, int outputs, int dtype) "
      "-> Tensor");
  m.def(
      "linear_chunk_(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, Tensor(a!) workspace, "
      "float temperature, float softcap, float logit_scale, int ignore_index, int outputs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_chunk_backward_(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor hidden, Tensor weight, Tensor targets, "
      "Tensor? bias, Tensor? row_temperature, Tensor entropy, Tensor stats, Tensor(a!) workspace, Tensor(b!)? d_hidden, "
      "Tensor(c!)? d_weight, Tensor(d!)? d_bias, float temperature, float softcap, float logit_scale, int ignore_index, "
      "bool accumulate) -> ()");
  m.def(
      "linear_shard(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, float temperature, "
      "float softcap, float logit_scale, int ignore_index, int outputs, int chunk_bytes, int first_col, int vocab) -> Tensor");
  m.def(
      "merge_linear_shards(Tensor states, Tensor targets, Tensor? row_temperature, float temperature, float softcap, "
      "float logit_scale, int ignore_index, int outputs, int vocab) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_shard_backward(Tensor? g_logp, Tensor? g_entropy, Tensor? g_lse, Tensor hidden, Tensor weight, Tensor targets, "
      "Tensor? bias, Tensor? row_temperature, Tensor entropy, Tensor stats, float temperature, float softcap, float logit_scale, "
      "int ignore_index, int needs, int chunk_bytes, int first_col, int vocab) -> (Tensor, Tensor, Tensor)");
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

  // ---- advantages: estimator, singleton, nan, batch and mode are the enumerations of math/advantages.h, combine 0 adds the
  // columns up first; outputs is the bit set of advantages/ops.h. Rewards are constants: no gradient.
  m.def(
      "group_advantages(Tensor rewards, Tensor group, Tensor? weights, Tensor? lengths, int estimator, int singleton, int ddof, "
      "float eps, int combine, int nan, float virtual_value, int virtual_count, int batch, float batch_eps) -> Tensor");
  m.def(
      "group_advantages_stats(Tensor rewards, Tensor group, Tensor? weights, Tensor? lengths, int estimator, int singleton, "
      "int ddof, float eps, int combine, int nan, float virtual_value, int virtual_count, int batch, float batch_eps, int outputs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("batch_moments(Tensor values, Tensor? weights) -> Tensor");
  m.def("merge_moments(Tensor moments) -> Tensor");
  m.def("batch_normalize(Tensor values, Tensor moments, Tensor? mask, int mode, float eps) -> Tensor");
  m.def(
      "question_weights(Tensor rewards, Tensor group, Tensor? lengths, Tensor? main_rewards, float temperature, float tol, "
      "bool zero_accuracy_as_easy) -> (Tensor, Tensor, Tensor)");
  m.def(
      "pair_masked_advantages(Tensor rewards, Tensor scores, Tensor group, float tau, int mode, int level, float eps, int ddof, "
      "int sigma, bool renormalise) -> (Tensor, Tensor, Tensor)");

  // ---- conflicts: runs are (forward, backward, length), int64 [B]; combine is the enumeration of math/conflicts.h.
  m.def(
      "conflict_runs(Tensor tokens, Tensor advantages, Tensor group, Tensor? mask, Tensor? cu_seqlens) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "conflict_weights(Tensor tokens, Tensor advantages, Tensor forward, Tensor backward, Tensor length, Tensor? cu_seqlens, "
      "float w_pos, float w_neg, int combine) -> Tensor");

  m.def(
      "first_divergence(Tensor ids_a, Tensor ids_b, Tensor? mask_a, Tensor? mask_b, Tensor? cu_seqlens_a, Tensor? cu_seqlens_b) "
      "-> Tensor");

  // ---- filters: interpolation is the enumeration of math/quantile.h; rule as in filters/ops.h. No gradients.
  m.def("masked_quantile(Tensor values, Tensor? mask, float q, int interpolation) -> Tensor");
  m.def("top_quantile_mask(Tensor values, Tensor? mask, float fraction, int rule) -> Tensor");

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
  m.def("policy_loss_backward_(Tensor g_loss, Tensor(a!) unnormalised, Tensor inverse_norm) -> ()");
  // Straight from the head: hidden [N, H]; targets [B, T], or [N] with cu_seqlens, ignore_index where a token does not count.
  // Results are (loss, metrics, d_hidden, d_weight, d_bias), the gradients as far as needs asks for them. Implemented in
  // python/prefkern/ops/linear_policy.py, over linear_chunk_.
  m.def(
      "linear_policy_loss(Tensor hidden, Tensor weight, Tensor targets, Tensor? cu_seqlens, Tensor? bias, "
      "Tensor? row_temperature, Tensor? old_logp, Tensor? advantages, Tensor? ref_logp, Tensor? token_weight, Tensor? lows, "
      "Tensor? highs, Tensor? anchor, Tensor? norm_tensor, int kind, int agg, int kl, int flags, float eps_low, "
      "float eps_high, float dual_clip, float delta, float tau_pos, float tau_neg, float clamp_low, float clamp_high, "
      "float beta, float kl_clamp, float anchor_gamma, float scale, float norm, float temperature, float softcap, "
      "float logit_scale, int ignore_index, float entropy_coef, int entropy_agg, bool with_entropy, int needs, "
      "int chunk_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // ---- sequence: transform is the enumeration of math/sequence.h, bootstrap that of math/returns.h, dtype that of
  // core/common.h; step_ids may be a bool mask, of one step. Sums and means have a gradient in values; everything about
  // returns is constant. The _fwd forms, here and below, have no autograd formula.
  m.def(
      "sequence_reduce(Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? minus, Tensor? weights, int transform, "
      "bool mean, Tensor? starts=None, Tensor? ends=None, Tensor? head=None, float tail_weight=1, float decay=1) -> Tensor");
  m.def(
      "sequence_reduce_fwd(Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? minus, Tensor? weights, int transform, "
      "bool mean, Tensor? starts=None, Tensor? ends=None, Tensor? head=None, float tail_weight=1, float decay=1) -> Tensor");
  m.def(
      "sequence_reduce_backward(Tensor g, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? minus, Tensor? weights, "
      "int transform, bool mean, Tensor? starts=None, Tensor? ends=None, Tensor? head=None, float tail_weight=1, "
      "float decay=1) -> Tensor");
  m.def("step_pool(Tensor values, Tensor step_ids, Tensor? cu_seqlens, int n_steps, bool clamp) -> (Tensor, Tensor)");
  m.def("step_pool_fwd(Tensor values, Tensor step_ids, Tensor? cu_seqlens, int n_steps, bool clamp) -> (Tensor, Tensor)");
  m.def("step_pool_backward(Tensor g, Tensor counts, Tensor step_ids, Tensor? cu_seqlens, bool clamp, int dtype) -> Tensor");
  m.def("discounted_returns(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, float gamma) -> Tensor");
  m.def("segmented_returns(Tensor rewards, Tensor segment, Tensor order, float gamma) -> Tensor");
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? lengths, Tensor? cu_seqlens, Tensor? finished, "
      "Tensor? last_values, float gamma, float lam, int bootstrap) -> (Tensor, Tensor)");

  // ---- groups: reduction is the enumeration of math/groups.h. The gradient of a reduction is made of reductions; that of the
  // others has an op of its own, for which they return what it needs beside their results.
  m.def("group_reduce(Tensor values, Tensor group, Tensor? mask, int reduction) -> Tensor");
  m.def("group_reduce_fwd(Tensor values, Tensor group, Tensor? mask, int reduction) -> Tensor");
  m.def("group_normalize(Tensor x, Tensor group, float eps, int ddof, bool sigma_grad) -> (Tensor, Tensor, Tensor)");
  m.def("group_normalize_fwd(Tensor x, Tensor group, float eps, int ddof, bool sigma_grad) -> (Tensor, Tensor, Tensor)");
  m.def("group_normalize_backward(Tensor g, Tensor group, Tensor z, Tensor scale, Tensor slope) -> Tensor");
  m.def(
      "level_pairs(Tensor scores, Tensor group, Tensor levels, float beta, float anisotropy, bool per_response, "
      "bool with_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "level_pairs_fwd(Tensor scores, Tensor group, Tensor levels, float beta, float anisotropy, bool per_response, "
      "bool with_grad) -> (Tensor, Tensor, Tensor)");
  m.def("level_pairs_backward(Tensor g_loss, Tensor unnormalised, Tensor pairs) -> Tensor");
  m.def(
      "importance_weights(Tensor old_logp, Tensor rollout_logp, Tensor? mask, Tensor? cu_seqlens, int level, int mode, "
      "float clip_min, float clip_max, float log_clamp, bool normalize) -> Tensor");
  m.def(
      "off_policy_mask(Tensor advantages, Tensor logp, Tensor rollout_logp, Tensor? mask, Tensor? cu_seqlens, float threshold) "
      "-> Tensor");

  // ---- preference: kind, score, average and reduction are the enumerations of math/preference.h; a tensor stands in for the
  // number of its name. With `desirable` the rows are single responses and kind is an UnpairedKind.
  m.def(
      "preference_loss(Tensor chosen, Tensor? rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? desirable, "
      "Tensor? chosen_lengths, Tensor? rejected_lengths, Tensor? scale, Tensor? offset, Tensor? smoothing, "
      "Tensor? chosen_target, Tensor? rejected_target, Tensor? weight, Tensor? tie, Tensor? mask, Tensor? norm_tensor, "
      "int kind, int score, int average, int reduction, float beta, float rejected_beta, float chosen_reward, "
      "float rejected_reward, float scale_number, float offset_number, float smoothing_number, float chosen_target_number, "
      "float rejected_target_number, float alpha, float exp_cap, float max_p, float parameter, float clip, float factor, "
      "float chosen_weight, float rejected_weight, float norm, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "preference_loss_fwd(Tensor chosen, Tensor? rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? desirable, "
      "Tensor? chosen_lengths, Tensor? rejected_lengths, Tensor? scale, Tensor? offset, Tensor? smoothing, "
      "Tensor? chosen_target, Tensor? rejected_target, Tensor? weight, Tensor? tie, Tensor? mask, Tensor? norm_tensor, "
      "int kind, int score, int average, int reduction, float beta, float rejected_beta, float chosen_reward, "
      "float rejected_reward, float scale_number, float offset_number, float smoothing_number, float chosen_target_number, "
      "float rejected_target_number, float alpha, float exp_cap, float max_p, float parameter, float clip, float factor, "
      "float chosen_weight, float rejected_weight, float norm, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  // Losses straight from the head: hidden [N, H]; targets [2P, T], or [N] with cu_seqlens, with `desirable` [P, T]. Results are
  // (loss, metrics and nll, d_hidden, d_weight, d_bias), the gradients as far as needs asks for them. Implemented in
  // python/prefkern/ops/_linear_responses.py, over linear_chunk_.
  m.def(
      "linear_preference_loss(Tensor hidden, Tensor weight, Tensor targets, Tensor? cu_seqlens, Tensor? bias, "
      "Tensor? row_temperature, Tensor? ref_logp, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? desirable, "
      "Tensor? chosen_lengths, Tensor? rejected_lengths, Tensor? scale, Tensor? offset, Tensor? smoothing, "
      "Tensor? chosen_target, Tensor? rejected_target, Tensor? weight_of_pair, Tensor? tie, Tensor? mask, Tensor? norm_tensor, "
      "int kind, int score, int average, int reduction, float beta, float rejected_beta, float chosen_reward, "
      "float rejected_reward, float scale_number, float offset_number, float smoothing_number, float chosen_target_number, "
      "float rejected_target_number, float alpha, float exp_cap, float max_p, float parameter, float clip, float factor, "
      "float chosen_weight, float rejected_weight, float norm, float temperature, float softcap, float logit_scale, "
      "int ignore_index, float sft_weight, int needs, int chunk_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("preference_loss_backward(Tensor g_loss, Tensor unnormalised, Tensor inverse_norm) -> Tensor");
  m.def("preference_loss_backward_(Tensor g_loss, Tensor(a!) unnormalised, Tensor inverse_norm) -> ()");
  m.def("label_posterior(Tensor margin, Tensor reliability, Tensor? annotator) -> Tensor");
  // ---- lists: kind, gain, rank and reduction are the enumerations of math/lists.h; results are (loss, metrics,
  // unnormalised, inverse), of skew_score with three gradients, as `needs` of lists/ops.h says, in place of one; only the
  // scores, or embeddings and scales, have one, which preference_rows_backward gives.
  m.def(
      "listwise_loss(Tensor scores, Tensor? labels, Tensor? mask, Tensor? norm_tensor, int kind, int gain, int rank, "
      "bool per_pair, int reduction, float beta, float temperature, float smoothing, float norm, bool with_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "listwise_loss_fwd(Tensor scores, Tensor? labels, Tensor? mask, Tensor? norm_tensor, int kind, int gain, int rank, "
      "bool per_pair, int reduction, float beta, float temperature, float smoothing, float norm, bool with_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_preference_loss(Tensor scores, Tensor is_winner, Tensor? mask, Tensor? norm_tensor, int ddof, "
      "bool scale_variance, int reduction, float beta, float lam, float norm, bool with_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_preference_loss_fwd(Tensor scores, Tensor is_winner, Tensor? mask, Tensor? norm_tensor, int ddof, "
      "bool scale_variance, int reduction, float beta, float lam, float norm, bool with_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "skew_score(Tensor v_i, Tensor v_j, Tensor? scales, Tensor? margin, Tensor? norm_tensor, bool normalize, "
      "bool with_loss, int reduction, float tau, float norm, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "skew_score_fwd(Tensor v_i, Tensor v_j, Tensor? scales, Tensor? margin, Tensor? norm_tensor, bool normalize, "
      "bool with_loss, int reduction, float tau, float norm, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("skew_row_means(Tensor v, Tensor? mask, Tensor? scales, bool normalize, float tau) -> Tensor");
  m.def("preference_rows_backward(Tensor g_loss, Tensor unnormalised, Tensor inverse) -> Tensor");

  // ---- sampling: seed is 64 bits as they are; rows are counted from first_row, elements from first_element. No gradients.
  m.def(
      "seeded_normal_combine(Tensor weights, Tensor? add_to, int seed, int n, int first_row, int first_element, float scale) "
      "-> Tensor");
  m.def("seeded_normal_combine_(Tensor(a!) x, Tensor weights, int seed, int first_row, int first_element, float scale) -> ()");
  m.def("seeded_normal_add_(Tensor(a!) x, int seed, int row, int first_element, float mu) -> ()");
  // utility and mode are the enumerations of math/thompson.h, method that of sampling/budget.h.
  m.def(
      "beta_thompson_topk(Tensor alpha, Tensor beta, Tensor? eligible, int k, int utility, int mode, int seed, int step, "
      "bool with_draws) -> (Tensor, Tensor, Tensor)");
  m.def(
      "decayed_beta_update_(Tensor(a!) alpha, Tensor(b!) beta, Tensor ids, Tensor successes, Tensor n, float lam1, float lam2) "
      "-> ()");
  m.def("knapsack_allocate(Tensor utilities, int surplus, int method) -> Tensor");
  // ---- diversity: of responses, float64 per prompt, on the CPU alone; sets of candidates that are unlike each other. No gradients.
  m.def(
      "self_bleu(Tensor ids, Tensor? mask, Tensor? cu_seqlens, Tensor? cu_prompts, Tensor weights, float smoothing) -> Tensor");
  m.def("distinct_n(Tensor ids, Tensor? mask, Tensor? cu_seqlens, Tensor? cu_prompts, int n) -> Tensor");
  m.def("edit_distance(Tensor ids, Tensor? mask, Tensor? cu_seqlens, Tensor? cu_prompts, bool normalize) -> Tensor");
  m.def("greedy_select(Tensor emb, Tensor type_id, Tensor seeds, Tensor quotas, int size, bool maximum) -> Tensor");
  // ---- gaussian: kernel is the enumeration of math/gaussian.h. Constants in, constants out. The factor of chol_* is changed in
  // place; they return the new, or smallest, squared diagonal.
  m.def(
      "gp_unique_posterior(Tensor factor, Tensor weights, Tensor unique, Tensor inputs, Tensor? counts, Tensor inverse_length, "
      "int kernel, float variance) -> (Tensor, Tensor)");
  m.def("chol_append_(Tensor(a!) factor, Tensor row, int size) -> Tensor");
  m.def("chol_rank1_(Tensor(a!) factor, Tensor vector, float sigma, int size) -> Tensor");
  // ---- meta: needs is the bit set of meta/ops.h. lpg_inner_loss results in the loss and the means of its two terms; its backward
  // is differentiable, by lpg_inner_loss_second, which is not. reverse_gru: states, and what its backward needs of the gates.
  m.def(
      "lpg_inner_loss(Tensor probs, Tensor actions, Tensor y, Tensor pi_hat, Tensor y_hat, float alpha, float sign) "
      "-> (Tensor, Tensor)");
  m.def(
      "lpg_inner_loss_fwd(Tensor probs, Tensor actions, Tensor y, Tensor pi_hat, Tensor y_hat, float alpha, float sign) "
      "-> (Tensor, Tensor)");
  m.def(
      "lpg_inner_loss_backward(Tensor g, Tensor probs, Tensor actions, Tensor y, Tensor pi_hat, Tensor y_hat, float alpha, "
      "float sign, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lpg_inner_loss_second(Tensor? above_probs, Tensor? above_y, Tensor? above_pi_hat, Tensor? above_y_hat, Tensor g, "
      "Tensor probs, Tensor actions, Tensor y, Tensor pi_hat, Tensor y_hat, float alpha, float sign, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("reverse_gru(Tensor gates, Tensor? done, Tensor weight, Tensor bias, bool with_grad) -> (Tensor, Tensor)");
  m.def("reverse_gru_fwd(Tensor gates, Tensor? done, Tensor weight, Tensor bias, bool with_grad) -> (Tensor, Tensor)");
  m.def(
      "reverse_gru_backward(Tensor grad, Tensor states, Tensor saved, Tensor? done, Tensor weight, bool needs_weights) "
      "-> (Tensor, Tensor, Tensor)");
  // ---- diffusion: latents are [B, D]. kind and reduction are the enumerations of math/diffusion.h; of a pair either both
  // references are given, or both of their errors; results are (loss, metrics, slopes). Only predictions have a gradient, those of
  // winner and loser, as `needs` of diffusion/ops.h says, in one tensor. coefficients are float64.
  m.def(
      "diffusion_pair_loss(Tensor pred_w, Tensor pred_l, Tensor target, Tensor? target_l, Tensor? ref_w, Tensor? ref_l, "
      "Tensor? ref_error_w, Tensor? ref_error_l, Tensor? weight, int kind, int reduction, float beta, float factor, "
      "bool negative) -> (Tensor, Tensor, Tensor)");
  m.def(
      "diffusion_pair_loss_fwd(Tensor pred_w, Tensor pred_l, Tensor target, Tensor? target_l, Tensor? ref_w, Tensor? ref_l, "
      "Tensor? ref_error_w, Tensor? ref_error_l, Tensor? weight, int kind, int reduction, float beta, float factor, "
      "bool negative) -> (Tensor, Tensor, Tensor)");
  m.def(
      "diffusion_pair_loss_backward(Tensor g_loss, Tensor slopes, Tensor pred_w, Tensor pred_l, Tensor target, "
      "Tensor? target_l, int reduction, int needs) -> Tensor");
  m.def("diffusion_mse(Tensor pred, Tensor target) -> Tensor");
  m.def("x0_loss(Tensor pred, Tensor x, Tensor target, Tensor coefficients, int kind, int reduction, float c) -> Tensor");
  m.def("x0_loss_fwd(Tensor pred, Tensor x, Tensor target, Tensor coefficients, int kind, int reduction, float c) -> Tensor");
  m.def(
      "x0_loss_backward(Tensor g_loss, Tensor pred, Tensor x, Tensor target, Tensor coefficients, int kind, int reduction, "
      "float c) -> Tensor");
  m.def("ddim_invert_step(Tensor x, Tensor e1, Tensor? e2, Tensor coefficients) -> Tensor");
}

#define PK_REGISTER(key)                                                              \
  STABLE_TORCH_LIBRARY_IMPL(prefkern, key, m) {                                       \
    m.impl("linear_logprobs", PK_OP(linear_logprobs));                                \
    m.impl("linear_logprobs_fwd", PK_OP(linear_logprobs));                            \
    m.impl("linear_logprobs_backward", PK_OP(linear_logprobs_backward));              \
    m.impl("linear_logprobs_ext", PK_OP(linear_logprobs_ext));                        \
    m.impl("linear_logprobs_ext_fwd", PK_OP(linear_logprobs_ext));                    \
    m.impl("linear_logprobs_ext_backward", PK_OP(linear_logprobs_ext_backward));      \
    m.impl("linear_logprobs_saving", PK_OP(linear_logprobs_saving));                  \
    m.impl("linear_logprobs_saving_fwd", PK_OP(linear_logprobs_saving));              \
    m.impl("linear_logprobs_kept_backward", PK_OP(linear_logprobs_kept_backward));    \
    m.impl("linear_logprobs_u_backward", PK_OP(linear_logprobs_u_backward));          \
    m.impl("linear_chunk_", PK_OP(linear_chunk));                                     \
    m.impl("linear_chunk_backward_", PK_OP(linear_chunk_backward));                   \
    m.impl("linear_shard", PK_OP(linear_shard));                                      \
    m.impl("merge_linear_shards", PK_OP(merge_linear_shards));                        \
    m.impl("linear_shard_backward", PK_OP(linear_shard_backward));                    \
    m.impl("logits_logprobs", PK_OP(logits_logprobs));                                \
    m.impl("logits_logprobs_fwd", PK_OP(logits_logprobs));                            \
    m.impl("logits_logprobs_backward", PK_OP(logits_logprobs_backward));              \
    m.impl("logits_logprobs_backward_", PK_OP(logits_logprobs_backward_inplace));     \
    m.impl("group_advantages", PK_OP(group_advantages));                              \
    m.impl("conflict_runs", PK_OP(conflict_runs));                                    \
    m.impl("conflict_weights", PK_OP(conflict_weights));                              \
    m.impl("masked_quantile", PK_OP(masked_quantile));                                \
    m.impl("top_quantile_mask", PK_OP(top_quantile_mask));                            \
    m.impl("group_advantages_stats", PK_OP(group_advantages_stats));                  \
    m.impl("batch_moments", PK_OP(batch_moments));                                    \
    m.impl("merge_moments", PK_OP(merge_moments));                                    \
    m.impl("batch_normalize", PK_OP(batch_normalize));                                \
    m.impl("question_weights", PK_OP(question_weights));                              \
    m.impl("pair_masked_advantages", PK_OP(pair_masked_advantages));                  \
    m.impl("policy_loss", PK_OP(policy_loss));                                        \
    m.impl("policy_loss_fwd", PK_OP(policy_loss));                                    \
    m.impl("policy_loss_backward", PK_OP(policy_loss_backward));                      \
    m.impl("policy_loss_backward_", PK_OP(policy_loss_backward_inplace));             \
    m.impl("sequence_reduce", PK_OP(sequence_reduce));                                \
    m.impl("sequence_reduce_fwd", PK_OP(sequence_reduce));                            \
    m.impl("sequence_reduce_backward", PK_OP(sequence_reduce_backward));              \
    m.impl("step_pool", PK_OP(step_pool));                                            \
    m.impl("step_pool_fwd", PK_OP(step_pool));                                        \
    m.impl("step_pool_backward", PK_OP(step_pool_backward));                          \
    m.impl("first_divergence", PK_OP(first_divergence));                              \
    m.impl("discounted_returns", PK_OP(discounted_returns));                          \
    m.impl("segmented_returns", PK_OP(segmented_returns));                            \
    m.impl("gae", PK_OP(gae));                                                        \
    m.impl("group_reduce", PK_OP(group_reduce));                                      \
    m.impl("group_reduce_fwd", PK_OP(group_reduce));                                  \
    m.impl("group_normalize", PK_OP(group_normalize));                                \
    m.impl("group_normalize_fwd", PK_OP(group_normalize));                            \
    m.impl("group_normalize_backward", PK_OP(group_normalize_backward));              \
    m.impl("level_pairs", PK_OP(level_pairs));                                        \
    m.impl("level_pairs_fwd", PK_OP(level_pairs));                                    \
    m.impl("level_pairs_backward", PK_OP(level_pairs_backward));                      \
    m.impl("importance_weights", PK_OP(importance_weights));                          \
    m.impl("off_policy_mask", PK_OP(off_policy_mask));                                \
    m.impl("preference_loss", PK_OP(preference_loss));                                \
    m.impl("preference_loss_fwd", PK_OP(preference_loss));                            \
    m.impl("preference_loss_backward", PK_OP(preference_loss_backward));              \
    m.impl("preference_loss_backward_", PK_OP(preference_loss_backward_inplace));     \
    m.impl("label_posterior", PK_OP(label_posterior));                                \
    m.impl("listwise_loss", PK_OP(listwise_loss));                                    \
    m.impl("listwise_loss_fwd", PK_OP(listwise_loss));                                \
    m.impl("group_preference_loss", PK_OP(group_preference_loss));                    \
    m.impl("group_preference_loss_fwd", PK_OP(group_preference_loss));                \
    m.impl("skew_score", PK_OP(skew_score));                                          \
    m.impl("skew_score_fwd", PK_OP(skew_score));                                      \
    m.impl("skew_row_means", PK_OP(skew_row_means));                                  \
    m.impl("preference_rows_backward", PK_OP(preference_rows_backward));              \
    m.impl("seeded_normal_combine", PK_OP(seeded_normal_combine));                    \
    m.impl("seeded_normal_combine_", PK_OP(seeded_normal_combine_inplace));           \
    m.impl("seeded_normal_add_", PK_OP(seeded_normal_add_inplace));                   \
    m.impl("beta_thompson_topk", PK_OP(beta_thompson_topk));                          \
    m.impl("decayed_beta_update_", PK_OP(decayed_beta_update));                       \
    m.impl("knapsack_allocate", PK_OP(knapsack_allocate));                            \
    m.impl("self_bleu", PK_OP(self_bleu));                                            \
    m.impl("distinct_n", PK_OP(distinct_n));                                          \
    m.impl("edit_distance", PK_OP(edit_distance));                                    \
    m.impl("greedy_select", PK_OP(greedy_select));                                    \
    m.impl("gp_unique_posterior", PK_OP(gp_unique_posterior));                        \
    m.impl("chol_append_", PK_OP(chol_append));                                       \
    m.impl("chol_rank1_", PK_OP(chol_rank1));                                         \
    m.impl("lpg_inner_loss", PK_OP(lpg_inner_loss));                                  \
    m.impl("lpg_inner_loss_fwd", PK_OP(lpg_inner_loss));                              \
    m.impl("lpg_inner_loss_backward", PK_OP(lpg_inner_loss_backward));                \
    m.impl("lpg_inner_loss_second", PK_OP(lpg_inner_loss_second));                    \
    m.impl("reverse_gru", PK_OP(reverse_gru));                                        \
    m.impl("reverse_gru_fwd", PK_OP(reverse_gru));                                    \
    m.impl("reverse_gru_backward", PK_OP(reverse_gru_backward));                      \
    m.impl("diffusion_pair_loss", PK_OP(diffusion_pair_loss));                        \
    m.impl("diffusion_pair_loss_fwd", PK_OP(diffusion_pair_loss));                    \
    m.impl("diffusion_pair_loss_backward", PK_OP(diffusion_pair_loss_backward));      \
    m.impl("diffusion_mse", PK_OP(diffusion_mse));                                    \
    m.impl("x0_loss", PK_OP(x0_loss));                                                \
    m.impl("x0_loss_fwd", PK_OP(x0_loss));                                            \
    m.impl("x0_loss_backward", PK_OP(x0_loss_backward));                              \
    m.impl("ddim_invert_step", PK_OP(ddim_invert_step));                              \
  }
PK_REGISTER(CPU)
PK_REGISTER(CUDA)
