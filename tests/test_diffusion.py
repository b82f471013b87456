"""Losses of pairs of denoised latents, of predicted clean latents, inversion steps and the balance of losses, against their
float64 definitions and worked numbers, and everything they must refuse."""

import math
import re
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import (
    alb_combine,
    ddim_coefficients,
    ddim_invert_step,
    diffusion_margin,
    diffusion_mse,
    diffusion_pref_loss,
    diffusion_pref_loss_stacked,
    reference,
    x0_regression_loss,
)
from prefkern.papers.self_npo import scaled_linear_abar
from ranks import run_ranks

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern
LOSS_TYPES = ("sigmoid", "hinge", "ipo")
each_loss = pytest.mark.parametrize("loss_type", LOSS_TYPES)
each_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-10):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype, device=actual.device), rtol=0, atol=tolerance)


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")


TARGET, PRED_W, PRED_L = f64([0.1, -0.2, 0.3, 0]), f64([0.11, -0.18, 0.33, 0.01]), f64([0.05, -0.25, 0.36, 0.02])
REF_W, REF_L = f64([0.13, -0.16, 0.34, -0.01]), f64([0.08, -0.22, 0.33, 0.01])
REFS = {"ref_w": REF_W, "ref_l": REF_L}


def pairs(shape, dtype=F32, device="cpu", change=0.05, distance=0.5):
    """A policy near its reference, which is far from the targets: (pred_w, pred_l, target, target_l, ref_w, ref_l)."""
    target, target_l = torch.randn(shape), torch.randn(shape)
    refs = [t + distance * torch.randn(shape) for t in (target, target_l)]
    preds = [r + change * torch.randn(shape) for r in refs]
    return [t.to(device, dtype) for t in (*preds, target, target_l, *refs)]


