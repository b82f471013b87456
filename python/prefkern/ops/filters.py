"""Quantiles over the tokens of a batch, and the tokens above them. Kernels: ``csrc/filters``; formulas:
``csrc/math/quantile.h``."""

from typing import Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import accumulator, check_tensors, number, same_device
from ._call import call

_quantile, _top = torch.ops.prefkern.masked_quantile.default, torch.ops.prefkern.top_quantile_mask.default

INTERPOLATIONS = ("linear", "lower", "higher")
RULES = ("count", "trl")


def masked_quantile(
    values: Tensor,
    q: float,
    mask: Tensor | None = None,
    *,
    interpolation: Literal["linear", "lower", "higher"] = "linear",
) -> Tensor:
    r"""The q-quantile of all values that count, exactly, without sorting them.

    Of the sorted values :math:`x_0 \le \dots \le x_{n-1}`, with :math:`p = q (n - 1)` and :math:`k = \lfloor p \rfloor`:
    ``"lower"`` is :math:`x_k`, ``"higher"`` :math:`x_{\lceil p \rceil}`, ``"linear"`` :math:`x_k + (p - k)(x_{k+1} - x_k)`. A p
    that is an integer but for the rounding of that product is taken as the integer.

    Args:
        values: any shape; float32, bfloat16 or float16 (float64 on the CPU). Constants: no gradient flows to them. Infinities
            are values like others.
        q: in [0, 1].
        mask: bool, shaped like ``values``; True counts. None: every value counts. What lies outside is never looked at.
        interpolation: ``"linear"``, ``"lower"`` or ``"higher"``.

    Returns:
        0-d; float64 for float64 values, else float32. NaN if no value counts, or one of them is NaN. No size is too large, and
        there is no synchronisation on CUDA.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    values, mask = _checked(values, mask)
    return call(_quantile, values, mask, number("q", q), choice("interpolation", interpolation, INTERPOLATIONS))


def top_quantile_mask(
    values: Tensor, mask: Tensor | None = None, *, fraction: float = 0.2, rule: Literal["count", "trl"] = "count"
) -> Tensor:
    r"""Which values are among the largest ``fraction`` of all that count: the tokens of highest entropy, say.

    Args:
        values, mask: as for :func:`masked_quantile`.
        fraction: in [0, 1].
        rule: ``"count"`` keeps exactly :math:`\lceil \mathrm{fraction} \cdot n \rceil` values, of equal ones those that come
            first in memory order; a NaN is as if outside the mask. ``"trl"`` keeps every value from the linear quantile
            ``1 - fraction`` on, so that equal values share one fate, and nothing if one is NaN.

    Returns:
        bool, shaped like ``values``; False outside the mask.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    values, mask = _checked(values, mask)
    return call(_top, values, mask, number("fraction", fraction), choice("rule", rule, RULES))


def _checked(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_tensors(values=values)
    if mask is not None:
        check_tensors(mask=mask)
    return values.detach() if values.requires_grad else values, mask


# ---- fake implementations --------------------------------------------------------------------------------------------


def _check_mask(values: Tensor, mask: Tensor | None) -> None:
    same_device("values", values, mask=mask)
    torch._check(mask is None or mask.dim() == values.dim(), lambda: "mask must be shaped like values")


@torch.library.register_fake("prefkern::masked_quantile")
def _fake_quantile(values: Tensor, mask: Tensor | None, q: float, interpolation: int) -> Tensor:
    _check_mask(values, mask)
    return values.new_empty((), dtype=accumulator(values))


@torch.library.register_fake("prefkern::top_quantile_mask")
def _fake_top(values: Tensor, mask: Tensor | None, fraction: float, rule: int) -> Tensor:
    _check_mask(values, mask)
    return values.new_empty(values.shape, dtype=torch.bool)
