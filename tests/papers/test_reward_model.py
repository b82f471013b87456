"""The Bradley-Terry loss of reward models against worked numbers and its identities."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import F64, close, gradients
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.reward_model import reward_model_loss

CHOSEN, REJECTED = torch.tensor([[1.0, 0.2], [0.3, 0.9]], dtype=F64)
MARGIN = torch.tensor([0.5, 0.0], dtype=F64)


def run(**options):
    out, x, y = gradients(lambda x, y: reward_model_loss(x, y, **options), CHOSEN, REJECTED)
    return out.loss.detach(), out.metrics, x, y


def test_worked_numbers() -> None:
    loss, metrics, chosen, rejected = run(margin=MARGIN, centering=0.01)
    close(loss, 0.8651624591)
    total = CHOSEN + REJECTED
    close(metrics["centering"], total.square().mean())
    close(metrics["chosen_reward"], 0.6)
    assert metrics["accuracy"] == 0.5
    pull = -torch.sigmoid(-(CHOSEN - REJECTED - MARGIN))
    close(chosen, (pull + 0.02 * total) / 2)
    close(rejected, (-pull + 0.02 * total) / 2)


def test_the_exponential_form_has_the_same_value() -> None:
    loss, _, chosen, rejected = run()
    x, y = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    other = torch.log(1 + torch.exp(y - x)).mean()
    close(loss, other.detach())
    of_x, of_y = torch.autograd.grad(other, (x, y))
    close(chosen, of_x)
    close(rejected, of_y)
    far = reward_model_loss(torch.tensor([0.0]), torch.tensor([1e4])).loss  # where e^x overflows
    assert far == 1e4


def test_reductions() -> None:
    each = run(margin=MARGIN, centering=0.01, reduction="none")[0]
    close(each, -logsigmoid(CHOSEN - REJECTED - MARGIN) + 0.01 * (CHOSEN + REJECTED).square())
    close(run(margin=MARGIN, centering=0.01, reduction="sum")[0], each.sum())
    close(run(margin=MARGIN, centering=0.01)[0], each.mean())
    assert "centering" not in run()[1]


def test_labels_and_weights() -> None:
    z = CHOSEN - REJECTED
    close(run(label_smoothing=0.1)[0], (-0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z)).mean())
    weight = torch.tensor([0.5, 2.0], dtype=F64)
    close(run(weight=weight)[0], (-logsigmoid(z) * weight).mean())
    close(run()[0], dpo_loss(CHOSEN, REJECTED, beta=1.0).loss)


def test_a_margin_has_no_gradient() -> None:
    margin = MARGIN.clone().requires_grad_()
    out = reward_model_loss(CHOSEN.clone().requires_grad_(), REJECTED, margin=margin)
    assert torch.autograd.grad(out.loss, margin, allow_unused=True) == (None,)


def test_refusals_and_nan() -> None:
    with pytest.raises(ValueError, match=r"centering is -0\.1; it must not be negative"):
        reward_model_loss(CHOSEN, REJECTED, centering=-0.1)
    with pytest.raises(ValueError, match="offset"):
        reward_model_loss(CHOSEN, REJECTED, margin=torch.zeros(3))
    assert reward_model_loss(torch.tensor([math.nan]), torch.tensor([0.0])).loss.isnan()
    assert reward_model_loss(torch.zeros(0), torch.zeros(0), centering=0.1).loss == 0
