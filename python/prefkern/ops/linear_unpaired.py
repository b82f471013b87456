"""Losses of single judged responses straight from hidden states and a linear head, with the logits computed once.

The gradient is found in the forward, chunk by chunk (``_single_pass.py``), where the two-step form, ``linear_logprobs`` and
``unpaired_loss``, computes the logits a second time in the backward.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import preference
from ._arguments import check_tensors, integer
from ._linear_layout import check_counted, check_options, count_sequences, head_arguments
from ._linear_responses import METRICS
from ._single_pass import run
from .types import LossOutput

_loss = torch.ops.prefkern.linear_preference_loss.default

# What unpaired_loss is told by name: all but the log-probs and their lengths, which come from the head; names that the head and
# the tokens have already are told apart.
_RENAMED = {"weight": "response_weight", "mask": "response_mask", "ref_logp": "ref_sequence_logp"}
_FROM_HEAD = ("logp", "lengths")
_DEFAULTS = {
    _RENAMED.get(name, name): None if parameter.default is parameter.empty else parameter.default
    for name, parameter in inspect.signature(preference.unpaired_loss).parameters.items()
    if name not in (*_FROM_HEAD, "desirable")
}


def linear_unpaired_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    desirable: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    **options: Any,
) -> LossOutput:
    r"""The loss of B single responses, each judged desirable or not (KTO, BCO, ...), straight from hidden states:
    :func:`linear_logprobs`, :func:`sequence_sum` and :func:`unpaired_loss` in one, with the logits computed once.

    The result is that of these three, to rounding. They take 4 GEMMs of 2 N V H flops (the backward computes the logits again);
    this takes 3, 2 with a frozen head and 1 where nothing needs a gradient, because the gradient is found in the forward, while
    the logits of a chunk of whole responses are at hand. The backward multiplies it by that of the loss.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``. dtypes as for :func:`linear_logprobs`.
        weight: ``[V, H]``. bias: ``[V]`` or None.
        targets: ``[B, T]`` or ``[N]`` int64 or int32: the token that each hidden state predicts, or ``ignore_index``.
        desirable: bool ``[B]``.
        mask: bool, shaped like ``targets``; True counts. None: all but ``ignore_index`` count. What does not count is never
            looked at, and on the CPU costs nothing.
        cu_seqlens: int32 ``[B + 1]``, where packed responses begin and end. On CUDA it is best left on the CPU: chunks of
            whole responses cannot be planned without knowing it. From one on the GPU, a batch that does not fit
            ``chunk_bytes`` takes 4 GEMMs, as the three functions would.
        ref_logp: log-probs of the tokens under the reference model, shaped like ``targets``; subtracted per token. Or else
            ``ref_sequence_logp``, ``[B]`` sums. Neither: no reference.
        temperature, softcap, logit_scale: as for :func:`linear_logprobs`.
        chunk_bytes: what the logits of a chunk and what goes with them may take; None for the default. A chunk holds at least
            one response. Results do not depend on it beyond rounding.
        options: those of :func:`unpaired_loss`, of the same meaning and with the same defaults: ``kind``, ``beta``, ``kl``
            (KTO's reference point: a number or a tensor, a constant), ``offset``, ``score``, ``average`` (lengths are known
            here), ``desirable_weight``, ``undesirable_weight``, ``reduction``, ``norm``, ... Its ``weight`` is
            ``response_weight`` here and its ``mask`` ``response_mask``; responses outside the latter are not looked at.
            ``reduction="none"`` is refused: the upstream gradient of each response is not known in the forward.

    Returns:
        LossOutput(loss, metrics), as of :func:`unpaired_loss`. Gradients flow to hidden, weight and bias.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Memory: as :func:`linear_preference_loss`, and what it says about a second backward.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets, desirable=desirable)
    fixed = _constants(desirable, options)
    responses = count_sequences(hidden, targets, cu_seqlens, "B")
    for name, t in {"desirable": desirable, **options}.items():
        if name in ("desirable", "response_weight", "response_mask") and t is not None and t.shape != (responses,):
            raise ValueError(f"{name} has shape {list(t.shape)}; there are {responses} responses, so [{responses}] is expected")
    targets = check_counted(targets, mask, ref_logp, integer("ignore_index", ignore_index))
    if ref_logp is not None and fixed[0] is not None:
        raise ValueError("ref_logp and ref_sequence_logp are given; one kind of reference is expected")
    head = head_arguments(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes)
    reference = None if ref_logp is None else ref_logp.detach().reshape(-1)
    args = (
        targets, cu_seqlens, head.row_temperature, reference, *fixed, *head.options, 0.0, head.needs, head.chunk_bytes
    )  # fmt: skip
    loss, metrics = run(_loss, head.hidden, head.weight, bias, args)
    named = dict(zip(METRICS, metrics.unbind(0), strict=True))
    del named["nll"]
    return LossOutput(loss, named)


def _constants(desirable: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of preference_loss's op behind the log-probs; lengths come later."""
    check_options(options, _DEFAULTS, _RENAMED, _FROM_HEAD, "unpaired_loss")
    given = {**_DEFAULTS, **options}
    if given["reduction"] == "none":
        raise ValueError("reduction is 'none'; accepted: 'mean', 'weighted_mean', 'sum'")
    for original, name in _RENAMED.items():
        given[original] = given.pop(name)
        if given[original] is not None:
            check_tensors(**{name: given[original]})
    for name, t in (("desirable", desirable), ("response_mask", given["mask"])):
        if t is not None and t.dtype != torch.bool:
            raise TypeError(f"{name} has dtype {t.dtype}; accepted: bool")
    return preference.constants(*preference.unpaired_arguments(desirable=desirable, lengths=None, **given))
