"""The CUDA kernels of csrc/gaussian, compiled for the CPU by tests/simt, against their definitions and the CPU kernels."""

from __future__ import annotations

import pytest
import torch

import prefkern
from prefkern import reference
from prefkern.reference.gaussian import gp_covariance
from simt.harness import NAN, close, launches, pointer, same_bits_in_every_order

F64 = torch.float64


def problem(q, d, candidates, kernel="rbf"):
    U, X, counts = torch.randn(q, d, dtype=F64), torch.randn(candidates, d, dtype=F64), torch.randint(0, 6, (q,))
    S = counts.double().sqrt()
    L = torch.linalg.cholesky(S[:, None] * gp_covariance(U, U, kernel=kernel, variance=1.3) * S + 0.3 * torch.eye(q, dtype=F64))
    return (L + torch.full((q, q), NAN, dtype=F64).triu(1)).contiguous(), torch.randn(q, dtype=F64), U, X, counts


def posterior(simt, L, a, U, X, counts, *, kernel="rbf", length, variance=1.3):
    args = simt.GpPosteriorArgs()
    inverse = 1 / length
    args.kernel, args.variance = getattr(simt.GpKernel, kernel), variance
    (args.points, args.dims), args.candidates = U.shape, len(X)
    args.stride, args.length_step = L.stride(0), len(length) > 1
    args.factor, args.weights, args.unique, args.inputs = map(pointer, (L, a, U, X))
    args.inverse_length, args.counts = pointer(inverse), pointer(counts)
    mean, var = torch.full((len(X),), NAN, dtype=F64), torch.full((len(X),), NAN, dtype=F64)
    args.mean, args.var = pointer(mean), pointer(var)
    simt.cuda_gp_posterior(args)
    return {"mean": mean, "var": var}


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "matern32", "matern52"])
@pytest.mark.parametrize(("q", "d", "candidates"), [(1, 1, 1), (16, 2, 8), (37, 3, 11)])
def test_posterior(simt, kernel, q, d, candidates):
    given, length = problem(q, d, candidates, kernel), torch.rand(d, dtype=F64) + 0.5
    out = same_bits_in_every_order(simt, lambda: posterior(simt, *given, kernel=kernel, length=length))
    options = {"kernel": kernel, "length": length, "variance": 1.3}
    expected = reference.gp_unique_posterior(*given, **options)
    on_cpu = prefkern.gp_unique_posterior(*given, **options)
    for name in ("mean", "var"):
        close(out[name], getattr(expected, name), atol=1e-11, rtol=0)
        close(out[name], getattr(on_cpu, name), atol=1e-11, rtol=0)


def test_without_counts_a_part_of_a_larger_array_and_no_points(simt):
    L, a, U, X, _ = problem(20, 2, 9)
    room, length = torch.full((25, 31), NAN, dtype=F64), torch.tensor([0.7], dtype=F64)
    room[:20, :20] = L
    out = posterior(simt, room[:20, :20], a, U, X, None, length=length)
    expected = reference.gp_unique_posterior(L.tril(), a, U, X, length=0.7, variance=1.3)
    close(out["mean"], expected.mean, atol=1e-11, rtol=0)
    close(out["var"], expected.var, atol=1e-11, rtol=0)
    out = posterior(simt, L[:0, :0], a[:0], U[:0], X, None, length=length)
    assert out["mean"].tolist() == [0] * 9 and out["var"].tolist() == [1.3] * 9
    assert launches(simt, lambda: posterior(simt, L, a, U, X[:0], None, length=length)) == 0


def test_the_largest_number_of_points(simt):
    L, a, U, X, counts = problem(512, 1, 3)
    out = posterior(simt, L, a, U, X, counts, length=torch.ones(1, dtype=F64))
    expected = reference.gp_unique_posterior(L, a, U, X, counts, variance=1.3)
    close(out["mean"], expected.mean, atol=1e-9, rtol=0)
    close(out["var"], expected.var, atol=1e-11, rtol=0)


def test_what_is_not_finite_shows(simt):
    L, a, U, X, counts = problem(9, 1, 10)
    X[3], X[6] = NAN, 1e300
    out = posterior(simt, L, a, U, X, counts, kernel="matern52", length=torch.full((1,), 1e-5, dtype=F64))
    assert out["var"].isnan().tolist() == out["mean"].isnan().tolist() == [i == 3 for i in range(10)]
    assert out["mean"][6] == 0 and out["var"][6] == 1.3


def chol(simt, name, factor, vector, size, sigma=1.0):
    args, pivot, changed = simt.CholArgs(), torch.full((), NAN, dtype=F64), factor.clone()
    args.size, args.stride, args.sigma = size, changed.stride(0), sigma
    args.factor, args.vector, args.pivot = map(pointer, (changed, vector, pivot))
    getattr(simt, name)(args)
    return {"factor": changed, "pivot": pivot}


def positive_definite(q):
    m = torch.randn(q, q, dtype=F64)
    return m @ m.T + 0.5 * q * torch.eye(q, dtype=F64)


@pytest.mark.parametrize("q", [0, 1, 5, 40, 270])
def test_factors(simt, q):
    A = positive_definite(q + 1)
    room = torch.full((q + 3, q + 3), NAN, dtype=F64)
    room[:q, :q] = torch.linalg.cholesky(A[:q, :q]) + torch.full((q, q), NAN, dtype=F64).triu(1)
    many = q > 100

    def every_order(compute):
        return compute() if many else same_bits_in_every_order(simt, compute)

    out = every_order(lambda: chol(simt, "cuda_chol_append", room, A[q], q))
    by_cpu = room.clone()
    pivot = prefkern.chol_append(by_cpu, A[q], q)
    close(out["factor"], by_cpu, atol=1e-11, rtol=0)
    close(out["pivot"], pivot, atol=1e-11, rtol=1e-12)
    w = torch.randn(q + 1, dtype=F64)
    for sigma in (0.4, -0.1):
        out = every_order(lambda s=sigma: chol(simt, "cuda_chol_rank1", by_cpu, w, q + 1, s))
        expected = by_cpu.clone()
        pivot = prefkern.chol_rank1(expected, w, sigma, size=q + 1)
        close(out["factor"], expected, atol=1e-11, rtol=0)
        close(out["pivot"], pivot, atol=1e-11, rtol=1e-12)


def test_a_matrix_that_is_not_positive_definite_is_nan_from_there_on(simt):
    A = positive_definite(8)
    factor = torch.zeros(9, 9, dtype=F64)
    factor[:8, :8] = torch.linalg.cholesky(A)
    out = chol(simt, "cuda_chol_append", factor, torch.cat([A[3], A[3, 3:4] - 0.25]), 8)
    assert out["factor"][8, 8].isnan() and out["factor"].isnan().sum() == 1
    assert out["pivot"].item() == pytest.approx(-0.25)
    w = torch.zeros(8, dtype=F64)
    w[5] = 1
    out = chol(simt, "cuda_chol_rank1", factor, w, 8, -A[5, 5].item())
    diagonal = out["factor"].diagonal()[:8]
    failed = diagonal.isnan()
    assert failed.tolist() == sorted(failed.tolist()) and failed[-1] and not failed[:5].any()
    assert out["pivot"] <= 0
