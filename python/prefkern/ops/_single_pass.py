"""The single pass over a linear head: chunk by chunk logits, their log-probs, the loss's gradient in those, and from the same
logits the gradients of hidden, weight and bias. 3 GEMMs of 2 N V H flops instead of the 4 of ``linear_logprobs`` and its
backward; 2 where the head is frozen.

What the loss is, is a function: it gets the log-probs of a chunk and returns their gradient. A chunk holds whatever rows that
function has to see together. Heavy work is in ``csrc/logprobs/linear_chunk.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import _C
from ._arguments import accumulator, same_device
from ._call import keeps_graph
from .logprobs import _DTYPES, _GRAD_BIAS, _GRAD_HIDDEN, _GRAD_WEIGHT, _SAVE_STATS, _fake_outputs

_OPS = torch.ops.prefkern
_chunk, _chunk_backward = _OPS.linear_chunk_.default, _OPS.linear_chunk_backward_.default
GRAD_HIDDEN: int = _GRAD_HIDDEN
GRAD_WEIGHT: int = _GRAD_WEIGHT
GRAD_BIAS: int = _GRAD_BIAS


class Head(NamedTuple):
    """A linear head and the rows that go through it, as ``linear_logprobs`` takes them."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    targets: Tensor
    """[N]; ignore_index where a row does not count."""
    bias: Tensor | None
    row_temperature: Tensor | None
    options: tuple[float, float, float, int]
    """temperature, softcap, logit_scale, ignore_index"""


class Rows(NamedTuple):
    """Which rows of [N] a chunk holds: ranges one behind the other, or an index."""

    total: int
    ranges: tuple[tuple[int, int], ...] = ()
    at: Tensor | None = None

    def take(self, t: Tensor) -> Tensor:
        if self.at is not None:
            return t.index_select(0, self.at)
        parts = [t[begin:end] for begin, end in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, into: Tensor, values: Tensor) -> None:
        if self.at is not None:
            into.index_copy_(0, self.at, values.to(into.dtype))
            return
        at = 0
        for begin, end in self.ranges:
            into[begin:end].copy_(values[at : at + end - begin])
            at += end - begin

    def window(self, t: Tensor) -> Tensor | None:
        """The rows as part of t's own memory, where they are that."""
        return t[self.ranges[0][0] : self.ranges[0][1]] if len(self.ranges) == 1 else None


def rows_of(*ranges: tuple[int, int]) -> Rows:
    """Rows of ranges; such as meet become one."""
    merged: list[tuple[int, int]] = []
    for begin, end in ranges:
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return Rows(sum(end - begin for begin, end in merged), tuple(merged))


def rows_that_fit(head: Head, rows: int, chunk_bytes: int) -> int:
    """How many rows a chunk should have at most."""
    hidden, weight = head.hidden, head.weight
    if rows == 0:
        return 1
    plan = _C.plan_kept(rows, hidden.shape[1], weight.shape[0], _DTYPES[hidden.dtype], hidden.is_cuda, True, chunk_bytes)
    return int(plan.row_chunk)


