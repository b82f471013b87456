"""GDPO against its worked numbers, its invariants and its edge cases."""

import math

import pytest
import torch
from torch.testing import assert_close

from prefkern import batch_moments, batch_normalize, merge_moments
from prefkern.papers import gdpo

NAN = math.nan
REWARDS = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1], [1, 0], [1, 0], [0, 0], [1, 1]], dtype=torch.float64)
GROUP = torch.arange(8) // 4
LENGTHS = torch.tensor([3, 1, 2, 3, 2, 3, 1, 3])
MASK = torch.arange(3) < LENGTHS[:, None]


def close(actual: torch.Tensor, expected: list[float], atol: float = 1e-10) -> None:
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def test_over_sequences() -> None:
    close(gdpo.gdpo_advantages(REWARDS, GROUP), [0, 0, -1.2246770063, 1.2246770063, 0, 0, -1.4140973144, 1.4140973144])


def test_weights() -> None:
    expected = [
        0.3929228429, -0.3929228429, -1.1787685288, 1.1787685288, 0.2268480318, 0.2268480318, -1.5879362227, 1.1342401591,
    ]  # fmt: skip
    close(gdpo.gdpo_advantages(REWARDS, GROUP, weights=(1.0, 0.5)), expected)
    close(gdpo.gdpo_advantages(REWARDS, GROUP, weights=torch.tensor([1.0, 0.5])), expected)


def test_over_tokens() -> None:
    expected = [
        -0.2430855703, -0.2430855703, -1.5652405418, 1.0790694012, -0.2430855703, -0.2430855703, -1.7697782186, 1.2836070780,
    ]  # fmt: skip
    each = gdpo.gdpo_advantages(REWARDS, GROUP, eps=1e-6, batch_norm="token", mask=MASK)
    close(each[:, 0], expected)
    assert_close(each, each[:, :1].where(MASK, 0.0))  # one value per row, 0 outside the mask
    close(gdpo.gdpo_advantages(REWARDS, GROUP, eps=1e-6, batch_norm="token", lengths=LENGTHS), expected)


def test_missing_rewards() -> None:
    rewards = REWARDS.clone()
    rewards[2] = NAN
    rewards[5, 1] = NAN
    expected = [-0.4634730103, -0.4634730103, 0, 0.9269460207, -0.0621043622, 0.4013686481, -1.6675789548, 1.3283146688]
    close(gdpo.gdpo_advantages(rewards, GROUP), expected)
    zeroed = gdpo.gdpo_advantages(rewards, GROUP, nan="zero")
    assert_close(zeroed, gdpo.gdpo_advantages(rewards.nan_to_num(0.0), GROUP), rtol=0, atol=0)
    with pytest.raises(ValueError, match="reward"):
        gdpo.gdpo_advantages(rewards, GROUP, nan="error")


def test_what_summing_first_collapses_stays_apart() -> None:
    rewards = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 0]], dtype=torch.float64)
    close(gdpo.gdpo_advantages(rewards, torch.tensor([0, 0, 1, 1])), [1.0953602568, -1.0953602568, 0.5476801284, -0.5476801284])


def test_a_reward_may_be_shifted_within_a_group_and_scaled() -> None:
    plain = gdpo.gdpo_advantages(REWARDS, GROUP)
    shifted = REWARDS.clone()
    shifted[:4, 1] += 3
    assert_close(gdpo.gdpo_advantages(shifted, GROUP), plain, rtol=0, atol=1e-12)
    scaled = gdpo.gdpo_advantages(REWARDS * torch.tensor([1.0, 100.0]), GROUP, eps=1e-12)
    assert_close(scaled, gdpo.gdpo_advantages(REWARDS, GROUP, eps=1e-12), rtol=0, atol=1e-9)


def test_constant_groups() -> None:
    same = torch.ones(8, 2, dtype=torch.float64)
    assert not gdpo.gdpo_advantages(same, GROUP).any()
    assert not gdpo.gdpo_advantages(same, GROUP, batch_norm="token", lengths=LENGTHS).any()
    half = REWARDS.clone()
    half[4:] = 1
    assert_close(gdpo.gdpo_advantages(half, GROUP)[4:], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)
    tokens = gdpo.gdpo_advantages(half, GROUP, batch_norm="token", lengths=LENGTHS)
    assert (tokens[4:] == tokens[4]).all() and tokens[4] != 0  # the mean over tokens is not 0


def test_a_group_of_one() -> None:
    rewards, group = REWARDS[:5], torch.tensor([0, 0, 0, 0, 1])
    assert gdpo.gdpo_advantages(rewards, group, batch_norm="none")[4] == 0
    alone = gdpo.gdpo_advantages(rewards[4:], group[4:], batch_norm="none", eps=1e-6)
    assert alone.tolist() == [0]


def test_ranks_that_merge_their_moments_equal_the_whole_batch() -> None:
    parts = [gdpo.gdpo_advantages(REWARDS[rows], GROUP[rows], batch_norm="none") for rows in (slice(0, 4), slice(4, 8))]
    moments = merge_moments(torch.stack([batch_moments(part) for part in parts]))
    whole = torch.cat([batch_normalize(part, moments, mode="seq", eps=1e-4) for part in parts])
    assert_close(whole, gdpo.gdpo_advantages(REWARDS, GROUP), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": "tokens"}, "batch_norm is 'tokens'; accepted"),
        ({"batch_norm": "token"}, "mask is None"),
        ({"nan": "drop"}, "nan is 'drop'; accepted"),
        ({"weights": (1.0,)}, "weights"),
        ({"eps": -1.0}, "eps is -1"),
    ],
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdpo.gdpo_advantages(REWARDS, GROUP, **options)


def test_an_infinite_reward_names_its_row() -> None:
    rewards = REWARDS.clone()
    rewards[6, 1] = math.inf
    with pytest.raises(ValueError, match="6"):
        gdpo.gdpo_advantages(rewards, GROUP)
