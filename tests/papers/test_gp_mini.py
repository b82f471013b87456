"""mini-GP-UCB and mini-GP-EI: worked numbers, the posterior of unique points against that of all, the loop, states."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import gp_mini
from prefkern.papers.gp_mini import Kernel, MiniGP, UniqueGP, beta_bound, ei, mini_gp_opt, repeat_count, ucb

F64 = torch.float64
INF, NAN = math.inf, math.nan
X = torch.tensor([[0.0], [0.5], [2.0]], dtype=F64)
MEAN = [0.3803032222787, 0.1421834332457, -0.2406822601567]
VAR = [0.1365197548068, 0.1809187878170, 0.7416346926590]
LOGDET = 2.8085256063711


def close(actual, expected, atol=5e-13) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def full_posterior(kernel, lam, x, y, candidates):
    """From the t x t matrix, and its log det(I + K / lam)."""
    K, k = kernel(x, x), kernel(x, candidates)
    solved = torch.linalg.solve(K + lam * torch.eye(len(x), dtype=F64), torch.cat([y[:, None], k], 1))
    var = kernel(candidates[:1], candidates[:1])[0, 0] - (k * solved[:, 1:]).sum(0)
    return k.T @ solved[:, 0], var, torch.logdet(torch.eye(len(x), dtype=F64) + K / lam)


# ------------------------------------------------------------------------------------------------------- worked numbers


def four_observations() -> UniqueGP:
    gp = UniqueGP(Kernel(), lam=0.5)
    gp.update(torch.tensor([[0.0], [0.0], [1.0], [0.0]], dtype=F64), [0.2, 0.6, -0.4, 0.7])
    return gp


def test_posterior_of_two_unique_points():
    gp = four_observations()
    assert len(gp) == 2 and gp.observations == 4 and gp.counts.tolist() == [3, 1]
    close(gp.sums, [1.5, -0.4])
    mean, var = gp.posterior(X)
    close(mean, MEAN)
    close(var, VAR)
    close(gp.logdet(), LOGDET)


def test_repeats():
    assert repeat_count(torch.tensor(VAR, dtype=F64), 0.5, 1.5).tolist() == [4, 3, 1]
    assert repeat_count(0.001, 0.5, 1.1) == 105
    assert repeat_count(1e-9, 0.5, 1.1, 30) == repeat_count(0.0, 0.5, 1.1, 30) == 30
    assert repeat_count(1e9, 0.5, 1.1) == 1 and repeat_count(torch.tensor(1e9), 0.5, 1.1).dtype == torch.int64


def test_repeats_keep_the_variance_within_the_square_of_C():
    for repeats, ratio in ((4, 2.0921580384547), (5, 2.3651975480683)):
        gp = four_observations()
        gp.update(X[0], [0.3] * repeats)
        after = gp.posterior(X).var
        close(VAR[0] / after[0], ratio, 1e-11)
        assert int((torch.tensor(VAR, dtype=F64) / after).argmax()) == 0
    assert 2.0921580384547 <= 1.5**2 < 2.3651975480683


def test_scores_and_width():
    mean, var = (torch.tensor(v, dtype=F64) for v in (MEAN, VAR))
    close(ucb(mean, var, 0.5, beta=2), [1.4253668751031, 1.3452421610457, 2.1951086876202])
    close(ei(mean, var, 0.5), [0.2084600384112, 0.1394763030005, 0.2372023456853])
    close(beta_bound(LOGDET, 0.5, xi=0.7, delta=0.05), 2.7836411958315)
    close(beta_bound(LOGDET, 0.5, xi=0.7, delta=0.05, C=1.1), 1.1 * 2.7836411958315)
    close(
        beta_bound(LOGDET, 0.5, xi=0.7, delta=0.05, F=2, C=1.5, form="predecessor"),
        2 * math.sqrt(0.5) + 0.7 * math.sqrt(1.5 * LOGDET + math.log(20)),
    )


def test_expected_improvement_of_its_definition():
    """The integral of max(0, f - best) over a normal of deviation beta sigma, far below the best one and without variance."""
    mean, var, lam, beta = (
        torch.tensor([0.4, 0.1, -3.0, 0.9], dtype=F64),
        torch.tensor([0.3, 0.02, 0.1, 0.0], dtype=F64),
        0.5,
        1.7,
    )
    score = ei(mean, var, lam, beta=beta)
    steps = torch.linspace(-12, 12, 200001, dtype=F64)
    density = torch.exp(-0.5 * steps**2) / math.sqrt(2 * math.pi)
    for i in range(3):
        f = mean[i] + beta * (var[i] / lam).sqrt() * steps
        close(score[i], torch.trapezoid((f - 0.9).clamp_min(0) * density, steps), 1e-9)
    assert score[3] == 0 and score[2] > 0
    assert ei(torch.tensor([0.0, -90.0], dtype=F64), torch.ones(2, dtype=F64), 1.0)[1] == 0
    close(ei(mean, var, lam, best=0.1)[1], (0.02 / lam) ** 0.5 / math.sqrt(2 * math.pi))


def run(beta, **options):
    f = [0.2, 1.0, 0.5]
    candidates = torch.tensor([[0.0], [0.5], [1.0]], dtype=F64)
    given = {"C": 1.5, "lam": 0.1, "beta": beta, "budget": 12, "kernel": Kernel(length=0.5)} | options
    return mini_gp_opt(candidates, lambda index, count: [f[index]] * count, **given)


def test_two_runs():
    history = run(2.0)
    assert history.picks == [0, 2, 1, 1, 2, 1, 1, 0, 1, 1, 1, 1]
    assert [repeats for _, repeats in history.rounds[-3:]] == [2, 1, 4]
    assert (history.switches, history.counts, history.unique) == (7, [2, 8, 2], 3)
    assert history.rewards == [[0.2, 1.0, 0.5][i] for i in history.picks]
    history = run(1.0)
    assert history.picks == [0, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    assert (history.switches, history.counts) == (5, [1, 9, 2])


def test_C_close_to_one_is_ordinary_ucb():
    history = run(2.0, C=1.0001)
    assert all(repeats == 1 for _, repeats in history.rounds)
    gp, f, kernel = UniqueGP(Kernel(length=0.5), 0.1), [0.2, 1.0, 0.5], Kernel(length=0.5)
    x, y = torch.zeros(0, 1, dtype=F64), torch.zeros(0, dtype=F64)
    candidates = torch.tensor([[0.0], [0.5], [1.0]], dtype=F64)
    for pick in history.picks:
        mean, var, _ = full_posterior(kernel, 0.1, x, y, candidates)
        assert int((mean + 2 * (var / 0.1).sqrt()).argmax()) == pick
        x, y = torch.cat([x, candidates[pick : pick + 1]]), torch.cat([y, torch.tensor([f[pick]], dtype=F64)])
    assert len(gp) == 0


def test_expected_improvement_finds_the_best_and_stays():
    history = run(1.0, rule="ei", budget=40)
    assert history.counts[1] > 25 and history.sampler.best() == 1 and history.switches < 12


def test_beta_as_a_function():
    seen = []

    def beta(gp):
        seen.append(gp.observations)
        return beta_bound(gp.logdet(), 0.1, xi=0.3, delta=0.1)

    history = run(beta)
    assert seen[0] == 0 and seen == sorted(seen) and len(seen) == len(history.rounds)


# ----------------------------------------------------------------------------------------------------- the whole history

lattice = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(-8, 8)), min_size=1, max_size=25)


@given(lattice, st.sampled_from(["rbf", "matern12", "matern32", "matern52"]), st.sampled_from([0.3, 2.0]), st.integers(1, 6))
def test_unique_points_are_all_there_is_to_know(observations, kind, lam, batch):
    data = torch.tensor(observations, dtype=F64)
    x, y = data[:, :2] / 2, data[:, 2] / 8
    kernel = Kernel(kind, (0.9, 1.3), 1.4)
    candidates = torch.tensor([[0.0, 0.0], [0.3, 0.8], [5.0, 5.0], [1.5, 0.5]], dtype=F64)
    gp, before = UniqueGP(kernel, lam), torch.full((4,), 1.4, dtype=F64)
    for first in range(0, len(x), batch):
        gp.update(x[first : first + batch], y[first : first + batch])
        var = gp.posterior(candidates).var
        assert (var <= before + 1e-12).all()
        before = var
    assert len(gp) == len(x.unique(dim=0))
    mean, var, logdet = full_posterior(kernel, lam, x, y, candidates)
    close(gp.posterior(candidates).mean, mean, 1e-10)
    close(gp.posterior(candidates).var, var, 1e-10)
    close(gp.logdet(), logdet, 1e-10)
    order = torch.randperm(len(x))
    other = UniqueGP(kernel, lam)
    other.update(x[order], y[order])
    close(other.posterior(candidates).mean, mean, 1e-10)
    close(other.posterior(candidates).var, var, 1e-10)


def test_a_long_history_of_few_points(monkeypatch):
    """Past the change at which the factor is made anew, and with room that grew."""
    monkeypatch.setattr(UniqueGP, "REFACTOR", 40)
    kernel, lam, generator = Kernel("matern52", 0.3), 0.05, torch.Generator().manual_seed(0)
    points = torch.rand(30, 2, dtype=F64, generator=generator)
    gp, history, changes = UniqueGP(kernel, lam), [], []
    for _ in range(200):
        i = int(torch.randint(30, (), generator=generator))
        y = torch.randn(int(torch.randint(1, 4, (), generator=generator)), dtype=F64, generator=generator)
        gp.update(points[i], y)
        history.append((points[i].expand(len(y), -1), y))
        changes.append(gp._changes)
    assert max(changes) == 40 and 0 in changes[changes.index(40) :]
    x, y = (torch.cat(part) for part in zip(*history, strict=True))
    candidates = torch.rand(50, 2, dtype=F64, generator=generator)
    mean, var, logdet = full_posterior(kernel, lam, x, y, candidates)
    close(gp.posterior(candidates).mean, mean, 1e-10)
    close(gp.posterior(candidates).var, var, 1e-10)
    close(gp.logdet(), logdet, 1e-10)
    assert gp.observations == len(y)


def test_no_observations():
    gp = UniqueGP(Kernel(variance=2.5), 0.1)
    mean, var = gp.posterior(torch.randn(5, 3))
    assert mean.tolist() == [0] * 5 and var.tolist() == [2.5] * 5 and gp.logdet() == 0 and len(gp) == 0
    gp.update(torch.zeros(0, 3, dtype=F64), torch.zeros(0))
    assert len(gp) == 0 and gp.posterior(torch.randn(0, 3)).mean.shape == (0,)


def test_points_are_merged_by_their_bits():
    gp = UniqueGP(Kernel(), 0.1)
    third = torch.tensor([1 / 3], dtype=torch.float32)
    gp.update(third, 1.0)
    gp.update(third.double(), 2.0)
    assert len(gp) == 1
    gp.update(torch.tensor([1 / 3], dtype=F64), 3.0)  # a near duplicate
    gp.update(torch.zeros(1), 0.5)
    gp.update(-torch.zeros(1), 0.5)
    assert len(gp) == 4 and gp.counts.tolist() == [2, 1, 1, 1]
    x = torch.tensor([[1 / 3]] * 3 + [[0.0]] * 2, dtype=F64)
    mean, var, _ = full_posterior(Kernel(), 0.1, x, torch.tensor([1, 2, 3, 0.5, 0.5], dtype=F64), X)
    close(gp.posterior(X).mean, mean, 1e-6)  # of float32's third
    close(gp.posterior(X).var, var, 1e-6)


def test_a_kernel_of_ones_own():
    """A matrix over discrete arms; the posterior is formed in plain PyTorch."""
    table = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.5]], dtype=F64)

    def kernel(A, B):
        return table[A[:, 0].long()][:, B[:, 0].long()]

    arms, lam = torch.arange(3.0, dtype=F64)[:, None], 0.2
    gp = UniqueGP(kernel, lam)
    mean, var = gp.posterior(arms)
    close(var, [2.0, 1.0, 1.5])
    close(mean, [0.0] * 3)
    gp.update(arms[[0, 2, 0, 1]], [1.0, -1.0, 0.5, 0.2])
    x, y = arms[[0, 2, 0, 1]], torch.tensor([1.0, -1.0, 0.5, 0.2], dtype=F64)
    solved = torch.linalg.solve(kernel(x, x) + lam * torch.eye(4, dtype=F64), torch.cat([y[:, None], kernel(x, arms)], 1))
    mean, var = gp.posterior(arms)
    close(mean, kernel(arms, x) @ solved[:, 0])
    close(var, table.diag() - (kernel(x, arms) * solved[:, 1:]).sum(0))
    assert mini_gp_opt(arms, lambda i, n: [0.1 * i] * n, C=1.2, lam=lam, beta=0.5, budget=60, kernel=kernel).sampler.best() == 2


# --------------------------------------------------------------------------------------------------------------- states


def small(**options) -> MiniGP:
    candidates = torch.rand(25, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
    return MiniGP(candidates, Kernel("matern32", 0.4), **{"lam": 0.05, "C": 1.2, "beta": 1.0, "budget": 300} | options)


def advance(sampler: MiniGP, rounds: int) -> list[tuple[int, int]]:
    picks = []
    for _ in range(rounds):
        pick = sampler.sample()
        assert sampler.sample() == pick  # nothing is drawn
        picks.append(tuple(pick))
        noise = torch.randn(pick.repeats, dtype=F64, generator=torch.Generator().manual_seed(sampler.spent))
        sampler.update(pick.candidate, torch.sin(5.0 * torch.tensor(pick.candidate, dtype=F64)) + 0.2 * noise)
    return picks


@pytest.mark.parametrize("rule", ["ucb", "ei"])
def test_what_goes_on_from_a_state_is_the_same_to_the_bit(rule):
    whole, first = small(rule=rule), small(rule=rule)
    advance(whole, 12)
    advance(first, 12)
    resumed = small(rule=rule)
    resumed.load_state_dict(first.state_dict())
    assert advance(resumed, 15) == advance(whole, 15)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert torch.equal(ours["gp"]["factor"], theirs["gp"]["factor"]) and torch.equal(ours["counts"], theirs["counts"])
    assert (resumed.spent, resumed.switches) == (whole.spent, whole.switches)
    assert all(torch.equal(a, b) for a, b in zip(resumed.scores()[1], whole.scores()[1], strict=True))


def test_a_state_is_a_copy():
    sampler = small()
    advance(sampler, 3)
    state = sampler.state_dict()
    kept = {name: value.clone() for name, value in state["gp"].items() if isinstance(value, torch.Tensor)}
    advance(sampler, 5)
    assert all(torch.equal(state["gp"][name], value) for name, value in kept.items())


def change(state, name, value):
    if "." in name:
        part, field = name.split(".")
        return {**state, part: change(state[part], field, value)}
    return {**state, name: value(state[name]) if callable(value) else value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("class", "UniqueGP", "state is of 'UniqueGP', version 1; one of 'MiniGP', version 1"),
        ("version", 2, "state is of 'MiniGP', version 2"),
        ("C", 1.3, r"state\['C'\] is 1.3; 1.2 is expected"),
        ("rule", "ei", r"state\['rule'\] is 'ei'; 'ucb' is expected"),
        ("spent", 7, r"state\['counts'\] sum up to 3; 7 are spent"),
        ("last", 25, r"state\['last'\] is 25; candidates are 0 to 24"),
        ("candidates", lambda t: t + 1, r"state\['candidates'\] are others"),
        ("candidates", lambda t: t[:5], r"state\['candidates'\] is torch.float64 \[5, 2\]; torch.float64 \[25, 2\]"),
        ("counts", lambda t: t.double(), r"state\['counts'\] is torch.float64 \[25\]; torch.int64"),
        ("gp.version", 0, "state is of 'UniqueGP', version 0"),
        ("gp.lam", 0.5, r"state\['lam'\] is 0.5; 0.05 is expected"),
        ("gp.kernel", "Kernel()", r"state\['kernel'\] is 'Kernel\(\)'; .*matern32"),
        ("gp.factor", lambda t: t[:-1], r"state\['factor'\] is torch.float64 .*is expected"),
        ("gp.factor", lambda t: -t, r"state\['factor'\] holds numbers"),
        ("gp.counts", lambda t: t - 9, r"state\['counts'\] holds numbers"),
        ("gp.points", lambda t: t[:1].expand_as(t), r"state\['points'\] holds a point twice"),
        ("gp.points", lambda t: t.float(), r"state\['points'\] is torch.float32"),
        ("gp.sums", lambda t: t * NAN, r"state\['sums'\] holds numbers"),
        ("gp.sums", None, r"state\['sums'\] is a NoneType"),
    ],
)
def test_states_refused(name, value, message):
    sampler, other = small(), small()
    for index in (1, 2, 3):
        sampler.update(index, 0.1 * index)
    other.update(4, 1.0)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(change(sampler.state_dict(), name, value))
    assert torch.equal(other.counts, before["counts"]) and torch.equal(other.gp.sums, before["gp"]["sums"])
    with pytest.raises(TypeError, match="state is a list"):
        other.gp.load_state_dict([])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, [1.0, NAN, 0.0], ValueError, r"y\[1\] is nan; it must be finite"),
        (X, [1.0, 0.0, INF], ValueError, r"y\[2\] is inf"),
        (X * NAN, [1.0] * 3, ValueError, r"x\[0, 0\] is nan"),
        (X, [1.0, 2.0], ValueError, r"x and y have shapes \[3, 1\] and \[2\]; \[n, d\] and \[n\], or"),
        (X[:, :0].expand(3, 0), [1.0] * 3, ValueError, "x has points of 0 dimensions; those before have 1"),
        (X.expand(3, 2), [1.0] * 3, ValueError, "x has points of 2 dimensions; those before have 1"),
        (X.long(), [1.0] * 3, TypeError, "x is torch.int64; a tensor of a floating dtype"),
        ([[1.0]], [1.0], TypeError, "x is a list"),
    ],
)
def test_updates_refused(x, y, error, message):
    gp = four_observations()
    with pytest.raises(error, match=message):
        gp.update(x, y)
    assert gp.counts.tolist() == [3, 1]
    close(gp.posterior(X).mean, MEAN)


def test_a_kernel_that_is_not_positive_semi_definite():
    table = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, -3.0]], dtype=F64)
    gp = UniqueGP(lambda A, B: table[A[:, 0].long()][:, B[:, 0].long()], 0.5)
    arms = torch.arange(3.0, dtype=F64)[:, None]
    gp.update(arms[:1], [1.0])
    mean = gp.posterior(arms[:1]).mean
    with pytest.raises(
        ValueError, match=r"kernel is not positive semi-definite: of K \+ lam / n of 2 points its pivot is -1\.7"
    ):
        gp.update(arms[[0, 1]], [1.0, 1.0])  # 1.5 - 4 / 1.25
    assert len(gp) == 1 and torch.equal(gp.posterior(arms[:1]).mean, mean)
    with pytest.raises(ValueError, match=r"of 2 points its pivot is -2\.5$"):
        gp.update(arms[2], 1.0)
    with pytest.raises(ValueError, match=r"kernel returned \[2\]; \[1, 1\] is expected"):
        UniqueGP(lambda A, B: torch.ones(2), 0.5).update(arms[0], 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: UniqueGP(Kernel(), 0.0), ValueError, "lam is 0.0; it must be finite and positive"),
        (lambda: UniqueGP(Kernel(), -1.0), ValueError, "lam is -1.0"),
        (lambda: UniqueGP(Kernel(), NAN), ValueError, "lam is nan"),
        (lambda: UniqueGP(Kernel(), "1"), TypeError, "lam is '1'; a number"),
        (lambda: UniqueGP("rbf", 1.0), TypeError, "kernel is a str; a Kernel or a function"),
        (lambda: Kernel("rfb"), ValueError, "kind is 'rfb'; accepted: 'rbf', .*did you mean 'rbf'"),
        (lambda: Kernel(length=0.0), ValueError, "length is 0.0"),
        (lambda: Kernel(length=()), ValueError, r"length is \(\)"),
        (lambda: Kernel(length=(1.0, -1.0)), ValueError, "length is"),
        (lambda: Kernel(variance=INF), ValueError, "variance is inf"),
        (lambda: Kernel(length=(1.0, 1.0))(X, X), ValueError, "length has 2 numbers; the points have 1 dimensions"),
        (lambda: four_observations().posterior(X[:, 0]), ValueError, r"X has shape \[3\]; \[M, 1\] is expected"),
        (lambda: four_observations().posterior(X.expand(3, 2)), ValueError, r"X has shape \[3, 2\]; \[M, 1\]"),
        (lambda: repeat_count(0.0, 0.5, 1.1), ValueError, "var is 0.0, of which C = 1.1 would have no end of repeats; max_b"),
        (lambda: repeat_count(-1e-9, 0.5, 1.1), ValueError, "var is -1e-09; it must be a number and not negative"),
        (lambda: repeat_count(NAN, 0.5, 1.1, 5), ValueError, "var is nan"),
        (lambda: repeat_count(0.1, 0.0, 1.1), ValueError, "lam is 0.0"),
        (lambda: repeat_count(0.1, 0.5, 1.0), ValueError, "C is 1.0; a number above 1"),
        (lambda: repeat_count(0.1, 0.5, 0.5), ValueError, "C is 0.5; a number above 1"),
        (lambda: repeat_count(0.1, 0.5, 1.1, 0), ValueError, "max_b is 0; at least 1"),
        (lambda: ucb(X, X, -1.0, beta=1), ValueError, "lam is -1.0"),
        (lambda: ucb(X, X, 1.0, beta=0), ValueError, "beta is 0"),
        (lambda: ei(X, X, 1.0, beta=NAN), ValueError, "beta is nan"),
        (lambda: beta_bound(-1.0, 1.0, xi=1.0, delta=0.1), ValueError, "logdet is -1.0"),
        (lambda: beta_bound(1.0, 1.0, xi=1.0, delta=1.0), ValueError, "delta is 1.0"),
        (lambda: beta_bound(1.0, 1.0, xi=1.0, delta=0.1, C=0.9), ValueError, "C is 0.9; at least 1"),
        (lambda: beta_bound(1.0, 1.0, xi=1.0, delta=0.1, form="new"), ValueError, "form is 'new'; accepted: 'self_normalised'"),
        (lambda: run(1.0, C=1.0), ValueError, "C is 1.0"),
        (lambda: run(1.0, lam=0.0), ValueError, "lam is 0.0"),
        (lambda: run(-1.0), ValueError, "beta is -1.0"),
        (lambda: run(1.0, budget=0), ValueError, "budget is 0; at least 1"),
        (lambda: run(1.0, rule="pi"), ValueError, "rule is 'pi'; accepted: 'ucb', 'ei'"),
        (lambda: small().update(25, 1.0), ValueError, "index is 25; candidates are 0 to 24"),
        (lambda: small().update(0, []), ValueError, "rewards is empty"),
        (lambda: small().update(0, [1.0, NAN]), ValueError, r"y\[1\] is nan"),
        (lambda: small(budget=2).update(0, [1.0] * 3), ValueError, "rewards has 3 numbers; of the budget 2 are left"),
        (lambda: MiniGP(X * NAN, Kernel(), lam=1, C=2, beta=1), ValueError, "candidates holds numbers that are not finite"),
        (lambda: MiniGP(X[:0], Kernel(), lam=1, C=2, beta=1), ValueError, r"candidates has shape \[0, 1\]"),
        (lambda: MiniGP(X.long(), Kernel(), lam=1, C=2, beta=1), TypeError, "candidates are torch.int64; floats"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_number_of_rewards_must_be_what_was_asked_for():
    with pytest.raises(ValueError, match="evaluate returned 3 rewards of candidate 0; it was asked for 1"):
        mini_gp_opt(X, lambda index, count: [0.0] * 3, C=1.5, lam=0.1, beta=1.0, budget=5)


def test_a_variance_of_zero_takes_what_is_left_of_the_budget():
    """Where the noise is so small that nothing is left to learn."""
    history = mini_gp_opt(X[:1], lambda index, count: [0.5] * count, C=1.1, lam=1e-30, beta=1.0, budget=50)
    assert history.rounds == [(0, 1), (0, 49)]
    sampler = MiniGP(X[:1], Kernel(), lam=1e-30, C=1.1, beta=1.0)
    sampler.update(0, 0.5)
    with pytest.raises(ValueError, match="no end of repeats"):
        sampler.sample()
    done = small(budget=1)
    done.update(0, 0.5)
    with pytest.raises(ValueError, match="budget is 1, and all of it is spent"):
        done.sample()


def test_about():
    assert gp_mini.about.evidence == "part" and "2201.12909" in gp_mini.about.link
