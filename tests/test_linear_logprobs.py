"""linear_logprobs against its float64 definition, its gradients, its memory, and everything it must refuse."""

import itertools
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


def names(dtype):
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def make(device="cpu", dtype=F32, shape=(13,), vocab=301, width=32, ignored=True):
    """hidden, weight, targets; logits of standard deviation 3. Every third row is ignored, every second target best."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    hidden = torch.randn(*shape, width).to(dtype)
    weight = (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, shape)
    targets.view(-1)[::2] = (hidden.double() @ weight.double().mT).argmax(-1).view(-1)[::2]
    if ignored:
        targets.view(-1)[1::3] = -100
    return hidden.to(device), weight.to(device), targets.to(device)


OPTIONS = {
    "plain": lambda n, v: {},
    "bias": lambda n, v: {"bias": torch.randn(v)},
    "temperature": lambda n, v: {"temperature": 0.7},
    "row temperature": lambda n, v: {"temperature": torch.rand(n) + 0.5},
    "softcap": lambda n, v: {"softcap": 2.0},
    "logit_scale": lambda n, v: {"logit_scale": 0.3},
    "everything": lambda n, v: {
        "bias": torch.randn(v),
        "temperature": torch.rand(n) + 0.5,
        "softcap": 4.0,
        "logit_scale": 1.7,
    },
}


def options_of(name, rows, vocab, device):
    made = OPTIONS[name](rows, vocab)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in made.items()}


def exactly(hidden, weight, targets, bias=None, temperature=1.0, **options):
    """The definition, on the same numbers, in float64 on the CPU."""
    wide = [None if t is None else t.cpu().double() for t in (hidden, weight, bias)]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.cpu().double()
    return reference.linear_logprobs(
        wide[0], wide[1], targets.cpu(), bias=wide[2], temperature=temperature, **{"outputs": ALL, **options}
    )


def assert_fields(actual, expected, tolerance, rtol=0.0):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert a.shape == e.shape
            near = {"rtol": rtol, "atol": tolerance, "equal_nan": True}
            assert_close(a.cpu().to(e.dtype), e.cpu(), **near, msg=lambda m, n=name: f"{n}: {m}")


def leaf(t):
    return t.detach().clone().requires_grad_()


def gradients(function, tensors, upstream, **options):
    """d (sum over `upstream` of g . output) / d (hidden, weight[, bias]) for function(hidden, weight, bias)."""
    leaves = [leaf(t) for t in tensors]
    out = function(leaves[0], leaves[1], bias=leaves[2] if len(leaves) > 2 else None, outputs=ALL, **options)
    fields = [getattr(out, name) for name in upstream]
    grads = [g.to(field.device, field.dtype) for g, field in zip(upstream.values(), fields, strict=True)]
    return torch.autograd.grad(fields, leaves, grads)


def upstream_of(shape, sources=SOURCES):
    return {name: torch.randn(shape, dtype=F64) for name in sources}


def distance(actual, expected):
    """Relative error in norm."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


# --------------------------------------------------------------------------------------------------------------- values

VALUE_TOLERANCE = {F64: 1e-11, F32: 1e-5, BF16: 1e-5, F16: 1e-5}  # the sums are float32 whatever the input


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_values(device, dtype, options, chunk_bytes):
    hidden, weight, targets = make(device, dtype)
    options = options_of(options, 13, 301, device)
    out = linear_logprobs(hidden, weight, targets, **options, outputs=ALL, chunk_bytes=chunk_bytes)
    expected = exactly(hidden, weight, targets, **options)
    assert_fields(out, expected, VALUE_TOLERANCE[dtype])
    assert {t.dtype for t in out[:5]} == {F64 if dtype == F64 else F32}
    assert out.is_top1.dtype == torch.bool
    assert 0 < out.is_top1.sum() < 13  # the inputs have both kinds
    assert {t.device for t in out} == {hidden.device}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
def test_logp_of_large_logits(device, dtype):
    """Logits of a few hundred: logp still to 1e-4, the project's promise."""
    hidden, weight, targets = make(device, dtype, vocab=1000, width=64)
    hidden, targets = hidden * 64, targets.clamp_min(0)
    targets[1::2] = (hidden.double() @ weight.double().mT).argmax(-1)[1::2]
    expected = exactly(hidden, weight, targets)
    assert expected.lse.min() > 300
    out = linear_logprobs(hidden, weight, targets, outputs=ALL)
    near = expected.logp > -50  # beyond, a float32 itself is spaced wider than that
    assert near.sum() >= 6
    assert_close(out.logp.cpu().double()[near], expected.logp[near], rtol=0, atol=1e-4)
    assert_close(out.logp.cpu().double(), expected.logp, rtol=2e-6, atol=1e-4)
    assert_close(out.entropy.cpu().double(), expected.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wanted", [(), *((name,) for name in ALL), ("lse", "is_top1"), ALL], ids="+".join)
@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
@pytest.mark.parametrize("grad", [False, True])
def test_each_output_alone_is_what_it_is_among_all(device, wanted, dtype, grad):
    hidden, weight, targets = make(device, dtype)
    everything = linear_logprobs(hidden, weight, targets, outputs=ALL)
    out = linear_logprobs(hidden.requires_grad_(grad), weight, targets, outputs=wanted)
    assert [name for name, value in zip(out._fields, out, strict=True) if value is not None] == ["logp", *wanted]
    for name in ("logp", *wanted):
        assert_close(getattr(out, name).detach(), getattr(everything, name), rtol=1e-6, atol=1e-6)
        assert getattr(out, name).requires_grad == (grad and name in SOURCES)


def test_outputs_may_be_any_iterable_of_names(device):
    hidden, weight, targets = make(device)
    for outputs in (["lse", "entropy"], {"lse": 1, "entropy": 2}, iter(("lse", "entropy", "lse"))):
        out = linear_logprobs(hidden, weight, targets, outputs=outputs)
        assert out.lse is not None
        assert out.entropy is not None
        assert out.mean_logit is None


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=lambda d: "bias " + names(d))
def test_bias_of_any_dtype(device, dtype, bias_dtype):
    if device == "cuda" and bias_dtype == F64:
        pytest.skip("float64 is a CPU type")
    hidden, weight, targets = make(device, dtype)
    bias = torch.randn(301).to(device, bias_dtype)
    expected = exactly(hidden, weight, targets, bias)
    assert_fields(linear_logprobs(hidden, weight, targets, bias=bias, outputs=ALL), expected, 1e-11 if dtype == F64 else 1e-5)
    upstream = upstream_of(targets.shape)
    (*_, d_bias) = gradients(linear_logprobs, (hidden, weight, bias), upstream, targets=targets)
    assert d_bias.dtype == bias_dtype
    (*_, e_bias) = gradients(
        reference.linear_logprobs, [t.cpu().double() for t in (hidden, weight, bias)], upstream, targets=targets.cpu()
    )
    assert distance(d_bias, e_bias) < {F64: 1e-6, F32: 1e-6, BF16: 4e-3, F16: 5e-4}[bias_dtype]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (4, 5), (1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=names)
