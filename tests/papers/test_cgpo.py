"""CGPO against its worked numbers, its invariants and its edge cases."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import LossOutput
from prefkern.papers import Rollout, cgpo, load_recipe, take_rows

F64 = torch.float64


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def close(actual, expected, atol=1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def gradient_of(loss: LossOutput, logp: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.loss, logp)[0]


# ---- rewards and CRPG

LOGP, REF, R, OK = vector(-20, -22, -19, -25), vector(-21, -21, -20, -24), vector(1, 0, 2, -1), flags(1, 1, 0, 1)
R_TILDE = vector(0.4668444984, 0.4719258360, 0, 0.2280319048)


def test_worked_rewards_and_crpg() -> None:
    base = torch.full((4,), 0.5, dtype=F64)
    rewards = cgpo.cgpo_rewards(R, base, OK, LOGP, REF, 4.0)
    close(rewards, R_TILDE)
    close(torch.sigmoid(R - base), [0.6224593312, 0.3775406688, 0.8175744762, 0.1824255238])
    close(rewards[[1, 3]] / torch.sigmoid(R - base)[[1, 3]], [1.25, 1.25])  # the factor may exceed 1
    weights = vector(0.1751439386, 0.1802252762, -0.2917005598, -0.0636686550)
    logp = LOGP.clone().requires_grad_()
    output = cgpo.crpg_loss(logp, rewards)
    close(output.loss.detach(), 0.0834519593)
    close(gradient_of(output, logp), -weights / 4)
    close(weights.sum(), 0.0)
    close(output.metrics["reward_mean"], rewards.mean())
    close(output.metrics["rewarded"], 0.75)


def test_crpg_over_tokens() -> None:
    lengths = torch.tensor([10, 20, 5, 5])
    logp = LOGP.clone().requires_grad_()
    output = cgpo.crpg_loss(logp, R_TILDE, norm="token", lengths=lengths)
    close(output.loss.detach(), 0.0834519593 * 4 / 40)
    close(gradient_of(output, logp), -(R_TILDE - R_TILDE.mean()) / 40)


@given(rows=st.integers(1, 9))
def test_crpg_weights_cancel(rows) -> None:
    logp = -torch.rand(rows, dtype=F64).requires_grad_()
    total = gradient_of(cgpo.crpg_loss(logp, torch.rand(rows, dtype=F64)), logp).sum()
    close(total, 0.0, atol=1e-15)


def test_all_violate() -> None:
    rewards = cgpo.cgpo_rewards(R, R, torch.zeros(4), LOGP, REF, 4.0)
    logp = LOGP.clone().requires_grad_()
    output = cgpo.crpg_loss(logp, rewards)
    assert output.loss == 0 and not gradient_of(output, logp).any()
    group, lengths = torch.tensor([0, 0, 1, 1]), torch.ones(4)
    for output in (
        cgpo.codpo_loss(logp, REF, R, torch.zeros(4), group, lengths),
        cgpo.crraft_loss(logp, LOGP, REF, R, R, torch.zeros(4), group, kl_max=1.0),
    ):
        assert output.loss == 0 and not gradient_of(output, logp).any()


def test_rewards_are_shifted_with_their_baseline() -> None:
    base, shift = torch.randn(4, dtype=F64), torch.tensor([0, 0, 3.0, 3.0], dtype=F64)
    close(cgpo.cgpo_rewards(R + shift, base + shift, OK, LOGP, REF, 4.0), cgpo.cgpo_rewards(R, base, OK, LOGP, REF, 4.0))


def test_the_factor_of_the_kl() -> None:
    old = vector(-20, -20, -30, -20)
    ref = vector(-25, -23, -20, -20)  # log-ratios 5, 3, -10, 0
    half = torch.zeros(4, dtype=F64)
    close(cgpo.cgpo_rewards(half, half, None, old, ref, 4.0), vector(0, 0.25, 3.5, 1) / 2)
    close(cgpo.cgpo_rewards(half, half, None, old, ref, 4.0, kl_factor_max=1.0), vector(0, 0.25, 1, 1) / 2)


def test_every_judge_must_be_satisfied() -> None:
    judges = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1]])
    half = torch.zeros(4, dtype=F64)
    for verdicts in (judges, judges.bool(), judges.float(), judges[:, :1] * judges[:, 1:]):
        close(cgpo.cgpo_rewards(half, half, verdicts, half, half, 1.0), [0.5, 0, 0, 0])


# ---- CODPO

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
LP, RP = vector(-20, -22, -19, -18, -17, -16), vector(-21, -21, -20, -18, -18, -18)
LENGTHS = torch.tensor([10, 12, 9, 8, 8, 8])
REWARDS, PASSED = vector(-1, -0.5, -2, 0.3, 0.9, 0.1), flags(1, 1, 0, 0, 0, 0)


def codpo(rewards=REWARDS, passed=PASSED, group=GROUP, **options):
    logp = LP.clone().requires_grad_()
    output = cgpo.codpo_loss(logp, RP, rewards, passed, group, LENGTHS, **options)
    return output.loss.detach(), output.metrics, gradient_of(output, logp)


def test_worked_codpo() -> None:
    loss, metrics, gradient = codpo()
    close(loss, 9.9648055360)
    close(gradient, [0, -0.4716500664, 0.0549833997, 0, 0, 0])
    assert metrics["prompts"] == 1
    close(metrics["margin"], -2.0)
    chosen, rejected = cgpo.constrained_select(REWARDS, PASSED, GROUP)
    assert chosen.tolist() == [False, True, False, False, False, False]
    assert rejected.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("rewards", "passed", "chosen", "rejected"),
    [
        ([1, 3, 2], [1, 1, 1], 1, 0),  # all ok: the worst
        ([1, 3, 2], [0, 0, 0], None, None),  # none ok
        ([-1, -3, -2], [0, 1, 1], 2, 0),  # a violator never wins, whatever the sign
        ([3, 1, 2], [0, 1, 0], 1, 2),  # the worst of the violators
        ([0, 0, 0], [1, 1, 0], 0, 2),  # ties go to the first
        ([5, 5, 5], [1, 1, 1], None, None),  # the same row both times
        ([2, 1, 1], [1, 1, 1], 0, 1),
        ([0, -1, -1], [1, 0, 0], 0, 1),  # a reward of 0 is a reward
    ],
)
def test_who_is_chosen(rewards, passed, chosen, rejected) -> None:
    r, ok, group = vector(*rewards, 9), flags(*passed, 1), torch.tensor([4, 4, 4, -1])  # the last is alone, and skipped
    pairs = cgpo.constrained_select(r, ok, group)
    assert pairs.chosen.nonzero()[:, 0].tolist() == ([] if chosen is None else [chosen])
    assert pairs.rejected.nonzero()[:, 0].tolist() == ([] if rejected is None else [rejected])


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.5]), st.booleans()), min_size=1, max_size=12),
)
def test_selection_is_masked_argmax_and_argmin(rows) -> None:
    group, r, ok = (torch.tensor(column) for column in zip(*rows, strict=True))
    pairs = cgpo.constrained_select(r, ok, group)
    for g in group.unique():
        at = (group == g).nonzero()[:, 0]
        best = r[at].masked_fill(~ok[at], -math.inf).argmax()
        others = torch.ones_like(ok[at]) if ok[at].all() else ~ok[at]
        worst = r[at].masked_fill(~others, math.inf).argmin()
        kept = bool(ok[at].any()) and best != worst
        expected = torch.zeros_like(ok[at])
        assert torch.equal(pairs.chosen[at], expected.index_fill(0, best, kept))
        assert torch.equal(pairs.rejected[at], expected.index_fill(0, worst, kept))


def test_codpo_of_one_pair_without_the_likelihood_is_dpo() -> None:
    logp = LP[:2].clone().requires_grad_()
    dpo = -F.logsigmoid(0.3 * ((logp[1] - RP[1]) - (logp[0] - RP[0])))
    output = cgpo.codpo_loss(logp, RP[:2], REWARDS[:2], flags(0, 1), GROUP[:2], LENGTHS[:2], beta=0.3, lam=0.0)
    close(output.loss.detach(), dpo.detach())
    close(gradient_of(output, logp), torch.autograd.grad(dpo, logp)[0])


def test_codpo_is_the_mean_over_prompts_that_have_a_pair() -> None:
    both, metrics, gradient = codpo(passed=flags(1, 1, 0, 0, 1, 1))
    alone, _, first = codpo()
    _, _, second = codpo(passed=flags(0, 0, 0, 0, 1, 1))
    other = codpo(passed=flags(0, 0, 0, 0, 1, 1))[0]
    assert metrics["prompts"] == 2
    close(both, (alone + other) / 2)
    close(gradient, (first + second) / 2)


def test_codpo_of_prompts_of_one() -> None:
    loss, metrics, gradient = codpo(passed=flags(1, 1, 1, 1, 1, 1), group=torch.arange(6))
    assert loss == 0 and metrics["prompts"] == 0 and not gradient.any()


# ---- CRRAFT

WITH_BASE = {
    "old_logp": torch.cat([LP, vector(-30, -31)]), "ref_logp": torch.cat([RP, vector(-30, -30)]),
    "rewards": torch.cat([REWARDS, vector(0, 0)]), "r_base": torch.zeros(8, dtype=F64),
    "judge_pass": torch.cat([PASSED, flags(1, 1)]), "group": torch.cat([GROUP, torch.tensor([0, 1])]),
    "is_base": flags(0, 0, 0, 0, 0, 0, 1, 1), "kl_max": 1.5,
}  # fmt: skip


def crraft(**changes):
    inputs = {**WITH_BASE, **changes}
    logp = WITH_BASE["old_logp"][: len(inputs["old_logp"])].clone().requires_grad_()
    output = cgpo.crraft_loss(logp, **inputs)
    return output.loss.detach(), output.metrics, gradient_of(output, logp)


def test_worked_crraft() -> None:
    loss, metrics, gradient = crraft()
    close(loss, 11.9029473568)
    close(gradient, [0, -0.1887703344, 0, 0, 0, 0, 0, -0.25])
    assert (metrics["prompts"], metrics["picked"], metrics["picked_base"]) == (2, 2, 1)


def test_crraft_over_the_tokens_it_picked() -> None:
    lengths = torch.cat([LENGTHS, torch.tensor([7, 4])])
    loss, _, gradient = crraft(norm="token", lengths=lengths)
    close(loss, 11.9029473568 * 2 / 16)
    close(gradient, vector(0, -0.3775406688, 0, 0, 0, 0, 0, -0.5) / 16)


def test_crraft_skips_a_prompt_whose_baseline_fails_but_counts_it() -> None:
    passed = torch.cat([PASSED, flags(1, 0)])
    loss, metrics, gradient = crraft(judge_pass=passed)
    close(gradient, [0, -0.1887703344, 0, 0, 0, 0, 0, 0])
    close(loss, 22 * 0.1887703344, atol=1e-8)
    assert (metrics["prompts"], metrics["picked"], metrics["picked_base"]) == (2, 1, 0)
    far = WITH_BASE["ref_logp"].clone()
    far[7] = -40  # the baseline is too far from the reference
    assert crraft(ref_logp=far)[1]["picked_base"] == 0
    no_base = {key: value[:6] if isinstance(value, torch.Tensor) else value for key, value in WITH_BASE.items()}
    loss, _, same = crraft(**{**no_base, "is_base": None})
    close(same, gradient[:6])


def test_crraft_leaves_out_what_is_far_from_the_reference() -> None:
    _, metrics, gradient = crraft(judge_pass=None, kl_max=0.5)  # log-ratios 1, -1, 1 | 0, 1, 2
    assert gradient.nonzero()[:, 0].tolist() == [1, 3]
    _, metrics, _ = crraft(judge_pass=None, kl_max=-5.0)  # any number is allowed
    assert metrics["picked"] == 0
    _, _, gradient = crraft(judge_pass=None, kl_max=5.0)
    assert gradient.nonzero()[:, 0].tolist() == [1, 4]
    assert bool((-gradient * 2 <= 1).all() and (gradient <= 0).all())  # weights lie in (0, 1)


def test_losses_have_the_dtype_of_the_log_probs() -> None:
    logp = torch.full((4,), -20.0)
    group, lengths = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 4, 5, 6])
    for output in (
        cgpo.crpg_loss(logp, R_TILDE),
        cgpo.codpo_loss(logp, REF, R, OK, group, lengths),
        cgpo.crraft_loss(logp, LOGP, REF, R, R, OK, group, kl_max=9.0),
    ):
        assert output.loss.dtype == torch.float32


# ---- several tasks


def test_tasks_are_summed_with_their_weights() -> None:
    x = vector(2.0).requires_grad_()
    losses = [LossOutput(x.sum() ** 2, {}), (3 * x).sum()]
    total, metrics = cgpo.cgpo_multitask(losses, [0.5, 2.0])
    close(total.detach(), 14.0)
    close(torch.autograd.grad(total, x)[0], [8.0])
    assert {name: value.item() for name, value in metrics.items()} == {"loss_0": 4.0, "loss_1": 6.0}
    with pytest.raises(ValueError, match="rho has 1 weights for 2 losses"):
        cgpo.cgpo_multitask(losses, [1.0])


# ---- what is refused

ZERO = torch.zeros(4, dtype=F64)
FOUR = torch.zeros(4, dtype=torch.int64)
NAN_R = vector(0, math.nan, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cgpo.cgpo_rewards(R, ZERO, OK, LOGP, REF, 0.0), "kl_max is 0.0; it must be positive"),
        (lambda: cgpo.cgpo_rewards(NAN_R, ZERO, OK, LOGP, REF, 1.0), r"rewards\[1\] is nan"),
        (lambda: cgpo.cgpo_rewards(R, NAN_R, OK, LOGP, REF, 1.0), r"r_base\[1\] is nan"),
        (lambda: cgpo.cgpo_rewards(R, ZERO, ZERO + 0.5, LOGP, REF, 1.0), r"judge_pass\[0\] is 0.5; accepted are bool"),
        (lambda: cgpo.cgpo_rewards(R, ZERO, NAN_R, LOGP, REF, 1.0), r"judge_pass\[1\] is nan"),
        (lambda: cgpo.cgpo_rewards(R, ZERO, OK[:3], LOGP, REF, 1.0), r"judge_pass has shape \[3\]"),
        (lambda: cgpo.cgpo_rewards(R, ZERO[:1], OK, LOGP, REF, 1.0), r"r_base has shape \[1\]; \[4\] is expected"),
        (lambda: cgpo.crpg_loss(LOGP, R, norm="mean"), "norm is 'mean'; accepted: 'sequence', 'token'"),
        (lambda: cgpo.crpg_loss(LOGP, R, norm="token"), "lengths is None; norm 'token' needs them"),
        (lambda: cgpo.codpo_loss(LOGP, REF, R, OK, FOUR, torch.tensor([1, 0, 2, 3])), r"lengths\[1\] is 0; a response needs"),
        (lambda: cgpo.codpo_loss(LOGP, REF, NAN_R, OK, FOUR, torch.ones(4)), r"rewards\[1\] is nan"),
        (lambda: cgpo.crraft_loss(LOGP, LOGP, REF, R, NAN_R, OK, FOUR, kl_max=1.0), r"r_base\[1\] is nan"),
        (lambda: cgpo.crraft_loss(LOGP, LOGP, REF, R, ZERO, ZERO + 2, FOUR, kl_max=1.0), r"judge_pass\[0\] is 2"),
        (lambda: cgpo.constrained_select(vector(math.inf), None, FOUR[:1]), r"rewards\[0\] is inf"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_looked_at_comes_out_nan(monkeypatch) -> None:
    """As on CUDA without validation."""
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)
    rewards = cgpo.cgpo_rewards(NAN_R, ZERO, OK, LOGP, REF, 4.0)
    assert rewards.isnan().tolist() == [False, True, False, False]
    assert cgpo.cgpo_rewards(R, ZERO, NAN_R, LOGP, REF, 4.0).isnan().tolist() == [False, True, False, False]
    group, ones = torch.tensor([0, 0, 1, 1]), torch.ones(4)
    for bad_rewards, bad_verdicts, lengths in ((NAN_R, OK, ones), (R, NAN_R, ones), (R, OK, torch.tensor([1, 1, 0, 1]))):
        assert cgpo.codpo_loss(LOGP, REF, bad_rewards, bad_verdicts, group, lengths).loss.isnan()
    assert cgpo.crraft_loss(LOGP, LOGP, REF, NAN_R, ZERO, OK, group, kl_max=9.0).loss.isnan()
    assert cgpo.crraft_loss(LOGP, LOGP, REF, R, ZERO, NAN_R, group, kl_max=9.0).loss.isnan()


# ---- the recipe


def make_rollout(**changes):
    mask = torch.arange(3) < torch.tensor([[3], [1], [2], [3]])
    old, ref = (-5 * torch.rand(4, 3, dtype=F64) for _ in range(2))
    fields = {"rewards": R, "group": torch.tensor([0, 0, 1, 1]), "mask": mask, "old_logp": old, "ref_logp": ref}
    extra = {"r_base": torch.full((4,), 0.5, dtype=F64), "judge_pass": OK}
    return Rollout(**{**fields, "extra": extra, **changes})


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_the_recipe_composes_crpg(norm) -> None:
    rollout = make_rollout()
    recipe = load_recipe("cgpo:kl_max=4", norm=norm)
    batch = recipe.prepare(rollout)
    old, ref = (torch.where(rollout.mask, x, 0.0).sum(1) for x in (rollout.old_logp, rollout.ref_logp))
    rewards = cgpo.cgpo_rewards(R, rollout.extra["r_base"], OK, old, ref, 4.0)
    close(batch["advantages"], rewards - rewards.mean())
    logp = (rollout.old_logp + 0.1).requires_grad_()
    loss, _ = recipe.loss(logp, batch)
    sums = torch.where(rollout.mask, logp, 0.0).sum(1)
    expected = cgpo.crpg_loss(sums, rewards, norm=norm, lengths=rollout.mask.sum(1)).loss
    close(loss.detach(), expected.detach())
    close(*(torch.autograd.grad(value, logp)[0] for value in (loss, expected)))
    rows = torch.tensor([2, 0])
    part = recipe.loss(logp[rows], take_rows(batch, rows)).loss
    expected = -(batch["advantages"][rows] * sums[rows]).sum() / (2 if norm == "sequence" else 5)
    close(part.detach(), expected.detach())

    inside = rollout.mask
    lengths = inside.sum(1)
    packed = make_rollout(
        mask=None, old_logp=rollout.old_logp[inside], ref_logp=rollout.ref_logp[inside],
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
    )  # fmt: skip
    close(recipe.loss(logp[inside], recipe.prepare(packed)).loss.detach(), loss.detach())


def test_the_recipe_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="kl_max is None; recipe 'cgpo' needs"):
        load_recipe("cgpo").prepare(make_rollout())
    recipe = load_recipe("cgpo:kl_max=4")
    for key in ("old_logp", "ref_logp"):
        with pytest.raises(ValueError, match=rf"recipe 'cgpo' needs rollout\.{key}"):
            recipe.prepare(make_rollout(**{key: None}))
    with pytest.raises(ValueError, match=r"recipe 'cgpo' needs rollout\.extra\['judge_pass'\]"):
        recipe.prepare(make_rollout(extra={"r_base": ZERO}))
    with pytest.raises(ValueError, match=r"'norm'.* is 'mean'"):
        load_recipe("cgpo:kl_max=4,norm=mean").loss(torch.zeros(4, 3), recipe.prepare(make_rollout()))
    with pytest.raises(ValueError, match="norm is 'mean'"):
        replace(recipe, norm="mean").loss(torch.zeros(4, 3), recipe.prepare(make_rollout()))


def test_losses_compile_without_a_break() -> None:
    def loss(logp):
        rewards = cgpo.cgpo_rewards(R, ZERO, OK, LOGP, REF, 4.0)
        total = cgpo.crpg_loss(logp, rewards).loss + cgpo.codpo_loss(logp, REF, R, OK, FOUR, torch.ones(4)).loss
        return total + cgpo.crraft_loss(logp, LOGP, REF, R, ZERO, OK, FOUR, kl_max=2.0).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = LOGP.clone().requires_grad_()
    assert_close(compiled(logp), loss(logp), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(logp), logp)[0] for of in (compiled, loss)), rtol=1e-12, atol=0)
