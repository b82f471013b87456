r"""NCA: noise contrastive alignment, which also looks at the likelihood of each response by itself.

Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv:2402.05369.
Evidence: code. TRL and Liger-Kernel, values and gradients.

The form for pairs. With :math:`u = \beta (\log\pi - \log\pi_\mathrm{ref})` summed over a response:

.. math:: L = -\log\sigma(u_w) - \tfrac12 \log\sigma(-u_w) - \tfrac12 \log\sigma(-u_l)

averaged over pairs. Each side is on its own: the chosen response is drawn to :math:`u_w = \log 2`, the rejected one is pushed
down without a limit.

Default: beta 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="NCA",
    title="Noise Contrastive Alignment of Language Models with Explicit Rewards",
    arxiv="2402.05369",
    year=2024,
    family="pairwise, each side by itself",
    evidence="code",
    note="the pair form in TRL and Liger-Kernel",
)


def nca_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    Metrics are those of `prefkern.preference_loss`.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="nca_pair", beta=beta, reduction=reduction
    )


@dataclass(frozen=True)
class NCA(PairRecipe):
    """Each response against noise."""

    name: ClassVar[str] = "nca"
    beta: float = 0.1

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return nca_loss(*pairs.log_ratios(), **self.options())


recipe = NCA()
