r"""T-PPO: PPO on rollouts that are cut at a window; cut completions train the policy, finished ones the critic too.

"Truncated Proximal Policy Optimization", arXiv:2506.15050.
Evidence: part. There is no released code and the full text was not at hand: setting and EGAE are from the abstract, reviews and
summaries; the restriction to the window, the normalisers and the target of the critic are inferred; the defaults are not
verified.

In every step each prompt generates at most a window of new tokens. Completions that end leave, the others go on in the next
step. For one with l tokens so far, of which the first :math:`l_0` (`win_start`) are from earlier steps:

.. math::
    \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t), \qquad A_t = \sum_{k=t}^{l-1} (\gamma\lambda)^{k-t} \delta_k, \qquad
    V(s_l) = \begin{cases} 0 & \text{finished} \\ V(s_{l-1}) & \text{cut (EGAE)} \end{cases}

- *Policy*: the tokens of this step's window, :math:`l_0 \le t < l`, of every completion: PPO's clipped loss, averaged over
  them.
- *Critic*: all tokens of the completions that finished in this step: :math:`\frac1{2n}\sum (V_\phi - R_t)^2`, with the
  Monte-Carlo return :math:`R_t = \sum_{k \ge t} \gamma^{k-t} r_k`. Older windows' rewards must be kept.

Advantages and targets are constants. What PPO itself does at a cut is `bootstrap="critic"`, with :math:`V(s_l)` given; `"zero"`
takes a cut for an end, wrong on purpose, to compare with. With :math:`\gamma = 1` and no reward at its last token a cut
completion has :math:`\delta_{l-1} = 0`, so under an untrained critic it gives no signal. Options of ours: a lambda-return as
target (`lam_value` < 1), PPO's value clip, whitening over the policy's tokens.

Nothing past a completion's length is read. Without a finished completion the critic's loss is 0, without a token in the window
the policy's is; the gradients are then 0 too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import GaeOutput, discounted_returns, gae, kl_penalty, policy_loss, whiten
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_rows, check_values, last_tokens, per_token

about = About(
    name="T-PPO",
    title="Truncated Proximal Policy Optimization",
    arxiv="2506.15050",
    year=2025,
    family="advantage, mask",
    evidence="part",
    note="abstract, reviews and summaries; window filter, normalisers, critic's target and defaults are inferred",
)

Bootstrap = Literal["repeat", "critic", "zero"]


class TPPOMasks(NamedTuple):
    """Which tokens each of the two models learns from."""

    policy_mask: Tensor
    """bool: the tokens of this step's window."""
    value_mask: Tensor
    """bool: all tokens of the completions that finished."""


class TPPOLoss(NamedTuple):
    """Two losses, of two models, each averaged over its own tokens."""

    policy_loss: Tensor
    """0-d, gradient to logp."""
    value_loss: Tensor
    """0-d, gradient to predictions."""
    metrics: dict[str, Tensor]
    """0-d: those of `policy_loss`, n_policy_tokens, n_value_tokens."""


def egae(
    rewards: Tensor,
    values: Tensor,
    lengths: Tensor,
    finished: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Bootstrap = "repeat",
    last_values: Tensor | None = None,
) -> GaeOutput:
    """Advantages, and lambda-returns advantages + values, [B, T]; 0 past the lengths.

    rewards, values: [B, T]. lengths: int64 [B]. finished: bool [B]. last_values: [B], V(s_l) for `bootstrap="critic"`.
    """
    check_lengths(lengths, rewards.shape[1])
    return gae(
        rewards, values, lengths=lengths, finished=finished, gamma=gamma, lam=lam, bootstrap=bootstrap, last_values=last_values
    )


def tppo_masks(lengths: Tensor, win_start: Tensor, finished: Tensor, max_length: int) -> TPPOMasks:
    """The two masks, bool [B, max_length], from int64 lengths and window starts [B] and bool finished [B]."""
    check_lengths(lengths, max_length)
    place = torch.arange(max_length, device=lengths.device).expand(len(lengths), max_length)
    check_starts(win_start, lengths)
    return _masks(place, place < lengths[:, None], win_start[:, None], lengths[:, None], finished[:, None])


def value_targets(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Tensor:
    """What the critic regresses on where a completion is finished: Monte-Carlo returns, or lambda-returns for lam < 1.

    rewards, values: [B, T] with a bool mask, or packed [N] with cu_seqlens. values may be None for lam = 1.
    """
    if lam == 1:
        return discounted_returns(rewards, mask, gamma=gamma, cu_seqlens=cu_seqlens)
    if values is None:
        raise ValueError(f"values is None; lam {lam} needs them")
    return gae(rewards, values, mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens).returns


def value_loss(
    predictions: Tensor,
    targets: Tensor,
    value_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    old_values: Tensor | None = None,
    value_clip: float | None = None,
) -> Tensor:
    """Half the mean squared error over the tokens of value_mask; gradient to predictions.

    value_clip: PPO's, around old_values: the larger error of the prediction and of old + clamp(prediction - old, -c, c).
    """
    if value_clip is not None:
        if old_values is None:
            raise ValueError("old_values is None; value_clip needs them")
        clipped = old_values + (predictions - old_values).clamp(-value_clip, value_clip)
        predictions = torch.where((clipped - targets).abs() > (predictions - targets).abs(), clipped, predictions)
    # half a square of a difference is what the k2 estimate of a KL is
    return kl_penalty(predictions, targets, value_mask, cu_seqlens=cu_seqlens, kl="k2")


def tppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    predictions: Tensor,
    targets: Tensor,
    policy_mask: Tensor | None,
    value_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    old_values: Tensor | None = None,
    value_clip: float | None = None,
) -> TPPOLoss:
    """Both losses from advantages, critic's predictions and targets; all like logp: [B, T], or packed [N] with cu_seqlens.

    The two share no tokens: each model may as well get its own batch, with `prefkern.policy_loss` and :func:`value_loss`.
    """
    policy, metrics = policy_loss(
        logp, old_logp, advantages, policy_mask, cu_seqlens=cu_seqlens, eps_low=eps_low, eps_high=eps_high
    )
    value = value_loss(predictions, targets, value_mask, cu_seqlens=cu_seqlens, old_values=old_values, value_clip=value_clip)
    n_value = torch.ones_like(targets, dtype=torch.bool) if value_mask is None else value_mask
    return TPPOLoss(
        policy, value, {**metrics, "n_policy_tokens": metrics["tokens"], "n_value_tokens": n_value.sum().to(value.dtype)}
    )


