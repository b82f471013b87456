"""SmPO-Diffusion: worked numbers of weights, inversion and loss, what they must keep, and refusals."""

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern.papers.diffusion_dpo import diffusion_dpo_loss
from prefkern.papers.smpo_diffusion import SCORE_MAX, SCORE_MIN, renoise_invert, scaled_linear_abar, smooth_weight, smpo_loss

F64 = torch.float64
ABAR = scaled_linear_abar()


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-10):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def test_weights():
    a, b = f64(0.22, 0.18, 0.20), f64(0.20, 0.21, 0.20)
    out = smooth_weight(a, b)
    assert out.first_wins.tolist() == [True, False, False]
    close(out.weight, [0.5995904742210, 0.8980399248183, 0])
    close(0.5 + out.weight / 20, [0.5299795237111, 0.5449019962409, 0.5])  # p
    other = smooth_weight(b, a)
    assert torch.equal(other.weight, out.weight) and other.first_wins.tolist() == [False, True, False]
    assert smooth_weight(a.float(), b.float()).weight.dtype == torch.float32
    close(smooth_weight(f64(SCORE_MAX), f64(SCORE_MIN)).weight, [4.6211715726], 1e-9)
    close(smooth_weight(a, b, gamma=1.0).weight, (out.weight / 10).tolist(), 1e-15)
    close(smooth_weight(f64(3.0), f64(1.0), gamma=2.0, smin=0.0, smax=4.0).weight, [2 * math.tanh(0.25)], 1e-15)


