r"""LD-DPO: the tokens that only the longer response has count for less.

Liu et al., "Length Desensitization in Direct Preference Optimization", arXiv:2409.06411.
Evidence: code. Values and gradients were checked against what TRL computes for `ld_alpha`, of policy and reference alike.

With :math:`n = \min(|y_w|, |y_l|)` and the log-ratio :math:`x_t` of a token:

.. math::
    x = \sum_{t \le n} x_t + \alpha \sum_{t > n} x_t, \qquad L = -\log\sigma\bigl(\beta (x_w - x_l)\bigr)

averaged over pairs. Only tokens that count are counted; the shorter response keeps all of its own. :math:`\alpha = 1` is DPO,
:math:`\alpha = 0` compares the shared length alone.

Where libraries differ: TRL leaves it out unless `ld_alpha` is set and has no default; 0.5 here is this library's. Default: beta
0.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import LossOutput
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import per_token
from .dpo import dpo_loss

about = About(
    name="LD-DPO",
    title="Length Desensitization in Direct Preference Optimization",
    arxiv="2409.06411",
    year=2024,
    family="pairwise, length",
    evidence="code",
    note="TRL",
)


def token_places(like: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """int64, shaped like `like`, [B, T] or packed [N]: which of its row's tokens that count each is, from 1. What does not
    count has the place of the one before, 0 at the start."""
    keep = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    so_far = keep.cumsum(-1)
    if cu_seqlens is None:
        return so_far
    before = torch.cat([so_far.new_zeros(1), so_far])[cu_seqlens[:-1].long()]
    return so_far - per_token(before, like, cu_seqlens)


def ld_token_weights(pairs: Pairs, alpha: float) -> Tensor:
    """1 for the tokens within the length that both responses of their pair have, alpha for those beyond; shaped like the
    tokens."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
    shared = torch.minimum(*pairs.lengths())
    logp = pairs.logp.detach()
    places = token_places(logp, pairs.mask, pairs.cu_seqlens)
    beyond = places > per_token(torch.cat([shared, shared]), logp, pairs.cu_seqlens)
    dtype = torch.promote_types(logp.dtype, torch.float32)
    return torch.ones_like(logp, dtype=dtype).masked_fill(beyond, alpha)


def ld_dpo_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs per token [2P, T], the chosen responses first, or packed [N]; see `Pairs`.

    Gradient to logp. Metrics: those of `prefkern.preference_loss`.
    """
    pairs = Pairs(logp, mask, ref_logp, cu_seqlens)
    sides = pairs.sums(minus=ref_logp, weights=ld_token_weights(pairs, alpha))
    return dpo_loss(*sides, beta=beta, label_smoothing=label_smoothing, reduction=reduction)


@dataclass(frozen=True)
class LDDPO(PairRecipe):
    """DPO with less weight beyond the shared length."""

    name: ClassVar[str] = "ld_dpo"
    beta: float = 0.1
    alpha: float = 0.5
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return ld_dpo_loss(pairs.logp, pairs.ref_logp, pairs.mask, cu_seqlens=pairs.cu_seqlens, **self.options())


recipe = LDDPO()
