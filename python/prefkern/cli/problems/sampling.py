"""Normal numbers from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prefkern.cli.problems.base import Problem, problem


def sampling_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Sums of few and of many rows, from any place on."""
    for rows, offset in ((1, 0), (3, 5), (40, 2**34 - 3)):
        given = {"seed": 42, "weights": torch.randn(rows).to(dtype), "n": 1000, "element_offset": offset}
        yield problem("seeded_normal_combine", f"{rows} rows", {}, given)
