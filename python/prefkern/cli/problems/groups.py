"""Reductions over the rows of a group, its pairs, and its normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from prefkern.cli.problems.base import Problem, problem


def group_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Shuffled groups of uneven sizes: some of one, one with equal values, one without a row that counts."""
    group = torch.cat([torch.randint(0, 20, (150,)) * 7919 - 3, torch.arange(1000, 1010)])
    group = group[torch.randperm(len(group))]
    values, mask = torch.randn(len(group)).to(dtype), torch.rand(len(group)) < 0.7
    values[group == group[0]] = 0.1
    mask &= group != group[1]
    for reduce in ("sum", "mean", "logsumexp", "min", "max", "count"):
        differentiable = reduce in ("sum", "mean", "logsumexp")
        # logsumexp is -inf where no row counts, and so would be the sum of outputs that gradients are taken of
        kept = mask | (group == group[1]) if reduce == "logsumexp" else mask
        masked = values.masked_fill(~kept, torch.nan)
        for case, x, more in (("all rows", values, {}), ("masked", masked, {"mask": kept})):
            options: dict[str, Any] = {"group": group, "reduce": reduce} | more
            leaves = {"values": x} if differentiable else {}
            yield problem("group_reduce", f"{reduce}, {case}", leaves, options if differentiable else options | {"values": x})
    levels = torch.randint(1, 4, (len(group),))
    for per_response in (False, True):
        options = {"group": group, "levels": levels, "per_response": per_response}
        case = "scaled per response" if per_response else "scaled per pair"
        yield problem("level_pairs", case, {"scores": values}, options)
    for sigma_grad in (False, True):
        case = f"{'with' if sigma_grad else 'without'} the gradient of sigma"
        yield problem("group_normalize", case, {"x": values}, {"group": group, "eps": 1e-4, "sigma_grad": sigma_grad})
