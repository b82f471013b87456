"""linear_policy_loss against linear_logprobs, policy_loss and masked_aggregate, which it fuses: values, metrics, gradients,
passes over the head, memory, bits, and everything it must refuse."""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

from linear_losses import BF16, DTYPES, F16, F32, F64, HEADS, TOLERANCE, Passes, assert_same, distance, leaf, names, run
from prefkern import LossOutput, linear_logprobs, linear_policy_loss, masked_aggregate, policy_loss
from prefkern.ops import _linear_layout, _single_pass
from prefkern.ops.policy import AGGREGATIONS, KINDS, KL_KINDS

OPS = torch.ops.prefkern
NAN = math.nan
ROWS, LENGTH, WIDTH, VOCAB = 5, 7, 16, 67
OF_SEQUENCES = ("gspo", "gspo_token", "gmpo")
CHUNKS = {"default": None, "smallest": 1, "some": 3000}


def two_steps(
    hidden, weight, targets, old_logp, advantages, mask=None, *, cu_seqlens=None, bias=None, temperature=1.0, softcap=None,
    logit_scale=1.0, ignore_index=-100, entropy_coef=0.0, entropy_agg=None, with_entropy=False, chunk_bytes=None, **options,
):  # fmt: skip
    """What linear_policy_loss fuses."""
    if mask is not None:
        targets = torch.where(mask, targets, ignore_index)
    wanted = with_entropy or entropy_coef != 0
    head = linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, outputs=("entropy",) * wanted, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    layout = {"mask": targets != ignore_index, "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(hidden.device)}
    old = head.logp.detach() if old_logp is None else old_logp
    out = policy_loss(head.logp, old, advantages, entropy=head.entropy if wanted else None, **layout, **options)
    if entropy_coef == 0:
        return out
    same = {name: options[name] for name in ("agg", "norm", "scale") if name in options}
    how = same if entropy_agg is None else {"agg": entropy_agg}
    return LossOutput(out.loss - entropy_coef * masked_aggregate(head.entropy, **layout, **how), out.metrics)


def make(device="cpu", dtype=F32, layout="padded", rows=ROWS, length=LENGTH, width=WIDTH, vocab=VOCAB):
    """hidden, weight and a dict of targets, old_logp, advantages, ref_logp and, packed, cu_seqlens. Ragged lengths; prompt
    tokens and padding do not count, and neither does anything of the second sequence; advantages of both signs and 0; ratios
    beyond the bounds on both sides."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    lengths = torch.randint(2, length + 1, (rows,))
    counts = torch.arange(length) < lengths[:, None]
    counts[:, 0] = False  # the prompt
    if rows > 1:
        counts[1] = False
    targets = torch.where(counts, torch.randint(0, vocab, counts.shape), -100)
    hidden, weight = torch.randn(rows, length, width).to(dtype), (torch.randn(vocab, width) * 2 / width**0.5).to(dtype)
    acc = F64 if dtype == F64 else F32
    logp = linear_logprobs(hidden, weight, targets).logp
    tokens = {"targets": targets}
    tokens |= {name: (logp + 0.4 * torch.randn(logp.shape)).to(acc) for name in ("old_logp", "ref_logp")}
    advantages = torch.linspace(-1.5, 1.5, rows).to(acc)
    if layout == "packed":
        inside = torch.arange(length) < lengths[:, None]
        hidden, tokens = hidden[inside], {name: t[inside] for name, t in tokens.items()}
        tokens["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    tokens = {name: t.to(device) for name, t in {**tokens, "advantages": advantages}.items()}
    return hidden.to(device), weight.to(device), tokens


def compare(hidden, weight, bias=None, upstream=1.0, **arguments):
    ours = run(linear_policy_loss, hidden, weight, bias, upstream, **arguments)
    assert_same(ours, run(two_steps, hidden, weight, bias, upstream, **arguments), hidden.dtype)
    return ours


def without(tokens, *dropped):
    return {name: t for name, t in tokens.items() if name not in dropped}


# ------------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_every_kind_penalty_and_aggregation(kind, agg):
    """In float64, to its rounding."""
    inputs = {layout: make("cpu", F64, layout) for layout in ("padded", "packed")}
    cases = list(itertools.product(inputs, CHUNKS, (0.0, 0.3)))
    first = 8 * (KINDS.index(kind) + AGGREGATIONS.index(agg))
    for place, kl in enumerate((None, *KL_KINDS)):
        if kind == "none" and kl is None:
            continue
        layout, chunk, entropy_coef = cases[(first + place) % len(cases)]
        hidden, weight, tokens = inputs[layout]
        penalty = {"beta": 0.2, "kl": kl}
        if kl is None:
            tokens, penalty = without(tokens, "ref_logp"), {}
        scale = 9.0 if agg in ("trl-dr_grpo", "seq-mean-token-sum-norm") else None
        compare(
            hidden, weight, kind=kind, agg=agg, scale=scale, entropy_coef=entropy_coef, chunk_bytes=CHUNKS[chunk], **penalty,
            **tokens,
        )  # fmt: skip


def options_of(generator, kind, shape, dtype, device, packed):
    """A random choice of every option."""

    def chance(p):
        return torch.rand((), generator=generator).item() < p

    def one_of(*values):
        return values[torch.randint(len(values), (), generator=generator)]

    def random(size, low=0.0, high=1.0):
        return (low + (high - low) * torch.rand(size, generator=generator, dtype=F64)).to(dtype).to(device)

    o = {"kind": kind, "agg": one_of(*AGGREGATIONS), "ratio_clamp": one_of(20.0, None, 0.3, (None, 0.5), (-0.2, None))}
    if o["agg"] == "trl-dr_grpo" or (o["agg"] == "seq-mean-token-sum-norm" and (packed or chance(0.5))):
        o["scale"] = 13.0
    if chance(0.3):
        o["norm"] = one_of(17.0, torch.tensor(17, device=device), torch.tensor(3.5, device=device))
    for name in ("eps_low", "eps_high"):
        size = one_of(None, (ROWS,), None if kind == "gspo" else shape)
        o[name] = one_of(0.1, 0.2, 0.4) if size is None else random(size, 0.0, 0.5)
    if kind in ("clip", "gspo", "gspo_token"):
        o |= {"dual_clip": one_of(None, 1.3), "delta": one_of(None, 1.1, 1.5)}
    if chance(0.5):
        o["token_weight"] = random(one_of(shape, (ROWS,)), 0.0, 2.0)
    if kind == "none" or chance(0.7):
        beta = 0.3 if kind == "none" else one_of(0.0, 0.3)
        o |= {"beta": beta, "kl": one_of(*KL_KINDS), "kl_clamp": one_of(None, None, 0.2), "ref_logp": True}
        o["kl_ratio"] = kind != "gmpo" and chance(0.4)
    if kind != "none" and chance(0.4):
        o["anchor"] = (torch.rand(ROWS, generator=generator) < 0.5).to(device)
        o |= {"anchor_loss": one_of("shaped", "nll"), "anchor_gamma": 0.3}
    o["entropy_coef"] = one_of(0.0, 0.2, -0.1)
    if chance(0.3):
        o["entropy_agg"] = one_of("token-mean", "token-sum", "trl-grpo", "seq-mean-token-mean")
        o["entropy_agg"] = None if o["entropy_agg"] == o["agg"] else o["entropy_agg"]
    o["with_entropy"] = chance(0.5)
    return o


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_all_options_together(device, dtype, kind, layout):
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    for each, chunk in itertools.product((False, True), CHUNKS):
        hidden, weight, tokens = make(device, dtype, layout)
        shape = tokens["targets"].shape
        o = options_of(generator, kind, shape, tokens["old_logp"].dtype, device, layout == "packed")
        if not o.pop("ref_logp", False):
            del tokens["ref_logp"]
        if each and kind not in ("gspo", "gmpo"):
            tokens["advantages"] = torch.randn(shape, generator=generator).to(tokens["old_logp"])
        compare(hidden, weight, chunk_bytes=CHUNKS[chunk], **o, **tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_head(device, dtype, head, layout, chunk):
    hidden, weight, tokens = make(device, dtype, layout)
    options = dict(HEADS[head])
    if options.get("temperature") is True:
        options["temperature"] = torch.rand(tokens["targets"].shape, device=device) + 0.5
    bias = torch.randn(VOCAB, device=device).to(dtype) if options.pop("bias", False) else None
    kind = "gspo" if head in ("bias", "softcap") else "sapo"  # of which no gradient stops at a bound that rounding might pass
    options |= {"kind": kind, "ratio_clamp": None, "eps_low": 1.0, "eps_high": 1e3} if kind == "gspo" else {"kind": kind}
    compare(hidden, weight, bias, chunk_bytes=CHUNKS[chunk], entropy_coef=0.1, beta=0.1, **options, **tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_on_policy(device, kind, layout, chunk):
    """Without old log-probs those of this very pass stand for them."""
    hidden, weight, tokens = make(device, layout=layout)
    out, grads = compare(
        hidden, weight, kind=kind, beta=0.2, chunk_bytes=CHUNKS[chunk], **{**tokens, "old_logp": None}
    )  # fmt: skip
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1
    if kind in ("clip", "gspo_token"):  # the policy gradient
        _, expected = run(linear_policy_loss, hidden, weight, kind="reinforce", beta=0.2, **tokens)
        assert all(distance(a, e) < TOLERANCE[F32] for a, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_mask_and_ignore_index_both_leave_tokens_out(device, layout):
    hidden, weight, tokens = make(device, layout=layout)
    counts = tokens["targets"] != -100
    expected, e_grads = run(linear_policy_loss, hidden, weight, entropy_coef=0.1, **tokens)
    everywhere = {**tokens, "mask": torch.ones_like(counts)}
    masked = {**tokens, "mask": counts, "targets": torch.where(counts, tokens["targets"], 10**9)}  # never looked at
    other = {**tokens, "targets": torch.where(counts, tokens["targets"], -1).int(), "ignore_index": -1}
    for same in (everywhere, masked, other):
        out, grads = run(linear_policy_loss, hidden, weight, entropy_coef=0.1, **same)
        assert torch.equal(out.loss, expected.loss)
        assert all(torch.equal(a, e) for a, e in zip(grads, e_grads, strict=True))


@pytest.mark.parametrize("upstream", [1.0, -3.0, 0.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_upstream_gradient(device, upstream, dtype):
    hidden, weight, tokens = make(device, dtype)
    one, one_grads = run(linear_policy_loss, hidden, weight, entropy_coef=0.1, **tokens)
    _, grads = run(linear_policy_loss, hidden, weight, upstream=upstream, entropy_coef=0.1, **tokens)
    for a, e in zip(grads, one_grads, strict=True):
        assert_close(a.double(), upstream * e.double(), rtol=2 * TOLERANCE[dtype], atol=1e-7)
    assert one.loss.dtype == (F64 if dtype == F64 else F32)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=names)
def test_low_precision_is_no_worse_than_two_steps(device, dtype):
    hidden, weight, tokens = make(device, dtype, rows=12, length=40)
    options = {"kind": "sapo", "beta": 0.1, "entropy_coef": 0.1}
    wide = [t.cpu().double() for t in (hidden, weight)]
    exact, e_grads = run(two_steps, *wide, **options, **{name: t.cpu() for name, t in tokens.items()})
    _, two_grads = run(two_steps, hidden, weight, **options, **tokens)
    for chunk_bytes in (None, 3000):
        out, grads = run(linear_policy_loss, hidden, weight, chunk_bytes=chunk_bytes, **options, **tokens)
        assert abs(out.loss.item() - exact.loss.item()) < 1e-5
        for a, t, e in zip(grads, two_grads, e_grads, strict=True):
            assert distance(a, e) < 1.2 * distance(t, e)


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_float16_gradients_survive_until_the_loss_is_scaled(device, monkeypatch, agg):
    """Neither does a mean over many tokens underflow on the way, nor a sum overflow."""
    hidden, weight, tokens = make(device, F16, rows=64, length=30, vocab=500)
    wide = [t.float() for t in (hidden, weight)]
    scale = 30.0 if agg in ("trl-dr_grpo", "seq-mean-token-sum-norm") else None
    options = {
        "agg": agg,
        "scale": scale,
        "entropy_coef": 0.05,
        "kind": "sapo",
        "upstream": 2.0**-4 if agg == "token-sum" else 8,
    }
    _, expected = run(linear_policy_loss, *wide, **options, **tokens)
    largest, backward = [], _single_pass._chunk_backward
    spy = lambda g, *rest: largest.append(g.abs().max().item()) or backward(g, *rest)  # noqa: E731
    monkeypatch.setattr(_single_pass, "_chunk_backward", spy)
    _, grads = run(linear_policy_loss, hidden, weight, **options, **tokens)
    assert all(1 < g < 1000 for g in largest)  # what a GPU narrows
    for a, e in zip(grads, expected, strict=True):
        assert a.dtype == F16
        assert distance(a, e) < 3e-3


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["sapo", "gspo"])
def test_gradcheck(layout, kind):
    hidden, weight, tokens = make("cpu", F64, layout, rows=3, length=4, width=3, vocab=5)
    leaves = [leaf(hidden), leaf(weight), leaf(torch.randn(5, dtype=F64))]

    def function(hidden, weight, bias):
        return linear_policy_loss(
            hidden, weight, bias=bias, softcap=3.0, entropy_coef=0.3, kind=kind, eps_low=1.0, eps_high=1e3, beta=0.2,
            chunk_bytes=1, **tokens,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_count_is_never_looked_at(device, layout, kind):
    """NaN in hidden states, old and reference log-probs and weights of tokens that do not count."""
    hidden, weight, tokens = make(device, layout=layout)
    counts = tokens["targets"] != -100
    tokens["token_weight"] = torch.rand(counts.shape, device=device)
    for chunk in CHUNKS.values():
        options = {"kind": kind, "beta": 0.1, "entropy_coef": 0.1, "chunk_bytes": chunk}
        expected, e_grads = run(linear_policy_loss, hidden, weight, **options, **tokens)
        poisoned = {name: torch.where(counts, tokens[name], NAN) for name in ("old_logp", "ref_logp", "token_weight")}
        out, grads = run(
            linear_policy_loss, torch.where(counts.unsqueeze(-1), hidden, NAN), weight, **options, **{**tokens, **poisoned}
        )
        assert torch.equal(out.loss, expected.loss)
        assert all(torch.equal(out.metrics[name], value) for name, value in expected.metrics.items())
        assert all(torch.equal(a, e) for a, e in zip(grads, e_grads, strict=True))
        assert grads[0][~counts].eq(0).all()


def test_tokens_without_a_gradient_have_none_at_all(device):
    """Clipped ones, those of sequences without advantage, and those of weight 0: exactly 0."""
    hidden, weight, tokens = make(device)
    tokens["token_weight"] = (torch.rand(ROWS, LENGTH, device=device) < 0.7).float()
    for chunk in CHUNKS.values():
        _, (grad, _) = run(linear_policy_loss, hidden, weight, chunk_bytes=chunk, **without(tokens, "ref_logp"))
        logp = leaf(linear_logprobs(hidden, weight, tokens["targets"]).logp)
        loss = policy_loss(
            logp, tokens["old_logp"], tokens["advantages"], tokens["targets"] != -100, token_weight=tokens["token_weight"]
        ).loss
        active = torch.autograd.grad(loss, logp)[0] != 0
        assert 0 < active.sum() < (tokens["targets"] != -100).sum() - 3
        assert torch.equal(grad.ne(0).any(-1), active)


def test_nan_stays_with_its_token_or_its_sequence(device):
    """It shows in the loss, and in no gradient but that of its token; where a ratio is one of the sequence, of its sequence."""
    for kind, chunk in itertools.product(("clip", "gspo"), CHUNKS.values()):
        hidden, weight, tokens = make(device)
        tokens["targets"][2, 1] = 3
        hidden[2, 1] = NAN
        leaves = leaf(hidden), weight
        out = linear_policy_loss(*leaves, kind=kind, eps_high=1e3, eps_low=1.0, chunk_bytes=chunk, **tokens)
        assert out.loss.isnan()
        (grad,) = torch.autograd.grad(out.loss, leaves[0])
        lost = torch.zeros(ROWS, LENGTH, dtype=torch.bool, device=device)
        lost[2] = tokens["targets"][2] != -100
        if kind == "clip":
            lost[2, 2:] = False
        assert torch.equal(grad.isnan().any(-1), lost)


@pytest.mark.parametrize("kind", ["clip", "gspo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", ["no sequences", "no tokens", "nothing counts"])
def test_nothing_to_do(device, layout, case, kind):
    hidden, weight, tokens = make(device, layout=layout)
    if case == "nothing counts":
        tokens["targets"][:] = -100
    elif case == "no sequences":
        hidden, tokens = hidden[:0], {name: t[: name == "cu_seqlens"] for name, t in tokens.items()}
    else:
        sequences = ("advantages", "cu_seqlens")
        cut = (lambda t: t[:, :0]) if layout == "padded" else (lambda t: t[:0])
        hidden, tokens = cut(hidden), {name: t if name in sequences else cut(t) for name, t in tokens.items()}
        if layout == "packed":
            tokens["cu_seqlens"] = torch.zeros_like(tokens["cu_seqlens"])
    for dtype in (F32, F16):
        own = hidden.to(dtype), weight.to(dtype), torch.zeros(VOCAB, device=device)
        out, grads = run(linear_policy_loss, *own, kind=kind, entropy_coef=0.5, **tokens)
        assert out.loss == 0
        assert out.metrics["tokens"] == 0
        assert [g.shape for g in grads] == [hidden.shape, weight.shape, (VOCAB,)]
        assert all(g.eq(0).all() for g in grads)


def test_strided_inputs(device):
    hidden, weight, tokens = make(device)
    expected, e_grads = run(linear_policy_loss, hidden, weight, **tokens)
    wide = torch.stack([hidden, torch.full_like(hidden, NAN)], 2)[:, :, 0]
    turned = weight.mT.contiguous().mT
    tokens = {name: t if t.ndim == 1 else t.mT.contiguous().mT for name, t in tokens.items()}
    leaves = wide.requires_grad_(), turned.requires_grad_()
    out = linear_policy_loss(*leaves, **tokens)
    assert_close(out.loss, expected.loss)
    for a, e in zip(torch.autograd.grad(out.loss, leaves), e_grads, strict=True):
        assert_close(a, e, rtol=1e-5, atol=1e-7)


def test_arguments_of_other_types(device):
    """Log-probs and advantages in whatever floating type they were kept."""
    hidden, weight, tokens = make(device)
    low = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tokens.items()}
    compare(hidden, weight, beta=0.1, kind="sapo", **low)


def test_autocast(device):
    hidden, weight, tokens = make(device)
    with torch.autocast(device, dtype=BF16):
        out, grads = run(linear_policy_loss, hidden, weight, entropy_coef=0.1, **tokens)
    low, low_grads = run(linear_policy_loss, hidden.bfloat16(), weight.bfloat16(), entropy_coef=0.1, **tokens)
    assert torch.equal(out.loss, low.loss)
    for a, e in zip(grads, low_grads, strict=True):
        assert a.dtype == F32
        assert torch.equal(a, e.float())


# ----------------------------------------------------------------------------------------------- passes, chunks, memory


@pytest.fixture
def passes(monkeypatch):
    return Passes(monkeypatch)


@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_passes_over_the_head(device, passes, monkeypatch, trained, chunk, kind):
    """Logits once, and a GEMM for each gradient that is needed. On the CPU, of rows that count only."""
    hidden, weight, tokens = make(device)
    monkeypatch.setattr("prefkern.ops._single_pass._linear_backward", None)
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    options = {"kind": kind, "entropy_coef": 0.1}
    out = linear_policy_loss(hidden, weight, chunk_bytes=CHUNKS[chunk], **options, **tokens)
    out.loss.backward()
    counts = tokens["targets"] != -100
    rows = int(counts.sum()) if device == "cpu" else counts.numel()
    assert passes.logits == rows
    assert passes.hidden == (rows if trained != "weight" else 0)
    assert passes.weight == (rows if trained != "hidden" else 0)
    pieces = len(counts) - (device == "cpu") if kind == "gspo" else rows
    assert len(passes.chunks) == {"default": 1, "smallest": pieces, "some": len(passes.chunks)}[chunk]
    if chunk == "some":
        assert 1 < len(passes.chunks) < pieces
        assert kind == "gspo" or max(passes.chunks) - min(passes.chunks) <= 1
    _, expected = run(linear_policy_loss, hidden, weight, **options, **tokens)
    for t, e in zip((hidden, weight), expected, strict=True):
        assert (t.grad is None) if not t.requires_grad else distance(t.grad, e) < 1e-6


@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_entropy_is_computed_where_somebody_needs_it(device, monkeypatch, coef, asked, grad):
    hidden, weight, tokens = make(device)
    outputs = []
    for name, place in (("_chunk", 10), ("_linear_fwd", 9)):
        op = getattr(_single_pass, name)
        spy = lambda *args, op=op, place=place: outputs.append(args[place]) or op(*args)  # noqa: E731
        monkeypatch.setattr(_single_pass, name, spy)
    out = linear_policy_loss(hidden.requires_grad_(grad), weight, entropy_coef=coef, with_entropy=asked, **tokens)
    wanted = asked or coef != 0
    assert [bits & 1 for bits in outputs] == [wanted]
    assert (out.metrics["entropy"] != 0) == wanted


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", ["clip", "gspo"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=names)
def test_chunks_with_the_rows_that_do_not_count(monkeypatch, layout, chunk, kind, dtype):
    """As on CUDA, where nobody waits for how many there are."""
    hidden, weight, tokens = make("cpu", dtype, layout)
    monkeypatch.setattr(_linear_layout.Layout, "compact_chunks", _linear_layout.Layout.full_chunks)
    monkeypatch.setattr(_linear_layout.Layout, "active", lambda self: None)
    options = {"kind": kind, "eps_low": 1.0, "eps_high": 1e3, "beta": 0.1, "entropy_coef": 0.1}
    compare(hidden, weight, torch.randn(VOCAB), chunk_bytes=CHUNKS[chunk], **options, **tokens)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", OF_SEQUENCES)
@pytest.mark.parametrize("dtype", [F32, F16], ids=names)
@pytest.mark.parametrize("trained", ["hidden", "both"])
def test_without_knowing_where_sequences_end(monkeypatch, passes, layout, kind, dtype, trained):
    """As with cu_seqlens on CUDA and a batch larger than a chunk: the same result from four passes."""
    hidden, weight, tokens = make("cpu", dtype, layout)
    monkeypatch.setattr(_linear_layout.Layout, "compact_chunks", lambda self, limit: None)
    options = {"kind": kind, "eps_low": 1.0, "eps_high": 1e3, "beta": 0.1, "entropy_coef": 0.1}
    if trained == "both":
        compare(hidden, weight, torch.randn(VOCAB), **options, **tokens)
        assert passes.logits == 0
        return
    ours = linear_policy_loss(hidden.requires_grad_(), weight, **options, **tokens)
    (grad,) = torch.autograd.grad(ours.loss, hidden)
    (expected,) = torch.autograd.grad(two_steps(hidden, weight, **options, **tokens).loss, hidden)
    assert_close(grad, expected, rtol=2 * TOLERANCE[dtype], atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["clip", "gspo"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_cu_seqlens_on_either_device(device, place, kind, chunk):
    hidden, weight, tokens = make(device, layout="packed")
    tokens["cu_seqlens"] = tokens["cu_seqlens"].to(place)
    compare(hidden, weight, chunk_bytes=CHUNKS[chunk], kind=kind, **tokens)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_nothing_waits_for_the_device(device, kind):
    hidden, weight, tokens = make(device)
    leaves = leaf(hidden), leaf(weight)

    def call():
        linear_policy_loss(*leaves, kind=kind, entropy_coef=0.1, chunk_bytes=3000, **tokens).loss.backward()

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_no_gradient_no_pass_for_it(device, passes, mode, kind):
    hidden, weight, tokens = make(device)
    expected, _ = run(linear_policy_loss, hidden, weight, kind=kind, entropy_coef=0.2, **tokens)
    before = passes.logits
    with mode():
        out = linear_policy_loss(hidden.requires_grad_(), weight, kind=kind, entropy_coef=0.2, **tokens)
    assert passes.logits == before  # blocks of linear_logprobs, none of which is kept
    assert out.loss.grad_fn is None
    assert_close(out.loss, expected.loss.detach())
    for name, value in expected.metrics.items():
        assert_close(out.metrics[name], value)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory(device, allocations, dtype, frozen):
    """Beside results: one chunk's logits and operands, and the float32 sums of a weight gradient that has another dtype."""
    rows, length, vocab, width, budget = 16, 64, 4000, 16, 1 << 21
    hidden, weight, tokens = make(device, dtype, rows=rows, length=length, vocab=vocab, width=width)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)

    def call():
        linear_policy_loss(hidden, weight, chunk_bytes=budget, entropy_coef=0.1, **tokens).loss.backward()

    call()
    hidden.grad = weight.grad = None
    used = allocations(call)
    results = hidden.nbytes + (0 if frozen else weight.nbytes + (vocab * width * 4 if dtype == BF16 else 0))
    small = 2 * vocab * width * 4 * (dtype == BF16)  # widened blocks of the weight
    assert used.peak <= budget + results + small + (128 << 10)
    counted = int((tokens["targets"] != -100).sum()) if device == "cpu" else tokens["targets"].numel()
    assert budget < counted * vocab * 4 / 1.5


