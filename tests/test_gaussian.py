"""gp_unique_posterior, chol_append and chol_rank1 against their definitions, and everything they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import chol_append, chol_rank1, gp_unique_posterior, reference
from prefkern.reference.gaussian import gp_covariance

OPS = torch.ops.prefkern
F64, F32 = torch.float64, torch.float32
NAN, INF = float("nan"), float("inf")
KERNELS = ("rbf", "matern12", "matern32", "matern52")
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def close(actual, expected, atol=1e-12, rtol=0.0) -> None:
    assert_close(actual.cpu(), torch.as_tensor(expected, dtype=actual.dtype).cpu(), rtol=rtol, atol=atol)


def positive_definite(q: int, generator=None) -> torch.Tensor:
    m = torch.randn(q, q, dtype=F64, generator=generator)
    return m @ m.T + 0.5 * q * torch.eye(q, dtype=F64)


def given_points(q, d, candidates, *, lam=0.3, kernel="rbf", length=0.8, variance=1.3, device="cpu"):
    """Arguments of the op, with and without counts."""
    U, X, counts = torch.randn(q, d, dtype=F64), torch.randn(candidates, d, dtype=F64), torch.randint(1, 9, (q,))
    K, sums = gp_covariance(U, U, kernel=kernel, length=length, variance=variance), torch.randn(q, dtype=F64)
    S = counts.double().sqrt()
    L = torch.linalg.cholesky(S[:, None] * K * S + lam * torch.eye(q, dtype=F64))
    plain = torch.linalg.cholesky(K + (lam / counts.double()).diag()).contiguous()
    a = torch.linalg.solve_triangular(L, (sums / S)[:, None], upper=False)[:, 0]
    options = {"kernel": kernel, "length": length, "variance": variance}
    move = [t.to(device) for t in (L, a, U, X, counts, plain)]
    return (*move, options, sums)


# ---------------------------------------------------------------------------------------------------------------- values


@each_kernel
@pytest.mark.parametrize(("q", "d", "candidates"), [(1, 1, 1), (4, 2, 13), (7, 3, 12), (41, 2, 50), (130, 1, 25)])
def test_posterior(device, kernel, q, d, candidates):
    L, a, U, X, counts, plain, options, _ = given_points(q, d, candidates, kernel=kernel, device=device)
    out = gp_unique_posterior(L, a, U, X, counts, **options)
    expected = reference.gp_unique_posterior(*(t.cpu() for t in (L, a, U, X, counts)), **options)
    close(out.mean, expected.mean, 1e-11)
    close(out.var, expected.var, 1e-12)
    unscaled = gp_unique_posterior(plain, a, U, X, **options)
    close(unscaled.mean, out.mean.cpu(), 1e-11)
    close(unscaled.var, out.var.cpu(), 1e-12)


def test_worked_numbers(device):
    """Two points at distance 1, seen three times and once; lambda 0.5."""
    U, X = torch.tensor([[0.0], [1.0]], dtype=F64), torch.tensor([[0.0], [0.5], [2.0]], dtype=F64)
    G = torch.tensor([[3.5, 3**0.5 * 0.6065306597126334], [0.0, 1.5]], dtype=F64)
    G[1, 0] = G[0, 1]
    L, n = torch.linalg.cholesky(G), torch.tensor([3, 1])
    a = torch.linalg.solve_triangular(L, (torch.tensor([1.5, -0.4], dtype=F64) / n.double().sqrt())[:, None], upper=False)[:, 0]
    mean, var = gp_unique_posterior(*(t.to(device) for t in (L, a, U, X, n)))
    close(mean, [0.3803032222787, 0.1421834332457, -0.2406822601567], 5e-13)
    close(var, [0.1365197548068, 0.1809187878170, 0.7416346926590], 5e-13)


@each_kernel
def test_a_length_per_dimension_and_the_kernels_themselves(device, kernel):
    """With one point of no noise the variance left is 1 - k^2."""
    U, X = (
        torch.zeros(1, 2, dtype=F64),
        torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.0, 2.0], [3.0, 40.0], [1e200, -1e200]], dtype=F64),
    )
    length = torch.tensor([0.5, 4.0], dtype=F64)
    one = torch.ones(1, 1, dtype=F64)
    mean, var = gp_unique_posterior(*(t.to(device) for t in (one, one[0], U, X)), kernel=kernel, length=length.to(device))
    expected = gp_covariance(U, X[:4], kernel=kernel, length=length)[0]
    close(mean[:4], expected, 1e-15)
    close(var[:4], 1 - expected**2, 1e-15)
    assert mean[0] == 1 and var[0] == 0 and mean[4] == 0 and var[4] == 1


def test_the_exponential_over_its_range(device):
    """Near the end of double's range, and beyond it exactly 0."""
    r2 = torch.cat([torch.linspace(0, 1415, 3001, dtype=F64), torch.tensor([1417.0, 1e4, 1e308], dtype=F64)])
    one = torch.ones(1, 1, dtype=F64, device=device)
    mean, _ = gp_unique_posterior(one, one[0], 0 * one, r2.sqrt()[:, None].to(device))
    close(mean[:3001], (-r2[:3001].sqrt().square() / 2).exp(), atol=0, rtol=4e-16)
    assert not mean[-3:].any() or device == "cuda"


