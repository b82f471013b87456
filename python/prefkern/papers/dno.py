r"""DNO: regression of log-ratio differences on win rates against the policy that sampled; with hard labels, iterated DPO.

Rosset et al., "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
arXiv:2404.03715.
Evidence: paper. From its equations 8 to 13; no code was released.

With :math:`\pi_t` the policy that iteration t samples from, a constant, :math:`r_t(y) = E_{y'\sim\pi_t} P(y \succ y')` and
:math:`\delta_i = \log\pi(y_i) - \log\pi_t(y_i)`, sums over tokens, a pair of responses has (equations 8, 11 and 12)

.. math::
    z = \sigma(r_t(y_1) - r_t(y_2)), \quad D = \eta\,(\delta_1 - \delta_2), \qquad
    L = -\frac1B \sum \bigl[z \log\sigma(D) + (1 - z) \log\sigma(-D)\bigr]

z is a constant and not divided by :math:`\eta`. Swapping the two responses changes nothing. The gradient in
:math:`\delta_1` is :math:`\eta(\sigma(D) - z)/B`: 0 where :math:`D = r_1 - r_2`, which the paper's target policy fulfils,
whatever pairs are drawn (equation 9, `dno_target`):

.. math::
    \pi_{t+1}(y) \propto \pi_t(y)\, e^{r_t(y)/\eta}, \qquad
    P(\pi_{t+1} \succ \pi_t) \ge \tfrac12 + \eta\,\mathrm{KL}(\pi_{t+1} \| \pi_t)

(Its equation 10 has :math:`\eta Z_t` where :math:`\eta \log Z_t` is meant; in pairs it cancels.) What the paper runs is
DNO-Prct (equation 13), :math:`-\log\sigma(\eta(\delta_+ - \delta_-))`: DPO with beta = eta whose reference is :math:`\pi_t`,
anew in every iteration.

Where theory and runs differ: win rates lie in [0, 1], so z is never above :math:`\sigma(1) = 0.73`, while the runs use hard
labels on pairs with a large margin. `reward_scale` c turns r and eta into c r and c eta: the same target, and labels that
approach hard ones. Which pairs are kept is data selection. The paper's regularised variant, which mixes :math:`\pi_t` with the
reference first, is not here, nor its extra supervised term, whose formula the text does not give.

Defaults: eta 0.1 (0.05 in some of the paper's runs). Equal win rates are a label of 1/2, which pulls the two log-ratios
together, and stay. Win rates outside [0, 1] are a ValueError. A batch without pairs has loss 0 and gradients of 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values

about = About(
    name="DNO",
    title="Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
    arxiv="2404.03715",
    year=2024,
    family="pairwise, soft labels",
    evidence="paper",
    note="its equations 8 to 13; no code was released",
)


def dno_loss(
    logp: Tensor,
    pair_logp: Tensor,
    ref_logp: Tensor,
    pair_ref_logp: Tensor,
    winrate: Tensor,
    pair_winrate: Tensor,
    *,
    eta: float = 0.1,
    reward_scale: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, in either order, all [P]; the other halves are `pair_...`. Gradient to logp and pair_logp.

    ref_logp, pair_ref_logp: under the policy that sampled in this iteration.
    winrate, pair_winrate: r_t of each response, in [0, 1].
    reward_scale: c; multiplies win rates and eta.
    mask: bool, the pairs that count.

    Metrics: those of `prefkern.preference_loss`, whose chosen response is the first of the pair and whose rewards are
    c eta delta.
    """
    _check_positive("eta", eta)
    _check_positive("reward_scale", reward_scale)
    check_rows(
        len(logp), pair_logp=pair_logp, ref_logp=ref_logp, pair_ref_logp=pair_ref_logp, winrate=winrate,
        pair_winrate=pair_winrate, mask=mask,
    )  # fmt: skip
    dtype = torch.promote_types(logp.dtype, torch.float32)
    first, second = (_rate(name, r, mask).to(dtype) for name, r in (("winrate", winrate), ("pair_winrate", pair_winrate)))
    return preference_loss(
        logp, pair_logp, ref_logp, pair_ref_logp, kind="sigmoid", beta=reward_scale * eta,
        label_smoothing=torch.sigmoid(reward_scale * (second - first)), mask=mask, reduction=reduction,
    )  # fmt: skip


def dno_prct_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    eta: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DNO-Prct, as run: hard labels. All [P]; the reference is the policy that sampled in this iteration.

    Metrics: those of `prefkern.preference_loss`.
    """
    _check_positive("eta", eta)
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp,
        kind="sigmoid", beta=eta, mask=mask, reduction=reduction,
    )  # fmt: skip


def dno_target(logp: Tensor, preference: Tensor, *, eta: float = 0.1) -> tuple[Tensor, Tensor]:
    """Over n responses: win rates r_t [..., n] against a policy, and log-probs [..., n] of the target policy. No gradient.

    logp: [..., n], log-probs of the policy that samples. preference: [..., n, n], the probability that the row's response
    beats the column's.
    """
    _check_positive("eta", eta)
    n = logp.shape[-1]
    if preference.shape[-2:] != (n, n):
        raise ValueError(f"preference has shape {list(preference.shape)}; [..., {n}, {n}] is expected")
    with torch.no_grad():
        winrate = (preference @ torch.softmax(logp, -1).unsqueeze(-1)).squeeze(-1)
        return winrate, torch.log_softmax(logp + winrate / eta, -1)


def _rate(name: str, r: Tensor, mask: Tensor | None) -> Tensor:
    """A win rate as a constant; NaN where it is none and that may not be looked at."""
    r = r.detach()
    good = (r >= 0) & (r <= 1)
    check_values(name, r, good if mask is None else good | ~mask, "a win rate in [0, 1] is expected")
    return torch.where(good, r, torch.nan)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")


@dataclass(frozen=True)
class DNO(PairRecipe):
    """DNO-Prct, as run; with `soft` the regression on win rates. The reference is the policy that sampled.

    `soft` takes "winrate" and "pair_winrate", [P] each, from `pairs.extra`, and has a use for `reward_scale`.
    """

    name: ClassVar[str] = "dno"
    eta: float = 0.1
    soft: bool = False
    reward_scale: float = 1.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        first, second = pairs.log_ratios()
        sides = (first, second, torch.zeros_like(first).detach(), torch.zeros_like(second).detach())
        if not self.soft:
            return dno_prct_loss(*sides, eta=self.eta)
        rates = (pairs.require("winrate"), pairs.require("pair_winrate"))
        return dno_loss(*sides, *rates, eta=self.eta, reward_scale=self.reward_scale)


recipe = DNO()
