"""MCTS-DPO's smoothing, log-ratios and loss against worked numbers, its definition, and edge cases. The search: test_mcts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import mcts
from prefkern.papers import mcts_dpo
from prefkern.papers.mcts_dpo import differing_log_ratios, smoothed_dpo_loss, visit_label_smoothing

F64, NAN = torch.float64, math.nan


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-10):
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(better, worse, *args, **options):
    leaves = [t.clone().requires_grad_() for t in (better, worse)]
    loss, metrics = smoothed_dpo_loss(*leaves, *args, **options)
    return loss.detach(), metrics, *torch.autograd.grad(loss.sum(), leaves)


def test_smoothing_by_visits() -> None:
    close(visit_label_smoothing(f64(6, 1, 0, 4), f64(2, 3, 0, 4)), [0.25, 0.5, 0, 0.5])
    out = visit_label_smoothing(torch.tensor([6, 1, 0, 4, 0]), torch.tensor([2, 3, 0, 4, 3]))
    assert out.dtype == torch.float32 and out.tolist() == [0.25, 0.5, 0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"n_worse\[1\] is -1"):
        visit_label_smoothing(f64(1, 2), f64(0, -1))
    with pytest.raises(ValueError, match=r"n_worse has shape \[1\]; \[2\] is expected"):
        visit_label_smoothing(f64(1, 2), f64(0))


@given(st.integers(1, 100), st.integers(0, 100))
def test_smoothing_is_a_share_of_visits(better, worse) -> None:
    (a,) = visit_label_smoothing(f64(better), f64(worse)).tolist()
    assert a == pytest.approx(min(worse / (better + worse), 0.5)) and 0 <= a <= 0.5


def test_worked_loss() -> None:
    loss, metrics, better, worse = run(f64(0.8, -0.3), f64(0.1, 0.4), f64(0.25, 0.5))
    close(loss, 0.6850095555)
    close(better, [-0.01162535712, -0.0008746428833])
    close(worse, [0.01162535712, 0.0008746428833])
    close(metrics["label_smoothing"], 0.375)
    assert metrics["accuracy"] == 0.5 and metrics["pairs"] == 2


@given(st.integers(0, 2**31), st.floats(0.01, 3))
def test_against_the_equation(seed, beta) -> None:
    torch.manual_seed(seed)
    h = torch.randn(2, 5, dtype=F64, requires_grad=True)
    a = torch.rand(5, dtype=F64) / 2
    d = beta * (h[0] - h[1])
    each = -(1 - a) * F.logsigmoid(d) - a * F.logsigmoid(-d)
    (gradient,) = torch.autograd.grad(each.mean(), h)
    loss, _, better, worse = run(h[0].detach(), h[1].detach(), a, beta=beta)
    close(loss, each.mean().detach())
    close(torch.stack([better, worse]), gradient)
    close(better, beta / 5 * (torch.sigmoid(d.detach()) - (1 - a)))
    close(run(h[0].detach(), h[1].detach(), a, beta=beta, reduction="none")[0], each.detach())


def test_options() -> None:
    better, worse, a = f64(0.8, -0.3), f64(0.1, 0.4), f64(0.25, 0.5)
    d = better - worse
    loss, metrics, *_ = run(better, worse, conservative=False)
    close(loss, F.softplus(-0.1 * d).mean())
    assert metrics["label_smoothing"] == 0
    close(run(better, worse, a, kind="ipo", beta=0.5)[0], (d - 1).square().mean())
    even = [run(sign * f64(0.9), f64(0.0), f64(0.5))[0] for sign in (1, -1)]  # a = 1/2
    close(even[0], even[1])
    assert run(f64(0.0), f64(0.0), f64(0.5))[2].item() == 0
    with pytest.raises(ValueError, match=r"alpha is None; \[P\] is expected, or conservative=False"):
        run(better, worse)
    with pytest.raises(ValueError, match="kind is 'hinge'; accepted: 'sigmoid', 'ipo'"):
        run(better, worse, a, kind="hinge")
    with pytest.raises(ValueError, match=r"alpha has shape \[1\]; \[2\] is expected"):
        run(better, worse, a[:1])


def test_no_pairs_and_pairs_that_do_not_count() -> None:
    loss, metrics, better, _ = run(torch.zeros(0, dtype=F64), torch.zeros(0, dtype=F64), torch.zeros(0, dtype=F64))
    assert loss == 0 and metrics["pairs"] == 0 and better.shape == (0,)
    mask = torch.tensor([True, True, False])
    loss, metrics, better, _ = run(f64(0.8, -0.3, NAN), f64(0.1, 0.4, 0), f64(0.25, 0.5, 0.5), mask=mask)
    close(loss, 0.6850095555)
    assert better[2] == 0 and metrics["pairs"] == 2
    close(metrics["label_smoothing"], 0.375)


def test_smoothing_is_a_constant() -> None:
    a = f64(0.25).requires_grad_()
    smoothed_dpo_loss(f64(0.5).requires_grad_(), f64(0.1), a).loss.backward()
    assert a.grad is None


SIDES = {
    "better_ids": torch.tensor([[7, 8, 3, 4, 2]]), "worse_ids": torch.tensor([[7, 8, 5, 2]]),
    "better_logp": f64([0, -1, -0.5, -0.7, -0.2]), "worse_logp": f64([0, -1, -0.9, -0.4]),
    "ref_better_logp": f64([0, -1, -0.6, -0.6, -0.3]), "ref_worse_logp": f64([0, -1, -0.8, -0.9]),
}  # fmt: skip


def test_log_ratios_from_the_first_difference() -> None:
    leaf = SIDES["better_logp"].clone().requires_grad_()
    better, worse, valid = differing_log_ratios(**{**SIDES, "better_logp": leaf})
    close(better.detach(), [0.1])
    close(worse, [0.4])
    assert valid.tolist() == [True]
    better.backward()
    assert leaf.grad.tolist() == [[0, 0, 1, 1, 1]]  # the prefix they share has none
    better, worse, _ = differing_log_ratios(**SIDES, length_penalty=1.0)
    close(better, [0.1 / 3])
    close(worse, [0.4 / 2])


def test_padding_and_pairs_that_do_not_differ() -> None:
    ids = torch.tensor([[7, 8, 3, 4, 2, 0], [7, 8, 5, 2, 0, 0], [7, 8, 5, 0, 0, 0]])
    lengths = torch.tensor([5, 4, 3])
    mask = torch.arange(6) < lengths[:, None]
    logp = torch.randn(3, 6, dtype=F64).masked_fill(~mask, NAN)
    ref = torch.randn(3, 6, dtype=F64).masked_fill(~mask, NAN)
    order = [1, 1, 1]  # against the second: differs, is equal, is a prefix of it
    ratios = differing_log_ratios(ids, ids[order], logp, logp[order], ref, ref[order], mask, mask[order])
    assert ratios.valid.tolist() == [True, False, False]
    close(ratios.better[0], (logp - ref)[0, 2:5].sum())
    close(ratios.worse[0], (logp - ref)[1, 2:4].sum())
    loss, metrics = smoothed_dpo_loss(ratios.better, ratios.worse, torch.zeros(3, dtype=F64), mask=ratios.valid)
    assert metrics["pairs"] == 1 and loss.isfinite()


def test_from_the_tree_to_the_loss() -> None:
    """Pairs of a search with their visits."""

    def expand(node):
        ends, value = node.depth == 1, node.value if node.depth else 0.9
        return [(value, 0.5, ends, "good"), (value - 0.6, 0.5, ends, "bad")]

    tree = mcts.collect_pairs(mcts.Node(), expand, n_iters=8, depth_limit=2)
    assert [(p.better.action, p.worse.action) for p in tree.pairs] == [("good", "bad")] * 2
    visits = [torch.tensor([getattr(p, f"{side}_visits") for p in tree.pairs]) for side in ("better", "worse")]
    a = visit_label_smoothing(*visits)
    assert a.lt(0.5).all()
    assert_close(a, visits[1] / (visits[0] + visits[1]))
    loss, _ = smoothed_dpo_loss(torch.zeros(2), torch.zeros(2), a)
    assert_close(loss, torch.tensor(math.log(2)))
    assert mcts_dpo.about.evidence == "code"
