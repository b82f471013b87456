"""Policy objectives straight from hidden states and a linear head, with the logits computed once.

The gradient is found in the forward, chunk by chunk (``_single_pass.py``), where the two-step form, ``linear_logprobs`` and
``policy_loss``, computes the logits a second time in the backward.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import torch
from torch import Tensor

from .._names import choice
from . import policy
from ._arguments import check_tensors, integer, number
from ._call import call, validation
from ._linear_layout import Layout, check_counted, check_head, check_options, count_sequences, head_arguments
from ._single_pass import Chunk, Head, gradients_of, register, results, run
from .types import LossOutput

_OPS = torch.ops.prefkern
_loss = _OPS.linear_policy_loss.default
_token_loss, _token_grad = _OPS.policy_loss_fwd.default, _OPS.policy_loss_backward.default

# What policy_loss is told by name; the rest are arguments here too, or come from the head.
_FROM_HEAD = ("logp", "entropy")
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(policy.policy_loss).parameters.items()
    if name not in (*_FROM_HEAD, "old_logp", "advantages", "mask", "cu_seqlens")
}
# Kinds of which a token's gradient needs the log-probs of its whole sequence.
_OF_SEQUENCES = tuple(policy.KINDS.index(kind) for kind in ("gspo", "gspo_token", "gmpo"))
_SCALED = ("seq-mean-token-sum-norm", "trl-dr_grpo")
# Of the op's arguments behind row_temperature: tensors, in this order, and the numbers of policy_loss.
_TENSORS = ("old_logp", "advantages", "ref_logp", "token_weight", "eps_low", "eps_high", "anchor", "norm")
_NUMBERS = 17


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy_coef: float = 0.0,
    entropy_agg: policy.Aggregation | None = None,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
    **options: Any,
) -> LossOutput:
    r"""A policy objective straight from hidden states: :func:`linear_logprobs` and :func:`policy_loss` in one, and an entropy
    bonus, with the logits computed once.

    .. math:: L = L_\mathrm{policy}(\log\pi) - c\,\mathrm{agg}(\mathcal{H})

    with the entropies :math:`\mathcal{H}` of the tokens' distributions, c ``entropy_coef`` and agg :func:`masked_aggregate`.
    The result is that of these functions, to rounding. They take 4 GEMMs of 2 N V H flops (the backward computes the logits
    again); this takes 3, 2 with a frozen head and 1 where nothing needs a gradient, because the gradient is found in the
    forward, while the logits of a chunk are at hand. The backward multiplies it by that of the loss.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``. dtypes as for :func:`linear_logprobs`.
        weight: ``[V, H]``. bias: ``[V]`` or None.
        targets: ``[B, T]`` or ``[N]`` int64 or int32: the token that each hidden state predicts, or ``ignore_index``.
        old_logp: shaped like ``targets``, or None: the policy that sampled is this one, so that the log-probs of this very
            pass, as constants, stand for the old ones. All ratios are 1 then, and the gradient is that of the ratio.
        advantages: ``[B]``, or shaped like ``targets`` unless the loss is one per sequence. None for ``kind="none"``.
        mask: bool, shaped like ``targets``; True counts. None: all but ``ignore_index`` count, which never does. What does not
            count is never looked at, and on the CPU costs nothing.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end. On CUDA, for kinds whose ratio is one of the
            sequence (``"gspo"``, ``"gspo_token"``, ``"gmpo"``), it is best left on the CPU: chunks of whole sequences cannot be
            planned without knowing it, and with one on the GPU the batch counts as one sequence that does not come apart.
        temperature, softcap, logit_scale: as for :func:`linear_logprobs`; log-probs and entropies are those of the softmax
            with them.
        entropy_coef: c, finite. At 0 no entropy is computed, unless ``with_entropy`` asks for the metric.
        entropy_agg: how entropies are summed up; None: as the loss is, with its ``norm`` and ``scale``. Another one than
            ``agg`` divides by its own count, and is none that needs a ``scale``.
        with_entropy: compute the metric ``entropy`` at ``entropy_coef`` 0 too.
        chunk_bytes: what the logits of a chunk and what goes with them may take; None for the default. A sequence of the
            kinds named above that does not fit (by default: not four times) goes through the head in pieces, its logits twice,
            which are 4 GEMMs then. Results do not depend on it beyond rounding.
        options: those of :func:`policy_loss`, of the same meaning and with the same defaults: ``kind``, ``eps_low``,
            ``eps_high``, ``agg``, ``norm``, ``scale``, ``token_weight``, ``ref_logp``, ``beta``, ``kl``, ``kl_ratio``, ...

    Returns:
        LossOutput(loss, metrics), as of :func:`policy_loss`; the metric ``entropy`` is 0 unless entropies are computed.
        Gradients flow to hidden, weight and bias, through log-probs and entropies; everything else is constant. A token whose
        gradient is 0 (clipped, without advantage) has a gradient of hidden of exactly 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted; as :func:`policy_loss` and
            :func:`linear_logprobs` do.

    Memory: the logits of a chunk, and from the forward on the gradients themselves (float32 for a weight of lower precision as
    long as chunks are added to it). The backward hands them over; a second backward through the same loss is an error, unless
    the first was told ``retain_graph=True``.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    check_options(options, _DEFAULTS, {}, _FROM_HEAD, "policy_loss")
    given = {**_DEFAULTS, **options}
    # Without old log-probs, those that the op finds are meant, and not that the kind has no ratio.
    tensors, numbers = policy.arguments(old_logp, advantages, None, None, entropy=None, **given)
    count_sequences(hidden, targets, cu_seqlens, "B")
    targets = check_counted(targets, mask, None, integer("ignore_index", ignore_index))
    coefficient = number("entropy_coef", entropy_coef)
    if not math.isfinite(coefficient):
        raise ValueError(f"entropy_coef is {coefficient}; it must be finite")
    aggregation = given["agg"] if entropy_agg is None else entropy_agg
    place = choice("entropy_agg", aggregation, policy.AGGREGATIONS)
    if aggregation != given["agg"] and aggregation in _SCALED:
        raise ValueError(
            f"entropy_agg is {aggregation!r}, which needs a scale, but agg is {given['agg']!r}; the same, or one without a "
            "scale, is expected"
        )
    head = head_arguments(hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, chunk_bytes)
    args = (
        targets, cu_seqlens, head.row_temperature, *(tensors[name] for name in _TENSORS), *numbers, *head.options, coefficient,
        place, bool(with_entropy), head.needs, head.chunk_bytes,
    )  # fmt: skip
    loss, metrics = run(_loss, head.hidden, head.weight, bias, args)
    return LossOutput(loss, dict(zip(policy.METRICS, metrics.unbind(0), strict=True)))


