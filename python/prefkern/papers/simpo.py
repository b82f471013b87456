r"""SimPO: the mean log-prob as the reward, a margin, no reference model.

Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734.
Evidence: code. Values and gradients were checked against the authors' release.

With the mean log-prob over a response's tokens, :math:`a = \frac{1}{|y|} \sum_t \log\pi(y_t)`,
:math:`z = \beta (a_w - a_l) - \gamma` and :math:`\gamma = \beta \rho`:

.. math::
    L = -(1 - \varepsilon) \log\sigma(z) - \varepsilon \log\sigma(-z) \quad\text{or}\quad \max(0, 1 - z)\ (\text{"hinge"})

averaged over pairs, plus `sft_weight` times the negative log-likelihood per token of all chosen responses together.

Where libraries differ. The paper and TRL and Liger give :math:`\gamma` (`gamma`), the current release :math:`\rho`
(`gamma_beta_ratio`): both are taken here, and both at once are an error. TRL's CPO trainer with `loss_type="simpo"` adds
`cpo_alpha` = 1 times that likelihood unless told otherwise, and Liger's module `alpha` = 1: that is CPO-SimPO, not SimPO, whose
weight is 0 here as in the release. beta 0.1, the default there, means nothing for a mean log-prob.

Defaults of the release: beta 2, ratio 0.25. Its recipes (beta, ratio): Mistral-Base (2, 0.8), Mistral-Instruct (2.5, 0.1),
Llama3-Base (2, 0.5), Llama3-Instruct (2.5, 0.55), its version 0.2 and Gemma2-9b-it (10, 0.3) and (10, 0.5).

A response without tokens makes the release's loss NaN; here it is an error, or with `empty="zero"` the pair is left out of the
mean. AlphaPO's reward is `prefkern.papers.cpo` with `alpha`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs, add_nll

about = About(
    name="SimPO",
    title="SimPO: Simple Preference Optimization with a Reference-Free Reward",
    arxiv="2405.14734",
    year=2024,
    family="pairwise, reference-free",
    evidence="code",
    note="the authors' release",
)

KINDS = ("sigmoid", "hinge")


def simpo_margin(beta: float, gamma: float | None, gamma_beta_ratio: float | None) -> float:
    """gamma, from it or from its ratio to beta, whose default is 0.25. ValueError if both are given."""
    if gamma is not None and gamma_beta_ratio is not None:
        raise ValueError(f"gamma is {gamma} and gamma_beta_ratio is {gamma_beta_ratio}; one of them is expected")
    return gamma if gamma is not None else beta * (0.25 if gamma_beta_ratio is None else gamma_beta_ratio)


def simpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float | None = None,
    gamma_beta_ratio: float | None = None,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "hinge"] = "sigmoid",
    sft_weight: float = 0.0,
    empty: Literal["error", "zero"] = "error",
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response and the numbers of their tokens, [P] each.

    Gradient to chosen_logp and rejected_logp. Metrics: those of `prefkern.preference_loss`, rewards being beta times the mean
    log-prob, and nll where sft_weight is not 0.
    """
    choice("kind", kind, KINDS)
    choice("empty", empty, ("error", "zero"))
    mask = (chosen_lengths > 0) & (rejected_lengths > 0) if empty == "zero" else None
    out = preference_loss(
        chosen_logp, rejected_logp, kind=kind, beta=beta, average="logp", chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths, offset=simpo_margin(beta, gamma, gamma_beta_ratio), mask=mask,
        label_smoothing=label_smoothing if kind == "sigmoid" else 0.0, reduction=reduction,
    )  # fmt: skip
    if mask is not None:  # a response without tokens has none in the likelihood either
        chosen_logp = torch.where(chosen_lengths > 0, chosen_logp, 0.0)
        if sft_weight:
            nll = -chosen_logp.sum() / chosen_lengths.sum().clamp_min(1)
            return LossOutput(out.loss + sft_weight * nll, {**out.metrics, "nll": nll.detach()})
    return add_nll(out, sft_weight, chosen_logp, chosen_lengths)


@dataclass(frozen=True)
class SimPO(PairRecipe):
    """Mean log-probs, a margin, no reference."""

    name: ClassVar[str] = "simpo"
    needs: ClassVar[tuple[str, ...]] = ()
    beta: float = 2.0
    gamma: float | None = None
    gamma_beta_ratio: float | None = None
    label_smoothing: float = 0.0
    kind: Literal["sigmoid", "hinge"] = "sigmoid"
    sft_weight: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return simpo_loss(*pairs.log_probs(), *pairs.lengths(), **self.options())


recipe = SimPO()