def test_no_points_and_no_candidates(device):
    L, a, U = (torch.empty(shape, dtype=F64, device=device) for shape in ((0, 0), (0,), (0, 2)))
    mean, var = gp_unique_posterior(L, a, U, torch.randn(5, 2, device=device), variance=2.5)
    assert mean.tolist() == [0] * 5 and var.tolist() == [2.5] * 5
    given = given_points(3, 2, 0, device=device)
    assert gp_unique_posterior(*given[:5]).var.shape == (0,)


def test_a_point_without_observations_has_no_influence(device):
    L, a, U, X, *_ = given_points(6, 2, 9, device=device)
    n = torch.tensor([2, 0, 3, 1, 0, 1], device=device)
    K = gp_covariance(U.cpu(), U.cpu())
    S, s = n.cpu().double().sqrt(), torch.randn(6, dtype=F64) * (n.cpu() > 0)
    G = S[:, None] * K * S + 0.2 * torch.eye(6, dtype=F64)
    L = torch.linalg.cholesky(G)
    a = torch.linalg.solve_triangular(L, (s / S.clamp_min(1))[:, None], upper=False)[:, 0]
    mean, var = gp_unique_posterior(L.to(device), a.to(device), U, X, n)
    kept = (n > 0).cpu()
    L = torch.linalg.cholesky(G[kept][:, kept])
    a = torch.linalg.solve_triangular(L, (s / S)[kept][:, None], upper=False)[:, 0]
    expected = reference.gp_unique_posterior(L, a, U.cpu()[kept], X.cpu(), n.cpu()[kept])
    close(mean, expected.mean)
    close(var, expected.var)


def test_variance_is_never_negative(device):
    """At the points themselves, of which round-off alone is left."""
    U = torch.rand(60, 1, dtype=F64)
    L = torch.linalg.cholesky(gp_covariance(U, U, kernel="matern12") + 1e-15 * torch.eye(60, dtype=F64))
    a = torch.zeros(60, dtype=F64)
    var = gp_unique_posterior(*(t.to(device) for t in (L, a, U, U)), kernel="matern12").var
    assert (var >= 0).all() and var.max() < 1e-13
    less_than_one = torch.tensor([[1.0 - 2.0**-52]], dtype=F64, device=device)
    assert gp_unique_posterior(less_than_one, *(torch.zeros(s, dtype=F64, device=device) for s in (1, (1, 1), (1, 1)))).var == 0


