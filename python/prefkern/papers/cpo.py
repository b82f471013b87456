r"""CPO, contrastive preference optimisation without a reference model, and AlphaPO's reward shape.

Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
arXiv:2401.08417; AlphaPO: Gupta et al., "AlphaPO: Reward Shape Matters for LLM Alignment", arXiv:2501.03884.
Evidence: code. Values and gradients were checked against TRL's CPO trainer, the logistic form against Liger-Kernel.
Not the controllable CPO nor the chain of preference optimisation, which share the letters.

With :math:`v` the log-prob of a response, its sum over tokens for `kind` ``"sigmoid"`` and ``"hinge"``, its mean for ``"ipo"``
and ``"simpo"``, and AlphaPO's reward :math:`r = (1 - e^{-\alpha v}) / \alpha`, which is v at :math:`\alpha = 0`:

.. math::
    L = L_\mathrm{kind}(r_w - r_l) + c \, \mathrm{NLL}(y_w)

===========  ===================================================================================================
kind         :math:`L_\mathrm{kind}(d)`
===========  ===================================================================================================
sigmoid      :math:`-(1 - \varepsilon) \log\sigma(\beta d) - \varepsilon \log\sigma(-\beta d)`
simpo        the same of :math:`\beta d - \gamma`
hinge        :math:`\max(0, 1 - \beta d)` (SLiC's form)
ipo          :math:`(d - 1 / (2 \beta))^2`
===========  ===================================================================================================

c is `cpo_alpha`; the likelihood is per token over all chosen responses together (`nll_reduction`, see
`prefkern.papers.rpo`). SimPO proper has none: `prefkern.papers.simpo`. AlphaPO is `kind="simpo"`, `cpo_alpha=0` and an `alpha`.

Where code differs: TRL forms :math:`e^{v}` first, which is 0 for a long response's sum, and gets infinity; here exponents above
`exp_cap` are held there, without gradient, and the metric `clamped` counts the pairs. Liger knows no `kind` and no `alpha`.
Rewards among the metrics are :math:`\beta r`, as in TRL.

Defaults of TRL: beta 0.1, `cpo_alpha` 1, alpha 0, gamma 0.5.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs, add_nll, check_pair_lengths

about = About(
    name="CPO",
    title="Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    arxiv="2401.08417",
    year=2024,
    family="pairwise, reference-free",
    evidence="code",
    note="TRL's CPO trainer, and Liger-Kernel",
)

Kind = Literal["sigmoid", "hinge", "ipo", "simpo"]
KINDS = ("sigmoid", "hinge", "ipo", "simpo")


def cpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    *,
    kind: Kind = "sigmoid",
    beta: float = 0.1,
    gamma: float | None = None,
    alpha: float = 0.0,
    exp_cap: float = 80.0,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    nll_reduction: str = "token",
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response and the numbers of their tokens, [P] each.

    Gradient to chosen_logp and rejected_logp. The lengths are needed by the kinds that take means, those of the chosen
    responses
    by the likelihood. gamma: of "simpo" alone, 0.5. label_smoothing: of "sigmoid" and "simpo". Metrics: those of
    `prefkern.preference_loss`, and nll where cpo_alpha is not 0.
    """
    choice("kind", kind, KINDS)
    if gamma is not None and kind != "simpo":
        raise ValueError(f"gamma is {gamma} but kind is {kind!r}; it means something for 'simpo'")
    mean = kind in ("ipo", "simpo")
    if mean:
        for name, t in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
            if t is None:
                raise ValueError(f"{name} is None; kind {kind!r} takes the mean log-prob and needs it")
        check_pair_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    out = preference_loss(
        chosen_logp, rejected_logp, kind="sigmoid" if kind == "simpo" else kind, beta=beta,
        score="alpha_divergence" if alpha else "reverse_kl", alpha=alpha or 1.0, exp_cap=exp_cap,
        average="logp" if mean else None, chosen_lengths=chosen_lengths if mean else None,
        rejected_lengths=rejected_lengths if mean else None,
        offset=(0.5 if gamma is None else gamma) if kind == "simpo" else 0.0, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip
    return add_nll(out, cpo_alpha, chosen_logp, chosen_lengths, nll_reduction)


@dataclass(frozen=True)
class CPO(PairRecipe):
    """Log-probs without a reference, and the likelihood of the chosen response."""

    name: ClassVar[str] = "cpo"
    needs: ClassVar[tuple[str, ...]] = ()
    kind: Kind = "sigmoid"
    beta: float = 0.1
    gamma: float | None = None
    alpha: float = 0.0
    exp_cap: float = 80.0
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    nll_reduction: Literal["token", "response", "sum"] = "token"

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return cpo_loss(*pairs.log_probs(), *pairs.lengths(), **self.options())


recipe = CPO()
