r"""DAPO: a higher upper clip, the mean over all tokens, groups of equal rewards left out, and a soft limit on length.

Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476.
Evidence: code. The pieces agree with verl's and TRL's implementations; that the four belong together is from the paper.

1. *Clip-higher*: GRPO's advantages, and the clip with :math:`\epsilon_l = 0.2, \epsilon_h = 0.28`.
2. *Token-level loss*: the mean over all tokens of the batch, not of each completion first. No KL.
3. *Dynamic sampling* (:func:`keep_groups`): prompts whose rewards are all equal are dropped and others sampled in their place.
4. *Soft overlong punishment* (:func:`overlong_penalty`), added to the reward of a completion of L tokens:

.. math::
    p(L) = 0 \text{ for } L \le L_\max - c, \qquad \frac{(L_\max - c) - L}{c} \text{ up to } L_\max, \qquad -1 \text{ beyond}

That is the paper's and TRL's form, `variant="trl"`. verl (`"verl"`) keeps to the middle branch, times a factor: it is equal
up to :math:`L_\max` and unbounded below beyond, which no completion reaches if :math:`L_\max` is what sampling stops at.
With c = 0 there is no middle branch: 0 up to :math:`L_\max`, and minus the factor beyond, in both.

Defaults are the paper's: :math:`L_\max` 20480, c 4096, 0.2, 0.28. The filter looks at the rewards before the punishment, as
the paper's accuracy does; it drops a group of one (verl keeps it: `keep_singletons=True`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, group_reduce, policy_loss
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import per_token
from .grpo import advantages

about = About(
    name="DAPO",
    title="DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    arxiv="2503.14476",
    year=2025,
    family="clip, aggregation, reward, sampler",
    evidence="code",
    note="verl and TRL; the bundle is the paper's",
)

VARIANTS = ("trl", "verl")


def overlong_penalty(
    lengths: Tensor,
    *,
    max_length: int = 20480,
    cache: int = 4096,
    factor: float = 1.0,
    variant: Literal["trl", "verl"] = "trl",
) -> Tensor:
    """What is added to the rewards of completions with `lengths` [B] tokens: float32 [B], never positive.

    max_length: of a completion, where sampling stops. cache: the last tokens of it, over which the penalty grows to `factor`.
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"cache is {cache}; accepted: from 0 to max_length, {max_length}")
    bounded = VARIANTS[choice("variant", variant, VARIANTS)] == "trl"
    if cache == 0:
        return torch.where(lengths > max_length, -factor, 0.0)
    over = (lengths - (max_length - cache)).float().clamp(min=0, max=cache if bounded else None)
    return -factor * over / cache


def keep_groups(rewards: Tensor, group: Tensor, *, keep_singletons: bool = False) -> Tensor:
    """Which rows to train on: bool [B], False for all members of a group whose rewards [B] are all equal."""
    keep = group_reduce(rewards, group, reduce="max") > group_reduce(rewards, group, reduce="min")
    return keep | (group_reduce(rewards, group, reduce="count") == 1) if keep_singletons else keep


def loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    dual_clip: float | None = None,
    norm: float | Tensor | None = None,
) -> LossOutput:
    """The clipped objective, the mean over all tokens. logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens.

    advantages: [B] or like logp. dual_clip: 3 in verl. norm: tokens of the whole batch over the number of ranks, where the
    batch is split over ranks or steps.
    """
    return policy_loss(
        logp,
        old_logp,
        advantages,
        mask,
        cu_seqlens=cu_seqlens,
        eps_low=eps_low,
        eps_high=eps_high,
        dual_clip=dual_clip,
        norm=norm,
    )


@dataclass(frozen=True)
class DAPO(Recipe):
    """GRPO's advantages of punished rewards, clip-higher, the mean over tokens of the groups that are kept.

    What sampling refills is the trainer's (:func:`keep_groups`); groups that are still there and have equal rewards are
    masked out.
    """

    name: ClassVar[str] = "dapo"
    eps: float = 1e-6
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None
    dynamic_sampling: bool = True
    max_length: int | None = None
    """Of a completion, for the overlong punishment. None: no punishment."""
    cache: int = 4096
    factor: float = 1.0
    overlong: Literal["trl", "verl"] = "trl"
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        rewards = rollout.rewards
        if rewards.dim() != 1:
            raise ValueError(f"rewards is {list(rewards.shape)}; recipe 'dapo' expects [B]")
        if self.max_length is not None:
            rewards = rewards + overlong_penalty(
                rollout.token_counts(), max_length=self.max_length, cache=self.cache, factor=self.factor, variant=self.overlong
            )
        return advantages(rewards, rollout.group, eps=self.eps).advantages

    def prepare(self, rollout: Rollout) -> Batch:
        batch = super().prepare(rollout)
        if self.dynamic_sampling:
            keep = keep_groups(rollout.rewards, rollout.group)
            like = next(x for x in (rollout.mask, rollout.old_logp, rollout.tokens) if x is not None)
            kept = per_token(keep, like, rollout.cu_seqlens)
            batch["mask"] = kept if rollout.mask is None else kept & rollout.mask
        return batch

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "dual_clip": self.dual_clip, "agg": self.agg}


recipe = DAPO()