def test_part_of_a_larger_array_and_what_is_above_the_diagonal(device):
    L, a, U, X, counts, _, options, _ = given_points(9, 2, 20, device=device)
    room = torch.full((14, 17), NAN, dtype=F64, device=device)
    room[:9, :9] = L + torch.full_like(L, NAN).triu(1)
    for factor in (room[:9, :9], L.T.contiguous().T):
        out = gp_unique_posterior(factor, a, U, X, counts, **options)
        assert all(torch.equal(x, y) for x, y in zip(out, gp_unique_posterior(L, a, U, X, counts, **options), strict=True))


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_widened(device, dtype):
    L, a, U, X, counts, _, options, _ = given_points(9, 2, 20, device=device)
    narrow = [t.to(dtype) for t in (L, a, U, X)]
    out = gp_unique_posterior(*narrow, counts.int(), **options)
    wide = gp_unique_posterior(*(t.double() for t in narrow), counts, **options)
    assert out.mean.dtype == out.var.dtype == F64
    assert all(torch.equal(x, y) for x, y in zip(out, wide, strict=True))


# -------------------------------------------------------------------------------------------------------------- factors


@given(st.integers(0, 40), st.integers(0, 3))
def test_append_is_a_row_of_the_factorisation(q, room):
    A = positive_definite(q + 1)
    whole = torch.linalg.cholesky(A)
    factor = torch.full((q + 1 + room, q + 1 + room), NAN, dtype=F64)
    factor[:q, :q] = torch.where(torch.ones(q, q).tril() > 0, whole[:q, :q], NAN)
    pivot = chol_append(factor, A[q], q)
    close(factor[: q + 1, : q + 1].tril().nan_to_num(7.0), whole, 1e-11)
    close(pivot, whole[q, q] ** 2, 1e-11)
    assert (
        factor.triu(1).isnan().sum() == (q + 1 + room) * (q + room) // 2
    )  # nothing above the diagonal, and nothing below row q
    assert factor[q + 1 :].isnan().all()


@given(st.integers(1, 40), st.sampled_from([1.0, 0.3, -0.2]), st.integers(0, 39))
def test_rank_one_is_the_factorisation_of_the_sum(q, sigma, zeros):
    A = positive_definite(q)
    w = torch.randn(q, dtype=F64)
    w[: zeros % q] = 0
    room = torch.full((q + 2, q + 2), NAN, dtype=F64)
    room[:q, :q] = torch.linalg.cholesky(A)
    whole = torch.linalg.cholesky(A + sigma * w.outer(w))
    pivot = chol_rank1(room, w, sigma, size=q)
    close(room[:q, :q].tril(), whole, 1e-11)
    close(pivot, whole.diagonal().min() ** 2, 1e-11)
    assert room[q:].isnan().all() and room[:, q:].isnan().all()


def test_up_and_down_again():
    A = positive_definite(33)
    factor = torch.linalg.cholesky(A).contiguous()
    start, w = factor.clone(), torch.randn(33, dtype=F64)
    chol_rank1(factor, w, 2.5)
    assert (factor - start).abs().max() > 0.01
    chol_rank1(factor, w, -2.5)
    close(factor, start, 1e-11)
    before = factor.clone()
    chol_rank1(factor, torch.zeros(33))
    assert torch.equal(factor, before)
    assert chol_rank1(torch.empty(0, 0, dtype=F64), torch.zeros(0)) == INF


def test_a_matrix_that_would_not_be_positive_definite():
    A = positive_definite(12)
    factor = torch.zeros(13, 13, dtype=F64)
    factor[:12, :12] = torch.linalg.cholesky(A)
    before, row = factor.clone(), torch.cat([A[3], A[3, 3:4] - 0.25])  # the row of point 3 again, and less variance
    with pytest.raises(ValueError, match=r"row makes the matrix indefinite: its pivot is -0\.2[45]\d*; it must be"):
        chol_append(factor, row, 12)
    assert torch.equal(factor, before)
    with pytest.raises(ValueError, match="its pivot is nan"):
        chol_append(factor, row * NAN, 12)
    w = torch.zeros(12)
    w[7] = 1
    with pytest.raises(ValueError, match=r"vector makes the matrix indefinite: its smallest pivot is -\d"):
        chol_rank1(factor, w, -A[7, 7].item(), size=12)
    with pytest.raises(ValueError, match="its smallest pivot is nan"):
        chol_rank1(factor, w * NAN, size=12)
    assert torch.equal(factor, before)


