r"""Dr. GRPO: GRPO without its two biases, the division by the group's std and by the completion's length.

Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv:2503.20783.
Evidence: code. TRL (`scale_rewards="none"`, `loss_type="dr_grpo"`) and verl (`norm_adv_by_std_in_grpo=False`,
`seq-mean-token-sum-norm`).

.. math::
    A_i = r_i - \mathrm{mean}(r), \qquad
    L = \frac1{B\,L_\max} \sum_i \sum_t \max(-A_i\rho_{it}, -A_i\,\mathrm{clip}(\rho_{it}))

:math:`L_\max` is a constant, the longest completion that is allowed: no completion's length enters.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..ops import GroupAdvantages, LossOutput, group_advantages, policy_loss
from ._about import About
from ._recipe import Batch, Recipe, Rollout

about = About(
    name="Dr. GRPO",
    title="Understanding R1-Zero-Like Training: A Critical Perspective",
    arxiv="2503.20783",
    year=2025,
    family="advantage, aggregation",
    evidence="code",
    note="TRL and verl",
)


def advantages(rewards: Tensor, group: Tensor) -> GroupAdvantages:
    """Advantages [B] of rewards [B] in groups given by id [B]: centred, not scaled."""
    return group_advantages(rewards, group, estimator="dr_grpo")


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    max_length: float,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
) -> LossOutput:
    """The clipped objective, summed over tokens and divided by B max_length. Completions without tokens count in B.

    logp, old_logp, ref_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B] or like logp.
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, eps_low=eps_low, eps_high=eps_high,
        agg="trl-dr_grpo", scale=max_length, ref_logp=ref_logp, beta=beta,
    )  # fmt: skip


@dataclass(frozen=True)
class DrGRPO(Recipe):
    """Centred rewards; token sums over a constant length."""

    name: ClassVar[str] = "dr_grpo"
    max_length: float | None = None
    """The constant that token sums are divided by; None: the padded length T of the minibatch (verl's default)."""
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        agg = "trl-dr_grpo" if self.max_length is not None else "seq-mean-token-sum-norm"
        options = {"eps_low": self.eps_low, "eps_high": self.eps_high, "beta": self.beta}
        return {**options, "agg": agg, "scale": self.max_length}


recipe = DrGRPO()
