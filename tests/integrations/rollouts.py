"""A rollout that has what every recipe needs, and what a trainer's batch is made of."""

from dataclasses import replace

import torch

from prefkern.papers import Recipe, Rollout, recipes

F64 = torch.float64
LENGTHS = torch.tensor([6, 2, 4, 1, 3, 6, 5, 2])
MASK = torch.arange(6) < LENGTHS[:, None]
COLUMNS = {
    "scores": torch.tensor([0.9, 0.1, 0.4, 0.8, 0.2, 0.6, 0.3, 0.7], dtype=F64),
    "step_rewards": torch.tensor([0, 1, 0, 0, 0.5, 0, 0, 1], dtype=F64),
    "traj": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
    "step": torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]),
    "anchor_ids": torch.tensor([7, 8, 7, 9, 7, 8, 9, 8]),
    "levels": torch.tensor([1, 2, 3, 1, 2, 1, 3, 1]),
    "finished": torch.tensor([True, True, False, True, True, False, True, True]),
    "win_start": torch.tensor([2, 0, 0, 0, 1, 0, 3, 0]),
    "r_base": torch.linspace(-1, 1, 8, dtype=F64),
    "judge_pass": torch.tensor([True, True, False, True, True, False, True, True]),
    "acc": torch.tensor([1, 0, 0, 1, 0, 1, 0, 1], dtype=F64),
    "has_aux": torch.tensor([True, True, False, False, True, False, True, False]),
    "tool_calls": torch.tensor([0, 1, 2, 3, 1, 0, 2, 2]),
    "correct": torch.tensor([True, False, False, True, False, True, False, True]),
}
"""Of each completion, beside its reward."""
OPTIONS = {"cgpo": {"kl_max": 5.0}, "otc": {"c": 3.0}, "dr_grpo": {"max_length": 6}}
RECIPES: dict[str, Recipe] = {name: replace(recipe, **OPTIONS.get(name, {})) for name, recipe in recipes().items()}


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
