"""Which sequence each token belongs to, padded or packed."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_tokens(values: Tensor, cu_seqlens: Tensor | None, name: str) -> tuple[Tensor, int]:
    """The sequence of each token, [N], and the number of sequences."""
    if cu_seqlens is None:
        if values.dim() != 2:
            raise ValueError(f"{name}: got shape {list(values.shape)}, accepted are [B, T], or [N] with cu_seqlens")
        rows, length = values.shape
        return torch.arange(rows, device=values.device).repeat_interleave(length), rows
    lengths = cu_seqlens.diff().long()
    if values.dim() != 1 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(values) or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens: must ascend from 0 to the {values.numel()} tokens of {name}, which must be [N]")
    return torch.arange(len(lengths), device=values.device).repeat_interleave(lengths), len(lengths)


def kept_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """bool [N]: which tokens count."""
    return torch.ones_like(values, dtype=torch.bool).reshape(-1) if mask is None else mask.reshape(-1)


def widen(x: Tensor) -> Tensor:
    """float64 stays; everything narrower becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
