"""CPO, CPO-SimPO and AlphaPO against worked numbers, definitions and their identities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from pair_cases import (
    CHOSEN,
    CHOSEN_LENGTHS,
    F64,
    MEAN_CHOSEN,
    MEAN_REJECTED,
    ONES,
    REJECTED,
    REJECTED_LENGTHS,
    assert_layouts_agree,
    close,
    gradients,
    sums,
)
from prefkern.papers import load_pair_recipe
from prefkern.papers.cpo import cpo_loss
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.simpo import simpo_loss

LENGTHS = (CHOSEN_LENGTHS, REJECTED_LENGTHS)


def run(chosen=MEAN_CHOSEN, rejected=MEAN_REJECTED, lengths=(ONES, ONES), **options):
    options = {"cpo_alpha": 0, "reduction": "none", **options}
    out, x, y = gradients(lambda x, y: cpo_loss(x, y, *lengths, **options), chosen, rejected)
    return out.loss.detach(), out.metrics, x, y


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        ({}, [0.6635971131, 0.6302581947]),
        ({"kind": "simpo", "beta": 2.0, "gamma": 1.0}, [0.5981388694, 0.1839007409]),
        ({"kind": "simpo", "beta": 2.0, "gamma": 0.5, "alpha": 0.25}, [0.3424542127, 0.0257327402]),
    ],
)
def test_worked_numbers(options, losses) -> None:
    loss, _, chosen, rejected = run(**options)
    close(loss, losses)
    alpha, beta = options.get("alpha", 0.0), options.get("beta", 0.1)
    slope = beta * torch.expm1(-loss)  # -(1 - sigma(z))
    close(chosen, slope * (-alpha * MEAN_CHOSEN).exp())
    close(rejected, -slope * (-alpha * MEAN_REJECTED).exp())


def test_gamma_of_simpo_is_a_half() -> None:
    close(run(kind="simpo", beta=2.0)[0], run(kind="simpo", beta=2.0, gamma=0.5)[0])
    close(run(kind="simpo", beta=2.0, gamma=0.0)[0], -logsigmoid(2 * (MEAN_CHOSEN - MEAN_REJECTED)))


def test_kinds_take_sums_or_means() -> None:
    d = CHOSEN - REJECTED
    a_w, a_l = CHOSEN / CHOSEN_LENGTHS, REJECTED / REJECTED_LENGTHS
    smoothed = -0.9 * logsigmoid(0.1 * d) - 0.1 * logsigmoid(-0.1 * d)
    close(run(CHOSEN, REJECTED, LENGTHS, label_smoothing=0.1)[0], smoothed)
    loss, _, chosen, rejected = run(CHOSEN, REJECTED, LENGTHS, kind="hinge", beta=0.25)
    close(loss, torch.relu(1 - 0.25 * d))
    close(chosen, [-0.25, -0.25])
    close(rejected, [0.25, 0.25])
    loss, _, chosen, _ = run(CHOSEN, REJECTED, LENGTHS, kind="ipo")
    close(loss, (a_w - a_l - 5).square())
    close(chosen, 2 * (a_w - a_l - 5) / CHOSEN_LENGTHS)
    loss, metrics, _, _ = run(CHOSEN, REJECTED, LENGTHS, kind="simpo", beta=2.0, gamma=1.0, label_smoothing=0.1)
    z = 2 * (a_w - a_l) - 1
    close(loss, -0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z))
    close(metrics["chosen_reward"], 2 * a_w.mean())


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "simpo"])
@pytest.mark.parametrize("alpha", [0.25, 1.0, -0.5])
def test_alpha_is_alphapo_in_every_kind(kind, alpha) -> None:
    loss, metrics, chosen, _ = run(CHOSEN, REJECTED, LENGTHS, kind=kind, beta=0.2, alpha=alpha)

    def definition(x):
        mean = kind in ("ipo", "simpo")
        w, lose = (x / CHOSEN_LENGTHS, REJECTED / REJECTED_LENGTHS) if mean else (x, REJECTED)
        r_w, r_l = (1 - (-alpha * w).exp()) / alpha, (1 - (-alpha * lose).exp()) / alpha
        z = 0.2 * (r_w - r_l)
        by_kind = {
            "sigmoid": -logsigmoid(z), "simpo": -logsigmoid(z - 0.5), "hinge": torch.relu(1 - z),
            "ipo": (r_w - r_l - 2.5).square(),
        }  # fmt: skip
        return by_kind[kind], 0.2 * r_w.mean(), 0.2 * r_l.mean()

    x = CHOSEN.clone().requires_grad_()
    expected, reward, rejected_reward = definition(x)
    assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    assert_close(chosen, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-10, atol=1e-12)
    assert_close(metrics["chosen_reward"], reward.detach(), rtol=1e-10, atol=1e-10)
    assert_close(metrics["rejected_reward"], rejected_reward.detach(), rtol=1e-10, atol=1e-10)


def test_a_small_alpha_is_no_alpha() -> None:
    close(run(alpha=1e-5)[0], run()[0], atol=1e-5)


def test_exponents_are_held() -> None:
    """exp(500 / 4) is beyond float32, in which TRL's e^v is 0 besides."""
    chosen, rejected = torch.tensor([-500.0, -1.0], requires_grad=True), torch.tensor([-2.0, -2.0])
    out = cpo_loss(chosen, rejected, alpha=0.25, cpo_alpha=0)
    assert out.loss.isfinite() and out.metrics["clamped"] == 1
    (gradient,) = torch.autograd.grad(out.loss, chosen)
    assert gradient[0] == 0 and gradient[1] < 0


