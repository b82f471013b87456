"""GPG: worked advantages, both counts, the plain policy gradient."""

import pytest
import torch
from torch.testing import assert_close

from prefkern import policy_loss
from prefkern.papers import Rollout, gpg, load_recipe

F64 = torch.float64
REWARDS = torch.tensor([1, 0, 0, 0, 1, 1, 0.5, 1], dtype=F64)
GROUP = torch.arange(8) // 4


def test_worked_numbers() -> None:
    expected = torch.tensor([1.2, -0.4, -0.4, -0.4, 0.2, 0.2, -0.6, 0.2], dtype=F64)
    assert_close(gpg.advantages(REWARDS, GROUP), expected, rtol=0, atol=1e-12)
    assert_close(gpg.advantages(REWARDS, GROUP, alpha="none"), expected * 5 / 8, rtol=0, atol=1e-12)
    assert_close(gpg.advantages(REWARDS, GROUP, f_norm=2.0), expected / 2, rtol=0, atol=1e-12)


def test_the_counts_differ_where_a_group_is_right_throughout() -> None:
    rewards, group = torch.tensor([1.0, 0, 1, 1], dtype=F64), torch.tensor([0, 0, 1, 1])
    centred = torch.tensor([0.5, -0.5, 0, 0], dtype=F64)
    assert_close(gpg.advantages(rewards, group), centred * 4 / 3, rtol=1e-12, atol=0)
    assert_close(gpg.advantages(rewards, group, alpha="signals"), centred * 4 / 2, rtol=1e-12, atol=0)


def test_all_zero() -> None:
    for alpha in ("scores", "signals", "none"):
        assert gpg.advantages(torch.zeros(4), torch.tensor([0, 0, 1, 1]), alpha=alpha).tolist() == [0] * 4


def test_a_group_of_one_has_mean_0() -> None:
    rewards, group = torch.tensor([2.0, 1, 0], dtype=F64), torch.tensor([0, 1, 1])
    assert_close(gpg.advantages(rewards, group), torch.tensor([2, 0.5, -0.5], dtype=F64) * 3 / 2, rtol=1e-12, atol=0)
    assert gpg.advantages(rewards, group, singleton="zero")[0] == 0


def test_loss_and_gradient() -> None:
    mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    logp, a = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.tensor([1.0, -2, 0.5], dtype=F64)
    out = gpg.loss(logp, a, mask)
    out.loss.backward()
    assert_close(out.loss.detach(), (-a[:, None] * logp.detach())[mask].mean(), rtol=1e-12, atol=0)
    assert_close(logp.grad, torch.where(mask, -a[:, None] / 8, 0.0), rtol=1e-12, atol=0)
    packed = gpg.loss(logp.detach().flatten(), a, mask.flatten(), cu_seqlens=torch.arange(4, dtype=torch.int32) * 4)
    assert_close(packed.loss, out.loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("old", [True, False])
def test_recipe_looks_at_no_ratio(old) -> None:
    logp = torch.randn(8, 3, dtype=F64)
    batch = load_recipe("gpg").prepare(Rollout(REWARDS, GROUP, old_logp=logp + 5 if old else None))
    out = load_recipe("gpg").loss(logp, batch)
    a = gpg.advantages(REWARDS, GROUP)
    assert_close(out.loss, (-a[:, None] * logp).mean(), rtol=1e-12, atol=1e-15)
    assert_close(out.loss, policy_loss(logp, None, a, kind="reinforce").loss, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": "all"}, "alpha is 'all'; accepted: 'scores', 'signals', 'none'"), ({"f_norm": 0.0}, "f_norm is 0.0")],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        gpg.advantages(REWARDS, GROUP, **options)
