"""BCO against worked numbers, its running shift, density weights and edge cases."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe
from prefkern.papers.bco import START_COUNT, RewardShift, bco_loss, bco_pair_loss

F64 = torch.float64
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = torch.tensor([[-10, -8], [-12, -7], [-11, -7.5], [-11.5, -8]], dtype=F64)
REFS = (REF_CHOSEN, REF_REJECTED)
X_W, X_L = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(chosen=CHOSEN, rejected=REJECTED, refs=REFS, **options):
    x, y = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    out = bco_pair_loss(x, y, *refs, **options)
    return out.loss.detach(), out.metrics, *torch.autograd.grad(out.loss.sum(), (x, y))


@pytest.mark.parametrize("delta", [0.07, torch.tensor(0.07, dtype=F64), torch.full((2,), 0.07, dtype=F64)])
@pytest.mark.parametrize("rejected_weight", [None, torch.ones(2, dtype=F64)])
def test_worked_numbers(delta, rejected_weight) -> None:
    options = {"delta": delta, "rejected_weight": rejected_weight}
    loss, metrics, chosen, rejected = run(reduction="none", **options)
    close(loss, [1.3132057779, 1.4632057779])
    close(chosen, [-0.0492500562, -0.0529964052])
    close(rejected, 0.1 * torch.sigmoid(0.1 * X_L - 0.07))
    for name, value in {
        "chosen_reward": 0.025,
        "rejected_reward": 0.025,
        "reward_margin": 0,
        "accuracy": 0.5,
        "pairs": 2,
    }.items():
        close(metrics[name], value)
    mean, _, half, _ = run(**options)
    close(mean, (1.3132057779 + 1.4632057779) / 2)
    close(half, chosen / 2, atol=1e-16)
    close(run(reduction="sum", **options)[0], 1.3132057779 + 1.4632057779, atol=2e-10)


@pytest.mark.parametrize("refs", [REFS, (), (REF_CHOSEN, None), (None, REF_REJECTED)])
def test_density_weights_are_the_rejected_sides(refs) -> None:
    weight = torch.tensor([3.0, 0.5], dtype=F64)
    x_w, x_l = (
        x if ref is None else x - ref for x, ref in zip((CHOSEN, REJECTED), refs or (None, None), strict=True)
    )  # fmt: skip
    delta = torch.tensor([0.2, -0.1], dtype=F64)
    for options in ({"delta": delta}, {"delta": 0.2}):
        shift = options["delta"]
        expected = F.softplus(shift - 0.1 * x_w) + weight * F.softplus(0.1 * x_l - shift)
        loss, metrics, chosen, rejected = run(refs=refs, rejected_weight=weight, reduction="none", **options)
        close(loss, expected, atol=1e-15)
        close(chosen, -0.1 * torch.sigmoid(shift - 0.1 * x_w), atol=1e-16)
        close(rejected, 0.1 * weight * torch.sigmoid(0.1 * x_l - shift), atol=1e-16)
        close(run(refs=refs, rejected_weight=weight, **options)[0], expected.mean(), atol=1e-15)
        plain = run(refs=refs, **options)[1]
        assert set(metrics) == set(plain)
        for name, value in plain.items():
            close(metrics[name], value, atol=1e-15)


def test_weights_and_shifts_are_constants() -> None:
    x = CHOSEN.clone().requires_grad_()
    weight, delta, *refs = (torch.rand(2, dtype=F64).requires_grad_() for _ in range(4))
    out = bco_pair_loss(x, REJECTED, *refs, delta=delta, rejected_weight=weight)
    assert torch.autograd.grad(out.loss, (weight, delta, *refs), allow_unused=True) == (None,) * 4


def test_single_responses_are_half_of_pairs() -> None:
    logp = torch.cat([CHOSEN, REJECTED]).requires_grad_()
    desirable = torch.tensor([True, True, False, False])
    out = bco_loss(logp, torch.cat(REFS), desirable, delta=0.07)
    close(out.loss.detach(), (1.3132057779 + 1.4632057779) / 4)
    close(torch.autograd.grad(out.loss, logp)[0][:2], torch.tensor([-0.0492500562, -0.0529964052], dtype=F64) / 4)
    each = bco_loss(logp[:3], None, desirable[:3], beta=1.0, delta=0.5, weight=torch.tensor([1, 1, 2.0]), reduction="none")
    x = logp.detach()
    close(each.loss.detach(), torch.stack([F.softplus(0.5 - x[0]), F.softplus(0.5 - x[1]), 2 * F.softplus(x[2] - 0.5)]))
    mean = bco_loss(logp[:3], None, desirable[:3], beta=1.0, delta=0.5, weight=torch.tensor([1, 1, 2.0])).loss
    close(mean.detach(), each.loss.detach().sum() / 3, atol=1e-14)  # over responses, not over weights


# ---- the shift


def test_the_shift_is_the_mean_of_all_that_was_seen() -> None:
    shift = RewardShift()
    assert shift.mean == 0 and shift.count == START_COUNT == 1e-24
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([-2.0]), torch.tensor([0.5, 0.5, 6.0])]
    seen = torch.zeros(0)
    for batch in batches:
        seen = torch.cat([seen, batch])
        delta = shift.update(batch)
        assert_close(delta, seen.mean())  # this batch is in it already
        assert delta.dtype == torch.float32 and delta.dim() == 0
    assert shift.count == 6 and shift.mean == 1.5


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), min_size=1, max_size=6))
def test_however_batches_are_cut(batches) -> None:
    one, many = RewardShift(), RewardShift()
    for batch in batches:
        delta = many.update(torch.tensor(batch, dtype=F64))
    together = one.update(torch.tensor([r for batch in batches for r in batch], dtype=F64))
    close(delta, together, atol=1e-10)
    close(many.count, one.count, atol=1e-12)


def test_an_empty_batch_changes_nothing() -> None:
    shift = RewardShift()
    assert shift.update(torch.zeros(0)) == 0
    shift.update(torch.tensor([2.0]))
    assert shift.update(torch.zeros(0)) == 2 and shift.count == 1


def test_the_shift_has_no_gradient_and_low_precision_is_widened() -> None:
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not RewardShift().update(rewards).requires_grad
    assert RewardShift().update(rewards.bfloat16()).dtype == torch.float32
    assert RewardShift().update(rewards.double()).dtype == F64


def test_ranks_have_one_shift() -> None:
    """What another rank has: 3 rewards that sum to 9."""
    asked = []

    def all_reduce(totals):
        asked.append(totals.clone())
        return totals + torch.tensor([9.0, 3.0], dtype=F64)

    shift = RewardShift(all_reduce)
    assert shift.update(torch.tensor([1.0, 2.0])) == 12 / 5
    assert asked[0].tolist() == [3, 2] and asked[0].dtype == F64 and shift.count == 5


def test_its_state_goes_on() -> None:
    shift = RewardShift()
    shift.update(torch.tensor([1.0, 2.0, 6.0]))
    state = shift.state_dict()
    other = RewardShift()
    other.load_state_dict(state)
    assert other.update(torch.tensor([7.0])) == 4 and shift.mean == 3 and state["mean"] == 3 and state["count"] == 3
    other.load_state_dict({"mean": 1.5, "count": 2})  # from JSON
    assert other.update(torch.tensor([3.0])) == 2
    with pytest.raises(ValueError, match=re.escape("state has keys ['mean', 'std']; accepted: 'count', 'mean'")):
        other.load_state_dict({"mean": torch.tensor(0.0), "std": torch.tensor(1.0)})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_none(bad, monkeypatch) -> None:
    shift = RewardShift()
    shift.update(torch.tensor([1.0]))
    with pytest.raises(ValueError, match=rf"rewards\[1\] is {bad}; a finite number is expected"):
        shift.update(torch.tensor([1.0, bad]))
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)  # as on CUDA
    assert not shift.update(torch.tensor([1.0, bad])).isfinite()
    assert shift.mean == 1 and shift.count == 1
    assert shift.update(torch.tensor([3.0])) == 2


def test_a_step_of_the_trainer() -> None:
    """Shift of both sides' rewards, then the loss around it."""
    shift = RewardShift()
    delta = shift.update(0.1 * torch.cat([X_W, X_L]))
    close(delta, 0.025, atol=1e-15)
    close(run(delta=delta)[0], run(delta=0.025)[0], atol=1e-15)


