r"""f-DPO: DPO under other divergences than the reverse KL.

Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
arXiv:2309.16240.
Evidence: code. Values and gradients were checked against the authors' release, values against TRL.

With :math:`x = \log\pi - \log\pi_\mathrm{ref}` summed over a response, :math:`u = e^x`, and a divergence whose f' can be
inverted and does not have 0 in its domain, the reward is :math:`\beta f'(u)` up to a constant:

.. math:: L = -\log\sigma\bigl(\beta\,s(x_w) - \beta\,s(x_l)\bigr)

================  ==============================  ================================
divergence        :math:`f'(u)`                   score s(x), 0 at the reference
================  ==============================  ================================
reverse_kl        :math:`\log u + 1`              x
forward_kl        :math:`-1 / u`                  :math:`1 - e^{-x}`
js_divergence     :math:`\log\frac{2u}{1 + u}`    :math:`\log 2 - \log(1 + e^{-x})`
alpha_divergence  :math:`(1 - u^{-a}) / a`        :math:`(1 - e^{-a x}) / a`, a in (0, 1)
================  ==============================  ================================

a = 0 is the reverse KL, a = 1 the forward KL; chi-squared and total variation do not qualify.

Where paper and code differ: TRL's coefficient c (`f_alpha_divergence_coef`) is 1 - a since its version 0.29, before that it was
a; both agree only at their default 1/2. `convention="trl"` reads alpha as c. The release has no guard against overflow and TRL
one for the alpha divergence alone: here exponents above `exp_cap` are held there, without gradient, and the metric `clamped`
counts the pairs. If both sides of a pair are held, its gradient is 0. TRL puts its scores into every loss type; any `loss` of
`prefkern.preference_loss` can be given here, though the paper defines the logistic one only. The release ignores its
`reference_free` for three of four divergences: without reference log-probs this is an error.

Defaults: beta 0.1; the release's scripts use alpha 0.3, 0.5 and 0.7.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..ops.preference import Kind, Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="f-DPO",
    title="Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
    arxiv="2309.16240",
    year=2023,
    family="pairwise",
    evidence="code",
    note="the authors' release, and TRL",
)

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def f_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    convention: Literal["paper", "trl"] = "paper",
    exp_cap: float = 80.0,
    loss: Kind = "sigmoid",
    reduction: Reduction = "mean",
    **options: Any,
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    alpha: of the alpha divergence, in [0, 1]. loss and options: kind and other arguments of `prefkern.preference_loss`, whose
    metrics these are; rewards are beta s(x).
    """
    for name, reference in (("ref_chosen_logp", ref_chosen_logp), ("ref_rejected_logp", ref_rejected_logp)):
        if reference is None:
            raise ValueError(f"{name} is None; f-DPO has no form without a reference")
    choice("divergence", divergence, DIVERGENCES)
    choice("convention", convention, ("paper", "trl"))
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind=loss, beta=beta, score=divergence,
        alpha=alpha if convention == "paper" else 1 - alpha, exp_cap=exp_cap, reduction=reduction, **options,
    )  # fmt: skip


@dataclass(frozen=True)
class FDPO(PairRecipe):
    """DPO with the reward of another divergence."""

    name: ClassVar[str] = "f_dpo"
    beta: float = 0.1
    divergence: Divergence = "js_divergence"
    alpha: float = 0.5
    convention: Literal["paper", "trl"] = "paper"
    exp_cap: float = 80.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        chosen, rejected = pairs.log_ratios()
        zero = chosen.detach().new_zeros(chosen.shape)
        return f_dpo_loss(chosen, rejected, zero, zero, **self.options())


recipe = FDPO()
