r"""ASFT, aligned supervised fine-tuning: the absolute likelihood of each response, without a reference.

"ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood", arXiv:2409.10571. Not *anchored* supervised fine-tuning
(arXiv:2509.23753), a token loss that LLaMA-Factory and Unsloth call ASFT.
Evidence: code. Values and gradients were checked against turbo-alignment, a re-implementation by the authors of
arXiv:2502.01237; the paper's own authors released none.

With the mean log-prob over a response's tokens, :math:`a = \frac1{|y|} \sum_t \log\pi(y_t) < 0`, and the log of its odds
:math:`o = a - \log(1 - e^a)`:

.. math:: L = -c\,a_w + \lambda \bigl(-\log\sigma(\beta o_w) - \log\sigma(-\beta o_l)\bigr)

averaged over pairs. With :math:`\beta = 1`, which is the paper's, that is
:math:`-(c + \lambda) a_w - \lambda \log(1 - e^{a_l})`: the push on the rejected response vanishes with its probability.
Nothing is detached. With :math:`\lambda = 0` it is supervised fine-tuning on means per response.

Where they differ: beta is of arXiv:2502.01237, not of the paper, and turbo-alignment's settings give 0.1 unless told otherwise.
Its odds are capped where :math:`e^a` exceeds 1 - 1e-7, in float32: `max_p` is that bound, above which
:math:`o = a - \log(1 - p_\max)`. Without it they are exact.

Edges. a = 0 of a rejected response is an infinite loss, and a > 0, rounding of a mean that is nearly 0, has no odds: both are
errors unless `max_p` is given. a = 0 of a chosen one has the gradient's limit: :math:`-c - \lambda` for beta = 1, -c above;
below 1 it is infinite, so an error too. A response without tokens is an error.

Defaults: lam 1, ce_coef 1, beta 1, as in the paper's form.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops._arguments import check_tensors, number
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs, check_pair_lengths
from ._shared import check_values, may_look

about = About(
    name="ASFT (aligned)",
    title="ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood",
    arxiv="2409.10571",
    year=2024,
    family="pairwise, reference-free, each side by itself",
    evidence="code",
    note="turbo-alignment's re-implementation",
)


def asft_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    lam: float = 1.0,
    ce_coef: float = 1.0,
    beta: float = 1.0,
    max_p: float | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response and the numbers of their tokens, [P] each.

    Gradient to chosen_logp and rejected_logp. lam, ce_coef: lambda and c above. Metrics: those of `prefkern.preference_loss`,
    rewards being beta times the log-odds; clamped counts pairs with a response above max_p.
    """
    check_tensors(
        chosen_logp=chosen_logp, rejected_logp=rejected_logp, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    beta = number("beta", beta)
    alike = chosen_logp.shape == chosen_lengths.shape and rejected_logp.shape == rejected_lengths.shape
    if max_p is None and alike and may_look(chosen_logp):
        check_pair_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        below = "a mean log-prob below 0 is expected, or max_p"
        a_w, a_l = chosen_logp.detach() / chosen_lengths, rejected_logp.detach() / rejected_lengths
        check_values("mean of chosen_logp", a_w, ~(a_w > 0) if beta >= 1 else ~(a_w >= 0), below)
        check_values("mean of rejected_logp", a_l, ~(a_l >= 0), below)
    if max_p is not None:  # the kernel has the limit for beta at exactly 0, but there the bound's slope is meant
        chosen_logp = chosen_logp - torch.where(chosen_logp.detach() == 0, 1e-30, 0.0)
    return preference_loss(
        chosen_logp, rejected_logp, kind="asft", score="log_odds", average="logp", chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths, beta=beta, sft=ce_coef, factor=lam, max_p=max_p, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class ASFT(PairRecipe):
    """Likelihood of the chosen response, odds of both."""

    name: ClassVar[str] = "asft"
    needs: ClassVar[tuple[str, ...]] = ()
    lam: float = 1.0
    ce_coef: float = 1.0
    beta: float = 1.0
    max_p: float | None = None

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return asft_loss(*pairs.log_probs(), *pairs.lengths(), **self.options())


recipe = ASFT()
