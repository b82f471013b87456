"""The DPO survey: its table against what is there, its losses against worked numbers, finite differences and identities."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn.functional import logsigmoid, softplus
from typer.testing import CliRunner

from pair_cases import CU_SEQLENS, F64, MASK, MEAN_CHOSEN, MEAN_REJECTED, ONES, close, gradients, sums
from prefkern import preference_loss, unpaired_loss
from prefkern.cli import app
from prefkern.papers import Pairs, dpo_survey, load_pair_recipe, module, pair_recipes
from prefkern.papers import dpo_survey as survey
from prefkern.papers._survey_rows import COVERS, NOTATION, ROWS, SOURCES
from prefkern.papers.beta_dpo import beta_dpo_loss
from prefkern.papers.cpo import cpo_loss
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.dpo_survey import STATUSES, coverage
from prefkern.papers.dpop import dpop_loss
from prefkern.papers.kto import kto_loss
from prefkern.papers.ld_dpo import ld_dpo_loss
from prefkern.papers.lipo import lipo_loss
from prefkern.papers.lire import lire_loss
from prefkern.papers.odpo import odpo_loss
from prefkern.papers.orpo import orpo_loss
from prefkern.papers.plackett_luce import plackett_luce_loss
from prefkern.papers.r_dpo import r_dpo_loss
from prefkern.papers.rrhf import rrhf_loss
from prefkern.papers.soft_preference import soft_preference_loss
from prefkern.papers.tdpo import tdpo_loss

X_W, X_L = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=F64)
TIE = torch.tensor([False, True])


def of_pairs(function, **options):
    """Losses and derivatives of the worked pairs."""
    out, x, y = gradients(lambda x, y: function(x, y, **{"reduction": "none", **options}), X_W, X_L)
    return out.loss.detach(), x, y


# ---- worked numbers


@pytest.mark.parametrize(
    ("kind", "losses"),
    [
        ("logistic", [0.2014132780, 1.7014132780]),
        ("hinge", [0.0, 2.5]),
        ("squared", [0.25, 6.25]),
        ("exponential", [0.2231301601, 4.4816890703]),
        ("truncated_quadratic", [0, 6.25]),
        ("savage", [0.0332790717, 0.6684280241]),
    ],
)
def test_gpo(kind, losses) -> None:
    loss, x, y = of_pairs(survey.gpo_loss, kind=kind, beta=1.0)
    close(loss, losses)
    close(x, -y)
    smooth = (torch.linspace(-3, 3, 8, dtype=F64, requires_grad=True), torch.zeros(8, dtype=F64, requires_grad=True))
    assert gradcheck(lambda x, y: survey.gpo_loss(x, y, kind=kind, beta=0.7).loss, smooth)
    assert set(survey.GPO_KINDS) == {"logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage"}


def test_the_squared_form_is_ipo() -> None:
    ipo = preference_loss(X_W, X_L, kind="ipo", beta=0.35, reduction="none").loss
    close(of_pairs(survey.gpo_loss, kind="squared", beta=0.7)[0], 0.49 * ipo)


@pytest.mark.parametrize(
    ("function", "options", "losses"),
    [
        (survey.cal_dpo_loss, {"beta": 0.5}, [0.4514132780, 7.9514132780]),
        (survey.focal_po_loss, {"beta": 1.0}, [0.1993950918, 1.5626585692]),
        (survey.dpo_shift_loss, {"beta": 1.0, "factor": 0.75}, [0.2254126516, 1.5019290813]),
        (survey.flex_dpo_loss, {"chosen_beta": 1.0, "rejected_beta": 0.75}, [0.2254126516, 1.5019290813]),
        (
            survey.geometric_dpo_loss,
            {"beta": 1.0, "soft_label": torch.tensor([0.8, 0.6], dtype=F64)},
            [0.3411538747, 0.8543552445],
        ),
        (survey.tie_dpo_loss, {"beta": 1.0, "nu": 3.0, "tie": TIE}, [0.5124585780, 1.1033700232]),
        (survey.todo_loss, {"beta": 1.0, "alpha": math.log(3), "tie": TIE}, [0.5124585780, 1.1033700232]),
        (survey.tie_dpo_loss, {"beta": 1.0, "nu": 1.0, "tie": TIE, "model": "davidson"}, [0.7737420122, 0.8305948317]),
    ],
)
def test_worked_pairs(function, options, losses) -> None:
    loss, x, y = of_pairs(function, **options)
    close(loss, losses)
    assert x.all() and y.all()


def test_chi_po() -> None:
    refs = {"ref_chosen_logp": torch.zeros(2, dtype=F64), "ref_rejected_logp": torch.zeros(2, dtype=F64)}
    loss, x, y = of_pairs(survey.chi_po_loss, beta=0.5, **refs)
    close(loss, [0.1521462509, 1.9580218353])
    pull = 0.5 * torch.expm1(-loss)
    close(x, pull * (1 + X_W.exp()))
    close(y, -pull * (1 + X_L.exp()))
    loss, x, _ = of_pairs(survey.chi_po_loss, beta=0.5, clip=1.0, **refs)
    close(loss, [softplus(torch.tensor(-1.0, dtype=F64)), softplus(torch.tensor(1.0, dtype=F64))])
    assert not x.any()
    far = torch.tensor([500.0, 0.0], requires_grad=True)  # e^500 is beyond float32
    out = survey.chi_po_loss(far, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    assert out.loss.isfinite() and out.metrics["clamped"] == 1


def test_simper() -> None:
    out, x, y = gradients(lambda x, y: survey.simper_loss(x, y, ONES, ONES, reduction="none"), MEAN_CHOSEN, MEAN_REJECTED)
    close(out.loss.detach(), [-0.3342485609, -0.2191092133])
    close(x, -MEAN_CHOSEN.exp())
    close(y, MEAN_REJECTED.exp())
    lengths = torch.tensor([4, 2])
    close(survey.simper_loss(MEAN_CHOSEN * lengths, MEAN_REJECTED * lengths, lengths, lengths).loss, out.loss.mean())


@given(st.floats(-200, 0), st.floats(-200, 0))
def test_simper_is_bounded(a_w, a_l) -> None:
    one = torch.ones(1)
    loss = survey.simper_loss(torch.tensor([a_w], dtype=F64), torch.tensor([a_l], dtype=F64), one, one).loss
    assert -1 <= loss <= 1


def test_npo_and_simnpo() -> None:
    out, slope = gradients(lambda x: survey.npo_loss(x, beta=0.5, reduction="none"), X_L)
    close(out.loss.detach(), [2.3037576795, 3.8963079367])
    close(slope, 2 * torch.sigmoid(0.5 * X_L))
    ref = torch.tensor([-3.0, 2.0], dtype=F64)
    close(survey.npo_loss(X_L + ref, ref, beta=0.5).loss, out.loss.mean())
    out, slope = gradients(lambda x: survey.simnpo_loss(x, ONES, beta=2.0, gamma=0.1, reduction="none"), MEAN_REJECTED)
    close(out.loss.detach(), [0.1677860294, 0.0074189941])
    close(slope, 2 * torch.sigmoid(2 * MEAN_REJECTED + 0.1))
    lengths = torch.tensor([3, 5])
    close(survey.simnpo_loss(MEAN_REJECTED * lengths, lengths, beta=2.0, gamma=0.1).loss, out.loss.mean())


def test_dr_dpo() -> None:
    x_l = torch.tensor([-0.5, 0.3], dtype=F64)
    out, x, y = gradients(lambda x, y: survey.dr_dpo_loss(x, y, b=2.0, beta=1.0), X_W, x_l)
    close(out.loss.detach(), 0.62805538, atol=5e-9)
    losses = -logsigmoid(X_W - x_l)
    share = torch.softmax(-losses / 2, 0)
    close(x, -share * torch.sigmoid(x_l - X_W))
    close(y, -x)
    assert x[0].abs() / x[1].abs() > torch.sigmoid(x_l - X_W)[0] / torch.sigmoid(x_l - X_W)[1]  # the worse pair counts less
    plain = dpo_loss(X_W, x_l, beta=1.0)
    close(survey.dr_dpo_loss(X_W, x_l, b=1e6, beta=1.0).loss, plain.loss, atol=1e-6)
    close(survey.dr_dpo_loss(X_W, x_l, b=1e-3, beta=1.0).loss, losses.min(), atol=1e-3)
    smoothed = dpo_loss(X_W[:1], x_l[:1], beta=1.0, label_smoothing=0.1).loss
    close(survey.dr_dpo_loss(X_W[:1], x_l[:1], b=2.0, beta=1.0, label_smoothing=0.1).loss, smoothed)
    assert survey.dr_dpo_loss(X_W[:0], x_l[:0], b=2.0).loss == 0


@given(st.floats(-8, 8), st.floats(1.01, 20), st.floats(0, 20))
def test_win_lose_and_tie_are_everything(z, nu_rk, nu_d) -> None:
    x, zero = torch.tensor([z], dtype=F64), torch.zeros(1, dtype=F64)
    for model, nu in (("rao_kupper", nu_rk), ("davidson", nu_d + 1e-6)):

        def probability(w, lose, tie, model=model, nu=nu):
            return (-survey.tie_dpo_loss(w, lose, tie=torch.tensor([tie]), model=model, nu=nu, beta=1.0).loss).exp()

        close(probability(x, zero, False) + probability(zero, x, False) + probability(x, zero, True), 1.0, atol=1e-9)
        close(probability(x, zero, True), probability(zero, x, True), atol=1e-12)


# ---- weights, scales, masks


def test_token_weights_by_place() -> None:
    mask = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    weights = survey.temporal_decay_weights(torch.zeros(2, 5, dtype=F64), mask, gamma=0.5)
    close(weights[mask], [1, 0.5, 0.25, 1])
    packed = survey.temporal_decay_weights(torch.zeros(20), None, gamma=0.9, cu_seqlens=CU_SEQLENS)
    padded = survey.temporal_decay_weights(torch.zeros(6, 5), MASK, gamma=0.9)
    assert torch.equal(packed, padded[MASK])
    close(padded[0], [0.9**t for t in range(5)], atol=1e-6)


def test_token_weights_by_turn() -> None:
    turn, turns = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0]]), torch.tensor([3, 1])
    weights = survey.dmpo_token_weights(turn, turns, gamma=0.5)
    total = 1 - 0.5**3
    close(weights[0], [1, 1, 0.5 * (1 - 0.25) / total, 0.25 * 0.5 / total], atol=1e-6)
    assert weights[1].tolist() == [1, 1, 1, 1]
    close(survey.dmpo_token_weights(turn, turns, gamma=1.0)[0], [1, 1, 2 / 3, 1 / 3], atol=1e-6)
    close(survey.dmpo_token_weights(turn, turns, gamma=0.9999)[0], [1, 1, 2 / 3, 1 / 3], atol=1e-3)
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    packed = survey.dmpo_token_weights(turn.flatten()[:6], turns, gamma=0.5, cu_seqlens=cu_seqlens)
    assert torch.equal(packed, weights.flatten()[:6])


@pytest.mark.parametrize("packed", [False, True])
def test_down_sampled_masks(packed) -> None:
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        if not packed:
            return survey.sampo_mask(MASK, generator=generator)
        flat = survey.sampo_mask(MASK[MASK], cu_seqlens=CU_SEQLENS, generator=generator)
        return torch.zeros_like(MASK).masked_scatter_(MASK, flat)

    drawn = draw(0)
    assert drawn.sum(1).tolist() == [1, 2, 3, 1, 2, 3] and not (drawn & ~MASK).any()  # of lengths 5, 2, 3 and 1, 4, 5
    assert torch.equal(drawn, draw(0)) and any(not torch.equal(drawn, draw(seed)) for seed in range(1, 5))
    first = sum(draw(seed)[0].int() for seed in range(600))
    assert all(80 < int(count) < 160 for count in first)  # one of five tokens, evenly: 120 +- 10 each


def test_down_sampling_passes_over_what_does_not_count() -> None:
    flat = torch.tensor([True, False, True, True, True, False, True])
    cu_seqlens = torch.tensor([0, 4, 7], dtype=torch.int32)
    for seed in range(20):
        drawn = survey.sampo_mask(flat, cu_seqlens=cu_seqlens, generator=torch.Generator().manual_seed(seed))
        assert drawn[:4].sum() == 2 == drawn[4:].sum() and not (drawn & ~flat).any()


def test_scales_and_weights_of_pairs() -> None:
    z = 0.5 * (X_W - X_L)
    phi = torch.tensor([0.3, 2.0], dtype=F64)
    close(of_pairs(survey.mallows_po_loss, beta=0.5, dispersion=phi)[0], -logsigmoid(phi * z))
    loss, x, _ = of_pairs(survey.geometric_dpo_loss, soft_label=torch.tensor([0.5, 0.1], dtype=F64))
    close(loss[0], math.log(2))
    assert x[0] == 0 and x[1] > 0  # even, and the other way round
    ages = torch.tensor([0, 3])
    share = torch.tensor([1, 0.9**3], dtype=F64)
    close(of_pairs(survey.ns_dpo_loss, beta=0.5, age=ages, gamma=0.9)[0], -logsigmoid(z) * share)
    rewards = {"chosen_rewards": torch.tensor([2.0, 1.0], dtype=F64), "rejected_rewards": torch.tensor([0.5, 2.0], dtype=F64)}
    close(of_pairs(survey.reward_distillation_loss, beta=0.5, **rewards)[0], (torch.tensor([1.5, -1.0]) - z).square())


# ---- several responses, groups, single responses


def test_means_over_samples() -> None:
    chosen, rejected = (
        torch.tensor([[1.0, 3.0], [0.5, math.nan]], dtype=F64),
        torch.tensor([[0.0, 1.0, 2.0], [1.0, 1, 4]], dtype=F64),
    )
    mask = torch.tensor([[True, True], [True, False]])
    refs = torch.full((2, 2), 0.5, dtype=F64), torch.full((2, 3), -0.5, dtype=F64)

    def loss(x, y):
        return survey.multi_sample_dpo_loss(x, y, *refs, chosen_mask=mask, beta=0.3, reduction="none")

    out, x, y = gradients(loss, chosen, rejected)
    z = 0.3 * (torch.tensor([2.0, 0.5]) - 0.5 - torch.tensor([1.0, 2.0]) - 0.5).double()
    close(out.loss.detach(), -logsigmoid(z))
    pull = -0.3 * torch.sigmoid(-z)
    close(x, [[pull[0] / 2, pull[0] / 2], [pull[1], 0]])
    close(y, (-pull / 3)[:, None].expand(2, 3))


def test_every_chosen_against_every_rejected() -> None:
    x_l, omega = torch.tensor([0.2, -1.0, 0.4], dtype=F64), torch.rand(2, 3, dtype=F64)
    refs = torch.tensor([0.5, 0.1], dtype=F64), torch.tensor([0.3, 0.1, -0.2], dtype=F64)
    out, x, y = gradients(lambda x, y: survey.relative_po_loss(x, y, *refs, omega=omega, beta=0.3), X_W, x_l)
    z = omega * 0.3 * ((X_W - refs[0])[:, None] - (x_l - refs[1])[None])
    close(out.loss.detach(), -logsigmoid(z).mean())
    pull = -0.3 * omega * torch.sigmoid(-z) / 6
    close(x, pull.sum(1))
    close(y, -pull.sum(0))


def test_the_worst_group_counts_most() -> None:
    losses = torch.tensor([1.0, 3.0, 0.5, 0.7], dtype=F64, requires_grad=True)
    group, weights = torch.tensor([0, 0, 2, 2]), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    out = survey.group_robust_loss(losses, group, weights, step_size=0.5)
    close(out.group_losses, [2.0, 0.0, 0.6])
    moved = weights * torch.tensor([math.exp(1.0), 1.0, math.exp(0.3)], dtype=F64)
    moved = moved / moved.sum()
    close(out.weights, moved)
    close(out.loss.detach(), moved[0] * 2.0 + moved[2] * 0.6)
    (slope,) = torch.autograd.grad(out.loss, losses)
    close(slope, [moved[0] / 2, moved[0] / 2, moved[2] / 2, moved[2] / 2])  # weights are constants
    assert not out.weights.requires_grad and not out.group_losses.requires_grad
    close(survey.group_robust_loss(losses, group, weights, step_size=0.0).weights, weights)


def test_values_are_learnt_with_the_policy() -> None:
    rewards, values = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.4, 0.1], dtype=F64)
    out, x, v = gradients(lambda x, v: survey.dro_v_loss(x, None, rewards, v, tau=0.5, reduction="none"), X_W, values)
    rest = rewards - values - 0.5 * X_W
    close(out.loss.detach(), 0.5 * rest.square())
    close(x, -0.5 * rest)
    close(v, -rest)
    close(survey.dro_v_loss(X_W, None, rewards, values, tau=0.5).loss, out.loss.mean())
    policy = unpaired_loss(X_W, None, TIE, kind="squared", beta=0.5, offset=rewards - values)
    close(out.loss.mean().detach(), policy.loss)


def test_pmpo() -> None:
    kl = torch.tensor([0.2, 0.7], dtype=F64)

    def loss(x, y, k):
        return survey.pmpo_loss(x, y, k, alpha=0.7, beta=0.3, reduction="none")

    out, x, y, k = gradients(loss, X_W, X_L, kl)
    close(out.loss.detach(), -0.7 * X_W + 0.3 * X_L + 0.3 * kl)
    close(x, [-0.7, -0.7])
    close(y, [0.3, 0.3])
    close(k, [0.3, 0.3])
    close(survey.pmpo_loss(X_W, X_L, kl, alpha=0.7, beta=0.3).loss, out.loss.mean())
    close(survey.pmpo_loss(X_W, X_L, kl.mean(), alpha=0.7, beta=0.3).loss, out.loss.mean())
    close(survey.pmpo_loss(X_W, X_L, kl, alpha=0.7, beta=0.3, reduction="sum").loss, out.loss.sum())


def test_xpo() -> None:
    sampled = torch.tensor([-3.0, -2.0, -4.0], dtype=F64)
    out, x, s = gradients(lambda x, s: survey.xpo_loss(x, X_L, sampled_logp=s, alpha=0.2, beta=0.5), X_W, sampled)
    close(out.loss.detach(), -logsigmoid(0.5 * (X_W - X_L)).mean() - 0.6)
    close(s, torch.full((3,), 0.2 / 3, dtype=F64))
    close(out.metrics["sampled_logp"], -3)
    assert x.all()


def test_lists() -> None:
    def row(*values):
        return torch.tensor([values], dtype=F64)

    close(lipo_loss(row(2, -1, 0.5), row(1, 2, 0), beta=1.0).loss, 5.4695740958)
    close(rrhf_loss(row(-1, -0.5, -2), row(3, 1, 2), nll_coef=0.0).loss, 2.0)
    close(rrhf_loss(row(-1, -0.5, -2), row(3, 1, 2)).loss, 3.0)
    close(lire_loss(row(0, 1, -1), row(1, 0.5, 0)).loss, -0.5773489489)


# ---- one harness for every row that has a loss: finite differences, and what it reduces to


@dataclass
class Case:
    loss: Callable
    """Of two tensors, a mean."""
    special: Callable
    """The same at the parameters where it is something simpler."""
    simpler: Callable
    tokens: bool = False
    """Whether the two are tokens [3, 5] of the chosen and of the rejected responses, instead of whole responses [5]."""
    atol: float = 1e-10


def dpo(x, y, beta=0.3):
    return -logsigmoid(beta * (x - y)).mean()


def of_tokens(weights=None, mask=MASK):
    def loss(x, y):
        return dpo_loss(*Pairs(torch.cat([x, y]), mask).sums(weights=weights), beta=0.3).loss

    return loss


def dpo_of_tokens(x, y):
    return dpo(*sums(torch.cat([x, y])))


def plain(function, given, special, simpler=dpo, atol=1e-10):
    """A case of a function of pairs: with these options, and with those it is simpler."""

    def at(options):
        return lambda x, y: function(x, y, **{"beta": 0.3, **options}).loss

    return Case(at(given), at(special), simpler, atol=atol)


P = 5
NO_TIE, SOME_TIE = torch.zeros(P, dtype=torch.bool), torch.arange(P) % 2 == 0
ZEROS, ONE = torch.zeros(P, dtype=F64), torch.ones(P, dtype=F64)
WEIGHTS = torch.linspace(0.2, 1.5, P, dtype=F64)
LENGTHS, OTHER_LENGTHS = torch.arange(1, P + 1), torch.arange(P, 0, -1)
TURNS = torch.full((6,), 3)


def below_zero(x):
    return -softplus(x) - 0.05


def kto(kl):
    return lambda x, y: kto_loss(torch.cat([x, y]), None, torch.arange(2 * P) < P, beta=0.3, kl=kl).loss


def group_robust(group, weights):
    return lambda x, y: (
        survey.group_robust_loss(dpo_loss(x, y, beta=0.3, reduction="none").loss, group, weights, step_size=0.0).loss
    )


def lists(function, given, special, simpler):
    """A case of a function of lists: of two prompts with five responses, and of five with two, the first the better."""
    labels = torch.tensor([[1.0, 3.0, 2.0, 0.0, 4.0], [2.0, 0.0, 1.0, 3.0, 4.0]], dtype=F64)
    two = torch.tensor([[1.0, 0.0]], dtype=F64).expand(P, 2)
    return Case(
        lambda x, y: function(torch.stack([x, y]), labels, **given).loss,
        lambda x, y: function(torch.stack([x, y], 1), two, **special).loss, simpler,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "DPO": plain(dpo_loss, {}, {}),
    "cDPO": plain(dpo_loss, {"label_smoothing": 0.2}, {"label_smoothing": 0.0}),
    "MallowsPO": plain(survey.mallows_po_loss, {"dispersion": WEIGHTS}, {"dispersion": ONE}),
    "GRPO (group robust)": Case(
        group_robust(torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0.7, 0.3], dtype=F64)),
        group_robust(torch.zeros(P, dtype=torch.int64), torch.ones(1, dtype=F64)), dpo,
    ),
    "ODPO": plain(odpo_loss, {"offset": WEIGHTS}, {"offset": 0.0}),
    "beta-DPO": Case(
        lambda x, y: beta_dpo_loss(x, y, batch_beta=0.4, selected=SOME_TIE).loss,
        lambda x, y: beta_dpo_loss(x, y, batch_beta=0.3).loss, dpo,
    ),
    "GDPO (geometric)": plain(survey.geometric_dpo_loss, {"soft_label": WEIGHTS / 2}, {"soft_label": ONE}),
    "FocalPO": plain(survey.focal_po_loss, {"gamma": 0.5}, {"gamma": 0.0}),
    "Dr. DPO": plain(survey.dr_dpo_loss, {"b": 0.5}, {"b": 1e6}, atol=1e-5),
    "KTO": Case(kto(0.4), kto(0.0), lambda x, y: (torch.sigmoid(-0.3 * x).mean() + torch.sigmoid(0.3 * y).mean()) / 2),
    "Cal-DPO": plain(
        survey.cal_dpo_loss, {}, {},
        lambda x, y: dpo(x, y, 1.0) + preference_loss(x, y, kind="sppo_hard", beta=0.3).loss,
    ),
    "DRO-V": Case(
        lambda x, y: survey.dro_v_loss(x, None, WEIGHTS, y).loss,
        lambda x, y: survey.dro_v_loss(x, None, ZEROS, 0 * y, tau=0.3).loss, lambda x, y: 0.045 * x.square().mean(),
    ),
    "DPO-RK (ties)": plain(
        survey.tie_dpo_loss, {"tie": SOME_TIE, "nu": 2.0}, {"tie": NO_TIE, "nu": 2.0},
        lambda x, y: -logsigmoid(0.3 * (x - y) - math.log(2)).mean(),
    ),
    "DPO-D (ties)": plain(
        survey.tie_dpo_loss, {"tie": SOME_TIE, "nu": 2.0, "model": "davidson"},
        {"tie": NO_TIE, "nu": 1e-12, "model": "davidson"},
    ),
    "PMPO": Case(
        lambda x, y: survey.pmpo_loss(x, y, WEIGHTS, alpha=0.7).loss,
        lambda x, y: survey.pmpo_loss(x, y, WEIGHTS, beta=0.0).loss, lambda x, y: 0.5 * (y - x).mean(),
    ),
    "NPO": Case(
        lambda x, y: survey.npo_loss(y, WEIGHTS).loss + 0 * x.sum(), lambda x, y: survey.npo_loss(y, beta=0.3).loss,
        lambda x, y: softplus(0.3 * y).mean() / 0.15,
    ),
    "SimNPO": Case(
        lambda x, y: survey.simnpo_loss(y, LENGTHS, gamma=0.4).loss + 0 * x.sum(),
        lambda x, y: survey.simnpo_loss(y, ONE, beta=0.3).loss, lambda x, y: survey.npo_loss(y, beta=0.3).loss,
    ),
    "mDPO (multi-sample)": Case(
        lambda x, y: survey.multi_sample_dpo_loss(x[:4].view(2, 2), y[:4].view(2, 2), beta=0.3).loss + 0 * (x + y).sum(),
        lambda x, y: survey.multi_sample_dpo_loss(x[:, None], y[:, None], beta=0.3).loss, dpo,
    ),
    "RPO (relative)": Case(
        lambda x, y: survey.relative_po_loss(x, y, omega=WEIGHTS[:, None] * WEIGHTS).loss,
        lambda x, y: survey.relative_po_loss(x[:1], y[:1], omega=torch.ones(1, 1), beta=0.3).loss,
        lambda x, y: dpo(x[:1], y[:1]),
    ),
    "TODO": plain(
        survey.todo_loss, {"tie": SOME_TIE, "alpha": 0.5}, {"tie": SOME_TIE, "alpha": math.log(2)},
        lambda x, y: survey.tie_dpo_loss(x, y, tie=SOME_TIE, nu=2.0, beta=0.3).loss,
    ),
    "TDPO": Case(
        lambda x, y: tdpo_loss(x, y, chosen_kl=x.square(), rejected_kl=y.square(), version=1, beta=0.3).loss,
        lambda x, y: tdpo_loss(x, y, chosen_kl=x.square(), rejected_kl=y.square(), alpha=0.0, beta=0.3).loss, dpo,
    ),
    "D2PO (temporal decay)": Case(
        of_tokens(survey.temporal_decay_weights(torch.zeros(6, 5, dtype=F64), MASK, gamma=0.8)),
        of_tokens(survey.temporal_decay_weights(torch.zeros(6, 5, dtype=F64), MASK, gamma=1.0)), dpo_of_tokens, tokens=True,
    ),
    "M-DPO": Case(
        of_tokens(mask=MASK & (torch.arange(5) != 1)), of_tokens(mask=MASK), dpo_of_tokens, tokens=True,
    ),
    "DMPO": Case(
        of_tokens(survey.dmpo_token_weights(torch.tensor([0, 0, 1, 2, 2]).expand(6, 5), TURNS, gamma=0.7).double()),
        of_tokens(survey.dmpo_token_weights(torch.zeros(6, 5, dtype=torch.int64), TURNS, gamma=0.7).double()),
        dpo_of_tokens, tokens=True,
    ),
    "CPO": Case(
        lambda x, y: cpo_loss(x, y, LENGTHS, OTHER_LENGTHS, kind="simpo", alpha=0.3, beta=0.3).loss,
        lambda x, y: cpo_loss(x, y, beta=0.3, cpo_alpha=0).loss, dpo,
    ),
    "ORPO": Case(
        lambda x, y: orpo_loss(below_zero(x), below_zero(y), LENGTHS, OTHER_LENGTHS).loss,
        lambda x, y: orpo_loss(below_zero(x), below_zero(y), LENGTHS, OTHER_LENGTHS, beta=0.0).loss,
        lambda x, y: -below_zero(x).sum() / 15,
    ),
    "XPO": Case(
        lambda x, y: survey.xpo_loss(x, y, sampled_logp=x + y, alpha=0.2).loss,
        lambda x, y: survey.xpo_loss(x, y, sampled_logp=x + y, alpha=0.0, beta=0.3).loss, dpo,
    ),
    "SPIN": plain(survey.spin_loss, {}, {}),
    "SimPER": Case(
        lambda x, y: survey.simper_loss(x, y, LENGTHS, OTHER_LENGTHS).loss,
        lambda x, y: survey.simper_loss(x, y, ONE, ONE).loss, lambda x, y: (y.exp() - x.exp()).mean(),
    ),
    "Soft Preference Learning": Case(
        lambda x, y: soft_preference_loss(x, y, WEIGHTS, ZEROS, alpha=0.5).loss,
        lambda x, y: soft_preference_loss(x, y, ZEROS, ZEROS, alpha=0.3, beta=0.3).loss, dpo,
    ),
    "GPO (generalized)": plain(survey.gpo_loss, {"kind": "savage"}, {"kind": "logistic"}),
    "chi-PO": plain(
        lambda x, y, **options: survey.chi_po_loss(x, y, ZEROS, ZEROS, **options), {},
        {}, lambda x, y: dpo(x + x.exp(), y + y.exp()),
    ),
    "e-DPO (reward distillation)": plain(
        survey.reward_distillation_loss, {"chosen_rewards": WEIGHTS, "rejected_rewards": ZEROS},
        {"chosen_rewards": ZEROS, "rejected_rewards": ZEROS}, lambda x, y: (0.3 * (x - y)).square().mean(),
    ),
    "NS-DPO": plain(survey.ns_dpo_loss, {"age": LENGTHS, "gamma": 0.8}, {"age": LENGTHS, "gamma": 1.0}),
    "R-DPO": plain(
        r_dpo_loss, {"chosen_lengths": LENGTHS, "rejected_lengths": OTHER_LENGTHS},
        {"chosen_lengths": LENGTHS, "rejected_lengths": LENGTHS, "alpha": 0.7},
    ),
    "SamPO": Case(
        of_tokens(mask=survey.sampo_mask(MASK, generator=torch.Generator().manual_seed(3))),
        of_tokens(mask=survey.sampo_mask(torch.cat([MASK[:3], MASK[:3]]))),
        lambda x, y: dpo(torch.where(MASK[:3], x, 0.0).sum(1), torch.where(MASK[:3], y, 0.0).sum(1)), tokens=True,
    ),
    "LD-DPO": Case(
        lambda x, y: ld_dpo_loss(torch.cat([x, y]), None, MASK, alpha=0.4).loss,
        lambda x, y: ld_dpo_loss(torch.cat([x, y]), None, MASK, alpha=1.0, beta=0.3).loss, dpo_of_tokens, tokens=True,
    ),
    "DPO-Positive": plain(dpop_loss, {"penalty": 3.0}, {"penalty": 0.0}),
    "Flex-DPO": Case(
        lambda x, y: survey.flex_dpo_loss(x, y, chosen_beta=0.2, rejected_beta=0.5).loss,
        lambda x, y: survey.flex_dpo_loss(x, y, chosen_beta=0.3, rejected_beta=0.3).loss, dpo,
    ),
    "RRHF": lists(rrhf_loss, {}, {"nll_coef": 0.0}, lambda x, y: torch.relu(y - x).mean()),
    "PRO": lists(plackett_luce_loss, {"beta": 1.0}, {"beta": 1.0}, lambda x, y: dpo(x, y, 1.0)),
    "LiPO-lambda": lists(
        lipo_loss, {}, {"beta": 0.3}, lambda x, y: (1 / math.log(2) - 1 / math.log(3)) * dpo(x, y),
    ),
    "LIRE": lists(lire_loss, {"temperature": 2.0}, {}, lambda x, y: -torch.sigmoid(x - y).mean()),
    "Plackett-Luce DPO": lists(plackett_luce_loss, {}, {"beta": 0.3}, dpo),
    "DPO-Shift": plain(survey.dpo_shift_loss, {"factor": 0.75}, {"factor": 1.0}),
}  # fmt: skip
HERE = [row for row in coverage() if row.status == "here" and row.cover in ("loss", "weight", "list")]
BY_RECIPE = {row.recipe for row in HERE if row.name not in CASES and row.recipe} - {
    name for name, recipe in pair_recipes().items() if not set(recipe.needs) <= {"ref_logp"}
}


def leaves(case: Case):
    shape = (3, 5) if case.tokens else (P,)
    return tuple(torch.randn(shape, dtype=F64, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name) -> None:
    x, y = leaves(CASES[name])
    assert CASES[name].loss(x, y).dim() == 0
    assert gradcheck(CASES[name].loss, (x, y))
    assert any(t is not None and t.any() for t in torch.autograd.grad(CASES[name].loss(x, y), (x, y), allow_unused=True))


@pytest.mark.parametrize("name", CASES)
def test_what_it_reduces_to(name) -> None:
    case = CASES[name]
    x, y = leaves(case)
    one, other = case.special(x, y), case.simpler(x, y)
    close(one.detach(), other.detach(), atol=case.atol)
    slopes = [torch.autograd.grad(of, (x, y), allow_unused=True, materialize_grads=True) for of in (one, other)]
    for got, expected in zip(*slopes, strict=True):
        close(got, expected, atol=case.atol)
    if case.loss is not case.special and name not in ("DPO", "SPIN", "Cal-DPO", "chi-PO"):
        assert abs(case.loss(x, y) - one) > 1e-6  # the general parameters are not the special ones


@pytest.mark.parametrize("recipe", sorted(BY_RECIPE | {"dpo"}))
def test_gradients_of_rows_with_a_recipe_are_finite_differences(recipe) -> None:
    ref = -torch.rand(6, 5, dtype=F64) - 0.05
    logp = (-torch.rand(6, 5, dtype=F64) - 0.05).requires_grad_()
    assert gradcheck(lambda x: load_pair_recipe(recipe).loss(Pairs(x, MASK, ref)).loss, (logp,))


def test_every_row_with_a_loss_is_in_the_harness() -> None:
    names = {row.name for row in HERE}
    assert set(CASES) <= names
    for row in HERE:
        assert row.name in CASES or row.recipe in BY_RECIPE, row.name


# ---- the table


def test_the_table_is_whole() -> None:
    rows = coverage()
    assert [row.name for row in rows] == [row.name for row in ROWS]
    assert len({(row.branch, row.name) for row in rows}) == len(rows) > 140
    for row in rows:
        assert row.source in SOURCES and row.cover in COVERS and row.status in STATUSES and "|" not in row.formula


def test_the_survey_has_these() -> None:
    names = {row.name for row in coverage()}
    assert names >= set(CASES)
    assert names >= {
        "RRHF", "SLiC-HF", "PRO", "rDPO", "BCO", "NCA", "AOT", "IPO", "LiPO-lambda", "LIRE", "Plackett-Luce DPO", "TGDPO",
        "Step-DPO", "MCTS-DPO", "IRPO", "VPO", "DNO", "MODPO", "SPPO", "SimPO", "f-DPO", "EXO", "LN-DPO", "APO-zero",
        "APO-down", "TIS-DPO", "SafeDPO", "TR-DPO",
    }  # fmt: skip


def test_what_is_not_verified_is_withheld() -> None:
    withheld = [row for row in coverage() if row.source == "unverified"]
    assert len(withheld) == 80
    for row in withheld:
        assert (row.formula, row.where, row.recipe, row.status) == ("", None, None, "withheld"), row.name
    assert {row.name for row in withheld if row.cover == "weight"} == {
        "alpha-DPO", "Ada-DPO", "DPO-rc", "Sr-DPO", "GaPO", "TIS-DPO", "SDPO (segments)"
    }  # fmt: skip


def test_nothing_that_the_table_points_at_is_missing() -> None:
    for row in coverage():
        if row.where is None:
            assert row.status == ("withheld" if row.source == "unverified" else "outside") and row.recipe is None
            continue
        package, paper, *function = row.where.split(".")
        assert row.status == "here" and package == "papers", row.where
        assert callable(getattr(module(paper), function[0])) if function else module(paper).about
        assert row.recipe == (paper if paper in pair_recipes() else None)


def test_a_path_that_leads_nowhere_is_missing(monkeypatch) -> None:
    row = survey.Row("basic", "X", "l(z)", "known", "loss", "papers.dpo_survey.gpo_loss")
    assert survey._covered(row).status == "here"
    for where in ("papers.dpo_survey.gpo_lost", "papers.dpx", "papers.dpx.gpo_loss", "ops.preference_loss", "papers.dpo.a.b"):
        assert survey._covered(survey.Row("basic", "X", "l(z)", "known", "loss", where)).status == "missing"
    monkeypatch.delattr(dpo_survey, "gpo_loss")
    assert {row.status for row in coverage() if row.name == "GPO (generalized)"} == {"missing"}


# ---- the command


def run(*arguments: str):
    return CliRunner().invoke(app, ["papers", "--survey", *arguments], env={"COLUMNS": "250"})


def test_text() -> None:
    result = run()
    assert result.exit_code == 0
    text = re.sub(r"[\s│]+", " ", result.output)
    counts = {status: sum(row.status == status for row in coverage()) for status in STATUSES}
    title = ", ".join(f"{count} {status}" for status, count in counts.items())
    assert f"{len(ROWS)} methods of the DPO survey: {title}" in text
    for row in ROWS:
        assert row.name.split()[0] in text
    assert "[(1 - e) l(z)" in text and "D[sel]" in text  # brackets are no markup
    for words in (SOURCES, COVERS, STATUSES):
        for word, meaning in words.items():
            assert f"{word}: {meaning}" in text
    assert NOTATION[:60] in text


def test_json() -> None:
    result = run("--json")
    assert result.exit_code == 0
    entries = json.loads(result.output)
    assert len(entries) == len(ROWS)
    by_name = {(entry["branch"], entry["name"]): entry for entry in entries}
    assert by_name["likelihood", "DPO-Positive"] == {
        "branch": "likelihood", "name": "DPO-Positive", "formula": "l(beta (D - lambda relu(-x_w)))", "source": "code",
        "cover": "loss", "where": "papers.dpop.dpop_loss", "status": "here", "recipe": "dpop",
    }  # fmt: skip
    assert by_name["safety", "SafeDPO"]["status"] == "withheld" and by_name["safety", "SafeDPO"]["where"] is None


def test_markdown() -> None:
    lines = run("--markdown").output.splitlines()
    assert lines[0] == "| branch | method | loss | source | cover | status | where |" and len(lines) == 2 + len(ROWS)
    assert all(line.count("|") == 8 for line in lines)
    assert "| noise | cDPO | `(1 - e) l(z) + e l(-z)` | code | loss | here | `prefkern.papers.dpo.dpo_loss` |" in lines
    assert "| safety | SafeDPO |  | unverified | none | withheld |  |" in lines


def test_a_name_is_refused_with_it() -> None:
    result = run("dpo")
    assert result.exit_code == 2
    assert "--survey shows all methods; a name is not expected with it" in re.sub(r"[\s│]+", " ", result.output)


# ---- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: survey.gpo_loss(X_W, X_L, kind="log"), "kind is 'log'; accepted: 'logistic', 'hinge', "),
        (lambda: survey.dr_dpo_loss(X_W, X_L, b=0.0), r"b is 0\.0; it must be finite and positive"),
        (
            lambda: survey.tie_dpo_loss(X_W, X_L, tie=TIE, nu=2.0, model="rk"),
            "model is 'rk'; accepted: 'rao_kupper', 'davidson'",
        ),
        (lambda: survey.tie_dpo_loss(X_W, X_L, tie=TIE, nu=0.5), "nu"),
        (lambda: survey.todo_loss(X_W, X_L, tie=TIE, alpha=0.0), r"alpha is 0\.0; it must be finite and positive"),
        (lambda: survey.chi_po_loss(X_W, X_L, X_W, None), "ref_rejected_logp is None; chi-PO has no form without a reference"),
        (lambda: survey.simper_loss(X_W, X_L, ONES, 0 * ONES), r"rejected_lengths\[0\] is 0\.0; a response needs at least one"),
        (lambda: survey.simnpo_loss(X_W, 0 * ONES), r"lengths\[0\] is 0\.0; a response needs at least one token"),
        (lambda: survey.npo_loss(X_W, beta=0.0), r"beta is 0\.0; it must be finite and positive"),
        (lambda: survey.dpo_shift_loss(X_W, X_L, factor=0.0), r"factor is 0\.0; it must be in \(0, 1\]"),
        (lambda: survey.dpo_shift_loss(X_W, X_L, factor=1.5), r"factor is 1\.5; it must be in \(0, 1\]"),
        (lambda: survey.pmpo_loss(X_W, X_L, ONES, alpha=1.0), r"alpha is 1\.0; it must be in \(0, 1\)"),
        (lambda: survey.pmpo_loss(X_W, X_L, torch.ones(3)), r"kl has shape \[3\]; \[2\] is expected"),
        (
            lambda: survey.geometric_dpo_loss(X_W, X_L, soft_label=torch.tensor([0.5, 1.5])),
            r"soft_label\[1\] is 1\.5; a probability is expected",
        ),
        (lambda: survey.geometric_dpo_loss(X_W, X_L, soft_label=ONES[:1]), r"soft_label has shape \[1\]; \[2\] is expected"),
        (lambda: survey.mallows_po_loss(X_W, X_L, dispersion=ONES[:1]), r"dispersion has shape \[1\]"),
        (lambda: survey.ns_dpo_loss(X_W, X_L, age=ONES, gamma=1.1), r"gamma is 1\.1; it must be in \(0, 1\]"),
        (lambda: survey.ns_dpo_loss(X_W, X_L, age=ONES[:1], gamma=0.9), r"age has shape \[1\]"),
        (lambda: survey.temporal_decay_weights(MASK.double(), gamma=0.0), r"gamma is 0\.0; it must be in \(0, 1\]"),
        (lambda: survey.dmpo_token_weights(torch.ones(1, 1), ONES[:1], gamma=0.0), r"gamma is 0\.0; it must be in \(0, 1\]"),
        (
            lambda: survey.dmpo_token_weights(torch.tensor([[0, 3]]), torch.tensor([3]), gamma=0.5),
            r"turn has entries that are not in \[0, turns\) of their row",
        ),
        (lambda: survey.sampo_mask(MASK[:3]), "mask has 3 responses; chosen and rejected ones, so an even number is expected"),
        (lambda: survey.multi_sample_dpo_loss(X_W, X_L), r"chosen_logp has shape \[2\]; \[P, K\] is expected"),
        (
            lambda: survey.multi_sample_dpo_loss(X_W[None], X_L[None], rejected_mask=TIE),
            r"rejected_mask has shape \[2\]; \[1, 2\] is expected, like rejected_logp",
        ),
        (
            lambda: survey.multi_sample_dpo_loss(X_W[:, None], X_L[:, None], chosen_mask=TIE[:, None]),
            r"chosen_mask\[0\] is \[False\]; a pair needs at least one sample on each side",
        ),
        (lambda: survey.relative_po_loss(X_W, X_L, omega=torch.ones(2, 3)), r"omega has shape \[2, 3\]; \[2, 2\] is expected"),
        (
            lambda: survey.reward_distillation_loss(X_W, X_L, chosen_rewards=ONES, rejected_rewards=ONES[:1]),
            r"rejected_rewards has shape \[1\]; \[2\] is expected",
        ),
        (
            lambda: survey.group_robust_loss(ONES, torch.tensor([0, 2]), ONES, step_size=1.0),
            r"group\[1\] is 2; 0 to 1 is expected",
        ),
        (
            lambda: survey.group_robust_loss(ONES, TIE.long(), ONES[0], step_size=1.0),
            r"weights has shape \[\]; \[G\] is expected",
        ),
        (lambda: survey.dro_v_loss(X_W, None, ONES[:1], ONES), r"rewards has shape \[1\]; \[2\] is expected"),
        (
            lambda: survey.dro_v_loss(X_W, None, ONES, ONES, reduction="min"),
            "reduction is 'min'; accepted: 'mean', 'sum', 'none'",
        ),
    ],
)
def test_refusals(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"mask has dtype torch\.float64; torch\.bool is expected"):
        survey.sampo_mask(MASK.double())


def test_nan_is_not_hidden() -> None:
    broken = torch.tensor([math.nan, -1.0], dtype=F64)
    for loss in (
        survey.dr_dpo_loss(broken, X_L, b=1.0).loss, survey.focal_po_loss(broken, X_L).loss, survey.npo_loss(broken).loss,
        survey.cal_dpo_loss(broken, X_L).loss, survey.simper_loss(broken, X_L, ONES, ONES).loss,
    ):  # fmt: skip
        assert loss.isnan()
