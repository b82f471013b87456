"""Every recipe with what has no default, and eight completions that have what any of them needs."""

from dataclasses import replace

import torch

from prefkern.papers import Recipe, recipes

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
"""What has no default; for Dr. GRPO a length, since packed completions have no padded one."""
RECIPES: dict[str, Recipe] = {name: replace(recipe, **OPTIONS.get(name, {})) for name, recipe in recipes().items()}
