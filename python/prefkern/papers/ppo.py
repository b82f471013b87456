r"""PPO: the clipped objective, with generalised advantage estimates from a critic.

Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347; GAE is arXiv:1506.02438.
Evidence: code. The clipped loss agrees with verl's and TRL's implementations; recursion, whitening and the critic's loss
follow verl's code. Where the two differ it is said below.

The score of a completion, with a penalty per token for leaving the reference model, becomes rewards of tokens
(:func:`token_rewards`); a critic's values V make advantages of them, which are whitened over all tokens that count:

.. math::
    r_t = s\,[t = \text{last}] - \beta\,\mathrm{kl}_t, \qquad
    \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad \hat A_t = \delta_t + \gamma\lambda \hat A_{t+1}, \qquad R_t = \hat A_t + V_t

and with :math:`\rho_t = \exp(\log\pi_t - \log\pi_{\mathrm{old},t})`

.. math::
    L &= \max(-A\rho, -A\,\mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h)), \quad L := \min(L, -A c) \text{ where } A < 0 \\
    L_V &= \tfrac12 \max\bigl((V - R)^2, (\mathrm{clip}(V, V_\mathrm{old} \pm \epsilon_V) - R)^2\bigr)

Rewards, advantages, returns and old values are constants; the gradient flows from logp, and from V in :math:`L_V`.
Where a clip holds the loss the gradient is 0; at the bound it flows.

Defaults are verl's: clip 0.2, the dual clip c = 3 always on, the log-ratio clamped to 20, the mean over tokens, gamma and
lambda 1, :math:`\epsilon_V` 0.5, no KL in the reward. TRL: `dual_clip=None, ratio_clamp=None`, lambda 0.95,
:math:`\epsilon_V` 0.2, beta 0.05 with k1 (or k3). The paper has no dual clip. Tokens outside the mask, such as those of a
tool, are passed over by the recursion. A completion without tokens gets no reward. Whitening needs two tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import GaeOutput, LossOutput, gae, masked_aggregate, policy_loss
from ..ops import whiten as whitened
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import last_tokens, per_token

about = About(
    name="PPO",
    title="Proximal Policy Optimization Algorithms",
    arxiv="1707.06347",
    year=2017,
    family="advantage, objective, value",
    evidence="code",
    note="verl and TRL",
)

KL_KINDS = ("k1", "abs", "k2", "k3")


def token_rewards(
    rewards: Tensor,
    old_logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    kl: Literal["k1", "abs", "k2", "k3"] = "k1",
) -> Tensor:
    """Rewards of tokens, like old_logp: a completion's score at its last token, less beta times the KL of each token.

    rewards: [B]. old_logp, ref_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. The KL is between the policy
    that sampled and the reference. 0 outside the mask. Constants.
    """
    estimate = KL_KINDS[choice("kl", kl, KL_KINDS)]
    if rewards.dim() != 1:
        raise ValueError(f"rewards is {list(rewards.shape)}; [B] is expected, one score per completion")
    last = last_tokens(old_logp, mask, cu_seqlens)
    scores = per_token(rewards.detach(), old_logp, cu_seqlens)
    result = torch.where(last, scores, torch.zeros_like(scores))
    if beta == 0:
        return result
    if ref_logp is None:
        raise ValueError(f"ref_logp is None; beta {beta} needs the reference's log-probs")
    d = old_logp.detach() - ref_logp.detach()
    match estimate:
        case "k1":
            penalty = d
        case "abs":
            penalty = d.abs()
        case "k2":
            penalty = d.square() / 2
        case _:
            penalty = torch.expm1(-d) + d
    return result - beta * (penalty if mask is None else penalty.where(mask, 0.0))


def advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
) -> GaeOutput:
    """Advantages and returns of tokens. 0 outside the mask. Constants.

    rewards (of tokens), values (of a critic): [B, T] with a bool mask, or packed [N] with cu_seqlens. Only the advantages
    are whitened.
    """
    out = gae(rewards, values, mask, cu_seqlens=cu_seqlens, gamma=gamma, lam=lam)
    return out._replace(advantages=whitened(out.advantages, mask)) if whiten else out


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = 3.0,
    delta: float | None = None,
    ratio_clamp: float | None = 20.0,
    agg: Aggregation = "token-mean",
) -> LossOutput:
    """The clipped objective.

    logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: like logp, or [B].
    delta: TRL's bound of the unclipped ratio.
    """
    return policy_loss(
        logp, old_logp, advantages, mask, cu_seqlens=cu_seqlens, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip,
        delta=delta, ratio_clamp=ratio_clamp, agg=agg,
    )  # fmt: skip


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    clip: float | None = 0.5,
    agg: Aggregation = "token-mean",
) -> LossOutput:
    """The clipped regression of the critic; gradient to `values` only.

    values, old_values, returns: [B, T] with a bool mask, or packed [N] with cu_seqlens. clip: None for the plain squared
    error. Metrics: `value_clip_fraction`, `value_mean`, `return_mean`, over the tokens that count.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; a positive number is expected, or None")
    v, old, target = (x if mask is None else x.where(mask, 0.0) for x in (values, old_values.detach(), returns.detach()))
    error, held = (v - target).square(), torch.zeros_like(v)
    if clip is not None:
        bounded = (torch.clamp(v, old - clip, old + clip) - target).square()
        held = (bounded.detach() > error.detach()).to(v.dtype)
        error = torch.maximum(error, bounded)
    value = 0.5 * masked_aggregate(error, mask, cu_seqlens=cu_seqlens, agg=agg)
    with torch.no_grad():
        metrics = {
            name: masked_aggregate(x.detach(), mask, cu_seqlens=cu_seqlens)
            for name, x in (("value_clip_fraction", held), ("value_mean", v), ("return_mean", target))
        }
    return LossOutput(value, metrics)


