"""The CUDA kernels of pairs of denoised latents, of clean latents and of steps between noise levels, compiled for the CPU by
tests/simt, against float64 PyTorch; and the CPU's kernels by the same structs."""

from __future__ import annotations

import pytest
import torch

from prefkern import _C, reference
from simt.harness import GUARD, NAN, close, guards_hold, launches, misaligned, pointer, same_bits_in_every_order, tensor_like

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", TYPES)
# A slice, and rows that need not begin at a multiple of 16 bytes, nor end there.
sizes = pytest.mark.parametrize("size", [(1, 1), (3, 37), (2, 8192), (2, 8192 * 2 + 333)])
METRICS = ("margin", "accuracy", "mse_w", "mse_l", "ref_mse_w", "ref_mse_l")
SLICE = {"cuda": 1 << 13, "cpu": 1 << 14}


def set_rows(rows, tensor):
    rows.data, rows.stride = pointer(tensor), tensor.stride(0)


def set_numbers(numbers, tensor):
    if tensor is not None:
        numbers.data, numbers.wide = pointer(tensor), tensor.dtype == torch.float64


def scratch(device, rows, length, each):
    slices = -(-length // SLICE[device])
    return torch.full((rows * slices * each,), NAN, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)


def pair_loss(module, device, pred_w, pred_l, target, *, target_l=None, refs=None, errors=None, weight=None,
              loss_type="sigmoid", factor=1.0, beta=1.0, negative=False, reduction="mean"):  # fmt: skip
    """Loss, metrics and gradients of upstream 1, 2, ..."""
    rows, length = pred_w.shape
    a = module.DiffusionPairArgs()
    a.rule.kind, a.rule.beta, a.rule.factor = getattr(module.DiffusionKind, loss_type), beta, factor
    a.rule.negative, a.reduction = negative, getattr(module.LatentReduction, reduction)
    a.dtype, a.pairs, a.length = getattr(module.DType, str(pred_w.dtype)[6:]), rows, length
    sides = (pred_w, pred_l, target, target if target_l is None else target_l)
    for name, tensor in zip(("pred_w", "pred_l", "target_w", "target_l"), sides, strict=True):
        set_rows(getattr(a, name), tensor)
    if refs is not None:
        set_rows(a.ref_w, refs[0])
        set_rows(a.ref_l, refs[1])
    else:
        set_numbers(a.ref_error_w, errors[0])
        set_numbers(a.ref_error_l, errors[1])
    set_numbers(a.weight, weight)
    loss = torch.full((rows,) if reduction == "none" else (), NAN)
    metrics, slopes = torch.full((6,), NAN), torch.full((rows,), NAN)
    sums, finished = scratch(device, rows, length, 4)
    a.sums, a.finished = pointer(sums), pointer(finished)
    a.loss, a.metrics, a.slopes = map(pointer, (loss, metrics, slopes))
    getattr(module, f"{device}_diffusion_pairs")(a)

    g, upstream = module.DiffusionGradArgs(), torch.arange(1.0, loss.numel() + 1)
    g.dtype, g.pairs, g.length = a.dtype, rows, length
    for name, tensor in zip(("pred_w", "pred_l", "target_w", "target_l"), sides, strict=True):
        set_rows(getattr(g, name), tensor)
    g.per_pair, g.share = reduction == "none", 1 / rows if reduction == "mean" else 1.0
    grads = [tensor_like(torch.empty(rows, length, dtype=pred_w.dtype)) for _ in range(2)]
    g.slopes, g.upstream, g.grad_w, g.grad_l = map(pointer, (slopes, upstream, *grads))
    getattr(module, f"{device}_diffusion_pairs_backward")(g)
    return {"loss": loss, "metrics": metrics, "grad_w": grads[0], "grad_l": grads[1]}


def pairs(size, dtype, change=0.05):
    target, target_l = torch.randn(size), torch.randn(size)
    refs = [t + 0.3 * torch.randn(size) for t in (target, target_l)]
    preds = [r + change * torch.randn(size) for r in refs]
    return [t.to(dtype) for t in (*preds, target, target_l, *refs)]


def expected(inputs, shared, **options):
    leaves = [t.double().requires_grad_() for t in inputs[:2]]
    wide = [t.double() for t in inputs[2:]]
    out = reference.diffusion_pref_loss(
        *leaves, wide[0], target_l=None if shared else wide[1], ref_w=wide[2], ref_l=wide[3] , **options
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, leaves, torch.arange(1.0, out.loss.numel() + 1).double().view_as(out.loss))
    metrics = torch.stack([out.metrics[name] for name in METRICS])
    return {"loss": out.loss.detach(), "metrics": metrics, "grad_w": grads[0], "grad_l": grads[1]}


def compare(out, truth, dtype):
    close(out["loss"], truth["loss"], atol=3e-6, rtol=3e-6)
    close(out["metrics"], truth["metrics"], atol=3e-6, rtol=3e-6)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for name in ("grad_w", "grad_l"):
        close(out[name], truth[name], atol=bound * max(1e-4, truth[name].abs().max().item()), rtol=0)


@sizes
@each_dtype
@pytest.mark.parametrize("shared", [True, False])
def test_pairs(simt, size, dtype, shared):
    inputs = pairs(size, TYPES[dtype])
    weight = torch.linspace(-0.5, 2, size[0])
    for loss_type, reduction in (("sigmoid", "mean"), ("ipo", "none"), ("hinge", "sum")):
        options = {"loss_type": loss_type, "reduction": reduction, "weight": weight, "negative": shared, "beta": 3.0}
        given = {**options, "factor": 1.5, "target_l": None if shared else inputs[3], "refs": inputs[4:]}
        truth = expected(inputs, shared, **options)
        of_gpu = same_bits_in_every_order(simt, lambda g=given: pair_loss(simt, "cuda", *inputs[:3], **g))
        compare(of_gpu, truth, TYPES[dtype])
        of_cpu = pair_loss(_C, "cpu", *inputs[:3], **given)
        compare(of_cpu, truth, TYPES[dtype])
        for name in ("grad_w", "grad_l"):  # the sums are added up in another order
            close(of_cpu[name], of_gpu[name], atol=1e-9, rtol=2**-7 if dtype != "float32" else 1e-5)


@each_dtype
def test_rows_at_every_alignment(simt, dtype):
    inputs = [misaligned(t, TYPES[dtype]) for t in pairs((3, 75), TYPES[dtype])]
    out = pair_loss(simt, "cuda", *inputs[:3], refs=inputs[4:], factor=1.5, beta=3.0)
    compare(out, expected(inputs, True, beta=3.0), TYPES[dtype])
    dense = pair_loss(
        simt, "cuda", *(t.contiguous() for t in inputs[:3]), refs=[t.contiguous() for t in inputs[4:]], factor=1.5
    )
    assert torch.equal(out["loss"], dense["loss"]) and all(map(guards_hold, inputs))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_errors_instead_of_predictions(simt, wide):
    inputs = pairs((3, 500), torch.float32)
    errors = [reference.diffusion_mse(r.double(), inputs[2].double()).to(wide) for r in inputs[4:]]
    truth = expected(inputs, True, beta=3.0)
    out = same_bits_in_every_order(simt, lambda: pair_loss(simt, "cuda", *inputs[:3], errors=errors, factor=1.5, beta=3.0))
    compare(out, truth, torch.float32)
    compare(pair_loss(_C, "cpu", *inputs[:3], errors=errors, factor=1.5, beta=3.0), truth, torch.float32)
    for module, device in ((simt, "cuda"), (_C, "cpu")):
        a, found = module.DiffusionPairArgs(), torch.full((3,), NAN, dtype=torch.float64)
        a.pairs, a.length = 3, 500
        set_rows(a.pred_w, inputs[4])
        set_rows(a.target_w, inputs[2])
        sums, finished = scratch(device, 3, 500, 4)
        a.sums, a.finished, a.errors = map(pointer, (sums, finished, found))
        getattr(module, f"{device}_diffusion_pairs")(a)
        close(found, errors[0], atol=0, rtol=1e-7)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_is_nan(simt, bad):
    inputs, clean = pairs((3, 40), torch.float32), None
    clean = pair_loss(simt, "cuda", *inputs[:3], refs=inputs[4:], reduction="none")
    for side in (0, 1, 4, 5):
        broken = [t.clone() for t in inputs]
        broken[side][1, 7] = bad
        out = pair_loss(simt, "cuda", *broken[:3], refs=broken[4:], reduction="none")
        assert out["loss"].isnan().tolist() == [False, True, False] and torch.equal(out["loss"][[0, 2]], clean["loss"][[0, 2]])
        assert out["grad_w"][1].isnan().all() and out["grad_l"][[0, 2]].isfinite().all()
    weight = torch.tensor([1.0, bad, 0.0])
    out = pair_loss(simt, "cuda", *inputs[:3], refs=inputs[4:], reduction="none", weight=weight)
    assert out["loss"].isnan().tolist() == [False, True, False] and not out["grad_w"][2].any()


def test_the_reference_itself(simt):
    inputs = pairs((2, 9000), torch.bfloat16)
    out = pair_loss(simt, "cuda", *inputs[4:], inputs[2], refs=inputs[4:], factor=2500.0)
    assert out["metrics"][0] == 0 and out["grad_w"].abs().amax() > 0
    close(out["loss"], torch.tensor(0.6931471805599453), atol=1e-7)


# ------------------------------------------------------------------------------------------------------ clean latents


def x0_loss(module, device, pred, x, target, coefficients, kind, reduction):
    rows, length = pred.shape
    a, g = module.X0LossArgs(), module.X0GradArgs()
    for s in (a, g):
        s.kind, s.c = getattr(module.X0Kind, kind), 0.05
        s.dtype, s.rows, s.length = getattr(module.DType, str(pred.dtype)[6:]), rows, length
        s.coefficients = pointer(coefficients)
        for name, tensor in (("pred", pred), ("x", x), ("target", target)):
            set_rows(getattr(s, name), tensor)
    loss = torch.full((rows,) if reduction == "none" else (), NAN)
    sums, finished = scratch(device, rows, length, 1)
    a.reduction = getattr(module.LatentReduction, reduction)
    a.sums, a.finished, a.loss = map(pointer, (sums, finished, loss))
    getattr(module, f"{device}_x0_loss")(a)
    grad, upstream = torch.full((rows, length), GUARD, dtype=pred.dtype), torch.arange(1.0, loss.numel() + 1)
    g.per_row, g.share = reduction == "none", 1 / rows if reduction == "mean" else 1.0
    g.upstream, g.grad = pointer(upstream), pointer(grad)
    getattr(module, f"{device}_x0_loss_backward")(g)
    return {"loss": loss, "grad": grad}


@sizes
@each_dtype
@pytest.mark.parametrize("kind", ["huber", "l2"])
def test_clean_latents(simt, size, dtype, kind):
    pred, x, target = (torch.randn(size).to(TYPES[dtype]) for _ in range(3))
    alpha, sigma = torch.linspace(0.4, 0.9, size[0]).double(), torch.linspace(0.9, 0.4, size[0]).double()
    coefficients = torch.stack([1 / alpha, -sigma / alpha])
    for reduction in ("mean", "none"):
        leaf = pred.double().requires_grad_()
        truth = reference.x0_regression_loss(
            leaf, x.double(), target.double(), alpha, sigma, loss_type=kind, c=0.05, reduction=reduction
        )
        (grad,) = torch.autograd.grad(truth, leaf, torch.arange(1.0, truth.numel() + 1).double().view_as(truth))
        call = (pred, x, target, coefficients, kind, reduction)
        bound = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10}[dtype] * grad.abs().max().item()
        for out in (
            same_bits_in_every_order(simt, lambda c=call: x0_loss(simt, "cuda", *c)),
            x0_loss(_C, "cpu", *call),
        ):
            close(out["loss"], truth.detach(), atol=0, rtol=3e-6)
            close(out["grad"], grad, atol=bound, rtol=0)


