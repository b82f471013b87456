"""verl: every recipe as an advantage estimator and as a policy loss, by name, and prefkern's head in its fused forward.

    VERL_USE_EXTERNAL_MODULES=prefkern.integrations.verl python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=prefkern_ngrpo actor_rollout_ref.actor.policy_loss.loss_mode=prefkern_ngrpo ...

Importing this module registers, and so does verl's plugin loader, which loads (imports, without a call) what the
entry-point group ``verl.plugins`` names. Options of recipes: :func:`register`, or the environment variable
``PREFKERN_VERL_RECIPES``. Both must be set in every process: the one that computes advantages and the workers.

What decides where both say something. The recipe: clip bounds, dual clip, temperatures of a gate. verl's own settings of
these, if changed from their defaults to something else than the recipe's, are an error. verl: how tokens are summed up
(``loss_agg_mode``, over the global batch), entropy bonus, KL, importance weights of the rollout. A recipe whose own
aggregation is another warns once. Losses with one value per completion (gmpo, rloo) are the mean over completions,
whatever ``loss_agg_mode`` says.

verl's policy loss receives neither groups nor entropies nor the reference. A recipe that needs them in its loss is refused
when verl validates its configuration (and if that is passed over, when it is first called), with what to use instead; what
does not depend on the policy is folded into the advantages.
"""

from __future__ import annotations

import contextvars
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._names import nearest_hint
from ..ops import discounted_returns, linear_logprobs, sequence_mean
from ..ops.policy import Aggregation
from ..papers import Recipe, Rollout, gtpo, load_recipe, ppo, reinforce_pp
from ..papers import recipes as known_recipes
from ._heads import linear_cross_entropy
from ._hooks import TokenLoss, check_version, kl_in_loss, mean_log_ratio, token_loss, warn_once

SUPPORTED = ((0, 9, 1), (0, 10))
"""From which version of verl, and to before which, this is tested."""
PREFIX = "prefkern_"
RECIPES_VARIABLE = "PREFKERN_VERL_RECIPES"
BATCH_VARIABLE = "PREFKERN_VERL_PASS_BATCH"
HEAD_VARIABLE = "PREFKERN_VERL_PATCH_HEAD"

# verl's setting of the actor -> the option of policy_loss, and verl's default.
_ACTOR_SETTINGS = {
    "clip_ratio_low": ("eps_low", 0.2),
    "clip_ratio_high": ("eps_high", 0.2),
    "clip_ratio_c": ("dual_clip", 3.0),
    "tau_pos": ("tau_pos", 1.0),
    "tau_neg": ("tau_neg", 1.05),
}
_BATCH_NAMES = {
    "old_logp": "old_log_probs",
    "ref_logp": "ref_log_prob",
    "tokens": "responses",
    "values": "values",
}
_SEVERAL_REWARDS = ("gdpo", "mo_grpo", "dgpo")
_GAE = "; or take algorithm.adv_estimator=gae, which is the same"
_NOTHING = ("copg", "disco", "trpa", "tppo")
"""Recipes that have neither advantages nor a loss here."""
_originals: dict[str, Any] = {}
"""What of verl was replaced, by name."""
_batch: contextvars.ContextVar[Any] = contextvars.ContextVar("prefkern_verl_batch", default=None)
_kept: contextvars.ContextVar[Any] = contextvars.ContextVar("prefkern_verl_kept", default=None)
"""What the new trainer keeps of the batch elsewhere."""
_warned: set[str] = set()


