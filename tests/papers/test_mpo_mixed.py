"""Mixed Preference Optimization: both stages' worked numbers, selections, edge cases."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.data import split_by_reward_gap
from prefkern.papers import mpo_mixed, ppo

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


LOGPS = [vector(-12, -9), vector(-11, -10), vector(-12.5, -9), vector(-11.5, -9.5)]


def run(*logps, **options):
    logps = [logp.clone().requires_grad_() for logp in logps]
    loss, metrics = mpo_mixed.mpo_dpo_loss(*logps, **options)
    return loss.detach(), metrics, *torch.autograd.grad(loss, logps, allow_unused=True)


# ---- stage 1


def test_worked_stage_one() -> None:
    loss, _, chosen, rejected, *references = run(*LOGPS)
    assert_close(loss, vector(0.6808034143)[0], rtol=0, atol=1e-10)
    assert_close(chosen, vector(-0.025, -0.02437513018), rtol=0, atol=1e-11)
    assert rejected.equal(-chosen) and references == [None, None]


def test_only_easy_pairs_count() -> None:
    loss, metrics, chosen, _, *_ = run(*LOGPS, easy=flags(0, 1))
    alone = run(*(logp[1:] for logp in LOGPS))
    assert loss == alone[0] and chosen.tolist() == [0, alone[2].item()] and metrics["pairs"] == 1
    nan = [logp.clone() for logp in LOGPS]
    nan[0][0] = math.nan
    assert run(*nan, easy=flags(0, 1))[0] == loss


def test_noisy_pairs_can_be_trained_the_other_way_round() -> None:
    loss, metrics, chosen, *_ = run(*LOGPS, easy=flags(1, 0), swapped=flags(0, 1))
    exchanged = [torch.stack([LOGPS[i][0], LOGPS[j][1]]) for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))]
    expected = run(*exchanged)
    assert_close(loss, expected[0], rtol=1e-14, atol=0)
    assert_close(chosen, torch.stack([expected[2][0], expected[3][1]]), rtol=1e-14, atol=0)
    assert metrics["pairs"] == 2
    with pytest.raises(ValueError, match=r"easy\[0\] is True; a pair is easy or swapped, not both"):
        run(*LOGPS, easy=flags(1, 0), swapped=flags(1, 1))
    with pytest.raises(ValueError, match=r"easy has shape \[1\]; \[2\] is expected"):
        run(*LOGPS, easy=flags(1))


def test_without_easy_pairs_nothing_moves() -> None:
    with pytest.warns(UserWarning, match="no pair is easy: stage 1 leaves the policy as it is"):
        loss, _, chosen, rejected, *_ = run(*LOGPS, easy=flags(0, 0))
    assert loss == 0 and not chosen.any() and not rejected.any()


def test_thresholds_at_the_ends() -> None:
    rewards = [2.1, 0.3, -1.5, 0.9, 4], [0.2, 0.1, 0.4, 0.8, 0.5]
    nothing = split_by_reward_gap(*rewards, gamma=math.inf)
    assert not nothing.easy.any() and nothing.hard.all()  # PPO from SFT
    everything = split_by_reward_gap(*rewards, gamma=0.05)
    assert everything.easy.all()  # DPO
    assert mpo_mixed.split_by_reward_gap is split_by_reward_gap


def test_prompts_of_hard_pairs_once_each() -> None:
    prompts = ["a", "b", "a", "c", "b"]
    assert mpo_mixed.hard_prompts(flags(1, 0, 1, 1, 1), prompts) == ["a", "c", "b"]  # "b" is in both sets
    with pytest.warns(UserWarning, match="no pair is hard: stop after stage 1"):
        assert mpo_mixed.hard_prompts([False], ["a"]) == []
    with pytest.raises(ValueError, match="prompts has 1 entries; 2 are expected"):
        mpo_mixed.hard_prompts([True, False], ["a"])


# ---- stage 2


def test_worked_rewards() -> None:
    old, dpo, mask = vector(-1, -2, -0.5)[None], vector(-1.2, -1.5, -0.5)[None], flags(1, 1, 0)[None]
    rewards = mpo_mixed.kl_shaped_rewards(old, dpo, mask, vector(0.8), beta=0.05)
    assert_close(rewards, vector(-0.01, 0.825, 0)[None], rtol=0, atol=1e-15)
    assert_close(rewards.sum(), vector(0.815)[0], rtol=0, atol=1e-15)
    assert rewards.equal(ppo.token_rewards(vector(0.8), old, mask, ref_logp=dpo, beta=0.05))


@given(st.integers(0, 10_000), st.floats(0, 2))
def test_rewards_sum_to_the_regularised_score(seed, beta) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, ref = torch.randn(2, 4, 5, dtype=F64, generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    mask[:, 2] = True
    scores = torch.randn(4, dtype=F64, generator=generator)
    rewards = mpo_mixed.kl_shaped_rewards(old.where(mask, math.nan), ref, mask, scores, beta=beta)
    expected = scores - beta * torch.where(mask, old - ref, 0.0).sum(1)
    assert_close(rewards.sum(1), expected, rtol=0, atol=1e-12)
    assert not rewards[~mask].any()
    start = mpo_mixed.kl_shaped_rewards(ref, ref, mask, scores, beta=beta)
    assert start.sum(1).equal(scores)  # at the start of stage 2 there is no KL
    lengths = mask.sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed = mpo_mixed.kl_shaped_rewards(old[mask], ref[mask], None, scores, beta=beta, cu_seqlens=cu)
    assert packed.equal(rewards[mask])


def test_short_completions() -> None:
    old, ref = vector(-1, -2)[:, None], vector(-1.5, -2)[:, None]
    with pytest.warns(UserWarning, match="completion 1 has no token that counts: its score is dropped"):
        rewards = mpo_mixed.kl_shaped_rewards(old, ref, flags(1, 0)[:, None], vector(0.8, 3), beta=0.1)
    assert_close(rewards, vector(0.75, 0)[:, None], rtol=0, atol=1e-15)  # one token carries both terms
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient = old.clone().requires_grad_()
        assert not mpo_mixed.kl_shaped_rewards(gradient, ref, None, vector(0.8, 3), beta=0.1).requires_grad
    with pytest.raises(ValueError, match=r"beta is -0.1; it must not be negative"):
        mpo_mixed.kl_shaped_rewards(old, ref, None, vector(0.8, 3), beta=-0.1)
    with pytest.raises(ValueError, match=r"rewards has shape \[1\]; \[2\] is expected"):
        mpo_mixed.kl_shaped_rewards(old, ref, None, vector(0.8), beta=0.1)
