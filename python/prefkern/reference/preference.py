"""Losses of preference pairs and of single judged responses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.ops.types import LossOutput


def score_of(x: Tensor, score: str, alpha: float, exp_cap: float, max_p: float | None) -> tuple[Tensor, Tensor]:
    """The score of a log-ratio, and where its exponent is held (it then has no gradient)."""
    none = torch.zeros_like(x, dtype=torch.bool)
    if score == "alpha_divergence" and abs(alpha) < 1e-6:
        score = "reverse_kl"
    if score == "reverse_kl":
        return x, none
    if score in ("forward_kl", "alpha_divergence"):
        a = 1.0 if score == "forward_kl" else alpha
        return -torch.expm1((-a * x).clamp(max=exp_cap)) / a, -a * x > exp_cap
    if score == "js_divergence":
        return math.log(2) + F.logsigmoid(x), none
    if score == "log_odds":
        held = none if max_p is None else x > math.log(max_p)
        below = torch.where(held, -1.0, x)
        log_rest = torch.where(below < -math.log(2), torch.log1p(-below.exp()), torch.log(-torch.expm1(below)))
        return torch.where(held, x - math.log1p(-(0.5 if max_p is None else max_p)), x - log_rest), held
    power = x.clamp(max=exp_cap).exp()
    return (x + power if score == "chi" else power), x > exp_cap


def preference_loss(  # noqa: PLR0912, PLR0915  (one formula after the other)
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    rejected_beta: float | None = None,
    scale: float | Tensor = 1.0,
    score: str = "reverse_kl",
    alpha: float = 0.5,
    exp_cap: float = 80.0,
    max_p: float | None = None,
    average: str | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    offset: float | Tensor = 0.0,
    label_smoothing: float | Tensor = 0.0,
    chosen_target: float | Tensor | None = None,
    rejected_target: float | Tensor | None = None,
    weight: Tensor | None = None,
    tie: Tensor | None = None,
    mask: Tensor | None = None,
    tau: float | None = None,
    penalty: float | None = None,
    gamma: float | None = None,
    nu: float | None = None,
    sft: float | None = None,
    clip: float | None = None,
    factor: float = 1.0,
    reduction: str = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    """`prefkern.preference_loss`."""
    dtype = torch.promote_types(chosen_logp.dtype, torch.float32)
    keep = torch.ones_like(chosen_logp, dtype=torch.bool) if mask is None else mask

    def constant(value: Any) -> Any:
        """A number, or a tensor of which pairs that do not count hold something harmless."""
        if not isinstance(value, Tensor):
            return value
        value = value.detach().to(dtype)
        return torch.where(keep, value, 0.25) if value.shape == keep.shape else value

    def side(logp: Tensor, ref: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.where(keep, logp.to(dtype), -1.0)
        x = x if ref is None else x - torch.where(keep, ref.detach().to(dtype), 0.0)
        n = torch.ones_like(x) if lengths is None else torch.where(keep, lengths.to(dtype), 1.0)
        x = x / n if average == "logp" else x
        s, held = score_of(x, score, alpha, exp_cap, max_p)
        return x, s / n if average == "score" else s, held

    x_w, s_w, held_w = side(chosen_logp, ref_chosen_logp, chosen_lengths)
    _, s_l, held_l = side(rejected_logp, ref_rejected_logp, rejected_lengths)
    beta_l = beta if rejected_beta is None else rejected_beta
    c, o, e = constant(scale), constant(offset), constant(label_smoothing)
    if kind in ("ipo", "sppo_hard", "cal_dpo"):
        u_w, u_l = c * s_w, c * s_l
    else:
        u_w, u_l = c * beta * s_w, c * beta_l * s_l
    z = u_w - u_l - o
    z = z if clip is None else z.clamp(-clip, clip)
    q_w, q_l, q, nll = torch.sigmoid(u_w), torch.sigmoid(u_l), torch.sigmoid(z), -F.logsigmoid(z)
    logistic = nll + e * z

    def to_targets(default: float) -> Tensor:
        t_w = default if chosen_target is None else constant(chosen_target)
        t_l = -default if rejected_target is None else constant(rejected_target)
        return factor * ((u_w - t_w) ** 2 + (u_l - t_l) ** 2)

    def ties(win: Tensor, tied: Tensor) -> Tensor:
        return win if tie is None else torch.where(tie & keep, tied, win)

    if kind == "sigmoid":
        loss = logistic
    elif kind == "robust":
        loss = ((1 - e) * nll - e * -F.logsigmoid(-z)) / (1 - 2 * e)
    elif kind in ("hinge", "truncated_quadratic"):
        loss = (1 - z).clamp(min=0)
        loss = loss if kind == "hinge" else loss**2
    elif kind == "ipo":
        loss = (z - 1 / (2 * beta)) ** 2
    elif kind == "squared":
        loss = z**2
    elif kind == "exo_pair":
        log_e, log_rest = (math.log(e), math.log1p(-e)) if not isinstance(e, Tensor) else (e.log(), torch.log1p(-e))
        loss = q * (-nll - log_rest) + torch.sigmoid(-z) * (F.logsigmoid(-z) - log_e)
    elif kind == "nca_pair":
        loss = -F.logsigmoid(u_w) - F.logsigmoid(-u_w) / 2 - F.logsigmoid(-u_l) / 2
    elif kind == "bco_pair":
        loss = -F.logsigmoid(u_w - o) - F.logsigmoid(o - u_l)
    elif kind == "squared_targets":
        loss = to_targets(0.0)
    elif kind == "sppo_hard":
        loss = to_targets(1 / (2 * beta))
    elif kind == "cal_dpo":
        loss = logistic + to_targets(1 / (2 * beta))
    elif kind == "apo_zero":
        loss = 1 - q_w + q_l
    elif kind == "apo_down":
        loss = q_w + 1 - q
    elif kind == "discopop":
        log_m = F.logsigmoid(z / (0.05 if tau is None else tau))
        loss = (1 - log_m.exp()) * nll + (log_m - z).exp()
    elif kind == "dpop":
        penalised = z - (50.0 if penalty is None else penalty) * (-u_w).clamp(min=0)
        loss = -F.logsigmoid(penalised) + e * penalised
    elif kind == "focal":
        loss = (-(0.05 if gamma is None else gamma) * nll).exp() * nll
    elif kind == "rao_kupper":
        assert nu is not None
        win = -F.logsigmoid(z - math.log(nu))
        loss = ties(win, win - F.logsigmoid(-z - math.log(nu)) - math.log(nu**2 - 1))
    elif kind == "davidson":
        assert nu is not None
        win = torch.logsumexp(torch.stack([torch.zeros_like(z), -z, math.log(2 * nu) - z / 2]), 0)
        loss = ties(win, win - math.log(2 * nu) + z / 2)
    elif kind == "exponential":
        loss = (-z).exp()
    elif kind == "savage":
        loss = torch.sigmoid(-z) ** 2
    elif kind == "linear":
        loss = -z
    elif kind == "asft":
        loss = -(1.0 if sft is None else sft) * x_w + factor * (-F.logsigmoid(u_w) - F.logsigmoid(-u_l))
    else:
        raise ValueError(f"kind is {kind!r}")

    rewards = (beta * s_w.detach(), beta_l * s_l.detach())
    return _output(loss, keep, constant(weight), reduction, norm, rewards, rewards[0] > rewards[1], held_w | held_l, keep, keep)


def unpaired_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    desirable: Tensor,
    *,
    kind: str = "kto",
    beta: float = 0.1,
    kl: float | Tensor | None = None,
    scale: float | Tensor = 1.0,
    score: str = "reverse_kl",
    alpha: float = 0.5,
    exp_cap: float = 80.0,
    max_p: float | None = None,
    average: str | None = None,
    lengths: Tensor | None = None,
    offset: float | Tensor = 0.0,
    weight: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    factor: float = 1.0,
    reduction: str = "mean",
    norm: float | Tensor | None = None,
) -> LossOutput:
    """`prefkern.unpaired_loss`."""
    dtype = torch.promote_types(logp.dtype, torch.float32)
    keep = torch.ones_like(desirable) if mask is None else mask

    def constant(value: Any) -> Any:
        return value.detach().to(dtype) if isinstance(value, Tensor) else value

    x = torch.where(keep, logp.to(dtype), -1.0)
    x = x if ref_logp is None else x - torch.where(keep, ref_logp.detach().to(dtype), 0.0)
    n = torch.ones_like(x) if lengths is None else torch.where(keep, lengths.to(dtype), 1.0)
    s, held = score_of(x / n if average == "logp" else x, score, alpha, exp_cap, max_p)
    s = s / n if average == "score" else s
    u, o = constant(scale) * beta * s, constant(offset)
    if kl is not None:
        o = beta * torch.as_tensor(kl, dtype=dtype, device=x.device).detach().clamp(min=0)
    v = torch.where(desirable, u - o, o - u)
    by_kind = {"kto": 1 - torch.sigmoid(v), "bco": -F.logsigmoid(v), "squared": (u - o) ** 2 / 2}
    loss = by_kind["kto" if kind == "apo_zero" else kind]
    loss = factor * loss * torch.where(desirable, loss.new_tensor(desirable_weight), loss.new_tensor(undesirable_weight))
    reward = beta * s.detach()
    correct = torch.where(desirable, reward > 0, reward < 0)
    sides = (keep & desirable, keep & ~desirable)
    return _output(loss, keep, constant(weight), reduction, norm, (reward, reward), correct, held, *sides)


def label_posterior(margin: Tensor, reliability: float | Tensor, annotator: Tensor | None = None) -> Tensor:
    """`prefkern.label_posterior`."""
    d = margin.detach().to(torch.promote_types(margin.dtype, torch.float32))
    eta = torch.as_tensor(reliability, dtype=d.dtype, device=d.device).detach().clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid(d + torch.logit(eta if annotator is None else eta.reshape(-1)[annotator.long()]))


def _output(
    loss: Tensor, keep: Tensor, weight: Tensor | None, reduction: str, norm: float | Tensor | None,
    rewards: tuple[Tensor, Tensor], correct: Tensor, held: Tensor, chosen: Tensor, rejected: Tensor,
) -> LossOutput:  # fmt: skip
    """Losses of pairs that count, weighted and reduced, and the metrics."""
    weights = torch.where(keep, torch.ones_like(loss) if weight is None else weight, 0.0)
    loss = torch.where(weights > 0, loss, 0.0) * weights
    count = keep.sum().to(loss.dtype)

    def mean(values: Tensor, of: Tensor) -> Tensor:
        return torch.where(of, values.to(loss.dtype), 0.0).sum() / of.sum().clamp(min=1)

    means = mean(rewards[0], chosen), mean(rewards[1], rejected)
    metrics = {
        "chosen_reward": means[0], "rejected_reward": means[1], "reward_margin": means[0] - means[1],
        "accuracy": mean(correct, keep), "clamped": (held & keep).sum().to(loss.dtype), "pairs": count,
    }  # fmt: skip
    if reduction == "none":
        return LossOutput(loss, metrics)
    divisor = {"mean": count, "weighted_mean": weights.sum(), "sum": torch.ones_like(count)}[reduction]
    divisor = divisor if norm is None else torch.as_tensor(norm, dtype=loss.dtype, device=loss.device)
    return LossOutput(torch.where(divisor == 0, 0.0, loss.sum() / torch.where(divisor == 0, 1.0, divisor)), metrics)
