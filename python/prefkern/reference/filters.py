"""Order statistics over the tokens of a batch, and the tokens above them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

INTERPOLATIONS = ("linear", "lower", "higher")
RULES = ("count", "trl")


def masked_quantile(
    values: Tensor,
    q: float,
    mask: Tensor | None = None,
    *,
    interpolation: Literal["linear", "lower", "higher"] = "linear",
) -> Tensor:
    """The q-quantile, 0-d, of all values that count, sorted x_0 <= ... <= x_{n-1}: with p = q (n - 1),

        lower   x_floor(p)
        higher  x_ceil(p)
        linear  x_floor(p) + (p - floor(p)) (x_ceil(p) - x_floor(p))

    A p that is an integer but for the rounding of the product is that integer.

    Args:
        values: any shape.
        q: in [0, 1].
        mask: bool, shaped like `values`; True counts. None counts every value.

    NaN if no value counts or one of them is NaN. float64 for float64 values, else float32. No gradient.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {interpolation!r}, accepted are {list(INTERPOLATIONS)}")
    if not 0 <= q <= 1:
        raise ValueError(f"q: got {q}, must lie in [0, 1]")
    kept = _that_count(values, mask)
    n = len(kept)
    if n == 0 or bool(kept.isnan().any()):
        return kept.new_full((), math.nan)
    p = _whole(q * (n - 1))
    x = kept.sort().values
    low, high = x[math.floor(p)], x[math.ceil(p)]
    if interpolation != "linear" or low == high:
        return high if interpolation == "higher" else low
    if bool(low.isinf() | high.isinf()):
        return low + high
    return torch.lerp(low.double(), high.double(), p - math.floor(p)).to(x.dtype)


def top_quantile_mask(
    values: Tensor, mask: Tensor | None = None, *, fraction: float = 0.2, rule: Literal["count", "trl"] = "count"
) -> Tensor:
    """Which values are among the largest `fraction` of those that count. bool, shaped like `values`, False outside the mask.

        count  exactly ceil(fraction n) values are kept, of equal ones those that come first; NaN is as if outside the mask
        trl    values >= masked_quantile(values, 1 - fraction, mask): equal values all the same, nothing if one is NaN

    Args:
        fraction: in [0, 1].
    """
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, accepted are {list(RULES)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, must lie in [0, 1]")
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if rule == "trl":
        return keep & (_widen(values) >= masked_quantile(values, 1 - fraction, mask))
    keep = keep & ~values.isnan()
    kept = _that_count(values, keep)
    best = kept.argsort(descending=True, stable=True)[: math.ceil(_whole(fraction * len(kept)))]
    chosen = torch.zeros_like(kept, dtype=torch.bool).index_fill(0, best, True)
    return torch.zeros_like(keep).masked_scatter(keep, chosen)


def _widen(values: Tensor) -> Tensor:
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()


def _that_count(values: Tensor, mask: Tensor | None) -> Tensor:
    return _widen(values).reshape(-1) if mask is None else _widen(values)[mask]


def _whole(x: float) -> float:
    """x, or the integer that it is within the rounding of a product."""
    return float(round(x)) if abs(x - round(x)) <= 4 * 2.0**-52 * x else x
