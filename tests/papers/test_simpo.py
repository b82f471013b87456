"""SimPO against worked numbers, its definition and its edge cases."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.ln_dpo import ln_dpo_loss
from prefkern.papers.simpo import simpo_loss, simpo_margin

F64 = torch.float64
X = math.nan  # padding
LOGP = torch.tensor(
    [[-0.5, -1, -0.25, X], [-2, -0.1, X, X], [-1.5, -0.7, X, X], [-0.4, -0.6, -0.2, -1.2]], dtype=F64
)  # fmt: skip
LENGTHS = torch.tensor([3, 2, 2, 4])
MASK = ~LOGP.isnan()
SUMS = torch.where(MASK, LOGP, 0.0).sum(1).chunk(2)
SIDES = LENGTHS.chunk(2)
CU_SEQLENS = torch.tensor([0, 3, 5, 7, 11], dtype=torch.int32)
A_W, A_L = torch.tensor([[-0.3, -1.2], [-0.9, -2.5]], dtype=F64)
ONES = torch.ones(2)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def of_tokens(layout="padded", text="simpo:beta=2.0,gamma_beta_ratio=0.5", **options):
    """Loss, metrics, and the gradient [4, 4]."""
    logp = LOGP.clone().requires_grad_()
    pairs = Pairs(logp, MASK) if layout == "padded" else Pairs(logp[MASK], None, None, CU_SEQLENS)
    out = load_pair_recipe(text, **options).loss(pairs)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    return out.loss.detach(), out.metrics, gradient


def of_sums(sums=SUMS, lengths=SIDES, **options):
    x, y = (s.clone().requires_grad_() for s in sums)
    out = simpo_loss(x, y, *lengths, **{"beta": 2.0, "gamma_beta_ratio": 0.5} | options)
    return out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss.sum(), (x, y))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_worked_numbers(layout) -> None:
    loss, metrics, gradient = of_tokens(layout)
    close(of_sums(reduction="none")[0], [0.6766193964, 2.0393867583])
    close(loss, 1.3580030773)
    close(metrics["chosen_reward"], (-1.1666666667 - 2.1) / 2)
    close(metrics["rejected_reward"], (-2.2 - 1.2) / 2)
    slopes = torch.tensor([-0.1638891461, -0.4349457628, 0.2458337191, 0.2174728814], dtype=F64)
    close(gradient, torch.where(MASK, slopes[:, None], 0.0))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_worked_numbers_with_smoothing_and_likelihood(layout) -> None:
    smoothed = {"label_smoothing": 0.1}
    close(of_sums(reduction="none", **smoothed)[0], [0.6799527297, 1.8493867583])
    loss, metrics, gradient = of_tokens(layout, sft_weight=0.5, **smoothed)
    close(loss, 1.6496697440)
    close(metrics["nll"], 0.77)
    plain = of_tokens(layout, **smoothed)[2]
    chosen = torch.tensor([[True], [True], [False], [False]]) & MASK
    close(gradient - plain, -0.1 * chosen.to(F64))


def test_worked_hinge() -> None:
    close(of_sums(reduction="none", kind="hinge")[0], [0.9666666667, 2.9])
    loss, _, gradient = of_tokens(kind="hinge", label_smoothing=0.3)  # which the hinge does not know
    close(loss, 1.9333333333)
    slopes = torch.tensor([-1, -1, 1, 1], dtype=F64) / LENGTHS
    close(gradient, torch.where(MASK, slopes[:, None], 0.0))


def test_a_hinge_that_is_met_has_no_gradient() -> None:
    """z = 1 exactly, and beyond."""
    sums = torch.tensor([-1.0, 0]), torch.tensor([-2.0, -9])
    loss, _, chosen, _ = of_sums(sums, (ONES, ONES), beta=1.0, gamma_beta_ratio=0.0, kind="hinge", reduction="none")
    assert loss.tolist() == [0, 0] and chosen.tolist() == [0, 0]


def test_worked_numbers_of_means() -> None:
    loss, *_ = of_sums((A_W, A_L), (ONES, ONES), gamma=1.0, gamma_beta_ratio=None, reduction="none")
    close(loss, [0.5981388694, 0.1839007409])


def test_the_margin_is_gamma_or_its_ratio() -> None:
    assert simpo_margin(2.0, None, None) == 0.5 and simpo_margin(2.0, 1.5, None) == 1.5 and simpo_margin(4.0, None, 0.5) == 2
    assert simpo_margin(2.0, 0.0, None) == 0
    close(of_tokens("padded", "simpo:gamma=1.0")[0], 1.3580030773)
    close(of_tokens("padded", "simpo:gamma_beta_ratio=0.25")[0], of_tokens("padded", "simpo")[0], atol=0)
    with pytest.raises(ValueError, match=r"gamma is 1\.0 and gamma_beta_ratio is 0\.5; one of them is expected"):
        of_tokens(gamma=1.0)


def test_the_gradient_is_that_of_the_definition() -> None:
    sums, lengths = (-5 * torch.rand(2, 7, dtype=F64)).unbind(), torch.randint(1, 9, (2, 7)).unbind()

    def loss(x, y, smoothing, weight):
        z = 2.5 * (x / lengths[0] - y / lengths[1]) - 0.7
        pair = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
        return pair.mean() - weight * x.sum() / lengths[0].sum()

    x, y = (s.clone().requires_grad_() for s in sums)
    for smoothing, weight in ((0.0, 0.0), (0.2, 0.0), (0.2, 1.3)):
        expected = loss(x, y, smoothing, weight)
        got = of_sums(sums, lengths, beta=2.5, gamma=0.7, gamma_beta_ratio=None, label_smoothing=smoothing, sft_weight=weight)
        close(got[0], expected.detach(), atol=1e-14)
        for gradient, wanted in zip(got[2:], torch.autograd.grad(expected, (x, y)), strict=True):
            close(gradient, wanted, atol=1e-15)


@given(st.floats(-5, 0), st.floats(-5, 0), st.floats(0, 1))
def test_without_a_margin_swapping_the_sides_adds_the_difference(a, b, smoothing) -> None:
    x, y = torch.tensor([a], dtype=F64), torch.tensor([b], dtype=F64)
    options = {"gamma": 0.0, "gamma_beta_ratio": None, "label_smoothing": smoothing}
    one = torch.ones(1)
    there, back = (of_sums(s, (one, one), **options)[0] for s in ((x, y), (y, x)))
    close(back - there, (1 - 2 * smoothing) * 2 * (a - b), atol=1e-12)


def test_invariants() -> None:
    plain = of_tokens(label_smoothing=0.2)[2]
    close(plain[:2].nansum(), -plain[2:].nansum(), atol=1e-15)
    doubled = of_sums(tuple(2 * s for s in SUMS), tuple(2 * n for n in SIDES))  # every token twice
    close(doubled[0], 1.3580030773)
    # A reference that gives every token the same probability is none.
    refs = tuple(-0.7 * n.to(F64) for n in SIDES)
    uniform = ln_dpo_loss(*SUMS, *refs, chosen_lengths=SIDES[0], rejected_lengths=SIDES[1], beta=2.0).loss
    close(of_sums(gamma_beta_ratio=0.0)[0], uniform, atol=1e-14)


def test_one_pair_of_equal_responses() -> None:
    x, lengths = torch.tensor([-3.0], dtype=F64), torch.tensor([3])
    loss, _, chosen, rejected = of_sums((x, x), (lengths, lengths))
    close(loss, math.log1p(math.exp(1.0)), atol=1e-15)
    close(chosen, -rejected, atol=0)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_a_token_that_is_impossible(kind) -> None:
    x = torch.tensor([-math.inf, -1.0])
    loss, *_ = of_sums((x, x.flip(0)), (ONES, ONES), kind=kind, reduction="none")
    assert loss.tolist() == [math.inf, 0]


def test_two_impossible_responses_are_refused(validation) -> None:
    validation(True)
    x = torch.tensor([-1.0, -math.inf])
    with pytest.raises(ValueError, match=re.escape("chosen_logp[1] and rejected_logp[1] are -inf; their margin is undefined")):
        of_sums((x, x), (ONES, ONES))


def test_far_margins() -> None:
    loss, _, chosen, _ = of_sums((torch.tensor([-1e4]), torch.zeros(1)), (torch.tensor([2]),) * 2, gamma_beta_ratio=0.0)
    assert loss == 1e4 and chosen == -1


EMPTY = (torch.tensor([3, 0]), torch.tensor([2, 4]))


def test_an_empty_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chosen_lengths\[1\] is 0; a response needs at least one token"):
        of_sums(lengths=EMPTY)
    with pytest.raises(ValueError, match=r"rejected_lengths\[0\] is 0; a response needs at least one token"):
        of_sums(lengths=(SIDES[0], torch.tensor([0, 4])))
    with pytest.raises(ValueError, match=r"lengths\[1\] is 0\.0; a response needs at least one token that counts"):
        load_pair_recipe("simpo").loss(Pairs(LOGP, MASK & torch.tensor([[True], [False], [True], [True]])))


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_an_empty_response_may_be_left_out(kind) -> None:
    sums = (torch.tensor([SUMS[0][0], X], dtype=F64), SUMS[1])
    loss, metrics, chosen, rejected = of_sums(sums, EMPTY, empty="zero", kind=kind, sft_weight=0.5)
    one = tuple(s[:1] for s in SUMS), tuple(n[:1] for n in SIDES)
    expected = of_sums(*one, kind=kind, sft_weight=0.5)
    close(loss, expected[0], atol=1e-15)
    close(metrics["nll"], 1.75 / 3)
    close(chosen, [expected[2].item(), 0])
    close(rejected, [expected[3].item(), 0])
    assert metrics["pairs"] == 1
    nothing = of_sums(sums, (torch.zeros(2), torch.ones(2)), empty="zero", sft_weight=0.5)
    assert nothing[0] == 0 and not nothing[2].any() and not nothing[3].any()


def test_nan_that_counts_is_kept() -> None:
    assert of_sums((torch.tensor([X, -1.0]), SUMS[1].float()))[0].isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ipo"}, "kind is 'ipo'; accepted: 'sigmoid', 'hinge'"),
        ({"empty": "skip"}, "empty is 'skip'; accepted: 'error', 'zero'"),
        ({"beta": -1.0}, "beta is -1"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2; it must be between 0 and 1"),
        ({"lengths": (SIDES[0][:1], SIDES[1])}, r"chosen_lengths has shape \[1\]"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        of_sums(**options)