def test_equal_calls_give_equal_bits(device):
    for kind in ("clip", "gspo"):
        hidden, weight, tokens = make(device, rows=9)
        options = {"kind": kind, "chunk_bytes": 3000, "entropy_coef": 0.1, "beta": 0.1}
        runs = [run(linear_policy_loss, hidden, weight, **options, **tokens) for _ in range(3)]
        for out, grads in runs[1:]:
            assert torch.equal(out.loss, runs[0][0].loss)
            assert all(torch.equal(a, e) for a, e in zip(grads, runs[0][1], strict=True))


def test_threads(threads):
    hidden, weight, tokens = make("cpu", rows=16, length=32, vocab=2000)
    runs = []
    for n in (1, 2, 2):
        threads(n)
        runs.append(run(linear_policy_loss, hidden, weight, kind="sapo", entropy_coef=0.1, **tokens))
    assert all(torch.equal(a, b) for a, b in zip(runs[1][1], runs[2][1], strict=True))
    assert_same(runs[1], runs[0], F32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_and_metrics_are_those_of_the_log_probs(device, monkeypatch, kind, layout):
    """Bit for bit, however the batch is cut: they are computed from all log-probs at once."""
    hidden, weight, tokens = make(device, layout=layout)
    logp, entropy = (torch.zeros(tokens["targets"].shape, device=device) for _ in range(2))
    at = []
    put = _single_pass.Rows.put
    monkeypatch.setattr(
        _single_pass.Rows, "put", lambda rows, into, values: at.append((rows, values)) or put(rows, into, values)
    )
    options = {"kind": kind, "beta": 0.1}
    out = linear_policy_loss(leaf(hidden), weight, chunk_bytes=3000, entropy_coef=0.1, **options, **tokens)
    found = [(rows, values) for rows, values in at if values.ndim == 1]  # the others are gradients
    for k, (rows, values) in enumerate(found):
        put(rows, (entropy if k % 2 else logp).view(-1), values)
    given = {**without(tokens, "targets"), "mask": tokens["targets"] != -100}
    expected = policy_loss(logp, entropy=entropy, **options, **given)
    bonus = masked_aggregate(entropy, given["mask"], cu_seqlens=tokens.get("cu_seqlens"))
    assert torch.equal(out.loss.detach(), expected.loss - 0.1 * bonus)
    assert all(torch.equal(value, expected.metrics[name]) for name, value in out.metrics.items())


# --------------------------------------------------------------------------------------------------------------- autograd


def test_gradients_go_to_the_first_backward(device):
    hidden, weight, tokens = make(device)
    hidden.requires_grad_()
    loss = linear_policy_loss(hidden, weight, **tokens).loss
    first, second = (torch.autograd.grad(loss * s, hidden, retain_graph=True)[0] for s in (1, 2))
    assert torch.equal(2 * first, second)
    torch.autograd.grad(loss, hidden)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_differentiating_twice_is_an_error(device, beside):
    hidden, weight, tokens = make(device)
    hidden.requires_grad_()
    loss = linear_policy_loss(hidden, weight, **tokens).loss + beside * hidden.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_everything_else_is_constant(device):
    hidden, weight, tokens = make(device)
    tokens = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tokens.items()}
    out = linear_policy_loss(leaf(hidden), weight, entropy_coef=0.1, beta=0.1, **tokens)
    out.loss.backward()
    assert all(t.grad is None for t in tokens.values())
    assert all(not value.requires_grad and value.shape == () for value in out.metrics.values())


