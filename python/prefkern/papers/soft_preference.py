r"""Soft preference learning: entropy and cross-entropy with the reference weigh apart.

Slocum et al., "Diverse Preference Learning for Capabilities and Alignment", arXiv:2511.08594.
Evidence: paper. The optimum below follows from the objective; no code was compared.

DPO's divergence from the reference is a cross-entropy with the reference less the policy's entropy. With weights :math:`\beta`
of the former and :math:`\alpha` of the latter, the optimum is
:math:`\pi \propto \pi_\mathrm{ref}^{\beta / \alpha} e^{r / \alpha}`, so that

.. math::
    L = -\log\sigma\Bigl(\alpha \log\frac{\pi(y_w)}{\pi(y_l)}
        - \beta \log\frac{\pi_\mathrm{ref}(y_w)}{\pi_\mathrm{ref}(y_l)}\Bigr)

of log-probs summed over each response, averaged over pairs. :math:`\alpha = \beta` is DPO; a larger :math:`\alpha` asks for a
flatter policy, with the same pull to the reference. :math:`\beta = 0` needs no reference.

Rewards among the metrics are :math:`\alpha \log\pi - \beta \log\pi_\mathrm{ref}`. Defaults: alpha and beta 0.1, which is DPO;
the paper varies alpha.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="Soft Preference Learning",
    title="Diverse Preference Learning for Capabilities and Alignment",
    arxiv="2511.08594",
    year=2025,
    family="pairwise, divergence",
    evidence="paper",
    note="its equation",
)


def soft_preference_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    alpha: of the policy, positive. beta: of the reference. Metrics: those of `prefkern.preference_loss`.
    """
    share = _share(alpha, beta)
    for name, reference in (("ref_chosen_logp", ref_chosen_logp), ("ref_rejected_logp", ref_rejected_logp)):
        if reference is None:
            raise ValueError(f"{name} is None; without a reference this is `prefkern.papers.cpo`")
    return preference_loss(
        chosen_logp, rejected_logp, share * ref_chosen_logp, share * ref_rejected_logp, beta=alpha,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


def _share(alpha: float, beta: float) -> float:
    """What the reference's log-probs are multiplied by, so that alpha times the difference is the reward."""
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be positive")
    return beta / alpha


@dataclass(frozen=True)
class SoftPreference(PairRecipe):
    """DPO with a weight for the policy and one for the reference."""

    name: ClassVar[str] = "soft_preference"
    alpha: float = 0.1
    beta: float = 0.1
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        sides = pairs.sums(minus=_share(self.alpha, self.beta) * pairs.require("ref_logp"))  # per token: no large sums cancel
        return preference_loss(*sides, beta=self.alpha, label_smoothing=self.label_smoothing)


recipe = SoftPreference()
