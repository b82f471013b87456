r"""SAPO: a smooth gate instead of the clip, steeper where the advantage is negative.

Qwen team, "Soft Adaptive Policy Optimization", arXiv:2511.20347.
Evidence: code. Loss and gradient agree with TRL's and verl's `sapo`.

.. math::
    l = -A\, \frac4\tau\, \sigma\bigl(\tau (\rho - 1)\bigr), \qquad \tau = 1 \text{ where } A > 0, \text{ else } 1.05, \qquad
    \frac{\partial l}{\partial \log\pi} = -4 A\, \sigma (1 - \sigma)\, \rho

with :math:`\rho = \pi/\pi_\mathrm{old}` of the token and GRPO's advantages, constant. At :math:`\rho = 1` the gradient is
exactly -A; it falls off smoothly on both sides and never is 0 while A is not, until it underflows (in float64 for ratios
above some 35, in float32 earlier). Averaged over the tokens of a completion, then over completions; `agg="trl-grpo"` counts
those without tokens, as TRL.
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
    name="SAPO",
    title="Soft Adaptive Policy Optimization",
    arxiv="2511.20347",
    year=2025,
    family="objective",
    evidence="code",
    note="TRL and verl",
)


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    agg: Aggregation = "seq-mean-token-mean",
) -> LossOutput:
    """The gated objective.

    logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B] or like logp.
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, kind="sapo", tau_pos=tau_pos, tau_neg=tau_neg, agg=agg
    )


@dataclass(frozen=True)
class SAPO(Recipe):
    """GRPO's advantages, and the gate."""

    name: ClassVar[str] = "sapo"
    eps: float = 1e-6
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    beta: float = 0.0
    agg: Aggregation = "seq-mean-token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group, eps=self.eps).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        options = {"kind": "sapo", "tau_pos": self.tau_pos, "tau_neg": self.tau_neg}
        return {**options, "beta": self.beta, "agg": self.agg}


recipe = SAPO()
