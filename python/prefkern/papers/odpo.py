r"""ODPO: DPO that asks for a larger margin where the scores of the two responses are further apart.

Amini et al., "Direct Preference Optimization with an Offset", arXiv:2402.10571.
Evidence: code. Values were checked against the authors' release.

With the log-ratio of a response summed over its tokens, :math:`x = \log\pi - \log\pi_\mathrm{ref}`, and scores s of the
responses:

.. math:: L = -\log\sigma\bigl(\beta (x_w - x_l) - \alpha\,\Delta\bigr), \qquad \Delta = \log(s_w - s_l)

averaged over pairs; the offset is a constant. `odpo_offset` gives :math:`\Delta` by `kind`: ``"log"`` as above,
``"log_ratio"``, :math:`\log(s_w / s_l)` (the release's `ratio`), or ``"linear"``, the gap itself. The first is negative for a
gap below 1: such pairs need less than DPO's margin. A gap that is not positive has no logarithm and is an error where values
may be looked at, else NaN.

An offset of 0, or alpha 0, give DPO. The same form with a reward model's margin is `prefkern.papers.reward_model`.

Defaults of the release: alpha 1, no beta; here beta 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values

about = About(
    name="ODPO",
    title="Direct Preference Optimization with an Offset",
    arxiv="2402.10571",
    year=2024,
    family="pairwise, margin",
    evidence="code",
    note="the authors' release",
)

OffsetKind = Literal["log", "log_ratio", "linear"]
KINDS = ("log", "log_ratio", "linear")


def odpo_offset(chosen_scores: Tensor, rejected_scores: Tensor, kind: OffsetKind = "log") -> Tensor:
    """The offset [P] of pairs with these scores [P], without gradient."""
    choice("kind", kind, KINDS)
    check_rows(len(chosen_scores), chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    chosen, rejected = chosen_scores.detach(), rejected_scores.detach()
    if kind == "log_ratio":
        for name, scores in (("chosen_scores", chosen), ("rejected_scores", rejected)):
            check_values(name, scores, scores > 0, "a ratio of scores needs them positive")
        return chosen.log() - rejected.log()
    gap = chosen - rejected
    if kind == "linear":
        return gap
    check_values("chosen_scores - rejected_scores", gap, gap > 0, "the logarithm needs the chosen score above the other")
    return gap.log()


def odpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    offset: float | Tensor,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    offset: [P] constants, or a number. Metrics: those of `prefkern.preference_loss`; rewards are without the offset.
    """
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, offset=alpha * offset,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class ODPO(PairRecipe):
    """DPO with an offset per pair, from `extra["chosen_scores"]` and `extra["rejected_scores"]`, [P] each."""

    name: ClassVar[str] = "odpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "chosen_scores", "rejected_scores")
    kind: OffsetKind = "log"
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        options = self.options()
        offset = odpo_offset(pairs.require("chosen_scores"), pairs.require("rejected_scores"), options.pop("kind"))
        return odpo_loss(*pairs.log_ratios(), offset=offset, **options)


recipe = ODPO()
