"""Advantages of samples against the others of their group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.types import GroupAdvantages

ESTIMATORS = ("grpo", "dr_grpo", "rloo")
SINGLETONS = ("zero", "reward")


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo",
    eps: float = 1e-6,
    singleton: Literal["zero", "reward"] = "zero",
) -> GroupAdvantages:
    """Advantages within groups of G samples with mean m and standard deviation s (ddof 1)

        grpo     (r - m) / (s + eps)
        dr_grpo  r - m
        rloo     G / (G - 1) (r - m), which is r minus the mean of the others

    Args:
        rewards: [B].
        group: int64 [B], any ids in any order; equal ids belong together. Groups may differ in size.
        singleton: what a group of one gets: "zero", or "reward", as if m = 0 and s = 1: r, and r / (1 + eps) for grpo.

    A group whose rewards are all equal has exactly this mean, standard deviation 0 and advantages 0, whatever rounding
    would have made of it. Rewards are constants: no gradient.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: got {estimator!r}, accepted are {list(ESTIMATORS)}")
    if singleton not in SINGLETONS:
        raise ValueError(f"singleton: got {singleton!r}, accepted are {list(SINGLETONS)}")
    r = rewards.detach()
    r = r if r.dtype == torch.float64 else r.float()
    if not bool(r.isfinite().all()):
        raise ValueError("rewards: every reward must be finite")

    ids, index = torch.unique(group, return_inverse=True)

    def per_group(values: Tensor, how: Literal["sum", "amin", "amax"]) -> Tensor:
        """The reduction of `values` over each group, given back to every member: [B]."""
        zeros = values.new_zeros(len(ids))
        return zeros.scatter_reduce(0, index, values, how, include_self=False)[index]

    count = per_group(torch.ones_like(r), "sum")
    equal = per_group(r, "amin") == per_group(r, "amax")
    mean = torch.where(equal, r, per_group(r, "sum") / count)
    std = torch.sqrt(per_group((r - mean).square(), "sum") / (count - 1).clamp_min(1))

    advantages = r - mean
    if estimator == "grpo":
        advantages = torch.where(equal, 0.0, advantages / (std + eps))
    elif estimator == "rloo":
        advantages = advantages * count / (count - 1).clamp_min(1)
    if singleton == "reward":
        alone = r / (1 + eps) if estimator == "grpo" else r
        advantages = torch.where(count == 1, alone, advantages)
    return GroupAdvantages(advantages, mean, std, count.long())
