"""V_0: loss, utility, budgets, router and the stand-in predictor, by value, and what they must refuse."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import v0
from prefkern.papers.v0 import (
    allocate_budget,
    class_weights,
    knn_success,
    rollout_utility,
    route,
    router_labels,
    value_ranking_loss,
)

F64 = torch.float64
NAN = math.nan


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


# ---- the loss

Z, Y = f64([0.2, 1], [0.5, -0.3], [0, 0.4], [0.1, 0.6]), f64(1, 0, 0.8, 0.2)


def test_the_composite_loss() -> None:
    z = Z.clone().requires_grad_()
    loss, metrics = value_ranking_loss(z, Y)
    close(metrics["rank"], 0.4641487005)
    close(metrics["ce"], 0.5523233921)
    close(loss.detach(), 0.5302797192)
    assert metrics["pairs"] == 2
    (grad,) = torch.autograd.grad(loss, z)
    close(grad[:, 1], [-0.0791274866, 0.0791274866, -0.1033684622, 0.1448335230])
    close(grad[:, 0], -grad[:, 1])
    assert torch.autograd.gradcheck(lambda x: value_ranking_loss(x, Y, weights=f64(1, 2, 3, 0.5)).loss, z)


def test_what_alpha_weighs() -> None:
    full, none = value_ranking_loss(Z, Y, alpha=1.0), value_ranking_loss(Z, Y, alpha=0.0)
    assert full.loss == full.metrics["rank"] and none.loss == none.metrics["ce"]
    s = Z[:, 1] - Z[:, 0]
    close(none.loss, torch.nn.functional.binary_cross_entropy_with_logits(s, Y))
    shifted = torch.stack([Z[:, 0], Z[:, 1] + 7], 1)
    close(value_ranking_loss(shifted, Y).metrics["rank"], full.loss)
    weights = f64(2, 0, 1, 1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(s, Y, weight=weights)
    close(value_ranking_loss(Z, Y, weights=weights).metrics["ce"], expected)


def test_queries_without_a_pair() -> None:
    odd = value_ranking_loss(Z[:3], Y[:3])
    close(odd.metrics["rank"], math.log1p(math.exp(-1.6)))
    close(odd.metrics["ce"], torch.nn.functional.binary_cross_entropy_with_logits(Z[:3, 1] - Z[:3, 0], Y[:3]))
    for given_z, y in ((Z[:1], Y[:1]), (Z, f64(1, 1, 0, 0)), (Z[:0], Y[:0])):
        z = given_z.clone().requires_grad_()
        loss, metrics = value_ranking_loss(z, y)
        assert metrics["rank"] == 0 and metrics["pairs"] == 0
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
    some = value_ranking_loss(Z, f64(1, 0, 1, 1))
    close(some.metrics["rank"], math.log1p(math.exp(-1.6)))


def test_weights_of_the_classes() -> None:
    context = f64(1, 0, 0, 0.9, 0.1, 0)
    close(class_weights(context, f64(1, 0, 0.5, 0.4)), [6 / 4, 6 / 8, 6 / 4, 6 / 8])
    close(class_weights(f64(1, 1), f64(1, 0)), [1, 1])
    close(class_weights(f64(), f64(1)), [1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, "alpha is 1.5; it must lie in"),
        ({"alpha": "a"}, TypeError, "alpha is 'a'"),
        ({"logits": Z[:, :1]}, ValueError, r"logits is torch.float64 \[4, 1\]; floating \[n, 2\]"),
        ({"y": Y[:3]}, ValueError, r"y has shape \[3\]; \[4\]"),
        ({"y": f64(1, 0, 0.2, 0.8)}, ValueError, r"y\[1\] is 0.8; of two queries"),
        ({"y": f64(1, -0.1, 1, 0)}, ValueError, r"y\[1\] is -0.1; a label"),
        ({"y": f64(NAN, 0, 1, 0)}, ValueError, r"y\[0\] is nan"),
        ({"weights": f64(1, 1, -1, 1)}, ValueError, r"weights\[2\] is -1"),
        ({"weights": f64(1)}, ValueError, r"weights has shape \[1\]"),
        ({"y": [1, 0]}, TypeError, "y is a list"),
    ],
)
def test_the_loss_refuses(change, error, message) -> None:
    with pytest.raises(error, match=message):
        value_ranking_loss(**{"logits": Z, "y": Y, **change})


# ---- budgets


def test_utilities() -> None:
    u = rollout_utility(torch.tensor([1, 2, 4, 8, 16]), f64(0.25))
    close(u, [0, 0.375, 1.734375, 5.1990966797, 11.8396384679])
    assert rollout_utility(torch.tensor([[0], [1], [7]]), f64(0, 1, 0.5))[:, :2].abs().sum() == 0
    assert rollout_utility(5, torch.tensor([0.3])).dtype == F64


@given(st.integers(2, 30), st.floats(1e-9, 1 - 1e-9))
def test_a_utility_is_an_expectation(budget, p) -> None:
    """Of the wrong rollouts of a mixed group; and what one more adds is as in the docstring."""
    exact = sum(
        (budget - k) * math.comb(budget, k) * p**k * (1 - p) ** (budget - k) for k in range(1, budget)
    )  # fmt: skip
    u = rollout_utility(torch.tensor([budget, budget + 1]), f64(p))
    assert u[0].item() == pytest.approx(exact, rel=1e-7, abs=1e-13)
    q = 1 - p
    assert (u[1] - u[0]).item() == pytest.approx(q + q**budget * (budget - (budget + 1) * q), rel=1e-6, abs=1e-9)


def test_small_probabilities_keep_their_digits() -> None:
    """U is B (B - 1) p at first order; 1 - (1 - p)^(B - 1) would be 0."""
    close(rollout_utility(10, f64(1e-18)) * 1e18, [90.0], atol=1e-9)


def test_worked_allocations() -> None:
    p = f64(0.02, 0.3, 0.3, 0.3)
    greedy, exact = allocate_budget(p, 64, method="greedy"), allocate_budget(p, 64)
    assert greedy.budgets.tolist() == [2, 58, 2, 2] and exact.budgets[0] == 2
    assert sorted(exact.budgets.tolist()) == [2, 20, 21, 21] and exact.budgets[3] == 20
    close(greedy.utility, 41.479, atol=5e-4)
    close(exact.utility, 43.400, atol=5e-4)
    close(rollout_utility(16, p).sum(), 37.540, atol=5e-4)
    p = f64(0.05, 0.5, 0.95, 0)
    greedy, exact = allocate_budget(p, 24, method="greedy"), allocate_budget(p, 24)
    assert greedy.budgets.tolist() == [2, 18, 2, 2] and exact.budgets.tolist() == [18, 2, 2, 2]
    close(greedy.utility, 9.1899313354)
    close(exact.utility, 10.5451422677)


def every_allocation(p, total, b_min, b_max):
    table = rollout_utility(torch.arange(b_max + 1), p[:, None]).tolist()
    return max(
        sum(u[b] for u, b in zip(table, budgets, strict=True))
        for budgets in itertools.product(range(b_min, b_max + 1), repeat=len(p))
        if sum(budgets) <= total
    )


@given(
    st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.02, 0.3, 1.0])), min_size=1, max_size=3),
    st.integers(0, 3), st.integers(0, 9), st.integers(0, 30),
)  # fmt: skip
def test_no_allocation_is_better(p, b_min, more, surplus) -> None:
    p, b_max, total = f64(*p), b_min + more, b_min * len(p) + surplus
    exact, greedy = (allocate_budget(p, total, b_min=b_min, b_max=b_max, method=m) for m in ("exact", "greedy"))
    for budgets, utility in (exact, greedy):
        assert budgets.sum() <= total and (budgets >= b_min).all() and (budgets <= b_max).all()
        close(utility, rollout_utility(budgets, p).sum(), atol=1e-12)
    assert exact.utility >= greedy.utility - 1e-12
    close(exact.utility, every_allocation(p, total, b_min, b_max), atol=1e-9)
    if ((p > 1e-6) & (p < 1 - 1e-6)).all() and b_min >= 2:  # every further rollout gains
        assert exact.budgets.sum() == greedy.budgets.sum() == min(total, b_max * len(p))


def test_what_nobody_gains_from_stays_unspent() -> None:
    for method in ("exact", "greedy"):
        budgets, utility = allocate_budget(f64(0, 1, 0), 300, method=method)
        assert budgets.tolist() == [2, 2, 2] and utility == 0
        budgets, _ = allocate_budget(f64(0.5, 1, 0.1), 300, b_max=20, method=method)
        assert budgets.tolist() == [20, 2, 20] and 300 - budgets.sum() == 258
    assert allocate_budget(f64(), 5).budgets.tolist() == []
    assert allocate_budget(f64(0.3, 0.4), 9, b_max=10**9).budgets.sum() == 9


def test_a_floor_takes_hopeless_prompts_out() -> None:
    p = f64(0.05, 0.5, 0.95, 0)
    budgets, utility = allocate_budget(p, 24, p_floor=0.1)
    assert budgets[0] == 2 and budgets.tolist() == [2, 18, 2, 2]
    close(utility, rollout_utility(budgets, f64(0, 0.5, 0.95, 0)).sum())
    assert allocate_budget(p, 24, p_floor=0.05).budgets.tolist() == [18, 2, 2, 2]  # not below it


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": f64(0.5, 1.2)}, ValueError, r"p\[1\] is 1.2; a probability"),
        ({"p": f64(NAN, 0.2)}, ValueError, r"p\[0\] is nan"),
        ({"p": f64([0.5])}, ValueError, r"p has shape \[1, 1\]"),
        ({"p": [0.5, 0.5]}, TypeError, "p is a list"),
        ({"total": 3}, ValueError, "total is 3; 2 prompts take at least 4, 2 each"),
        ({"total": 8.0}, TypeError, "total is 8.0"),
        ({"b_min": 5, "b_max": 4}, ValueError, "b_min is 5 and b_max 4"),
        ({"b_min": -1}, ValueError, "b_min is -1"),
        ({"method": "best"}, ValueError, "method is 'best'; accepted: 'exact', 'greedy'"),
        ({"p_floor": 1.5}, ValueError, "p_floor is 1.5"),
    ],
)
def test_allocation_refuses(change, error, message) -> None:
    with pytest.raises(error, match=message):
        allocate_budget(**{"p": f64(0.5, 0.2), "total": 20, **change})
    with pytest.raises(ValueError, match=r"budget\[0\] is -1"):
        rollout_utility(-1, f64(0.5))
    with pytest.raises(TypeError, match=r"budget has dtype torch\.float32"):
        rollout_utility(torch.tensor([2.0]), f64(0.5))


# ---- the router


def test_labels_of_the_router() -> None:
    r, cost = f64(1, 0, 1), f64(1, 3, 5)
    close(router_labels(r, cost, 0.7), [1, 0.15, 0.7])
    close(router_labels(r, cost, 1.0), r)
    close(router_labels(r, cost, 0.0), [1, 0.5, 0])
    close(router_labels(r, f64(4, 4, 4), 0.5), [1, 0.5, 1])
    assert router_labels(f64(), f64(), 0.5).shape == (0,)
    for bad, message in (
        ((r, cost, 1.1), "beta is 1.1"),
        ((r, cost[:2], 0.5), r"cost has shape \[2\]; r has shape \[3\]"),
        ((r, f64(1, math.inf, 2), 0.5), r"cost\[1\] is inf"),
        ((f64(1, 2, 0), cost, 0.5), r"r\[1\] is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            router_labels(*bad)


def test_the_first_of_the_best_models_is_asked() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.9], [0.5, 0.5, 0.5], [0.0, -1.0, 2.0], [-math.inf, -math.inf, -math.inf]])
    assert route(scores).tolist() == [1, 0, 2, 0]
    with pytest.raises(ValueError, match=r"scores\[1\]"):
        route(torch.tensor([[0.0, 1], [NAN, 1]]))
    with pytest.raises(ValueError, match=r"scores has shape \[3\]"):
        route(scores[0])


# ---- the stand-in


def test_the_stand_in_smooths_its_neighbours() -> None:
    context, labels = f64([0, 0], [1, 0], [10, 0], [11, 0]), f64(1, 0, 1, 1)
    queries = f64([0.2, 0], [10.4, 0])
    close(knn_success(queries, context, labels, k=2), [2 / 4, 3 / 4])
    close(knn_success(queries, context, labels, k=1, prior=(0.0, 1.0)), [1 / 2, 1 / 2])
    close(knn_success(queries, context, labels, k=None), [4 / 6] * 2)
    close(knn_success(queries, context, labels, k=99), [4 / 6] * 2)
    close(knn_success(queries, context[:0], labels[:0]), [0.5] * 2)
    for change, message in (
        ({"k": 0}, "k is 0"),
        ({"prior": (0.0, 0.0)}, r"prior is \(0.0, 0.0\)"),
        ({"labels": labels + 1}, r"labels\[0\] is 2"),
        ({"labels": labels[:3]}, r"labels has shape \[3\]; \[4\]"),
        ({"queries": queries[:, :1]}, r"queries has shape \[2, 1\], context \[4, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            knn_success(**{"queries": queries, "context": context, "labels": labels, **change})
    assert v0.about.evidence == "part"
