"""What the forward of a linear head saves for its backward, and what that costs: the choice that ``plan_backward`` shows and
``linear_logprobs`` takes. Plain arithmetic on sizes, so that a compiler can trace it.

One product F is a GEMM of 2 N V H flops. Computing the logits again costs one of them; the logits themselves, or what they are
needed for where the head is frozen, cost memory instead.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .._names import choice, nearest_hint
from ._arguments import integer

SAVES = ("recompute", "logits", "u")  # by the number that the op takes
RECOMPUTE, LOGITS, U = SAVES
NEEDS = ("hidden", "weight", "bias", "lora")


class BackwardPlan(NamedTuple):
    """What a forward saves, and what it and its backward cost. F is a GEMM of 2 N V H flops."""

    save: str
    """``"recompute"``, ``"logits"`` or ``"u"``; see `linear_logprobs`."""
    forward_products: int
    """F of the forward."""
    backward_products: int
    """F of the backward, where every row has an upstream gradient."""
    saved_bytes: int
    """Held from the forward to the backward, beside the inputs and two numbers per row."""
    workspace_bytes: int
    """The larger of the two passes' workspaces."""

    @property
    def products(self) -> int:
        """F in all."""
        return self.forward_products + self.backward_products


class Call(NamedTuple):
    """What the choice depends on."""

    rows: Any
    hidden: Any
    vocab: Any
    accumulator_bytes: int
    logit_bytes: int
    """Of one kept logit."""
    cuda: bool
    needs: frozenset[str] | tuple[str, ...]
    lora: bool
    entropy: bool
    lse: bool


def frozen(call: Call) -> bool:
    """Whether u can serve: hidden alone needs a gradient, of a head without lora, on the CPU."""
    return tuple(call.needs) == ("hidden",) and not call.lora and not call.cuda


def saved_bytes(call: Call, save: str) -> Any:
    if save == LOGITS:
        return call.rows * call.vocab * call.logit_bytes
    if save == U:
        return (1 + call.entropy + call.lse) * call.rows * call.hidden * call.accumulator_bytes
    return 0


def products(call: Call, save: str) -> tuple[int, int]:
    """F of the forward and of the backward."""
    if save == U:
        return 2 + call.entropy, 0
    gradients = ("hidden" in call.needs) + ("weight" in call.needs)
    return 1, gradients + (save == RECOMPUTE and bool(call.needs))


def choose(call: Call, budget: int | None) -> str:
    """The fewest products within the budget, and of those the fewest bytes. Without a budget u may be saved where it is one
    gradient, no more than that of hidden in accumulators."""
    best = RECOMPUTE
    for save in (U, LOGITS):
        if save == U and not frozen(call):
            continue
        small = save == U and not call.entropy and not call.lse
        if (small if budget is None else bool(saved_bytes(call, save) <= budget)) and _cost(call, save) < _cost(call, best):
            best = save
    return best


def _cost(call: Call, save: str) -> tuple[int, Any]:
    return sum(products(call, save)), saved_bytes(call, save)


def decide(call: Call, save: str, budget: int | None) -> str:
    """What is saved for ``save=`` and ``save_bytes=``, or why it cannot be."""
    if save == "auto":
        return choose(call, budget)
    if save == U and not frozen(call):
        why = (
            "it is saved on the CPU only" if call.cuda
            else "the head has a lora" if call.lora
            else f"{', '.join(n for n in call.needs if n != 'hidden') or 'nothing'} needs a gradient"
        )  # fmt: skip
        raise ValueError(f"save is 'u', which serves a head whose hidden alone needs a gradient, but {why}; pass 'auto'")
    return save


def checked(save: Any, save_bytes: Any) -> int | None:
    """The budget of these arguments."""
    if not isinstance(save, str):
        raise TypeError(f"save is {save!r}; 'auto' or one of {', '.join(map(repr, SAVES))} is expected")
    choice("save", save, ("auto", *SAVES))
    if save_bytes is None:
        return None
    if save != "auto":
        raise ValueError(f"save_bytes is {save_bytes} but save is {save!r}; a budget is for save='auto'")
    if (budget := integer("save_bytes", save_bytes)) < 0:
        raise ValueError(f"save_bytes is {budget}; it must not be negative")
    return budget


def needed(needs: Iterable[str]) -> tuple[str, ...]:
    if isinstance(needs, str) or not isinstance(needs, Iterable):
        raise TypeError(f"needs is {needs!r}; a tuple of names is expected, e.g. ('hidden', 'weight')")
    given = tuple(needs)
    for name in given:
        if name not in NEEDS:
            hint = nearest_hint(name, NEEDS) if isinstance(name, str) else ""
            raise ValueError(f"needs has {name!r}; accepted: {', '.join(map(repr, NEEDS))}{hint}")
    return tuple(name for name in NEEDS if name in given)


def check_recomputes(save: Any, save_bytes: Any) -> None:
    """Of calls that never save anything."""
    if save not in ("auto", RECOMPUTE) or save_bytes is not None:
        raise ValueError(
            f"save is {save!r} and save_bytes is {save_bytes}; ranges of a vocabulary and DTensors always recompute"
        )


def workspace_bytes(call: Call, save: str, forward: Any, backward: Any) -> int:
    """The larger workspace of the two passes, whose chunk plans these are."""
    if save == LOGITS:
        return int(backward.workspace_bytes)
    if save == U:  # with entropy, a second block of weights
        return int(forward.workspace_bytes + call.entropy * forward.row_chunk * forward.vocab_block * call.accumulator_bytes)
    return int(max(forward.workspace_bytes, backward.workspace_bytes if call.needs else 0))


def kept_bytes(dtype: torch.dtype, rounding: int) -> int:
    """Of one kept logit: what it is rounded to, or the inputs' type."""
    return 2 if rounding else dtype.itemsize
