"""R-DPO against worked numbers and its identities."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import (
    CHOSEN,
    CHOSEN_LENGTHS,
    F64,
    REFS,
    REJECTED,
    REJECTED_LENGTHS,
    assert_layouts_agree,
    close,
    gradients,
    sums,
)
from prefkern.papers import load_pair_recipe
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.r_dpo import r_dpo_loss

LENGTHS = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}


def run(**options):
    options = {**LENGTHS, "reduction": "none", **options}
    out, x, y = gradients(lambda x, y: r_dpo_loss(x, y, *REFS, **options), CHOSEN, REJECTED)
    return out.loss.detach(), out.metrics, x, y


def test_worked_numbers() -> None:
    loss, metrics, chosen, rejected = run(alpha=0.02)
    close(loss, [0.6117553389, 0.8036495810])
    close(chosen, 0.1 * torch.expm1(-loss))
    close(rejected, -chosen)
    close(metrics["chosen_reward"], 0.025)  # without the lengths


def test_a_longer_chosen_response_needs_less() -> None:
    loss = run(alpha=0.5)[0] - run(alpha=0.0)[0]
    assert loss[0] < 0 < loss[1]  # 4 tokens against 3, 2 against 5


def test_identities() -> None:
    plain = dpo_loss(CHOSEN, REJECTED, *REFS, reduction="none").loss
    close(run(alpha=0.0)[0], plain)
    close(run(alpha=0.7, rejected_lengths=CHOSEN_LENGTHS)[0], plain)
    z = 0.1 * (CHOSEN - REFS[0] - REJECTED + REFS[1]) + 0.3 * torch.tensor([1, -3], dtype=F64)
    close(run(alpha=0.3, label_smoothing=0.2)[0], -0.8 * logsigmoid(z) - 0.2 * logsigmoid(-z))
    close(run()[0], run(alpha=0.01)[0])


def test_recipe() -> None:
    counts = {"chosen_lengths": torch.tensor([5, 2, 3]), "rejected_lengths": torch.tensor([1, 4, 5])}
    recipe = load_pair_recipe("r_dpo:alpha=0.05")
    assert_layouts_agree(recipe, lambda logp, ref: r_dpo_loss(*sums(logp - ref), **counts, alpha=0.05).loss)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"chosen_lengths has shape \[1\]; \[2\] is expected"):
        r_dpo_loss(CHOSEN, REJECTED, chosen_lengths=CHOSEN_LENGTHS[:1], rejected_lengths=REJECTED_LENGTHS)
