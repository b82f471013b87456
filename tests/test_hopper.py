"""The head on Hopper: logits folded in registers (stage 2), and a backward over the rows that have a gradient."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern import _C, linear_logprobs, reference

OUTPUTS = ("entropy", "lse")


def test_paths_have_names():
    before = _C.cuda_forward(), _C.cuda_backward()
    for get, put, names in (
        (_C.cuda_forward, _C.set_cuda_forward, ("stage1", "stage2", "auto")),
        (_C.cuda_backward, _C.set_cuda_backward, ("dense", "compact", "auto")),
    ):
        for name in names:
            put(name)
            assert get() == name
        with pytest.raises(ValueError, match=f"'stage3'; accepted: auto, {names[0]}, {names[1]}"):
            put("stage3")
        assert get() == "auto"
    _C.set_cuda_forward(before[0])
    _C.set_cuda_backward(before[1])


def test_paths_change_nothing_on_the_cpu():
    hidden, weight, targets = torch.randn(9, 16).bfloat16(), torch.randn(40, 16).bfloat16(), torch.randint(40, (9,))
    expected = linear_logprobs(hidden, weight, targets, outputs=OUTPUTS)
    with paths("stage2", "compact"):
        out = linear_logprobs(hidden, weight, targets, outputs=OUTPUTS)
    assert torch.equal(out.logp, expected.logp)
    assert torch.equal(out.entropy, expected.entropy)


@contextmanager
def paths(forward: str, backward: str = "dense"):
    before = _C.cuda_forward(), _C.cuda_backward()
    _C.set_cuda_forward(forward)
    _C.set_cuda_backward(backward)
    try:
        yield
    finally:
        _C.set_cuda_forward(before[0])
        _C.set_cuda_backward(before[1])


def on_hopper() -> bool:
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
        and prefkern.build_info()["cutlass"] != ""
    )  # fmt: skip


hopper = [
    pytest.mark.cuda,
    pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9.0 and a build with CUTLASS"),
]


def on_gpu(function):
    for mark in hopper:
        function = mark(function)
    return function


def make(rows, width, vocab, dtype, seed=0, *, ignored=True):
    """Logits of standard deviation 3; every fifth row is ignored; targets in the first and the last column."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    weight = (torch.randn(vocab, width, generator=g) * 3 / width**0.5).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[0], targets[-1] = 0, vocab - 1
    if ignored:
        targets[2::5] = -100
    return hidden.cuda(), weight.cuda(), targets.cuda()


def exactly(hidden, weight, targets, *, bias=None, temperature=1.0, **options):
    """In float64, on the device: the CPU would take minutes."""
    return reference.linear_logprobs(
        hidden.double(),
        weight.double(),
        targets,
        bias=None if bias is None else bias.double(),
        temperature=temperature.double() if isinstance(temperature, torch.Tensor) else temperature,
        outputs=OUTPUTS,
        **options,
    )


