r"""DPO, with cDPO's label smoothing: the loss that every pairwise method varies.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv:2305.18290; label
smoothing: Mitchell, "A note on DPO with noisy preferences & relationship to IPO" (2023).
Evidence: code. TRL, Liger-Kernel and OpenRLHF, values and gradients.

With the log-ratio of a response summed over its tokens, :math:`x = \log\pi - \log\pi_\mathrm{ref}`, and
:math:`z = \beta (x_w - x_l)`:

.. math:: L = -(1 - \varepsilon) \log\sigma(z) - \varepsilon \log\sigma(-z)

averaged over pairs. :math:`\varepsilon` is the probability that a label is wrong: the target margin is then finite,
:math:`\log\frac{1 - \varepsilon}{\varepsilon}`. The reference is a constant.

Where libraries differ: OpenRLHF has cDPO; TRL and Liger took a label smoothing for this loss and, TRL since 0.29, ignore it. A
negative log-likelihood of the chosen responses besides (RPO, IRPO) is `prefkern.papers.rpo`. NeMo-RL can average over tokens:
`prefkern.papers.ln_dpo`.

Default: beta 0.1, as in all of them (NeMo-RL: 0.05).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="DPO",
    title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    arxiv="2305.18290",
    year=2023,
    family="pairwise",
    evidence="code",
    note="TRL, Liger-Kernel and OpenRLHF",
)


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    label_smoothing: a number, or [P] in [0, 1]: a soft label p per pair is 1 - p. weight: [P] constants.
    Arguments and metrics are those of `prefkern.preference_loss`.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, label_smoothing=label_smoothing,
        weight=weight, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class DPO(PairRecipe):
    """Log-ratios to the reference, logistic loss."""

    name: ClassVar[str] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return dpo_loss(*pairs.log_ratios(), **self.options())


recipe = DPO()
