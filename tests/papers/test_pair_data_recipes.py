"""Recipes whose loss takes weights, margins or reliabilities besides the pairs: equal to their functions, padded and packed."""

import math

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern.papers import Pairs, ecpo, lcpo, load_pair_recipe, madpo, modpo, vpo

F64 = torch.float64
LENGTHS = torch.tensor([5, 2, 3, 1, 4, 6])
MASK = torch.arange(6) < LENGTHS[:, None]
CU = torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)]).int()
MARGIN = torch.tensor([0.5, -2.0, 3.0], dtype=F64)
OTHERS = torch.tensor([[1.0, -1.0], [0.5, 0.2], [0.0, 0.3]], dtype=F64)
ANNOTATOR = torch.tensor([1, 0, 1])
ETA = torch.tensor([0.9, 0.6], dtype=F64)
CAL = torch.tensor([-4.0, -6.0], dtype=F64)


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(-torch.rand(6, 6, dtype=F64, generator=generator).where(MASK, math.nan) for _ in range(2))


def sums(values):
    return values.where(MASK, 0.0).sum(1).chunk(2)


def lcpo_of(kind, **options):
    def loss(logp, ref):
        refs = sums(ref) if kind in ("dpo", "ipo") else (None, None)
        return lcpo.lcpo_loss(kind, *sums(logp), *refs, **options)

    return loss


