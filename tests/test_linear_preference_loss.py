"""linear_preference_loss against linear_logprobs, sequence_sum and preference_loss, which it fuses: values, gradients, passes
over the head, memory, bits, and everything it must refuse."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from linear_losses import BF16, DTYPES, F16, F32, F64, HEADS, TOLERANCE, Passes, assert_same, distance, leaf, names, run
from prefkern import linear_logprobs, linear_preference_loss, preference_loss, sequence_sum
from prefkern.ops import _linear_layout, _single_pass
from prefkern.ops.preference import KINDS

OPS = torch.ops.prefkern
NAN = math.nan
PAIRS, LENGTH, WIDTH, VOCAB = 5, 7, 16, 67


def two_steps(
    hidden, weight, targets, *, mask=None, cu_seqlens=None, ref_logp=None, sft_weight=0.0, pair_weight=None, pair_mask=None,
    average=None, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100, chunk_bytes=None, **options,
):  # fmt: skip
    """What linear_preference_loss fuses."""
    if mask is not None:
        targets = torch.where(mask, targets, ignore_index)
    logp = linear_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        ignore_index=ignore_index, chunk_bytes=chunk_bytes,
    ).logp  # fmt: skip
    counts = targets != ignore_index
    layout = {"mask": counts, "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(hidden.device)}
    ratios = sequence_sum(logp, minus=ref_logp, **layout).chunk(2)
    lengths = sequence_sum(torch.ones_like(logp.detach()), **layout).chunk(2)
    if average:
        options.update(average=average, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    out = preference_loss(*ratios, weight=pair_weight, mask=pair_mask, **options)
    if not sft_weight:
        return out
    chosen = sequence_sum(logp, **layout).chunk(2)[0]
    kept = torch.ones_like(chosen, dtype=torch.bool) if pair_mask is None else pair_mask
    nll = -chosen[kept].sum() / lengths[0][kept].sum()
    return prefkern.LossOutput(out.loss + sft_weight * nll, {**out.metrics, "nll": nll.detach()})


def make(device="cpu", dtype=F32, layout="padded", pairs=PAIRS, length=LENGTH, width=WIDTH, vocab=VOCAB):
    """hidden, weight and a dict of targets, ref_logp and, packed, cu_seqlens. Ragged lengths; prompt tokens and padding do not
    count; one response of a single token."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    lengths = torch.randint(2, length + 1, (2 * pairs,))
    lengths[1 % (2 * pairs)] = 2
    counts = torch.arange(length) < lengths[:, None]
    counts[:, 0] = False  # the prompt
    targets = torch.where(counts, torch.randint(0, vocab, counts.shape), -100)
    hidden = torch.randn(2 * pairs, length, width)
    ref_logp = -5 * torch.rand(2 * pairs, length)
    tokens = {"targets": targets, "ref_logp": ref_logp}
    if layout == "packed":
        inside = torch.arange(length) < lengths[:, None]
        hidden, tokens = hidden[inside], {name: t[inside] for name, t in tokens.items()}
        tokens["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    weight = torch.randn(vocab, width) * 2 / width**0.5
    tokens["ref_logp"] = tokens["ref_logp"].to(F64 if dtype == F64 else F32)
    tokens = {name: t.to(device) for name, t in tokens.items()}
    return hidden.to(device, dtype), weight.to(device, dtype), tokens


def compare(hidden, weight, bias=None, upstream=1.0, two=None, **arguments):
    ours = run(linear_preference_loss, hidden, weight, bias, upstream, **arguments)
    assert_same(ours, run(two_steps, hidden, weight, bias, upstream, **{**arguments, **(two or {})}), hidden.dtype)
    return ours


# ------------------------------------------------------------------------------------------------------------- equality

KIND_OPTIONS = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "sigmoid": {"label_smoothing": 0.1, "offset": 0.3},
    "rao_kupper": {"nu": 2.0},
    "davidson": {"nu": 2.0},
    "squared_targets": {"chosen_target": 1.0, "rejected_target": -1.0},
    "asft": {"score": "log_odds"},
}
CHUNKS = {"default": None, "one row": 1, "some pairs": 9000}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_kind(device, kind, layout, chunk):
    hidden, weight, tokens = make(device, layout=layout)
    if kind == "asft":  # its score knows no reference
        tokens.pop("ref_logp")
    compare(hidden, weight, kind=kind, chunk_bytes=CHUNKS[chunk], **KIND_OPTIONS.get(kind, {}), **tokens)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "discopop"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_to_float64_rounding(layout, kind, chunk):
    hidden, weight, tokens = make("cpu", F64, layout)
    compare(hidden, weight, torch.randn(VOCAB, dtype=F64), kind=kind, chunk_bytes=CHUNKS[chunk], sft_weight=0.5, **tokens)


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
    compare(hidden, weight, bias, chunk_bytes=CHUNKS[chunk], **options, **tokens)


