r"""R-DPO, length-regularised DPO. (Not the robust rDPO, which is `kind="robust"` of `prefkern.preference_loss`.)

Park et al., "Disentangling Length from Quality in Direct Preference Optimization", arXiv:2403.19159.
Evidence: paper. No library has it; the equation is the paper's.

With the log-ratio of a response summed over its tokens, :math:`x = \log\pi - \log\pi_\mathrm{ref}`, and numbers of tokens
:math:`|y|`:

.. math:: L = -\log\sigma\bigl(\beta (x_w - x_l) + \alpha (|y_w| - |y_l|)\bigr)

averaged over pairs. A chosen response that is longer has part of its margin for that already; one that is shorter has to earn
more. Lengths are constants.

Equal lengths, or alpha 0, give DPO. The paper tunes alpha per data set: 0.01 here is this library's choice, and so small
because it multiplies tokens. Default: beta 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows

about = About(
    name="R-DPO",
    title="Disentangling Length from Quality in Direct Preference Optimization",
    arxiv="2403.19159",
    year=2024,
    family="pairwise, length",
    evidence="paper",
    note="its equation; no library code was found",
)


def r_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    alpha: float = 0.01,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response and the numbers of their tokens, [P] each.

    Gradient to chosen_logp and rejected_logp. Metrics: those of `prefkern.preference_loss`; rewards are without the lengths.
    """
    check_rows(len(chosen_logp), chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    dtype = torch.promote_types(chosen_logp.dtype, torch.float32)
    offset = -alpha * (chosen_lengths.to(dtype) - rejected_lengths.to(dtype))
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, offset=offset,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class RDPO(PairRecipe):
    """DPO with a margin for length."""

    name: ClassVar[str] = "r_dpo"
    beta: float = 0.1
    alpha: float = 0.01
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        chosen, rejected = pairs.lengths()
        return r_dpo_loss(*pairs.log_ratios(), chosen_lengths=chosen, rejected_lengths=rejected, **self.options())


recipe = RDPO()