def arguments_of_the_op(monkeypatch, *args, **kwargs):
    seen = []
    monkeypatch.setattr("prefkern.ops.linear_policy._loss", lambda *a: seen.append(a) or OPS.linear_policy_loss(*a))
    linear_policy_loss(*args, **kwargs)
    return seen[0]


@pytest.mark.parametrize("dtype", [F32, F16], ids=names)
@pytest.mark.parametrize("needs", ["none", "hidden", "all"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["clip", "gspo"])
def test_the_op_is_a_good_citizen(monkeypatch, dtype, needs, layout, kind):
    hidden, weight, tokens = make("cpu", dtype, layout)
    hidden.requires_grad_(needs != "none")
    weight.requires_grad_(needs == "all")
    options = {"kind": kind, "beta": 0.1, "entropy_coef": 0.1, "chunk_bytes": 3000}
    if kind == "gspo":
        tokens["old_logp"] = None
    opcheck(OPS.linear_policy_loss.default, arguments_of_the_op(monkeypatch, hidden, weight, **options, **tokens))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiles_into_one_graph(device, layout):
    hidden, weight, tokens = make(device, layout=layout)
    counter = CompileCounterWithBackend("aot_eager")

    def function(hidden, weight, **tokens):
        return linear_policy_loss(hidden * 1.0, weight, kind="gspo", beta=0.1, entropy_coef=0.1, **tokens).loss * 3

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for rows in (3, 4, 6):
        hidden, weight, tokens = make(device, layout=layout, rows=rows)
        leaves = [leaf(hidden), leaf(weight)], [leaf(hidden), leaf(weight)]
        losses = [f(*own, **tokens) for f, own in zip((function, compiled), leaves, strict=True)]
        assert_close(losses[0], losses[1])
        grads = [torch.autograd.grad(loss, own) for loss, own in zip(losses, leaves, strict=True)]
        for a, e in zip(*grads, strict=True):
            assert_close(a, e, rtol=1e-5, atol=1e-7)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]  # nothing is compiled again for another number of sequences


