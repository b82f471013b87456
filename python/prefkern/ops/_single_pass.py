"""The single pass over a linear head: chunk by chunk logits, their log-probs, the loss's gradient in those, and from the same
logits the gradients of hidden, weight and bias. 3 GEMMs of 2 N V H flops instead of the 4 of ``linear_logprobs`` and its
backward; 2 where the head is frozen.

What the loss is, is an :class:`Objective`: it takes over the log-probs (and entropies) of a chunk and returns the gradient in
them. A chunk holds whatever rows it has to see together. Heavy work is in ``csrc/logprobs/linear_chunk.cpp``.

Ops built on this begin with hidden, weight, targets, cu_seqlens, bias and row_temperature, end with temperature, softcap,
logit_scale and ignore_index, options of their own, needs and chunk_bytes, and return loss, metrics, d_hidden, d_weight and
d_bias, the gradients as far as needs asks for them; :func:`register` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _C
from ._arguments import accumulator, check_tensors, same_device
from ._call import call, differentiated_once, keeps_graph
from .logprobs import _DTYPES, _ENTROPY, _GRAD_BIAS, _GRAD_HIDDEN, _GRAD_WEIGHT, _SAVE_STATS, _fake_outputs

_OPS = torch.ops.prefkern
_chunk, _chunk_backward = _OPS.linear_chunk_.default, _OPS.linear_chunk_backward_.default
_linear_fwd = _OPS.linear_logprobs_fwd.default
_BITS = (_GRAD_HIDDEN, _GRAD_WEIGHT, _GRAD_BIAS)


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

    def pieces(self, most: int) -> list[Rows]:
        """These in order, at most so many at a time, shared out evenly."""
        count = -(-self.total // most)
        if count <= 1:
            return [self]
        ends = [self.total * k // count for k in range(count + 1)]
        if self.at is not None:
            return [Rows(b - a, at=self.at[a:b]) for a, b in pairwise(ends)]
        found, before = [], [0, *accumulate(end - begin for begin, end in self.ranges)]
        for a, b in pairwise(ends):
            parts = (
                (begin + max(a - first, 0), min(end, begin + b - first))
                for first, (begin, end) in zip(before, self.ranges, strict=False)
            )
            found.append(rows_of(*((begin, end) for begin, end in parts if begin < end)))
        return found

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


def rows_at(index: Tensor) -> Rows:
    """Rows of an ascending index on the CPU; a range where they are one."""
    count = len(index)
    if count and int(index[-1]) - int(index[0]) + 1 == count:
        return rows_of((int(index[0]), int(index[-1]) + 1))
    return Rows(count, at=index)


class Chunk(NamedTuple):
    """Rows that go through the head together: whole items, pairs or sequences, or any rows."""

    rows: Rows
    begin: int = 0
    end: int = 0
    """Items [begin, end), where it holds whole ones: their first sequences, then their second ones, one row behind the
    other."""
    cu_seqlens: Tensor | None = None
    """int32, where those sequences begin and end among the rows, on the device; None: padded."""
    counts: Tensor | None = None
    """bool [rows], or None: all rows count."""


class Objective(Protocol):
    """A loss in the log-probs, and perhaps the entropies, of rows."""

    def add(self, chunk: Chunk, logp: Tensor, entropy: Tensor) -> None:
        """Take over a chunk's."""

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """The loss's gradient in those of a chunk that was taken over, times :attr:`gain`."""

    @property
    def gain(self) -> float | Tensor:
        """A power of two that keeps gradients inside float16's range where they are narrowed to it."""


def _fit_into_gradient(head: Head, rows: int, needs: int, wide: bool) -> bool:
    """Whether the logits of so many rows have room in the memory of the weight's gradient, which is written over them."""
    hidden, weight = head.hidden, head.weight
    acc = accumulator(hidden)
    own = (acc if wide else weight.dtype).itemsize
    return (
        bool(needs & _GRAD_WEIGHT) and hidden.is_cpu and 0 < rows * acc.itemsize <= weight.shape[1] * own
        and (weight.numel() * own) % acc.itemsize == 0
    )  # fmt: skip


