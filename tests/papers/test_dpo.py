"""DPO and cDPO against worked numbers and their identities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.dpo import dpo_loss

F64 = torch.float64
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = torch.tensor([[-10, -8], [-12, -7], [-11, -7.5], [-11.5, -8]], dtype=F64)
REFS = (REF_CHOSEN, REF_REJECTED)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(chosen=CHOSEN, rejected=REJECTED, refs=REFS, **options):
    x, y = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    out = dpo_loss(x, y, *refs, **options)
    gradients = torch.autograd.grad(out.loss.sum(), (x, y))
    return out.loss.detach(), out.metrics, *gradients


@pytest.mark.parametrize(
    ("smoothing", "losses", "slopes"),
    [
        (0.0, [0.6209570478, 0.7709570478], [-0.0462570155, -0.0537429845]),
        (0.1, [0.6359570478, 0.7559570478], [-0.0362570155, -0.0437429845]),
    ],
)
def test_worked_numbers(smoothing, losses, slopes) -> None:
    loss, metrics, chosen, rejected = run(label_smoothing=smoothing, reduction="none")
    close(loss, losses)
    close(chosen, slopes)
    close(rejected, -torch.tensor(slopes, dtype=F64))
    for name, value in {
        "chosen_reward": 0.025, "rejected_reward": 0.025, "reward_margin": 0, "accuracy": 0.5, "pairs": 2, "clamped": 0,
    }.items():  # fmt: skip
        close(metrics[name], value)
    mean, _, chosen, _ = run(label_smoothing=smoothing)
    close(mean, sum(losses) / 2)
    close(chosen, torch.tensor(slopes, dtype=F64) / 2)
    close(run(label_smoothing=smoothing, reduction="sum")[0], sum(losses), atol=2e-10)


def test_a_smoothing_per_pair_is_a_soft_label() -> None:
    soft = torch.tensor([0.0, 0.1], dtype=F64)
    loss, _, chosen, _ = run(label_smoothing=soft, reduction="none")
    close(loss, [0.6209570478, 0.7559570478])
    close(chosen, [-0.0462570155, -0.0437429845])
    undecided = run(CHOSEN, REJECTED, (CHOSEN, REJECTED), label_smoothing=torch.full((2,), 0.5, dtype=F64))
    close(undecided[0], math.log(2))
    close(undecided[2], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"label_smoothing\[1\] is 1\.5"):
        run(label_smoothing=torch.tensor([0.0, 1.5], dtype=F64))


def test_weights_multiply_and_the_mean_stays_over_pairs() -> None:
    weight = torch.tensor([3.0, 0.0], dtype=F64)
    loss, metrics, chosen, _ = run(weight=weight)
    close(loss, 1.5 * 0.6209570478)
    close(chosen, [1.5 * -0.0462570155, 0])
    assert metrics["pairs"] == 2
    close(run(weight=weight, reduction="weighted_mean")[0], 0.6209570478)


def test_the_reference_is_a_constant_and_may_be_missing() -> None:
    x, refs = CHOSEN.clone().requires_grad_(), [r.clone().requires_grad_() for r in REFS]
    loss = dpo_loss(x, REJECTED, *refs).loss
    gradients = torch.autograd.grad(loss, (x, *refs), allow_unused=True)
    assert gradients[0] is not None and gradients[1:] == (None, None)
    close(run(refs=())[0], run(CHOSEN, REJECTED, tuple(torch.zeros_like(r) for r in REFS))[0], atol=0)


@given(st.floats(-30, 30), st.floats(0, 1), st.floats(0.01, 2))
def test_swapping_the_sides_adds_the_margin(difference, smoothing, beta) -> None:
    x, y = torch.tensor([difference], dtype=F64), torch.zeros(1, dtype=F64)
    there = dpo_loss(x, y, beta=beta, label_smoothing=smoothing).loss
    back = dpo_loss(y, x, beta=beta, label_smoothing=smoothing).loss
    close(back - there, (1 - 2 * smoothing) * beta * difference, atol=1e-12)


def test_smoothing_makes_the_best_margin_finite() -> None:
    best = math.log(0.9 / 0.1)
    x = torch.tensor([best], dtype=F64)
    _, _, chosen, _ = run(x, torch.zeros(1, dtype=F64), (), beta=1.0, label_smoothing=0.1)
    close(chosen, [0.0], atol=1e-15)


def test_far_margins_are_linear_or_nothing() -> None:
    x = torch.tensor([-2000.0, 2000.0])
    loss, _, chosen, _ = run(x, torch.zeros(2), (), reduction="none", beta=1.0)
    assert loss.tolist() == [2000, 0] and chosen.tolist() == [-1, 0]


def test_the_recipe_is_dpo_of_the_sums() -> None:
    logp = torch.stack([CHOSEN, REJECTED]).view(4, 1) / 2
    ref = torch.stack(REFS).view(4, 1) / 2
    pairs = Pairs(logp.expand(4, 2), None, ref.expand(4, 2))
    close(load_pair_recipe("dpo:label_smoothing=0.1").loss(pairs).loss, (0.6359570478 + 0.7559570478) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta is 0"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1; it must be between 0 and 1"),
        ({"rejected": REJECTED[:1]}, r"rejected_logp has shape \[1\]"),
        ({"refs": (REF_CHOSEN[:1], None)}, r"ref_chosen_logp has shape \[1\]"),
        ({"reduction": "avg"}, "reduction is 'avg'; accepted: 'mean'"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)
