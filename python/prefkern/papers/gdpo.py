r"""GDPO: every reward is normalised within its group on its own, then they are summed and normalised over the batch.

"GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization", arXiv:2601.05242.
Evidence: code. Checked against the authors' TRL fork and against TRL and verl, which ship it; the authors' verl fork was read
only.

For rewards :math:`r_{bk}` with weights :math:`w_k` and groups g (all std with ddof 1):

.. math::
    z_{bk} = \frac{r_{bk} - \mathrm{mean}_g r_{\cdot k}}{\mathrm{std}_g r_{\cdot k} + \epsilon}, \qquad
    a_b = \sum_k w_k z_{bk}, \qquad
    A_b = \frac{a_b - \mathrm{mean}_B a}{\mathrm{std}_B a + \epsilon_B}

The last step runs over the whole batch, of all ranks: over sequences in TRL's form (`batch_norm="seq"`, the default), where
each counts once; over tokens in verl's (`"token"`), where long completions weigh more:

.. math::
    n = \sum m, \quad \mu = \frac{\sum v m}{n + 10^{-8}}, \quad
    \sigma^2 = \frac{\sum (v - \mu)^2 m}{n + 10^{-8}} \frac{n}{n - 1}, \\
    v_{bt} = a_b m_{bt}, \quad A_{bt} = \frac{v_{bt} - \mu}{\sqrt{\sigma^2 + 10^{-8}}} m_{bt}

What it argues against is `sum_then_normalize` (:mod:`prefkern.papers.mo_grpo`): rewards summed first collapse different
combinations into one advantage, and a reward of small scale is not learned.

Known behaviour, kept: with `"token"` a group of equal rewards gets a non-zero advantage, since the mean over tokens is not 0.
With one reward the last step still applies, as in TRL. The authors' TRL fork replaces NaN by 0 (`nan="zero"`), TRL leaves
such rewards out (`nan="ignore"`, the default). Defaults: eps 1e-4 (TRL; verl 1e-6), weights 1. A group of one has z = 0, or
with `"token"` verl's raw reward over 1 + eps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import group_advantages
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout

about = About(
    name="GDPO",
    title="GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization",
    arxiv="2601.05242",
    year=2026,
    family="advantage",
    evidence="code",
    note="the authors' TRL fork, TRL and verl",
)

BATCH_NORMS = ("seq", "token", "none")
NAN_RULES = ("ignore", "zero", "error")


def gdpo_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    eps: float = 1e-4,
    ddof: int = 1,
    batch_norm: Literal["seq", "token", "none"] = "seq",
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    nan: Literal["ignore", "zero", "error"] = "ignore",
    batch_eps: float | None = None,
) -> Tensor:
    """Advantages of rewards [B, K] in groups given by id [B]. Constants.

    Returns [B]; or [B, T], 0 outside the mask, for `batch_norm="token"` with `mask` [B, T]. Given `lengths` [B] instead of a
    mask, `"token"` returns [B], the value that every token of a row has.

    batch_norm: "none" leaves out the last step: what a rank computes before `prefkern.batch_moments` are merged over ranks.
    batch_eps: None: eps for "seq", 1e-8 under the root for "token".
    """
    choice("batch_norm", batch_norm, BATCH_NORMS)
    choice("nan", nan, NAN_RULES)
    if batch_norm == "token" and lengths is None:
        if mask is None:
            raise ValueError("mask is None; batch_norm='token' needs the mask [B, T] or the lengths [B]")
        lengths = mask.sum(-1)
    a = group_advantages(
        rewards, group, combine="normalize_then_sum", weights=weights, eps=eps, ddof=ddof, nan=nan, batch=batch_norm,
        batch_eps=batch_eps, lengths=lengths if batch_norm == "token" else None,
        singleton="reward" if batch_norm == "token" else "zero",
    ).advantages  # fmt: skip
    return a[:, None].where(mask, 0.0) if batch_norm == "token" and mask is not None else a


@dataclass(frozen=True)
class GDPO(Recipe):
    """Decoupled advantages of several rewards, and the clipped loss."""

    name: ClassVar[str] = "gdpo"
    weights: tuple[float, ...] | None = None
    eps: float = 1e-4
    batch_norm: Literal["seq", "token", "none"] = "seq"
    nan: Literal["ignore", "zero", "error"] = "ignore"
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        lengths = rollout.token_counts() if self.batch_norm == "token" else None
        return gdpo_advantages(
            rollout.rewards, rollout.group, weights=self.weights, eps=self.eps, batch_norm=self.batch_norm, lengths=lengths,
            nan=self.nan,
        )  # fmt: skip

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "beta": self.beta, "agg": self.agg}


recipe = GDPO()
