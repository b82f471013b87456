"""Trainers' own functions of hidden states and a head's weight, computed by `prefkern.linear_logprobs`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import linear_logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of that name: log-probs (not their negatives) and entropies, float32, flat [N].

    hidden: [..., H], N rows. weight: [V, H], or with a group this rank's shard, of one size on all. labels: [...], N of them,
    ids of the whole vocabulary. reduction: "none", or "sum" or "mean" of the log-probs, 0-d.
    """
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; accepted: 'none', 'sum', 'mean'")
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    options: dict[str, Any] = {}
    ranks = 1 if dist_process_group is None else torch.distributed.get_world_size(dist_process_group)
    if ranks > 1:
        # Callers sum the gradients of hidden over the ranks, as verl's kernel leaves them partial; ours is the whole on each.
        rows = _Shared.apply(rows, ranks)
        rank, size = torch.distributed.get_rank(dist_process_group), weight.shape[0]
        options = {"group": dist_process_group, "vocab_offset": rank * size, "vocab": ranks * size}
    out = linear_logprobs(rows, weight, targets, temperature=temperature, outputs=("entropy",), **options)
    assert out.entropy is not None
    if reduction.lower() == "none":
        return out.logp, out.entropy
    return (out.logp.sum() if reduction.lower() == "sum" else out.logp.mean()), out.entropy


class _Shared(torch.autograd.Function):
    """The identity, whose gradient is one rank's part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None
