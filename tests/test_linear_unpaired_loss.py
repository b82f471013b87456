"""linear_unpaired_loss against linear_logprobs, sequence_sum and unpaired_loss, which it fuses. What it shares with
linear_preference_loss (the op, chunks, autograd) is tested there."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

from linear_losses import BF16, DTYPES, F16, F32, F64, HEADS, Passes, assert_same, distance, leaf, names, run
from prefkern import linear_logprobs, linear_unpaired_loss, sequence_sum, unpaired_loss
from prefkern.ops import _linear_layout
from prefkern.ops.preference import SCORES, UNPAIRED_KINDS

OPS = torch.ops.prefkern
NAN = math.nan
ROWS, LENGTH, WIDTH, VOCAB = 7, 6, 16, 67
CHUNKS = {"default": None, "one row": 1, "some responses": 6000}


def two_steps(
    hidden, weight, targets, desirable, *, mask=None, cu_seqlens=None, ref_logp=None, ref_sequence_logp=None,
    response_weight=None, response_mask=None, average=None, bias=None, temperature=1.0, softcap=None, logit_scale=1.0,
    ignore_index=-100, chunk_bytes=None, **options,
):  # fmt: skip
    """What linear_unpaired_loss fuses."""
    if mask is not None:
        targets = torch.where(mask, targets, ignore_index)
    logp = linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, chunk_bytes=chunk_bytes,
    ).logp  # fmt: skip
    layout = {"mask": targets != ignore_index, "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(hidden.device)}
    ratio = sequence_sum(logp, minus=ref_logp, **layout)
    if average:
        options.update(average=average, lengths=sequence_sum(torch.ones_like(logp.detach()), **layout))
    return unpaired_loss(ratio, ref_sequence_logp, desirable, weight=response_weight, mask=response_mask, **options)


def make(device="cpu", dtype=F32, layout="padded", rows=ROWS, length=LENGTH, width=WIDTH, vocab=VOCAB):
    """hidden, weight and a dict of targets, desirable, ref_logp and, packed, cu_seqlens; prompt tokens and padding do not
    count."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    lengths = torch.randint(2, length + 1, (rows,))
    counts = torch.arange(length) < lengths[:, None]
    counts[:, 0] = False  # the prompt
    targets = torch.where(counts, torch.randint(0, vocab, counts.shape), -100)
    hidden, weight = torch.randn(rows, length, width).to(dtype), (torch.randn(vocab, width) * 2 / width**0.5).to(dtype)
    logp = linear_logprobs(hidden, weight, targets).logp
    tokens = {"targets": targets, "ref_logp": (logp + 0.5 * torch.randn(logp.shape)).to(F64 if dtype == F64 else F32)}
    if layout == "packed":
        inside = torch.arange(length) < lengths[:, None]
        hidden, tokens = hidden[inside], {name: t[inside] for name, t in tokens.items()}
        tokens["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    tokens["desirable"] = torch.arange(rows) % 3 != 1
    return hidden.to(device), weight.to(device), {name: t.to(device) for name, t in tokens.items()}


def compare(hidden, weight, bias=None, upstream=1.0, **arguments):
    ours = run(linear_unpaired_loss, hidden, weight, bias, upstream, **arguments)
    assert_same(ours, run(two_steps, hidden, weight, bias, upstream, **arguments), hidden.dtype)
    return ours


# ------------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("kind", UNPAIRED_KINDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_every_kind(device, kind, layout, chunk, dtype):
    hidden, weight, tokens = make(device, dtype, layout)
    bias = torch.randn(VOCAB, device=device).to(dtype)
    compare(hidden, weight, bias, kind=kind, chunk_bytes=CHUNKS[chunk], upstream=-2.0, **tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_head(device, dtype, head, layout):
    hidden, weight, tokens = make(device, dtype, layout)
    options = dict(HEADS[head])
    if options.get("temperature") is True:
        options["temperature"] = torch.rand(tokens["targets"].shape, device=device) + 0.5
    bias = torch.randn(VOCAB, device=device).to(dtype) if options.pop("bias", False) else None
    for chunk_bytes in (None, 6000):
        compare(hidden, weight, bias, chunk_bytes=chunk_bytes, **options, **tokens)


each = torch.linspace(0.1, 2.0, ROWS)
OPTIONS = {
    "kl": {"kl": 0.4},
    "kl as a tensor": {"kl": torch.tensor(0.4)},
    "kl of each": {"kl": each - 1},
    "weights of the sides": {"desirable_weight": 1.5, "undesirable_weight": 0.2},
    "bco with a shift": {"kind": "bco", "offset": 0.3},
    "npo": {"kind": "bco", "beta": 0.1, "factor": 20.0},
    "dro": {"kind": "squared", "offset": each, "beta": 1.0},
    "average logp": {"average": "logp", "beta": 2.0},
    "average score": {"average": "score", "beta": 2.0},
    "response_weight": {"response_weight": each - 0.1},
    "weighted_mean": {"response_weight": each, "reduction": "weighted_mean"},
    "response_mask": {"response_mask": torch.arange(ROWS) % 2 == 0},
    "sum": {"reduction": "sum"},
    "norm": {"norm": 7.0},
    "norm as a tensor": {"norm": torch.tensor([3.0])},
    "scale": {"scale": each},
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", [*OPTIONS, *(score for score in SCORES if score != "log_odds")])
def test_every_option(device, layout, chunk, name):
    hidden, weight, tokens = make(device, layout=layout)
    options = OPTIONS.get(name, {"score": name})
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    compare(hidden, weight, chunk_bytes=CHUNKS[chunk], **options, **tokens)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("reference", ["sums", "none"])
def test_other_references(device, layout, chunk, reference):
    hidden, weight, tokens = make(device, layout=layout)
    ref = tokens.pop("ref_logp")
    if reference == "sums":
        counts = tokens["targets"] != -100
        tokens["ref_sequence_logp"] = sequence_sum(ref, counts, cu_seqlens=tokens.get("cu_seqlens"))
    compare(hidden, weight, chunk_bytes=CHUNKS[chunk], **tokens)


def test_float16_gradients_survive_until_the_loss_is_scaled(device):
    hidden, weight, tokens = make(device, F16, rows=128, vocab=500)
    wide = [t.float() for t in (hidden, weight)]
    _, expected = run(linear_unpaired_loss, *wide, upstream=2.0**12, beta=1e-3, **tokens)
    _, grads = run(linear_unpaired_loss, hidden, weight, upstream=2.0**12, beta=1e-3, **tokens)
    for a, e in zip(grads, expected, strict=True):
        assert a.dtype == F16
        assert distance(a, e) < 3e-3


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gradcheck(layout):
    hidden, weight, tokens = make("cpu", F64, layout, rows=3, length=3, width=3, vocab=5)
    leaves = [leaf(hidden), leaf(weight), leaf(torch.randn(5, dtype=F64))]

    def function(hidden, weight, bias):
        return linear_unpaired_loss(hidden, weight, bias=bias, softcap=3.0, beta=1.0, chunk_bytes=1, **tokens).loss

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_does_not_count_is_never_looked_at(device, layout, chunk):
    """NaN in hidden states and the reference, at tokens and in responses that do not count."""
    hidden, weight, tokens = make(device, layout=layout)
    keep = torch.arange(ROWS, device=device) % 3 != 2
    options = {"response_mask": keep, "chunk_bytes": CHUNKS[chunk]}
    expected, e_grads = run(linear_unpaired_loss, hidden, weight, **options, **tokens)
    kept = keep[:, None] if layout == "padded" else keep.repeat_interleave(tokens["cu_seqlens"].diff())
    counts = (tokens["targets"] != -100) & kept
    hidden = torch.where(counts.unsqueeze(-1), hidden, NAN)
    tokens["ref_logp"] = torch.where(counts, tokens["ref_logp"], NAN)
    masked = {**tokens, "targets": torch.where(counts, tokens["targets"], 10**9), "mask": counts}
    for same in (tokens, masked):
        out, grads = run(linear_unpaired_loss, hidden, weight, **options, **same)
        assert torch.equal(out.loss, expected.loss)
        assert all(torch.equal(a, e) for a, e in zip(grads, e_grads, strict=True))
        assert torch.equal(grads[0].ne(0).any(-1), counts)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", ["no responses", "nothing counts"])
def test_nothing_to_do(device, layout, case):
    hidden, weight, tokens = make(device, layout=layout)
    if case == "nothing counts":
        tokens["targets"][:] = -100
    else:
        hidden, tokens = hidden[:0], {name: t[: name == "cu_seqlens"] for name, t in tokens.items()}
    out, grads = run(linear_unpaired_loss, hidden, weight, torch.zeros(VOCAB, device=device), **tokens)
    assert out.metrics["pairs"] == (ROWS if case == "nothing counts" else 0)
    assert out.loss.isfinite()
    assert [g.shape for g in grads] == [hidden.shape, weight.shape, (VOCAB,)]
    assert all(g.eq(0).all() for g in grads)


# ------------------------------------------------------------------------------------------------------ passes and chunks


@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_passes_over_the_head(device, monkeypatch, trained, chunk):
    hidden, weight, tokens = make(device)
    passes = Passes(monkeypatch)
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    linear_unpaired_loss(hidden, weight, chunk_bytes=CHUNKS[chunk], **tokens).loss.backward()
    sizes = [int(n) if device == "cpu" else LENGTH for n in (tokens["targets"] != -100).sum(1)]
    rows = sum(sizes)
    again = rows - ROWS if chunk == "one row" else 0  # all but the last of each response
    assert passes.logits == rows + again
    assert passes.hidden == (rows if trained != "weight" else 0)
    assert passes.weight == (rows if trained != "hidden" else 0)
    assert len(passes.chunks) == {"default": 1, "one row": rows + again, "some responses": len(passes.chunks)}[chunk]
    if chunk == "some responses":
        assert 1 < len(passes.chunks) < ROWS


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=names)
def test_chunks_as_on_cuda(monkeypatch, layout, chunk, dtype):
    """With the rows that do not count, and without knowing where responses end."""
    hidden, weight, tokens = make("cpu", dtype, layout)
    for cut in (_linear_layout.Layout.full_chunks, lambda self, limit: [self.whole()]):
        monkeypatch.setattr(_linear_layout.Layout, "compact_chunks", cut)
        compare(hidden, weight, torch.randn(VOCAB), chunk_bytes=CHUNKS[chunk], **tokens)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_cu_seqlens_on_either_device(device, place, chunk):
    hidden, weight, tokens = make(device, layout="packed")
    tokens["cu_seqlens"] = tokens["cu_seqlens"].to(place)
    compare(hidden, weight, chunk_bytes=CHUNKS[chunk], **tokens)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_no_pass_for_it(device, monkeypatch, mode):
    hidden, weight, tokens = make(device)
    expected, _ = run(linear_unpaired_loss, hidden, weight, **tokens)
    passes = Passes(monkeypatch)
    with mode():
        out = linear_unpaired_loss(hidden.requires_grad_(), weight, **tokens)
    assert passes.logits == 0
    assert out.loss.grad_fn is None
    assert_close(out.loss, expected.loss.detach())


def test_equal_calls_give_equal_bits(device):
    hidden, weight, tokens = make(device)
    runs = [run(linear_unpaired_loss, hidden, weight, chunk_bytes=6000, **tokens) for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    assert all(torch.equal(a, e) for a, e in zip(runs[0][1], runs[1][1], strict=True))


def test_autocast(device):
    hidden, weight, tokens = make(device)
    with torch.autocast(device, dtype=BF16):
        out, grads = run(linear_unpaired_loss, hidden, weight, **tokens)
    low, low_grads = run(linear_unpaired_loss, hidden.bfloat16(), weight.bfloat16(), **tokens)
    assert torch.equal(out.loss, low.loss)
    assert all(a.dtype == F32 and torch.equal(a, e.float()) for a, e in zip(grads, low_grads, strict=True))


# --------------------------------------------------------------------------------------------------------------- autograd


def test_differentiating_twice_is_an_error(device):
    hidden, weight, tokens = make(device)
    hidden.requires_grad_()
    loss = linear_unpaired_loss(hidden, weight, **tokens).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("needs", ["none", "hidden", "all"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_op_is_a_good_citizen(monkeypatch, needs, layout):
    hidden, weight, tokens = make("cpu", F32, layout)
    hidden.requires_grad_(needs != "none")
    weight.requires_grad_(needs == "all")
    seen = []
    monkeypatch.setattr("prefkern.ops.linear_unpaired._loss", lambda *a: seen.append(a) or OPS.linear_preference_loss(*a))
    linear_unpaired_loss(hidden, weight, chunk_bytes=6000, **tokens)
    opcheck(OPS.linear_preference_loss.default, seen[0])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiles_into_one_graph(device, layout):
    counter = CompileCounterWithBackend("aot_eager")

    def function(hidden, weight, kl, **tokens):
        return linear_unpaired_loss(hidden * 1.0, weight, kl=kl, **tokens).loss * 3

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for rows in (3, 4, 6):
        hidden, weight, tokens = make(device, layout=layout, rows=rows)
        leaves, kl = ([leaf(hidden), leaf(weight)], [leaf(hidden), leaf(weight)]), torch.tensor(0.1 * rows, device=device)
        losses = [f(*own, kl, **tokens) for f, own in zip((function, compiled), leaves, strict=True)]
        assert_close(losses[0], losses[1])
        grads = [torch.autograd.grad(loss, own) for loss, own in zip(losses, leaves, strict=True)]
        for a, e in zip(*grads, strict=True):
            assert_close(a, e, rtol=1e-5, atol=1e-7)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_shapes_on_meta():
    hidden, weight, tokens = make()
    hidden, weight = hidden.to("meta").requires_grad_(), weight.to("meta").requires_grad_()
    out = linear_unpaired_loss(hidden, weight, **{name: t.to("meta") for name, t in tokens.items()})
    assert out.loss.shape == ()
    assert out.loss.device.type == "meta"


# ------------------------------------------------------------------------------------------------------------- bad input

H, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.tensor([[0, 1, 2], [3, 4, -100]])
GOOD = torch.tensor([True, False])
CU = torch.tensor([0, 2, 3]).int()
BAD = {
    "hidden: a list": ({"hidden": [1.0]}, TypeError, "hidden is a list"),
    "hidden: flat": ({"hidden": H.reshape(6, 4)}, ValueError, r"hidden.*\[6, 4\].*\[B, T, H\].*cu_seqlens"),
    "hidden: another width": ({"hidden": torch.zeros(2, 3, 5)}, ValueError, "hidden.*5.*weight.*4"),
    "targets: too few": ({"targets": T[:1]}, ValueError, r"targets.*\[1, 3\].*\[2, 3\] is expected"),
    "targets: beyond": ({"targets": T + 2}, ValueError, r"targets\[1, 0\] is 5; accepted: 0 to 4"),
    "desirable: None": ({"desirable": None}, TypeError, "desirable is a NoneType"),
    "desirable: shape": ({"desirable": GOOD[:1]}, ValueError, r"desirable has shape \[1\]; there are 2 responses"),
    "desirable: dtype": ({"desirable": GOOD.long()}, TypeError, "desirable has dtype torch.int64; accepted: bool"),
    "desirable: meta": ({"desirable": GOOD.to("meta")}, ValueError, "desirable is on meta"),
    "mask: dtype": ({"mask": torch.ones(2, 3)}, TypeError, "mask.*float32.*bool"),
    "ref_logp: shape": ({"ref_logp": torch.zeros(2)}, ValueError, r"ref_logp.*\[2\].*\[2, 3\]"),
    "ref_logp: twice": (
        {"ref_logp": torch.zeros(2, 3), "ref_sequence_logp": torch.zeros(2)},
        ValueError,
        "ref_logp and ref_sequence_logp are given; one kind of reference",
    ),
    "ref_sequence_logp: shape": ({"ref_sequence_logp": torch.zeros(3)}, ValueError, r"ref_sequence_logp.*\[3\].*\[2\]"),
    "cu_seqlens: dtype": (
        {"hidden": H.reshape(6, 4)[:3], "targets": torch.arange(3), "cu_seqlens": CU.long()}, ValueError, "int64.*int32"
    ),
    "bias: shape": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[4\].*\[5\]"),
    "temperature: zero": ({"temperature": 0.0}, ValueError, "temperature is 0.*positive"),
    "chunk_bytes: zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0.*positive"),
    "kind: of pairs": ({"kind": "sigmoid"}, ValueError, "kind is 'sigmoid'; accepted: 'kto'"),
    "kl: of another kind": ({"kind": "bco", "kl": 0.1}, ValueError, "kl is 0.1 but kind is 'bco'"),
    "kl: a word": ({"kl": "0.1"}, TypeError, "kl is '0.1'"),
    "option: unknown": ({"desirable_wieght": 0.1}, TypeError, "'desirable_wieght'.*did you mean 'desirable_weight'"),
    "option: mask_of_responses": ({"lengths": torch.ones(2)}, TypeError, "'lengths' is not an argument here; it comes from"),
    "option: response_weight": ({"response_weight": torch.ones(3)}, ValueError, r"response_weight.*\[3\].*\[2\]"),
    "option: response_mask": ({"response_mask": [True]}, TypeError, "response_mask is a list"),
    "option: response_mask dtype": ({"response_mask": torch.ones(2)}, TypeError, "response_mask.*float32.*bool"),
    "reduction: none": ({"reduction": "none"}, ValueError, "reduction is 'none'; accepted: 'mean'"),
    "beta: negative": ({"beta": -1.0}, ValueError, "beta is -1.*positive"),
    "average without tokens": ({"average": "logp", "targets": T * 0 - 100}, ValueError, r"lengths\[0\] is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(name, grad):
    changes, error, message = BAD[name]
    arguments = {"hidden": H, "weight": W, "targets": T, "desirable": GOOD, **changes}
    for key in ("hidden", "weight"):
        if grad and isinstance(arguments[key], torch.Tensor) and arguments[key].is_floating_point():
            arguments[key] = leaf(arguments[key])
    with pytest.raises(error, match=message) as caught:
        linear_unpaired_loss(**arguments)
    assert caught.type is error


def test_a_nan_log_prob_is_an_error_under_validation(validation):
    hidden, weight, tokens = make()
    hidden[1, 1] = NAN
    validation(True)
    with pytest.raises(ValueError, match=r"logp\[1\] is nan"):
        linear_unpaired_loss(leaf(hidden), weight, **tokens)
