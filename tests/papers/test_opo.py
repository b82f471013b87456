"""OPO: worked advantages, their sum over tokens, the recipe."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import policy_loss
from prefkern.papers import Rollout, load_recipe, opo

F64 = torch.float64
REWARDS = torch.tensor([1, 0, 0, 0, 1, 1, 0.5, 1], dtype=F64)
GROUP = torch.arange(8) // 4
LENGTHS = torch.tensor([3, 1, 2, 4, 2, 2, 4, 1])
EXPECTED = torch.tensor([0.7, -0.3, -0.3, -0.3, *[0.2222222222] * 2, -0.2777777778, 0.2222222222], dtype=F64)


def test_worked_numbers() -> None:
    assert_close(opo.advantages(REWARDS, GROUP, LENGTHS).advantages, EXPECTED, rtol=0, atol=1e-10)


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 50)), min_size=2, max_size=10))
def test_advantages_cancel_over_tokens(rows) -> None:
    r, n = torch.tensor([x for x, _ in rows], dtype=F64), torch.tensor([x for _, x in rows])
    a = opo.advantages(r, torch.zeros(len(r), dtype=torch.int64), n).advantages
    assert abs(float((n * a).sum())) < 1e-10


def test_groups_of_one_and_constant_groups() -> None:
    r, group = torch.tensor([2.0, 0.1, 0.1, 0.1], dtype=F64), torch.tensor([4, 1, 1, 1])
    n = torch.tensor([5, 1, 2, 3])
    assert opo.advantages(r, group, n).advantages.tolist() == [2, 0, 0, 0]
    assert opo.advantages(r, group, n, singleton="zero").advantages.tolist() == [0, 0, 0, 0]


def test_equal_lengths_make_it_centred() -> None:
    r = torch.rand(6, dtype=F64)
    a = opo.advantages(r, torch.zeros(6, dtype=torch.int64), torch.full((6,), 9)).advantages
    assert_close(a, r - r.mean(), rtol=0, atol=1e-12)


def test_recipe_counts_tokens() -> None:
    mask = torch.arange(4) < LENGTHS[:, None]
    logp = torch.randn(8, 4, dtype=F64, requires_grad=True)
    batch = load_recipe("opo").prepare(Rollout(REWARDS, GROUP, mask))
    assert_close(batch["advantages"], EXPECTED, rtol=0, atol=1e-10)
    out = load_recipe("opo").loss(logp, batch)
    out.loss.backward()
    assert_close(logp.grad, torch.where(mask, -EXPECTED[:, None] / LENGTHS.sum(), 0.0), rtol=0, atol=1e-10)
    assert abs(float(logp.grad.sum())) < 1e-12
    old = logp.detach() + 0.3
    expected = policy_loss(logp, old, batch["advantages"], mask).loss
    assert torch.equal(opo.loss(logp, old, batch["advantages"], mask).loss, expected)


def test_lengths_are_needed() -> None:
    with pytest.raises(ValueError, match=r"rollout.mask is None"):
        load_recipe("opo").prepare(Rollout(REWARDS, GROUP))
    with pytest.raises(ValueError, match="lengths"):
        opo.advantages(REWARDS, GROUP, LENGTHS[:3])
