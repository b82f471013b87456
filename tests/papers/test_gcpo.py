"""GCPO against its worked numbers, its invariants and its edge cases."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, gcpo, load_recipe

F64 = torch.float64


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(acc, aux, group=None, **options):
    acc = torch.as_tensor(acc, dtype=F64)
    group = torch.zeros(len(acc), dtype=torch.int64) if group is None else group
    return gcpo.gcpo_rewards(acc, torch.as_tensor(aux), group, **options)


def advantages(rewards):
    return prefkern.group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.int64), eps=1e-4).advantages


def test_worked_numbers() -> None:
    options = {"lengths": torch.tensor([100, 300, 200, 600, 50, 0]), "w_aux": 0.5, "w_len": 0.1, "max_len": 400}
    rewards, mask, stats = run([1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0], **options)
    assert mask.tolist() == [1] * 6
    close(rewards, [1.525, 1.575, 0.55, 1.1, 0.0125, 0])
    close(advantages(rewards), [1.0260928250, 1.0962530181, -0.3420309417, 0.4297311831, -1.0962530181, -1.1137930664])
    assert {name: value.item() for name, value in stats.items()} == {"helps": 1, "hurts": 0, "one_armed": 0, "mismatch": 0}


def test_a_construction_that_hurts_is_punished() -> None:
    rewards, mask, stats = run([0, 0, 1, 1], [1, 1, 0, 0])
    assert mask.tolist() == [-1] * 4 and stats["hurts"] == 1
    close(rewards, [-1, -1, 1, 1])
    close(advantages(rewards), [-0.8659504103, -0.8659504103, 0.8659504103, 0.8659504103])


def test_without_a_difference_it_is_grpo() -> None:
    rewards, mask, _ = run([1] * 6, [1, 1, 1, 0, 0, 0])
    assert not mask.any() and rewards.tolist() == [1] * 6 and not advantages(rewards).any()
    rewards, mask, stats = run([1, 0, 1], [1, 1, 1])
    assert not mask.any() and rewards.tolist() == [1, 0, 1] and stats["one_armed"] == 1
    assert run([1, 0, 1], [0, 0, 0]).stats["one_armed"] == 1


def test_questions_are_apart_in_any_order() -> None:
    acc, aux = [1, 0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1, 1]
    group = torch.tensor([9, 4, 9, 4, 4, 2, 2])
    rewards, mask, stats = run(acc, aux, group)
    assert mask.tolist() == [1, -1, 1, -1, -1, 0, 0]
    close(rewards, [2, -1, 0, 1, 1, 1, 0])
    assert {name: value.item() for name, value in stats.items()} == {"helps": 1, "hurts": 1, "one_armed": 1, "mismatch": 0}


def test_the_tolerance_is_a_step() -> None:
    for n in (4, 5, 7, 10):
        aux = [1] * n + [0] * n
        for more in range(n + 1):
            acc = [1] * more + [0] * (2 * n - more)
            for tolerance in range(n):
                mask = run(acc, aux, eps=tolerance / n).mask_per_group
                assert mask.tolist() == [float(more > tolerance)] * (2 * n)
                single = gcpo.gcpo_rewards(torch.tensor(acc), torch.tensor(aux), torch.zeros(2 * n).long(), eps=tolerance / n)
                assert single.mask_per_group.tolist() == mask.tolist()
    assert run([1, 0, 0, 0] + [0] * 4, [1] * 4 + [0] * 4, eps=0.2).mask_per_group[0] == 1


def test_the_mask_is_a_noisy_sign() -> None:
    outcomes = torch.tensor(list(product([0.0, 1.0], repeat=8)), dtype=F64)
    group = torch.arange(256).repeat_interleave(8)
    mask = run(outcomes.reshape(-1), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).repeat(256), group).mask_per_group
    share = (mask != 0).double().mean()
    close(share, 1 - sum(math.comb(4, k) ** 2 for k in range(5)) / 2**8)
    close(share, 0.7265625)


rows = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 2)), min_size=1, max_size=12)


@given(rows=rows, eps=st.sampled_from([0.0, 0.2]))
def test_swapped_arms_flip_the_mask_and_a_constant_changes_nothing(rows, eps) -> None:
    acc, aux, group = (torch.tensor(column) for column in zip(*rows, strict=True))
    acc = acc.double()
    mask = gcpo.gcpo_rewards(acc, aux, group, eps=eps).mask_per_group
    assert torch.equal(gcpo.gcpo_rewards(acc, aux, group, arm=~aux, eps=eps).mask_per_group, -mask)
    assert torch.equal(gcpo.gcpo_rewards(acc + 4, aux, group, eps=eps).mask_per_group, mask)
    plain = gcpo.gcpo_rewards(acc, aux, group, w_aux=0.0)
    assert torch.equal(plain.rewards, acc)
    a = prefkern.group_advantages(gcpo.gcpo_rewards(acc, aux, group, eps=eps).rewards, group, eps=1e-4).advantages
    close(prefkern.group_reduce(a, group), torch.zeros(len(a)), atol=1e-12)


def test_the_label_of_the_arm_decides_the_mask_and_the_flag_the_reward() -> None:
    arm = torch.tensor([1, 1, 0, 0])
    rewards, mask, stats = run([1, 1, 0, 0], [1, 0, 1, 0], arm=arm)
    assert mask.tolist() == [1] * 4
    close(rewards, [2, 1, 1, 0])
    close(stats["mismatch"].double(), 0.5)


def test_weights() -> None:
    fmt = torch.tensor([1, 0, 1, 1])
    close(run([1, 1, 0, 0], [1, 1, 0, 0], fmt=fmt, w_fmt=0.25, w_acc=2.0, w_aux=0.5).rewards, [2.75, 2.5, 0.25, 0.25])


def test_accuracies_beyond_zero_and_one() -> None:
    rewards, mask, _ = run([3.5, -1, 0.5, 0.25], [1, 1, 0, 0])
    assert mask.tolist() == [1] * 4
    close(rewards, [4.5, 0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acc": [1, math.nan]}, r"acc\[1\] is nan; every accuracy must be finite"),
        ({"aux": vector(0, math.nan)}, r"has_aux\[1\] is nan; accepted are bool, or 0 and 1"),
        ({"aux": vector(0, 2)}, r"has_aux\[1\] is 2"),
        ({"arm": vector(0.5, 1)}, r"arm\[0\] is 0.5"),
        ({"eps": -0.1}, "eps is -0.1; it must not be negative"),
        ({"w_len": 0.1, "lengths": torch.ones(2)}, "max_len is None; w_len 0.1 needs a positive number"),
        ({"w_len": 0.1, "lengths": torch.ones(2), "max_len": 0}, "max_len is 0"),
        ({"w_len": 0.1, "max_len": 4}, "lengths is None; w_len 0.1 needs it"),
        ({"w_fmt": 0.1}, "fmt is None; w_fmt 0.1 needs it"),
        ({"fmt": torch.ones(3)}, r"fmt has shape \[3\]; \[2\] is expected"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**{"acc": [1, 0], "aux": [1, 0], **options})


def test_what_is_not_looked_at_comes_out_nan(monkeypatch) -> None:
    """As on CUDA without validation."""
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)
    group = torch.tensor([0, 0, 1, 1])
    rewards = run([1, math.nan, 1, 0], [1, 0, 1, 0], group).rewards
    assert rewards.isnan().tolist() == [True, True, False, False]
    assert run([1, 0, 1, 0], vector(1, 0, math.nan, 0), group).rewards.isnan().tolist() == [False, False, True, True]


def test_the_recipe_composes_it() -> None:
    acc, aux = vector(1, 1, 0, 1, 0, 0), torch.tensor([1, 1, 1, 0, 0, 0])
    mask = torch.arange(4) < torch.tensor([[1], [3], [2], [4], [1], [0]])
    old = -torch.rand(6, 4, dtype=F64)
    group = torch.zeros(6, dtype=torch.int64)
    recipe = load_recipe("gcpo:w_aux=0.5,w_len=0.1,max_len=4,eps_high=0.28")
    batch = recipe.prepare(Rollout(torch.full((6,), math.nan), group, mask, old, extra={"acc": acc, "has_aux": aux}))
    expected = run(acc, aux, lengths=mask.sum(1), w_aux=0.5, w_len=0.1, max_len=4).rewards
    close(batch["advantages"], advantages(expected))
    logp = old + 0.3
    options = {"eps_high": 0.28, "agg": "seq-mean-token-mean"}
    assert torch.equal(
        recipe.loss(logp, batch).loss, prefkern.policy_loss(logp, old, batch["advantages"], mask, **options).loss
    )
    arms = {"acc": acc, "has_aux": aux, "arm": 1 - aux, "fmt": aux}
    swapped = load_recipe("gcpo:w_fmt=2").prepare(Rollout(torch.zeros(6), group, mask, extra=arms))["advantages"]
    close(swapped, advantages(acc - aux + 2 * aux))
    with pytest.raises(ValueError, match=r"recipe 'gcpo' needs rollout\.extra\['has_aux'\]"):
        recipe.prepare(Rollout(torch.zeros(6), group, mask, extra={"acc": acc}))


def test_rewards_compile_without_a_break() -> None:
    acc, aux, group = vector(1, 0, 0, 1), torch.tensor([1, 1, 0, 0]), torch.zeros(4, dtype=torch.int64)
    compiled = torch.compile(lambda a: gcpo.gcpo_rewards(a, aux, group)[:2], fullgraph=True, backend="aot_eager")
    assert_close(compiled(acc), gcpo.gcpo_rewards(acc, aux, group)[:2], rtol=0, atol=0)
