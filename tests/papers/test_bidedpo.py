"""BideDPO: worked numbers of the balanced loss and its gradients, what the balance must keep, ranks, and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers.bidedpo import alb_combine, alb_weights, bidedpo_gap, bidedpo_loss
from ranks import run_ranks

F64 = torch.float64


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-10):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def gradients(text, cond, **options):
    leaves = [torch.tensor(gap, dtype=F64, requires_grad=True) for gap in (text, cond)]
    out = bidedpo_loss(*leaves, **options)
    return out, torch.autograd.grad(out.loss, leaves)


def test_numbers():
    out, (text, cond) = gradients([0.5, -1.0], [2.0, 1.0])
    close(out.weights, [0.8023864905883, 0.1976135094117])
    close(out.loss.detach(), 0.7605619177081)
    close(text, [-0.1514667661456, -0.2932957636607])
    close(cond, [-0.0117780538765, -0.0265732290516])
    losses = -F.logsigmoid(f64([0.5, -1.0], [2.0, 1.0])).mean(1)
    close(losses, [0.8936693358492, 0.2200948492806])
    assert torch.equal(alb_weights(losses), out.weights)
    close(alb_combine(losses).loss, 0.7605619177081)
    out, (text, cond) = gradients([0.5, -1.0], [2.0, 1.0], balance="sample")
    close(out.weights[:, 0], [0.7888070614191, 0.8074041281385])
    close(out.loss.detach(), 0.7607136940373)
    close(text, [-0.1489033727604, -0.2951298571485])
    close(cond, [-0.0125874076946, -0.0258985037642])


def test_a_satisfied_condition_leaves_the_prompt_its_gradient():
    """One pair with the sum of both scores does not."""
    gap = f64(-1.0).requires_grad_()
    (-F.logsigmoid(gap + 12).sum()).backward()
    close(gap.grad, [-1.6701421848e-5], 1e-14)
    out, (text, _) = gradients([-1.0], [12.0])
    close(text, [-0.7310551583335])
    close(out.weights[0], 0.9999953214468)


def test_gap_and_shares():
    pos, neg = f64([0.5, -0.2]), f64([0.1, 0.9])
    options = {"ref_pos": f64([0.55, -0.3]), "ref_neg": f64([0.15, 0.83]), "beta": 200.0}
    close(bidedpo_gap(pos, neg, f64([0.48, -0.25]), f64([0.2, 0.8]), **options), [1.055], 1e-12)
    close(bidedpo_gap(pos, neg, f64([0.48, -0.25]), f64([0.2, 0.8]), half=False, **options), [2.11], 1e-12)
    close(alb_weights(f64(0.7, 0.2, 0.1)), [0.7, 0.2, 0.1], 1e-15)
    close(alb_weights(f64([1, 3], [0, 0], [0, 2])), [[0.25, 0.75], [0.5, 0.5], [0, 1]], 1e-15)


def test_gradients_reach_the_predictions():
    torch.manual_seed(1)
    preds = [torch.randn(3, 4, dtype=F64, requires_grad=True) for _ in range(4)]
    target, ref = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)

    def loss(*p, balance="batch"):
        text, cond = (bidedpo_gap(a, b, target, ref_pos=ref, ref_neg=ref, beta=0.5) for a, b in (p[:2], p[2:]))
        return bidedpo_loss(text, cond, balance=balance).loss

    assert torch.autograd.gradcheck(lambda *p: loss(*p, balance="off"), preds)
    (grad,) = torch.autograd.grad(loss(*preds), preds[0])
    text, cond = (bidedpo_gap(a, b, target, ref_pos=ref, ref_neg=ref, beta=0.5) for a, b in (preds[:2], preds[2:]))
    weights = bidedpo_loss(text, cond).weights
    (alone,) = torch.autograd.grad(-F.logsigmoid(text).mean(), preds[0])
    assert_close(grad, weights[0] * alone, rtol=1e-12, atol=1e-15)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=4), st.lists(st.floats(-20, 20), min_size=1, max_size=4))
def test_invariants(text, cond):
    out = bidedpo_loss(f64(*text), f64(*cond))
    a, b = (-F.logsigmoid(f64(*gap)).mean() for gap in (text, cond))
    close(out.weights.sum(), 1, 1e-12)
    assert (out.weights[0] >= out.weights[1]) == (a >= b) or abs(a - b) < 1e-12
    close(out.loss, (a * a + b * b) / (a + b), 1e-9)
    same = bidedpo_loss(f64(*text), f64(*text))
    close(same.weights, [0.5, 0.5], 0)
    close(same.loss, a, 1e-12)
    close(alb_weights(torch.stack([a, b]) * 7), out.weights.tolist(), 1e-12)


def test_losses_that_underflow():
    for dtype, gap in ((torch.float32, 200.0), (F64, 800.0)):
        out = bidedpo_loss(*[torch.full((2,), gap, dtype=dtype)] * 2)
        assert out.loss == 0 and out.weights.tolist() == [0.5, 0.5]
        one = bidedpo_loss(torch.full((2,), gap, dtype=dtype), torch.zeros(2, dtype=dtype))
        assert one.weights.tolist() == [0, 1]
    each = bidedpo_loss(f64(800, 800), f64(0, 800), balance="sample")
    assert each.weights.tolist() == [[0, 1], [0.5, 0.5]]


def test_sides_of_different_sizes():
    out = bidedpo_loss(f64(0, 1, 2), f64(1))
    expected = [-F.logsigmoid(f64(0, 1, 2)).mean(), -F.logsigmoid(f64(1)).mean()]
    assert torch.equal(out.weights, alb_weights(torch.stack(expected)))
    for balance in ("batch", "off"):
        missing, (text, cond) = gradients([0.5, -1.0], [], balance=balance, allow_missing=True)
        close(missing.loss.detach(), 0.8936693358492)
        assert missing.weights.tolist() == [1, 0] and text.abs().min() > 0 and cond.shape == (0,)
    off, _ = gradients([0.5, -1.0], [2.0, 1.0], balance="off")
    close(off.loss.detach(), (0.8936693358492 + 0.2200948492806) / 2)
    assert bidedpo_loss(torch.zeros(2).bfloat16(), torch.zeros(2)).loss.dtype == torch.float32


TEXT, COND = [[0.5, -1.0], [3.0]], [[2.0, 1.0], [0.0]]


def on_ranks(rank):
    out, grads = gradients(TEXT[rank], COND[rank], group="world")
    missing, _ = gradients(TEXT[rank], COND[rank] if rank == 0 else [], group="world", allow_missing=True)
    return out.loss.detach(), out.weights, *grads, missing.weights, missing.loss.detach()


def test_weights_of_all_ranks():
    """Those of one process with all pairs; every rank's loss and gradients are of its own pairs."""
    whole = bidedpo_loss(f64(*TEXT[0], *TEXT[1]), f64(*COND[0], *COND[1]))
    for rank, (loss, weights, text, cond, missing, rest) in enumerate(run_ranks(on_ranks, 2)):
        close(weights, whole.weights.tolist(), 1e-14)
        a, b = (-F.logsigmoid(f64(*gaps[rank])).mean() for gaps in (TEXT, COND))
        close(loss, (weights[0] * a + weights[1] * b).item(), 1e-14)
        close(text, (-weights[0] * torch.sigmoid(-f64(*TEXT[rank])) / len(TEXT[rank])).tolist(), 1e-14)
        close(cond, (-weights[1] * torch.sigmoid(-f64(*COND[rank])) / len(COND[rank])).tolist(), 1e-14)
        partly = bidedpo_loss(f64(*TEXT[0], *TEXT[1]), f64(*COND[0]))
        close(missing, partly.weights.tolist(), 1e-14)
        close(rest, (missing[0] * a + missing[1] * (b if rank == 0 else 0)).item(), 1e-14)


