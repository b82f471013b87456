"""What everything here is sent by: rows gathered from all ranks, and numbers summed over them, in one message each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._names import choice
from ..ops._arguments import accumulator, check_tensors
from ._ranks import (
    HEAD,
    ProcessGroup,
    Ranks,
    all_well,
    attempt,
    check_heads,
    checksum,
    describe,
    device_for,
    head,
    looks,
    ranks_of,
)

GRADIENTS = ("sum", "mean")
SUM_SLOT = 512
"""Numbers of the first message of a sum, its head among them: 4096 bytes."""
GATHER_SLOT = 4096
"""Bytes of a rank's message that rows are gathered by, at first."""
GATHER_HEAD = 512
"""Of which what a rank says of them: numbers, then text."""

_NUMBERS = 64  # bytes: checksum, rows, bytes, whether it refuses
_ALIGN = 8
_slots: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


class GatheredRows(NamedTuple):
    """Rows of all ranks, in the order of the ranks."""

    tensors: dict[str, Tensor]
    own: slice
    """Which of them are this rank's."""


def gather_rows(rows: Mapping[str, Tensor | None], *, process_group: ProcessGroup, agree: str = "") -> GatheredRows:
    r"""The rows that all ranks hold, of several tensors, on every rank, in one all-gather.

    What compares rows that lie on different ranks is then computed as one process would, on every rank alike, and each
    takes its own of the result:

        rows = gather_rows({"rewards": rewards, "group": group}, process_group="world")
        advantages = ngrpo_advantages(rows.tensors["rewards"], rows.tensors["group"])[rows.own]

    Args:
        rows: tensors ``[B, ...]`` by name, of any dtypes, on one device; B may differ from rank to rank and be 0. What is None
            is left out. Constants: no gradient flows back.
        process_group: ``"world"``, a group of `torch.distributed`, or None: the rows as they are.
        agree: what all ranks must say alike: the options of what follows.

    Returns:
        GatheredRows(tensors ``[sum of B, ...]``, own).

    A rank's message has a fixed size, the same on all ranks: 4096 bytes, of which 512 say what it holds. If that of one is too
    small, all see it, send again with the next power of two that is large enough, and go on with that size: one message a call
    but for the first with more rows than ever. On CUDA a call waits for the device once, to learn how many rows there are.

    Raises:
        ValueError, TypeError: naming the argument. Ranks that disagree in names, dtypes, shapes but for B, or `agree`: on every
            rank.
        RuntimeError: on the other ranks, where one refuses its arguments.
    """
    ranks = ranks_of(process_group)
    local, refusal = attempt(lambda: _checked_rows(rows))
    if ranks is None:
        if local is None:
            raise refusal or AssertionError
        return GatheredRows(local, slice(0, _rows(local)))
    first = next((t for t in rows.values() if isinstance(t, Tensor)), None) if isinstance(rows, Mapping) else None
    return exchange_rows(local, ranks, "gather_rows", agree, refusal, device_for(first, ranks))


def exchange_rows(
    rows: dict[str, Tensor] | None, ranks: Ranks, what: str, agree: str, refusal: Exception | None, device: torch.device
) -> GatheredRows:
    """`gather_rows` of checked rows, or of the reason why there are none."""
    if rows is None:
        saying, payload, count = f"{type(refusal).__name__}: {refusal}", torch.empty(0, dtype=torch.uint8, device=device), 0
    else:
        saying = "; ".join(["call=" + what, *(_kind(name, t) for name, t in rows.items()), *([agree] if agree else [])])
        payload, count = _packed(rows), _rows(rows)
    text = saying.encode()[: GATHER_HEAD - _NUMBERS].ljust(GATHER_HEAD - _NUMBERS, b"\0")
    numbers = torch.tensor([checksum(saying), count, len(payload), int(refusal is not None), 0, 0, 0, 0])
    start = torch.cat([numbers.view(torch.uint8), torch.frombuffer(bytearray(text), dtype=torch.uint8)]).to(device)

    slot = _slots.get(ranks.group, GATHER_SLOT)
    received = ranks.gather(_filled(slot, start, payload))
    said = received[:, :_NUMBERS].contiguous().view(torch.int64).tolist()
    if refusal is not None:
        raise refusal
    for rank, (_, _, _, refuses, *_) in enumerate(said):
        if refuses:
            raise RuntimeError(f"{what}: rank {rank} of process_group refuses its arguments: {_text(received, rank)}")
    for rank, (other, *_) in enumerate(said):
        if other != said[0][0]:
            raise ValueError(f"{what}: {_difference(_text(received, 0), _text(received, rank), rank)}")
    most = max(size for _, _, size, *_ in said) + GATHER_HEAD
    if most > slot:
        slot = _slots[ranks.group] = 1 << (most - 1).bit_length()
        received = ranks.gather(_filled(slot, start, payload))
    assert rows is not None
    counts = [n for _, n, *_ in said]
    before = sum(counts[: ranks.rank])
    return GatheredRows(_unpacked(received, counts, rows), slice(before, before + count))


