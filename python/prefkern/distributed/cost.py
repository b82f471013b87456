"""What the messages of a step cost: how many there are, what each rank gives and sends, and how long they take on a link.

A message is a collective that every rank calls once. For n bytes that each of R ranks gives, and a link that takes
:math:`\\alpha` seconds a message and :math:`\\beta` seconds a byte, one after the other:

==========  =========  ============================  ==========================
collective  algorithm  sends in a row                bytes that a rank sends
==========  =========  ============================  ==========================
all-reduce  ring       2 (R - 1)                     2 n (R - 1) / R
all-reduce  tree       2 ceil(log2 R)                2 n
all-gather  ring       R - 1                         n (R - 1)
all-gather  tree       ceil(log2 R)                  n (R - 1)
==========  =========  ============================  ==========================

and the time is sends x alpha + bytes x beta. The tree of an all-reduce goes up and down, in pieces, so that a rank sends
everything twice; that of an all-gather doubles what each rank has. It is a model: no congestion, no overlap, no arithmetic.

`docs/scaling.md` is made of it; tests hold the messages that it states to what the functions send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ._ranks import HEAD
from .advantages import MOMENTS
from .collectives import GATHER_HEAD, GATHER_SLOT, SUM_SLOT
from .filters import ROUND_NUMBERS

Kind = Literal["all_reduce", "all_gather"]
Algorithm = Literal["ring", "tree"]
KINDS, ALGORITHMS = ("all_reduce", "all_gather"), ("ring", "tree")


class Message(NamedTuple):
    """A collective that every rank calls once."""

    what: str
    kind: Kind
    nbytes: int
    """What each rank gives."""


class Link(NamedTuple):
    """How long it takes from one rank to the next."""

    alpha: float
    """Seconds a message."""
    beta: float
    """Seconds a byte."""


class Cost(NamedTuple):
    """What messages come to, for each rank."""

    messages: int
    """Collectives."""
    sends: int
    """How many times a rank sends, each after the one before."""
    nbytes: float
    """How many bytes a rank sends, all together."""

    def seconds(self, link: Link) -> float:
        return self.sends * link.alpha + self.nbytes * link.beta


def cost(messages: Sequence[Message], ranks: int, algorithm: Algorithm = "ring") -> Cost:
    """What the messages come to on so many ranks, by one algorithm. ValueError for an unknown one, or less than one rank."""
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; a positive number is expected")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; accepted: 'ring', 'tree'")
    if ranks == 1:
        return Cost(0, 0, 0.0)
    hops = ranks - 1 if algorithm == "ring" else (ranks - 1).bit_length()
    sends, nbytes = 0, 0.0
    for message in messages:
        if message.kind == "all_gather":
            sends += hops
            nbytes += message.nbytes * (ranks - 1)
        else:
            sends += 2 * hops
            nbytes += 2 * message.nbytes * ((ranks - 1) / ranks if algorithm == "ring" else 1)
    return Cost(len(messages), sends, nbytes)


# ---- what the functions send -----------------------------------------------------------------------------------------


def gathered_rows(rows: int, row_bytes: Sequence[int], what: str = "gather_rows") -> list[Message]:
    """`gather_rows` and `group_advantages` on ranks of at most `rows` rows, of tensors with so many bytes a row each, once the
    ranks know how large a message has to be."""
    needed = GATHER_HEAD + sum(-(-rows * size // 8) * 8 for size in row_bytes)
    return [Message(what, "all_gather", GATHER_SLOT if needed <= GATHER_SLOT else 1 << (needed - 1).bit_length())]


def summed(numbers: int, what: str = "packed_sum") -> list[Message]:
    """`packed_sum` of so many numbers; `sequence_sum` of so many sequences, `sequence_mean` of half as many, `global_count` of
    one."""
    rest = numbers - (SUM_SLOT - HEAD)
    messages = [Message(what, "all_reduce", 8 * SUM_SLOT)]
    return [*messages, Message(what, "all_reduce", 8 * rest)] if rest > 0 else messages


def batch_moments() -> list[Message]:
    """`batch_moments` and `whiten`."""
    return [Message("batch_moments", "all_gather", 8 * MOMENTS)]


def top_quantile_mask(rule: Literal["count", "trl"] = "count", wide: bool = False) -> list[Message]:
    """`top_quantile_mask`, of float64 if `wide`; `masked_quantile` is as with "trl"."""
    rounds = [Message("top_quantile_mask", "all_reduce", 8 * ROUND_NUMBERS)] * (6 if wide else 3)
    return [*rounds, Message("top_quantile_mask", "all_gather" if rule == "count" else "all_reduce", 8)]


def grpo_step(
    rows: int, *, rewards: int = 1, lengths: bool = False, micro_batches: int = 1, top_entropy: bool = False
) -> list[Message]:
    """What a data-parallel step on `rows` completions a rank sends besides the trainer's own gradients: advantages whose groups
    may straddle ranks, of float32 rewards; the count of tokens that the loss is divided by; and for each of `micro_batches` the
    tokens of highest entropy, over all ranks, if `top_entropy`."""
    row_bytes = [4 * rewards, 8, *([8] if lengths else [])]
    return [
        *gathered_rows(rows, row_bytes, "group_advantages"),
        *summed(1, "global_count"),
        *(top_quantile_mask() * micro_batches if top_entropy else []),
    ]


def vocabulary_parallel(tokens: int, hidden: int, *, backward: bool = True) -> list[Message]:
    """The head whose vocabulary lies on several ranks, for `tokens` rows of `hidden` numbers: 7 float32 numbers a row, and 7
    that say what they are, are gathered; backward, the gradient of the hidden states is summed in float32. Each rank's range
    is given by the caller."""
    forward = Message("vocabulary-parallel head, forward", "all_gather", 4 * 7 * (tokens + 1))
    return [forward, *([Message("vocabulary-parallel head, backward", "all_reduce", 4 * tokens * hidden)] if backward else [])]


# ---- a link from measurements, and tables ----------------------------------------------------------------------------


def fit(measured: Sequence[tuple[Kind, int, int, float]], algorithm: Algorithm = "ring") -> Link:
    """The link that explains measurements (collective, bytes that a rank gives, ranks, seconds) best: least squares of the
    relative errors, so that small messages count as much as large ones."""
    a = b = d = x = y = 0.0
    for kind, nbytes, ranks, seconds in measured:
        c = cost([Message("", kind, nbytes)], ranks, algorithm)
        u, v = c.sends / seconds, c.nbytes / seconds
        a, b, d, x, y = a + u * u, b + u * v, d + v * v, x + u, y + v
    determinant = a * d - b * b
    if not determinant > 1e-12 * a * d:
        raise ValueError("measured does not tell messages from bytes; messages of at least two sizes are expected")
    return Link((d * x - b * y) / determinant, (a * y - b * x) / determinant)


def size_text(nbytes: float) -> str:
    """1536 is "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while nbytes >= 1024 and power < len(units) - 1:
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.3g} {units[power]}" if nbytes < 1000 else f"{nbytes:.0f} {units[power]}"


def messages_table(messages: Sequence[Message]) -> str:
    """In Markdown, what each rank gives to each message; equal ones are counted."""
    lines = ["| what | collective | times | bytes that a rank gives |", "| --- | --- | --- | --- |"]
    for message in dict.fromkeys(messages):
        lines.append(
            f"| {message.what} | {message.kind.replace('_', '-')} | {list(messages).count(message)} | {message.nbytes:,} |"
        )
    return "\n".join(lines)


def ranks_table(messages: Sequence[Message], ranks: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024)) -> str:
    """In Markdown, what the messages come to on so many ranks."""
    lines = [
        "| ranks | messages | sends, ring | sends, tree | a rank sends, ring | a rank sends, tree |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in ranks:
        ring, tree = cost(messages, r, "ring"), cost(messages, r, "tree")
        lines.append(
            f"| {r} | {ring.messages} | {ring.sends:,} | {tree.sends:,} | {size_text(ring.nbytes)} | {size_text(tree.nbytes)} |"
        )
    return "\n".join(lines)