def register(recipes: Iterable[str] | Mapping[str, str] = ()) -> tuple[str, ...]:
    """Register every recipe with verl, as an advantage estimator and as a policy loss, both named ``prefkern_<recipe>``.

    Args:
        recipes: strings such as ``"ngrpo:r_max=2.0"`` replace what that recipe's name stands for; a mapping
            such as ``{"strict": "grpo:eps_high=0.1"}`` adds names, here ``prefkern_strict``.

    Returns:
        The names. Registering the same again changes nothing.

    Raises:
        ImportError: without verl, or with a version that is not supported; the message has the range.
        ValueError: for a recipe or an option that does not exist; for a name that is registered by someone else.
    """
    check_version("verl", *SUPPORTED)
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    specs = dict(recipes) if isinstance(recipes, Mapping) else {}
    if not isinstance(recipes, Mapping):
        if isinstance(recipes, str):
            raise TypeError(f"recipes is {recipes!r}; a list of such strings, or a mapping, is expected")
        specs = {text.partition(":")[0]: text for text in recipes}
    chosen = {name: load_recipe(text) for name, text in specs.items()}
    for recipe in chosen.values():
        _check_recipe(recipe)
    for name, recipe in known_recipes().items():
        if name not in chosen and not _is_ours(algos.ADV_ESTIMATOR_REGISTRY.get(PREFIX + name)):
            chosen[name] = recipe
    for name, recipe in chosen.items():
        _add(algos, PREFIX + name, recipe)
    _validate_with_verl()
    return tuple(name for name in algos.ADV_ESTIMATOR_REGISTRY if name.startswith(PREFIX))


def _check_recipe(recipe: Recipe) -> None:
    """ValueError for a recipe that has nothing for verl, or asks of it what verl itself adds."""
    if recipe.name in _NOTHING:
        token_loss(recipe, "verl")  # has none, and says so
    if isinstance(recipe, gtpo.GTPO) and recipe.variant == "code":
        raise ValueError("recipe 'gtpo' has variant 'code', which sums over completions; with verl use variant 'paper'")
    if (beta := kl_in_loss(recipe)) != 0:
        raise ValueError(
            f"recipe {recipe.name!r} has beta {beta}; verl adds the KL: set algorithm.use_kl_in_reward and algorithm.kl_ctrl, "
            "or actor.use_kl_loss and actor.kl_loss_coef, and leave beta at 0"
        )


def validate(config: Any) -> None:
    """ValueError if verl's whole configuration selects a recipe where it cannot work, or contradicts it; verl's own
    `validate_config` calls this, before anything starts.

    Seen from here: losses that verl cannot compute, settings that say something else than the recipe, names that are not
    registered, and what the new trainer (`trainer.use_v1`) does not hand to the computation of advantages.
    """
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    actor = config.actor_rollout_ref.actor
    estimator, mode = str(config.algorithm.adv_estimator), str(actor.policy_loss.loss_mode)
    for setting, name, registry in (
        ("algorithm.adv_estimator", estimator, algos.ADV_ESTIMATOR_REGISTRY),
        ("actor.policy_loss.loss_mode", mode, algos.POLICY_LOSS_REGISTRY),
    ):
        if name.startswith(PREFIX) and name not in registry:
            ours = [known for known in registry if known.startswith(PREFIX)]
            raise ValueError(f"{setting} is {name!r}, which is not registered{nearest_hint(name, ours)}")
    if estimator.startswith(PREFIX):
        algos.ADV_ESTIMATOR_REGISTRY[estimator].check(config.algorithm, new_trainer=bool(config.trainer.use_v1))
    if mode.startswith(PREFIX):
        settings = dict(actor.items()) | {"global_batch_info": {"loss_scale_factor": actor.get("loss_scale_factor")}}
        algos.POLICY_LOSS_REGISTRY[mode].check(settings, actor.loss_agg_mode)


def _validate_with_verl() -> None:
    original = importlib.import_module("verl.utils.config").validate_config
    if hasattr(original, "prefkern"):
        return

    @wraps(original)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(config, *args, **kwargs)
        validate(config)
        return result

    validate_config.prefkern = True  # type: ignore[attr-defined]
    _replace(original, validate_config, "validate_config")


