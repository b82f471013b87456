"""Losses straight from hidden states and a linear head, with the logits computed once.

The gradient is found in the forward, chunk by chunk (``_single_pass.py``), where the two-step form, ``linear_logprobs`` and a
loss, computes the logits a second time in the backward.
"""

from __future__ import annotations

import inspect
import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._names import nearest_hint
from . import preference
from ._arguments import accumulator, check_ends, check_layout, check_tensors, integer, number, positive_int, same_device
from ._call import call, validation
from ._single_pass import (
    GRAD_BIAS,
    GRAD_HIDDEN,
    GRAD_WEIGHT,
    Head,
    Rows,
    Stored,
    differentiated_once,
    rows_of,
    rows_that_fit,
    share_out,
    single_pass,
)
from .logprobs import _SAVE_STATS, _autocast, _softcap, _split_temperature, _validate
from .types import LossOutput

_OPS = torch.ops.prefkern
_loss = _OPS.linear_preference_loss.default
_linear_fwd, _linear_backward = _OPS.linear_logprobs_fwd.default, _OPS.linear_logprobs_backward.default
_pair_loss, _sums = _OPS.preference_loss_fwd.default, _OPS.sequence_reduce_fwd.default
_BITS = (GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS)

# What preference_loss is told by name: all but the log-probs and their lengths, which come from the head; two names that the
# head and the tokens have already are told apart.
_RENAMED = {"weight": "pair_weight", "mask": "pair_mask"}
_FROM_HEAD = ("chosen_logp", "rejected_logp", "chosen_lengths", "rejected_lengths")
_DEFAULTS = {
    _RENAMED.get(name, name): parameter.default
    for name, parameter in inspect.signature(preference.preference_loss).parameters.items()
    if name not in _FROM_HEAD
}
_METRICS = len(preference.METRICS)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    sft_weight: float = 0.0,
    chunk_bytes: int | None = None,
    **options: Any,
) -> LossOutput:
    r"""The loss of P preference pairs straight from hidden states: :func:`linear_logprobs`, :func:`sequence_sum` and
    :func:`preference_loss` in one, with the logits computed once.

    The result is that of these three, to rounding. They take 4 GEMMs of 2 N V H flops (the backward computes the logits again);
    this takes 3, 2 with a frozen head and 1 where nothing needs a gradient, because the gradient is found in the forward, while
    the logits of a chunk of whole pairs are at hand. The backward multiplies it by that of the loss.

    Args:
        hidden: ``[2P, T, H]``, the chosen responses first, then the rejected ones (TRL's concatenated layout), or packed
            ``[N, H]`` with ``cu_seqlens``. dtypes as for :func:`linear_logprobs`.
        weight: ``[V, H]``. bias: ``[V]`` or None.
        targets: ``[2P, T]`` or ``[N]`` int64 or int32: the token that each hidden state predicts, or ``ignore_index``.
        mask: bool, shaped like ``targets``; True counts. None: all but ``ignore_index`` count. What does not count is never
            looked at, and on the CPU costs nothing.
        cu_seqlens: int32 ``[2P + 1]``, where packed responses begin and end. On CUDA it is best left on the CPU: chunks of
            whole pairs cannot be planned without knowing it. From one on the GPU, a batch that does not fit ``chunk_bytes``
            takes 4 GEMMs, as the three functions would.
        ref_logp: log-probs of the tokens under the reference model, shaped like ``targets``; subtracted per token. Or else
            ``ref_chosen_logp`` and ``ref_rejected_logp``, ``[P]`` sums. Neither: no reference.
        temperature, softcap, logit_scale: as for :func:`linear_logprobs`.
        sft_weight: adds so much of the negative log-likelihood of the chosen responses, the mean over all their tokens that
            count (ORPO, CPO, RPO).
        chunk_bytes: what the logits of a chunk and what goes with them may take; None for the default. A chunk holds at least
            one pair. Results do not depend on it beyond rounding.
        options: those of :func:`preference_loss`, of the same meaning and with the same defaults: ``kind``, ``beta``,
            ``score``, ``average`` (lengths are known here), ``offset``, ``label_smoothing``, ``scale``, ``reduction``,
            ``norm``, ... Its ``weight`` is ``pair_weight`` here and its ``mask`` ``pair_mask``; responses of pairs outside the
            latter are not looked at, by ``sft_weight`` neither. ``reduction="none"`` is refused: the upstream gradient of each
            pair is not known in the forward.

    Returns:
        LossOutput(loss, metrics), as of :func:`preference_loss`, and with ``sft_weight`` the metric ``nll``. Gradients flow to
        hidden, weight and bias.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Memory: the logits of a chunk, and from the forward on the gradients themselves (float32 for a weight of lower precision as
    long as chunks are added to it). The backward hands them over; a second backward through the same loss is an error, unless
    the first was told ``retain_graph=True``.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    fixed = _pair_constants(options)
    pairs = _check_layout(hidden, targets, cu_seqlens) // 2
    for name in ("pair_weight", "pair_mask"):
        t = options.get(name)
        if t is not None and t.shape != (pairs,):
            raise ValueError(f"{name} has shape {list(t.shape)}; there are {pairs} pairs, so [{pairs}] is expected")
    ignore_index = integer("ignore_index", ignore_index)
    targets, reference = _tokens(targets, mask, ref_logp, ignore_index)
    if reference is not None and (fixed[0] is not None or fixed[1] is not None):
        raise ValueError("ref_logp and ref_chosen_logp or ref_rejected_logp are given; one kind of reference is expected")
    if hidden.is_cuda:
        _validate(targets, temperature, weight.shape[0], ignore_index)
    tau, row_temperature = _split_temperature(temperature, targets.shape)
    head_options = (tau, _softcap(softcap), number("logit_scale", logit_scale), ignore_index)
    sft_weight = number("sft_weight", sft_weight)
    if not math.isfinite(sft_weight):
        raise ValueError(f"sft_weight is {sft_weight}; it must be finite")
    chunk = 0 if chunk_bytes is None else positive_int("chunk_bytes", chunk_bytes)
    if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = _autocast(hidden, weight)
    hidden = hidden.reshape(targets.numel(), hidden.shape[-1])
    needs = _needs(hidden, weight, bias) if torch.is_grad_enabled() else 0
    args = (targets, cu_seqlens, row_temperature, reference, *fixed, *head_options, sft_weight, needs, chunk)
    if needs and not torch.compiler.is_compiling():
        loss, metrics = call(_LinearPreferenceLoss.apply, hidden, weight, bias, args)
    else:
        loss, metrics, *_ = call(_loss, hidden, weight, *args[:2], bias, *args[2:])
    named = dict(zip(preference.METRICS, metrics.unbind(0)[:_METRICS], strict=True))
    if sft_weight != 0:
        named["nll"] = metrics[_METRICS]
    return LossOutput(loss, named)


def _needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    if bias is not None:
        check_tensors(bias=bias)
    trained = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    return sum(bit for bit, wanted in zip(_BITS, trained, strict=True) if wanted)


def _tokens(targets: Tensor, mask: Tensor | None, ref_logp: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets as int64, ignore_index where a token does not count, and the reference's log-probs, flat."""
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
    return targets, None if ref_logp is None else ref_logp.detach().reshape(-1)


