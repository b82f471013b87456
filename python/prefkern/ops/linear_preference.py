"""Preference losses of pairs straight from hidden states and a linear head, with the logits computed once.

The gradient is found in the forward, chunk by chunk (``_single_pass.py``), where the two-step form, ``linear_logprobs`` and a
loss, computes the logits a second time in the backward.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from . import preference
from ._arguments import check_tensors, integer, number
from ._linear_layout import check_counted, check_options, count_sequences, head_arguments
from ._linear_responses import METRICS
from ._single_pass import run
from .types import LossOutput

_loss = torch.ops.prefkern.linear_preference_loss.default

# What preference_loss is told by name: all but the log-probs and their lengths, which come from the head; two names that the
# head and the tokens have already are told apart.
_RENAMED = {"weight": "pair_weight", "mask": "pair_mask"}
_FROM_HEAD = ("chosen_logp", "rejected_logp", "chosen_lengths", "rejected_lengths")
_DEFAULTS = {
    _RENAMED.get(name, name): parameter.default
    for name, parameter in inspect.signature(preference.preference_loss).parameters.items()
    if name not in _FROM_HEAD
}


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
    responses = count_sequences(hidden, targets, cu_seqlens, "2P")
    if responses % 2:
        raise ValueError(
            f"{'hidden' if cu_seqlens is None else 'cu_seqlens'} has {responses} responses; chosen and rejected ones, so an "
            "even number is expected"
        )
    for name in ("pair_weight", "pair_mask"):
        t = options.get(name)
        if t is not None and t.shape != (responses // 2,):
            raise ValueError(
                f"{name} has shape {list(t.shape)}; there are {responses // 2} pairs, so [{responses // 2}] is expected"
            )
    targets = check_counted(targets, mask, ref_logp, integer("ignore_index", ignore_index))
    if ref_logp is not None and (fixed[0] is not None or fixed[1] is not None):
        raise ValueError("ref_logp and ref_chosen_logp or ref_rejected_logp are given; one kind of reference is expected")
    sft_weight = number("sft_weight", sft_weight)
    if not math.isfinite(sft_weight):
        raise ValueError(f"sft_weight is {sft_weight}; it must be finite")
    head = head_arguments(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes)
    reference = None if ref_logp is None else ref_logp.detach().reshape(-1)
    args = (
        targets, cu_seqlens, head.row_temperature, reference, *fixed, *head.options, sft_weight, head.needs, head.chunk_bytes
    )  # fmt: skip
    loss, metrics = run(_loss, head.hidden, head.weight, bias, args)
    named = dict(zip(METRICS, metrics.unbind(0), strict=True))
    if sft_weight == 0:
        del named["nll"]
    return LossOutput(loss, named)


def _pair_constants(options: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of preference_loss's op behind the log-probs; lengths come later."""
    check_options(options, _DEFAULTS, _RENAMED, _FROM_HEAD, "preference_loss")
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
