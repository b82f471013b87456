"""UltraGen's claim on texts of twelve bits: does DPO on sets of many attributes help where they come late, and does it matter
how the sets are made?

A text is twelve binary tokens, drawn from one of four topics; an attribute is "bit i is b", the six bits in front being soft
ones. A prompt is a list of up to ten attributes. The policy is autoregressive: a token's logit is a bias, a weight of the
token before, and, for each attribute that speaks of it, a gain that depends on the attribute's place in the list and on the
bit. It is first trained on (attributes, text) with lists of up to four: later places never had an effect. Then, with equally
many pairs from

    random     attributes that do not contradict each other, as many as the sets below have
    code       neighbours of an attribute in the space of what occurs together, of which the unlike are chosen as by UltraGen's
               code
    farthest   the same, by farthest point

the policy samples eight texts for each set, the best and the worst by share of satisfied attributes make a pair, and DPO
follows, the trained policy being the reference. What is measured: the satisfaction rate by place in lists of ten that are true
of held-out texts, and by the length of the list.

    python examples/attribute_sets.py                        # two tables, and attribute_sets.png
    python examples/attribute_sets.py --markdown             # the tables as docs/experiments_rollouts.md has them
    python examples/attribute_sets.py --quick --json numbers.json

A run repeats exactly on the same machine. Needed besides prefkern: matplotlib, which the "demo" extra brings.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from _report import Result, Rows, add_outputs, check_outputs, one_thread, show
from prefkern import logits_logprobs, sequence_sum
from prefkern.papers import ultragen

BITS, PLACES, TOPICS, BINS = 12, 10, 4, 5
SFT_PLACES = 4  # how long lists are before DPO
CANDIDATES = 12  # nearest neighbours a set is chosen from
TEXTS = 8  # sampled for each set
DOCUMENTS, TEST_TEXTS = 4000, 2000
METHODS = ("random", "code", "farthest")


class Prompts(NamedTuple):
    """Lists of attributes: bits and their values, int64 [B, 10], and which places are used, bool [B, 10]."""

    bits: Tensor
    values: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Scale:
    seeds: int
    pairs: int
    sft_steps: int
    dpo_steps: int


SCALES = {"default": Scale(5, 1000, 300, 300), "quick": Scale(2, 300, 120, 100)}


# ---- texts and attributes


def draw_texts(count: int, topics: Tensor, generator: torch.Generator) -> Tensor:
    """bool [count, 12]."""
    topic = torch.randint(TOPICS, (count,), generator=generator)
    return torch.rand(count, BITS, generator=generator) < topics[topic]


def attributes_of(texts: Tensor, most: int, generator: torch.Generator) -> Prompts:
    """For each text a list of 1 to `most` attributes that are true of it, in random order."""
    order = torch.rand(texts.shape, generator=generator).argsort(1)[:, :PLACES]
    length = torch.randint(1, most + 1, (len(texts), 1), generator=generator)
    return Prompts(order, texts.gather(1, order).long(), torch.arange(PLACES) < length)


def correlation_vectors(texts: Tensor) -> Tensor:
    """[24, 24]: how much more often than by chance attribute 2 i + b occurs with each other one, over the norm. Nothing is as
    far away as its opposite."""
    has = torch.stack([~texts, texts], 2).flatten(1).double()
    share = has.mean(0)
    return torch.nn.functional.normalize((has.mT @ has) / len(has) - share[:, None] * share)


def semantic_vectors() -> Tensor:
    """[24, 3]: where the bit is, on a circle, and what it is."""
    angle = 2 * math.pi * torch.arange(BITS).double() / BITS
    place = torch.stack([angle.cos(), angle.sin()], 1).repeat_interleave(2, 0)
    return torch.cat([place, torch.tensor([-0.5, 0.5]).double().repeat(BITS)[:, None]], 1)


def chosen_sets(method: str, texts: Tensor, count: int, generator: torch.Generator) -> Prompts:
    """`count` lists of up to 10 attributes; of attributes that contradict each other the first stays."""
    if method == "random":
        values = torch.rand(count, BITS, generator=generator) < 0.5
        lists = attributes_of(values, PLACES, generator)
        return lists._replace(valid=chosen_sets("code", texts, count, generator).valid)
    correlation, semantic = correlation_vectors(texts), semantic_vectors()
    is_soft = torch.arange(2 * BITS) < BITS
    sizes = ultragen.sample_set_sizes(count, least=4, most=PLACES, most_soft=6, generator=generator)
    seeds = torch.randint(BITS, (count,), generator=generator)
    near = ultragen.nearest_candidates(correlation, seeds, CANDIDATES)
    there = is_soft[near].sum(1)
    ids = ultragen.attribute_sets(
        semantic, is_soft, seeds, sizes.soft.minimum(there), sizes.hard.minimum(CANDIDATES - there), correlation=correlation,
        candidates=CANDIDATES, reduce="max" if method == "farthest" else "min",
    )  # fmt: skip
    ids = torch.nn.functional.pad(ids, (0, PLACES - ids.shape[1]), value=-1)
    bits = ids.div(2, rounding_mode="floor")
    again = (bits[:, :, None] == bits[:, None, :]).tril(-1).any(2)
    keep = (ids >= 0) & ~again
    order = (~keep).long().argsort(dim=1, stable=True)  # what stays moves up
    ids, keep = ids.gather(1, order), keep.gather(1, order)
    shuffle = torch.rand(ids.shape, generator=generator).masked_fill(~keep, 2).argsort(1)  # a list has no order of its own
    ids, keep = ids.gather(1, shuffle), keep.gather(1, shuffle)
    return Prompts((ids.clamp_min(0) // 2), ids.clamp_min(0) % 2, keep)


# ---- the policy


class Policy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(BITS))
        self.before = torch.nn.Parameter(torch.zeros(BITS))
        self.gain = torch.nn.Parameter(torch.zeros(PLACES, BITS))

    def wanted(self, prompts: Prompts) -> Tensor:
        """[B, 12]: what the list adds to each token's logit."""
        gain = self.gain[torch.arange(PLACES), prompts.bits] * (2 * prompts.values - 1) * prompts.valid
        return torch.zeros(len(gain), BITS).scatter_add(1, prompts.bits, gain)

    def logp(self, prompts: Prompts, texts: Tensor) -> Tensor:
        """[B]: of whole texts."""
        signs = torch.nn.functional.pad(2.0 * texts[:, :-1] - 1, (1, 0))
        logit = self.bias + self.wanted(prompts) + self.before * signs
        both = torch.stack([torch.zeros_like(logit), logit], -1)
        return sequence_sum(logits_logprobs(both, texts.long()).logp)

    @torch.no_grad()
    def sample(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        base, tokens = self.bias + self.wanted(prompts), []
        sign = torch.zeros(len(base))
        for t in range(BITS):
            probability = torch.sigmoid(base[:, t] + self.before[t] * sign)
            tokens.append(torch.rand(len(base), generator=generator) < probability)
            sign = 2.0 * tokens[-1] - 1
        return torch.stack(tokens, 1)


def satisfied(prompts: Prompts, texts: Tensor) -> Tensor:
    """bool [B, 10]."""
    return texts.gather(1, prompts.bits).long() == prompts.values


def minimise(policy: Policy, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def repeat(prompts: Prompts, times: int) -> Prompts:
    return Prompts(*(t.repeat_interleave(times, 0) for t in prompts))


def pairs_of(policy: Policy, prompts: Prompts, count: int, generator: torch.Generator) -> tuple[Prompts, Tensor, Tensor]:
    """The first `count` sets of which two texts differ in their rate, with the best and the worst text."""
    many = repeat(prompts, TEXTS)
    texts = policy.sample(many, generator)
    rates = ultragen.csr(satisfied(many, texts), many.valid).per_sample.view(-1, TEXTS)
    pairs = ultragen.build_pairs(rates)
    rows = pairs.keep.nonzero().flatten()[:count]
    if len(rows) < count:
        raise RuntimeError(f"{len(rows)} pairs of {count} came of {len(prompts.bits)} sets")
    texts = texts.view(-1, TEXTS, BITS)
    return Prompts(*(t[rows] for t in prompts)), texts[rows, pairs.chosen[rows]], texts[rows, pairs.rejected[rows]]


# ---- the experiment


def measure(policy: Policy, test: Tensor, seed: int) -> dict[str, list[float]]:
    """Rates in lists of ten by place, and by the length of the list, on the same lists and draws for every policy."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    full = attributes_of(test, PLACES, generator)
    by_length = []
    for n in range(1, PLACES + 1):
        lists = full._replace(valid=(torch.arange(PLACES) < n).expand_as(full.valid))
        texts = policy.sample(lists, torch.Generator().manual_seed(20_000 + seed))
        held = satisfied(lists, texts)
        by_length.append(ultragen.csr(held, lists.valid).macro.item())
    return {"place": ultragen.csr_by_position(held, lists.valid, BINS).rate.tolist(), "length": by_length}


def run_seed(seed: int, scale: Scale) -> dict[str, dict[str, list[float]]]:
    generator = torch.Generator().manual_seed(seed)
    topics = torch.where(torch.rand(TOPICS, BITS, generator=generator) < 0.5, 0.15, 0.85)
    texts, test = draw_texts(DOCUMENTS, topics, generator), draw_texts(TEST_TEXTS, topics, generator)
    lists = attributes_of(texts, SFT_PLACES, generator)
    reference = Policy()
    minimise(reference, lambda: -reference.logp(lists, texts).mean(), scale.sft_steps, 0.05)
    found = {"before": measure(reference, test, seed)}
    for k, method in enumerate(METHODS):
        own = torch.Generator().manual_seed(1000 * (seed + 1) + k)
        sets = chosen_sets(method, texts, 2 * scale.pairs, own)
        prompts, chosen, rejected = pairs_of(reference, sets, scale.pairs, own)
        with torch.no_grad():
            refs = reference.logp(prompts, chosen), reference.logp(prompts, rejected)
        policy = Policy()
        policy.load_state_dict(reference.state_dict())

        def loss(policy=policy, prompts=prompts, chosen=chosen, rejected=rejected, refs=refs) -> Tensor:
            return ultragen.gpo_loss(policy.logp(prompts, chosen), policy.logp(prompts, rejected), *refs).loss

        minimise(policy, loss, scale.dpo_steps, 0.02)
        found[method] = measure(policy, test, seed)
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.nan


def said(values: Sequence[float], form: str = "{:.3f}") -> str:
    mean, error = mean_and_error(values)
    return f"{form.format(mean)} ± {error:.3f}"


def experiment(scale: Scale) -> Result:
    runs = [run_seed(seed, scale) for seed in range(scale.seeds)]
    names = ("before", *METHODS)

    def values(name: str, what: str, i: int) -> list[float]:
        return [run[name][what][i] for run in runs]

    places = [f"places {2 * b + 1} and {2 * b + 2}" for b in range(BINS)]
    by_place = [[name, *(said(values(name, "place", b)) for b in range(BINS))] for name in names]
    lengths = (1, 4, 7, 10)
    by_length = [[name, *(said(values(name, "length", n - 1)) for n in lengths)] for name in names]
    last = PLACES - 1
    over = [
        [
            f"{a} over {b}",
            said([x - y for x, y in zip(values(a, "length", last), values(b, "length", last), strict=True)], "{:+.3f}"),
        ]
        for a, b in (("code", "before"), ("code", "random"), ("farthest", "random"), ("farthest", "code"))
    ]
    tables = [
        Rows(
            f"Satisfaction rate by place in a list of {PLACES}, mean and standard error of {scale.seeds} seeds",
            ["policy", *places],
            by_place,
        ),
        Rows("Satisfaction rate by the length of the list", ["policy", *(str(n) for n in lengths)], by_length),
        Rows(f"Difference at length {PLACES}, same seeds", ["policies", "difference"], over),
    ]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name in names:
        style = {"marker": "o", "markersize": 4, "linestyle": "--" if name == "before" else "-", "label": name}
        left.plot(range(1, BINS + 1), [mean_and_error(values(name, "place", b))[0] for b in range(BINS)], **style)
        right.plot(range(1, PLACES + 1), [mean_and_error(values(name, "length", n))[0] for n in range(PLACES)], **style)
    left.set(title=f"In lists of {PLACES}", xlabel="bin of the place in the list", ylabel="satisfaction rate")
    right.set(title="By the length of the list", xlabel="attributes")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend()
    return Result(tables, figure, {"seeds": scale.seeds, "pairs": scale.pairs, "runs": runs})


# ---- the command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="UltraGen's claim on texts of twelve bits.")
    add = parser.add_argument
    add("--quick", action="store_true", help="two seeds and fewer pairs and steps")
    add_outputs(parser, "attribute_sets.png")
    arguments = parser.parse_args(argv)
    check_outputs(parser, arguments, "attribute_sets.png")
    with one_thread():
        result = experiment(SCALES["quick" if arguments.quick else "default"])
    show(result, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
