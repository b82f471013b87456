r"""AOT: preference between distributions; quantiles are compared instead of pairs.

Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv:2406.05882.
Evidence: code. TRL, values and gradients.

The policy should be better than the reference in the first stochastic order: each quantile of a batch is compared with the
same quantile of the other side. With log-probs summed over a response, :math:`x = \log\pi - \log\pi_\mathrm{ref}` and
:math:`v_{(i)}` the i-th smallest of v:

.. math::
    d_i = (\log\pi_w - \log\pi_l)_{(i)} - (\log\pi_{\mathrm{ref},w} - \log\pi_{\mathrm{ref},l})_{(i)} \quad(\text{"paired"}),
    \qquad d_i = x_{w\,(i)} - x_{l\,(i)} \quad(\text{"unpaired"})

.. math:: L = \frac1P \sum_i -(1 - \varepsilon) \log\sigma(\beta d_i) - \varepsilon \log\sigma(-\beta d_i)

The order is a constant: a gradient goes to each response through its own rank. Sorting is stable, so that ties fall the same
way in every run. The paper's unpaired form takes responses of different prompts; both sides have to be as many, else it is an
error.

Only the mean, or the sum, means something: i is a rank, not a pair. `reduction="none"` gives the ranks' losses, in order.
A batch of one is cDPO. Distributions are those of what the loss is given: of a micro-batch on one rank, as in TRL.

TRL's names: "aot" is "paired", "aot_unpaired" (before: "aot_pair") is "unpaired".

Defaults: beta 0.1, label_smoothing 0.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..ops._arguments import check_tensors
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs

about = About(
    name="AOT",
    title="Distributional Preference Alignment of LLMs via Optimal Transport",
    arxiv="2406.05882",
    year=2024,
    family="distributions of a batch",
    evidence="code",
    note="TRL",
)


def aot_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    form: Literal["paired", "unpaired"] = "paired",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P chosen and P rejected responses, from log-probs summed over each, [P] each. Gradient to chosen_logp and
    rejected_logp.

    Metrics are those of `prefkern.preference_loss`; accuracy is the share of ranks with a positive margin.
    """
    choice("form", form, ("paired", "unpaired"))
    sides = {"chosen_logp": chosen_logp, "rejected_logp": rejected_logp}
    references = {"ref_chosen_logp": ref_chosen_logp, "ref_rejected_logp": ref_rejected_logp}
    for name, t in (sides | {name: t for name, t in references.items() if t is not None}).items():
        check_tensors(**{name: t})
        if t.shape != chosen_logp.shape:
            shapes = f"{list(t.shape)}; chosen_logp has shape {list(chosen_logp.shape)}"
            raise ValueError(f"{name} has shape {shapes}, and both sides must be as many")
    chosen, rejected, zeros = chosen_logp.detach(), rejected_logp.detach(), torch.zeros_like(chosen_logp)
    ref_chosen = zeros if ref_chosen_logp is None else ref_chosen_logp.detach()
    ref_rejected = zeros if ref_rejected_logp is None else ref_rejected_logp.detach()
    if form == "paired":
        policy, ref = _order(chosen - rejected), _order(ref_chosen - ref_rejected)
        orders = (policy, policy, ref, ref)
    else:
        up, down = _order(chosen - ref_chosen), _order(rejected - ref_rejected)
        orders = (up, down, up, down)
    logps = (chosen_logp, rejected_logp, ref_chosen, ref_rejected)
    ranked = (logp.gather(0, order) for logp, order in zip(logps, orders, strict=True))
    return preference_loss(*ranked, beta=beta, label_smoothing=label_smoothing, reduction=reduction)


def _order(values: Tensor) -> Tensor:
    return values.sort(stable=True).indices


@dataclass(frozen=True)
class AOT(PairRecipe):
    """DPO on the quantiles of a batch."""

    name: ClassVar[str] = "aot"
    form: Literal["paired", "unpaired"] = "paired"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        if self.form == "unpaired":
            return aot_loss(*pairs.log_ratios(), **self.options())
        return aot_loss(*pairs.log_probs(), *pairs.ref_log_probs(), **self.options())


recipe = AOT()
