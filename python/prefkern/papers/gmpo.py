r"""GMPO: the geometric mean of a completion's ratios, each clipped, instead of GRPO's arithmetic mean.

Zhao et al., "Geometric-Mean Policy Optimization", arXiv:2507.20673.
Evidence: code. Loss and gradient agree with verl's `geo_mean`.

With :math:`d_{it} = (\log\pi - \log\pi_\mathrm{old})_{it}`, clipped per token in the direction of the advantage only,

.. math::
    b_{it} = \min(d_{it}, \epsilon_h) \text{ where } A_i > 0, \quad \max(d_{it}, -\epsilon_l) \text{ where } A_i < 0, \qquad
    l_i = -A_i \exp \frac1{n_i} \sum_t b_{it}, \qquad
    \frac{\partial l_i}{\partial \log\pi_{it}} = \frac{l_i}{n_i} \text{ unless clipped}

with GRPO's advantages, constant, and the mean of :math:`l_i` over completions. The bounds are those of the logarithm.

Defaults: bounds 0.4 and 0.4 from the paper (verl takes those of the ordinary clip, 0.2); the mean counts completions
without tokens, as in verl (there such a row adds the constant -A; here it adds 0). One advantage per completion.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..ops import LossOutput, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from .grpo import advantages

about = About(
    name="GMPO",
    title="Geometric-Mean Policy Optimization",
    arxiv="2507.20673",
    year=2025,
    family="objective",
    evidence="code",
    note="verl",
)


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.4,
    eps_high: float = 0.4,
    agg: Aggregation = "trl-grpo",
) -> LossOutput:
    """The objective over completions. logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens.

    advantages: [B].
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, kind="gmpo", eps_low=eps_low, eps_high=eps_high,
        ratio_clamp=None, agg=agg,
    )  # fmt: skip


@dataclass(frozen=True)
class GMPO(Recipe):
    """GRPO's advantages, and the geometric mean of clipped ratios."""

    name: ClassVar[str] = "gmpo"
    eps: float = 1e-6
    eps_low: float = 0.4
    eps_high: float = 0.4
    beta: float = 0.0
    agg: Aggregation = "trl-grpo"

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group, eps=self.eps).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        options = {"kind": "gmpo", "eps_low": self.eps_low, "eps_high": self.eps_high, "ratio_clamp": None}
        return {**options, "beta": self.beta, "agg": self.agg}


recipe = GMPO()
