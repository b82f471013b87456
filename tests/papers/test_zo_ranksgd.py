"""ZO-RankSGD: weights against the sum over edges, oracles, line search, steps and rounds against stored directions."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import reference, seeded_normal
from prefkern.papers import zo_ranksgd as zo
from prefkern.papers.zo_ranksgd import Ranker, RankSGD, line_search, rank_gradient, rank_weights, ranking_oracle, zo_rank_step

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
INF, NAN = math.inf, math.nan
XI = torch.tensor([[1, 0], [0, 1], [-1, 0.5], [0.5, -1]], dtype=F64)


def close(actual, expected, atol=1e-12) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def edge_sum(xi, ranking, *, values=None):
    """The mean of xi_j - xi_i over all pairs of which i is known to be the better one."""
    others = [j for j in range(len(xi)) if j not in ranking]
    edges = list(itertools.combinations(ranking, 2)) + [(i, j) for i in ranking for j in others]
    if values is not None:
        edges = [(i, j) for i, j in edges if values[i] != values[j]]
    return sum(xi[j] - xi[i] for i, j in edges) / len(edges), len(edges)


# ---- weights


def test_worked_weights() -> None:
    close(rank_weights([2, 0], 4), [0.2, -0.4, 0.6, -0.4])
    close(rank_gradient(XI, [2, 0]), [0.6, -0.3])
    close(rank_weights([2, 0], 4, variant="code"), [0.4, -0.4, 0.8, -0.4])
    close(rank_gradient(XI, [2, 0], variant="code"), [0.6, -0.4])
    close(rank_gradient(XI, [2, 0, 3, 1]), [0.4166666667, 0.0833333333], 5e-11)
    close(rank_gradient(XI, [2, 0, 3, 1], variant="code"), [0.3333333333, 0], 5e-11)
    close(rank_gradient(XI, [2, 0], mu=0.1), [0.06, -0.03])


def test_the_best_of_m() -> None:
    for m in range(2, 8):
        expected = torch.full((m,), -1 / (m - 1), dtype=F64)
        expected[1] = 1
        close(rank_weights([1], m), expected)
    close(rank_weights([1, 0], 2), [-1, 1])


@pytest.mark.parametrize("m", range(2, 8))
def test_closed_form_is_the_sum_over_edges(m) -> None:
    """For every m <= 7 and every k; all rankings of the first five, and some of the others."""
    generator = torch.Generator().manual_seed(m)
    xi = torch.randn(m, 3, dtype=F64, generator=generator)
    for k in range(1, m + 1):
        rankings = list(itertools.permutations(range(m), k)) if m < 6 else []
        rankings += [tuple(torch.randperm(m, generator=generator)[:k].tolist()) for _ in range(5)]
        for ranking in rankings:
            g, edges = edge_sum(xi, ranking)
            assert edges == k * m - (k * k + k) // 2
            close(rank_gradient(xi, ranking), g)
            w = rank_weights(ranking, m)
            close(w.sum(), 0)
            close(rank_gradient(xi + 7.5, ranking), g, 1e-11)  # what all have in common cancels
            off_by_one = rank_weights(ranking, m, variant="code")
            close(off_by_one.sum(), k / edges)
            close(off_by_one[list(ranking)] - w[list(ranking)], torch.full((k,), 1 / edges, dtype=F64))
        if k == m - 1:
            last = [i for i in range(m) if i not in ranking]
            close(rank_weights(ranking, m), rank_weights([*ranking, *last], m))


def test_dropped_ties() -> None:
    values = [0.5, NAN, -2, 0.5, INF]
    order = ranking_oracle(values)
    assert order == [2, 0, 3, 1, 4]
    xi = torch.randn(5, 4, dtype=F64)
    g, edges = edge_sum(xi, order, values=[0.5, 9, -2, 0.5, 9])
    assert edges == 8
    close(rank_gradient(xi, order, values=values), g)
    close(rank_gradient(xi, order[:2], values=values), edge_sum(xi, order[:2], values=[0.5, 9, -2, 0.5, 9])[0])
    close(rank_weights([0, 1, 2], 3, values=[4.0, 4.0, 4.0]), [0, 0, 0])
    distinct = torch.randn(5)
    close(rank_weights(ranking_oracle(distinct, 3), 5, values=distinct), rank_weights(ranking_oracle(distinct, 3), 5))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=7), st.data())
def test_any_ties(values, data) -> None:
    k = data.draw(st.integers(1, len(values)))
    order = ranking_oracle(values, k)
    xi = torch.randn(len(values), 2, dtype=F64)
    if len(set(values)) > 1:
        close(rank_gradient(xi, order, values=values), edge_sum(xi, order, values=values)[0])


# ---- oracles and the line search


def test_oracle() -> None:
    assert ranking_oracle([0.5, NAN, -2, 0.5]) == [2, 0, 3, 1]
    assert ranking_oracle(torch.tensor([0.5, NAN, -2, 0.5]), 2) == [2, 0]
    assert ranking_oracle([INF, 1, NAN, -INF]) == [3, 1, 0, 2]
    assert ranking_oracle([3]) == [0]
    values = torch.randn(9, dtype=F64)
    for increasing in (torch.exp, lambda v: v**3, lambda v: 5 * v - 2):
        assert ranking_oracle(increasing(values), 4) == ranking_oracle(values, 4) == values.argsort()[:4].tolist()


def test_line_search() -> None:
    x, d = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.4, -0.2], dtype=F64)
    candidates = zo.line_search_candidates(x, d, eta=0.5, n=3)
    close(candidates, [[1.2, 1.9], [1.1, 1.95], [1.05, 1.975]])
    asked = []

    def best_of(points):
        asked.append(points)
        return 1

    close(line_search(x, d, best_of, eta=0.5, n=3), [1.1, 1.95])
    close(asked[0], candidates)
    close(line_search(x, torch.zeros_like(d), best_of, eta=0.5, n=3), x)
    assert len(asked) == 1
    close(zo.line_search_candidates(x, d, eta=1.0, n=2, gamma=0.1)[1], [1.04, 1.98])


# ---- directions from a seed


@pytest.mark.parametrize("variant", zo.VARIANTS)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_computed_again_is_as_stored(variant, k) -> None:
    xi = torch.stack([reference.seeded_normal(3, 12 + i, 41) for i in range(6)])
    ranking = torch.randperm(6)[:k]
    options = {"variant": variant, "mu": 0.3}
    stored = rank_gradient(xi, ranking, **options)
    close(rank_gradient(3, ranking, m=6, n=41, first_row=12, dtype=F64, **options), stored)
    single = rank_gradient(3, ranking, m=6, n=41, first_row=12, **options)
    assert single.dtype == F32
    close(single.double(), stored, 2e-6)
    close(rank_gradient(xi.view(6, 1, 41).float(), ranking, **options).double(), stored[None], 2e-6)


def test_descent_on_average() -> None:
    """Of a linear f: the estimate's inner product with the gradient, over 400 draws."""
    slope = torch.randn(20, dtype=F64)
    xi = seeded_normal(1, 0, 400 * 8 * 20, dtype=F64).view(400, 8, 20)
    for k in (1, 3, 8):
        for variant in zo.VARIANTS:
            g = torch.stack([rank_gradient(x, ranking_oracle(x @ slope, k), variant=variant) for x in xi])
            products = g @ slope / slope.norm()
            assert products.mean() > 10 * products.std() / 20
    reverse = torch.stack([rank_gradient(x, ranking_oracle(-x @ slope)) for x in xi])
    assert (reverse @ slope).mean() < 0


