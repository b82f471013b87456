r"""MODPO: multi-objective DPO. The other objectives' rewards become a margin inside the loss of one objective's pairs.

Zhou et al., "Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization", arXiv:2310.03708.
Evidence: code. Losses and gradients were checked against the authors' release.

Of n objectives with weights w, number 0 has the preference pairs, and the others have frozen rewards :math:`m_k`, explicit or
the implicit ones of DPO models (:func:`implicit_reward`). With :math:`M_y = \sum_{k \ge 1} w_k m_k(y)`

.. math::
    r_y = \frac{1}{w_0} \Bigl[\beta \log\frac{\pi(y)}{\pi_\mathrm{ref}(y)} - M_y\Bigr], \qquad
    L = \mathrm{mean}\; -\log\sigma(r_w - r_l) \;\text{ or }\; \max(0, 1 - (r_w - r_l))

Sums over tokens; margins, weights and reference are constants. At the optimum the policy is the one that is optimal for the
sum of all rewards by their weights. A margin that both sides of a pair share cancels. Without other objectives it is DPO with
:math:`\beta / w_0`; so it is where margins are equal: the effective beta grows as :math:`w_0` falls.

Paper and release agree. The release does not check the weights: here those that do not add up to 1, whose result is a
rescaled reward, bring a warning, and :math:`w_0 \le 0` is a ValueError; below 0.01 the loss is hardly more than its margins.
Defaults are those of its scripts: beta 0.1. A NaN margin is a ValueError on the CPU."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_values

__all__ = ["MODPO", "about", "implicit_reward", "modpo_loss", "modpo_rewards", "recipe"]

about = About(
    name="MODPO",
    title="Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization",
    arxiv="2310.03708",
    year=2023,
    family="pairwise, margin",
    evidence="code",
    note="the authors' release",
)


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float = 0.1) -> Tensor:
    """The reward [B] that a DPO model stands for, beta times its log-ratio; from sums over tokens. A constant."""
    return beta * (logp.detach() - ref_logp.detach())


def modpo_rewards(
    logp: Tensor, ref_logp: Tensor, margin: Tensor | None, weights: Sequence[float], *, beta: float = 0.1
) -> Tensor:
    """r [B] of responses, from sums over tokens; with a gradient to logp."""
    first = _checked(weights)
    return (beta * (logp - ref_logp.detach()) - _margin("margin", margin, weights, logp)) / first


def modpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    chosen_margin: Tensor | None,
    rejected_margin: Tensor | None,
    weights: Sequence[float],
    *,
    beta: float = 0.1,
    kind: Literal["sigmoid", "hinge"] = "sigmoid",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of pairs that objective 0 has judged. Gradient to chosen_logp and rejected_logp.

    chosen_logp to ref_rejected_logp: [P], sums over tokens; None for 0, of log-ratios. chosen_margin, rejected_margin: the
    other objectives' rewards, [P, n - 1], or [P] for a single one; None without others. weights: n numbers, objective 0
    first.

    Metrics: those of :func:`prefkern.preference_loss`, whose rewards are beta times the log-ratio, and margin_gap, the mean of
    M_w - M_l.
    """
    choice("kind", kind, ("sigmoid", "hinge"))
    choice("reduction", reduction, ("mean", "sum", "none"))
    first = _checked(weights)
    gap = _margin("chosen_margin", chosen_margin, weights, chosen_logp) - _margin(
        "rejected_margin", rejected_margin, weights, rejected_logp
    )
    loss, metrics = preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind=kind, beta=beta, scale=1 / first,
        offset=gap / first, reduction=reduction,
    )  # fmt: skip
    return LossOutput(loss, {**metrics, "margin_gap": gap.sum() / max(len(gap), 1)})


@dataclass(frozen=True)
class MODPO(PairRecipe):
    """Pairs of one objective; `extra` holds the rewards of the others, `chosen_margin` and `rejected_margin`."""

    name: ClassVar[str] = "modpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "chosen_margin", "rejected_margin")
    weights: tuple[float, ...] = (0.5, 0.5)
    """One per objective, that of the pairs first."""
    beta: float = 0.1
    kind: Literal["sigmoid", "hinge"] = "sigmoid"

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        margins = pairs.require("chosen_margin"), pairs.require("rejected_margin")
        return modpo_loss(*pairs.log_ratios(), None, None, *margins, **self.options())


recipe = MODPO()


def _checked(weights: Sequence[float]) -> float:
    """w_0."""
    if not len(weights):
        raise ValueError("weights is empty; one number per objective is expected, that of the pairs first")
    if not weights[0] > 0:
        raise ValueError(f"weights[0] is {weights[0]}; it must be positive, 0.01 or more")
    if not abs(sum(weights) - 1) < 1e-6:
        warnings.warn(f"weights add up to {sum(weights)}, not 1: the result is that of a rescaled reward", stacklevel=3)
    return float(weights[0])


def _margin(name: str, margin: Tensor | None, weights: Sequence[float], like: Tensor) -> Tensor:
    """M [P], summed in the order of the objectives."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    total = torch.zeros(like.shape, dtype=wide, device=like.device)
    columns = margin if margin is None or margin.dim() != 1 else margin[:, None]
    expected = (len(like), len(weights) - 1)
    if columns is None:
        if expected[1]:
            raise ValueError(f"{name} is None; {list(expected)} is expected for {len(weights)} weights")
        return total
    if columns.shape != expected:
        raise ValueError(f"{name} has shape {list(columns.shape)}; {list(expected)} is expected for {len(weights)} weights")
    check_values(name, columns, ~columns.isnan().any(1), "numbers are expected")
    for k, weight in enumerate(weights[1:]):
        total = total + weight * columns[:, k].detach().to(total)
    return total
