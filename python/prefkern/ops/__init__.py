"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

from ._call import set_validation, validation
from .advantages import group_advantages
from .logprobs import linear_logprobs, logits_logprobs, plan_chunks
from .policy import policy_loss
from .types import GroupAdvantages, LinearLogprobs, LossOutput, PairMaskedAdvantages, QuestionWeights

__all__ = [
    "GroupAdvantages",
    "LinearLogprobs",
    "LossOutput",
    "PairMaskedAdvantages",
    "QuestionWeights",
    "group_advantages",
    "linear_logprobs",
    "logits_logprobs",
    "plan_chunks",
    "policy_loss",
    "set_validation",
    "validation",
]
