r"""EXO: the reverse KL between the policy's preference and the label, for pairs.

Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", arXiv:2402.00856.
Evidence: code. TRL and Liger-Kernel, values and gradients.

The pair form of the paper's EXO-pref. With :math:`z = \beta (x_w - x_l)`, x the log-ratio
:math:`\log\pi - \log\pi_\mathrm{ref}` summed over a response, and :math:`q = \sigma(z)`:

.. math:: L = q \log\frac{q}{1 - \varepsilon} + (1 - q) \log\frac{1 - q}{\varepsilon}

averaged over pairs: KL(q || label), where DPO has KL(label || q). It is smallest, 0, at :math:`q = 1 - \varepsilon`, and flat
for :math:`z \to \pm\infty`, where it tends to :math:`-\log(1 - \varepsilon)` and :math:`-\log\varepsilon`: a pair that is far
on the wrong side has hardly a gradient. The logs are formed of :math:`\log\sigma(\pm z)`, so that they never are of 0.

:math:`\varepsilon` is needed: 0 is an error, as in TRL, whose versions before that put 1e-3 in its place.

Defaults: beta 0.1, label_smoothing 1e-3, the paper's.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="EXO",
    title="Towards Efficient Exact Optimization of Language Model Alignment",
    arxiv="2402.00856",
    year=2024,
    family="pairwise",
    evidence="code",
    note="the pair form in TRL and Liger-Kernel",
)


def exo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 1e-3,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    label_smoothing: a number, or [P], in (0, 1). Metrics are those of `prefkern.preference_loss`.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="exo_pair", beta=beta,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class EXO(PairRecipe):
    """KL of the policy's preference to the smoothed label."""

    name: ClassVar[str] = "exo"
    beta: float = 0.1
    label_smoothing: float = 1e-3

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return exo_loss(*pairs.log_ratios(), **self.options())


recipe = EXO()
