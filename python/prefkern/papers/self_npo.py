r"""Self-NPO: a model made worse by its own truncated samples, to be guided away from; and its parent, Diffusion-NPO.

"Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning", arXiv:2505.11777.
Evidence: code. The authors' release: the pair losses with their gradients, the roll-out with its freezing, the noising and the
regression loss. What is said of the paper besides comes from a public note of it.

**Diffusion-NPO** trains the negative model on preference pairs by the loss of `prefkern.papers.diffusion_dpo` with winner and
loser exchanged, and without the half:

.. math:: L = -\log\sigma\bigl(\beta [(m_w - m_l) - (r_w - r_l)]\bigr)

Its script's hinge and ipo are `loss_type` of :func:`prefkern.diffusion_pref_loss` (the ipo branch names an attribute that does
not exist, so that its formula was not tested by its authors). Its variant for step-wise preferences, with :math:`\rho` the
ratio of policy and reference held in :math:`[1 - \epsilon, 1 + \epsilon]`:

.. math:: L = -\log\sigma\bigl(\beta [\log\rho_w - \log\rho_l]\bigr)

**Self-NPO** needs no pairs (truncated diffusion fine-tuning):

1. :func:`tdft_rollout`: from :math:`x` at a level :math:`t_j = (j + 1) \lfloor T / N \rfloor - 1` of a grid of N, K DDIM steps
   of the reference, :math:`e = e_c + w (e_c - e_u)`, down to level 0 at most, where a sample stays. The clean latent that the
   reference predicts at the level reached is the target.
2. :func:`tdft_renoise`: noise is added to the latent reached, not to the clean one, up to a later level s:
   :math:`x_s = \frac{a_s}{a_t} x_t + \sqrt{1 - \bar\alpha_s / \bar\alpha_t}\,\epsilon`.
3. :func:`tdft_loss`: :math:`\sqrt{y^2 + c^2} - c` with y the difference of the clean latent that the model predicts at s and
   the target.

At inference :math:`e = e_- + g (e_+ - e_-)` (:func:`npo_cfg`), the negative model with the empty or negative prompt; the
paper's :math:`\omega` is g - 1. The negative weights may be blended first (:func:`merge_negative`):
:math:`\theta_- = \theta + \alpha \eta + \beta \delta`, :math:`\eta` being the preference-tuned minus the base weights and
:math:`\delta` the negative minus the base. The code's merge weight m is :math:`\alpha = 1 - m, \beta = 1`. Were the two
predictions independent, guidance would raise the variance to :math:`2 \omega^2 + 2 \omega + 1`: they must stay correlated.

Where paper and code differ:

- "Data-free": the code starts roll-outs from noised images of a folder, not from noise. Here x and j are arguments.
- The guidance w of the roll-out is not in the paper. The code's -1 (SD 1.5, :data:`GUIDANCE`) is exactly the unconditional
  prediction, its -5 (SDXL) an anti-prompt. There is no default.
- The reference reads as frozen; the code moves it after the student (:func:`ema_update_`, 0.999). Frozen is what one gets
  without that call.

Defaults are the code's scripts': K = 5, N = 25, huber with c = 1e-3 (its argument parser's default is l2). beta of
Diffusion-NPO: 500 (SD 1.5), 2000 (SDXL), without the half; required. SPO: beta 10, eps 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import LossOutput, diffusion_pref_loss, x0_regression_loss
from ..ops._arguments import check_tensors, number
from ..ops.diffusion import DiffusionLossType, Reduction, _level, check_schedule, latent_step
from ._about import About
from ._noise import host_levels, scaled_linear_abar

__all__ = [
    "GUIDANCE",
    "Renoised",
    "TruncatedRollout",
    "about",
    "diffusion_npo_loss",
    "ema_update_",
    "merge_negative",
    "npo_cfg",
    "scaled_linear_abar",
    "spo_pair_loss",
    "tdft_loss",
    "tdft_renoise",
    "tdft_rollout",
]

about = About(
    name="Self-NPO",
    title="Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning",
    arxiv="2505.11777",
    year=2025,
    family="diffusion, pairwise and regression",
    evidence="code",
    note="the authors' release, and that of Diffusion-DPO",
)

GUIDANCE = {"sd15": -1.0, "sdxl": -5.0}
"""w of the roll-outs of the authors' two scripts."""

