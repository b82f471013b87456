r"""MADPO: margin-adaptive DPO. A reward model says by how much each pair's target margin is stretched or shrunk.

"Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference Optimization", arXiv:2510.05342.
Evidence: code. Weights, loss and gradient were checked against the author's release; the paper itself could be read only in its
abstract and in reviews.

With the frozen reward model's margin :math:`h = r(y_w) - r(y_l)` and :math:`\sigma` the logistic function

.. math::
    c(m) = c_{\min} + \frac{c_{\max} - c_{\min}}{1 + \frac{c_{\max} - 1}{1 - c_{\min}} e^{\lambda (m - \tau)}}, \qquad
    w = \begin{cases} \sigma(c(|h|)\,h) / \sigma(h) & h > -\tau \\ 1 & \text{else} \end{cases}

.. math:: L = \mathrm{mean}\; w \cdot -\log\sigma\bigl(\beta [x_w - x_l]\bigr), \qquad x = \log\pi - \log\pi_\mathrm{ref}

c falls from :math:`c_{\max}` to :math:`c_{\min}`, and is 1 at :math:`\tau`. The mean is over pairs, not weights. w is a
constant. Why this w: of pairs seen in both orders as often as h says, the minimiser is :math:`\beta (x_w - x_l) = c(|h|)\,h`,
as long as :math:`|h| < \tau`.

What the weights are not: with the published settings those of pairs with h > 0 lie within [0.9949, 1.2060], so that easy
pairs are hardly damped; what is large is the damping of pairs whose label the reward model contradicts (down to 0.031 at h =
-4.41). The "amplified" and "dampened" of the abstract speak of target margins. At :math:`h \le -\tau` the weight jumps back
to 1, as in the release; `floor_below_tau=False` goes on with the ratio, held at e^80.

Defaults are those of the published runs: c_max 2, c_min 1 / c_max, lambda 1, tau log 999, beta 0.1. (Those of the release's
class are tau 2.) The release's weights are NaN for margins beyond the range of exp; here they are finite for any. A NaN
margin is a ValueError on the CPU, and NaN on CUDA."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import LossOutput, preference_loss
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values

__all__ = ["MADPO", "about", "madpo_loss", "madpo_scale", "madpo_weight", "recipe"]

about = About(
    name="MADPO",
    title="Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference Optimization",
    arxiv="2510.05342",
    year=2025,
    family="pair weight",
    evidence="code",
    note="the author's release",
)

TAU = math.log(999)
_LARGEST = 80.0  # of log w without a floor: finite in float32


def madpo_scale(
    size: Tensor, *, c_max: float = 2.0, c_min: float | None = None, lmbda: float = 1.0, tau: float = TAU
) -> Tensor:
    """c(m): what the target margin of a pair is multiplied by, for the size m = |h| of its margin."""
    c_min = _checked(c_max, c_min, lmbda, tau)
    if c_max == c_min:
        return torch.ones_like(size)
    return c_min + (c_max - c_min) * torch.sigmoid(-lmbda * (size - tau) - math.log((c_max - 1) / (1 - c_min)))


def madpo_weight(
    margin: Tensor,
    *,
    c_max: float = 2.0,
    c_min: float | None = None,
    lmbda: float = 1.0,
    tau: float = TAU,
    floor_below_tau: bool = True,
) -> Tensor:
    """The weights [P] of pairs, from the reward margins [P]. Constants; float32, or float64 for float64.

    c_min: None for 1 / c_max; 0 < c_min < 1 < c_max, or both 1, which is DPO. floor_below_tau: weight 1 at margins of -tau and
    below.
    """
    check_values("margin", margin, ~margin.isnan(), "a number is expected")
    h = margin.detach() if margin.dtype == torch.float64 else margin.detach().float()
    c = madpo_scale(h.abs(), c_max=c_max, c_min=c_min, lmbda=lmbda, tau=tau)
    # log sigma(c h) - log sigma(h), each sign in the form that does not cancel
    above = F.softplus(-h.abs()) - F.softplus(-c * h.abs())
    log_weight = torch.where(h < 0, above + (1 - c) * h.abs(), above)
    weight = torch.where(c == 1, 1.0, log_weight.clamp(max=_LARGEST).exp())
    if floor_below_tau:
        weight = torch.where(h <= -tau, 1.0, weight)
    return torch.where(h.isnan(), torch.nan, weight)


def madpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    margin: Tensor,
    *,
    beta: float = 0.1,
    c_max: float = 2.0,
    c_min: float | None = None,
    lmbda: float = 1.0,
    tau: float = TAU,
    floor_below_tau: bool = True,
) -> LossOutput:
    """DPO's loss, each pair with its :func:`madpo_weight`. Gradient to chosen_logp and rejected_logp.

    chosen_logp to ref_rejected_logp: [P], sums over tokens; None for 0, of log-ratios. margin: [P], chosen less rejected, of
    the reward model.

    Metrics: those of :func:`prefkern.preference_loss`, and weight_mean.
    """
    check_rows(len(chosen_logp), margin=margin)
    weight = madpo_weight(margin, c_max=c_max, c_min=c_min, lmbda=lmbda, tau=tau, floor_below_tau=floor_below_tau)
    loss, metrics = preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, weight=weight.to(chosen_logp.dtype)
    )
    return LossOutput(loss, {**metrics, "weight_mean": weight.mean()})


@dataclass(frozen=True)
class MADPO(PairRecipe):
    """DPO whose pairs are weighted by a reward model's margins: `margin` [P] in `extra`."""

    name: ClassVar[str] = "madpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "margin")
    beta: float = 0.1
    c_max: float = 2.0
    c_min: float | None = None
    lmbda: float = 1.0
    tau: float = TAU
    floor_below_tau: bool = True

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return madpo_loss(*pairs.log_ratios(), None, None, pairs.require("margin"), **self.options())


recipe = MADPO()


def _checked(c_max: float, c_min: float | None, lmbda: float, tau: float) -> float:
    """c_min."""
    if not lmbda >= 0:
        raise ValueError(f"lmbda is {lmbda}; it must not be negative")
    if not tau >= 0:
        raise ValueError(f"tau is {tau}; it must not be negative")
    if c_min is None:
        c_min = 1 / c_max if c_max > 0 else 0.0
    if not (0 < c_min < 1 < c_max < math.inf or c_min == c_max == 1):
        raise ValueError(f"c_min is {c_min} and c_max is {c_max}; 0 < c_min < 1 < c_max is expected, or both 1")
    return c_min
