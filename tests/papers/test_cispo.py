"""CISPO: worked losses and gradients of both variants."""

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import Rollout, cispo, grpo, load_recipe

F64 = torch.float64
RATIOS = torch.tensor([1.5, 0.5, 1.5, 0.5, 4], dtype=F64)
ADVANTAGES = torch.tensor([1.0, 1, -1, -1, -1], dtype=F64)


def run(**options):
    logp = RATIOS.log()[:, None].requires_grad_()
    out = cispo.loss(logp, torch.zeros_like(logp), ADVANTAGES, agg="token-sum", **options)
    out.loss.backward()
    return out, logp.grad[:, 0]


def test_verl() -> None:
    out, gradient = run(variant="verl")
    losses = [-0.4865581297, 0.5545177444, 0.4865581297, -0.5545177444, 1.6635532333]
    assert_close(out.loss.detach(), torch.tensor(losses, dtype=F64).sum(), rtol=0, atol=1e-9)
    assert_close(gradient, torch.tensor([-1.2, -0.8, 1.2, 0.8, 1.2], dtype=F64), rtol=1e-12, atol=0)
    for i, expected in enumerate(losses):
        lp = RATIOS[i].log().reshape(1, 1)
        one = cispo.loss(lp, torch.zeros_like(lp), ADVANTAGES[i : i + 1], variant="verl").loss
        assert_close(one, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-10)


def test_trl_bounds_the_ratio_itself() -> None:
    _, gradient = run(cap=2.0)
    assert_close(gradient, torch.tensor([-1.5, -0.5, 1.5, 0.5, 2], dtype=F64), rtol=1e-12, atol=0)


def test_no_token_loses_its_gradient() -> None:
    old = torch.zeros(50, 1, dtype=F64)
    logp = torch.linspace(-5, 5, 50, dtype=F64)[:, None].requires_grad_()
    for variant in ("trl", "verl"):
        for sign in (1.0, -1.0):
            a = torch.full((50,), sign, dtype=F64)
            (gradient,) = torch.autograd.grad(cispo.loss(logp, old, a, variant=variant).loss, logp)
            assert bool((gradient.sign() == -sign).all())


def test_on_policy_the_gradient_is_minus_a() -> None:
    logp, a = torch.randn(3, 2, dtype=F64, requires_grad=True), torch.tensor([1.0, -2, 0], dtype=F64)
    cispo.loss(logp, logp.detach(), a).loss.backward()
    assert_close(logp.grad, -a[:, None].expand(3, 2) / 6, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["trl", "verl"])
def test_recipe(variant) -> None:
    rewards, group = torch.tensor([1.0, 0, 0.5], dtype=F64), torch.zeros(3, dtype=torch.int64)
    mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    old = -torch.rand(3, 4, dtype=F64)
    logp = old + torch.randn(3, 4, dtype=F64)
    recipe = load_recipe("cispo", variant=variant, cap=1.3, eps_low=0.3, eps_high=0.1)
    out = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, mask, old)))
    a = grpo.advantages(rewards, group).advantages
    w = (logp - old).exp()
    w = w.clamp(max=1.3) if variant == "trl" else w.clamp(0.7, 1.1)
    assert_close(out.loss, (-w * a[:, None] * logp)[mask].mean(), rtol=1e-12, atol=0)
    same = cispo.loss(logp, old, a, mask, variant=variant, cap=1.3, eps_low=0.3, eps_high=0.1)
    assert torch.equal(same.loss, out.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cap": 1.0}, "cap is 1.0; it bounds the ratio itself"), ({"variant": "hf"}, "variant is 'hf'; accepted: 'trl', 'verl'")],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        cispo.loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), **options)
