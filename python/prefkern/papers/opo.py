r"""OPO: exact on-policy updates, with the baseline that minimises the gradient's variance.

Hao et al., "On-Policy RL with Optimal Reward Baseline", arXiv:2505.23585.
Evidence: code. The advantage agrees with verl's `opo`.

For a group of completions of one prompt with :math:`n_i` tokens each, the baseline is the mean reward weighted by length:

.. math:: A_i = r_i - \frac{\sum_j n_j r_j}{\sum_j n_j}

so that :math:`\sum_i n_i A_i = 0`: summed over tokens, advantages cancel. No std, no KL, no entropy bonus. The loss is the
ordinary one; on-policy, where the paper keeps it, every ratio is 1 and its gradient is that of :math:`-A \log\pi`.

Advantages are constants. A group of one has advantage r, as in verl (`singleton="zero"`: 0); a group of equal rewards
exactly 0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..ops import GroupAdvantages, LossOutput, group_advantages, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout

about = About(
    name="OPO",
    title="On-Policy RL with Optimal Reward Baseline",
    arxiv="2505.23585",
    year=2025,
    family="advantage",
    evidence="code",
    note="verl",
)


def advantages(
    rewards: Tensor, group: Tensor, lengths: Tensor, *, singleton: Literal["reward", "zero"] = "reward"
) -> GroupAdvantages:
    """Advantages [B] of rewards [B] in groups given by id [B], whose completions have `lengths` [B] tokens. Constants."""
    return group_advantages(rewards, group, estimator="opo", lengths=lengths, singleton=singleton)


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    agg: Aggregation = "token-mean",
) -> LossOutput:
    """The clipped objective.

    logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B] or like logp.
    """
    return policy_loss(logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, eps_low=eps_low, eps_high=eps_high, agg=agg)


@dataclass(frozen=True)
class OPO(Recipe):
    """Rewards less their mean weighted by length; the clipped loss."""

    name: ClassVar[str] = "opo"
    singleton: Literal["reward", "zero"] = "reward"
    eps_low: float = 0.2
    eps_high: float = 0.2
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group, rollout.token_counts(), singleton=self.singleton).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "agg": self.agg}


recipe = OPO()
