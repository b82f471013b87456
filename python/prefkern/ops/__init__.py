"""Typed, documented functions over ``torch.ops.prefkern``. One module per room of ``csrc``."""

from ._call import set_validation, validation
from .logprobs import linear_logprobs, logits_logprobs, plan_chunks
from .types import GroupAdvantages, LinearLogprobs, LossOutput

__all__ = [
    "GroupAdvantages",
    "LinearLogprobs",
    "LossOutput",
    "linear_logprobs",
    "logits_logprobs",
    "plan_chunks",
    "set_validation",
    "validation",
]
