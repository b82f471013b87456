"""What losses straight from a linear head share: the checks of their arguments, which tokens of which sequences count, and
chunks of these."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._names import nearest_hint
from ._arguments import check_ends, check_layout, check_tensors, integer, number, positive_int, same_device
from ._single_pass import Chunk, Head, needed, rows_at, rows_of, rows_that_fit, share_out
from .logprobs import _autocast, _softcap, _split_temperature, _validate

_OPS = torch.ops.prefkern
_linear_fwd, _sums = _OPS.linear_logprobs_fwd.default, _OPS.sequence_reduce_fwd.default


# ---- arguments of the public functions -------------------------------------------------------------------------------


def check_options(
    options: dict[str, Any], accepted: Iterable[str], renamed: dict[str, str], from_head: Iterable[str], loss: str
) -> None:
    """TypeError for an option that ``loss`` does not have, that has another name here or that the head knows."""
    for name in options:
        if name in accepted:
            continue
        if known := renamed.get(name):
            raise TypeError(f"{name!r} is not an argument here: {known!r} is what {loss} calls {name!r}")
        if name in from_head:
            raise TypeError(f"{name!r} is not an argument here; it comes from the head and the tokens that count")
        listed = ", ".join(accepted)
        raise TypeError(f"{name!r} is not an argument; accepted beside the head's: {listed}" + nearest_hint(name, accepted))


def count_sequences(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None, letter: str) -> int:
    """How many sequences there are; ``letter`` says what the documentation calls that number."""
    expected = f"[{letter}, T, H]" if cu_seqlens is None else "[N, H]"
    if hidden.ndim != (3 if cu_seqlens is None else 2):
        raise ValueError(f"hidden has shape {list(hidden.shape)}; {expected} is expected, or [N, H] with cu_seqlens")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {list(targets.shape)}; hidden has shape {list(hidden.shape)}, so "
            f"{list(hidden.shape[:-1])} is expected"
        )
    if cu_seqlens is None:
        return hidden.shape[0]
    check_layout(cu_seqlens, targets, "targets")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens has dtype {cu_seqlens.dtype} and shape {list(cu_seqlens.shape)}; int32 [{letter} + 1] is expected"
        )
    if cu_seqlens.device != hidden.device and (not cu_seqlens.is_cpu or hidden.is_meta):
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} but hidden is on {hidden.device}; that device, or the CPU, is expected"
        )
    return len(cu_seqlens) - 1


def check_counted(targets: Tensor, mask: Tensor | None, ref_logp: Tensor | None, ignore_index: int) -> Tensor:
    """Targets as int64, ignore_index where a token does not count."""
    for name, t in (("mask", mask), ("ref_logp", ref_logp)):
        if t is None:
            continue
        check_tensors(**{name: t})
        if t.shape != targets.shape:
            raise ValueError(f"{name} has shape {list(t.shape)}; targets has {list(targets.shape)}, so the same is expected")
        same_device("targets", targets, **{name: t})
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets has dtype {targets.dtype}; accepted: int64, int32")
    targets = targets.long()
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
        targets = torch.where(mask, targets, ignore_index)
    return targets


class HeadArguments(NamedTuple):
    """What an op is told about the head; autocast has been applied."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    row_temperature: Tensor | None
    options: tuple[float, float, float, int]
    """temperature, softcap, logit_scale, ignore_index"""
    needs: int
    chunk_bytes: int


def head_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None,
    logit_scale: float, ignore_index: int, chunk_bytes: int | None,
) -> HeadArguments:  # fmt: skip
    ignore_index = integer("ignore_index", ignore_index)
    if hidden.is_cuda:
        _validate(targets, temperature, weight.shape[0], ignore_index)
    tau, row_temperature = _split_temperature(temperature, targets.shape)
    options = (tau, _softcap(softcap), number("logit_scale", logit_scale), ignore_index)
    chunk = 0 if chunk_bytes is None else positive_int("chunk_bytes", chunk_bytes)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = _autocast(hidden, weight)
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    return HeadArguments(rows, weight, row_temperature, options, needed(hidden, weight, bias), chunk)


# ---- inside the ops --------------------------------------------------------------------------------------------------


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None,
    options: tuple[float, float, float, int],
) -> None:  # fmt: skip
    """All that is wrong before a product is computed."""
    _linear_fwd(hidden[:0], weight, targets.new_empty(0), bias, None, *options, 0, 0)  # for what it checks
    vocab, ignore_index = weight.shape[0], options[3]
    if targets.is_cpu:
        bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise ValueError(
                f"targets{at} is {int(targets[tuple(at)])}; accepted: 0 to {vocab - 1}, or ignore_index = {ignore_index}"
            )
    if cu_seqlens is not None and cu_seqlens.is_cpu:
        check_ends(cu_seqlens, targets, "targets")


