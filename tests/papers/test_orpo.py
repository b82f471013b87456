"""ORPO against worked numbers, its definition and its edges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.orpo import orpo_loss


def log_odds(a):
    return a - torch.log1p(-a.exp())


def run(chosen=MEAN_CHOSEN, rejected=MEAN_REJECTED, lengths=(ONES, ONES), **options):
    options = {"nll_weight": 0, "reduction": "none", **options}
    out, x, y = gradients(lambda x, y: orpo_loss(x, y, *lengths, **options), chosen, rejected)
    return out.loss.detach(), out.metrics, x, y


def test_worked_numbers() -> None:
    loss, metrics, chosen, rejected = run()
    close(loss, [0.0214864962, 0.0188533549])
    z = log_odds(MEAN_CHOSEN) - log_odds(MEAN_REJECTED)
    slope = -0.1 * torch.sigmoid(-z)
    close(chosen, slope / -torch.expm1(MEAN_CHOSEN))
    close(rejected, -slope / -torch.expm1(MEAN_REJECTED))
    close(metrics["reward_margin"], z.mean())
    close(metrics["chosen_reward"], log_odds(MEAN_CHOSEN).mean())
    assert metrics["accuracy"] == 1 and "nll" not in metrics


def test_lengths_and_beta_outside_the_logistic() -> None:
    loss, _, chosen, _ = run(CHOSEN, REJECTED, (CHOSEN_LENGTHS, REJECTED_LENGTHS), beta=0.5)
    x = CHOSEN.clone().requires_grad_()
    z = log_odds(x / CHOSEN_LENGTHS) - log_odds(REJECTED / REJECTED_LENGTHS)
    expected = -0.5 * torch.nn.functional.logsigmoid(z)
    close(loss, expected.detach())
    close(chosen, torch.autograd.grad(expected.sum(), x)[0])
    close(run(CHOSEN, REJECTED, (CHOSEN_LENGTHS, REJECTED_LENGTHS), beta=1.0)[0], 2 * loss)


def test_the_likelihood_is_over_the_tokens_given() -> None:
    lengths = (CHOSEN_LENGTHS, REJECTED_LENGTHS)
    odds = run(CHOSEN, REJECTED, lengths)[0].mean()
    out = orpo_loss(CHOSEN, REJECTED, *lengths)
    close(out.loss, odds + 18 / 6)
    close(out.metrics["nll"], 3.0)
    close(orpo_loss(CHOSEN, REJECTED, *lengths, nll_weight=0.5, nll_reduction="response").loss, odds + 0.5 * 3.25)
    # prompt and response together, as TRL has it
    whole, counts = torch.tensor([-13.0, -9.0], dtype=F64, requires_grad=True), torch.tensor([7, 4])
    x = CHOSEN.clone().requires_grad_()
    out = orpo_loss(x, REJECTED, *lengths, nll_logp=whole, nll_lengths=counts)
    close(out.loss.detach(), odds + 22 / 11)
    gradient, of_whole = torch.autograd.grad(out.loss, (x, whole))
    close(of_whole, [-1 / 11, -1 / 11])
    close(gradient, run(CHOSEN, REJECTED, lengths, reduction="mean")[2])


@given(st.floats(-30, -1e-3), st.floats(-30, -1e-3))
def test_stable_everywhere_below_zero(a_w, a_l) -> None:
    loss, _, chosen, rejected = run(torch.tensor([a_w], dtype=F64), torch.tensor([a_l], dtype=F64), (ONES[:1], ONES[:1]))
    z = a_w - a_l - math.log(-math.expm1(a_w)) + math.log(-math.expm1(a_l))
    expected = 0.1 * (math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z)) - z)
    assert_close(loss.item(), expected, rtol=1e-10, atol=1e-12)
    assert chosen <= 0 <= rejected


def test_near_certainty_in_float32() -> None:
    """log(1 - e^a) by log1p(-exp(a)) would be -inf here."""
    a = torch.tensor([-1e-9])
    loss = orpo_loss(a, torch.tensor([-1.0]), torch.ones(1), torch.ones(1), nll_weight=0, beta=1.0).loss
    assert_close(loss.item(), math.exp(-(-1e-9 - math.log(1e-9)) - 1 - math.log(1 - math.exp(-1))), rtol=1e-4, atol=0)


def test_certain_responses_are_refused_unless_held() -> None:
    certain = torch.tensor([-0.3, 0.0], dtype=F64)
    for name, sides in (("chosen_logp", (certain, MEAN_REJECTED)), ("rejected_logp", (MEAN_CHOSEN, certain))):
        with pytest.raises(ValueError, match=rf"{name}\[1\] is 0\.0; a response that is certain has infinite odds"):
            orpo_loss(*sides, ONES, ONES)
    loss, _, chosen, _ = run(certain, MEAN_REJECTED, max_p=0.99)
    z = -math.log(0.01) - log_odds(MEAN_REJECTED)[1]
    close(loss[1], -0.1 * torch.nn.functional.logsigmoid(z))
    assert chosen.isfinite().all()


def test_recipe() -> None:
    counts = torch.tensor([5, 2, 3]), torch.tensor([1, 4, 5])
    assert_layouts_agree(load_pair_recipe("orpo"), lambda logp, _: orpo_loss(*sums(logp), *counts).loss)
    given = {"nll_logp": torch.tensor([-9.0, -4.0, -5.0], dtype=F64), "nll_lengths": torch.tensor([8, 5, 6])}
    recipe = load_pair_recipe("orpo:nll=given,beta=0.3")
    assert_layouts_agree(recipe, lambda logp, _: orpo_loss(*sums(logp), *counts, beta=0.3, **given).loss, per_pair=given)
    with pytest.raises(ValueError, match=r"pairs\.extra\['nll_logp'\] is None"):
        recipe.loss(Pairs(-torch.ones(2, 2)))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="nll_lengths is None; the likelihood needs both nll_logp and nll_lengths"):
        orpo_loss(CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS, nll_logp=CHOSEN)
    with pytest.raises(ValueError, match="nll_logp is None; the likelihood needs both"):
        orpo_loss(CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS, nll_lengths=CHOSEN_LENGTHS)
    with pytest.raises(ValueError, match=r"chosen_lengths\[0\] is 0; a response needs at least one token"):
        orpo_loss(CHOSEN, REJECTED, torch.tensor([0, 2]), REJECTED_LENGTHS)
    with pytest.raises(ValueError, match="nll_reduction is 'all'; accepted: 'token', 'response', 'sum'"):
        orpo_loss(CHOSEN, REJECTED, CHOSEN_LENGTHS, REJECTED_LENGTHS, nll_reduction="all")
    with pytest.raises(ValueError, match="nll is 'prompt'; accepted: 'response', 'given'"):
        load_pair_recipe("orpo").__class__(nll="prompt").loss(Pairs(-torch.ones(2, 2)))


def test_nan_is_not_hidden() -> None:
    broken = torch.tensor([math.nan, -1.0], dtype=F64)
    assert orpo_loss(broken, MEAN_REJECTED, ONES, ONES).loss.isnan()
