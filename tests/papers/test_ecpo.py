"""ECPO's loss: worked numbers, weights, what has no gradient. Its selection is tested with the data package."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.data import ecpo_satisfaction, ecpo_select
from prefkern.papers import ecpo

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


LOGPS = [vector(-30, -12, -18), vector(-28, -14, -18.5), vector(-31, -13, -18), vector(-28.5, -13, -18)]


def run(*logps, **options):
    logps = [logp.clone().requires_grad_() for logp in logps]
    loss, metrics = ecpo.turn_dpo_loss(*logps, **options)
    return loss.detach(), metrics, *torch.autograd.grad(loss, logps, allow_unused=True)


@pytest.mark.parametrize(
    ("weight", "loss", "gradient"),
    [
        (None, 0.6450193885, [-0.01625008678, -0.01500553342, -0.01625008678]),
        ([1, 0, 2], 0.668459648, [-0.01625008678, 0, -0.03250017357]),
    ],
)
def test_worked_loss(weight, loss, gradient) -> None:
    turn_weight = None if weight is None else vector(*weight)
    found, _, chosen, rejected, *references = run(*LOGPS, turn_weight=turn_weight)
    assert_close(found, vector(loss)[0], rtol=0, atol=1e-9)
    assert_close(chosen, vector(*gradient), rtol=0, atol=1e-11)
    assert rejected.equal(-chosen) and references == [None, None]


@given(st.floats(1e-3, 1e3), st.permutations(range(3)))
def test_only_relative_weights_matter_and_turns_are_independent(scale, order) -> None:
    weight = vector(1, 0.5, 2)
    loss, _, chosen, *_ = run(*LOGPS, turn_weight=weight)
    scaled, _, scaled_chosen, *_ = run(*LOGPS, turn_weight=weight * scale)
    assert_close(scaled, loss, rtol=1e-12, atol=0)
    assert_close(scaled_chosen, chosen, rtol=1e-12, atol=0)
    moved, _, moved_chosen, *_ = run(*(logp[list(order)] for logp in LOGPS), turn_weight=weight[list(order)])
    assert_close(moved, loss, rtol=1e-12, atol=0)
    assert_close(moved_chosen, chosen[list(order)], rtol=1e-12, atol=0)
    assert_close(run(*LOGPS, turn_weight=torch.full((3,), scale, dtype=F64))[0], run(*LOGPS)[0], rtol=1e-12, atol=0)


def test_at_the_reference_it_is_log_two() -> None:
    assert_close(run(*LOGPS[2:], *LOGPS[2:])[0], vector(math.log(2))[0], rtol=0, atol=1e-15)


def test_history_has_no_gradient() -> None:
    logp = -torch.rand(2, 6, dtype=F64).requires_grad_()
    action = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    chosen, rejected = prefkern.sequence_sum(logp, action).chunk(2)
    zero = torch.zeros(1, dtype=F64)
    (gradient,) = torch.autograd.grad(ecpo.turn_dpo_loss(chosen, rejected, zero, zero).loss, logp)
    assert not gradient[~action].any() and gradient[action].all()


def test_without_turns() -> None:
    with pytest.warns(UserWarning, match="no turn counts: the loss is 0"):
        assert run(*(logp[:0] for logp in LOGPS))[0] == 0
    with pytest.warns(UserWarning, match="no turn counts: the loss is 0"):
        loss, _, chosen, *_ = run(*LOGPS, turn_weight=torch.zeros(3, dtype=F64))
    assert loss == 0 and not chosen.any()


@pytest.mark.parametrize("place", range(4))
def test_nan_is_refused(place) -> None:
    logps = [logp.clone() for logp in LOGPS]
    logps[place][1] = math.nan
    names = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    with pytest.raises(ValueError, match=rf"^{names[place]}\[1\] is nan; a log-prob is expected"):
        ecpo.turn_dpo_loss(*logps)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"turn_weight has shape \[2\]; \[3\] is expected"):
        ecpo.turn_dpo_loss(*LOGPS, turn_weight=vector(1, 2))
    with pytest.raises(ValueError, match="weight"):
        ecpo.turn_dpo_loss(*LOGPS, turn_weight=vector(1, -2, 1))


def test_the_parts_are_those_of_the_data_package() -> None:
    assert ecpo.ecpo_select is ecpo_select and ecpo.ecpo_satisfaction is ecpo_satisfaction