def packed_sum(*tensors: Tensor, process_group: ProcessGroup, gradient: Literal["sum", "mean"] = "sum") -> tuple[Tensor, ...]:
    r"""Sums over ranks of several small tensors, in one all-reduce.

    Args:
        tensors: of the same shapes and dtypes on every rank; floating, or int64 or int32, on one device.
        process_group: ``"world"``, a group of `torch.distributed`, or None: the tensors as they are.
        gradient: what the gradient of a local tensor is. Every rank is taken to compute the same loss of the sums, so that the
            gradient with respect to a sum is already the whole one on each, and backward sends nothing. ``"sum"``: it is passed
            on as it is, to the part of each rank; gradients of parameters that all ranks share, **summed** over ranks, are
            then those of one process. ``"mean"``: it is multiplied by the number of ranks, for trainers that **average**
            gradients over these ranks, as DDP and FSDP do.

    Returns:
        A tuple of sums, shaped like the tensors: int64 of integers (exact below 2^53), else float32, or float64 for float64.
        Added in double, so that sums of float32 differ from those of one process by a rounding. Equal on all ranks.

    Up to 504 numbers are one message of 4096 bytes, whatever they are; the others follow in a second.

    Raises:
        ValueError, TypeError: naming the argument. Ranks whose tensors differ in shape or dtype: on every rank; on CUDA,
            without `prefkern.set_validation(True)`, the sums come out NaN (integers: -1).
        RuntimeError: on the other ranks, where one refuses its arguments.
    """
    ranks = ranks_of(process_group)
    return sum_of(lambda: tensors, ranks, "packed_sum", gradient, tensors[0] if tensors else None)


def sum_of(
    make: Callable[[], Sequence[Tensor]], ranks: Ranks | None, what: str, gradient: str = "sum", like: Any = None
) -> tuple[Tensor, ...]:
    """`packed_sum` of what `make` returns. If that raises, all ranks raise."""

    def checked() -> list[Tensor]:
        choice("gradient", gradient, GRADIENTS)
        return _checked_terms(make())

    if ranks is None:
        return tuple(t.to(_sum_dtype(t)) for t in checked())
    terms, refusal = attempt(checked)
    if terms is None:
        nothing = torch.empty(0, dtype=torch.float64, device=device_for(like, ranks))
        _reduced(nothing, ranks, what, "", refusal)
        raise refusal or AssertionError
    text = f"{what} of {describe(**{f'tensor {i}': t for i, t in enumerate(terms)})}, gradient {gradient}"
    flat = torch.cat([t.reshape(-1).to(torch.float64) for t in terms])
    total = _SumOverRanks.apply(flat, ranks, what, text, ranks.size if gradient == "mean" else 1)
    parts = total.split([t.numel() for t in terms])
    return tuple(_cast(part.view(t.shape), _sum_dtype(t)) for part, t in zip(parts, terms, strict=True))


