"""beta_thompson_topk and decayed_beta_update_ against their definitions, the beta distribution, and what they must refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import beta_thompson_topk, decayed_beta_update_, reference
from prefkern.reference.thompson import philox

F64, F32 = torch.float64, torch.float32
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern
UTILITIES = ("p1mp2", "p1mp")

only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def counts(n, dtype=F64):
    """From none to many."""
    alpha, beta = torch.rand(2, n, dtype=F64).mul(14).sub(4).exp2().sub(0.0625).clamp_min(0)
    return alpha.to(dtype), beta.to(dtype)


def drawn(alpha, beta, n, *, seed=0, step=0, dtype=F32):
    """n draws of one belief."""
    a, b = torch.full((n,), alpha, dtype=dtype), torch.full((n,), beta, dtype=dtype)
    return beta_thompson_topk(a, b, 1, seed=seed, step=step, return_draws=True).draws


# ------------------------------------------------------------------------------------------------------- the definition


def test_the_words_of_the_definition_are_those_of_philox():
    assert [f"{word:08x}" for word in philox(0, 0, 0, 0, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{word:08x}" for word in philox(42, 1, 0, 2, 0)] == ["8fe60f5c", "e22cac8b", "c387c0fb", "aa23aa8d"]


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("mode", ["thompson", "mean"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "eligible"])
def test_float64_is_the_definition(utility, mode, masked):
    alpha, beta = counts(120)
    eligible = torch.rand(120) < 0.6 if masked else None
    given = {"eligible": eligible, "utility": utility, "mode": mode, "seed": -(2**40) + 3, "step": 17, "return_draws": True}
    ours, exact = beta_thompson_topk(alpha, beta, 40, **given), reference.beta_thompson_topk(alpha, beta, 40, **given)
    assert torch.equal(ours.ids, exact.ids)
    assert_close(ours.utilities, exact.utilities, rtol=1e-12, atol=1e-15)
    assert_close(ours.draws, exact.draws, rtol=1e-12, atol=1e-15)
    assert not masked or eligible[ours.ids].all()


def test_float32_is_float64_rounded(device):
    alpha, beta = counts(20_000)
    exact = beta_thompson_topk(alpha.float().double(), beta.float().double(), 1, seed=5, return_draws=True).draws
    ours = beta_thompson_topk(alpha.float().to(device), beta.float().to(device), 1, seed=5, return_draws=True).draws
    off = (ours.cpu().double() - exact).abs()
    assert (off > 2e-6).sum() <= 1  # a proposal at the very edge of being taken


def test_seeds_steps_and_prompts_have_draws_of_their_own():
    first = drawn(2.0, 3.0, 1000)
    assert torch.equal(first, drawn(2.0, 3.0, 1000)) and first.unique().numel() > 990
    assert torch.equal(first[:7], drawn(2.0, 3.0, 7))  # whoever else is there
    others = [drawn(2.0, 3.0, 1000, seed=s, step=t) for s, t in ((1, 0), (0, 1), (2**32, 0), (-1, 0), (0, 2**32 - 1))]
    for a in (first, *others):
        for b in (first, *others):
            assert a is b or (a == b).sum() <= 1
    assert torch.equal(drawn(2.0, 3.0, 5, seed=2**64 + 9), drawn(2.0, 3.0, 5, seed=9))


# ----------------------------------------------------------------------------------------------------- the distribution


def beta_cdf(x, a, b):
    """Of Beta(a, b) for integers: the chance of at least a successes in a + b - 1 trials."""
    n = a + b - 1
    return sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0), (2, 6), (0, 9), (30, 10)])
def test_draws_have_their_distribution(alpha, beta):
    n = 100_000
    p = drawn(float(alpha), float(beta), n, seed=11).double().sort().values
    assert (p > 0).all() and (p < 1).all()
    cdf = beta_cdf(p, alpha + 1, beta + 1)
    places = torch.arange(n + 1, dtype=F64) / n
    gap = torch.maximum((cdf - places[:-1]).max(), (places[1:] - cdf).max())
    assert gap < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov, at a chance of 0.001
    cells = torch.histc(cdf, 50, 0, 1)
    assert ((cells - n / 50) ** 2 / (n / 50)).sum() < 85.4  # chi-square of 49 degrees, at 0.001


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 6.0), (0.3, 0.0), (5e3, 2e3), (1e7, 3e7)])
def test_moments_of_draws(alpha, beta):
    n = 100_000
    p = drawn(alpha, beta, n, seed=3, dtype=F64)
    a, b = alpha + 1, beta + 1
    s = a + b
    mean, variance = a / s, a * b / (s * s * (s + 1))
    assert abs(p.mean() - mean) < 4 * math.sqrt(variance / n)
    assert p.var().item() == pytest.approx(variance, rel=0.03)
    assert drawn(alpha, beta, n, seed=3).double().mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))


def test_many_rollouts_do_not_blur_a_draw_in_float32():
    """The acceptance test subtracts numbers as large as the shape, unless it is written otherwise."""
    for evidence in (1e5, 1e7):
        exact, ours = drawn(evidence, evidence, 20_000, dtype=F64), drawn(evidence, evidence, 20_000)
        assert ours.double().std().item() == pytest.approx(exact.std().item(), rel=0.01)
        assert ((ours.double() - exact).abs() > 3e-7).sum() <= 2


def test_mean_utility_of_draws():
    p = drawn(2.0, 6.0, 100_000, seed=1).double()
    utility = p * (1 - p) ** 2
    assert abs(utility.mean() - 0.1272727273) < 4 * utility.std() / math.sqrt(len(p))


def test_equal_prompts_are_chosen_equally_often():
    m, k, steps = 20, 5, 2000
    zeros = torch.zeros(m)
    chosen = torch.stack([beta_thompson_topk(zeros, zeros, k, seed=7, step=t).ids for t in range(steps)])
    times, expected = torch.bincount(chosen.flatten(), minlength=m).double(), steps * k / m
    # Without replacement the sum of squares is smaller than chi-square's by (m - k) / (m - 1).
    assert ((times - expected) ** 2 / expected).sum() * (m - 1) / (m - k) < 43.8  # 19 degrees, at 0.001
    first = torch.bincount(chosen[:, 0], minlength=m).double()
    assert ((first - steps / m) ** 2 / (steps / m)).sum() < 43.8


# --------------------------------------------------------------------------------------------------------- the largest k


@pytest.mark.parametrize("k", [1, 7, 300, 2999, 3000])
def test_the_largest_and_of_equal_ones_the_first(device, k):
    alpha, beta = (torch.randint(0, 4, (3000,)).float() for _ in range(2))
    eligible = torch.rand(3000) < 0.5
    for mask in (None, eligible):
        if mask is not None and k > mask.sum():
            continue
        given = [t if t is None else t.to(device) for t in (alpha, beta, mask)]
        ids, utilities, _ = beta_thompson_topk(*given[:2], k, eligible=given[2], mode="mean")
        everybody = beta_thompson_topk(*given[:2], 3000, mode="mean")
        worth = torch.empty(3000).scatter_(0, everybody.ids.cpu(), everybody.utilities.cpu())
        exact = reference.thompson.expected_thompson_utility(alpha.double(), beta.double())
        assert_close(worth.double(), exact, rtol=1e-6, atol=0)
        worth = worth if mask is None else torch.where(mask, worth, -INF)
        assert torch.equal(ids.cpu(), worth.sort(descending=True, stable=True).indices[:k])
        assert torch.equal(utilities.cpu(), worth[ids.cpu()])


def test_draws_of_0_and_1_are_worth_nothing():
    for alpha, beta in ((0.0, 1e30), (1e30, 0.0)):
        out = beta_thompson_topk(torch.tensor([alpha] * 3), torch.tensor([beta] * 3), 3, return_draws=True)
        assert (out.utilities >= 0).all() and (out.utilities < 1e-25).all()
        assert (out.draws < 1e-25).all() or (out.draws == 1).all()
    ones = beta_thompson_topk(torch.full((3,), 1e30), torch.zeros(3), 3)
    assert ones.utilities.tolist() == [0, 0, 0] and ones.ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [F64, F32])
def test_same_bits_on_any_number_of_threads(threads, dtype):
    alpha, beta = counts(70_001, dtype)
    eligible = torch.rand(70_001) < 0.8
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append([
            t for k in (1, 512, 40_000) for mode in ("thompson", "mean")
            for t in beta_thompson_topk(alpha, beta, k, eligible=eligible, mode=mode, return_draws=True)
        ])  # fmt: skip
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    assert torch.equal(results[0][0], results[0][6][:1])


def test_what_is_not_eligible_is_not_looked_at(device):
    alpha, beta = (t.to(device) for t in counts(100, F32))
    eligible = torch.rand(100, device=device) < 0.5
    clean = beta_thompson_topk(alpha, beta, 5, eligible=eligible, return_draws=True)
    alpha[~eligible], beta[~eligible] = NAN, -1.0
    dirty = beta_thompson_topk(alpha, beta, 5, eligible=eligible, return_draws=True)
    assert torch.equal(clean.ids, dirty.ids) and torch.equal(clean.utilities, dirty.utilities)
    assert torch.equal(clean.draws[eligible], dirty.draws[eligible]) and dirty.draws[~eligible].isnan().all()


def test_strides_and_gradients_do_not_matter():
    alpha, beta = torch.rand(50, 2, requires_grad=True), torch.rand(2, 50)
    out = beta_thompson_topk(alpha[:, 1], beta[0], 9)
    assert torch.equal(out.ids, beta_thompson_topk(alpha[:, 1].detach().clone(), beta[0].clone(), 9).ids)
    assert not out.utilities.requires_grad


def test_memory_on_the_cpu_is_that_of_the_chosen(allocations):
    alpha, beta = torch.zeros(2, 200_000)
    assert allocations(lambda: beta_thompson_topk(alpha, beta, 64)).peak < 10_000


test_memory_on_the_cpu_is_that_of_the_chosen = pytest.mark.parametrize("device", ["cpu"], indirect=True)(
    test_memory_on_the_cpu_is_that_of_the_chosen
)


# --------------------------------------------------------------------------------------------------------------- updates


def test_worked_updates(device):
    for dtype in (F64, F32) if device == "cpu" else (F32,):
        alpha, beta = (torch.tensor(x, dtype=dtype, device=device) for x in ([1.0, 5, 3], [1.0, 2, 7]))
        ids, s = torch.tensor([1], device=device), torch.tensor([6], device=device)
        decayed_beta_update_(alpha, beta, ids, s, 8)
        assert_close(alpha.cpu().double(), torch.tensor([0.999, 7, 2.997], dtype=F64), rtol=1e-6, atol=0)
        assert_close(beta.cpu().double(), torch.tensor([0.999, 2.4, 6.993], dtype=F64), rtol=1e-6, atol=0)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_updates_are_the_definition(seed, lam1, lam2, selected):
    g = torch.Generator().manual_seed(seed)
    alpha, beta = (torch.rand(9, generator=g, dtype=F64) * 10 for _ in range(2))
    ids = torch.randperm(9, generator=g)[:selected]
    n = torch.randint(0, 9, (selected,), generator=g)
    s = torch.rand(selected, generator=g, dtype=F64) * n
    ours, exact = (alpha.clone(), beta.clone()), (alpha.clone(), beta.clone())
    decayed_beta_update_(*ours, ids, s, n, lam1=lam1, lam2=lam2)
    reference.decayed_beta_update_(*exact, ids, s, n, lam1=lam1, lam2=lam2)
    for a, b in zip(ours, exact, strict=True):
        assert_close(a, b, rtol=1e-14, atol=1e-14)
        assert (a >= 0).all()


def test_no_decay_is_the_conjugate_update_and_nothing_left_decays_alone(device):
    alpha, beta = (torch.rand(5, device=device) for _ in range(2))
    before = alpha.clone(), beta.clone()
    ids = torch.tensor([3, 0], dtype=torch.int32, device=device)
    decayed_beta_update_(alpha, beta, ids, torch.tensor([2.0, 0.5], device=device), 4, lam1=1, lam2=1)
    assert_close(alpha - before[0], torch.tensor([0.5, 0, 0, 2, 0], device=device))
    assert_close(beta - before[1], torch.tensor([3.5, 0, 0, 2, 0], device=device))
    before = alpha.clone()
    none = torch.zeros(2, device=device)
    decayed_beta_update_(alpha, beta, ids, none, none, lam1=0.5, lam2=0.9)
    assert_close(alpha, before * torch.tensor([0.5, 0.9, 0.9, 0.5, 0.9], device=device))


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": [1.0]}, TypeError, "alpha is a list"),
        ({"alpha": torch.zeros(4, dtype=torch.int64)}, TypeError, "alpha has dtype Long on cpu; accepted: float32"),
        ({"alpha": torch.zeros(4).bfloat16()}, TypeError, "alpha has dtype BFloat16"),
        ({"alpha": torch.zeros(2, 2)}, ValueError, r"alpha has shape \[2, 2\]; expected \[M\]"),
        ({"beta": torch.zeros(3)}, ValueError, r"beta has shape \[3\]; alpha has shape \[4\]"),
        ({"beta": torch.zeros(4).double()}, TypeError, "beta has dtype Double; alpha has Float"),
        ({"alpha": torch.tensor([0.0, 1, -0.5, NAN])}, ValueError, r"alpha\[2\] is -0.5; a count is finite, not negative"),
        ({"beta": torch.tensor([0.0, INF, 1, 1])}, ValueError, r"beta\[1\] is inf"),
        ({"alpha": torch.tensor([0.0, 0, 0, NAN]), "mode": "mean"}, ValueError, r"alpha\[3\] is nan"),
        ({"k": 0}, ValueError, "k is 0; accepted: 1 to the number of prompts, 4"),
        ({"k": 5}, ValueError, "k is 5"),
        ({"k": 2.0}, TypeError, "k is 2.0; an integer"),
        ({"eligible": torch.tensor([True, False, False, False])}, ValueError, "k is 2; 1 prompts are eligible"),
        ({"eligible": torch.ones(4)}, TypeError, "eligible has dtype Float; accepted: bool"),
        ({"eligible": torch.ones(3, dtype=torch.bool)}, ValueError, r"eligible has shape \[3\]"),
        ({"eligible": [True] * 4}, TypeError, "eligible is a list"),
        ({"utility": "variance"}, ValueError, "utility is 'variance'; accepted: 'p1mp2', 'p1mp'"),
        ({"mode": "greedy"}, ValueError, "mode is 'greedy'"),
        ({"seed": 0.5}, TypeError, "seed is 0.5"),
        ({"step": -1}, ValueError, "step is -1; accepted: 0 to"),
        ({"step": 2**32}, ValueError, "step is 4294967296"),
    ],
)
def test_topk_refuses(change, error, message):
    given = {"alpha": torch.zeros(4), "beta": torch.zeros(4), "k": 2, **change}
    with pytest.raises(error, match=message):
        beta_thompson_topk(**given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": torch.zeros(4, 2)[:, 0]}, ValueError, "alpha is not contiguous; it is changed in place"),
        ({"beta": torch.zeros(4, dtype=torch.float16)}, TypeError, "beta has dtype Half"),
        ({"alpha": torch.tensor([0.0, NAN, 0, 0])}, ValueError, r"alpha\[1\] is nan"),
        ({"beta": torch.tensor([0.0, 0, 0, -1])}, ValueError, r"beta\[3\] is -1"),
        ({"ids": torch.tensor([1, 1])}, ValueError, "ids holds 1 twice"),
        ({"ids": torch.tensor([0, 4])}, ValueError, r"ids\[1\] is 4; accepted: 0 to 3"),
        ({"ids": torch.tensor([-1, 0])}, ValueError, r"ids\[0\] is -1"),
        ({"ids": torch.tensor([0.0, 1])}, TypeError, "ids has dtype Float"),
        ({"ids": torch.tensor([[0, 1]])}, ValueError, r"ids has shape \[1, 2\]; expected \[B\]"),
        ({"successes": torch.tensor([1.0])}, ValueError, r"successes has shape \[1\]"),
        ({"successes": torch.tensor([1.0, 9])}, ValueError, r"successes\[1\] is 9; it must lie between 0 and n\[1\], 8"),
        ({"successes": torch.tensor([-1.0, 0])}, ValueError, r"successes\[0\] is -1"),
        ({"successes": torch.tensor([NAN, 0])}, ValueError, r"successes\[0\] is nan"),
        ({"successes": [1, 1]}, TypeError, "successes is a list"),
        ({"n": torch.tensor([8])}, ValueError, r"n has shape \[1\]"),
        ({"n": torch.tensor([8.0, INF])}, ValueError, r"n\[1\] is inf"),
        ({"n": -1}, ValueError, r"n\[0\] is -1"),
        ({"n": "8"}, TypeError, "n is '8'"),
        ({"lam1": 1.1}, ValueError, "lam1 is 1.1; it must lie in"),
        ({"lam2": -0.1}, ValueError, "lam2 is -0.1"),
        ({"lam2": NAN}, ValueError, "lam2 is nan"),
    ],
)
def test_updates_refuse_and_change_nothing(change, error, message):
    given = {"alpha": torch.ones(4), "beta": torch.ones(4), "ids": torch.tensor([0, 2]), "successes": torch.tensor([1.0, 2])}
    given |= {"n": 8} | change
    before = given["alpha"].clone(), given["beta"].clone()
    with pytest.raises(error, match=message):
        decayed_beta_update_(**given)
    for name, old in zip(("alpha", "beta"), before, strict=True):
        assert_close(given[name], old, equal_nan=True, rtol=0, atol=0)
    counts_twice = torch.ones(4)
    with pytest.raises(ValueError, match="alpha and beta are the same memory"):
        decayed_beta_update_(counts_twice, counts_twice, torch.tensor([0]), torch.tensor([1]), 8)


def test_more_than_the_schema_is_refused():
    a = torch.zeros(3)
    with pytest.raises(RuntimeError, match="utility is 2"):
        OPS.beta_thompson_topk(a, a, None, 1, 2, 0, 0, 0, False)
    with pytest.raises(RuntimeError, match="mode is -1"):
        OPS.beta_thompson_topk(a, a, None, 1, 0, -1, 0, 0, False)


# ---------------------------------------------------------------------------------------------------------------- PyTorch


def test_opcheck(device):
    alpha, beta = (t.to(device) for t in counts(40, F32))
    eligible = torch.ones(40, dtype=torch.bool, device=device)
    for mode, draws in ((0, True), (1, False)):
        opcheck(OPS.beta_thompson_topk.default, (alpha, beta, eligible, 5, 0, mode, 3, 4, draws))
    ids, s = torch.tensor([3, 1], device=device), torch.tensor([2.0, 8.0], device=device)
    opcheck(OPS.decayed_beta_update_.default, (alpha, beta, ids, s, torch.full_like(s, 8), 0.2, 0.999))


def test_compiles():
    def step(alpha, beta):
        ids, utilities, _ = beta_thompson_topk(alpha, beta, 3, seed=1, step=2)
        decayed_beta_update_(alpha, beta, ids, torch.full((3,), 2.0), 8)
        return ids, utilities

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    alpha, beta = counts(30, F32)
    for n in (30, 20):
        eager, traced = ([alpha[:n].clone(), beta[:n].clone()] for _ in range(2))
        for a, b in zip(step(*eager), compiled(*traced), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(eager[0], traced[0]) and torch.equal(eager[1], traced[1])


@only_cuda
def test_cuda_does_not_wait(device, validation):
    alpha, beta = torch.zeros(2, 9, device=device)
    alpha[4] = NAN
    validation(False)
    out = beta_thompson_topk(alpha, beta, 3)
    assert out.ids[0] == 4 and out.utilities[0].isnan()
    ids, s = torch.tensor([1, 1, 2, 12], device=device), torch.tensor([1.0, 1, 9, 0], device=device)
    decayed_beta_update_(alpha, beta, ids, s, 8)
    assert alpha.isnan().tolist() == [False, True, True, False, True, *[False] * 4]
    validation(True)
    with pytest.raises(ValueError, match=r"alpha\[1\] is nan"):
        beta_thompson_topk(alpha, beta, 3)
    with pytest.raises(ValueError, match="ids reach from 1 to 12"):
        decayed_beta_update_(alpha, beta, ids, s, 8)
    with pytest.raises(ValueError, match="ids holds a prompt twice"):
        decayed_beta_update_(alpha, beta, ids[:2], s[:2], 8)
    with pytest.raises(ValueError, match="successes must lie between"):
        decayed_beta_update_(alpha, beta, ids[2:3], s[2:3], 8)


@only_cuda
def test_cuda_is_the_cpu(device):
    alpha, beta = counts(20_000, F32)
    cpu = beta_thompson_topk(alpha, beta, 256, seed=4, return_draws=True)
    cuda = beta_thompson_topk(alpha.to(device), beta.to(device), 256, seed=4, return_draws=True)
    assert ((cpu.draws - cuda.draws.cpu()).abs() > 2e-6).sum() <= 1
    assert len(set(cpu.ids.tolist()) & set(cuda.ids.tolist())) >= 250
    assert prefkern.capabilities()["cuda_compiled"]
