"""Tokens that completions of both signs share. Kernels: ``csrc/conflicts``; formulas: ``csrc/math/conflicts.h``."""

from typing import Literal

import torch
from torch import Tensor

from ._arguments import accumulator, check_ends, check_tensors, number, same_device
from ._call import call, choice, validation
from .types import ConflictRuns

_runs, _weights = torch.ops.prefkern.conflict_runs.default, torch.ops.prefkern.conflict_weights.default

COMBINES = ("max_once", "product")


def conflict_runs(
    tokens: Tensor, advantages: Tensor, group: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> ConflictRuns:
    """How far each completion agrees, from its first token on and from its last token back, with one of the other sign.

    Token t of a row with A > 0 (A < 0) is in conflict if a row of its group with A < 0 (A > 0) has the same token at t, inside
    its own length. The forward run is the number of tokens in conflict before the first that is not; the backward run is the
    same with every row read from its last token back. Agreements behind a run's end change nothing. Rows with A = 0, exactly,
    are inactive: they have no runs and end nobody else's.

    Args:
        tokens: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. int64 or int32, any values.
        advantages: ``[B]``, any floating dtype (float64 on the CPU), none NaN; only the signs matter.
        group: ``[B]`` int64 or int32. Equal ids belong together; any values, any order, groups of any sizes.
        mask: bool, shaped like ``tokens``: in every row a run of True from the first token on. None: every token counts. What
            lies outside is never looked at.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.

    Returns:
        ConflictRuns(forward, backward, length), int64 ``[B]`` each; length is how many tokens of the row count. Rows are
        compared in pairs and no further than they agree: nothing as large as the vocabulary is needed.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. NaN advantages, masks with holes and wrong
            ``cu_seqlens`` are always found on the CPU; on CUDA all rows of the group get runs 0 and length -1 (and from
            :func:`conflict_weights` NaN), or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(tokens=tokens, advantages=advantages, group=group)
    if mask is not None:
        check_tensors(mask=mask)
    if cu_seqlens is not None:
        check_tensors(cu_seqlens=cu_seqlens)
    if advantages.requires_grad:
        advantages = advantages.detach()
    if tokens.is_cuda:
        _validate(tokens, advantages, mask, cu_seqlens)
    return ConflictRuns(*call(_runs, tokens, advantages, group, mask, cu_seqlens))


def conflict_weights(
    tokens: Tensor,
    advantages: Tensor,
    group: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    w_pos: float = 2.0,
    w_neg: float = 0.0,
    combine: Literal["max_once", "product"] = "max_once",
    runs: ConflictRuns | None = None,
) -> Tensor:
    """The weight of every token in view of the conflicts of its group; constants, to multiply a policy objective with.

    With the runs f, b and the length n of the token's row from :func:`conflict_runs`, a token t < f or t >= n - b gets
    ``w_pos`` where the row's advantage is positive and ``w_neg`` where it is negative. All other tokens that count get 1, those
    that do not 0.

    Args:
        tokens, advantages, group, mask, cu_seqlens: as for :func:`conflict_runs`.
        w_pos, w_neg: finite numbers.
        combine: what a token in both runs gets: its weight (``"max_once"``) or the square of it (``"product"``).
        runs: what :func:`conflict_runs` returned for the same arguments. None: found here. ``group`` and ``mask`` are not
            looked at if it is given: the tokens that count are the first ``runs.length`` of each row.

    Returns:
        float32, or float64 for float64 advantages, shaped like ``tokens``.

    Raises:
        ValueError, TypeError: as :func:`conflict_runs`. On CUDA the weights of a row of which nothing is known are NaN.
    """
    combine_id = choice("combine", combine, COMBINES)
    if runs is None:
        runs = conflict_runs(tokens, advantages, group, mask, cu_seqlens=cu_seqlens)
    else:
        if not isinstance(runs, tuple) or len(runs) != 3:
            raise TypeError(f"runs is a {type(runs).__name__}; the ConflictRuns of conflict_runs, or None, is expected")
        check_tensors(tokens=tokens, advantages=advantages, forward=runs[0], backward=runs[1], length=runs[2])
        if cu_seqlens is not None:
            check_tensors(cu_seqlens=cu_seqlens)
    if advantages.requires_grad:
        advantages = advantages.detach()
    return call(_weights, tokens, advantages, *runs, cu_seqlens, number("w_pos", w_pos), number("w_neg", w_neg), combine_id)


def _validate(tokens: Tensor, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if not validation() or torch.compiler.is_compiling():
        return
    if bool((bad := advantages.isnan()).any()):
        raise ValueError(f"advantages[{int(bad.nonzero()[0])}] is nan; its sign is needed")
    if cu_seqlens is not None:
        check_ends(cu_seqlens, tokens, "tokens")
    if mask is None or mask.numel() == 0 or mask.shape != tokens.shape:  # the op refuses a wrong shape
        return
    flat = mask.reshape(-1)
    rises = flat[1:] & ~flat[:-1]  # True behind False; only a row may begin with it
    position = torch.arange(1, flat.numel(), device=flat.device)
    if cu_seqlens is None:
        first = position % mask.shape[-1] == 0
        row = position // mask.shape[-1]
    else:
        row = torch.searchsorted(cu_seqlens.long(), position, right=True) - 1
        first = cu_seqlens.long()[row] == position
    if bool((bad := rises & ~first).any()):
        raise ValueError(
            f"mask of row {int(row[bad.nonzero()[0]])} has a token that counts behind one that does not; accepted: a run of "
            "True from the first token on"
        )


# ---- fake implementations --------------------------------------------------------------------------------------------


def _check_tokens(tokens: Tensor, cu_seqlens: Tensor | None) -> None:
    expected = 2 if cu_seqlens is None else 1
    torch._check(
        tokens.dim() == expected, lambda: f"tokens has shape {list(tokens.shape)}; expected [B, T], or [N] with cu_seqlens"
    )


@torch.library.register_fake("prefkern::conflict_runs")
def _fake_runs(
    tokens: Tensor, advantages: Tensor, group: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    same_device("tokens", tokens, advantages=advantages, group=group, mask=mask, cu_seqlens=cu_seqlens)
    _check_tokens(tokens, cu_seqlens)
    torch._check(advantages.dim() == 1 and group.dim() == 1, lambda: "advantages and group must be [B]")
    torch._check(mask is None or mask.dim() == tokens.dim(), lambda: "mask must be shaped like tokens")
    return tuple(tokens.new_empty(advantages.shape, dtype=torch.int64) for _ in range(3))


@torch.library.register_fake("prefkern::conflict_weights")
def _fake_weights(
    tokens: Tensor,
    advantages: Tensor,
    forward: Tensor,
    backward: Tensor,
    length: Tensor,
    cu_seqlens: Tensor | None,
    w_pos: float,
    w_neg: float,
    combine: int,
) -> Tensor:
    same_device(
        "tokens", tokens, advantages=advantages, forward=forward, backward=backward, length=length, cu_seqlens=cu_seqlens
    )
    _check_tokens(tokens, cu_seqlens)
    return tokens.new_empty(tokens.shape, dtype=accumulator(advantages))
