"""Methods by name, straight from the head in one pass, against the functions of their papers on top of linear_logprobs."""

import pytest
import torch

from linear_losses import BF16, F16, F32, F64, Passes, assert_same, names, run
from prefkern import LossOutput, linear_logprobs, linear_policy_loss, linear_preference_loss, linear_unpaired_loss, sequence_sum
from prefkern.ops import _single_pass
from prefkern.papers.dpo import dpo_loss
from prefkern.papers.grpo import loss as grpo_loss
from prefkern.papers.gspo import loss as gspo_loss
from prefkern.papers.kto import kto_kl, kto_loss
from prefkern.papers.orpo import orpo_loss
from prefkern.papers.simpo import simpo_loss

SEQUENCES, LENGTH, WIDTH, VOCAB = 6, 9, 16, 53
CHUNKS = {"default": None, "smallest": 1, "some": 6000}


def make(dtype, layout):
    """hidden, weight, what the tokens are, log-probs of a reference, and the layout of sums."""
    lengths = torch.randint(3, LENGTH + 1, (SEQUENCES,))
    counts = torch.arange(LENGTH) < lengths[:, None]
    counts[:, 0] = False
    targets = torch.where(counts, torch.randint(0, VOCAB, counts.shape), -100)
    hidden, weight = torch.randn(SEQUENCES, LENGTH, WIDTH, dtype=dtype), torch.randn(VOCAB, WIDTH, dtype=dtype) / 2
    ref = linear_logprobs(hidden, weight, targets).logp + 0.3 * torch.randn(targets.shape, dtype=dtype)
    if layout == "padded":
        return hidden, weight, {"targets": targets}, ref, {"mask": counts}
    inside = torch.arange(LENGTH) < lengths[:, None]
    packed = {"cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()}
    return hidden[inside], weight, {"targets": targets[inside], **packed}, ref[inside], {"mask": counts[inside], **packed}


def sums_of(t, layout):
    return sequence_sum(t, **layout)


def dpo(ref, layout):
    def two(logp):
        return dpo_loss(*sums_of(logp, layout).chunk(2), *sums_of(ref, layout).chunk(2), beta=0.2)

    return linear_preference_loss, {"beta": 0.2, "ref_logp": ref}, two


def simpo(ref, layout):
    lengths = sums_of(torch.ones_like(ref), layout).chunk(2)
    one = {"beta": 2.0, "average": "logp", "offset": 1.0}
    return linear_preference_loss, one, lambda logp: simpo_loss(*sums_of(logp, layout).chunk(2), *lengths, gamma=1.0)


def orpo(ref, layout):
    lengths = sums_of(torch.ones_like(ref), layout).chunk(2)
    one = {"beta": 1.0, "score": "log_odds", "average": "logp", "sft_weight": 1.0, "norm": SEQUENCES / 2 / 0.1}
    return linear_preference_loss, one, lambda logp: orpo_loss(*sums_of(logp, layout).chunk(2), *lengths, beta=0.1)


def kto(ref, layout):
    desirable = torch.tensor([True, False, True, True, False, False])
    kl = kto_kl(torch.tensor([0.3, -0.1, 0.5], dtype=ref.dtype))
    options = {"kl": kl, "beta": 0.3, "desirable_weight": 1.5}

    def two(logp):
        out = kto_loss(sums_of(logp, layout), sums_of(ref, layout), desirable, **options)
        return LossOutput(out.loss, {name: value for name, value in out.metrics.items() if name != "kl"})

    return linear_unpaired_loss, {"desirable": desirable, "ref_logp": ref, **options}, two


def gspo(ref, layout):
    advantages = torch.linspace(-1, 1, SEQUENCES, dtype=ref.dtype)
    one = {"kind": "gspo", "eps_low": 0.05, "eps_high": 0.06, "ratio_clamp": None, "agg": "seq-mean-token-mean"}
    options = {"eps_low": 0.05, "eps_high": 0.06, **layout}
    return (
        linear_policy_loss,
        {"old_logp": ref, "advantages": advantages, **one},
        lambda logp: gspo_loss(logp, ref, advantages, **options),
    )


def grpo(ref, layout):
    advantages = torch.linspace(-1, 1, SEQUENCES, dtype=ref.dtype)
    one = {"agg": "seq-mean-token-mean", "beta": 0.04, "ref_logp": ref - 0.1}
    return (
        linear_policy_loss,
        {"old_logp": ref, "advantages": advantages, **one},
        lambda logp: grpo_loss(logp, ref, advantages, ref_logp=ref - 0.1, beta=0.04, **layout),
    )


METHODS = {function.__name__: function for function in (dpo, simpo, orpo, kto, gspo, grpo)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_is_its_paper_in_three_passes(monkeypatch, method, layout, chunk, dtype):
    hidden, weight, tokens, ref, sums = make(dtype, layout)
    function, options, two = METHODS[method](ref, sums)
    passes = Passes(monkeypatch)
    budget = CHUNKS[chunk] and CHUNKS[chunk] * (2 if dtype == F64 else 1)
    ours = run(function, hidden, weight, chunk_bytes=budget, **tokens, **options)
    counted = int((tokens["targets"] != -100).sum())
    assert passes.hidden == passes.weight == counted
    if chunk != "smallest" or method == "grpo":  # what has to stay together fits
        assert passes.logits == counted
    assert (len(passes.chunks) > 1) == (chunk != "default")
    expected = run(
        lambda hidden, weight, bias: two(linear_logprobs(hidden, weight, tokens["targets"]).logp), hidden, weight
    )  # fmt: skip
    assert_same(ours, expected, dtype)


OPS = torch.ops.prefkern


@pytest.mark.parametrize("rows", [64, 61, 20])
@pytest.mark.parametrize("active", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=names)
def test_logits_in_the_memory_of_the_weights_gradient(rows, active, dtype):
    """The same bits as from a workspace apart, with as many rows as there is room for and with fewer; blocks of 16384 columns
    and more."""
    width, vocab, acc = (64 if dtype in (F32, F64) else 128), 53000, (F64 if dtype == F64 else F32)
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) / 8).to(dtype)
    targets, g = torch.randint(0, vocab, (rows,)), torch.randn(rows, dtype=acc) * (torch.rand(rows) < active)
    targets[0] = -100
    found = []
    for inside in (False, True):
        d_hidden, d_weight = torch.empty(rows, width, dtype=acc), torch.empty(vocab, width, dtype=dtype)
        d_bias = torch.empty(vocab, dtype=acc)
        workspace = _single_pass._end_of(d_weight, rows * vocab, acc) if inside else torch.empty(rows * vocab, dtype=acc)
        logp, entropy, *_, stats = OPS.linear_chunk_(hidden, weight, targets, None, None, workspace, 1.0, 0.0, 1.0, -100, 33)
        into = (d_hidden, d_weight, d_bias, 1.0, 0.0, 1.0, -100, False)
        OPS.linear_chunk_backward_(g, g, None, hidden, weight, targets, None, None, entropy, stats, workspace, *into)
        found.append((logp, entropy, d_hidden, d_weight, d_bias))
    for name, apart, inside in zip(("logp", "entropy", "hidden", "weight", "bias"), *found, strict=True):
        assert torch.equal(apart, inside), name


