r"""WPO: DPO whose pairs weigh as much as their responses are likely under the policy, so that off-policy data act on-policy.

Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv:2406.11827.
Evidence: code. Weight and loss were checked against the authors' release.

With the policy's probabilities :math:`p_v` of all tokens at place t and that of the token there, a response's weight is

.. math::
    \omega = \exp\Bigl(\frac{1}{|y|} \sum_t \bigl(\log\pi(y_t) - \log\textstyle\sum_v p_v^2\bigr)\Bigr)

which is about 1 for a response sampled from the policy, and

.. math:: L = -\min(c, \omega_w \omega_l)\,\log\sigma\bigl(\beta (x_w - x_l)\bigr)

averaged over pairs. Weights are constants. :math:`\sum_v p_v^2` is `sum_sq_probs` of `prefkern.linear_logprobs` or
`prefkern.logits_logprobs`, from the same pass as the log-probs.

Where libraries differ: the release, and TRL up to 0.28, hold the product at c = 1; TRL since 0.29 does not (`clamp=None`).

Defaults of the release: clamp 1, beta 0.01; here beta 0.1, as DPO's.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ops import LossOutput, sequence_mean
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows
from .dpo import dpo_loss

about = About(
    name="WPO",
    title="WPO: Enhancing RLHF with Weighted Preference Optimization",
    arxiv="2406.11827",
    year=2024,
    family="pairwise, pair weight",
    evidence="code",
    note="the authors' release, and TRL",
)


def wpo_weight(logp: Tensor, sum_sq_probs: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """The weight [B] of each response, from log-probs and `sum_sq_probs` per token, [B, T] or packed [N]. No gradient.

    A response without tokens has weight 1.
    """
    if sum_sq_probs.shape != logp.shape:
        raise ValueError(f"sum_sq_probs has shape {list(sum_sq_probs.shape)}; {list(logp.shape)} is expected, like logp")
    return sequence_mean(logp.detach(), mask, cu_seqlens=cu_seqlens, minus=sum_sq_probs.detach().log()).exp()


def wpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_weight: Tensor,
    rejected_weight: Tensor,
    beta: float = 0.1,
    clamp: float | None = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response and the weights of each (`wpo_weight`), [P] each.

    Gradient to chosen_logp and rejected_logp. clamp: of the product of both weights; None for none. Metrics: those of
    `prefkern.preference_loss`, and weight, the mean weight of a pair.
    """
    if clamp is not None and not (clamp > 0 and math.isfinite(clamp)):
        raise ValueError(f"clamp is {clamp}; a positive number is expected, or None")
    check_rows(len(chosen_logp), chosen_weight=chosen_weight, rejected_weight=rejected_weight)
    weight = (chosen_weight * rejected_weight).detach()
    if clamp is not None:
        weight = weight.clamp_max(clamp)
    out = dpo_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, label_smoothing=label_smoothing,
        weight=weight, reduction=reduction,
    )  # fmt: skip
    return LossOutput(out.loss, {**out.metrics, "weight": weight.sum() / max(len(weight), 1)})


@dataclass(frozen=True)
class WPO(PairRecipe):
    """DPO weighted by the policy's likelihoods; `extra["sum_sq_probs"]` is per token, like the log-probs."""

    name: ClassVar[str] = "wpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "sum_sq_probs")
    beta: float = 0.1
    clamp: float | None = 1.0
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        weights = wpo_weight(pairs.logp, pairs.require("sum_sq_probs"), pairs.mask, cu_seqlens=pairs.cu_seqlens).chunk(2)
        return wpo_loss(*pairs.log_ratios(), chosen_weight=weights[0], rejected_weight=weights[1], **self.options())


recipe = WPO()