def test_temperature_is_broadcast_to_the_targets(device, shape, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    hidden, weight, targets = make(device, F32, shape=(4, 5))
    temperature = (torch.rand(shape) + 0.5).to(device, dtype)
    out = linear_logprobs(hidden, weight, targets, temperature=temperature, outputs=ALL)
    assert_fields(out, exactly(hidden, weight, targets, temperature=temperature), 1e-5)


def test_a_number_as_temperature_is_that_temperature_in_every_row(device):
    hidden, weight, targets = make(device)
    one = linear_logprobs(hidden, weight, targets, temperature=0.75, outputs=ALL)
    each = linear_logprobs(hidden, weight, targets, temperature=torch.full((13,), 0.75, device=device), outputs=ALL)
    for a, b in zip(one, each, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------ gradients


def plain_torch(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, outputs=()):
    """What one would write without this library, in the dtype of the inputs throughout."""
    z = hidden @ weight.mT
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(z.dtype).unsqueeze(-1)
    z = z / temperature
    log_p = torch.log_softmax(z, -1)
    counts = targets != -100
    logp = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return prefkern.LinearLogprobs(*(torch.where(counts, t, 0) for t in (logp, entropy, z.logsumexp(-1))))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_gradients(device, dtype, options, chunk_bytes):
    """Against float64: rounding only in float32, and in half precision at most twice the error of plain PyTorch."""
    hidden, weight, targets = make(device, dtype)
    options = options_of(options, 13, 301, device)
    bias = options.pop("bias", torch.zeros(301, device=device)).to(dtype)
    upstream = upstream_of(targets.shape)
    tensors = (hidden, weight, bias)
    ours = gradients(linear_logprobs, tensors, upstream, targets=targets, chunk_bytes=chunk_bytes, **options)
    wide = {k: v.cpu().double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = gradients(
        reference.linear_logprobs, [t.cpu().double() for t in tensors], upstream, targets=targets.cpu(), **wide
    )
    for name, a, t, e in zip(("hidden", "weight", "bias"), ours, tensors, expected, strict=True):
        assert a.dtype == t.dtype
        assert a.shape == t.shape
        if dtype in (F64, F32):
            assert distance(a, e) < {F64: 1e-12, F32: 2e-6}[dtype], name
    if dtype in (BF16, F16):
        plain = gradients(plain_torch, tensors, upstream, targets=targets, **options)
        for name, a, p, e in zip(("hidden", "weight", "bias"), ours, plain, expected, strict=True):
            assert distance(a, e) <= 2 * distance(p, e), name
            assert distance(a, e) < {BF16: 4e-3, F16: 6e-4}[dtype], name  # two roundings at the worst


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_gradient_of_each_output_alone(device, source, dtype):
    hidden, weight, targets = make(device, dtype)
    options = options_of("everything", 13, 301, device)
    tensors = hidden, weight, options.pop("bias")
    upstream = upstream_of(targets.shape, [source])
    ours = gradients(linear_logprobs, tensors, upstream, targets=targets, **options)
    options["temperature"] = options["temperature"].cpu().double()
    expected = gradients(
        reference.linear_logprobs, [t.cpu().double() for t in tensors], upstream, targets=targets.cpu(), **options
    )
    for a, e in zip(ours, expected, strict=True):
        assert distance(a, e) < {F64: 1e-6 if a.dtype == F32 else 1e-12, F32: 2e-6}[dtype]


def test_an_output_that_was_not_asked_for_adds_no_gradient(device):
    """The loss uses logp only; asking for entropy beside it must not change the gradient."""
    hidden, weight, targets = make(device)
    grads = []
    for outputs in ((), ALL):
        leaves = leaf(hidden), leaf(weight)
        grads.append(torch.autograd.grad(linear_logprobs(*leaves, targets, outputs=outputs).logp.sum(), leaves))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


NEEDS = {"hidden": 1, "weight": 2, "bias": 4}


@pytest.mark.parametrize("trained", [c for n in (1, 2, 3) for c in itertools.combinations(NEEDS, n)], ids="+".join)
def test_only_needed_gradients_are_computed(device, op_log, trained):
    """A frozen head costs no weight gradient: the backward op is not asked for it."""
    hidden, weight, targets = make(device)
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.randn(301, device=device)}
    for name in trained:
        tensors[name].requires_grad_()
    linear_logprobs(**tensors, targets=targets).logp.sum().backward()
    if trained == ("hidden",) and device == "cpu":
        assert "linear_logprobs_backward" not in op_log.names()
        assert op_log.args("linear_logprobs_u_backward")
    else:
        assert op_log.args("linear_logprobs_backward")[-2] == sum(NEEDS[name] for name in trained)
    full = {name: leaf(t) for name, t in tensors.items()}
    linear_logprobs(**full, targets=targets).logp.sum().backward()
    for name, t in tensors.items():
        if name in trained:
            assert_close(t.grad, full[name].grad, rtol=1e-6, atol=1e-7)
            assert t.grad.norm() > 0
        else:
            assert t.grad is None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_bytes", [None, 200])
def test_gradcheck(options, chunk_bytes):
    hidden, weight, targets = make("cpu", F64, shape=(5,), vocab=6, width=3)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[options](5, 6).items()}
    leaves = [leaf(hidden), leaf(weight)] + ([leaf(options.pop("bias"))] if "bias" in options else [])

    def function(hidden, weight, bias=None):
        out = linear_logprobs(
            hidden, weight, targets, bias=bias, outputs=("entropy", "lse"), chunk_bytes=chunk_bytes, **options
        )
        return out.logp, out.entropy, out.lse

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("other", [0.0, 1.0], ids=["alone", "beside another term"])
def test_differentiating_twice_is_an_error(device, other):
    """Never a zero in silence, not even where the rest of the loss has a second derivative."""
    hidden, weight, targets = make(device)
    hidden.requires_grad_()
    loss = linear_logprobs(hidden, weight, targets).logp.sum()
    if other:
        loss = loss + other * hidden.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_the_op_itself_cannot_be_differentiated_twice():
    hidden, weight, targets = make()
    hidden.requires_grad_()
    out = OPS.linear_logprobs(hidden, weight, targets, None, None, 1.0, 0.0, 1.0, -100, 32, 0)
    (gradient,) = torch.autograd.grad(out[0].sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_a_backward_can_be_repeated(device):
    hidden, weight, targets = make(device)
    hidden.requires_grad_()
    logp = linear_logprobs(hidden, weight, targets).logp
    first, second = (torch.autograd.grad(logp.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 4), (0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
def test_any_leading_shape(device, shape, dtype):
    hidden, weight, targets = make(device, dtype, shape=shape, vocab=19, width=6)
    hidden.requires_grad_()
    out = linear_logprobs(hidden, weight.requires_grad_(), targets, outputs=ALL)
    assert all(field.shape == shape for field in out)
    flat = linear_logprobs(hidden.detach().reshape(-1, 6), weight.detach(), targets.reshape(-1), outputs=ALL)
    for a, b in zip(out, flat, strict=True):
        assert torch.equal(a.detach().reshape(-1), b)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape
    if targets.numel() == 0:
        assert weight.grad.eq(0).all()
    else:
        assert weight.grad.ne(0).any() == bool((targets != -100).any())


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT,
    "columns of a wider one": lambda t: torch.cat([t, torch.full_like(t, NAN)], 1)[:, : t.shape[1]],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda t: torch.cat([torch.full_like(t[:1], NAN), t])[1:],
}


@pytest.mark.parametrize(
    ("hidden_layout", "weight_layout"),
    [*((name, "contiguous") for name in LAYOUTS), *(("contiguous", name) for name in LAYOUTS), ("transposed", "transposed")],
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
def test_any_strides(device, hidden_layout, weight_layout, dtype):
    hidden, weight, targets = make(device, dtype, vocab=19, width=6)
    expected = exactly(hidden, weight, targets)
    upstream = upstream_of(targets.shape)
    straight = gradients(linear_logprobs, (hidden, weight), upstream, targets=targets)
    strided = LAYOUTS[hidden_layout](hidden).requires_grad_(), LAYOUTS[weight_layout](weight).requires_grad_()
    out = linear_logprobs(*strided, targets, outputs=ALL)
    assert_fields(out, expected, 1e-5)
    fields = [getattr(out, name) for name in SOURCES]
    grads = torch.autograd.grad(fields, strided, [g.to(device, F32) for g in upstream.values()])
    for a, b in zip(grads, straight, strict=True):
        assert distance(a, b) < {F32: 1e-6, BF16: 4e-3}[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("rows", [1, 5])
def test_expanded_rows(device, dtype, rows):
    """One hidden state for every target; its gradient is the sum. Likewise a weight whose rows are all the same."""
    hidden, weight, _ = make(device, dtype, shape=(1,), vocab=19, width=6)
    targets = torch.randint(0, 19, (rows,), device=device)
    one, many = leaf(hidden), leaf(hidden.repeat(rows, 1))
    a = linear_logprobs(one.expand(rows, 6), weight, targets, outputs=ALL)
    b = linear_logprobs(many, weight, targets, outputs=ALL)
    assert_fields(a, b, 1e-6)
    (a.logp.sum() + a.entropy.sum()).backward()
    (b.logp.sum() + b.entropy.sum()).backward()
    assert distance(one.grad, many.grad.double().sum(0, keepdim=True)) < {F32: 1e-6, BF16: 1e-2}[dtype]
    flat = leaf(weight[:1])
    out = linear_logprobs(hidden.expand(rows, 6), flat.expand(19, 6), targets, outputs=ALL)
    assert_close(out.logp, torch.full_like(out.logp, -math.log(19)), rtol=0, atol=1e-6)
    out.logp.sum().backward()
    assert flat.grad.abs().max() < {F32: 1e-5, BF16: 0.05}[dtype]  # all logits move together


def test_targets_of_any_strides_and_int32(device):
    hidden, weight, targets = make(device, shape=(4, 5))
    expected = linear_logprobs(hidden, weight, targets, outputs=ALL)
    for same in (targets.mT.contiguous().mT, targets.int(), targets.repeat_interleave(2, 1)[:, ::2]):
        out = linear_logprobs(hidden, weight, same, outputs=ALL)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    one = torch.tensor(3, device=device)
    assert torch.equal(
        linear_logprobs(hidden, weight, one.expand(4, 5)).logp, linear_logprobs(hidden, weight, one.repeat(4, 5)).logp
    )


@pytest.mark.parametrize("width", [1, 5, 33])
@pytest.mark.parametrize("vocab", [2, 7, 1025])
@pytest.mark.parametrize("rows", [1, 3])
def test_odd_sizes(device, rows, vocab, width):
    hidden, weight, targets = make(device, F32, (rows,), vocab, width, ignored=False)
    out = linear_logprobs(hidden, weight, targets, outputs=ALL)
    assert_fields(out, exactly(hidden, weight, targets), 1e-5)
    upstream = upstream_of(targets.shape)
    ours = gradients(linear_logprobs, (hidden, weight), upstream, targets=targets)
    wide = [hidden.cpu().double(), weight.cpu().double()]
    for a, e in zip(ours, gradients(reference.linear_logprobs, wide, upstream, targets=targets.cpu()), strict=True):
        assert distance(a, e) < 3e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_a_vocabulary_of_one(device, dtype):
    hidden, weight, _ = make(device, dtype, (5,), 1, 4)
    targets = torch.zeros(5, dtype=torch.int64, device=device)
    hidden, weight = leaf(hidden), leaf(weight)
    out = linear_logprobs(hidden, weight, targets, outputs=ALL)
    assert out.logp.eq(0).all()
    assert out.entropy.eq(0).all()
    assert out.sum_sq_probs.eq(1).all()
    assert out.is_top1.all()
    z = (hidden.double() @ weight.double().mT).squeeze(1).detach().cpu()
    assert_close(out.lse.detach().cpu().double(), z, rtol=0, atol=1e-6)
    assert_close(out.mean_logit.cpu().double(), z, rtol=0, atol=1e-6)
    d_hidden, d_weight = torch.autograd.grad([out.logp.sum(), out.entropy.sum()], (hidden, weight), retain_graph=True)
    assert d_hidden.eq(0).all()
    assert d_weight.eq(0).all()
    (d_lse,) = torch.autograd.grad(out.lse.sum(), hidden)
    assert torch.equal(d_lse, weight.detach().expand(5, 4))


def test_the_first_maximum_wins_ties_in_every_block(device):
    """Small integers: the logits are exact and tie all over the vocabulary."""
    hidden = torch.randint(-2, 3, (64, 3), device=device).float()
    weight = torch.randint(-2, 3, (200, 3), device=device).float()
    z = hidden @ weight.mT
    best = z.cpu().max(-1, keepdim=True).values
    first = (z.cpu() == best).int().argmax(-1)  # of the ones
    assert ((z.cpu() == best).sum(-1) > 1).float().mean() > 0.5
    for chunk_bytes in (None, 2000):
        for targets, expected in ((first, True), (200 - 1 - (z.cpu() == best).int().flip(-1).argmax(-1), None)):
            out = linear_logprobs(hidden, weight, targets.to(device), outputs=["is_top1"], chunk_bytes=chunk_bytes)
            wanted = torch.ones(64, dtype=torch.bool) if expected else targets == first
            assert torch.equal(out.is_top1.cpu(), wanted)


# ---------------------------------------------------------------------------------------------- chunks, bits and memory


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("chunk_bytes", [1, 500, 5000, 50_000, 1 << 20, 1 << 40])
def test_results_do_not_depend_on_the_chunk(device, dtype, chunk_bytes):
    hidden, weight, targets = make(device, dtype, vocab=130, width=8)
    options = options_of("everything", 13, 130, device)
    upstream = upstream_of(targets.shape)
    base = linear_logprobs(hidden, weight, targets, **options, outputs=ALL)
    out = linear_logprobs(hidden, weight, targets, **options, outputs=ALL, chunk_bytes=chunk_bytes)
    assert_fields(out, base, 1e-12 if dtype == F64 else 3e-6)
    tensors = hidden, weight, options.pop("bias")
    a = gradients(linear_logprobs, tensors, upstream, targets=targets, **options)
    b = gradients(linear_logprobs, tensors, upstream, targets=targets, **options, chunk_bytes=chunk_bytes)
    for x, y in zip(a, b, strict=True):
        assert distance(x, y) < {F64: 1e-12, F32: 1e-6, BF16: 4e-3, F16: 5e-4}[y.dtype] + (1e-7 if dtype == F64 else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("chunk_bytes", [None, 5000])
def test_equal_calls_give_equal_bits(device, dtype, chunk_bytes):
    hidden, weight, targets = make(device, dtype, shape=(67,))
    upstream = upstream_of(targets.shape)
    runs = []
    for _ in range(3):
        out = linear_logprobs(hidden, weight, targets, outputs=ALL, chunk_bytes=chunk_bytes)
        grads = gradients(linear_logprobs, (hidden, weight), upstream, targets=targets, chunk_bytes=chunk_bytes)
        runs.append((*out, *grads))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_threads(threads, dtype):
    """Large enough to be shared out: the same values with any number of threads, the same bits with the same number."""
    hidden, weight, targets = make("cpu", dtype, (256,), 2000, 16)
    upstream = upstream_of(targets.shape)
    runs = []
    for n in (1, 2, 2, 3):
        threads(n)
        out = linear_logprobs(hidden, weight, targets, outputs=ALL)
        runs.append((*out, *gradients(linear_logprobs, (hidden, weight), upstream, targets=targets)))
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
    assert_fields(prefkern.LinearLogprobs(*runs[0][:6]), exactly(hidden, weight, targets), VALUE_TOLERANCE[dtype])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert distance(a, b) < {F64: 1e-12, F32: 2e-6, BF16: 2e-3, F16: 3e-4, torch.bool: 1e-9}[a.dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("backward", [False, True])
def test_workspace_is_what_the_plan_says(device, allocations, dtype, backward):
    """Nothing of N x V elements is allocated: beside results, what the planner announces and a few numbers per row."""
    rows, vocab, width, budget = 256, 10_000, 16, 1 << 18
    hidden, weight, targets = make(device, dtype, (rows,), vocab, width, ignored=False)
    if backward:
        hidden.requires_grad_()
        weight.requires_grad_()

    def call():
        out = linear_logprobs(hidden, weight, targets, outputs=ALL, chunk_bytes=budget)
        return torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight)) if backward else out

    call()  # what the GEMM library keeps for itself
    used = allocations(call)
    plan = prefkern.plan_chunks(rows, width, vocab, dtype=dtype, device=device, backward=backward, chunk_bytes=budget)
    assert plan.workspace_bytes <= budget
    results = (rows + vocab) * width * hidden.element_size() + rows * width * 4 if backward else 0
    assert used.peak <= plan.workspace_bytes + results + 128 * rows + 8192
    if device == "cpu":
        assert used.largest < rows * vocab * hidden.element_size() / 4


PEAK = """
import sys
import torch
import prefkern

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

rows, vocab, width = map(int, sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
hidden = torch.randn(rows, width).to(dtype).requires_grad_()
weight = torch.randn(vocab, width).to(dtype).requires_grad_()
targets = torch.randint(0, vocab, (rows,))
small = prefkern.linear_logprobs(hidden[:4], weight[:64], targets[:4] % 64, outputs=["entropy"])
torch.autograd.grad(small.logp.sum() + small.entropy.sum(), (hidden, weight))
try:
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from here
except OSError:
    pass
before = status("VmRSS")
out = prefkern.linear_logprobs(hidden, weight, targets, outputs=["entropy"])
(out.logp.sum() + out.entropy.sum()).backward()
assert out.logp.isfinite().all()
print(status("VmHWM") - before - hidden.nbytes - weight.nbytes)
"""
MIB = 1 << 20


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "dtype", "limit"),
    [
        (2048, 50_000, 64, "float32", 64 * MIB),
        (2048, 50_000, 64, "bfloat16", 64 * MIB),
        pytest.param(4096, 128_256, 256, "float32", 128 * MIB, marks=pytest.mark.slow),
        pytest.param(4096, 128_256, 256, "bfloat16", 128 * MIB, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_a_process(run_python, rows, vocab, width, dtype, limit):
    """Forward and backward, beside inputs and gradients, as the system counts it. The logits would be 400 MB, 2 GB."""
    extra = int(run_python(PEAK, rows, vocab, width, dtype, OMP_NUM_THREADS="1"))
    assert extra < limit
    assert limit < rows * vocab * 4 / 5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(device, op_log, mode):
    hidden, weight, targets = make(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    saved = []
    with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = linear_logprobs(hidden, weight, targets, outputs=ALL)
    assert saved == []
    assert all(field.grad_fn is None and not field.requires_grad for field in out)
    assert op_log.names() == ["linear_logprobs_fwd"]
    assert op_log.args("linear_logprobs_fwd")[-2] == 31  # the five outputs, not the statistics of the backward


def test_nothing_is_saved_when_nothing_is_trained(device, op_log):
    out = linear_logprobs(*make(device))
    assert out.logp.grad_fn is None
    assert op_log.args("linear_logprobs_fwd")[-2] == 0


def test_what_a_backward_keeps(device):
    """The inputs themselves and a few numbers per row."""
    hidden, weight, targets = make(device)
    hidden.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_logprobs(hidden, weight, targets, outputs=ALL)
    inputs = {t.data_ptr() for t in (hidden, weight, targets)}
    assert inputs <= {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in inputs) <= 13 * 4 * 4


# ------------------------------------------------------------------------------------------------------- extreme logits


@pytest.mark.parametrize("chunk_bytes", [None, 600])
def test_huge_logits(device, chunk_bytes):
    logits = torch.randn(6, 100)
    logits[:, 17] = 1e4
    logits[:, 40] = -1e4
    logits[3:, 18] = 1e4
    targets = torch.tensor([17, 40, 5, 18, 17, 5])
    identity = torch.eye(100)  # the logits, exactly
    out = linear_logprobs(logits.to(device), identity.to(device), targets.to(device), outputs=ALL, chunk_bytes=chunk_bytes)
    expected = exactly(logits, identity, targets)
    assert_close(out.logp.cpu().double(), expected.logp, rtol=1e-6, atol=1e-6)
    assert out.logp[0] == 0
    assert_close(out.entropy.cpu(), torch.tensor([0.0] * 3 + [math.log(2)] * 3), rtol=0, atol=1e-6)
    assert_close(out.lse.cpu().double(), expected.lse, rtol=2e-7, atol=0)
    assert out.is_top1.tolist() == [True, False, False, False, True, False]
    upstream = upstream_of((6,))
    d_logits, _ = gradients(linear_logprobs, (logits.to(device), identity.to(device)), upstream, targets=targets.to(device))
    e_logits, _ = gradients(reference.linear_logprobs, (logits.double(), identity.double()), upstream, targets=targets)
    assert_close(d_logits.cpu().double(), e_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [None, 600])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
def test_tokens_that_a_bias_of_minus_infinity_forbids(device, dtype, chunk_bytes):
    hidden, weight, targets = make(device, dtype, vocab=100, width=8)
    allowed = torch.rand(100) < 0.3
    allowed[targets.cpu().clamp_min(0)] = True
    bias = torch.where(allowed, 0.0, -INF).to(device)
    out = linear_logprobs(hidden, weight, targets, bias=bias, outputs=ALL, chunk_bytes=chunk_bytes)
    expected = exactly(hidden, weight, targets, bias)
    assert expected.mean_logit[0] == -INF
    assert_fields(out, expected, VALUE_TOLERANCE[dtype])
    kept = linear_logprobs(
        hidden, weight[allowed.to(device)], torch.where(targets < 0, targets, allowed.cumsum(0).to(device)[targets] - 1)
    )
    assert_close(out.logp, kept.logp, rtol=0, atol=1e-5)
    upstream = upstream_of(targets.shape)
    grads = gradients(linear_logprobs, (hidden, weight, bias), upstream, targets=targets, chunk_bytes=chunk_bytes)
    wide = [t.cpu().double() for t in (hidden, weight, bias)]
    exact = gradients(reference.linear_logprobs, wide, upstream, targets=targets.cpu())
    for a, e in zip(grads, exact, strict=True):
        assert distance(a, e) < {F64: 1e-12, F32: 2e-6, BF16: 4e-3}[a.dtype] + (1e-6 if dtype == F64 else 0)
    assert grads[1][~allowed.to(device)].eq(0).all()
    assert grads[2][~allowed.to(device)].eq(0).all()


def test_a_forbidden_target_has_no_probability(device):
    hidden, weight, _ = make(device, vocab=10, width=8)
    bias = torch.zeros(10, device=device)
    bias[4] = -INF
    out = linear_logprobs(hidden, weight, torch.full((13,), 4, device=device), bias=bias, outputs=ALL)
    assert out.logp.eq(-INF).all()
    assert out.entropy.isfinite().all()
    assert not out.is_top1.any()


def test_no_token_allowed_or_an_infinite_logit_is_nan(device):
    hidden, weight, targets = make(device, vocab=10, width=8, ignored=False)
    for value, where in ((-INF, slice(None)), (INF, slice(3, 4)), (NAN, slice(3, 4))):
        bias = torch.zeros(10, device=device)
        bias[where] = value
        out = linear_logprobs(hidden, weight, targets, bias=bias, outputs=("entropy", "sum_sq_probs"))
        assert out.logp.isnan().all(), value
        assert out.entropy.isnan().all(), value
        assert out.sum_sq_probs.isnan().all(), value


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
def test_equal_logits_have_the_entropy_of_the_vocabulary(device, dtype, offset):
    hidden, weight, targets = make(device, dtype, vocab=777)
    bias = torch.full((777,), offset, device=device)
    out = linear_logprobs(hidden * 0, weight, targets.clamp_min(0), bias=bias, outputs=ALL)
    uniform = torch.full_like(out.logp, math.log(777))
    assert_close(out.logp, -uniform, rtol=0, atol=1e-6)
    assert_close(out.entropy, uniform, rtol=0, atol=1e-6)
    assert_close(out.lse, uniform + offset, rtol=2e-7, atol=1e-6)
    assert_close(out.sum_sq_probs, torch.full_like(out.logp, 1 / 777), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_a_row_of_nan_poisons_only_itself(device, dtype, chunk_bytes):
    hidden, weight, targets = make(device, dtype, ignored=False)
    poisoned = hidden.clone()
    poisoned[4] = NAN
    others = torch.arange(13) != 4
    clean = linear_logprobs(hidden, weight, targets, outputs=ALL, chunk_bytes=chunk_bytes)
    out = linear_logprobs(poisoned, weight, targets, outputs=ALL, chunk_bytes=chunk_bytes)
    for a, b in zip(out[:5], clean[:5], strict=True):
        assert a[4].isnan()
        assert_close(a[others], b[others], rtol=0, atol=1e-5)
    assert not out.is_top1[4]
    upstream = upstream_of((13,))
    d_clean, _ = gradients(linear_logprobs, (hidden, weight), upstream, targets=targets, chunk_bytes=chunk_bytes)
    d_hidden, d_weight = gradients(linear_logprobs, (poisoned, weight), upstream, targets=targets, chunk_bytes=chunk_bytes)
    assert d_hidden[4].isnan().all()
    assert distance(d_hidden[others], d_clean[others]) < {F64: 1e-12, F32: 1e-6, BF16: 4e-3, F16: 5e-4}[dtype]
    assert d_weight.isnan().all()  # a sum over the rows cannot hide it


# --------------------------------------------------------------------------------------------------------- ignored rows


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_ignored_rows_are_never_looked_at(device, dtype, garbage):
    """Garbage in an ignored row's hidden state, temperature of its own, or upstream gradient changes nothing."""
    hidden, weight, targets = make(device, dtype)
    ignored = targets == -100
    spoiled, upstream = hidden.clone(), upstream_of(targets.shape)
    spoiled[ignored] = garbage
    bad_upstream = {name: torch.where(ignored.cpu(), garbage, g) for name, g in upstream.items()}
    out = linear_logprobs(spoiled, weight, targets, outputs=ALL)
    assert all(field[ignored].eq(0).all() for field in out)
    clean = linear_logprobs(hidden, weight, targets, outputs=ALL)
    assert all(torch.equal(a, b) for a, b in zip(out, clean, strict=True))
    bias = torch.zeros(301, device=device)
    expected = gradients(linear_logprobs, (hidden, weight, bias), upstream, targets=targets)
    actual = gradients(linear_logprobs, (spoiled, weight, bias), bad_upstream, targets=targets)
    assert actual[0][ignored].eq(0).all()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_all_rows_ignored(device, dtype):
    hidden, weight, targets = make(device, dtype)
    targets.fill_(-100)
    hidden, bias = torch.full_like(hidden, NAN), torch.zeros(301, device=device)
    out = linear_logprobs(hidden, weight, targets, outputs=ALL)
    assert all(field.eq(0).all() for field in out)
    grads = gradients(linear_logprobs, (hidden, weight, bias), upstream_of(targets.shape), targets=targets)
    assert all(g.eq(0).all() for g in grads)
    assert [g.dtype for g in grads] == [dtype, dtype, F32]


def test_ignored_rows_equal_the_call_without_them(device):
    hidden, weight, targets = make(device)
    counts = targets != -100
    temperature = torch.rand(13, device=device) + 0.5
    some = linear_logprobs(hidden, weight, targets, temperature=temperature, outputs=ALL)
    few = linear_logprobs(hidden[counts], weight, targets[counts], temperature=temperature[counts], outputs=ALL)
    for a, b in zip(some, few, strict=True):
        assert_close(a[counts], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ignore_index", [-1, 3, 301, 10**12])
def test_any_number_may_be_the_ignore_index(device, ignore_index):
    hidden, weight, targets = make(device, ignored=False)
    targets[::2] = ignore_index
    targets[1] = 7
    out = linear_logprobs(hidden, weight, targets, ignore_index=ignore_index, outputs=ALL)
    assert all(field[::2].eq(0).all() for field in out)
    assert_fields(out, exactly(hidden, weight, targets, ignore_index=ignore_index), 1e-5)
    assert out.logp[1] < 0


# ----------------------------------------------------------------------------------------------------------- properties

sizes = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 9))  # rows, vocab, width


@given(
    sizes=sizes,
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    dtype=st.sampled_from(DTYPES),
)
def test_bounds(sizes, seed, scale, dtype):
    """logp <= 0, 0 <= entropy <= log V, 1/V <= sum p^2 <= 1, mean z <= lse: whatever the inputs."""
    torch.manual_seed(seed)
    rows, vocab, width = sizes
    hidden, weight = torch.randn(rows, width).to(dtype) * scale, torch.randn(vocab, width).to(dtype)
    out = linear_logprobs(hidden, weight, torch.randint(0, vocab, (rows,)), outputs=ALL)
    assert out.logp.isfinite().all()
    assert (out.logp <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(vocab) + 1e-6).all()
    assert (out.sum_sq_probs <= 1 + 1e-6).all()
    assert (out.sum_sq_probs >= 1 / vocab * (1 - 1e-5)).all()
    assert (out.mean_logit <= out.lse + 1e-6 * (1 + out.lse.abs())).all()


@given(sizes=sizes, seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_only_lse_and_mean(sizes, seed, shift):
    torch.manual_seed(seed)
    rows, vocab, width = sizes
    hidden, weight = torch.randn(rows, width, dtype=F64), torch.randn(vocab, width, dtype=F64)
    targets = torch.randint(0, vocab, (rows,))
    a = linear_logprobs(hidden, weight, targets, outputs=ALL)
    b = linear_logprobs(hidden, weight, targets, bias=torch.full((vocab,), shift, dtype=F64), outputs=ALL)
    moved = a._replace(lse=a.lse + shift, mean_logit=a.mean_logit + shift)
    # Not is_top1: a shift may round two logits into a tie.
    assert_fields(b._replace(is_top1=None), moved._replace(is_top1=None), 1e-10)


@given(sizes=sizes, seed=st.integers(0, 2**31))
def test_rows_and_tokens_may_come_in_any_order(sizes, seed):
    torch.manual_seed(seed)
    rows, vocab, width = sizes
    hidden, weight = torch.randn(rows, width, dtype=F64), torch.randn(vocab, width, dtype=F64)
    targets = torch.randint(0, vocab, (rows,))
    base = linear_logprobs(hidden, weight, targets, outputs=ALL)
    order, tokens = torch.randperm(rows), torch.randperm(vocab)
    place = tokens.argsort()
    by_row = linear_logprobs(hidden[order], weight, targets[order], outputs=ALL)
    assert_fields(by_row, type(base)(*(field[order] for field in base)), 1e-12)
    assert_fields(linear_logprobs(hidden, weight[tokens], place[targets], outputs=ALL), base, 1e-12)
    upstream = upstream_of((rows,))
    d_hidden, d_weight = gradients(linear_logprobs, (hidden, weight), upstream, targets=targets)
    p_hidden, p_weight = gradients(linear_logprobs, (hidden, weight[tokens]), upstream, targets=place[targets])
    assert_close(p_hidden, d_hidden, rtol=1e-10, atol=1e-11)
    assert_close(p_weight, d_weight[tokens], rtol=1e-10, atol=1e-11)


def test_probabilities_of_all_targets_sum_to_one(device):
    hidden, weight, _ = make(device, shape=(4,), vocab=57)
    each = hidden.repeat_interleave(57, 0)
    targets = torch.arange(57, device=device).repeat(4)
    out = linear_logprobs(each, weight, targets, outputs=["entropy", "is_top1", "sum_sq_probs"])
    log_p = out.logp.view(4, 57).double()
    assert_close(log_p.exp().sum(-1), torch.ones(4, dtype=F64, device=device), rtol=0, atol=1e-6)
    assert_close(-(log_p.exp() * log_p).sum(-1), out.entropy.view(4, 57)[:, 0].double(), rtol=0, atol=1e-5)
    assert_close(log_p.exp().square().sum(-1), out.sum_sq_probs.view(4, 57)[:, 0].double(), rtol=0, atol=1e-6)
    assert out.is_top1.view(4, 57).sum(-1).eq(1).all()


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("dtype", [BF16, F16], ids=names)
def test_autocast_casts_hidden_and_weight(device, dtype):
    hidden, weight, targets = make(device)
    bias = torch.randn(301, device=device)
    narrow = linear_logprobs(hidden.to(dtype), weight.to(dtype), targets, bias=bias, outputs=ALL)
    leaves = leaf(hidden), leaf(weight), leaf(bias)
    with torch.autocast(device, dtype):
        out = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], outputs=ALL)
        mixed = linear_logprobs(hidden.to(dtype), weight, targets, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(out, narrow, strict=True))
    assert torch.equal(mixed.logp, narrow.logp)
    assert out.logp.dtype == F32
    grads = torch.autograd.grad(out.logp.sum(), leaves)
    expected = torch.autograd.grad(linear_logprobs(*leaves[:2], targets, bias=leaves[2]).logp.sum(), leaves)
    for g, e in zip(grads, expected, strict=True):
        assert g.dtype == F32
        assert distance(g, e) < 2e-2


def test_autocast_leaves_float64_alone():
    hidden, weight, targets = make("cpu", F64)
    with torch.autocast("cpu", BF16):
        out = linear_logprobs(hidden, weight, targets)
    assert torch.equal(out.logp, linear_logprobs(hidden, weight, targets).logp)


def op_arguments(dtype, options, grad, device):
    hidden, weight, targets = make(device, dtype, (6,), 9, 4)
    options = options_of(options, 6, 9, device)
    bias, temperature = options.get("bias"), options.get("temperature", 1.0)
    rows = temperature if isinstance(temperature, torch.Tensor) else None
    tensors = [None if t is None else leaf(t) if grad else t for t in (hidden, weight, bias)]
    number = 1.0 if rows is not None else temperature
    numbers = (number, options.get("softcap", 0.0), options.get("logit_scale", 1.0), -100)
    return (tensors[0], tensors[1], targets, tensors[2], rows), numbers


@pytest.mark.parametrize(("dtype", "options"), [(F32, "plain"), (BF16, "everything")], ids=str)
@pytest.mark.parametrize("outputs", [0, 9, 31])
def test_opcheck_forward(device, dtype, options, outputs):
    tensors, numbers = op_arguments(dtype, options, False, device)
    opcheck(OPS.linear_logprobs_fwd.default, (*tensors, *numbers, outputs, 0))
    opcheck(OPS.linear_logprobs.default, (*tensors, *numbers, outputs | 32, 0))
    tensors, numbers = op_arguments(dtype, options, True, device)
    opcheck(OPS.linear_logprobs.default, (*tensors, *numbers, outputs | 32, 0))


@pytest.mark.parametrize(("dtype", "rows"), [(F32, "some"), (BF16, "some"), (BF16, "none")], ids=str)
@pytest.mark.parametrize("needs", range(1, 8))
def test_opcheck_backward(device, dtype, needs, rows):
    tensors, numbers = op_arguments(dtype, "everything", False, device)
    if rows == "none":
        tensors[2].fill_(-100)
    out = OPS.linear_logprobs_fwd(*tensors, *numbers, 63, 0)
    upstream = (torch.randn(6, device=device), None, torch.randn(6, device=device))
    opcheck(OPS.linear_logprobs_backward.default, (*upstream, *tensors, out[1], out[6], *numbers, needs, 0))


COMPILED = {
    "plain": lambda n, d: {},
    "outputs": lambda n, d: {"outputs": ALL},
    "everything": lambda n, d: {
        "temperature": torch.rand(n, device=d) + 0.5, "softcap": 3.0, "logit_scale": 0.5, "outputs": ALL
    },
}  # fmt: skip


@pytest.mark.parametrize(("options", "ranks"), [("plain", 1), ("outputs", 1), ("everything", 1), ("everything", 2)])
def test_one_graph_for_any_number_of_tokens(device, options, ranks):
    """fullgraph, forward and backward, five sizes, at most two compilations (the second has a symbolic N)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(hidden, weight, targets, bias, **options):
        out = linear_logprobs(hidden * 2, weight, targets, bias=bias, **options)
        total = out.logp.sum()
        for field in out[1:3]:
            if field is not None:
                total = total + 0.5 * field.sum()
        return total, out

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (5, 8, 13, 21, 34):
        shape = (rows,) if ranks == 1 else (3, rows)
        hidden, weight, targets = make(device, F32, shape, 40, 8)
        made = COMPILED[options](rows, device)
        bias = torch.randn(40, device=device)
        a, b = ([leaf(t) for t in (hidden, weight, bias)] for _ in range(2))
        eager, out = loss(a[0], a[1], targets, a[2], **made)
        total, compiled_out = compiled(b[0], b[1], targets, b[2], **made)
        eager.backward()
        total.backward()
        assert_close(total, eager, rtol=1e-6, atol=1e-5)
        assert_fields(compiled_out, [None if f is None else f.detach().cpu() for f in out], 1e-5)
        for x, y in zip(a, b, strict=True):
            assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_compiled_under_autocast_and_without_gradients(device):
    torch._dynamo.reset()
    hidden, weight, targets = make(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def head(hidden, weight):
        with torch.autocast(device, BF16):
            return linear_logprobs(hidden, weight, targets, outputs=["entropy"])

    expected = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, outputs=["entropy"])
    with torch.no_grad():
        out = head(hidden.requires_grad_(), weight)
    assert out.logp.grad_fn is None
    assert torch.equal(out.logp, expected.logp)
    assert torch.equal(out.entropy, expected.entropy)


@pytest.mark.slow
def test_compiled_by_inductor(device):
    torch._dynamo.reset()
    hidden, weight, targets = make(device)
    compiled = torch.compile(lambda *a: linear_logprobs(*a, targets, outputs=["entropy"]), fullgraph=True)
    upstream = upstream_of(targets.shape, ["logp", "entropy"])
    ours, eager = (
        gradients(lambda h, w, bias, outputs, f=f: f(h, w), (hidden, weight), upstream)
        for f in (compiled, lambda *a: linear_logprobs(*a, targets, outputs=["entropy"]))
    )
    for a, b in zip(ours, eager, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_meta_tensors_give_shapes():
    out = linear_logprobs(
        torch.empty(2, 3, 4, device="meta"),
        torch.empty(5, 4, device="meta"),
        torch.empty(2, 3, dtype=torch.int64, device="meta"),
        outputs=ALL,
    )
    assert all(field.shape == (2, 3) and field.device.type == "meta" for field in out)
    assert [field.dtype for field in out] == [F32] * 5 + [torch.bool]


# ------------------------------------------------------------------------------------------------------------ bad input

H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2])

BAD = {
    # name: (arguments, error, what its message says)
    "hidden: a list": ({"hidden": [[0.0] * 4] * 3}, TypeError, "hidden.*list.*Tensor"),
    "hidden: no dimension": ({"hidden": torch.tensor(1.0), "targets": torch.tensor(0)}, ValueError, r"hidden.*\[\]"),
    "hidden: too many rows": ({"hidden": torch.zeros(4, 4)}, ValueError, r"targets.*\[3\].*hidden.*\[4, 4\]"),
    "hidden: too deep": ({"hidden": torch.zeros(1, 3, 4)}, ValueError, r"targets.*\[3\].*hidden.*\[1, 3, 4\]"),
    "hidden: another width": ({"hidden": torch.zeros(3, 6)}, ValueError, "hidden.*6.*weight.*4"),
    "hidden: no width": ({"hidden": torch.zeros(3, 0), "weight": torch.zeros(5, 0)}, ValueError, "hidden.*H = 0"),
    "hidden: no width, deep": (
        {"hidden": torch.zeros(1, 3, 0), "weight": torch.zeros(5, 0), "targets": T[None]},
        ValueError,
        "hidden.*H = 0",
    ),
    "hidden: integers": ({"hidden": H.long(), "weight": W.long()}, TypeError, "hidden.*Long.*float32"),
    "hidden: complex": ({"hidden": H.cfloat(), "weight": W.cfloat()}, TypeError, "hidden.*ComplexFloat.*float32"),
    "hidden: bool": ({"hidden": H.bool(), "weight": W.bool()}, TypeError, "hidden.*Bool"),
    "hidden: another dtype": ({"hidden": H.bfloat16()}, TypeError, "hidden.*BFloat16.*weight.*Float.*equal"),
    "hidden: on meta": ({"hidden": H.to("meta")}, ValueError, "(weight|hidden) is on.*must be on the same device"),
    "weight: None": ({"weight": None}, TypeError, "weight.*NoneType.*Tensor"),
    "weight: a vector": ({"weight": torch.zeros(4)}, ValueError, r"weight.*\[4\].*\[V, H\]"),
    "weight: too deep": ({"weight": torch.zeros(1, 5, 4)}, ValueError, r"weight.*\[1, 5, 4\].*\[V, H\]"),
    "weight: transposed": ({"weight": torch.zeros(4, 5)}, ValueError, "hidden.*4.*weight.*5"),
    "weight: no vocabulary": ({"weight": torch.zeros(0, 4), "targets": T * 0 - 100}, ValueError, "weight.*V = 0"),
    "weight: integers": ({"weight": W.int()}, TypeError, "weight.*Int.*float32"),
    "weight: another dtype": ({"weight": W.half()}, TypeError, "hidden.*Float.*weight.*Half.*equal"),
    "weight: on meta": ({"weight": W.to("meta")}, ValueError, "weight.*meta.*hidden.*same device"),
    "targets: a list": ({"targets": [0, 1, 2]}, TypeError, "targets.*list.*Tensor"),
    "targets: too few": ({"targets": T[:2]}, ValueError, r"targets.*\[2\].*\[3\] is expected"),
    "targets: a column": ({"targets": T[:, None]}, ValueError, r"targets.*\[3, 1\].*\[3\] is expected"),
    "targets: beyond": ({"targets": torch.tensor([0, 5, 2])}, ValueError, "targets.* 5.*0 to 4.*ignore_index = -100"),
    "targets: negative": ({"targets": torch.tensor([0, 1, -1])}, ValueError, "targets.* -1.*0 to 4"),
    "targets: not the ignore_index": (
        {"targets": torch.tensor([0, 1, -100]), "ignore_index": -1},
        ValueError,
        "targets.* -100.*ignore_index = -1",
    ),
    "targets: far beyond, int32": (
        {"targets": torch.tensor([0, 2**31 - 1, 2]).int()},
        ValueError,
        "targets.* 2147483647",
    ),
    "targets: floats": ({"targets": T.float()}, TypeError, "targets.*Float.*int64, int32"),
    "targets: bool": ({"targets": T.bool()}, TypeError, "targets.*Bool.*int64, int32"),
    "targets: int16": ({"targets": T.short()}, TypeError, "targets.*Short.*int64, int32"),
    "targets: on meta": ({"targets": T.to("meta")}, ValueError, "targets.*meta.*same device"),
    "bias: a list": ({"bias": [0.0] * 5}, TypeError, "bias.*list.*Tensor"),
    "bias: too short": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[4\].*\[5\]"),
    "bias: a row": ({"bias": torch.zeros(1, 5)}, ValueError, r"bias.*\[1, 5\].*\[5\]"),
    "bias: a number": ({"bias": torch.tensor(0.0)}, ValueError, r"bias.*\[\].*\[5\]"),
    "bias: integers": ({"bias": torch.zeros(5).long()}, TypeError, "bias.*Long.*float32"),
    "bias: on meta": ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias.*meta.*same device"),
    "temperature: zero": ({"temperature": 0.0}, ValueError, "temperature is 0.*positive"),
    "temperature: negative": ({"temperature": -1}, ValueError, "temperature is -1.*positive"),
    "temperature: NaN": ({"temperature": NAN}, ValueError, "temperature is nan.*positive"),
    "temperature: infinite": ({"temperature": INF}, ValueError, "temperature is inf.*finite"),
    "temperature: a word": ({"temperature": "1"}, TypeError, "temperature is '1'.*number or a tensor"),
    "temperature: None": ({"temperature": None}, TypeError, "temperature is None.*number"),
    "temperature: a list": ({"temperature": [1.0, 1.0, 1.0]}, TypeError, r"temperature is \[1.0.*tensor"),
    "temperature: a row of zero": (
        {"temperature": torch.tensor([1.0, 0.0, 1.0])},
        ValueError,
        "temperature.* 0.*positive",
    ),
    "temperature: a negative row": (
        {"temperature": torch.tensor([1.0, 1.0, -2.0])},
        ValueError,
        "temperature.* -2.*positive",
    ),
    "temperature: a row of NaN": (
        {"temperature": torch.tensor([NAN, 1.0, 1.0])},
        ValueError,
        "temperature.* nan.*positive",
    ),
    "temperature: an infinite row": (
        {"temperature": torch.tensor([1.0, INF, 1.0])},
        ValueError,
        "temperature.* inf.*finite",
    ),
    "temperature: wrong shape": (
        {"temperature": torch.ones(2)},
        ValueError,
        r"temperature.*\[2\].*broadcasts to \[3\]",
    ),
    "temperature: too deep": (
        {"temperature": torch.ones(1, 3)},
        ValueError,
        r"temperature.*\[1, 3\].*broadcasts to \[3\]",
    ),
    "temperature: trained": (
        {"temperature": torch.ones(3, requires_grad=True)},
        ValueError,
        "temperature.*gradient.*detach",
    ),
    "temperature: integers": ({"temperature": torch.ones(3).int()}, TypeError, "temperature.*Int.*float32"),
    "temperature: on meta": (
        {"temperature": torch.ones(3, device="meta")},
        ValueError,
        "temperature.*meta.*same device",
    ),
    "softcap: zero": ({"softcap": 0}, ValueError, "softcap is 0.*positive"),
    "softcap: negative": ({"softcap": -30.0}, ValueError, "softcap is -30.*positive"),
    "softcap: NaN": ({"softcap": NAN}, ValueError, "softcap is nan.*positive"),
    "softcap: infinite": ({"softcap": INF}, ValueError, "softcap is inf.*finite"),
    "softcap: a word": ({"softcap": "30"}, TypeError, "softcap is '30'.*number"),
    "softcap: a tensor": ({"softcap": torch.tensor([1.0, 2.0])}, TypeError, "softcap is tensor.*number"),
    "logit_scale: zero": ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.*positive"),
    "logit_scale: negative": ({"logit_scale": -0.5}, ValueError, "logit_scale is -0.5.*positive"),
    "logit_scale: NaN": ({"logit_scale": NAN}, ValueError, "logit_scale is nan.*positive"),
    "logit_scale: infinite": ({"logit_scale": INF}, ValueError, "logit_scale is inf.*finite"),
    "logit_scale: None": ({"logit_scale": None}, TypeError, "logit_scale is None.*number"),
    "logit_scale: trained": (
        {"logit_scale": torch.tensor(1.0, requires_grad=True)},
        TypeError,
        "logit_scale is tensor.*number",
    ),
    "ignore_index: None": ({"ignore_index": None}, TypeError, "ignore_index is None.*integer"),
    "ignore_index: a float": ({"ignore_index": -100.0}, TypeError, "ignore_index is -100.0.*integer"),
    "outputs: a string": ({"outputs": "entropy"}, ValueError, r"outputs.*'entropy'.*\('entropy',\)"),
    "outputs: unknown": ({"outputs": ["entropi"]}, ValueError, "outputs.*'entropi'.*'entropy', 'lse'"),
    "outputs: logp": ({"outputs": ["logp"]}, ValueError, "outputs.*'logp'.*'entropy', 'lse'"),
    "outputs: None": ({"outputs": None}, TypeError, "outputs is None.*names"),
    "outputs: not names": ({"outputs": [1]}, ValueError, "outputs has 1.*'entropy'"),
    "outputs: lists": ({"outputs": [["lse"]]}, ValueError, r"outputs has \['lse'\].*'entropy'"),
    "chunk_bytes: zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0.*positive"),
    "chunk_bytes: negative": ({"chunk_bytes": -1}, ValueError, "chunk_bytes is -1.*positive"),
    "chunk_bytes: too large": ({"chunk_bytes": 1 << 63}, ValueError, "chunk_bytes is 9223372036854775808.*below"),
    "chunk_bytes: a float": ({"chunk_bytes": 0.5}, TypeError, "chunk_bytes is 0.5.*integer"),
    "chunk_bytes: a word": ({"chunk_bytes": "1M"}, TypeError, "chunk_bytes is '1M'.*integer"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(device, validation, name, grad):
    """The CPU always looks at values; a GPU does under validation."""
    validation(True)
    changes, error, message = BAD[name]
    arguments = {"hidden": H, "weight": W, "targets": T, **changes}
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            trained = value.requires_grad or (grad and key in NEEDS and value.is_floating_point())
            arguments[key] = value.detach().to(device).requires_grad_(trained)
    with pytest.raises(error, match=message) as caught:
        linear_logprobs(**arguments)
    assert caught.type is error


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_bad_values_on_a_gpu_are_nan_without_validation(device, validation):
    validation(False)
    hidden, weight, _ = make(device, shape=(4,), vocab=10)
    temperature = torch.tensor([1.0, 1.0, -1.0, 1.0], device=device)
    out = linear_logprobs(hidden, weight, torch.tensor([0, 10, 3, -1], device=device), temperature=temperature, outputs=ALL)
    assert out.logp.isnan().tolist() == [False, True, True, True]


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_float64_is_refused_on_a_gpu(device):
    with pytest.raises(TypeError, match=r"hidden.*Double on cuda.*float64 on the CPU"):
        linear_logprobs(H.double().to(device), W.double().to(device), T.to(device))
