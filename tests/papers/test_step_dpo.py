"""Step-DPO against its worked numbers, DPO, every way to give a span, and its edge cases; first_error_step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import preference_loss
from prefkern.data import first_error_step
from prefkern.papers import step_dpo

F64, NAN = torch.float64, math.nan


def rows(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10):
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


PAIRS = {
    "chosen_logp": rows([-1, -2, -0.5, -0.3, 0], [-0.2, -0.4, -1, -1.5, -0.7]),
    "ref_chosen_logp": rows([-1, -1, -0.8, -0.5, 0], [-0.3, -0.4, -1.2, -1.1, -0.9]),
    "rejected_logp": rows([-1, -2, -2.5, -1], [-0.2, -0.4, -3, -0.1]),
    "ref_rejected_logp": rows([-1, -2, -1.5, -1.2], [-0.2, -0.4, -2, -0.4]),
}
SPANS = {
    "chosen_starts": torch.tensor([2, 2]), "chosen_ends": torch.tensor([4, 5]), "rejected_starts": torch.tensor([2, 2]),
    "rejected_ends": torch.tensor([4, 4]),
}  # fmt: skip
MASKS = {
    "chosen_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool(),
    "rejected_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]).bool(),
}
LOSS = 0.4767187456
CHOSEN = [[0, 0, -0.08574738433, -0.08574738433, 0], [0, 0, -0.1033456053, -0.1033456053, -0.1033456053]]
REJECTED = [[0, 0, 0.08574738433, 0.08574738433], [0, 0, 0.1033456053, 0.1033456053]]


def run(inputs=PAIRS, **changes):
    """Loss, metrics, gradients of both sides."""
    inputs = {**inputs, **changes}
    leaves = [inputs[name].clone().requires_grad_() for name in ("chosen_logp", "rejected_logp")]
    inputs |= dict(zip(("chosen_logp", "rejected_logp"), leaves, strict=True))
    loss, metrics = step_dpo.step_dpo_loss(**inputs)
    return loss.detach(), metrics, *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("span", ["spans", "masks", "both", "steps alone", "packed"])
def test_worked(span) -> None:
    if span == "packed":
        mask = MASKS["chosen_mask"]
        inputs = {name: t[mask] if t.shape[1] == 5 else t.reshape(-1) for name, t in PAIRS.items()}
        inputs |= {"rejected_mask": MASKS["rejected_mask"].view(-1), "chosen_cu_seqlens": torch.tensor([0, 2, 5]).int()}
        inputs["rejected_cu_seqlens"] = torch.tensor([0, 4, 8]).int()
        loss, metrics, chosen, rejected = run(inputs)
        close(chosen, torch.tensor(CHOSEN, dtype=F64)[mask])
        close(rejected.view(2, 4), REJECTED)
    elif span == "steps alone":
        loss, metrics, chosen, rejected = run(
            {name: t[:, 2:] for name, t in PAIRS.items()}, chosen_mask=MASKS["chosen_mask"][:, 2:]
        )
        close(chosen, [r[2:] for r in CHOSEN])
        close(rejected, [r[2:] for r in REJECTED])
    else:
        spans = {"spans": SPANS, "masks": MASKS, "both": {**SPANS, **MASKS}}[span]
        loss, metrics, chosen, rejected = run(**spans)
        close(chosen, CHOSEN)
        close(rejected, REJECTED)
        assert chosen[0, 4] == 0 and not chosen[:, :2].any()
    close(loss, LOSS)
    close(metrics["reward_margin"], (0.65 + 0.35) / 2)


def test_margins() -> None:
    each = run(**SPANS, reduction="none")[0]
    close(each, [math.log1p(math.exp(-0.65)), math.log1p(math.exp(-0.35))])


@pytest.mark.parametrize("spans", [SPANS, MASKS], ids=["spans", "masks"])
def test_nan_outside_the_step_changes_nothing(spans) -> None:
    inputs = {name: t.clone() for name, t in PAIRS.items()}
    for t in inputs.values():
        t[:, :2] = NAN
    inputs["chosen_logp"][0, 4] = math.inf
    loss, _, chosen, rejected = run(inputs, **spans)
    close(loss, LOSS)
    close(chosen, CHOSEN)
    close(rejected, REJECTED)


@given(st.integers(0, 2**31), st.floats(0.05, 2))
def test_properties(seed, beta) -> None:
    torch.manual_seed(seed)
    tokens = {name: -torch.rand(3, 7, dtype=F64) * 4 for name in PAIRS}
    starts, ends = torch.randint(0, 4, (3,)), torch.randint(5, 8, (3,))
    spans = {"chosen_starts": starts, "chosen_ends": ends}
    _, metrics, chosen, rejected = run(tokens, beta=beta, **spans)
    other = {
        "chosen_logp": tokens["rejected_logp"], "rejected_logp": tokens["chosen_logp"],
        "ref_chosen_logp": tokens["ref_rejected_logp"], "ref_rejected_logp": tokens["ref_chosen_logp"],
    }  # fmt: skip
    swapped = run(other, beta=beta, rejected_starts=starts, rejected_ends=ends)[1]
    close(swapped["reward_margin"], -metrics["reward_margin"], 1e-12)
    place = torch.arange(7)
    outside = (place < starts[:, None]) | (place >= ends[:, None])
    assert not chosen[outside].any() and rejected.all()
    assert not outside.all() and (chosen[~outside] < 0).all()
    at_reference = {**tokens, "chosen_logp": tokens["ref_chosen_logp"], "rejected_logp": tokens["ref_rejected_logp"]}
    close(run(at_reference, beta=beta, **spans)[0], math.log(2), 1e-12)
    whole, _ = preference_loss(
        *(tokens[name].sum(1) for name in ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")), beta=beta
    )
    close(run(tokens, beta=beta)[0], whole, 1e-12)


def test_extreme_margins_are_finite() -> None:
    huge = {name: torch.full((1, 3), -1e4 if name == "chosen_logp" else -0.1, dtype=F64) for name in PAIRS}
    loss, _, chosen, _ = run(huge)
    close(loss, 0.5 * 3 * (1e4 - 0.1), 1e-6)
    close(chosen, [[-0.5] * 3])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"chosen lengths\[1\] is 0.*every step needs a token"):
        run(**{**SPANS, "chosen_starts": torch.tensor([2, 5])})
    with pytest.raises(ValueError, match=r"rejected lengths\[0\] is 0"):
        run(rejected_mask=torch.zeros(2, 4).bool())
    with pytest.raises(ValueError, match=r"ends\[1\] is 6; it must lie in \[0, 5\]"):
        run(**{**SPANS, "chosen_ends": torch.tensor([4, 6])})
    with pytest.raises(ValueError, match=r"mask has shape \[2, 4\]; values has shape \[2, 5\]"):
        run(chosen_mask=MASKS["rejected_mask"])
    with pytest.raises(ValueError, match="reduction is 'max'"):
        run(reduction="max")
    assert run(**SPANS, beta=0.4)[0] != run(**SPANS)[0]


def test_the_first_error() -> None:
    assert first_error_step([True, True, False, True]) == 2
    assert first_error_step([True, True]) is None
    assert first_error_step([False]) == 0
    assert first_error_step([]) is None
    assert first_error_step(torch.tensor([True, False, False])) == 1
    with pytest.raises(TypeError, match=r"step_ok\[1\] is 0; a bool"):
        first_error_step([True, 0])
    with pytest.raises(TypeError, match=r"step_ok\[0\] is 0\.9; a bool"):
        first_error_step([0.9])


@given(st.lists(st.booleans(), max_size=12))
def test_every_step_in_front_of_the_first_error_is_right(flags) -> None:
    k = first_error_step(flags)
    assert all(flags[:k]) and (k is None or flags[k] is False)
