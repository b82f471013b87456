"""DPOP against worked numbers and its identities."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import CHOSEN, F64, REFS, REJECTED, assert_layouts_agree, close, gradients, sums
from prefkern.papers import load_pair_recipe
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.dpop import dpop_loss


def run(chosen=CHOSEN, **options):
    out, x, y = gradients(lambda x, y: dpop_loss(x, y, *REFS, **{"reduction": "none", **options}), chosen, REJECTED)
    return out.loss.detach(), out.metrics, x, y


def test_worked_numbers() -> None:
    """x_w is 1 and -0.5."""
    loss, metrics, chosen, rejected = run(penalty=5.0)
    close(loss, [0.6209570478, 0.9130152524])
    pull = 0.1 * torch.expm1(-loss)
    close(chosen, pull * torch.tensor([1, 6]))
    close(rejected, -pull)
    close(metrics["chosen_reward"], 0.025)  # without the penalty


def test_identities() -> None:
    plain = dpo_loss(CHOSEN, REJECTED, *REFS, reduction="none").loss
    close(run(penalty=0.0)[0], plain)
    close(run()[0], run(penalty=50.0)[0])
    close(run()[0][0], plain[0])  # no likelihood lost
    z = 0.1 * (CHOSEN - REFS[0] - REJECTED + REFS[1]) - 0.1 * 5 * torch.tensor([0, 0.5])
    close(run(penalty=5.0, label_smoothing=0.1)[0], -0.9 * logsigmoid(z) - 0.1 * logsigmoid(-z))


def test_no_gradient_of_the_penalty_at_zero() -> None:
    loss, _, chosen, rejected = run(chosen=REFS[0], penalty=5.0)
    close(chosen, -rejected)
    close(loss, dpo_loss(REFS[0], REJECTED, *REFS, reduction="none").loss)


def test_recipe() -> None:
    recipe = load_pair_recipe("dpop:penalty=2.0")
    assert_layouts_agree(recipe, lambda logp, ref: dpop_loss(*sums(logp - ref), penalty=2.0).loss)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="penalty"):
        dpop_loss(CHOSEN, REJECTED, penalty=-1.0)
    assert dpop_loss(torch.tensor([torch.nan], dtype=F64), REJECTED[:1]).loss.isnan()
