"""What linear_logprobs takes beside a head: a low-rank update of it; a type that logits are rounded to; the tokens
that each row may draw."""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import linear_logprobs, reference

ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
SOURCES = ("logp", "entropy", "lse")  # outputs that gradients flow from
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16]
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern
ROWS, VOCAB, WIDTH, RANK = 13, 301, 32, 4


def names(dtype):
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def make(device="cpu", dtype=F32, shape=(ROWS,), vocab=VOCAB, width=WIDTH):
    """hidden, weight, targets; logits of standard deviation 3. Every third row is ignored, every second target best."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    hidden = torch.randn(*shape, width).to(dtype)
    weight = (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, shape)
    targets.view(-1)[::2] = (hidden.double() @ weight.double().mT).argmax(-1).view(-1)[::2]
    targets.view(-1)[1::3] = -100
    return hidden.to(device), weight.to(device), targets.to(device)


def factors(device="cpu", dtype=F32, vocab=VOCAB, width=WIDTH, rank=RANK):
    """a and b of a low-rank update that moves logits by about as much as they are."""
    a, b = torch.randn(rank, width) / width**0.5, torch.randn(vocab, rank) * 2 / rank**0.5
    return a.to(device, dtype), b.to(device, dtype)


OPTIONS = {
    "plain": lambda n, v: {},
    "bias": lambda n, v: {"bias": torch.randn(v)},
    "everything": lambda n, v: {
        "bias": torch.randn(v),
        "temperature": torch.rand(n) + 0.5,
        "softcap": 4.0,
        "logit_scale": 1.7,
    },
}


def options_of(name, device, rows=ROWS, vocab=VOCAB):
    made = OPTIONS[name](rows, vocab)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in made.items()}


def wide(value):
    """In float64 on the CPU, as gradients may be taken of it."""
    if isinstance(value, tuple):
        return tuple(wide(v) for v in value)
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double() if value.is_floating_point() else value.cpu()
    return value


def exactly(hidden, weight, targets, **options):
    """The definition, on the same numbers, in float64 on the CPU."""
    return reference.linear_logprobs(wide(hidden), wide(weight), targets.cpu(), **{k: wide(v) for k, v in options.items()})


def assert_fields(actual, expected, tolerance, rtol=0.0):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert a.shape == e.shape
            near = {"rtol": rtol, "atol": tolerance, "equal_nan": True}
            assert_close(a.detach().cpu().to(e.dtype), e.detach().cpu(), **near, msg=lambda m, n=name: f"{n}: {m}")


def leaf(t):
    return t.detach().clone().requires_grad_()


def gradients(function, tensors, upstream, **options):
    """d (sum over `upstream` of g . output) / d tensors, by name; `lora` is (a, b, scale) of tensors["a"], tensors["b"]."""
    leaves = {name: leaf(t) for name, t in tensors.items()}
    arguments = {name: t for name, t in leaves.items() if name not in ("a", "b")}
    if "a" in leaves:
        arguments["lora"] = (leaves["a"], leaves["b"], options.pop("scale"))
    out = function(**arguments, outputs=ALL, **options)
    fields = [getattr(out, name) for name in upstream]
    grads = [g.to(field.device, field.dtype) for g, field in zip(upstream.values(), fields, strict=True)]
    return dict(zip(leaves, torch.autograd.grad(fields, leaves.values(), grads), strict=True))


def exact_gradients(tensors, upstream, **options):
    options = {k: wide(v) for k, v in options.items()}
    return gradients(reference.linear_logprobs, {k: wide(t) for k, t in tensors.items()}, upstream, **options)


def upstream_of(shape=(ROWS,), sources=SOURCES):
    return {name: torch.randn(shape, dtype=F64) for name in sources}


def distance(actual, expected):
    """Relative error in norm."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


VALUE_TOLERANCE = {F64: 1e-11, F32: 1e-5, BF16: 1e-5, F16: 1e-5}
GRAD_TOLERANCE = {F64: 1e-12, F32: 2e-6, BF16: 4e-3, F16: 6e-4}  # in half precision two roundings at the worst


def loosened(tolerance, dtype, device):
    """On CUDA h a^T is rounded to the inputs' dtype, and so is its gradient."""
    return tolerance if device == "cpu" or dtype == F32 else max(tolerance, {BF16: 3e-2, F16: 4e-3}[dtype])


# ------------------------------------------------------------------------------------------------------- low-rank update


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_lora_values(device, dtype, options, chunk_bytes):
    hidden, weight, targets = make(device, dtype)
    options = {**options_of(options, device), "lora": (*factors(device, dtype), 1.5), "outputs": ALL}
    out = linear_logprobs(hidden, weight, targets, **options, chunk_bytes=chunk_bytes)
    assert_fields(out, exactly(hidden, weight, targets, **options), loosened(VALUE_TOLERANCE[dtype], dtype, device))
    without = linear_logprobs(hidden, weight, targets, **{**options, "lora": None})
    assert (out.logp - without.logp).abs().max() > 0.1


@pytest.mark.parametrize("scale", [2.0, -0.5, 0.0])
def test_lora_is_the_head_of_the_updated_weight(device, scale):
    hidden, weight, targets = make(device)
    a, b = factors(device)
    out = linear_logprobs(hidden, weight, targets, lora=(a, b, scale), outputs=ALL)
    assert_fields(out, linear_logprobs(hidden, weight + scale * b @ a, targets, outputs=ALL), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_lora_gradients(device, dtype, options, chunk_bytes):
    hidden, weight, targets = make(device, dtype)
    a, b = factors(device, dtype)
    options = {**options_of(options, device), "targets": targets, "scale": 1.5}
    tensors = {"hidden": hidden, "weight": weight, "a": a, "b": b}
    if "bias" in options:
        tensors["bias"] = options.pop("bias").to(dtype)
    upstream = upstream_of()
    ours = gradients(linear_logprobs, tensors, upstream, **options, chunk_bytes=chunk_bytes)
    expected = exact_gradients(tensors, upstream, **options)
    for name, g in ours.items():
        assert g.dtype == dtype
        assert g.shape == tensors[name].shape
        assert distance(g, expected[name]) < loosened(GRAD_TOLERANCE[dtype], dtype, device), name


BITS = {"hidden": 1, "weight": 2, "bias": 4, "a": 8, "b": 16}


@pytest.mark.parametrize("trained", [c for n in (1, 2, 5) for c in itertools.combinations(BITS, n)], ids="+".join)
def test_only_needed_gradients_are_computed(device, op_log, trained):
    """With a frozen weight the backward op is not asked for its gradient."""
    hidden, weight, targets = make(device)
    a, b = factors(device)
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.randn(VOCAB, device=device), "a": a, "b": b}

    def run(trained):
        leaves = {name: leaf(t) if name in trained else t for name, t in tensors.items()}
        head = {name: leaves[name] for name in ("hidden", "weight", "bias")}
        linear_logprobs(**head, targets=targets, lora=(leaves["a"], leaves["b"], 0.5)).logp.sum().backward()
        return {name: t.grad for name, t in leaves.items()}

    ours = run(trained)
    assert op_log.args("linear_logprobs_ext_backward")[-2] == sum(BITS[name] for name in trained)
    full = run(BITS)
    for name, g in ours.items():
        if name in trained:
            assert_close(g, full[name], rtol=1e-6, atol=1e-7)
            assert g.norm() > 0
        else:
            assert g is None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 200])