def value_and_gradients(function, pred_w, pred_l, *args, **options):
    """Of the loss, weighted by 1, 2, ... where it is not reduced."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (pred_w, pred_l)]
    out = function(*leaves, *args, **options)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    upstream = torch.arange(1.0, loss.numel() + 1, device=loss.device).to(loss.dtype).view_as(loss)
    return out, torch.autograd.grad(loss, leaves, upstream)


# --------------------------------------------------------------------------------------------------------- worked numbers


def test_numbers_of_a_pair():
    out, (grad_w, grad_l) = value_and_gradients(diffusion_pref_loss, PRED_W, PRED_L, TARGET, beta=5000, **REFS)
    close(out.loss.detach(), 0.0020528491937)
    expected = {
        "margin": 6.1875,
        "accuracy": 1,
        "mse_w": 0.000375,
        "mse_l": 0.00225,
        "ref_mse_w": 0.00105,
        "ref_mse_l": 0.00045,
    }
    for name, value in expected.items():
        close(out.metrics[name], value, 1e-12)
    assert tuple(out.metrics) == tuple(expected)
    close(grad_w, [[0.0256342942490, 0.0512685884979, 0.0769028827469, 0.0256342942490]])
    close(grad_l, [[0.1281714712448, 0.1281714712448, -0.1538057654938, -0.0512685884979]])
    out = diffusion_pref_loss(PRED_W, PRED_L, TARGET, beta=500, half=False, negative=True, **REFS)
    close(out.metrics["margin"], -1.2375, 1e-12)
    close(out.loss, 1.4922263881364)
    assert out.metrics["accuracy"] == 0
    close(diffusion_pref_loss(PRED_W, PRED_L, TARGET, beta=500, loss_type="ipo", **REFS).loss, 2.175625e-6, 1e-15)


def test_cached_errors_are_the_reference():
    """From its predictions or from its errors: the same numbers."""
    r_w, r_l = diffusion_mse(REF_W, TARGET), diffusion_mse(REF_L, TARGET)
    close(r_w, [0.00105], 1e-15)
    out, grads = value_and_gradients(diffusion_pref_loss, PRED_W, PRED_L, TARGET, r_w, r_l, beta=5000)
    other, expected = value_and_gradients(diffusion_pref_loss, PRED_W, PRED_L, TARGET, beta=5000, **REFS)
    for a, b in ((out.loss.detach(), other.loss.detach()), *zip(grads, expected, strict=True)):
        assert_close(a, b, rtol=1e-12, atol=0)
    for name, value in other.metrics.items():
        assert_close(out.metrics[name], value, rtol=1e-12, atol=0)


def test_numbers_of_weighted_pairs_with_a_target_each():
    w, t_w, r_w = f64([0.5, -0.2]), f64([0.48, -0.25]), f64([0.55, -0.3])
    loser, t_l, r_l = f64([0.1, 0.9]), f64([0.2, 0.8]), f64([0.15, 0.83])
    options = {"ref_w": r_w, "ref_l": r_l, "target_l": t_l, "weight": f64(0.5995904742210)}
    out, (grad_w, grad_l) = value_and_gradients(diffusion_pref_loss, w, loser, t_w, beta=2000, **options)
    close(out.metrics["margin"], 6.3256795030320, 1e-9)
    close(out.loss.detach(), 0.0017881500033)
    close(grad_w, [[0.0214239938038, 0.0535599845095]])
    close(grad_l, [[0.1071199690190, -0.1071199690190]])
    out, (grad_w, _) = value_and_gradients(diffusion_pref_loss, w, loser, t_w, beta=20, half=False, **options)
    close(out.metrics["margin"], 0.1265135900606)
    close(out.loss.detach(), 0.6318897637288)
    close(grad_w, [[0.1123425621052, 0.2808564052631]])
    options.pop("weight")
    close(diffusion_margin(w, loser, t_w, beta=200, **options), [1.055], 1e-12)


# --------------------------------------------------------------------------------------------------- against definitions

SHAPES = [(1,), (3, 5), (2, 1, 1, 1), (2, 3, 37), (3, 4, 33, 32), (2, 4, 72, 72)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
def test_pairs(device, shape, dtype):
    skip_float64_on_cuda(device, dtype)
    pred_w, pred_l, target, target_l, ref_w, ref_l = pairs(shape, dtype, device)
    weight = torch.linspace(-0.5, 2, shape[0], device=device)
    inputs, wide = (pred_w, pred_l, target), [t.cpu().double() for t in (pred_w, pred_l, target)]
    cases = (
        {"ref_w": ref_w, "ref_l": ref_l},
        {"ref_w": ref_w, "ref_l": ref_l, "target_l": target_l, "weight": weight, "half": False, "reduction": "none"},
        {
            "ref_mse_w": diffusion_mse(ref_w, target),
            "ref_mse_l": diffusion_mse(ref_l, target),
            "weight": weight,
            "reduction": "sum",
        },
        {"ref_w": ref_w, "ref_l": ref_l, "negative": True, "reduction": "none"},
    )
    for loss_type in LOSS_TYPES:
        for case in cases:
            options = {**case, "beta": 3.0, "loss_type": loss_type}
            exact = {k: v.cpu().double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            out, grads = value_and_gradients(diffusion_pref_loss, *inputs, **options)
            expected, expected_grads = value_and_gradients(reference.diffusion_pref_loss, *wide, **exact)
            assert out.loss.dtype == (F64 if dtype == F64 else F32)
            assert out.loss.shape == ((shape[0],) if options.get("reduction") == "none" else ())
            tight = dtype == F64
            tolerance = {"rtol": 1e-12 if tight else 2e-6, "atol": 1e-12 if tight else 3e-6}
            assert_close(out.loss.detach().cpu().double(), expected.loss.detach(), **tolerance)
            for name, value in expected.metrics.items():
                assert_close(out.metrics[name].cpu().double(), value, **tolerance)
            for grad, truth, leaf in zip(grads, expected_grads, inputs, strict=False):
                assert grad.dtype == dtype and grad.shape == leaf.shape
                bound = {F64: 1e-12, F32: 5e-6, BF16: 2**-8, F16: 2**-10}[dtype] * max(truth.abs().max().item(), 1e-4)
                assert_close(grad.cpu().double(), truth, rtol=0, atol=bound)
            assert torch.equal(diffusion_pref_loss(*inputs, **options).loss, out.loss)


@each_loss
def test_gradcheck(loss_type):
    pred_w, pred_l, target, target_l, ref_w, ref_l = pairs((3, 2, 5), F64)
    leaves = [pred_w.requires_grad_(), pred_l.requires_grad_()]
    options = {"target_l": target_l, "ref_w": ref_w, "ref_l": ref_l, "weight": f64(0.5, 2, -1), "beta": 0.7}
    for extra in ({}, {"reduction": "none", "negative": True}):
        call = partial(diffusion_pref_loss, target=target, loss_type=loss_type, **options, **extra)
        assert torch.autograd.gradcheck(lambda *sides, call=call: call(*sides).loss, leaves, nondet_tol=0)
    assert torch.autograd.gradcheck(lambda *sides: diffusion_margin(*sides, target, **options), leaves, nondet_tol=0)


def test_one_side_alone_needs_a_gradient(device):
    pred_w, pred_l, target, _, ref_w, ref_l = pairs((2, 3, 4), device=device)
    both = value_and_gradients(diffusion_pref_loss, pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, beta=9.0)[1]
    for side in range(2):
        leaves = [pred_w.clone(), pred_l.clone()]
        leaves[side].requires_grad_()
        diffusion_pref_loss(*leaves, target, ref_w=ref_w.requires_grad_(), ref_l=ref_l, beta=9.0).loss.backward()
        assert torch.equal(leaves[side].grad, both[side]) and leaves[1 - side].grad is None and ref_w.grad is None


@pytest.mark.parametrize("shared", [True, False])
def test_winners_in_the_first_half(device, shared):
    """Bits of the call with both halves, and one gradient for the whole batch."""
    pred_w, pred_l, target, target_l, ref_w, ref_l = pairs((3, 2, 5, 4), device=device)
    options = {"beta": 30.0, "weight": torch.tensor([1.0, 0.5, 2.0], device=device), "negative": True, "loss_type": "hinge"}
    others = {} if shared else {"target_l": target_l}
    out, grads = value_and_gradients(diffusion_pref_loss, pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, **others, **options)
    leaf, targets = torch.cat([pred_w, pred_l]).requires_grad_(), target if shared else torch.cat([target, target_l])
    refs = torch.cat([ref_w, ref_l])
    stacked = diffusion_pref_loss_stacked(leaf, targets, refs, **options)
    stacked.loss.backward()
    assert torch.equal(stacked.loss, out.loss) and torch.equal(leaf.grad, torch.cat(grads))
    assert all(torch.equal(stacked.metrics[name], value) for name, value in out.metrics.items())
    errors = torch.cat([diffusion_mse(ref_w, target), diffusion_mse(ref_l, target if shared else target_l)])
    cached = diffusion_pref_loss_stacked(leaf.detach(), targets, ref_mse=errors, **options)
    assert_close(cached.loss, out.loss.detach(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- numerics


def margin_errors(dtype, distance, change, dims=(4, 64, 64)):
    """Of margins against float64 of the same numbers: ours with predictions of the reference, ours with its errors, and plain
    PyTorch in float32."""
    pred_w, pred_l, target, _, ref_w, ref_l = pairs((6, *dims), dtype, distance=distance, change=change)
    wide = [t.double() for t in (pred_w, pred_l, target)]
    exact = reference.diffusion_margin(*wide, ref_w=ref_w.double(), ref_l=ref_l.double(), beta=5000.0)
    narrow = [t.float() for t in (pred_w, pred_l, target)]
    found = (
        diffusion_margin(pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, beta=5000.0),
        diffusion_margin(pred_w, pred_l, target, diffusion_mse(ref_w, target), diffusion_mse(ref_l, target), beta=5000.0),
        reference.diffusion_margin(*narrow, ref_w=ref_w.float(), ref_l=ref_l.float(), beta=5000.0),
    )
    return [(f.double() - exact).abs().max().item() for f in found], exact.abs().max().item()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_what_cancellation_leaves(dtype):
    """Errors near 1 that differ by a ten thousandth: plain float32 has lost digits of the margin that this keeps."""
    (of_refs, of_errors, plain), size = margin_errors(dtype, distance=1.0, change=1e-4 if dtype == F32 else 1e-2)
    assert size > (0.005 if dtype == F32 else 0.5)
    assert of_refs < 5e-7
    assert of_errors < 2e-4
    assert plain > 1000 * of_refs and plain > 3 * of_errors


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["float32", "bfloat16", "float16", "float64"])
def test_a_policy_that_is_its_reference(device, dtype):
    """Margin exactly 0, loss log 2, and a gradient."""
    skip_float64_on_cuda(device, dtype)
    _, _, target, _, ref_w, ref_l = pairs((4, 3, 50), dtype, device)
    out, grads = value_and_gradients(
        diffusion_pref_loss, ref_w, ref_l, target, ref_w=ref_w, ref_l=ref_l, beta=5000.0, reduction="none"
    )
    assert out.metrics["margin"] == 0 and out.metrics["accuracy"] == 0
    close(out.loss.detach(), [math.log(2)] * 4, 1e-7)
    assert all(grad.abs().amax() > 0 for grad in grads)


@each_loss
def test_far_apart(device, loss_type):
    """A huge beta: no overflow, and no gradient where nothing is left to learn."""
    pred_w, pred_l, target, _, ref_w, ref_l = pairs((2, 6, 6), device=device)
    pred_w, pred_l = torch.stack([target[0], pred_w[1] + 3]), torch.stack([pred_l[0] + 3, target[1]])  # won, lost
    options = {"ref_w": ref_w, "ref_l": ref_l, "reduction": "none", "loss_type": loss_type}
    out, grads = value_and_gradients(diffusion_pref_loss, pred_w, pred_l, target, beta=1e8, **options)
    assert out.loss.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    if loss_type != "ipo":
        assert out.loss[0] == 0 and out.loss[1] > 1e8 and not grads[0][0].any() and grads[0][1].any()


def test_hinge_at_its_corner():
    """Margin exactly 1: no gradient."""
    one, zero = torch.ones(1, 4, dtype=F64), torch.zeros(1, 4, dtype=F64)
    out, grads = value_and_gradients(
        diffusion_pref_loss, zero, one, zero, ref_w=zero, ref_l=zero, beta=1.0, half=False, loss_type="hinge"
    )
    assert out.metrics["margin"] == 1 and out.loss == 0 and not grads[0].any() and not grads[1].any()


@each_loss
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
def test_what_is_not_finite_shows(device, loss_type, bad):
    """In the loss of its pair, on whichever side; the others keep theirs."""
    inputs = pairs((3, 40), device=device)
    options = {"beta": 4.0, "reduction": "none", "loss_type": loss_type}
    clean = diffusion_pref_loss(*inputs[:3], ref_w=inputs[4], ref_l=inputs[5], **options).loss
    for side in (0, 1, 4, 5):
        broken = [t.clone() for t in inputs]
        broken[side][1, 7] = bad
        out, grads = value_and_gradients(
            diffusion_pref_loss, broken[0], broken[1], broken[2], ref_w=broken[4], ref_l=broken[5], **options
        )
        assert out.loss.isnan().tolist() == [False, True, False]
        assert torch.equal(out.loss[[0, 2]], clean[[0, 2]]) and out.metrics["margin"].isnan()
        assert grads[0][1].isnan().all() and grads[0][[0, 2]].isfinite().all()


def test_weight_zero_is_no_update(device):
    pred_w, pred_l, target, _, ref_w, ref_l = pairs((2, 30), device=device)
    out, grads = value_and_gradients(
        diffusion_pref_loss, pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, beta=100.0, reduction="none",
        weight=torch.tensor([0.0, 1.0], device=device),
    )  # fmt: skip
    close(out.loss.detach()[0], math.log(2), 1e-7)
    assert not grads[0][0].any() and not grads[1][0].any() and grads[0][1].any()
    negated = diffusion_pref_loss(
        pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, beta=9.0, weight=-torch.ones(2, device=device)
    )
    exchanged = diffusion_pref_loss(pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, beta=9.0, negative=True)
    assert torch.equal(negated.loss, exchanged.loss)


@each_loss
def test_invariants(device, loss_type):
    """Exchanging the sides and setting negative changes nothing; shared weights of winners and losers add up to 0."""
    pred_w, pred_l, target, _, ref_w, ref_l = pairs((4, 70), device=device)
    options = {"beta": 20.0, "loss_type": loss_type}
    one, grads = value_and_gradients(diffusion_pref_loss, pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, **options)
    other, exchanged = value_and_gradients(
        diffusion_pref_loss, pred_l, pred_w, target, ref_w=ref_l, ref_l=ref_w, negative=True, **options
    )
    assert torch.equal(one.loss, other.loss) and torch.equal(grads[0], exchanged[1]) and torch.equal(grads[1], exchanged[0])
    of_w, of_l = grads[0] / (pred_w - target), grads[1] / (pred_l - target)
    assert_close(of_w.mean(1), -of_l.mean(1), rtol=1e-5, atol=1e-9)


def test_bits_do_not_depend_on_threads(threads):
    inputs = pairs((3, 4, 90, 90))
    options = {"ref_w": inputs[4], "ref_l": inputs[5], "beta": 40.0}
    x, clean = torch.randn(3, 4, 90, 90), torch.randn(3, 4, 90, 90)
    found = []
    for count in (1, 2, 3):
        threads(count)
        out, grads = value_and_gradients(diffusion_pref_loss, *inputs[:3], **options)
        leaf = inputs[0].clone().requires_grad_()
        x0 = x0_regression_loss(leaf, x, clean, 0.8, 0.6)
        x0.backward()
        step = ddim_invert_step(x, clean, c1=0.5, c2=0.25)
        found.append([out.loss.detach(), *out.metrics.values(), *grads, diffusion_mse(x, clean), x0.detach(), leaf.grad, step])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# -------------------------------------------------------------------------------------------------------------- layouts


def as_channels_last(t):
    return t.to(memory_format=torch.channels_last)


LAYOUTS = {
    "channels last": as_channels_last,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every other row": lambda t: torch.stack([t, torch.full_like(t, NAN)], 1)[:, 0],
    "channels last, every other row": lambda t: (
        as_channels_last(torch.cat([t, torch.full_like(t, NAN)], 1)[:, : t.shape[1]])
        if t.shape[0] == 1
        else torch.stack([as_channels_last(t).permute(0, 2, 3, 1)] * 2, 1)[:, 1].permute(0, 3, 1, 2)
    ),
}
MIXED = {
    "predictions": lambda ts: [as_channels_last(t) if i < 2 else t for i, t in enumerate(ts)],
    "targets": lambda ts: [as_channels_last(t) if i == 2 else t for i, t in enumerate(ts)],
    "gaps between elements": lambda ts: [torch.stack([t, torch.full_like(t, NAN)], -1)[..., 0] for t in ts],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_lie_as_they_like(device, layout, op_log):
    """Read where they lie, and gradients come in the same order."""
    inputs = [LAYOUTS[layout](t) for t in pairs((3, 4, 6, 5), device=device)]
    pred_w, pred_l, target, _, ref_w, ref_l = inputs
    dense = [t.contiguous() for t in inputs]
    out, grads = value_and_gradients(diffusion_pref_loss, pred_w, pred_l, target, ref_w=ref_w, ref_l=ref_l, beta=9.0)
    expected, expected_grads = value_and_gradients(diffusion_pref_loss, *dense[:3], ref_w=dense[4], ref_l=dense[5], beta=9.0)
    assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
    for grad, truth in zip(grads, expected_grads, strict=True):
        assert_close(grad, truth, rtol=1e-5, atol=1e-9)
    first = next(args for name, args in op_log.calls if name == "diffusion_pair_loss_fwd")
    given = [target.data_ptr(), ref_w.data_ptr(), ref_l.data_ptr()]
    assert [first[i].data_ptr() for i in (2, 4, 5)] == given  # not copied
    if "channels" in layout:
        assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads)


@pytest.mark.parametrize("mixed", MIXED)
def test_latents_that_lie_differently(device, mixed):
    plain = pairs((3, 4, 6, 5), device=device)
    inputs = MIXED[mixed](plain)
    out, grads = value_and_gradients(diffusion_pref_loss, *inputs[:3], ref_w=inputs[4], ref_l=inputs[5], beta=9.0)
    expected, truth = value_and_gradients(diffusion_pref_loss, *plain[:3], ref_w=plain[4], ref_l=plain[5], beta=9.0)
    assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
    for a, b in zip(grads, truth, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_expanded_and_narrower_latents(device):
    """A target for all pairs; a bfloat16 policy beside a float32 target: the widest dtype is computed in."""
    pred_w, pred_l, target, _, ref_w, ref_l = pairs((3, 2, 8), device=device)
    shared = target[:1].expand(3, -1, -1)
    a = diffusion_pref_loss(pred_w, pred_l, shared, ref_w=ref_w, ref_l=ref_l, beta=3.0)
    b = diffusion_pref_loss(pred_w, pred_l, shared.contiguous(), ref_w=ref_w, ref_l=ref_l, beta=3.0)
    assert torch.equal(a.loss, b.loss)
    low_w, low_l = pred_w.bfloat16(), pred_l.bfloat16()
    out, grads = value_and_gradients(diffusion_pref_loss, low_w, low_l, target, ref_w=ref_w, ref_l=ref_l, beta=3.0)
    wide, truth = value_and_gradients(
        diffusion_pref_loss, low_w.float(), low_l.float(), target, ref_w=ref_w, ref_l=ref_l, beta=3.0
    )
    assert torch.equal(out.loss, wide.loss)
    for grad, expected in zip(grads, truth, strict=True):
        assert grad.dtype == BF16 and torch.equal(grad, expected.bfloat16())


def test_memory_is_a_few_numbers_a_pair(device, allocations):
    inputs = pairs((4, 4, 64, 64), device=device)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    used = allocations(lambda: diffusion_pref_loss(*leaves, inputs[2], ref_w=inputs[4], ref_l=inputs[5], beta=9.0))
    assert used.peak < 16384 < inputs[0].numel() * 4
    gradient = allocations(lambda: torch.autograd.grad(used.result.loss, leaves))
    assert gradient.largest <= 2 * inputs[0].numel() * 4 + 4096


# ------------------------------------------------------------------------------------------------------- clean latents

ALPHA, SIGMA = f64(0.9, 0.5), f64(0.3, 0.8)


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
@each_dtype
def test_regression_of_clean_latents(device, loss_type, dtype):
    skip_float64_on_cuda(device, dtype)
    for shape in ((2, 3), (2, 4, 70, 65)):
        pred, x, clean = (torch.randn(shape).to(device, dtype) for _ in range(3))
        for reduction in ("mean", "none", "sum"):
            options = {"loss_type": loss_type, "c": 0.05, "reduction": reduction}
            leaves = [t.detach().clone().requires_grad_() for t in (pred, pred.cpu().double())]
            loss = x0_regression_loss(leaves[0], x, clean, ALPHA, SIGMA, **options)
            wide = [t.cpu().double() for t in (x, clean)]
            expected = reference.x0_regression_loss(leaves[1], *wide, ALPHA, SIGMA, **options)
            tight = dtype == F64
            assert_close(loss.detach().cpu().double(), expected.detach(), rtol=1e-12 if tight else 2e-6, atol=0)
            loss.sum().backward()
            expected.sum().backward()
            bound = {F64: 1e-12, F32: 5e-6, BF16: 2**-8, F16: 2**-10}[dtype] * leaves[1].grad.abs().max().item()
            assert leaves[0].grad.dtype == dtype
            assert_close(leaves[0].grad.cpu().double(), leaves[1].grad, rtol=0, atol=bound)


def test_gradcheck_of_clean_latents():
    pred, x, clean = (torch.randn(2, 3, 2, dtype=F64) for _ in range(3))
    for options in ({}, {"loss_type": "l2", "reduction": "none"}):
        call = partial(x0_regression_loss, x=x, target=clean, alpha=ALPHA, sigma=SIGMA, c=0.1, **options)
        assert torch.autograd.gradcheck(call, pred.requires_grad_(), nondet_tol=0)


def test_small_residuals_keep_their_digits():
    """Far below c sqrt(y^2 + c^2) - c cancels in float32; its other form does not."""
    x, zero = torch.full((1, 64), 1e-5), torch.zeros(1, 64)
    loss = x0_regression_loss(zero, x, zero, 1.0, 0.0, c=1.0)
    assert_close(loss.double(), f64(0.5e-10).squeeze(), rtol=1e-5, atol=0)


def test_channels_last_clean_latents(device):
    pred, x, clean = (torch.randn(2, 3, 4, 5, device=device) for _ in range(3))
    leaf = as_channels_last(pred).requires_grad_()
    x0_regression_loss(leaf, as_channels_last(x), clean, ALPHA, SIGMA).backward()
    plain = pred.clone().requires_grad_()
    x0_regression_loss(plain, x, clean, ALPHA, SIGMA).backward()
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    assert_close(leaf.grad, plain.grad, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------------ steps


@each_dtype
def test_steps(device, dtype):
    skip_float64_on_cuda(device, dtype)
    c1, c2 = f64(1.25, 0.5), f64(-0.125, 0)
    for shape in ((2, 1), (2, 3, 50, 50)):
        x, e1, e2 = (torch.randn(shape).to(device, dtype) for _ in range(3))
        for second in (None, e2):
            out = ddim_invert_step(x, e1, second, c1=c1, c2=c2)
            wide = [None if t is None else t.cpu().double() for t in (x, e1, second)]
            expected = reference.ddim_invert_step(*wide, c1=c1, c2=c2)
            assert out.dtype == dtype and not out.requires_grad
            bound = {F64: 1e-15, F32: 3e-7, BF16: 2**-6, F16: 2**-9}[dtype]
            assert_close(out.cpu().double(), expected, rtol=bound, atol=bound)
    e1[1] = e2[1] = NAN  # where the coefficient is 0 nothing is read
    assert ddim_invert_step(x, e1, e2, c1=c1, c2=c2)[1].isfinite().all()
    last = as_channels_last(x)
    assert ddim_invert_step(last, e1, c1=1.0, c2=0.0).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ddim_invert_step(last, e1, c1=1.0, c2=0.0), x)


def test_coefficients_of_a_schedule():
    abar = scaled_linear_abar()
    close(abar[[0, 1, 101, 201]], [0.99915, 0.998296027838, 0.892980537081, 0.752143401636], 1e-12)
    close(abar[[279, 199, 599]], [0.625729392010, 0.755238361158, 0.161752515005], 1e-12)
    c1, c2 = ddim_coefficients(abar, torch.tensor([201, 101]), torch.tensor([101, 1]))
    a, s = abar.sqrt(), (1 - abar).sqrt()
    close(c1, [a[201] / a[101], a[101] / a[1]], 1e-15)
    close(c2, [s[201] - a[201] * s[101] / a[101], s[101] - a[101] * s[1] / a[1]], 1e-15)
    x0, e = torch.randn(2, 5, dtype=F64), torch.randn(2, 5, dtype=F64)
    there = ddim_invert_step(a[101] * x0 + s[101] * e, e, c1=c1[0], c2=c2[0])
    assert_close(there, a[201] * x0 + s[201] * e, rtol=1e-13, atol=1e-14)
    assert ddim_coefficients(abar.float(), 5, 0)[0].dtype == F64


# ---------------------------------------------------------------------------------------------------------------- balance


def test_balanced_losses(device):
    losses = torch.tensor([0.7, 0.2, 0.1], device=device, requires_grad=True)
    out = alb_combine(losses)
    close(out.weights, [0.7, 0.2, 0.1], 1e-7)
    close(out.loss.detach(), 0.49 + 0.04 + 0.01, 1e-7)
    out.loss.backward()
    assert torch.equal(losses.grad, out.weights)  # constants
    parts = alb_combine([losses.detach()[0], losses.detach()[1:2], losses.detach()[2]])
    assert torch.equal(parts.loss, out.loss.detach())
    for nothing in (torch.zeros(4, device=device), torch.zeros(4, device=device) * 5):
        assert alb_combine(nothing).weights.tolist() == [0.25] * 4 and alb_combine(nothing).loss == 0
    close(alb_combine(losses.detach(), eps=1.0).weights, [0.35, 0.1, 0.05], 1e-7)
    leaf = f64(0.7, 0.2, 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: alb_combine(x, detach=False).loss, leaf)


def balanced_on_ranks(rank):
    losses = torch.tensor([[1.0, 3.0], [2.0, 4.0]], dtype=F64)[rank].requires_grad_()
    out = alb_combine(losses, group="world")
    out.loss.backward()
    return out.loss.detach(), out.weights, losses.grad


@pytest.mark.slow
def test_balance_over_ranks():
    for rank, (loss, weights, grad) in enumerate(run_ranks(balanced_on_ranks, 2)):
        close(weights, [0.3, 0.7], 1e-15)
        close(loss, [0.3 * 1 + 0.7 * 3, 0.3 * 2 + 0.7 * 4][rank], 1e-15)
        assert torch.equal(grad, weights)


# ------------------------------------------------------------------------------------------------------------ as ops


def test_ops():
    for dtype in (F32, F64):
        w, loser, target, target_l, ref_w, ref_l = pairs((2, 7), dtype)
        leaves = w.requires_grad_(), loser.requires_grad_()
        options = (0, 0, 5.0, 2.5, False)
        opcheck(OPS.diffusion_pair_loss.default, (*leaves, target, target_l, ref_w, ref_l, None, None, None, *options))
        numbers = torch.rand(2), torch.rand(2, dtype=F64), torch.rand(2)
        opcheck(OPS.diffusion_pair_loss.default, (*leaves, target, None, None, None, *numbers, 1, 2, 5.0, 5.0, True))
        opcheck(
            OPS.diffusion_pair_loss_fwd.default,
            (w.detach(), loser.detach(), target, None, ref_w, ref_l, None, None, None, *options),
        )
        real = F64 if dtype == F64 else F32
        backward = (torch.ones((), dtype=real), torch.ones(2, dtype=real), w.detach(), loser.detach(), target, None)
        opcheck(OPS.diffusion_pair_loss_backward.default, (*backward, 0, 3 if dtype == F64 else 1))
        opcheck(OPS.diffusion_mse.default, (w.detach(), target))
        coefficients = torch.rand(3, 2, dtype=F64)
        opcheck(OPS.x0_loss.default, (leaves[0], target, target_l, coefficients[:2], 0, 0, 0.1))
        opcheck(OPS.x0_loss_fwd.default, (w.detach(), target, target_l, coefficients[:2], 1, 2, 0.1))
        grad = (torch.ones((), dtype=real), w.detach(), target, target_l, coefficients[:2], 0, 0, 0.1)
        opcheck(OPS.x0_loss_backward.default, grad)
        opcheck(OPS.ddim_invert_step.default, (w.detach(), target, target_l, coefficients))


def test_compiles_as_one_graph():
    def train(w, loser, target, ref_w, ref_l, x):
        loss = diffusion_pref_loss(w, loser, target, ref_w=ref_w, ref_l=ref_l, beta=9.0, weight=x[:, 0, 0, 0]).loss
        stacked = diffusion_pref_loss_stacked(torch.cat([w, loser]), target, torch.cat([ref_w, ref_l]), beta=3.0)
        clean = x0_regression_loss(w, x, target, 0.8, 0.6)
        step = ddim_invert_step(x, target, c1=0.5, c2=0.25)
        balanced = alb_combine(torch.stack([loss, stacked.loss, clean]))
        return balanced.loss + step.mean() + stacked.metrics["mse_w"]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train, fullgraph=True, dynamic=True, backend=counter)
    for shape, layout in (((2, 3, 4, 5), lambda t: t), ((5, 3, 6, 8), lambda t: t), ((2, 3, 4, 5), as_channels_last)):
        w, loser, target, _, ref_w, ref_l = (layout(t) for t in pairs(shape))
        x = layout(torch.randn(shape))
        results = []
        for function in (train, compiled):
            leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (w, loser)]
            loss = function(*leaves, target, ref_w, ref_l, x)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 3


def test_no_second_derivative():
    w, loser, target, _, ref_w, ref_l = pairs((2, 3), F64)
    w.requires_grad_()
    loss = diffusion_pref_loss(w, loser, target, ref_w=ref_w, ref_l=ref_l, beta=1.0).loss
    (grad,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match="diffusion_pair_loss_backward cannot be differentiated twice"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(x0_regression_loss(w, target, target, 1.0, 1.0), w, create_graph=True)
    with pytest.raises(RuntimeError, match="x0_loss_backward cannot be differentiated twice"):
        grad.sum().backward()


def test_without_gradients_nothing_is_kept(op_log):
    w, loser, target, _, ref_w, ref_l = pairs((2, 3))
    with torch.no_grad():
        out = diffusion_pref_loss(w.requires_grad_(), loser, target, ref_w=ref_w, ref_l=ref_l, beta=1.0)
    assert not out.loss.requires_grad and op_log.names() == ["diffusion_pair_loss_fwd"]
    with torch.inference_mode():
        assert not diffusion_margin(w, loser, target, ref_w=ref_w, ref_l=ref_l, beta=1.0).requires_grad


# ------------------------------------------------------------------------------------------------------------- refusals

A, ONE = torch.zeros(2, 3, 4), torch.ones(2)
GIVEN = {"pred_w": A, "pred_l": A, "target": A, "ref_w": A, "ref_l": A, "beta": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred_w": [1.0]}, TypeError, "pred_w is a list; a torch.Tensor is expected"),
        ({"pred_l": torch.zeros(2, 4, 3)}, ValueError, r"pred_l has shape \[2, 4, 3\]; pred_w has shape \[2, 3, 4\]"),
        ({"target": torch.zeros(1, 3, 4)}, ValueError, r"target has shape \[1, 3, 4\]"),
        ({"target_l": torch.zeros(2, 12)}, ValueError, r"target_l has shape \[2, 12\]"),
        ({"ref_w": torch.zeros(2)}, ValueError, r"ref_w has shape \[2\]"),
        ({"ref_l": "x"}, TypeError, "ref_l is a str"),
        ({"ref_w": None, "ref_l": None}, ValueError, "no reference given; either the reference's predictions of both sides"),
        ({"ref_l": None}, ValueError, "ref_w given; either"),
        ({"ref_mse_w": ONE, "ref_mse_l": ONE}, ValueError, "ref_w, ref_l, ref_mse_w, ref_mse_l given; either"),
        ({"ref_w": None, "ref_mse_w": ONE}, ValueError, "ref_l, ref_mse_w given; either"),
        ({"ref_w": None, "ref_l": None, "ref_mse_w": ONE, "ref_mse_l": torch.ones(3)},
         ValueError, r"ref_mse_l has shape \[3\]; expected \[2\]"),
        ({"ref_w": None, "ref_l": None, "ref_mse_w": ONE, "ref_mse_l": ONE * NAN},
         ValueError, r"ref_mse_l\[0\] is nan; it must be finite"),
        ({"weight": torch.ones(2, 1)}, ValueError, r"weight has shape \[2, 1\]; expected \[2\]"),
        ({"weight": torch.tensor([1.0, INF])}, ValueError, r"weight\[1\] is inf; it must be finite"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, TypeError, "weight has dtype Long"),
        ({"weight": 1.0}, TypeError, "weight is a float"),
        ({"beta": 0.0}, ValueError, "beta is 0; it must be finite and positive"),
        ({"beta": INF}, ValueError, "beta is inf"),
        ({"beta": "big"}, TypeError, "beta is 'big'; a number is expected"),
        ({"loss_type": "sigmiod"},
         ValueError, "loss_type is 'sigmiod'; accepted: 'sigmoid', 'hinge', 'ipo'.*did you mean 'sigmoid'"),
        ({"loss_type": "margin"}, ValueError, "loss_type is 'margin'; accepted"),
        ({"reduction": "batch"}, ValueError, "reduction is 'batch'; accepted: 'mean', 'sum', 'none'"),
        ({name: torch.zeros(0, 3) for name in ("pred_w", "pred_l", "target", "ref_w", "ref_l")}, ValueError, "empty batch"),
        ({name: torch.zeros(2, 0) for name in ("pred_w", "pred_l", "target", "ref_w", "ref_l")},
         ValueError, "latents without elements"),
        ({name: torch.zeros(()) for name in ("pred_w", "pred_l", "target", "ref_w", "ref_l")},
         ValueError, r"pred_w has shape \[\]"),
        ({name: A.long() for name in ("pred_w", "pred_l", "target", "ref_w", "ref_l")}, TypeError, "pred_w has dtype Long"),
        ({"target": A.to("meta")}, ValueError, "target is on meta but pred_w is on cpu"),
    ],
)  # fmt: skip
def test_pairs_refused(change, error, message):
    with pytest.raises(error, match=message):
        diffusion_pref_loss(**{**GIVEN, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_pred": torch.zeros(3, 4)}, r"model_pred has shape \[3, 4\]; \[2B, ...\] is expected, winners first"),
        ({"model_pred": torch.zeros(0, 4)}, r"model_pred has shape \[0, 4\]"),
        ({"target": torch.zeros(1, 4)}, r"target has shape \[1, 4\]; model_pred has shape \[4, 4\].*or half as many rows"),
        (
            {"ref_pred": torch.zeros(2, 4)},
            r"ref_pred has shape \[2, 4\]; model_pred has shape \[4, 4\], so the same is expected$",
        ),
        ({"ref_pred": None}, "no reference given"),
        ({"ref_mse": torch.ones(4)}, "ref_w, ref_l, ref_mse_w, ref_mse_l given"),
        ({"ref_pred": None, "ref_mse": torch.ones(2)}, r"ref_mse has shape \[2\]; \[4\] is expected"),
        ({"weight": torch.ones(4)}, r"weight has shape \[4\]; expected \[2\]"),
    ],
)
def test_stacked_pairs_refused(change, message):
    given = {"model_pred": torch.zeros(4, 4), "target": torch.zeros(4, 4), "ref_pred": torch.zeros(4, 4), "beta": 1.0}
    with pytest.raises(ValueError, match=message):
        diffusion_pref_loss_stacked(**{**given, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diffusion_mse(A, ONE), ValueError, r"target has shape \[2\]; pred has shape \[2, 3, 4\]"),
        (lambda: x0_regression_loss(A, A, ONE, 1.0, 1.0), ValueError, r"target has shape \[2\]"),
        (lambda: x0_regression_loss(A, A, A, 1.0, 1.0, c=0.0), ValueError, "c is 0; it must be finite and positive"),
        (lambda: x0_regression_loss(A, A, A, 1.0, 1.0, loss_type="l1"),
         ValueError, "loss_type is 'l1'; accepted: 'huber', 'l2'"),
        (lambda: x0_regression_loss(A, A, A, torch.ones(3), 1.0), ValueError, r"alpha has shape \[3\]; \[2\] is expected"),
        (lambda: ddim_invert_step(A, ONE, c1=1.0, c2=1.0), ValueError, r"e1 has shape \[2\]"),
        (lambda: ddim_invert_step(A, A, ONE, c1=1.0, c2=1.0), ValueError, r"e2 has shape \[2\]"),
        (lambda: ddim_invert_step(A, A, c1=1.0, c2="x"), TypeError, "c2 is 'x'; a number or a torch.Tensor is expected"),
        (lambda: ddim_coefficients(torch.tensor([0.9, 0.5]), 2, 0), ValueError, "to is 2; the schedule has levels 0 to 1"),
        (lambda: ddim_coefficients(torch.tensor([0.9, 0.5]), 1, -1), ValueError, "frm is -1"),
        (lambda: ddim_coefficients(torch.tensor([0.9, 0.5]), torch.tensor(0.5), 0),
         TypeError, "to has dtype float32; integers"),
        (lambda: ddim_coefficients(torch.tensor([0.9, 0.0]), 1, 0), ValueError, r"abar\[1\] is 0.0; it must be greater than 0"),
        (lambda: ddim_coefficients(torch.tensor([0.5, 0.75]), 1, 0),
         ValueError, r"abar\[1\] is 0.75 after 0.5; it must not ascend"),
        (lambda: ddim_coefficients(torch.ones(2, 2), 1, 0), ValueError, r"abar has shape \[2, 2\]; \[T\] is expected"),
        (lambda: ddim_coefficients(torch.ones(2).long(), 1, 0), TypeError, "abar has dtype int64"),
        (lambda: alb_combine([]), ValueError, "losses is empty"),
        (lambda: alb_combine(torch.ones(2, 2)), ValueError, r"losses has shape \[2, 2\]; \[K\] is expected"),
        (lambda: alb_combine([torch.ones(2)]), ValueError, r"losses\[0\] has shape \[2\]; one element is expected"),
        (lambda: alb_combine([1.0]), TypeError, r"losses\[0\] is a float"),
        (lambda: alb_combine(torch.tensor([1.0, NAN])),
         ValueError, r"losses is \[1.0, nan\]; they must be finite and not negative"),
        (lambda: alb_combine(torch.tensor([1.0, -1.0])), ValueError, "must be finite and not negative"),
        (lambda: alb_combine(torch.ones(2), eps=-1.0), ValueError, "eps is -1.0; it must be finite and not negative"),
        (lambda: alb_combine(torch.ones(2).long()), TypeError, "losses has dtype int64"),
        (lambda: alb_combine(torch.ones(2), group="world"), ValueError, "torch.distributed is not initialised"),
    ],
)  # fmt: skip
def test_others_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


ROWS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.diffusion_pair_loss(*[ROWS] * 3, None, ROWS, ROWS, None, None, None, 4, 0, 1.0, 1.0, False), "kind is 4"),
        (lambda: OPS.diffusion_pair_loss(*[ROWS] * 3, None, ROWS, ROWS, None, None, None, 0, 3, 1.0, 1.0, False),
         "reduction is 3"),
        (lambda: OPS.diffusion_pair_loss(*[ROWS] * 3, None, ROWS, ROWS, None, None, None, 0, 0, 1.0, -1.0, False),
         "factor is -1"),
        (lambda: OPS.diffusion_pair_loss(*[ROWS] * 3, None, ROWS, None, None, None, None, 0, 0, 1.0, 1.0, False),
         "either both"),
        (lambda: OPS.diffusion_pair_loss(A, A, A, None, A, A, None, None, None, 0, 0, 1.0, 1.0, False), r"expected \[B, D\]"),
        (lambda: OPS.diffusion_pair_loss(ROWS, ROWS.double(), ROWS, None, ROWS, ROWS, None, None, None, 0, 0, 1.0, 1.0, False),
         "pred_l has dtype Double; that of pred_w, Float, is expected"),
        (lambda: OPS.diffusion_pair_loss_backward(ONE, ONE, ROWS, ROWS, ROWS, None, 0, 3),
         r"g_loss has shape \[2\]; expected \[\]"),
        (lambda: OPS.diffusion_pair_loss_backward(ONE[0], ONE[:1], ROWS, ROWS, ROWS, None, 0, 3), r"slopes has shape \[1\]"),
        (lambda: OPS.diffusion_pair_loss_backward(ONE[0], ONE, ROWS, ROWS, ROWS, None, 0, 4), "needs is 4"),
        (lambda: OPS.x0_loss(ROWS, ROWS, ROWS, torch.ones(2, 2), 0, 0, 1.0), "coefficients has dtype Float; accepted: float64"),
        (lambda: OPS.x0_loss(ROWS, ROWS, ROWS, torch.ones(3, 2, dtype=F64), 0, 0, 1.0), r"coefficients has shape \[3, 2\]"),
        (lambda: OPS.ddim_invert_step(ROWS, ROWS, None, torch.ones(3, 2, dtype=F64)), r"expected \[2, 2\]"),
    ],
)  # fmt: skip
def test_ops_refuse(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@only_cuda
def test_what_only_the_data_can_tell_on_cuda(device):
    """Weights that are not finite: NaN in their pair."""
    a, weight = torch.randn(2, 8, device=device), torch.tensor([1.0, INF], device=device)
    out = diffusion_pref_loss(a, a + 1, a * 2, ref_w=a, ref_l=a, beta=1.0, weight=weight, reduction="none")
    assert out.loss.isnan().tolist() == [False, True]
    assert ddim_coefficients(scaled_linear_abar(), torch.tensor([1, 1000], device=device), 0)[0].isnan().tolist() == [
        False,
        True,
    ]


@only_cuda
def test_captured_in_a_graph(device):
    inputs = pairs((2, 4, 16, 16), device=device)
    leaves = [t.requires_grad_() for t in inputs[:2]]

    def step():
        loss = diffusion_pref_loss(*leaves, inputs[2], ref_w=inputs[4], ref_l=inputs[5], beta=9.0).loss
        return loss, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_public_names():
    for name in ("diffusion_pref_loss", "diffusion_pref_loss_stacked", "diffusion_margin", "x0_regression_loss", "alb_combine"):
        assert name in prefkern.__all__
        assert re.search(r"\n\s+(Args|Arguments|losses|ref_pred)", getattr(prefkern, name).__doc__)
