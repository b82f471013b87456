"""MADPO: worked weights and losses, the target margin that they mean, margins of any size, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import madpo

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


H = vector(0, 0.5, 1, 2, 5, 9, -1, -3, -6, -8)
LOGPS = [vector(-10, -8), vector(-12, -7), vector(-11, -7.5), vector(-11.5, -8)]


# ---- worked numbers


def test_worked_weights_of_the_class_defaults() -> None:
    close(madpo.madpo_scale(H.abs(), tau=2), [
        1.6804790632, 1.5371576811, 1.3641753271, 1.0, 0.5364333465, 0.5006835998, 1.3641753271, 0.7330436052, 0.5136120723,
        0.5018567629,
    ])  # fmt: skip
    close(madpo.madpo_weight(H, tau=2), [
        1, 1.0976032554, 1.0894304275, 1, 0.9422725963, 0.9892017721, 0.7569028941, 1, 1, 1,
    ])  # fmt: skip


def test_worked_weights_of_the_published_runs() -> None:
    close(madpo.madpo_weight(H), [
        1, 1.1736882117, 1.2036545911, 1.1140192088, 1.0064832822, 0.9950755952, 0.4464094258, 0.0620135585, 0.1385304907, 1,
    ])  # fmt: skip
    assert pytest.approx(6.906754778648554, abs=1e-14) == madpo.TAU
    h = torch.linspace(1e-6, 50, 100_000, dtype=F64)
    easy = madpo.madpo_weight(h)
    close(easy.min(), 0.9949, 1e-4)
    close(easy.max(), 1.2060, 1e-4)
    close(h[easy.argmax()], 0.88, 1e-2)
    against = madpo.madpo_weight(torch.linspace(-6.9, -1e-6, 100_000, dtype=F64))
    close(against.min(), 0.031, 1e-3)


def test_worked_loss() -> None:
    logps = [logp.clone().requires_grad_() for logp in LOGPS]
    margin = vector(1, -3).requires_grad_()
    loss, metrics = madpo.madpo_loss(*logps, margin, tau=2)
    close(loss.detach(), 0.7237232749)
    close(loss.detach(), (0.6764895020 + 0.7709570478) / 2)
    chosen, rejected, *constants = torch.autograd.grad(loss, [*logps, margin], allow_unused=True)
    close(chosen, [-0.0251969001, -0.0268714923])
    assert rejected.equal(-chosen) and constants == [None, None, None]
    close(metrics["weight_mean"], (1.0894304275 + 1) / 2)


def test_worked_target_margins() -> None:
    h = vector(0.5, 1.5, 3)
    target = (torch.sigmoid(h) * madpo.madpo_weight(h, tau=4)).log() - (torch.sigmoid(-h) * madpo.madpo_weight(-h, tau=4)).log()
    close(target, [0.9572837621, 2.6827074270, 4.0925259814])
    close(target, madpo.madpo_scale(h, tau=4) * h, 1e-12)


# ---- properties


@given(st.floats(-30, 30), st.floats(1.1, 4), st.floats(0.1, 3), st.floats(0, 8))
def test_against_the_formula(h, c_max, lmbda, tau) -> None:
    options = {"c_max": c_max, "lmbda": lmbda, "tau": tau}
    c_min = 1 / c_max
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(lmbda * (abs(h) - tau)))
    close(madpo.madpo_scale(vector(abs(h)), **options), [c], 1e-12)
    ratio = math.exp(float(F.logsigmoid(vector(c * h)) - F.logsigmoid(vector(h))))
    found = madpo.madpo_weight(vector(h), **options)
    assert_close(found, vector(ratio if h > -tau else 1), rtol=1e-9, atol=0)
    assert_close(madpo.madpo_weight(vector(h), **options, floor_below_tau=False), vector(ratio), rtol=1e-9, atol=0)
    assert found > 0 and c_min <= c <= c_max
    close(madpo.madpo_scale(vector(tau), **options), [1], 1e-12)
    close(madpo.madpo_weight(vector(0, tau), **options), [1, 1], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_margins_of_any_size_have_finite_weights(dtype) -> None:
    h = torch.tensor([0, 1e-30, 50, 100, 800, 1e30, math.inf, -1e-30, -5, -50, -100, -800, -1e30, -math.inf], dtype=dtype)
    weight = madpo.madpo_weight(h)
    assert weight.isfinite().all() and (weight > 0).all() and weight.dtype == (F64 if dtype == F64 else torch.float32)
    close(weight[[2, 3, 4, 5, 6]].double(), [1] * 5, 1e-6)
    assert weight[9:].tolist() == [1] * 5
    ratio = madpo.madpo_weight(h, floor_below_tau=False)
    assert ratio.isfinite().all() and ratio[-1] == pytest.approx(math.exp(80), rel=1e-5)
    assert_close(ratio[9].double(), vector(math.exp(25))[0], rtol=1e-4, atol=0)
    logp = torch.zeros(len(h), requires_grad=True)
    loss = madpo.madpo_loss(logp, logp * 0.5, torch.zeros(len(h)), torch.zeros(len(h)), h.float()).loss
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()


def test_both_scales_one_is_dpo() -> None:
    plain = prefkern.preference_loss(*LOGPS, beta=0.1)
    assert madpo.madpo_weight(H, c_max=1).equal(torch.ones(10, dtype=F64))  # 1 / c_max is 1 as well
    one = madpo.madpo_loss(*LOGPS, vector(3, -2), c_max=1, c_min=1)
    assert one.loss == plain.loss and one.metrics["weight_mean"] == 1
    alike = madpo.madpo_loss(*LOGPS, vector(0.5, 0.5))
    close(alike.loss, madpo.madpo_weight(vector(0.5))[0] * plain.loss, 1e-14)  # equal margins scale the loss


def test_the_minimiser_has_the_target_margin() -> None:
    """Each pair in both orders, as often as h says: the weighted loss is least where beta D = c(h) h."""
    h, beta = vector(0.3, 1.0, 2.5, 6.0), 0.1
    often = torch.stack([torch.sigmoid(h), torch.sigmoid(-h)])
    D = torch.zeros(4, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([D], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe")
    weight = torch.stack([madpo.madpo_weight(h), madpo.madpo_weight(-h)])

    def closure():
        optimizer.zero_grad()
        loss = (often * weight * F.softplus(torch.stack([-beta * D, beta * D]))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_close(beta * D.detach(), madpo.madpo_scale(h) * h, rtol=1e-4, atol=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c_max": 0.5}, "c_min is 2.0 and c_max is 0.5; 0 < c_min < 1 < c_max is expected, or both 1"),
        ({"c_min": 1.0}, "c_min is 1.0 and c_max is 2"),
        ({"c_min": 0.0}, "c_min is 0.0"),
        ({"c_max": math.inf}, "c_max is inf"),
        ({"lmbda": -1}, "lmbda is -1; it must not be negative"),
        ({"tau": -1}, "tau is -1; it must not be negative"),
    ],
)
def test_options_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        madpo.madpo_weight(H, **options)


def test_margins_refused() -> None:
    with pytest.raises(ValueError, match=r"margin\[1\] is nan; a number is expected"):
        madpo.madpo_loss(*LOGPS, vector(1, math.nan))
    with pytest.raises(ValueError, match=r"margin has shape \[1\]; \[2\] is expected"):
        madpo.madpo_loss(*LOGPS, vector(1))


def test_on_a_gpu_a_nan_margin_is_a_nan_weight(device) -> None:
    margin = torch.tensor([1.0, math.nan], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"margin\[1\] is nan"):
            madpo.madpo_weight(margin)
    else:
        assert madpo.madpo_weight(margin).isnan().tolist() == [False, True]
