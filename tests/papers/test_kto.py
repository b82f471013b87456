"""KTO against worked numbers, its definition, its reference point and its edges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pair_cases import F64, assert_layouts_agree, close, gradients, sums
from prefkern import unpaired_loss
from prefkern.papers import load_pair_recipe
from prefkern.papers.kto import kto_kl, kto_loss, kto_mismatched

X = torch.tensor([1.0, -0.5, 2.0], dtype=F64)
DESIRABLE = torch.tensor([True, False, False])


def run(x=X, desirable=DESIRABLE, ref=None, **options):
    out, slope = gradients(lambda x: kto_loss(x, ref, desirable, **{"reduction": "none", **options}), x)
    return out.loss.detach(), out.metrics, slope


def test_worked_numbers() -> None:
    loss, metrics, slope = run(kl=0.4, undesirable_weight=1.33)
    close(loss, [0.4850044984, 0.6350951830, 0.7180867965])
    v = 0.1 * (X - 0.4) * torch.tensor([1, -1, -1])
    sides = torch.tensor([-0.1, 0.133, 0.133], dtype=F64)
    close(slope, sides * torch.sigmoid(v) * torch.sigmoid(-v))
    close(metrics["kl"], 0.4)
    close(metrics["chosen_reward"], 0.1)
    close(metrics["rejected_reward"], 0.075)
    mean = run(kl=0.4, undesirable_weight=1.33, reduction="mean")
    close(mean[0], (0.4850044984 + 0.6350951830 + 0.7180867965) / 3)
    close(mean[2], slope / 3)


def test_a_reference_and_a_tensor_as_reference_point() -> None:
    ref = torch.tensor([-3.0, 0.25, 1.0], dtype=F64)
    close(run(X + ref, ref=ref, kl=torch.tensor(0.4, dtype=F64))[0], run(kl=0.4)[0])
    kl = torch.tensor(0.4, dtype=F64, requires_grad=True)
    out = kto_loss(X.clone().requires_grad_(), None, DESIRABLE, kl=kl)
    assert torch.autograd.grad(out.loss, kl, allow_unused=True) == (None,) and not out.metrics["kl"].requires_grad
    close(run(desirable_weight=0.5)[0][0], 0.5 * run()[0][0])


@pytest.mark.parametrize("kl", [-2.0, torch.tensor(-2.0, dtype=F64)])
def test_a_negative_reference_point_counts_as_zero(kl) -> None:
    loss, metrics, _ = run(kl=kl)
    close(loss, run(kl=0.0)[0])
    assert metrics["kl"] == 0


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone_uses_the_reference_point(label) -> None:
    loss, metrics, _ = run(desirable=torch.full((3,), label), kl=0.4, reduction="mean")
    close(loss, (1 - torch.sigmoid((1 if label else -1) * 0.1 * (X - 0.4))).mean())
    assert metrics["rejected_reward" if label else "chosen_reward"] == 0


def test_without_it_this_is_apo_zero_of_single_responses() -> None:
    close(run()[0], unpaired_loss(X, None, DESIRABLE, kind="apo_zero", reduction="none").loss)


def test_the_loss_saturates_both_ways() -> None:
    loss, _, slope = run(torch.tensor([1e4, -1e4, 1e4], dtype=F64))
    close(loss, [0, 0, 1])
    close(slope, [0, 0, 0])


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.floats(0, 20))
def test_between_zero_and_the_weights(values, kl) -> None:
    x = torch.tensor(values, dtype=F64)
    desirable = torch.arange(len(x)) % 2 == 0
    loss, _, slope = run(x, desirable, kl=kl, undesirable_weight=1.5)
    assert (loss >= 0).all() and (loss <= torch.where(desirable, 1.0, 1.5)).all()
    assert (slope[desirable] <= 0).all() and (slope[~desirable] >= 0).all()


# ---- the reference point


def test_every_prompt_gets_the_response_of_the_one_before() -> None:
    assert kto_mismatched(torch.tensor([10, 20, 30])).tolist() == [30, 10, 20]
    assert kto_mismatched(torch.tensor([[1, 2], [3, 4]])).tolist() == [[3, 4], [1, 2]]
    for rows in (torch.zeros(1, 4), torch.zeros(())):
        with pytest.raises(ValueError, match=r"responses has shape \[.*\]; at least two rows can be mismatched"):
            kto_mismatched(rows)


def test_its_mean_and_bound() -> None:
    logp, ref = torch.tensor([-1.0, -2.0], dtype=F64, requires_grad=True), torch.tensor([-2.0, -2.5], dtype=F64)
    kl = kto_kl(logp, ref)
    assert kl == 0.75 and not kl.requires_grad and kl.dim() == 0
    assert kto_kl(logp) == 0 and kto_kl(-logp) == 1.5


def test_the_bound_comes_after_the_other_ranks() -> None:
    seen = []

    def all_reduce(mean):
        seen.append(mean.item())
        return (mean + 3.0) / 2  # another rank's is 3

    logp = torch.tensor([-1.0, -3.0], dtype=F64)
    assert kto_kl(logp, all_reduce=all_reduce) == 0.5 and seen == [-2.0]


def test_reference_points_refused() -> None:
    with pytest.raises(ValueError, match="logp has no rows; the mean of at least one mismatched response is expected"):
        kto_kl(torch.zeros(0))
    with pytest.raises(ValueError, match=r"ref_logp has shape \[3\]; \[2\] is expected"):
        kto_kl(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"logp - ref_logp\[1\] is nan; a finite number is expected"):
        kto_kl(torch.zeros(2), torch.tensor([0.0, math.nan]))


# ---- pairs


def test_recipe() -> None:
    desirable = torch.tensor([True] * 3 + [False] * 3)

    def expected(kl):
        return lambda logp, ref: kto_loss(torch.cat(sums(logp - ref)), None, desirable, kl=kl, undesirable_weight=1.2).loss

    recipe = load_pair_recipe("kto:undesirable_weight=1.2")
    assert assert_layouts_agree(recipe, expected(0.0)).metrics["kl"] == 0
    out = assert_layouts_agree(recipe, expected(0.7), per_pair={"kl": torch.tensor(0.7, dtype=F64)})
    close(out.metrics["kl"], 0.7)
    assert out.metrics["pairs"] == 3


def test_refusals_and_nan() -> None:
    with pytest.raises((ValueError, TypeError), match="desirable"):
        kto_loss(X, None, torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises((ValueError, TypeError), match="desirable"):
        kto_loss(X, None, torch.tensor([True]))
    with pytest.raises(ValueError, match="desirable_weight"):
        kto_loss(X, None, DESIRABLE, desirable_weight=-1.0)
    broken = torch.tensor([1.0, math.nan, 2.0], dtype=F64)
    assert kto_loss(broken, None, DESIRABLE).loss.isnan()
    masked = kto_loss(broken, None, DESIRABLE, mask=torch.tensor([True, False, True]), kl=0.4)
    close(masked.loss, run(kl=0.4)[0][[0, 2]].mean())