ONE = torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bidedpo_loss(ONE, ONE, balance="batches"),
         ValueError, "balance is 'batches'; accepted: 'batch', 'sample', 'off'"),
        (lambda: bidedpo_loss(ONE, torch.zeros(3), balance="sample"),
         ValueError, "2 and 3 pairs; balance 'sample' takes equally many"),
        (lambda: bidedpo_loss(ONE, ONE[:0]), ValueError, "gap_cond has no pairs: empty objective"),
        (lambda: bidedpo_loss(ONE[:0], ONE), ValueError, "gap_text has no pairs: empty objective"),
        (lambda: bidedpo_loss(ONE[:0], ONE[:0], allow_missing=True), ValueError, "no pairs: empty objective"),
        (lambda: bidedpo_loss(ONE[:0], ONE[:0], allow_missing=True, balance="sample"), ValueError, "empty objective"),
        (lambda: bidedpo_loss(ONE * math.nan, ONE), ValueError, r"losses is \[nan, 0.69\d*\]; they must be finite"),
        (lambda: bidedpo_loss(ONE, ONE * math.nan, balance="sample"), ValueError, "they must be finite"),
        (lambda: bidedpo_loss(ONE, ONE.view(1, 2)), ValueError, r"gap_cond has shape \[1, 2\]; \[P\] is expected"),
        (lambda: bidedpo_loss(ONE.long(), ONE), TypeError, "gap_text has dtype int64; a floating type is expected"),
        (lambda: bidedpo_loss(ONE, ONE, balance="off", group="world"), ValueError, "group is given but balance is 'off'"),
        (lambda: bidedpo_loss(ONE, ONE, group="world"), ValueError, "torch.distributed is not initialised"),
        (lambda: alb_weights(torch.tensor(1.0)), ValueError, r"losses has shape \[\]; \[..., K\] is expected"),
        (lambda: alb_weights(torch.tensor([1.0, -1.0])), ValueError, "must be finite and not negative"),
        (lambda: bidedpo_gap(ONE, ONE, ONE, beta=1.0), ValueError, "no reference given"),
    ],
)  # fmt: skip
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
