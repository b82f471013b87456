"""A rollout that has what every recipe needs, and what a trainer's batch is made of."""

import torch

from every_recipe import COLUMNS, F64, LENGTHS, MASK, OPTIONS, RECIPES
from prefkern.papers import Recipe, Rollout

__all__ = ["COLUMNS", "F64", "LENGTHS", "MASK", "OPTIONS", "RECIPES", "as_text", "make", "value_and_gradient"]


def as_text(recipe: Recipe) -> str:
    """The recipe with those options, as a configuration spells it."""
    options = ",".join(f"{key}={value!r}" for key, value in OPTIONS.get(recipe.name, {}).items())
    return f"{recipe.name}:{options}" if options else recipe.name


def make(seed: int = 0, dtype: torch.dtype = F64) -> tuple[Rollout, torch.Tensor, torch.Tensor]:
    """Eight completions of two prompts, and the policy's log-probs and entropies. Rewards differ within each group."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=F64)

    old = -2 * uniform(8, 6)
    ref = old + 0.1 * (uniform(8, 6) - 0.5)
    values = uniform(8, 6) - 0.5
    tokens = (uniform(8, 6) * 3).long()
    logp, entropy = old + 0.8 * (uniform(8, 6) - 0.5), 0.9 * uniform(8, 6)
    rewards = torch.tensor([1, 0, 0, 1, 0, 0.5, 0, 1], dtype=F64)
    extra = {key: value.to(dtype) if value.is_floating_point() else value for key, value in COLUMNS.items()}
    rollout = Rollout(
        rewards=rewards.to(dtype), group=torch.tensor([3, 3, 3, 3, 9, 9, 9, 9]), mask=MASK, old_logp=old.to(dtype),
        ref_logp=ref.to(dtype), tokens=tokens, extra={**extra, "values": values.to(dtype)},
    )  # fmt: skip
    return rollout, logp.to(dtype), entropy.to(dtype)


def value_and_gradient(function, logp):
    """(loss, gradient, what else `function(leaf)` returns)."""
    leaf = logp.detach().clone().requires_grad_()
    loss, *rest = function(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(leaf) if gradient is None else gradient, *rest
