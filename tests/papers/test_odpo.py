"""ODPO against worked numbers, its offsets and its identities."""

import math

import pytest
import torch

from pair_cases import CHOSEN, F64, REFS, REJECTED, assert_layouts_agree, close, gradients, sums
from prefkern.papers import load_pair_recipe
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.odpo import odpo_loss, odpo_offset

HIGH, LOW = torch.tensor([[3.0, 0.5], [1.0, 0.25]], dtype=F64)


def run(**options):
    out, x, y = gradients(lambda x, y: odpo_loss(x, y, *REFS, **{"reduction": "none", **options}), CHOSEN, REJECTED)
    return out.loss.detach(), out.metrics, x, y


@pytest.mark.parametrize("offset", [0.4, torch.tensor([0.4, 0.4], dtype=F64)])
def test_worked_numbers(offset) -> None:
    loss, metrics, chosen, rejected = run(offset=offset)
    close(loss, [0.8259394199, 1.0054924815])
    close(chosen, 0.1 * torch.expm1(-loss))
    close(rejected, -chosen)
    close(metrics["reward_margin"], 0)  # without the offset


def test_offsets_of_scores() -> None:
    close(odpo_offset(HIGH, LOW), [math.log(2), math.log(0.25)])
    close(odpo_offset(HIGH, LOW, "log_ratio"), [math.log(3), math.log(2)])
    close(odpo_offset(HIGH, LOW, "linear"), [2, 0.25])
    assert not odpo_offset(HIGH.clone().requires_grad_(), LOW).requires_grad


def test_identities() -> None:
    close(run(offset=0.0)[0], dpo_loss(CHOSEN, REJECTED, *REFS, reduction="none").loss)
    close(run(offset=torch.ones(2, dtype=F64), alpha=0.0)[0], run(offset=0.0)[0])
    close(run(offset=0.8, alpha=0.5)[0], run(offset=0.4)[0])
    smoothed = dpo_loss(CHOSEN + 4, REJECTED, *REFS, label_smoothing=0.1, reduction="none").loss
    close(run(offset=-0.4, label_smoothing=0.1)[0], smoothed)


def test_an_offset_has_no_gradient() -> None:
    offset = torch.tensor([0.4, 0.1], dtype=F64, requires_grad=True)
    out = odpo_loss(CHOSEN.clone().requires_grad_(), REJECTED, offset=offset)
    assert torch.autograd.grad(out.loss, offset, allow_unused=True) == (None,)


@pytest.mark.parametrize("kind", ["log", "log_ratio", "linear"])
def test_recipe(kind) -> None:
    scores = {"chosen_scores": torch.tensor([3.0, 0.5, 2.0]), "rejected_scores": torch.tensor([1.0, 0.25, 0.5])}

    def expected(logp, ref):
        return odpo_loss(*sums(logp - ref), offset=odpo_offset(*scores.values(), kind), alpha=0.5).loss

    assert_layouts_agree(load_pair_recipe("odpo", kind=kind, alpha=0.5), expected, per_pair=scores)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kind is 'exp'; accepted: 'log', 'log_ratio', 'linear'"):
        odpo_offset(HIGH, LOW, "exp")
    with pytest.raises(ValueError, match=r"chosen_scores - rejected_scores\[1\] is 0\.0; the logarithm needs the chosen score"):
        odpo_offset(HIGH, torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match=r"rejected_scores\[0\] is -1\.0; a ratio of scores needs them positive"):
        odpo_offset(HIGH, -LOW, "log_ratio")
    with pytest.raises(ValueError, match=r"rejected_scores has shape \[1\]; \[2\] is expected"):
        odpo_offset(HIGH, LOW[:1])
    with pytest.raises(ValueError, match="offset"):
        odpo_loss(CHOSEN, REJECTED, offset=torch.zeros(3))
