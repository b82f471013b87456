"""GMPO against its definition, with gradients, clipping in the direction of the advantage only, and the recipe."""

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import Rollout, gmpo, grpo, load_recipe

F64 = torch.float64
MASK = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])


def by_definition(logp, old, a, mask, low, high):
    """The release's way: the smaller of A's sign times d and times d clamped."""
    sign = a.sign()[:, None]
    d = torch.where(mask, logp - old, 0.0)
    b = sign * torch.minimum(sign * d, sign * d.clamp(-low, high))
    return (-a * (b.sum(1) / (mask.sum(1).double() + 1e-8)).exp()).mean()


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.4), (0.2, 0.2), (0.1, 0.6)])
def test_loss_and_gradient(low, high) -> None:
    old = -torch.rand(4, 5, dtype=F64)
    logp = (old + torch.randn(4, 5, dtype=F64)).requires_grad_()
    a = torch.tensor([1.0, -2, 0.5, -0.3], dtype=F64)
    out = gmpo.loss(logp, old, a, MASK, eps_low=low, eps_high=high)
    expected = by_definition(logp, old, a, MASK, low, high)
    assert_close(out.loss, expected, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(out.loss, logp)[0], torch.autograd.grad(expected, logp)[0], rtol=1e-7, atol=1e-12)


def test_clipped_only_in_the_direction_of_the_advantage() -> None:
    d = torch.tensor([[1.0, -1.0]], dtype=F64)
    for sign, free in ((1.0, 1), (-1.0, 0)):
        logp = d.clone().requires_grad_()
        gmpo.loss(logp, torch.zeros_like(d), torch.tensor([sign], dtype=F64)).loss.backward()
        assert logp.grad[0, free] != 0 and logp.grad[0, 1 - free] == 0


def test_the_geometric_mean_is_below_the_arithmetic() -> None:
    old = torch.zeros(1, 5, dtype=F64)
    logp = 0.1 * torch.randn(1, 5, dtype=F64)
    a = torch.ones(1, dtype=F64)
    assert -gmpo.loss(logp, old, a).loss <= -grpo.loss(logp, old, a).loss


def test_on_policy_the_gradient_is_minus_a_over_n() -> None:
    logp, a = torch.randn(4, 5, dtype=F64, requires_grad=True), torch.tensor([1.0, -2, 0.5, 0], dtype=F64)
    gmpo.loss(logp, logp.detach(), a, MASK).loss.backward()
    assert_close(logp.grad, torch.where(MASK, -a[:, None] / MASK.sum(1, keepdim=True) / 4, 0.0), rtol=1e-7, atol=0)


def test_a_completion_without_tokens_adds_0_and_counts() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    logp = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    out = gmpo.loss(logp, logp.detach(), torch.tensor([1.0, 3], dtype=F64), mask)
    out.loss.backward()
    assert out.loss == -0.5
    assert not logp.grad[1].any()


def test_one_advantage_per_completion() -> None:
    with pytest.raises(ValueError, match="advantages"):
        gmpo.loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))


def test_recipe() -> None:
    rewards, group = torch.tensor([1.0, 0, 0.5, 0], dtype=F64), torch.zeros(4, dtype=torch.int64)
    old = -torch.rand(4, 5, dtype=F64)
    logp = old + torch.randn(4, 5, dtype=F64)
    recipe = load_recipe("gmpo:eps_low=0.2,eps_high=0.3")
    out = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, MASK, old)))
    a = grpo.advantages(rewards, group).advantages
    assert_close(out.loss, by_definition(logp, old, a, MASK, 0.2, 0.3), rtol=1e-12, atol=0)