@dataclass(frozen=True)
class PPO(Recipe):
    """Advantages from a critic, and the clipped loss; `value_loss` trains the critic."""

    name: ClassVar[str] = "ppo"
    needs: ClassVar[tuple[str, ...]] = ("old_logp", "values")
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True
    beta: float = 0.0
    """Weight of the KL in the reward; needs ref_logp."""
    kl: Literal["k1", "abs", "k2", "k3"] = "k1"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = 3.0
    ratio_clamp: float | None = 20.0
    value_clip: float | None = 0.5
    agg: Aggregation = "token-mean"

    def estimates(self, rollout: Rollout) -> GaeOutput:
        """Advantages and returns, like the tokens."""
        self.check(rollout)
        assert rollout.old_logp is not None
        rewards = token_rewards(
            rollout.rewards, rollout.old_logp, rollout.mask, cu_seqlens=rollout.cu_seqlens, ref_logp=rollout.ref_logp,
            beta=self.beta, kl=self.kl,
        )  # fmt: skip
        values = rollout.get("values")
        assert values is not None
        return advantages(
            rewards, values, rollout.mask, cu_seqlens=rollout.cu_seqlens, gamma=self.gamma, lam=self.lam, whiten=self.whiten
        )

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.estimates(rollout).advantages

    def prepare(self, rollout: Rollout) -> Batch:
        values, out = rollout.get("values"), self.estimates(rollout)
        assert values is not None
        return {**self.batch(rollout, out.advantages), "returns": out.returns, "old_values": values.detach()}

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        options = {"eps_low": self.eps_low, "eps_high": self.eps_high, "dual_clip": self.dual_clip}
        return {**options, "ratio_clamp": self.ratio_clamp, "agg": self.agg}

    def value_loss(self, values: Tensor, batch: Batch) -> LossOutput:
        """The critic's loss of the rows of `batch`, for its values of their tokens; gradient to `values`."""
        return value_loss(
            values, batch["old_values"], batch["returns"], batch.get("mask"), cu_seqlens=batch.get("cu_seqlens"),
            clip=self.value_clip, agg=self.agg,
        )  # fmt: skip


recipe = PPO()