def test_lora_gradcheck(options, chunk_bytes):
    hidden, weight, targets = make("cpu", F64, (5,), 6, 3)
    a, b = factors("cpu", F64, 6, 3, 2)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[options](5, 6).items()}
    leaves = [leaf(t) for t in (hidden, weight, a, b)] + ([leaf(options.pop("bias"))] if "bias" in options else [])

    def function(hidden, weight, a, b, bias=None):
        out = linear_logprobs(
            hidden, weight, targets, bias=bias, lora=(a, b, 0.7), outputs=ALL, chunk_bytes=chunk_bytes, **options
        )
        return out.logp, out.entropy, out.lse

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("chunk_bytes", [1, 500, 5000, 50_000, 1 << 40])
def test_lora_does_not_depend_on_the_chunk(device, dtype, chunk_bytes):
    hidden, weight, targets = make(device, dtype, vocab=130, width=8)
    a, b = factors(device, dtype, 130, 8)
    tensors = {"hidden": hidden, "weight": weight, "a": a, "b": b}
    upstream = upstream_of()
    base, out = (
        linear_logprobs(hidden, weight, targets, lora=(a, b, 1.5), outputs=ALL, chunk_bytes=n) for n in (None, chunk_bytes)
    )
    assert_fields(out, base, loosened(1e-12 if dtype == F64 else 3e-6, dtype, device))
    x, y = (
        gradients(linear_logprobs, tensors, upstream, targets=targets, scale=1.5, chunk_bytes=n) for n in (None, chunk_bytes)
    )
    for name in tensors:
        assert distance(x[name], y[name]) < loosened(GRAD_TOLERANCE[dtype], dtype, device), name


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("chunk_bytes", [None, 5000])
def test_lora_equal_calls_give_equal_bits(device, dtype, chunk_bytes):
    hidden, weight, targets = make(device, dtype, (67,))
    a, b = factors(device, dtype)
    tensors, upstream = {"hidden": hidden, "weight": weight, "a": a, "b": b}, upstream_of((67,))
    runs = []
    for _ in range(3):
        out = linear_logprobs(hidden, weight, targets, lora=(a, b, 1.5), outputs=ALL, chunk_bytes=chunk_bytes)
        grads = gradients(linear_logprobs, tensors, upstream, targets=targets, scale=1.5, chunk_bytes=chunk_bytes)
        runs.append((*out, *grads.values()))
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("rank", [1, 3, 300])
def test_lora_of_any_rank_and_strides(device, rank):
    hidden, weight, targets = make(device, shape=(2, 5))
    a, b = factors(device, rank=rank)
    upstream = upstream_of((2, 5))
    tensors = {"hidden": hidden, "weight": weight, "a": a, "b": b}
    expected = exact_gradients(tensors, upstream, targets=targets, scale=0.5)
    strided = {**tensors, "a": a.mT.contiguous().mT, "b": b.mT.contiguous().mT}
    for given in (tensors, strided):
        out = linear_logprobs(hidden, weight, targets, lora=(given["a"], given["b"], 0.5), outputs=ALL)
        assert_fields(out, exactly(hidden, weight, targets, lora=(a, b, 0.5), outputs=ALL), 1e-5)
        ours = gradients(linear_logprobs, given, upstream, targets=targets, scale=0.5)
        for name, g in ours.items():
            assert distance(g, expected[name]) < 3e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_ignored_rows_are_never_looked_at(device, dtype, garbage):
    hidden, weight, targets = make(device, dtype)
    a, b = factors(device, dtype)
    spoiled, upstream = hidden.clone(), upstream_of()
    spoiled[targets == -100] = garbage
    ours, clean = (
        gradients(linear_logprobs, {"hidden": h, "weight": weight, "a": a, "b": b}, upstream, targets=targets, scale=1.5)
        for h in (spoiled, hidden)
    )
    for name, g in ours.items():
        assert torch.equal(g, clean[name]), name
    assert ours["hidden"][targets == -100].eq(0).all()
    targets = torch.full_like(targets, -100)
    tensors = {"hidden": spoiled, "weight": weight, "a": a, "b": b}
    for name, g in gradients(linear_logprobs, tensors, upstream, targets=targets, scale=1.5).items():
        assert g.shape == tensors[name].shape
        assert g.eq(0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("backward", [False, True])
def test_lora_workspace(device, allocations, dtype, backward):
    """Beside results: what the planner announces for a head whose width has the rank in it, and a few numbers per row."""
    rows, vocab, width, rank, budget = 256, 10_000, 16, 8, 1 << 18
    hidden, weight, targets = make(device, dtype, (rows,), vocab, width)
    targets.clamp_(min=0)
    a, b = factors(device, dtype, vocab, width, rank)
    trained = (hidden, a, b)
    for t in trained:
        t.requires_grad_(backward)

    def call():
        out = linear_logprobs(hidden, weight, targets, lora=(a, b, 0.5), outputs=ALL, chunk_bytes=budget)
        return torch.autograd.grad(out.logp.sum() + out.entropy.sum(), trained) if backward else out

    call()  # what the GEMM library keeps for itself
    used = allocations(call)
    plan = prefkern.plan_chunks(rows, width + rank, vocab, dtype=dtype, device=device, backward=backward, chunk_bytes=budget)
    results = (rows * width + (vocab + width) * rank) * hidden.element_size() + rows * width * 4 if backward else 0
    per_row = 128 + 4 * rank * (3 if backward else 1)
    assert used.peak <= plan.workspace_bytes + results + per_row * rows + 8 * rank * width + 8192
    if device == "cpu":
        assert used.largest < rows * vocab * hidden.element_size() / 4


@pytest.mark.parametrize("dtype", [BF16, F16], ids=names)
def test_lora_under_autocast(device, dtype):
    hidden, weight, targets = make(device)
    a, b = factors(device)
    narrow = linear_logprobs(hidden.to(dtype), weight.to(dtype), targets, lora=(a.to(dtype), b.to(dtype), 0.5), outputs=ALL)
    tensors, upstream = {"hidden": hidden, "weight": weight, "a": a, "b": b}, upstream_of()
    with torch.autocast(device, dtype):
        out = linear_logprobs(hidden, weight, targets, lora=(a, b, 0.5), outputs=ALL)
        grads = gradients(linear_logprobs, tensors, upstream, targets=targets, scale=0.5)
    assert all(torch.equal(x, y) for x, y in zip(out, narrow, strict=True))
    expected = exact_gradients(tensors, upstream, targets=targets, scale=0.5)
    for name, g in grads.items():
        assert g.dtype == F32
        assert distance(g, expected[name]) < 4e-2, name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(device, op_log, mode):
    hidden, weight, targets = make(device)
    a, b = (leaf(t) for t in factors(device))
    saved = []
    with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = linear_logprobs(hidden, weight, targets, lora=(a, b, 0.5), outputs=ALL)
    assert saved == []
    assert all(field.grad_fn is None for field in out)
    assert op_log.names() == ["linear_logprobs_ext_fwd"]
    assert op_log.args("linear_logprobs_ext_fwd")[-2] == 31


def test_a_call_without_these_inputs_is_the_plain_op(device, op_log):
    linear_logprobs(*make(device), lora=None)
    assert op_log.names() == ["linear_logprobs_fwd"]


def test_differentiating_twice_is_an_error(device):
    hidden, weight, targets = make(device)
    a, b = (leaf(t) for t in factors(device))
    loss = linear_logprobs(hidden, weight, targets, lora=(a, b, 0.5)).logp.sum() + a.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


# --------------------------------------------------------------------------------------------------------- rounded logits

NARROW = {"bfloat16": BF16, "float16": F16}


def exact_inputs(device, dtype=F32, shape=(ROWS,), vocab=VOCAB, width=WIDTH):
    """hidden, weight, targets, bias, a, b whose products and sums are multiples of 2^-11 that float32 holds without rounding,
    in whatever order they are added, and that bfloat16 and float16 do not hold."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")

    def grid(*size, most, step):
        return (torch.randint(-most, most + 1, size) * step).to(device, dtype)

    hidden, weight = grid(*shape, width, most=64, step=2**-6), grid(vocab, width, most=64, step=2**-5)
    targets = torch.randint(0, vocab, shape, device=device)
    targets.view(-1)[1::3] = -100
    a, b = grid(RANK, width, most=3, step=2**-2), grid(vocab, RANK, most=3, step=2**-2)
    return hidden, weight, targets, torch.randint(-4096, 4097, (vocab,), device=device) * 2.0**-11, a, b


ROUNDED_OPTIONS = {
    "plain": lambda bias, a, b: {},
    "bias": lambda bias, a, b: {"bias": bias},
    "lora": lambda bias, a, b: {"lora": (a, b, 0.5)},
    "everything": lambda bias, a, b: {
        "bias": bias, "lora": (a, b, 0.5), "temperature": torch.rand(ROWS, device=bias.device) + 0.5, "softcap": 20.0,
        "logit_scale": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=names)
@pytest.mark.parametrize("options", ROUNDED_OPTIONS)
@pytest.mark.parametrize("logits_dtype", NARROW)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_rounded_values(device, dtype, options, logits_dtype, chunk_bytes):
    if device == "cuda" and dtype != F32 and options in ("lora", "everything"):
        pytest.skip("there h a^T is rounded, too")
    hidden, weight, targets, bias, a, b = exact_inputs(device, dtype)
    options = {**ROUNDED_OPTIONS[options](bias, a, b), "outputs": ALL}
    rounded = {**options, "logits_dtype": logits_dtype}
    out = linear_logprobs(hidden, weight, targets, **rounded, chunk_bytes=chunk_bytes)
    assert_fields(out, exactly(hidden, weight, targets, **rounded), 1e-5)
    without = linear_logprobs(hidden, weight, targets, **options)
    assert (out.logp - without.logp).abs().max() > {"bfloat16": 2e-3, "float16": 2e-4}[logits_dtype]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=names)
@pytest.mark.parametrize("options", ROUNDED_OPTIONS)
@pytest.mark.parametrize("logits_dtype", NARROW)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_rounded_gradients(device, dtype, options, logits_dtype, chunk_bytes):
    if device == "cuda" and dtype != F32 and options in ("lora", "everything"):
        pytest.skip("there h a^T is rounded, too")
    hidden, weight, targets, bias, a, b = exact_inputs(device, dtype)
    made = ROUNDED_OPTIONS[options](bias, a, b)
    tensors = {"hidden": hidden, "weight": weight}
    if "bias" in made:
        tensors["bias"] = made.pop("bias")
    if "lora" in made:
        tensors["a"], tensors["b"], made["scale"] = made.pop("lora")
    upstream = upstream_of()
    made |= {"targets": targets, "logits_dtype": logits_dtype}
    ours = gradients(linear_logprobs, tensors, upstream, **made, chunk_bytes=chunk_bytes)
    expected = exact_gradients(tensors, upstream, **made)
    for name, g in ours.items():
        # On CUDA the gradient of the logits is narrowed to the inputs' dtype.
        assert distance(g, expected[name]) < (GRAD_TOLERANCE[dtype] if g.dtype == dtype else 3e-6), name


@pytest.mark.parametrize("dtype", [BF16, F16], ids=names)
@pytest.mark.parametrize("biased", [False, True])
def test_rounded_logits_are_those_of_a_narrow_head(device, dtype, biased):
    """F.linear in that dtype, then logits_logprobs: the same but for the kernels' rounding."""
    hidden, weight, targets, bias, *_ = exact_inputs(device, dtype)
    bias = bias.to(dtype) if biased else None
    logits = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float()).to(dtype)
    out = linear_logprobs(hidden, weight, targets, bias=bias, logits_dtype=names(dtype), outputs=ALL)
    assert_fields(out, prefkern.logits_logprobs(logits, targets, outputs=ALL), 5e-6)
    if device == "cuda":
        assert torch.equal(torch.nn.functional.linear(hidden, weight, bias), logits)


