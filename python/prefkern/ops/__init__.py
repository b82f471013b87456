"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

from ._call import set_validation, validation
from .advantages import group_advantages
from .logprobs import linear_logprobs, logits_logprobs, plan_chunks
from .policy import importance_weights, kl_penalty, masked_aggregate, off_policy_mask, policy_loss
from .types import GroupAdvantages, LinearLogprobs, LossOutput

__all__ = [
    "GroupAdvantages",
    "LinearLogprobs",
    "LossOutput",
    "group_advantages",
    "importance_weights",
    "kl_penalty",
    "linear_logprobs",
    "logits_logprobs",
    "masked_aggregate",
    "off_policy_mask",
    "plan_chunks",
    "policy_loss",
    "set_validation",
    "validation",
]
