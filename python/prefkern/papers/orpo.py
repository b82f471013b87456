r"""ORPO: likelihood of the chosen response and the log odds ratio, in one stage and without a reference model.

Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", arXiv:2403.07691.
Evidence: code. Values and gradients were checked against TRL's ORPO trainer, the odds ratio against Liger-Kernel.

With the mean log-prob over a response's tokens, :math:`a = \frac{1}{|y|} \sum_t \log\pi(y_t)`, and its log odds
:math:`o = a - \log(1 - e^a)`:

.. math:: L = \mathrm{NLL}(y_w) - \beta \log\sigma(o_w - o_l)

:math:`\beta` stands outside the logistic, unlike DPO's (the paper's :math:`\lambda`).

Where libraries differ. TRL's likelihood runs over the tokens of prompt and chosen response together, Liger's over those of the
response unless given others: here those of the response, or with `nll_logp` and `nll_lengths` any. TRL computes
:math:`\log(1 - e^a)` stably, Liger does not; here it is stable. TRL's and Liger's rewards among the metrics are
:math:`\beta a`; here they are log odds, which order pairs alike.

A response whose every token is certain, a = 0, has infinite odds: an error where values may be looked at, and else NaN. `max_p`
holds the odds: where :math:`e^a` is above it, :math:`o = a - \log(1 - p_\max)`.

Defaults of TRL and Liger: beta 0.1; the likelihood has weight 1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs, add_nll, check_pair_lengths
from ._shared import check_values

about = About(
    name="ORPO",
    title="ORPO: Monolithic Preference Optimization without Reference Model",
    arxiv="2403.07691",
    year=2024,
    family="pairwise, reference-free",
    evidence="code",
    note="TRL's ORPO trainer, and Liger-Kernel",
)


def orpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    nll_logp: Tensor | None = None,
    nll_lengths: Tensor | None = None,
    nll_reduction: str = "token",
    max_p: float | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response and the numbers of their tokens, [P] each.

    Gradient to chosen_logp, rejected_logp and nll_logp. nll_logp, nll_lengths: sums and numbers of the tokens that the
    likelihood is over, such as prompt and chosen response (TRL); None for the chosen response. Metrics: those of
    `prefkern.preference_loss`, rewards being log odds, and nll where nll_weight is not 0.
    """
    if (nll_logp is None) != (nll_lengths is None):
        missing = "nll_logp" if nll_logp is None else "nll_lengths"
        raise ValueError(f"{missing} is None; the likelihood needs both nll_logp and nll_lengths, or neither")
    check_pair_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, nll_lengths=nll_lengths)
    if max_p is None:
        for name, t in (("chosen_logp", chosen_logp), ("rejected_logp", rejected_logp)):
            what = "a response that is certain has infinite odds; below 0 is expected, or max_p"
            check_values(name, t.detach(), ~(t.detach() >= 0), what)
    out = preference_loss(
        chosen_logp, rejected_logp, beta=1.0, score="log_odds", max_p=max_p, average="logp", chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths, reduction=reduction,
    )  # fmt: skip
    out = LossOutput(beta * out.loss, out.metrics)
    if nll_logp is None:
        return add_nll(out, nll_weight, chosen_logp, chosen_lengths, nll_reduction)
    return add_nll(out, nll_weight, nll_logp, nll_lengths, nll_reduction)


@dataclass(frozen=True)
class ORPO(PairRecipe):
    """Log odds ratio and likelihood. With `nll="given"` the likelihood is over the tokens summed up in `extra["nll_logp"]` and
    counted in `extra["nll_lengths"]`, [P] each."""

    name: ClassVar[str] = "orpo"
    needs: ClassVar[tuple[str, ...]] = ()
    beta: float = 0.1
    nll: Literal["response", "given"] = "response"
    nll_weight: float = 1.0
    nll_reduction: Literal["token", "response", "sum"] = "token"
    max_p: float | None = None

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        choice("nll", self.nll, ("response", "given"))
        options = self.options()
        if options.pop("nll") == "given":
            options |= {"nll_logp": pairs.require("nll_logp"), "nll_lengths": pairs.require("nll_lengths")}
        return orpo_loss(*pairs.log_probs(), *pairs.lengths(), **options)


recipe = ORPO()
