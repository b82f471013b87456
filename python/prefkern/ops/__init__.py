"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

from . import _linear_shard as _linear_shard  # fakes
from ._backward_plan import BackwardPlan
from ._call import set_validation, validation
from .advantages import (
    batch_moments,
    batch_normalize,
    group_advantages,
    merge_moments,
    pair_masked_advantages,
    question_weights,
    whiten,
)
from .budget import knapsack_allocate
from .conflicts import conflict_runs, conflict_weights, first_divergence
from .diffusion import (
    alb_combine,
    ddim_coefficients,
    ddim_invert_step,
    diffusion_margin,
    diffusion_mse,
    diffusion_pref_loss,
    diffusion_pref_loss_stacked,
    x0_regression_loss,
)
from .diversity import distinct_n, edit_distance, greedy_select, self_bleu
from .filters import masked_quantile, top_quantile_mask
from .gaussian import GpPosterior, chol_append, chol_rank1, gp_unique_posterior
from .groups import group_normalize, group_reduce, level_pairs
from .linear_policy import linear_policy_loss
from .linear_preference import linear_preference_loss
from .linear_unpaired import linear_unpaired_loss
from .lists import group_preference_loss, listwise_loss, skew_loss, skew_row_means, skew_score
from .logprobs import linear_logprobs, logits_logprobs, plan_backward, plan_chunks
from .meta import lpg_inner_loss, reverse_gru_reset
from .policy import importance_weights, kl_penalty, masked_aggregate, off_policy_mask, policy_loss
from .preference import label_posterior, preference_loss, unpaired_loss
from .seeded_normal import seeded_normal, seeded_normal_add_, seeded_normal_combine, seeded_normal_combine_
from .sequence import discounted_returns, gae, masked_mean_pool, segmented_returns, sequence_mean, sequence_sum, step_mean
from .thompson import ThompsonTopk, beta_thompson_topk, decayed_beta_update_
from .types import (
    BalancedLoss,
    ConflictRuns,
    GaeOutput,
    GroupAdvantages,
    LevelPairs,
    LinearLogprobs,
    LossOutput,
    PairMaskedAdvantages,
    QuestionWeights,
    StepMeans,
)

__all__ = [
    "BackwardPlan",
    "BalancedLoss",
    "ConflictRuns",
    "GaeOutput",
    "GpPosterior",
    "GroupAdvantages",
    "LevelPairs",
    "LinearLogprobs",
    "LossOutput",
    "PairMaskedAdvantages",
    "QuestionWeights",
    "StepMeans",
    "ThompsonTopk",
    "alb_combine",
    "batch_moments",
    "batch_normalize",
    "beta_thompson_topk",
    "chol_append",
    "chol_rank1",
    "conflict_runs",
    "conflict_weights",
    "ddim_coefficients",
    "ddim_invert_step",
    "decayed_beta_update_",
    "diffusion_margin",
    "diffusion_mse",
    "diffusion_pref_loss",
    "diffusion_pref_loss_stacked",
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
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_unpaired_loss",
    "listwise_loss",
    "logits_logprobs",
    "lpg_inner_loss",
    "masked_aggregate",
    "masked_mean_pool",
    "masked_quantile",
    "merge_moments",
    "off_policy_mask",
    "pair_masked_advantages",
    "plan_backward",
    "plan_chunks",
    "policy_loss",
    "preference_loss",
    "question_weights",
    "reverse_gru_reset",
    "seeded_normal",
    "seeded_normal_add_",
    "seeded_normal_combine",
    "seeded_normal_combine_",
    "segmented_returns",
    "self_bleu",
    "sequence_mean",
    "sequence_sum",
    "set_validation",
    "skew_loss",
    "skew_row_means",
    "skew_score",
    "step_mean",
    "top_quantile_mask",
    "unpaired_loss",
    "validation",
    "whiten",
    "x0_regression_loss",
]
