"""Sums over the tokens of each sequence, and recursions that run backwards through them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.types import GaeOutput, StepMeans
from prefkern.reference._tokens import kept_tokens, rows_of_tokens, widen

TRANSFORMS = ("none", "exp")
BOOTSTRAPS = ("repeat", "critic", "zero")


def sequence_sum(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    head: Tensor | None = None,
    tail_weight: float | None = None,
    decay: float = 1.0,
) -> Tensor:
    """sum_t w_t h(p_t) decay^p_t f(values_t - minus_t) over the tokens of each sequence that count: [B]

    p_t is the number of tokens of the sequence that count before t; h is 1 for p_t < head, and tail_weight behind.

    Args:
        values: [B, T], or packed [N] with `cu_seqlens`. The only argument with a gradient.
        mask: bool, shaped like `values`; True counts. None counts every token.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end.
        minus: shaped like `values`, and so is `weights`. None: 0, and 1.
        transform: f, "none" or "exp".
        starts, ends: int [B], positions in each sequence: only tokens from one up to, not including, the other count.
        head: int [B], with tail_weight. None: no tail.
        decay: in [0, 1].

    A sequence without tokens gives 0. Values outside the mask change nothing, whatever they are.
    """
    return _sums(values, mask, cu_seqlens, minus, weights, transform, starts, ends, head, tail_weight, decay)[0]


def sequence_mean(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    head: Tensor | None = None,
    tail_weight: float | None = None,
    decay: float = 1.0,
) -> Tensor:
    """`sequence_sum` divided by the number of tokens that count; 0 for a sequence without tokens."""
    sums, counts = _sums(values, mask, cu_seqlens, minus, weights, transform, starts, ends, head, tail_weight, decay)
    return sums / counts.clamp_min(1)


def _sums(
    values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, minus: Tensor | None, weights: Tensor | None,
    transform: str, starts: Tensor | None, ends: Tensor | None, head: Tensor | None, tail_weight: float | None, decay: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums and token counts per sequence."""
    if transform not in TRANSFORMS:
        raise ValueError(f"transform: got {transform!r}, accepted are {list(TRANSFORMS)}")
    row, rows = rows_of_tokens(values, cu_seqlens, "values")
    keep = kept_tokens(values, mask)
    position = _positions(row, rows)
    if starts is not None:
        keep = keep & (position >= starts[row])
    if ends is not None:
        keep = keep & (position < ends[row])
    terms = widen(values.reshape(-1)[keep])
    if minus is not None:
        terms = terms - minus.detach().reshape(-1)[keep].to(terms.dtype)
    if transform == "exp":
        terms = terms.exp()
    if weights is not None:
        terms = terms * weights.detach().reshape(-1)[keep].to(terms.dtype)
    place = _positions(row[keep], rows)
    if head is not None and tail_weight is not None:
        terms = torch.where(place < head[row[keep]], terms, terms * tail_weight)
    terms = terms * decay ** place.to(terms.dtype)
    zeros = terms.new_zeros(rows)
    return zeros.index_add(0, row[keep], terms), zeros.index_add(0, row[keep], torch.ones_like(terms))


