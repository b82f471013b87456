r"""DPOP (Smaug, DPO-Positive): DPO that minds when the chosen response becomes less likely.

Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", arXiv:2402.13228.
Evidence: code. Values and gradients were checked against turbo-alignment's implementation.

With the log-ratio of a response summed over its tokens, :math:`x = \log\pi - \log\pi_\mathrm{ref}`:

.. math:: L = -\log\sigma\bigl(\beta (x_w - x_l - \lambda \max(0, -x_w))\bigr)

averaged over pairs. The gradient flows through the penalty: where the chosen response has lost likelihood, its pull is
:math:`1 + \lambda` times DPO's. At :math:`x_w = 0` the penalty has no gradient. lambda 0 is DPO.

Where paper and code differ: turbo-alignment's lambda is 0.1, the paper's 50 (as commonly cited; the default here). beta 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="DPOP",
    title="Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    arxiv="2402.13228",
    year=2024,
    family="pairwise",
    evidence="code",
    note="turbo-alignment",
)


def dpop_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    penalty: float = 50.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    penalty: lambda, not negative. Metrics: those of `prefkern.preference_loss`; rewards are without the penalty.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="dpop", beta=beta, penalty=penalty,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class DPOP(PairRecipe):
    """DPO with a penalty on chosen responses that lost likelihood."""

    name: ClassVar[str] = "dpop"
    beta: float = 0.1
    penalty: float = 50.0
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return dpop_loss(*pairs.log_ratios(), **self.options())


recipe = DPOP()
