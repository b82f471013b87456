r"""ECPO: expectation confirmation. Turns of a dialogue that disappointed the user, against their rewrites.

Feng et al., "Expectation Confirmation Preference Optimization for Multi-Turn Conversational Recommendation Agent",
arXiv:2506.14302. (Other papers use the acronym for unrelated methods.)
Evidence: code. Selection and rating follow the authors' release, whose training is the DPO of LLaMA-Factory.

A simulated user rates every turn, 5 less what it deducts (:func:`prefkern.data.ecpo_satisfaction`), and says why. A rewriter is
asked to mend the turns below a threshold; where the rewrite reads like an action and is not the original, it is chosen, the
original is rejected, and the prompt is the original history (:func:`prefkern.data.ecpo_select`). No rollouts, no tree. Then

.. math::
    L = \frac{\sum_t w_t\, \ell_t}{\sum_t w_t}, \qquad
    \ell_t = -\log\sigma\Bigl(\beta \Bigl[\log\frac{\pi(a'_t \mid h_t)}{\pi_\mathrm{SFT}(a'_t \mid h_t)}
    - \log\frac{\pi(a_t \mid h_t)}{\pi_\mathrm{SFT}(a_t \mid h_t)}\Bigr]\Bigr)

with sums over the tokens of the action only: history has no gradient. Reference and weights are constants. Without weights,
which are this library's addition, it is DPO's mean.

Where the release differs from the method as described: turns with satisfaction 0, the worst, reach none of its files
(`min_score=1`; here 0 by default), and it does not check that a rewrite keeps the kind of action (`same_action`). The
threshold that was trained with is not known. beta 0.1 is the trainer's default. Without pairs, or with weights that are all
0, the loss is 0, with a warning. A NaN log-prob is a ValueError on the CPU."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..data import ecpo_satisfaction, ecpo_select
from ..ops import LossOutput, preference_loss
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values, may_look

__all__ = ["ECPO", "about", "ecpo_satisfaction", "ecpo_select", "recipe", "turn_dpo_loss"]

about = About(
    name="ECPO",
    title="Expectation Confirmation Preference Optimization for Multi-Turn Conversational Recommendation Agent",
    arxiv="2506.14302",
    year=2025,
    family="selection, pairwise",
    evidence="code",
    note="the authors' release for selection and rating; turn weights are an addition",
)


def turn_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None,
    ref_rejected_logp: Tensor | None,
    *,
    beta: float = 0.1,
    turn_weight: Tensor | None = None,
) -> LossOutput:
    """DPO's loss of turns, weighted. Gradient to chosen_logp and rejected_logp.

    chosen_logp to ref_rejected_logp: [P], sums over the tokens of the action; None for 0, of log-ratios. turn_weight: [P],
    not negative, such as how far the satisfaction lay below the threshold; scaling all changes nothing. None: all alike.

    Metrics: those of :func:`prefkern.preference_loss`.
    """
    check_rows(len(chosen_logp), turn_weight=turn_weight)
    given = {"chosen_logp": chosen_logp, "rejected_logp": rejected_logp}
    for name, logp in {**given, "ref_chosen_logp": ref_chosen_logp, "ref_rejected_logp": ref_rejected_logp}.items():
        if logp is not None:
            check_values(name, logp, ~logp.isnan(), "a log-prob is expected")
    if len(chosen_logp) == 0 or (turn_weight is not None and may_look(turn_weight) and not bool(turn_weight.any())):
        warnings.warn("no turn counts: the loss is 0", stacklevel=2)
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, weight=turn_weight, reduction="weighted_mean"
    )


@dataclass(frozen=True)
class ECPO(PairRecipe):
    """DPO of turns that :func:`ecpo_select` picked; masks mark the tokens of the action.

    `extra` may hold `turn_weight`, [P].
    """

    name: ClassVar[str] = "ecpo"
    beta: float = 0.1

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return turn_dpo_loss(*pairs.log_ratios(), None, None, turn_weight=pairs.get("turn_weight"), **self.options())


recipe = ECPO()
