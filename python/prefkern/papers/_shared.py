"""What several papers share: checks of arguments, whose values are looked at where that costs no synchronisation, and one
value per row given to its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import validation


def may_look(*tensors: Tensor) -> bool:
    """Whether values may be looked at: on the CPU always, elsewhere under `prefkern.set_validation(True)`, never while
    compiling."""
    return not torch.compiler.is_compiling() and (validation() or all(t.device.type == "cpu" for t in tensors))


def check_values(name: str, values: Tensor, good: Tensor, accepted: str) -> None:
    """ValueError that names the first row of `values` [B] which is not `good`, if that may be looked at."""
    if may_look(values) and not bool(good.all()):
        i = int((~good).nonzero()[0, 0])
        raise ValueError(f"{name}[{i}] is {values[i].tolist()}; {accepted}")


def check_finite(name: str, values: Tensor) -> None:
    """ValueError that names the first of `values` [B] which is not finite, if they may be looked at."""
    check_values(name, values, values.isfinite(), "a finite number is expected")


def check_rows(rows: int, **tensors: Tensor | None) -> None:
    """ValueError unless every tensor is [B]."""
    for name, t in tensors.items():
        if t is not None and t.shape != (rows,):
            raise ValueError(f"{name} has shape {list(t.shape)}; [{rows}] is expected")


def per_token(values: Tensor, like: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """values [B] given to each token of the row, shaped like `like`: [B, T], or packed [N]."""
    return values[:, None].expand_as(like) if cu_seqlens is None else values[_rows(like, cu_seqlens)]


def last_tokens(like: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """bool, shaped like `like`: the last token of each row that counts."""
    keep = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    so_far = keep.cumsum(-1)
    if cu_seqlens is None:
        return keep & (so_far == so_far[:, -1:])
    before = torch.cat([so_far.new_zeros(1), so_far])
    return keep & (so_far == before[cu_seqlens[1:].long()][_rows(like, cu_seqlens)])


def _rows(like: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The row of each packed token."""
    places = torch.arange(like.shape[0], dtype=cu_seqlens.dtype, device=like.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
