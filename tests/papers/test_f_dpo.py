"""f-DPO against worked numbers, its limits, its closed-form solution and its edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.f_dpo import DIVERGENCES, f_dpo_loss

F64 = torch.float64
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = torch.tensor([[-10, -8], [-12, -7], [-11, -7.5], [-11.5, -8]], dtype=F64)
ZERO = torch.zeros(1, dtype=F64)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(chosen=CHOSEN, rejected=REJECTED, refs=(REF_CHOSEN, REF_REJECTED), **options):
    x, y = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    out = f_dpo_loss(x, y, *refs, **options)
    return out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss.sum(), (x, y))


def of_ratios(x_w, x_l, **options):
    x, y = (torch.as_tensor(v, dtype=F64).reshape(-1) for v in (x_w, x_l))
    return run(x, y, (torch.zeros_like(x), torch.zeros_like(y)), **options)


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        ({}, [0.6209570478, 0.7709570478]),
        ({"divergence": "forward_kl"}, [0.6311543836, 0.7592385665]),
        ({"divergence": "js_divergence"}, [0.6606521625, 0.7267336922]),
        ({"divergence": "alpha_divergence", "alpha": 0.3}, [0.6254376939, 0.7657763679]),
        ({"divergence": "alpha_divergence", "alpha": 0.3, "convention": "trl"}, [0.6294248733, 0.7612080512]),
        ({"divergence": "alpha_divergence", "alpha": 0.7}, [0.6294248733, 0.7612080512]),
    ],
)
def test_worked_numbers(options, losses) -> None:
    loss, *_ = run(reduction="none", **options)
    close(loss, losses)
    close(run(**options)[0], sum(losses) / 2)


def test_worked_gradients_and_rewards() -> None:
    close(run()[2], [-0.0231285077, -0.0268714923])
    _, _, chosen, rejected = run(divergence="forward_kl")
    close(chosen, [-0.0086087957, -0.0438541178])
    close(rejected, [0.0385819457, 0.0097851763])
    rewards = [run(CHOSEN[i : i + 1], REJECTED[i : i + 1], (REF_CHOSEN[i : i + 1], REF_REJECTED[i : i + 1]),
                   divergence="js_divergence")[1]["chosen_reward"] for i in range(2)]  # fmt: skip
    close(torch.stack(rewards), [0.0379885493, -0.0280929804])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "exponential"])
def test_the_gradient_is_that_of_the_score(divergence, loss) -> None:
    """Score and slope as in the table of f'; any loss of the margin."""
    x_w, x_l = torch.tensor([1.0, -0.5, 2.0], dtype=F64), torch.tensor([-0.5, 1.0, 2.0], dtype=F64)
    score, slope = {
        "reverse_kl": (lambda x: x, torch.ones_like),
        "forward_kl": (lambda x: 1 - (-x).exp(), lambda x: (-x).exp()),
        "js_divergence": (lambda x: math.log(2) + F.logsigmoid(x), lambda x: torch.sigmoid(-x)),
        "alpha_divergence": (lambda x: (1 - (-0.4 * x).exp()) / 0.4, lambda x: (-0.4 * x).exp()),
    }[divergence]
    z = (0.7 * (score(x_w) - score(x_l))).requires_grad_()
    value = {"sigmoid": F.softplus(-z), "hinge": F.relu(1 - z), "exponential": (-z).exp()}[loss]
    (dz,) = torch.autograd.grad(value.sum(), z)
    got = of_ratios(x_w, x_l, divergence=divergence, alpha=0.4, beta=0.7, loss=loss, reduction="none")
    close(got[0], value.detach(), atol=1e-14)
    close(got[2], dz * 0.7 * slope(x_w), atol=1e-14)
    close(got[3], -dz * 0.7 * slope(x_l), atol=1e-14)
    close(got[1]["chosen_reward"], 0.7 * score(x_w).mean(), atol=1e-14)


def test_limits_of_alpha() -> None:
    alpha = {"divergence": "alpha_divergence"}
    forward, reverse = run(divergence="forward_kl"), run()
    for got, expected in zip(run(alpha=1.0, **alpha), forward, strict=True):
        if not isinstance(got, dict):
            close(got, expected, atol=1e-15)
    close(run(alpha=0.0, **alpha)[0], reverse[0], atol=0)
    close(run(alpha=1e-7, **alpha)[2], reverse[2], atol=0)
    close(run(alpha=1e-5, **alpha)[0], reverse[0], atol=1e-4)
    close(run(alpha=1e-5, **alpha)[2], reverse[2], atol=1e-6)
    close(run(alpha=1.0, convention="trl", **alpha)[0], reverse[0], atol=0)
    close(run(**alpha)[0], run(convention="trl", **alpha)[0], atol=0)  # at 1/2 both say the same


def test_reverse_kl_is_dpo() -> None:
    close(run(beta=0.3)[0], dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=0.3).loss, atol=0)


