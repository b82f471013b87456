"""PPO: worked losses and gradients, the recursions against loops, the critic's loss, the recipe."""

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import Rollout, load_recipe, ppo, take_rows

F64 = torch.float64
RATIOS = torch.tensor([1.5, 0.5, 1.5, 0.5, 4], dtype=F64)
ADVANTAGES = torch.tensor([1.0, 1, -1, -1, -1], dtype=F64)


def close(actual: torch.Tensor, expected, atol: float = 1e-12) -> None:
    assert_close(actual.detach(), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("options", "losses", "gradients"),
    [
        ({"eps_high": 0.28}, [-1.28, -0.5, 1.5, 0.8, 3], [0, -0.5, 1.5, 0, 0]),
        ({"eps_high": 0.28, "dual_clip": None}, [-1.28, -0.5, 1.5, 0.8, 4], [0, -0.5, 1.5, 0, 4]),
        ({"dual_clip": None, "delta": 2.0}, [-1.2, -0.5, 1.5, 0.8, 2], [0, -0.5, 1.5, 0, 0]),
    ],
)
def test_worked_loss_and_gradient(options, losses, gradients) -> None:
    for rho, a, loss, gradient in zip(RATIOS, ADVANTAGES, losses, gradients, strict=True):
        logp = rho.log().reshape(1, 1).requires_grad_()
        out = ppo.loss(logp, torch.zeros_like(logp), a.reshape(1), **options)
        out.loss.backward()
        close(out.loss, loss)
        close(logp.grad, [[gradient]])


def test_at_the_bound_the_gradient_flows() -> None:
    old = torch.zeros(2, 1, dtype=F64)
    logp = torch.tensor([[1.25], [0.75]], dtype=F64).log().requires_grad_()
    ppo.loss(logp, old, torch.tensor([1.0, -1], dtype=F64), eps_low=0.25, eps_high=0.25, agg="token-sum").loss.backward()
    held = logp.detach().exp()
    inside = torch.where(torch.tensor([[1.0], [-1]]) > 0, held <= 1.25, held >= 0.75)
    close(logp.grad, torch.where(inside, torch.tensor([[-1.0], [1]]) * held, 0.0))


def test_the_log_ratio_is_clamped_as_verl_does() -> None:
    logp = torch.tensor([[25.0]], dtype=F64, requires_grad=True)
    out = ppo.loss(logp, torch.zeros_like(logp), -torch.ones(1, dtype=F64), dual_clip=None)
    out.loss.backward()
    close(out.loss, torch.tensor(20.0, dtype=F64).exp(), atol=1e-6)
    assert logp.grad.item() == 0


def inputs(rows=4, length=6):
    mask = torch.rand(rows, length) < 0.7
    mask[0], mask[1] = True, False
    mask[1, 2] = True
    rewards, values = torch.randn(rows, length, dtype=F64), torch.randn(rows, length, dtype=F64)
    return rewards, values, mask


def gae_by_a_loop(rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        next_value = carry = 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[i, t]:
                delta = rewards[i, t] + gamma * next_value - values[i, t]
                carry = delta + gamma * lam * carry
                advantages[i, t], next_value = carry, values[i, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten_by_hand(v, mask):
    n = mask.sum().double()
    mean = v[mask].sum() / (n + 1e-8)
    variance = (v[mask] - mean).square().sum() / (n + 1e-8) * n / (n - 1)
    return torch.where(mask, (v - mean) / torch.sqrt(variance + 1e-8), 0.0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.0, 1.0)])
def test_advantages_pass_over_tokens_that_do_not_count(gamma, lam) -> None:
    rewards, values, mask = inputs()
    expected, returns = gae_by_a_loop(rewards, values, mask, gamma, lam)
    out = ppo.advantages(rewards, values, mask, gamma=gamma, lam=lam, whiten=False)
    close(out.advantages, expected)
    close(out.returns, returns)
    whitened = ppo.advantages(rewards, values, mask, gamma=gamma, lam=lam)
    close(whitened.advantages, whiten_by_hand(expected, mask))
    close(whitened.returns, returns)


def test_packed_equals_padded() -> None:
    rewards, values, mask = inputs()
    cu = torch.arange(5, dtype=torch.int32) * 6
    padded = ppo.advantages(rewards, values, mask, lam=0.9)
    packed = ppo.advantages(rewards.flatten(), values.flatten(), mask.flatten(), lam=0.9, cu_seqlens=cu)
    assert_close(packed.advantages, padded.advantages.flatten(), rtol=0, atol=1e-12)
    old, ref, scores = values, rewards, torch.randn(4, dtype=F64)
    one = ppo.token_rewards(scores, old, mask, ref_logp=ref, beta=0.1)
    other = ppo.token_rewards(scores, old.flatten(), mask.flatten(), ref_logp=ref.flatten(), beta=0.1, cu_seqlens=cu)
    assert_close(other, one.flatten(), rtol=0, atol=0)