@pytest.mark.parametrize("logits_dtype", NARROW)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("chunk_bytes", [None, 40_000])
def test_the_backward_takes_the_logits_of_the_forward(device, logits_dtype, dtype, chunk_bytes):
    """The gradient of lse in the bias is p. Were a large logit rounded the other way the second time, p would miss 1."""
    hidden, weight, _ = make(device, dtype, (512,), 2000, 64)
    targets = torch.randint(0, 2000, (512,), device=device)
    bias = torch.zeros(2000, device=device, requires_grad=True)
    lse = linear_logprobs(
        hidden * 8, weight, targets, bias=bias, logits_dtype=logits_dtype, outputs=["lse"], chunk_bytes=chunk_bytes
    ).lse
    for row in (0, 100, 511):
        (p,) = torch.autograd.grad(lse[row], bias, retain_graph=True)
        assert_close(p.sum(), torch.tensor(1.0, device=device), rtol=0, atol=1e-5)


@pytest.mark.parametrize("logits_dtype", NARROW)
def test_a_forward_alone_rounds_as_one_with_a_backward(device, logits_dtype):
    """log-probs of before and after, whose ratio a loss takes."""
    hidden, weight, targets = make(device, BF16, (300,), 3000, 64)
    trained = linear_logprobs(leaf(hidden), leaf(weight), targets, logits_dtype=logits_dtype)
    assert torch.equal(trained.logp, linear_logprobs(hidden, weight, targets, logits_dtype=logits_dtype).logp)