PAIR_OPTIONS = {
    "average logp": {"average": "logp", "beta": 2.0},
    "average score": {"average": "score", "beta": 2.0, "offset": 0.5},
    "orpo": {"average": "logp", "score": "log_odds", "beta": 1.0, "sft_weight": 1.0},
    "simpo with cpo": {"average": "logp", "beta": 2.5, "offset": 1.0, "sft_weight": 0.5},
    "rpo": {"sft_weight": 0.2},
    "rejected_beta": {"rejected_beta": 0.3},
    "forward_kl": {"score": "forward_kl", "beta": 0.1, "average": "logp"},
    "sum": {"reduction": "sum"},
    "norm": {"norm": 7.0},
    "clip": {"clip": 0.5},
}
EACH = {
    "offset": {"offset": torch.tensor([0.0, 0.5, -1.0, 2.0, 0.1])},
    "label_smoothing": {"label_smoothing": torch.tensor([0.0, 0.5, 0.2, 1.0, 0.1])},
    "scale": {"scale": torch.tensor([1.0, 0.5, 2.0, 3.0, 0.1])},
    "one scale": {"scale": torch.tensor(0.7)},
    "norm": {"norm": torch.tensor([3.0])},
    "pair_weight": {"pair_weight": torch.tensor([0.0, 0.5, 2.0, 3.0, 0.1])},
    "weighted_mean": {"pair_weight": torch.tensor([0.0, 0.5, 2.0, 3.0, 0.1]), "reduction": "weighted_mean"},
    "tie": {"kind": "davidson", "nu": 1.5, "tie": torch.tensor([True, False, True, False, False])},
    "pair_mask": {"pair_mask": torch.tensor([True, False, True, False, True]), "sft_weight": 0.3},
    "targets": {
        "kind": "squared_targets",
        "chosen_target": torch.tensor([0.0, 0.5, 2.0, 3.0, 0.1]),
        "rejected_target": torch.tensor(-0.5),
    },
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", [*PAIR_OPTIONS, *(f"each {name}" for name in EACH)])
def test_every_option_of_the_pair_loss(device, layout, chunk, name):
    hidden, weight, tokens = make(device, layout=layout)
    options = EACH[name.removeprefix("each ")] if name.startswith("each ") else PAIR_OPTIONS[name]
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    if options.get("score") == "log_odds":
        tokens.pop("ref_logp")
    compare(hidden, weight, chunk_bytes=CHUNKS[chunk], **options, **tokens)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_reference_of_sums(device, layout, chunk):
    hidden, weight, tokens = make(device, layout=layout)
    tokens.pop("ref_logp")
    sums = {
        "ref_chosen_logp": -20 * torch.rand(PAIRS, device=device),
        "ref_rejected_logp": -20 * torch.rand(PAIRS, device=device),
    }
    compare(hidden, weight, chunk_bytes=CHUNKS[chunk], average="score", sft_weight=0.1, **sums, **tokens)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_mask_is_ignore_index_by_another_name(device, layout):
    hidden, weight, tokens = make(device, layout=layout)
    counts = tokens["targets"] != -100
    expected, e_grads = run(linear_preference_loss, hidden, weight, **tokens)
    tokens["targets"] = torch.where(counts, tokens["targets"], 10**9)  # never looked at
    out, grads = run(linear_preference_loss, hidden, weight, mask=counts, **tokens)
    assert torch.equal(out.loss, expected.loss)
    assert all(torch.equal(a, e) for a, e in zip(grads, e_grads, strict=True))


def test_int32_targets_and_another_ignore_index(device):
    hidden, weight, tokens = make(device)
    expected = linear_preference_loss(hidden, weight, **tokens)
    targets = torch.where(tokens["targets"] == -100, -1, tokens["targets"]).int()
    out = linear_preference_loss(hidden, weight, targets, ref_logp=tokens["ref_logp"], ignore_index=-1)
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("upstream", [1.0, -3.0, 0.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_upstream_gradient(device, upstream, dtype):
    hidden, weight, tokens = make(device, dtype)
    one, one_grads = run(linear_preference_loss, hidden, weight, **tokens)
    _, grads = run(linear_preference_loss, hidden, weight, upstream=upstream, **tokens)
    for a, e in zip(grads, one_grads, strict=True):
        assert_close(a.double(), upstream * e.double(), rtol=2 * TOLERANCE[dtype], atol=1e-7)
    assert one.loss.dtype == (F64 if dtype == F64 else F32)


def test_float16_gradients_survive_until_the_loss_is_scaled(device):
    """Of a mean over many pairs, times a loss scale: nothing has underflowed on the way."""
    hidden, weight, tokens = make(device, F16, pairs=64, vocab=1000)
    wide = [t.float() for t in (hidden, weight)]
    _, expected = run(linear_preference_loss, *wide, upstream=2.0**12, beta=1e-3, **tokens)
    _, grads = run(linear_preference_loss, hidden, weight, upstream=2.0**12, beta=1e-3, **tokens)
    for a, e in zip(grads, expected, strict=True):
        assert a.dtype == F16
        assert distance(a, e) < 3e-3


@pytest.mark.parametrize("dtype", [BF16, F16], ids=names)
def test_low_precision_is_no_worse_than_two_steps(device, dtype):
    hidden, weight, tokens = make(device, dtype, pairs=8, length=40)
    tokens["ref_logp"] = tokens["ref_logp"].double()
    wide = [t.cpu().double() for t in (hidden, weight)]
    exact, e_grads = run(two_steps, *wide, **{name: t.cpu() for name, t in tokens.items()})
    tokens["ref_logp"] = tokens["ref_logp"].float()
    _, two_grads = run(two_steps, hidden, weight, **tokens)
    for chunk_bytes in (None, 1):
        out, grads = run(linear_preference_loss, hidden, weight, chunk_bytes=chunk_bytes, **tokens)
        assert abs(out.loss.item() - exact.loss.item()) < 1e-5
        for a, t, e in zip(grads, two_grads, e_grads, strict=True):
            assert distance(a, e) < 1.2 * distance(t, e)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gradcheck(layout):
    hidden, weight, tokens = make("cpu", F64, layout, pairs=2, length=3, width=3, vocab=5)
    leaves = [leaf(hidden), leaf(weight), leaf(torch.randn(5, dtype=F64))]

    def function(hidden, weight, bias):
        return linear_preference_loss(hidden, weight, bias=bias, softcap=3.0, sft_weight=0.3, chunk_bytes=1, **tokens).loss

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_does_not_count_is_never_looked_at(device, layout, chunk):
    """NaN in hidden states and the reference, at tokens and in pairs that do not count."""
    hidden, weight, tokens = make(device, layout=layout)
    keep = torch.tensor([True, False, True, True, False], device=device)
    options = {"pair_mask": keep, "sft_weight": 0.2, "chunk_bytes": CHUNKS[chunk]}
    expected, e_grads = run(linear_preference_loss, hidden, weight, **options, **tokens)
    both = torch.cat([keep, keep])
    if layout == "packed":
        both = both.repeat_interleave(tokens["cu_seqlens"].diff())
    counts = (tokens["targets"] != -100) & (both if layout == "packed" else both[:, None])
    hidden = torch.where(counts.unsqueeze(-1), hidden, NAN)
    tokens["ref_logp"] = torch.where(counts, tokens["ref_logp"], NAN)
    out, grads = run(linear_preference_loss, hidden, weight, **options, **tokens)
    assert torch.equal(out.loss, expected.loss)
    assert all(torch.equal(a, e) for a, e in zip(grads, e_grads, strict=True))
    assert grads[0][~counts].eq(0).all()
    assert grads[0][counts].ne(0).any(-1).all()


def test_nan_that_counts_shows(device):
    hidden, weight, tokens = make(device)
    hidden[0, 1] = NAN
    assert linear_preference_loss(hidden, weight, **tokens).loss.isnan()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_response_without_tokens(device, layout):
    """Its log-prob is 0; where a mean over its tokens is asked for, it is an error."""
    hidden, weight, tokens = make(device, layout=layout)
    begin = 0 if layout == "padded" else int(tokens["cu_seqlens"][2])
    where = 2 if layout == "padded" else slice(begin, int(tokens["cu_seqlens"][3]))
    tokens["targets"][where] = -100
    compare(hidden, weight, sft_weight=0.1, **tokens)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"chosen_lengths\[2\] is 0; a response needs at least one token"):
            linear_preference_loss(hidden, weight, average="logp", **tokens)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", ["no pairs", "nothing counts"])
def test_nothing_to_do(device, layout, case):
    hidden, weight, tokens = make(device, layout=layout)
    if case == "nothing counts":
        tokens["targets"][:] = -100
    else:
        hidden, tokens = hidden[:0], {name: t[: name == "cu_seqlens"] for name, t in tokens.items()}
    out, grads = run(linear_preference_loss, hidden, weight, torch.zeros(VOCAB, device=device), sft_weight=0.5, **tokens)
    assert out.metrics["nll"] == 0
    assert out.metrics["pairs"] == (PAIRS if case == "nothing counts" else 0)
    assert out.loss.isfinite()
    assert [g.shape for g in grads] == [hidden.shape, weight.shape, (VOCAB,)]
    assert all(g.eq(0).all() for g in grads)


def test_strided_inputs(device):
    hidden, weight, tokens = make(device)
    expected, e_grads = run(linear_preference_loss, hidden, weight, **tokens)
    wide = torch.stack([hidden, torch.full_like(hidden, NAN)], 2)[:, :, 0]
    turned = weight.mT.contiguous().mT
    targets = tokens.pop("targets").mT.contiguous().mT
    leaves = wide.requires_grad_(), turned.requires_grad_()
    out = linear_preference_loss(*leaves, targets, **tokens)
    assert_close(out.loss, expected.loss)
    for a, e in zip(torch.autograd.grad(out.loss, leaves), e_grads, strict=True):
        assert_close(a, e, rtol=1e-5, atol=1e-7)


def test_autocast(device):
    hidden, weight, tokens = make(device)
    with torch.autocast(device, dtype=BF16):
        out, grads = run(linear_preference_loss, hidden, weight, **tokens)
    low, low_grads = run(linear_preference_loss, hidden.bfloat16(), weight.bfloat16(), **tokens)
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
def test_passes_over_the_head(device, passes, monkeypatch, trained, chunk):
    """Logits once, and a GEMM for each gradient that is needed. On the CPU, of rows that count only. Pairs that do not fit are
    cut, and their logits computed again."""
    hidden, weight, tokens = make(device)
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    out = linear_preference_loss(hidden, weight, chunk_bytes=CHUNKS[chunk], **tokens)
    out.loss.backward()
    rows = int((tokens["targets"] != -100).sum()) if device == "cpu" else tokens["targets"].numel()
    again = rows - PAIRS if chunk == "one row" else 0  # all but the last of each pair
    assert passes.logits == rows + again
    assert passes.hidden == (rows if trained != "weight" else 0)
    assert passes.weight == (rows if trained != "hidden" else 0)
    assert len(passes.chunks) == {"default": 1, "one row": rows + again, "some pairs": len(passes.chunks)}[chunk]
    if chunk == "some pairs":
        assert 1 < len(passes.chunks) <= PAIRS - (device == "cpu")
    _, expected = run(linear_preference_loss, hidden, weight, **tokens)
    for t, e in zip((hidden, weight), expected, strict=True):
        assert (t.grad is None) if not t.requires_grad else distance(t.grad, e) < 1e-6


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=names)
def test_chunks_with_the_rows_that_do_not_count(monkeypatch, layout, chunk, dtype):
    """As on CUDA, where nobody waits for how many there are."""
    hidden, weight, tokens = make("cpu", dtype, layout)
    layout = _linear_layout.Layout
    monkeypatch.setattr(layout, "compact_chunks", layout.full_chunks)
    keep = torch.tensor([True, False, True, True, True])
    compare(hidden, weight, torch.randn(VOCAB), chunk_bytes=CHUNKS[chunk], sft_weight=0.3, pair_mask=keep, **tokens)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=names)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_without_knowing_where_pairs_end(monkeypatch, passes, layout, dtype, chunk):
    """As with cu_seqlens on CUDA: a batch that does not fit has its logits computed twice."""
    hidden, weight, tokens = make("cpu", dtype, layout)
    monkeypatch.setattr(_linear_layout.Layout, "compact_chunks", lambda self, limit: [self.whole()])
    options = {"sft_weight": 0.3, "average": "score", "chunk_bytes": CHUNKS[chunk]}
    compare(hidden, weight, torch.randn(VOCAB), **options, **tokens)
    rows = tokens["targets"].numel()
    assert passes.logits == (rows if chunk == "default" else 2 * rows - max(passes.chunks))  # the last piece's are still there


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_cu_seqlens_on_either_device(device, place, chunk):
    hidden, weight, tokens = make(device, layout="packed")
    tokens["cu_seqlens"] = tokens["cu_seqlens"].to(place)
    compare(hidden, weight, chunk_bytes=CHUNKS[chunk], **tokens)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_no_pass_for_it(device, passes, mode):
    hidden, weight, tokens = make(device)
    expected, _ = run(linear_preference_loss, hidden, weight, sft_weight=0.2, **tokens)
    before = passes.logits
    with mode():
        out = linear_preference_loss(hidden.requires_grad_(), weight, sft_weight=0.2, **tokens)
    assert passes.logits == before  # blocks of linear_logprobs, none of which is kept
    assert out.loss.grad_fn is None
    assert_close(out.loss, expected.loss)
    assert out.metrics.keys() == expected.metrics.keys()