def kernels(call) -> list[str]:
    """The names of those that run."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


def takes_stage2(call) -> bool:
    return any("merge_tiles" in name for name in kernels(call))


def close(out, expected, tolerance):
    for name in ("logp", *OUTPUTS):
        actual = getattr(out, name).double()
        assert_close(actual, getattr(expected, name), atol=tolerance, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def same(a, b):
    for name in ("logp", *OUTPUTS):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


OPTIONS = {
    "plain": lambda n, v: {},
    "temperature": lambda n, v: {"temperature": 0.7, "logit_scale": 1.3},
    "rows": lambda n, v: {"temperature": torch.rand(n, device="cuda") + 0.5},
    "bias": lambda n, v: {"bias": torch.randn(v, device="cuda")},
    "softcap": lambda n, v: {"softcap": 4.0, "bias": torch.randn(v, device="cuda")},
}


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"),
    [
        (1, 8, 1), (3, 64, 191), (127, 72, 192), (129, 64, 193), (256, 128, 5003), (513, 1024, 32000),  # ping-pong
        (1, 2056, 1), (129, 2056, 255), (300, 2304, 257), (257, 4096, 5003),  # cooperative
    ],
)  # fmt: skip
def test_values(dtype, options, rows, width, vocab):
    """Around tiles of 128 rows and of 192 and 256 columns, around a step of 64 of the width."""
    hidden, weight, targets = make(rows, width, vocab, dtype)
    options = OPTIONS[options](rows, vocab)
    expected = exactly(hidden, weight, targets, **options)
    with paths("stage2"):
        out = linear_logprobs(hidden, weight, targets, **options, outputs=OUTPUTS)
        again = linear_logprobs(hidden, weight, targets, **options, outputs=OUTPUTS)
    close(out, expected, 2e-5 if width <= 128 else 1e-4)
    same(out, again)
    with paths("stage1"):
        close(linear_logprobs(hidden, weight, targets, **options, outputs=OUTPUTS), expected, 1e-4)


@on_gpu
@pytest.mark.parametrize("width", [256, 2304])
def test_which_calls_take_it(width):
    hidden, weight, targets = make(300, width, 1000, torch.bfloat16)
    lora = (torch.randn(4, width).bfloat16().cuda(), torch.randn(1000, 4).bfloat16().cuda(), 0.5)
    odd = torch.empty(300 * width + 1, dtype=torch.bfloat16, device="cuda")[1:].view(300, width).copy_(hidden)
    with paths("stage2"):
        assert takes_stage2(lambda: linear_logprobs(hidden, weight, targets))
        assert takes_stage2(lambda: linear_logprobs(hidden[::2], weight, targets[::2], outputs=OUTPUTS))
        for call in (
            lambda: linear_logprobs(hidden, weight, targets, outputs=("is_top1",)),
            lambda: linear_logprobs(hidden, weight, targets, lora=lora),
            lambda: linear_logprobs(hidden, weight, targets, logits_dtype="bfloat16"),
            lambda: linear_logprobs(hidden.float(), weight.float(), targets),
            lambda: linear_logprobs(odd, weight, targets),
            lambda: linear_logprobs(hidden[:, :-1], weight[:, :-1], targets),
        ):
            assert not takes_stage2(call)
    for path in ("stage1", "auto"):
        with paths(path):
            assert not takes_stage2(lambda: linear_logprobs(hidden, weight, targets))


@on_gpu
@pytest.mark.parametrize("width", [256, 2304])
def test_bits_of_a_row_depend_on_nothing_else(width):
    """Neither on the chunk that it is in, nor on its neighbours, nor on the stream."""
    hidden, weight, targets = make(1500, width, 5003, torch.bfloat16)
    with paths("stage2"):
        whole = linear_logprobs(hidden, weight, targets, outputs=OUTPUTS)
        same(linear_logprobs(hidden, weight, targets, outputs=OUTPUTS, chunk_bytes=1 << 18), whole)
        part = linear_logprobs(hidden[700:811], weight, targets[700:811], outputs=OUTPUTS)
        for name in ("logp", *OUTPUTS):
            assert torch.equal(getattr(part, name), getattr(whole, name)[700:811])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            elsewhere = linear_logprobs(hidden, weight, targets, outputs=OUTPUTS)
        torch.cuda.current_stream().wait_stream(side)
        same(elsewhere, whole)


@on_gpu
def test_no_logits_reach_memory():
    hidden, weight, targets = make(2048, 512, 64000, torch.bfloat16)
    with paths("stage2"):
        linear_logprobs(hidden, weight, targets)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_logprobs(hidden, weight, targets, outputs=OUTPUTS)
        torch.cuda.synchronize()
    # 3 numbers for each row and tile of 192 columns; outputs, statistics and allocation granularity.
    assert torch.cuda.max_memory_allocated() - before <= 3 * 4 * 2048 * -(-64000 // 192) + (1 << 20)


@on_gpu
def test_what_is_not_finite():
    hidden, weight, targets = make(140, 64, 1000, torch.bfloat16, ignored=False)
    targets[5], hidden[5] = -100, float("nan")
    hidden[7], hidden[131, 3] = float("nan"), float("inf")
    targets[9] = 1000
    with paths("stage2"):
        out = linear_logprobs(hidden, weight, targets, outputs=OUTPUTS)
    bad = torch.tensor([7, 9, 131], device="cuda")
    assert out.logp[bad].isnan().all()
    assert out.logp[5] == 0
    good = torch.ones(140, dtype=torch.bool, device="cuda").index_fill_(0, bad, False)
    assert out.logp[good].isfinite().all()


@on_gpu
@pytest.mark.parametrize("width", [256, 2304])
def test_gradients_go_with_it(width):
    hidden, weight, targets = make(300, width, 3000, torch.bfloat16)
    g = torch.randn(2, 300, device="cuda")

    def gradients(forward):
        with paths(forward):
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = linear_logprobs(x, w, targets, outputs=("entropy",))
            return torch.autograd.grad([out.logp, out.entropy], [x, w], list(g))

    for a, b in zip(gradients("stage2"), gradients("stage1"), strict=True):
        assert (a.double() - b.double()).norm() <= 4e-3 * b.double().norm()


# ------------------------------------------------------------------------------------------------------- active rows


def backward_of(hidden, weight, targets, g, *, backward, bias=None, chunk_bytes=None, **options):
    with paths("stage1", backward):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, *((bias,) if bias is not None else ()))]
        out = linear_logprobs(
            leaves[0], leaves[1], targets, bias=leaves[2] if bias is not None else None, outputs=OUTPUTS,
            chunk_bytes=chunk_bytes, save="recompute", **options,
        )  # fmt: skip
        return torch.autograd.grad([out.logp, out.entropy, out.lse], leaves, list(g))


def wanted(hidden, weight, targets, g, **options):
    leaves = [t.double().requires_grad_() for t in (hidden, weight, *((options["bias"],) if "bias" in options else ()))]
    options = options | ({"bias": leaves[2]} if "bias" in options else {})
    out = exactly(leaves[0], leaves[1], targets, **options)
    return torch.autograd.grad([out.logp, out.entropy, out.lse], leaves, list(g.double()))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("rows", [1, 300, 1111])
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 19])
def test_compact_backward(dtype, options, fraction, rows, chunk_bytes):
    """Rows without an upstream gradient, or ignored, take no part; in one chunk of rows and in several."""
    hidden, weight, targets = make(rows, 136, 1000, dtype)
    options = OPTIONS[options](rows, 1000)
    g = torch.randn(3, rows, device="cuda")
    g[:, torch.rand(rows, device="cuda") >= fraction] = 0
    runs = [backward_of(hidden, weight, targets, g, backward="compact", chunk_bytes=chunk_bytes, **options) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    inactive = (g == 0).all(0) | (targets == -100)
    assert not runs[0][0][inactive].any()
    limit = 8e-3 if dtype == torch.bfloat16 else 2e-3  # the logits' gradient is narrowed for the tensor cores
    for a, e in zip(runs[0], wanted(hidden, weight, targets, g, **options), strict=True):
        assert (a.double() - e).norm() <= limit * e.norm()


@on_gpu
def test_inactive_rows_are_not_looked_at():
    hidden, weight, targets = make(700, 64, 1000, torch.bfloat16, ignored=False)
    g = torch.randn(3, 700, device="cuda")
    g[:, 100:650] = 0
    clean = backward_of(hidden, weight, targets, g, backward="compact")
    hidden[100:650] = float("nan")
    dirty = backward_of(hidden, weight, targets, g, backward="compact")
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@on_gpu
def test_the_number_of_rows_is_the_devices():
    """A captured graph is replayed with other rows; nothing in it waits for the device."""
    hidden, weight, targets = make(900, 128, 2000, torch.bfloat16, ignored=False)
    g = torch.ones(3, 900, device="cuda")
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def step():
        out = linear_logprobs(x, w, targets, outputs=OUTPUTS)
        return torch.autograd.grad([out.logp, out.entropy, out.lse], [x, w], list(g))

    with paths("stage2", "compact"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for active in (0, 1, 255, 256, 257, 900):
            g.zero_()
            g[:, torch.randperm(900, device="cuda")[:active]] = 1
            graph.replay()
            for a, e in zip(captured, wanted(hidden, weight, targets, g), strict=True):
                assert (a.double() - e).norm() <= 8e-3 * e.norm()


# ---------------------------------------------------------------------------------------------------- bounded products


@on_gpu
@pytest.mark.parametrize("product", ["rows_nt", "rows_nn", "depth_tn"])
@pytest.mark.parametrize(("m", "n", "k"), [(8, 8, 8), (300, 136, 200), (1000, 520, 72), (128, 2048, 1024)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_bounded_products(product, m, n, k, accumulate):
    """Every count around a tile, against float64; beyond the bound C is left alone or, in the last tile, as zeros make it."""
    depth = product == "depth_tn"
    size = k if depth else m
    for count in sorted({0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, size - 1, size} & set(range(size + 1))):
        g = torch.Generator("cuda").manual_seed(count)
        a = torch.randn((k, m) if depth else (m, k), generator=g, device="cuda").bfloat16()
        b = torch.randn((n, k) if product == "rows_nt" else (k, n), generator=g, device="cuda").bfloat16()
        a[count:] = 0
        if depth:
            b[count:] = 0
        c = torch.randn(m, n, generator=g, device="cuda")
        before, counted = c.clone(), torch.tensor([count + 1000], device="cuda")
        args = _C.BoundedGemmArgs()
        args.product, args.dtype = getattr(_C.BoundedProduct, product), _C.DType.bfloat16
        args.m, args.n, args.k = m, n, k
        args.a, args.b, args.c = a.data_ptr(), b.data_ptr(), c.data_ptr()
        args.a_stride, args.b_stride, args.c_stride = a.stride(0), b.stride(0), n
        args.count, args.first, args.accumulate = counted.data_ptr(), 1000, accumulate
        _C.cuda_gemm_bounded(args, torch.cuda.current_stream().cuda_stream)
        wide = (a.double().T if depth else a.double()) @ (b.double().T if product == "rows_nt" else b.double())
        expected = wide + before.double() * accumulate
        rows = m if depth else count
        assert_close(c[:rows].double(), expected[:rows], atol=1e-4 * k**0.5, rtol=1e-5)
        end = m if depth else min(-(-count // 256) * 256, m)
        assert torch.equal(c[rows:end], before[rows:end] * accumulate)
        assert torch.equal(c[end:], before[end:])
