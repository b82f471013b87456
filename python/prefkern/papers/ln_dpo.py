r"""LN-DPO: DPO on the mean log-ratio per token.

Ahrabian et al., "The Hitchhiker's Guide to Human Alignment with \*PO", arXiv:2407.15229.
Evidence: code. TRL's `sigmoid_norm`, values and gradients.

With :math:`x = \log\pi - \log\pi_\mathrm{ref}` summed over a response of n tokens:

.. math:: L = -\log\sigma\Bigl(\beta \Bigl(\frac{x_w}{n_w} - \frac{x_l}{n_l}\Bigr)\Bigr)

averaged over pairs; each side is divided by its own length. A reference that gives all tokens the same probability cancels:
then it is SimPO without a margin. NeMo-RL has it as DPO with a mean per token.

TRL takes an empty response for one token; here it is an error. Means are smaller than sums by about the length of a response,
so a beta that is good for DPO is small here.

Default: beta 0.1, TRL's for all of its losses.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="LN-DPO",
    title="The Hitchhiker's Guide to Human Alignment with *PO",
    arxiv="2407.15229",
    year=2024,
    family="pairwise, length",
    evidence="code",
    note="TRL's sigmoid_norm",
)


def ln_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response and the numbers of their tokens, [P] each.

    Gradient to chosen_logp and rejected_logp. Metrics are those of `prefkern.preference_loss`, of means.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, average="logp",
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class LNDPO(PairRecipe):
    """DPO on means over tokens."""

    name: ClassVar[str] = "ln_dpo"
    beta: float = 0.1

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        chosen, rejected = pairs.lengths()
        return ln_dpo_loss(*pairs.log_ratios(), chosen_lengths=chosen, rejected_lengths=rejected, beta=self.beta)


recipe = LNDPO()
