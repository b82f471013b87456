"""What a trainer's hooks can be given of a recipe.

An advantage hook sees a whole rollout, so any recipe's advantages fit. A loss hook sees log-probs, advantages and a mask of
a micro-batch, without groups, rewards or the reference: :func:`token_loss` says whether a recipe's loss can be computed
from that, and how.
"""

from __future__ import annotations

import importlib
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops import LossOutput, masked_aggregate, policy_loss, sequence_sum
from ..ops.policy import Aggregation
from ..papers import Recipe
from ..papers._shared import check_values

Average = Literal["tokens", "rows"]

# Options named beta that are the weight of a KL to the reference. Elsewhere the name means something else.
_BETA_IS_NO_KL = ("copg", "disco", "etr", "trpa")
_NO_LOSS = {
    "etr": "its clip bounds come from the rewards of each completion's group",
    "tppo": "its critic learns from other tokens than its policy, which one mask cannot say",
}


def check_version(package: str, low: tuple[int, ...], high: tuple[int, ...]) -> None:
    """ImportError unless the package is installed in a version from `low` to before `high`."""
    try:
        version = str(importlib.import_module(package).__version__)
    except ImportError as error:
        raise ImportError(f"{package} is not installed: {error}") from error
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if not low <= numbers < high:
        accepted = f"from {'.'.join(map(str, low))} to before {'.'.join(map(str, high))}"
        raise ImportError(f"{package} is {version}; prefkern's integration is tested with versions {accepted}")


@dataclass(frozen=True)
class TokenLoss:
    """A recipe's loss as a function of log-probs, advantages and a mask."""

    recipe: Recipe
    options: dict[str, Any]
    """Of `prefkern.policy_loss`, without how tokens are summed up."""
    average: Average
    """"rows": one loss per completion, always the mean over them."""
    agg: Aggregation
    """The recipe's own way to sum up, by verl's names."""
    scale: float | None

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        agg: Aggregation,
        norm: float | Tensor | None = None,
        scale: float | None = None,
        token_weight: Tensor | None = None,
        ref_logp: Tensor | None = None,
    ) -> LossOutput:
        """All tensors [B, T], mask bool. agg, norm and scale: as `prefkern.policy_loss` has them, for means over tokens;
        for one loss per completion `norm` stands for the number of completions. Gradient to logp."""
        if self.recipe.on_policy and self.options["kind"] == "clip":
            old_logp = logp.detach()
        if self.options["kind"] == "gspo":
            advantages = row_values("advantages", advantages, mask)
        if self.average == "tokens":
            return policy_loss(
                logp, old_logp, advantages, mask, agg=agg, norm=norm, scale=scale, token_weight=token_weight,
                ref_logp=ref_logp, **self.options,
            )  # fmt: skip
        rows = row_values("advantages", advantages, mask)
        weight = None if token_weight is None else geometric_mean(token_weight, mask)
        if self.options["kind"] == "gmpo":
            return policy_loss(
                logp, old_logp, rows, mask, agg="trl-grpo", norm=norm, token_weight=weight, ref_logp=ref_logp, **self.options
            )
        ratio = sequence_sum(logp, mask, minus=old_logp)[:, None]
        out = policy_loss(ratio, torch.zeros_like(ratio), rows, norm=norm, token_weight=weight, **self.options)
        return LossOutput(out.loss, {**out.metrics, "tokens": mask.sum()})


def token_loss(recipe: Recipe, trainer: str, *, reference: bool = False) -> TokenLoss:
    """The loss of a recipe for a hook of a trainer. ValueError that says what is missing, and what to do instead.

    reference: whether the hook receives the reference's log-probs, so that the recipe's KL can be in its loss.
    """
    name = recipe.name
    loop = f"prefkern.papers.load_recipe({name!r})"
    if recipe.whole_groups:
        raise ValueError(
            f"recipe {name!r} has no loss for {trainer}: its loss compares the completions of a group, but {trainer}'s "
            f"loss hook receives neither groups nor rewards, and splits groups over micro-batches; call {loop}.loss from a "
            "loop that keeps groups whole"
        )
    if name in _NO_LOSS:
        raise ValueError(f"recipe {name!r} has no loss for {trainer}: {_NO_LOSS[name]}; use {loop} from a loop of your own")
    if not reference and (beta := kl_in_loss(recipe)) != 0:
        raise ValueError(
            f"recipe {name!r} has beta {beta}: {trainer}'s loss hook does not receive the reference's log-probs; set the KL in "
            f"{trainer}'s own options and leave beta at 0"
        )
    if name == "gtpo":  # all the rest of it is in the advantages
        return TokenLoss(recipe, {"kind": "clip", "ratio_clamp": None}, "tokens", "seq-mean-token-mean", None)
    options = recipe.loss_options({})
    agg, scale = options.pop("agg", "token-mean"), options.pop("scale", None)
    if not reference:
        options.pop("beta", None)
        options.pop("kl", None)
    options.setdefault("kind", "clip")
    if name == "rloo" and recipe.level == "sequence":  # type: ignore[attr-defined]
        return TokenLoss(recipe, options | {"ratio_clamp": None}, "rows", "seq-mean-token-mean", None)
    if options["kind"] == "gmpo":
        return TokenLoss(recipe, options, "rows", "seq-mean-token-mean", None)
    if agg == "trl-grpo":
        agg = "seq-mean-token-mean"
    elif agg == "trl-dr_grpo":  # means over completions that have tokens: the same for a rollout, whose completions have some
        agg, scale = ("seq-mean-token-sum", None) if scale == 1 else ("seq-mean-token-sum-norm", scale)
    return TokenLoss(recipe, options, "tokens", agg, scale)


def kl_in_loss(recipe: Recipe) -> float:
    """The weight of the recipe's KL to the reference, wherever it enters."""
    return 0.0 if recipe.name in _BETA_IS_NO_KL else float(getattr(recipe, "beta", 0.0))


def row_values(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """What the tokens of each row [B, T] all have: [B]. 0 for a row without tokens. ValueError if they differ, where values
    may be looked at."""
    if values.dim() == 1:
        return values
    first = values.gather(1, mask.long().argmax(1, keepdim=True))
    kept = values.where(mask, first)
    check_values(name, values, (kept == first).all(1), "a loss of whole completions needs one value for all tokens of a row")
    return first[:, 0].where(mask.any(1), 0.0)


def geometric_mean(weight: Tensor, mask: Tensor) -> Tensor:
    """Of the token weights [B, T] of each row: [B]. A weight [B] is returned as it is."""
    if weight.dim() == 1:
        return weight
    return (sequence_sum((weight + 1e-10).log(), mask) / (mask.sum(1) + 1e-8)).exp()


def mean_log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, clamp: float | None) -> Tensor:
    """The mean of old_logp - logp over the tokens that count: the k1 estimate of the KL of the step."""
    d = (old_logp - logp).detach()
    return masked_aggregate(d if clamp is None else d.clamp(-clamp, clamp), mask)


def warn_once(text: str, seen: set[str]) -> None:
    if text not in seen:
        seen.add(text)
        warnings.warn(text, stacklevel=3)