def share_out(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Cut items into runs of at most ``limit`` rows, of about equal size; an item that is larger has a run of its own."""
    total = sum(sizes)
    if total == 0:
        return []
    target = total / -(-total // limit)
    runs, begin, held = [], 0, 0
    for i, size in enumerate(sizes):
        if held and (held + size > limit or held + size / 2 > target):
            runs.append((begin, i))
            begin, held = i, 0
        held += size
    if held:
        runs.append((begin, len(sizes)))
    else:  # items without rows at the end
        runs[-1] = (runs[-1][0], len(sizes))
    return runs


def single_pass(
    head: Head, chunks: Sequence[Rows], gradient: Callable[[int, Tensor], Tensor], needs: int, wide: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, as far as ``needs`` asks for them: those of a loss of which
    ``gradient(k, logp)`` is the gradient in the log-probs of the rows of ``chunks[k]``.

    They have the types of what they belong to; with ``wide`` that of accumulators. No row is in two chunks; one that is in none
    has no gradient. Rows are taken in order, so equal calls give equal bits.
    """
    hidden, weight, targets, bias, row_temperature, options = head
    acc, vocab, width = accumulator(hidden), weight.shape[0], hidden.shape[1]
    most = max((rows.total for rows in chunks), default=0)
    covered = sum(rows.total for rows in chunks) == hidden.shape[0]
    new = hidden.new_empty
    workspace = new(most * vocab, dtype=acc)
    # One chunk's gradient of the weight is all of it, and needs no accumulator of its own.
    d_weight = (
        new((vocab, width), dtype=weight.dtype if len(chunks) == 1 and not wide else acc) if needs & GRAD_WEIGHT else None
    )
    d_bias = new(vocab, dtype=acc) if needs & GRAD_BIAS else None
    d_hidden = buffer = None
    if needs & GRAD_HIDDEN:
        d_hidden = (new if covered else hidden.new_zeros)(hidden.shape, dtype=acc if wide else hidden.dtype)
        if d_hidden.dtype != acc or any(len(rows.ranges) != 1 for rows in chunks):
            buffer = new((most, width), dtype=acc)
    if not chunks:
        for t in (d_weight, d_bias):
            if t is not None:
                t.zero_()
    for k, rows in enumerate(chunks):
        x, t = rows.take(hidden), rows.take(targets)
        if hidden.is_cuda and d_weight is not None:  # there, ignored rows stay: 0 times NaN would reach the weight's gradient
            x = torch.where((t != options[3]).unsqueeze(1), x, 0)
        tau = None if row_temperature is None else rows.take(row_temperature)
        logp, entropy, *_, stats = _chunk(x, weight, t, bias, tau, workspace, *options, _SAVE_STATS)
        g = gradient(k, logp)
        d_rows = None
        if d_hidden is not None:
            d_rows = rows.window(d_hidden) if buffer is None else buffer[: rows.total]
        _chunk_backward(
            g, None, None, x, weight, t, bias, tau, entropy, stats, workspace, d_rows, d_weight, d_bias, *options, k > 0
        )  # fmt: skip
        if d_hidden is not None and buffer is not None and d_rows is not None:
            rows.put(d_hidden, d_rows)
    del workspace, buffer
    if d_weight is not None and not wide:
        d_weight = d_weight.to(weight.dtype)
    if d_bias is not None and bias is not None and not wide:
        d_bias = d_bias.to(bias.dtype)
    return d_hidden, d_weight, d_bias


class Stored:
    """Gradients that a forward has already computed, on their way to the backward. They are handed over rather than copied, so
    a second backward finds nothing unless the first one was told to keep the graph."""

    def __init__(self, gradients: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype | None, ...]):
        self.gradients: tuple[Tensor | None, ...] | None = gradients
        self.dtypes = dtypes

    def times(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the upstream gradient of the loss."""
        held = self.gradients
        if held is None:
            raise RuntimeError(
                "the gradients of this loss went to an earlier backward; call that one with retain_graph=True to have two"
            )
        keep = keeps_graph()
        if not keep:
            self.gradients = None
        if g.is_cuda or float(g) != 1:
            held = tuple(t if t is None else t * g if keep else t.mul_(g) for t in held)
        elif keep:
            held = tuple(t if t is None else t.clone() for t in held)
        return tuple(t if t is None else t.to(dtype) for t, dtype in zip(held, self.dtypes, strict=True))


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError("a loss whose gradient is found in the forward cannot be differentiated twice")


def differentiated_once(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What a backward returns: under create_graph, a second differentiation must find an error, and no constant."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(t if t is None else _Constant.apply(t.detach().requires_grad_()) for t in gradients)


# ---- fake implementations --------------------------------------------------------------------------------------------


@torch.library.register_fake("prefkern::linear_chunk_")
def _fake_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, row_temperature: Tensor | None, workspace: Tensor,
    temperature: float, softcap: float, logit_scale: float, ignore_index: int, outputs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    same_device("hidden", hidden, weight=weight, targets=targets, bias=bias, workspace=workspace)
    return _fake_outputs(hidden, hidden.shape[0], outputs)


@torch.library.register_fake("prefkern::linear_chunk_backward_")
def _fake_chunk_backward(*args: Any) -> None:
    return None
