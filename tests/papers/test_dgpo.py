"""DGPO against its worked numbers, its invariants, several ranks and its edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, dgpo, load_recipe

F64 = torch.float64
REWARDS = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0], dtype=F64)
GROUP = torch.arange(12) // 4
LENGTHS = torch.tensor([10, 20, 30, 40, *[10] * 4, *[5] * 4])
PLAIN = [1.9998666756, *[-0.6666222252] * 3, *[0.6666222252] * 3, -1.9998666756, 0, 0, 0, 0]


def close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def plain(rewards, group=None, **options):
    rewards = torch.as_tensor(rewards, dtype=F64)
    group = torch.zeros(len(rewards), dtype=torch.int64) if group is None else group
    return dgpo.dgpo_advantages(rewards, None, group, dqw=False, token_rescale=False, **options)


def test_worked_numbers() -> None:
    close(plain(REWARDS, GROUP), PLAIN)
    final = [2.5697783998, *[-0.8565927999] * 3, *[0.6671151434] * 3, -2.0013454301, 0, 0, 0, 0]
    close(dgpo.dgpo_advantages(REWARDS, LENGTHS, GROUP), final)
    weights = torch.tensor([1.1243530018, 0.8756469982, 1], dtype=F64).repeat_interleave(4)
    weighted = dgpo.dgpo_advantages(REWARDS, None, GROUP, token_rescale=False)
    close(weighted, torch.tensor(PLAIN, dtype=F64) * weights, atol=1e-9)
    close(dgpo.dgpo_advantages(REWARDS, LENGTHS, GROUP, dqw=False), torch.tensor(PLAIN, dtype=F64) * 160 / 140)


def test_worked_mean_absolute_deviation() -> None:
    close(plain([0.2, 0.7, 0.9, 0.2]), [-0.9999166736, 0.6666111157, 1.3332222315, -0.9999166736])


def test_without_scale_it_is_centred() -> None:
    close(plain([0.2, 0.7, 0.9, 0.2], scale=False), [-0.3, 0.2, 0.4, -0.3])


@pytest.mark.parametrize(("as_easy", "expected"), [(True, [0.8756469982, 1.1243530018]), (False, [1.1243530018, 0.8756469982])])
def test_accuracy_0_counts_as_easiest_in_the_release(as_easy, expected) -> None:
    main = torch.tensor([0.0, 0, 1, 0], dtype=F64)
    other = torch.tensor([1.0, 0, 0, 0], dtype=F64)  # makes the first question valid
    rewards, group = torch.stack([main, other], 1), torch.tensor([0, 0, 1, 1])
    a = dgpo.dgpo_advantages(rewards, None, group, token_rescale=False, zero_accuracy_as_easy=as_easy)
    unweighted = plain(rewards.sum(1), group)
    close((a / unweighted)[[0, 2]], expected)
    again = dgpo.dgpo_advantages(
        rewards.sum(1), None, group, main_rewards=main, token_rescale=False, zero_accuracy_as_easy=as_easy
    )
    assert torch.equal(again, a)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, 2.0]), min_size=2, max_size=12))
def test_every_mixed_group_is_updated_by_its_size(rewards) -> None:
    a, r = plain(rewards), torch.tensor(rewards, dtype=F64)
    deviation = float((r - r.mean()).abs().sum())
    if r.max() == r.min():
        assert not a.any()
        return
    assert abs(float(a.sum())) < 1e-10
    close(a.abs().sum(), len(r) / (1 + 1e-4 / deviation))
    grpo = prefkern.group_advantages(r, torch.zeros(len(r), dtype=torch.int64), eps=0.0).advantages
    close(a / (len(r) / (deviation + 1e-4)), grpo * r.std())


def test_scale_of_the_rewards_does_not_matter() -> None:
    close(plain([0.0, 3, 1], eps=0.0), plain([0.0, 30, 10], eps=0.0))


def test_weights_sum_to_the_number_of_valid_questions_and_flatten_with_temperature() -> None:
    rewards = torch.tensor([float(i < k) for k in range(9) for i in range(8)], dtype=F64)
    group = torch.arange(72) // 8
    weights = dgpo.dgpo_advantages(rewards, None, group, token_rescale=False) / plain(rewards, group)
    valid = weights[weights.isfinite()].view(-1, 8)[:, 0]
    close(valid.sum(), 7.0)
    assert bool((valid.diff() < 0).all()) and float(valid.max() / valid.min()) < math.exp(0.5)
    flat = dgpo.dgpo_advantages(rewards, None, group, token_rescale=False, temperature=1e9)
    close(flat, plain(rewards, group), atol=1e-8)


def test_all_groups_constant() -> None:
    for rewards in (torch.ones(8), torch.full((8,), 0.1)):
        assert dgpo.dgpo_advantages(rewards, torch.full((8,), 3), torch.arange(8) // 4).tolist() == [0] * 8


def test_one_valid_question_has_weight_1() -> None:
    a = dgpo.dgpo_advantages(REWARDS[:4], None, GROUP[:4], token_rescale=False)
    close(a, PLAIN[:4])


def test_a_group_of_one_and_groups_of_unequal_size() -> None:
    a = plain([1.0, 0, 0, 1, 0], torch.tensor([5, 5, 5, 2, 9]))
    d = torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=F64)
    close(a, [*(3 * d / (d.abs().sum() + 1e-4)).tolist(), 0, 0])


def test_rewards_that_are_missing_are_left_out_of_the_sum() -> None:
    rewards = torch.tensor([[1, math.nan], [0, 2], [0, 0], [1, 1]], dtype=F64)
    group = torch.zeros(4, dtype=torch.int64)
    close(
        dgpo.dgpo_advantages(rewards, None, group, weights=(1.0, 0.5), token_rescale=False),
        plain([1.0, 1, 0, 1.5]),
    )
    rewards[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"main_rewards\[2\] is nan"):
        dgpo.dgpo_advantages(rewards, None, group, token_rescale=False)


def test_ranks_that_use_global_weights_and_norm_equal_one() -> None:
    mask = torch.arange(6) < torch.randint(1, 7, (8, 1))
    rewards, group = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0], dtype=F64), torch.arange(8) // 4
    a = dgpo.dgpo_advantages(rewards, mask.sum(1), group)
    old = -torch.rand(8, 6, dtype=F64)
    logp = old + 0.3 * torch.randn(8, 6, dtype=F64)
    whole = prefkern.policy_loss(logp, old, a, mask).loss
    total = float(mask.sum())
    by_norm, by_balance = 0.0, 0.0
    for h in (slice(0, 4), slice(4, 8)):
        by_norm += prefkern.policy_loss(logp[h], old[h], a[h], mask[h], norm=total / 2).loss / 2
        balance = 2 * int(mask[h].sum()) / total
        by_balance += prefkern.policy_loss(logp[h], old[h], a[h] * balance, mask[h]).loss / 2
    close(by_norm, whole, 1e-12)
    close(by_balance, whole, 1e-12)


@pytest.mark.parametrize("gpg", [False, True])
def test_recipe(gpg) -> None:
    mask = torch.arange(40) < LENGTHS[:, None]
    old = -torch.rand(12, 40, dtype=F64)
    logp = old + 0.3 * torch.randn(12, 40, dtype=F64)
    main = torch.tensor([1.0, 0, 0, 0] * 3, dtype=F64)
    rewards = torch.stack([REWARDS, main], 1)
    recipe = load_recipe("dgpo", gpg=gpg, weights=(1.0, 0.5))
    out = recipe.loss(logp, recipe.prepare(Rollout(rewards, GROUP, mask, old, extra={"main_rewards": main})))
    a = dgpo.dgpo_advantages(rewards, LENGTHS, GROUP, main_rewards=main, weights=(1.0, 0.5))
    expected = prefkern.policy_loss(logp, old, a, mask, kind="reinforce" if gpg else "clip")
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dgpo.dgpo_advantages(REWARDS, None, GROUP), "lengths is None"),
        (lambda: dgpo.dgpo_advantages(REWARDS, LENGTHS, GROUP, temperature=0.0), "temperature"),
        (lambda: dgpo.dgpo_advantages(REWARDS, torch.zeros_like(LENGTHS), GROUP), "lengths"),
        (
            lambda: dgpo.dgpo_advantages(REWARDS[:, None], LENGTHS, GROUP, weights=(1.0, 2.0)),
            r"weights is \[2\]; \[1\] is expected",
        ),
        (lambda: plain(REWARDS, GROUP, eps=-1.0), "eps"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
