r"""SmPO-Diffusion: pairs weighted by how far a reward model tells their images apart, and noise found by inversion.

"Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied Human Preferences",
arXiv:2506.02698.
Evidence: code. The authors' release: inversion, target noise, loss and gradient. What is said of the paper besides comes from
public notes.

The label of a person is replaced by that of a reward model with scores S, normalised to :math:`n(S) = (S - S_\min) / (S_\max -
S_\min)`, and the preference is smoothed: :math:`p = \sigma(n_w - n_l), \alpha = \gamma p`, and the pair's weight is

.. math:: 2\alpha - \gamma = \gamma \tanh\bigl(\tfrac12 (n_w - n_l)\bigr) \ge 0

(:func:`smooth_weight`). In place of random noise each image gets its own, by inverting it to the timestep t with one correction
a step (:func:`renoise_invert`), :math:`\tau = (x - a_t x_0) / s_t`; winner and loser have different :math:`\tau`. With m the
mean squared errors against :math:`\tau`, r those of the reference,

.. math:: L = -\log\sigma\bigl(-\tfrac12 \beta\, w\, [(m_w - r_w) - (m_l - r_l)]\bigr)

(:func:`smpo_loss`). Neither x nor :math:`\tau`, weight or reference has a gradient.

Where paper and code differ:

- The half is the code's; `half=False` is the paper's loss.
- Levels. After its last step the latent is at the last level of the grid below t, :math:`u`, but the code's network and
  :math:`\tau` use t: the target then holds :math:`\frac{a_u - a_t}{s_t} x_0`, a part of the clean image. `match_level="code"`,
  the default, reproduces that; with "exact" both are at u.
- The text has one correction behind the inversion; the code corrects in every step, by averaging two predictions.
- The code takes weight and timestep of the first pair of a micro-batch for all; here each pair has its own.

Defaults: gamma 10, S between the two constants of the authors' data set. beta 2000 and 5 levels (SD 1.5), 5000 and 10 (SDXL);
required.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, ddim_coefficients, ddim_invert_step, diffusion_pref_loss
from ..ops._arguments import check_tensors, number
from ..ops.diffusion import Reduction, check_schedule, latent_step
from ._about import About
from ._noise import host_levels, scaled_linear_abar
from ._shared import check_finite, may_look

__all__ = [
    "SCORE_MAX",
    "SCORE_MIN",
    "Inverted",
    "SmoothWeights",
    "about",
    "renoise_invert",
    "scaled_linear_abar",
    "smooth_weight",
    "smpo_loss",
]

about = About(
    name="SmPO-Diffusion",
    title="Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied Human Preferences",
    arxiv="2506.02698",
    year=2025,
    family="diffusion, pairwise",
    evidence="code",
    note="the authors' release",
)

SCORE_MIN, SCORE_MAX = 0.11543526500463486, 0.28201571106910706
"""The least and the largest PickScore of the authors' data set."""


class SmoothWeights(NamedTuple):
    """Labels and weights of B pairs."""

    first_wins: Tensor
    """bool [B]: whether the first image is the winner. Of equal scores the second is."""
    weight: Tensor
    """[B], not negative."""


class Inverted(NamedTuple):
    """Latents brought to a noise level."""

    x: Tensor
    """[B, ...]."""
    tau: Tensor
    """[B, ...]: the noise that they are taken to hold; the target of the network at x."""
    t: Tensor
    """int64 [B], on the device of x: the timestep for the network."""


def smooth_weight(
    score_a: Tensor, score_b: Tensor, *, gamma: float = 10.0, smin: float = SCORE_MIN, smax: float = SCORE_MAX
) -> SmoothWeights:
    """Who wins of B pairs of images, and by which weight: constants, float32, or float64 for float64 scores.

    score_a, score_b: [B], of the reward model. Scores outside of smin and smax are taken as they are, with a warning where they
    may be looked at: on the CPU. There a score that is not finite is a ValueError; on CUDA its weight is NaN.
    """
    check_tensors(score_a=score_a, score_b=score_b)
    if score_a.dim() != 1 or score_b.shape != score_a.shape:
        raise ValueError(
            f"score_a and score_b have shapes {list(score_a.shape)} and {list(score_b.shape)}; [B] is expected twice"
        )
    if not 0 < number("gamma", gamma) < torch.inf:
        raise ValueError(f"gamma is {gamma}; it must be finite and positive")
    if not number("smin", smin) < number("smax", smax):
        raise ValueError(f"smin is {smin} and smax {smax}; smin must be less than smax")
    wide = torch.float64 if torch.float64 in (score_a.dtype, score_b.dtype) else torch.float32
    a, b = score_a.detach().to(wide), score_b.detach().to(wide)
    check_finite("score_a", a)
    check_finite("score_b", b)
    if may_look(a, b) and len(a) and (min(float(a.min()), float(b.min())) < smin or max(float(a.max()), float(b.max())) > smax):
        warnings.warn(f"scores outside of smin {smin} and smax {smax}: weights may exceed {_most(gamma):.3g}", stacklevel=2)
    return SmoothWeights(a > b, gamma * ((a - b).abs() / (2 * (smax - smin))).tanh())


