r"""NGRPO: negative-enhanced GRPO. A virtual sample with the best reward makes all-wrong groups a signal.

"NGRPO: Negative-enhanced Group Relative Policy Optimization", arXiv:2509.18851.
Evidence: code. Advantage, loss and gradient were checked against the authors' release to 1e-12.

Advantage calibration, with the reward :math:`r_\max` added K times to a group of G rewards, in closed form:

.. math::
    \mu' = \frac{\sum_i r_i + K r_\max}{G + K}, \qquad
    \sigma'^2 = \frac{M_2 + G (\mu - \mu')^2 + K (r_\max - \mu')^2}{G + K - 1}, \qquad
    A_i = \frac{r_i - \mu'}{\sigma' + \epsilon}

with :math:`M_2` the sum of squared deviations from the group's own mean :math:`\mu`. The virtual samples enter nothing but
these statistics. For 0/1 rewards and K = 1, an all-wrong group gets about :math:`-1/\sqrt{G+1}`, an all-correct one exactly
0, and the advantages of a mixed group sum to a negative number: the push-down says that these answers are wrong, not which
other is right; what is gained comes from exploration.

Asymmetric clipping: the lower half-width :math:`\epsilon_\mathrm{neg}` binds only where A < 0, the upper one
:math:`\epsilon_\mathrm{pos}` only where A > 0:

.. math:: l = \max(-A\rho, -A\,\mathrm{clip}(\rho, 1 - \epsilon_\mathrm{neg}, 1 + \epsilon_\mathrm{pos}))

No dual clip, no KL, no clamp of the log-ratio; the mean over tokens. Defaults are those of the release: r_max 1, K 1, eps 1e-6,
0.16 and 0.24, ddof 1. Its trainer drops groups whose scores are all exactly 1 and keeps the all-wrong ones (`keep_groups`).
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, group_advantages, group_reduce, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout

about = About(
    name="NGRPO",
    title="NGRPO: Negative-enhanced Group Relative Policy Optimization",
    arxiv="2509.18851",
    year=2025,
    family="advantage, clip",
    evidence="code",
    note="the authors' release, to 1e-12",
)

STRATEGIES = ("all_correct", "all_incorrect", "all")


def ngrpo_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    r_max: float = 1.0,
    n_virtual: int = 1,
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Literal["raw", "zero", "calibrate"] = "raw",
) -> Tensor:
    """Calibrated advantages [B] of rewards [B] in groups given by id [B]. Constants.

    n_virtual: K; 0 is GRPO. singleton: what a group of one gets: "raw", its reward over 1 + eps, as the release does; "zero";
    or "calibrate", the formula. A reward above r_max is allowed, but on the CPU warned about: the virtual sample is then no
    maximum.
    """
    if singleton not in ("raw", "zero", "calibrate"):
        raise ValueError(f"singleton is {singleton!r}; accepted: 'raw', 'zero', 'calibrate'")
    if rewards.device.type == "cpu" and not torch.compiler.is_compiling() and n_virtual > 0 and bool((rewards > r_max).any()):
        warnings.warn(f"rewards reach {rewards.max().item()}, above r_max {r_max}", stacklevel=2)
    return group_advantages(
        rewards, group, eps=eps, ddof=ddof, singleton="reward" if singleton == "raw" else singleton, virtual_value=r_max,
        virtual_count=n_virtual,
    ).advantages  # fmt: skip


def ngrpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_neg: float = 0.16,
    eps_pos: float = 0.24,
    agg: Aggregation = "token-mean",
) -> LossOutput:
    """The asymmetrically clipped objective. An empty mask gives loss 0 and gradient 0 (the release: NaN).

    logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B] or like logp.
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, eps_low=eps_neg, eps_high=eps_pos, agg=agg, ratio_clamp=None
    )


def keep_groups(
    rewards: Tensor,
    group: Tensor,
    strategy: Literal["all_correct", "all_incorrect", "all"] = "all_correct",
    *,
    correct: float = 1.0,
) -> Tensor:
    """Which rows to train on: bool [B], the same for all members of a group.

    "all_correct" drops groups in which every reward is at least `correct` (the release's recipe), "all_incorrect" those in
    which none is, "all" both. The release tests for exactly 1, which real-valued rewards never meet; hence the threshold.
    """
    choice("strategy", strategy, STRATEGIES)
    right = (rewards >= correct).float()
    keep = torch.ones_like(right, dtype=torch.bool)
    if strategy != "all_incorrect":
        keep &= group_reduce(right, group, reduce="min") == 0
    if strategy != "all_correct":
        keep &= group_reduce(right, group, reduce="max") == 1
    return keep


@dataclass(frozen=True)
class NGRPO(Recipe):
    """Calibrated advantages, asymmetric clip, the mean over tokens."""

    name: ClassVar[str] = "ngrpo"
    r_max: float = 1.0
    n_virtual: int = 1
    eps: float = 1e-6
    singleton: Literal["raw", "zero", "calibrate"] = "raw"
    eps_neg: float = 0.16
    eps_pos: float = 0.24
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return ngrpo_advantages(
            rollout.rewards, rollout.group, r_max=self.r_max, n_virtual=self.n_virtual, eps=self.eps, singleton=self.singleton
        )

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_neg, "eps_high": self.eps_pos, "agg": self.agg, "ratio_clamp": None}


recipe = NGRPO()
