"""A GRPO trainer whose advantages and policy loss are a recipe's, and whose everything else is TRL's.

TRL's `_compute_loss` runs as it is, but with advantages of 0: its policy term vanishes, and the forward, the KL to the
reference, the entropy bonus, the auxiliary loss and the metrics remain. The recipe's loss of the same log-probs is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from ...ops import LossOutput
from ...papers import Batch, Recipe, Rollout, load_recipe
from ...papers._recipe import multiply
from ._options import default_config, refuse_options

TAKEN_OVER = (
    "loss_type", "scale_rewards", "multi_objective_aggregation", "importance_sampling_level", "epsilon", "epsilon_high",
    "delta", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
    "vespo_lambda_neg",
)  # fmt: skip
"""Options of GRPOConfig that the recipe has in its place."""
PREFIX = "recipe/"
"""Of what belongs to the recipe among a batch's entries, and among metrics."""
GIVEN = ("tokens", "mask", "old_logp", "ref_logp", "lengths")
"""What the trainer knows of a rollout."""
COUNTS = ("tokens", "sequences")
SAME_AVERAGE = {
    "token-mean": "dapo", "seq-mean-token-sum": "luspo", "trl-dr_grpo": "dr_grpo", "seq-mean-token-sum-norm": "dr_grpo",
}  # fmt: skip
"""The loss of TRL's that averages as the recipe does, for its KL; otherwise "grpo"."""


class PrefkernGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the advantages and the policy loss of a recipe of `prefkern.papers`.

    Args:
        recipe: its name, with options as `load_recipe` takes them ("ngrpo:r_max=2.0"), or a recipe.
        others: those of `GRPOTrainer`. Options of GRPOConfig that the recipe decides (:data:`TAKEN_OVER`) must be left alone.

    What stays TRL's: generation, rewards and `reward_weights` (recipes that take several rewards have each of them), the KL to
    the reference of weight `beta` (unless the recipe has its own), importance weights of vLLM, the off-policy mask and the
    mask of high entropies (as weights of tokens), the entropy bonus, the auxiliary loss, metrics, and what a step is divided
    by: token means by the tokens of the whole batch, others by the number of accumulation steps. Groups are those of all
    processes. The recipe's metrics are logged as `recipe/...`, its clip fractions as `clip_ratio/...`.

    Raises:
        ValueError: for an unknown recipe or option, options that the recipe decides, and recipes that the settings do not
            allow: no reference model, several steps on one rollout where the loss has no ratio, groups that are not whole.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *rest: Any,
        recipe: str | Recipe,
        **more: Any,
    ) -> None:
        self.recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe is {recipe!r}; a name or a prefkern.papers.Recipe is expected")
        args = default_config(GRPOConfig, model, "GRPO") if args is None else args
        refuse_options(args, TAKEN_OVER, self.recipe)
        self._check_recipe(args)
        super().__init__(model, reward_funcs, args, *rest, **more)
        if self._is_vlm:
            raise ValueError("model is a vision-language model; PrefkernGRPOTrainer takes models of text")
        if getattr(self.recipe, "max_length", 0) is None and self.recipe.name == "dr_grpo":
            self.recipe = replace(self.recipe, max_length=self.max_completion_length)  # type: ignore[call-arg]
        weights = getattr(self.recipe, "weights", None)
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"recipe {self.recipe.name!r} has {len(weights)} weights; {len(self.reward_funcs)} are expected, one per "
                "reward function"
            )
        if weights is not None:
            self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        elif hasattr(self.recipe, "weights"):
            self.recipe = replace(self.recipe, weights=tuple(self.reward_weights.tolist()))  # type: ignore[call-arg]
        self.loss_type = SAME_AVERAGE.get(self._average(), "grpo")
        self._recording = False
        self._scored: tuple[Tensor, Tensor] | None = None
        self._high_entropy: Tensor | None = None
        self._rewards: Tensor | None = None

    def _check_recipe(self, args: GRPOConfig) -> None:
        recipe, name = self.recipe, self.recipe.name
        missing = [key for key in recipe.needs if key not in GIVEN]
        if missing and type(self).rollout_extra is PrefkernGRPOTrainer.rollout_extra:
            raise ValueError(
                f"recipe {name!r} needs {', '.join(missing)}, which the trainer does not have; override rollout_extra"
            )
        steps = args.steps_per_generation * args.num_iterations
        if recipe.on_policy and args.gradient_accumulation_steps % steps:
            raise ValueError(
                f"recipe {name!r} is for one optimiser step per rollout: gradient_accumulation_steps is "
                f"{args.gradient_accumulation_steps}, a multiple of steps_per_generation * num_iterations = {steps} is expected"
            )
        if recipe.whole_groups and (args.steps_per_generation != 1 or args.per_device_train_batch_size % args.num_generations):
            raise ValueError(
                f"recipe {name!r} compares the members of a group: steps_per_generation is {args.steps_per_generation}, 1 is "
                f"expected; per_device_train_batch_size is {args.per_device_train_batch_size}, a multiple of num_generations "
                f"= {args.num_generations} is expected"
            )
        own_kl = _kl_weight(recipe)
        if own_kl and own_kl != args.beta:
            raise ValueError(
                f"recipe {name!r} has beta={own_kl} and GRPOConfig has beta={args.beta}; they must be equal, or the recipe's 0"
            )
        if "ref_logp" in recipe.needs and args.beta == 0:
            raise ValueError(
                f"recipe {name!r} needs a reference model, which TRL has only for GRPOConfig(beta=...) other than 0"
            )
        self._own_reference = bool(own_kl) or "ref_logp" in recipe.needs
        if getattr(recipe, "weights", None) is not None and args.reward_weights is not None:
            raise ValueError(f"recipe {name!r} has weights, and GRPOConfig has reward_weights; one of them is expected")
        weighted = {
            "top_entropy_quantile": args.top_entropy_quantile < 1,
            "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
            "vllm_importance_sampling_correction": args.use_vllm and args.vllm_importance_sampling_correction,
        }
        if any(weighted.values()) and not recipe.takes_token_weight:
            option = next(key for key, on in weighted.items() if on)
            raise ValueError(f"recipe {name!r} has no place for token weights, which GRPOConfig({option}=...) makes")

    def rollout_extra(self, inputs: list[dict[str, Any]], output: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a recipe needs besides (`Rollout.extra`), [B, ...] for the completions of this process; to be overridden.

        inputs: the rows of the data set. output: what TRL made of them, `completion_ids` and so on.
        """
        return {}

    def _average(self) -> str:
        """How the recipe's loss averages over tokens; "" if in its own way."""
        if getattr(self.recipe, "level", None) == "sequence":
            return ""
        return str(getattr(self.recipe, "agg", "trl-dr_grpo" if self.recipe.name == "dr_grpo" else ""))

    # ------------------------------------------------------------------------------------------------- a rollout's batch

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._rewards is not None
        rewards, self._rewards = self._rewards.clone(), None
        rollout = self._rollout(inputs, output, rewards)
        batch = self._prepare(rollout, ~rewards.isnan().all(1))
        batch["items"] = batch["mask"].sum()
        if batch["advantages"].dim() == 1:
            log = self._logs["advantages"]
            for _ in range(min(len(log), len(rewards))):
                log.pop()
            log.extend(batch["advantages"].tolist())
        rows, columns = output["completion_ids"].shape
        everybody, width = rollout.mask.shape  # type: ignore[union-attr]
        first = self.accelerator.process_index * rows if everybody > rows else 0
        for key, value in batch.items():
            own = value[first : first + rows] if value.dim() else value
            padded = value.dim() > 1 and value.shape[1] == width > columns
            output[PREFIX + key] = own[:, :columns] if padded else own
        output["advantages"] = output[PREFIX + "advantages"]
        return output

    def _rollout(self, inputs: list[dict[str, Any]], output: dict[str, Any], rewards: Tensor) -> Rollout:
        """Of all processes: groups may have members on several."""
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        old = output.get("old_per_token_logps")
        if old is None and ("old_logp" in self.recipe.needs or _kl_weight(self.recipe)):
            old = self._old_logp(output)
        needed = {
            "mask": mask.bool(),
            "old_logp": old,
            "ref_logp": output.get("ref_per_token_logps") if self._own_reference else None,
            "tokens": output["completion_ids"] if "tokens" in self.recipe.needs else None,
        }
        extra = self.rollout_extra(inputs, output)
        everybody: dict[str, Any] = {key: None if t is None else self._gather(t) for key, t in needed.items()}
        several = hasattr(self.recipe, "weights")
        if not several:
            weighted = rewards * self.reward_weights.to(rewards.device)
            rewards = weighted.nansum(1)
        members = self.num_generations if self.model.training else self.num_generations_eval
        return Rollout(
            rewards=rewards,
            group=torch.arange(len(rewards), device=rewards.device) // members,
            extra={key: self._gather(t) for key, t in sorted(extra.items())},
            **everybody,
        )

    def _gather(self, values: Tensor) -> Tensor:
        """The same of all processes, by rows, padded to the widest."""
        if self.accelerator.num_processes == 1:
            return values
        sent = values.to(torch.uint8) if values.dtype == torch.bool else values  # padding would make int64 of bool
        if sent.dim() > 1:
            sent = self.accelerator.pad_across_processes(sent, dim=1)
        gathered = self.accelerator.gather(sent)
        assert isinstance(gathered, Tensor)
        return gathered.to(values.dtype)

    def _old_logp(self, output: dict[str, Any]) -> Tensor:
        """TRL leaves them out where they are those of the loss."""
        tokens, mask = (
            torch.cat([output[f"prompt_{key}"], output[f"completion_{key}"]], dim=1) for key in ("ids", "mask")
        )  # fmt: skip
        with torch.no_grad():
            logp, _, _ = self._get_per_token_logps_and_entropies(
                self.model, tokens, mask, output["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )  # fmt: skip
        assert isinstance(logp, Tensor)
        return logp

    def _prepare(self, rollout: Rollout, scored: Tensor) -> Batch:
        """The recipe's batch. Completions that no reward function scored are not in their groups and have advantage 0, as in
        TRL."""
        if bool(scored.all()) or hasattr(self.recipe, "nan"):
            return dict(self.recipe.prepare(rollout))
        if self.recipe.whole_groups:
            raise ValueError(f"a completion has no reward; recipe {self.recipe.name!r} needs one of each")
        given: dict[str, Any] = {
            key: value[scored]
            for key in ("rewards", "group", "mask", "old_logp", "ref_logp", "tokens")
            if (value := rollout.get(key)) is not None
        }
        extra = {key: value[scored] for key, value in (rollout.extra or {}).items()}
        batch = {}
        for key, value in self.recipe.prepare(Rollout(**given, extra=extra)).items():
            if value.dim() == 0:
                batch[key] = value
                continue
            whole = rollout.get(key)
            batch[key] = value.new_ones(len(scored), *value.shape[1:]) if whole is None else whole.clone()
            batch[key][scored] = value
        batch["advantages"][~scored] = 0.0
        batch["token_weight"] = multiply(scored.to(batch["advantages"].dtype), batch.get("token_weight"))
        return batch

    # -------------------------------------------------------------------------------------------------------------- loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._recording:
            self._scored = scored[:2]
        return scored

    def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        mask = super().get_high_entropy_mask(*args, **kwargs)
        if self._recording:
            self._high_entropy = mask
        assert isinstance(mask, Tensor)
        return mask

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch = {key[len(PREFIX) :]: value for key, value in inputs.items() if key.startswith(PREFIX)}
        theirs = {key: value for key, value in inputs.items() if not key.startswith(PREFIX)}
        theirs["advantages"] = batch["advantages"].new_zeros(len(batch["advantages"]))
        beta: float = self.beta  # type: ignore[has-type]
        if self._own_reference:
            self.beta = 0.0
        if self.beta == 0:  # else the KL may be corrected by the ratio; a ratio of inf would make NaN of the 0
            theirs.pop("old_per_token_logps", None)
        self._recording, self._scored, self._high_entropy = True, None, None
        try:
            rest = super()._compute_loss(model, theirs)
        finally:
            self._recording, self.beta = False, beta
        assert self._scored is not None
        (logp, entropy), self._scored = self._scored, None
        items = batch.pop("items")
        weight = self._token_weight(inputs, batch, logp)
        if weight is not None:
            batch["token_weight"] = weight
        out = self.recipe.loss(logp, batch, entropy=entropy)
        own = self._scaled(out.loss, batch["mask"], items)
        self._log_recipe(out, own)
        return rest + own[1]

    def _token_weight(self, inputs: dict[str, Any], batch: Batch, logp: Tensor) -> Tensor | None:
        """The weights that TRL would multiply its tokens' losses by, with the recipe's."""
        weight = batch.get("token_weight")
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps")
            sampled = inputs.get("sampling_per_token_logps", logp.detach() if old is None else old)
            advantages = batch["advantages"]
            keep = self.get_off_policy_mask(
                advantages=advantages[:, None] if advantages.dim() == 1 else advantages, per_token_logps=logp,
                sampling_per_token_logps=sampled, mask=inputs["completion_mask"] * inputs.get("tool_mask", 1),
                off_policy_threshold=self.off_policy_mask_threshold,
            )  # fmt: skip
            weight = multiply(_narrow(keep).to(logp.dtype), weight)
        if self._high_entropy is not None:
            weight, self._high_entropy = multiply(self._high_entropy.to(logp.dtype), weight), None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weight = multiply(_narrow(inputs["importance_sampling_ratio"]), weight)
        return weight

    def _scaled(self, loss: Tensor, mask: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss, its part of what the optimiser step sums up), as TRL does for a loss with this average."""
        training = self.model.training
        if self._average() == "token-mean":
            normalizer = items.clamp(min=1) / self.accelerator.num_processes
            if training:
                normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation
            loss = loss * (mask.sum() / normalizer)
            return loss, loss
        return loss, loss / (self.current_gradient_accumulation_steps if training else 1)

    def _log_recipe(self, out: LossOutput, own: tuple[Tensor, Tensor]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for key in [key for key in metrics if key.startswith("clip_ratio/")]:  # of a loss that is 0
            metrics[key].pop()
            if not metrics[key]:
                del metrics[key]
        names = sorted(out.metrics)
        values = torch.stack([own[0].detach(), *(out.metrics[name].detach() for name in names)]).float()
        weight = out.metrics["tokens"].detach().float() if "tokens" in out.metrics else values.new_ones(())
        gathered = self.accelerator.gather(torch.cat([values, weight[None]])[None])
        weights = gathered[:, -1:]
        means = (gathered[:, 1:-1] * weights).nansum(0) / weights.sum().clamp(min=1e-30)
        of = dict(zip(names, means.tolist(), strict=True))
        if metrics.get("policy_loss"):
            metrics["policy_loss"][-1] += gathered[:, 0].nanmean().item()
        if "clip_fraction_low" in of:
            low, high = of.pop("clip_fraction_low"), of.pop("clip_fraction_high")
            for key, value in (("low_mean", low), ("high_mean", high), ("region_mean", low + high)):
                metrics[f"clip_ratio/{key}"].append(value)
        for name, value in of.items():
            if name not in (*COUNTS, "entropy"):
                metrics[PREFIX + name].append(value)


def _narrow(weight: Tensor) -> Tensor:
    """[B, 1] as [B]."""
    return weight[:, 0] if weight.shape[1] == 1 else weight


def _kl_weight(recipe: Recipe) -> float:
    """The recipe's own weight of the KL to the reference; a `beta` whose default is not 0 is something else."""
    default = getattr(type(recipe), "beta", None)
    return float(getattr(recipe, "beta", 0.0)) if default == 0 else 0.0
