"""A recipe: everything between sampled completions and a loss, for one objective, under one name.

    recipe = prefkern.papers.load_recipe("ngrpo")
    batch = recipe.prepare(rollout)                    # once per rollout: advantages, masks, weights, bounds
    for rows in minibatches:
        out = recipe.loss(logp, take_rows(batch, rows), entropy=entropy)

What `prepare` returns is a plain dict of tensors, by row: a minibatch is the same dict at some rows. A recipe is a frozen
dataclass whose fields are the paper's options: `dataclasses.replace(recipe, r_max=2.0)`, or `load_recipe("ngrpo", r_max=2.0)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..ops import LossOutput, masked_aggregate, policy_loss

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rollout:
    """What was sampled, B completions, and what is known of them. Only `rewards`, `group` and `mask` are always needed;
    a recipe names the rest in `needs`.

    Token tensors are padded `[B, T]`, or packed `[N]` with `cu_seqlens`; then `mask` may be None.
    """

    rewards: Tensor
    """[B], or [B, K] for K reward functions."""
    group: Tensor
    """int64 [B]: completions of one prompt have one id. Any ids, any order."""
    mask: Tensor | None = None
    """bool, like the tokens: True where a token belongs to the completion and counts."""
    old_logp: Tensor | None = None
    """Log-probs of the policy that the ratios compare with. None: on-policy, the ratios are 1."""
    ref_logp: Tensor | None = None
    """Log-probs of the reference model."""
    tokens: Tensor | None = None
    """Ids of the sampled tokens."""
    cu_seqlens: Tensor | None = None
    """int32 [B + 1]: where packed completions begin and end."""
    token_weight: Tensor | None = None
    """[B], or like the tokens: importance weights from `prefkern.importance_weights`, for instance. Recipes multiply their own
    into it."""
    lengths: Tensor | None = None
    """int64 [B]: tokens that count. None: counted from the mask."""
    extra: Mapping[str, Tensor] | None = None
    """What single papers ask for, [B, ...] each: main_rewards, levels, scores, is_anchor, values, ..."""

    def get(self, name: str) -> Tensor | None:
        """A field, or an entry of `extra`."""
        value = self.extra.get(name) if self.extra and name in self.extra else getattr(self, name, None)
        assert value is None or isinstance(value, Tensor)
        return value

    def token_counts(self) -> Tensor:
        """`lengths`, or how many tokens of each completion count: [B] int64."""
        if self.lengths is not None:
            return self.lengths
        if self.cu_seqlens is None:
            if self.mask is None:
                raise ValueError("rollout.mask is None; [B, T] is expected, or cu_seqlens, or lengths")
            return self.mask.sum(-1)
        if self.mask is None:
            return self.cu_seqlens.diff().long()
        before = self.mask.new_zeros(len(self.mask) + 1, dtype=self.cu_seqlens.dtype)
        before[1:] = self.mask.cumsum(0)
        return before[self.cu_seqlens.long()].diff().long()


@dataclass(frozen=True)
class Recipe(ABC):
    """One objective. Subclasses set `name`, override `advantages`, and where the loss is not the plain clipped one
    `loss_options` or `loss`."""

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of the rollout, or names in its `extra`, without which `prepare` raises."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Names in `extra` that are passed through to the loss."""
    needs_entropy: ClassVar[bool] = False
    """Whether `loss` needs the current policy's token entropies."""
    takes_token_weight: ClassVar[bool] = True
    """Whether its loss has a place for token weights; `prepare` raises if it has none and is given some."""
    on_policy: ClassVar[bool] = False
    """Whether nothing in the loss says how far the policy has moved since it sampled: one optimiser step per rollout."""
    whole_groups: ClassVar[bool] = False
    """Whether a minibatch must hold whole groups, since the loss itself compares the members of a group."""

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """[B], or like the tokens."""

    def prepare(self, rollout: Rollout) -> Batch:
        """What the loss needs of a rollout, by row; all of it constant."""
        self.check(rollout)
        return self.batch(rollout, self.advantages(rollout))

    def batch(self, rollout: Rollout, advantages: Tensor) -> Batch:
        """The advantages, and what of the rollout goes along with them."""
        batch = {"advantages": advantages, "group": rollout.group}
        for key in ("mask", "old_logp", "ref_logp", "cu_seqlens", "token_weight", *self.takes):
            value = rollout.get(key)
            if value is not None:
                batch[key] = value.detach()
        return batch

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of `prefkern.policy_loss`."""
        return {}

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        """The loss of the rows of `batch`, for the policy's log-probs `logp` of their tokens; gradient to `logp`.

        entropy: token entropies like `logp`; needed if `needs_entropy`, else only averaged as a metric.
        """
        options: dict[str, Any] = {"ref_logp": batch.get("ref_logp"), "token_weight": batch.get("token_weight")}
        options |= self.loss_options(batch)
        return policy_loss(
            logp, batch.get("old_logp", logp.detach()), batch["advantages"], batch.get("mask"),
            cu_seqlens=batch.get("cu_seqlens"), entropy=self.checked_entropy(entropy), **options,
        )  # fmt: skip

    def check(self, rollout: Rollout) -> None:
        """ValueError if the rollout lacks what this recipe needs, or has what it cannot use."""
        for key in self.needs:
            if rollout.get(key) is None:
                place = key if key in Rollout.__dataclass_fields__ else f"extra[{key!r}]"
                raise ValueError(f"recipe {self.name!r} needs rollout.{place}, which is None")
        if rollout.token_weight is not None and not self.takes_token_weight:
            raise ValueError(f"rollout.token_weight is given; recipe {self.name!r} has no place for token weights")

    def checked_entropy(self, entropy: Tensor | None) -> Tensor | None:
        if entropy is None and self.needs_entropy:
            raise ValueError(f"entropy is None; recipe {self.name!r} needs the policy's token entropies")
        return None if entropy is None else entropy.detach()

    def with_entropy(self, out: LossOutput, batch: Batch, entropy: Tensor | None) -> LossOutput:
        """The same with the mean token entropy among its metrics, for losses that do not see tokens."""
        if entropy is None:
            return out
        mean = masked_aggregate(entropy.detach(), batch.get("mask"), cu_seqlens=batch.get("cu_seqlens"))
        return LossOutput(out.loss, {**out.metrics, "entropy": mean})

    def options(self) -> dict[str, Any]:
        """The options and their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The batch at some of its rows, for a minibatch. Padded batches only: packed tokens do not lie in rows."""
    if "cu_seqlens" in batch:
        raise ValueError("batch has cu_seqlens; rows can only be taken of padded batches")
    return {key: value if value.dim() == 0 else value[rows] for key, value in batch.items()}


def multiply(weight: Tensor, other: Tensor | None) -> Tensor:
    """The product of two token weights, each [B] or like the tokens."""
    if other is None:
        return weight
    if weight.dim() < other.dim():
        weight = weight[:, None]
    elif other.dim() < weight.dim():
        other = other[:, None]
    return weight * other
