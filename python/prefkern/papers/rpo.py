r"""RPO: DPO plus the likelihood of the chosen response.

Liu et al., "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer",
arXiv:2405.16436; on pairs that the policy wrote, and with a likelihood per token, it is Iterative RPO's (Pang et al.,
"Iterative Reasoning Preference Optimization", arXiv:2404.19733). Neither relative nor reward-aware preference optimisation,
which share the acronym.
Evidence: code. TRL's and Liger's loss; OpenRLHF's reduction of the likelihood was read.

With :math:`z = \beta (x_w - x_l)`, x the log-ratio :math:`\log\pi - \log\pi_\mathrm{ref}` summed over a response of n tokens:

.. math::
    L = \frac1P \sum_i -\log\sigma(z_i) + \alpha\,\mathrm{NLL}, \qquad
    \mathrm{NLL} = -\frac{\sum_i \log\pi_{w,i}}{\sum_i n_{w,i}} \quad\text{or}\quad
    -\frac1P \sum_i \frac{\log\pi_{w,i}}{n_{w,i}} \quad\text{or}\quad -\frac1P \sum_i \log\pi_{w,i}

Where paper and libraries differ: TRL and Liger average over all chosen tokens of the batch (`nll_reduction="token"`), OpenRLHF
and the Iterative RPO paper over responses after their tokens (`"response"`); `"sum"` does not look at lengths. In TRL
`rpo_alpha` became `loss_type=["sigmoid", "sft"]` with `loss_weights`.

Defaults: beta 0.1, nll_weight 1, nll_reduction "token".
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..ops import LossOutput
from ._about import About
from ._pairs import PairRecipe, Pairs, add_nll
from .dpo import dpo_loss

about = About(
    name="RPO",
    title="Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer",
    arxiv="2405.16436",
    year=2024,
    family="pairwise, with likelihood",
    evidence="code",
    note="TRL and Liger-Kernel",
)


def rpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    nll_weight: float = 1.0,
    nll_reduction: Literal["token", "response", "sum"] = "token",
) -> LossOutput:
    """The mean loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    chosen_lengths: [P] numbers of tokens; only nll_reduction "sum" does without. Metrics: those of `prefkern.preference_loss`,
    and nll.
    """
    out = dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, label_smoothing=label_smoothing)
    return add_nll(out, nll_weight, chosen_logp, chosen_lengths, nll_reduction)


@dataclass(frozen=True)
class RPO(PairRecipe):
    """DPO plus the negative log-likelihood of the chosen responses."""

    name: ClassVar[str] = "rpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 1.0
    nll_reduction: Literal["token", "response", "sum"] = "token"

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        out = dpo_loss(*pairs.log_ratios(), beta=self.beta, label_smoothing=self.label_smoothing)
        return add_nll(out, self.nll_weight, pairs.log_probs().chosen, pairs.lengths().chosen, self.nll_reduction)


recipe = RPO()
