"""The definitions: what every op computes, in plain PyTorch.

Same signatures and results as the public ops, differentiable by autograd, in any floating type. Nothing here is fast,
nothing here calls a kernel: in float64 these functions are the truth that the tests and `prefkern check` compare with.
"""

from prefkern.reference.advantages import group_advantages
from prefkern.reference.logprobs import linear_logprobs, logits_logprobs
from prefkern.reference.policy import importance_weights, kl_penalty, masked_aggregate, off_policy_mask, policy_loss

__all__ = [
    "group_advantages",
    "importance_weights",
    "kl_penalty",
    "linear_logprobs",
    "logits_logprobs",
    "masked_aggregate",
    "off_policy_mask",
    "policy_loss",
]
