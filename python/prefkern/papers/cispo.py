r"""CISPO: the importance ratio is clipped and detached, so that no token ever loses its gradient.

MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv:2506.13585.
Evidence: code. Both variants agree with their implementations, TRL's `loss_type="cispo"` and verl's `cispo`.

.. math:: l = -\mathrm{sg}(w)\, A \log\pi, \qquad \frac{\partial l}{\partial \log\pi} = -w A

and the two differ in the weight, :math:`\rho = \pi / \pi_\mathrm{old}`:

- `variant="trl"` (default): :math:`w = \min(\rho, C)`. C, `cap`, is an absolute bound, though TRL calls it `epsilon_high`;
  no lower bound. 5 is what TRL recommends.
- `variant="verl"`: :math:`w = \mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h)`, by default with the 0.2 and 0.2 of the
  ordinary clip.

GRPO's advantages, constant; the mean over all tokens; no KL. The value of the loss is no measure of progress: it is a
log-prob times a weight.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import LossOutput, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from .grpo import advantages

about = About(
    name="CISPO",
    title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    arxiv="2506.13585",
    year=2025,
    family="objective",
    evidence="code",
    note="TRL and verl, whose weights differ",
)

VARIANTS = ("trl", "verl")


def bounds(variant: str, cap: float, eps_low: float, eps_high: float) -> tuple[float, float]:
    """How far below and above 1 the weight may lie: eps_low and eps_high of `prefkern.policy_loss`."""
    if VARIANTS[choice("variant", variant, VARIANTS)] == "verl":
        return eps_low, eps_high
    if not cap > 1:
        raise ValueError(f"cap is {cap}; it bounds the ratio itself and must be greater than 1")
    return 1.0, cap - 1.0


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    variant: Literal["trl", "verl"] = "trl",
    cap: float = 5.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    agg: Aggregation = "token-mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    """The objective. logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B] or like logp.

    cap: of "trl". eps_low, eps_high: of "verl". norm: instead of the number of tokens in the denominator.
    """
    low, high = bounds(variant, cap, eps_low, eps_high)
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, kind="cispo", eps_low=low, eps_high=high, agg=agg, norm=norm
    )


@dataclass(frozen=True)
class CISPO(Recipe):
    """GRPO's advantages, and log-probs weighted by the clipped ratio."""

    name: ClassVar[str] = "cispo"
    eps: float = 1e-6
    variant: Literal["trl", "verl"] = "trl"
    cap: float = 5.0
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group, eps=self.eps).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        low, high = bounds(self.variant, self.cap, self.eps_low, self.eps_high)
        return {"kind": "cispo", "eps_low": low, "eps_high": high, "beta": self.beta, "agg": self.agg}


recipe = CISPO()
