r"""APO, anchored: whether both responses should rise or fall is said, not left to the data.

D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
arXiv:2408.06266. Not accelerated preference optimisation (arXiv:2410.06293, `prefkern.papers.apo_accel`), which shares the
acronym and extrapolates the reference policy by Nesterov's rule.
Evidence: code. TRL and Liger-Kernel, values and gradients; the unpaired form was read in TRL, not run.

With :math:`u = \beta (\log\pi - \log\pi_\mathrm{ref})` summed over a response:

.. math::
    L_\mathrm{zero} = 1 - \sigma(u_w) + \sigma(u_l), \qquad L_\mathrm{down} = \sigma(u_w) + 1 - \sigma(u_w - u_l)

averaged over pairs. `"zero"`, for chosen responses that are better than what the policy writes: up with those, down with the
others. `"down"`, for ones that are worse: down with both, with the rejected ones further. All terms are in [0, 1] and flat
for a :math:`|u|` that is large.

Unpaired (TRL's KTO trainer, `apo_zero_unpaired`): :math:`1 - \sigma(u)` of each desirable response and :math:`\sigma(u)` of
each other one, averaged over all: half of L_zero where both are as many.

Default: beta 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss, unpaired_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="APO (anchored)",
    title="Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    arxiv="2408.06266",
    year=2024,
    family="pairwise, each side by itself",
    evidence="code",
    note="TRL and Liger-Kernel",
)


def apo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    anchor: Literal["zero", "down"] = "zero",
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    Metrics are those of `prefkern.preference_loss`.
    """
    choice("anchor", anchor, ("zero", "down"))
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="apo_zero" if anchor == "zero" else "apo_down",
        beta=beta, reduction=reduction,
    )  # fmt: skip


def apo_zero_unpaired_loss(
    logp: Tensor, ref_logp: Tensor | None, desirable: Tensor, *, beta: float = 0.1, reduction: Reduction = "mean"
) -> LossOutput:
    """The loss of N single responses, from summed log-probs [N] and bools [N]. Gradient to logp.

    Metrics are those of `prefkern.unpaired_loss`.
    """
    return unpaired_loss(logp, ref_logp, desirable, kind="apo_zero", beta=beta, reduction=reduction)


@dataclass(frozen=True)
class APO(PairRecipe):
    """Up with the chosen and down with the rejected, or down with both."""

    name: ClassVar[str] = "apo_anchored"
    anchor: Literal["zero", "down"] = "zero"
    beta: float = 0.1

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return apo_loss(*pairs.log_ratios(), **self.options())


recipe = APO()