def _add(algos: Any, name: str, recipe: Recipe) -> None:
    known = algos.ADV_ESTIMATOR_REGISTRY.get(name)
    if _is_ours(known):
        if known.recipe == recipe:
            return
        del algos.ADV_ESTIMATOR_REGISTRY[name]
    algos.register_adv_est(name)(Estimator(name, recipe))
    algos.register_policy_loss(name)(PolicyLoss(name, recipe))


def _is_ours(registered: Any) -> bool:
    return type(registered).__module__ == __name__  # not isinstance: the module may have been loaded anew


@dataclass(frozen=True)
class Estimator:
    """What verl calls for advantages. `batch` and `non_tensor_batch`: see :func:`pass_batch`."""

    name: str
    recipe: Recipe

    def __call__(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: np.ndarray | None = None,
        reward_baselines: Tensor | None = None,
        non_tensor_batch: Mapping[str, Any] | None = None,
        batch: Any = None,
        **other: Any,
    ) -> tuple[Tensor, Tensor]:
        """(advantages, returns), [B, T] each, 0 outside the mask.

        token_level_rewards, response_mask: [B, T]. config: verl's algorithm settings. index: [B], the prompts' uid.
        """
        recipe = self.recipe
        self.check(config)
        mask = response_mask.bool()
        if batch is None and (data := _batch.get()) is not None:
            batch, non_tensor_batch = data.batch, data.non_tensor_batch
        if (kept := _kept.get()) is not None and batch is not None:
            batch, non_tensor_batch = {**dict(batch.items()), **kept[0]}, {**(non_tensor_batch or {}), **kept[1]}
        seen = _Batch(recipe.name, batch, non_tensor_batch)
        with torch.no_grad():
            if isinstance(recipe, ppo.PPO):
                values = seen.tensor("values")
                out = ppo.advantages(
                    token_level_rewards, values, mask, gamma=recipe.gamma, lam=recipe.lam, whiten=recipe.whiten
                )
                return out.advantages, out.returns
            if isinstance(recipe, reinforce_pp.ReinforcePP) and recipe.is_plain():
                returns = discounted_returns(token_level_rewards, mask, gamma=recipe.gamma)
                return reinforce_pp.advantages(token_level_rewards, mask, gamma=recipe.gamma, eps=recipe.eps), returns
            advantages = self._advantages(token_level_rewards, mask, index, config, seen)
            return advantages, advantages

    def _advantages(self, rewards: Tensor, mask: Tensor, index: Any, config: Any, seen: _Batch) -> Tensor:
        recipe = self.recipe
        group = _groups(recipe.name, index, mask.device)
        scores = rewards.sum(-1)
        if recipe.name in _SEVERAL_REWARDS and (keys := _get(config, "gdpo_reward_keys")):
            scores = torch.stack([seen.numbers(key, mask.device) for key in keys], 1).to(rewards.dtype)
            weights = _get(config, "gdpo_reward_weights")
            if weights is not None and recipe.weights is None:  # type: ignore[attr-defined]
                recipe = replace(recipe, weights=tuple(map(float, weights)))  # type: ignore[call-arg]
        if isinstance(recipe, reinforce_pp.ReinforcePP):
            rows = reinforce_pp.baseline_advantages(scores, group, mask.sum(1), eps=recipe.eps)
            return rows[:, None] * mask
        fields = {key: seen.tensor(name) for key, name in _BATCH_NAMES.items() if key in recipe.needs}
        extra = seen.extra(recipe, mask.device)
        rollout = Rollout(rewards=scores, group=group, mask=mask, **fields, extra=extra)
        prepared = recipe.prepare(rollout)
        if "is_anchor" in prepared:
            raise ValueError(f"recipe {recipe.name!r} was given is_anchor; verl's loss cannot tell anchors from sampled rows")
        result = prepared["advantages"]
        if isinstance(recipe, gtpo.GTPO):
            result = _fold_gtpo(recipe, prepared, seen)
        result = result[:, None] if result.dim() == 1 else result
        return torch.where(prepared["mask"], result, 0.0)

    def kept_fields(self, config: Any) -> list[str]:
        """What the recipe needs that the new trainer keeps without handing it to the computation of advantages."""
        recipe = self.recipe
        fields = ["responses"] if "tokens" in recipe.needs else []
        if isinstance(recipe, gtpo.GTPO) and _looks_at_entropy(recipe):
            fields.append("entropy")
        several = recipe.name in _SEVERAL_REWARDS and _get(config, "gdpo_reward_keys")
        if several or set(recipe.needs) - set(_BATCH_NAMES):
            fields.append("extra_fields")
        return fields

    def check(self, config: Any, *, new_trainer: bool = False) -> None:
        """ValueError where the recipe has no advantages for verl, or verl's algorithm settings say something else.

        new_trainer: whether it is the one that hands little to the computation of advantages.
        """
        recipe = self.recipe
        passes = _switched_on(BATCH_VARIABLE) or "compute_advantage" in _originals
        fields = ["values"] if recipe.name == "ppo" else self.kept_fields(config)
        if new_trainer and fields and not passes:
            raise ValueError(
                f"recipe {recipe.name!r} needs {', '.join(fields)} of the batch for its advantages, which verl does not hand "
                f"out by itself; set {BATCH_VARIABLE}=1{_GAE if recipe.name == 'ppo' else ''}"
            )
        _check_recipe(recipe)
        if recipe.name in ("gdpo", "mo_grpo") and not _get(config, "gdpo_reward_keys"):
            raise ValueError(
                f"recipe {recipe.name!r} needs several rewards: name them in algorithm.gdpo_reward_keys, as keys of what "
                "compute_score returns"
            )
        for key in ("gamma", "lam"):
            given, own = _get(config, key, 1.0), getattr(recipe, key, None)
            if own is not None and given not in (1.0, own):
                raise ValueError(
                    f"algorithm.{key} is {given}, but {self.name} has {key} {own}; leave verl's at 1.0, or register "
                    f"{recipe.name}:{key}={given}"
                )
        if not _get(config, "norm_adv_by_std_in_grpo", True) and getattr(recipe, "scale", None) == "group":
            raise ValueError(
                f"algorithm.norm_adv_by_std_in_grpo is False, but {self.name} divides by the group's std; register "
                f"{recipe.name}:scale=none, or take {PREFIX}dr_grpo"
            )


