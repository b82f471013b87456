"""Exact quantiles over the tokens of all ranks, and the tokens above them, without gathering the tokens.

Values are read as integers of the same order, and the wanted one is found a digit of 11 bits at a time, the highest first:
each rank counts which of its values have which digit, the counts are summed, and all ranks choose the same digit. Counts are
integers, so that the result is that of one process, whatever the ranks hold. No step waits for a CUDA device: what a round
finds stays on it, and the number of rounds depends on nothing but the dtype.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from .._names import choice
from ..ops._arguments import accumulator, check_tensors, number
from ..ops.filters import INTERPOLATIONS, RULES
from ._ranks import HEAD, ProcessGroup, Ranks, all_well, attempt, check_heads, device_for, head, looks, ranks_of

DIGIT_BITS = 11
DIGITS = 1 << DIGIT_BITS
ROUND_NUMBERS = HEAD + DIGITS
"""int64 numbers of the message of a round."""
_NANS = 6  # where in the head a rank says how many of its values are NaN


def rounds(dtype: torch.dtype) -> int:
    """All-reduces of counts: 3, or 6 for float64."""
    return 6 if dtype == torch.float64 else 3


def masked_quantile(
    values: Tensor,
    q: float,
    mask: Tensor | None = None,
    *,
    interpolation: Literal["linear", "lower", "higher"] = "linear",
    process_group: ProcessGroup,
) -> Tensor:
    """:func:`prefkern.masked_quantile` of the values of all ranks: the same number on each, equal to one process's.

    3 all-reduces of 16 KiB (6 for float64), and for ``"linear"`` one of 8 bytes, however many values there are.

    Args:
        values, mask: as there; shapes may differ from rank to rank, and a rank may have no values. One dtype on all, but for
            bfloat16 and float16, which count as float32.
        q, interpolation: as there, the same on every rank.
        process_group: ``"world"``, a group of `torch.distributed`, or None: one process.

    Raises:
        ValueError, TypeError: as there; ranks that disagree in dtype or options, on every rank. RuntimeError on the other
            ranks, where one refuses its arguments. On CUDA, without `prefkern.set_validation(True)`, the others get NaN
            instead.
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        return ops.masked_quantile(values, q, mask, interpolation=interpolation)
    checked, refusal = attempt(lambda: _checked(values, mask, "q", q, "interpolation", interpolation, INTERPOLATIONS))
    selection = _Selection(values, checked, ranks, "masked_quantile", f"q={q}, interpolation={interpolation}", refusal)
    return selection.ended(selection.quantile(selection.share, interpolation))


