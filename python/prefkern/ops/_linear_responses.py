"""The op behind ``linear_preference_loss`` and ``linear_unpaired_loss``: a loss in the sums of log-probs of whole responses, in
pairs or single ones. Chunks hold whole pairs, or whole responses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import preference
from ._call import validation
from ._linear_layout import Layout, check_head
from ._single_pass import Chunk, Head, gradients_of, register, results

_response_loss = torch.ops.prefkern.preference_loss_fwd.default

# Places among the constants of preference_loss's op.
_DESIRABLE, _LENGTHS, _MASK, _AVERAGE = 2, (3, 4), preference.PAIR_TENSORS - 2, 16
METRICS = (*preference.METRICS, "nll")


class _Objective:
    """The loss in the sums of the responses: chunks deliver these, and get the gradient in the log-probs of their tokens."""

    def __init__(self, layout: Layout, ref_logp: Tensor | None, fixed: list[Any], sft_weight: float, dtype: torch.dtype):
        self.layout, self.ref_logp, self.fixed, self.sft_weight = layout, ref_logp, fixed, sft_weight
        count, acc = layout.items, torch.float64 if dtype == torch.float64 else torch.float32
        self.sums = torch.zeros(layout.sides, count, dtype=acc, device=layout.device)
        self.gain = 2.0 ** (math.ceil(math.log2(max(count, 1))) + 4) if dtype == torch.float16 else 1.0
        lengths = layout.lengths() if fixed[_AVERAGE] or sft_weight else None
        if lengths is not None and fixed[_AVERAGE]:
            for place, own in zip(_LENGTHS, lengths.view(layout.sides, count), strict=False):
                fixed[place] = own
        # The norm depends on no log-prob, so it is known before the first one; and whatever is wrong with the options too.
        *_, self.inverse_norm = self.loss(self.sums, fixed, False)
        if lengths is not None and sft_weight:
            tokens = lengths[:count].sum().to(acc)
            self.inverse_tokens = torch.where(tokens > 0, 1 / tokens, 0)
            self.chosen = torch.zeros(count, dtype=acc, device=layout.device)

    @staticmethod
    def loss(sums: Tensor, fixed: list[Any], with_grad: bool) -> tuple[Tensor, ...]:
        return _response_loss(sums[0], sums[1] if len(sums) == 2 else None, *fixed, with_grad)

    def add(self, chunk: Chunk, logp: Tensor, entropy: Tensor) -> None:
        layout, mine = self.layout, slice(chunk.begin, chunk.end)
        self.sums[:, mine] = layout.sums(chunk, logp, self.ref_logp).view(layout.sides, -1)
        if self.sft_weight:
            self.chosen[mine] = (
                self.sums[0, mine] if self.ref_logp is None else layout.sums(chunk, logp, None).view(layout.sides, -1)[0]
            )

    def gradient(self, chunk: Chunk) -> tuple[Tensor, None]:
        mine, count = slice(chunk.begin, chunk.end), self.layout.items
        own = [t[mine] if isinstance(t, Tensor) and t.ndim == 1 and len(t) == count else t for t in self.fixed]
        _, _, grads, _ = self.loss(self.sums[:, mine], own, True)
        grads = grads * self.inverse_norm
        if self.sft_weight:
            grads[0] -= self.sft_weight * self.inverse_tokens
        return self.layout.spread(chunk, (grads if self.gain == 1 else grads * self.gain).view(-1)), None

    def result(self) -> tuple[Tensor, Tensor]:
        """Loss and metrics of all responses at once: the same bits as from the sums without chunks."""
        if validation():
            preference.validate_pairs(self.sums[0], self.sums[1] if len(self.sums) == 2 else None, tuple(self.fixed))
        loss, metrics, *_ = self.loss(self.sums, self.fixed, False)
        nll = metrics.new_zeros(1)
        if self.sft_weight:
            nll = (-self.chosen.sum() * self.inverse_tokens).unsqueeze(0)
            loss = loss + self.sft_weight * nll[0]
        return loss, torch.cat([metrics, nll])


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor | None, bias: Tensor | None,
    row_temperature: Tensor | None, ref_logp: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    fixed, options, (sft_weight, needs, chunk_bytes) = list(rest[:-7]), rest[-7:-3], rest[-3:]
    ignore_index = options[3]
    check_head(hidden, weight, targets, cu_seqlens, bias, options)
    sides = 2 if fixed[_DESIRABLE] is None else 1
    if fixed[_MASK] is not None:
        targets = _of_items(targets, cu_seqlens, fixed[_MASK].repeat(sides), ignore_index)
    layout = Layout(targets, cu_seqlens, ignore_index, hidden.device, sides)
    head = Head(hidden, weight, layout.targets, bias, row_temperature, options)
    objective = _Objective(layout, ref_logp, fixed, sft_weight, hidden.dtype)
    chunks = layout.chunks(head, chunk_bytes, needs) if needs else []
    gradients = gradients_of(objective, head, chunks, layout.whole(), needs, False, chunk_bytes)
    return results(*objective.result(), gradients)


def _of_items(targets: Tensor, cu_seqlens: Tensor | None, keep: Tensor, ignore_index: int) -> Tensor:
    """Targets of which only those of responses that count are left."""
    if cu_seqlens is None:
        return torch.where(keep.unsqueeze(1), targets, ignore_index)
    ends = cu_seqlens.to(targets.device, non_blocking=True)
    return torch.where(keep.repeat_interleave(ends.diff(), output_size=len(targets)), targets, ignore_index)


register("prefkern::linear_preference_loss", _forward, len(METRICS), ("ref_logp", *preference.NAMES))
