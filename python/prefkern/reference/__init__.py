"""The definitions: what every op computes, in plain PyTorch.

Same signatures and results as the public ops, differentiable by autograd, in any floating type. Nothing here is fast,
nothing here calls a kernel: in float64 these functions are the truth that the tests and `prefkern check` compare with.
"""

from prefkern.reference.advantages import (
    batch_moments,
    batch_normalize,
    group_advantages,
    merge_moments,
    pair_masked_advantages,
    question_weights,
    whiten,
)
from prefkern.reference.budget import knapsack_allocate
from prefkern.reference.conflicts import conflict_runs, conflict_weights, first_divergence
from prefkern.reference.diffusion import (
    ddim_invert_step,
    diffusion_margin,
    diffusion_mse,
    diffusion_pref_loss,
    x0_regression_loss,
)
from prefkern.reference.diversity import distinct_n, edit_distance, greedy_select, self_bleu
from prefkern.reference.filters import masked_quantile, top_quantile_mask
from prefkern.reference.gaussian import gp_unique_posterior
from prefkern.reference.groups import group_normalize, group_reduce, level_pairs
from prefkern.reference.lists import group_preference_loss, listwise_loss, skew_loss, skew_row_means, skew_score
from prefkern.reference.logprobs import linear_logprobs, logits_logprobs
from prefkern.reference.meta import lpg_inner_loss, reverse_gru_reset
from prefkern.reference.policy import importance_weights, kl_penalty, masked_aggregate, off_policy_mask, policy_loss
from prefkern.reference.preference import label_posterior, preference_loss, unpaired_loss
from prefkern.reference.seeded_normal import philox_words as philox_words
from prefkern.reference.seeded_normal import seeded_normal as seeded_normal
from prefkern.reference.seeded_normal import seeded_normal_combine
from prefkern.reference.sequence import (
    discounted_returns,
    gae,
    masked_mean_pool,
    segmented_returns,
    sequence_mean,
    sequence_sum,
    step_mean,
)
from prefkern.reference.thompson import beta_thompson_topk, decayed_beta_update_

__all__ = [
    "batch_moments",
    "batch_normalize",
    "beta_thompson_topk",
    "conflict_runs",
    "conflict_weights",
    "ddim_invert_step",
    "decayed_beta_update_",
    "diffusion_margin",
    "diffusion_mse",
    "diffusion_pref_loss",
    "discounted_returns",
    "distinct_n",
    "edit_distance",
    "first_divergence",
    "gae",
    "gp_unique_posterior",
    "greedy_select",
    "group_advantages",
    "group_normalize",
    "group_preference_loss",
    "group_reduce",
    "importance_weights",
    "kl_penalty",
    "knapsack_allocate",
    "label_posterior",
    "level_pairs",
    "linear_logprobs",
    "listwise_loss",
    "logits_logprobs",
    "lpg_inner_loss",
    "masked_aggregate",
    "masked_mean_pool",
    "masked_quantile",
    "merge_moments",
    "off_policy_mask",
    "pair_masked_advantages",
    "policy_loss",
    "preference_loss",
    "question_weights",
    "reverse_gru_reset",
    "seeded_normal_combine",
    "segmented_returns",
    "self_bleu",
    "sequence_mean",
    "sequence_sum",
    "skew_loss",
    "skew_row_means",
    "skew_score",
    "step_mean",
    "top_quantile_mask",
    "unpaired_loss",
    "whiten",
    "x0_regression_loss",
]
