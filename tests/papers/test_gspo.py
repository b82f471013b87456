"""GSPO: worked sequence ratios, gradients of both forms, verl's cap."""

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import Rollout, grpo, gspo, load_recipe

F64 = torch.float64
LOGP = torch.tensor([[-1, -0.9, -1.1], [-0.2, -2, 0]], dtype=F64)
OLD = torch.tensor([[-1.2, -1, -1], [-0.5, -1, 0]], dtype=F64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
S = torch.tensor([1.0689391057, 0.7046880897], dtype=F64)
N = torch.tensor([3, 2])


def test_worked_ratios() -> None:
    metrics = gspo.loss(LOGP, OLD, torch.ones(2, dtype=F64), MASK).metrics
    assert_close(metrics["ratio_max"], S[0], rtol=0, atol=1e-10)
    assert_close(metrics["ratio_min"], S[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(
    ("advantages", "held"),
    [([1.0, 1], [True, False]), ([-1, -1], [False, True]), ([-2, 0.5], [False, False]), ([1, -1], [True, True])],
)
def test_loss_and_gradient(token, advantages, held) -> None:
    a, flat = torch.tensor(advantages, dtype=F64), torch.tensor(held)
    bound = torch.where(a > 0, torch.tensor(1 + 4e-4, dtype=F64), 1 - 3e-4)
    expected = -a * torch.where(flat, bound, S)
    logp = LOGP.clone().requires_grad_()
    out = gspo.loss(logp, OLD, a, MASK, token=token, agg="trl-grpo")
    out.loss.backward()
    assert_close(out.loss.detach(), expected.mean(), rtol=0, atol=1e-10)
    gradient = torch.where(flat, 0.0, -a * S / N)[:, None] / 2
    assert_close(logp.grad, torch.where(MASK, gradient, 0.0), rtol=0, atol=1e-10)


def test_on_policy_the_gradient_is_minus_a_over_n() -> None:
    logp, a = OLD.clone().requires_grad_(), torch.tensor([2.0, -3], dtype=F64)
    gspo.loss(logp, OLD, a, MASK, agg="trl-grpo").loss.backward()
    assert_close(logp.grad, torch.where(MASK, (-a / N)[:, None] / 2, 0.0), rtol=1e-12, atol=0)


def test_gspo_token_takes_an_advantage_per_token() -> None:
    a = torch.tensor([[-1.0, 0.0, -2.0], [0.5, 1.5, torch.nan]], dtype=F64)
    logp = LOGP.clone().requires_grad_()
    out = gspo.loss(logp, OLD, a, MASK, token=True, agg="trl-grpo")
    out.loss.backward()
    weight = S[:, None] / N[:, None] / 2
    safe = torch.where(MASK, a, 0.0)
    assert_close(out.loss.detach(), (-safe * weight).sum(), rtol=0, atol=1e-10)
    assert_close(logp.grad, -safe * weight, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="advantages"):
        gspo.loss(LOGP, OLD, a, MASK)


def test_verl_caps_the_log_of_the_ratio() -> None:
    logp = torch.tensor([[12.0, 14.0]], dtype=F64, requires_grad=True)
    out = gspo.loss(logp, torch.zeros_like(logp), -torch.ones(1, dtype=F64), token=True, ratio_clamp=(None, 10.0))
    out.loss.backward()
    assert_close(out.loss.detach(), torch.tensor(10.0, dtype=F64).exp(), rtol=1e-7, atol=0)
    assert not logp.grad.any()
    low = gspo.loss(-logp, torch.zeros_like(logp), torch.ones(1, dtype=F64), token=True, ratio_clamp=(None, 10.0))
    assert_close(low.loss.detach(), -torch.tensor(-13.0, dtype=F64).exp(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("token", [False, True])
def test_recipe(token) -> None:
    rewards, group = torch.tensor([1.0, 0], dtype=F64), torch.tensor([7, 7])
    recipe = load_recipe("gspo", token=token, eps_low=0.1, eps_high=0.05)
    out = recipe.loss(LOGP, recipe.prepare(Rollout(rewards, group, MASK, OLD)))
    a = grpo.advantages(rewards, group).advantages
    assert_close(out.loss, gspo.loss(LOGP, OLD, a, MASK, token=token, eps_low=0.1, eps_high=0.05).loss, rtol=1e-12, atol=0)
    packed = Rollout(rewards, group, MASK.flatten(), OLD.flatten(), cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32))
    assert_close(recipe.loss(LOGP.flatten(), recipe.prepare(packed)).loss, out.loss, rtol=1e-12, atol=0)