def top_quantile_mask(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    fraction: float = 0.2,
    rule: Literal["count", "trl"] = "count",
    process_group: ProcessGroup,
) -> Tensor:
    """:func:`prefkern.top_quantile_mask` over the values of all ranks: this rank's part of the mask.

    Equal to one process on the values of all ranks in their order, ties too: ``"count"`` keeps exactly so many on all ranks
    together, of equal ones those of the first ranks. 3 all-reduces of 16 KiB (6 for float64), then for ``"count"`` an
    all-gather of 8 bytes a rank, for ``"trl"`` an all-reduce of 8 bytes, however many values there are.

    Args:
        values, mask: as for :func:`prefkern.distributed.masked_quantile`.
        fraction, rule: as there, the same on every rank.
        process_group: ``"world"``, a group of `torch.distributed`, or None: one process.

    Raises:
        As :func:`prefkern.distributed.masked_quantile`; where that gives NaN on CUDA, nothing is kept.
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        return ops.top_quantile_mask(values, mask, fraction=fraction, rule=rule)
    checked, refusal = attempt(lambda: _checked(values, mask, "fraction", fraction, "rule", rule, RULES))
    selection = _Selection(values, checked, ranks, "top_quantile_mask", f"fraction={fraction}, rule={rule}", refusal)
    if rule == "trl":
        keep = selection.kept & (selection.values >= selection.quantile(1 - selection.share, "linear"))
    else:
        keep = selection.largest(selection.share)
    return selection.ended(keep.view(selection.shape))


class _Selection:
    """The values of this rank, as integers of the same order too, and what all ranks together know of theirs."""

    def __init__(
        self, values: Any, checked: tuple[Tensor, Tensor, float] | None, ranks: Ranks, what: str, options: str,
        refusal: Exception | None,
    ) -> None:  # fmt: skip
        if checked is None:  # it takes part all the same, with no values
            nothing = torch.empty(0, device=device_for(values, ranks))
            checked = (nothing, nothing.bool(), 0.0)
        values, kept, self.share = checked
        self.ranks, self.refusal, self.shape = ranks, refusal, values.shape
        self.values, self.kept = values.reshape(-1), kept.reshape(-1)
        nan = self.values.isnan()
        self.used = self.kept & ~nan
        self.width = 8 * values.element_size()
        self.order = _order(self.values)
        self.pool = _without_sign(self.order, self.width)  # of which those count that are
        self.in_pool: Tensor | None = self.used
        if _narrows(self.pool):
            self.pool, self.in_pool = self.pool[self.used], None
        text = f"{options} of {str(values.dtype)[6:]}"
        start = head(text, ranks, refusal, self.order)
        start[_NANS] = (self.kept & nan).sum()
        said = self._count(0, start, start.new_zeros(()))
        if looks(said):
            check_heads(said, ranks, what, text, refusal)
        self.ok, self.nans, self.first = all_well(said, ranks), said[_NANS], said[HEAD:]
        self.number = self.first.sum()  # of values that count and are not NaN

    def ended(self, result: Tensor) -> Tensor:
        """The result, once nobody waits for this rank any more."""
        if self.refusal is not None:
            raise self.refusal
        return result

    def quantile(self, q: float, interpolation: str) -> Tensor:
        """NaN if there is none. The arithmetic of one process, operation by operation."""
        n = self.number
        at = _whole(q * (n - 1).clamp_min(0).double())
        weight = at - at.floor()
        rank = at.long()
        if interpolation == "higher":
            rank = rank + (weight > 0)
        chosen, below, equal = self.select(rank)
        result = _number(chosen, self.values.dtype)
        if interpolation == "linear":
            high = _number(torch.where(rank + 1 < below + equal, chosen, self.next_above(chosen)), self.values.dtype)
            result = torch.where((weight == 0) | (rank + 1 < below + equal), result, _interpolate(result, high, weight))
        return torch.where(self.ok & (n > 0) & (self.nans == 0), result, torch.nan)

    def largest(self, fraction: float) -> Tensor:
        """The largest of all values: exactly so many, of equal ones the first."""
        n = self.number
        exact = _whole(fraction * n.double())
        wanted = torch.where(self.ok, torch.minimum(exact.ceil().long(), n), 0)
        chosen, below, equal = self.select(n - wanted)
        ties = wanted - (n - below - equal)
        same = self.used & (self.order == chosen)
        before = self.ranks.gather(same.sum().view(1))[: self.ranks.rank].sum()
        keep = (self.used & (self.order > chosen)) | (same & (same.cumsum(0) + before <= ties))
        return keep & (wanted > 0)

    def select(self, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integer of the value with this rank among all, how many values lie below it, how many are equal to it."""
        key = below = equal = rank.new_zeros(())
        for p in range(rounds(self.values.dtype)):
            counts = self.first if p == 0 else self._count(p, key.new_zeros(HEAD), key)[HEAD:]
            up_to = below + counts.cumsum(0)
            digit = (up_to <= rank).sum().clamp_max(DIGITS - 1).view(1)
            equal = counts.index_select(0, digit)[0]
            below = up_to.index_select(0, digit)[0] - equal
            key = key | (digit[0] << self._shift(p))
        return _with_sign(key, self.width), below, equal

    def next_above(self, chosen: Tensor) -> Tensor:
        """The smallest integer of all ranks' values above that one; the largest int64 if there is none."""
        above = torch.where(self.used & (self.order > chosen), self.order, _MOST)
        return self.ranks.reduce(torch.cat([above, above.new_full((1,), _MOST)]).min().view(1), dist.ReduceOp.MIN)[0]

    def _shift(self, p: int) -> int:
        return max(self.width - DIGIT_BITS * (p + 1), 0)

    def _count(self, p: int, start: Tensor, key: Tensor) -> Tensor:
        """A round: how many values of all ranks have which digit here, and before it the digits of `key`; behind `start`."""
        takes_part = self.in_pool
        if p > 0:
            matches = (self.pool ^ key) >> self._shift(p - 1) == 0
            if takes_part is None:
                self.pool = self.pool[matches]
            else:
                takes_part = takes_part & matches
        digit = (self.pool >> self._shift(p)) & ((1 << min(DIGIT_BITS, self.width - DIGIT_BITS * p)) - 1)
        if takes_part is None:
            histogram = torch.bincount(digit, minlength=DIGITS)
        else:
            places = torch.where(takes_part, digit, DIGITS)
            histogram = digit.new_zeros(DIGITS + 1).scatter_add_(0, places, torch.ones_like(places))[:DIGITS]
        return self.ranks.reduce(torch.cat([start, histogram]))


