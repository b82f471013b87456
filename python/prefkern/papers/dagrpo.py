r"""DaGRPO-style distinctiveness: pairs of completions too alike are masked out of the advantage; hard prompts get an anchor.

"DaGRPO: Rectifying Gradient Conflict in Reasoning via Distinctiveness-Aware Group Relative Policy Optimization",
arXiv:2512.06337.
Evidence: inferred. Known is the mechanism: a fine-grained score per completion; pairs of low distinctiveness are masked out;
external anchors are added for hard prompts. The equations were not available and no code is released. The formulas below,
"pair-v1", are this library's own; what is obtained with them says nothing about the paper's numbers.

GRPO's advantage is an average over pairs, exactly, so that masking pairs is well defined. With scores q of the caller's, in
[0, 1]:

.. math::
    A_i = \frac1G \sum_j W_{ij} \frac{r_i - r_j}{\sigma + \epsilon}, \qquad
    W_{ij} = \begin{cases} 1 & r_i = r_j \\ [\mathrm{sign}(r_i - r_j)(q_i - q_j) \ge \tau] & \text{mode "gap"} \\
    [|q_i - q_j| \ge \tau] & \text{mode "abs"} \end{cases}

`level="pair"` (default) is this; with `"sequence"` :math:`A_i = k_i A_i^\mathrm{GRPO}`, :math:`k_i = 1` if some pair with a
completion of another reward is left. The title's mechanism is called sequence-level, the abstract speaks of pairs; hence
both. W is symmetric, so pair-level advantages sum to zero; sequence-level ones need not. :math:`\sigma` is of all rewards
of the group, with ddof 1.

*Anchors.* Where no completion of a prompt succeeds (:func:`needs_anchor`), append one external completion with the best
reward and score 1 *before* advantages are computed. Its tokens have no behaviour probability: with p = pi(token)

.. math::
    l = -A\,\frac{p}{p + g}, \qquad \frac{\partial l}{\partial \log\pi} = -\frac{A\,g\,p}{(p + g)^2}

(a shaping known from LUFFY) without a clip, or :math:`-A \log\pi` (`anchor_loss="nll"`). Other rows: the ordinary clip. The
mean runs over all tokens; masked rows stay in its denominator unless `renormalise`. Scores, W, A and sigma are constants.

Defaults: tau 0.1, gap, pair, g 0.1, clip 0.2, no KL. tau = -inf with "gap" is GRPO. Constant groups and groups of one get 0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..ops import LossOutput, PairMaskedAdvantages, group_advantages, group_reduce, pair_masked_advantages, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import may_look

about = About(
    name="DaGRPO",
    title="DaGRPO: Rectifying Gradient Conflict in Reasoning via Distinctiveness-Aware Group Relative Policy Optimization",
    arxiv="2512.06337",
    year=2025,
    family="mask, off-policy",
    evidence="inferred",
    note="neither equations nor code were available",
)


def needs_anchor(rewards: Tensor, group: Tensor, *, success: float = 1.0) -> Tensor:
    """Which rows belong to a prompt without any success: bool [B], the same for all members of a group."""
    return group_reduce(rewards, group, reduce="max") < success


def dagrpo_advantages(
    rewards: Tensor,
    scores: Tensor,
    group: Tensor,
    *,
    tau: float = 0.1,
    mode: Literal["gap", "abs"] = "gap",
    level: Literal["pair", "sequence"] = "pair",
    eps: float = 1e-6,
    ddof: int = 1,
    sigma: Literal["all", "kept"] = "all",
    renormalise: bool = False,
    is_anchor: Tensor | None = None,
) -> PairMaskedAdvantages:
    """Advantages, which rows are left, and how many pairs each lost, [B] each.

    rewards, scores: [B]. group: ids [B]. sigma: "kept" takes the std of the rows that are left (1 if fewer than two).
    renormalise: scale up for the rows that are not. is_anchor: bool [B], only to check (on the CPU, or under validation)
    that each anchor's reward is above its group's mean: it must be a positive.
    """
    if is_anchor is not None and may_look(rewards, is_anchor):
        bad = is_anchor & (group_advantages(rewards, group, estimator="dr_grpo").advantages <= 0)
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise ValueError(f"rewards[{i}] is {rewards[i].item()}; an anchor's must be above the mean of its group")
    return pair_masked_advantages(
        rewards, scores, group, tau=tau, mode=mode, level=level, eps=eps, ddof=ddof, sigma=sigma, renormalise=renormalise
    )


def mixed_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    is_anchor: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    anchor_gamma: float = 0.1,
    anchor_loss: Literal["shaped", "nll"] = "shaped",
    agg: Aggregation = "token-mean",
) -> LossOutput:
    """The clipped objective of sampled rows, and the anchors'. What old_logp holds for an anchor's tokens is not looked at.

    logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B]. is_anchor: bool [B].
    """
    _check_anchors(advantages, is_anchor)
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, eps_low=eps_low, eps_high=eps_high, anchor=is_anchor,
        anchor_gamma=anchor_gamma, anchor_loss=anchor_loss, agg=agg,
    )  # fmt: skip


def _check_anchors(advantages: Tensor, is_anchor: Tensor) -> None:
    if may_look(advantages, is_anchor) and advantages.shape == is_anchor.shape:
        bad = is_anchor & (advantages < 0)
        if bool(bad.any()):
            i = int(bad.nonzero()[0, 0])
            raise ValueError(f"advantages[{i}] is {advantages[i].item()}; an anchor's must not be negative")


@dataclass(frozen=True)
class DaGRPO(Recipe):
    """Pair-masked advantages, and anchors beside sampled rows (pair-v1, this library's own)."""

    name: ClassVar[str] = "dagrpo"
    needs: ClassVar[tuple[str, ...]] = ("scores",)
    takes: ClassVar[tuple[str, ...]] = ("is_anchor",)
    tau: float = 0.1
    mode: Literal["gap", "abs"] = "gap"
    level: Literal["pair", "sequence"] = "pair"
    eps: float = 1e-6
    sigma: Literal["all", "kept"] = "all"
    renormalise: bool = False
    eps_low: float = 0.2
    eps_high: float = 0.2
    anchor_gamma: float = 0.1
    anchor_loss: Literal["shaped", "nll"] = "shaped"
    beta: float = 0.0
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        scores = rollout.get("scores")
        assert scores is not None
        return dagrpo_advantages(
            rollout.rewards, scores, rollout.group, tau=self.tau, mode=self.mode, level=self.level, eps=self.eps,
            sigma=self.sigma, renormalise=self.renormalise, is_anchor=rollout.get("is_anchor"),
        ).advantages  # fmt: skip

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        options = {"eps_low": self.eps_low, "eps_high": self.eps_high, "beta": self.beta, "agg": self.agg}
        if "is_anchor" not in batch:
            return options
        return {**options, "anchor": batch["is_anchor"], "anchor_gamma": self.anchor_gamma, "anchor_loss": self.anchor_loss}


recipe = DaGRPO()