def masked_mean_pool(hidden: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """The mean of hidden [B, T, H], or packed [N, H], over the tokens of each sequence that count: [B, H]; 0 without any"""
    if mask is None:
        mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    return step_mean(hidden, mask.long(), 1, cu_seqlens=cu_seqlens).means[:, 0]


def step_mean(
    values: Tensor, step_ids: Tensor, n_steps: int, *, cu_seqlens: Tensor | None = None, clamp: bool = False
) -> StepMeans:
    """The mean of values over the tokens of each step of each sequence

    Args:
        values: [B, T] or [B, T, H], or packed [N] or [N, H] with `cu_seqlens`. The only argument with a gradient.
        step_ids: int [B, T] or [N], 1 to n_steps; 0 for tokens of no step.
        clamp: ids above n_steps count as n_steps. Else they are refused.

    Returns StepMeans(means [B, n_steps] or [B, n_steps, H], counts [B, n_steps]); a step without tokens has mean 0.
    """
    row, rows = rows_of_tokens(step_ids, cu_seqlens, "step_ids")
    ids = step_ids.reshape(-1).long()
    if clamp:
        ids = ids.clamp_max(n_steps)
    if bool(((ids < 0) | (ids > n_steps)).any()):
        raise ValueError(f"step_ids: must lie in [0, {n_steps}]")
    keep = ids > 0
    cell = (row * n_steps + ids - 1)[keep]
    features = values.shape[step_ids.dim() :]
    kept = widen(values.reshape(ids.numel(), *features)[keep])
    sums = kept.new_zeros(rows * n_steps, *features).index_add(0, cell, kept)
    counts = torch.bincount(cell, minlength=rows * n_steps)
    divisor = counts.clamp_min(1).reshape(-1, *(1 for _ in features))
    return StepMeans((sums / divisor).reshape(rows, n_steps, *features), counts.reshape(rows, n_steps))


def discounted_returns(
    rewards: Tensor, mask: Tensor | None = None, *, gamma: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """R_t = r_t + gamma R_{t+1} over the tokens of each sequence that count

    A token that does not count is passed over: what comes from behind it is not discounted for it. It gets 0 itself.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`. Constants: no gradient.
        mask: bool, shaped like `rewards`; True counts. None counts every token.
        gamma: in [0, 1].
    """
    _check_factors(gamma=gamma)
    row, rows = rows_of_tokens(rewards, cu_seqlens, "rewards")
    keep = kept_tokens(rewards, mask)
    r = widen(rewards.detach().reshape(-1))
    result = torch.zeros_like(r)
    result[keep] = _suffix_scan(r[keep], row[keep], _positions(row[keep], rows), rows, gamma)
    return result.reshape(rewards.shape)


def segmented_returns(rewards: Tensor, segment: Tensor, order: Tensor, *, gamma: float) -> Tensor:
    """G_b = r_b + gamma G_next(b), where next(b) is the row of the same segment that follows in `order`

    Args:
        rewards: [B]. Constants: no gradient.
        segment: int64 [B], any ids in any order.
        order: int64 [B], the place of each row in its segment; any integers, but no two rows of a segment share one.
        gamma: in [0, 1].
    """
    _check_factors(gamma=gamma)
    r = widen(rewards.detach())
    ids, row = torch.unique(segment, return_inverse=True)
    by_order = torch.argsort(order, stable=True)
    sorted_rows = by_order[torch.argsort(row[by_order], stable=True)]
    before, after = sorted_rows[:-1], sorted_rows[1:]
    if bool(((row[before] == row[after]) & (order[before] == order[after])).any()):
        raise ValueError("order: two rows of a segment have the same place")
    result = torch.zeros_like(r)
    result[sorted_rows] = _suffix_scan(
        r[sorted_rows], row[sorted_rows], _positions(row[sorted_rows], len(ids)), len(ids), gamma
    )
    return result


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    finished: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Literal["repeat", "critic", "zero"] = "repeat",
    last_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> GaeOutput:
    """Generalised advantage estimates over the l tokens of each sequence that count

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    A_l = 0

    V_l, the value of the state after the last token, is 0 where the sequence is finished, and otherwise

        repeat  V_{l-1} (EGAE)
        critic  last_values
        zero    0

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`. Constants like all arguments: no gradient.
        values: shaped like `rewards`.
        mask: bool, shaped like `rewards`; True counts. Tokens that do not count are passed over. None counts every token.
        lengths: int64 [B], instead of a mask of padded sequences: the first tokens count.
        finished: bool [B]; None: all are.
        last_values: [B], with "critic"; looked at where a sequence is not finished.

    Returns GaeOutput(advantages, returns = advantages + values), 0 at tokens that do not count.
    """
    _check_factors(gamma=gamma, lam=lam)
    if bootstrap not in BOOTSTRAPS:
        raise ValueError(f"bootstrap: got {bootstrap!r}, accepted are {list(BOOTSTRAPS)}")
    if (last_values is not None) != (bootstrap == "critic"):
        raise ValueError('last_values: belongs to bootstrap "critic", and to no other')
    row, rows = rows_of_tokens(rewards, cu_seqlens, "rewards")
    if lengths is not None:
        if mask is not None or cu_seqlens is not None:
            raise ValueError("lengths: accepted for padded sequences without a mask")
        if bool(((lengths < 0) | (lengths > rewards.shape[1])).any()):
            raise ValueError(f"lengths: must lie in [0, {rewards.shape[1]}]")
        mask = torch.arange(rewards.shape[1], device=rewards.device) < lengths.unsqueeze(1)
    keep = kept_tokens(rewards, mask)
    r, v, row = widen(rewards.detach()).reshape(-1)[keep], values.detach().reshape(-1)[keep], row[keep]
    v = v.to(r.dtype)

    last = torch.ones_like(row, dtype=torch.bool)
    last[:-1] = row[:-1] != row[1:]
    following = torch.zeros_like(v)
    following[:-1] = v[1:]
    following[last] = 0.0
    if finished is not None and bootstrap != "zero":
        cut = last & ~finished[row]
        following[cut] = v[cut] if last_values is None else last_values.detach().to(r.dtype)[row[cut]]
    delta = r + gamma * following - v
    advantages = _suffix_scan(delta, row, _positions(row, rows), rows, gamma * lam)

    def tokens(x: Tensor) -> Tensor:
        return torch.zeros(keep.shape, dtype=r.dtype, device=r.device).masked_scatter(keep, x).reshape(rewards.shape)

    return GaeOutput(tokens(advantages), tokens(advantages + v))


def _positions(row: Tensor, rows: int) -> Tensor:
    """How many tokens of the same row come before each; equal rows are adjacent."""
    sizes = torch.bincount(row, minlength=rows)
    return torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]


def _suffix_scan(x: Tensor, row: Tensor, position: Tensor, rows: int, factor: float) -> Tensor:
    """y_p = x_p + factor y_{p+1} within each row."""
    if len(x) == 0:
        return x
    length = int(position.max()) + 1
    dense = x.new_zeros(rows, length)
    dense[row, position] = x
    sizes = torch.bincount(row, minlength=rows)
    carry = x.new_zeros(rows)
    for t in reversed(range(length)):
        inside = sizes > t
        carry = torch.where(inside, dense[:, t] + factor * carry, carry)
        dense[:, t] = carry
    return dense[row, position]


def _check_factors(**factors: float) -> None:
    for name, value in factors.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, must lie in [0, 1]")
