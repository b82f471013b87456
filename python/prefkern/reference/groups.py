"""Reductions over the rows of a group, its pairs, and its normalisation. A group is the rows with equal ids."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.ops.types import LevelPairs
from prefkern.reference._tokens import widen

REDUCTIONS = ("sum", "mean", "min", "max", "logsumexp", "count")


def group_reduce(
    values: Tensor,
    group: Tensor,
    *,
    mask: Tensor | None = None,
    reduce: Literal["sum", "mean", "min", "max", "logsumexp", "count"] = "sum",
) -> Tensor:
    """The reduction of each group over its rows that count, given to every row of the group: [B]

    Args:
        values: [B]. Gradients flow from "sum", "mean" and "logsumexp".
        group: int64 [B], any ids in any order.
        mask: bool [B]; True counts. A row outside it gets its group's result too, and its value changes nothing.
        reduce: where no row of a group counts, "sum", "mean" and "count" are 0, "min" is inf, "max" and "logsumexp" are
            -inf.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: got {reduce!r}, accepted are {list(REDUCTIONS)}")
    v = widen(values)
    ids, index = torch.unique(group, return_inverse=True)
    keep = torch.ones_like(group, dtype=torch.bool) if mask is None else mask
    kept, at = v[keep], index[keep]
    zeros = v.new_zeros(len(ids))
    count = zeros.index_add(0, at, torch.ones_like(kept))
    if reduce == "count":
        return count[index]
    if reduce == "sum":
        return zeros.index_add(0, at, kept)[index]
    if reduce == "mean":
        return (zeros.index_add(0, at, kept) / count.clamp_min(1))[index]
    if reduce == "min":
        return (zeros + torch.inf).scatter_reduce(0, at, kept.detach(), "amin")[index]
    highest = (zeros - torch.inf).scatter_reduce(0, at, kept.detach(), "amax")
    if reduce == "max":
        return highest[index]
    shift = highest.masked_fill(highest.isinf(), 0.0)
    total = zeros.index_add(0, at, (kept - shift[at]).exp())
    nothing = total == 0
    return (shift + total.masked_fill(nothing, 1.0).log()).masked_fill(nothing, -torch.inf)[index]


def level_pairs(
    scores: Tensor,
    group: Tensor,
    levels: Tensor,
    *,
    beta: float = 0.1,
    anisotropy: float = 2.5,
    per_response: bool = False,
) -> LevelPairs:
    """The mean of -log sigmoid(margin) over all pairs (i, j) of a group with level_i < level_j (1 is the best)

        margin = kappa_i beta (h_i - h_j)                 kappa = anisotropy at level 1, else 1
        margin = kappa_i beta h_i - kappa_j beta h_j      with per_response

    Args:
        scores: h, [B]. The only argument with a gradient.
        group: int64 [B], any ids in any order.
        levels: int64 [B], at least 1.

    Returns LevelPairs(loss, pairs), 0-d. Without pairs both are 0.
    """
    if bool((levels < 1).any()):
        raise ValueError("levels: must be at least 1")
    h = widen(scores)
    kappa = torch.full_like(h, beta).masked_fill(levels == 1, beta * anisotropy).detach()
    i, j = torch.nonzero((group[:, None] == group) & (levels[:, None] < levels), as_tuple=True)
    margin = kappa[i] * h[i] - kappa[j] * h[j] if per_response else kappa[i] * (h[i] - h[j])
    pairs = torch.tensor(len(i), device=h.device)
    return LevelPairs(F.softplus(-margin).sum() / pairs.clamp_min(1), pairs)


def group_normalize(x: Tensor, group: Tensor, *, eps: float, ddof: int = 1, sigma_grad: bool = False) -> Tensor:
    """z = (x - m) / (s + eps), m and s being mean and standard deviation (divisor n - ddof) of x's group: [B]

    Args:
        x: [B]. The gradient flows through m, and through s if `sigma_grad` is set.
        group: int64 [B], any ids in any order.
        eps: not negative.

    Where all x of a group are equal z is exactly 0, s counts as a constant, and if eps is 0 there is no gradient.
    """
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, must not be negative")
    if ddof not in (0, 1):
        raise ValueError(f"ddof: got {ddof}, accepted are 0 and 1")
    x = widen(x)
    mean = group_reduce(x, group, reduce="mean")
    lowest, highest = (group_reduce(x, group, reduce=reduce) for reduce in ("min", "max"))
    mean = mean + torch.where(lowest == highest, x - mean, 0.0).detach()
    d = x - mean
    n = group_reduce(x, group, reduce="count")
    variance = group_reduce(d.square(), group, reduce="sum") / (n - ddof).clamp_min(1)
    equal = variance == 0
    s = variance.masked_fill(equal, 1.0).sqrt().masked_fill(equal, 0.0)
    divisor = (s if sigma_grad else s.detach()) + eps
    return torch.where(divisor == 0, 0.0, d / divisor.masked_fill(divisor == 0, 1.0))