def _pair_constants(options: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of preference_loss's op behind the log-probs; lengths come later."""
    for name in options:
        if name not in _DEFAULTS:
            known = _RENAMED.get(name)
            if known:
                raise TypeError(f"{name!r} is not an argument here: {known!r} is what preference_loss calls {name!r}")
            if name in _FROM_HEAD:
                raise TypeError(f"{name!r} is not an argument here; it comes from the head and the tokens that count")
            raise TypeError(f"{name!r} is not an argument; accepted beside the head's: {', '.join(_DEFAULTS)}"
                            + nearest_hint(name, _DEFAULTS))  # fmt: skip
    given = {**_DEFAULTS, **options}
    if given["reduction"] == "none":
        raise ValueError("reduction is 'none'; accepted: 'mean', 'weighted_mean', 'sum'")
    for name, original in (("pair_weight", "weight"), ("pair_mask", "mask")):
        given[original] = given.pop(name)
        if given[original] is not None:
            check_tensors(**{name: given[original]})
    if given["mask"] is not None and given["mask"].dtype != torch.bool:
        raise TypeError(f"pair_mask has dtype {given['mask'].dtype}; accepted: bool")
    return preference.constants(*preference.pair_arguments(chosen_lengths=None, rejected_lengths=None, **given))


def _check_layout(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many responses there are."""
    expected = "[2P, T, H]" if cu_seqlens is None else "[N, H]"
    if hidden.ndim != (3 if cu_seqlens is None else 2):
        raise ValueError(f"hidden has shape {list(hidden.shape)}; {expected} is expected, or [N, H] with cu_seqlens")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {list(targets.shape)}; hidden has shape {list(hidden.shape)}, so "
            f"{list(hidden.shape[:-1])} is expected"
        )
    responses = hidden.shape[0]
    if cu_seqlens is not None:
        check_layout(cu_seqlens, targets, "targets")
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
            raise ValueError(
                f"cu_seqlens has dtype {cu_seqlens.dtype} and shape {list(cu_seqlens.shape)}; int32 [2P + 1] is expected"
            )
        if cu_seqlens.device != hidden.device and (not cu_seqlens.is_cpu or hidden.is_meta):
            raise ValueError(
                f"cu_seqlens is on {cu_seqlens.device} but hidden is on {hidden.device}; that device, or the CPU, is expected"
            )
        responses = len(cu_seqlens) - 1
    if responses % 2:
        raise ValueError(
            f"{'hidden' if cu_seqlens is None else 'cu_seqlens'} has {responses} responses; chosen and rejected ones, so an "
            "even number is expected"
        )
    return responses


# ---- pairs and their chunks ------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Whole pairs: their chosen responses, then their rejected ones, one row behind the other."""

    begin: int
    end: int
    """Pairs [begin, end)."""
    rows: Rows
    cu_seqlens: Tensor | None
    """int32 [2 (end - begin) + 1] on the device, or None: padded."""
    counts: Tensor | None
    """bool [rows], or None: all rows count."""


class _Pairs:
    """P pairs of a call: the sums of their responses as chunks deliver them, and the gradient of the loss in these."""

    def __init__(self, targets: Tensor, cu_seqlens: Tensor | None, ref_logp: Tensor | None, ignore_index: int, device: Any):
        self.targets, self.ref_logp = targets.reshape(-1), ref_logp
        self.counts = self.targets != ignore_index
        self.cu_seqlens, self.device = cu_seqlens, device
        self.length = targets.shape[1] if cu_seqlens is None else 0
        self.pairs = (targets.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1) // 2
        self.on_device = None if cu_seqlens is None else cu_seqlens.to(device, non_blocking=True)

    def lengths(self) -> Tensor:
        """How many tokens of each response count, [2P]."""
        shape = (2 * self.pairs, self.length) if self.cu_seqlens is None else (-1,)
        return _sums(self.counts.float().view(shape), None, self.on_device, None, None, 0, False)

    def whole(self) -> _Chunk:
        """All pairs at once, with the rows that do not count."""
        return _Chunk(0, self.pairs, rows_of((0, len(self.targets))), self.on_device, self.counts)

    def chunks(self, limit: int) -> list[_Chunk] | None:
        """Chunks of at most ``limit`` rows, or of a pair; None if that would have to wait for the device."""
        if self.device.type == "cpu":
            return self.compact_chunks(limit)
        if self.cu_seqlens is None or self.cu_seqlens.is_cpu:
            return self.full_chunks(limit)
        return [self.whole()] if len(self.targets) <= limit else None

    def full_chunks(self, limit: int) -> list[_Chunk]:
        """With the rows that do not count: how many there are is for the device to know."""
        pairs, packed = self.pairs, self.cu_seqlens is not None
        ends = self.cu_seqlens.tolist() if self.cu_seqlens is not None else [self.length * i for i in range(2 * pairs + 1)]
        sizes = [ends[p + 1] - ends[p] + ends[pairs + p + 1] - ends[pairs + p] for p in range(pairs)]
        chunks = []
        for begin, end in share_out(sizes, limit):
            rows = rows_of((ends[begin], ends[end]), (ends[pairs + begin], ends[pairs + end]))
            cu = None
            if packed and self.on_device is not None:
                chosen = self.on_device[begin : end + 1] - ends[begin]
                rejected = self.on_device[pairs + begin + 1 : pairs + end + 1] - (ends[pairs + begin] - ends[end] + ends[begin])
                cu = torch.cat([chosen, rejected])
            chunks.append(_Chunk(begin, end, rows, cu, rows.take(self.counts)))
        return chunks

    def compact_chunks(self, limit: int) -> list[_Chunk]:
        """On the CPU rows that do not count leave before the GEMM."""
        pairs = self.pairs
        active = self.counts.nonzero().squeeze(1)
        if self.cu_seqlens is None:
            counts = self.counts.view(2 * pairs, self.length).sum(1)
        else:
            before = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
            counts = before[self.cu_seqlens.long()].diff()
        ends = [0, *accumulate(counts.tolist())]
        sizes = (counts[:pairs] + counts[pairs:]).tolist()
        chunks = []
        for begin, end in share_out(sizes, limit):
            sides = ((begin, end), (pairs + begin, pairs + end))
            index = torch.cat([active[ends[first] : ends[last]] for first, last in sides])
            lengths = torch.cat([counts[first:last] for first, last in sides])
            cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
            chunks.append(_Chunk(begin, end, Rows(len(index), at=index), cu, None))
        return chunks

    def sums(self, chunk: _Chunk, logp: Tensor, minus: bool) -> Tensor:
        """Sums over each response of a chunk of log-probs, less the reference's if there is one, [2 pairs]."""
        shape = (2 * (chunk.end - chunk.begin), self.length) if chunk.cu_seqlens is None else (-1,)
        reference = chunk.rows.take(self.ref_logp).view(shape) if minus and self.ref_logp is not None else None
        counts = None if chunk.counts is None or reference is None else chunk.counts.view(shape)
        return _sums(logp.view(shape), counts, chunk.cu_seqlens, reference, None, 0, False)

    def spread(self, chunk: _Chunk, values: Tensor) -> Tensor:
        """A number for each response of a chunk, [2 pairs], as one for each row."""
        if chunk.cu_seqlens is None:
            return values.unsqueeze(1).expand(-1, self.length).reshape(-1)
        return values.repeat_interleave(chunk.cu_seqlens.diff(), output_size=chunk.rows.total)


class _Objective:
    """The loss in the sums of the responses. Chunks deliver these, and get the gradient in the log-probs of their tokens."""

    def __init__(self, pairs: _Pairs, fixed: list[Any], sft_weight: float, acc: torch.dtype, gain: float):
        self.pairs, self.fixed, self.sft_weight, self.gain = pairs, fixed, sft_weight, gain
        count, device = pairs.pairs, pairs.device
        self.sums = torch.zeros(2, count, dtype=acc, device=device)
        lengths = pairs.lengths() if fixed[16] or sft_weight else None
        if lengths is not None and fixed[16]:  # average
            fixed[3], fixed[4] = lengths[:count], lengths[count:]
        # The norm depends on no log-prob, so it is known before the first one; and whatever is wrong with the options too.
        *_, self.inverse_norm = _pair_loss(*self.sums, *fixed, False)
        if lengths is not None and sft_weight:
            tokens = lengths[:count].sum().to(acc)
            self.inverse_tokens = torch.where(tokens > 0, 1 / tokens, 0)
            self.chosen = torch.zeros(count, dtype=acc, device=device)

    def add(self, chunk: _Chunk, logp: Tensor) -> Tensor:
        """Take over a chunk's sums, [2, pairs]."""
        here = self.pairs.sums(chunk, logp, True).view(2, -1)
        self.sums[:, chunk.begin : chunk.end] = here
        if self.sft_weight:
            plain = here if self.pairs.ref_logp is None else self.pairs.sums(chunk, logp, False).view(2, -1)
            self.chosen[chunk.begin : chunk.end] = plain[0]
        return here

    def gradient(self, chunk: _Chunk, logp: Tensor) -> Tensor:
        here, count = self.add(chunk, logp), self.pairs.pairs
        own = [
            t[chunk.begin : chunk.end] if isinstance(t, Tensor) and t.ndim == 1 and len(t) == count else t for t in self.fixed
        ]
        _, _, grads, _ = _pair_loss(*here, *own, True)
        grads = grads * self.inverse_norm
        if self.sft_weight:
            grads[0] -= self.sft_weight * self.inverse_tokens
        return self.pairs.spread(chunk, (grads if self.gain == 1 else grads * self.gain).view(-1))

    def result(self) -> tuple[Tensor, Tensor]:
        """Loss and metrics of all pairs at once: the same bits as from the sums without chunks."""
        if validation():
            preference.validate_pairs(self.sums[0], self.sums[1], tuple(self.fixed))
        loss, metrics, *_ = _pair_loss(*self.sums, *self.fixed, False)
        nll = metrics.new_zeros(1)
        if self.sft_weight:
            nll = (-self.chosen.sum() * self.inverse_tokens).unsqueeze(0)
            loss = loss + self.sft_weight * nll[0]
        return loss, torch.cat([metrics, nll])


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None,
    row_temperature: Tensor | None, ref_logp: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op. Loss, metrics and gradients; what is not needed has no elements."""
    fixed, options, (sft_weight, needs, chunk_bytes) = list(rest[:-7]), rest[-7:-3], rest[-3:]
    ignore_index = options[3]
    _linear_fwd(hidden[:0], weight, targets.new_empty(0), bias, None, *options, 0, 0)  # for what it checks
    _check_targets(targets, weight.shape[0], ignore_index)
    if cu_seqlens is not None and cu_seqlens.is_cpu:
        check_ends(cu_seqlens, targets, "targets")
    pair_mask = fixed[preference.PAIR_TENSORS - 2]
    if pair_mask is not None:
        targets = _of_pairs(targets, cu_seqlens, pair_mask, ignore_index)
    pairs = _Pairs(targets, cu_seqlens, ref_logp, ignore_index, hidden.device)
    # float16 gradients would underflow without the loss scaling that comes later, so they stay float32 until the backward, and
    # what a GPU narrows on the way is scaled by a power of two.
    half = hidden.dtype == torch.float16
    gain = 2.0 ** (math.ceil(math.log2(max(pairs.pairs, 1))) + 4) if half else 1.0
    objective = _Objective(pairs, fixed, sft_weight, accumulator(hidden), gain)

    rows = (hidden, weight, pairs.targets, bias, row_temperature)
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if not needs:
        logp, *_ = _linear_fwd(*rows, *options, 0, chunk_bytes)
        objective.add(pairs.whole(), logp)
    else:
        head = Head(*rows, options)
        chunks = pairs.chunks(rows_that_fit(head, len(pairs.targets), chunk_bytes))
        if chunks is not None:
            of = chunks
            gradients = single_pass(
                head, [c.rows for c in of], lambda k, logp: objective.gradient(of[k], logp), needs, wide=half
            )
        else:  # as linear_logprobs and its backward: the logits are computed twice
            logp, entropy, *_, stats = _linear_fwd(*rows, *options, _SAVE_STATS, chunk_bytes)
            upstream = objective.gradient(pairs.whole(), logp)
            found = _linear_backward(upstream, None, None, *rows, entropy, stats, *options, needs, chunk_bytes)
            gradients = tuple(g if needs & bit else None for g, bit in zip(found, _BITS, strict=True))
    if half:
        gradients = tuple(None if g is None else g.float().mul_(1 / gain) for g in gradients)
    loss, metrics = objective.result()
    return loss, metrics, *(metrics.new_empty(0) if g is None else g for g in gradients)


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if not targets.is_cpu:
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"targets{at} is {int(targets[tuple(at)])}; accepted: 0 to {vocab - 1}, or ignore_index = {ignore_index}"
        )


def _of_pairs(targets: Tensor, cu_seqlens: Tensor | None, pair_mask: Tensor, ignore_index: int) -> Tensor:
    """Targets of which only those of pairs that count are left."""
    both = torch.cat([pair_mask, pair_mask])
    if cu_seqlens is None:
        return torch.where(both.unsqueeze(1), targets, ignore_index)
    ends = cu_seqlens.to(targets.device, non_blocking=True)
    return torch.where(both.repeat_interleave(ends.diff(), output_size=len(targets)), targets, ignore_index)


# ---- autograd and fake implementations -------------------------------------------------------------------------------

torch.library.impl("prefkern::linear_preference_loss", ("cpu", "cuda"), _forward)


@torch.library.register_fake("prefkern::linear_preference_loss")
def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    same_device("hidden", hidden, weight=weight, targets=targets, bias=bias)
    acc, needs = accumulator(hidden), rest[-2]
    stored = [acc if hidden.dtype == torch.float16 else t.dtype for t in (hidden, weight, hidden if bias is None else bias)]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = [
        hidden.new_empty(shape if needs & bit else (0,), dtype=dtype if needs & bit else acc)
        for shape, dtype, bit in zip(shapes, stored, _BITS, strict=True)
    ]
    return hidden.new_empty((), dtype=acc), hidden.new_empty(_METRICS + 1, dtype=acc), *gradients


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
    d_hidden, d_weight, d_bias = differentiated_once(tuple(gradients))
    return (d_hidden, d_weight, None, None, d_bias, *(None,) * (ctx.inputs - 5))


class _LinearPreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        loss, metrics, *gradients = _loss(hidden, weight, *args[:2], bias, *args[2:])
        needs = args[-2]
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.stored = Stored(tuple(g if needs & bit else None for g, bit in zip(gradients, _BITS, strict=True)), dtypes)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g_loss is None:
            return (None,) * 4
        return (*differentiated_once(ctx.stored.times(g_loss.detach())), None)


torch.library.register_autograd("prefkern::linear_preference_loss", _backward, setup_context=_setup)
