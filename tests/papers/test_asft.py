"""ASFT (aligned) against worked numbers, its algebra, and its edges at certainty."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.asft import asft_loss

F64 = torch.float64
A_W, A_L = torch.tensor([[-0.3, -1.2], [-0.9, -2.5]], dtype=F64)
LOG_ODDS_W, LOG_ODDS_L = [1.0502256128, -0.8416175821], [-0.3781645571, -2.4143495163]


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(a_w=A_W, a_l=A_L, lengths=None, **options):
    """Loss, metrics, and the gradients of its sum in the summed log-probs; means unless there are lengths."""
    x, y = (torch.as_tensor(a, dtype=F64).reshape(-1).clone().requires_grad_() for a in (a_w, a_l))
    ones = torch.ones(len(x), dtype=torch.int64)
    out = asft_loss(x, y, *((ones, ones) if lengths is None else lengths), **options)
    return out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss.sum(), (x, y))


def test_worked_numbers() -> None:
    loss, metrics, chosen, rejected = run(reduction="none")
    close(loss, [1.1218354429, 2.4856504837])
    close(chosen, [-2, -2])
    close(rejected, [0.6851177504, 0.0894254898], atol=2e-10)
    close(metrics["chosen_reward"], sum(LOG_ODDS_W) / 2)
    close(metrics["rejected_reward"], sum(LOG_ODDS_L) / 2)
    for i in range(2):
        metrics = run(A_W[i], A_L[i])[1]
        close(metrics["chosen_reward"], LOG_ODDS_W[i])
        close(metrics["rejected_reward"], LOG_ODDS_L[i])
    loss, _, chosen, rejected = run()
    close(loss, 1.8037429633)
    close(chosen, [-1, -1])
    close(rejected, [0.3425588752, 0.0447127449])


def test_worked_numbers_of_another_beta() -> None:
    close(run(lam=0.5, beta=0.1, reduction="none")[0], [0.9582158433, 1.8579058147])
    loss, metrics, chosen, rejected = run(lam=0.5, beta=0.1)
    close(loss, 1.4080608290)
    close(metrics["chosen_reward"], 0.1 * sum(LOG_ODDS_W) / 2)
    odds_w, odds_l = torch.tensor([LOG_ODDS_W, LOG_ODDS_L], dtype=F64)
    close(chosen, (-1 - 0.05 * torch.sigmoid(-0.1 * odds_w) / (1 - A_W.exp())) / 2)
    close(rejected, 0.05 * torch.sigmoid(0.1 * odds_l) / (1 - A_L.exp()) / 2)


@pytest.mark.parametrize(
    "options", [{}, {"lam": 0.5, "ce_coef": 0.3}, {"beta": 0.1}, {"beta": 3.0, "lam": 2.0}, {"max_p": 0.5}]
)
def test_gradients_are_those_of_differences(options) -> None:
    x, y = (-torch.rand(2, 6, dtype=F64) - 0.05).unbind()
    lengths = torch.randint(1, 5, (2, 6)).unbind()
    x, y = (x * lengths[0]).requires_grad_(), (y * lengths[1]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: asft_loss(x, y, *lengths, **options).loss, (x, y))


negative = st.floats(-8, -0.01)


@given(negative, negative, st.floats(0, 3), st.floats(0, 3))
def test_with_beta_1_it_is_the_papers_form(a_w, a_l, lam, ce_coef) -> None:
    loss, _, chosen, rejected = run(a_w, a_l, lam=lam, ce_coef=ce_coef)
    close(loss, -(ce_coef + lam) * a_w - lam * math.log(-math.expm1(a_l)), atol=1e-12)
    close(chosen, [-(ce_coef + lam)], atol=1e-12)
    close(rejected, [lam * math.exp(a_l) / -math.expm1(a_l)], atol=1e-11)


@given(negative, negative, st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_it_is_above_the_loss_of_the_odds_ratio(a_w, a_l, beta) -> None:
    """ORPO's, which compares the two."""
    aligned, metrics, *_ = run(a_w, a_l, ce_coef=0.0, beta=beta)
    assert aligned >= F.softplus(-metrics["reward_margin"])


def test_the_push_on_the_rejected_vanishes_with_its_probability() -> None:
    a = torch.linspace(-40, -0.01, 200, dtype=F64)
    for beta in (0.5, 1.0, 2.0):
        rejected = run(torch.full_like(a, -1.0), a, beta=beta, reduction="none")[3]
        assert (rejected > 0).all() and (rejected.diff() > 0).all() and rejected[0] < 1e-8


def test_without_odds_it_is_fine_tuning_on_means() -> None:
    lengths = torch.tensor([3, 5]), torch.tensor([2, 4])
    loss, _, chosen, rejected = run(3 * A_W, A_L, lengths, lam=0.0, ce_coef=0.7)
    close(loss, -0.7 * (3 * A_W / lengths[0]).mean(), atol=1e-15)
    close(chosen, -0.35 / lengths[0], atol=1e-7)
    close(rejected, [0, 0], atol=0)


def test_means_are_of_each_response() -> None:
    lengths = torch.tensor([4, 2]), torch.tensor([3, 5])
    loss, _, chosen, rejected = run(A_W * lengths[0], A_L * lengths[1], lengths)
    close(loss, 1.8037429633)
    close(chosen, -1 / lengths[0].to(F64))
    close(rejected, torch.tensor([0.3425588752, 0.0447127449], dtype=F64) / lengths[1])


