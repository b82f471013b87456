"""SAPO: worked losses and gradients, what the gate does far out."""

import torch
from torch.testing import assert_close

from prefkern.papers import Rollout, grpo, load_recipe, sapo

F64 = torch.float64
RATIOS = torch.tensor([1.5, 0.5, 1.5, 0.5, 4], dtype=F64)
ADVANTAGES = torch.tensor([1.0, 1, -1, -1, -1], dtype=F64)
LOSSES = torch.tensor([-2.4898373248, -1.5101626752, 2.3935854792, 1.4159383303, 3.6529856069], dtype=F64)
GRADIENTS = torch.tensor([-1.4100222732, -0.4700074244, 1.4012097349, 0.4670699116, 0.6304445609], dtype=F64)


def test_worked_loss_and_gradient() -> None:
    logp = RATIOS.log()[:, None].requires_grad_()
    out = sapo.loss(logp, torch.zeros_like(logp), ADVANTAGES, agg="token-sum")
    out.loss.backward()
    assert_close(out.loss.detach(), LOSSES.sum(), rtol=0, atol=1e-9)
    assert_close(logp.grad[:, 0], GRADIENTS, rtol=0, atol=1e-10)
    for i in range(5):
        lp = logp.detach()[i : i + 1]
        assert_close(
            sapo.loss(lp, torch.zeros_like(lp), ADVANTAGES[i : i + 1], agg="token-mean").loss, LOSSES[i], rtol=0, atol=1e-10
        )


def test_on_policy_the_gradient_is_minus_a() -> None:
    logp, a = torch.randn(3, 2, dtype=F64, requires_grad=True), torch.tensor([1.0, -2, 0], dtype=F64)
    sapo.loss(logp, logp.detach(), a, agg="token-sum").loss.backward()
    assert_close(logp.grad, -a[:, None].expand(3, 2), rtol=1e-12, atol=0)


def test_the_gradient_never_is_0_before_the_gate_saturates() -> None:
    logp = torch.linspace(-8, 3.5, 60, dtype=F64)[:, None].requires_grad_()  # ratios up to 33
    for sign in (1.0, -1.0):
        a = torch.full((60,), sign, dtype=F64)
        (gradient,) = torch.autograd.grad(sapo.loss(logp, torch.zeros_like(logp), a).loss, logp)
        assert bool((gradient.sign() == -sign).all())


def test_far_out_nothing_overflows() -> None:
    logp = torch.tensor([[300.0, -300]], dtype=F64, requires_grad=True)
    out = sapo.loss(logp, torch.zeros_like(logp), torch.ones(1, dtype=F64))
    out.loss.backward()
    assert bool(out.loss.isfinite()) and bool(logp.grad.isfinite().all())


def test_recipe_averages_over_tokens_then_completions() -> None:
    rewards, group = torch.tensor([1.0, 0, 0.5], dtype=F64), torch.zeros(3, dtype=torch.int64)
    mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    old = -torch.rand(3, 4, dtype=F64)
    logp = old + torch.randn(3, 4, dtype=F64)
    recipe = load_recipe("sapo", tau_neg=2.0)
    out = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, mask, old)))
    a = grpo.advantages(rewards, group).advantages[:, None]
    tau = torch.where(a > 0, 1.0, 2.0)
    token = -a * 4 / tau * torch.sigmoid(tau * ((logp - old).exp() - 1))
    expected = ((token * mask).sum(1) / (mask.sum(1) + 1e-8)).mean()
    assert_close(out.loss, expected, rtol=1e-7, atol=0)
    a = grpo.advantages(rewards, group).advantages
    assert torch.equal(out.loss, sapo.loss(logp, old, a, mask, tau_neg=2.0).loss)