class Layout:
    """The sequences of a call, padded or packed, which of their tokens count, and how they are cut into chunks. An item is
    what has to stay together: ``sides`` sequences, of P items the p-th, the (P + p)-th and so on."""

    def __init__(self, targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int, device: torch.device, sides: int = 1):
        self.shape, self.targets = targets.shape, targets.reshape(-1)
        self.counts = self.targets != ignore_index
        self.cu_seqlens, self.device, self.sides = cu_seqlens, device, sides
        self.length = targets.shape[1] if cu_seqlens is None else 0
        self.sequences = targets.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.items = self.sequences // sides
        self.on_device = None if cu_seqlens is None else cu_seqlens.to(device, non_blocking=True)

    def lengths(self) -> Tensor:
        """How many tokens of each sequence count, [sequences]."""
        return _sums(self.counts.float().view(self.shape), None, self.on_device, None, None, 0, False)

    def whole(self) -> Chunk:
        """All items at once, with the rows that do not count."""
        return Chunk(rows_of((0, len(self.targets))), 0, self.items, self.on_device, self.counts)

    def chunks(self, head: Head, chunk_bytes: int, needs: int) -> list[Chunk]:
        """Chunks of whole items that fit, or of one item; of all, where their ends are for the device to know."""
        if self.device.type == "cpu":
            return self.compact_chunks(rows_that_fit(head, int(self.counts.sum()), chunk_bytes, needs))
        limit = rows_that_fit(head, len(self.targets), chunk_bytes, needs)
        if self.cu_seqlens is None or self.cu_seqlens.is_cpu:
            return self.full_chunks(limit)
        return [self.whole()] if len(self.targets) else []

    def full_chunks(self, limit: int) -> list[Chunk]:
        """With the rows that do not count: how many there are is for the device to know."""
        items, packed = self.items, self.cu_seqlens is not None
        ends = self.cu_seqlens.tolist() if self.cu_seqlens is not None else [self.length * i for i in range(self.sequences + 1)]
        firsts = range(0, self.sides * items, items) if items else ()
        sizes = [sum(ends[first + i + 1] - ends[first + i] for first in firsts) for i in range(items)]
        chunks = []
        for begin, end in share_out(sizes, limit):
            ranges = [(ends[first + begin], ends[first + end]) for first in firsts]
            rows = rows_of(*ranges)
            cu = None
            if packed and self.on_device is not None:
                parts, held = [self.on_device.new_zeros(1)], 0
                for first, (start, stop) in zip(firsts, ranges, strict=True):
                    parts.append(self.on_device[first + begin + 1 : first + end + 1] - (start - held))
                    held += stop - start
                cu = torch.cat(parts)
            chunks.append(Chunk(rows, begin, end, cu, rows.take(self.counts)))
        return chunks

    def compact_chunks(self, limit: int) -> list[Chunk]:
        """On the CPU rows that do not count leave before the GEMM."""
        items = self.items
        active = self.counts.nonzero().squeeze(1)
        if self.cu_seqlens is None:
            counts = self.counts.view(self.shape).sum(1)
        else:
            before = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
            counts = before[self.cu_seqlens.long()].diff()
        ends = [0, *accumulate(counts.tolist())]
        sizes = counts.view(self.sides, items).sum(0).tolist()
        chunks = []
        for begin, end in share_out(sizes, limit):
            sides = [(side * items + begin, side * items + end) for side in range(self.sides)]
            index = torch.cat([active[ends[first] : ends[last]] for first, last in sides])
            lengths = torch.cat([counts[first:last] for first, last in sides])
            cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
            chunks.append(Chunk(rows_at(index), begin, end, cu))
        return chunks

    def active(self) -> Tensor | None:
        """Where rows count, on the CPU; what a device knows nobody waits for."""
        return self.counts.nonzero().squeeze(1) if self.device.type == "cpu" else None

    def row_chunks(self, head: Head, chunk_bytes: int, needs: int) -> list[Chunk]:
        """Chunks of any rows, of about equal size; on the CPU of those that count."""
        active = self.active()
        total = len(self.targets) if active is None else len(active)
        parts = -(-total // rows_that_fit(head, total, chunk_bytes, needs))
        ends = [total * k // parts for k in range(parts + 1)] if parts else [0]
        return [Chunk(rows_of((a, b)) if active is None else rows_at(active[a:b])) for a, b in pairwise(ends)]

    def sums(self, chunk: Chunk, logp: Tensor, minus: Tensor | None) -> Tensor:
        """Sums over each sequence of a chunk of log-probs, less those of ``minus`` [N] if there are any."""
        shape = (self.sides * (chunk.end - chunk.begin), self.length) if chunk.cu_seqlens is None else (-1,)
        reference = None if minus is None else chunk.rows.take(minus).view(shape)
        counts = None if chunk.counts is None or reference is None else chunk.counts.view(shape)
        return _sums(logp.view(shape), counts, chunk.cu_seqlens, reference, None, 0, False)

    def spread(self, chunk: Chunk, values: Tensor) -> Tensor:
        """A number for each sequence of a chunk as one for each row."""
        if chunk.cu_seqlens is None:
            return values.unsqueeze(1).expand(-1, self.length).reshape(-1)
        return values.repeat_interleave(chunk.cu_seqlens.diff(), output_size=chunk.rows.total)
