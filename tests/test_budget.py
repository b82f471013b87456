"""knapsack_allocate against every allocation there is, its definition, and what it must refuse."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from prefkern import knapsack_allocate, reference

F64 = torch.float64
OPS = torch.ops.prefkern


def worth(table, budgets, b_min=0):
    return table.double().gather(1, (budgets - b_min)[:, None]).sum().item()


def best_of_all(table, surplus):
    n, k = table.shape
    rows = table.double().tolist()
    return max(
        sum(u[j] for u, j in zip(rows, extra, strict=True))
        for extra in itertools.product(range(k), repeat=n)
        if sum(extra) <= surplus
    )


tables = st.integers(1, 3).flatmap(
    lambda n: st.integers(1, 6).flatmap(
        lambda k: st.lists(st.lists(st.integers(-4, 9), min_size=k, max_size=k), min_size=n, max_size=n)
    )
)


@given(tables, st.integers(0, 20), st.integers(0, 3))
def test_exact_is_the_best_of_all(rows, surplus, b_min):
    table = torch.tensor(rows, dtype=F64)
    n, k = table.shape
    total = n * b_min + surplus
    exact, greedy = (knapsack_allocate(table, total, b_min=b_min, method=method) for method in ("exact", "greedy"))
    for budgets in (exact, greedy):
        assert budgets.dtype == torch.int64 and budgets.sum() <= total
        assert (budgets >= b_min).all() and (budgets < b_min + k).all()
    assert worth(table, exact, b_min) == best_of_all(table, surplus) >= worth(table, greedy, b_min)
    for method, ours in (("exact", exact), ("greedy", greedy)):
        assert torch.equal(ours, reference.knapsack_allocate(table, total, b_min=b_min, method=method))


@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize(("n", "k", "surplus"), [(7, 40, 300), (40, 13, 700), (3, 600, 1300)])
def test_larger_ones_are_the_definition(threads, method, n, k, surplus):
    """Over several blocks of sums."""
    table = torch.randint(0, 30, (n, k)).cumsum(1).sqrt() if k < 100 else torch.randint(0, 3, (n, k)).cumsum(1)
    table = table.double()
    results = []
    for count in (1, 3):
        threads(count)
        results.append(knapsack_allocate(table, surplus, method=method))
    assert torch.equal(*results)
    expected = reference.knapsack_allocate(table, surplus, method=method)
    assert worth(table, results[0]) == pytest.approx(worth(table, expected), rel=1e-12)
    assert torch.equal(results[0], expected)


def test_ties_and_what_nobody_gains_from():
    flat = torch.zeros(3, 5)
    for method in ("exact", "greedy"):
        assert knapsack_allocate(flat, 10, b_min=2, method=method).tolist() == [2, 2, 2]
    steps = torch.arange(5.0).expand(3, 5)
    assert knapsack_allocate(steps, 9, b_min=1, method="greedy").tolist() == [5, 3, 1]
    exact = knapsack_allocate(steps, 9, b_min=1)
    assert exact.sum() == 9 and exact.tolist() == [5, 3, 1]  # the smaller budget to the later prompt
    assert knapsack_allocate(steps, 1000, b_min=1).tolist() == [5, 5, 5]  # up to the caps
    assert knapsack_allocate(torch.tensor([[3.0, 1.0], [0.0, 0.5]]), 2).tolist() == [0, 1]
    assert knapsack_allocate(torch.zeros(0, 4), 7).tolist() == []
    assert knapsack_allocate(torch.ones(2, 1), 5, b_min=2).tolist() == [2, 2]


def test_greedy_does_not_see_over_a_dip():
    table = torch.tensor([[0.0, 0.0, 9.0], [0.0, 1.0, 2.0]])
    assert knapsack_allocate(table, 2, method="greedy").tolist() == [0, 2]
    assert knapsack_allocate(table, 2).tolist() == [2, 0]


def test_types():
    table = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, F64):
        assert knapsack_allocate(table.to(dtype), 1).tolist() == [0, 1]
    assert knapsack_allocate(table.T.contiguous().T.requires_grad_(), 1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"utilities": [[0.0]]}, TypeError, "utilities is a list"),
        ({"utilities": torch.zeros(3)}, ValueError, r"utilities has shape \[3\]; expected \[n, K\]"),
        ({"utilities": torch.zeros(2, 0)}, ValueError, r"utilities has shape \[2, 0\]"),
        ({"utilities": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "utilities has dtype Long"),
        ({"utilities": torch.tensor([[0.0, 1], [math.nan, 0]])}, ValueError, r"utilities\[1, 0\] is nan; a finite"),
        ({"utilities": torch.tensor([[0.0, math.inf], [0, 0]])}, ValueError, r"utilities\[0, 1\] is inf"),
        ({"total": 3, "b_min": 2}, ValueError, "total is 3; 2 prompts take at least 4, 2 each"),
        ({"total": -1}, ValueError, "total is -1; 2 prompts take at least 0"),
        ({"total": 2.5}, TypeError, "total is 2.5"),
        ({"b_min": -1}, ValueError, "b_min is -1"),
        ({"method": "optimal"}, ValueError, "method is 'optimal'; accepted: 'exact', 'greedy'"),
    ],
)
def test_refuses(change, error, message):
    given = {"utilities": torch.zeros(2, 3), "total": 6, **change}
    with pytest.raises(error, match=message):
        knapsack_allocate(given.pop("utilities"), given.pop("total"), **given)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_is_refused():
    with pytest.raises(ValueError, match="utilities is on cuda:0; budgets are allocated on the CPU"):
        knapsack_allocate(torch.zeros(2, 3, device="cuda"), 6)


def test_opcheck():
    table = torch.rand(4, 6)
    for method in (0, 1):
        opcheck(OPS.knapsack_allocate.default, (table, 9, method))
    with pytest.raises(RuntimeError, match="method is 2"):
        OPS.knapsack_allocate(table, 9, 2)
    with pytest.raises(RuntimeError, match="surplus is -1"):
        OPS.knapsack_allocate(table, -1, 0)
