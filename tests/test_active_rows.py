"""Rows whose upstream gradients are all exactly 0 leave the backward: nothing is computed from them, and nothing changes."""

import math
import time

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern import linear_logprobs

OPS = torch.ops.prefkern
ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
SOURCES = ("logp", "entropy", "lse")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN = math.nan
ROWS, VOCAB, WIDTH = 23, 301, 32
FRACTIONS = {"none": 0.0, "a fifth": 0.2, "one": 1 / ROWS, "all": 1.0}
TOLERANCE = {F64: 1e-12, F32: 2e-6, BF16: 1e-2, F16: 2e-3}


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make(device="cpu", dtype=F32, *, bias=True):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    hidden = torch.randn(ROWS, WIDTH).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH) * 3 / WIDTH**0.5).to(dtype)
    targets = torch.randint(0, VOCAB, (ROWS,))
    targets[1::5] = -100
    out = [hidden, weight, targets] + [torch.randn(VOCAB, dtype=F64 if dtype == F64 else F32)] * bias
    return tuple(t.to(device) for t in out)


def active(fraction):
    """A mask of about this part of the rows."""
    chosen = torch.zeros(ROWS, dtype=torch.bool)
    chosen[torch.randperm(ROWS)[: round(fraction * ROWS)]] = True
    return chosen


def upstream(mask, sources, device="cpu"):
    """One gradient each; a row outside the mask has none, and one inside may lack some of them."""
    found = {}
    for i, name in enumerate(sources):
        g = torch.randn(ROWS, dtype=F64)
        g[i :: 2 * len(sources)] = 0
        found[name] = torch.where(mask, g, 0.0).to(device)
    return found


def gradients(leaves, targets, g, **options):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2] if len(leaves) > 2 else None, outputs=ALL, **options)
    fields = [getattr(out, name) for name in g]
    return torch.autograd.grad(fields, leaves, [t.to(f.dtype) for t, f in zip(g.values(), fields, strict=True)])


def distance(actual, expected):
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def nothing_of_inactive_rows(targets, g):
    """The targets with every row ignored that has no upstream gradient: what inactive rows must equal."""
    any_of = sum(t != 0 for t in g.values()) > 0
    return torch.where(any_of.to(targets.device), targets, -100)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=names)
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("sources", [("logp",), ("entropy",), ("lse",), SOURCES], ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 3000])
def test_gradients_are_those_of_all_rows(device, dtype, fraction, sources, chunk_bytes):
    """The dense gradient, taken in float64 with dense upstream gradients, row by row where they are not zero."""
    hidden, weight, targets, bias = make(device, dtype)
    g = upstream(active(FRACTIONS[fraction]), sources, device)
    got = gradients((hidden, weight, bias), targets, g, softcap=5.0, chunk_bytes=chunk_bytes)
    wide = [t.cpu().double() for t in (hidden, weight, bias)]
    leaves = [t.requires_grad_() for t in wide]
    exact = prefkern.reference.linear_logprobs(leaves[0], leaves[1], targets.cpu(), bias=leaves[2], softcap=5.0, outputs=ALL)
    loss = sum((getattr(exact, name) * t.cpu()).sum() for name, t in g.items())
    expected = torch.autograd.grad(loss, leaves)
    for a, e in zip(got, expected, strict=True):
        if fraction == "none":
            assert not a.any()
        else:
            assert distance(a, e) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("options", ["plain", "lora", "keep", "rounded"])
def test_an_inactive_row_may_hold_anything(device, dtype, options):
    """NaN in the hidden state of an inactive row reaches no gradient: none of it is multiplied."""
    hidden, weight, targets = make(device, dtype, bias=False)
    g = upstream(active(0.4), SOURCES, device)
    extra = {}
    if options == "lora":
        extra["lora"] = (torch.randn(4, WIDTH).to(device, dtype), torch.randn(VOCAB, 4).to(device, dtype) / 8, 0.5)
    elif options == "keep":
        rows = [sorted({int(t), *torch.randperm(VOCAB)[:20].tolist()} - {-100}) for t in targets]
        offsets = torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0).tolist()])
        extra["keep"] = (offsets.to(device), torch.tensor([i for r in rows for i in r]).to(device))
    elif options == "rounded":
        extra["logits_dtype"] = "bfloat16"
    idle = nothing_of_inactive_rows(targets, g) == -100
    expected = gradients((hidden, weight), targets, g, **extra)
    hidden[idle] = NAN
    found = gradients((hidden, weight), targets, g, **extra)
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)
    assert not found[0][idle].any()


