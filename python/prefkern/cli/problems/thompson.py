"""Which prompts to roll out, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefkern.cli.problems.base import Problem, problem


def thompson_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Counts from none to many, some of the prompts not eligible; tables that are not concave."""
    import prefkern
    from prefkern import reference

    alpha, beta = (torch.rand(40) * 20).to(dtype), (torch.rand(40) ** 4 * 20).to(dtype)
    counts = {"alpha": alpha, "beta": beta}
    for mode in ("thompson", "mean"):
        options: dict[str, Any] = {"k": 7, "eligible": torch.rand(40) < 0.7, "mode": mode, "seed": 3, "step": 5}
        given = problem("beta_thompson_topk", mode, {}, counts | options | {"return_draws": True})
        yield replace(given, ours=_widened(given.ours))
    results = {"ids": torch.tensor([3, 17, 0]), "successes": torch.tensor([2.0, 0, 8]).to(dtype), "n": 8}
    exact = _updated(reference.decayed_beta_update_)
    ours = _widened(_updated(prefkern.decayed_beta_update_))
    yield Problem("decayed_beta_update_", "", {}, counts | results, ours, exact, exact)

    table = (torch.rand(6, 9) ** 2).cumsum(1).to(dtype)
    for method in ("exact", "greedy"):
        given = problem("knapsack_allocate", method, {}, {"utilities": table, "total": 31, "b_min": 2, "method": method})
        yield replace(given, ours=_on_the_cpu(given.ours))


def _widened(op: Callable[..., Any]) -> Callable[..., Any]:
    """Counts are float32 or float64."""

    def call(**options: Any) -> Any:
        narrow = (torch.bfloat16, torch.float16)
        return op(**{k: x.float() if isinstance(x, Tensor) and x.dtype in narrow else x for k, x in options.items()})

    return call


def _updated(op: Callable[..., None]) -> Callable[..., Tensor]:
    """What it leaves behind."""

    def call(alpha: Tensor, beta: Tensor, **options: Any) -> Tensor:
        alpha, beta = alpha.clone(), beta.clone()
        op(alpha, beta, **options)
        return torch.stack([alpha, beta])

    return call


def _on_the_cpu(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Budgets are allocated there."""

    def call(utilities: Tensor, **options: Any) -> Tensor:
        return op(utilities.cpu(), **options).to(utilities.device)

    return call
