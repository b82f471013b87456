"""AOT against worked numbers, its definition by sorting, and its edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.aot import aot_loss
from prefkern.papers.dpo import dpo_loss

F64 = torch.float64
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = torch.tensor([[-10, -8], [-12, -7], [-11, -7.5], [-11.5, -8]], dtype=F64)
REFS = (REF_CHOSEN, REF_REJECTED)
FORMS = ("paired", "unpaired")


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(chosen=CHOSEN, rejected=REJECTED, refs=REFS, **options):
    x, y = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    out = aot_loss(x, y, *refs, **options)
    return out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss.sum(), (x, y))


def sample(count: int) -> list[torch.Tensor]:
    return list(3 * torch.randn(4, count, dtype=F64))


def definition(chosen, rejected, ref_chosen, ref_rejected, form, beta, smoothing):
    if form == "paired":
        d = (chosen - rejected).sort().values - (ref_chosen - ref_rejected).sort().values
    else:
        d = (chosen - ref_chosen).sort().values - (rejected - ref_rejected).sort().values
    return (1 - smoothing) * F.softplus(-beta * d) + smoothing * F.softplus(beta * d)


def test_worked_numbers() -> None:
    """Losses by rank, the gradient by response."""
    loss, _, chosen, rejected = run(label_smoothing=0.05, reduction="none")
    close(loss, [0.7634570478, 0.6284570478])
    close(chosen, [-0.0412570155, -0.0487429845])
    close(rejected, -chosen, atol=0)
    close(run(label_smoothing=0.05)[0], (0.7634570478 + 0.6284570478) / 2)
    loss, _, chosen, _ = run(torch.tensor([-9, -8], dtype=F64), form="unpaired", reduction="none")
    close(loss, [0.6931471806, 0.6443966601])
    close(chosen, [-0.0475020812, -0.05])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 17])
def test_it_is_its_definition(form, count) -> None:
    tensors = sample(count)
    x, y = (t.clone().requires_grad_() for t in tensors[:2])
    expected = definition(x, y, *tensors[2:], form, 0.3, 0.1)
    loss, _, *gradients = run(*tensors[:2], tensors[2:], form=form, beta=0.3, label_smoothing=0.1, reduction="none")
    close(loss, expected.detach(), atol=1e-14)
    for got, wanted in zip(gradients, torch.autograd.grad(expected.sum(), (x, y)), strict=True):
        close(got, wanted, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_one_pair_is_cdpo(form) -> None:
    x, y, *refs = sample(1)
    close(run(x, y, refs, form=form, label_smoothing=0.2)[0], dpo_loss(x, y, *refs, label_smoothing=0.2).loss, atol=1e-15)


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_only_distributions_matter(order, other) -> None:
    """Pairs in any order; and, unpaired, the sides on their own: the gradient goes along."""
    x, y, u, v = sample(6)
    loss, _, chosen, _ = run(x, y, (u, v))
    close(run(x, y, (u[order], v[order]))[0], loss, atol=1e-15)  # paired: the reference's margins are a set
    moved = run(x[order], y[order], (u, v))
    close(moved[0], loss, atol=1e-15)
    close(moved[2], chosen[order], atol=1e-16)
    loss, _, chosen, rejected = run(x, y, (u, v), form="unpaired")
    moved = run(x[order], y[other], (u[order], v[other]), form="unpaired")
    close(moved[0], loss, atol=1e-15)
    close(moved[2], chosen[order], atol=1e-16)
    close(moved[3], rejected[other], atol=1e-16)


@pytest.mark.parametrize("form", FORMS)
def test_metrics_are_those_of_the_responses(form) -> None:
    x, y, *refs = sample(9)
    metrics = run(x, y, refs, form=form, beta=0.3)[1]
    close(metrics["chosen_reward"], 0.3 * (x - refs[0]).mean(), atol=1e-14)
    close(metrics["rejected_reward"], 0.3 * (y - refs[1]).mean(), atol=1e-14)
    d = definition(x, y, *refs, form, 1.0, 0.0) < math.log(2)
    close(metrics["accuracy"], d.to(F64).mean(), atol=1e-15)
    assert metrics["pairs"] == 9


def test_ties_keep_their_order() -> None:
    """Equal margins, so that the sort alone says which response meets which quantile of the reference."""
    x, zeros = torch.zeros(64, dtype=F64), torch.zeros(64, dtype=F64)
    ref = torch.arange(64, dtype=F64)
    _, _, chosen, _ = run(x, zeros, (ref, zeros))
    close(chosen, -0.1 * torch.sigmoid(0.1 * ref) / 64, atol=1e-16)
    _, _, chosen, _ = run(x, ref, (zeros, zeros), form="unpaired")
    close(chosen, -0.1 * torch.sigmoid(0.1 * ref) / 64, atol=1e-16)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_a_constant_and_may_be_missing(form) -> None:
    refs = [r.clone().requires_grad_() for r in REFS]
    x = CHOSEN.clone().requires_grad_()
    assert torch.autograd.grad(aot_loss(x, REJECTED, *refs, form=form).loss, refs, allow_unused=True) == (None, None)
    close(run(refs=(), form=form)[0], run(refs=(torch.zeros(2), torch.zeros(2)), form=form)[0], atol=0)


def test_no_pairs_are_no_loss_and_nan_is_kept() -> None:
    empty = torch.zeros(0, dtype=F64)
    assert run(empty, empty, ())[0] == 0
    assert run(torch.tensor([math.nan, 0], dtype=F64), form="unpaired")[0].isnan()


@pytest.mark.parametrize("form", FORMS)
def test_the_recipe_is_aot_of_the_sums(form) -> None:
    logp, ref = -torch.rand(2, 10, 3, dtype=F64)
    got = load_pair_recipe(f"aot:form={form},beta=2.0,label_smoothing=0.1").loss(Pairs(logp, None, ref))
    tensors = (*logp.sum(1).chunk(2), *ref.sum(1).chunk(2))
    close(got.loss, definition(*tensors, form, 2.0, 0.1).mean(), atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "aot_pair"}, "form is 'aot_pair'; accepted: 'paired', 'unpaired'"),
        (
            {"rejected": REJECTED[:1]},
            r"rejected_logp has shape \[1\]; chosen_logp has shape \[2\], and both sides must be as many",
        ),
        ({"refs": (REF_CHOSEN[:1], None)}, r"ref_chosen_logp has shape \[1\]; chosen_logp has shape \[2\]"),
        ({"refs": (None, REF_CHOSEN[:, None])}, r"ref_rejected_logp has shape \[2, 1\]"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be between 0 and 1"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], REJECTED), "chosen_logp is a list; a torch.Tensor is expected"),
        ((CHOSEN, None), "rejected_logp is a NoneType; a torch.Tensor is expected"),
        ((CHOSEN, REJECTED, 0.0), "ref_chosen_logp is a float; a torch.Tensor is expected"),
    ],
)
def test_other_types_are_refused(arguments, message) -> None:
    with pytest.raises(TypeError, match=message):
        aot_loss(*arguments)
