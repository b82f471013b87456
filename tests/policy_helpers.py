"""What the tests of csrc/policy share: inputs, values with gradients, and the comparison with the float64 definition."""

import math

import pytest
import torch
from torch.testing import assert_close

from prefkern import policy_loss, reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf

only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype, device=actual.device), rtol=0, atol=tolerance)


def value_and_gradient(logp, *args, upstream=1.0, function=policy_loss, **options):
    leaf = logp.detach().clone().requires_grad_()
    out = function(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(out.loss * upstream, leaf)
    return out, gradient


def make(shape=(5, 37), dtype=F32, device="cpu", spread=0.4, per_token=False):
    """logp, old_logp, ref_logp, advantages; about a third of the ratios are outside of [0.8, 1.2]."""
    logp = -3 * torch.rand(shape, dtype=F64)
    old, ref = (logp + spread * torch.randn(shape, dtype=F64) for _ in range(2))
    advantages = torch.randn(shape if per_token else shape[:1], dtype=F64)
    return [t.to(dtype).to(device) for t in (logp, old, ref, advantages)]


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *torch.as_tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def widened(x):
    """Tensors of numbers in float64, others as they are; on the CPU."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().cpu().double() if x.is_floating_point() else x.detach().cpu()


def exactly(logp, old, advantages, mask=None, *, upstream=1.0, **options):
    """The definition, on the same numbers, in float64 on the CPU: LossOutput, gradient."""
    arguments = [widened(x) for x in (logp, old, advantages, mask)]
    options = {name: widened(value) for name, value in options.items()}
    return value_and_gradient(*arguments, upstream=upstream, function=reference.policy_loss, **options)


def compare(logp, old, advantages, mask=None, *, tolerance=None, **options):
    """Ours against the definition, gradient of 3 times the loss included."""
    out, gradient = value_and_gradient(logp, old, advantages, mask, **options)
    expected, expected_gradient = exactly(logp, old, advantages, mask, upstream=3.0, **options)
    _, gradient = value_and_gradient(logp, old, advantages, mask, upstream=3.0, **options)
    tolerance = tolerance or (1e-12 if logp.dtype == F64 else 2e-6)
    close_to(out.loss, expected.loss, tolerance)
    assert list(out.metrics) == list(expected.metrics)
    for name, metric in out.metrics.items():
        assert metric.shape == () and metric.dtype == out.loss.dtype and not metric.requires_grad, name
        assert_close(metric.cpu().double(), expected.metrics[name].double(), rtol=tolerance, atol=tolerance, msg=name)
    assert gradient.shape == logp.shape and gradient.dtype == logp.dtype
    if logp.dtype in (F32, F64):
        largest = expected_gradient.abs().max().item() if logp.numel() else 0.0
        assert_close(gradient.cpu().double(), expected_gradient, rtol=tolerance, atol=tolerance * largest)
    else:
        assert_close(gradient.cpu(), expected_gradient.to(logp.dtype), rtol=2**-7, atol=1e-6)
    return out, gradient


def close_to(actual, expected, tolerance):
    assert_close(actual.detach().cpu().double(), expected.detach().double(), rtol=tolerance, atol=tolerance)


def per_token(logp, old, advantages, **options):
    """Loss and gradient of each token: every one a sequence of its own."""
    out = [
        value_and_gradient(lp.view(1, 1), o.view(1, 1), a.view(1), **options)
        for lp, o, a in zip(logp, old, advantages, strict=True)
    ]
    return torch.stack([o.loss.detach() for o, _ in out]), torch.cat([g.view(1) for _, g in out])