class PolicyLoss:
    """What verl calls for the loss of a micro-batch."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe = name, recipe
        self._loss: TokenLoss | None = None

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: Aggregation = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, metrics), from [B, T] each. Gradient to log_prob.

        config: verl's ActorConfig; its `global_batch_info` says what the loss is divided by. Metrics have verl's names:
        actor/pg_clipfrac, actor/pg_clipfrac_lower, actor/ppo_kl.
        """
        loss, mask = self.check(config, loss_agg_mode), response_mask.bool()
        norm, scale = _denominators(loss_agg_mode, dict(_get(config, "global_batch_info") or {}), loss.average)
        value, metrics = loss(
            log_prob, old_log_prob, advantages, mask, agg=loss_agg_mode, norm=norm, scale=scale, token_weight=rollout_is_weights
        )
        kind = loss.options["kind"]
        clamp = 20.0 if kind in ("clip", "cispo", "sapo", "reinforce") else None
        low, high, dual = (metrics[f"clip_fraction_{side}"] for side in ("low", "high", "dual"))
        upper, lower = (high, low) if kind == "gmpo" else (low + high, dual)
        kl = mean_log_ratio(log_prob, old_log_prob, mask, clamp)
        numbers = torch.stack([upper, lower, kl]).tolist()
        names = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl")
        return value, dict(zip(names, numbers, strict=True))

    def check(self, config: Any, agg: str) -> TokenLoss:
        """The loss. ValueError where there is none, or settings of verl's actor contradict it; a warning for another
        aggregation."""
        if self._loss is None:
            self._loss = token_loss(self.recipe, "verl")
        loss = self._loss
        for setting, (option, default) in _ACTOR_SETTINGS.items():
            given, used = _get(config, setting, default), loss.options.get(option)
            if given is not None and given not in (default, used):
                raise ValueError(
                    f"actor.{setting} is {given}, but {self.name} uses {used}; the recipe decides: leave verl's at its "
                    f"default, {default}, and register the recipe with the option you want ({RECIPES_VARIABLE})"
                )
        if loss.average == "rows":
            return loss
        factor = (_get(config, "global_batch_info") or {}).get("loss_scale_factor")
        if agg == loss.agg and loss.scale is not None and loss.scale != factor:
            raise ValueError(
                f"actor.loss_scale_factor is {factor}, but {self.name} divides by {loss.scale:g}; set verl's to the same"
            )
        if agg != loss.agg:
            warn_once(
                f"{self.name}: recipe {self.recipe.name!r} sums up tokens by {loss.agg}, but actor.loss_agg_mode is {agg}, "
                "which is what is done",
                _warned,
            )
        return loss


