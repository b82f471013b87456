"""MODPO: worked numbers, the closed-form optimum, invariances, refusals."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import modpo

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


LOGPS = [vector(-10, -8), vector(-12, -7), vector(-11, -7.5), vector(-11.5, -8)]
MARGINS = [vector(0.8, -0.2), vector(0.1, 0.5)]


def run(margins=MARGINS, weights=(0.5, 0.5), **options):
    logps = [logp.clone().requires_grad_() for logp in LOGPS]
    loss, metrics = modpo.modpo_loss(*logps, *margins, weights, **options)
    return loss.detach(), metrics, *torch.autograd.grad(loss.sum(), logps, allow_unused=True)


# ---- worked numbers


@pytest.mark.parametrize(
    ("weights", "chosen", "rejected", "pairs", "gradient"),
    [
        ((0.5, 0.5), [-0.6, 0.1], [-0.2, -0.3], [0.9130152524, 0.5130152524], [-0.0598687660, -0.0401312340]),
        ((0.1, 0.9), [-6.2, 1.3], [-1.4, -3.5], [4.8081960673, 0.0081960673], [-0.4959187144, -0.0040812856]),
        ((1.0, 0.0), None, None, [0.6209570478, 0.7709570478], None),
    ],
)
def test_worked_numbers(weights, chosen, rejected, pairs, gradient) -> None:
    if chosen is not None:
        close(modpo.modpo_rewards(LOGPS[0], LOGPS[2], MARGINS[0], weights), chosen)
        close(modpo.modpo_rewards(LOGPS[1], LOGPS[3], MARGINS[1], weights), rejected)
    close(run(weights=weights, reduction="none")[0], pairs)
    loss, metrics, found, other, *references = run(weights=weights)
    close(loss, sum(pairs) / 2)
    if gradient is not None:
        close(found, gradient)
    assert other.equal(-found) and references == [None, None]
    close(metrics["margin_gap"], weights[1] * (0.7 - 0.7) / 2, 1e-15)
    close(run(weights=weights, reduction="sum")[0], sum(pairs))


def test_hinge() -> None:
    z = modpo.modpo_rewards(LOGPS[0], LOGPS[2], MARGINS[0], (0.5, 0.5)) - modpo.modpo_rewards(
        LOGPS[1], LOGPS[3], MARGINS[1], (0.5, 0.5)
    )
    close(run(kind="hinge")[0], (1 - z).clamp_min(0).mean(), 1e-14)


def test_implicit_rewards() -> None:
    logp = LOGPS[0].clone().requires_grad_()
    reward = modpo.implicit_reward(logp, LOGPS[2])
    close(reward, [0.1, -0.05], 1e-15)
    assert not reward.requires_grad and modpo.modpo_rewards(logp, LOGPS[2], None, (1.0,)).requires_grad


# ---- properties


@given(st.floats(-50, 50), st.floats(0.05, 0.95))
def test_a_shared_margin_cancels(shift, first) -> None:
    weights = (first, 1 - first)
    moved = run([m + vector(shift, -2 * shift) for m in MARGINS], weights)
    plain = run(weights=weights)
    close(moved[0], plain[0], 1e-10)
    close(moved[2], plain[2], 1e-10)


def test_without_other_objectives_it_is_dpo() -> None:
    for margins in ((None, None), (torch.zeros(2, 0), torch.zeros(2, 0))):
        loss, metrics, gradient, *_ = run(margins, (1.0,))
        logp = LOGPS[0].clone().requires_grad_()
        plain = prefkern.preference_loss(logp, *LOGPS[1:], beta=0.1).loss
        close(loss, plain.detach(), 1e-15)
        close(gradient, torch.autograd.grad(plain, logp)[0], 1e-15)
        assert metrics["margin_gap"] == 0
    same = [MARGINS[0], MARGINS[0]]
    close(run(same, (0.2, 0.8))[0], prefkern.preference_loss(*LOGPS, beta=0.1 / 0.2).loss, 1e-15)


def test_margins_are_constants_that_move_the_loss_as_they_should() -> None:
    weights = (0.4, 0.35, 0.25)
    margins = [torch.randn(2, 2, dtype=F64) for _ in range(2)]
    z = modpo.modpo_rewards(LOGPS[0], LOGPS[2], margins[0], weights) - modpo.modpo_rewards(
        LOGPS[1], LOGPS[3], margins[1], weights
    )
    for k in range(2):
        step = torch.zeros(2, 2, dtype=F64)
        step[0, k] = 1e-6
        slope = (run([margins[0] + step, margins[1]], weights)[0] - run([margins[0] - step, margins[1]], weights)[0]) / 2e-6
        close(slope, weights[k + 1] / weights[0] * torch.sigmoid(-z[0]) / 2, 1e-8)
    margin = margins[0].clone().requires_grad_()
    loss = modpo.modpo_loss(*LOGPS, margin, margins[1], weights).loss
    assert not loss.requires_grad and loss == run(margins, weights)[0]


def test_a_huge_margin_saturates_and_stays_finite() -> None:
    loss, _, gradient, *_ = run([MARGINS[0] + vector(1e6, 0), MARGINS[1]])
    assert loss.isfinite() and gradient.isfinite().all()
    close(gradient[0], -0.1 / 0.5 / 2, 1e-12)


@pytest.mark.parametrize("first", [0.1, 0.5, 0.9])
def test_the_optimum_is_that_of_the_sum_of_rewards(first) -> None:
    """A table of responses; pairs by Bradley-Terry on r_0 only, the margin is r_1, and the expected loss is minimised."""
    generator = torch.Generator().manual_seed(0)
    n, beta, weights = 8, 0.5, (first, 1 - first)
    ref = torch.log_softmax(torch.randn(n, dtype=F64, generator=generator), 0)
    r_0, r_1 = torch.randn(2, n, dtype=F64, generator=generator)
    i, j = torch.tensor([(a, b) for a in range(n) for b in range(n) if a != b]).T
    often = torch.sigmoid(r_0[i] - r_0[j])
    logits = torch.zeros(n, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logp = torch.log_softmax(logits, 0)
        losses = modpo.modpo_loss(logp[i], logp[j], ref[i], ref[j], r_1[i], r_1[j], weights, beta=beta, reduction="none").loss
        loss = (losses * often).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = torch.softmax(ref + (weights[0] * r_0 + weights[1] * r_1) / beta, 0)
    assert (torch.softmax(logits.detach(), 0) - best).abs().sum() / 2 < 1e-3


# ---- refusals


def test_weights_that_do_not_add_up_warn() -> None:
    with pytest.warns(UserWarning, match=r"weights add up to 1.5, not 1: the result is that of a rescaled reward"):
        run(weights=(0.5, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(weights=(0.1, 0.9))


@pytest.mark.parametrize(
    ("margins", "weights", "options", "message"),
    [
        (MARGINS, (0.0, 1.0), {}, r"weights\[0\] is 0.0; it must be positive, 0.01 or more"),
        (MARGINS, (-0.5, 1.5), {}, r"weights\[0\] is -0.5"),
        (MARGINS, (), {}, "weights is empty; one number per objective"),
        (MARGINS, (0.5, 0.25, 0.25), {}, r"chosen_margin has shape \[2, 1\]; \[2, 2\] is expected for 3 weights"),
        ((MARGINS[0], None), (0.5, 0.5), {}, r"rejected_margin is None; \[2, 1\] is expected for 2 weights"),
        ((MARGINS[0], vector(0, math.nan)), (0.5, 0.5), {}, r"rejected_margin\[1\] is \[nan\]; numbers are expected"),
        (MARGINS, (0.5, 0.5), {"kind": "ipo"}, "kind is 'ipo'; accepted: 'sigmoid', 'hinge'"),
        (MARGINS, (0.5, 0.5), {"reduction": "avg"}, "reduction is 'avg'; accepted: 'mean', 'sum', 'none'"),
    ],
)
def test_refused(margins, weights, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(margins, weights, **options)
