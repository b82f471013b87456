"""Posteriors of Gaussian processes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class GpPosterior(NamedTuple):
    mean: Tensor
    var: Tensor


def gp_covariance(A: Tensor, B: Tensor, *, kernel: str = "rbf", length: float | Tensor = 1.0, variance: float = 1.0) -> Tensor:
    """k(A, B), [n, m], of points [n, d] and [m, d]. With r the distance in units of the length scale, and variance 1:

        rbf       exp(-r^2 / 2)
        matern12  exp(-r)
        matern32  (1 + sqrt3 r) exp(-sqrt3 r)
        matern52  (1 + sqrt5 r + 5 r^2 / 3) exp(-sqrt5 r)

    Args:
        length: a number, or one per dimension [d].
    """
    r2 = torch.stack([((a - B) / length).square().sum(-1) for a in A]) if len(A) else A.new_zeros(0, len(B))
    r = r2.sqrt()
    if kernel == "rbf":
        k = (-r2 / 2).exp()
    elif kernel == "matern12":
        k = (-r).exp()
    elif kernel == "matern32":
        k = (1 + math.sqrt(3) * r) * (-math.sqrt(3) * r).exp()
    elif kernel == "matern52":
        k = (1 + math.sqrt(5) * r + 5 / 3 * r2) * (-math.sqrt(5) * r).exp()
    else:
        raise ValueError(f"kernel: got {kernel!r}, accepted are ['rbf', 'matern12', 'matern32', 'matern52']")
    return variance * k


def gp_unique_posterior(
    L: Tensor,
    a: Tensor,
    U: Tensor,
    X: Tensor,
    counts: Tensor | None = None,
    *,
    kernel: str = "rbf",
    length: float | Tensor = 1.0,
    variance: float = 1.0,
) -> GpPosterior:
    """v = L^-1 S k(U, x) with S = diag(sqrt(counts)), or 1 without counts; mean v . a, var max(0, variance - v . v). float64.

    Args:
        L, a, U, X: [q, q], [q], [q, d], [M, d]. Of L the lower triangle counts.
        counts: integers [q].
    """
    L, a, U, X = L.double(), a.double(), U.double(), X.double()
    k = gp_covariance(U, X, kernel=kernel, length=length.double() if isinstance(length, Tensor) else length, variance=variance)
    if counts is not None:
        k = counts.double().sqrt().unsqueeze(1) * k
    v = torch.linalg.solve_triangular(L.tril(), k, upper=False)
    return GpPosterior(a @ v, (variance - v.square().sum(0)).clamp_min(0.0))
