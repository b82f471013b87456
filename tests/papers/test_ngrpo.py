"""NGRPO against its worked numbers, its invariants and its edge cases."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import load_recipe, ngrpo

F64 = torch.float64


def advantages(rewards: list[float], **options) -> torch.Tensor:
    return ngrpo.ngrpo_advantages(torch.tensor(rewards, dtype=F64), torch.zeros(len(rewards), dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ([0, 0, 0, 0], {}, [-0.4472125955] * 4),
        ([0, 0, 0, 0], {"n_virtual": 2}, [-0.6454959744] * 4),
        ([1, 0, 0, 0], {}, [1.0954431150, -0.7302954100, -0.7302954100, -0.7302954100]),
        ([1, 1, 1, 0], {}, [0.4472125955, 0.4472125955, 0.4472125955, -1.7888503820]),
        ([1, 1, 1, 1], {}, [0, 0, 0, 0]),
    ],
)
def test_worked_numbers(rewards, options, expected) -> None:
    assert_close(advantages(rewards, **options), torch.tensor(expected, dtype=F64), rtol=0, atol=1e-10)


def test_worked_loss_and_gradient() -> None:
    logp = torch.tensor([[1.3], [0.8], [1.3], [0.8]], dtype=F64).log().requires_grad_()
    a = torch.tensor([1.0, 1, -1, -1], dtype=F64)
    loss, _ = ngrpo.ngrpo_loss(logp, torch.zeros_like(logp), a)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(0.025, dtype=F64), rtol=0, atol=1e-15)
    assert_close(logp.grad, torch.tensor([[0], [-0.2], [0.325], [0]], dtype=F64), rtol=0, atol=1e-15)


@given(rewards=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=12), n=st.integers(1, 4))
def test_the_missing_mass_sits_on_the_virtual_samples(rewards, n) -> None:
    a, r = advantages(rewards, n_virtual=n), torch.tensor(rewards, dtype=F64)
    everything = torch.cat([r, torch.ones(n, dtype=F64)])
    mean, std = everything.mean(), everything.std()
    assert_close(a, (r - mean) / (std + 1e-6), rtol=1e-9, atol=1e-12)
    assert_close(a.sum(), -(1 - mean) * n / (std + 1e-6), rtol=1e-9, atol=1e-12)


def test_without_virtual_samples_it_is_grpo() -> None:
    rewards, group = torch.rand(40), torch.randint(0, 7, (40,))
    ours = ngrpo.ngrpo_advantages(rewards, group, n_virtual=0)
    assert torch.equal(ours, prefkern.group_advantages(rewards, group, singleton="reward").advantages)


def test_a_group_of_one() -> None:
    raw = advantages([0.5], singleton="raw", eps=1.0)
    assert raw.tolist() == [0.25]
    assert advantages([0.5], singleton="zero").tolist() == [0]
    calibrated = advantages([0.5], singleton="calibrate", eps=0.0)
    assert_close(calibrated, torch.tensor([-0.25 / math.sqrt(0.125)], dtype=F64), rtol=1e-12, atol=0)


def test_equal_rewards_below_the_maximum_are_pushed_down() -> None:
    a = advantages([0.3] * 5)
    assert bool((a < 0).all() and a.isfinite().all())


def test_a_reward_above_the_maximum_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="above r_max 1"):
        advantages([0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advantages([0, 2.0], r_max=2.0)


def test_which_groups_are_kept() -> None:
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 0])
    group = torch.tensor([5, 5, -1, -1, 2, 2])
    assert ngrpo.keep_groups(rewards, group).tolist() == [False, False, True, True, True, True]
    assert ngrpo.keep_groups(rewards, group, "all_incorrect").tolist() == [True, True, False, False, True, True]
    assert ngrpo.keep_groups(rewards, group, "all").tolist() == [False, False, False, False, True, True]
    assert ngrpo.keep_groups(rewards * 0.9, group, correct=0.9).tolist() == [False, False, True, True, True, True]


def test_an_empty_mask_gives_zero() -> None:
    logp = torch.randn(2, 3, requires_grad=True)
    loss, _ = ngrpo.ngrpo_loss(logp, logp.detach(), torch.ones(2), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not logp.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_names_its_row(bad) -> None:
    with pytest.raises(ValueError, match=r"rewards\[2\]"):
        advantages([0, 1, bad, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantages([0, 1], singleton="mean"), "singleton is 'mean'; accepted: 'raw', 'zero', 'calibrate'"),
        (lambda: advantages([0, 1], n_virtual=-1), "virtual_count is -1"),
        (lambda: ngrpo.keep_groups(torch.ones(1), torch.zeros(1).long(), "none"), "strategy is 'none'; accepted"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_recipe_composes_both() -> None:
    rewards, group = torch.tensor([0.0, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
    mask = torch.arange(3) < torch.tensor([[3], [1], [2], [3]])
    old = -torch.rand(4, 3)
    logp = (old + 0.3 * torch.randn(4, 3)).requires_grad_()
    recipe = load_recipe("ngrpo", n_virtual=2)
    batch = recipe.prepare(prefkern.papers.Rollout(rewards, group, mask, old))
    loss, _ = recipe.loss(logp, batch)
    a = ngrpo.ngrpo_advantages(rewards, group, n_virtual=2)
    expected, _ = ngrpo.ngrpo_loss(logp, old, a, mask)
    assert torch.equal(loss, expected)
