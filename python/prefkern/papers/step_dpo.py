r"""Step-DPO: DPO on the first step that goes wrong, after the steps that were right.

"Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs", arXiv:2406.18629.
Evidence: code. The span and the defaults were read in the authors' release, whose loss is TRL's sigmoid DPO.

With a problem x, correct steps :math:`s_1 \dots s_{k-1}` that both sides share, and a right and a wrong k-th step:

.. math::
    m = \beta \log\frac{\pi(s_w \mid x, s_{<k})}{\pi_\mathrm{ref}(s_w \mid x, s_{<k})}
      - \beta \log\frac{\pi(s_l \mid x, s_{<k})}{\pi_\mathrm{ref}(s_l \mid x, s_{<k})}, \qquad L = -\log\sigma(m)

averaged over pairs, log-probs being sums over the tokens of the step alone. Gradient: :math:`\mp\frac{\beta}{P}\sigma(-m)` at
every token of the span, exactly 0 in front of it and behind; the reference is a constant. What lies outside the span is never
looked at: NaN there changes nothing.

The span begins right behind the prompt and the prefix (whose text ends with "Step k:") and ends with the step's last token. No
end-of-sequence token is appended, so that the model is not taught to stop after one step. Prompt and prefix as the prompt and
the step as the response, or whole solutions with a span, give the same result: a mask per side, or `starts` and `ends`, the
positions where the step begins and behind which it is over. A span is never cut to fit: one that reaches past its sequence is a
ValueError, as is an empty one (on CUDA such pairs come out NaN).

Pairs (paper and code): sample with the reference policy, keep solutions with a wrong answer, find their first wrong step
(`prefkern.data.first_error_step`); sample again from the correct prefix, and take the next step of a continuation whose
answer is right. Both sides are the policy's own. A solution without a wrong step makes no pair. Two equal steps give the loss
log 2 and gradients that cancel in the weights of the model; they are worth leaving out.

Paper and code agree on the loss. Default: beta 0.5 (0.4 for models of 72B). The release's configuration file says 0.05, which
its scripts always override.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss, sequence_sum
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_values

about = About(
    name="Step-DPO",
    title="Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs",
    arxiv="2406.18629",
    year=2024,
    family="pairwise, step span",
    evidence="code",
    note="the authors' release",
)


def step_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    *,
    chosen_starts: Tensor | None = None,
    chosen_ends: Tensor | None = None,
    rejected_starts: Tensor | None = None,
    rejected_ends: Tensor | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    beta: float = 0.5,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of P pairs of steps, from token log-probs [P, T], or packed [N] with cu_seqlens, each side its own. Gradient to
    chosen_logp and rejected_logp.

    The step's tokens are those in the bool mask and, int [P], from `starts` up to, not including, `ends`; None: no limit.

    Metrics: those of `preference_loss`.
    """
    sides = (
        ("chosen", chosen_logp, ref_chosen_logp, chosen_mask, chosen_cu_seqlens, chosen_starts, chosen_ends),
        ("rejected", rejected_logp, ref_rejected_logp, rejected_mask, rejected_cu_seqlens, rejected_starts, rejected_ends),
    )
    scores = []
    for side, logp, ref, mask, cu_seqlens, starts, ends in sides:
        lengths = sequence_sum(torch.ones_like(ref), mask, cu_seqlens=cu_seqlens, starts=starts, ends=ends)
        check_values(f"{side} lengths", lengths, lengths > 0, "every step needs a token")
        score = sequence_sum(logp, mask, cu_seqlens=cu_seqlens, minus=ref, starts=starts, ends=ends)
        scores.append(torch.where(lengths > 0, score, torch.nan))
    return preference_loss(*scores, beta=beta, reduction=reduction)


@dataclass(frozen=True)
class StepDPO(PairRecipe):
    """DPO on one step: the mask of the pairs holds the tokens of that step alone."""

    name: ClassVar[str] = "step_dpo"
    beta: float = 0.5

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return preference_loss(*pairs.log_ratios(), beta=self.beta)


recipe = StepDPO()
