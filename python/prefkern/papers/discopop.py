r"""DiscoPOP: a blend of the logistic and the exponential loss, found by a language model.

Lu et al., "Discovering Preference Optimization Algorithms with and for Large Language Models", arXiv:2406.08414.
Evidence: code. TRL and Liger-Kernel, values and gradients.

The paper's log-ratio modulated loss. With :math:`z = \beta (x_w - x_l)`, x the log-ratio
:math:`\log\pi - \log\pi_\mathrm{ref}` summed over a response, and :math:`m = \sigma(z / \tau)`:

.. math:: L = -(1 - m) \log\sigma(z) + m\,e^{-z}

averaged over pairs. The gradient flows through m too, and the loss is not convex: there is a dent just below z = 0.

Where paper and libraries agree but overflow: :math:`e^{-z}` is infinite in float32 for z below -88, where m is 0. Here
:math:`m e^{-z}` is one exponential of a sum.

Defaults: beta 0.1, tau 0.05, the paper's.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="DiscoPOP",
    title="Discovering Preference Optimization Algorithms with and for Large Language Models",
    arxiv="2406.08414",
    year=2024,
    family="pairwise",
    evidence="code",
    note="TRL and Liger-Kernel",
)


def discopop_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    Metrics are those of `prefkern.preference_loss`.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="discopop", beta=beta, tau=tau,
        reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class DiscoPOP(PairRecipe):
    """Logistic below, exponential above."""

    name: ClassVar[str] = "discopop"
    beta: float = 0.1
    tau: float = 0.05

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return discopop_loss(*pairs.log_ratios(), **self.options())


recipe = DiscoPOP()
