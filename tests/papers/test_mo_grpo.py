"""Multi-objective GRPO against its worked numbers, its properties and its edge cases."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, gdpo, load_recipe, mo_grpo

F64 = torch.float64
SCORES = torch.tensor([[0.9, 0.2, 0.5, 0.1], [0.4, 0.6, 0.5, 0.9], [0.7, 0.7, 0.5, 0.4], [0.2, 0.3, 0.5, 0.8]], dtype=F64)
GROUP = torch.zeros(4, dtype=torch.int64)


def run(scores=SCORES, weights=None, group=None, **options):
    scores = torch.as_tensor(scores, dtype=F64)
    group = torch.zeros(len(scores), dtype=torch.int64) if group is None else group
    return mo_grpo.multi_objective_advantage(scores, weights, group, **options)


def close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def test_worked_numbers() -> None:
    out = run()
    close(out.reward, [0.425, 0.6, 0.575, 0.45])
    close(out.advantages, [-0.9954820518, 0.9954820518, 0.7110586085, -0.7110586085])
    close(run(weights=[0.25] * 4).advantages, out.advantages)
    close(run(order="norm_then_sum").advantages, [-0.2853344226, 0.2735157533, 0.2816057452, -0.2697870759])


def test_two_aspects_that_cancel() -> None:
    opposed = [[1.0, 0], [0, 1]]
    for order in ("sum_then_norm", "norm_then_sum"):
        out = run(opposed, [0.5, 0.5], order=order)
        close(out.advantages, [0, 0])
        assert out.stats["frac_zero_std"] == 1
        assert run(opposed, [0.6, 0.4], order=order).advantages.argmax() == 0


def test_worked_regression() -> None:
    pred = torch.tensor([[0.2, 0.8], [0.5, 0.1]], dtype=F64, requires_grad=True)
    target = torch.tensor([[0, 1], [math.nan, 0.5]], dtype=F64)
    loss = mo_grpo.multilabel_regression_loss(pred, target, torch.tensor([[1, 1], [0, 1]]))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(0.08, dtype=F64), rtol=0, atol=1e-12)
    close(pred.grad, [[0.1333333333, -0.1333333333], [0, -0.2666666667]])
    everything = mo_grpo.multilabel_regression_loss(pred, torch.zeros_like(pred))
    assert_close(everything, pred.square().mean(), rtol=1e-12, atol=0)


@given(
    scores=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8),
    a=st.floats(0.5, 3),
    b=st.floats(-3, 3),
)
def test_properties(scores, a, b) -> None:
    z = torch.tensor(scores, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = run(z, [0.7, 0.3])
        assert abs(float(out.advantages.sum())) < 1e-8
        if float(out.reward.std()) > 1e-2:
            close(run(a * z + b, [0.7, 0.3], eps=0.0).advantages, run(z, [0.7, 0.3], eps=0.0).advantages, atol=1e-8)
        scaled = z * torch.tensor([a, 1.0], dtype=F64)
        close(run(scaled, [0.7, 0.3]).advantages, run(z, [0.7 * a, 0.3]).advantages, atol=1e-8)


def test_with_one_aspect_it_is_grpo() -> None:
    grpo = prefkern.group_advantages(SCORES[:, 0], GROUP, eps=1e-4).advantages
    close(run(SCORES[:, 0]).advantages, grpo, atol=1e-12)
    close(run(SCORES[:, :1], [2.0], eps=2e-4).advantages, grpo, atol=1e-12)


def test_a_constant_aspect_has_no_effect() -> None:
    for order in ("sum_then_norm", "norm_then_sum"):
        a = run(weights=[0.25, 0.25, 0.25, 0.25], order=order).advantages
        close(run(weights=[0.25, 0.25, 9.0, 0.25], order=order).advantages, a, atol=1e-9)


def test_decoupled_is_gdpo_without_its_batch_step() -> None:
    a = run(weights=[1.0, 2, 0.5, -1], order="norm_then_sum").advantages
    close(a, gdpo.gdpo_advantages(SCORES, GROUP, weights=[1.0, 2, 0.5, -1], batch_norm="none"), atol=1e-12)


def test_ragged_groups_and_statistics() -> None:
    scores = torch.cat([SCORES, torch.tensor([[0.3, 0.3, 0.3, 0.3]] * 2 + [[1.0, 0, 0, 0]], dtype=F64)])
    group = torch.tensor([5, 5, 5, 5, 2, 2, 9])
    out = run(scores, group=group)
    close(out.advantages, [*run().advantages.tolist(), 0, 0, 0], atol=1e-12)
    close(out.stats["frac_zero_std"], 2 / 3)
    close(out.stats["aspect_mean"], scores.mean(0), atol=1e-12)
    close(out.stats["reward_mean"], out.reward.mean(), atol=1e-12)
    close(out.stats["reward_std"], out.reward.std(), atol=1e-12)


def test_a_missing_score_is_dropped_if_asked_for() -> None:
    scores = SCORES.clone()
    scores[1, 3] = math.nan
    weights = [0.4, 0.3, 0.2, 0.1]
    out = run(scores, weights, nan="drop")
    r = (SCORES * torch.tensor(weights, dtype=F64)).sum(1)
    r[1] = (0.4 * 0.4 + 0.3 * 0.6 + 0.2 * 0.5) / 0.9
    close(out.reward, r, atol=1e-12)
    close(out.advantages, prefkern.group_advantages(r, GROUP, eps=1e-4).advantages, atol=1e-12)
    close(out.stats["aspect_mean"][3], (0.1 + 0.4 + 0.8) / 3, atol=1e-12)
    decoupled = run(scores, weights, order="norm_then_sum", nan="drop").advantages
    z = [prefkern.group_advantages(SCORES[:, k], GROUP, eps=1e-4).advantages for k in range(3)]
    close(decoupled[1], (0.4 * z[0][1] + 0.3 * z[1][1] + 0.2 * z[2][1]) / 0.9, atol=1e-12)
    with pytest.raises(ValueError, match=r"scores\[1\]: the weights of the aspects it has sum to 0"):
        run(scores, [1.0, -1, 0, 1], nan="drop")


def test_a_wide_aspect_is_warned_about() -> None:
    scores = SCORES * torch.tensor([1, 1, 1, 20], dtype=F64)
    with pytest.warns(UserWarning, match="aspect 3 range over 16, ten times"):
        run(scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


@pytest.mark.parametrize("order", ["sum_then_norm", "norm_then_sum"])
def test_recipe(order) -> None:
    mask = torch.arange(4) < torch.tensor([[4], [1], [2], [3]])
    old = -torch.rand(4, 4, dtype=F64)
    logp = old + 0.3 * torch.randn(4, 4, dtype=F64)
    recipe = load_recipe("mo_grpo", order=order, weights=(0.5, 0.2, 0.2, 0.1))
    out = recipe.loss(logp, recipe.prepare(Rollout(SCORES, GROUP, mask, old)))
    a = run(weights=[0.5, 0.2, 0.2, 0.1], order=order).advantages
    assert_close(out.loss, prefkern.policy_loss(logp, old, a, mask).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(order="sum"), "order is 'sum'; accepted: 'sum_then_norm', 'norm_then_sum'"),
        (lambda: run(nan="zero"), "nan is 'zero'; accepted: 'error', 'drop'"),
        (lambda: run(weights=[1.0]), r"weights is \[1\]; \[4\] is expected"),
        (lambda: run(weights=[0.0] * 4), "at least one of them not 0"),
        (lambda: run(weights=[1.0, math.nan, 0, 0]), "finite numbers are expected"),
        (lambda: run(SCORES.clone().index_fill_(1, torch.tensor([2]), math.nan)), r"scores\[0, 2\] is nan"),
        (lambda: run(SCORES.clone().index_fill_(0, torch.tensor([3]), math.inf), nan="drop"), r"scores\[3, 0\] is inf"),
        (lambda: run(SCORES[None]), r"scores is \[1, 4, 4\]; \[N, K\] is expected"),
        (lambda: mo_grpo.multilabel_regression_loss(SCORES, SCORES, torch.zeros(4, 4)), "has no labels"),
        (lambda: mo_grpo.multilabel_regression_loss(SCORES, SCORES[:2]), r"pred is \[4, 4\]"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
