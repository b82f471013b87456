"""logits_logprobs against its float64 definition, its gradients, its memory, and everything it must refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import logits_logprobs, reference

ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
SOURCES = ("logp", "entropy", "lse")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = [F64, F32, BF16, F16]
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern


def names(dtype):
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def make(device="cpu", dtype=F32, shape=(13,), vocab=2777, ignored=True):
    """logits of standard deviation 3, targets; every third row is ignored, every second target the best."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    logits = (torch.randn(*shape, vocab) * 3).to(dtype)
    targets = torch.randint(0, vocab, shape)
    targets.view(-1)[::2] = logits.argmax(-1).view(-1)[::2]
    if ignored:
        targets.view(-1)[1::3] = -100
    return logits.to(device), targets.to(device)


OPTIONS = {
    "plain": lambda n: {},
    "temperature": lambda n: {"temperature": 0.7},
    "row temperature": lambda n: {"temperature": torch.rand(n) + 0.5},
    "softcap": lambda n: {"softcap": 5.0},
    "logit_scale": lambda n: {"logit_scale": 0.3},
    "everything": lambda n: {"temperature": torch.rand(n) + 0.5, "softcap": 6.0, "logit_scale": 1.7},
}


def options_of(name, rows, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[name](rows).items()}


def widened(options):
    return {k: v.cpu().double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def exactly(logits, targets, **options):
    """The definition, on the same numbers, in float64 on the CPU."""
    return reference.logits_logprobs(logits.cpu().double(), targets.cpu(), **{"outputs": ALL, **widened(options)})


def assert_fields(actual, expected, tolerance, rtol=0.0):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert a.shape == e.shape
            assert_close(
                a.detach().cpu().to(e.dtype), e.detach().cpu(), rtol=rtol, atol=tolerance, equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip


def leaf(t):
    return t.detach().clone().requires_grad_()


def upstream_of(shape, sources=SOURCES):
    return {name: torch.randn(shape, dtype=F64) for name in sources}


def apply(out, upstream, inputs):
    fields = [getattr(out, name) for name in upstream]
    grads = [g.to(f.device, f.dtype) for g, f in zip(upstream.values(), fields, strict=True)]
    return torch.autograd.grad(fields, inputs, grads)[0]


def gradient(function, logits, upstream, targets, **options):
    x = leaf(logits)
    return apply(function(x, targets, outputs=ALL, **options), upstream, x)


def distance(actual, expected):
    """Relative error in norm."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", OPTIONS)
def test_values(device, dtype, options):
    logits, targets = make(device, dtype)
    options = options_of(options, 13, device)
    out = logits_logprobs(logits, targets, **options, outputs=ALL)
    assert_fields(out, exactly(logits, targets, **options), 1e-11 if dtype == F64 else 1e-5)
    assert {t.dtype for t in out[:5]} == {F64 if dtype == F64 else F32}
    assert out.is_top1.dtype == torch.bool
    assert 0 < out.is_top1.sum() < 13
    assert {t.device for t in out} == {logits.device}


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 17, 63, 65, 127, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", ["plain", "softcap"])
def test_any_vocabulary_size(device, dtype, vocab, options):
    """Around the widths of vectors and tiles, with targets at both ends."""
    logits, targets = make(device, dtype, (6,), vocab, ignored=False)
    targets[:4] = torch.tensor([0, vocab - 1, vocab // 2, -100])
    options = options_of(options, 6, device)
    assert_fields(
        logits_logprobs(logits, targets, **options, outputs=ALL),
        exactly(logits, targets, **options),
        1e-11 if dtype == F64 else 1e-5,
    )
    upstream = upstream_of((6,))
    ours = gradient(logits_logprobs, logits, upstream, targets, **options)
    exact = gradient(reference.logits_logprobs, logits.cpu().double(), upstream, targets.cpu(), **options)
    assert_close(ours.cpu().double(), exact, rtol={F64: 1e-10, F32: 1e-5, BF16: 4e-3, F16: 1e-3}[dtype], atol=2e-6)


@pytest.mark.parametrize("wanted", [(), *((name,) for name in ALL), ("lse", "is_top1"), ALL], ids="+".join)
@pytest.mark.parametrize("grad", [False, True])
def test_each_output_alone_is_what_it_is_among_all(device, wanted, grad):
    logits, targets = make(device)
    everything = logits_logprobs(logits, targets, outputs=ALL)
    out = logits_logprobs(logits.requires_grad_(grad), targets, outputs=wanted)
    assert [name for name, value in zip(out._fields, out, strict=True) if value is not None] == ["logp", *wanted]
    for name in ("logp", *wanted):
        assert torch.equal(getattr(out, name).detach(), getattr(everything, name))
        assert getattr(out, name).requires_grad == (grad and name in SOURCES)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (4, 5)], ids=str)
def test_temperature_is_broadcast_to_the_targets(device, shape):
    logits, targets = make(device, shape=(4, 5), vocab=50)
    temperature = (torch.rand(shape) + 0.5).to(device)
    out = logits_logprobs(logits, targets, temperature=temperature, outputs=ALL)
    assert_fields(out, exactly(logits, targets, temperature=temperature), 1e-5)


def test_the_first_maximum_wins_ties(device):
    logits = torch.randint(0, 3, (64, 3000), device=device).float()
    for targets in (torch.randint(0, 3000, (64,)), (logits.cpu() == 2).int().argmax(-1)):
        out = logits_logprobs(logits, targets.to(device), outputs=["is_top1"])
        assert torch.equal(out.is_top1.cpu(), (logits.cpu() == 2).int().argmax(-1) == targets)


# ------------------------------------------------------------------------------------------------------------ gradients


def plain_torch(logits, targets, temperature=1.0, softcap=None, logit_scale=1.0, outputs=()):
    """What one would write without this library, in the dtype of the logits throughout."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype).unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    logp = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    fields = (torch.where(targets != -100, t, 0) for t in (logp, entropy, z.logsumexp(-1)))
    return prefkern.LinearLogprobs(*fields)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(
    ("options", "sources"),
    [*((name, SOURCES) for name in OPTIONS), *((name, [s]) for name in ("plain", "everything") for s in SOURCES)],
    ids=lambda p: p if isinstance(p, str) else "+".join(p),
)
def test_gradients(device, dtype, options, sources):
    """Against float64: rounding only in float32, and in half precision at most twice the error of plain PyTorch."""
    logits, targets = make(device, dtype, vocab=301)
    options, upstream = options_of(options, 13, device), upstream_of((13,), sources)
    ours = gradient(logits_logprobs, logits, upstream, targets, **options)
    exact = gradient(reference.logits_logprobs, logits.cpu().double(), upstream, targets.cpu(), **widened(options))
    assert ours.dtype == dtype
    assert distance(ours, exact) < {F64: 1e-12, F32: 1e-6, BF16: 3e-3, F16: 4e-4}[dtype]  # one rounding to the dtype
    if dtype in (BF16, F16):
        assert distance(ours, exact) <= 2 * distance(gradient(plain_torch, logits, upstream, targets, **options), exact)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    logits, targets = make("cpu", F64, (5,), 7)
    options = widened(OPTIONS[options](5))

    def function(x):
        out = logits_logprobs(x, targets, outputs=("entropy", "lse"), **options)
        return out.logp, out.entropy, out.lse

    assert torch.autograd.gradcheck(function, leaf(logits), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("other", [0.0, 1.0], ids=["alone", "beside another term"])
def test_differentiating_twice_is_an_error(device, inplace, other):
    logits, targets = make(device, vocab=50)
    x = leaf(logits)
    loss = logits_logprobs(x * 1, targets, inplace_backward=inplace).logp.sum()
    if other:
        loss = loss + other * x.pow(3).sum()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss, x, create_graph=True)[0].sum().backward()


# --------------------------------------------------------------------------------------------------- layouts, no copies


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 4), (2, 2, 1, 3), (0,), (2, 0), (0, 3)], ids=str)
def test_any_leading_shape(device, shape):
    logits, targets = make(device, shape=shape, vocab=19)
    x = leaf(logits)
    out = logits_logprobs(x, targets, outputs=ALL)
    assert all(field.shape == shape for field in out)
    flat = logits_logprobs(logits.reshape(-1, 19), targets.reshape(-1), outputs=ALL)
    for a, b in zip(out, flat, strict=True):
        assert torch.equal(a.detach().reshape(-1), b)
    upstream = upstream_of(shape)
    d = apply(out, upstream, x)
    assert d.shape == logits.shape
    if targets.numel():
        exact = gradient(reference.logits_logprobs, logits.cpu().double(), upstream, targets.cpu())
        assert_close(d.cpu().double(), exact, rtol=1e-5, atol=2e-6)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "sequence first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "without the last token": lambda t: torch.cat([t, torch.full_like(t[:, :1], NAN)], 1)[:, :-1],
    "columns of a wider one": lambda t: torch.cat([t, torch.full_like(t, NAN)], -1)[..., : t.shape[-1]],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every second token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_any_strides(device, layout, dtype):
    logits, targets = make(device, dtype, shape=(3, 5), vocab=70)
    strided = LAYOUTS[layout](logits)
    assert not strided.is_contiguous()
    straight = logits_logprobs(logits, targets, outputs=ALL)
    out = logits_logprobs(strided.requires_grad_(), targets, outputs=ALL)
    assert all(torch.equal(a.detach(), b) for a, b in zip(out, straight, strict=True))
    upstream = upstream_of((3, 5))
    assert torch.equal(apply(out, upstream, strided), gradient(logits_logprobs, logits, upstream, targets))