def test_the_likelihood_and_its_reductions() -> None:
    pairs = run(CHOSEN, REJECTED, LENGTHS)[0].mean()
    for reduction, term in (("token", 18 / 6), ("response", (10 / 4 + 8 / 2) / 2), ("sum", 9.0)):
        out = cpo_loss(CHOSEN, REJECTED, *LENGTHS, cpo_alpha=0.5, nll_reduction=reduction)
        close(out.loss, pairs + 0.5 * term)
        close(out.metrics["nll"], term)
    _, _, chosen, rejected = run(CHOSEN, REJECTED, LENGTHS, cpo_alpha=1.0, reduction="mean")
    without = run(CHOSEN, REJECTED, LENGTHS, reduction="mean")
    close(chosen - without[2], [-1 / 6, -1 / 6])
    close(rejected, without[3])
    close(cpo_loss(CHOSEN, REJECTED, *LENGTHS).loss, pairs + 3)  # TRL's weight is 1
    assert "nll" not in run()[1]


def test_identities() -> None:
    close(run(CHOSEN, REJECTED)[0], dpo_loss(CHOSEN, REJECTED, reduction="none").loss)
    expected = simpo_loss(CHOSEN, REJECTED, *LENGTHS, gamma=1.0, reduction="none").loss
    close(run(CHOSEN, REJECTED, LENGTHS, kind="simpo", beta=2.0, gamma=1.0)[0], expected)


@given(st.floats(-40, 40), st.floats(0.01, 5))
def test_adding_to_both_sides_changes_nothing(shift, beta) -> None:
    one, other = run(CHOSEN, REJECTED, beta=beta), run(CHOSEN + shift, REJECTED + shift, beta=beta)
    close(one[0], other[0], atol=1e-9)
    close(one[2], other[2], atol=1e-9)
    close(one[2], -one[3])


@pytest.mark.parametrize("options", [{}, {"kind": "simpo", "alpha": 0.25, "beta": 2.0}])
def test_recipe(options) -> None:
    counts = torch.tensor([5, 2, 3]), torch.tensor([1, 4, 5])

    def expected(logp, _):
        return cpo_loss(*sums(logp), *counts, **options).loss

    assert_layouts_agree(load_pair_recipe("cpo", **options), expected)
    assert load_pair_recipe("cpo").needs == () and load_pair_recipe("cpo:kind=ipo,beta=0.5").beta == 0.5


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kind is 'logistic'; accepted: 'sigmoid', 'hinge', 'ipo', 'simpo'"):
        cpo_loss(CHOSEN, REJECTED, kind="logistic")
    with pytest.raises(ValueError, match=r"gamma is 1\.0 but kind is 'sigmoid'; it means something for 'simpo'"):
        cpo_loss(CHOSEN, REJECTED, gamma=1.0)
    for kind in ("ipo", "simpo"):
        with pytest.raises(ValueError, match=f"chosen_lengths is None; kind {kind!r} takes the mean log-prob and needs it"):
            cpo_loss(CHOSEN, REJECTED, kind=kind)
    with pytest.raises(ValueError, match=r"rejected_lengths\[1\] is 0; a response needs at least one token"):
        cpo_loss(CHOSEN, REJECTED, CHOSEN_LENGTHS, torch.tensor([1, 0]), kind="simpo")
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1 but kind is 'hinge'"):
        cpo_loss(CHOSEN, REJECTED, kind="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="chosen_lengths is None; nll_reduction 'token' needs them"):
        cpo_loss(CHOSEN, REJECTED)


def test_nan_is_not_hidden() -> None:
    broken = torch.tensor([math.nan, -1.0], dtype=F64)
    assert cpo_loss(broken, REJECTED, cpo_alpha=0).loss.isnan()
