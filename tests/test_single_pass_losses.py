"""Methods by name, straight from the head in one pass, against the functions of their papers on top of linear_logprobs."""

import pytest
import torch

from linear_losses import F32, F64, Passes, assert_same, names, run
from prefkern import LossOutput, linear_logprobs, linear_policy_loss, linear_preference_loss, linear_unpaired_loss, sequence_sum
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