def test_expanded_logits(device):
    logits, _ = make(device, shape=(1,), vocab=70)
    targets = torch.arange(5, device=device)
    one = leaf(logits)
    out = logits_logprobs(one.expand(5, 70), targets, outputs=ALL)
    assert_fields(out, exactly(logits.expand(5, 70), targets), 1e-5)
    upstream = upstream_of((5,))
    rows = gradient(logits_logprobs, logits.repeat(5, 1), upstream, targets)
    assert_close(apply(out, upstream, one), rows.sum(0, keepdim=True), rtol=1e-5, atol=1e-6)


def test_targets_of_any_strides_and_int32(device):
    logits, targets = make(device, shape=(4, 5), vocab=70)
    expected = logits_logprobs(logits, targets, outputs=ALL)
    for same in (targets.mT.contiguous().mT, targets.int(), targets.repeat_interleave(2, 1)[:, ::2]):
        out = logits_logprobs(logits, same, outputs=ALL)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_a_shifted_slice_is_not_copied(device, allocations, op_log, grad):
    """logits[:, :-1], as a trainer writes it: the op is given that memory, and allocates a few numbers per row."""
    logits, targets = make(device, shape=(4, 33), vocab=5000)
    if grad:
        logits = leaf(logits) * 1
    part = logits[:, :-1]
    used = allocations(lambda: logits_logprobs(part, targets[:, 1:], outputs=ALL))
    given = op_log.args("logits_logprobs_fwd")[0]
    assert given.data_ptr() == logits.data_ptr()
    assert given.stride() == (33 * 5000, 5000, 1)
    assert used.peak < 128 * 128 + 8192
    assert_fields(used.result, exactly(part, targets[:, 1:]), 1e-5)


