r"""GRPO: group relative policy optimisation.

Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv:2402.03300.
Evidence: code. The formulas agree with TRL's and verl's implementations.

For a group of G completions of one prompt with rewards r_i (section 4.1.2):

.. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + \epsilon}

and, with :math:`\rho_{it} = \exp(\log\pi(o_{it}) - \log\pi_\mathrm{old}(o_{it}))` (equation 3),

.. math:: L = \frac1B \sum_i \frac1{|o_i|} \sum_t
          \max\bigl(-A_i \rho_{it}, -A_i\,\mathrm{clip}(\rho_{it}, 1-\epsilon_l, 1+\epsilon_h)\bigr)
          + \beta\, k_3(\pi \| \pi_\mathrm{ref})

Advantages, old and reference log-probs are constants. std has ddof 1; a group of equal rewards gets exactly 0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..ops import GroupAdvantages, LossOutput, group_advantages, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout

about = About(
    name="GRPO",
    title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    arxiv="2402.03300",
    year=2024,
    family="advantage, objective",
    evidence="code",
    note="TRL and verl",
)


def advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    eps: float = 1e-6,
    scale: Literal["group", "batch", "none"] = "group",
    singleton: Literal["zero", "reward"] = "zero",
) -> GroupAdvantages:
    """Advantages [B] of rewards [B] (or [B, K], which are summed) in groups given by id [B].

    eps: verl's default; TRL uses 1e-4. scale: TRL's `scale_rewards`: what centred rewards are divided by. singleton: a group of
    one gets "zero" (TRL) or its "reward" (verl).
    """
    estimator: Literal["grpo", "dr_grpo"] = "grpo" if scale == "group" else "dr_grpo"
    return group_advantages(
        rewards, group, estimator=estimator, eps=eps, singleton=singleton, batch="std" if scale == "batch" else "none"
    )


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
) -> LossOutput:
    """The clipped objective as the paper averages it: over the tokens of a completion, then over completions.

    logp, old_logp, ref_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B] or like logp.
    beta: weight of the k3 estimate of KL(policy || reference); needs ref_logp (the paper uses 0.04).
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, kind="clip", eps_low=eps_low, eps_high=eps_high,
        agg="seq-mean-token-mean", ref_logp=ref_logp, beta=beta,
    )  # fmt: skip


@dataclass(frozen=True)
class GRPO(Recipe):
    """Advantages of the group, and the clipped loss averaged over tokens, then completions."""

    name: ClassVar[str] = "grpo"
    eps: float = 1e-6
    scale: Literal["group", "batch", "none"] = "group"
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    agg: Aggregation = "seq-mean-token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group, eps=self.eps, scale=self.scale).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "beta": self.beta, "agg": self.agg}


recipe = GRPO()
