"""The definitions: what every op computes, in plain PyTorch.

Same signatures and results as the public ops, differentiable by autograd, in any floating type. Nothing here is fast,
nothing here calls a kernel: in float64 these functions are the truth that the tests and `prefkern check` compare with.
"""

from prefkern.reference.advantages import group_advantages
from prefkern.reference.conflicts import conflict_runs, conflict_weights
from prefkern.reference.filters import masked_quantile, top_quantile_mask
from prefkern.reference.logprobs import linear_logprobs, logits_logprobs
from prefkern.reference.policy import policy_loss

__all__ = [
    "conflict_runs",
    "conflict_weights",
    "group_advantages",
    "linear_logprobs",
    "logits_logprobs",
    "masked_quantile",
    "policy_loss",
    "top_quantile_mask",
]
