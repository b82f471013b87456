"""Losses of lists of scored items, of two groups of them, and of a skew-symmetric score of two embeddings."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.ops.types import LossOutput
from prefkern.reference._tokens import widen

LIST_KINDS = ("plackett_luce", "lambda", "uniform", "exo", "infonca", "nca", "rrhf", "lire")


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own is x above 20."""
    return -F.logsigmoid(-x)


def _reduced(losses: Tensor, counts: Tensor, reduction: str, norm: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    divisor = counts.sum() if norm is None else torch.as_tensor(norm, dtype=losses.dtype, device=losses.device).reshape(())
    return torch.where(divisor == 0, 0.0 * losses.sum(), losses.sum() / divisor.masked_fill(divisor == 0, 1.0))


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return values.detach().masked_fill(~counts, 0.0).sum() / counts.sum().clamp_min(1)


def listwise_loss(
    scores: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: str,
    beta: float = 1.0,
    gain: Literal["exp2", "linear"] = "exp2",
    rank: Literal["labels", "scores"] = "labels",
    normalize: Literal["sum", "pairs"] = "sum",
    label_temperature: float = 1.0,
    label_smoothing: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    """The loss of lists of K items with scores [B, K] and labels [B, K], the higher the better; u = beta * scores.

    A list in which no two items that count have different labels has loss 0 and is not counted. Gradient to scores only.
    """
    if kind not in LIST_KINDS:
        raise ValueError(f"kind: got {kind!r}, accepted are {list(LIST_KINDS)}")
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    u = (beta * widen(scores)).masked_fill(~keep, 0.0)
    if u.shape[1] == 0:
        labels = u = F.pad(u, (0, 1))
        keep = torch.zeros_like(u, dtype=torch.bool)
    v = -torch.arange(u.shape[1], dtype=u.dtype, device=u.device).expand_as(u) if labels is None else labels.to(u.dtype)
    v = v.masked_fill(~keep, 0.0).detach()
    best, worst = v.masked_fill(~keep, -torch.inf).amax(1), v.masked_fill(~keep, torch.inf).amin(1)
    compares = best > worst
    if kind in ("exo", "infonca", "nca", "lire"):
        losses = _of_items(kind, u, v, _log_target(v, keep, best, label_temperature, label_smoothing), keep)
    else:
        both = keep[:, :, None] & keep[:, None, :]
        wins = both & (v[:, :, None] > v[:, None, :])
        if kind == "plackett_luce":
            losses = _plackett_luce(u, wins)
        else:
            margin = u[:, :, None] - u[:, None, :]
            each = F.relu(-margin) if kind == "rrhf" else _softplus(-margin)
            if kind == "lambda":
                each = each * _lambda_weights(v, (v if rank == "labels" else u.detach()), both, gain)
            losses = torch.where(wins, each, 0.0).sum((1, 2))
            if normalize == "pairs":
                losses = losses / wins.sum((1, 2)).clamp_min(1)
    losses = torch.where(compares, losses, 0.0)
    highest = u.detach().masked_fill(~keep, -torch.inf).argmax(1, keepdim=True)
    metrics = {
        "lists": compares.sum().to(u.dtype),
        "top1": _mean((v.gather(1, highest)[:, 0] == best).to(u.dtype), compares),
        "items": _mean(keep.sum(1).to(u.dtype), compares),
    }
    return LossOutput(_reduced(losses, compares, reduction, norm), metrics)


def _plackett_luce(u: Tensor, wins: Tensor) -> Tensor:
    """The sum over items of -log sigmoid(u - logsumexp of what they win over)."""
    below = wins.any(2)
    lower = torch.where(below[:, :, None], u[:, None, :].expand_as(wins).masked_fill(~wins, -torch.inf), 0.0)
    return torch.where(below, _softplus(lower.logsumexp(2) - u), 0.0).sum(1)


def _lambda_weights(v: Tensor, key: Tensor, both: Tensor, gain: str) -> Tensor:
    index = torch.arange(v.shape[1], device=v.device)
    equal_before = (key[:, None, :] == key[:, :, None]) & (index[None, None, :] < index[None, :, None])
    rank = 1 + (((key[:, None, :] > key[:, :, None]) | equal_before) & both).sum(2).to(v.dtype)
    discount, g = 1 / torch.log1p(rank), (torch.exp2(v) - 1 if gain == "exp2" else v)
    return (g[:, :, None] - g[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


def _log_softmax(x: Tensor, keep: Tensor) -> Tensor:
    """0 outside the mask."""
    x = torch.where(keep.any(1, keepdim=True), x.masked_fill(~keep, -torch.inf), 0.0)
    return x.log_softmax(1).masked_fill(~keep, 0.0)


def _log_target(v: Tensor, keep: Tensor, best: Tensor, temperature: float, smoothing: float | None) -> Tensor:
    if smoothing is None:
        return _log_softmax(v / temperature, keep)
    top = keep & (v == best[:, None])
    at_top, others = top.sum(1, keepdim=True).to(v.dtype), (keep & ~top).sum(1, keepdim=True).to(v.dtype)
    return torch.where(top, (1 - smoothing) / at_top, smoothing / others.clamp_min(1)).log().masked_fill(~keep, 0.0)


def _of_items(kind: str, u: Tensor, v: Tensor, log_t: Tensor, keep: Tensor) -> Tensor:
    log_p = _log_softmax(u, keep)
    p, t = log_p.exp(), log_t.exp()
    if kind == "exo":
        each = p * (log_p - log_t)
    elif kind == "infonca":
        each = -t * log_p
    elif kind == "nca":
        each = t * _softplus(-u) + _softplus(u) / keep.sum(1, keepdim=True).clamp_min(1)
    else:
        each = -p * v
    return torch.where(keep, each, 0.0).sum(1)


def group_preference_loss(
    scores: Tensor,
    is_winner: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    lam: float = 1.0,
    ddof: int = 0,
    var_scale: Literal["logratio", "reward"] = "logratio",
    reduction: Literal["mean", "sum", "none"] = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    """-log sigmoid(beta (mean of winners - mean of losers)) + lam * Var(winners), per row of scores [B, G].

    A row without a winner or without a loser has loss 0 and is not counted.
    """
    s = widen(scores)
    keep = torch.ones_like(is_winner) if mask is None else mask
    s = s.masked_fill(~keep, 0.0)
    wins, loses = keep & is_winner, keep & ~is_winner
    n, m = wins.sum(1), loses.sum(1)
    counts = (n > 0) & (m > 0)
    winner = s.masked_fill(~wins, 0.0).sum(1) / n.clamp_min(1)
    loser = s.masked_fill(~loses, 0.0).sum(1) / m.clamp_min(1)
    preference = _softplus(-beta * (winner - loser))
    squares = (s - winner[:, None]).square().masked_fill(~wins, 0.0).sum(1)
    variance = torch.where(n > ddof, squares / (n - ddof).clamp_min(1), 0.0 * squares)
    if var_scale == "reward":
        variance = beta**2 * variance
    losses = torch.where(counts, preference + lam * variance, 0.0)
    metrics = {
        "rows": counts.sum().to(s.dtype), "preference": _mean(preference, counts), "variance": _mean(variance, counts)
    }  # fmt: skip
    return LossOutput(_reduced(losses, counts, reduction, norm), metrics)


def _normalized(v: Tensor, normalize: bool) -> Tensor:
    return F.normalize(v, dim=-1, eps=1e-12) if normalize else v


def _skew(a: Tensor, b: Tensor, scales: Tensor | None) -> Tensor:
    blocks = a[..., 0::2] * b[..., 1::2] - a[..., 1::2] * b[..., 0::2]
    return (blocks if scales is None else blocks * scales).sum(-1)


def skew_score(v_i: Tensor, v_j: Tensor, scales: Tensor | None = None, *, normalize: bool = True) -> Tensor:
    """The score of i over j, [B]: sum over l of s_l (v_i[2l] v_j[2l + 1] - v_i[2l + 1] v_j[2l])."""
    scales = None if scales is None else widen(scales)
    return _skew(_normalized(widen(v_i), normalize), _normalized(widen(v_j), normalize), scales)


def skew_loss(
    v_chosen: Tensor,
    v_rejected: Tensor,
    scales: Tensor | None = None,
    *,
    tau: float = 0.1,
    margin: Tensor | None = None,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    """-log sigmoid((score of chosen over rejected - margin) / tau), of embeddings [B, 2k]."""
    score = skew_score(v_chosen, v_rejected, scales, normalize=normalize)
    z = (score if margin is None else score - margin.to(score.dtype).detach()) / tau
    every = torch.ones_like(score, dtype=torch.bool)
    metrics = {
        "rows": every.sum().to(score.dtype),
        "prob": _mean(z.sigmoid(), every),
        "accuracy": _mean((score > 0).to(score.dtype), every),
    }
    return LossOutput(_reduced(_softplus(-z), every, reduction, norm), metrics)


def skew_row_means(
    v: Tensor, mask: Tensor | None = None, scales: Tensor | None = None, *, tau: float = 0.1, normalize: bool = True
) -> Tensor:
    """The mean over the items of its list of each item's score over them, / tau: [B, K]. By the table of all pairs."""
    n = _normalized(widen(v), normalize).detach()
    keep = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device) if mask is None else mask
    n = n.masked_fill(~keep[:, :, None], 0.0)
    scales = None if scales is None else widen(scales).detach()[:, None, None]
    table = _skew(n[:, :, None], n[:, None, :], scales) / tau
    return table.sum(2) / keep.sum(1, keepdim=True).clamp_min(1)
