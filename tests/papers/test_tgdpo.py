"""TGDPO against its worked numbers, its definition, DPO, and its edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import preference_loss, sequence_sum
from prefkern.papers import tgdpo

F64, NAN, INF = torch.float64, math.nan, math.inf


def row(*values):
    return torch.tensor([values], dtype=F64)


def close(actual, expected, atol=1e-10):
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


PAIR = {
    "chosen_logp": row(-1, -0.5, -2), "ref_chosen_logp": row(-1.2, -0.9, -1.5), "guide_chosen_logp": row(-0.7, -1.4, -1.5),
    "rejected_logp": row(-0.8, -1.1), "ref_rejected_logp": row(-0.6, -1), "guide_rejected_logp": row(-1.6, -0.5),
}  # fmt: skip


def run(inputs=PAIR, **changes):
    """Loss, metrics, gradients of both sides."""
    inputs = {**inputs, **changes}
    leaves = [inputs[name].clone().requires_grad_() for name in ("chosen_logp", "rejected_logp")]
    inputs |= dict(zip(("chosen_logp", "rejected_logp"), leaves, strict=True))
    loss, metrics = tgdpo.tgdpo_loss(**inputs)
    return loss.detach(), metrics, *torch.autograd.grad(loss.sum(), leaves)


def factors(**options):
    return [
        tgdpo.tgdpo_factors(PAIR[f"guide_{side}_logp"], PAIR[f"ref_{side}_logp"], chosen=side == "chosen", **options)
        for side in ("chosen", "rejected")
    ]


def test_the_defaults() -> None:
    close(factors()[0], [[1.025, 0.975, 1.0]])
    close(factors()[1], [[1.05, 0.975]])
    loss, metrics, chosen, rejected = run()
    close(metrics["reward_margin"], 0.04025)
    close(loss, 0.6732246747)
    close(chosen, [[-0.0502187330, -0.0477690387, -0.0489938858]])
    close(rejected, [[0.0514435801, 0.0477690387]])
    assert metrics["negative_factors"] == 0 and metrics["pairs"] == 1


def test_a_factor_that_turns_negative_flips_its_token() -> None:
    close(factors(alpha=3, guide_beta=1.0)[0], [[2.5, -0.5, 1]])
    close(factors(alpha=3, guide_beta=1.0)[1], [[4, -0.5]])
    loss, metrics, chosen, _ = run(beta=1.0, alpha=3.0)
    close(metrics["reward_margin"], 0.55)
    close(loss, 0.4554924815)
    close(chosen, [[-0.9146610225, 0.1829322045, -0.3658644090]])
    close(metrics["negative_factors"], 2 / 5)


def test_a_floor_under_the_factors() -> None:
    floored = factors(alpha=3, guide_beta=1.0, min_factor=0)
    close(floored[0], [[2.5, 0, 1]])
    close(floored[1], [[4, 0]])
    loss, metrics, chosen, rejected = run(beta=1.0, alpha=3.0, min_factor=0.0)
    close(loss, 0.3711006659)
    assert chosen[0, 1] == 0 and rejected[0, 1] == 0
    close(metrics["negative_factors"], 2 / 5)  # as they were before it


def test_the_guide_has_a_beta_of_its_own() -> None:
    assert_close(run(beta=1.0, alpha=3.0)[0], run(beta=1.0, alpha=0.3, guide_beta=10.0)[0])
    assert_close(factors(guide_beta=0.2), factors(alpha=1.0))


@pytest.mark.parametrize("same", ["alpha", "guide"])
def test_without_guidance_it_is_dpo(same) -> None:
    changes = {"alpha": 0.0} if same == "alpha" else {f"guide_{s}_logp": PAIR[f"ref_{s}_logp"] for s in ("chosen", "rejected")}
    loss, metrics, *_ = run(**changes)
    expected, dpo = preference_loss(
        *(PAIR[f"{s}_logp"].sum(1) for s in ("chosen", "rejected")),
        *(PAIR[f"ref_{s}_logp"].sum(1) for s in ("chosen", "rejected")),
    )
    close(loss, expected)
    close(metrics["chosen_reward"], dpo["chosen_reward"])


def batch(seed, pairs=4, length=9):
    torch.manual_seed(seed)
    names = [f"{kind}{side}_logp" for kind in ("", "ref_", "guide_") for side in ("chosen", "rejected")]
    inputs = {name: -torch.rand(pairs, length, dtype=F64) * 5 for name in names}
    for side in ("chosen", "rejected"):
        inputs[f"{side}_mask"] = torch.rand(pairs, length) < 0.7
        inputs[f"{side}_mask"][:, 2] = True
    return inputs


@given(st.integers(0, 2**31), st.floats(0, 4), st.floats(0.01, 2))
def test_against_the_equations(seed, alpha, beta) -> None:
    inputs = batch(seed)
    loss, _, chosen, rejected = run(inputs, alpha=alpha, beta=beta)
    leaves, z = {}, 0
    for side, sign in (("chosen", 1), ("rejected", -1)):
        leaves[side] = inputs[f"{side}_logp"].clone().requires_grad_()
        ref = inputs[f"ref_{side}_logp"]
        f = 1 + sign * alpha * beta * (inputs[f"guide_{side}_logp"] - ref)
        z = z + sign * beta * (f * (leaves[side] - ref) * inputs[f"{side}_mask"]).sum(1)
    expected = F.softplus(-z).mean()
    gradients = torch.autograd.grad(expected, list(leaves.values()))
    close(loss, expected.detach(), 1e-9)
    close(chosen, gradients[0], 1e-9)
    close(rejected, gradients[1], 1e-9)
    # sum_t of the gradient: -(beta / P) sigmoid(-z) (|y| + alpha sum of rewards)
    reward = beta * (inputs["guide_chosen_logp"] - inputs["ref_chosen_logp"])
    lengths = sequence_sum(torch.ones_like(reward), inputs["chosen_mask"])
    total = lengths + alpha * sequence_sum(reward, inputs["chosen_mask"])
    close(chosen.sum(1), -beta / 4 * torch.sigmoid(-z.detach()) * total, 1e-9)


def test_padding_and_packing_change_nothing() -> None:
    inputs = batch(0)
    plain = run(inputs)
    poisoned = {
        name: t
        if name.endswith("mask")
        else t.masked_fill(~inputs[f"{'chosen' if 'chosen' in name else 'rejected'}_mask"], -INF)
        for name, t in inputs.items()
    }
    for a, b in zip(plain[2:], run(poisoned)[2:], strict=True):
        assert torch.equal(a, b)
    packed = {}
    for side in ("chosen", "rejected"):
        mask = inputs[f"{side}_mask"]
        packed[f"{side}_cu_seqlens"] = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
        for kind in ("", "ref_", "guide_"):
            packed[f"{kind}{side}_logp"] = inputs[f"{kind}{side}_logp"][mask]
    out = run(packed)
    close(out[0], plain[0], 1e-12)
    close(out[2], plain[2][inputs["chosen_mask"]], 1e-12)


def test_guide_and_reference_are_constants() -> None:
    inputs = {name: t.clone().requires_grad_() for name, t in PAIR.items()}
    tgdpo.tgdpo_loss(**inputs).loss.backward()
    assert {name for name, t in inputs.items() if t.grad is not None} == {"chosen_logp", "rejected_logp"}


def test_reductions() -> None:
    inputs = batch(1)
    each = run(inputs, reduction="none")[0]
    assert each.shape == (4,)
    close(run(inputs, reduction="sum")[0], each.sum(), 1e-12)
    close(run(inputs)[0], each.mean(), 1e-12)


def test_empty_responses_and_infinities() -> None:
    mask = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rejected lengths\[0\] is 0.*allow_empty"):
        run(rejected_mask=mask)
    loss, metrics, _, rejected = run(rejected_mask=mask, allow_empty=True)
    assert metrics["rejected_reward"] == 0 and not rejected.any()
    close(loss, F.softplus(-metrics["chosen_reward"]))
    for name in ("guide_chosen_logp", "ref_chosen_logp"):
        with pytest.raises(ValueError, match=r"guide_logp - ref_logp at token \[0, 1\] is -?inf; a finite number"):
            run(**{name: row(-1, -INF, -1)})
    with pytest.raises(ValueError, match=r"guide_logp has shape \[1, 2\]; ref_logp has shape \[1, 3\]"):
        run(guide_chosen_logp=row(-1, -2))
    with pytest.raises(TypeError, match="alpha is 'large'"):
        run(alpha="large")
    with pytest.raises(ValueError, match="reduction is 'max'"):
        run(reduction="max")


def test_one_token() -> None:
    inputs = {name: t[:, :1] for name, t in PAIR.items()}
    z = 0.1 * (1.025 * 0.2 - 1.05 * -0.2)
    close(run(inputs)[0], math.log1p(math.exp(-z)))