def check_lengths(lengths: Tensor, max_length: int) -> None:
    check_values("lengths", lengths, (lengths >= 0) & (lengths <= max_length), f"accepted are 0 to {max_length}")


def check_starts(win_start: Tensor, lengths: Tensor) -> None:
    check_values("win_start", win_start, _within(win_start, lengths), "it must lie between 0 and the completion's length")


def _within(start: Tensor, length: Tensor) -> Tensor:
    return (start >= 0) & (start <= length)


def _masks(place: Tensor, counted: Tensor, start: Tensor, length: Tensor, done: Tensor) -> TPPOMasks:
    """`place`: where in its completion each token stands; start, length and done are its completion's.

    All tokens of a completion whose start is out of range count, so that it is not passed over in silence."""
    return TPPOMasks(counted & ((place >= start) | ~_within(start, length)), counted & done)


class _Window(NamedTuple):
    """A rollout's tokens as EGAE and the two losses see them."""

    values: Tensor
    finished: Tensor
    counted: Tensor
    rewards: Tensor
    masks: TPPOMasks


@dataclass(frozen=True)
class TPPO(Recipe):
    """EGAE, the clipped loss over the window, and a critic that learns from finished completions.

    Of the rollout, `mask` covers all response tokens so far. `extra` holds values (the critic's, like the tokens), finished
    (bool [B]), win_start (int64 [B]); optional are token_rewards (like the tokens; default: the rewards, at the last token of
    a finished completion) and last_values [B]. `loss` is the policy's; the critic's is `value_loss`.
    """

    name: ClassVar[str] = "tppo"
    needs: ClassVar[tuple[str, ...]] = ("values", "finished", "win_start")
    takes: ClassVar[tuple[str, ...]] = ("values",)
    gamma: float = 1.0
    lam: float = 0.95
    lam_value: float = 1.0
    bootstrap: Bootstrap = "repeat"
    eps_low: float = 0.2
    eps_high: float = 0.2
    value_clip: float | None = None
    whiten: bool = False

    def prepare(self, rollout: Rollout) -> Batch:
        self.check(rollout)
        window = self._window(rollout)
        targets = value_targets(
            window.rewards, window.values, window.counted,
            cu_seqlens=rollout.cu_seqlens, gamma=self.gamma, lam=self.lam_value,
        )  # fmt: skip
        batch = self.batch(rollout, self._advantages(rollout, window))
        return {**batch, "mask": window.masks.policy_mask, "value_mask": window.masks.value_mask, "value_targets": targets}

    def advantages(self, rollout: Rollout) -> Tensor:
        return self._advantages(rollout, self._window(rollout))

    def _advantages(self, rollout: Rollout, window: _Window) -> Tensor:
        advantages = gae(
            window.rewards, window.values, window.counted, finished=window.finished, gamma=self.gamma, lam=self.lam,
            bootstrap=self.bootstrap, last_values=rollout.get("last_values") if self.bootstrap == "critic" else None,
            cu_seqlens=rollout.cu_seqlens,
        ).advantages  # fmt: skip
        return whiten(advantages, window.masks.policy_mask) if self.whiten else advantages

    def _window(self, rollout: Rollout) -> _Window:
        values, finished, win_start = (rollout.get(name) for name in self.needs)
        assert values is not None and finished is not None and win_start is not None
        check_rows(len(rollout.group), finished=finished, win_start=win_start)
        if values.shape != (rollout.mask.shape if rollout.mask is not None else values.shape):
            raise ValueError(f"values has shape {list(values.shape)}; that of the mask is expected")
        cu_seqlens, lengths = rollout.cu_seqlens, rollout.token_counts()
        counted = torch.ones_like(values, dtype=torch.bool) if rollout.mask is None else rollout.mask
        done, start, length = (per_token(x, values, cu_seqlens) for x in (finished, win_start, lengths))
        place = counted.cumsum(-1) - 1  # among the tokens of its completion that count
        if cu_seqlens is not None:
            place = place - per_token(lengths.cumsum(0) - lengths, values, cu_seqlens)
        rewards = rollout.get("token_rewards")
        if rewards is None:
            r = rollout.rewards if rollout.rewards.dim() == 1 else rollout.rewards.sum(-1)
            rewards = torch.where(last_tokens(values, counted, cu_seqlens) & done, per_token(r, values, cu_seqlens), 0.0)
        check_starts(win_start, lengths)
        rewards = torch.where(_within(start, length), rewards, torch.nan)
        return _Window(values, finished, counted, rewards, _masks(place, counted, start, length, done))

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high}

    def value_loss(self, predictions: Tensor, batch: Batch) -> Tensor:
        """The critic's loss at the rows of `batch`, for its values like the tokens; gradient to them."""
        return value_loss(
            predictions, batch["value_targets"], batch["value_mask"], cu_seqlens=batch.get("cu_seqlens"),
            old_values=batch["values"], value_clip=self.value_clip,
        )  # fmt: skip


recipe = TPPO()