def test_factors_on_every_device(device):
    A = positive_definite(21).to(device)
    factor = torch.zeros(24, 24, dtype=F64, device=device)
    for q in range(21):
        chol_append(factor, A[q, : q + 1], q)
    close(factor[:21, :21], torch.linalg.cholesky(A).cpu(), 1e-11)
    w = torch.randn(21, device=device)
    pivot = chol_rank1(factor, w, -0.1, size=21)
    whole = torch.linalg.cholesky(A - 0.1 * w.double().outer(w.double()))
    close(factor[:21, :21], whole.cpu(), 1e-11)
    close(pivot, whole.diagonal().min().cpu() ** 2, 1e-11)


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


def test_same_bits_on_any_number_of_threads_and_anywhere(threads):
    L, a, U, X, counts, _, options, _ = given_points(70, 3, 500)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(gp_unique_posterior(L, a, U, X, counts, **options))
    assert all(torch.equal(x, y) for r in results[1:] for x, y in zip(r, results[0], strict=True))
    order = torch.randperm(500)[:77]
    part = gp_unique_posterior(L, a, U, X[order], counts, **options)
    assert all(torch.equal(x, y[order]) for x, y in zip(part, results[0], strict=True))


SETS = """
import sys, torch, prefkern
torch.manual_seed(0)
q, lam = 37, 0.3
U, X, n = torch.randn(q, 2).double(), torch.randn(29, 2).double(), torch.randint(1, 5, (q,))
k = lambda A, B: prefkern.reference.gaussian.gp_covariance(A, B, kernel="matern52")
factor = torch.zeros(q, q, dtype=torch.float64)
H = k(U, U) + (lam / n.double()).diag()
for i in range(q):
    prefkern.chol_append(factor, H[i, : i + 1], i)
unit = torch.eye(q)[5]
prefkern.chol_rank1(factor, unit, lam / 9 - lam / n[5].item())
n[5] = 9
whole = torch.linalg.cholesky(k(U, U) + (lam / n.double()).diag())
a = torch.randn(q).double()
ours = prefkern.gp_unique_posterior(factor, a, U, X, kernel="matern52")
exact = prefkern.reference.gp_unique_posterior(whole, a, U, X, kernel="matern52")
print(prefkern.capabilities()["cpu_isa"], (factor - whole).abs().max().item() < 1e-12,
      *(bool((x - y).abs().max() < 1e-11) for x, y in zip(ours, exact)))
"""