# ---- recipe and refusals


def test_the_recipe_takes_shift_and_weights_from_the_pairs() -> None:
    logp, ref = (torch.cat(t)[:, None].expand(4, 2) / 2 for t in ((CHOSEN, REJECTED), REFS))
    recipe = load_pair_recipe("bco:delta=0.07")
    close(recipe.loss(Pairs(logp, None, ref)).loss, (1.3132057779 + 1.4632057779) / 2)
    extra = {"delta": torch.tensor(0.2), "density_weight": torch.tensor([2.0, 3.0])}
    expected = run(delta=0.2, rejected_weight=torch.tensor([2.0, 3.0]))
    close(recipe.loss(Pairs(logp, None, ref, extra=extra)).loss, expected[0], atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "weighted_mean"}, "reduction is 'weighted_mean'; accepted: 'mean', 'sum', 'none'"),
        ({"delta": math.nan}, "offset is nan; it must be finite"),
        ({"beta": -1.0}, "beta is -1; it must be finite and positive"),
        ({"rejected_weight": torch.ones(1)}, r"rejected_weight has shape \[1\]; chosen_logp has shape \[2\]"),
        ({"rejected": REJECTED[:1], "rejected_weight": torch.ones(2)}, r"rejected_logp has shape \[1\]; chosen_logp has"),
        ({"rejected_weight": torch.tensor([1.0, -1.0])}, r"weight\[3\] is -1; it must be finite and not negative"),
    ],
)
def test_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"rejected_weight is a float; a torch\.Tensor is expected"):
        run(rejected_weight=1.0)
    with pytest.raises(TypeError, match=r"rewards is a float; a torch\.Tensor is expected"):
        RewardShift().update(1.0)