@pytest.mark.parametrize("logits_dtype", [None, *NARROW])
@pytest.mark.parametrize("device", ["cpu"])
def test_a_forward_that_rounds_has_the_blocks_of_its_backward(allocations, logits_dtype):
    """In others a GEMM may add up a logit in another order, and a rounding turn the last bit into an ulp of the narrow type."""
    rows, vocab, width, budget = 64, 8000, 128, 1 << 19
    hidden, weight, targets = make("cpu", BF16, (rows,), vocab, width)
    targets.clamp_(min=0)
    forward, backward = (
        prefkern.plan_chunks(rows, width, vocab, dtype=BF16, chunk_bytes=budget, backward=b) for b in (False, True)
    )
    assert forward.fused or forward.vocab_block > backward.vocab_block > rows
    plan = forward if logits_dtype is None else backward
    used = allocations(lambda: linear_logprobs(hidden, weight, targets, logits_dtype=logits_dtype, chunk_bytes=budget))
    if plan.fused:
        assert used.peak <= plan.workspace_bytes + 128 * rows + 8192
        return
    # A block of logits; for a library that of the weight, too, is made in float32, which here is larger.
    assert used.largest == plan.vocab_block * (rows if prefkern.capabilities()["cpu_gemm"] == "own" else width) * 4


def test_float32_is_no_rounding(device, op_log):
    hidden, weight, targets = make(device)
    out = linear_logprobs(hidden, weight, targets, logits_dtype="float32")
    assert torch.equal(out.logp, linear_logprobs(hidden, weight, targets).logp)
    assert op_log.names() == ["linear_logprobs_fwd"] * 2
    wide = [t.double() if t.is_floating_point() else t for t in (hidden.cpu(), weight.cpu(), targets.cpu())]
    assert torch.equal(linear_logprobs(*wide, logits_dtype="float32").logp, linear_logprobs(*wide).logp)


def test_logits_beyond_float16_are_infinite(device):
    logits = torch.tensor([[70000.0, 1.0, -70000.0]], device=device)
    target = torch.tensor([1], device=device)
    out = linear_logprobs(logits, torch.eye(3, device=device), target, logits_dtype="float16")
    assert out.logp.isnan().all()  # as of an infinite logit
    out = linear_logprobs(-logits.abs(), torch.eye(3, device=device), target, logits_dtype="float16", outputs=["entropy"])
    assert (out.logp.item(), out.entropy.item()) == (0, 0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=names)
@pytest.mark.parametrize("chunk_bytes", [1, 500, 5000, 50_000, 1 << 40])
def test_rounding_does_not_depend_on_the_chunk(device, dtype, chunk_bytes):
    hidden, weight, targets, bias, *_ = exact_inputs(device, dtype, vocab=130)
    tensors, upstream = {"hidden": hidden, "weight": weight, "bias": bias}, upstream_of()
    chunks = (None, chunk_bytes)
    x, y = (linear_logprobs(**tensors, targets=targets, logits_dtype="bfloat16", outputs=ALL, chunk_bytes=n) for n in chunks)
    assert_fields(x, y, 3e-6)
    x, y = (
        gradients(linear_logprobs, tensors, upstream, targets=targets, logits_dtype="bfloat16", chunk_bytes=n) for n in chunks
    )
    for name in tensors:
        assert distance(x[name], y[name]) < GRAD_TOLERANCE[tensors[name].dtype] + 1e-6, name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
def test_rounding_equal_calls_give_equal_bits(device, dtype):
    hidden, weight, targets = make(device, dtype, (67,))
    tensors, upstream = {"hidden": hidden, "weight": weight}, upstream_of((67,))
    runs = []
    for _ in range(3):
        out = linear_logprobs(hidden, weight, targets, logits_dtype="bfloat16", outputs=ALL, chunk_bytes=5000)
        grads = gradients(linear_logprobs, tensors, upstream, targets=targets, logits_dtype="bfloat16", chunk_bytes=5000)
        runs.append((*out, *grads.values()))
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


