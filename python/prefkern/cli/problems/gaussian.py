"""Posteriors of Gaussian processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from prefkern.cli.problems.base import Problem, problem


def gaussian_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Of every kernel, more candidates than a tile has, with counts of which one is 0."""
    from prefkern.reference.gaussian import gp_covariance

    q, d = 21, 3
    U, X = torch.randn(q, d).double(), torch.randn(45, d).to(dtype)
    length, counts = torch.rand(d).to(dtype) + 0.5, torch.randint(0, 9, (q,))
    counts[4] = 0
    for kernel in ("rbf", "matern12", "matern32", "matern52"):
        scale = counts.double().sqrt()
        matrix = scale.unsqueeze(1) * gp_covariance(U, U, kernel=kernel, length=length.double(), variance=1.5) * scale
        factor = torch.linalg.cholesky(matrix + 0.3 * torch.eye(q).double())
        given: dict[str, Any] = {"L": factor.to(dtype), "a": torch.randn(q).to(dtype), "U": U.to(dtype), "X": X}
        options = given | {"kernel": kernel, "length": length, "variance": 1.5}
        yield problem("gp_unique_posterior", f"{kernel}, counts", {}, options | {"counts": counts})
        yield problem("gp_unique_posterior", kernel, {}, options)