@torch.no_grad()
def renoise_invert(
    eps_fn: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor | int,
    *,
    abar: Tensor,
    n_steps: int,
    match_level: Literal["code", "exact"] = "code",
) -> Inverted:
    """Clean latents inverted to the levels below t, each step with one correction, and the noise that they then hold. No
    gradient.

    Args:
        eps_fn: called with latents [B, ...] and levels int64 [B], returns the noise that the model in training predicts,
            without guidance. Twice a level of the grid, for all B as long as one of them still has a step to make.
        x0: [B, ...].
        t: timesteps, one or [B]. Of a tensor on CUDA this waits for the device.
        abar: the cumulative alphas, [T], as from `scaled_linear_abar`.
        n_steps: n; the grid is k floor(T / n) + 1 for k from 0 to n - 1, of which each latent takes what is below its t.
        match_level: "code": tau and the network's timestep at t. "exact": at the level reached, 0 where there is none below t.

    The clean latents are taken to be at level 0. Raises ValueError where a level that is divided by has no noise (abar = 1).
    """
    check_tensors(x0=x0)
    choice("match_level", match_level, ("code", "exact"))
    table = check_schedule(abar).cpu()
    if not 1 <= n_steps <= len(table):
        raise ValueError(f"n_steps is {n_steps}; it must be at least 1 and at most {len(table)}")
    if x0.dim() == 0 or len(x0) == 0:
        raise ValueError(f"x0 has shape {list(x0.shape)}; [B, ...] is expected, B at least 1")
    wanted, stride = host_levels("t", t, len(x0), 0, len(table) - 1), len(table) // n_steps
    x, reached = x0, torch.zeros_like(wanted)
    for k in range(n_steps):
        u = k * stride + 1
        moves = wanted > u
        if u >= len(table) or not bool(moves.any()):
            break
        c1, c2 = ddim_coefficients(table, u, max(u - stride, 0))
        first, second = torch.where(moves, c1, 1.0).to(x.device), torch.where(moves, c2, 0.0).to(x.device)
        level = torch.full((len(x),), u, device=x.device)
        e1 = eps_fn(x, level)
        e2 = eps_fn(ddim_invert_step(x, e1, c1=first, c2=second), level)
        x = ddim_invert_step(x, e1, e2, c1=first, c2=second)
        reached = torch.where(moves, u, reached)
    at = wanted if match_level == "code" else reached
    noise = (1 - table[at]).sqrt()
    if not bool((noise > 0).all()):
        i = int((noise <= 0).nonzero()[0, 0])
        raise ValueError(f"abar[{int(at[i])}] is 1: there is no noise at that level, by which tau of row {i} would be divided")
    tau = latent_step(x, x0, None, torch.stack([1 / noise, -table[at].sqrt() / noise]).to(x.device))
    return Inverted(x, tau, at.to(x.device))


def smpo_loss(
    pred_w: Tensor,
    pred_l: Tensor,
    tau_w: Tensor,
    tau_l: Tensor,
    weight: Tensor,
    ref_mse_w: Tensor | None = None,
    ref_mse_l: Tensor | None = None,
    *,
    ref_w: Tensor | None = None,
    ref_l: Tensor | None = None,
    beta: float,
    half: bool = True,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of B pairs from predictions and the noises found by inversion, [B, ...] each, and weights [B]. Gradient to
    pred_w and pred_l.

    `prefkern.diffusion_pref_loss` with a target for each side, whose arguments and metrics these are. A negative weight prefers
    the other; one of 0 has loss log 2 and no gradient.
    """
    return diffusion_pref_loss(
        pred_w, pred_l, tau_w, ref_mse_w, ref_mse_l, ref_w=ref_w, ref_l=ref_l, target_l=tau_l, beta=beta, half=half,
        weight=weight, reduction=reduction,
    )  # fmt: skip


def _most(gamma: float) -> float:
    """The weight of the largest difference within the bounds."""
    return gamma * float(torch.tensor(0.5).tanh())