def test_a_workspace_elsewhere_in_the_gradient_is_refused():
    hidden, weight, targets = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([0, 1, 2])
    d_weight = torch.empty(20, 8)
    for workspace, accumulate in (
        (d_weight.view(-1)[:60], False),
        (d_weight.view(-1)[-80:], False),
        (d_weight.view(-1)[-60:], True),
    ):
        _, entropy, *_, stats = OPS.linear_chunk_(hidden, weight, targets, None, None, workspace, 1.0, 0.0, 1.0, -100, 32)
        with pytest.raises(RuntimeError, match=r"workspace overlaps d_weight; it may only be the last N \* V elements"):
            OPS.linear_chunk_backward_(
                torch.ones(3), None, None, hidden, weight, targets, None, None, entropy, stats, workspace, None, d_weight, None,
                1.0, 0.0, 1.0, -100, accumulate,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=names)
@pytest.mark.parametrize("function", ["policy", "sequences", "preference"])
def test_no_more_memory_than_the_gradients_and_a_block(device, allocations, dtype, function):
    """Up to H rows (half of it where the gradient is half as wide as logits) on the CPU."""
    if device != "cpu":
        pytest.skip("on CUDA the workspace lies apart")
    width, vocab = 128, 60_000
    rows = width if dtype != BF16 else width // 2
    hidden, weight = torch.randn(rows, width).to(dtype).requires_grad_(), torch.randn(vocab, width).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (4, rows // 4))
    hidden = hidden.view(4, rows // 4, width)
    old, advantages = torch.full(targets.shape, -11.0), torch.linspace(-1, 1, 4)

    def loss():
        if function == "preference":
            return linear_preference_loss(hidden, weight, targets, ref_logp=old).loss
        kind = {"policy": "reinforce", "sequences": "gspo"}[function]
        return linear_policy_loss(hidden, weight, targets, old, advantages, kind=kind).loss

    used = allocations(loss)
    gradient = vocab * width * (2 if dtype == BF16 else 4)
    assert used.peak < gradient + (4 << 20) + (8192 * width * 4 if dtype == BF16 else 0) + (1 << 20)
