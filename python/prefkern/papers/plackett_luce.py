r"""Plackett-Luce DPO: the likelihood of a whole ranking, of which DPO is the case of two.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv:2305.18290, appendix.
Evidence: paper. From its equation for rankings; every trainer ships the case of two only.

With the sequence log-ratios :math:`x = \log\pi - \log\pi_\mathrm{ref}` of K responses to one prompt, from best to worst, and
:math:`s = \beta x`:

.. math::
    L = -\sum_{k=1}^{K-1} \Bigl[s_k - \log \sum_{j \ge k} e^{s_j}\Bigr]

The reference is a constant. Two responses: DPO. One response: 0. PRO's ranking loss is the same sum over length-averaged
log-probs without a reference, to which it adds the likelihood of the best.

Where the paper's order is strict, labels may be equal: of equal ones neither is compared with the other (a choice made here),
so that a prompt whose responses are all as good has loss 0 and does not count. `beta` 0.1, as for DPO.
"""

from typing import Literal

from torch import Tensor

from ..ops import LossOutput, listwise_loss
from ._about import About

about = About(
    name="Plackett-Luce DPO",
    title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    arxiv="2305.18290",
    year=2023,
    family="listwise",
    evidence="paper",
    note="its appendix's form for rankings",
)


def plackett_luce_loss(
    logratio: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of B prompts with K responses. Gradient to logratio.

    logratio: [B, K], log pi - log pi_ref, summed over the tokens of each response.
    labels: [B, K], the higher the better; None: the first response is the best.
    mask: bool [B, K]; responses that there are.

    Metrics: lists, top1, items of `prefkern.listwise_loss`.
    """
    return listwise_loss(logratio, labels, mask, kind="plackett_luce", beta=beta, reduction=reduction)