@pytest.mark.parametrize(
    ("sizes", "limit", "runs"),
    [
        ([], 10, []),
        ([0, 0], 10, []),
        ([3, 3, 3], 9, [(0, 3)]),
        ([3, 3, 3], 8, [(0, 2), (2, 3)]),
        ([3, 3, 3], 1, [(0, 1), (1, 2), (2, 3)]),
        ([50, 1, 1], 10, [(0, 1), (1, 3)]),
        ([1, 50, 1], 10, [(0, 1), (1, 2), (2, 3)]),
        ([4, 4, 4, 4, 4, 4], 20, [(0, 3), (3, 6)]),  # even shares rather than 5 and 1
        ([0, 5, 0, 5, 0], 5, [(0, 3), (3, 5)]),
    ],
)
def test_share_out(sizes, limit, runs):
    assert _single_pass.share_out(sizes, limit) == runs


def test_share_out_covers_everything_within_the_limit():
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        sizes = torch.randint(0, 30, (int(torch.randint(1, 40, (1,), generator=generator)),), generator=generator).tolist()
        limit = int(torch.randint(1, 120, (1,), generator=generator))
        runs = _single_pass.share_out(sizes, limit)
        held = [sum(sizes[begin:end]) for begin, end in runs]
        assert sum(held) == sum(sizes)
        assert [begin for begin, _ in runs[1:]] == [end for _, end in runs[:-1]]
        for (begin, end), rows in zip(runs, held, strict=True):
            assert 0 < rows <= limit or max(sizes[begin:end]) == rows


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 11, 12, 100])
def test_pieces_of_rows(most):
    rows = [_single_pass.rows_of((2, 9), (20, 21), (30, 34)), _single_pass.rows_at(torch.tensor([1, 3, 4, 8, 9, 15, 30]))]
    numbers = torch.arange(40)
    for whole in rows:
        pieces = whole.pieces(most)
        assert torch.equal(torch.cat([piece.take(numbers) for piece in pieces]), whole.take(numbers))
        sizes = [piece.total for piece in pieces]
        assert sizes == [len(piece.take(numbers)) for piece in pieces]
        assert len(sizes) == -(-whole.total // most)
        assert max(sizes) - min(sizes) <= 1


def test_by_default_a_pair_may_take_four_times_the_budget(monkeypatch, passes):
    """Before its logits are computed twice."""
    hidden, weight, tokens = make(pairs=1, length=17)
    rows = int((tokens["targets"] != -100).sum())
    half = rows // 2
    monkeypatch.setattr(_single_pass, "_fit_into_gradient", lambda *args: False)
    for fits, logits in ((rows, rows), (-(-rows // 4), rows), ((rows - 1) // 4, rows + half)):
        monkeypatch.setattr(_single_pass, "_planned_rows", lambda *args, fits=fits: fits)
        before = passes.logits
        compare(hidden, weight, **tokens)
        assert passes.logits - before == logits
    before = passes.logits
    monkeypatch.setattr(_single_pass, "_planned_rows", lambda *args: -(-rows // 2))
    compare(hidden, weight, chunk_bytes=1, **tokens)
    assert passes.logits - before == rows + half


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory(device, allocations, dtype, long, frozen):
    """Beside results: one chunk's logits and operands, and the float32 sums of a weight gradient that has another dtype. Of
    pairs too that do not fit."""
    pairs, length, vocab, width, budget = 2 if long else 16, 256 if long else 32, 4000, 16, 1 << 21
    hidden, weight, tokens = make(device, dtype, pairs=pairs, length=length, vocab=vocab, width=width)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)

    def call():
        linear_preference_loss(hidden, weight, chunk_bytes=budget, **tokens).loss.backward()

    call()
    hidden.grad = weight.grad = None
    used = allocations(call)
    results = hidden.nbytes + (0 if frozen else weight.nbytes + (vocab * width * 4 if dtype == BF16 else 0))
    small = 2 * vocab * width * 4 * (dtype == BF16)  # widened blocks of the weight
    assert used.peak <= budget + results + small + (64 << 10)
    rows = int((tokens["targets"] != -100).sum()) if device == "cpu" else tokens["targets"].numel()
    assert budget < rows * vocab * 4 / 1.5


def test_equal_calls_give_equal_bits(device):
    hidden, weight, tokens = make(device, pairs=9)
    runs = [run(linear_preference_loss, hidden, weight, chunk_bytes=20000, sft_weight=0.1, **tokens) for _ in range(3)]
    for out, grads in runs[1:]:
        assert torch.equal(out.loss, runs[0][0].loss)
        assert all(torch.equal(a, e) for a, e in zip(grads, runs[0][1], strict=True))


def test_threads(threads):
    hidden, weight, tokens = make("cpu", pairs=8, length=32, vocab=2000)
    runs = []
    for n in (1, 2, 2):
        threads(n)
        runs.append(run(linear_preference_loss, hidden, weight, **tokens))
    assert all(torch.equal(a, b) for a, b in zip(runs[1][1], runs[2][1], strict=True))
    assert_same(runs[1], runs[0], F32)


def test_loss_and_metrics_are_those_of_the_sums(device):
    """Bit for bit, however the batch is cut: they are computed from all sums at once."""
    hidden, weight, tokens = make(device)
    cut = linear_preference_loss(leaf(hidden), weight, chunk_bytes=1, **tokens)
    whole = two_steps(hidden, weight, **tokens)
    assert_close(cut.loss.detach(), whole.loss, rtol=1e-6, atol=0)
    assert torch.equal(cut.metrics["accuracy"], whole.metrics["accuracy"])
    assert torch.equal(cut.metrics["pairs"], whole.metrics["pairs"])


# --------------------------------------------------------------------------------------------------------------- autograd


def test_gradients_go_to_the_first_backward(device):
    hidden, weight, tokens = make(device)
    hidden.requires_grad_()
    loss = linear_preference_loss(hidden, weight, **tokens).loss
    first, second = (torch.autograd.grad(loss * s, hidden, retain_graph=True)[0] for s in (1, 2))
    assert torch.equal(2 * first, second)
    torch.autograd.grad(loss, hidden)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, hidden)
    assert torch.equal(2 * first, second)


def test_a_gradient_is_no_copy(device):
    """The .grad of a leaf is the tensor that the forward wrote."""
    hidden, weight, tokens = make(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_preference_loss(hidden, weight, **tokens).loss
    where = loss.grad_fn.stored.gradients[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == where


@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_differentiating_twice_is_an_error(device, beside):
    hidden, weight, tokens = make(device)
    hidden.requires_grad_()
    loss = linear_preference_loss(hidden, weight, **tokens).loss + beside * hidden.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_the_op_itself_cannot_be_differentiated_twice(monkeypatch):
    hidden, weight, tokens = make()
    hidden.requires_grad_()
    args = arguments_of_the_op(monkeypatch, hidden, weight, **tokens)
    (gradient,) = torch.autograd.grad(OPS.linear_preference_loss(*args)[0], args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_metrics_have_no_gradient(device):
    hidden, weight, tokens = make(device)
    out = linear_preference_loss(leaf(hidden), weight, sft_weight=0.1, **tokens)
    assert out.loss.requires_grad
    assert all(not value.requires_grad and value.shape == () for value in out.metrics.values())


def arguments_of_the_op(monkeypatch, *args, **kwargs):
    seen = []
    monkeypatch.setattr("prefkern.ops.linear_preference._loss", lambda *a: seen.append(a) or OPS.linear_preference_loss(*a))
    linear_preference_loss(*args, **kwargs)
    return seen[0]


@pytest.mark.parametrize("dtype", [F32, F16], ids=names)
@pytest.mark.parametrize("needs", ["none", "hidden", "all"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_op_is_a_good_citizen(monkeypatch, dtype, needs, layout):
    hidden, weight, tokens = make("cpu", dtype, layout)
    hidden.requires_grad_(needs != "none")
    weight.requires_grad_(needs == "all")
    args = arguments_of_the_op(monkeypatch, hidden, weight, chunk_bytes=8000, sft_weight=0.1, **tokens)
    opcheck(OPS.linear_preference_loss.default, args)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiles_into_one_graph(device, layout):
    hidden, weight, tokens = make(device, layout=layout)
    counter = CompileCounterWithBackend("aot_eager")

    def function(hidden, weight, **tokens):
        return linear_preference_loss(hidden * 1.0, weight, average="logp", beta=2.0, sft_weight=0.1, **tokens).loss * 3

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for pairs in (3, 4, 6):
        hidden, weight, tokens = make(device, layout=layout, pairs=pairs)
        leaves = [leaf(hidden), leaf(weight)], [leaf(hidden), leaf(weight)]
        losses = [f(*own, **tokens) for f, own in zip((function, compiled), leaves, strict=True)]
        assert_close(losses[0], losses[1])
        grads = [torch.autograd.grad(loss, own) for loss, own in zip(losses, leaves, strict=True)]
        for a, e in zip(*grads, strict=True):
            assert_close(a, e, rtol=1e-5, atol=1e-7)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]  # nothing is compiled again for another number of pairs


def test_shapes_on_meta():
    hidden, weight, tokens = make()
    hidden, weight = hidden.to("meta").requires_grad_(), weight.to("meta").requires_grad_()
    out = linear_preference_loss(hidden, weight, **{name: t.to("meta") for name, t in tokens.items()})
    assert out.loss.shape == ()
    assert out.loss.device.type == "meta"


# ---------------------------------------------------------------------------------------------------------- linear_chunk_


def chunk_arguments(dtype=F32, rows=5):
    hidden, weight = torch.randn(rows, 4).to(dtype), torch.randn(9, 4).to(dtype)
    targets = torch.arange(rows)
    targets[1] = -100
    workspace = torch.zeros(rows * 9, dtype=F64 if dtype == F64 else F32)
    return hidden, weight, targets, workspace


OPTIONS = (1.0, 0.0, 1.0, -100)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("narrow", [False, True])
def test_a_chunk_is_linear_logprobs_and_its_backward(dtype, narrow):
    """With gradients from entropy and lse too, and the weight's gradient in its own type or added up in float32."""
    hidden, weight, targets, workspace = chunk_arguments(dtype)
    bias = torch.randn(9)
    upstream = [torch.randn(5, dtype=workspace.dtype) for _ in range(3)]
    leaves = [leaf(hidden), leaf(weight), leaf(bias)]
    out = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], softcap=3.0, outputs=("entropy", "lse"))
    expected = torch.autograd.grad([out.logp, out.entropy, out.lse], leaves, upstream)
    options = (1.0, 3.0, 1.0, -100)
    logp, entropy, lse, *_, stats = OPS.linear_chunk_(hidden, weight, targets, bias, None, workspace, *options, 32 | 1 | 2)
    for a, e in zip((logp, entropy, lse), out[:3], strict=True):
        assert_close(a, e.detach(), rtol=1e-6, atol=1e-6)
    acc = workspace.dtype
    d_hidden, d_bias = torch.empty(5, 4, dtype=acc), torch.ones(9, dtype=acc)
    d_weight = torch.empty(9, 4, dtype=dtype) if narrow else torch.ones(9, 4, dtype=acc)
    OPS.linear_chunk_backward_(
        *upstream,
        hidden,
        weight,
        targets,
        bias,
        None,
        entropy,
        stats,
        workspace,
        d_hidden,
        d_weight,
        d_bias,
        *options,
        not narrow,
    )
    before = 0.0 if narrow else 1.0
    for a, e in zip((d_hidden, d_weight.double() - before, d_bias - before), expected, strict=True):
        assert distance(a, e) < {F64: 1e-6, F32: 1e-6, BF16: 5e-3, F16: 1e-3}[dtype]


def test_chunk_ops_are_good_citizens():
    hidden, weight, targets, workspace = chunk_arguments()
    opcheck(OPS.linear_chunk_.default, (hidden, weight, targets, None, None, workspace, *OPTIONS, 32))
    logp, entropy, *_, stats = OPS.linear_chunk_(hidden, weight, targets, None, None, workspace, *OPTIONS, 32)
    grads = torch.empty(5, 4), torch.empty(9, 4), None
    args = (logp, None, None, hidden, weight, targets, None, None, entropy, stats, workspace, *grads, *OPTIONS, False)
    opcheck(OPS.linear_chunk_backward_.default, args)


CHUNK_BAD = {
    "workspace too small": ({"workspace": torch.zeros(44)}, r"workspace.*\[44\].*N \* V = 45"),
    "workspace of another dtype": ({"workspace": torch.zeros(45, dtype=F64)}, "workspace.*Double.*Float"),
    "d_hidden shape": ({"d_hidden": torch.zeros(4, 4)}, r"d_hidden.*\[4, 4\].*\[N, H\]"),
    "d_weight shape": ({"d_weight": torch.zeros(4, 9)}, r"d_weight.*\[4, 9\].*\[V, H\]"),
    "d_weight strides": ({"d_weight": torch.zeros(4, 9).mT}, "d_weight.*contiguous"),
    "d_bias shape": ({"d_bias": torch.zeros(4)}, r"d_bias.*\[4\].*\[V\]"),
    "d_hidden dtype": ({"d_hidden": torch.zeros(5, 4, dtype=BF16)}, "d_hidden.*BFloat16.*Float"),
}


@pytest.mark.parametrize("name", CHUNK_BAD)
def test_bad_input_of_a_chunk(name):
    changes, message = CHUNK_BAD[name]
    hidden, weight, targets, workspace = chunk_arguments()
    _, entropy, *_, stats = OPS.linear_chunk_(hidden, weight, targets, None, None, workspace, *OPTIONS, 32)
    into = {"workspace": workspace, "d_hidden": None, "d_weight": None, "d_bias": None, **changes}
    with pytest.raises(RuntimeError, match=message):
        OPS.linear_chunk_backward_(
            torch.ones(5), None, None, hidden, weight, targets, None, None, entropy, stats, *into.values(), *OPTIONS, False
        )


def test_plan():
    plan = prefkern._C.plan_kept(10_000, 64, 1000, prefkern._C.DType.float32, False, True, 1 << 20)
    assert plan.row_chunk == (1 << 20) // (4000 + 512)
    assert plan.workspace_bytes <= 1 << 20
    assert prefkern._C.plan_kept(10_000, 64, 1000, prefkern._C.DType.float32, False, True, 1).row_chunk == 1
    assert prefkern._C.plan_kept(7, 64, 1000, prefkern._C.DType.float32, True, True, 0).row_chunk == 7
    assert prefkern._C.plan_kept(7, 64, 1000, prefkern._C.DType.float32, True, True, 0).vocab_block == 1000


def test_plan_of_a_frozen_head():
    """Logits that stay in a cache, but rows enough for a GEMM."""

    def rows(vocab, **options):
        return prefkern._C.plan_kept(10_000, 64, vocab, prefkern._C.DType.float32, False, True, 0, **options).row_chunk

    assert (
        rows(32_000, weight_grad=False)
        == (24 << 20) // (4 * (32_000 + 2 * 64))
        < rows(32_000)
        == (128 << 20) // (4 * (32_000 + 2 * 64))
    )
    assert rows(151_936, weight_grad=False) == 128 < rows(151_936)


# ------------------------------------------------------------------------------------------------------------- bad input

H, W, T = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.tensor([[0, 1, 2], [3, 4, -100]])
CU = torch.tensor([0, 2, 3]).int()
PACKED = {"hidden": H.reshape(6, 4)[:3], "targets": torch.tensor([0, 1, 2]), "cu_seqlens": CU}
BAD = {
    "hidden: a list": ({"hidden": [1.0]}, TypeError, "hidden is a list"),
    "hidden: flat": ({"hidden": H.reshape(6, 4)}, ValueError, r"hidden.*\[6, 4\].*\[2P, T, H\].*cu_seqlens"),
    "hidden: padded and packed": ({"cu_seqlens": CU}, ValueError, r"hidden.*\[2, 3, 4\].*\[N, H\]"),
    "hidden: odd": ({"hidden": torch.zeros(3, 3, 4), "targets": torch.zeros(3, 3).long()}, ValueError, "3 responses.*even"),
    "hidden: integers": ({"hidden": H.int()}, TypeError, "hidden.*Int.*float32"),
    "hidden: another width": ({"hidden": torch.zeros(2, 3, 5)}, ValueError, "hidden.*5.*weight.*4"),
    "weight: None": ({"weight": None}, TypeError, "weight.*NoneType"),
    "weight: another dtype": ({"weight": W.half()}, TypeError, "hidden.*Float.*weight.*Half"),
    "targets: too few": ({"targets": T[:1]}, ValueError, r"targets.*\[1, 3\].*\[2, 3\] is expected"),
    "targets: floats": ({"targets": T.float()}, TypeError, "targets.*float32.*int64, int32"),
    "targets: beyond": ({"targets": T + 2}, ValueError, r"targets\[1, 0\] is 5; accepted: 0 to 4"),
    "mask: shape": ({"mask": torch.ones(2, 2).bool()}, ValueError, r"mask.*\[2, 2\].*\[2, 3\]"),
    "mask: dtype": ({"mask": torch.ones(2, 3)}, TypeError, "mask.*float32.*bool"),
    "mask: a list": ({"mask": [True]}, TypeError, "mask is a list"),
    "mask: meta": ({"mask": torch.ones(2, 3, device="meta").bool()}, ValueError, "mask is on meta.*targets"),
    "ref_logp: shape": ({"ref_logp": torch.zeros(2)}, ValueError, r"ref_logp.*\[2\].*\[2, 3\]"),
    "ref_logp: twice": (
        {"ref_logp": torch.zeros(2, 3), "ref_chosen_logp": torch.zeros(1)},
        ValueError,
        "ref_logp and ref_chosen_logp.*one kind of reference",
    ),
    "cu_seqlens: dtype": ({**PACKED, "cu_seqlens": CU.long()}, ValueError, "cu_seqlens.*int64.*int32"),
    "cu_seqlens: odd": ({**PACKED, "cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, "1 responses.*even"),
    "cu_seqlens: short": ({**PACKED, "cu_seqlens": torch.tensor([0, 1, 2]).int()}, ValueError, r"\[0, 1, 2\].*3 tokens"),
    "cu_seqlens: falling": ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 3]).int()}, ValueError, "must ascend"),
    "bias: shape": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[4\].*\[5\]"),
    "temperature: zero": ({"temperature": 0.0}, ValueError, "temperature is 0.*positive"),
    "softcap: negative": ({"softcap": -1.0}, ValueError, "softcap is -1.*positive"),
    "logit_scale: None": ({"logit_scale": None}, TypeError, "logit_scale is None"),
    "sft_weight: NaN": ({"sft_weight": NAN}, ValueError, "sft_weight is nan.*finite"),
    "sft_weight: a word": ({"sft_weight": "1"}, TypeError, "sft_weight is '1'"),
    "chunk_bytes: zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0.*positive"),
    "kind: unknown": ({"kind": "sigmoyd"}, ValueError, "kind is 'sigmoyd'.*did you mean 'sigmoid'"),
    "option: unknown": ({"label_smoting": 0.1}, TypeError, "'label_smoting'.*did you mean 'label_smoothing'"),
    "option: weight of pairs": ({"chosen_lengths": torch.ones(1)}, TypeError, "'chosen_lengths'.*comes from the head"),
    "option: a pair's weight": ({"pair_weight": torch.ones(2)}, ValueError, r"pair_weight.*\[2\].*\[1\] is expected"),
    "option: pair_mask": ({"pair_mask": [True]}, TypeError, "pair_mask is a list"),
    "option: pair_mask shape": ({"pair_mask": torch.ones(3).bool()}, ValueError, r"pair_mask.*\[3\].*\[1\]"),
    "option: pair_mask dtype": ({"pair_mask": torch.ones(1)}, TypeError, "pair_mask.*float32.*bool"),
    "reduction: none": ({"reduction": "none"}, ValueError, "reduction is 'none'; accepted: 'mean'"),
    "average without tokens": ({"average": "logp", "targets": T * 0 - 100}, ValueError, r"chosen_lengths\[0\] is 0"),
    "beta: negative": ({"beta": -1.0}, ValueError, "beta is -1.*positive"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input_is_named(name, grad):
    changes, error, message = BAD[name]
    arguments = {"hidden": H, "weight": W, "targets": T, **changes}
    for key in ("hidden", "weight"):
        if grad and isinstance(arguments[key], torch.Tensor) and arguments[key].is_floating_point():
            arguments[key] = leaf(arguments[key])
    with pytest.raises(error, match=message) as caught:
        linear_preference_loss(**arguments)
    assert caught.type is error


def test_a_nan_log_prob_is_an_error_under_validation(validation):
    hidden, weight, tokens = make()
    hidden[1, 1] = NAN
    validation(True)
    with pytest.raises(ValueError, match=r"chosen_logp\[1\] is nan"):
        linear_preference_loss(leaf(hidden), weight, **tokens)
