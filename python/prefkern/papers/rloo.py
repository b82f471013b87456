r"""RLOO: REINFORCE with the mean reward of the other completions as baseline, over whole completions.

Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
arXiv:2402.14740.
Evidence: code. Formulas agree with TRL's `RLOOTrainer` and with verl's `rloo`.

For a group of G completions of one prompt, with the KL of the whole completion taken off the reward:

.. math::
    R_i = r_i - \beta \sum_t (\log\pi_\mathrm{old} - \log\pi_\mathrm{ref})_{it}, \qquad
    A_i = R_i - \frac1{G-1} \sum_{j \ne i} R_j = \frac{G}{G-1} (R_i - \mathrm{mean}(R))

A completion is one action: the ratio is that of its probabilities, the exponential of a sum over tokens, not of a mean.

.. math::
    \rho_i = \exp \sum_t (\log\pi - \log\pi_\mathrm{old})_{it}, \qquad
    L = \frac1B \sum_i \max(-A_i\rho_i, -A_i\,\mathrm{clip}(\rho_i, 1 - \epsilon_l, 1 + \epsilon_h))

Everything but :math:`\log\pi` is constant. On-policy the gradient is REINFORCE's, :math:`-A_i/B` for every token of row i.
Completions without tokens count in B.

Defaults are TRL's but for beta, which is 0 here and 0.05 there: clip 0.2, no whitening (`whiten=True` whitens the advantages
over the whole batch, eps 1e-4). verl has no KL in the reward unless it is put there, and uses its token-level loss
(`level="token"`). A group of one gets 0, as in TRL and verl's vectorised form; `singleton="reward"` is verl's loop.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, group_advantages, policy_loss, sequence_sum
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout

about = About(
    name="RLOO",
    title="Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
    arxiv="2402.14740",
    year=2024,
    family="advantage, objective",
    evidence="code",
    note="TRL and verl",
)

LEVELS = ("sequence", "token")


def advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.0,
    whiten: bool = False,
    eps: float = 1e-4,
    singleton: Literal["zero", "reward"] = "zero",
) -> Tensor:
    """Advantages [B] of rewards [B] in groups given by id [B]. Constants.

    beta: weight of the KL that is taken off the reward; needs old_logp and ref_logp, [B, T] with a bool mask, or packed [N]
    with cu_seqlens. whiten: centre the advantages of the whole batch and divide them by their standard deviation (ddof 1)
    plus eps.
    """
    if beta != 0:
        if old_logp is None or ref_logp is None:
            raise ValueError(f"{'old_logp' if old_logp is None else 'ref_logp'} is None; beta {beta} needs both log-probs")
        if rewards.dim() != 1:
            raise ValueError(f"rewards is {list(rewards.shape)}; [B] is expected with beta {beta}")
        rewards = rewards - beta * sequence_sum(old_logp.detach(), mask, cu_seqlens=cu_seqlens, minus=ref_logp)
    return group_advantages(
        rewards,
        group,
        estimator="rloo",
        singleton=singleton,
        batch="seq" if whiten else "none",
        batch_eps=eps if whiten else None,
    ).advantages


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    token_weight: Tensor | None = None,
) -> LossOutput:
    """The clipped objective over completions. logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens.

    advantages, token_weight: [B]. Metrics are over completions, `ratio_mean` of their ratios, and so on; `tokens` counts
    tokens.
    """
    for name, value in (("advantages", advantages), ("token_weight", token_weight)):
        if value is not None and value.dim() != 1:
            raise ValueError(f"{name} is {list(value.shape)}; [B] is expected, a completion is one action")
    ratio = sequence_sum(logp, mask, cu_seqlens=cu_seqlens, minus=old_logp)[:, None]
    value, metrics = policy_loss(
        ratio,
        torch.zeros_like(ratio),
        advantages,
        eps_low=eps_low,
        eps_high=eps_high,
        ratio_clamp=None,
        token_weight=token_weight,
    )
    counted = logp.numel() if mask is None else mask.sum()
    return LossOutput(value, {**metrics, "tokens": torch.zeros_like(metrics["tokens"]) + counted})


@dataclass(frozen=True)
class RLOO(Recipe):
    """Leave-one-out baseline; whole completions as actions, or tokens."""

    name: ClassVar[str] = "rloo"
    beta: float = 0.0
    """Weight of the KL in the reward; needs old_logp and ref_logp. TRL: 0.05."""
    whiten: bool = False
    eps: float = 1e-4
    singleton: Literal["zero", "reward"] = "zero"
    level: Literal["sequence", "token"] = "sequence"
    eps_low: float = 0.2
    eps_high: float = 0.2
    agg: Aggregation = "token-mean"
    """Of `level="token"`."""

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(
            rollout.rewards, rollout.group, old_logp=rollout.old_logp, ref_logp=rollout.ref_logp, mask=rollout.mask,
            cu_seqlens=rollout.cu_seqlens, beta=self.beta, whiten=self.whiten, eps=self.eps, singleton=self.singleton,
        )  # fmt: skip

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "agg": self.agg}

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        if LEVELS[choice("level", self.level, LEVELS)] == "token":
            return super().loss(logp, batch, entropy=entropy)
        out = loss(
            logp, batch.get("old_logp", logp.detach()), batch["advantages"], batch.get("mask"),
            cu_seqlens=batch.get("cu_seqlens"), eps_low=self.eps_low, eps_high=self.eps_high,
            token_weight=batch.get("token_weight"),
        )  # fmt: skip
        return self.with_entropy(out, batch, entropy)


recipe = RLOO()
