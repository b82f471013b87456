r"""Reg-GRPO: the policy's log-ratio, normalised in the group, is regressed on the advantage.

"DeepVideo-R1: Video Reinforcement Fine-Tuning via Difficulty-aware Regressive GRPO", arXiv:2506.07464.
Evidence: paper, at second hand. The formulas are from two written summaries of the paper, not confirmed by code; whether
its mean and standard deviation carry a gradient is not said there, nor are c, the eps of z, and the estimator of the KL:
those are choices of this library.

For a group of G completions with advantages A (ordinary ones, constant) and log-ratios of whole completions:

.. math::
    x_i = \sum_t (\log\pi - \log\pi_\mathrm{old})_{it}, \qquad z_i = \frac{x_i - \mathrm{mean}(x)}{\mathrm{std}(x) + e}, \qquad
    L = \frac1G \sum_i (A_i - c\,z_i)^2 + \beta\,\mathrm{KL}

the mean over groups of that; no ratio, no clip. Where it comes from: the optimum of the KL-regularised objective has
:math:`r = \beta x + \beta\log Z`, and normalising both sides in the group cancels :math:`\beta` and Z. Version 2 of the
paper has a coefficient c and no KL; the camera-ready has c = 1 and a KL, k3 per token here, the mean over tokens, then over
rows; a summary prints it with a minus sign inside what is minimised, here it is a penalty [inferred].

.. math::
    \frac{\partial L}{\partial x_j} = -\frac{2c}{G} \frac{u_j - \mathrm{mean}(u)}{\mathrm{std}(x) + e}, \qquad u = A - c z
    \qquad (\text{std constant, the default})

and with `sigma_grad` the std is differentiated too, which takes out the part of that gradient along x - mean(x).

What to know before using it:

- On-policy x = 0, so z = 0, and the size of the gradient is set by 1/e alone. The default e of 1e-6 is for comparisons; train
  with something like 1e-2, a small c, or gradient clipping.
- The loss does not see the scale of x: any x = a A with a > 0 is a minimum for c = 1. It fixes the direction of the update;
  its size is limited by the KL, the number of inner steps and the learning rate.
- Constant rewards: A = 0. With `sigma_grad` there is no gradient but through e; without, all log-ratios are drawn to their
  mean.

A group of one adds 0 but counts in the mean over groups. A completion without tokens has x = 0. Nothing is exponentiated
but in the KL. Defaults: c 1, e 1e-6, ddof 1, beta 0; advantages with eps 1e-4.

The paper's augmentation by difficulty is no loss: :func:`difficulty_shift` and :func:`augmentation` give its numbers.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops import (
    LossOutput,
    group_advantages,
    group_normalize,
    group_reduce,
    kl_penalty,
    sequence_mean,
    sequence_sum,
    validation,
)
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_finite

about = About(
    name="Reg-GRPO",
    title="DeepVideo-R1: Video Reinforcement Fine-Tuning via Difficulty-aware Regressive GRPO",
    arxiv="2506.07464",
    year=2025,
    family="objective",
    evidence="paper",
    note="at second hand; gradient through the std, c and eps are not stated there",
)


def reg_grpo_advantages(rewards: Tensor, group: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Ordinary group advantages [B] of rewards [B] in groups given by id [B]. Constants."""
    return group_advantages(rewards, group, eps=eps).advantages


