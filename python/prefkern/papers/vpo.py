r"""VPO: value-incentivised preference optimisation. One regulariser for optimism online and pessimism offline.

Cen et al., "Value-Incentivized Preference Optimization: A Unified Approach to Online and Offline RLHF", arXiv:2405.19320.
(Not the VPO of "V-usable information".)
Evidence: paper. Stated from knowledge of the paper and re-derived on a table; the text of its equations could not be read
again, and no code was released. TRL's XPO has the online term with the reference as calibration.

With :math:`x = \log\pi - \log\pi_\mathrm{ref}`, summed over tokens, and calibration responses :math:`y_c` of a fixed
distribution

.. math::
    L = \mathrm{mean}\; -\log\sigma\bigl(\beta [x_w - x_l]\bigr) \;\pm\; \alpha \beta\, \mathrm{mean}_c\; x(y_c), \qquad
    \hat J = -\beta\, \mathrm{mean}_c\; x(y_c)

with + online, which makes calibration responses less likely, to look elsewhere, and - offline, which keeps them likely. The
second term is :math:`\mp \alpha \hat J`: the value of the best policy, when the reward's shift is fixed by having no mean
under the calibration distribution. The reference is constant and only moves the reported value.

Calibrate online with samples of the reference or of the last policy, offline with responses of the data set: with the chosen
ones, offline VPO is DPO plus alpha beta times their negative log-likelihood (RPO's regulariser), up to a constant. With the
rejected ones it would raise those: a warning.

What is chosen here: means, where the paper sums its first term over the data set, so that its alpha absorbs the size; and
sums over tokens in the second, which grow with length (`cal_lengths` divides by it). beta 0.1 and alpha 0.01 are this
library's, the paper's are not known. The online term has no lower bound: watch `value`, or hold log-probs at `cal_floor`,
below which they have no gradient (off by default). alpha = 0 is DPO, and needs no calibration responses; else none is a
ValueError. A NaN log-prob is a ValueError on the CPU."""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values, may_look

__all__ = ["VPO", "about", "recipe", "vpo_loss"]

about = About(
    name="VPO",
    title="Value-Incentivized Preference Optimization: A Unified Approach to Online and Offline RLHF",
    arxiv="2405.19320",
    year=2024,
    family="pairwise, value term",
    evidence="paper",
    note="from memory, re-derived on a table",
)

MODES = ("online", "offline")


def vpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    cal_logp: Tensor | None,
    ref_cal_logp: Tensor | None,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    mode: Literal["online", "offline"] = "online",
    cal_weight: Tensor | None = None,
    cal_lengths: Tensor | None = None,
    cal_floor: float | None = None,
) -> LossOutput:
    """The loss of P pairs and C calibration responses. Gradient to chosen_logp, rejected_logp and cal_logp.

    chosen_logp to ref_rejected_logp: [P], sums over tokens; the reference None for 0, of log-ratios. cal_logp, ref_cal_logp:
    [C], alike. cal_weight: [C], not negative; instead of 1/C, after division by their sum. cal_lengths: [C], divides the
    log-ratios. cal_floor: log-probs of calibration responses are held at this.

    Metrics: those of :func:`prefkern.preference_loss`, pair_loss, and value, the estimate of the best policy's.
    """
    choice("mode", mode, MODES)
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; it must not be negative; the mode is the sign")
    for name, logp in (
        ("chosen_logp", chosen_logp), ("rejected_logp", rejected_logp), ("ref_chosen_logp", ref_chosen_logp),
        ("ref_rejected_logp", ref_rejected_logp), ("cal_logp", cal_logp), ("ref_cal_logp", ref_cal_logp),
    ):  # fmt: skip
        if logp is not None:
            check_values(name, logp, ~logp.isnan(), "a log-prob is expected")
    pair_loss, metrics = preference_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta)
    metrics = {**metrics, "pair_loss": pair_loss.detach()}
    if cal_logp is None or ref_cal_logp is None or len(cal_logp) == 0:
        if alpha:
            raise ValueError(f"cal_logp or ref_cal_logp has no responses; alpha {alpha} needs some")
        return LossOutput(pair_loss, {**metrics, "value": torch.zeros_like(pair_loss.detach())})
    if mode == "offline" and alpha and _same(cal_logp, rejected_logp):
        warnings.warn("the calibration responses are the rejected ones: offline VPO makes them more likely", stacklevel=2)
    ratio = _mean_ratio(cal_logp, ref_cal_logp, cal_weight, cal_lengths, cal_floor).to(pair_loss.dtype)
    metrics["value"] = -beta * ratio.detach()
    if alpha == 0:
        return LossOutput(pair_loss, metrics)
    return LossOutput(pair_loss + (alpha if mode == "online" else -alpha) * beta * ratio, metrics)


@dataclass(frozen=True)
class VPO(PairRecipe):
    """DPO and a value term. `extra` holds `cal_logp`, with its gradient, and `ref_cal_logp`, sums over tokens [C]; offline,
    where it does not, the chosen responses calibrate."""

    name: ClassVar[str] = "vpo"
    beta: float = 0.1
    alpha: float = 0.01
    mode: Literal["online", "offline"] = "online"
    cal_floor: float | None = None

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        ratios = pairs.log_ratios()
        calibration = (pairs.get("cal_logp"), pairs.get("ref_cal_logp"))
        if calibration == (None, None) and self.mode == "offline":
            chosen, references = pairs.log_probs().chosen, pairs.ref_log_probs().chosen
            calibration = (chosen, references)
        return vpo_loss(*ratios, None, None, *calibration, **self.options())


recipe = VPO()


def _mean_ratio(logp: Tensor, ref_logp: Tensor, weight: Tensor | None, lengths: Tensor | None, floor: float | None) -> Tensor:
    check_rows(len(logp), ref_cal_logp=ref_logp, cal_weight=weight, cal_lengths=lengths)
    if logp.dtype != torch.float64:
        logp = logp.float()
    ratio = (logp if floor is None else logp.clamp(min=floor)) - ref_logp.detach()
    if lengths is not None:
        check_values("cal_lengths", lengths, lengths > 0, "every calibration response needs a token")
        ratio = ratio / lengths
    if weight is None:
        return ratio.mean()
    check_values("cal_weight", weight, (weight >= 0) & weight.isfinite(), "finite weights that are not negative are expected")
    if may_look(weight) and not bool(weight.any()):
        raise ValueError("cal_weight is 0 everywhere; one must be positive")
    share = weight.detach().to(ratio.dtype)
    return (ratio * (share / share.sum())).sum()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same responses, as far as log-probs tell without waiting for a device."""
    return one is other or (one.shape == other.shape and may_look(one, other) and bool((one == other).all()))
