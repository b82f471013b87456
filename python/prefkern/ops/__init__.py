"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

from ._call import set_validation, validation
from .advantages import group_advantages
from .conflicts import conflict_runs, conflict_weights
from .filters import masked_quantile, top_quantile_mask
from .logprobs import linear_logprobs, logits_logprobs, plan_chunks
from .policy import policy_loss
from .types import ConflictRuns, GroupAdvantages, LinearLogprobs, LossOutput

__all__ = [
    "ConflictRuns",
    "GroupAdvantages",
    "LinearLogprobs",
    "LossOutput",
    "conflict_runs",
    "conflict_weights",
    "group_advantages",
    "linear_logprobs",
    "logits_logprobs",
    "masked_quantile",
    "plan_chunks",
    "policy_loss",
    "set_validation",
    "top_quantile_mask",
    "validation",
]