def _narrows(t: Tensor) -> bool:
    """Whether values that take no part any more are left out: on CUDA that would wait for the device."""
    return t.device.type == "cpu"


# ---- floats as integers of the same order: csrc/math/quantile.h --------------------------------------------------------

_MOST = torch.iinfo(torch.int64).max


def _signed(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _turned(bits: Tensor) -> Tensor:
    """Of a negative number all bits but the sign are turned; its own inverse."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _order(values: Tensor) -> Tensor:
    """int64, ascending with the values; both zeros are one."""
    return _turned((values + 0.0).contiguous().view(_signed(values.dtype))).long()


def _number(order: Tensor, dtype: torch.dtype) -> Tensor:
    return _turned(order.to(_signed(dtype))).view(dtype)


def _without_sign(order: Tensor, width: int) -> Tensor:
    """From the smallest on: of 64 bits, the bits of the unsigned number."""
    return order ^ torch.iinfo(torch.int64).min if width == 64 else order + (1 << 31)


def _with_sign(key: Tensor, width: int) -> Tensor:
    return key ^ torch.iinfo(torch.int64).min if width == 64 else key - (1 << 31)


def _whole(x: Tensor) -> Tensor:
    """x >= 0, or the integer that it is but for the rounding of the product it comes from."""
    nearest = (x + 0.5).floor()
    return torch.where((x - nearest).abs() <= 2.0**-50 * x, nearest, x)


def _interpolate(low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    a, b = low.double(), high.double()
    difference = b - a
    between = torch.where(weight < 0.5, a + weight * difference, b - difference * (1 - weight))
    ends = torch.where((a == -torch.inf) | (b == torch.inf), a + b, a * (1 - weight) + b * weight)  # where that overflows
    return torch.where(difference == torch.inf, ends, between).to(low.dtype)


def _checked(
    values: Tensor, mask: Tensor | None, name: str, share: float, option: str, choice_: str, accepted: tuple[str, ...]
) -> tuple[Tensor, Tensor, float]:
    """Values in the dtype that they are compared in, which of them count, and the share as a float."""
    check_tensors(values=values)
    choice(option, choice_, accepted)
    share = number(name, share)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}; it must lie in [0, 1]")
    if not values.is_floating_point():
        raise TypeError(f"values has dtype {values.dtype}; accepted: float32, bfloat16, float16, float64")
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    check_tensors(mask=mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}; values has shape {list(values.shape)}, so the same is expected")
    if mask.device != values.device:
        raise ValueError(f"mask is on {mask.device} but values is on {values.device}; they must be on the same device")
    return values.detach().to(accumulator(values)), mask, share