def _denominators(agg: str, info: dict[str, Any], average: str) -> tuple[Any, float | None]:
    """norm and scale of `prefkern.policy_loss` for verl's global batch."""
    ranks = info.get("dp_size") or 1
    counted = "global_batch_size" if average == "rows" or agg.startswith("seq-") else "batch_num_tokens"
    if agg == "token-sum" and average == "tokens":
        return 1 / ranks, None
    total = info.get(counted)
    if total is None and ranks > 1:
        raise ValueError(f"{counted} is None in actor.global_batch_info; {agg} needs it when dp_size is {ranks}")
    scale = info.get("loss_scale_factor") if agg == "seq-mean-token-sum-norm" and average == "tokens" else None
    return None if total is None else total / ranks, None if scale is None else float(scale)


def _fold_gtpo(recipe: gtpo.GTPO, prepared: dict[str, Tensor], seen: _Batch) -> Tensor:
    """The token advantages [B, T] with which the plain policy gradient is GTPO's: on-policy, as it is meant, the entropies of
    the policy that sampled are those of the current one."""
    advantages, weights, mask = prepared["advantages"], prepared["weights"], prepared["mask"]
    if not _looks_at_entropy(recipe):
        return advantages[:, None] * weights
    threshold = gtpo.THRESHOLDS[recipe.variant] if recipe.threshold is None else recipe.threshold
    entropy = seen.any_of("entropys", "entropy")
    if entropy is None:
        raise ValueError(
            "recipe 'gtpo' needs token entropies of the policy, which verl's legacy trainer drops before it computes "
            "advantages; set trainer.use_v1=True, or do without entropy filter and pressure: gtpo:gamma=0,threshold=1e9"
        )
    h = sequence_mean(entropy, mask)
    shaped = advantages - recipe.gamma * h
    if recipe.h_init is None or recipe.h_init <= threshold:
        shaped = torch.where(h <= threshold, shaped, 0.0)  # false for NaN
    return shaped[:, None] * weights


def _looks_at_entropy(recipe: gtpo.GTPO) -> bool:
    threshold = gtpo.THRESHOLDS[recipe.variant] if recipe.threshold is None else recipe.threshold
    return recipe.gamma != 0 or (threshold < 1e9 and (recipe.h_init is None or recipe.h_init <= threshold))