# ---- steps on parameters


def quadratic(x):
    target = torch.linspace(-1, 1, x.numel(), dtype=x.dtype)
    return ((x.flatten() - target) ** 2).sum()


def stored_step(x, f, *, m, k, mu, eta, seed, step, variant="paper", scale_mu=False, ties="stable", n=None, gamma=0.5):
    """The same in float64, with all directions in memory."""
    xi = torch.stack([reference.seeded_normal(seed, step * m + i, x.numel()) for i in range(m)]).view(m, *x.shape)
    values = [float(f(x + mu * d)) for d in xi]
    ranking = ranking_oracle(values, k)
    direction = -rank_gradient(xi, ranking, variant=variant, values=values if ties == "drop" else None)
    direction = direction * (mu if scale_mu else 1.0)
    if n is None:
        return x + eta * direction, ranking, None
    candidates = zo.line_search_candidates(x, direction, eta=eta, n=n, gamma=gamma)
    chosen = ranking_oracle([float(f(c)) for c in candidates], 1)[0]
    return candidates[chosen], ranking, chosen


OPTIONS = [
    {},
    {"k": 3, "variant": "code", "scale_mu": True},
    {"k": 1},
    {"line_search": 4},
    {"k": 2, "line_search": 3, "gamma": 0.25, "ties": "drop"},
    {"line_search": 2, "variant": "code", "scale_mu": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_with_stored_directions(options) -> None:
    x, y = torch.zeros(3, 4, dtype=F64), torch.zeros(3, 4, dtype=F64)
    for step in range(5):
        common = {"m": 6, "k": options.get("k"), "mu": 0.1, "eta": 0.2, "seed": 5, "step": step}
        rest = {key: value for key, value in options.items() if key not in ("k", "line_search")}
        calls = []

        def f(at, calls=calls):
            assert at is x
            calls.append(quadratic(at))
            return calls[-1]

        done = zo_rank_step(x, f, line_search=options.get("line_search"), **common, **rest)
        y, ranking, chosen = stored_step(y, quadratic, n=options.get("line_search"), **common, **rest)
        assert (done.ranking, done.chosen) == (ranking, chosen)
        assert done.evaluations == len(calls) == 6 + (options.get("line_search") or 0)
        close(x, y, 1e-10)
    assert quadratic(x) < quadratic(torch.zeros(12, dtype=F64))


def test_only_the_order_of_values_counts() -> None:
    points = []
    for increasing in (lambda v: v, lambda v: v**3 - 4, torch.log, lambda v: -1 / v):
        x = torch.zeros(10)
        for step in range(10):
            zo_rank_step(
                x, lambda at, g=increasing: g(quadratic(at)), m=4, k=2, mu=0.1, eta=0.1, seed=0, step=step, line_search=3
            )
        points.append(x)
    assert all(torch.equal(points[0], x) for x in points[1:])


def test_a_module_moves_as_the_concatenation_of_its_parameters() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    module[0].bias.requires_grad_(False)
    frozen = module[0].bias.clone()
    moving = [p for p in module.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in moving])
    several = [p.detach().clone() for p in moving]

    def value(tensors):
        return sum(float(((t - 0.3) ** 2).sum()) for t in tensors)

    def of_module(at):
        assert at is module and not torch.is_grad_enabled()
        return value(p for p in module.parameters() if p.requires_grad)

    options = {"m": 5, "mu": 0.2, "eta": 0.3, "seed": 1, "line_search": 2}
    first = zo_rank_step(module, of_module, **options)
    assert zo_rank_step(several, value, **options) == first
    assert zo_rank_step(flat, lambda x: value([x]), **options) == first
    assert torch.equal(torch.cat([p.detach().flatten() for p in moving]), flat)
    assert torch.equal(torch.cat([t.flatten() for t in several]), flat)
    assert torch.equal(module[0].bias, frozen) and all(p.requires_grad for p in moving)


def test_bfloat16_parameters() -> None:
    x = torch.linspace(-2, 2, 30).bfloat16()
    before = x.clone()
    zo_rank_step(x, lambda at: at.float().square().sum(), m=4, mu=0.05, eta=0.1, seed=2)
    exact = torch.stack([reference.seeded_normal(2, i, 30) for i in range(4)])
    values = [float((before.double() + 0.05 * d).bfloat16().float().square().sum()) for d in exact]
    expected = before.double() - 0.1 * rank_gradient(exact, ranking_oracle(values))
    assert_close(x.double(), expected, rtol=2.0**-8, atol=1e-6)
    assert x.dtype == BF16 and not torch.equal(x, before)


def test_a_ranker_sees_everything_before_it_is_asked() -> None:
    x, log = torch.zeros(8, dtype=F64), []

    def observe(at):
        log.append("look")
        return at.clone()

    def rank(seen, k):
        log.append(f"rank {k} of {len(seen)}")
        return torch.tensor(ranking_oracle([float(quadratic(o)) for o in seen], k))

    options = {"m": 4, "k": 2, "mu": 0.1, "eta": 0.3, "seed": 0, "line_search": 3}
    done = zo_rank_step(x, Ranker(observe, rank), **options)
    assert log == ["look"] * 4 + ["rank 2 of 4"] + ["look"] * 3 + ["rank 1 of 3"]
    y = torch.zeros(8, dtype=F64)
    assert zo_rank_step(y, quadratic, **options) == done
    assert torch.equal(x, y)


def test_equal_values_move_nothing_if_ties_are_dropped() -> None:
    for n in (None, 3):
        x = torch.randn(6)
        before = x.clone()
        done = zo_rank_step(x, lambda _: 1.0, m=3, mu=0.1, eta=1.0, seed=0, ties="drop", line_search=n)
        assert torch.equal(x, before) and done.chosen is None
        zo_rank_step(x, lambda _: 1.0, m=3, mu=0.1, eta=1.0, seed=0, line_search=n)
        assert not torch.equal(x, before)  # the first of equal ones is the best


@pytest.mark.parametrize("fails_at", [1, 4, 6])
def test_what_is_raised_leaves_everything_as_it_was(fails_at) -> None:
    calls = []

    def f(at):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return quadratic(at)

    x = torch.randn(7)
    before, optimizer = x.clone(), RankSGD(x, m=4, mu=0.1, eta=1.0, seed=0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(f)
    assert torch.equal(x, before) and (optimizer.rounds, optimizer.averaged) == (0, 0)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        zo_rank_step(x, f, m=4, mu=0.1, eta=1.0, seed=0, line_search=5)
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="values are all NaN"):
        zo_rank_step(x, lambda _: NAN, m=4, mu=0.1, eta=1.0, seed=0)
    assert torch.equal(x, before)


# ---- rounds


def stored_rounds(x, f, rounds, *, m, k, mu, eta, seed, n_query, gamma=0.5, variant="paper", scale_mu=False):
    """The rounds in float64 with all directions in memory: [(chosen, averaged, x, D)]."""
    average, count, log = torch.zeros_like(x), 0, []
    for t in range(rounds):
        xi = torch.stack([reference.seeded_normal(seed, t * m + i, x.numel()) for i in range(m)])
        probes = x + mu * xi
        ranking = ranking_oracle([float(f(p)) for p in probes], k)
        d = -rank_gradient(xi, ranking, variant=variant) * (mu if scale_mu else 1.0)
        average, count = (average * count + d) / (count + 1), count + 1
        candidates = [x + eta * gamma**i * average for i in range(n_query - 2)] + [probes[ranking[0]], x]
        chosen = ranking_oracle([float(f(c)) for c in candidates], 1)[0]
        used = count
        if chosen != n_query - 1:
            x, average, count = candidates[chosen], torch.zeros_like(x), 0
        log.append((chosen, used, x, average))
    return log


@pytest.mark.parametrize("variant", zo.VARIANTS)
@pytest.mark.parametrize("run", range(6))
def test_rounds_are_those_with_stored_directions(variant, run) -> None:
    """Directions, chosen candidates, incumbents and counts, near and far from the minimum, where rounds fail."""
    options = {"m": 3 + run % 3, "k": 1 + run % 3, "mu": (0.02, 0.3)[run % 2], "eta": (0.5, 4.0)[run % 2], "seed": run}
    options |= {"n_query": 3 + run % 3, "variant": variant, "scale_mu": run % 2 == 1}
    start = torch.linspace(-1, 1, 6, dtype=F64) + (0.02 * run if run % 2 else 1.0)
    x = start.clone()
    optimizer = RankSGD(x, **options)
    log = stored_rounds(start, quadratic, 12, **options)
    for chosen, averaged, place, average in log:
        done = optimizer.step(quadratic)
        assert (done.chosen, done.averaged) == (chosen, averaged)
        assert done.moved == (chosen != options["n_query"] - 1) and done.evaluations == options["m"] + options["n_query"] - 1
        close(x, place, 1e-10)
        close(optimizer.direction, average, 1e-10)
    assert optimizer.rounds == 12


def test_failures_pool_and_successes_reset() -> None:
    x = torch.linspace(-1, 1, 6, dtype=F64)  # the minimum: everything else is worse
    optimizer = RankSGD(x, m=4, mu=0.1, eta=1.0, seed=0)
    rounds = [optimizer.step(quadratic) for _ in range(3)]
    assert [(r.averaged, r.moved, r.chosen) for r in rounds] == [(1, False, 4), (2, False, 4), (3, False, 4)]
    assert optimizer.averaged == 3 and optimizer.direction.any()
    assert torch.equal(x, torch.linspace(-1, 1, 6, dtype=F64))
    moved = optimizer.step(lambda at: -quadratic(at))
    assert moved.moved and moved.averaged == 4
    assert optimizer.averaged == 0 and not optimizer.direction.any()


def test_the_incumbent_loses_ties() -> None:
    x = torch.zeros(5)
    done = RankSGD(x, m=3, mu=0.1, eta=1.0, seed=0).step(lambda _: 1.0)
    assert done.moved and done.chosen == 0
    dropped = RankSGD(x, m=3, mu=0.1, eta=1.0, seed=0, ties="drop")
    before = x.clone()
    assert dropped.step(lambda _: 1.0) == ([0, 1, 2], 4, False, 0, 3)
    assert torch.equal(x, before) and dropped.rounds == 1


def test_a_round_may_end_at_its_best_probe() -> None:
    """With a step far too long, and a ranker that looks at each candidate once."""
    looks = []

    def observe(at):
        looks.append(at.clone())
        return at.clone()

    x = torch.ones(4, dtype=F64)
    ranker = Ranker(observe, lambda seen, k: ranking_oracle([float(quadratic(o)) for o in seen], k))
    done = RankSGD(x, m=5, mu=0.2, eta=1e4, seed=3, n_query=3).step(ranker)
    assert done.chosen == 1 and len(looks) == done.evaluations == 7
    close(x, torch.ones(4, dtype=F64) + 0.2 * reference.seeded_normal(3, done.ranking[0], 4))
    assert torch.equal(x, looks[done.ranking[0]])


@pytest.mark.parametrize("dtype", [F64, F32])
def test_resumed_rounds_are_the_same(dtype) -> None:
    def model():
        return [torch.zeros(3, 2, dtype=dtype), torch.linspace(-0.5, 0.5, 5).to(dtype)]

    def f(tensors):
        return sum(float(quadratic(t)) for t in tensors)

    options = {"m": 4, "k": 2, "mu": 0.2, "eta": 2.0, "seed": 2**64 - 7}
    one = model()
    first = RankSGD(one, **options)
    for _ in range(5):
        first.step(f)
    state, saved = first.state_dict(), [t.clone() for t in one]
    rest = [first.step(f) for _ in range(5)]
    second = RankSGD(saved, **{**options, "seed": 0})
    second.load_state_dict(state)
    assert [second.step(f) for _ in range(5)] == rest
    assert all(torch.equal(a, b) for a, b in zip(one, saved, strict=True))
    assert len({r.averaged for r in rest}) > 1  # some of them had an average to resume


CORRUPT = [
    ({"version": 2}, "version 2; one of 'RankSGD', version 1"),
    ({"class": "Other"}, "state is of 'Other'"),
    ({"direction": torch.zeros(7)}, r"direction.* is torch.float32 \[7\]; torch.float32 \[6\]"),
    ({"direction": torch.zeros(6, dtype=F64)}, "direction.* is torch.float64"),
    ({"averaged": 0.5}, "averaged.* is a float; a int"),
    ({"averaged": -1}, r"state\['averaged'\] is -1; it must not be negative"),
    ({"next_row": 2**32}, r"state\['next_row'\] is 4294967296; a seed has 2\^32 rows"),
    ({"more": 1}, r"unknown \['more'\]"),
]


@pytest.mark.parametrize(("change", "message"), CORRUPT)
def test_corrupted_states(change, message) -> None:
    x = torch.randn(6)
    optimizer = RankSGD(x, m=3, mu=0.1, eta=1.0, seed=0)
    optimizer.step(quadratic)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**before, **change})
    after = optimizer.state_dict()
    assert torch.equal(after.pop("direction"), before.pop("direction")) and after == before
    with pytest.raises(TypeError, match="state is a list"):
        optimizer.load_state_dict([])


