"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

from ._call import set_validation, validation
from .advantages import group_advantages
from .conflicts import conflict_runs, conflict_weights
from .filters import masked_quantile, top_quantile_mask
from .groups import group_normalize, group_reduce, level_pairs
from .logprobs import linear_logprobs, logits_logprobs, plan_chunks
from .policy import policy_loss
from .sequence import discounted_returns, gae, segmented_returns, sequence_mean, sequence_sum
from .types import ConflictRuns, GaeOutput, GroupAdvantages, LevelPairs, LinearLogprobs, LossOutput

__all__ = [
    "ConflictRuns",
    "GaeOutput",
    "GroupAdvantages",
    "LevelPairs",
    "LinearLogprobs",
    "LossOutput",
    "conflict_runs",
    "conflict_weights",
    "discounted_returns",
    "gae",
    "group_advantages",
    "group_normalize",
    "group_reduce",
    "level_pairs",
    "linear_logprobs",
    "logits_logprobs",
    "masked_quantile",
    "plan_chunks",
    "policy_loss",
    "segmented_returns",
    "sequence_mean",
    "sequence_sum",
    "set_validation",
    "top_quantile_mask",
    "validation",
]
