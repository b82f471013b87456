"""What the tests of the losses straight from a linear head share."""

import torch
from torch.testing import assert_close

from prefkern.ops import _single_pass

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16]
TOLERANCE = {F64: 1e-12, F32: 3e-6, BF16: 8e-3, F16: 1e-3}  # of gradients: float32 sums, rounded to the dtype
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "token temperature": {"temperature": True},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.3},
    "everything": {"bias": True, "temperature": True, "softcap": 4.0, "logit_scale": 1.7},
}


def names(dtype):
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def leaf(t):
    return t.detach().clone().requires_grad_()


def distance(actual, expected):
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def run(function, hidden, weight, bias=None, upstream=1.0, **arguments):
    """(out, [d_hidden, d_weight, d_bias])"""
    leaves = [leaf(t) for t in (hidden, weight, bias) if t is not None]
    out = function(*leaves[:2], bias=leaves[2] if bias is not None else None, **arguments)
    return out, torch.autograd.grad(out.loss * upstream, leaves)


def assert_same(ours, expected, dtype):
    (out, grads), (e_out, e_grads) = ours, expected
    tolerance = 1e-12 if dtype == F64 else 1e-5
    assert_close(out.loss, e_out.loss, rtol=tolerance, atol=tolerance)
    assert out.metrics.keys() == e_out.metrics.keys()
    for name, value in out.metrics.items():
        assert_close(value, e_out.metrics[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for a, e in zip(grads, e_grads, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert e.norm() > 0
        assert distance(a, e) < TOLERANCE[dtype]


class Passes:
    """Rows that went through each GEMM of the head, by gradient; none of them through linear_logprobs and its backward."""

    def __init__(self, monkeypatch):
        self.logits, self.hidden, self.weight, self.chunks = 0, 0, 0, []
        forward, backward = _single_pass._chunk, _single_pass._chunk_backward

        def spy_forward(x, *rest):
            self.logits += len(x)
            self.chunks.append(len(x))
            return forward(x, *rest)

        def spy_backward(*args):
            self.hidden += len(args[3]) * (args[11] is not None)
            self.weight += len(args[3]) * (args[12] is not None)
            return backward(*args)

        monkeypatch.setattr(_single_pass, "_chunk", spy_forward)
        monkeypatch.setattr(_single_pass, "_chunk_backward", spy_backward)
