"""RLOO: worked advantages, the KL in the reward, whole completions as actions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import group_advantages, policy_loss
from prefkern.papers import Rollout, load_recipe, rloo

F64 = torch.float64
REWARDS = torch.tensor([1, 0, 0, 0, 1, 1, 0.5, 1], dtype=F64)
GROUP = torch.arange(8) // 4
MASK = torch.arange(4) < torch.tensor([3, 1, 2, 4, 2, 2, 4, 1])[:, None]


def test_worked_numbers() -> None:
    third, sixth = 1 / 3, 1 / 6
    expected = torch.tensor([1, -third, -third, -third, sixth, sixth, -0.5, sixth], dtype=F64)
    assert_close(rloo.advantages(REWARDS, GROUP), expected, rtol=0, atol=1e-12)


@given(rewards=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=2, max_size=12))
def test_each_against_the_mean_of_the_others(rewards) -> None:
    r = torch.tensor(rewards, dtype=F64)
    group = torch.zeros(len(r), dtype=torch.int64)
    a = rloo.advantages(r, group)
    others = torch.stack([torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(len(r))])
    assert_close(a, r - others, rtol=1e-12, atol=1e-12)
    assert abs(float(a.sum())) < 1e-12
    centred = group_advantages(r, group, estimator="dr_grpo").advantages
    assert_close(a, len(r) / (len(r) - 1) * centred, rtol=1e-12, atol=1e-12)


def test_the_kl_of_a_completion_comes_off_its_reward() -> None:
    old, ref = -torch.rand(8, 4, dtype=F64), -torch.rand(8, 4, dtype=F64)
    kl = torch.where(MASK, old - ref, 0.0).sum(1)
    a = rloo.advantages(REWARDS, GROUP, old_logp=old, ref_logp=ref, mask=MASK, beta=0.05)
    assert_close(a, rloo.advantages(REWARDS - 0.05 * kl, GROUP), rtol=0, atol=1e-12)
    packed = rloo.advantages(
        REWARDS, GROUP, old_logp=old.flatten(), ref_logp=ref.flatten(), mask=MASK.flatten(), beta=0.05,
        cu_seqlens=torch.arange(9, dtype=torch.int32) * 4,
    )  # fmt: skip
    assert_close(packed, a, rtol=0, atol=1e-12)


def test_whitened_over_the_whole_batch() -> None:
    a = rloo.advantages(REWARDS, GROUP)
    expected = (a - a.mean()) / (a.std() + 1e-4)
    assert_close(rloo.advantages(REWARDS, GROUP, whiten=True), expected, rtol=0, atol=1e-12)


def test_groups_of_one_and_constant_groups() -> None:
    r, group = torch.tensor([2.0, 0.1, 0.1, 0.1], dtype=F64), torch.tensor([4, 1, 1, 1])
    assert rloo.advantages(r, group).tolist() == [0, 0, 0, 0]
    assert rloo.advantages(r, group, singleton="reward").tolist() == [2, 0, 0, 0]


def test_loss_and_gradient_of_whole_completions() -> None:
    old = -torch.rand(8, 4, dtype=F64)
    logp = (old + 0.2 * torch.randn(8, 4, dtype=F64)).requires_grad_()
    a = torch.randn(8, dtype=F64)
    rho = torch.where(MASK, logp - old, 0.0).sum(1).exp()
    expected = torch.maximum(-a * rho, -a * rho.clamp(0.8, 1.2)).mean()
    out = rloo.loss(logp, old, a, MASK)
    assert_close(out.loss, expected, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(out.loss, logp)[0], torch.autograd.grad(expected, logp)[0], rtol=1e-12, atol=1e-15)
    assert_close(out.metrics["ratio_max"], rho.detach().max(), rtol=1e-12, atol=0)
    assert out.metrics["tokens"] == MASK.sum() and out.metrics["sequences"] == 8


def test_on_policy_it_is_reinforce() -> None:
    logp = torch.randn(8, 4, dtype=F64, requires_grad=True)
    a = torch.randn(8, dtype=F64)
    rloo.loss(logp, logp.detach(), a, MASK).loss.backward()
    assert_close(logp.grad, torch.where(MASK, -a[:, None] / 8, 0.0), rtol=1e-12, atol=0)


def test_a_completion_without_tokens_counts_in_the_mean() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    logp = torch.full((2, 2), torch.nan, dtype=F64).masked_fill(mask, 0.0).requires_grad_()
    out = rloo.loss(logp, logp.detach(), torch.tensor([1.0, 3], dtype=F64), mask)
    out.loss.backward()
    assert out.loss == -2
    assert logp.grad.tolist() == [[-0.5, -0.5], [0, 0]]


def test_recipe() -> None:
    old, ref = -torch.rand(8, 4, dtype=F64), -torch.rand(8, 4, dtype=F64)
    logp = (old + 0.2 * torch.randn(8, 4, dtype=F64)).requires_grad_()
    rollout = Rollout(REWARDS, GROUP, MASK, old, ref)
    a = rloo.advantages(REWARDS, GROUP, old_logp=old, ref_logp=ref, mask=MASK, beta=0.05)
    batch = load_recipe("rloo", beta=0.05).prepare(rollout)
    assert_close(load_recipe("rloo").loss(logp, batch).loss, rloo.loss(logp, old, a, MASK).loss, rtol=1e-12, atol=0)
    entropy = torch.rand(8, 4, dtype=F64).masked_fill(~MASK, torch.nan)
    metrics = load_recipe("rloo").loss(logp, batch, entropy=entropy).metrics
    assert_close(metrics["entropy"], entropy[MASK].mean(), rtol=1e-12, atol=0)
    token = load_recipe("rloo:level=token").loss(logp, batch).loss
    assert_close(token, policy_loss(logp, old, a, MASK).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rloo.advantages(REWARDS, GROUP, beta=0.1), "old_logp is None; beta 0.1 needs both"),
        (
            lambda: rloo.advantages(REWARDS, GROUP, beta=0.1, old_logp=torch.zeros(8, 4)),
            "ref_logp is None; beta 0.1 needs both",
        ),
        (
            lambda: rloo.advantages(REWARDS[:, None], GROUP, beta=0.1, old_logp=torch.zeros(8, 4), ref_logp=torch.zeros(8, 4)),
            r"rewards is \[8, 1\]; \[B\] is expected",
        ),
        (lambda: rloo.loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3)), r"advantages is \[2, 3\]; \[B\]"),
        (
            lambda: rloo.loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), token_weight=torch.ones(2, 3)),
            r"token_weight is \[2, 3\]; \[B\]",
        ),
        (
            lambda: rloo.RLOO(level="word").loss(torch.zeros(2, 3), {"advantages": torch.ones(2)}),
            "level is 'word'; accepted: 'sequence', 'token'",
        ),
        (lambda: load_recipe("rloo:beta=0.05").prepare(Rollout(REWARDS, GROUP, MASK)), "beta 0.05 needs both log-probs"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
