"""Reg-GRPO against its worked numbers, its invariants, ragged groups and its edge cases."""

import math

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, load_recipe, reg_grpo

F64 = torch.float64
REWARDS = torch.tensor([1, 0, 0, 1], dtype=F64)
GROUP = torch.zeros(4, dtype=torch.int64)
X = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=F64)


def close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    assert_close(actual.detach(), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(x, a=None, group=GROUP, **options):
    """Loss, and its gradient to the log-ratio x of completions of one token."""
    logp = x.clone()[:, None].requires_grad_()
    a = reg_grpo.reg_grpo_advantages(REWARDS, GROUP) if a is None else a
    out = reg_grpo.reg_grpo_loss(logp, torch.zeros_like(logp), a, None, group, **options)
    out.loss.backward()
    return out, logp.grad[:, 0]


def test_worked_numbers() -> None:
    close(reg_grpo.reg_grpo_advantages(REWARDS, GROUP), [0.8658754298, -0.8658754298, -0.8658754298, 0.8658754298])
    z = prefkern.group_normalize(X, GROUP, eps=1e-6)
    close(z, [0.5669445667, -1.3228706556, -0.1889815222, 0.9449076111])
    out, gradient = run(X)
    close(out.loss, 0.1906589363)
    close(gradient, [-0.5649240955, -0.8636365342, 1.2792044103, 0.1493562194])
    out, gradient = run(X, sigma_grad=True)
    close(out.loss, 0.1906589363)
    close(gradient, [-0.7012900136, -0.5454493919, 1.3246597163, -0.0779203109])


@pytest.mark.parametrize("sigma_grad", [False, True])
def test_worked_start_on_policy(sigma_grad) -> None:
    out, gradient = run(torch.zeros(4, dtype=F64), eps=1e-2, sigma_grad=sigma_grad)
    close(out.loss, 0.7497402599)
    close(gradient, [-43.2937714880, 43.2937714880, 43.2937714880, -43.2937714880])


@pytest.mark.parametrize("sigma_grad", [False, True])
def test_invariants(sigma_grad) -> None:
    out, gradient = run(X, sigma_grad=sigma_grad)
    close(gradient.sum(), 0.0)
    close(run(X + 7, sigma_grad=sigma_grad)[0].loss, out.loss)
    close(run(3 * X, sigma_grad=sigma_grad, eps=0.0)[0].loss, run(X, sigma_grad=sigma_grad, eps=0.0)[0].loss)
    if sigma_grad:
        _, gradient = run(X, sigma_grad=True, eps=0.0)
        close((gradient * (X - X.mean())).sum(), 0.0)


def test_any_multiple_of_the_advantages_is_a_minimum() -> None:
    a = reg_grpo.reg_grpo_advantages(REWARDS, GROUP, eps=0.0)
    for scale in (0.1, 5.0):
        out, gradient = run(scale * a, a, eps=0.0)
        close(out.loss, 0.0)
        close(gradient, [0.0] * 4)


def test_constant_rewards() -> None:
    zero = torch.zeros(4, dtype=F64)
    out, gradient = run(X, zero, eps=0.0)
    close(out.loss, 3 / 4)
    z = prefkern.group_normalize(X, GROUP, eps=0.0)
    close(gradient, 2 / 4 * z / X.std())  # drawn to their mean
    close(run(X, zero, eps=0.0, sigma_grad=True)[1], [0.0] * 4)
    close(run(X, zero, eps=0.0, c=2.0)[0].loss, 4 * 3 / 4)


def test_the_coefficient() -> None:
    a = reg_grpo.reg_grpo_advantages(REWARDS, GROUP)
    z = prefkern.group_normalize(X, GROUP, eps=1e-6)
    close(run(X, c=0.3)[0].loss, (a - 0.3 * z).square().mean())


def test_ragged_groups_weigh_the_same_and_a_group_of_one_counts() -> None:
    x = torch.tensor([0.3, 0.9, -0.2, 0.1, 0.4, 0.7, -0.3], dtype=F64)
    a, group = torch.randn(7, dtype=F64), torch.tensor([0, 8, 0, 0, 0, 3, 3])
    parts = []
    for g in (0, 3):
        rows = group == g
        parts.append(run(x[rows], a[rows], group[rows])[0].loss)
    out, gradient = run(x, a, group)
    close(out.loss, sum(parts) / 3, atol=1e-12)
    assert gradient[1] == 0
    alone, gradient = run(x[1:2], a[1:2], group[1:2])
    assert alone.loss == 0 and gradient.tolist() == [0]


def test_tokens_add_up_to_the_ratio_of_a_completion() -> None:
    mask = torch.arange(5) < torch.tensor([[5], [0], [3], [1]])
    old = -torch.rand(4, 5, dtype=F64)
    logp = (old + 0.2 * torch.randn(4, 5, dtype=F64)).masked_fill(~mask, torch.nan).requires_grad_()
    a = torch.randn(4, dtype=F64)
    x = torch.where(mask, logp.detach() - old, 0.0).sum(1)
    assert x[1] == 0  # no tokens
    expected, gradient = run(x, a)
    out = reg_grpo.reg_grpo_loss(logp, old, a, mask, GROUP)
    out.loss.backward()
    close(out.loss, expected.loss, atol=1e-12)
    close(logp.grad, torch.where(mask, gradient[:, None], 0.0), atol=1e-12)
    close(out.metrics["log_ratio_mean"], x.mean(), atol=1e-12)
    close(out.metrics["log_ratio_abs_max"], x.abs().max(), atol=1e-12)
    assert out.metrics["tokens"] == 9 and out.metrics["sequences"] == 3
    packed = reg_grpo.reg_grpo_loss(
        logp.detach().flatten(), old.flatten(), a, mask.flatten(), GROUP, cu_seqlens=torch.arange(5, dtype=torch.int32) * 5
    )
    close(packed.loss, out.loss.detach(), atol=1e-12)
    normed = reg_grpo.reg_grpo_loss(logp.detach(), old, a, mask, GROUP, length_norm=True)
    close(normed.loss, run(x / mask.sum(1).clamp_min(1), a)[0].loss, atol=1e-12)


def test_kl_is_a_penalty() -> None:
    mask = torch.arange(5) < torch.tensor([[5], [0], [3], [1]])
    old, ref = -torch.rand(4, 5, dtype=F64), -torch.rand(4, 5, dtype=F64)
    logp = (old + 0.2 * torch.randn(4, 5, dtype=F64)).requires_grad_()
    a = torch.randn(4, dtype=F64)
    plain = reg_grpo.reg_grpo_loss(logp, old, a, mask, GROUP).loss
    out = reg_grpo.reg_grpo_loss(logp, old, a, mask, GROUP, ref_logp=ref, beta=0.3)
    k3 = torch.expm1(ref - logp) - (ref - logp)
    kl = (torch.where(mask, k3, 0.0).sum(1) / mask.sum(1).clamp_min(1)).mean()
    assert_close(out.loss, plain + 0.3 * kl, rtol=1e-12, atol=0)
    close(out.metrics["kl"], kl, atol=1e-12)
    expected = torch.autograd.grad(plain + 0.3 * kl, logp)[0]
    close(torch.autograd.grad(out.loss, logp)[0], expected, atol=1e-12)


@pytest.mark.parametrize("sigma_grad", [False, True])
def test_gradcheck(sigma_grad) -> None:
    logp = torch.randn(6, 2, dtype=F64, requires_grad=True)
    group, a = torch.tensor([1, 0, 0, 1, 1, 2]), torch.randn(6, dtype=F64)
    if not sigma_grad:  # a constant std is no function whose slope can be measured
        a = 0.7 * a
    old = torch.zeros(6, 2, dtype=F64)

    def value(x):
        return reg_grpo.reg_grpo_loss(x, old, a, None, group, eps=0.1, sigma_grad=sigma_grad, ref_logp=old, beta=0.1).loss

    if sigma_grad:
        assert torch.autograd.gradcheck(value, logp)
    else:
        x = logp.sum(1)
        expected = torch.zeros(6, dtype=F64)
        for g, size in ((0, 2), (1, 3)):
            rows = group == g
            d, s = x[rows] - x[rows].mean(), x[rows].std()
            u = a[rows] - d / (s + 0.1)
            expected[rows] = -2 / size * (u - u.mean()) / (s + 0.1) / 3
        (gradient,) = torch.autograd.grad(reg_grpo.reg_grpo_loss(logp, old, a, None, group, eps=0.1).loss, logp)
        close(gradient, expected.detach()[:, None].expand(6, 2), atol=1e-12)


def test_large_log_ratios_do_not_overflow() -> None:
    out, gradient = run(torch.tensor([1e5, -1e5, 3e4, 0.0], dtype=F64))
    assert bool(out.loss.isfinite()) and bool(gradient.isfinite().all())


def test_difficulty() -> None:
    history = torch.tensor([9.0, 0.2, 0.4])
    shift = reg_grpo.difficulty_shift(torch.tensor([1.0, 0, 0, 0]), history, window=2)
    assert_close(shift, torch.tensor(0.25 - 0.3))
    assert reg_grpo.difficulty_shift(torch.ones(2), history[:0], window=2) == 0
    hints, noise = reg_grpo.augmentation(torch.tensor([-2.6, -0.3, 0.0, 0.4, 2.0]))
    assert hints.tolist() == [4, 1, 0, 0, 0]
    assert_close(noise, torch.tensor([0, 0, 0, 1.4, 3.0]))


def test_recipe() -> None:
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])
    old, ref = -torch.rand(4, 5, dtype=F64), -torch.rand(4, 5, dtype=F64)
    logp = old + 0.2 * torch.randn(4, 5, dtype=F64)
    recipe = load_recipe("reg_grpo", beta=0.1, sigma_grad=True, c=0.5)
    assert recipe.whole_groups
    weight = torch.rand(4, dtype=F64)
    batch = recipe.prepare(Rollout(REWARDS, GROUP, mask, old, ref, token_weight=weight))
    a = reg_grpo.reg_grpo_advantages(REWARDS, GROUP)
    options = {"c": 0.5, "sigma_grad": True, "ref_logp": ref, "beta": 0.1}
    expected = reg_grpo.reg_grpo_loss(logp, old, a, mask, GROUP, **options, row_weight=weight)
    assert torch.equal(recipe.loss(logp, batch).loss, expected.loss)
    entropy = torch.rand(4, 5, dtype=F64).masked_fill(~mask, torch.nan)
    close(recipe.loss(logp, batch, entropy=entropy).metrics["entropy"], entropy[mask].mean(), atol=1e-12)
    z = prefkern.group_normalize(torch.where(mask, logp - old, 0.0).sum(1), GROUP, eps=1e-6)
    k3 = expected.metrics["kl"]
    close(expected.loss, (weight * (a - 0.5 * z).square()).mean() + 0.1 * k3, atol=1e-12)


def test_nan_is_found_under_validation(validation) -> None:
    validation(True)
    with pytest.raises(ValueError, match=r"log-ratio of completions\[2\] is nan"):
        run(torch.tensor([0.0, 1, math.nan, 2], dtype=F64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, "ref_logp is None; beta 0.1 needs"),
        ({"eps": -1.0}, "eps"),
        ({"row_weight": torch.ones(4, 1)}, r"row_weight is \[4, 1\]; \[B\] is expected"),
        ({"a": torch.ones(4, 1)}, r"advantages is \[4, 1\]; \[B\] is expected"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(X, **options)
    with pytest.raises(ValueError, match="window is 0"):
        reg_grpo.difficulty_shift(X, X, window=0)
