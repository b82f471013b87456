r"""rDPO: the DPO loss made unbiased under labels that are flipped at a known rate.

Chowdhury et al., "Provably Robust DPO: Aligning Language Models with Noisy Feedback", arXiv:2403.00409.
Evidence: code. TRL and Liger-Kernel, values and gradients.

With the log-ratio of a response summed over its tokens, :math:`x = \log\pi - \log\pi_\mathrm{ref}`,
:math:`z = \beta (x_w - x_l)`, :math:`\ell = -\log\sigma` and the probability :math:`\varepsilon < 1/2` that a label is flipped:

.. math:: L = \frac{(1 - \varepsilon)\,\ell(z) - \varepsilon\,\ell(-z)}{1 - 2\varepsilon}

averaged over pairs: the mean of L over flips is :math:`\ell` of the true pair. Since :math:`\ell(-z) = \ell(z) + z`, that is
:math:`\ell(z) - \frac{\varepsilon}{1 - 2\varepsilon} z`: it may be negative and pulls harder than DPO. cDPO
(`prefkern.papers.dpo` with a label smoothing), which assumes the same noise and subtracts nothing, pulls less.

Where libraries differ: outside [0, 1/2) TRL warns and Liger raises; here it is an error. With 0 it is DPO.

Defaults: beta 0.1; label_smoothing 0.1, the value that TRL's documentation names for this loss (its own default of 0 is DPO).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops._arguments import number
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="rDPO",
    title="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    arxiv="2403.00409",
    year=2024,
    family="pairwise, noisy labels",
    evidence="code",
    note="TRL and Liger-Kernel",
)


def robust_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    label_smoothing: in [0, 1/2). weight: [P] constants.
    Arguments and metrics are those of `prefkern.preference_loss`.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="robust", beta=beta,
        label_smoothing=number("label_smoothing", label_smoothing), weight=weight, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class RobustDPO(PairRecipe):
    """DPO corrected for flipped labels."""

    name: ClassVar[str] = "robust_dpo"
    beta: float = 0.1
    label_smoothing: float = 0.1

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return robust_dpo_loss(*pairs.log_ratios(), **self.options())


recipe = RobustDPO()
