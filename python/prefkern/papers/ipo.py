r"""IPO: a squared loss that stops at a finite margin.

Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv:2310.12036.
Evidence: code. TRL's form, values and gradients, and OpenRLHF's.

With :math:`x = \log\pi - \log\pi_\mathrm{ref}` summed over a response of n tokens:

.. math::
    L = \Bigl(\frac{x_w}{n_w} - \frac{x_l}{n_l} - \frac{1}{2\beta}\Bigr)^2 \quad (\text{"response"}) \qquad\text{or}\qquad
    L = \Bigl(x_w - x_l - \frac{1}{2\beta}\Bigr)^2 \quad (\text{None})

averaged over pairs. beta is the paper's :math:`\tau`; rewards in the metrics are beta times the log-ratio.

Where libraries differ: TRL divides each side by its own length, which its authors report to have settled with those of the
paper; OpenRLHF, and the equation as printed, do not, and Liger has no IPO. A beta does not carry over from one to the other:
name which is meant by `length_average`. TRL takes an empty response for one token; here it is an error.

Default: beta 0.1, `length_average="response"`, as TRL.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="IPO",
    title="A General Theoretical Paradigm to Understand Learning from Human Preferences",
    arxiv="2310.12036",
    year=2023,
    family="pairwise, squared",
    evidence="code",
    note="TRL and OpenRLHF",
)


def ipo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    length_average: Literal["response"] | None = "response",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    chosen_lengths, rejected_lengths: [P] numbers of tokens, needed for length_average "response", and only for that.
    Metrics are those of `prefkern.preference_loss`.
    """
    if length_average not in ("response", None):
        raise ValueError(f"length_average is {length_average!r}; accepted: 'response', None")
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="ipo", beta=beta,
        average=None if length_average is None else "logp", chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
        reduction=reduction,
    )  # fmt: skip


@dataclass(frozen=True)
class IPO(PairRecipe):
    """The squared distance of the margin from 1 / (2 beta)."""

    name: ClassVar[str] = "ipo"
    beta: float = 0.1
    length_average: Literal["response"] | None = "response"

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        chosen, rejected = (None, None) if self.length_average is None else pairs.lengths()
        return ipo_loss(*pairs.log_ratios(), chosen_lengths=chosen, rejected_lengths=rejected, **self.options())


recipe = IPO()
