"""What a problem is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A call by keyword: `leaves` get gradients. The three functions take the same arguments."""

    op: str
    case: str
    leaves: dict[str, Tensor]
    options: dict[str, Any]
    ours: Callable[..., Any]
    exact: Callable[..., Any]
    plain: Callable[..., Any] = field(repr=False)
    """The definition as PyTorch computes it in the type of the inputs."""


def problem(op: str, case: str, leaves: dict[str, Tensor], options: dict[str, Any]) -> Problem:
    """For an op whose definition is its own plain PyTorch."""
    import prefkern
    from prefkern import reference

    definition = getattr(reference, op)
    return Problem(op, case, leaves, options, getattr(prefkern, op), definition, definition)


def on(device: str, given: Problem) -> Problem:
    """The same problem there."""
    leaves = {name: leaf.to(device) for name, leaf in given.leaves.items()}
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.options.items()}
    return replace(given, leaves=leaves, options=options)


@dataclass(frozen=True)
class Ragged:
    """Sequences of uneven lengths, one of them empty, padded and packed."""

    mask: Tensor

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.mask.sum(1).cumsum(0)]).int()

    def pad(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """NaN outside the mask."""
        return x.masked_fill(~self.mask, math.nan).to(dtype)


def ragged(rows: int, length: int) -> Ragged:
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
    mask[rows // 2] = False
    return Ragged(mask)
