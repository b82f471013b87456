r"""GPG: plain policy gradient with centred rewards, scaled up for what gives no signal.

Chu et al., "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning", arXiv:2504.02546.
Evidence: code. Advantage and loss agree with verl's `gpg`; the paper's own alpha is from its text.

.. math::
    A_i = \alpha\, \frac{r_i - \mathrm{mean}(r)}{F}, \qquad l_{it} = -A_i \log\pi_{it}

over all tokens of the batch, without ratio, clip or KL. F, `f_norm`, is 1. With B completions in the batch,

- `alpha="scores"` (default, verl): :math:`\alpha = B / \max(1, \#\{r_i \ne 0\})`, the number of non-zero scores;
- `alpha="signals"` (the paper): :math:`\alpha = B / \max(1, \#\{A_i \ne 0\})`, the number of completions with a gradient.
  The two differ where a group is right throughout: it counts for verl, and has no gradient;
- `alpha="none"`: 1.

A group of one has mean 0 (verl): its advantage is its score. Advantages are constants. Counts are those of the batch that
is passed in.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, group_advantages, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout

about = About(
    name="GPG",
    title="GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning",
    arxiv="2504.02546",
    year=2025,
    family="advantage, objective",
    evidence="code",
    note="verl",
)

ALPHAS = ("scores", "signals", "none")


def advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    alpha: Literal["scores", "signals", "none"] = "scores",
    f_norm: float = 1.0,
    singleton: Literal["zero", "reward"] = "reward",
) -> Tensor:
    """Advantages [B] of rewards [B] in groups given by id [B]. Constants."""
    counted = ALPHAS[choice("alpha", alpha, ALPHAS)]
    if not f_norm > 0:
        raise ValueError(f"f_norm is {f_norm}; it must be positive")
    a = group_advantages(
        rewards, group, estimator="dr_grpo", singleton=singleton, batch="nonzero" if counted == "scores" else "none"
    ).advantages
    if counted == "signals":
        a = a * (len(a) / torch.count_nonzero(a).clamp_min(1))
    return a if f_norm == 1 else a / f_norm


def loss(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    agg: Aggregation = "token-mean",
) -> LossOutput:
    """-A log pi over the tokens. logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B] or like logp."""
    return policy_loss(logp, None, advantages, mask, cu_seqlens=cu_seqlens, kind="reinforce", agg=agg)


@dataclass(frozen=True)
class GPG(Recipe):
    """Centred rewards, scaled; log-probs weighted by them."""

    name: ClassVar[str] = "gpg"
    on_policy: ClassVar[bool] = True
    alpha: Literal["scores", "signals", "none"] = "scores"
    f_norm: float = 1.0
    singleton: Literal["zero", "reward"] = "reward"
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return advantages(rollout.rewards, rollout.group, alpha=self.alpha, f_norm=self.f_norm, singleton=self.singleton)

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"kind": "reinforce", "agg": self.agg}


recipe = GPG()