@given(st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(DIVERGENCES))
def test_swapping_the_sides_adds_the_margin(a, b, divergence) -> None:
    options = {"divergence": divergence, "beta": 0.5}
    there, metrics, *_ = of_ratios([a], [b], **options)
    close(of_ratios([b], [a], **options)[0] - there, metrics["reward_margin"], atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_increase_and_some_are_bounded(divergence) -> None:
    x = torch.linspace(-5, 30, 71, dtype=F64)
    rewards = torch.stack([of_ratios([v], [0.0], divergence=divergence, beta=1.0)[1]["chosen_reward"] for v in x.tolist()])
    assert (rewards.diff() >= 0).all() and (rewards[:30].diff() > 0).all()
    top = {"reverse_kl": 30.0, "forward_kl": 1.0, "js_divergence": math.log(2), "alpha_divergence": 2.0}[divergence]
    close(rewards[-1], top, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_at_the_reference(divergence) -> None:
    loss, _, chosen, rejected = of_ratios([0.0, 3.0], [0.0, 3.0], divergence=divergence, reduction="none")
    close(loss, [math.log(2)] * 2, atol=1e-15)
    close(chosen, -rejected, atol=0)


def test_exponents_are_held_without_gradient_and_counted() -> None:
    """x of -100 would be e^100."""
    for options, held in (({"divergence": "forward_kl"}, -100.0), ({"divergence": "alpha_divergence", "alpha": 0.5}, -200.0)):
        x_w, x_l = torch.tensor([held, 0.0, held, 1.0]), torch.tensor([0.0, held, held, 0.0])
        for dtype in (torch.float32, F64):
            zeros = torch.zeros(4, dtype=dtype)
            loss, metrics, chosen, rejected = run(
                x_w.to(dtype), x_l.to(dtype), (zeros, zeros), reduction="none", beta=1e-35, **options
            )
            assert loss.isfinite().all() and metrics["clamped"] == 3
            assert chosen[0] == chosen[2] == rejected[1] == rejected[2] == 0
            assert chosen[3] < 0 and rejected[0] > 0 and chosen[1] < 0
            assert_close(loss[2], torch.tensor(math.log(2), dtype=dtype))  # both held: nothing is left
            slope = 1e-35 / (1 + math.exp(-1e-35 * math.exp(80) / options.get("alpha", 1)))  # of x_l, far from held
            assert_close(rejected[0], torch.tensor(slope, dtype=dtype), rtol=1e-4, atol=0)
    assert of_ratios([-3.0], [0.0], divergence="forward_kl", exp_cap=2.0)[1]["clamped"] == 1
    close(
        of_ratios([-3.0], [0.0], divergence="forward_kl", exp_cap=2.0)[0],
        math.log1p(math.exp(0.1 * (math.exp(2.0) - 1))), atol=1e-14,
    )  # fmt: skip
    assert of_ratios([-1000.0], [0.0], divergence="js_divergence")[1]["clamped"] == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_minimiser_is_the_closed_form(divergence) -> None:
    """All pairs of a table with Bradley-Terry labels: the policy solves pi = ref (f')^-1((r - lambda) / beta)."""
    ref = torch.softmax(torch.tensor([0.3, -0.4, 0.8, 0.0, -1.0], dtype=F64), 0)
    reward, beta, alpha = torch.tensor([0.4, 0.1, -0.2, 0.3, -0.3], dtype=F64), 0.6, 0.4
    inverse = {
        "reverse_kl": lambda v: (v - 1).exp(),
        "forward_kl": lambda v: -1 / v,
        "js_divergence": lambda v: v.exp() / (2 - v.exp()),
        "alpha_divergence": lambda v: (1 - alpha * v) ** (-1 / alpha),
    }[divergence]
    supremum = {"reverse_kl": 50.0, "forward_kl": 0.0, "js_divergence": math.log(2), "alpha_divergence": 1 / alpha}[divergence]
    low, high = reward.max() - beta * supremum, reward.max() + 50 * beta
    for _ in range(200):  # the mass falls with lambda
        middle = (low + high) / 2
        mass = (ref * inverse((reward - middle) / beta)).sum()
        low, high = (middle, high) if mass > 1 else (low, middle)
    expected = ref * inverse((reward - high) / beta)
    close(expected.sum(), 1.0, atol=1e-9)

    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    wins = torch.sigmoid(reward[i] - reward[j])
    logits = ref.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        logp, log_ref = logits.log_softmax(0), ref.log()
        loss = f_dpo_loss(
            logp[i], logp[j], log_ref[i], log_ref[j], beta=beta, divergence=divergence, alpha=alpha, weight=wins
        ).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    close(logits.detach().softmax(0), expected, atol=1e-6)


def test_the_recipe_is_f_dpo_of_the_sums() -> None:
    logp = torch.cat([CHOSEN, REJECTED])[:, None].expand(4, 2) / 2
    ref = torch.cat([REF_CHOSEN, REF_REJECTED])[:, None].expand(4, 2) / 2
    recipe = load_pair_recipe("f_dpo:divergence=alpha_divergence,alpha=0.3,convention=trl")
    close(recipe.loss(Pairs(logp, None, ref)).loss, (0.6294248733 + 0.7612080512) / 2)
    close(load_pair_recipe("f_dpo").loss(Pairs(logp, None, ref)).loss, (0.6606521625 + 0.7267336922) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refs": (None, REF_REJECTED)}, "ref_chosen_logp is None; f-DPO has no form without a reference"),
        ({"refs": (REF_CHOSEN, None)}, "ref_rejected_logp is None; f-DPO has no form without a reference"),
        ({"divergence": "chi_squared"}, "divergence is 'chi_squared'; accepted: 'reverse_kl', 'forward_kl'"),
        ({"convention": "TRL"}, "convention is 'TRL'; accepted: 'paper', 'trl'"),
        ({"alpha": 1.1}, r"alpha is 1\.1; it must be between 0 and 1"),
        ({"alpha": -0.1}, r"alpha is -0\.1; it must be between 0 and 1"),
        ({"alpha": math.nan}, "alpha is nan; it must be between 0 and 1"),
        ({"exp_cap": 0.0, "divergence": "forward_kl"}, "exp_cap is 0; it must be finite and positive"),
        ({"loss": "logistic"}, "kind is 'logistic'; accepted: "),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)