class _Objective:
    """The loss in the log-probs and entropies of all tokens, which chunks fill in. A token's gradient depends on those of its
    sequence at most, and on counts: so that of a chunk is final once the chunk is there, and what the others still lack (zeros)
    is never seen."""

    def __init__(
        self, layout: Layout, dtype: torch.dtype, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...],
        entropy_coef: float, entropy_agg: int, with_entropy: bool, with_grad: bool,
    ):  # fmt: skip
        self.layout, self.numbers, self.coefficient = layout, numbers, entropy_coef
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.logp = torch.zeros(layout.targets.shape, dtype=acc, device=layout.device)
        self.entropy = torch.zeros_like(self.logp) if with_entropy else None
        self.given = dict(zip(_TENSORS, tensors, strict=True))
        # Cast once, and not for each chunk.
        old, advantages, ref, *each, anchor, self.norm = (
            t.to(acc) if t is not None and t.is_floating_point() else t for t in tensors
        )
        self.mask, cu = layout.counts.view(layout.shape), layout.on_device
        self.fixed = (
            self.logp.view(layout.shape) if old is None else old, advantages, self.mask, cu, ref, *each, anchor,
        )  # fmt: skip
        try:  # what is wrong is found before the first product
            call(self.loss, False)
        except (ValueError, TypeError) as error:
            raise type(error)(re.sub(r"\blogp\b", "targets", str(error))) from None
        same = entropy_agg == numbers[1]
        self.aggregation = policy.aggregation(
            self.mask, cu, self.norm if same else None, entropy_agg, *(numbers[-2:] if same else (0.0, -1.0))
        )
        self.gain: float | Tensor = 1.0
        if not with_grad:
            return
        if dtype == torch.float16 and self.logp.numel():
            weights = policy.aggregation(self.mask, cu, self.norm, *numbers[1:2], *numbers[-2:])
            self.gain = self._power_above(*_token_loss(self.logp.view(layout.shape), *weights, True)[2:])
        self.upstream = torch.ones((), dtype=acc, device=layout.device) * self.gain
        self.entropy_grad = None
        if entropy_coef != 0:
            found = _token_loss(self.logp.view(layout.shape), *self.aggregation, True)
            self.entropy_grad = _token_grad(-entropy_coef * self.upstream, *found[2:]).view(-1)

    @staticmethod
    def _power_above(unnormalised: Tensor, inverse_norm: Tensor) -> Tensor:
        """A power of two that brings a token's weight in the loss to 8 or more, the largest to less than 16."""
        largest = unnormalised.max() * inverse_norm
        return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), 4 - largest.frexp().exponent), 1)

    def loss(self, with_grad: bool, entropy: Tensor | None = None) -> tuple[Tensor, ...]:
        logp = self.logp.view(self.layout.shape)
        found: tuple[Tensor, ...] = _token_loss(logp, *self.fixed, entropy, self.norm, *self.numbers, with_grad)
        return found

    def add(self, chunk: Chunk, logp: Tensor, entropy: Tensor) -> None:
        chunk.rows.put(self.logp, logp)
        if self.entropy is not None:
            chunk.rows.put(self.entropy, entropy)

    def gradient(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        _, _, unnormalised, inverse_norm = self.loss(True)
        g_logp = _token_grad(self.upstream, chunk.rows.take(unnormalised.view(-1)), inverse_norm)
        return g_logp, None if self.entropy_grad is None else chunk.rows.take(self.entropy_grad)

    def result(self) -> tuple[Tensor, Tensor]:
        """Loss and metrics of all tokens at once: the same bits as from the log-probs without chunks."""
        shape = self.layout.shape
        if validation():
            seen = self.given | {"mask": self.mask, "cu_seqlens": self.layout.on_device}
            policy.validate(self.logp.view(shape), seen, policy.KINDS[self.numbers[0]])
        entropy = None if self.entropy is None else self.entropy.view(shape)
        loss, metrics, *_ = self.loss(False, entropy)
        if self.coefficient != 0:
            bonus, *_ = _token_loss(entropy, *self.aggregation, False)
            loss = loss - self.coefficient * bonus
        return loss, metrics


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None,
    row_temperature: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors, rest = rest[: len(_TENSORS)], rest[len(_TENSORS) :]
    numbers, options = rest[:_NUMBERS], rest[_NUMBERS : _NUMBERS + 4]
    entropy_coef, entropy_agg, with_entropy, needs, chunk_bytes = rest[_NUMBERS + 4 :]
    check_head(hidden, weight, targets, cu_seqlens, bias, options)
    with_entropy = with_entropy or entropy_coef != 0
    layout = Layout(targets, cu_seqlens, options[3], hidden.device)
    head = Head(hidden, weight, layout.targets, bias, row_temperature, options)
    objective = _Objective(layout, hidden.dtype, tensors, numbers, entropy_coef, entropy_agg, with_entropy, bool(needs))
    chunks: list[Chunk] = []
    if needs:
        chunks = (layout.chunks if numbers[0] in _OF_SEQUENCES else layout.row_chunks)(head, chunk_bytes, needs)
    gradients = gradients_of(objective, head, chunks, layout.whole(), needs, with_entropy, chunk_bytes)
    return results(*objective.result(), gradients)


register("prefkern::linear_policy_loss", _forward, len(policy.METRICS), _TENSORS)
