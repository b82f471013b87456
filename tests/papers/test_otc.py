"""OTC against its worked numbers, its invariants and its edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, load_recipe, otc

F64 = torch.float64
INF = math.inf


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


CALLS, CORRECT = torch.tensor([1, 3, 2, 0]), torch.tensor([True, True, False, False])
ONE = torch.zeros(4, dtype=torch.int64)


def test_worked_coefficients() -> None:
    ppo = otc.otc_coefficient(vector(0, 1, 2, 3, 10), c=5)
    close(ppo, [1, 0.9009688679, 0.7660444431, 0.6548607339, 0.3090169944])
    m = vector(0, 1, 2, 3, 4, 8)
    close(otc.otc_coefficient(m, c=5, n=2), [0, 0.8660254038, 1, 0.9510565163, 0.8660254038, 0.5877852523])
    close(otc.otc_coefficient(vector(0, 1, 2), c=5, n=0), [1, 0.9009688679, 0.7660444431])


def test_worked_rewards() -> None:
    rewards, coef, n = otc.otc_rewards(CALLS, CORRECT, CORRECT.double(), ONE, c=5)
    close(n, [1, 1, 1, 1])
    close(coef, [1, 0.7071067812, 0.8660254038, 0])
    close(rewards, [1, 0.7071067812, 0, 0])


@given(m=st.integers(0, 200), n=st.integers(0, 200), c=st.sampled_from([0.5, 3.0, 20.0]))
def test_the_coefficient_is_that_of_the_equations(m, n, c) -> None:
    ours = otc.otc_coefficient(vector(m), c=c, n=n).item()
    f = 0 if m == n == 0 else m if n == 0 else 2 * m * n / (m + n)
    expected = (1 if m == 0 else math.cos(m * math.pi / (2 * m + c))) if n == 0 else math.sin(f * math.pi / (2 * n))
    assert abs(ours - expected) < 1e-12 and 0 <= ours <= 1
    assert abs(otc.otc_coefficient(vector(m), c=c).item() - math.cos(m * math.pi / (2 * m + c))) < 1e-12
    if m > 0 and n > 0:
        assert ours == otc.otc_coefficient(vector(n), c=c, n=m).item()  # m/n and n/m


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_coefficient_stays_in_zero_and_one(dtype) -> None:
    m = torch.cat([torch.arange(1000), 10 ** torch.arange(3, 12)]).to(dtype)
    for n in (None, 0, 1, 7, 10**9):
        coef = otc.otc_coefficient(m, c=0.01, n=n)
        assert coef.dtype == dtype and bool(((coef >= 0) & (coef <= 1)).all())
    assert bool((otc.otc_coefficient(m[:50], c=3, n=7)[8:].diff() < 0).all())  # falls beyond n
    assert bool((otc.otc_coefficient(m[:50], c=3).diff() < 0).all())
    assert bool((otc.otc_coefficient(m[1:50], c=4) > otc.otc_coefficient(m[1:50], c=3)).all())
    assert bool((otc.otc_coefficient(m[1:], c=1, n=m[1:]) == 1).all())  # exactly, where m = n


def test_integers_give_float32() -> None:
    assert otc.otc_coefficient(CALLS, c=5).dtype == torch.float32
    assert otc.otc_rewards(CALLS, CORRECT, CORRECT, ONE, c=5).rewards.dtype == torch.float32


def test_groups_in_any_order() -> None:
    m = torch.tensor([4, 2, 0, 3, 1, 5])
    correct = torch.tensor([True, True, False, True, False, False])
    group = torch.tensor([7, -1, 7, 7, -1, 3])
    rewards, coef, n = otc.otc_rewards(m, correct, vector(1, 1, 0.5, 1, 0, 0.5), group, c=5, alpha=2.0)
    assert n.tolist() == [3, 2, 3, 3, 2, INF]
    ppo = math.cos(5 * math.pi / 15)  # nothing is known of the last question
    sharp = [math.sin(math.pi * 4 / 7), 1, 0, 1, math.sin(math.pi / 3), ppo]
    close(coef, sharp)
    close(rewards, [2 * a * b for a, b in zip(sharp, (1, 1, 0.5, 1, 0, 0.5), strict=True)])
    smooth = otc.otc_rewards(m, correct, vector(1, 1, 0, 1, 0, 0), group, c=5, variant="ppo").coef
    close(smooth, [math.cos(x * math.pi / (2 * x + 5)) for x in m.tolist()])


def test_all_wrong_is_no_signal() -> None:
    wrong = torch.zeros(4, dtype=torch.bool)
    rewards = otc.otc_rewards(CALLS, wrong, vector(0, 0, 0, 0), ONE, c=5).rewards
    assert not prefkern.group_advantages(rewards, ONE).advantages.any()


def test_penalties_are_scaled_unless_told_otherwise() -> None:
    r = vector(1, -1, -0.5, 0)
    coef = otc.otc_rewards(CALLS, CORRECT, r, ONE, c=5).coef
    close(otc.otc_rewards(CALLS, CORRECT, r, ONE, c=5, alpha=0.5).rewards, coef * r / 2)
    close(otc.otc_rewards(CALLS, CORRECT, r, ONE, c=5, alpha=0.5, apply_to="positive").rewards, [0.5, -1, -0.5, 0])


def test_nan_rewards_stay() -> None:
    rewards = otc.otc_rewards(CALLS, CORRECT, vector(1, math.nan, 0, 0), ONE, c=5).rewards
    assert rewards.isnan().tolist() == [False, True, False, False]


def test_history_keeps_the_minimum_of_every_question() -> None:
    history = otc.ToolCallHistory()

    def step(m, correct, question):
        m, correct, question = torch.tensor(m), torch.tensor(correct, dtype=torch.bool), torch.tensor(question)
        return otc.otc_rewards(m, correct, correct.double(), question, c=5, history=history)

    assert step([3, 4, 2], [1, 1, 0], [70, 70, 70]).n_per_group.tolist() == [3, 3, 3]
    assert step([5, 9], [1, 0], [70, -4]).n_per_group.tolist() == [3, INF]  # from the step before; never answered
    assert step([1, 6], [1, 1], [70, -4]).n_per_group.tolist() == [1, 6]  # this step's own counts
    assert len(history) == 2 and history.get(70) == 1 and history.get(-4) == 6 and history.get(0) == INF
    state = history.state_dict()
    assert {key: (value.dtype, value.tolist()) for key, value in state.items()} == {
        "question": (torch.int64, [70, -4]), "calls": (torch.int64, [1, 6]),
    }  # fmt: skip
    fresh = otc.ToolCallHistory()
    fresh.update(torch.tensor([8]), vector(2))
    fresh.load_state_dict(state)
    assert len(fresh) == 2 and fresh.get(70) == 1 and fresh.get(8) == INF
    assert fresh.update(torch.tensor([70, 3]), vector(4, INF)).tolist() == [1, INF] and len(fresh) == 2


def test_history_goes_by_question_not_by_group() -> None:
    history = otc.ToolCallHistory()
    question = torch.tensor([11, 11, 12, 12])
    for group in (torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])):
        n = otc.otc_rewards(CALLS, ~CORRECT | CORRECT, CORRECT.double(), group, c=5, history=history, question=question)
        assert n.n_per_group.tolist() == [1, 1, 0, 0]
    assert history.get(11) == 1 and history.get(12) == 0


def test_a_stale_minimum_of_calls_gives_nothing_for_fewer() -> None:
    close(otc.otc_coefficient(vector(0), c=5, n=vector(3)), [0])


@pytest.mark.parametrize(
    ("correct", "m", "expected"),
    [([1, 0, 1], [2, 1, 1], 0.5), ([0, 0], [3, 0], 0), ([1, 0], [0, 0], INF), ([0, 0], [0, 0], 0), ([1, 1], [1, 0], 2)],
)
def test_tool_productivity(correct, m, expected) -> None:
    result = otc.tool_productivity(torch.tensor(correct, dtype=torch.bool), torch.tensor(m))
    assert result.dim() == 0 and result.item() == expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: otc.otc_coefficient(CALLS, c=0), ValueError, "c is 0; it must be positive"),
        (lambda: otc.otc_coefficient(CALLS, c=-1.0), ValueError, "c is -1.0"),
        (lambda: otc.otc_coefficient(-CALLS, c=1), ValueError, r"m\[0\] is -1; a number of calls is expected"),
        (lambda: otc.otc_coefficient(CALLS / 2, c=1), ValueError, r"m\[0\] is 0.5"),
        (lambda: otc.otc_coefficient(vector(1, INF), c=1), ValueError, r"m\[1\] is inf"),
        (lambda: otc.otc_coefficient(CALLS, c=1, n=-1), ValueError, r"n\[0\] is -1.0; a number of calls, or inf"),
        (lambda: otc.otc_rewards(CALLS, CORRECT.int(), CALLS, ONE, c=1), TypeError, "correct is torch.int32; torch.bool"),
        (lambda: otc.otc_rewards(CALLS - 1, CORRECT, CALLS, ONE, c=1), ValueError, r"m\[3\] is -1"),
        (lambda: otc.otc_rewards(CALLS, CORRECT, CALLS[:2], ONE, c=1), ValueError, r"base_reward has shape \[2\]; \[4\]"),
        (lambda: otc.otc_rewards(CALLS, CORRECT, CALLS, ONE, c=1, variant="trpo"), ValueError, "variant is 'trpo'"),
        (lambda: otc.otc_rewards(CALLS, CORRECT, CALLS, ONE, c=1, apply_to="right"), ValueError, "apply_to is 'right'"),
    ],
)
def test_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_what_is_not_looked_at_comes_out_nan(monkeypatch) -> None:
    """As on CUDA without validation."""
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)
    assert otc.otc_coefficient(vector(1, -1, 0.5), c=5).isnan().tolist() == [False, True, True]
    assert otc.otc_coefficient(vector(1, 1), c=5, n=vector(math.nan, 2)).isnan().tolist() == [True, False]


def test_the_recipe_composes_it() -> None:
    history = otc.ToolCallHistory()
    mask = torch.arange(3) < torch.tensor([[3], [1], [2], [3]])
    old = -torch.rand(4, 3, dtype=F64)
    extra = {"tool_calls": CALLS, "correct": CORRECT, "question": ONE + 42}
    rollout = Rollout(CORRECT.double(), ONE, mask, old, extra=extra)
    recipe = load_recipe("otc:c=5,agg=token-mean", history=history)
    batch = recipe.prepare(rollout)
    rewards = vector(1, math.sqrt(0.5), 0, 0)
    assert_close(batch["advantages"], prefkern.group_advantages(rewards, ONE).advantages)
    assert history.get(42) == 1
    logp = old + 0.3
    assert torch.equal(recipe.loss(logp, batch).loss, prefkern.policy_loss(logp, old, batch["advantages"], mask).loss)
    ppo = load_recipe("otc:c=5,variant=ppo,eps=0.1").prepare(Rollout(CORRECT.double(), ONE, mask, old, extra=extra))
    smooth = CORRECT * otc.otc_coefficient(CALLS.double(), c=5)
    assert_close(ppo["advantages"], prefkern.group_advantages(smooth, ONE, eps=0.1).advantages)
    with pytest.raises(ValueError, match="c is None; recipe 'otc' needs a positive number"):
        load_recipe("otc").prepare(rollout)
    with pytest.raises(ValueError, match=r"recipe 'otc' needs rollout\.extra\['correct'\]"):
        recipe.prepare(Rollout(CORRECT.double(), ONE, mask, old, extra={"tool_calls": CALLS}))


def test_rewards_compile_without_a_break() -> None:
    def rewards(m):
        return tuple(otc.otc_rewards(m, CORRECT, CORRECT.double(), ONE, c=5))

    assert_close(torch.compile(rewards, fullgraph=True, backend="aot_eager")(CALLS), rewards(CALLS), rtol=0, atol=1e-15)
