"""DaGRPO-style distinctiveness: the worked numbers of pair-v1, anchors with gradients, invariants and edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, dagrpo, load_recipe

F64 = torch.float64


def run(rewards, scores, **options):
    r, q = torch.tensor(rewards, dtype=F64), torch.tensor(scores, dtype=F64)
    return dagrpo.dagrpo_advantages(r, q, torch.zeros(len(r), dtype=torch.int64), **options)


def grpo(rewards):
    r = torch.tensor(rewards, dtype=F64)
    return prefkern.group_advantages(r, torch.zeros(len(r), dtype=torch.int64)).advantages


def close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    assert_close(actual.detach(), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def test_worked_pairs() -> None:
    rewards, scores = [1.0, 1, 0, 0], [0.9, 0.55, 0.5, 0.1]
    out = run(rewards, scores, tau=0.2)
    close(out.advantages, [0.8660239038, 0.4330119519, -0.4330119519, -0.8660239038])
    assert out.masked_pairs.tolist() == [0, 1, 1, 0]
    sequence = run(rewards, scores, tau=0.2, level="sequence")
    close(sequence.advantages, [0.8660239038, 0.8660239038, -0.8660239038, -0.8660239038])
    assert sequence.kept.all()


def test_worked_anchor() -> None:
    out = run([0.0, 0, 0, 1], [0.2, 0.9, 0.1, 1], tau=0.2, is_anchor=torch.tensor([False, False, False, True]))
    close(out.advantages, [-0.4999990, 0, -0.4999990, 0.9999980], atol=5e-8)
    assert out.kept.tolist() == [True, False, True, True]


rows = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.floats(0, 1)), min_size=2, max_size=10)


@given(rows=rows, tau=st.floats(0, 0.5), mode=st.sampled_from(["gap", "abs"]))
def test_pairs_cancel_and_never_exceed_grpo(rows, tau, mode) -> None:
    rewards, scores = [r for r, _ in rows], [q for _, q in rows]
    a, plain = run(rewards, scores, tau=tau, mode=mode).advantages, grpo(rewards)
    assert abs(float(a.sum())) < 1e-12
    assert bool((a.abs() <= plain.abs() + 1e-12).all())
    assert bool(((a == 0) | (a.sign() == plain.sign())).all())


@given(rows=st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 1)), min_size=2, max_size=10))
def test_without_a_threshold_it_is_grpo(rows) -> None:
    rewards, scores = [r for r, _ in rows], [q for _, q in rows]
    out = run(rewards, scores, tau=-math.inf)
    assert_close(out.advantages, grpo(rewards), rtol=1e-12, atol=1e-12)
    assert not out.masked_pairs.any()


def test_a_worse_score_for_the_better_reward_is_masked_by_gap_only() -> None:
    assert not run([1.0, 0], [0.1, 0.9]).advantages.any()
    close(run([1.0, 0], [0.1, 0.9], mode="abs").advantages, grpo([1.0, 0]), atol=1e-12)


def test_all_pairs_masked() -> None:
    out = run([1.0, 0, 0], [0.5, 0.5, 0.5])
    assert not out.advantages.any() and not out.kept.any()
    assert out.masked_pairs.tolist() == [2, 1, 1]


def test_renormalised_for_the_rows_that_are_left() -> None:
    rewards, scores = [0.0, 0, 0, 1], [0.2, 0.9, 0.1, 1]
    close(
        run(rewards, scores, tau=0.2, renormalise=True).advantages, run(rewards, scores, tau=0.2).advantages * 4 / 3, atol=1e-12
    )


def test_std_of_the_rows_that_are_left() -> None:
    rewards, scores = [0.0, 0, 0, 1], [0.2, 0.9, 0.1, 1]
    kept = run(rewards, scores, tau=0.2, sigma="kept").advantages
    close(kept[3], (2 / 4) / (torch.tensor([0.0, 0, 1], dtype=F64).std() + 1e-6))


def test_constant_groups_and_groups_of_one() -> None:
    r, q = torch.tensor([0.1, 0.1, 0.1, 1], dtype=F64), torch.rand(4, dtype=F64)
    assert dagrpo.dagrpo_advantages(r, q, torch.tensor([0, 0, 0, 1])).advantages.tolist() == [0] * 4


def test_prompts_without_success_need_an_anchor() -> None:
    rewards, group = torch.tensor([0.0, 0, 1, 0, 0.5]), torch.tensor([4, 4, 2, 2, 3])
    assert dagrpo.needs_anchor(rewards, group).tolist() == [True, True, False, False, True]
    assert dagrpo.needs_anchor(rewards, group, success=0.5).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("kind", ["shaped", "nll"])
def test_mixed_loss_and_gradient(kind) -> None:
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    anchor = torch.tensor([False, True, False])
    old = -torch.rand(3, 4, dtype=F64)
    logp = (old + 0.4 * torch.randn(3, 4, dtype=F64)).requires_grad_()
    a = torch.tensor([-0.5, 0.9, 0.4], dtype=F64)
    old[1] = torch.nan  # nobody knows the anchor's
    out = dagrpo.mixed_policy_loss(logp, old, a, mask, anchor, anchor_gamma=0.2, anchor_loss=kind)
    out.loss.backward()
    lp = logp.detach()
    rho, p, column = (lp - old).exp(), lp.exp(), a[:, None]
    clip = torch.maximum(-column * rho, -column * rho.clamp(0.8, 1.2))
    live = ~(((column > 0) & (rho > 1.2)) | ((column < 0) & (rho < 0.8)))
    own, slope = (-column * p / (p + 0.2), -column * 0.2 * p / (p + 0.2) ** 2) if kind == "shaped" else (-column * lp, -column)
    value = torch.where(anchor[:, None], own, clip)
    gradient = torch.where(anchor[:, None], slope, torch.where(live, -column * rho, 0.0))
    close(out.loss, value[mask].mean(), atol=1e-12)
    close(logp.grad, torch.where(mask, gradient, 0.0) / 9, atol=1e-12)


def test_recipe() -> None:
    rewards, group = torch.tensor([0.0, 0, 0, 1], dtype=F64), torch.zeros(4, dtype=torch.int64)
    scores, anchor = torch.tensor([0.2, 0.9, 0.1, 1], dtype=F64), torch.tensor([False, False, False, True])
    mask = torch.arange(5) < torch.tensor([[3], [2], [3], [5]])
    old = -torch.rand(4, 5, dtype=F64)
    logp = old + 0.3 * torch.randn(4, 5, dtype=F64)
    recipe = load_recipe("dagrpo", tau=0.2, anchor_gamma=0.3)
    a = dagrpo.dagrpo_advantages(rewards, scores, group, tau=0.2).advantages
    out = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, mask, old, extra={"scores": scores, "is_anchor": anchor})))
    assert_close(out.loss, dagrpo.mixed_policy_loss(logp, old, a, mask, anchor, anchor_gamma=0.3).loss, rtol=1e-12, atol=0)
    out = recipe.loss(logp, recipe.prepare(Rollout(rewards, group, mask, old, extra={"scores": scores})))
    assert_close(out.loss, prefkern.policy_loss(logp, old, a, mask).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run([1.0, 0], [0.1, math.nan]), "scores"),
        (lambda: run([1.0, math.inf], [0.1, 1]), "rewards"),
        (lambda: run([1.0, 0], [0.1, 1], mode="sum"), "mode"),
        (lambda: run([1.0, 0], [0.1, 1], level="token"), "level"),
        (
            lambda: run([1.0, 1], [0.1, 1], is_anchor=torch.tensor([False, True])),
            r"rewards\[1\] is 1.0; an anchor's must be above",
        ),
        (
            lambda: run([1.0, 0], [0.1, 1], is_anchor=torch.tensor([False, True])),
            r"rewards\[1\] is 0.0; an anchor's must be above",
        ),
        (
            lambda: dagrpo.mixed_policy_loss(
                torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1.0, -1]), None, torch.tensor([False, True])
            ),
            r"advantages\[1\] is -1.0; an anchor's must not be negative",
        ),
        (
            lambda: load_recipe("dagrpo").prepare(Rollout(torch.ones(2), torch.arange(2))),
            r"needs rollout.extra\['scores'\]",
        ),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_it_is_not_said_to_be_the_paper_s() -> None:
    assert dagrpo.about.evidence == "inferred"
    assert "pair-v1" in dagrpo.__doc__ and "Evidence: inferred." in dagrpo.__doc__
