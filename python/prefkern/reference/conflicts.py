"""Tokens on which completions of both signs agree, at the beginning and at the end of the completions of a group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.types import ConflictRuns

COMBINES = ("max_once", "product")


def conflict_runs(
    tokens: Tensor, advantages: Tensor, group: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> ConflictRuns:
    """How far each completion agrees, from its first token on and from its last token back, with one of the other sign.

    Row i with A_i > 0 (A_i < 0) is in conflict at position t if a row of its group with A < 0 (A > 0) has the same token at
    t, and t lies inside both. The forward run is the number of positions in conflict before the first that is not; the
    backward run is the same with every row read from its last token back. Later agreements change nothing.

    Args:
        tokens: integers [B, T], or packed [N] with `cu_seqlens`.
        advantages: [B]; only their signs are used. Rows with A = 0 are inactive: they conflict with nothing.
        group: integers [B], any ids in any order; equal ids belong together.
        mask: bool, shaped like `tokens`; True counts. In every row it must be a run of True from the first position on.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end.

    Returns int64 [B] each: forward and backward runs (0 for inactive rows), and how many tokens of the row count.
    """
    row, at, rows = _positions(tokens, cu_seqlens)
    keep = torch.ones_like(row, dtype=torch.bool) if mask is None else mask.reshape(-1)
    length = torch.zeros(rows, dtype=torch.int64, device=tokens.device).index_add(0, row, keep.long())
    if not torch.equal(keep, at < length[row]):
        raise ValueError("mask: in every row it must be a run of True from the first position on")
    if bool(advantages.isnan().any()):
        raise ValueError("advantages: NaN has no sign")

    sequences = [tokens.reshape(-1)[(row == i) & keep].tolist() for i in range(rows)]
    backwards = [list(reversed(s)) for s in sequences]
    signs, ids = advantages.sign().tolist(), group.tolist()

    def runs(of: list[list[int]]) -> Tensor:
        result = []
        for i, own in enumerate(of):
            others = [of[j] for j in range(rows) if ids[j] == ids[i] and signs[i] * signs[j] < 0]
            n = 0
            while n < len(own) and any(n < len(other) and other[n] == own[n] for other in others):
                n += 1
            result.append(n)
        return torch.tensor(result, dtype=torch.int64, device=tokens.device)

    return ConflictRuns(runs(sequences), runs(backwards), length)


def first_divergence(
    ids_a: Tensor,
    ids_b: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    *,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_b: Tensor | None = None,
) -> Tensor:
    """How many tokens the common prefix of each pair of sequences has: int64 [B]

    Args:
        ids_a, ids_b: integers [B, T_a] and [B, T_b], or packed [N_a] and [N_b].
        mask_a, mask_b: bool, shaped like the ids: in every row a run of True from the first token on. None counts all.
        cu_seqlens_a, cu_seqlens_b: int32 [B + 1].
    """

    def sequences(ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[list[int]]:
        row, at, rows = _positions(ids, cu_seqlens)
        keep = torch.ones_like(row, dtype=torch.bool) if mask is None else mask.reshape(-1)
        length = torch.zeros(rows, dtype=torch.int64, device=ids.device).index_add(0, row, keep.long())
        if not torch.equal(keep, at < length[row]):
            raise ValueError("mask: in every row it must be a run of True from the first position on")
        return [ids.reshape(-1)[(row == i) & keep].tolist() for i in range(rows)]

    result = []
    pairs = zip(sequences(ids_a, mask_a, cu_seqlens_a), sequences(ids_b, mask_b, cu_seqlens_b), strict=True)
    for a, b in pairs:
        n = 0
        while n < min(len(a), len(b)) and a[n] == b[n]:
            n += 1
        result.append(n)
    return torch.tensor(result, dtype=torch.int64, device=ids_a.device)


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
    """The weight of every token: w_pos (A > 0) or w_neg (A < 0) in a conflict run, 1 elsewhere, 0 outside the mask.

    With f, b and n from `conflict_runs`, token t is in the forward run if t < f, in the backward run if t >= n - b. A token
    in both gets the weight once ("max_once") or its square ("product").

    Args:
        runs: what `conflict_runs` returned for the same tokens, advantages, group and mask; None: found here.

    Returns float32 (float64 for float64 advantages), shaped like `tokens`. See `conflict_runs` for the other arguments.
    """
    if combine not in COMBINES:
        raise ValueError(f"combine: got {combine!r}, accepted are {list(COMBINES)}")
    if runs is None:
        runs = conflict_runs(tokens, advantages, group, mask, cu_seqlens=cu_seqlens)
    row, at, _ = _positions(tokens, cu_seqlens)
    a = advantages.detach().to(torch.float64 if advantages.dtype == torch.float64 else torch.float32)
    one = torch.ones_like(a)
    weight = torch.where(a > 0, w_pos * one, torch.where(a < 0, w_neg * one, one))[row]
    first, last = at < runs.forward[row], at >= (runs.length - runs.backward)[row]
    both = weight.square() if combine == "product" else weight
    result = torch.where(first & last, both, torch.where(first | last, weight, 1.0))
    return torch.where(at < runs.length[row], result, 0.0).reshape(tokens.shape)


def _positions(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The sequence of each token and its position in there, [N] each; and the number of sequences."""
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens: got shape {list(tokens.shape)}, accepted are [B, T], or [N] with cu_seqlens")
        starts = torch.arange(tokens.shape[0] + 1, device=tokens.device) * tokens.shape[1]
    else:
        starts = cu_seqlens.long()
        if tokens.dim() != 1 or int(starts[0]) != 0 or int(starts[-1]) != len(tokens) or bool((starts.diff() < 0).any()):
            raise ValueError(f"cu_seqlens: must ascend from 0 to the {tokens.numel()} tokens, which must be [N]")
    rows = len(starts) - 1
    row = torch.arange(rows, device=tokens.device).repeat_interleave(starts.diff())
    return row, torch.arange(tokens.numel(), device=tokens.device) - starts[row], rows