def test_rounding_under_autocast(device):
    hidden, weight, targets = make(device)
    narrow = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, logits_dtype="bfloat16")
    with torch.autocast(device, BF16):
        assert torch.equal(linear_logprobs(hidden, weight, targets, logits_dtype="bfloat16").logp, narrow.logp)


# --------------------------------------------------------------------------------------------------------- kept tokens

LOST = (3, 8)  # rows that do not keep their target


def csr(rows, dtype=torch.int64, device="cpu"):
    """(offsets, ids) of lists of ids."""
    offsets = torch.tensor([0, *itertools.accumulate(map(len, rows))], device=device)
    return offsets, torch.tensor([i for row in rows for i in row], dtype=dtype, device=device)


def kept_tokens(targets, vocab=VOCAB, dtype=torch.int64, lost=LOST):
    """From one token to all of them. Ignored rows keep nothing, or what is no token at all."""
    rows = []
    for i, target in enumerate(targets.view(-1).tolist()):
        if target == -100:
            rows.append([] if i % 2 else [vocab + 7, -3])
            continue
        share = (0.02, 0.3, 1.0)[i % 3 - 1]
        ids = set((torch.rand(vocab) < share).nonzero().flatten().tolist()) | {(target + 1) % vocab}
        rows.append(sorted(ids - {target} if i in lost else ids | {target}))
    return csr(rows, dtype, targets.device)


KEPT_OPTIONS = {
    "plain": lambda rows, v: {},
    "row temperature": lambda rows, v: {"temperature": torch.rand(rows) + 0.5},
    "bias": lambda rows, v: {"bias": torch.randn(v)},
    "softcap": lambda rows, v: {"softcap": 3.0},
    "everything": lambda rows, v: {
        "bias": torch.randn(v), "temperature": torch.rand(rows) + 0.5, "softcap": 4.0, "logit_scale": 1.7,
    },
}  # fmt: skip


def kept_options(name, device, rows=ROWS, vocab=VOCAB):
    made = KEPT_OPTIONS[name](rows, vocab)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in made.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", KEPT_OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_kept_values(device, dtype, options, chunk_bytes):
    hidden, weight, targets = make(device, dtype)
    options = {**kept_options(options, device), "keep": kept_tokens(targets), "outputs": ALL}
    out = linear_logprobs(hidden, weight, targets, **options, chunk_bytes=chunk_bytes)
    assert_fields(out, exactly(hidden, weight, targets, **options), VALUE_TOLERANCE[dtype])
    assert [i for i in range(ROWS) if out.logp[i] == -INF] == list(LOST)
    assert all(field.isfinite().all() for field in out[1:])
    assert out.logp[targets == -100].eq(0).all()
    assert 0 < out.is_top1.sum() < ROWS


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", KEPT_OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_kept_gradients(device, dtype, options, chunk_bytes):
    hidden, weight, targets = make(device, dtype)
    options = {**kept_options(options, device), "keep": kept_tokens(targets), "targets": targets}
    tensors = {"hidden": hidden, "weight": weight}
    if "bias" in options:
        tensors["bias"] = options.pop("bias").to(dtype)
    upstream = upstream_of()
    expected = exact_gradients(tensors, upstream, **options)
    upstream["logp"][LOST[0]], upstream["logp"][LOST[1]] = NAN, INF  # as of a loss that did not expect -inf
    ours = gradients(linear_logprobs, tensors, upstream, **options, chunk_bytes=chunk_bytes)
    for name, g in ours.items():
        assert distance(g, expected[name]) < GRAD_TOLERANCE[dtype], name


@pytest.mark.parametrize("chunk_bytes", [None, 3000])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_kept_tokens_alone_are_a_smaller_vocabulary(device, chunk_bytes, softcap):
    hidden, weight, targets = make(device)
    bias = torch.randn(VOCAB, device=device)
    ids = (torch.rand(VOCAB) < 0.3).nonzero().flatten().tolist()
    ids = sorted({*ids, *targets[targets >= 0].tolist()})
    place = torch.tensor(ids, device=device)
    smaller = torch.where(targets < 0, targets, torch.searchsorted(place, targets.clamp_min(0)))
    tensors, upstream = {"hidden": hidden, "weight": weight, "bias": bias}, upstream_of()
    keep = csr([ids] * ROWS, torch.int32, device)
    out = linear_logprobs(**tensors, targets=targets, softcap=softcap, keep=keep, outputs=ALL, chunk_bytes=chunk_bytes)
    few = {**tensors, "weight": weight[place], "bias": bias[place]}
    assert_fields(out, linear_logprobs(**few, targets=smaller, softcap=softcap, outputs=ALL), 1e-5)
    ours = gradients(linear_logprobs, tensors, upstream, targets=targets, softcap=softcap, keep=keep, chunk_bytes=chunk_bytes)
    theirs = gradients(linear_logprobs, few, upstream, targets=smaller, softcap=softcap)
    others = torch.ones(VOCAB, dtype=torch.bool, device=device)
    others[place] = False
    assert distance(ours["hidden"], theirs["hidden"]) < 2e-6
    for name in ("weight", "bias"):
        assert distance(ours[name][place], theirs[name]) < 2e-6
        assert ours[name][others].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_keeping_everything_changes_nothing(device, dtype, options):
    hidden, weight, targets = make(device, dtype)
    options = kept_options(options, device)
    keep = csr([range(VOCAB)] * ROWS, device=device)
    bias = options.pop("bias", torch.zeros(VOCAB, device=device))
    tensors, upstream = {"hidden": hidden, "weight": weight, "bias": bias}, upstream_of()
    x, y = (linear_logprobs(**tensors, targets=targets, **options, keep=k, outputs=ALL) for k in (keep, None))
    assert_fields(x, y, 1e-6)  # the mean is added up in another order
    assert torch.equal(x.logp, y.logp)
    x, y = (gradients(linear_logprobs, tensors, upstream, targets=targets, **options, keep=k) for k in (keep, None))
    assert all(torch.equal(x[name], y[name]) for name in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_one_kept_token_is_certain(device, dtype):
    hidden, weight, targets = make(device, dtype)
    targets = targets.clamp_min(0)
    out = linear_logprobs(hidden, weight, targets, keep=csr([[t] for t in targets.tolist()], device=device), outputs=ALL)
    assert out.logp.eq(0).all()
    assert out.entropy.eq(0).all()
    assert out.sum_sq_probs.eq(1).all()
    assert out.is_top1.all()
    assert torch.equal(out.lse, out.mean_logit)
    hidden.requires_grad_()
    out = linear_logprobs(hidden, weight, targets, keep=csr([[t] for t in targets.tolist()], device=device), outputs=ALL)
    (grad,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), hidden)
    assert grad.eq(0).all()