def test_a_backward_allocates_one_gradient(device, allocations):
    logits, targets = make(device, shape=(64,), vocab=5000)
    x = leaf(logits)
    out = logits_logprobs(x, targets)
    used = allocations(lambda: torch.autograd.grad(out.logp.sum(), x))
    assert logits.nbytes <= used.peak < logits.nbytes + 16384


# ---------------------------------------------------------------------------------------------------- in-place backward


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", OPTIONS)
def test_inplace_equals_out_of_place(device, dtype, options):
    logits, targets = make(device, dtype)
    options, upstream = options_of(options, 13, device), upstream_of((13,))
    expected = gradient(logits_logprobs, logits, upstream, targets, **options)
    x = leaf(logits)
    result = x * 1
    out = logits_logprobs(result, targets, outputs=ALL, inplace_backward=True, **options)
    actual = apply(out, upstream, result)
    assert torch.equal(actual, expected)
    assert actual.data_ptr() == result.data_ptr()
    assert torch.equal(result, expected)  # their memory now holds the gradient


def test_inplace_allocates_nothing_of_the_size_of_the_logits(device, allocations):
    logits, targets = make(device, shape=(64,), vocab=5000)
    result = leaf(logits) * 1
    out = logits_logprobs(result, targets, inplace_backward=True)
    used = allocations(lambda: torch.autograd.grad(out.logp.sum(), result))
    assert used.peak < 16384
    assert used.result[0].data_ptr() == result.data_ptr()


@pytest.mark.parametrize("layout", ["sequence first", "without the last token", "columns of a wider one", "every second row"])
def test_inplace_into_a_view(device, layout):
    """The rest of the memory is left alone."""
    logits, targets = make(device, shape=(3, 5), vocab=70)
    base = leaf(logits)
    view = LAYOUTS[layout](base)
    assert view._base is not None
    rest = view._base.detach().clone()
    upstream = upstream_of((3, 5))
    apply(logits_logprobs(view, targets, outputs=ALL, inplace_backward=True), upstream, view)
    assert torch.equal(view.detach(), gradient(logits_logprobs, logits, upstream, targets))
    mark = torch.as_strided(torch.zeros_like(view._base), view.shape, view.stride(), view.storage_offset())
    untouched = torch.ones_like(view._base, dtype=torch.bool)
    torch.as_strided(untouched, mark.shape, mark.stride(), mark.storage_offset()).fill_(False)
    assert_close(view._base.detach()[untouched], rest[untouched], rtol=0, atol=0, equal_nan=True)


def test_inplace_through_a_model(device):
    """The gradient of what made the logits is the same."""
    hidden, weight = torch.randn(4, 9, 8, device=device), torch.randn(70, 8, device=device)
    targets = torch.randint(0, 70, (4, 8), device=device)
    grads = []
    for inplace in (False, True):
        h, w = leaf(hidden), leaf(weight)
        out = logits_logprobs((h @ w.mT)[:, :-1], targets, outputs=["entropy"], inplace_backward=inplace)
        grads.append(torch.autograd.grad(out.logp.sum() + 0.1 * out.entropy.sum(), (h, w)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_inplace_cannot_be_repeated(device):
    logits, targets = make(device, vocab=70)
    result = leaf(logits) * 1
    logp = logits_logprobs(result, targets, inplace_backward=True).logp
    torch.autograd.grad(logp.sum(), result, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp.sum(), result)


def test_inplace_is_found_out_by_whoever_saved_the_logits(device):
    logits, targets = make(device, vocab=70)
    x = leaf(logits)
    result = x * 1
    other = result.sigmoid() * result  # saves the logits
    logp = logits_logprobs(result, targets, inplace_backward=True).logp
    torch.autograd.grad(logp.sum(), result, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_inplace_of_a_leaf_is_refused(device):
    logits, targets = make(device, vocab=70)
    x = leaf(logits)
    for same in (x, x[:, :], x[None][0]):
        with pytest.raises(ValueError, match=r"inplace_backward.*leaf"):
            logits_logprobs(same, targets, inplace_backward=True)
    with torch.no_grad():  # where nothing will be overwritten, it is allowed
        out = logits_logprobs(x, targets, inplace_backward=True)
    assert torch.equal(out.logp, logits_logprobs(logits, targets, inplace_backward=True).logp)
    assert torch.equal(x.detach(), logits)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((1, 70), lambda t: t.expand(13, 70)),
        ((13, 1), lambda t: t.expand(13, 70)),
        ((1, 4, 70), lambda t: t.expand(3, 4, 70)),
        ((3, 1, 70), lambda t: t.expand(3, 4, 70)),
        ((140,), lambda t: t.as_strided((3, 70), (35, 1))),
        ((3, 4, 140), lambda t: t[..., ::2]),
    ],
    ids=["a row", "a column", "a batch", "a token", "sliding", "strided"],
)
def test_inplace_needs_rows_of_their_own(device, shape, view):
    """Logits that share memory, or are not adjacent, cannot take a gradient each. Said in the forward."""
    result = leaf(torch.randn(shape, device=device)) * 1
    logits = view(result)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"logits.*(share memory|stride).*inplace_backward"):
        logits_logprobs(logits, targets, inplace_backward=True)
    assert logits_logprobs(logits, targets).logp.isfinite().all()


