"""Diffusion-DPO, Diffusion-NPO and Self-NPO: worked numbers of the losses, roll-out, noising, merging and guidance, their
invariants, and refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers.diffusion_dpo import diffusion_dpo_loss
from prefkern.papers.self_npo import (
    GUIDANCE,
    diffusion_npo_loss,
    ema_update_,
    merge_negative,
    npo_cfg,
    scaled_linear_abar,
    spo_pair_loss,
    tdft_loss,
    tdft_renoise,
    tdft_rollout,
)

F64 = torch.float64
ABAR = scaled_linear_abar()


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-10):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------- pairs

TARGET, PRED_W, PRED_L = f64([0.1, -0.2, 0.3, 0]), f64([0.11, -0.18, 0.33, 0.01]), f64([0.05, -0.25, 0.36, 0.02])
REFS = {"ref_w": f64([0.13, -0.16, 0.34, -0.01]), "ref_l": f64([0.08, -0.22, 0.33, 0.01])}


def test_diffusion_dpo():
    leaves = PRED_W.clone().requires_grad_(), PRED_L.clone().requires_grad_()
    out = diffusion_dpo_loss(*leaves, TARGET, **REFS)
    close(out.metrics["margin"], 6.1875, 1e-12)
    close(out.loss.detach(), 0.0020528491937)
    out.loss.backward()
    close(leaves[0].grad, [[0.0256342942490, 0.0512685884979, 0.0769028827469, 0.0256342942490]])
    close(leaves[1].grad, [[0.1281714712448, 0.1281714712448, -0.1538057654938, -0.0512685884979]])
    assert torch.equal(diffusion_dpo_loss(*leaves, TARGET, beta=2500.0, half=False, **REFS).loss, out.loss)


def test_diffusion_npo():
    out = diffusion_npo_loss(PRED_W, PRED_L, TARGET, beta=500.0, **REFS)
    close(out.metrics["margin"], -1.2375, 1e-12)
    close(out.loss, 1.4922263881364)
    swapped = diffusion_dpo_loss(PRED_L, PRED_W, TARGET, ref_w=REFS["ref_l"], ref_l=REFS["ref_w"], beta=1000.0)
    assert_close(out.loss, swapped.loss, rtol=1e-14, atol=0)
    ipo = diffusion_npo_loss(PRED_W, PRED_L, TARGET, beta=500.0, loss_type="ipo", **REFS).loss
    close(ipo, (-0.002475 - 1 / 1000) ** 2, 1e-15)  # its g has the other sign


def test_step_wise_pairs():
    leaves = f64(-10.02, -9.9).requires_grad_(), f64(-10, -10.3).requires_grad_()
    refs = f64(-10.05, -10), f64(-10.01, -10)
    out = spo_pair_loss(*leaves, *refs)
    close(out.loss.detach(), 0.3621348746471)
    out.loss.backward()
    close(leaves[0].grad, [-2.250830013438, 0])  # the second is held at 1 + eps
    assert out.metrics["clip_fraction"] == 0.5 and out.metrics["accuracy"] == 1
    negative = spo_pair_loss(*leaves, *refs, negative=True)
    assert torch.equal(negative.loss, spo_pair_loss(leaves[1], leaves[0], refs[1], refs[0]).loss)
    assert torch.equal(negative.metrics["margin"], -out.metrics["margin"])
    at_reference = spo_pair_loss(refs[0], refs[1], *refs)
    close(at_reference.loss, math.log(2), 1e-15)


# ------------------------------------------------------------------------------------------------------------- roll-out

COND, UNCOND = f64([0.2, 0.1], [0.3, -0.1], [0.1, 0.0]), f64([0, 0.4], [-0.2, 0.2], [0.5, 0.1])


class Net:
    """Predictions one after the other, and what it was asked with."""

    def __init__(self, cond=COND, uncond=UNCOND):
        self.cond, self.uncond, self.asked = cond, uncond, []

    def __call__(self, x, t):
        k = len(self.asked)
        self.asked.append((x.clone(), t.tolist()))
        return self.cond[k].expand_as(x), self.uncond[k].expand_as(x)


@pytest.mark.parametrize(
    ("guidance", "x_t", "x0"),
    [
        (-1.0, [1.1157004934055, -0.6031854285163], [0.9991818939096, -0.7510073550579]),
        ("sd15", [1.1157004934055, -0.6031854285163], [0.9991818939096, -0.7510073550579]),
        (-5.0, [1.3600670213257, -0.8160390561035], [0.3695159598102, -1.2236496483893]),
        ("sdxl", [1.3600670213257, -0.8160390561035], [0.3695159598102, -1.2236496483893]),
    ],
)
def test_rollout(guidance, x_t, x0):
    net = Net()
    out = tdft_rollout(net, f64([1, -0.5]), 6, guidance=guidance, abar=ABAR, steps=2)
    close(out.x, [x_t])
    close(out.x0, [x0])
    assert out.t.tolist() == [199] and [t for _, t in net.asked] == [[279], [239], [199]]
    assert GUIDANCE == {"sd15": -1.0, "sdxl": -5.0}


def test_minus_one_ignores_the_prompt():
    x = torch.randn(2, 2, dtype=F64)
    one = tdft_rollout(Net(torch.full_like(COND, math.nan)), x, 6, guidance=-1.0, abar=ABAR, steps=2)
    other = tdft_rollout(Net(), x, 6, guidance=-1.0, abar=ABAR, steps=2)
    assert torch.equal(one.x, other.x) and torch.equal(one.x0, other.x0) and one.x0.isfinite().all()


def plain_rollout(cond, uncond, x, j, w, steps):
    """One sample at a time, as the definition has it: x, t, x0 at the level reached."""
    t = (j + 1) * 40 - 1
    for k in range(steps + 1):
        a, s = ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()
        e = cond[k] + w * (cond[k] - uncond[k])
        x0 = (x - s * e) / a
        if k == steps or t == 0:
            return x, t, x0
        t = max(t - 40, 0)
        x = ABAR[t].sqrt() * x0 + (1 - ABAR[t]).sqrt() * e
    raise AssertionError


def test_samples_freeze_at_level_0():
    """Those that get there stay, whatever the network says of them; the others go on."""
    same = torch.randn(1, 2, dtype=F64).expand(6, 2), torch.randn(1, 2, dtype=F64).expand(6, 2)
    x, j = torch.randn(3, 2, dtype=F64), torch.tensor([0, 2, 9])
    out = tdft_rollout(Net(*same), x, j, guidance=1.5, abar=ABAR, steps=5)
    assert out.t.tolist() == [0, 0, 199]
    for i in range(3):
        x_t, t, x0 = plain_rollout(*same, x[i], int(j[i]), 1.5, 5)
        assert t == out.t[i]
        close(out.x[i], x_t.tolist(), 1e-12)
        close(out.x0[i], x0.tolist(), 1e-12)


def test_all_freeze_early():
    """Nobody has a step left: the target is what was predicted last."""
    net, x = Net(), torch.randn(2, 2, dtype=F64)
    out = tdft_rollout(net, x, torch.tensor([1, 0]), guidance=0.5, abar=ABAR, steps=5)
    assert [t for _, t in net.asked] == [[79, 39], [39, 0]] and out.t.tolist() == [0, 0]
    a, s = ABAR[[39, 0]].sqrt()[:, None], (1 - ABAR[[39, 0]]).sqrt()[:, None]
    e = COND[1] + 0.5 * (COND[1] - UNCOND[1])
    assert_close(out.x0, (net.asked[1][0] - s * e) / a, rtol=1e-12, atol=1e-12)
    assert torch.equal(out.x[1], net.asked[1][0][1])  # frozen before
    just = Net()
    tdft_rollout(just, x, 1, guidance=0.5, abar=ABAR, steps=2)
    assert [t for _, t in just.asked] == [[79, 79], [39, 39], [0, 0]]  # the last step is one of K


# ---------------------------------------------------------------------------------------------- noising and regression


def test_renoise_and_loss():
    x_t, x0 = f64([1.1157004934055, -0.6031854285163]), f64([0.9991818939096, -0.7510073550579])
    x_s, s, noise = tdft_renoise(x_t, 199, 599, f64([0.7, -1.1]), abar=ABAR)
    close(x_s, [[1.1368622198939, -1.2542629086116]])
    assert s.tolist() == [599] and noise.tolist() == [[0.7, -1.1]]
    eps = f64([0.4, -0.9]).requires_grad_()
    loss = tdft_loss(eps, x_s, s, x0, abar=ABAR)
    close(loss.detach(), 0.6168760320870)
    loss.backward()
    close(eps.grad, [[-1.1382308560063, 1.1382259332400]])
    close(tdft_loss(eps.detach(), x_s, 599, x0, abar=ABAR, loss_type="l2"), 0.4712152154495)


def test_noise_on_top_is_noise_from_the_start():
    """Of a sample at t exactly that at s in mean and variance; what is drawn is uniform and later than t."""
    t, s = torch.tensor([3, 500]), torch.tensor([4, 990])
    one = torch.ones(2, 1, dtype=F64)
    mean = tdft_renoise(ABAR[t].sqrt()[:, None], t, s, 0 * one, abar=ABAR).x[:, 0]
    added = tdft_renoise(0 * one, t, s, one, abar=ABAR).x[:, 0]
    assert_close(mean, ABAR[s].sqrt(), rtol=1e-14, atol=0)
    assert_close(mean.square() / ABAR[t] * (1 - ABAR[t]) + added.square(), 1 - ABAR[s], rtol=1e-12, atol=0)
    generator = torch.Generator().manual_seed(0)
    out = tdft_renoise(torch.zeros(4000, 1, dtype=F64), 989, abar=ABAR, generator=generator)
    counts = torch.bincount(out.s - 990, minlength=10)
    assert len(counts) == 10 and ((counts - 400).square() / 400).sum() < 27.9  # chi-square, 9 degrees, one in a thousand
    assert abs(out.noise.mean()) < 0.06 and abs(out.noise.std() - 1) < 0.05
    again = tdft_renoise(torch.zeros(4000, 1, dtype=F64), 989, abar=ABAR, generator=generator.manual_seed(0))
    assert torch.equal(again.x, out.x) and torch.equal(again.s, out.s)
    assert tdft_renoise(torch.zeros(3, 1), 998, abar=ABAR).s.tolist() == [999] * 3


# ------------------------------------------------------------------------------------------------- merging and guidance


def test_merging():
    theta, eta, delta = f64(1, 2), f64(0.5, -0.5), f64(0.1, 0.2)
    close(merge_negative(theta, eta, delta, 0.6, 1), [1.4, 1.9], 1e-15)
    state = {"weight": theta, "steps": torch.tensor(7), "low": theta.bfloat16()}
    offsets = (
        {"weight": eta, "steps": torch.tensor(1), "low": eta.bfloat16()},
        {**state, "weight": delta, "low": delta.bfloat16()},
    )
    merged = merge_negative(state, *offsets, 0.6, 1)
    close(merged["weight"], [1.4, 1.9], 1e-15)
    assert merged["steps"] == 7 and merged["low"].dtype == torch.bfloat16 and list(merged) == list(state)
    exact = theta.bfloat16().float() + 0.6 * eta.bfloat16().float() + delta.bfloat16().float()
    assert torch.equal(merged["low"], exact.bfloat16())


def test_guidance():
    pos, neg = f64(1, 2).requires_grad_(), f64(0.5, 2.5)
    out = npo_cfg(pos, neg, 7.5)
    close(out.detach(), [4.25, -1.25], 1e-15)
    out.sum().backward()
    assert pos.grad.tolist() == [7.5, 7.5]
    assert torch.equal(npo_cfg(pos, neg, 1.0), pos)


def test_a_reference_that_follows():
    reference, student = [torch.zeros(2), torch.ones(1).bfloat16()], [torch.ones(2), torch.full((1,), 3.0)]
    ema_update_(reference, student, decay=0.75)
    assert reference[0].tolist() == [0.25, 0.25] and reference[1].tolist() == [1.5] and student[0].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        ema_update_(reference, student, decay=1.5)


# ------------------------------------------------------------------------------------------------------------- refusals

X = torch.zeros(2, 3)


def rollout(**change):
    return tdft_rollout(Net(), **{"x": X, "j": 3, "guidance": -1.0, "abar": ABAR, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rollout(j=25), ValueError, r"j\[0\] is 25; accepted: 0 to 24"),
        (lambda: rollout(j=torch.tensor([0, -1])), ValueError, r"j\[1\] is -1; accepted: 0 to 24"),
        (lambda: rollout(j=torch.tensor([1.0])), TypeError, "j has dtype float32; integers are expected"),
        (lambda: rollout(j=torch.tensor([1, 2, 3])), ValueError, r"j has shape \[3\]; \[2\] is expected"),
        (lambda: rollout(steps=0), ValueError, "steps is 0; it must be at least 1"),
        (lambda: rollout(n_ddim=1001), ValueError, "n_ddim is 1001; it must be at least 1 and at most 1000"),
        (lambda: rollout(guidance="sd3"), ValueError, "guidance is 'sd3'; accepted: a number, 'sd15', 'sdxl'"),
        (lambda: rollout(x=X[:0]), ValueError, r"x has shape \[0, 3\]; \[B, ...\] is expected"),
        (lambda: rollout(abar=ABAR.flip(0)), ValueError, r"abar\[1\] is .* it must not ascend"),
        (lambda: rollout(abar=torch.tensor([0.9, 0.0])), ValueError, r"abar\[1\] is 0.0"),
        (lambda: tdft_renoise(X, 5, 5, abar=ABAR), ValueError, r"s\[0\] is 5; accepted: 6 to 999, later than t"),
        (lambda: tdft_renoise(X, torch.tensor([5, 9]), torch.tensor([6, 8]), abar=ABAR),
         ValueError, r"s\[1\] is 8; accepted: 10 to"),
        (lambda: tdft_renoise(X, 5, 1000, abar=ABAR), ValueError, r"s\[0\] is 1000; accepted: 6 to 999"),
        (lambda: tdft_renoise(X, 999, abar=ABAR),
         ValueError, r"t\[0\] is 999; accepted: 0 to 998, so that a later level exists"),
        (lambda: tdft_renoise(X, -1, 5, abar=ABAR), ValueError, r"t\[0\] is -1; accepted: 0 to 998"),
        (lambda: tdft_renoise(X, torch.tensor([1.5]), abar=ABAR), TypeError, "t has dtype float32; integers"),
        (lambda: tdft_loss(X, X, 1000, X, abar=ABAR), ValueError, r"s is \[1000, 1000\]; the schedule has levels 0 to 999"),
        (lambda: tdft_loss(X, X, torch.tensor([1, 2, 3]), X, abar=ABAR), ValueError, r"s has shape \[3\]; \[2\] is expected"),
        (lambda: merge_negative({"a": X}, {"b": X}, {"a": X}, 1, 1),
         ValueError, "eta and theta differ in their keys: 'a', 'b'"),
        (lambda: merge_negative({"a": X}, {"a": X}, X, 1, 1), TypeError, "delta is a Tensor; theta is a mapping"),
        (lambda: merge_negative({"a": X}, {"a": X}, {"a": X[0]}, 1, 1), ValueError, r"a: delta has shape \[3\]; theta has"),
        (lambda: merge_negative(X, X, X, "x", 1), TypeError, "alpha is 'x'; a number is expected"),
        (lambda: npo_cfg(X, X[0], 2.0), ValueError, r"eps_neg has shape \[3\]; eps_pos has shape \[2, 3\]"),
        (lambda: spo_pair_loss(X, X, X, X), ValueError, r"logp_w has shape \[2, 3\]; \[B\] is expected"),
        (lambda: spo_pair_loss(X[0], X[0], X[0], X[0, :2]), ValueError, r"ref_logp_l has shape \[2\]; \[3\] is expected"),
        (lambda: spo_pair_loss(*[X[0]] * 4, eps=1.0), ValueError, "eps is 1.0; it must be greater than 0 and less than 1"),
        (lambda: spo_pair_loss(*[X[0]] * 4, beta=-1.0), ValueError, "beta is -1.0; it must be finite and positive"),
        (lambda: diffusion_npo_loss(X, X, X, beta=1.0), ValueError, "no reference given"),
    ],
)  # fmt: skip
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
