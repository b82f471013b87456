r"""GSPO: one ratio per completion, the geometric mean of its tokens' ratios.

Zheng et al., "Group Sequence Policy Optimization", arXiv:2507.18071.
Evidence: code. Formulas and gradients agree with TRL's `importance_sampling_level="sequence"` and with verl's `gspo`.

.. math::
    s_i = \exp \frac1{n_i} \sum_t (\log\pi - \log\pi_\mathrm{old})_{it}, \qquad
    l_i = \max(-A_i s_i, -A_i\,\mathrm{clip}(s_i, 1 - \epsilon_l, 1 + \epsilon_h)), \qquad
    \frac{\partial l_i}{\partial \log\pi_{it}} = -\frac{A_i s_i}{n_i} \text{ unless clipped}

with GRPO's advantages, constant, and the mean of :math:`l_i` over completions. All tokens of a completion are clipped, or none.

*GSPO-token* (`token=True`) allows an advantage per token:
:math:`s_{it} = \mathrm{sg}(s_i)\,\pi_{it}/\mathrm{sg}(\pi_{it})`, whose value is :math:`s_i` and whose gradient is that of
token t alone. With one advantage per completion both have the same loss and gradient.

Defaults: :math:`\epsilon_l` 3e-4 and :math:`\epsilon_h` 4e-4 from the paper, no KL, no clamp of :math:`\log s`. verl's
`gspo` is `token=True, ratio_clamp=(None, 10.0)`: log s is capped at 10, and above it there is no gradient. Completions
without tokens are left out of the mean (`agg="trl-grpo"`: counted, as in TRL).
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
    name="GSPO",
    title="Group Sequence Policy Optimization",
    arxiv="2507.18071",
    year=2025,
    family="objective",
    evidence="code",
    note="TRL and verl",
)

Clamp = float | tuple[float | None, float | None] | None


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    token: bool = False,
    ratio_clamp: Clamp = None,
    agg: Aggregation = "seq-mean-token-mean",
) -> LossOutput:
    """The clipped objective over completions. logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens.

    advantages: [B], or like logp with `token`. ratio_clamp: bounds of log s.
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, kind="gspo_token" if token else "gspo", eps_low=eps_low,
        eps_high=eps_high, ratio_clamp=ratio_clamp, agg=agg,
    )  # fmt: skip


@dataclass(frozen=True)
class GSPO(Recipe):
    """GRPO's advantages, and the clip of the completion's ratio."""

    name: ClassVar[str] = "gspo"
    eps: float = 1e-6
    eps_low: float = 3e-4
    eps_high: float = 4e-4
    token: bool = False
    ratio_clamp: Clamp = None
    beta: float = 0.0
    agg: Aggregation = "seq-mean-token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group, eps=self.eps).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        options = {"kind": "gspo_token" if self.token else "gspo", "eps_low": self.eps_low, "eps_high": self.eps_high}
        return {**options, "ratio_clamp": self.ratio_clamp, "beta": self.beta, "agg": self.agg}


recipe = GSPO()
