r"""ETR-style elastic clipping: clip bounds per completion, wider where the signal is strong.

"ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization", arXiv:2601.03723.
Evidence: inferred. Known is the mechanism: bounds that grow with the size of the advantage (micro), and a budget that grows
with the variance of the group, through its pass rate (macro); everything else is GRPO. The paper's equations were not
available and no code is released. The parameterisation below, "elastic-v1", with all its constants, is this library's own.
What is obtained with it says nothing about the paper's numbers.

With A the group-normalised advantage, and R the range of the task's rewards, the variance v of a group relative to the
largest possible:

.. math::
    v_g = \frac{4\,\mathrm{Var}_\mathrm{pop}(r)}{R^2}, \qquad
    s_i = \mathrm{clip}\bigl((1 + \alpha(\min(|A_i|, a_\mathrm{cap}) - 1))\,(1 + \beta(v_g - 1)),\ s_\min, s_\max\bigr)

.. math::
    \epsilon_{l,i} = \min(\epsilon_l s_i, 0.999), \qquad \epsilon_{h,i} = \epsilon_h s_i, \qquad
    l_{it} = \max(-A_i\rho_{it}, -A_i\,\mathrm{clip}(\rho_{it}, 1 - \epsilon_{l,i}, 1 + \epsilon_{h,i}))

A, v, s and the bounds are constants; at a bound the gradient flows, beyond it is 0. v is 4p(1-p) for 0/1 rewards with pass
rate p. s is 1 at |A| = 1, the root mean square of normalised advantages, and v = 1, so that the average budget stays near
the static one; alpha = beta = 0 is GRPO, to the bit. For 0/1 rewards |A| is itself a function of p: at small p the rare
successes get wide bounds by alpha and the many failures narrow ones, while beta narrows both; the two factors work against
each other at extreme pass rates, and both are reported as metrics. A group of equal rewards has A = 0 and adds nothing,
whatever its bounds.

Defaults: 0.2, 0.2 (GRPO's); alpha 0.5, beta 0.5, a_cap 3, s between 0.25 and 2.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..ops import LossOutput, group_advantages
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_finite

about = About(
    name="ETR",
    title="ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization",
    arxiv="2601.03723",
    year=2026,
    family="clip",
    evidence="inferred",
    note="neither equations nor code were available",
)

MOST_BELOW = 0.999
"""A lower half-width of 1 or more would be no bound at all."""


class ElasticScale(NamedTuple):
    """What bounds are multiplied by, [B] each."""

    scale: Tensor
    """clip(micro * macro)."""
    micro: Tensor
    """The factor of the advantage."""
    macro: Tensor
    """The factor of the group's variance."""


def elastic_scale(
    advantages: Tensor,
    rewards: Tensor,
    group: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    a_cap: float = 3.0,
    s_min: float = 0.25,
    s_max: float = 2.0,
    reward_range: float = 1.0,
) -> ElasticScale:
    """The scale s and its two factors, [B], of advantages [B] that came from rewards [B] in groups given by id [B]. Constants.

    alpha, beta: how far advantage and variance count, in [0, 1]. reward_range: of the task, largest reward less smallest.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; accepted: from 0 to 1")
    if not 0 < s_min <= s_max < math.inf:
        raise ValueError(f"s_min is {s_min} and s_max {s_max}; accepted: 0 < s_min <= s_max")
    if not a_cap > 0:
        raise ValueError(f"a_cap is {a_cap}; it must be positive")
    if beta != 0 and not reward_range > 0:
        raise ValueError(f"reward_range is {reward_range}; it must be positive, unless beta is 0")
    check_finite("advantages", advantages)
    a = advantages.detach()
    micro = 1 + alpha * (a.abs().clamp(max=a_cap) - 1)
    macro = micro.new_ones(micro.shape)
    if beta != 0:
        std = group_advantages(rewards, group, estimator="dr_grpo", ddof=0, outputs=("std",)).std
        assert std is not None
        macro = (1 + beta * ((2 / reward_range * std).square() - 1)).to(micro.dtype)
    return ElasticScale((micro * macro).clamp(s_min, s_max), micro, macro)


def elastic_clip(
    advantages: Tensor,
    rewards: Tensor,
    group: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    alpha: float = 0.5,
    beta: float = 0.5,
    a_cap: float = 3.0,
    s_min: float = 0.25,
    s_max: float = 2.0,
    reward_range: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Lower and upper half-widths, [B] each, for `prefkern.policy_loss(eps_low=, eps_high=)`. See :func:`elastic_scale`."""
    scale = elastic_scale(
        advantages, rewards, group, alpha=alpha, beta=beta, a_cap=a_cap, s_min=s_min, s_max=s_max, reward_range=reward_range
    ).scale
    return bounds(scale, eps_low, eps_high)


def bounds(scale: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """The half-widths of a scale."""
    return (eps_low * scale).clamp(max=MOST_BELOW), eps_high * scale


@dataclass(frozen=True)
class ETR(Recipe):
    """GRPO's advantages, and a clip with bounds per completion (elastic-v1, this library's own)."""

    name: ClassVar[str] = "etr"
    eps: float = 1e-6
    eps_low: float = 0.2
    eps_high: float = 0.2
    alpha: float = 0.5
    beta: float = 0.5
    a_cap: float = 3.0
    s_min: float = 0.25
    s_max: float = 2.0
    reward_range: float = 1.0
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return group_advantages(rollout.rewards, rollout.group, eps=self.eps).advantages

    def prepare(self, rollout: Rollout) -> Batch:
        batch = super().prepare(rollout)
        scale, micro, macro = elastic_scale(
            batch["advantages"], rollout.rewards, rollout.group, alpha=self.alpha, beta=self.beta, a_cap=self.a_cap,
            s_min=self.s_min, s_max=self.s_max, reward_range=self.reward_range,
        )  # fmt: skip
        low, high = bounds(scale, self.eps_low, self.eps_high)
        return {**batch, "eps_low": low, "eps_high": high, "micro": micro, "macro": macro}

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": batch["eps_low"], "eps_high": batch["eps_high"], "agg": self.agg}

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        value, metrics = super().loss(logp, batch, entropy=entropy)
        return LossOutput(value, {**metrics, "elastic_micro": batch["micro"].mean(), "elastic_macro": batch["macro"].mean()})


recipe = ETR()