# --------------------------------------------------------------------------------------------------- rows by themselves


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("step", [0.0, 0.01, 3.0, 20.0, 40.0, 600.0])
def test_maxima_that_come_late(device, dtype, step):
    """Logits that rise or jump from one stretch of a row to the next, by little or beyond what an exponential can hold."""
    logits, targets = make(device, dtype, (6,), 5000, ignored=False)
    logits = (logits.float().cpu() + step * (torch.arange(5000) // 700)).to(dtype).to(device)
    logits[1] = logits[1].flip(0)
    logits[2, :3000] = -INF  # nothing to measure against at first
    logits[3, ::2] = -INF
    logits[4, 4999] = 900.0
    actual, expected = logits_logprobs(logits, targets, outputs=ALL), exactly(logits, targets, outputs=ALL)
    far = 4e-6 * step if dtype != F64 else 0.0
    assert_fields(actual, expected, 1e-5 + far if dtype != F64 else 1e-11, rtol=3e-6 if dtype != F64 else 0.0)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("at", [0, 3, 1029, 2500, 4999])
def test_what_is_not_finite_is_seen_wherever_it_is(device, dtype, value, at):
    logits, targets = make(device, dtype, (3,), 5000, ignored=False)
    logits[1, at] = value
    negative = torch.tensor([0xFFC00000 - (1 << 32)], dtype=torch.int32).view(F32).to(dtype).to(device)
    logits[2, at] = -value if value == INF else negative[0]
    out = logits_logprobs(logits, targets, outputs=("entropy", "lse"))
    spoiled = [False, True, value is NAN]
    assert out.entropy.isnan().tolist() == spoiled
    assert out.lse.isnan().tolist() == spoiled


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-8, 1e-30, 1e8, 1e30])
def test_temperatures_far_from_one(device, temperature):
    """Logits over temperature from where every exponent is 0 to where a product with log2 e has no digit behind the point."""
    logits, targets = make(device, F32, (5,), 4000, ignored=False)
    actual = logits_logprobs(logits, targets, temperature=temperature, outputs=("entropy",))
    expected = exactly(logits, targets, temperature=float(torch.tensor(temperature)), outputs=("entropy",))
    assert_close(actual.logp.cpu().double(), expected.logp, rtol=3e-7, atol=1e-5)
    assert_close(actual.entropy.cpu().double(), expected.entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_a_row_gives_the_same_bits_wherever_it_is(device, dtype, options):
    """Order of rows, what is beside them, and the number of calls change nothing, not even rounding."""
    logits, targets = make(device, dtype)
    options, upstream = options_of(options, 13, device), upstream_of((13,))
    temperature = options.pop("temperature", torch.ones(13, device=device))
    base = logits_logprobs(logits, targets, outputs=ALL, temperature=temperature, **options)
    d_base = gradient(logits_logprobs, logits, upstream, targets, temperature=temperature, **options)
    for rows in (torch.randperm(13), torch.arange(5, 9), torch.tensor([3]), torch.arange(13)):
        picked = {name: g[rows] for name, g in upstream.items()}
        where = rows.to(device)
        options["temperature"] = temperature[where]
        out = logits_logprobs(logits[where], targets[where], outputs=ALL, **options)
        assert all(torch.equal(a, b[where]) for a, b in zip(out, base, strict=True))
        assert torch.equal(gradient(logits_logprobs, logits[where], picked, targets[where], **options), d_base[where])


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    logits, targets = make("cpu", dtype, (64,), 5000)
    upstream = upstream_of((64,))
    runs = []
    for n in (1, 2, 3):
        threads(n)
        out = logits_logprobs(logits, targets, outputs=ALL)
        runs.append((*out, gradient(logits_logprobs, logits, upstream, targets)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@given(
    rows=st.integers(1, 7),
    vocab=st.integers(1, 90),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    forbidden=st.sampled_from([0.0, 0.5]),
)
def test_bounds(rows, vocab, seed, scale, dtype, forbidden):
    """logp <= 0, 0 <= entropy <= log V, 1/V <= sum p^2 <= 1, whatever the logits."""
    torch.manual_seed(seed)
    logits = (torch.randn(rows, vocab) * scale).clamp(-6e4, 6e4).to(dtype)
    logits[:, 1:][torch.rand(rows, vocab - 1) < forbidden] = -INF
    out = logits_logprobs(logits, torch.randint(0, vocab, (rows,)), outputs=ALL)
    assert not out.logp.isnan().any()
    assert (out.logp <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= math.log(vocab) + 1e-6).all()
    assert (out.sum_sq_probs <= 1 + 1e-6).all()
    assert (out.sum_sq_probs >= 1 / vocab * (1 - 1e-5)).all()
    assert (out.mean_logit <= out.lse + 1e-6 * (1 + out.lse.abs())).all()


@given(vocab=st.integers(2, 300), seed=st.integers(0, 2**31), shift=st.integers(-64, 64))
def test_a_shift_of_all_logits_changes_only_lse_and_mean(vocab, seed, shift):
    """The logits are multiples of 1/64, so that the shift is exact."""
    torch.manual_seed(seed)
    logits = torch.randint(-256, 256, (3, vocab)) / 64.0
    targets = torch.randint(0, vocab, (3,))
    a = logits_logprobs(logits, targets, outputs=ALL)
    b = logits_logprobs(logits + shift, targets, outputs=ALL)
    for name in ("logp", "entropy", "sum_sq_probs", "is_top1"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert_close(b.lse, a.lse + shift, rtol=0, atol=1e-5)
    assert_close(b.mean_logit, a.mean_logit + shift, rtol=0, atol=1e-5)


@given(rows=st.integers(1, 5), vocab=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_tokens_may_come_in_any_order(rows, vocab, seed):
    torch.manual_seed(seed)
    logits, targets = torch.randn(rows, vocab) * 3, torch.randint(0, vocab, (rows,))
    tokens = torch.randperm(vocab)
    place = tokens.argsort()
    base = logits_logprobs(logits, targets, outputs=ALL)
    assert_fields(logits_logprobs(logits[:, tokens], place[targets], outputs=ALL), base, 1e-5)
    upstream = upstream_of((rows,))
    a = gradient(logits_logprobs, logits, upstream, targets)
    b = gradient(logits_logprobs, logits[:, tokens], upstream, place[targets])
    assert_close(b, a[:, tokens], rtol=1e-5, atol=2e-6)


@given(vocab=st.integers(1, 300), seed=st.integers(0, 2**31), temperature=st.floats(0.1, 10.0))
def test_temperature_is_a_division_of_the_logits(vocab, seed, temperature):
    torch.manual_seed(seed)
    logits, targets = torch.randn(3, vocab, dtype=F64) * 3, torch.randint(0, vocab, (3,))
    a = logits_logprobs(logits, targets, temperature=temperature, outputs=ALL)
    assert_fields(a, logits_logprobs(logits / temperature, targets, outputs=ALL), 1e-10)
    assert_fields(a, logits_logprobs(logits, targets, logit_scale=1 / temperature, outputs=ALL), 1e-10)


# ------------------------------------------------------------------------------------------------------- extreme logits


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_huge_logits(device, dtype):
    logits = torch.randn(6, 3000)
    logits[:, 1700] = 1e4
    logits[:, 40] = -1e4
    logits[3:, 18] = 1e4
    logits = logits.to(dtype)
    targets = torch.tensor([1700, 40, 5, 18, 1700, 5])
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    out = logits_logprobs(logits.to(device), targets.to(device), outputs=ALL)
    exact = exactly(logits, targets)
    assert_close(out.logp.cpu().double(), exact.logp, rtol=2e-7, atol=1e-6)
    assert out.logp[0] == 0
    assert_close(out.entropy.cpu().double(), exact.entropy, rtol=0, atol=1e-6)
    assert_close(out.lse.cpu().double(), exact.lse, rtol=2e-7, atol=0)
    assert_close(out.sum_sq_probs.cpu().double(), exact.sum_sq_probs, rtol=1e-6, atol=0)
    assert out.is_top1.tolist() == [True, False, False, True, False, False]
    upstream = upstream_of((6,))
    ours = gradient(logits_logprobs, logits.to(device), upstream, targets.to(device))
    exact = gradient(reference.logits_logprobs, logits.double(), upstream, targets)
    assert_close(ours.cpu().double(), exact, rtol={F64: 1e-10, F32: 1e-6, BF16: 4e-3, F16: 1e-3}[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("forbidden", ["most", "all but the first", "all but the last", "a long start"])
def test_logits_of_minus_infinity(device, dtype, forbidden, options):
    """Tokens that cannot be drawn: no probability, no entropy, no gradient."""
    logits, targets = make(device, dtype)
    mask = torch.zeros(13, 2777, dtype=torch.bool)
    if forbidden == "most":
        mask[torch.rand(13, 2777) < 0.99] = True
    elif forbidden == "a long start":
        mask[:, :2300] = True  # more than two tiles
    else:
        mask[:, slice(1, None) if forbidden == "all but the first" else slice(None, -1)] = True
    mask.scatter_(1, targets.cpu().clamp_min(0).unsqueeze(1), False)
    logits[mask.to(device)] = -INF
    options, upstream = options_of(options, 13, device), upstream_of((13,))
    options.pop("softcap", None)  # which would make a logit of -softcap of it
    out = logits_logprobs(logits, targets, **options, outputs=ALL)
    exact = exactly(logits, targets, **options)
    assert exact.mean_logit[0] == -INF
    assert_fields(out, exact, 1e-11 if dtype == F64 else 1e-5)
    ours = gradient(logits_logprobs, logits, upstream, targets, **options)
    exact = gradient(reference.logits_logprobs, logits.cpu().double(), upstream, targets.cpu(), **widened(options))
    assert ours[mask.to(device)].eq(0).all()
    assert_close(ours.cpu().double(), exact, rtol={F64: 1e-9, F32: 1e-5, BF16: 4e-3, F16: 1e-3}[dtype], atol=2e-6)


def test_softcap_takes_infinite_logits(device):
    """A capped -inf is -softcap, a capped +inf is +softcap; both are flat there."""
    logits, targets = make(device, shape=(4,), vocab=40, ignored=False)
    logits[:, 3], logits[:, 9] = -INF, INF
    options = {"softcap": 5.0}
    capped = logits.clone()
    capped[:, 3], capped[:, 9] = -1e9, 1e9
    assert_fields(logits_logprobs(logits, targets, outputs=ALL, **options), exactly(capped, targets, **options), 1e-5)
    d = gradient(logits_logprobs, logits, upstream_of((4,)), targets, **options)
    assert d.isfinite().all()
    assert d[:, [3, 9]].abs().max() < 1e-6


def test_a_forbidden_target_has_no_probability(device):
    logits, targets = make(device, vocab=70, ignored=False)
    logits.scatter_(1, targets.unsqueeze(1), -INF)
    out = logits_logprobs(logits, targets, outputs=ALL)
    assert out.logp.eq(-INF).all()
    assert not out.is_top1.any()
    assert_close(out.entropy.cpu().double(), exactly(logits, targets).entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [INF, NAN, "all -inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("column", [0, 1100, 2776])
def test_a_bad_row_is_nan_and_poisons_only_itself(device, dtype, value, column):
    logits, targets = make(device, dtype, ignored=False)
    bad = logits.clone()
    bad[4, slice(None) if value == "all -inf" else column] = -INF if value == "all -inf" else value
    others = torch.arange(13) != 4
    clean, out = (logits_logprobs(x, targets, outputs=ALL) for x in (logits, bad))
    assert out.logp[4].isnan()
    assert out.entropy[4].isnan()
    assert out.sum_sq_probs[4].isnan()
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a[others], b[others])
    upstream = upstream_of((13,))
    d_clean, d = (gradient(logits_logprobs, x, upstream, targets) for x in (logits, bad))
    assert d[4].isnan().all()
    assert torch.equal(d[others], d_clean[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("value", [0.0, -3.5, 1e4])
@pytest.mark.parametrize("vocab", [2, 777, 32_000])
def test_equal_logits_have_the_entropy_of_the_vocabulary(device, dtype, value, vocab):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    logits = torch.full((2, vocab), value, dtype=dtype, device=device)
    out = logits_logprobs(logits, torch.tensor([0, vocab - 1], device=device), outputs=ALL)
    uniform = torch.full_like(out.logp, math.log(vocab))
    assert_close(out.entropy, uniform, rtol=0, atol=1e-6)
    assert_close(out.logp, -uniform, rtol=0, atol=1e-6)
    assert_close(out.lse, uniform + logits[:, 0], rtol=2e-7, atol=1e-6)
    assert_close(out.mean_logit, logits[:, 0].to(out.logp.dtype), rtol=1e-6, atol=0)
    assert out.is_top1.tolist() == [True, False]


def test_tiny_probabilities_keep_their_gradient(device):
    """exp(-80) is still a float32, and so is what flows to it."""
    logits = torch.zeros(1, 64, device=device)
    logits[:, 1:] = torch.linspace(-80, -60, 63)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    upstream = upstream_of((1,))
    d = gradient(logits_logprobs, logits, upstream, targets).cpu().double()
    e = gradient(reference.logits_logprobs, logits.cpu().double(), upstream, targets.cpu())
    assert e[:, 1:].abs().min() > 0
    assert_close(d[:, 1:], e[:, 1:], rtol=1e-4, atol=0)


# --------------------------------------------------------------------------------------------------------- ignored rows


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("garbage", [NAN, INF])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_ignored_rows_are_never_looked_at(device, dtype, garbage, options):
    logits, targets = make(device, dtype)
    options, ignored = options_of(options, 13, device), targets == -100
    spoiled, upstream = logits.clone(), upstream_of((13,))
    spoiled[ignored] = garbage
    bad_upstream = {name: torch.where(ignored.cpu(), garbage, g) for name, g in upstream.items()}
    out = logits_logprobs(spoiled, targets, **options, outputs=ALL)
    clean = logits_logprobs(logits, targets, **options, outputs=ALL)
    assert all(field[ignored].eq(0).all() for field in out)
    assert all(torch.equal(a, b) for a, b in zip(out, clean, strict=True))
    d = gradient(logits_logprobs, spoiled, bad_upstream, targets, **options)
    assert d[ignored].eq(0).all()
    assert torch.equal(d, gradient(logits_logprobs, logits, upstream, targets, **options))


def test_all_rows_ignored(device):
    logits, targets = torch.full((3, 70), NAN, device=device), torch.full((3,), -1, device=device)
    out = logits_logprobs(logits, targets, ignore_index=-1, outputs=ALL)
    assert all(field.eq(0).all() for field in out)
    assert gradient(logits_logprobs, logits, upstream_of((3,)), targets, ignore_index=-1).eq(0).all()


@pytest.mark.parametrize("ignore_index", [-1, 3, 2777, 10**12])
def test_any_number_may_be_the_ignore_index(device, ignore_index):
    logits, targets = make(device, ignored=False)
    targets[::2], targets[1] = ignore_index, 7
    out = logits_logprobs(logits, targets, ignore_index=ignore_index, outputs=ALL)
    assert all(field[::2].eq(0).all() for field in out)
    assert_fields(out, exactly(logits, targets, ignore_index=ignore_index), 1e-5)
    assert out.logp[1] < 0


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(device, op_log, mode):
    logits, targets = make(device, vocab=70)
    x, saved = leaf(logits), []
    with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = logits_logprobs(x, targets, outputs=ALL)
    assert saved == []
    assert all(field.grad_fn is None and not field.requires_grad for field in out)
    assert op_log.names() == ["logits_logprobs_fwd"]
    assert op_log.args("logits_logprobs_fwd")[-2] == 31  # the five outputs, not the statistics of the backward


def test_what_a_backward_keeps(device):
    """The logits themselves and a few numbers per row."""
    logits, targets = make(device, vocab=70)
    x, saved = leaf(logits), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits_logprobs(x, targets, outputs=ALL)
    inputs = {x.data_ptr(), targets.data_ptr()}
    assert inputs <= {t.data_ptr() for t in saved}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in inputs) <= 13 * 4 * 4


def test_autocast_takes_logits_as_they_are(device):
    logits, targets = make(device)
    with torch.autocast(device, BF16):
        out = logits_logprobs(logits, targets)
    assert torch.equal(out.logp, logits_logprobs(logits, targets).logp)


@pytest.mark.parametrize(
    ("dtype", "options", "shape"), [(F32, "plain", (6,)), (BF16, "everything", (6,)), (F32, "everything", (2, 3))], ids=str
)
def test_opcheck(device, dtype, options, shape):
    logits, targets = make(device, dtype, shape, 9)
    options, targets = options_of(options, 6, device), targets.reshape(-1)
    rows = options.get("temperature") if isinstance(options.get("temperature"), torch.Tensor) else None
    numbers = (1.0, options.get("softcap", 0.0), options.get("logit_scale", 1.0), -100)
    for outputs in (0, 31):
        opcheck(OPS.logits_logprobs_fwd.default, (logits, targets, rows, *numbers, outputs, False))
        opcheck(OPS.logits_logprobs.default, (leaf(logits), targets, rows, *numbers, outputs | 32, False))
    opcheck(OPS.logits_logprobs.default, (logits, targets, rows, *numbers, 33, False))
    out = OPS.logits_logprobs_fwd(logits, targets, rows, *numbers, 63, False)
    upstream = (torch.randn(6, device=device), None, torch.randn(6, device=device))
    opcheck(OPS.logits_logprobs_backward.default, (*upstream, logits, targets, rows, out[1], out[6], *numbers))
    opcheck(OPS.logits_logprobs_backward_.default, (*upstream, logits.clone(), targets, rows, out[1], out[6], *numbers))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_one_graph_for_any_number_of_tokens(device, inplace, ranks):
    """fullgraph, forward and backward, five sizes, at most two compilations (the second has a symbolic N)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x, targets, temperature):
        out = logits_logprobs(x * 2, targets, temperature=temperature, outputs=ALL, inplace_backward=inplace)
        return out.logp.sum() + 0.5 * out.entropy.sum() - 0.1 * out.lse.sum(), out

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (5, 8, 13, 21, 34):
        logits, targets = make(device, F32, (rows,) if ranks == 1 else (3, rows), 40)
        temperature = torch.rand(rows, device=device) + 0.5
        a, b = leaf(logits), leaf(logits)
        (eager, out), (total, compiled_out) = loss(a, targets, temperature), compiled(b, targets, temperature)
        eager.backward()
        total.backward()
        assert_close(total, eager, rtol=1e-6, atol=1e-5)
        assert_fields(compiled_out, out, 1e-6)
        assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_meta_tensors_give_shapes():
    out = logits_logprobs(torch.empty(2, 3, 5, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta"), outputs=ALL)
    assert all(field.shape == (2, 3) and field.device.type == "meta" for field in out)
    assert [field.dtype for field in out] == [F32] * 5 + [torch.bool]


# ------------------------------------------------------------------------------------------------------------ bad input

X, T = torch.zeros(3, 5), torch.tensor([0, 1, 2])

BAD = {
    # name: (arguments, error, what its message says)
    "logits: a list": ({"logits": [[0.0] * 5] * 3}, TypeError, "logits.*list.*Tensor"),
    "logits: no dimension": ({"logits": torch.tensor(1.0), "targets": torch.tensor(0)}, ValueError, r"logits.*\[\]"),
    "logits: too many rows": ({"logits": torch.zeros(4, 5)}, ValueError, r"targets.*\[3\].*logits.*\[4, 5\]"),
    "logits: too deep": ({"logits": torch.zeros(1, 3, 5)}, ValueError, r"targets.*\[3\].*logits.*\[1, 3, 5\]"),
    "logits: no vocabulary": ({"logits": torch.zeros(3, 0), "targets": T * 0 - 100}, ValueError, "logits.*V = 0"),
    "logits: no vocabulary, one row": (
        {"logits": torch.zeros(0), "targets": torch.tensor(-100)},
        ValueError,
        "logits.*V = 0",
    ),
    "logits: integers": ({"logits": X.long()}, TypeError, "logits.*Long.*float32"),
    "logits: complex": ({"logits": X.cfloat()}, TypeError, "logits.*ComplexFloat.*float32"),
    "logits: on meta": ({"logits": X.to("meta")}, ValueError, "targets is on.*logits.*meta.*same device"),
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
    "targets: floats": ({"targets": T.float()}, TypeError, "targets.*Float.*int64, int32"),
    "targets: bool": ({"targets": T.bool()}, TypeError, "targets.*Bool.*int64, int32"),
    "targets: int16": ({"targets": T.short()}, TypeError, "targets.*Short.*int64, int32"),
    "targets: on meta": ({"targets": T.to("meta")}, ValueError, "targets.*meta.*same device"),
    "temperature: zero": ({"temperature": 0.0}, ValueError, "temperature is 0.*positive"),
    "temperature: negative": ({"temperature": -1}, ValueError, "temperature is -1.*positive"),
    "temperature: NaN": ({"temperature": NAN}, ValueError, "temperature is nan.*positive"),
    "temperature: infinite": ({"temperature": INF}, ValueError, "temperature is inf.*finite"),
    "temperature: a word": ({"temperature": "1"}, TypeError, "temperature is '1'.*number or a tensor"),
    "temperature: None": ({"temperature": None}, TypeError, "temperature is None.*number"),
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
    "logit_scale: zero": ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.*positive"),
    "logit_scale: negative": ({"logit_scale": -0.5}, ValueError, "logit_scale is -0.5.*positive"),
    "logit_scale: NaN": ({"logit_scale": NAN}, ValueError, "logit_scale is nan.*positive"),
    "logit_scale: infinite": ({"logit_scale": INF}, ValueError, "logit_scale is inf.*finite"),
    "logit_scale: None": ({"logit_scale": None}, TypeError, "logit_scale is None.*number"),
    "ignore_index: None": ({"ignore_index": None}, TypeError, "ignore_index is None.*integer"),
    "ignore_index: a float": ({"ignore_index": -100.0}, TypeError, "ignore_index is -100.0.*integer"),
    "outputs: a string": ({"outputs": "entropy"}, ValueError, r"outputs.*'entropy'.*\('entropy',\)"),
    "outputs: unknown": ({"outputs": ["entropi"]}, ValueError, "outputs.*'entropi'.*'entropy', 'lse'"),
    "outputs: None": ({"outputs": None}, TypeError, "outputs is None.*names"),
    "inplace_backward: a word": ({"inplace_backward": "no"}, TypeError, "inplace_backward is 'no'.*True or False"),
    "inplace_backward: None": ({"inplace_backward": None}, TypeError, "inplace_backward is None.*True or False"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(device, validation, name, grad):
    """The CPU always looks at values; a GPU does under validation."""
    validation(True)
    changes, error, message = BAD[name]
    arguments = {"logits": X, "targets": T, **changes}
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            trained = value.requires_grad or (grad and key == "logits" and value.is_floating_point())
            arguments[key] = value.detach().to(device).requires_grad_(trained)
    with pytest.raises(error, match=message) as caught:
        logits_logprobs(**arguments)
    assert caught.type is error


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_bad_values_on_a_gpu_are_nan_without_validation(device, validation):
    validation(False)
    logits, _ = make(device, shape=(4,), vocab=10)
    temperature = torch.tensor([1.0, 1.0, -1.0, 1.0], device=device)
    out = logits_logprobs(logits, torch.tensor([0, 10, 3, -1], device=device), temperature=temperature, outputs=ALL)
    assert out.logp.isnan().tolist() == [False, True, True, True]


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_float64_is_refused_on_a_gpu(device):
    with pytest.raises(TypeError, match=r"logits.*Double on cuda.*float64 on the CPU"):
        logits_logprobs(X.double().to(device), T.to(device))
