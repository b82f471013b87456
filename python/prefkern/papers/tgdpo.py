r"""TGDPO: DPO with a weight per token, taken from a model that was aligned before.

"TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization", arXiv:2506.14574.
Evidence: code. Values and gradients were checked against the authors' release (its `sigmoid` branch).

With the token log-probs :math:`\ell_t` of the policy, :math:`r_t` of the reference and :math:`g_t` of the guide, a frozen model
with the same tokeniser that was trained by DPO, SimPO or the like:

.. math::
    \hat r_t = \beta_g (g_t - r_t), \qquad f_{w,t} = 1 + \alpha \hat r_t, \quad f_{l,t} = 1 - \alpha \hat r_t

.. math::
    z = \beta \sum_t f_{w,t} (\ell_t - r_t)_w - \beta \sum_t f_{l,t} (\ell_t - r_t)_l, \qquad L = -\log\sigma(z)

averaged over pairs. Tokens that the guide likes are pushed harder in the chosen response and pushed down less in the rejected
one. Gradient to the policy's log-probs alone: :math:`-\frac{\beta}{P} \sigma(-z) f_{w,t}` and
:math:`\frac{\beta}{P} \sigma(-z) f_{l,t}`; reference, guide and factors are constants.

Where paper and code differ: the paper allows a general f and argues with the partition function; the code has the linear form
above, which is followed. Nothing bounds f: below :math:`\hat r_t = -1/\alpha` it is negative and the token is pushed the
wrong way (with the defaults from 20 nats on). That is kept, the metric `negative_factors` says how often it happens, and
`min_factor` puts a floor under f. The code scales both the reward and the loss by one beta (`guide_beta=None`); a guide that
was trained with another may use its own. The code's other losses treat token-level terms as sequence sums, and its SFT term
broadcasts only for a batch of one: neither is here.

Defaults: beta 0.1 and alpha 0.5, the code's. alpha = 0, or a guide equal to the reference, is DPO; no length is divided by.
What lies outside the masks is never looked at. An infinite :math:`g_t` or :math:`r_t` inside is a ValueError, as is a response
without tokens unless `allow_empty`, where its side of z is 0 (on CUDA such pairs come out NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss, sequence_sum
from ..ops._arguments import check_tensors, number
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_values, may_look, per_token

about = About(
    name="TGDPO",
    title="TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
    arxiv="2506.14574",
    year=2025,
    family="pairwise, token weights",
    evidence="code",
    note="the authors' release",
)


def tgdpo_factors(
    guide_logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    chosen: bool,
    alpha: float = 0.5,
    guide_beta: float = 0.1,
    min_factor: float | None = None,
) -> Tensor:
    """f of every token, shaped like the log-probs [B, T] or [N]; 1 outside the mask. Constants.

    chosen: which side's sign. min_factor: a floor, None for none.
    """
    check_tensors(guide_logp=guide_logp, ref_logp=ref_logp)
    if guide_logp.shape != ref_logp.shape:
        raise ValueError(
            f"guide_logp has shape {list(guide_logp.shape)}; ref_logp has shape {list(ref_logp.shape)}, so the same is expected"
        )
    reward = guide_logp.detach() - ref_logp.detach()
    if mask is not None:
        reward = torch.where(mask, reward, 0.0)
    _check_finite_tokens("guide_logp - ref_logp", reward)
    reward = torch.where(reward.isfinite(), reward, torch.nan)
    slope = number("alpha", alpha) * number("guide_beta", guide_beta)
    factor = 1 + slope * reward if chosen else 1 - slope * reward
    return factor if min_factor is None else factor.clamp_min(number("min_factor", min_factor))


def tgdpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    guide_chosen_logp: Tensor,
    guide_rejected_logp: Tensor,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    *,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    guide_beta: float | None = None,
    min_factor: float | None = None,
    allow_empty: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of P pairs, from token log-probs [P, T] with bool masks, or packed [N] with cu_seqlens, each side its own.
    Gradient to chosen_logp and rejected_logp.

    guide_beta: of the guide's rewards; None: beta. min_factor: a floor for the factors of both sides.

    Metrics: those of `preference_loss`, whose rewards are the two sides of z, and negative_factors, the share of both sides'
    tokens whose factor is negative, before any floor.
    """
    sides = (
        ("chosen", chosen_logp, ref_chosen_logp, guide_chosen_logp, chosen_mask, chosen_cu_seqlens),
        ("rejected", rejected_logp, ref_rejected_logp, guide_rejected_logp, rejected_mask, rejected_cu_seqlens),
    )
    scores: list[Tensor] = []
    negative: list[Tensor] = []
    tokens: list[Tensor] = []
    for side, logp, ref, guide, mask, cu_seqlens in sides:
        factor = tgdpo_factors(
            guide, ref, mask, chosen=side == "chosen", alpha=alpha, guide_beta=beta if guide_beta is None else guide_beta
        )
        lengths = sequence_sum(torch.ones_like(factor), mask, cu_seqlens=cu_seqlens)
        negative.append((factor < 0).sum())  # outside the mask a factor is 1
        tokens.append(lengths.sum())
        if min_factor is not None:
            factor = factor.clamp_min(number("min_factor", min_factor))
        score = sequence_sum(logp, mask, cu_seqlens=cu_seqlens, minus=ref, weights=factor)
        if not allow_empty:
            check_values(f"{side} lengths", lengths, lengths > 0, "every response needs a token that counts, or allow_empty")
            score = torch.where(lengths > 0, score, torch.nan)
        scores.append(score)
    loss, metrics = preference_loss(*scores, beta=beta, reduction=reduction)
    share = torch.stack(negative).sum() / torch.stack(tokens).sum().clamp_min(1)
    return LossOutput(loss, {**metrics, "negative_factors": share})


def _check_finite_tokens(name: str, values: Tensor) -> None:
    if may_look(values) and not bool(values.isfinite().all()):
        place = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} at token {place} is {values[tuple(place)].item()}; a finite number is expected")


@dataclass(frozen=True)
class TGDPO(PairRecipe):
    """DPO whose tokens weigh more or less by the reward of a guide, `extra["guide_logp"]`: its log-probs of the tokens."""

    name: ClassVar[str] = "tgdpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "guide_logp")
    beta: float = 0.1
    alpha: float = 0.5
    guide_beta: float | None = None
    min_factor: float | None = None

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        guide, ref = pairs.require("guide_logp"), pairs.require("ref_logp")
        guide_beta = self.beta if self.guide_beta is None else self.guide_beta
        for_chosen, for_rejected = (
            tgdpo_factors(guide, ref, pairs.mask, chosen=chosen, alpha=self.alpha, guide_beta=guide_beta)
            for chosen in (True, False)
        )
        row = torch.arange(2 * len(pairs), device=ref.device)
        factor = torch.where(per_token(row, ref, pairs.cu_seqlens) < len(pairs), for_chosen, for_rejected)
        negative = (factor < 0).sum() / pairs.lengths_of_all().sum().clamp_min(1)  # outside the mask a factor is 1
        if self.min_factor is not None:
            factor = factor.clamp_min(self.min_factor)
        loss, metrics = preference_loss(*pairs.sums(minus=ref, weights=factor), beta=self.beta)
        return LossOutput(loss, {**metrics, "negative_factors": negative})


recipe = TGDPO()
