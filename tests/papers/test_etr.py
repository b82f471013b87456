"""ETR-style elastic clipping: the worked numbers of elastic-v1, its invariants and its edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, etr, load_recipe, take_rows

F64 = torch.float64
REWARDS = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0], dtype=F64)
GROUP = torch.arange(8) // 4
RATIOS = torch.tensor([1.3, 0.7, 0.9, 1.1, 1.3, 1.1, 0.7, 0.85], dtype=F64)
SCALE = torch.tensor([1.0937486875, *[0.6562495625] * 3, *[0.9330119519] * 4], dtype=F64)


def close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    assert_close(actual.detach(), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def advantages(rewards=REWARDS, group=GROUP):
    return prefkern.group_advantages(rewards, group).advantages


def test_worked_scale_and_bounds() -> None:
    a = advantages()
    close(a, [1.4999970, *[-0.4999990] * 3, 0.8660239038, 0.8660239038, -0.8660239038, -0.8660239038], atol=5e-8)
    scale, micro, macro = etr.elastic_scale(a, REWARDS, GROUP)
    close(2 * macro - 1, [0.75] * 4 + [1] * 4)  # v
    close(2 * micro - 1, a.abs())
    close(scale, SCALE)
    low, high = etr.elastic_clip(a, REWARDS, GROUP)
    close(low, [0.2187497375, *[0.1312499125] * 3, *[0.1866023904] * 4])
    assert torch.equal(low, high)


def test_worked_loss_and_gradient() -> None:
    logp = RATIOS.log()[:, None].requires_grad_()
    recipe = load_recipe("etr")
    loss, metrics = recipe.loss(logp, recipe.prepare(Rollout(REWARDS, GROUP, old_logp=torch.zeros(8, 1, dtype=F64))))
    loss.backward()
    close(loss, -0.1166823765)
    close(logp.grad[:, 0], [0, 0, 0.0562498875, 0.0687498625, 0, -0.1190782868, 0, 0.0920150398])
    close(metrics["clip_fraction_low"] + metrics["clip_fraction_high"], 0.5)
    close(metrics["elastic_micro"], (0.5 + 0.5 * advantages().abs()).mean())
    close(metrics["elastic_macro"], (0.875 + 1) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_without_elasticity_it_is_grpo_to_the_bit(dtype) -> None:
    rewards = REWARDS.to(dtype)
    old = -torch.rand(8, 5, dtype=dtype)
    logp = (old + 0.4 * torch.randn(8, 5, dtype=dtype)).requires_grad_()
    recipe = load_recipe("etr:alpha=0,beta=0", eps_high=0.28)
    out = recipe.loss(logp, recipe.prepare(Rollout(rewards, GROUP, old_logp=old)))
    plain = prefkern.policy_loss(logp, old, advantages(rewards), eps_high=0.28)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(torch.autograd.grad(out.loss, logp)[0], torch.autograd.grad(plain.loss, logp)[0])


@given(size=st.floats(0, 5), more=st.floats(0, 5))
def test_the_scale_grows_with_the_advantage(size, more) -> None:
    a = torch.tensor([size, size + more, -size - more], dtype=F64)
    rewards, group = torch.tensor([1.0, 0, 0], dtype=F64), torch.zeros(3, dtype=torch.int64)
    scale = etr.elastic_scale(a, rewards, group).scale
    assert scale[0] <= scale[1] == scale[2]
    assert bool((scale >= 0.25).all() and (scale <= 2).all())


def test_the_scale_grows_with_the_variance_of_the_group() -> None:
    rewards = torch.tensor([float(i < k) for k in range(5) for i in range(8)], dtype=F64)
    group = torch.arange(40) // 8
    scale = etr.elastic_scale(torch.ones(40, dtype=F64), rewards, group).scale[::8]
    assert bool((scale.diff() > 0).all())
    close(scale, [1 + 0.5 * (4 * p * (1 - p) - 1) for p in (0, 1 / 8, 2 / 8, 3 / 8, 4 / 8)])


def test_rows_may_come_in_any_order() -> None:
    order = torch.randperm(8)
    low, _ = etr.elastic_clip(advantages()[order], REWARDS[order], GROUP[order])
    close(low, (0.2 * SCALE)[order])


def test_the_range_of_the_task() -> None:
    a = advantages()
    assert_close(
        etr.elastic_scale(a, 5 * REWARDS - 2, GROUP, reward_range=5.0).scale, etr.elastic_scale(a, REWARDS, GROUP).scale
    )
    scale = etr.elastic_scale(a, REWARDS, GROUP, beta=0.0, reward_range=0.0).scale
    close(scale, (0.5 + 0.5 * a.abs()))


def test_a_lower_bound_remains() -> None:
    low, high = etr.elastic_clip(
        torch.full((2,), 9.0), torch.tensor([1.0, 0]), torch.zeros(2).long(), eps_low=0.9, eps_high=3.0
    )
    assert_close(low, torch.full((2,), 0.999))
    assert_close(high, torch.full((2,), 6.0))


def test_a_constant_group_adds_nothing() -> None:
    logp = torch.randn(4, 3, requires_grad=True)
    recipe = load_recipe("etr")
    batch = recipe.prepare(Rollout(torch.ones(4), torch.zeros(4).long(), old_logp=torch.zeros(4, 3)))
    out = recipe.loss(logp, batch)
    out.loss.backward()
    assert out.loss == 0 and not logp.grad.any()
    assert bool((batch["macro"] == 0.5).all())


def test_a_minibatch_keeps_its_own_bounds() -> None:
    old = torch.zeros(8, 1, dtype=F64)
    logp = RATIOS.log()[:, None]
    recipe = load_recipe("etr")
    batch = recipe.prepare(Rollout(REWARDS, GROUP, old_logp=old))
    rows = torch.tensor([6, 0])
    low, high = etr.elastic_clip(advantages(), REWARDS, GROUP)
    expected = prefkern.policy_loss(logp[rows], old[rows], advantages()[rows], eps_low=low[rows], eps_high=high[rows])
    assert_close(recipe.loss(logp[rows], take_rows(batch, rows)).loss, expected.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5; accepted: from 0 to 1"),
        ({"beta": -0.1}, "beta is -0.1; accepted: from 0 to 1"),
        ({"s_min": 0.0}, "s_min is 0.0 and s_max 2.0; accepted: 0 < s_min <= s_max"),
        ({"s_min": 3.0}, "s_min is 3.0 and s_max 2.0"),
        ({"a_cap": 0.0}, "a_cap is 0.0; it must be positive"),
        ({"reward_range": 0.0}, "reward_range is 0.0; it must be positive, unless beta is 0"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        etr.elastic_clip(advantages(), REWARDS, GROUP, **options)


def test_nan_names_its_row() -> None:
    a = advantages()
    a[3] = math.nan
    with pytest.raises(ValueError, match=r"advantages\[3\] is nan"):
        etr.elastic_clip(a, REWARDS, GROUP)


def test_it_is_not_said_to_be_the_paper_s() -> None:
    assert etr.about.evidence == "inferred"
    assert "elastic-v1" in etr.__doc__ and "Evidence: inferred." in etr.__doc__