def test_shapes_on_meta():
    hidden, weight, tokens = make()
    hidden, weight = hidden.to("meta").requires_grad_(), weight.to("meta").requires_grad_()
    out = linear_policy_loss(hidden, weight, **{name: t.to("meta") for name, t in tokens.items()})
    assert out.loss.shape == ()
    assert out.loss.device.type == "meta"


# ------------------------------------------------------------------------------------------------------------- bad input

H, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.tensor([[0, 1, 2], [3, 4, -100]])
Z, A = torch.zeros(2, 3), torch.zeros(2)
CU = torch.tensor([0, 2, 3]).int()
FLAT = torch.zeros(3)
PACKED = {"hidden": H.reshape(6, 4)[:3], "targets": torch.tensor([0, 1, 2]), "cu_seqlens": CU, "old_logp": FLAT}
BAD = {
    "hidden: a list": ({"hidden": [1.0]}, TypeError, "hidden is a list"),
    "hidden: flat": ({"hidden": H.reshape(6, 4)}, ValueError, r"hidden.*\[6, 4\].*\[B, T, H\].*cu_seqlens"),
    "hidden: padded and packed": ({"cu_seqlens": CU}, ValueError, r"hidden.*\[2, 3, 4\].*\[N, H\]"),
    "hidden: integers": ({"hidden": H.int()}, TypeError, "hidden.*Int.*float32"),
    "hidden: another width": ({"hidden": torch.zeros(2, 3, 5)}, ValueError, "hidden.*5.*weight.*4"),
    "weight: None": ({"weight": None}, TypeError, "weight.*NoneType"),
    "weight: another dtype": ({"weight": W.half()}, TypeError, "hidden.*Float.*weight.*Half"),
    "targets: too few": ({"targets": T[:1]}, ValueError, r"targets.*\[1, 3\].*\[2, 3\] is expected"),
    "targets: floats": ({"targets": T.float()}, TypeError, "targets.*float32.*int64, int32"),
    "targets: beyond": ({"targets": T + 2}, ValueError, r"targets\[1, 0\] is 5; accepted: 0 to 4"),
    "old_logp: shape": ({"old_logp": A}, ValueError, r"old_logp has shape \[2\]; targets has shape \[2, 3\]"),
    "old_logp: a list": ({"old_logp": [0.0]}, TypeError, "old_logp is a list"),
    "old_logp: meta": ({"old_logp": Z.to("meta")}, ValueError, "old_logp is on meta but .* is on cpu"),
    "advantages: None": ({"advantages": None}, TypeError, "advantages is a NoneType"),
    "advantages: shape": ({"advantages": torch.zeros(3)}, ValueError, r"advantages has shape \[3\]; expected \[2\]"),
    "advantages: of tokens": ({"advantages": Z, "kind": "gspo"}, ValueError, "'gspo' has one per sequence.*gspo_token"),
    "mask: shape": ({"mask": torch.ones(2, 2).bool()}, ValueError, r"mask.*\[2, 2\].*\[2, 3\]"),
    "mask: dtype": ({"mask": torch.ones(2, 3)}, TypeError, "mask.*float32.*bool"),
    "mask: a list": ({"mask": [True]}, TypeError, "mask is a list"),
    "mask: meta": ({"mask": torch.ones(2, 3, device="meta").bool()}, ValueError, "mask is on meta.*targets"),
    "cu_seqlens: dtype": ({**PACKED, "cu_seqlens": CU.long()}, ValueError, "cu_seqlens.*int64.*int32"),
    "cu_seqlens: short": ({**PACKED, "cu_seqlens": torch.tensor([0, 1, 2]).int()}, ValueError, r"\[0, 1, 2\].*3 tokens"),
    "cu_seqlens: falling": ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 3]).int()}, ValueError, "must ascend"),
    "cu_seqlens: advantages": ({**PACKED, "advantages": torch.zeros(4)}, ValueError, r"advantages has shape \[4\].*\[2\]"),
    "bias: shape": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[4\].*\[5\]"),
    "bias: a list": ({"bias": [0.0]}, TypeError, "bias is a list"),
    "temperature: zero": ({"temperature": 0.0}, ValueError, "temperature is 0.*positive"),
    "temperature: shape": ({"temperature": torch.ones(4)}, ValueError, r"temperature has shape \[4\]"),
    "softcap: negative": ({"softcap": -1.0}, ValueError, "softcap is -1.*positive"),
    "logit_scale: None": ({"logit_scale": None}, TypeError, "logit_scale is None"),
    "ignore_index: a float": ({"ignore_index": 0.5}, TypeError, "ignore_index is 0.5"),
    "entropy_coef: NaN": ({"entropy_coef": NAN}, ValueError, "entropy_coef is nan.*finite"),
    "entropy_coef: a tensor": ({"entropy_coef": torch.ones(())}, TypeError, "entropy_coef is tensor"),
    "entropy_agg: unknown": ({"entropy_agg": "mean"}, ValueError, "entropy_agg is 'mean'; accepted: 'token-mean'"),
    "entropy_agg: scaled": ({"entropy_agg": "trl-dr_grpo"}, ValueError, "entropy_agg is 'trl-dr_grpo', which needs a scale"),
    "chunk_bytes: zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0.*positive"),
    "kind: unknown": ({"kind": "ppo"}, ValueError, "kind is 'ppo'; accepted: 'clip'"),
    "agg: unknown": ({"agg": "mean"}, ValueError, "agg is 'mean'; accepted"),
    "option: unknown": ({"eps_hi": 0.1}, TypeError, "'eps_hi'.*did you mean 'eps_high'"),
    "option: entropy": ({"entropy": Z}, TypeError, "'entropy' is not an argument here; it comes from the head"),
    "token_weight: shape": ({"token_weight": torch.zeros(3)}, ValueError, r"token_weight has shape \[3\]; expected \[2\]"),
    "eps_low: negative": ({"eps_low": torch.tensor([0.1, -0.5])}, ValueError, r"eps_low\[1\] is -0\.5"),
    "dual_clip: of another kind": ({"dual_clip": 3.0, "kind": "sapo"}, ValueError, "dual_clip is 3 but kind is 'sapo'"),
    "beta without a reference": ({"beta": 0.1}, ValueError, "beta is 0.1 but ref_logp is None"),
    "ref_logp: shape": ({"ref_logp": A}, ValueError, r"ref_logp has shape \[2\]; targets has shape \[2, 3\]"),
    "scale: missing": ({"agg": "trl-dr_grpo"}, ValueError, "scale is None; trl-dr_grpo"),
    "norm: negative": ({"norm": torch.tensor(-1.0)}, ValueError, "norm is -1"),
    "anchor: shape": ({"anchor": Z.bool()}, ValueError, r"anchor has shape \[2, 3\]; expected \[2\]"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(name, grad):
    changes, error, message = BAD[name]
    arguments = {"hidden": H, "weight": W, "targets": T, "old_logp": Z, "advantages": A, **changes}
    for key in ("hidden", "weight"):
        if grad and isinstance(arguments[key], torch.Tensor) and arguments[key].is_floating_point():
            arguments[key] = leaf(arguments[key])
    with pytest.raises(error, match=message) as caught:
        linear_policy_loss(**arguments)
    assert caught.type is error


@pytest.mark.parametrize("name", ["hidden", "old_logp", "ref_logp"])
def test_a_nan_log_prob_is_an_error_under_validation(validation, name):
    hidden, weight, tokens = make()
    tokens["targets"][2, 1] = 3
    {"hidden": hidden, **tokens}[name][2, 1] = NAN
    validation(True)
    with pytest.raises(ValueError, match=rf"{'logp' if name == 'hidden' else name}\[2, 1\] is nan"):
        linear_policy_loss(leaf(hidden), weight, **tokens)
