"""NeMo-RL: a recipe as a loss function and as an advantage estimator, from a copy of `examples/run_grpo.py`.

    loss_fn = prefkern.integrations.nemo_rl.RecipeLoss("ngrpo")
    nemo_rl.algorithms.grpo._create_advantage_estimator = lambda config: RecipeAdvantages("ngrpo")

The loss takes the place of what `setup` returns; the estimator that of the one the trainer would make. The recipe decides
everything about the objective: bounds, aggregation (which is the loss's `loss_type`), and its KL to the reference, `beta`,
for which the trainer must compute reference log-probs. NeMo-RL's `loss_fn` settings are not looked at.

Every sum is divided by NeMo-RL's global number of valid tokens or sequences, so that micro-batches and ranks add up; where
NeMo-RL has them, `metric_normalizations` says of each metric what it was divided by.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import importance_weights, kl_penalty, masked_aggregate
from ..papers import Recipe, Rollout, load_recipe
from ._hooks import kl_in_loss, token_loss
from ._version import check_version

SUPPORTED = ((0, 6), (0, 8))
"""From which version of NeMo-RL, and to before which, the interface was read."""

check_version("nemo_rl", *SUPPORTED)
_interfaces = importlib.import_module("nemo_rl.algorithms.loss.interfaces")
LossType, LossInputType = _interfaces.LossType, _interfaces.LossInputType
MetricNormalizer = getattr(_interfaces, "MetricNormalizer", None)
"""Later than 0.7."""

_OVER_TOKENS = (
    "kl_penalty", "probs_ratio", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "approx_kl",
    "token_mult_prob_error", "gen_kl_error", "sampling_importance_ratio", "approx_entropy",
)  # fmt: skip
_AS_THEY_ARE = ("probs_ratio_min", "probs_ratio_max", "num_valid_samples")
_KL_IN_REWARD = ("ppo", "reinforce_pp", "rloo")
"""Recipes whose beta is the weight of a KL in the reward (reinforce_pp: of its plain variant)."""


class RecipeLoss:
    """A recipe's loss by NeMo-RL's `LossFunction` protocol, with log-probs as its input.

    recipe: a string such as "ngrpo:r_max=2.0", or a recipe. importance: keyword arguments of `prefkern.importance_weights`,
    such as ``{"clip_max": 2.0}`` (truncated, per token) or ``{"mode": "mask", "clip_min": 0.5, "clip_max": 5.0}`` (IcePop), to
    correct for the engine that generated; None: no correction.

    ValueError for a recipe whose loss needs what NeMo-RL does not hand to a loss.
    """

    def __init__(self, recipe: str | Recipe, *, importance: Mapping[str, Any] | None = None) -> None:
        self.recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        if self.recipe.needs_entropy:
            raise ValueError(
                f"recipe {self.recipe.name!r} has no loss for NeMo-RL: a loss that takes log-probs receives no entropies; call "
                f"prefkern.papers.load_recipe({self.recipe.name!r}).loss from a loop of your own"
            )
        self._loss = token_loss(self.recipe, "NeMo-RL", reference=True)
        if self._loss.agg == "seq-mean-token-sum-norm" and self._loss.scale is None:
            raise ValueError(
                f"recipe {self.recipe.name!r} has max_length None; NeMo-RL's micro-batches have no common length, so give it "
                "one"
            )
        self._by_token = self._loss.average == "tokens" and self._loss.agg == "token-mean"
        self._needs_reference = self._loss.options.get("beta", 0.0) != 0
        self.importance = None if importance is None else dict(importance)
        self.loss_type = LossType.TOKEN_LEVEL if self._by_token else LossType.SEQUENCE_LEVEL
        self.input_type = LossInputType.LOGPROB
        if MetricNormalizer is not None:
            gradient = MetricNormalizer.TOKENS if self._by_token else MetricNormalizer.SEQUENCES
            self.metric_normalizations = {
                "loss": gradient,
                **dict.fromkeys(_OVER_TOKENS, MetricNormalizer.TOKENS),
                **dict.fromkeys(_AS_THEY_ARE, MetricNormalizer.NONE),
            }

    def __call__(
        self, next_token_logprobs: Tensor, data: Mapping[str, Any], global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, metrics) of a micro-batch. Gradient to next_token_logprobs.

        next_token_logprobs: [B, S - 1], of the tokens from the second on. data: token_mask, advantages, prev_logprobs,
        generation_logprobs [B, S], sample_mask [B], and for a KL reference_policy_logprobs [B, S]. global_valid_seqs,
        global_valid_toks: 0-d, over all micro-batches and ranks.
        """
        logp = next_token_logprobs.float() if next_token_logprobs.dtype != torch.float64 else next_token_logprobs
        mask = data["token_mask"][:, 1:].bool() & data["sample_mask"].bool()[:, None]
        advantages, old, generated = (data[key][:, 1:] for key in ("advantages", "prev_logprobs", "generation_logprobs"))
        reference = None
        if self._needs_reference:
            if data.get("reference_policy_logprobs") is None:
                raise ValueError(
                    f"recipe {self.recipe.name!r} has beta {self._loss.options['beta']}, but data has no "
                    "reference_policy_logprobs; leave grpo.skip_reference_policy_logprobs_calculation at False"
                )
            reference = data["reference_policy_logprobs"][:, 1:]
        weight = None if self.importance is None else importance_weights(old, generated, mask, **self.importance)
        norm = global_valid_toks if self._by_token else global_valid_seqs
        loss, metrics = self._loss(
            logp, old, advantages, mask, agg=self._loss.agg, norm=_number(norm, logp), scale=self._loss.scale,
            token_weight=weight, ref_logp=reference,
        )  # fmt: skip
        found = self._metrics(
            loss, metrics, logp.detach(), old, generated, weight, mask, data["sample_mask"], global_valid_toks
        )
        return loss, found

    def _metrics(
        self,
        loss: Tensor,
        metrics: Mapping[str, Tensor],
        logp: Tensor,
        old: Tensor,
        generated: Tensor,
        weight: Tensor | None,
        mask: Tensor,
        samples: Tensor,
        tokens: Tensor,
    ) -> dict[str, float]:
        """What adds up over micro-batches; means over tokens are shares of the global mean."""
        norm = _number(tokens, logp)
        old, generated = old.to(logp.dtype), generated.to(logp.dtype)

        def over_all(values: Tensor) -> Tensor:
            return masked_aggregate(values, mask, norm=norm)

        share = torch.where(norm > 0, mask.sum() / norm.clamp_min(1), 0.0).to(logp.dtype)
        values = {
            "loss": loss.detach(),
            "kl_penalty": metrics["kl"] * share,
            "probs_ratio": metrics["ratio_mean"] * share,
            **{key: metrics[key] * share for key in ("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual")},
            "approx_kl": metrics["approx_kl"] * share,
            "token_mult_prob_error": over_all((generated - old).abs().exp()),
            "gen_kl_error": kl_penalty(generated, old, mask, kl="k3", norm=norm),
            "sampling_importance_ratio": over_all((old - generated).exp() if weight is None else weight),
            "approx_entropy": -over_all((logp - generated).exp() * logp),
            "probs_ratio_min": metrics["ratio_min"],
            "probs_ratio_max": metrics["ratio_max"],
            "num_valid_samples": samples.sum().to(logp.dtype),
            "tokens": mask.sum().to(logp.dtype),
        }
        numbers = dict(zip(values, torch.stack([v.to(logp.dtype) for v in values.values()]).tolist(), strict=True))
        if numbers.pop("tokens") == 0:  # what NeMo-RL leaves out of its extrema
            numbers |= {"probs_ratio_min": math.inf, "probs_ratio_max": -math.inf}
        return numbers


