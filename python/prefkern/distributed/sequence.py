"""Sums over sequences whose tokens lie on several ranks: sequence parallelism, context parallelism.

Each rank holds a slice of every sequence, in the same order of sequences, whether as neighbouring tokens, in turns or in any
other way: a sum does not ask. What a loss needs of a whole sequence, its log-prob, its mean log-ratio, is a sum of the ranks'
own sums, and everything behind that is computed on every rank alike.

**Gradients.** All ranks compute the same loss of the same sums, so the gradient with respect to a sum is the whole gradient on
each of them, and the gradient of a token is that of its sum, whichever rank it lies on: backward sends nothing. The gradient of
parameters that the ranks share is then the **sum** of what the ranks have; where the trainer averages over them, as DDP and
FSDP do, `gradient="mean"` makes up for it by their number. A loss that is itself summed over these ranks afterwards would count
everything once a rank: sum what is summed here, not the loss.

    s = distributed.sequence_sum(logp, mask, minus=ref_logp, process_group=group)   # [2P], this rank's tokens; DPO
    loss = prefkern.preference_loss(s[:P], s[P:], ...)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ._ranks import ProcessGroup, ranks_of
from .collectives import sum_of


def sequence_sum(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
    process_group: ProcessGroup,
    gradient: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r""":func:`prefkern.sequence_sum` of sequences whose tokens lie on several ranks, :math:`\sum_t w_t f(x_t - y_t)`.

    One all-reduce of 4096 bytes up to 504 sequences. Spans, heads and decays, which ask for a token's place in its sequence,
    are not offered; the caller, who knows the places, can give them as ``weights``.

    Args:
        values: this rank's tokens of each sequence, ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. B is the same on all
            ranks, T and N need not be; a rank may have no token of a sequence. The only argument with a gradient.
        mask, cu_seqlens, minus, weights, transform: as there, of this rank's tokens.
        process_group: ``"world"``, a group of `torch.distributed`, or None: one process.
        gradient: ``"sum"``, for gradients that are summed over these ranks, or ``"mean"``, for gradients that are averaged; see
            the module.

    Returns:
        ``[B]`` float32, or float64 for float64 values, equal on all ranks; that of one process up to the rounding of each
        rank's part (the parts are added in double).

    Raises:
        ValueError, TypeError: as there; ranks that disagree in B or dtype, on every rank. RuntimeError on the other ranks,
            where one refuses its arguments. On CUDA, without `prefkern.set_validation(True)`, the others get NaN instead.
    """
    return sum_of(
        lambda: [
            ops.sequence_sum(values, mask, cu_seqlens=cu_seqlens, minus=minus, weights=weights, transform=transform)
        ],
        ranks_of(process_group), "sequence_sum", gradient, values,
    )[0]  # fmt: skip


def sequence_mean(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
    process_group: ProcessGroup,
    gradient: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """:func:`prefkern.distributed.sequence_sum` divided by the number of tokens of the sequence that count on all ranks; 0
    where there are none. Sums and counts go in one all-reduce, of 4096 bytes up to 252 sequences."""

    def parts() -> list[Tensor]:
        sums = ops.sequence_sum(values, mask, cu_seqlens=cu_seqlens, minus=minus, weights=weights, transform=transform)
        ones = torch.ones_like(values, dtype=sums.dtype, requires_grad=False)
        return [sums, ops.sequence_sum(ones, mask, cu_seqlens=cu_seqlens)]

    total, count = sum_of(parts, ranks_of(process_group), "sequence_mean", gradient, values)
    return total / count.detach().clamp_min(1)