CASES = {
    "ecpo": ({}, lambda logp, ref: ecpo.turn_dpo_loss(*sums(logp), *sums(ref))),
    "ecpo:beta=0.3": (
        {"turn_weight": MARGIN.abs()},
        lambda logp, ref: ecpo.turn_dpo_loss(*sums(logp), *sums(ref), beta=0.3, turn_weight=MARGIN.abs()),
    ),
    "madpo:tau=2.0": ({"margin": MARGIN}, lambda logp, ref: madpo.madpo_loss(*sums(logp), *sums(ref), MARGIN, tau=2.0)),
    "modpo:beta=0.2,weights=(0.4, 0.35, 0.25),kind=hinge": (
        {"chosen_margin": OTHERS, "rejected_margin": OTHERS.flip(0)},
        lambda logp, ref: modpo.modpo_loss(
            *sums(logp), *sums(ref), OTHERS, OTHERS.flip(0), (0.4, 0.35, 0.25), beta=0.2, kind="hinge"
        ),
    ),
    "modpo": (
        {"chosen_margin": MARGIN, "rejected_margin": -MARGIN},
        lambda logp, ref: modpo.modpo_loss(*sums(logp), *sums(ref), MARGIN, -MARGIN, (0.5, 0.5)),
    ),
    "vpo:alpha=0.5": (
        {"cal_logp": CAL, "ref_cal_logp": CAL + 0.3},
        lambda logp, ref: vpo.vpo_loss(*sums(logp), *sums(ref), CAL, CAL + 0.3, alpha=0.5),
    ),
    "vpo:alpha=0.5,mode=offline,cal_floor=-2.0": (
        {},
        lambda logp, ref: vpo.vpo_loss(
            *sums(logp), *sums(ref), sums(logp)[0], sums(ref)[0], alpha=0.5, mode="offline", cal_floor=-2.0
        ),
    ),
    "lcpo:eta=0.8": ({}, lcpo_of("dpo", beta=0.1, eta=0.8)),
    "lcpo:kind=ipo,beta=0.4,variant=weighted": (
        {"annotator": ANNOTATOR, "eta": ETA}, lcpo_of("ipo", beta=0.4, eta=ETA, annotator=ANNOTATOR, variant="weighted"),
    ),
    "lcpo:kind=simpo,beta=2.5,gamma=0.8": (
        {}, lcpo_of("simpo", beta=2.5, gamma=0.8, chosen_lengths=LENGTHS[:3], rejected_lengths=LENGTHS[3:]),
    ),
    "lcpo:kind=cpo": ({}, lcpo_of("cpo", beta=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", CASES)
def test_the_recipe_composes_the_function(text, packed) -> None:
    extra, function = CASES[text]
    recipe = load_pair_recipe(text)
    logp, ref = tokens()
    logp.requires_grad_()
    pairs = Pairs(logp[MASK], None, ref[MASK], CU, extra) if packed else Pairs(logp, MASK, ref, extra=extra)
    loss, metrics = recipe.loss(pairs)
    expected = function(logp, ref)
    assert_close(loss, expected.loss, rtol=1e-12, atol=1e-14)
    (gradient,), (other,) = (torch.autograd.grad(of, logp) for of in (loss, expected.loss))
    assert_close(gradient, other.where(MASK, 0.0), rtol=1e-10, atol=1e-14)
    assert not gradient[~MASK].any() and gradient[MASK].all()
    assert set(metrics) == set(expected.metrics)
    for name, value in metrics.items():
        assert value.dim() == 0 and not value.requires_grad
        assert_close(value, expected.metrics[name], rtol=1e-9, atol=1e-12)


def test_calibration_responses_get_their_gradient() -> None:
    logp, ref = tokens()
    cal = CAL.clone().requires_grad_()
    pairs = Pairs(logp, MASK, ref, extra={"cal_logp": cal, "ref_cal_logp": CAL})
    for mode, sign in (("online", 1), ("offline", -1)):
        (gradient,) = torch.autograd.grad(load_pair_recipe("vpo", mode=mode).loss(pairs).loss, cal)
        assert_close(gradient, torch.full((2,), sign * 0.01 * 0.1 / 2, dtype=F64), rtol=1e-12, atol=0)


def test_reliabilities_move_by_the_posterior_of_the_recipe() -> None:
    recipe, reliability = load_pair_recipe("lcpo"), prefkern.AnnotatorReliability(2)
    logp, ref = tokens()
    pairs = Pairs(logp.requires_grad_(), MASK, ref, extra={"annotator": ANNOTATOR, "eta": reliability.eta})
    w = recipe.posterior(pairs)
    assert not w.requires_grad and w.shape == (3,)
    assert_close(recipe.loss(pairs).metrics["posterior"], w.mean(), rtol=1e-12, atol=0)
    found = reliability.update(w, ANNOTATOR)
    assert_close(found, 0.9 + 0.1 * (torch.stack([w[1], (w[0] + w[2]) / 2]) - 0.9), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("text", "extra", "message"),
    [
        ("madpo", {}, r"recipe 'madpo' needs pairs.extra\['margin'\], which is None"),
        ("modpo", {"chosen_margin": MARGIN}, r"recipe 'modpo' needs pairs.extra\['rejected_margin'\]"),
        ("vpo", {}, "cal_logp or ref_cal_logp has no responses; alpha 0.01 needs some"),
        ("vpo:mode=offline", {"cal_logp": CAL}, "cal_logp or ref_cal_logp has no responses"),
        ("lcpo:kind=simpo", {}, "gamma is None; kind 'simpo' needs it"),
    ],
)
def test_what_is_missing_is_named(text, extra, message) -> None:
    logp, ref = tokens()
    with pytest.raises(ValueError, match=message):
        load_pair_recipe(text).loss(Pairs(logp, MASK, ref, extra=extra))


@pytest.mark.parametrize("text", ["ecpo", "lcpo", "lcpo:kind=ipo", "madpo", "modpo", "vpo"])
def test_the_reference_is_needed(text) -> None:
    extra = {"margin": MARGIN, "chosen_margin": MARGIN, "rejected_margin": MARGIN, "cal_logp": CAL, "ref_cal_logp": CAL}
    with pytest.raises(ValueError, match=r"pairs\.ref_logp"):
        load_pair_recipe(text).loss(Pairs(tokens()[0], MASK, extra=extra))