def test_a_logit_that_is_not_kept_may_be_anything(device):
    """Not even NaN in the weight of a token that no row keeps reaches a result."""
    hidden, weight, targets = make(device)
    spoiled = weight.clone()
    spoiled[7], spoiled[9] = NAN, INF
    targets[targets == 7] = targets[targets == 9] = 8
    keep = csr([[i for i in range(VOCAB) if i not in (7, 9)]] * ROWS, device=device)
    x, y = (linear_logprobs(hidden, w, targets, keep=keep, outputs=ALL) for w in (spoiled, weight))
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("logits_dtype", [None, "bfloat16"])
def test_a_kept_logit_of_minus_infinity_is_still_capped(device, logits_dtype):
    hidden, weight, targets = make(device)
    bias = torch.zeros(VOCAB, device=device)
    bias[5] = -INF
    targets[targets == 5] = 6
    keep = kept_tokens(targets, lost=())
    options = {"bias": bias, "softcap": 3.0, "keep": keep, "outputs": ALL}
    out = linear_logprobs(hidden, weight, targets, **options, logits_dtype=logits_dtype)
    expected = exactly(hidden, weight, targets, **options)
    assert_fields(out, expected, 1e-5 if logits_dtype is None else 5e-2)
    without = linear_logprobs(hidden, weight, targets, **{**options, "softcap": None}, logits_dtype=logits_dtype)
    assert without.mean_logit.isinf().any()
    assert not out.mean_logit.isinf().any()


