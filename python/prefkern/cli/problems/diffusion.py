"""Losses of pairs of denoised latents and of predicted clean latents, and inversion steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prefkern.cli.problems.base import Problem, problem

PAIRS, LATENT = 5, (4, 9, 7)


def diffusion_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Predictions near a reference that is far from the target, so that errors cancel."""
    latents = torch.randn(8, PAIRS, *LATENT)
    target, target_l, ref_w, ref_l, change_w, change_l, x, clean = latents.unbind()
    ref_w, ref_l = (target + 0.5 * ref_w).to(dtype), (target + 0.5 * ref_l).to(dtype)
    pred_w, pred_l = (ref_w + 0.02 * change_w).to(dtype), (ref_l + 0.02 * change_l).to(dtype)
    target, target_l, x, clean = (t.to(dtype) for t in (target, target_l, x, clean))
    leaves, weight = {"pred_w": pred_w, "pred_l": pred_l}, torch.linspace(-1, 4, PAIRS)
    pair = {"target": target, "ref_w": ref_w, "ref_l": ref_l, "beta": 200.0}
    for loss_type in ("sigmoid", "hinge"):
        yield problem("diffusion_pref_loss", loss_type, leaves, {**pair, "loss_type": loss_type, "weight": weight})
    yield problem("diffusion_pref_loss", "ipo, exchanged", leaves, {**pair, "beta": 2.0, "loss_type": "ipo", "negative": True})
    apart = {**pair, "target_l": target_l, "beta": 5.0, "half": False}
    yield problem("diffusion_pref_loss", "a target for each side", leaves, apart)
    yield problem("diffusion_margin", "margins", leaves, {**pair, "beta": 5.0})
    yield problem("diffusion_mse", "errors", {}, {"pred": pred_w, "target": target})
    alpha, sigma = torch.linspace(0.3, 0.9, PAIRS), torch.linspace(0.9, 0.3, PAIRS)
    for loss_type in ("huber", "l2"):
        options = {"x": x, "target": clean, "alpha": alpha, "sigma": sigma, "loss_type": loss_type, "c": 0.1}
        yield problem("x0_regression_loss", loss_type, {"pred": pred_w}, options)
    if dtype in (torch.float32, torch.float64):  # narrower results are rounded
        yield problem("ddim_invert_step", "two predictions", {}, {"x": x, "e1": pred_w, "e2": pred_l, "c1": alpha, "c2": sigma})
