"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

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
from .logprobs import linear_logprobs, logits_logprobs, plan_chunks
from .policy import policy_loss
from .types import GroupAdvantages, LinearLogprobs, LossOutput, PairMaskedAdvantages, QuestionWeights

__all__ = [
    "GroupAdvantages",
    "LinearLogprobs",
    "LossOutput",
    "PairMaskedAdvantages",
    "QuestionWeights",
    "batch_moments",
    "batch_normalize",
    "group_advantages",
    "linear_logprobs",
    "logits_logprobs",
    "merge_moments",
    "pair_masked_advantages",
    "plan_chunks",
    "policy_loss",
    "question_weights",
    "set_validation",
    "validation",
    "whiten",
]
