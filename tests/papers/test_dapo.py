"""DAPO: the overlong punishment in both forms, dynamic sampling, the clip, the recipe."""

import pytest
import torch
from torch.testing import assert_close

from prefkern import policy_loss
from prefkern.papers import Rollout, dapo, load_recipe

F64 = torch.float64
LENGTHS = torch.tensor([70, 80, 85, 99, 120])


@pytest.mark.parametrize(("variant", "beyond"), [("trl", -1.0), ("verl", -2.0)])
def test_worked_overlong_punishment(variant, beyond) -> None:
    penalty = dapo.overlong_penalty(LENGTHS, max_length=100, cache=20, variant=variant)
    assert_close(penalty, torch.tensor([0, 0, -0.25, -0.95, beyond]))
    assert_close(dapo.overlong_penalty(LENGTHS, max_length=100, cache=20, factor=0.5, variant=variant), 0.5 * penalty)


@pytest.mark.parametrize("variant", ["trl", "verl"])
def test_without_a_cache_nothing_is_divided_by_it(variant) -> None:
    penalty = dapo.overlong_penalty(torch.tensor([99, 100, 101, 300]), max_length=100, cache=0, factor=2.0, variant=variant)
    assert penalty.tolist() == [0, 0, -2, -2]


def test_both_forms_agree_up_to_the_limit() -> None:
    lengths = torch.arange(0, 20481, 7)
    assert torch.equal(dapo.overlong_penalty(lengths), dapo.overlong_penalty(lengths, variant="verl"))


def test_groups_of_equal_rewards_are_dropped() -> None:
    rewards, group = torch.tensor([1.0, 0, 1, 1, 0.1, 0.1, 0.1, 3]), torch.tensor([8, 8, 2, 2, -1, -1, -1, 5])
    assert dapo.keep_groups(rewards, group).tolist() == [True, True, *[False] * 6]
    assert dapo.keep_groups(rewards, group, keep_singletons=True).tolist() == [True, True, *[False] * 5, True]


def test_worked_loss_and_gradient() -> None:
    ratios, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5, 4], dtype=F64), torch.tensor([1.0, 1, -1, -1, -1], dtype=F64)
    for dual, last in ((3.0, (3.0, 0.0)), (None, (4.0, 4.0))):
        logp = ratios.log()[None].requires_grad_()
        out = dapo.loss(logp, torch.zeros_like(logp), advantages[None], dual_clip=dual)
        out.loss.backward()
        assert_close(out.loss.detach(), torch.tensor([-1.28, -0.5, 1.5, 0.8, last[0]], dtype=F64).mean(), rtol=1e-12, atol=0)
        assert_close(logp.grad * 5, torch.tensor([[0, -0.5, 1.5, 0, last[1]]], dtype=F64), rtol=1e-12, atol=0)


def test_the_mean_is_over_all_tokens_wherever_they_are() -> None:
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    old = -torch.rand(3, 5, dtype=F64)
    logp, a = old + 0.1 * torch.randn(3, 5, dtype=F64), torch.randn(3, dtype=F64)
    whole = dapo.loss(logp, old, a, mask).loss
    parts = [dapo.loss(logp[i : i + 1], old[i : i + 1], a[i : i + 1], mask[i : i + 1], norm=9.0).loss for i in range(3)]
    assert_close(sum(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dynamic", [True, False])
def test_recipe(packed, dynamic) -> None:
    rewards, group = torch.tensor([1.0, 0, 1, 1], dtype=F64), torch.tensor([3, 3, 1, 1])
    mask = torch.arange(6) < torch.tensor([[6], [2], [5], [4]])
    old = -torch.rand(4, 6, dtype=F64)
    logp = old + 0.3 * torch.randn(4, 6, dtype=F64)
    recipe = load_recipe("dapo", max_length=6, cache=2, dynamic_sampling=dynamic)
    punished = rewards + dapo.overlong_penalty(mask.sum(1), max_length=6, cache=2)
    a = dapo.advantages(punished, group).advantages
    kept = mask & (torch.tensor([True, True, not dynamic, not dynamic])[:, None])
    expected = policy_loss(logp, old, a, kept, eps_high=0.28)
    if packed:
        rollout = Rollout(rewards, group, mask.flatten(), old.flatten(), cu_seqlens=torch.arange(5, dtype=torch.int32) * 6)
        out = recipe.loss(logp.flatten(), recipe.prepare(rollout))
    else:
        out = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, mask, old)))
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    assert out.metrics["tokens"] == kept.sum()


def test_recipe_without_a_mask() -> None:
    rewards, group, old = torch.tensor([1.0, 0, 1, 1]), torch.tensor([3, 3, 1, 1]), -torch.rand(4, 6)
    batch = load_recipe("dapo").prepare(Rollout(rewards, group, old_logp=old))
    assert batch["mask"].sum(1).tolist() == [6, 6, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dapo.overlong_penalty(LENGTHS, max_length=10, cache=11), "cache is 11; accepted: from 0 to max_length, 10"),
        (lambda: dapo.overlong_penalty(LENGTHS, cache=-1), "cache is -1"),
        (lambda: dapo.overlong_penalty(LENGTHS, variant="hard"), "variant is 'hard'; accepted: 'trl', 'verl'"),
        (lambda: dapo.recipe.advantages(Rollout(torch.ones(2, 2), torch.arange(2))), r"rewards is \[2, 2\]; recipe 'dapo'"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
