"""Log-probabilities of target tokens, from hidden states and head weight or from logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prefkern.ops.types import LinearLogprobs

OUTPUTS = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Iterable[str] = (),
    keep: tuple[Tensor, Tensor] | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    logits_dtype: str | None = None,
    chunk_bytes: int | None = None,
) -> LinearLogprobs:
    """Statistics of softmax(z), with

        y = hidden weight^T + s (hidden a^T) b^T + bias
        x = logit_scale * y,   z = softcap tanh(x / softcap) / temperature
        logp = z[target] - lse(z),    entropy = -sum_v p_v log p_v

    Args:
        hidden: [..., H]. Narrower types than float32 are widened first: the products are those of the given numbers.
        weight: [V, H].
        targets: int64 or int32 [...], in [0, V) or `ignore_index`.
        bias: [V].
        temperature: positive; a number, or one per token (broadcast to `targets`). No gradient.
        softcap: positive; None leaves x as it is.
        outputs: which of "entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1" to return beside logp.
        keep: (offsets [N + 1], ids): row i of the flattened targets keeps ids[offsets[i]:offsets[i + 1]]. All other z are -inf,
            and the mean of z is over those that are kept. logp of a target that is not kept is the constant -inf. Every row
            that counts must keep at least one. None keeps all.
        lora: (a [r, H], b [V, r], s), a low-rank update of the weight; None is the weight as it is.
        logits_dtype: "bfloat16" or "float16" rounds y to that type, once; its gradient passes straight through. None and
            "float32" leave it as it is.
        chunk_bytes: without meaning here.

    Ignored rows give 0 (False), and neither their hidden states nor their gradients are looked at.
    Gradients flow from logp, entropy and lse to hidden, weight, bias, a and b.
    """
    counts = targets != ignore_index
    h = _widen(hidden)[counts]
    y = h @ _widen(weight).mT
    if lora is not None:
        a, b, s = lora
        y = y + s * (h @ _widen(a).mT) @ _widen(b).mT
    if bias is not None:
        y = y + bias.to(y.dtype)
    if logits_dtype not in (None, "float32"):
        y = _Rounded.apply(y, {"bfloat16": torch.bfloat16, "float16": torch.float16}[logits_dtype])
    kept = None if keep is None else _kept(keep, counts, y)
    return _statistics(y, targets, counts, temperature, softcap, logit_scale, outputs, kept)


def logits_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Iterable[str] = (),
    inplace_backward: bool = False,
) -> LinearLogprobs:
    """The same statistics of given logits y [..., V]. See `linear_logprobs`.

    A logit of -inf is a token that cannot be drawn: it adds nothing to the entropy. `inplace_backward` is without
    meaning here: the logits are never overwritten.
    """
    counts = targets != ignore_index
    return _statistics(_widen(logits)[counts], targets, counts, temperature, softcap, logit_scale, outputs)


def _kept(keep: tuple[Tensor, Tensor], counts: Tensor, y: Tensor) -> Tensor:
    """bool, shaped like y, of the rows that count."""
    offsets, ids = keep
    kept = torch.zeros(y.shape, dtype=torch.bool, device=y.device)
    for i, row in enumerate(counts.reshape(-1).nonzero().flatten().tolist()):
        own = ids[offsets[row] : offsets[row + 1]].long()
        if not len(own):
            raise ValueError(f"keep: row {row} keeps no token")
        kept[i, own] = True
    return kept


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, dtype: torch.dtype) -> Tensor:
        return y.to(dtype).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _statistics(
    y: Tensor,
    targets: Tensor,
    counts: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    outputs: Iterable[str],
    kept: Tensor | None = None,
) -> LinearLogprobs:
    """y [n, V] holds the rows of `targets` that count; kept, shaped like it, is True where a token can be drawn."""
    wanted = set(outputs)
    if unknown := wanted - set(OUTPUTS):
        raise ValueError(f"outputs: got {sorted(unknown)}, accepted are {list(OUTPUTS)}")
    target = targets[counts].long()
    if bool(((target < 0) | (target >= y.shape[-1])).any()):
        raise ValueError(f"targets: values must lie in [0, {y.shape[-1]}) or be ignore_index")

    x = logit_scale * y
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().expand_as(targets)[counts].unsqueeze(-1).to(x.dtype)
    z = x / temperature
    if kept is not None:
        z = z.masked_fill(~kept, -torch.inf)

    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()

    def per_row(values: Tensor) -> Tensor:
        return torch.zeros(targets.shape, dtype=values.dtype, device=values.device).masked_scatter(counts, values)

    at = target.unsqueeze(-1)
    logp = log_p.gather(-1, at).squeeze(-1)
    if kept is not None:
        logp = logp.where(kept.gather(-1, at).squeeze(-1), -torch.inf)
    result = LinearLogprobs(logp=per_row(logp))
    if "entropy" in wanted:  # 0 log 0 = 0, in the gradient too
        result = result._replace(entropy=per_row(-(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)))
    if "lse" in wanted:
        result = result._replace(lse=per_row(torch.logsumexp(z, dim=-1)))
    if "sum_sq_probs" in wanted:
        result = result._replace(sum_sq_probs=per_row(p.detach().square().sum(-1)))
    if "mean_logit" in wanted:
        mean = z.mean(-1) if kept is None else z.where(kept, 0).sum(-1) / kept.sum(-1)
        result = result._replace(mean_logit=per_row(mean.detach()))
    if "is_top1" in wanted:
        result = result._replace(is_top1=per_row(z.argmax(dim=-1) == target))
    return result