Weights = TypeVar("Weights", Tensor, Mapping[str, Tensor])


class TruncatedRollout(NamedTuple):
    """What a truncated roll-out reached."""

    x: Tensor
    """[B, ...]: the latents."""
    t: Tensor
    """int64 [B], on the device of x: their levels."""
    x0: Tensor
    """[B, ...]: the clean latents that the reference predicts; the target."""


class Renoised(NamedTuple):
    """Latents at a later level."""

    x: Tensor
    """[B, ...]."""
    s: Tensor
    """int64 [B]: the level."""
    noise: Tensor
    """[B, ...]: what was added, before its factor."""


def diffusion_npo_loss(
    pred_w: Tensor,
    pred_l: Tensor,
    target: Tensor,
    ref_mse_w: Tensor | None = None,
    ref_mse_l: Tensor | None = None,
    *,
    ref_w: Tensor | None = None,
    ref_l: Tensor | None = None,
    beta: float,
    half: bool = False,
    weight: Tensor | None = None,
    loss_type: DiffusionLossType = "sigmoid",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Diffusion-NPO's loss of B pairs in which w is preferred: the negative model learns the opposite.

    `prefkern.diffusion_pref_loss` with negative=True, whose arguments and metrics these are; its margin is that of the
    exchanged pair.
    """
    return diffusion_pref_loss(
        pred_w, pred_l, target, ref_mse_w, ref_mse_l, ref_w=ref_w, ref_l=ref_l, beta=beta, half=half, weight=weight,
        negative=True, loss_type=loss_type, reduction=reduction,
    )  # fmt: skip


def spo_pair_loss(
    logp_w: Tensor,
    logp_l: Tensor,
    ref_logp_w: Tensor,
    ref_logp_l: Tensor,
    *,
    beta: float = 10.0,
    eps: float = 0.1,
    negative: bool = False,
) -> LossOutput:
    """The loss of B pairs of denoising steps from their log-probs, [B] each; ratios outside of 1 - eps and 1 + eps are held
    there, and have no gradient. Gradient to logp_w and logp_l.

    negative: exchange w and l. Metrics: margin, accuracy, clip_fraction (of both sides).
    """
    check_tensors(logp_w=logp_w, logp_l=logp_l, ref_logp_w=ref_logp_w, ref_logp_l=ref_logp_l)
    if logp_w.dim() != 1 or len(logp_w) == 0:
        raise ValueError(f"logp_w has shape {list(logp_w.shape)}; [B] is expected, B at least 1")
    for name, t in (("logp_l", logp_l), ("ref_logp_w", ref_logp_w), ("ref_logp_l", ref_logp_l)):
        if t.shape != logp_w.shape:
            raise ValueError(f"{name} has shape {list(t.shape)}; [{len(logp_w)}] is expected")
    if not 0 < number("beta", beta) < torch.inf:
        raise ValueError(f"beta is {beta}; it must be finite and positive")
    if not 0 < number("eps", eps) < 1:
        raise ValueError(f"eps is {eps}; it must be greater than 0 and less than 1")
    low, high = torch.tensor([1 - eps, 1 + eps], dtype=torch.float64).log().tolist()
    ratios = torch.stack([logp_w - ref_logp_w.detach(), logp_l - ref_logp_l.detach()])
    held = ratios.clamp(low, high)
    margin = beta * (held[1] - held[0] if negative else held[0] - held[1])
    with torch.no_grad():
        metrics = {
            "margin": margin.mean(),
            "accuracy": (margin > 0).to(margin.dtype).mean(),
            "clip_fraction": (held != ratios).to(margin.dtype).mean(),
        }
    return LossOutput(-F.logsigmoid(margin).mean(), metrics)


@torch.no_grad()
def tdft_rollout(
    eps_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    j: Tensor | int,
    *,
    guidance: float | Literal["sd15", "sdxl"],
    abar: Tensor,
    n_ddim: int = 25,
    steps: int = 5,
) -> TruncatedRollout:
    """A few deterministic steps of the reference, and the clean latents it then predicts. No gradient.

    Args:
        eps_fn: called with latents [B, ...] and levels int64 [B], returns the noise the reference predicts with and without
            the prompt.
        x: [B, ...], noised to level (j + 1) floor(T / n_ddim) - 1: data that were noised, or, from the last level, noise.
        j: the place of that level in the grid, 0 to n_ddim - 1, one or [B]. Of a tensor on CUDA this waits for the device.
        guidance: w, or the name of one of :data:`GUIDANCE`. With -1 the prediction with the prompt has no effect.
        abar: the cumulative alphas, [T], as from `scaled_linear_abar`.
        steps: K, at least 1. A sample that reaches level 0 stays. If all do before K steps, the target is the clean latent that
            was predicted last, as in the code; otherwise one more evaluation makes it.
    """
    check_tensors(x=x)
    table = check_schedule(abar).cpu()
    for name, value, most in (("n_ddim", n_ddim, len(table)), ("steps", steps, None)):
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"{name} is {value}; it must be at least 1{f' and at most {most}' if most else ''}")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x has shape {list(x.shape)}; [B, ...] is expected, B at least 1")
    w = _guidance(guidance)
    place, stride = host_levels("j", j, len(x), 0, n_ddim - 1), len(table) // n_ddim

    def level(k: Tensor) -> Tensor:
        return torch.where(k < 0, 0, (k + 1) * stride - 1)

    for step in range(steps + 1):
        t = level(place)
        a, s = table[t].sqrt(), (1 - table[t]).sqrt()
        levels = t.to(x.device)
        cond, uncond = eps_fn(x, levels)
        # Of x, of the prediction with the prompt, and of that without: e = (1 + w) cond - w uncond.
        clean = torch.stack([1 / a, -s / a * (1 + w), s / a * w])
        if step == steps:
            break
        place = (place - 1).clamp_min(-1)
        below = table[level(place)]
        a_p, s_p = below.sqrt(), (1 - below).sqrt()
        e = s_p - a_p * s / a
        onward = torch.stack([a_p / a, e * (1 + w), -e * w])
        stays = t == level(place)
        onward = torch.where(stays, torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64), onward)
        done = step + 1 < steps and bool((place < 0).all())
        if done:
            x0 = latent_step(x, cond, uncond, clean.to(x.device))
        x = latent_step(x, cond, uncond, onward.to(x.device))
        if done:
            return TruncatedRollout(x, level(place).to(x.device), x0)
    return TruncatedRollout(x, levels, latent_step(x, cond, uncond, clean.to(x.device)))


@torch.no_grad()
def tdft_renoise(
    x: Tensor,
    t: Tensor | int,
    s: Tensor | int | None = None,
    noise: Tensor | None = None,
    *,
    abar: Tensor,
    generator: torch.Generator | None = None,
) -> Renoised:
    """Latents at level t noised on to level s: exactly what noising the clean latent to s would give in distribution, if they
    are such at t. No gradient.

    Args:
        x: [B, ...]. t: int, one or [B].
        s: greater than t, one or [B]; None: drawn evenly from t + 1 to T - 1.
        noise: like x; None: drawn. generator: for what is drawn, on the device of x.
        abar: [T].

    Raises ValueError for an s that is not later than t, and for t = T - 1, after which there is none (on the CPU; such latents
    come out NaN on CUDA).
    """
    check_tensors(x=x)
    table = check_schedule(abar)
    last = len(table) - 1
    t = _levels("t", t, x)
    _look("t", t, torch.zeros_like(t), torch.full_like(t, last - 1))
    if s is None:
        share = torch.rand(len(x), dtype=torch.float64, device=x.device, generator=generator)
        s = (t + 1 + (share * (last - t)).long()).clamp_max(last)
    s = _levels("s", s, x)
    _look("s", s, t + 1, torch.full_like(t, last))
    if noise is None:
        noise = torch.empty_like(x).normal_(generator=generator)
    # The ratio, not a difference of variances, which cancels.
    a_t, a_s = _level(table, t, "t")[0], _level(table, s, "s")[0]
    ratio = torch.where(s > t, a_s / a_t, torch.nan)
    return Renoised(latent_step(x, noise, None, torch.stack([ratio, (1 - ratio.square()).sqrt()])), s, noise)


def tdft_loss(
    eps_theta: Tensor,
    x_s: Tensor,
    s: Tensor | int,
    x0: Tensor,
    *,
    abar: Tensor,
    loss_type: Literal["huber", "l2"] = "huber",
    c: float = 1e-3,
    reduction: Reduction = "mean",
) -> Tensor:
    """How far the clean latent told by the model's prediction [B, ...] at level s is from the target: see
    `prefkern.x0_regression_loss`. Gradient to eps_theta. 0-d, or [B] without a reduction."""
    check_tensors(eps_theta=eps_theta)
    a, sigma = _level(abar, _levels("s", s, eps_theta), "s")
    return x0_regression_loss(eps_theta, x_s, x0, a, sigma, loss_type=loss_type, c=c, reduction=reduction)


def merge_negative(theta: Weights, eta: Weights, delta: Weights, alpha: float, beta: float) -> Weights:
    """The weights of the negative model, theta + alpha eta + beta delta: of a tensor, or of every tensor of a state dict.

    eta: preference-tuned minus base weights; delta: negative minus base. Integers (buffers) are those of theta. Half precision
    is added up in float32.
    """
    alpha, beta = number("alpha", alpha), number("beta", beta)
    if isinstance(theta, Tensor):
        check_tensors(eta=eta, delta=delta)
        return _merged("theta", theta, eta, delta, alpha, beta)
    for name, other in (("eta", eta), ("delta", delta)):
        if not isinstance(other, Mapping):
            raise TypeError(f"{name} is a {type(other).__name__}; theta is a mapping, so that one is expected")
        if other.keys() != theta.keys():
            differing = sorted(other.keys() ^ theta.keys())
            raise ValueError(f"{name} and theta differ in their keys: {', '.join(map(repr, differing[:5]))}")
    merged = {name: _merged(name, t, eta[name], delta[name], alpha, beta) for name, t in theta.items()}
    return merged


def npo_cfg(eps_pos: Tensor, eps_neg: Tensor, scale: float | Tensor) -> Tensor:
    """eps_neg + scale (eps_pos - eps_neg): the positive network with the prompt, the negative with the empty or negative
    prompt. The paper's omega is scale - 1. Gradients to all."""
    check_tensors(eps_pos=eps_pos, eps_neg=eps_neg)
    if eps_pos.shape != eps_neg.shape:
        raise ValueError(f"eps_neg has shape {list(eps_neg.shape)}; eps_pos has shape {list(eps_pos.shape)}")
    return eps_neg + scale * (eps_pos - eps_neg)


@torch.no_grad()
def ema_update_(reference: Iterable[Tensor], student: Iterable[Tensor], decay: float = 0.999) -> None:
    """Move the reference's parameters after the student's: decay reference + (1 - decay) student, in place."""
    if not 0 <= number("decay", decay) <= 1:
        raise ValueError(f"decay is {decay}; it must be between 0 and 1")
    for ours, theirs in zip(reference, student, strict=True):
        ours.lerp_(theirs.to(ours.dtype), 1 - decay)


def _guidance(w: float | str) -> float:
    if isinstance(w, str):
        if w not in GUIDANCE:
            raise ValueError(f"guidance is {w!r}; accepted: a number, {', '.join(map(repr, GUIDANCE))}")
        return GUIDANCE[w]
    return number("guidance", w)


def _levels(name: str, t: Tensor | int, x: Tensor) -> Tensor:
    """int64 [B] on the device of x."""
    t = t if isinstance(t, Tensor) else torch.tensor(t)
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {str(t.dtype)[6:]}; integers are expected")
    if t.shape not in ((), (1,), (len(x),)):
        raise ValueError(f"{name} has shape {list(t.shape)}; [{len(x)}] is expected, or one element")
    return t.to(x.device, torch.int64).expand(len(x))


def _look(name: str, t: Tensor, low: Tensor, high: Tensor) -> None:
    """On the CPU, ValueError for the first level that is not within its bounds."""
    if t.device.type != "cpu":
        return
    bad = (t < low) | (t > high)
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        why = ", later than t" if name == "s" else ", so that a later level exists"
        raise ValueError(f"{name}[{i}] is {int(t[i])}; accepted: {int(low[i])} to {int(high[i])}{why}")


def _merged(name: str, theta: Tensor, eta: Tensor, delta: Tensor, alpha: float, beta: float) -> Tensor:
    for other, t in (("eta", eta), ("delta", delta)):
        if t.shape != theta.shape:
            raise ValueError(f"{name}: {other} has shape {list(t.shape)}; theta has shape {list(theta.shape)}")
    if not theta.is_floating_point():
        return theta.clone()
    wide = torch.promote_types(theta.dtype, torch.float32)
    return (theta.to(wide) + alpha * eta.to(wide) + beta * delta.to(wide)).to(theta.dtype)
