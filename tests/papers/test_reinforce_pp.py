"""REINFORCE++: worked numbers, returns and whitening against loops, both variants."""

import pytest
import torch
from torch.testing import assert_close

from prefkern import batch_moments, batch_normalize, group_advantages, merge_moments, policy_loss
from prefkern.papers import Rollout, load_recipe, ppo, reinforce_pp

F64 = torch.float64
REWARDS = torch.tensor([1, 0, 0, 0, 1, 1, 0.5, 1], dtype=F64)
GROUP = torch.arange(8) // 4
LENGTHS = torch.tensor([3, 1, 2, 4, 2, 2, 4, 1])
MASK = torch.arange(4) < LENGTHS[:, None]


def whiten_by_hand(v, mask):
    n = mask.sum().double()
    mean = v[mask].sum() / (n + 1e-8)
    variance = (v[mask] - mean).square().sum() / (n + 1e-8) * n / (n - 1)
    return torch.where(mask, (v - mean) / torch.sqrt(variance + 1e-8), 0.0)


def test_worked_numbers_of_the_baseline() -> None:
    expected = [1.9663633481, *[-0.5882283520] * 3, 0.3697435355, 0.3697435355, -0.9075523146, 0.3697435355]
    a = reinforce_pp.baseline_advantages(REWARDS, GROUP, LENGTHS)
    assert_close(a, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-10)


def test_the_baseline_whitens_centred_rewards_over_tokens() -> None:
    centred = group_advantages(REWARDS, GROUP, estimator="dr_grpo").advantages
    tokens = whiten_by_hand(centred[:, None].expand(8, 4), MASK)
    a = reinforce_pp.baseline_advantages(REWARDS, GROUP, LENGTHS)
    assert_close(torch.where(MASK, a[:, None], 0.0), tokens, rtol=0, atol=1e-12)


def test_in_the_baseline_a_group_of_one_has_mean_0() -> None:
    r, group, lengths = torch.tensor([3.0, 1, 0], dtype=F64), torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])
    expected = whiten_by_hand(torch.tensor([[3.0], [0.5], [-0.5]], dtype=F64), torch.ones(3, 1, dtype=torch.bool))
    assert_close(reinforce_pp.baseline_advantages(r, group, lengths), expected[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_are_carried_over_tokens_that_do_not_count(gamma) -> None:
    mask = torch.rand(5, 7) < 0.6
    rewards = torch.randn(5, 7, dtype=F64)
    expected = torch.zeros_like(rewards)
    for i in range(5):
        carry = 0.0
        for t in reversed(range(7)):
            if mask[i, t]:
                expected[i, t] = carry = rewards[i, t] + gamma * carry
    assert_close(reinforce_pp.advantages(rewards, mask, gamma=gamma, whiten=False), expected, rtol=0, atol=1e-12)
    assert_close(reinforce_pp.advantages(rewards, mask, gamma=gamma), whiten_by_hand(expected, mask), rtol=0, atol=1e-12)
    packed = reinforce_pp.advantages(
        rewards.flatten(), mask.flatten(), gamma=gamma, cu_seqlens=torch.arange(6, dtype=torch.int32) * 7
    )
    assert_close(packed.view(5, 7), whiten_by_hand(expected, mask), rtol=0, atol=1e-12)


def test_without_discount_each_token_gets_its_completion_s_score() -> None:
    old = torch.zeros(8, 4, dtype=F64)
    rewards = ppo.token_rewards(REWARDS, old, MASK)
    returns = reinforce_pp.advantages(rewards, MASK, whiten=False)
    assert torch.equal(returns, torch.where(MASK, REWARDS[:, None], 0.0))


def test_ranks_that_merge_their_moments_equal_the_whole_batch() -> None:
    rewards = ppo.token_rewards(REWARDS, torch.zeros(8, 4, dtype=F64), MASK)
    halves = [slice(0, 4), slice(4, 8)]
    parts = [reinforce_pp.advantages(rewards[h], MASK[h], whiten=False) for h in halves]
    moments = merge_moments(torch.stack([batch_moments(p, MASK[h]) for p, h in zip(parts, halves, strict=True)]))
    whole = [batch_normalize(p, moments, mode="token", eps=1e-8, mask=MASK[h]) for p, h in zip(parts, halves, strict=True)]
    assert_close(torch.cat(whole), reinforce_pp.advantages(rewards, MASK), rtol=0, atol=1e-12)


def test_two_tokens_are_needed() -> None:
    with pytest.raises(ValueError):
        reinforce_pp.advantages(torch.ones(1, 1, dtype=F64))


@pytest.mark.parametrize(
    ("kl", "values", "gradients"),
    [
        ("k1", [0.2, -1, 0], [1, 1, 1]),
        ("k2", [0.02, 0.5, 0], [0.2, -1, 0]),
        ("k3", [0.0187307531, 0.7182818285, 0], [0.1812692469, -1.7182818285, 0]),
        ("k3+", [0.0187307531, 0.7182818285, 0], [0.2, -1, 0]),
    ],
)
def test_worked_kl_in_the_loss(kl, values, gradients) -> None:
    logp = torch.tensor([[-1.0, -2, -0.5]], dtype=F64, requires_grad=True)
    ref = torch.tensor([[-1.2, -1, -0.5]], dtype=F64)
    out = reinforce_pp.loss(logp, logp.detach(), torch.zeros(1, dtype=F64), ref_logp=ref, beta=1.0, kl=kl)
    out.loss.backward()
    assert_close(out.loss.detach(), torch.tensor(values, dtype=F64).mean(), rtol=0, atol=1e-10)
    assert_close(3 * logp.grad, torch.tensor([gradients], dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "baseline"])
def test_recipe(variant) -> None:
    old, ref = -torch.rand(8, 4, dtype=F64), -torch.rand(8, 4, dtype=F64)
    logp = (old + 0.3 * torch.randn(8, 4, dtype=F64)).requires_grad_()
    recipe = load_recipe("reinforce_pp", variant=variant, beta=0.1, gamma=0.9)
    out = recipe.loss(logp, recipe.prepare(Rollout(REWARDS, GROUP, MASK, old, ref)))
    if variant == "plain":
        rewards = ppo.token_rewards(REWARDS, old, MASK, ref_logp=ref, beta=0.1, kl="k1")
        expected = policy_loss(logp, old, reinforce_pp.advantages(rewards, MASK, gamma=0.9), MASK)
    else:
        a = reinforce_pp.baseline_advantages(REWARDS, GROUP, LENGTHS)
        expected = policy_loss(logp, old, a, MASK, ref_logp=ref, beta=0.1, kl="k2")
        again = reinforce_pp.loss(logp, old, a, MASK, ref_logp=ref, beta=0.1)
        assert torch.equal(again.loss, expected.loss)
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(out.loss, logp)[0], torch.autograd.grad(expected.loss, logp)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fast"}, "variant is 'fast'; accepted: 'plain', 'baseline'"),
        ({"gamma": 1.5}, "gamma"),
        ({"beta": 0.1}, "ref_logp is None; beta 0.1 needs"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        reinforce_pp.ReinforcePP(**options).prepare(Rollout(REWARDS, GROUP, MASK, torch.zeros(8, 4)))