@sizes
@each_dtype
def test_steps(simt, size, dtype):
    x, e1, e2 = (torch.randn(size).to(TYPES[dtype]) for _ in range(3))
    coefficients = torch.randn(3, size[0], dtype=torch.float64)
    coefficients[1:, -1] = 0
    e1[-1] = e2[-1] = NAN  # not read
    wide = [t.double().nan_to_num() for t in (x, e1, e2)]
    for terms in (2, 3):
        truth = sum(c[:, None] * t for c, t in zip(coefficients[:terms], wide[:terms], strict=True))
        for module, device in ((simt, "cuda"), (_C, "cpu")):

            def run(module=module, device=device, terms=terms):
                a, out = module.LatentStepArgs(), tensor_like(torch.empty(size, dtype=TYPES[dtype]))
                a.dtype, a.rows, a.length = getattr(module.DType, dtype), *size
                for name, tensor in zip(("x", "e1", "e2")[:terms], (x, e1, e2), strict=False):
                    set_rows(getattr(a, name), tensor)
                a.coefficients, a.out = pointer(coefficients), pointer(out)
                getattr(module, f"{device}_latent_step")(a)
                return out

            out = same_bits_in_every_order(simt, run) if device == "cuda" else run()
            bound = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-9}[dtype]
            close(out, truth, atol=bound, rtol=bound)


def test_no_rows_launch_nothing(simt):
    def run():
        simt.cuda_diffusion_pairs(simt.DiffusionPairArgs())
        simt.cuda_diffusion_pairs_backward(simt.DiffusionGradArgs())
        simt.cuda_x0_loss(simt.X0LossArgs())
        simt.cuda_x0_loss_backward(simt.X0GradArgs())
        simt.cuda_latent_step(simt.LatentStepArgs())

    assert launches(simt, run) == 0


def test_types_that_a_gpu_has_not(simt):
    a = simt.LatentStepArgs()
    a.dtype, a.rows, a.length = simt.DType.float64, 1, 1
    with pytest.raises(RuntimeError, match="invalid argument"):
        simt.cuda_latent_step(a)
