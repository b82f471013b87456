r"""REINFORCE++: PPO's objective without a critic; returns of tokens, whitened over the whole batch.

Hu et al., "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization", arXiv:2501.03262.
Evidence: code. Both advantages agree with verl's `reinforce_plus_plus` and `reinforce_plus_plus_baseline`.

*Plain*: the score of a completion at its last token, less a KL per token, summed backwards, then whitened:

.. math::
    r_t = s\,[t = \text{last}] - \beta\,\mathrm{kl}_t, \qquad R_t = r_t + \gamma R_{t+1}, \qquad A = \mathrm{whiten}(R)

*Baseline* (`variant="baseline"`), for several completions of a prompt: centred in the group instead, not divided by its std:

.. math:: A_{it} = \mathrm{whiten}\bigl((r_i - \mathrm{mean}(r))\,m_{it}\bigr)

.. math::
    \mathrm{whiten}(v) = \frac{v - \mu}{\sqrt{\sigma^2 + 10^{-8}}}, \quad n = \sum m, \quad
    \mu = \frac{\sum v m}{n + 10^{-8}}, \quad \sigma^2 = \frac{\sum (v - \mu)^2 m}{n + 10^{-8}} \frac{n}{n - 1}

both over all tokens of the batch that count (of all ranks: merge `prefkern.batch_moments`, then
`prefkern.batch_normalize`), so that long completions weigh more. The objective is PPO's clip. Advantages are constants.

Known behaviour, kept: the mean over tokens is not 0, so a constant group gets non-zero advantages beside others. Tokens
outside the mask are passed over: what comes from behind them is not discounted for them. A group of one has mean 0 in the
baseline. Fewer than two tokens cannot be whitened. Defaults: gamma 1, clip 0.2, eps 1e-8 under the root, no KL.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import LossOutput, discounted_returns, group_advantages, policy_loss
from ..ops import whiten as whitened
from ..ops.policy import Aggregation, Kl
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from .ppo import token_rewards

about = About(
    name="REINFORCE++",
    title="REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
    arxiv="2501.03262",
    year=2025,
    family="advantage",
    evidence="code",
    note="verl",
)

VARIANTS = ("plain", "baseline")


def advantages(
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    eps: float = 1e-8,
    whiten: bool = True,
) -> Tensor:
    """Whitened returns of tokens; 0 outside the mask. Constants.

    rewards: [B, T] with a bool mask, or packed [N] with cu_seqlens; `prefkern.papers.ppo.token_rewards` puts the scores of
    completions on their last tokens. whiten: False leaves out the last step: what a rank computes before moments are merged
    over ranks.
    """
    returns = discounted_returns(rewards, mask, gamma=gamma, cu_seqlens=cu_seqlens)
    return whitened(returns, mask, eps=eps) if whiten else returns


def baseline_advantages(rewards: Tensor, group: Tensor, lengths: Tensor, *, eps: float = 1e-8) -> Tensor:
    """The baseline's advantages [B], the value that every token of a row has, of rewards [B] in groups given by id [B].

    lengths: [B], how many tokens of each row count. Constants.
    """
    return group_advantages(
        rewards, group, estimator="dr_grpo", singleton="reward", lengths=lengths, batch="token", batch_eps=eps
    ).advantages


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
    kl: Kl = "k2",
    agg: Aggregation = "token-mean",
) -> LossOutput:
    """The clipped objective, plus beta times an estimate of KL(policy || reference) if asked for.

    logp, old_logp, ref_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: like logp, or [B].
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, eps_low=eps_low, eps_high=eps_high, ref_logp=ref_logp,
        beta=beta, kl=kl, agg=agg,
    )  # fmt: skip


@dataclass(frozen=True)
class ReinforcePP(Recipe):
    """Whitened returns of tokens, or whitened centred rewards; the clipped loss."""

    name: ClassVar[str] = "reinforce_pp"
    needs: ClassVar[tuple[str, ...]] = ("old_logp",)
    variant: Literal["plain", "baseline"] = "plain"
    gamma: float = 1.0
    """Of the plain variant."""
    eps: float = 1e-8
    beta: float = 0.0
    """Weight of the KL: in the reward of the plain variant, in the loss of the baseline. Needs ref_logp."""
    kl: Literal["k1", "k2", "k3"] | None = None
    """None: k1 in the reward, k2 in the loss."""
    eps_low: float = 0.2
    eps_high: float = 0.2
    agg: Aggregation = "token-mean"

    def is_plain(self) -> bool:
        return VARIANTS[choice("variant", self.variant, VARIANTS)] == "plain"

    def advantages(self, rollout: Rollout) -> Tensor:
        if not self.is_plain():
            return baseline_advantages(rollout.rewards, rollout.group, rollout.token_counts(), eps=self.eps)
        assert rollout.old_logp is not None
        rewards = token_rewards(
            rollout.rewards, rollout.old_logp, rollout.mask, cu_seqlens=rollout.cu_seqlens, ref_logp=rollout.ref_logp,
            beta=self.beta, kl=self.kl or "k1",
        )  # fmt: skip
        return advantages(rewards, rollout.mask, cu_seqlens=rollout.cu_seqlens, gamma=self.gamma, eps=self.eps)

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        options: dict[str, Any] = {"eps_low": self.eps_low, "eps_high": self.eps_high, "agg": self.agg}
        return options if self.is_plain() else {**options, "beta": self.beta, "kl": self.kl or "k2"}


recipe = ReinforcePP()
