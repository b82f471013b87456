"""Token-level policy objectives."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.types import LossOutput


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    kind: Literal["clip"] = "clip",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    agg: Literal["token-mean", "seq-mean-token-mean"] = "token-mean",
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    kl: Literal["k3"] = "k3",
    ratio_clamp: float | None = 20.0,
) -> LossOutput:
    """The clipped policy objective, to be minimised. Per token, with A the advantage,

        d = logp - old_logp,   lr = clamp(d, -ratio_clamp, ratio_clamp),   rho = exp(lr)
        l = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high))
        l = min(l, -A dual_clip)                    where A < 0, if dual_clip is given
        l = l + beta k3(logp, ref_logp),            k3 = exp(ref_logp - logp) - (ref_logp - logp) - 1

    Where a bound of rho, of d or of the dual clip is passed, its gradient is 0; at the bound itself it flows. Then

        token-mean           sum l / number of tokens
        seq-mean-token-mean  mean over the sequences that have tokens of sum l / (n_i + 1e-8)

    Args:
        logp: [B, T], or packed [N] with `cu_seqlens`. The only argument with a gradient.
        old_logp: shaped like `logp`, and so is `ref_logp`.
        advantages: [B], or shaped like `logp`.
        mask: bool, shaped like `logp`; True counts. None counts every token.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end.
        dual_clip: greater than 1.
        ratio_clamp: None leaves d as it is.

    Values outside the mask change nothing, whatever they are. If the mask is empty, loss, metrics and gradient are 0.

    Metrics, over the tokens that count: `clip_fraction_low` (A < 0 and rho < 1 - eps_low), `clip_fraction_high` (A > 0
    and rho > 1 + eps_high), `clip_fraction_dual` (A < 0 and the dual bound holds l down), `ratio_mean`, `ratio_min`,
    `ratio_max` (of rho), `approx_kl` (mean of exp(d) - 1 - d), `kl` (mean of k3; 0 without ref_logp) and `tokens` (how
    many count).
    """
    _check_options(kind, agg, kl, dual_clip, beta, ref_logp)
    row, rows = _row_of_each_token(logp, cu_seqlens)
    keep = torch.ones_like(row, dtype=torch.bool) if mask is None else mask.reshape(-1)
    dtype = logp.dtype if logp.dtype == torch.float64 else torch.float32

    def tokens(x: Tensor) -> Tensor:
        """The values of those that count, [n]."""
        return x.reshape(-1)[keep].to(dtype)

    lp, old = tokens(logp), tokens(old_logp).detach()
    a = tokens(advantages if advantages.shape == logp.shape else advantages[row]).detach()
    d = lp - old
    lr = d if ratio_clamp is None else d.clamp(-ratio_clamp, ratio_clamp)
    rho = lr.detach().exp()

    low, high = (a < 0) & (rho < 1 - eps_low), (a > 0) & (rho > 1 + eps_high)
    bound = torch.where(low, -a * (1 - eps_low), -a * (1 + eps_high))
    dual = torch.zeros_like(low)
    if dual_clip is not None:
        dual = (a < 0) & (rho > dual_clip)
        bound = torch.where(dual, -a * dual_clip, bound)
    flat = low | high | dual  # constant in logp; their ratio is masked before exp, so that none of it overflows
    loss = torch.where(flat, bound, -a * lr.masked_fill(flat, 0.0).exp())

    k3 = torch.zeros_like(lp)
    if ref_logp is not None:
        to_ref = tokens(ref_logp).detach() - lp
        k3 = torch.expm1(to_ref) - to_ref
        loss = loss + beta * k3 if beta != 0 else loss

    def mean(x: Tensor) -> Tensor:
        return x.detach().to(dtype).sum() / max(len(lp), 1)

    empty = len(lp) == 0
    zero = rho.new_zeros(())
    metrics = {
        "clip_fraction_low": mean(low),
        "clip_fraction_high": mean(high),
        "clip_fraction_dual": mean(dual),
        "ratio_mean": mean(rho),
        "ratio_min": zero if empty else rho.min(),
        "ratio_max": zero if empty else rho.max(),
        "approx_kl": mean(torch.expm1(d) - d),
        "kl": mean(k3),
        "tokens": torch.tensor(len(lp), dtype=dtype, device=logp.device),
    }
    return LossOutput(_aggregate(loss, row[keep], rows, agg), metrics)


def _aggregate(loss: Tensor, row: Tensor, rows: int, agg: str) -> Tensor:
    """loss [n] of the tokens that count, row [n] the sequence of each."""
    if agg == "token-mean":
        return loss.sum() / max(len(loss), 1)
    zeros = loss.new_zeros(rows)
    length = zeros.index_add(0, row, torch.ones_like(loss))
    per_row = zeros.index_add(0, row, loss) / (length + 1e-8)
    return per_row.sum() / (length > 0).sum().clamp_min(1)


def _row_of_each_token(logp: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence of each token, [N], and the number of sequences."""
    if cu_seqlens is None:
        if logp.dim() != 2:
            raise ValueError(f"logp: got shape {list(logp.shape)}, accepted are [B, T], or [N] with cu_seqlens")
        rows, length = logp.shape
        return torch.arange(rows, device=logp.device).repeat_interleave(length), rows
    lengths = cu_seqlens.diff().long()
    if logp.dim() != 1 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(logp) or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens: must ascend from 0 to the {logp.numel()} tokens of logp, which must be [N]")
    return torch.arange(len(lengths), device=logp.device).repeat_interleave(lengths), len(lengths)


def _check_options(kind: str, agg: str, kl: str, dual_clip: float | None, beta: float, ref_logp: Tensor | None) -> None:
    for name, value, accepted in (
        ("kind", kind, ("clip",)),
        ("agg", agg, ("token-mean", "seq-mean-token-mean")),
        ("kl", kl, ("k3",)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: got {value!r}, accepted are {list(accepted)}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: got {dual_clip}, must be greater than 1")
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta: got {beta} without ref_logp")
