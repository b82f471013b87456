"""Losses of diffusion and flow models, and steps between noise levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.ops.types import LossOutput
from prefkern.reference._tokens import widen
from prefkern.reference.lists import _softplus


def diffusion_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each latent [B, ...]: [B]."""
    return (widen(pred) - widen(target)).square().reshape(len(pred), -1).mean(1)


def diffusion_margin(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    ref_mse_w: Tensor | None = None,
    ref_mse_l: Tensor | None = None,
    *,
    ref_w: Tensor | None = None,
    ref_l: Tensor | None = None,
    target_l: Tensor | None = None,
    beta: float,
    half: bool = True,
    weight: Tensor | None = None,
    negative: bool = False,
) -> Tensor:
    """The margins of B pairs, [B]. Gradient to pred_w and pred_l."""
    errors = _errors(pred_w, pred_l, target, ref_mse_w, ref_mse_l, ref_w, ref_l, target_l)
    return beta * (0.5 if half else 1.0) * _gap(errors, weight, negative)


def diffusion_pref_loss(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    ref_mse_w: Tensor | None = None,
    ref_mse_l: Tensor | None = None,
    *,
    ref_w: Tensor | None = None,
    ref_l: Tensor | None = None,
    target_l: Tensor | None = None,
    beta: float,
    half: bool = True,
    weight: Tensor | None = None,
    negative: bool = False,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
) -> LossOutput:
    """The loss of B pairs of latents [B, ...]. Gradient to pred_w and pred_l."""
    errors = _errors(pred_w, pred_l, target, ref_mse_w, ref_mse_l, ref_w, ref_l, target_l)
    gap = _gap(errors, weight, negative)
    margin = gap if loss_type == "ipo" else beta * (0.5 if half else 1.0) * gap
    if loss_type == "sigmoid":
        losses = _softplus(-margin)
    elif loss_type == "hinge":
        losses = F.relu(1 - margin)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"loss_type: got {loss_type!r}, accepted are ['sigmoid', 'hinge', 'ipo']")
    names = ("mse_w", "mse_l", "ref_mse_w", "ref_mse_l")
    metrics = {"margin": margin, "accuracy": (margin > 0).to(margin.dtype), **dict(zip(names, errors, strict=True))}
    loss = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    return LossOutput(loss, {name: value.detach().mean() for name, value in metrics.items()})


def x0_regression_loss(
    pred: Tensor,
    x: Tensor,
    target: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    loss_type: str = "huber",
    c: float = 1e-3,
    reduction: str = "mean",
) -> Tensor:
    """How far the clean latent that a noise prediction [B, ...] tells of is from a target. Gradient to pred."""
    alpha, sigma = (_over(value, pred) for value in (alpha, sigma))
    y = (widen(x) - sigma * widen(pred)) / alpha - widen(target)
    losses = (y.square() if loss_type == "l2" else (y.square() + c * c).sqrt() - c).reshape(len(pred), -1).mean(1)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def ddim_invert_step(x: Tensor, e1: Tensor, e2: Tensor | None = None, *, c1: Tensor | float, c2: Tensor | float) -> Tensor:
    """c1 x + c2 (e1 + e2) / 2, or c1 x + c2 e1."""
    e = widen(e1) if e2 is None else (widen(e1) + widen(e2)) / 2
    return (_over(c1, x) * widen(x) + _over(c2, x) * e).to(x.dtype)


def _errors(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    ref_mse_w: Tensor | None,
    ref_mse_l: Tensor | None,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    target_l: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m of winner and loser, r of both."""
    target_l = target if target_l is None else target_l
    of_w, of_l = diffusion_mse(pred_w, target), diffusion_mse(pred_l, target_l)
    if ref_mse_w is None or ref_mse_l is None:
        assert ref_w is not None and ref_l is not None
        return of_w, of_l, diffusion_mse(ref_w, target).detach(), diffusion_mse(ref_l, target_l).detach()
    return of_w, of_l, ref_mse_w.detach().to(of_w.dtype), ref_mse_l.detach().to(of_w.dtype)


def _gap(errors: tuple[Tensor, ...], weight: Tensor | None, negative: bool) -> Tensor:
    of_w, of_l, ref_w, ref_l = errors
    gap = (ref_w - ref_l) - (of_w - of_l)
    gap = gap if weight is None else gap * weight.detach().to(gap.dtype)
    return -gap if negative else gap


def _over(value: Tensor | float, like: Tensor) -> Tensor:
    """One number per latent, over its elements."""
    number = torch.as_tensor(value, device=like.device).to(widen(like).dtype)
    return number.reshape(-1, *(1,) * (like.dim() - 1)) if number.numel() > 1 else number
