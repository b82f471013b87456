"""Policy objectives over tokens, and the weights and masks that go with them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.types import LossOutput
from prefkern.reference._tokens import kept_tokens, rows_of_tokens

KINDS = ("clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo", "none")
CLIPPED = ("clip", "gspo", "gspo_token")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "trl-grpo",
    "trl-dr_grpo",
)
KL_KINDS = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")

Kind = Literal["clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo", "none"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum", "trl-grpo", "trl-dr_grpo"
]
Kl = Literal["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"]


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    kind: Kind = "clip",
    eps_low: float | Tensor = 0.2,
    eps_high: float | Tensor = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    agg: Aggregation = "token-mean",
    norm: float | Tensor | None = None,
    scale: float | None = None,
    token_weight: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    kl: Kl = "k3",
    kl_clamp: float | None = None,
    kl_ratio: bool = False,
    ratio_clamp: float | tuple[float | None, float | None] | None = 20.0,
    anchor: Tensor | None = None,
    anchor_gamma: float = 0.1,
    anchor_loss: Literal["shaped", "nll"] = "shaped",
    entropy: Tensor | None = None,
) -> LossOutput:
    """A policy objective, to be minimised. Per token, with A the advantage, w the token's weight,

        d = logp - old_logp,   rho = exp(clamp(lr, *ratio_clamp))

    where lr is d, or for a sequence kind its mean over the tokens of the sequence that count:

        clip        -A min(max(rho, lower), upper): lower = 1 - eps_low where A < 0; upper = 1 + eps_high where A > 0,
                    dual_clip where A < 0. `delta` bounds the unclipped ratio: upper = min(1 + eps_high, delta) where
                    A > 0, min(dual_clip, max(1 + eps_high, delta)) where A < 0
        cispo       -sg(clip(rho, 1 - eps_low, 1 + eps_high)) A logp
        reinforce   -A logp
        sapo        -A (4 / tau) sigmoid(tau (rho - 1)), tau = tau_pos where A > 0, else tau_neg
        gspo        clip, with lr the mean of d: a loss per sequence, given to each of its tokens
        gspo_token  the same value, but each token's gradient is that of rho exp(logp - sg logp)
        gmpo        -A rho, with lr = sum_t b / (n + 1e-8), b = min(d, eps_high) where A > 0, max(d, -eps_low) where A < 0
        none        0

    and the loss is w l + beta KL. A row of `anchor` has no ratio: l = -A p / (p + anchor_gamma) with p = exp(logp)
    ("shaped"), or -A logp ("nll"). Where a bound of rho, lr or the KL is passed, its gradient is 0; at the bound it flows.

    KL, with x = ref_logp - logp: k1 = -x, abs = |x|, k2 = x^2 / 2, k3 = exp(x) - 1 - x, clamped to [-kl_clamp, kl_clamp];
    a "+" keeps the value and takes the gradient of k2. With `kl_ratio` it is multiplied by rho (1 for an anchor).

    Aggregation, with n_i the tokens of a sequence and S the number of sequences that have any:

        token-mean               sum l / number of tokens
        seq-mean-token-mean      sum_i (sum_t l / (n_i + 1e-8)) / S
        seq-mean-token-sum       sum l / S
        seq-mean-token-sum-norm  sum l / S / scale; scale defaults to T
        token-sum                sum l
        trl-grpo                 sum_i (sum_t l / max(1, n_i)) / B
        trl-dr_grpo              sum l / (B scale)

    `norm` replaces the count (number of tokens, S, B, or 1) in the denominator; if it is 0, so is the loss.

    Args:
        logp: [B, T], or packed [N] with `cu_seqlens`. The only argument with a gradient.
        old_logp: shaped like `logp`, and so are `ref_logp` and `entropy`. May be None for "reinforce" and "none", which
            then count as on policy.
        advantages: [B], or shaped like `logp` but for "gspo" and "gmpo". None for "none".
        mask: bool, shaped like `logp`; True counts. None counts every token.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end.
        eps_low, eps_high: numbers, or [B], or shaped like `logp` but for "gspo".
        token_weight: [B], or shaped like `logp`.
        ratio_clamp: C for [-C, C], or (low, high), None standing for no bound.
        anchor: bool [B].
        entropy: only for the metric.

    Values outside the mask change nothing, whatever they are. If the mask is empty, loss, metrics and gradient are 0.

    Metrics, over the tokens that count: `clip_fraction_low` and `clip_fraction_high` (a bound of rho holds the loss: clip,
    gspo, gspo_token and gmpo with A < 0 below and with A > 0 above, cispo with any A), `clip_fraction_dual` (A < 0 and
    the upper bound holds it), `ratio_mean`, `ratio_min`, `ratio_max` (of rho) and `approx_kl` (mean of exp(d) - 1 - d), all
    without anchors; `kl` (mean of KL without the factor rho; 0 without ref_logp), `entropy`, `tokens` and `sequences`
    (how many count).
    """
    _check_options(kind, agg, kl, old_logp, advantages, dual_clip, delta, beta, ref_logp, kl_ratio, anchor, scale, cu_seqlens)
    every_row, rows = rows_of_tokens(logp, cu_seqlens, "logp")
    keep = kept_tokens(logp, mask)
    row = every_row[keep]
    dtype = logp.dtype if logp.dtype == torch.float64 else torch.float32

    def tokens(x: Tensor) -> Tensor:
        """The values of those that count, [n]."""
        return x.reshape(-1)[keep].to(dtype)

    def constant(x: float | Tensor, of_rows: bool = False) -> Tensor:
        """A number, [B], or unless `of_rows` one value per token, as one per token that counts."""
        if not isinstance(x, Tensor):
            return logp.new_full((len(row),), x, dtype=dtype)
        return (tokens(x) if x.shape == logp.shape and not of_rows else x[row].to(dtype)).detach()

    if kind in ("gspo", "gmpo") and advantages is not None and advantages.shape != (rows,):
        raise ValueError(f"advantages: got shape {list(advantages.shape)}, {kind} has [{rows}]; see gspo_token")
    lp = tokens(logp)
    a = constant(0.0 if kind == "none" or advantages is None else advantages, of_rows=kind in ("gspo", "gmpo"))
    eps_low, eps_high = (constant(eps, of_rows=kind == "gspo") for eps in (eps_low, eps_high))
    is_anchor = torch.zeros_like(row, dtype=torch.bool) if anchor is None else anchor[row]
    old = lp.detach() if old_logp is None else tokens(old_logp).detach()
    d = lp - torch.where(is_anchor, lp.detach(), old)
    length = lp.new_zeros(rows).index_add(0, row, torch.ones_like(lp))

    lr = _log_ratio(kind, d, a, eps_low, eps_high, row, length)
    bounds = ratio_clamp if isinstance(ratio_clamp, tuple) else (None if ratio_clamp is None else -ratio_clamp, ratio_clamp)
    if bounds != (None, None):
        lr = lr.clamp(*bounds)
    bounds_of_ratio = (eps_low, eps_high, math.inf if dual_clip is None else dual_clip, delta)
    policy, low, high, dual = _policy_term(kind, lp, d, lr, a, bounds_of_ratio, (tau_pos, tau_neg))
    if anchor is not None:
        of_anchor = -a * (lp if anchor_loss == "nll" else torch.sigmoid(lp - math.log(anchor_gamma)))
        policy = torch.where(is_anchor, of_anchor, policy)
    loss = policy if token_weight is None else policy * constant(token_weight)

    penalty = torch.zeros_like(lp)
    if ref_logp is not None:
        penalty = _kl(lp, tokens(ref_logp).detach(), kl, kl_clamp)
        if beta != 0:
            loss = loss + beta * (penalty * torch.where(is_anchor, 1.0, lr.exp()) if kl_ratio else penalty)

    def mean(x: Tensor) -> Tensor:
        return x.detach().to(dtype).sum() / max(len(x), 1)

    own = ~is_anchor
    rho = lr.detach()[own].exp()
    metrics = {
        "clip_fraction_low": mean(low[own]),
        "clip_fraction_high": mean(high[own]),
        "clip_fraction_dual": mean(dual[own]),
        "ratio_mean": mean(rho),
        "ratio_min": rho.min() if len(rho) else rho.new_zeros(()),
        "ratio_max": rho.max() if len(rho) else rho.new_zeros(()),
        "approx_kl": mean((torch.expm1(d) - d)[own]),
        "kl": mean(penalty),
        "entropy": lp.new_zeros(()) if entropy is None else mean(tokens(entropy)),
        "tokens": torch.tensor(len(lp), dtype=dtype, device=logp.device),
        "sequences": (length > 0).sum().to(dtype),
    }
    return LossOutput(_aggregate(loss, row, rows, agg, norm, scale or _padded_length(logp)), metrics)


def masked_aggregate(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    agg: Aggregation = "token-mean",
    norm: float | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The values of tokens as one number, weighted as :func:`policy_loss` weighs its tokens. Gradient to `values`."""
    _check_aggregation(agg, scale, cu_seqlens)
    row, rows = rows_of_tokens(values, cu_seqlens, "values")
    keep = kept_tokens(values, mask)
    kept = values.reshape(-1)[keep].to(values.dtype if values.dtype == torch.float64 else torch.float32)
    return _aggregate(kept, row[keep], rows, agg, norm, scale or _padded_length(values))


