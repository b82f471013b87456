r"""MCTS-DPO: pairs of steps from a tree search, each with a label smoothing that the visits tell.

"Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning", arXiv:2405.00451.
Evidence: code. The search (`prefkern.mcts`) gives the visits and values of the authors' release; loss and smoothing are its.

`prefkern.mcts` searches, ranks and makes pairs. Of a pair, k being the first token that differs:

.. math::
    h = \sum_{t \ge k} (\log\pi - \log\pi_\mathrm{ref})_t, \qquad d = h_\mathrm{better} - h_\mathrm{worse}

.. math::
    a = \min\Bigl(1 - \frac{1}{1 + N_\mathrm{worse} / \max(1, N_\mathrm{better})}, \frac12\Bigr), \qquad
    L = -(1 - a) \log\sigma(\beta d) - a \log\sigma(-\beta d)

averaged over pairs. a and the reference are constants: :math:`\partial L / \partial h_\mathrm{better} =
\frac{\beta}{P}(\sigma(\beta d) - (1 - a))`. Tokens of the shared prefix have no gradient. A pair whose children were both never
visited has a = 0. Ranking is by Q, so the worse child may have more visits: then a = 1/2, where the loss is even in d.

Options of the code: `kind="ipo"`, :math:`(d - 1/(2\beta))^2` without smoothing, and `conservative=False`, a = 0.
`length_penalty` divides h by (tokens from k on) to that power (the code's `norm_prob`, which its `ipo` implies).

Where paper and code differ: the code's option for the worse child cannot be switched off and takes a random one; the
intended worst is the default of `prefkern.mcts.step_pair`, "random" reproduces the runs. That the code drops pairs of trees
without a correct answer, the max(1, N) and the bound of a at 1/2 are in the code alone; the last two are followed.

Defaults: beta 0.1, as in paper and scripts (the code's own default is 0.02). Two equal sequences, or one that is a prefix of
the other, make no pair: `differing_log_ratios` says which do, and the loss takes that as `mask`. No pairs: loss 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, first_divergence, preference_loss, sequence_sum
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values

about = About(
    name="MCTS-DPO",
    title="Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning",
    arxiv="2405.00451",
    year=2024,
    family="search, pairwise",
    evidence="code",
    note="the authors' release",
)


class LogRatios(NamedTuple):
    """Of P pairs, [P] each."""

    better: Tensor
    worse: Tensor
    valid: Tensor
    """bool: whether both sequences have a token where they first differ."""


def visit_label_smoothing(n_better: Tensor, n_worse: Tensor) -> Tensor:
    """a of every pair from the visits of its two children, in [0, 1/2]: float32 [P] (float64 for float64 visits)."""
    better, worse = (n if n.is_floating_point() else n.float() for n in (n_better, n_worse))
    check_rows(len(better), n_worse=worse)
    for name, n in (("n_better", better), ("n_worse", worse)):
        check_values(name, n, n >= 0, "a number of visits is not negative")
    return (1 - 1 / (1 + worse / better.clamp_min(1))).clamp_max(0.5)


def differing_log_ratios(
    better_ids: Tensor,
    worse_ids: Tensor,
    better_logp: Tensor,
    worse_logp: Tensor,
    ref_better_logp: Tensor,
    ref_worse_logp: Tensor,
    better_mask: Tensor | None = None,
    worse_mask: Tensor | None = None,
    *,
    length_penalty: float | None = None,
) -> LogRatios:
    """h of both sides, from the first token that differs to each one's last. Gradient to better_logp and worse_logp.

    ids, logp: [P, T], each side its own T; logp of a token where its id is. masks: bool, True from the first token of a
    sequence to its last. length_penalty: None for sums.
    """
    k = first_divergence(better_ids, worse_ids, better_mask, worse_mask)
    sides = ((better_logp, ref_better_logp, better_mask), (worse_logp, ref_worse_logp, worse_mask))
    ratios, valid = [], torch.ones_like(k, dtype=torch.bool)
    for logp, ref, mask in sides:
        h = sequence_sum(logp, mask, minus=ref, starts=k)
        tokens = sequence_sum(torch.ones_like(ref), mask, starts=k)
        valid = valid & (tokens > 0)
        ratios.append(h if length_penalty is None else h / tokens.clamp_min(1) ** length_penalty)
    return LogRatios(ratios[0], ratios[1], valid)


def smoothed_dpo_loss(
    better_log_ratio: Tensor,
    worse_log_ratio: Tensor,
    alpha: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    beta: float = 0.1,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    conservative: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of P pairs from their log-ratios h [P]. Gradient to both.

    alpha: the smoothing a [P], as from `visit_label_smoothing`; not looked at with `kind="ipo"` or `conservative=False`. mask:
    bool [P], the pairs that count.

    Metrics: those of `preference_loss`, and label_smoothing, the mean a of the pairs that count.
    """
    choice("kind", kind, ("sigmoid", "ipo"))
    smoothing: Tensor | float = 0.0
    if kind == "sigmoid" and conservative:
        if alpha is None:
            raise ValueError("alpha is None; [P] is expected, or conservative=False")
        check_rows(len(better_log_ratio), alpha=alpha)
        smoothing = alpha.detach()
    loss, metrics = preference_loss(
        better_log_ratio, worse_log_ratio, kind=kind, beta=beta, label_smoothing=smoothing, mask=mask, reduction=reduction
    )
    used = torch.zeros_like(better_log_ratio) + smoothing
    kept = used if mask is None else torch.where(mask, used, 0.0)
    return LossOutput(loss, {**metrics, "label_smoothing": kept.detach().sum() / metrics["pairs"].clamp_min(1)})


@dataclass(frozen=True)
class MCTSDPO(PairRecipe):
    """DPO with the label smoothing of each pair, `extra["label_smoothing"]`. The mask leaves out the prefix that a pair shares,
    though its log-ratios would cancel."""

    name: ClassVar[str] = "mcts_dpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "label_smoothing")
    beta: float = 0.1

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        return smoothed_dpo_loss(*pairs.log_ratios(), pairs.require("label_smoothing"), beta=self.beta)


recipe = MCTSDPO()