def reg_grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    group: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    c: float = 1.0,
    eps: float = 1e-6,
    ddof: int = 1,
    sigma_grad: bool = False,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    length_norm: bool = False,
    row_weight: Tensor | None = None,
) -> LossOutput:
    """The regression. Gradient to logp only. The rows must hold whole groups.

    Args:
        logp, old_logp, ref_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens.
        advantages: [B].
        group: ids [B].
        c, eps, ddof: of the regression; eps is e.
        sigma_grad: differentiate the standard deviation of x too.
        beta: weight of the KL, which needs ref_logp.
        length_norm: x is the mean over tokens instead of the sum.
        row_weight: [B], constant, multiplies the squares.

    Metrics: `log_ratio_mean` and `log_ratio_abs_max` of x, `error` (mean of (A - c z)^2 over rows), `kl`, `tokens`,
    `sequences`.
    """
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is None; beta {beta} needs the reference's log-probs")
    if advantages.dim() != 1:
        raise ValueError(f"advantages is {list(advantages.shape)}; [B] is expected")
    if row_weight is not None and row_weight.dim() != 1:
        raise ValueError(f"row_weight is {list(row_weight.shape)}; [B] is expected, the loss is over completions")
    reduced = sequence_mean if length_norm else sequence_sum
    x = reduced(logp, mask, cu_seqlens=cu_seqlens, minus=old_logp)
    if validation():
        check_finite("log-ratio of completions", x)
    a = advantages.detach().to(x.dtype)
    z = group_normalize(x, group, eps=eps, ddof=ddof, sigma_grad=sigma_grad)
    count = group_reduce(torch.ones_like(x), group, reduce="count").to(x.dtype)
    square = torch.where(count > 1, (a - c * z).square(), 0.0)
    share = 1 / count
    groups = share.sum().round().clamp_min(1)
    loss = (square * (share if row_weight is None else share * row_weight.detach())).sum() / groups
    kl = x.new_zeros(())
    if ref_logp is not None:
        kl = kl_penalty(logp, ref_logp, mask, cu_seqlens=cu_seqlens, kl="k3", agg="trl-grpo")
        loss = loss + beta * kl if beta != 0 else loss
    size = sequence_sum(torch.ones_like(logp, dtype=x.dtype, requires_grad=False), mask, cu_seqlens=cu_seqlens)
    metrics = {
        "log_ratio_mean": x.detach().mean(),
        "log_ratio_abs_max": x.detach().abs().max() if len(x) else x.new_zeros(()),
        "error": square.detach().mean(),
        "kl": kl.detach(),
        "tokens": size.sum(),
        "sequences": (size > 0).sum().to(size.dtype),
    }
    return LossOutput(loss, metrics)


class Augmentation(NamedTuple):
    """How a prompt is made easier or harder."""

    hints: Tensor
    """int64: how many pieces of a successful trace are given away. 0 for a prompt that is not hard."""
    noise: Tensor
    """What the strength of frame noise is multiplied by. 0 for a prompt that is not easy."""


def difficulty_shift(rewards: Tensor, history: Tensor, *, window: int) -> Tensor:
    """Mean reward of a group less the mean of the last `window` entries of `history`: 0-d. Negative: harder than lately.

    history: [S], mean rewards of earlier steps, oldest first. Without one: 0.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    mean = rewards.detach().mean()
    return mean - history.detach()[-window:].mean() if len(history) else torch.zeros_like(mean)


def augmentation(shift: Tensor) -> Augmentation:
    """What the paper's version 2 does about a :func:`difficulty_shift`, any shape: round(|shift|) + 1 hints for a hard
    prompt, noise times |shift| + 1 for an easy one. It depends on the scale of the rewards."""
    size = shift.detach().abs()
    return Augmentation(
        torch.where(shift < 0, size.round() + 1, 0.0).long(), torch.where(shift > 0, size + 1, torch.zeros_like(size))
    )


@dataclass(frozen=True)
class RegGRPO(Recipe):
    """Ordinary advantages, regressed on by the normalised log-ratio."""

    name: ClassVar[str] = "reg_grpo"
    whole_groups: ClassVar[bool] = True
    adv_eps: float = 1e-4
    c: float = 1.0
    eps: float = 1e-6
    sigma_grad: bool = False
    beta: float = 0.0
    length_norm: bool = False

    def advantages(self, rollout: Rollout) -> Tensor:
        return reg_grpo_advantages(rollout.rewards, rollout.group, eps=self.adv_eps)

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        out = reg_grpo_loss(
            logp, batch.get("old_logp", logp.detach()), batch["advantages"], batch.get("mask"), batch["group"],
            cu_seqlens=batch.get("cu_seqlens"), c=self.c, eps=self.eps, sigma_grad=self.sigma_grad,
            ref_logp=batch.get("ref_logp"), beta=self.beta, length_norm=self.length_norm, row_weight=batch.get("token_weight"),
        )  # fmt: skip
        return self.with_entropy(out, batch, entropy)


recipe = RegGRPO()