def kl_penalty(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    kl: Kl = "k3",
    kl_clamp: float | None = None,
    agg: Aggregation = "token-mean",
    norm: float | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The KL of :func:`policy_loss` alone. Gradient to `logp`."""
    return policy_loss(
        logp, None, None, mask, cu_seqlens=cu_seqlens, kind="none", agg=agg, norm=norm, scale=scale, ref_logp=ref_logp,
        beta=1.0, kl=kl, kl_clamp=kl_clamp,
    ).loss  # fmt: skip


def importance_weights(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    level: Literal["token", "sequence", "geometric"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    clip_min: float | None = None,
    clip_max: float | None = 2.0,
    log_clamp: float | None = 20.0,
    normalize: bool = False,
) -> Tensor:
    """Weights for the mismatch between the trainer's old policy and the engine that sampled, shaped like `old_logp`.

        u = old_logp - rollout_logp: of the token, summed over the sequence ("sequence"), or its mean ("geometric")
        w = exp(clamp(u, -log_clamp, log_clamp))
        truncate: w clipped to [clip_min, clip_max]     mask: w where clip_min <= w <= clip_max, else 0

    `normalize` divides by the mean of the weights, over tokens or over sequences that have tokens, unless it is <= 1e-8.
    0 outside the mask. Constants: no gradient.
    """
    for name, value, accepted in (("level", level, ("token", "sequence", "geometric")), ("mode", mode, ("truncate", "mask"))):
        if value not in accepted:
            raise ValueError(f"{name}: got {value!r}, accepted are {list(accepted)}")
    row, rows = rows_of_tokens(old_logp, cu_seqlens, "old_logp")
    keep = kept_tokens(old_logp, mask)
    row = row[keep]
    dtype = old_logp.dtype if old_logp.dtype == torch.float64 else torch.float32
    u = old_logp.detach().reshape(-1)[keep].to(dtype) - rollout_logp.detach().reshape(-1)[keep].to(dtype)
    length = u.new_zeros(rows).index_add(0, row, torch.ones_like(u))
    if level != "token":
        u = u.new_zeros(rows).index_add(0, row, u)
        u = u if level == "sequence" else u / length.clamp_min(1)
    w = (u if log_clamp is None else u.clamp(-log_clamp, log_clamp)).exp()
    least, most = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    w = w.clamp(least, most) if mode == "truncate" else torch.where((w < least) | (w > most), 0.0, w)
    if normalize:
        counted = w if level == "token" else w[length > 0]
        mean = counted.sum() / max(len(counted), 1)
        w = w if mean <= 1e-8 else w / mean
    out = torch.zeros(old_logp.numel(), dtype=dtype, device=old_logp.device)
    out[keep] = w if level == "token" else w[row]
    return out.view(old_logp.shape)


def off_policy_mask(
    advantages: Tensor,
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Which sequences to keep, bool [B]: all but those with A < 0 and mean_t(rollout_logp - old_logp) > threshold.

    A token that one of the two could not score (NaN) counts as one without mismatch.
    """
    row, rows = rows_of_tokens(old_logp, cu_seqlens, "old_logp")
    keep = kept_tokens(old_logp, mask)
    dtype = old_logp.dtype if old_logp.dtype == torch.float64 else torch.float32
    x = rollout_logp.detach().reshape(-1)[keep].to(dtype) - old_logp.detach().reshape(-1)[keep].to(dtype)
    x = torch.where(x.isnan(), 0.0, x)
    zeros = x.new_zeros(rows)
    length = zeros.index_add(0, row[keep], torch.ones_like(x)).clamp_min(1)
    return ~((advantages.detach() < 0) & (zeros.index_add(0, row[keep], x) / length > threshold))


def _log_ratio(kind: str, d: Tensor, a: Tensor, eps_low: Tensor, eps_high: Tensor, row: Tensor, length: Tensor) -> Tensor:
    """lr of :func:`policy_loss` before its clamp."""

    def row_sum(x: Tensor) -> Tensor:
        return torch.zeros_like(length).index_add(0, row, x)

    if kind == "gmpo":
        bounded = torch.where((a > 0) & (d > eps_high), eps_high, torch.where((a < 0) & (d < -eps_low), -eps_low, d))
        return (row_sum(torch.where(a == 0, 0.0, bounded)) / (length + 1e-8))[row]
    if kind not in ("gspo", "gspo_token"):
        return d
    mean = (row_sum(d) / length.clamp_min(1))[row]
    return mean if kind == "gspo" else mean.detach() + d - d.detach()


def _policy_term(
    kind: str,
    lp: Tensor,
    d: Tensor,
    lr: Tensor,
    a: Tensor,
    bounds: tuple[Tensor, Tensor, float, float | None],
    taus: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """l of :func:`policy_loss`, and where the lower, the upper and the dual bound hold it."""
    eps_low, eps_high, dual_clip, delta = bounds
    rho, no = lr.detach().exp(), torch.zeros_like(lr, dtype=torch.bool)
    if kind in CLIPPED:
        upper = torch.where(a < 0, dual_clip, 1 + eps_high)
        if delta is not None:
            upper = torch.minimum(upper, torch.where(a < 0, (1 + eps_high).clamp_min(delta), delta))
        low, high, dual = (a < 0) & (rho < 1 - eps_low), (a > 0) & (rho > upper), (a < 0) & (rho > upper)
        flat = low | high | dual  # constant in logp; their ratio is masked before exp, so that none of it overflows
        bound = torch.where(low, 1 - eps_low, upper)
        return -a * torch.where(flat, bound, lr.masked_fill(flat, 0.0).exp()), low, high, dual
    if kind == "cispo":
        low, high = rho < 1 - eps_low, rho > 1 + eps_high
        return -torch.where(low, 1 - eps_low, torch.where(high, 1 + eps_high, rho)) * a * lp, low, high, no
    if kind == "sapo":
        tau = torch.where(a > 0, a.new_tensor(taus[0]), a.new_tensor(taus[1]))
        flat = tau * (rho - 1) > 800  # there the sigmoid is 1
        gate = torch.where(flat, 1.0, torch.sigmoid(tau * (lr.masked_fill(flat, 0.0).exp() - 1)))
        return -a * 4 / tau * gate, no, no, no
    if kind == "gmpo":
        return -a * lr.exp(), (a < 0) & (d < -eps_low), (a > 0) & (d > eps_high), no
    return (-a * lp if kind == "reinforce" else torch.zeros_like(lp)), no, no, no


def _kl(lp: Tensor, ref: Tensor, kl: str, clamp: float | None) -> Tensor:
    """Estimate of KL(policy || reference) per token."""
    x = ref - lp
    square = x.square() / 2
    base = kl.removesuffix("+")
    value = -x if base == "k1" else x.abs() if base == "abs" else square if base == "k2" else torch.expm1(x) - x
    if clamp is not None:
        value = value.clamp(-clamp, clamp)
    return value if base == kl else square - square.detach() + value.detach()


def _aggregate(loss: Tensor, row: Tensor, rows: int, agg: str, norm: float | Tensor | None, scale: float) -> Tensor:
    """loss [n] of the tokens that count, row [n] the sequence of each."""
    length = loss.new_zeros(rows).index_add(0, row, torch.ones_like(loss))
    if agg == "seq-mean-token-mean":
        loss = loss / (length + 1e-8)[row]
    elif agg == "trl-grpo":
        loss = loss / length[row]
    count = {"token-mean": float(len(loss)), "token-sum": 1.0, "trl-grpo": float(rows), "trl-dr_grpo": float(rows)}
    given = count.get(agg, (length > 0).sum()) if norm is None else norm
    total = torch.as_tensor(given, dtype=loss.dtype, device=loss.device).detach().reshape(())
    if agg in ("seq-mean-token-sum-norm", "trl-dr_grpo"):
        total = total * scale
    return torch.where(total == 0, 0.0, loss.sum() / torch.where(total == 0, 1.0, total))


def _padded_length(logp: Tensor) -> int:
    return max(logp.shape[-1], 1)


def _check_options(
    kind: str,
    agg: str,
    kl: str,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    dual_clip: float | None,
    delta: float | None,
    beta: float,
    ref_logp: Tensor | None,
    kl_ratio: bool,
    anchor: Tensor | None,
    scale: float | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, value, accepted in (("kind", kind, KINDS), ("kl", kl, KL_KINDS)):
        if value not in accepted:
            raise ValueError(f"{name}: got {value!r}, accepted are {list(accepted)}")
    _check_aggregation(agg, scale, cu_seqlens)
    if kind != "none" and advantages is None:
        raise ValueError(f"advantages: got None, {kind} needs them")
    if old_logp is None and (kind not in ("none", "reinforce") or kl_ratio):
        raise ValueError(f"old_logp: got None, {kind}{' with kl_ratio' if kl_ratio else ''} needs it")
    for name, bound in (("dual_clip", dual_clip), ("delta", delta)):
        if bound is not None and kind not in CLIPPED:
            raise ValueError(f"{name}: got {bound}, but {kind} has no such bound")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: got {dual_clip}, must be greater than 1")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta: got {delta}, must be positive")
    if ref_logp is None and (beta != 0 or kl_ratio or kind == "none"):
        raise ValueError(f"beta: got {beta}, kl_ratio {kl_ratio}, kind {kind!r}, without ref_logp")
    if kind == "none" and anchor is not None:
        raise ValueError("anchor: given, but kind none has no policy term")
    if kl_ratio and kind == "gmpo":
        raise ValueError("kl_ratio: got True, but gmpo has no ratio per token")


def _check_aggregation(agg: str, scale: float | None, cu_seqlens: Tensor | None) -> None:
    if agg not in AGGREGATIONS:
        raise ValueError(f"agg: got {agg!r}, accepted are {list(AGGREGATIONS)}")
    scaled = agg in ("seq-mean-token-sum-norm", "trl-dr_grpo")
    if scale is not None and not (scaled and scale > 0):
        raise ValueError(f"scale: got {scale}, must be positive, and is for seq-mean-token-sum-norm and trl-dr_grpo only")
    if scale is None and (agg == "trl-dr_grpo" or (scaled and cu_seqlens is not None)):
        raise ValueError(f"scale: got None, {agg} needs it")