def global_count(mask: Tensor, *, process_group: ProcessGroup) -> Tensor:
    """How many elements of a mask are True on all ranks together: the number that a loss over the tokens of the whole batch
    is divided by. One all-reduce.

        norm = global_count(mask, process_group="world")
        loss = prefkern.policy_loss(logp, old_logp, advantages, mask, agg="token-mean", norm=norm).loss

    The gradients of such a loss, summed over ranks, are those of one process on the whole batch. A trainer that averages
    them over W ranks (DDP, FSDP) wants W times the loss, or ``norm / W``.

    Args:
        mask: bool, any shape, which may differ from rank to rank. Of labels, ``labels != -100``.
        process_group: ``"world"``, a group of `torch.distributed`, or None: the count of this process.

    Returns:
        int64, 0-d, on the device of the mask.

    Raises:
        TypeError: if `mask` is not a bool tensor. RuntimeError on the other ranks.
    """

    def count() -> list[Tensor]:
        check_tensors(mask=mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
        return [mask.sum()]

    return sum_of(count, ranks_of(process_group), "global_count", like=mask)[0]


# ---- sums ------------------------------------------------------------------------------------------------------------


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, ranks: Ranks, what: str, text: str, scale: int) -> Tensor:
        ctx.scale = scale
        return _reduced(flat, ranks, what, text, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.scale, None, None, None, None


def _reduced(flat: Tensor, ranks: Ranks, what: str, text: str, refusal: Exception | None) -> Tensor:
    first = flat[: SUM_SLOT - HEAD]
    slot = torch.cat([head(text, ranks, refusal, flat), first, first.new_zeros(SUM_SLOT - HEAD - len(first))])
    ranks.reduce(slot)
    if looks(slot):
        check_heads(slot, ranks, what, text, refusal)
    total = slot[HEAD : HEAD + len(first)]
    if len(flat) > len(first):
        total = torch.cat([total, ranks.reduce(flat[len(first) :].clone())])
    return total.clone() if looks(slot) else torch.where(all_well(slot, ranks), total, torch.nan)


def _cast(total: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return total.to(dtype)
    return total.detach().nan_to_num(nan=-1.0).round().to(dtype)


def _sum_dtype(t: Tensor) -> torch.dtype:
    return accumulator(t) if t.is_floating_point() else torch.int64


def _checked_terms(tensors: Sequence[Tensor]) -> list[Tensor]:
    if not tensors:
        raise ValueError("no tensors are given; at least one is expected")
    for i, t in enumerate(tensors):
        check_tensors(**{f"tensors[{i}]": t})
        if not t.is_floating_point() and t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tensors[{i}] has dtype {t.dtype}; accepted: floating, int64, int32")
        if t.device != tensors[0].device:
            raise ValueError(f"tensors[{i}] is on {t.device} but tensors[0] is on {tensors[0].device}")
    return list(tensors)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _checked_rows(rows: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    if not isinstance(rows, Mapping):
        raise TypeError(f"rows is a {type(rows).__name__}; a mapping from names to tensors is expected")
    given = {name: t for name, t in rows.items() if t is not None}
    if not given:
        raise ValueError("rows has no tensors; at least one is expected")
    check_tensors(**given)
    reference = next(iter(given))
    for name, t in given.items():
        if t.dim() == 0:
            raise ValueError(f"{name} has shape []; [B, ...] is expected")
        if len(t) != len(given[reference]):
            raise ValueError(f"{name} has {len(t)} rows but {reference} has {len(given[reference])}")
        if t.device != given[reference].device:
            raise ValueError(f"{name} is on {t.device} but {reference} is on {given[reference].device}")
    return {name: t.detach() for name, t in given.items()}


def _rows(rows: dict[str, Tensor]) -> int:
    return len(next(iter(rows.values())))


def _kind(name: str, t: Tensor) -> str:
    return f"{name}={str(t.dtype)[6:]} [{', '.join(['rows', *map(str, t.shape[1:])])}]"


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _packed(rows: dict[str, Tensor]) -> Tensor:
    """The bytes of all tensors, each from a multiple of 8 on, where any dtype may begin."""
    parts = []
    for t in rows.values():
        raw = t.contiguous().reshape(-1).view(torch.uint8)
        parts += [raw, raw.new_zeros(_padded(len(raw)) - len(raw))]
    return torch.cat(parts)


def _unpacked(received: Tensor, counts: list[int], like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in like}
    for message, count in zip(received, counts, strict=True):
        at = GATHER_HEAD
        for name, t in like.items():
            shape = (count, *t.shape[1:])
            size = torch.Size(shape).numel() * t.element_size()
            parts[name].append(message[at : at + size].view(t.dtype).view(shape))
            at += _padded(size)
    return {name: torch.cat(of_ranks) for name, of_ranks in parts.items()}


def _filled(slot: int, start: Tensor, payload: Tensor) -> Tensor:
    message = start.new_zeros(slot)
    message[:GATHER_HEAD] = start
    if GATHER_HEAD + len(payload) <= slot:
        message[GATHER_HEAD : GATHER_HEAD + len(payload)] = payload
    return message


def _text(received: Tensor, rank: int) -> str:
    return bytes(received[rank, _NUMBERS:GATHER_HEAD].tolist()).rstrip(b"\0").decode(errors="replace")


def _difference(first: str, other: str, rank: int) -> str:
    for ours, theirs in zip(first.split("; "), other.split("; "), strict=False):
        if ours != theirs:
            return f"ranks of process_group disagree: rank 0 has {ours}, rank {rank} has {theirs}"
    return f"ranks of process_group disagree: rank 0 and rank {rank} have different options"
