"""A DPO trainer whose loss is a pair recipe's, and whose everything else is TRL's.

TRL's `_compute_loss` runs as it is, but its loss has weight 0: the forwards, the auxiliary loss and the metrics remain. The
recipe's loss of the same log-probs is added.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ...ops import LossOutput
from ...papers import PairRecipe, Pairs, load_pair_recipe
from ._options import default_config, refuse_options

TAKEN_OVER = (
    "loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha",
    "discopop_tau", "use_weighting",
)  # fmt: skip
"""Options of DPOConfig that the recipe has in its place."""
PREFIX = "recipe/"
REWARDS = {
    "chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected", "reward_margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
}  # fmt: skip
"""Metrics of a recipe that stand in for TRL's, whose rewards are those of DPO."""
TOKEN_WISE = ("ld_dpo", "tdpo", "tgdpo")
"""Recipes for which the reference's log-probs of whole responses are not enough."""


class PrefkernDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with the loss of a pair recipe of `prefkern.papers`.

    Args:
        recipe: its name, with options as `load_pair_recipe` takes them ("simpo:beta=2.5"), or a recipe.
        others: those of `DPOTrainer`. Options of DPOConfig that the recipe decides (:data:`TAKEN_OVER`) must be left alone.

    A recipe that needs no reference has none: no second model is loaded, and nothing computed with one. Log-probs of a
    reference that were computed beforehand are used where the recipe needs those of responses only. What stays TRL's: data, the
    auxiliary loss, accumulation and metrics, where rewards, their margins and accuracies are the recipe's if it says them.
    Other metrics of the recipe are logged as `recipe/...`.

    Raises:
        ValueError: for an unknown recipe or option, options that the recipe decides, and what the trainer cannot give it.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *rest: Any,
        recipe: str | PairRecipe,
        **more: Any,
    ) -> None:
        self.recipe = load_pair_recipe(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(self.recipe, PairRecipe):
            raise TypeError(f"recipe is {recipe!r}; a name or a prefkern.papers.PairRecipe is expected")
        args = default_config(DPOConfig, model, "DPO") if args is None else copy.copy(args)
        refuse_options(args, TAKEN_OVER, self.recipe)
        name = self.recipe.name
        missing = [key for key in self.recipe.needs if key not in ("ref_logp", "sum_sq_probs")]
        if missing and type(self).pairs_extra is PrefkernDPOTrainer.pairs_extra:
            raise ValueError(
                f"recipe {name!r} needs {', '.join(missing)}, which the trainer does not have; override pairs_extra"
            )
        self._has_reference = _needs_reference(self.recipe)
        if not self._has_reference:
            if ref_model is not None or args.sync_ref_model or args.precompute_ref_log_probs:
                raise ValueError(f"recipe {name!r} needs no reference model; ref_model and its options have no effect")
            args.precompute_ref_log_probs = True  # in TRL: no model is kept for it
        elif args.precompute_ref_log_probs and name in TOKEN_WISE:
            raise ValueError(
                f"precompute_ref_log_probs keeps the log-probs of whole responses; recipe {name!r} needs those of tokens"
            )
        args.use_weighting = "sum_sq_probs" in self.recipe.needs  # then the head computes them
        super().__init__(model, ref_model, args, *rest, **more)
        if self._is_vlm:
            raise ValueError("model is a vision-language model; PrefkernDPOTrainer takes models of text")
        self.precompute_ref_logps: bool = args.precompute_ref_log_probs and self._has_reference
        self.use_weighting = False
        self.loss_types, self.loss_weights = ["sigmoid"], [0.0]
        self.beta: float = getattr(self.recipe, "beta", args.beta)

    def pairs_extra(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a recipe needs besides (`Pairs.extra`), [P] for each pair of the batch; to be overridden."""
        return {}

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._precompute_ref_logps(dataset, *args, **kwargs) if self._has_reference else dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mask = inputs["completion_mask"][:, 1:].bool()
        pairs = len(mask) // 2
        if not self._has_reference:
            zeros = torch.zeros(pairs, device=mask.device)
            inputs = {**inputs, "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        policy, precomputed = _Recorder(model), self.precompute_ref_logps
        self.precompute_ref_logps = precomputed or not self._has_reference
        try:
            with self._recorded_reference() as reference:
                result = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        rest, outputs = result if return_outputs else (result, None)
        scored = policy.output
        assert scored is not None
        logp = scored.log_probs[:, -mask.shape[1] :]
        ref_logp = None
        if self._has_reference and reference:
            ref_logp = reference[-1][:, -mask.shape[1] :]
        elif self._has_reference:
            ref_logp = _in_first_token(torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]), mask)
        extra = self.pairs_extra(inputs)
        if "sum_sq_probs" in self.recipe.needs:
            extra["sum_sq_probs"] = scored.log_sum_sq_probs[:, -mask.shape[1] :].exp()
        out = self.recipe.loss(Pairs(logp, mask, ref_logp, extra=extra))
        self._log_recipe(out)
        loss = rest + out.loss
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _recorded_reference(self) -> Iterator[list[Tensor]]:
        """The reference's log-probs, which TRL's `_compute_loss` does not give away: its forward is the last."""
        found: list[Tensor] = []
        module = self.model if self.ref_model is None else self.ref_model

        def record(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, FusedCausalLMOutput) and not self.precompute_ref_logps:
                found.append(output.log_probs.detach())

        handle = module.register_forward_hook(record)
        try:
            yield found
        finally:
            handle.remove()

    def _log_recipe(self, out: LossOutput) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        names = sorted(set(out.metrics) - {"pairs"})
        values = torch.stack([out.metrics[name].detach().float() for name in names])
        for name, value in zip(names, self.accelerator.gather(values[None]).mean(0).tolist(), strict=True):
            if name in REWARDS:
                metrics[REWARDS[name]][-1] = value
            else:
                metrics[PREFIX + name].append(value)


class _Recorder:
    """A model, and the last output of its fused head."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if isinstance(output, FusedCausalLMOutput):
            self.output = output
        return output


def _needs_reference(recipe: PairRecipe) -> bool:
    if recipe.name == "slic":
        return not recipe.options()["reference_free"]
    if recipe.name == "lcpo":
        return recipe.options()["kind"] not in ("simpo", "cpo")
    return "ref_logp" in recipe.needs


def _in_first_token(sums: Tensor, mask: Tensor) -> Tensor:
    """Log-probs of tokens [2P, T] that have these sums [2P] over the mask: all of it in the first token."""
    first = mask & (mask.cumsum(1) == 1)
    return torch.where(first, sums[:, None].to(torch.float32), 0.0)