def test_unlikely_responses() -> None:
    loss, _, chosen, rejected = run(-1e4, -1e4)
    close(loss, 2e4)
    close(chosen, [-2])
    close(rejected, [0], atol=0)
    assert run(-1.0, -math.inf)[0] == 2


def test_nearly_certain_responses_are_exact() -> None:
    """1 - e^a without cancellation."""
    loss, _, chosen, rejected = run(-1e-9, -1e-9)
    assert_close(loss, torch.tensor(2e-9 - math.log(1e-9), dtype=F64), rtol=1e-9, atol=0)
    assert_close(rejected, torch.tensor([1e9], dtype=F64), rtol=1e-8, atol=0)
    close(chosen, [-2], atol=1e-8)


@pytest.mark.parametrize(("beta", "slope"), [(1.0, -3.0), (2.0, -1.0)])
def test_a_certain_chosen_response_has_a_limit(beta, slope) -> None:
    loss, _, chosen, _ = run([0.0, -1e-12], [-0.9, -0.9], beta=beta, lam=2.0, reduction="none")
    close(chosen, [slope, slope], atol=1e-3)
    close(loss[0], loss[1], atol=1e-9)
    assert chosen[0] == slope


def test_certain_responses_are_refused() -> None:
    for a_w, a_l, beta, message in (
        (-1.0, 0.0, 1.0, "mean of rejected_logp[0] is 0.0; a mean log-prob below 0 is expected, or max_p"),
        (-1.0, 1e-6, 1.0, "mean of rejected_logp[0] is 1e-06; "),
        (1e-6, -1.0, 1.0, "mean of chosen_logp[0] is 1e-06; "),
        (0.0, -1.0, 0.5, "mean of chosen_logp[0] is 0.0; "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(a_w, a_l, beta=beta)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_bound_on_the_probability(beta) -> None:
    """Above it the odds are a - log(1 - max_p), with slope 1; so also for what is not a probability at all."""
    a, p = torch.tensor([-1e-3, 0.0, 1e-4, -3.0], dtype=F64), 0.99
    odds = torch.where(a > math.log(p), a - math.log1p(-p), a - (1 - a.exp()).log())
    slope = torch.where(a > math.log(p), 1.0, 1 / (1 - a.exp()))
    loss, metrics, chosen, rejected = run(a, a, beta=beta, max_p=p, reduction="none")
    close(loss, -a + F.softplus(-beta * odds) + F.softplus(beta * odds), atol=1e-12)
    close(chosen, -1 - beta * torch.sigmoid(-beta * odds) * slope, atol=1e-12)
    close(rejected, beta * torch.sigmoid(beta * odds) * slope, atol=1e-12)
    assert metrics["clamped"] == 3
    unbound, bound = run(beta=beta), run(beta=beta, max_p=1 - 1e-7)
    close(bound[0], unbound[0], atol=0)


@pytest.mark.parametrize("certain", [0.0, 1e-6])
def test_what_is_not_looked_at_is_no_plausible_number(certain, monkeypatch) -> None:
    """As on CUDA without validation."""
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)
    assert not run(-1.0, certain)[0].isfinite()
    if certain > 0:
        assert run(certain, -1.0)[0].isnan()


def test_nan_is_kept() -> None:
    assert run([math.nan, -1.0], A_L)[0].isnan() and run(A_W, [math.nan, -1.0])[0].isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (torch.tensor([1, 0]), torch.ones(2))}, "chosen_lengths[1] is 0; a response needs at least one token"),
        ({"lengths": (torch.ones(2), torch.tensor([0, 1]))}, "rejected_lengths[0] is 0; a response needs at least one token"),
        ({"lengths": (torch.ones(2), torch.tensor([0, 1])), "max_p": 0.9}, "rejected_lengths[0] is 0; a response needs"),
        ({"lengths": (torch.ones(1), torch.ones(2))}, "chosen_lengths has shape [1]"),
        ({"max_p": 1.0}, "max_p is 1; it must be between 0 and 1, or None"),
        ({"beta": 0.0}, "beta is 0; it must be finite and positive"),
        ({"ce_coef": math.inf}, "sft is inf; it must be finite"),
        ({"lam": math.nan}, "factor is nan; it must be finite"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ([1, 1], torch.ones(2))}, "chosen_lengths is a list; a torch.Tensor is expected"),
        ({"beta": None}, "beta is None; a number is expected"),
    ],
)
def test_other_types_are_refused(options, message) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        run(**options)


def test_the_recipe_is_asft_of_the_means() -> None:
    lengths = torch.tensor([4, 2, 3, 5])
    mask = torch.arange(5) < lengths[:, None]
    logp = torch.where(mask, torch.cat([A_W, A_L])[:, None], math.nan)
    close(load_pair_recipe("asft").loss(Pairs(logp, mask)).loss, 1.8037429633)
    close(load_pair_recipe("asft:lam=0.5,beta=0.1").loss(Pairs(logp, mask)).loss, 1.4080608290)
    assert load_pair_recipe("asft:max_p=0.5").loss(Pairs(logp, mask)).metrics["clamped"] == 1
