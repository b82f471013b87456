r"""SLiC: a hinge on the margin of a pair; as SLiC-HF defines it, or relative to a reference as trainers have it.

Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", arXiv:2305.10425.
Evidence: code. The form with a reference: TRL and Liger-Kernel, values and gradients; without one: turbo-alignment's formula.

With log-probs :math:`\log\pi` summed over a response, and :math:`x = \log\pi - \log\pi_\mathrm{ref}`:

.. math::
    L_\mathrm{hinge} = \max\bigl(0, \delta - \beta (x_w - x_l)\bigr), \qquad
    L_\mathrm{SLiC} = \max\bigl(0, \delta - (\log\pi_w - \log\pi_l)\bigr) - \lambda \log\pi_w

averaged over pairs. The gradient is that of the margin where it is short of :math:`\delta`, else 0, at :math:`\delta` too.

Where paper and libraries differ: the paper has no reference and regularises with the likelihood of the target that the model
was fine-tuned on, for which turbo-alignment, and TRL's CPO trainer with `loss_type="hinge"`, take the chosen response
(`nll_reduction` says how it is averaged: `"sum"` as above, `"token"` as TRL). TRL's and Liger's `hinge` in a DPO trainer is the
left form with :math:`\delta = 1` and no likelihood. Both are functions here; the recipe is the left one, or the other with
`reference_free=True`.

Defaults: beta 0.1 and delta 1 (TRL, Liger) with a reference; delta 1, lambda 0.1 (turbo-alignment's settings) without.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops._arguments import number
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs, add_nll

about = About(
    name="SLiC",
    title="SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
    arxiv="2305.10425",
    year=2023,
    family="pairwise, hinge",
    evidence="code",
    note="TRL and Liger-Kernel with a reference, turbo-alignment's formula without",
)


def hinge_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 1.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The hinge of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    delta: the margin that is enough, a number or [P]. Metrics are those of `prefkern.preference_loss`.
    """
    enough = delta if isinstance(delta, Tensor) else number("delta", delta, "a number or a torch.Tensor")
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="hinge", beta=beta, offset=enough - 1,
        reduction=reduction,
    )  # fmt: skip


def slic_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_lengths: Tensor | None = None,
    *,
    delta: float | Tensor = 1.0,
    nll_weight: float = 0.1,
    nll_reduction: Literal["token", "response", "sum"] = "sum",
) -> LossOutput:
    """The mean loss of P pairs without a reference, plus nll_weight times the negative log-likelihood of the chosen ones.

    chosen_logp, rejected_logp: [P], summed over tokens, with gradient. chosen_lengths: [P] numbers of tokens, for an
    nll_reduction other than "sum". Metrics: those of `prefkern.preference_loss`, and nll.
    """
    out = hinge_loss(chosen_logp, rejected_logp, beta=1.0, delta=delta)
    return add_nll(out, nll_weight, chosen_logp, chosen_lengths, nll_reduction)


@dataclass(frozen=True)
class SLiC(PairRecipe):
    """A hinge on the margin: relative to the reference, or of the policy's own log-probs, with their likelihood."""

    name: ClassVar[str] = "slic"
    needs: ClassVar[tuple[str, ...]] = ()
    reference_free: bool = False
    beta: float = 0.1
    """Only with a reference."""
    delta: float = 1.0
    nll_weight: float = 0.1
    """Only without."""
    nll_reduction: Literal["token", "response", "sum"] = "sum"

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        if not self.reference_free:
            pairs.require("ref_logp")
            return hinge_loss(*pairs.log_ratios(), beta=self.beta, delta=self.delta)
        return slic_loss(
            *pairs.log_probs(), pairs.lengths().chosen, delta=self.delta, nll_weight=self.nll_weight,
            nll_reduction=self.nll_reduction,
        )  # fmt: skip


recipe = SLiC()
