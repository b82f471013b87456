"""Tokens that completions of both signs share. Kernels: ``csrc/conflicts``; formulas: ``csrc/math/conflicts.h``."""

from typing import Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import accumulator, check_ends, check_tensors, number, same_device
from ._call import call, validation
from .types import ConflictRuns

_divergence = torch.ops.prefkern.first_divergence.default
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


def first_divergence(
    ids_a: Tensor,
    ids_b: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    *,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_b: Tensor | None = None,
) -> Tensor:
    """Where the tokens of two sequences first differ, for B pairs: how many tokens their common prefix has.

    That is the position, from 0, of the first token that differs. Where none does up to the end of one of the two, it is the
    number of tokens of the shorter one (of both, where they are equal), a position at which that one has no token. What comes
    behind, ``starts`` of :func:`sequence_sum` picks out; a pair with nothing in common has 0.

    Args:
        ids_a, ids_b: ``[B, T_a]`` and ``[B, T_b]``, or packed ``[N_a]`` and ``[N_b]``. int64 or int32, both the same.
        mask_a, mask_b: bool, shaped like the ids: in every row a run of True from the first token on. None: every token counts.
            What lies outside is never looked at.
        cu_seqlens_a, cu_seqlens_b: int32 ``[B + 1]``, where packed sequences begin and end.

    Returns:
        int64 ``[B]``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Masks with holes and wrong ``cu_seqlens``
            are always found on the CPU; on CUDA the pair, or every pair, gets -1, or it raises under
            ``prefkern.set_validation(True)``.
    """
    check_tensors(ids_a=ids_a, ids_b=ids_b)
    given = {"mask_a": mask_a, "mask_b": mask_b, "cu_seqlens_a": cu_seqlens_a, "cu_seqlens_b": cu_seqlens_b}
    check_tensors(**{name: t for name, t in given.items() if t is not None})
    if ids_a.is_cuda and validation() and not torch.compiler.is_compiling():
        for side, ids, mask, cu_seqlens in (("a", ids_a, mask_a, cu_seqlens_a), ("b", ids_b, mask_b, cu_seqlens_b)):
            if cu_seqlens is not None:
                check_ends(cu_seqlens, ids, f"ids_{side}", f"cu_seqlens_{side}")
            _validate_runs(f"mask_{side}", mask, ids, cu_seqlens)
    return call(_divergence, ids_a, ids_b, mask_a, mask_b, cu_seqlens_a, cu_seqlens_b)


def _validate(tokens: Tensor, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if not validation() or torch.compiler.is_compiling():
        return
    if bool((bad := advantages.isnan()).any()):
        raise ValueError(f"advantages[{int(bad.nonzero()[0])}] is nan; its sign is needed")
    if cu_seqlens is not None:
        check_ends(cu_seqlens, tokens, "tokens")
    _validate_runs("mask", mask, tokens, cu_seqlens)


def _validate_runs(name: str, mask: Tensor | None, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
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
            f"{name} of row {int(row[bad.nonzero()[0]])} has a token that counts behind one that does not; accepted: a run of "
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


@torch.library.register_fake("prefkern::first_divergence")
def _fake_divergence(
    ids_a: Tensor, ids_b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, cu_seqlens_a: Tensor | None,
    cu_seqlens_b: Tensor | None,
) -> Tensor:  # fmt: skip
    same_device("ids_a", ids_a, ids_b=ids_b, mask_a=mask_a, mask_b=mask_b, cu_seqlens_a=cu_seqlens_a, cu_seqlens_b=cu_seqlens_b)
    for name, ids, cu_seqlens in (("ids_a", ids_a, cu_seqlens_a), ("ids_b", ids_b, cu_seqlens_b)):
        expected = 2 if cu_seqlens is None else 1
        torch._check(ids.dim() == expected, lambda name=name: f"{name} must be [B, T], or [N] with cu_seqlens")
    rows = ids_a.shape[0] if cu_seqlens_a is None else cu_seqlens_a.shape[0] - 1
    return ids_a.new_empty((rows,), dtype=torch.int64)


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