def test_scores_outside_of_their_bounds_are_taken_as_they_are():
    with pytest.warns(UserWarning, match=r"scores outside of smin 0.115.* weights may exceed 4.62"):
        out = smooth_weight(f64(0.4), f64(0.1))
    close(out.weight, [10 * math.tanh(0.15 / (SCORE_MAX - SCORE_MIN))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert smooth_weight(f64(SCORE_MIN), f64(SCORE_MAX)).weight > 4.62
        assert smooth_weight(torch.zeros(0), torch.zeros(0)).weight.shape == (0,)


class Net:
    """Predictions one after the other, and the levels it was asked for."""

    def __init__(self, *predictions):
        self.predictions, self.asked = predictions, []

    def __call__(self, x, t):
        self.asked.append(t.tolist())
        return self.predictions[(len(self.asked) - 1) % len(self.predictions)].expand_as(x)


E = f64([0.2, -0.4], [0.4, 0], [0.1, 0.3], [-0.1, 0.1], [0.5, 0.5], [0, 1])


@pytest.mark.parametrize(
    ("match", "t", "tau"),
    [("code", 257, [0.1830741643619, 0.2960967978003]), ("exact", 201, [0.1063240274653, 0.3993205012555])],
)
def test_inversion(match, t, tau):
    net = Net(*E)
    out = renoise_invert(net, f64([1, -0.5]), 257, abar=ABAR, n_steps=10, match_level=match)
    close(out.x, [[0.9201956424706, -0.2348285032451]])
    close(out.tau, [tau])
    assert out.t.tolist() == [t] and net.asked == [[1], [1], [101], [101], [201], [201]]


def test_every_latent_takes_the_levels_below_its_own():
    x0 = torch.randn(4, 2, dtype=F64)
    t = torch.tensor([257, 1, 101, 102])
    out = renoise_invert(Net(*E), x0, t, abar=ABAR, n_steps=10, match_level="exact")
    assert out.t.tolist() == [201, 0, 1, 101]
    for i in range(4):
        alone = renoise_invert(Net(*E), x0[i : i + 1], t[i], abar=ABAR, n_steps=10)
        assert torch.equal(alone.x[0], out.x[i])
        close(alone.tau[0], ((out.x[i] - ABAR[t[i]].sqrt() * x0[i]) / (1 - ABAR[t[i]]).sqrt()).tolist(), 1e-12)
    net = Net(*E)
    low = renoise_invert(net, x0, torch.tensor([0, 1, 0, 1]), abar=ABAR, n_steps=10)
    assert not net.asked and torch.equal(low.x, x0)
    a = ABAR[[0, 1, 0, 1]]
    assert_close(low.tau, x0 * ((1 - a.sqrt()) / (1 - a).sqrt())[:, None], rtol=1e-9, atol=1e-15)


def test_inversion_of_a_constant_prediction_is_exact():
    """Started where the path is: at level 0 with the noise of that level."""
    x0, e = torch.randn(1, 6, dtype=F64), torch.randn(1, 6, dtype=F64)
    start = ABAR[0].sqrt() * x0 + (1 - ABAR[0]).sqrt() * e
    out = renoise_invert(Net(e), start, 999, abar=ABAR, n_steps=5)
    assert_close(out.x, ABAR[801].sqrt() * x0 + (1 - ABAR[801]).sqrt() * e, rtol=1e-12, atol=1e-13)
    from_clean = renoise_invert(Net(e), x0, 999, abar=ABAR, n_steps=5)
    assert (from_clean.x - out.x).abs().max() > 1e-3


def test_inversion_keeps_dtype_and_layout():
    x0 = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    e = torch.randn(2, 3, 4, 4)
    out = renoise_invert(lambda x, t: e, x0.requires_grad_(), 400, abar=ABAR, n_steps=4)
    assert out.x.is_contiguous(memory_format=torch.channels_last) and not out.x.requires_grad and not out.tau.requires_grad
    exact = renoise_invert(lambda x, t: e.double(), x0.detach().double(), 400, abar=ABAR, n_steps=4)
    assert_close(out.x.double(), exact.x, rtol=1e-6, atol=1e-6)
    assert renoise_invert(lambda x, t: e, x0.detach().bfloat16(), 400, abar=ABAR, n_steps=4).x.dtype == torch.bfloat16


PAIR = {"pred_w": f64([0.5, -0.2]), "pred_l": f64([0.1, 0.9]), "tau_w": f64([0.48, -0.25]), "tau_l": f64([0.2, 0.8])}
REFS = {"ref_w": f64([0.55, -0.3]), "ref_l": f64([0.15, 0.83])}


def test_loss():
    leaves = {name: PAIR[name].clone().requires_grad_() for name in ("pred_w", "pred_l")}
    out = smpo_loss(**{**PAIR, **leaves}, weight=f64(0.5995904742210), beta=2000.0, **REFS)
    close(out.metrics["margin"], 6.3256795030320, 1e-9)
    close(out.loss.detach(), 0.0017881500033)
    out.loss.backward()
    close(leaves["pred_w"].grad, [[0.0214239938038, 0.0535599845095]])
    close(leaves["pred_l"].grad, [[0.1071199690190, -0.1071199690190]])
    out = smpo_loss(**PAIR, weight=f64(0.5995904742210), beta=20.0, half=False, **REFS)
    close(out.metrics["margin"], 0.1265135900606)
    close(out.loss, 0.6318897637288)


def test_weights_at_their_ends():
    """Equal scores: log 2 and no gradient. Weight 1 and one noise for both: Diffusion-DPO."""
    leaf = PAIR["pred_w"].clone().requires_grad_()
    tie = smooth_weight(f64(0.2), f64(0.2)).weight
    out = smpo_loss(**{**PAIR, "pred_w": leaf}, weight=tie, beta=2000.0, **REFS)
    out.loss.backward()
    close(out.loss.detach(), math.log(2), 1e-15)
    assert not leaf.grad.any()
    shared = {**PAIR, "tau_l": PAIR["tau_w"]}
    dpo = diffusion_dpo_loss(PAIR["pred_w"], PAIR["pred_l"], PAIR["tau_w"], **REFS, beta=30.0)
    assert torch.equal(smpo_loss(**shared, weight=f64(1.0), beta=30.0, **REFS).loss, dpo.loss)
    errors = prefkern.diffusion_mse(REFS["ref_w"], PAIR["tau_w"]), prefkern.diffusion_mse(REFS["ref_l"], PAIR["tau_l"])
    a, b = (smpo_loss(*PAIR.values(), f64(-0.5), *e, beta=30.0, **r) for e, r in ((errors, {}), ((), REFS)))
    assert_close(a.loss, b.loss, rtol=1e-12, atol=0)


X = torch.zeros(2, 3)


def invert(**change):
    return renoise_invert(Net(X[0]), **{"x0": X, "t": 300, "abar": ABAR, "n_steps": 5, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smooth_weight(f64(0.2, math.nan), f64(0.2, 0.2)),
         ValueError, r"score_a\[1\] is nan; a finite number is expected"),
        (lambda: smooth_weight(f64(0.2), f64(math.inf)), ValueError, r"score_b\[0\] is inf"),
        (lambda: smooth_weight(f64(0.2), f64(0.2, 0.3)), ValueError, r"shapes \[1\] and \[2\]; \[B\] is expected twice"),
        (lambda: smooth_weight(f64(0.2), f64(0.2), gamma=0.0), ValueError, "gamma is 0.0; it must be finite and positive"),
        (lambda: smooth_weight(f64(0.2), f64(0.2), smin=1.0, smax=1.0), ValueError, "smin must be less than smax"),
        (lambda: smooth_weight(0.2, f64(0.2)), TypeError, "score_a is a float"),
        (lambda: invert(t=1000), ValueError, r"t\[0\] is 1000; accepted: 0 to 999"),
        (lambda: invert(t=torch.tensor([3, -1])), ValueError, r"t\[1\] is -1; accepted: 0 to 999"),
        (lambda: invert(t=torch.tensor([3, 4, 5])), ValueError, r"t has shape \[3\]; \[2\] is expected"),
        (lambda: invert(t=3.5), TypeError, "t has dtype float32; integers are expected"),
        (lambda: invert(n_steps=0), ValueError, "n_steps is 0; it must be at least 1 and at most 1000"),
        (lambda: invert(match_level="both"), ValueError, "match_level is 'both'; accepted: 'code', 'exact'"),
        (lambda: invert(x0=X[:0]), ValueError, r"x0 has shape \[0, 3\]; \[B, ...\] is expected"),
        (lambda: invert(abar=torch.tensor([1.0, 0.9, 0.5]), t=0, n_steps=1), ValueError, r"abar\[0\] is 1: there is no noise"),
        (lambda: invert(abar=torch.tensor([1.0, 0.9, 0.5]), t=1, n_steps=1, match_level="exact"),
         ValueError, r"abar\[0\] is 1"),
        (lambda: invert(abar=torch.tensor([0.9, 0.0])), ValueError, r"abar\[1\] is 0.0; it must be greater than 0"),
        (lambda: smpo_loss(X, X, X, X, torch.ones(3), ref_w=X, ref_l=X, beta=1.0), ValueError, r"weight has shape \[3\]"),
        (lambda: smpo_loss(X, X, X, X, torch.ones(2), beta=1.0), ValueError, "no reference given"),
    ],
)  # fmt: skip
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_schedule_that_starts_clean_is_fine_where_nothing_is_divided_by_it():
    abar = torch.tensor([1.0, 0.9, 0.5], dtype=F64)
    out = renoise_invert(Net(f64(0.5)), torch.ones(1, 1, dtype=F64), 2, abar=abar, n_steps=1)
    close(out.x, [[math.sqrt(0.9) + math.sqrt(0.1) * 0.5]], 1e-14)
