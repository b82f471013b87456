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
from prefkern.reference.logprobs import linear_logprobs, logits_logprobs
from prefkern.reference.policy import policy_loss

__all__ = [
    "batch_moments",
    "batch_normalize",
    "group_advantages",
    "linear_logprobs",
    "logits_logprobs",
    "merge_moments",
    "pair_masked_advantages",
    "policy_loss",
    "question_weights",
    "whiten",
]