def test_nan_is_not_zero(device):
    hidden, weight, targets = make(device, bias=False)
    g = upstream(active(0.3), ("logp",), device)
    row = int((targets != -100).nonzero()[2])
    g["logp"][row] = NAN
    d_hidden, d_weight = gradients((hidden, weight), targets, g)
    assert d_hidden[row].isnan().all() and d_weight.isnan().all()
    others = torch.arange(ROWS, device=device) != row
    assert d_hidden[others].isfinite().all()


def test_low_rank_updates(device):
    """lora's gradients, of a fifth of the rows, are those of those rows alone."""
    hidden, weight, targets = make(device, bias=False)
    a, b = torch.randn(4, WIDTH, device=device), torch.randn(VOCAB, 4, device=device) / 8
    g = upstream(active(0.2), SOURCES, device)

    def run(targets):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, a, b)]
        out = linear_logprobs(leaves[0], leaves[1], targets, lora=(leaves[2], leaves[3], 0.5), outputs=ALL)
        fields = [getattr(out, name) for name in g]
        return torch.autograd.grad(fields, leaves, [t.float() for t in g.values()])

    for x, e in zip(run(targets), run(nothing_of_inactive_rows(targets, g)), strict=True):
        assert torch.equal(x, e)


def test_ranges_of_a_vocabulary(device):
    hidden, weight, targets, bias = make(device)
    g = upstream(active(0.2), SOURCES, device)
    options = (1.0, 0.0, 1.0, -100)
    out = OPS.linear_logprobs_fwd(hidden, weight, targets, bias, None, *options, 35, 0)
    grads = [t.float() for t in g.values()]

    def run(hidden, a, b):
        return OPS.linear_shard_backward(
            *grads, hidden, weight[a:b], targets, bias[a:b], None, out[1], out[6], *options, 7, 0, a, VOCAB
        )

    expected = OPS.linear_logprobs_backward(*grads, hidden, weight, targets, bias, None, out[1], out[6], *options, 7, 0)
    hidden = torch.where((nothing_of_inactive_rows(targets, g) == -100).unsqueeze(1), NAN, hidden)
    parts = [run(hidden, a, b) for a, b in ((0, 100), (100, 100), (100, VOCAB))]
    assert_close(sum(p[0] for p in parts), expected[0])
    for k in (1, 2):
        assert_close(torch.cat([p[k] for p in parts]), expected[k])


# ---- logits that are kept ---------------------------------------------------------------------------------------------


