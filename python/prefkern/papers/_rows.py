"""What several papers do with rows and their tokens: one value per row given to its tokens, its last token, checks of data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import validation


def looks_at_data(*tensors: Tensor) -> bool:
    """Whether checks of values run: on the CPU always, on CUDA when validation is on, never while compiling."""
    return not torch.compiler.is_compiling() and (validation() or all(t.device.type == "cpu" for t in tensors))


def check_finite(name: str, values: Tensor) -> None:
    """ValueError naming the first value of [B] that is not finite."""
    if looks_at_data(values) and not bool((finite := values.isfinite()).all()):
        i = int((~finite).nonzero()[0, 0])
        raise ValueError(f"{name}[{i}] is {values[i].item()}; a finite number is expected")


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