@pytest.mark.parametrize("options", KEPT_OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 200])
def test_kept_gradcheck(options, chunk_bytes):
    hidden, weight, targets = make("cpu", F64, (5,), 6, 3)
    a, b = factors("cpu", F64, 6, 3, 2)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in KEPT_OPTIONS[options](5, 6).items()}
    leaves = [leaf(t) for t in (hidden, weight, a, b)] + ([leaf(options.pop("bias"))] if "bias" in options else [])
    keep = kept_tokens(targets, 6)
    assert targets[3] >= 0

    def function(hidden, weight, a, b, bias=None):
        out = linear_logprobs(
            hidden, weight, targets, bias=bias, lora=(a, b, 0.7), keep=keep, outputs=ALL, chunk_bytes=chunk_bytes, **options
        )
        return out.logp[[0, 2]], out.entropy, out.lse

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("options", ROUNDED_OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_kept_and_rounded(device, dtype, options, chunk_bytes):
    if device == "cuda" and dtype != F32 and options in ("lora", "everything"):
        pytest.skip("there h a^T is rounded, too")
    hidden, weight, targets, bias, a, b = exact_inputs(device, dtype)
    made = {**ROUNDED_OPTIONS[options](bias, a, b), "keep": kept_tokens(targets), "logits_dtype": "bfloat16"}
    out = linear_logprobs(hidden, weight, targets, **made, outputs=ALL, chunk_bytes=chunk_bytes)
    assert_fields(out, exactly(hidden, weight, targets, **made, outputs=ALL), 1e-5)
    upstream, tensors, made = upstream_of(), {"hidden": hidden, "weight": weight}, {**made, "targets": targets}
    ours = gradients(linear_logprobs, tensors, upstream, **made, chunk_bytes=chunk_bytes)
    expected = exact_gradients(tensors, upstream, **made)
    for name, g in ours.items():
        assert distance(g, expected[name]) < GRAD_TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("chunk_bytes", [1, 500, 5000, 50_000, 1 << 40])
def test_kept_does_not_depend_on_the_chunk(device, dtype, chunk_bytes):
    hidden, weight, targets = make(device, dtype, vocab=130, width=8)
    options = {**kept_options("everything", device, vocab=130), "keep": kept_tokens(targets, 130)}
    tensors, upstream = {"hidden": hidden, "weight": weight, "bias": options.pop("bias")}, upstream_of()
    chunks = (None, chunk_bytes)
    x, y = (linear_logprobs(**tensors, targets=targets, **options, outputs=ALL, chunk_bytes=n) for n in chunks)
    assert_fields(x, y, 1e-12 if dtype == F64 else 3e-6)
    x, y = (gradients(linear_logprobs, tensors, upstream, targets=targets, **options, chunk_bytes=n) for n in chunks)
    for name in tensors:
        assert distance(x[name], y[name]) < max(GRAD_TOLERANCE[dtype], 1e-6 if dtype == F64 else 0), name


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_kept_equal_calls_give_equal_bits(device, dtype):
    hidden, weight, targets = make(device, dtype, (67,))
    keep = kept_tokens(targets)
    tensors, upstream = {"hidden": hidden, "weight": weight}, upstream_of((67,))
    runs = []
    for kind in (torch.int64, torch.int32, torch.int64):
        options = {"targets": targets, "keep": (keep[0], keep[1].to(kind)), "chunk_bytes": 5000}
        out = linear_logprobs(**tensors, **options, outputs=ALL)
        runs.append((*out, *gradients(linear_logprobs, tensors, upstream, **options).values()))
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


def test_kept_of_any_shape_and_strides(device):
    hidden, weight, targets = make(device, shape=(3, 4))
    keep = kept_tokens(targets)
    out = linear_logprobs(hidden, weight, targets, keep=keep, outputs=ALL)
    assert_fields(out, exactly(hidden, weight, targets, keep=keep, outputs=ALL), 1e-5)
    strided = tuple(t.repeat_interleave(2)[::2] for t in keep)
    assert torch.equal(linear_logprobs(hidden, weight, targets, keep=strided).logp, out.logp)
    none = linear_logprobs(hidden[:0], weight, targets[:0], keep=csr([], device=device))
    assert none.logp.shape == (0, 4)


def test_a_target_that_is_not_kept_raises_under_validation(device, validation):
    hidden, weight, targets = make(device)
    keep = kept_tokens(targets)
    validation(True)
    with pytest.raises(ValueError, match=rf"targets has {int(targets[3])} in row 3.*keep does not hold"):
        linear_logprobs(hidden, weight, targets, keep=keep)
    linear_logprobs(hidden, weight, targets, keep=kept_tokens(targets, lost=()))
    validation(False)
    assert linear_logprobs(hidden, weight, targets, keep=keep).logp[3] == -INF


# --------------------------------------------------------------------------------------------------- a citizen of PyTorch


def op_arguments(dtype, options, grad, device):
    hidden, weight, targets = make(device, dtype, (6,), 9, 4)
    a, b = factors(device, dtype, 9, 4, 2)
    options = options_of(options, device, 6, 9)
    hidden, weight, bias, a, b = (
        None if t is None else leaf(t) if grad else t for t in (hidden, weight, options.get("bias"), a, b)
    )
    numbers = (1.0, options.get("softcap", 0.0), options.get("logit_scale", 1.0), -100, 0.5, 0 if dtype == F32 else 1)
    keep = kept_tokens(targets, 9, lost=()) if dtype == BF16 else (None, None)
    return (hidden, weight, targets, bias, options.get("temperature"), a, b, *keep), numbers


@pytest.mark.parametrize(("dtype", "options"), [(F32, "plain"), (BF16, "everything")], ids=str)
@pytest.mark.parametrize("outputs", [0, 31])
def test_opcheck_forward(device, dtype, options, outputs):
    tensors, numbers = op_arguments(dtype, options, False, device)
    opcheck(OPS.linear_logprobs_ext_fwd.default, (*tensors, *numbers, outputs, 0))
    tensors, numbers = op_arguments(dtype, options, True, device)
    opcheck(OPS.linear_logprobs_ext.default, (*tensors, *numbers, outputs | 32, 0))


@pytest.mark.parametrize("rows", ["some", "none"])
@pytest.mark.parametrize("needs", [1, 8, 16, 24, 25, 31])
def test_opcheck_backward(device, needs, rows):
    tensors, numbers = op_arguments(BF16, "everything", False, device)
    if rows == "none":
        tensors[2].fill_(-100)
    out = OPS.linear_logprobs_ext_fwd(*tensors, *numbers, 63, 0)
    upstream = (torch.randn(6, device=device), None, torch.randn(6, device=device))
    opcheck(OPS.linear_logprobs_ext_backward.default, (*upstream, *tensors, out[1], out[6], *numbers, needs, 0))


def test_one_graph_for_any_number_of_tokens(device):
    """fullgraph, forward and backward, four sizes, at most two compilations (the second has a symbolic N)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(hidden, weight, targets, a, b, offsets, ids):
        out = linear_logprobs(
            hidden * 2, weight, targets, lora=(a, b, 0.5), logits_dtype="float16", keep=(offsets, ids), outputs=ALL
        )
        return out.logp.sum() + 0.5 * out.entropy.sum() + 0.25 * out.lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (5, 8, 13, 21):
        hidden, weight, targets = make(device, F32, (rows,), 40, 8)
        tensors = (hidden, weight, *factors(device, F32, 40, 8))
        x, y = ([leaf(t) for t in tensors] for _ in range(2))
        keep = kept_tokens(targets, 40, lost=())
        eager = loss(*x[:2], targets, *x[2:], *keep)
        total = compiled(*y[:2], targets, *y[2:], *keep)
        eager.backward()
        total.backward()
        assert_close(total, eager, rtol=1e-6, atol=1e-5)
        for s, t in zip(x, y, strict=True):
            assert_close(t.grad, s.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_meta_tensors_give_shapes():
    def empty(*shape, dtype=F32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    lora = (empty(2, 4), empty(5, 2), 1.0)
    keep = (empty(7, dtype=torch.int64), empty(20, dtype=torch.int64))
    out = linear_logprobs(empty(2, 3, 4), empty(5, 4), empty(2, 3, dtype=torch.int64), lora=lora, keep=keep, outputs=ALL)
    assert all(field.shape == (2, 3) and field.device.type == "meta" for field in out)


# ------------------------------------------------------------------------------------------------------------- bad input

H, W, T, A, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2]), torch.zeros(2, 4), torch.zeros(5, 2)

OFFSETS, IDS = csr([[0, 3], [1], [1, 2, 4]])


def offsets(*values):
    return {"keep": (torch.tensor(values), IDS)}


def ids(*values):
    return {"keep": (OFFSETS, torch.tensor(values))}


BAD = {
    "keep: a tensor": ({"keep": IDS}, TypeError, r"keep is a Tensor.*\(offsets, ids\)"),
    "keep: three": ({"keep": (OFFSETS, IDS, IDS)}, TypeError, r"keep is a tuple of 3.*\(offsets, ids\)"),
    "keep: offsets is a list": ({"keep": ([0, 1], IDS)}, TypeError, "keep's offsets is a list"),
    "keep: ids is None": ({"keep": (OFFSETS, None)}, TypeError, "keep's ids is a NoneType"),
    "keep: offsets of int32": ({"keep": (OFFSETS.int(), IDS)}, TypeError, "keep's offsets.*Int.*int64"),
    "keep: ids of float": ({"keep": (OFFSETS, IDS.float())}, TypeError, "keep's ids.*Float.*int64, int32"),
    "keep: ids of int16": ({"keep": (OFFSETS, IDS.short())}, TypeError, "keep's ids.*Short.*int64, int32"),
    "keep: offsets too short": (offsets(0, 2, 6), ValueError, r"keep's offsets has shape \[3\].*3 rows, \[4\]"),
    "keep: offsets too long": (offsets(0, 2, 3, 6, 6), ValueError, r"keep's offsets has shape \[5\].*3 rows, \[4\]"),
    "keep: offsets of rows": ({"keep": (OFFSETS[None], IDS)}, ValueError, r"keep's offsets has shape \[1, 4\]"),
    "keep: ids of rows": ({"keep": (OFFSETS, IDS[None])}, ValueError, r"keep's ids has shape \[1, 6\].*vector"),
    "keep: offsets begin late": (offsets(1, 2, 3, 6), ValueError, "keep's offsets"),
    "keep: offsets end early": (offsets(0, 2, 3, 5), ValueError, "keep's offsets.* 6"),
    "keep: offsets end late": (offsets(0, 2, 3, 7), ValueError, "keep's offsets.* 6"),
    "keep: offsets descend": (offsets(0, 4, 3, 6), ValueError, "keep's offsets"),
    "keep: an empty row": (offsets(0, 2, 2, 6), ValueError, "keep holds no ids for row 1"),
    "keep: an id too large": (ids(0, 3, 1, 1, 2, 5), ValueError, r"keep's ids\[5\] is 5 in row 2.*0 to 4"),
    "keep: a negative id": (ids(-1, 3, 1, 1, 2, 4), ValueError, r"keep's ids\[0\] is -1 in row 0.*0 to 4"),
    "keep: ids descend": (ids(0, 3, 1, 2, 1, 4), ValueError, r"keep's ids\[4\] is 1 after 2 in row 2.*ascend"),
    "keep: an id twice": (ids(0, 3, 1, 1, 2, 2), ValueError, r"keep's ids\[5\] is 2 after 2 in row 2.*none twice"),
    "keep: not the target": (ids(0, 3, 1, 1, 3, 4), ValueError, "targets has 2 in row 2, which keep does not hold"),
    "keep: offsets on meta": ({"keep": (OFFSETS.to("meta"), IDS)}, ValueError, "keep's offsets is on meta.*same device"),
    "keep: ids on meta": ({"keep": (OFFSETS, IDS.to("meta"))}, ValueError, "keep's ids is on meta.*same device"),
    # name: (arguments, error, what its message says)
    "lora: a tensor": ({"lora": A}, TypeError, r"lora is a Tensor.*\(a, b, scale\)"),
    "lora: no scale": ({"lora": (A, B)}, TypeError, r"lora is a tuple of 2.*\(a, b, scale\)"),
    "lora: a is None": ({"lora": (None, B, 1.0)}, TypeError, "lora's a is a NoneType"),
    "lora: b is a list": ({"lora": (A, [0.0], 1.0)}, TypeError, "lora's b is a list"),
    "lora: scale is a tensor": ({"lora": (A, B, torch.tensor(1.0))}, TypeError, "lora's scale is tensor.*number"),
    "lora: scale is a word": ({"lora": (A, B, "1")}, TypeError, "lora's scale is '1'.*number"),
    "lora: scale is NaN": ({"lora": (A, B, NAN)}, ValueError, "lora's scale is nan.*finite"),
    "lora: scale is infinite": ({"lora": (A, B, INF)}, ValueError, "lora's scale is inf.*finite"),
    "lora: a of another width": ({"lora": (torch.zeros(2, 3), B, 1.0)}, ValueError, r"lora's a.*\[2, 3\].*\[r, 4\]"),
    "lora: a is a vector": ({"lora": (torch.zeros(4), B, 1.0)}, ValueError, r"lora's a.*\[4\].*\[r, 4\]"),
    "lora: rank 0": ({"lora": (torch.zeros(0, 4), torch.zeros(5, 0), 1.0)}, ValueError, "lora's a has r = 0"),
    "lora: b of another rank": ({"lora": (A, torch.zeros(5, 3), 1.0)}, ValueError, r"lora's b.*\[5, 3\].*\[5, 2\]"),
    "lora: b of another vocabulary": ({"lora": (A, torch.zeros(6, 2), 1.0)}, ValueError, r"lora's b.*\[6, 2\].*\[5, 2\]"),
    "lora: b transposed": ({"lora": (A, torch.zeros(2, 5), 1.0)}, ValueError, r"lora's b.*\[2, 5\].*\[5, 2\]"),
    "lora: a of another dtype": ({"lora": (A.bfloat16(), B, 1.0)}, TypeError, "lora's a.*BFloat16.*hidden.*Float.*equal"),
    "lora: b of another dtype": ({"lora": (A, B.half(), 1.0)}, TypeError, "lora's b.*Half.*hidden.*Float.*equal"),
    "lora: integers": ({"lora": (A.long(), B, 1.0)}, TypeError, "lora's a.*Long.*float32"),
    "logits_dtype: unknown": ({"logits_dtype": "bfloat"}, ValueError, "logits_dtype is 'bfloat'.*'float32'.*mean 'bfloat16'"),
    "logits_dtype: float64": ({"logits_dtype": "float64"}, ValueError, "logits_dtype is 'float64'.*accepted"),
    "logits_dtype: a dtype": ({"logits_dtype": BF16}, TypeError, "logits_dtype is torch.bfloat16.*'bfloat16'"),
    "lora: a on meta": ({"lora": (A.to("meta"), B, 1.0)}, ValueError, "lora's a is on meta.*same device"),
    "lora: b on meta": ({"lora": (A, B.to("meta"), 1.0)}, ValueError, "lora's b is on meta.*same device"),
}


def moved(value, device):
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(device, validation, name, grad):
    """The CPU always looks at values; a GPU does under validation."""
    validation(True)
    changes, error, message = BAD[name]
    arguments = {key: moved(value, device) for key, value in {"hidden": H, "weight": W, "targets": T, **changes}.items()}
    arguments["hidden"] = arguments["hidden"].requires_grad_(grad)
    with pytest.raises(error, match=message) as caught:
        linear_logprobs(**arguments)
    assert caught.type is error


def test_float64_is_not_rounded():
    with pytest.raises(TypeError, match=r"logits_dtype is bfloat16; with float64 hidden"):
        linear_logprobs(H.double(), W.double(), T, logits_dtype="bfloat16")


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("keep") and name != "keep: not the target"])
def test_the_cpu_looks_at_kept_tokens_without_validation(validation, name):
    validation(False)
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        linear_logprobs(H, W, T, **changes)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_wrong_kept_tokens_on_a_gpu_stay_within_bounds(device, validation):
    validation(False)
    hidden, weight, _ = make(device, shape=(4,), vocab=10)
    targets = torch.tensor([0, 1, 2, 3], device=device)
    offsets = torch.tensor([-5, 2, 1 << 40, 3, 4], device=device)
    ids = torch.tensor([1 << 50, -7, 2, 3], device=device)
    out = linear_logprobs(hidden, weight, targets, keep=(offsets, ids), outputs=ALL)
    torch.cuda.synchronize()
    assert out.logp[3] == 0
