"""``linear_logprobs(..., group=)``: each process of a group holds a range of the vocabulary's rows of the head.

Every process folds its own columns into 7 numbers per row (``csrc/logprobs/linear_shard.cpp``), one all-gather brings them to
all, and each joins them in the order of the ranks: equal bits everywhere. Nothing of N x V elements exists on any process.

Messages, for N rows, hidden size H and R processes:

- forward: one all-gather in which each process gives 28 N + 28 bytes (float64: twice that);
- backward: one all-reduce of 4 N H bytes, the hidden gradient in float32, if hidden requires a gradient;
- where the ranges are not given by the caller, one all-gather of 56 bytes before the forward, which the host waits for.

Which of them are sent follows from the arguments, never from what a process remembers of earlier calls, so no process can wait
for a message that another believes it can do without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import _linear_shard, logprobs, validation
from ..ops._arguments import accumulator, check_tensors, integer, is_dtensor, number, positive_int
from ..ops._call import call
from ..ops.types import LinearLogprobs
from ._ranks import ProcessGroup, Ranks, attempt, checksum, device_for, looks, ranks_of
from .gathered import Gradient, whole

_OPS = torch.ops.prefkern
_shard, _merge = _OPS.linear_shard.default, _OPS.merge_linear_shards.default
_shard_backward = _OPS.linear_shard_backward.default


class VocabShard(NamedTuple):
    """Where the rows of a process lie: those of tokens ``[offset, offset + V_r)`` of a vocabulary of ``vocab``."""

    offset: int
    vocab: int


def vocab_shard(weight: Tensor, group: ProcessGroup, *, vocab: int | None = None) -> VocabShard:
    """The range of the vocabulary that this process's ``weight`` ``[V_r, H]`` is, where the processes of ``group`` hold the
    ranges one after the other, in the order of their ranks.

    A collective call: every process of the group makes it, once, and then passes ``vocab_offset=shard.offset,
    vocab=shard.vocab`` to :func:`prefkern.linear_logprobs`, which then sends one message in the forward.

    Args:
        weight: ``[V_r, H]``, V_r may differ from process to process and be 0. A DTensor in ``Shard(0)`` says itself where its
            rows lie, and nothing is sent; :func:`prefkern.linear_logprobs` takes it as it is.
        group: the process group, or ``"world"``.
        vocab: V, if it is known: ranges that do not sum to it are an error, on every process.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
        RuntimeError: on the others, where one process refuses its arguments.
    """
    ranks = ranks_of(group, "group")

    def rows() -> int:
        check_tensors(weight=weight)
        if weight.ndim != 2:
            raise ValueError(f"weight has shape {list(weight.shape)}; expected [V_r, H]")
        _given(None, vocab)
        return weight.shape[0]

    columns, refusal = attempt(rows)
    if ranks is not None and columns is not None and is_dtensor(weight):
        shard = _placed(weight, ranks)
        if shard is None:
            raise ValueError(
                f"weight is a DTensor placed as {list(cast(Any, weight).placements)}; a range is one in [Shard(0)]"
            )
        if vocab not in (None, shard.vocab):
            raise ValueError(f"weight is a DTensor of {shard.vocab} rows; vocab is {vocab}")
        return shard
    text, said = f"vocab {vocab}", (columns or 0, 0, refusal)
    heads = [_head(text, *said)]
    if ranks is not None:
        heads = ranks.gather(torch.tensor(heads[0], device=device_for(weight, ranks))).tolist()
    rank = 0 if ranks is None else ranks.rank
    _check_heads(heads, rank, text, refusal)
    return _range_of(heads, rank, vocab)


# ---- the call ---------------------------------------------------------------------------------------------------------


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup,
    vocab_offset: int | None = None,
    vocab: int | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> LinearLogprobs:
    """See :func:`prefkern.linear_logprobs`, which comes here for ``group=`` and for DTensors."""
    if torch.compiler.is_compiling():
        raise RuntimeError("linear_logprobs with group= cannot be compiled: its messages are those of eager torch.distributed")
    for name, t in (("hidden", hidden), ("targets", targets)):
        if is_dtensor(t):
            raise TypeError(f"{name} is a DTensor; pass the rows of this process, {name}.to_local()")
    if group is None and (vocab_offset is not None or vocab is not None):
        raise ValueError(f"vocab_offset is {vocab_offset} and vocab is {vocab} but group is None; they say where a range lies")
    ranks = ranks_of(group, "group")
    given = _given(vocab_offset, vocab)
    if is_dtensor(weight):
        # Its layout is the same on all ranks, and so is what is wrong with it.
        shard = None if ranks is None else _placed(weight, ranks)
        if ranks is None or shard is None:
            if given is not None:
                raise ValueError("vocab_offset is given, but weight is a DTensor that is not placed as [Shard(0)], so no range")
            gradient: Gradient = "mean" if group is None else "same"
            bias = None if bias is None else whole(bias, gradient)
            return logprobs.linear_logprobs(hidden, whole(weight, gradient), targets, bias=bias, **options)
        if given not in (None, shard) or vocab not in (None, shard.vocab):
            raise ValueError(f"vocab_offset is {vocab_offset} and vocab is {vocab}, but weight is a DTensor: {shard}")
        given, weight = shard, cast(Any, weight).to_local()
        if bias is not None and is_dtensor(bias):  # each rank has the gradient of its own range
            bias = whole(bias, "sum").narrow(0, shard.offset, weight.shape[0])
    elif ranks is None:  # a group of this process alone
        if vocab is not None and isinstance(weight, Tensor) and (given or (0, vocab)) != (0, weight.shape[0]):
            rows = weight.shape[0]
            raise ValueError(
                f"vocab_offset is {vocab_offset} and vocab is {vocab}; group has one process, whose weight has {rows} rows"
            )
        return logprobs.linear_logprobs(hidden, weight, targets, bias=bias, **options)
    return _of_ranges(hidden, weight, targets, bias, ranks, given, vocab, options)


def _of_ranges(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ranks: Ranks, given: VocabShard | None,
    vocab: int | None, options: dict[str, Any],
) -> LinearLogprobs:  # fmt: skip
    p, refusal = attempt(lambda: _prepare(hidden, weight, targets, vocab, bias, **options))
    shard = given
    if given is None or validation():
        head = _head(p.text if p else "", p.weight.shape[0] if p else 0, given.offset if given else 0, refusal)
        heads = ranks.gather(torch.tensor(head, device=device_for(hidden, ranks))).tolist()
        _check_heads(heads, ranks.rank, p.text if p else "", refusal)
        shard = _range_of(heads, ranks.rank, vocab)
        if given is not None:
            _check_offsets(heads, given.vocab)
    if p is None or shard is None:
        # Ranges are given, so the others wait for the one message there is; where nobody knows how long it is, for the timeout.
        if isinstance(targets, Tensor) and isinstance(hidden, Tensor) and hidden.is_floating_point():
            state = torch.zeros(_linear_shard.STATE_ARRAYS * targets.numel(), dtype=accumulator(hidden), device=hidden.device)
            ranks.gather(torch.cat([state, state.new_tensor(_head("", 0, 0, refusal))]))
        raise refusal or AssertionError
    if p.hidden.is_cuda:
        logprobs._validate(p.targets, options.get("temperature", 1.0), shard.vocab, p.options[-1])
    run: Any = _VocabParallel.apply if p.trains else _forward
    out = run(p.hidden, p.weight, p.targets, p.bias, p.row_temperature, *p.options, p.bits, p.chunk, shard, ranks, p.text)
    return logprobs._result(out, p.bits & ~logprobs._SAVE_STATS, p.shape)


@dataclass(frozen=True)
class _Call:
    """The checked arguments, flattened to rows."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    row_temperature: Tensor | None
    options: tuple[float, float, float, int]
    bits: int
    chunk: int
    shape: torch.Size
    trains: bool
    text: str  # what all ranks must agree on


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int | None,
    bias: Tensor | None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Iterable[str] = (),
    chunk_bytes: int | None = None,
    keep: Any = None,
    lora: Any = None,
    logits_dtype: str | None = None,
) -> _Call:
    for name, given in (("keep", keep), ("lora", lora), ("logits_dtype", None if logits_dtype == "float32" else logits_dtype)):
        if given is not None:
            raise ValueError(f"{name} is given together with group; a vocabulary over several processes does not take it")
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        check_tensors(bias=bias)
    bits = logprobs._output_bits(outputs)
    shape = targets.shape
    if hidden.ndim == 0:
        raise ValueError("hidden has shape []; [..., H] is expected")
    if hidden.shape[:-1] != shape:
        raise ValueError(
            f"targets has shape {list(shape)}; hidden has shape {list(hidden.shape)}, so {list(hidden.shape[:-1])} is expected"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected [V_r, {hidden.shape[-1]}], the H of hidden")
    tau, row_temperature = logprobs._split_temperature(temperature, shape)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = logprobs._autocast(hidden, weight)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden has dtype {hidden.dtype} and weight {weight.dtype}; they must be equal")
    options = (
        tau,
        logprobs._softcap(softcap),
        number("logit_scale", logit_scale),
        integer("ignore_index", ignore_index),
    )
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    # The gradient of hidden is reduced over the ranks: all must want it, or none. Those of weight and bias are each rank's own.
    reduces = torch.is_grad_enabled() and hidden.requires_grad
    text = (
        f"targets {list(shape)}, hidden {hidden.dtype} {list(hidden.shape)} with{'' if reduces else 'out'} a gradient, "
        f"outputs {bits:#b}, temperature, softcap, logit_scale and ignore_index {options}, vocab {vocab}"
    )
    if looks(hidden):  # the rows are to be the same on all ranks: so are these sums, which wrap around
        places = torch.arange(1, targets.numel() + 1, device=targets.device)
        text += f", targets that sum to {int((targets.reshape(-1).long() * places).sum())}"
        if row_temperature is not None:
            text += f", temperatures that sum to {float(row_temperature.double().sum())}"
    return _Call(
        hidden.reshape(targets.numel(), hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        row_temperature,
        options,
        bits | logprobs._SAVE_STATS if trains else bits,
        0 if chunk_bytes is None else positive_int("chunk_bytes", chunk_bytes),
        shape,
        trains,
        text,
    )


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, row_temperature: Tensor | None, tau: float,
    softcap: float, logit_scale: float, ignore_index: int, bits: int, chunk: int, shard: VocabShard, ranks: Ranks, text: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """logp, entropy, lse, sum_sq_probs, mean_logit, is_top1 and the statistics of the backward, equal on all ranks."""
    options = (tau, softcap, logit_scale, ignore_index)
    size = (_linear_shard.STATE_ARRAYS, targets.numel())
    state, refusal = attempt(
        lambda: call(_shard, hidden, weight, targets, bias, row_temperature, *options, bits, chunk, *shard)
    )
    if state is None:
        state = torch.zeros(size, dtype=accumulator(hidden), device=hidden.device)
    head = torch.tensor(_head(text, weight.shape[0], shard.offset, refusal), dtype=state.dtype)
    gathered = ranks.gather(torch.cat([state.view(-1), head.to(state.device, non_blocking=True)]))
    states, heads = gathered[:, : state.numel()].view(ranks.size, *size), gathered[:, state.numel() :]
    if looks(hidden):
        listed = [[int(x) for x in row] for row in heads.tolist()]
        _check_heads(listed, ranks.rank, text, refusal)
        _check_offsets(listed, shard.vocab)
    elif refusal is not None:
        raise refusal
    else:  # without waiting for the device: every row turns NaN
        well = (heads[:, 0] == 0).all() & (heads[:, 1:3] == heads[:1, 1:3]).all()
        states += torch.where(well, 0.0, torch.nan).to(state.dtype)
    out: tuple[Tensor, ...] = call(_merge, states, targets, row_temperature, *options, bits, shard.vocab)
    return out


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        hidden, weight, targets, bias, row_temperature, *options, bits, chunk, shard, ranks, _ = inputs
        output = _forward(*inputs)
        ctx.save_for_backward(hidden, weight, targets, bias, row_temperature, output[1], output[6])
        ctx.options, ctx.chunk, ctx.shard, ctx.ranks = options, chunk, shard, ranks
        logprobs._mark_outputs(ctx, output, bits)
        return output

    @staticmethod
    def backward(ctx: Any, g_logp: Any, g_entropy: Any, g_lse: Any, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, row_temperature, entropy, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = needs[0] * logprobs._GRAD_HIDDEN + needs[1] * logprobs._GRAD_WEIGHT + needs[3] * logprobs._GRAD_BIAS
        d_hidden = d_weight = d_bias = None
        if g_logp is not None or g_entropy is not None or g_lse is not None:
            args = (g_logp, g_entropy, g_lse, hidden, weight, targets, bias, row_temperature, entropy, stats, *ctx.options)
            d_hidden, d_weight, d_bias = call(_shard_backward, *args, wanted, ctx.chunk, *ctx.shard)
        elif needs[0]:  # nothing comes to this rank, but the others reduce all the same
            d_hidden = torch.zeros(hidden.shape, dtype=accumulator(hidden), device=hidden.device)
        if needs[0] and d_hidden is not None:
            if d_hidden.numel() > 0:
                with torch.no_grad():  # in place; a second derivative is refused by the op that made it
                    ctx.ranks.reduce(d_hidden)
            d_hidden = d_hidden.to(hidden.dtype)
        return (
            d_hidden if needs[0] else None,
            d_weight if needs[1] else None,
            None,
            d_bias if needs[3] else None,
            *(None,) * 10,
        )


# ---- ranks, and what they say of themselves ---------------------------------------------------------------------------


def _placed(weight: Any, ranks: Ranks) -> VocabShard | None:
    """The range that this process has of a DTensor in Shard(0) over the ranks; None for other placements."""
    from torch.distributed.tensor import Shard

    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"weight is a DTensor on a mesh of {mesh.ndim} dimensions; with group= one of 1 dimension is expected, "
            "or a plain tensor: weight.to_local(), where that is this process's range"
        )
    members = dist.get_process_group_ranks(ranks.group)
    if mesh.mesh.tolist() != members:
        raise ValueError(f"weight is a DTensor on ranks {mesh.mesh.tolist()}, and group has {members}; they must be the same")
    if weight.ndim != 2 or weight.placements != (Shard(0),):
        return None
    vocab = weight.shape[0]
    step = -(-vocab // ranks.size)  # as torch.chunk cuts
    return VocabShard(min(ranks.rank * step, vocab), vocab)


def _given(vocab_offset: Any, vocab: Any) -> VocabShard | None:
    """The range, if the caller says it."""
    if vocab is not None and integer("vocab", vocab) <= 0:
        raise ValueError(f"vocab is {vocab}; it must be positive, or None")
    if vocab_offset is None:
        return None
    if vocab is None:
        raise ValueError(f"vocab_offset is {vocab_offset} but vocab is None; give both, or none to have them gathered")
    if integer("vocab_offset", vocab_offset) < 0:
        raise ValueError(f"vocab_offset is {vocab_offset}; it must not be negative")
    return VocabShard(int(vocab_offset), int(vocab))


_HALF = 1 << 16


def _head(text: str, columns: int, offset: int, refusal: Exception | None) -> list[int]:
    """What a rank says of itself: whether it refuses its arguments, a checksum of what all must agree on, its range. In numbers
    that a float32 holds."""
    return [int(refusal is not None), *(x for n in (checksum(text), columns, offset) for x in divmod(n, _HALF))]


def _check_heads(heads: list[list[int]], rank: int, text: str, refusal: Exception | None) -> None:
    """Raises on every rank if one refuses, or if they do not agree."""
    if refusal is not None:
        raise refusal
    refused = [other for other, head in enumerate(heads) if head[0]]
    if refused:
        raise RuntimeError(f"rank {refused[0]} of group refuses its arguments; its own error says why")
    unlike = [other for other, head in enumerate(heads) if head[1:3] != heads[rank][1:3]]
    if unlike:
        raise ValueError(f"the ranks of group disagree: rank {rank} has {text}; rank {unlike[0]} has something else")


def _ranges(heads: list[list[int]]) -> tuple[list[int], list[int]]:
    """Columns and offsets by rank."""
    return [head[3] * _HALF + head[4] for head in heads], [head[5] * _HALF + head[6] for head in heads]


def _range_of(heads: list[list[int]], rank: int, vocab: int | None) -> VocabShard:
    sizes, _ = _ranges(heads)
    total = sum(sizes)
    if vocab is not None and total != vocab:
        raise ValueError(f"weight has {sizes} rows on the ranks of group, {total} in all; vocab is {vocab}")
    if total == 0:
        raise ValueError("weight has no rows on any rank of group; a vocabulary needs at least one token")
    return VocabShard(sum(sizes[:rank]), total)


def _check_offsets(heads: list[list[int]], vocab: int) -> None:
    """Given ranges must lie one after the other and make up the vocabulary."""
    sizes, offsets = _ranges(heads)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    if offsets != [0, *ends[:-1]] or ends[-1] != vocab:
        ranges = ", ".join(f"[{a}, {b})" for a, b in zip(offsets, ends, strict=True))
        raise ValueError(
            f"vocab_offset and weight make the ranges {ranges} on the ranks of group; "
            f"they must follow one another from 0 to vocab = {vocab}"
        )