@pytest.mark.parametrize("isa", prefkern.capabilities()["cpu_isas"])
def test_every_instruction_set(run_python, isa):
    found = prefkern.capabilities()["cpu_features"]
    if {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512bf16"}.get(isa, "") not in ("", *found):
        pytest.skip(f"this CPU has no {isa}")
    assert run_python(SETS, PREFKERN_CPU_ISA=isa).split() == [isa, "True", "True", "True"]


def test_memory_is_a_tile(allocations):
    """Nothing of size q x M: beside the results there is what a task needs, which goes past torch's allocator."""
    L, a, U, X, counts, _, options, _ = given_points(100, 2, 4000)
    assert allocations(lambda: gp_unique_posterior(L, a, U, X, counts, **options)).peak < 100 * 4000 * 8 / 10


def test_results_are_constants():
    L, a, U, X, *_ = given_points(5, 2, 7)
    out = gp_unique_posterior(L.requires_grad_(), a.requires_grad_(), U.requires_grad_(), X.requires_grad_())
    assert not out.mean.requires_grad and not out.var.requires_grad
    with torch.inference_mode():
        assert torch.equal(gp_unique_posterior(L, a, U, X).mean, out.mean)


def test_opcheck(device):
    L, a, U, X, counts, *_ = given_points(5, 2, 7, device=device)
    for n in (counts, None):
        opcheck(OPS.gp_unique_posterior.default, (L, a, U, X, n, torch.ones(2, dtype=F64, device=device), 3, 1.3))
    A = positive_definite(6).to(device)
    factor = torch.linalg.cholesky(A).contiguous()
    opcheck(OPS.chol_append_.default, (factor.clone(), A[5], 5))
    opcheck(OPS.chol_rank1_.default, (factor.clone(), A[5], 0.5, 6))


def test_one_graph_for_any_number_of_candidates(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(L, a, U, X, row):
        factor = L.clone()
        chol_rank1(factor, row, 0.5)
        mean, var = gp_unique_posterior(factor, a, U, X * 2, kernel="matern32", length=0.7)
        return mean + var, factor

    for q, candidates in ((4, 6), (5, 11), (7, 30)):
        _, a, U, X, _, plain, *_ = given_points(q, 2, candidates, device=device)
        row = torch.randn(q, device=device)
        total, factor = run(plain, a, U, X, row)
        by_hand = plain.clone()
        chol_rank1(by_hand, row, 0.5)
        assert torch.equal(factor, by_hand)
        assert torch.equal(total, sum(gp_unique_posterior(by_hand, a, U, X * 2, kernel="matern32", length=0.7)))
    assert counter.frame_count <= 2


def test_meta_tensors():
    L, a, U, X = (torch.empty(shape, device="meta") for shape in ((3, 3), (3,), (3, 2), (9, 2)))
    out = gp_unique_posterior(L, a, U, X)
    assert (out.mean.shape, out.var.dtype, out.var.device.type) == ((9,), F64, "meta")
    assert chol_append(L.double(), a, 2).shape == chol_rank1(L.double(), a).shape == ()


# --------------------------------------------------------------------------------------------------------------- errors

L, A, U, X, N = torch.eye(3, dtype=F64), torch.zeros(3, dtype=F64), torch.zeros(3, 2), torch.ones(5, 2), torch.ones(3).long()
BAD = {
    "L list": (dict(L=[1.0]), TypeError, r"L is a list; a torch\.Tensor"),
    "counts list": (dict(counts=[1]), TypeError, r"counts is a list; a torch\.Tensor"),
    "L int": (dict(L=L.long()), TypeError, "L has dtype Long; accepted: float64, float32"),
    "L shape": (dict(L=L[:2]), ValueError, r"L has shape \[2, 3\]; expected \[q, q\]"),
    "L zero": (
        dict(L=L * torch.tensor([1.0, 1, 0])),
        ValueError,
        r"L\[2, 2\] is 0; the diagonal of a Cholesky factor is positive",
    ),
    "L nan": (dict(L=L * NAN), ValueError, r"L\[0, 0\] is -?nan; the diagonal"),
    "a shape": (dict(a=A[:2]), ValueError, r"a has shape \[2\]; expected \[3\]"),
    "a int": (dict(a=N), TypeError, "a has dtype Long"),
    "U shape": (dict(U=U[:2]), ValueError, r"U has shape \[2, 2\]; expected \[3, 2\]"),
    "U dims": (dict(U=X[:3, :1]), ValueError, r"U has shape \[3, 1\]; expected \[3, 2\]"),
    "U nan": (dict(U=U + torch.tensor([0.0, INF])), ValueError, r"U\[0, 1\] is inf; it must be finite"),
    "X shape": (dict(X=X[0]), ValueError, r"X has shape \[2\]; expected \[M, d\]"),
    "X nan": (dict(X=X * NAN), ValueError, r"X\[0, 0\] is -?nan; it must be finite"),
    "X bool": (dict(X=X.bool()), TypeError, "X has dtype Bool"),
    "counts shape": (dict(counts=N[:2]), ValueError, r"counts has shape \[2\]; expected \[3\]"),
    "counts float": (dict(counts=A), TypeError, "counts has dtype Double; accepted: int64, int32"),
    "counts negative": (dict(counts=N - 2), ValueError, r"counts\[0\] is -1; it must not be negative"),
    "kernel": (dict(kernel="rfb"), ValueError, "kernel is 'rfb'; accepted: 'rbf', 'matern12', .*did you mean 'rbf'"),
    "kernel number": (dict(kernel=0), ValueError, "kernel is 0; accepted"),
    "length": (dict(length=0.0), ValueError, "length is 0.0; it must be finite and positive"),
    "length tiny": (dict(length=1e-310), ValueError, "length is 1e-310"),
    "length text": (dict(length="1"), TypeError, "length is '1'; a number or a torch.Tensor"),
    "length negative": (
        dict(length=torch.tensor([1.0, -2.0])),
        ValueError,
        r"length\[1\] is -2; it must be finite and positive",
    ),
    "length shape": (dict(length=torch.ones(3)), ValueError, r"length has shape \[3\]; expected a number, or \[2\]"),
    "variance": (dict(variance=0.0), ValueError, "variance is 0; it must be finite and positive"),
    "variance nan": (dict(variance=NAN), ValueError, "variance is nan"),
    "variance text": (dict(variance="1"), TypeError, "variance is '1'"),
    "device": (dict(L=L.to("meta")), ValueError, "L is on meta but X is on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    wrong, error, message = BAD[case]
    with pytest.raises(error, match=message):
        gp_unique_posterior(**{"L": L, "a": A, "U": U, "X": X, "counts": N, **wrong})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: chol_append([1.0], A, 2), TypeError, "factor is a list"),
        (lambda: chol_append(L.float(), A, 2), TypeError, "factor has dtype Float; it is changed in place, so float64"),
        (lambda: chol_append(A, A, 2), ValueError, r"factor has shape \[3\]; expected \[rows, columns\]"),
        (lambda: chol_append(L, A, 3), ValueError, r"size is 3 and factor has shape \[3, 3\]; it must have room for 4 rows"),
        (lambda: chol_append(L, A, -1), ValueError, "size is -1"),
        (lambda: chol_append(L, A, 1.5), TypeError, "size is 1.5; an integer"),
        (lambda: chol_append(L, A, 1), ValueError, r"row has shape \[3\]; expected \[2\]"),
        (lambda: chol_append(L, N, 2), TypeError, "row has dtype Long"),
        (lambda: chol_append(0 * L, A, 2), ValueError, r"factor\[0, 0\] is 0; the diagonal"),
        (
            lambda: chol_append(torch.ones(3, 6, dtype=F64)[:, ::2], A, 2),
            ValueError,
            "factor has strides 6, 2; the numbers of a row",
        ),
        (lambda: chol_append(L, A.to("meta"), 2), ValueError, "row is on meta but factor is on cpu"),
        (lambda: chol_rank1(L, A[:2]), ValueError, r"vector has shape \[2\]; expected \[3\]"),
        (lambda: chol_rank1(L, A, size=4), ValueError, "it must have room for 4 rows"),
        (lambda: chol_rank1(L, A, INF), ValueError, "sigma is inf; it must be finite"),
        (lambda: chol_rank1(L, A, "1"), TypeError, "sigma is '1'"),
        (lambda: reference.gaussian.gp_covariance(U, X, kernel="linear"), ValueError, "kernel: got 'linear'"),
    ],
)
def test_errors_of_factors(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(L, torch.eye(3, dtype=F64))


def test_the_op_itself_refuses_an_unknown_kernel():
    with pytest.raises(RuntimeError, match="kernel is 4; accepted: 0 to 3"):
        OPS.gp_unique_posterior(L, A, U, X, None, torch.ones(1), 4, 1.0)
