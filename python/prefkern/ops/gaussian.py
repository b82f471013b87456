"""Posteriors of Gaussian processes from their unique points, and Cholesky factors kept up to date in place. Kernels:
``csrc/gaussian``; formulas: ``csrc/math/gaussian.h``."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, integer, number, same_device
from ._call import call, validation

_posterior = torch.ops.prefkern.gp_unique_posterior.default
_append, _rank1 = torch.ops.prefkern.chol_append_.default, torch.ops.prefkern.chol_rank1_.default

# In the order of the enumeration of csrc/math/gaussian.h.
GP_KERNELS = ("rbf", "matern12", "matern32", "matern52")
GpKernelName = Literal["rbf", "matern12", "matern32", "matern52"]


class GpPosterior(NamedTuple):
    """What a Gaussian process says of M candidates."""

    mean: Tensor
    """[M] float64."""
    var: Tensor
    """[M] float64: of the function, without the noise; never below 0."""


def gp_unique_posterior(
    L: Tensor,
    a: Tensor,
    U: Tensor,
    X: Tensor,
    counts: Tensor | None = None,
    *,
    kernel: GpKernelName = "rbf",
    length: float | Tensor = 1.0,
    variance: float = 1.0,
) -> GpPosterior:
    r"""Mean and variance of a Gaussian process at M candidates, from the q unique points of a longer history, in one pass.

    With n_i observations of sum s_i at unique point :math:`u_i`, :math:`N = \mathrm{diag}(n)`, :math:`S = N^{1/2}` and
    :math:`k(x) = k(U, x)`:

    .. math::
        S K S + \lambda I = L L^\top, \qquad a = L^{-1} S^{-1} s, \qquad v(x) = L^{-1} S\, k(x), \qquad
        \mathrm{mean} = v^\top a, \qquad \mathrm{var} = \max(0, k(x, x) - v^\top v)

    the posterior of all t observations, for :math:`O(q^2)` a candidate. Without ``counts`` S is 1, for the factor of
    :math:`K + \lambda N^{-1}` and :math:`a = L^{-1} N^{-1} s`: the two factors are rows of each other, scaled, and v and a are
    the same.

    With r the distance in units of the length scale, and the variance as a factor, ``kernel`` is ``"rbf"``, :math:`e^{-r^2/2}`;
    ``"matern12"``, :math:`e^{-r}`; ``"matern32"``, :math:`(1 + \sqrt3 r) e^{-\sqrt3 r}`; or ``"matern52"``,
    :math:`(1 + \sqrt5 r + \frac53 r^2) e^{-\sqrt5 r}`.

    Args:
        L: ``[q, q]``; what is above the diagonal is never read. A part ``[:q, :q]`` of a larger array is taken without a copy.
        a: ``[q]``.
        U, X: the unique points ``[q, d]`` and the candidates ``[M, d]``.
        counts: int64 or int32 ``[q]``, not negative; a point with 0 has no influence.
        length: of the kernel: a positive number, or one per dimension ``[d]``.
        variance: k(x, x), positive.

    Any floating dtype is taken on any device, and everything is computed in float64: float32 does not do for more than a
    hundred points or so. Scratch is O(q) per few candidates: no ``[q, M]`` is formed. Equal bits for any number of threads, and
    for a candidate wherever it is. On CUDA at most 512 unique points.

    Returns:
        GpPosterior(mean, var), ``[M]`` float64 each. Constants: no gradient. Without points mean 0 and the variance.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Points that are not finite, counts below 0,
            a diagonal or length that is not positive are always found on the CPU; on CUDA they show as NaN, or raise under
            ``prefkern.set_validation(True)``.
    """
    check_tensors(L=L, a=a, U=U, X=X)
    if counts is not None:
        check_tensors(counts=counts)
    kind = choice("kernel", kernel, GP_KERNELS)
    inverse = inverse_length(length, X)
    L, a, U, X = (t.detach() if t.requires_grad else t for t in (L, a, U, X))
    if X.is_cuda and validation() and not torch.compiler.is_compiling():
        _look(L, U, X, counts, inverse)
    mean, var = call(_posterior, L, a, U, X, counts, inverse, kind, number("variance", variance))
    return GpPosterior(mean, var)


def chol_append(factor: Tensor, row: Tensor, size: int) -> Tensor:
    r"""Append a row to a Cholesky factor in place: with the factor L of A, that of
    :math:`\begin{pmatrix} A & b \\ b^\top & c \end{pmatrix}`, in :math:`O(q^2)`.

    The new row is :math:`l = L^{-1} b`, and its diagonal the root of the pivot :math:`c - l^\top l`.

    Args:
        factor: ``[rows, columns]`` float64, preallocated: the lower triangle of its first ``size`` rows is L, and row ``size``
            is written. What is above the diagonal is never touched. Rows may be a part of longer ones.
        row: (b, c), ``[size + 1]``, of any floating dtype.
        size: q, of L before the call.

    Returns:
        The pivot, 0-d float64.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; and with the pivot, where it is not
            positive, so that the matrix is not positive definite. On the CPU the factor has not changed then. On CUDA, where
            there is no wait, the new diagonal is NaN, or it raises under ``prefkern.set_validation(True)``; at most 512 rows.
    """
    check_tensors(factor=factor, row=row)
    pivot: Tensor = call(_append, factor, row.detach(), integer("size", size))
    _look_at_pivot("row makes the matrix indefinite: its pivot is", pivot)
    return pivot


def chol_rank1(factor: Tensor, vector: Tensor, sigma: float = 1.0, *, size: int | None = None) -> Tensor:
    r"""Change a Cholesky factor in place from that of A to that of :math:`A + \sigma w w^\top`, in :math:`O(q^2)`.

    By the method C1 of Gill, Golub, Murray and Saunders (1974), for either sign of :math:`\sigma`. Leading zeros of w leave the
    rows before them as they are.

    Args:
        factor: as for :func:`chol_append`.
        vector: w, ``[size]``, of any floating dtype.
        sigma: finite.
        size: q; None: the factor fills its array.

    Returns:
        The smallest squared diagonal of the new factor, 0-d float64; infinity for an empty one.

    Raises:
        ValueError, TypeError: as for :func:`chol_append`, with the first pivot that is not positive.
    """
    check_tensors(factor=factor, vector=vector)
    rows = -1 if size is None else integer("size", size)
    if size is not None and rows < 0:
        raise ValueError(f"size is {size}; it must not be negative")
    pivot: Tensor = call(_rank1, factor, vector.detach(), number("sigma", sigma), rows)
    _look_at_pivot("vector makes the matrix indefinite: its smallest pivot is", pivot)
    return pivot


# ---- arguments -------------------------------------------------------------------------------------------------------


def inverse_length(length: float | Tensor, X: Tensor) -> Tensor:
    """[1] or [d] float64 on the device of X."""
    if isinstance(length, Tensor):
        return (length.detach().reshape(1) if length.dim() == 0 else length.detach()).double().reciprocal()
    value = number("length", length, "a number or a torch.Tensor")
    if not (0 < value < math.inf and 1 / value < math.inf):
        raise ValueError(f"length is {length}; it must be finite and positive")
    return X.new_full((1,), 1 / value, dtype=torch.float64)


def _look(L: Tensor, U: Tensor, X: Tensor, counts: Tensor | None, inverse: Tensor) -> None:
    diagonal = L.diagonal()
    for name, good, values, accepted in (
        ("the diagonal of L", (diagonal > 0) & diagonal.isfinite(), diagonal, "a Cholesky factor's is positive and finite"),
        ("U", U.isfinite(), U, "it must be finite"),
        ("X", X.isfinite(), X, "it must be finite"),
        ("length", (inverse > 0) & inverse.isfinite(), 1 / inverse, "it must be finite and positive"),
        *([] if counts is None else [("counts", counts >= 0, counts, "it must not be negative")]),
    ):
        if not bool(good.all()):
            raise ValueError(f"{name} holds {values[~good][0].item()}; {accepted}")


def _look_at_pivot(what: str, pivot: Tensor) -> None:
    if pivot.is_cuda and validation() and not torch.compiler.is_compiling() and not bool(pivot > 0):
        raise ValueError(f"{what} {pivot.item()}; it must be finite and positive")


# ---- fake implementations --------------------------------------------------------------------------------------------


@torch.library.register_fake("prefkern::gp_unique_posterior")
def _fake_posterior(
    factor: Tensor, weights: Tensor, unique: Tensor, inputs: Tensor, counts: Tensor | None, inverse_length: Tensor,
    kernel: int, variance: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    torch._check(inputs.dim() == 2, lambda: f"X has shape {list(inputs.shape)}; expected [M, d]")
    same_device("X", inputs, L=factor, a=weights, U=unique, counts=counts, length=inverse_length)
    mean, var = (inputs.new_empty((inputs.shape[0],), dtype=torch.float64) for _ in range(2))
    return mean, var


@torch.library.register_fake("prefkern::chol_append_")
def _fake_append(factor: Tensor, row: Tensor, size: int) -> Tensor:
    same_device("factor", factor, row=row)
    return factor.new_empty(())


@torch.library.register_fake("prefkern::chol_rank1_")
def _fake_rank1(factor: Tensor, vector: Tensor, sigma: float, size: int) -> Tensor:
    same_device("factor", factor, vector=vector)
    return factor.new_empty(())