def _end_of(memory: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """The last elements of a tensor's memory, as those of another type."""
    return memory.view(-1).view(torch.uint8)[-elements * dtype.itemsize :].view(dtype)


def _planned_rows(head: Head, rows: int, chunk_bytes: int, weight_grad: bool) -> int:
    hidden, weight = head.hidden, head.weight
    shape = (rows, hidden.shape[1], weight.shape[0], _DTYPES[hidden.dtype], hidden.is_cuda, True, chunk_bytes)
    return int(_C.plan_kept(*shape, weight_grad=weight_grad).row_chunk)


def rows_that_fit(head: Head, rows: int, chunk_bytes: int, needs: int) -> int:
    """How many of these rows a chunk should have at most."""
    if rows == 0:
        return 1
    if not chunk_bytes and _fit_into_gradient(head, rows, needs, head.hidden.dtype == torch.float16):
        return rows
    return _planned_rows(head, rows, chunk_bytes, bool(needs & _GRAD_WEIGHT))


# What has to stay together may take this many times the default budget before its logits are computed twice.
_STRETCH = 4


def rows_at_once(head: Head, rows: int, chunk_bytes: int, needs: int) -> int:
    """How many rows a chunk that cannot be cut may have before it goes through the head in pieces."""
    if rows == 0:
        return 1
    fit = rows_that_fit(head, rows, chunk_bytes, needs)
    return fit if chunk_bytes else max(fit, _STRETCH * _planned_rows(head, rows, 0, True))


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


class _Walk:
    """Chunks on their way through the head, one after the other in the same workspace, and the gradients they add up to."""

    def __init__(self, head: Head, needs: int, chunks: Sequence[Rows], wide: bool):
        self.head, self.needs, self.wide, self.later = head, needs, wide, False
        hidden, weight = head.hidden, head.weight
        acc, vocab, width = accumulator(hidden), weight.shape[0], hidden.shape[1]
        largest = max((rows.total for rows in chunks), default=0)
        covered = sum(rows.total for rows in chunks) == hidden.shape[0]
        new = hidden.new_empty if chunks else hidden.new_zeros
        self.hidden = self.weight = self.bias = self.buffer = None
        if needs & _GRAD_WEIGHT:  # one chunk's gradient of the weight is all of it, and needs no accumulator of its own
            self.weight = new((vocab, width), dtype=weight.dtype if len(chunks) == 1 and not wide else acc)
        if self.weight is not None and len(chunks) == 1 and _fit_into_gradient(head, largest, needs, wide):
            self.workspace = _end_of(self.weight, largest * vocab, acc)
        else:
            self.workspace = new(largest * vocab, dtype=acc)
        if needs & _GRAD_BIAS:
            self.bias = new(vocab, dtype=acc)
        if needs & _GRAD_HIDDEN:
            self.hidden = (new if covered else hidden.new_zeros)(hidden.shape, dtype=acc if wide else hidden.dtype)
            if self.hidden.dtype != acc or any(len(rows.ranges) != 1 for rows in chunks):
                self.buffer = new((largest, width), dtype=acc)

    def forward(self, rows: Rows, outputs: int) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor, Tensor]:
        """Leave the rows' logits in the workspace; what went in, log-probs, entropies and statistics."""
        hidden, weight, targets, bias, tau, options = self.head
        x, t = rows.take(hidden), rows.take(targets)
        if hidden.is_cuda and self.weight is not None:  # there, ignored rows stay: 0 times NaN would reach this gradient
            x = torch.where((t != options[3]).unsqueeze(1), x, 0)
        inputs = (x, weight, t, bias, None if tau is None else rows.take(tau))
        logp, entropy, *_, stats = _chunk(*inputs, self.workspace, *options, outputs)
        return inputs, logp, entropy, stats

    def backward(
        self, rows: Rows, g_logp: Tensor, g_entropy: Tensor | None, inputs: tuple[Tensor | None, ...], entropy: Tensor,
        stats: Tensor,
    ) -> None:  # fmt: skip
        """Turn the logits in the workspace into the rows' part of the gradients."""
        into = None
        if self.hidden is not None:
            into = rows.window(self.hidden) if self.buffer is None else self.buffer[: rows.total]
        _chunk_backward(
            g_logp, g_entropy, None, *inputs, entropy, stats, self.workspace, into, self.weight, self.bias, *self.head.options,
            self.later,
        )  # fmt: skip
        if self.hidden is not None and self.buffer is not None and into is not None:
            rows.put(self.hidden, into)
        self.later = True

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        del self.workspace, self.buffer
        if self.wide:
            return self.hidden, self.weight, self.bias
        bias = self.head.bias
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(self.head.weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def single_pass(
    head: Head,
    chunks: Sequence[Rows],
    gradient: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    needs: int,
    most: int,
    outputs: int = 0,
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, as far as ``needs`` asks for them: those of a loss of which
    ``gradient(k, logp, entropy)`` are the gradients in the log-probs and in the entropies of the rows of ``chunks[k]``, the
    latter None if there is none. Entropies are computed where ``outputs`` has their bit.

    They have the types of what they belong to; with ``wide`` that of accumulators. No row is in two chunks; one that is in none
    has no gradient. Rows are taken in order, so equal calls give equal bits. A chunk of more than ``most`` rows goes through
    the head in pieces, and, but for the last of them, again once its gradient is known: those logits, and nothing else, are
    computed twice.
    """
    cut = [rows.pieces(most) for rows in chunks]
    walk = _Walk(head, needs, [rows for pieces in cut for rows in pieces], wide)
    for k, pieces in enumerate(cut):
        states = []
        for rows in pieces:
            inputs, logp, entropy, stats = walk.forward(rows, _SAVE_STATS | outputs)
            states.append((logp, entropy, stats))
        if len(pieces) == 1:
            walk.backward(pieces[0], *gradient(k, logp, entropy), inputs, entropy, stats)
            continue
        g_logp, g_entropy = gradient(k, torch.cat([state[0] for state in states]), torch.cat([state[1] for state in states]))
        end = len(g_logp)
        for rows, (_, entropy, stats) in zip(reversed(pieces), reversed(states), strict=True):
            if end < len(g_logp):  # the last one's logits are still there
                inputs, *_ = walk.forward(rows, 0)
            mine = slice(end - rows.total, end)
            walk.backward(rows, g_logp[mine], None if g_entropy is None else g_entropy[mine], inputs, entropy, stats)
            end -= rows.total
    return walk.gradients()


def gradients_of(
    objective: Objective,
    head: Head,
    chunks: Sequence[Chunk],
    whole: Chunk,
    needs: int,
    with_entropy: bool,
    chunk_bytes: int,
) -> tuple[Tensor | None, ...]:
    """Hand all rows to the objective, and return its gradients in hidden, weight and bias, None where nobody needs one. Where
    nobody needs any, the logits are not kept."""
    outputs = _ENTROPY if with_entropy else 0
    if not needs:
        logp, entropy, *_ = _linear_fwd(*head[:-1], *head.options, outputs, chunk_bytes)
        objective.add(whole, logp, entropy)
        return None, None, None

    def gradient(k: int, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        objective.add(chunks[k], logp, entropy)
        return objective.gradient(chunks[k])

    # float16 gradients would underflow without the loss scaling that comes later, so they stay float32 until the backward, and
    # what a GPU narrows on the way is scaled by a power of two.
    half = head.hidden.dtype == torch.float16
    most = rows_at_once(head, sum(chunk.rows.total for chunk in chunks), chunk_bytes, needs)
    found = single_pass(head, [chunk.rows for chunk in chunks], gradient, needs, most, outputs, wide=half)
    return tuple(None if g is None else g.float().mul_(1 / objective.gain) for g in found) if half else found


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


def _once(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    why = "a loss whose gradient is found in the forward cannot be differentiated twice"
    return tuple(t if t is None else differentiated_once(t, why) for t in gradients)


# ---- autograd and fake implementations of losses ---------------------------------------------------------------------


def needed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The gradients that are asked for, as bits."""
    if bias is not None:
        check_tensors(bias=bias)
    if not torch.is_grad_enabled():
        return 0
    trained = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    return sum(bit for bit, wanted in zip(_BITS, trained, strict=True) if wanted)


def run(
    op: Callable[..., Any], hidden: Tensor, weight: Tensor, bias: Tensor | None, args: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Loss and metrics of an op with those inputs and, in the order of its schema, ``args``."""
    if args[-2] and not torch.compiler.is_compiling():
        return call(_Loss.apply, hidden, weight, bias, op, args)
    loss, metrics, *_ = call(op, hidden, weight, *args[:2], bias, *args[2:])
    return loss, metrics


def results(loss: Tensor, metrics: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What the op returns; what is not needed has no elements."""
    return loss, metrics, *(metrics.new_empty(0) if g is None else g for g in gradients)


def register(name: str, forward: Callable[..., Any], metrics: int, tensors: Sequence[str]) -> None:
    """Implement the op on CPU and CUDA, its fake, and its autograd formula. ``tensors`` are its arguments behind
    row_temperature that are one."""

    def fake(
        hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        same_device("hidden", hidden, weight=weight, targets=targets, bias=bias)
        same_device("hidden", hidden, **dict(zip(("temperature", *tensors), rest, strict=False)))
        acc, needs = accumulator(hidden), rest[-2]
        stored = [acc if hidden.dtype == torch.float16 else t.dtype for t in (hidden, weight, hidden if bias is None else bias)]
        shapes = (hidden.shape, weight.shape, weight.shape[:1])
        gradients = [
            hidden.new_empty(shape if needs & bit else (0,), dtype=dtype if needs & bit else acc)
            for shape, dtype, bit in zip(shapes, stored, _BITS, strict=True)
        ]
        return hidden.new_empty((), dtype=acc), hidden.new_empty(metrics, dtype=acc), *gradients

    torch.library.impl(name, ("cpu", "cuda"), forward)
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, _backward, setup_context=_setup)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype, None if inputs[4] is None else inputs[4].dtype)
    ctx.needs, ctx.inputs = inputs[-2], len(inputs)


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if g_loss is None:
        return (None,) * ctx.inputs
    gradients = (
        (t * g_loss).to(dtype) if ctx.needs & bit and dtype is not None else None
        for t, dtype, bit in zip(ctx.saved_tensors, ctx.dtypes, _BITS, strict=True)
    )
    d_hidden, d_weight, d_bias = _once(tuple(gradients))
    return (d_hidden, d_weight, None, None, d_bias, *(None,) * (ctx.inputs - 5))


class _Loss(torch.autograd.Function):
    """What the registered formula does, for eager mode, without a copy of the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, op: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, *gradients = op(hidden, weight, *args[:2], bias, *args[2:])
        needs = args[-2]
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.stored = Stored(tuple(g if needs & bit else None for g, bit in zip(gradients, _BITS, strict=True)), dtypes)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g_loss is None:
            return (None,) * 5
        return (*_once(ctx.stored.times(g_loss.detach())), None, None)


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