def chunk_gradients(hidden, weight, targets, bias, g, dtype=None, accumulate=False):
    acc = F64 if hidden.dtype == F64 else F32
    workspace = torch.empty(ROWS * VOCAB, dtype=acc, device=hidden.device)
    options = (0.7, 5.0, 1.3, -100)
    out = OPS.linear_chunk_(hidden, weight, targets, bias, None, workspace, *options, 35)
    into = [
        torch.full_like(t, 2.0 if accumulate else NAN, dtype=d) for t, d in ((hidden, acc), (weight, dtype or acc), (bias, acc))
    ]
    if accumulate:
        into[0].fill_(NAN)
    OPS.linear_chunk_backward_(
        *(None if t is None else t.to(acc) for t in g), hidden, weight, targets, bias, None, out[1], out[6], workspace, *into,
        *options, accumulate,
    )  # fmt: skip
    return into


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("sources", [("logp",), SOURCES], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_kept_logits(device, dtype, fraction, sources, accumulate):
    hidden, weight, targets, bias = make(device, dtype)
    given = upstream(active(FRACTIONS[fraction]), sources, device)
    g = [given.get(name) for name in SOURCES]
    idle = nothing_of_inactive_rows(targets, given) == -100
    poisoned = torch.where(idle.unsqueeze(1), NAN, hidden)
    got = chunk_gradients(poisoned, weight, targets, bias, g, accumulate=accumulate)
    leaves = [t.cpu().double().requires_grad_() for t in (hidden, weight, bias)]
    exact = prefkern.reference.linear_logprobs(
        leaves[0], leaves[1], targets.cpu(), bias=leaves[2], temperature=0.7, softcap=5.0, logit_scale=1.3, outputs=ALL
    )
    loss = sum((getattr(exact, name) * t.cpu()).sum() for name, t in given.items())
    expected = torch.autograd.grad(loss, leaves)
    tolerance = TOLERANCE[dtype] if hidden.is_cuda else TOLERANCE[F64 if dtype == F64 else F32]
    for k, (a, e) in enumerate(zip(got, expected, strict=True)):
        added = a - 2.0 if accumulate and k > 0 else a
        if fraction == "none":
            assert not added.any()
        else:
            assert distance(added, e) < tolerance * (10 if accumulate else 1)  # what is added to 2 is rounded as 2 is
    assert not got[0][idle].any()


def test_kept_logits_in_the_weights_type(device):
    hidden, weight, targets, bias = make(device, BF16)
    given = upstream(active(0.2), SOURCES, device)
    wide = chunk_gradients(hidden, weight, targets, bias, list(given.values()))
    narrow = chunk_gradients(hidden, weight, targets, bias, list(given.values()), dtype=BF16)
    assert torch.equal(narrow[0], wide[0])
    assert distance(narrow[1], wide[1]) < 3e-3


def test_kept_logits_on_many_threads(threads):
    """Rows move in place while others are read: the bits do not depend on how many threads move them."""
    rows, vocab, width = 300, 3001, 64
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) / 8
    targets, g = torch.randint(0, vocab, (rows,)), torch.randn(rows) * (torch.rand(rows) < 0.5)
    runs = []
    for n in (1, 3):
        threads(n)
        workspace, d_hidden = torch.empty(rows * vocab), torch.empty(rows, width)
        out = OPS.linear_chunk_(hidden, weight, targets, None, None, workspace, 1.0, 0.0, 1.0, -100, 32)
        OPS.linear_chunk_backward_(
            g, None, None, hidden, weight, targets, None, None, out[1], out[6], workspace, d_hidden, None, None, 1.0, 0.0, 1.0,
            -100, False,
        )  # fmt: skip
        runs.append(d_hidden)
    assert not runs[0][g == 0].any()
    assert distance(runs[1], runs[0]) < 1e-6


@pytest.mark.slow
def test_work_is_not_done():
    """A fifth of the rows: the backward takes a good deal less than half of its time, general or of kept logits."""
    rows, vocab, width = 512, 16384, 512
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) / 16
    targets, g = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    some = g * (torch.arange(rows) % 5 == 0)
    options = (1.0, 0.0, 1.0, -100)
    out = OPS.linear_logprobs_fwd(hidden, weight, targets, None, None, *options, 32, 0)
    workspace, into = torch.empty(rows * vocab), (torch.empty(rows, width), torch.empty(vocab, width))

    def general(g):
        OPS.linear_logprobs_backward(g, None, None, hidden, weight, targets, None, None, out[1], out[6], *options, 3, 0)

    def kept(g):
        OPS.linear_chunk_backward_(
            g, None, None, hidden, weight, targets, None, None, out[1], out[6], workspace, *into, None, *options, False
        )

    for backward in (general, kept):
        best = [math.inf, math.inf]
        for _ in range(5):
            for k, upstream in enumerate((g, some)):
                workspace.normal_()
                begin = time.process_time()
                backward(upstream)
                best[k] = min(best[k], time.process_time() - begin)
        assert best[1] < 0.4 * best[0]