@dataclass(frozen=True)
class _Batch:
    """What is seen of verl's batch, if anything."""

    recipe: str
    batch: Any
    non_tensor: Mapping[str, Any] | None

    def tensor(self, key: str) -> Tensor:
        found = self.any_of(key)
        if found is None:
            raise ValueError(self._missing(key))
        return found

    def any_of(self, *keys: str) -> Tensor | None:
        for key in keys:
            if self.batch is not None and key in self.batch:
                tensor: Tensor = self.batch[key]
                return tensor
        return None

    def numbers(self, key: str, device: torch.device) -> Tensor:
        """Numbers [B] of the rows by name, wherever they are."""
        found = self.any_of(key)
        if found is None and self.non_tensor is not None and key in self.non_tensor:
            values = np.asarray(self.non_tensor[key]).tolist()
            try:
                found = torch.as_tensor(values)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{key} of verl's batch is {values!r}; a number for every completion is expected") from error
        if found is None:
            raise ValueError(self._missing(key))
        return found.to(device)

    def extra(self, recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
        """What else the recipe needs, and what columns of numbers there are that it may look for."""
        fields = Rollout.__dataclass_fields__
        wanted = {key for key in recipe.needs if key not in fields and key not in _BATCH_NAMES}
        result = {key: self.numbers(key, device) for key in wanted}
        for key, column in (self.non_tensor or {}).items():
            if key not in fields and key not in result and np.asarray(column).dtype.kind in "biuf":
                result[key] = torch.as_tensor(np.asarray(column)).to(device)
        return result

    def _missing(self, key: str) -> str:
        if self.batch is None:
            return (
                f"recipe {self.recipe!r} needs {key!r} of the batch, which verl hands to its own gdpo only; call "
                f"prefkern.integrations.verl.pass_batch() where advantages are computed, or set {BATCH_VARIABLE}=1"
            ) + (_GAE if self.recipe == "ppo" else "")
        return (
            f"recipe {self.recipe!r} needs {key!r}, which is not in verl's batch; return it from compute_score, with the score"
        )


def _groups(recipe: str, index: Any, device: torch.device) -> Tensor:
    if index is None:
        raise ValueError(f"recipe {recipe!r} needs groups, but verl's batch has no uid")
    ids: dict[Any, int] = {}
    return torch.tensor([ids.setdefault(uid, len(ids)) for uid in index], dtype=torch.long, device=device)


def _get(config: Any, key: str, default: Any = None) -> Any:
    return default if config is None else config.get(key, default)


# ------------------------------------------------------------------------------------------------------ what is replaced


def pass_batch() -> None:
    """Let prefkern's estimators see the whole batch: what token ids, entropies, critics, or further columns of rewards they
    need.

    verl hands these to its own gdpo only. This puts a wrapper around its `compute_advantage`, which is otherwise unchanged,
    and one around the method of the new trainer that calls it, to fetch what that one has put away (responses, entropy, and
    of extra_fields what compute_score returned); call it in the process that computes advantages, or set
    ``PREFKERN_VERL_PASS_BATCH=1``. The legacy trainer (``trainer.use_v1=False``) has all but the entropies in its batch.
    """
    check_version("verl", *SUPPORTED)
    home = importlib.import_module("verl.trainer.ppo.ray_trainer")
    if "compute_advantage" in _originals:
        return
    original = _originals["compute_advantage"] = home.compute_advantage

    @wraps(original)
    def compute_advantage(data: Any, *args: Any, **kwargs: Any) -> Any:
        token = _batch.set(data)
        try:
            return original(data, *args, **kwargs)
        finally:
            _batch.reset(token)

    _replace(original, compute_advantage, "compute_advantage")
    try:
        trainer = importlib.import_module("verl.trainer.ppo.v1.trainer_base")
    except ImportError:  # its queue is a package of its own, which the legacy trainer does without
        return
    method = _originals["_compute_advantage"] = trainer.PPOTrainer._compute_advantage

    @wraps(method)
    def _compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        algos = importlib.import_module("verl.trainer.ppo.core_algos")
        estimator = algos.ADV_ESTIMATOR_REGISTRY.get(str(self.config.algorithm.adv_estimator))
        fields = estimator.kept_fields(self.config.algorithm) if _is_ours(estimator) else []
        kept = None
        if fields:
            data = trainer.tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
            kept = _unpacked(data, fields)
        token = _kept.set(kept)
        try:
            return method(self, batch, metrics)
        finally:
            _kept.reset(token)

    trainer.PPOTrainer._compute_advantage = _compute_advantage


def _unpacked(data: Any, fields: list[str]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Padded tensors, and the numbers that compute_score returned, by name."""
    columns: dict[str, list[Any]] = {}
    if "extra_fields" in fields:
        rows = [row.get("reward_extra_info", {}) if isinstance(row, dict) else {} for row in data.pop("extra_fields").tolist()]
        for key in set(rows[0]).intersection(*rows) if rows else ():
            columns[key] = [row[key] for row in rows]
    tensors = [name for name in fields if name != "extra_fields"]
    return ({name: data.to_padded_tensor()[name] for name in tensors} if tensors else {}), columns


def unpass_batch() -> None:
    """Take the wrappers off again."""
    if "compute_advantage" in _originals:
        home = importlib.import_module("verl.trainer.ppo.ray_trainer")
        _replace(home.compute_advantage, _originals.pop("compute_advantage"), "compute_advantage")
    if "_compute_advantage" in _originals:
        trainer = importlib.import_module("verl.trainer.ppo.v1.trainer_base")
        trainer.PPOTrainer._compute_advantage = _originals.pop("_compute_advantage")


def patch_head() -> None:
    """Compute verl's fused log-probs and entropies with `prefkern.linear_logprobs`.

    Replaces both of ``use_fused_kernels=True``: `linear_cross_entropy` (backend triton, and Megatron's fused forward) and
    `FusedLinearForPPO` (torch, liger). Log-probs and entropies are float32. Call it in the workers, before or after the
    model is built, or set ``PREFKERN_VERL_PATCH_HEAD=1``. With a process group the weight is this rank's shard of the
    vocabulary.
    """
    check_version("verl", *SUPPORTED)
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    if kernel.linear_cross_entropy is not linear_cross_entropy:
        _originals["linear_cross_entropy"] = kernel.linear_cross_entropy
        _replace(kernel.linear_cross_entropy, linear_cross_entropy, "linear_cross_entropy")
    if module.forward is not _fused_forward:
        _originals["forward"] = module.forward
        module.forward = _fused_forward


def unpatch_head() -> None:
    """Put verl's own functions back."""
    if "linear_cross_entropy" in _originals:
        _replace(linear_cross_entropy, _originals.pop("linear_cross_entropy"), "linear_cross_entropy")
    if "forward" in _originals:
        module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
        module.forward = _originals.pop("forward")


def _fused_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    out = linear_logprobs(hidden_states, vocab_weights, input_ids, temperature=temperature, outputs=("entropy",))
    assert out.entropy is not None
    return out.logp, out.entropy


def _replace(old: Any, new: Callable[..., Any], name: str) -> None:
    """Put `new` where any module of verl has `old` by that name, as those do that imported it."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "verl" and vars(module).get(name) is old:
            setattr(module, name, new)


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _from_environment() -> None:
    """Register what the environment names. A plugin's exceptions go unseen in verl, so that they are warnings as well."""
    names: dict[str, str] = {}
    for part in filter(None, map(str.strip, os.environ.get(RECIPES_VARIABLE, "").split(";"))):
        name, equals, text = part.partition("=")
        named = equals and ":" not in name
        names[name.strip() if named else part.partition(":")[0]] = text.strip() if named else part
    try:
        register(names)
        for variable, function in ((BATCH_VARIABLE, pass_batch), (HEAD_VARIABLE, patch_head)):
            if _switched_on(variable):
                function()
    except (ImportError, ValueError) as error:
        warnings.warn(f"prefkern is not registered with verl: {error}", stacklevel=2)
        raise


_from_environment()