# ---- what is refused

X = torch.zeros(3)
STEP = {"m": 3, "mu": 0.1, "eta": 1.0, "seed": 0}


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: rank_weights([0], 1), ValueError, "m is 1; at least 2 probes"),
    (lambda: rank_weights([0], 2.0), TypeError, r"m is 2\.0; an integer"),
    (lambda: rank_weights([0, 1, 2], 2), ValueError, "ranking has 3 indices; 1 to 2 of 2"),
    (lambda: rank_weights([], 2), ValueError, "ranking has 0 indices"),
    (lambda: rank_weights([1, 1], 3), ValueError, r"ranking is \[1, 1\]; an index comes twice"),
    (lambda: rank_weights([0, 3], 3), ValueError, r"ranking\[1\] is 3; 0 to 2"),
    (lambda: rank_weights([-1], 3), ValueError, r"ranking\[0\] is -1"),
    (lambda: rank_weights([0.0], 3), TypeError, r"ranking\[0\] is 0\.0; an integer"),
    (lambda: rank_weights(torch.tensor([0.0]), 3), TypeError, r"ranking\[0\] is 0\.0"),
    (lambda: rank_weights(torch.tensor([[0]]), 3), TypeError, r"ranking\[0\] is \[0\]"),
    (lambda: rank_weights(torch.tensor(0), 3), TypeError, "ranking is 0; indices"),
    (lambda: rank_weights("01", 3), TypeError, "ranking is '01'"),
    (lambda: rank_weights([0], 3, variant="theirs"), ValueError, "variant is 'theirs'; accepted: 'paper', 'code'"),
    (lambda: rank_weights([0], 3, values=[1.0]), ValueError, "values has 1 entries; m = 3"),
    (lambda: rank_weights([0], 2, values=[1, 2], variant="code"), ValueError, "values are given with variant='code'"),
    (lambda: ranking_oracle([1.0], 2), ValueError, "k is 2; there are 1 values"),
    (lambda: ranking_oracle([1.0], 0), ValueError, "k is 0"),
    (lambda: ranking_oracle([]), ValueError, "values is empty"),
    (lambda: ranking_oracle([NAN, INF]), ValueError, "values are all NaN or"),
    (lambda: ranking_oracle(torch.ones(2, 2)), ValueError, r"values has shape \[2, 2\]"),
    (lambda: rank_gradient(0, [0]), ValueError, "m is None and n is None; both are expected"),
    (lambda: rank_gradient(0.5, [0], m=2, n=3), TypeError, r"xi is 0\.5; an integer"),
    (lambda: rank_gradient(XI, [0], m=3), ValueError, "m is 3; xi has 4 directions"),
    (lambda: rank_gradient(XI.int(), [0]), ValueError, r"xi is torch\.int32 \[4, 2\]"),
    (lambda: rank_gradient(XI, [4]), ValueError, r"ranking\[0\] is 4"),
    (lambda: line_search(X, X + 1, lambda _: 3, eta=1.0, n=3), ValueError, r"best_of\[0\] is 3; 0 to 2"),
    (lambda: line_search(X, X[:2], lambda _: 0, eta=1.0, n=3), ValueError, r"direction has shape \[2\]; \[3\]"),
    (lambda: line_search(X, X, lambda _: 0, eta=1.0, n=0), ValueError, "n is 0; at least one"),
    (lambda: line_search(X, X, lambda _: 0, eta=0.0, n=1), ValueError, r"eta is 0\.0; a positive"),
    (lambda: line_search(X, X, lambda _: 0, eta=1.0, n=1, gamma=1.0), ValueError, r"gamma is 1\.0; a number in \(0, 1\)"),
    (lambda: zo_rank_step(X, 1.0, **STEP), TypeError, "f_or_ranker is a float"),
    (lambda: zo_rank_step(X, lambda _: "good", **STEP), TypeError, "f returned str; a number"),
    (lambda: zo_rank_step(X, lambda x: x, **STEP), TypeError, r"f returned \[3\]; a number"),
    (lambda: zo_rank_step(X, Ranker(id, lambda s, k: [0]), **STEP), ValueError, r"answer is \[0\]; 3 indices are expected"),
    (lambda: zo_rank_step(X, Ranker(id, lambda s, k: [0, 0, 1]), **STEP), ValueError, "answer is .* an index comes twice"),
    (lambda: zo_rank_step(X, Ranker(id, lambda s, k: None), **STEP), TypeError, "answer is None"),
    (lambda: zo_rank_step(X, Ranker(id, id), **STEP, ties="drop"), ValueError, "ties is 'drop' with a Ranker"),
    (lambda: zo_rank_step(X, sum, **STEP, ties="drop", variant="code"), ValueError, "ties is 'drop' with variant='code'"),
    (lambda: zo_rank_step(X, sum, **STEP, ties="all"), ValueError, "ties is 'all'; accepted: 'stable', 'drop'"),
    (lambda: zo_rank_step(X, sum, **STEP, line_search=0), ValueError, "line_search is 0"),
    (lambda: zo_rank_step(X, sum, **STEP, k=4), ValueError, "k is 4; 1 to m = 3"),
    (lambda: zo_rank_step(X, sum, **STEP | {"m": 1}), ValueError, "m is 1"),
    (lambda: zo_rank_step(X, sum, **STEP | {"mu": 0}), ValueError, "mu is 0; a positive"),
    (lambda: zo_rank_step(X, sum, **STEP | {"mu": NAN}), ValueError, "mu is nan"),
    (lambda: zo_rank_step(X, sum, **STEP | {"eta": -1.0}), ValueError, r"eta is -1\.0"),
    (lambda: zo_rank_step(X, sum, **STEP, step=2**31), ValueError, r"rows .* are wanted; a seed has rows 0 to 2\^32 - 1"),
    (lambda: zo_rank_step(X, sum, **STEP, step=-1), ValueError, "step: rows -3 to -1"),
    (lambda: zo_rank_step(X.int(), sum, **STEP), TypeError, r"params\[0\] has dtype int32"),
    (lambda: zo_rank_step(3, sum, **STEP), TypeError, "params is a int; a module, a tensor"),
    (lambda: zo_rank_step([], sum, **STEP), ValueError, "params has no element"),
    (lambda: zo_rank_step(torch.nn.ReLU(), sum, **STEP), ValueError, "params has no element"),
    (lambda: zo_rank_step([X, X.to("meta")], sum, **STEP), ValueError, r"params\[1\] is on meta"),
    (lambda: RankSGD(X, **STEP, n_query=2), ValueError, "n_query is 2; at least 3"),
    (lambda: RankSGD(X, **STEP | {"seed": 0.5}), TypeError, r"seed is 0\.5"),
    (lambda: RankSGD(X, **STEP, gamma=0.0), ValueError, r"gamma is 0\.0"),
])  # fmt: skip
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
    assert not X.any()
