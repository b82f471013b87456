"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

from ._call import set_validation, validation
from .advantages import group_advantages
from .groups import group_normalize, group_reduce, level_pairs
from .logprobs import linear_logprobs, logits_logprobs, plan_chunks
from .policy import policy_loss
from .sequence import discounted_returns, gae, segmented_returns, sequence_mean, sequence_sum
from .types import GaeOutput, GroupAdvantages, LevelPairs, LinearLogprobs, LossOutput

__all__ = [
    "GaeOutput",
    "GroupAdvantages",
    "LevelPairs",
    "LinearLogprobs",
    "LossOutput",
    "discounted_returns",
    "gae",
    "group_advantages",
    "group_normalize",
    "group_reduce",
    "level_pairs",
    "linear_logprobs",
    "logits_logprobs",
    "plan_chunks",
    "policy_loss",
    "segmented_returns",
    "sequence_mean",
    "sequence_sum",
    "set_validation",
    "validation",
]