class RecipeAdvantages:
    """A recipe's advantages in the place of NeMo-RL's estimators.

    recipe: a string such as "ngrpo:r_max=2.0", or a recipe. ValueError for one whose loss compares completions itself.
    """

    def __init__(self, recipe: str | Recipe) -> None:
        self.recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        if self.recipe.name == "tppo" or (self.recipe.whole_groups and self.recipe.name != "reg_grpo"):
            token_loss(self.recipe, "NeMo-RL")  # has none, and says so
        if self.recipe.name == "gtpo":
            raise ValueError("recipe 'gtpo' needs token ids, which NeMo-RL does not hand to an estimator")

    def compute_advantage(
        self,
        prompt_ids: Tensor,
        rewards: Tensor,
        mask: Tensor,
        repeated_batch: Mapping[str, Any] | None = None,
        logprobs_policy: Tensor | None = None,
        logprobs_reference: Tensor | None = None,
        **other: Any,
    ) -> Tensor:
        """[B, S], 0 outside the mask.

        prompt_ids: [B, P], equal rows are one group. rewards: [B]. mask: [B, S]. repeated_batch: by name what else a recipe
        needs, a number per row; for several rewards (gdpo, mo_grpo, dgpo) the keys reward/<name>, in alphabetical order.
        logprobs_policy, logprobs_reference: [B, S].
        """
        recipe, batch = self.recipe, repeated_batch if repeated_batch is not None else {}
        device = mask.device
        keys = sorted(key for key in batch if isinstance(key, str) and key.startswith("reward/"))
        if recipe.name in ("gdpo", "mo_grpo") and len(keys) < 2:
            raise ValueError(f"recipe {recipe.name!r} needs several rewards; the batch has {len(keys)} keys reward/<name>")
        if recipe.name in ("gdpo", "mo_grpo", "dgpo") and keys:
            rewards = torch.stack([torch.as_tensor(batch[key]) for key in keys], 1)
        ids = prompt_ids[:, None] if prompt_ids.dim() == 1 else prompt_ids
        group = ids.unique(dim=0, return_inverse=True)[1]
        rewards = rewards if rewards.is_floating_point() else rewards.float()
        extra = {}
        for need in recipe.needs:
            if need in ("old_logp", "ref_logp"):
                continue
            if need not in batch:
                raise ValueError(f"recipe {recipe.name!r} needs {need!r}, which is not in the batch; put it there per row")
            extra[need] = torch.as_tensor(batch[need], device=device)
        uses_reference = "ref_logp" in recipe.needs or (recipe.name in _KL_IN_REWARD and kl_in_loss(recipe) != 0)
        rollout = Rollout(
            rewards=rewards.to(device), group=group.to(device), mask=mask.bool(), old_logp=logprobs_policy,
            ref_logp=logprobs_reference if uses_reference else None, extra=extra,
        )  # fmt: skip
        prepared = recipe.prepare(rollout)
        advantages = prepared["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        kept = prepared["mask"] if "mask" in prepared else mask.bool()
        return torch.where(kept, advantages, 0.0)


def _number(count: Any, like: Tensor) -> Tensor:
    """A count as a tensor of one element that `norm` takes."""
    return torch.as_tensor(count, dtype=like.dtype, device=like.device).detach().reshape(())