def test_a_score_sits_on_the_last_token_that_counts() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    old = torch.full((3, 4), torch.nan, dtype=F64)
    rewards = ppo.token_rewards(torch.tensor([2.0, 3, 4], dtype=F64), old, mask)
    assert rewards.tolist() == [[0, 0, 2, 0], [0, 0, 0, 3], [0, 0, 0, 0]]
    cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    packed = ppo.token_rewards(torch.tensor([2.0, 3, 4], dtype=F64), torch.zeros(5, dtype=F64), cu_seqlens=cu)
    assert packed.tolist() == [0, 0, 2, 0, 4]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [("k1", [0.2, -1, 0]), ("abs", [0.2, 1, 0]), ("k2", [0.02, 0.5, 0]), ("k3", [0.0187307531, 0.7182818285, 0])],
)
def test_the_penalty_of_each_token(kl, expected) -> None:
    old, ref = torch.tensor([[-1.0, -2, -0.5]], dtype=F64), torch.tensor([[-1.2, -1, -0.5]], dtype=F64)
    rewards = ppo.token_rewards(torch.tensor([1.0], dtype=F64), old, ref_logp=ref, beta=0.5, kl=kl)
    close(rewards, torch.tensor([[0.0, 0, 1]], dtype=F64) - 0.5 * torch.tensor([expected], dtype=F64), atol=1e-10)


def test_value_loss_against_its_formula() -> None:
    old, target, mask = inputs()
    values = (old + torch.randn_like(old)).requires_grad_()
    out = ppo.value_loss(values, old, target, mask, clip=0.5)
    bounded = values.clamp(old - 0.5, old + 0.5)
    squares = torch.maximum((values - target).square(), (bounded - target).square())
    expected = 0.5 * squares[mask].mean()
    assert_close(out.loss, expected, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(out.loss, values)[0], torch.autograd.grad(expected, values)[0], rtol=1e-12, atol=1e-15)
    held = ((bounded - target).square() > (values - target).square())[mask]
    close(out.metrics["value_clip_fraction"], held.double().mean())
    close(out.metrics["value_mean"], values[mask].mean())
    close(out.metrics["return_mean"], target[mask].mean())
    plain = ppo.value_loss(values, old, target, mask, clip=None)
    assert_close(plain.loss, 0.5 * (values - target).square()[mask].mean(), rtol=1e-12, atol=0)
    assert plain.metrics["value_clip_fraction"] == 0


def test_nan_outside_the_mask_changes_nothing() -> None:
    old, target, mask = inputs()
    values = old + 0.3
    expected = ppo.value_loss(values, old, target, mask).loss
    values, old, target = (x.masked_fill(~mask, torch.nan) for x in (values, old, target))
    values.requires_grad_()
    out = ppo.value_loss(values, old, target, mask)
    out.loss.backward()
    assert torch.equal(out.loss, expected)
    assert bool(values.grad.isfinite().all()) and not values.grad[~mask].any()


def test_recipe() -> None:
    _, values, mask = inputs()
    old, ref, scores = -torch.rand(4, 6, dtype=F64), -torch.rand(4, 6, dtype=F64), torch.randn(4, dtype=F64)
    recipe = load_recipe("ppo", beta=0.1, kl="k3", lam=0.9, gamma=0.99, dual_clip=None)
    batch = recipe.prepare(Rollout(scores, torch.arange(4), mask, old, ref_logp=ref, extra={"values": values}))
    rewards = ppo.token_rewards(scores, old, mask, ref_logp=ref, beta=0.1, kl="k3")
    expected, returns = gae_by_a_loop(rewards, values, mask, 0.99, 0.9)
    expected = whiten_by_hand(expected, mask)
    close(batch["advantages"], expected)
    close(batch["returns"], returns)
    logp = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    out = recipe.loss(logp, batch)
    assert_close(out.loss, ppo.loss(logp, old, expected, mask, dual_clip=None).loss, rtol=1e-12, atol=0)
    critic = values + 0.4
    assert_close(recipe.value_loss(critic, batch).loss, ppo.value_loss(critic, values, returns, mask).loss, rtol=1e-12, atol=0)
    rows = torch.tensor([2, 0])
    part = recipe.loss(logp[rows], take_rows(batch, rows))
    assert_close(
        part.loss, ppo.loss(logp[rows], old[rows], expected[rows], mask[rows], dual_clip=None).loss, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ppo.token_rewards(torch.ones(2), x, kl="k4"), "kl is 'k4'; accepted: 'k1', 'abs', 'k2', 'k3'"),
        (lambda x: ppo.token_rewards(torch.ones(2), x, beta=0.1), "ref_logp is None; beta 0.1 needs"),
        (lambda x: ppo.token_rewards(torch.ones(2, 3), x), r"rewards is \[2, 3\]; \[B\] is expected"),
        (lambda x: ppo.value_loss(x, x, x, clip=0.0), "clip is 0.0; a positive number is expected, or None"),
        (lambda x: ppo.loss(x, x, torch.ones(2), dual_clip=1.0), "dual_clip"),
        (lambda x: ppo.recipe.prepare(Rollout(torch.ones(2), torch.arange(2), old_logp=x)), r"needs rollout.extra\['values'\]"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
