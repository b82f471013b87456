r"""LiPO-lambda: pairs of a list weighted by what exchanging them would cost in DCG.

Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", arXiv:2402.01878.
Evidence: paper. Its equation as known from the paper, not read again; no code was released.

With :math:`s = \beta(\log\pi - \log\pi_\mathrm{ref})` summed over the tokens of each of K responses to one prompt, labels
:math:`\psi`, and the rank r of a response by s, 1 for the largest, of equal ones the first:

.. math::
    L = -\sum_{\psi_i > \psi_j} \Delta_{ij} \log\sigma(s_i - s_j), \qquad
    \Delta_{ij} = \bigl|2^{\psi_i} - 2^{\psi_j}\bigr| \Bigl|\frac{1}{\log(1 + r_i)} - \frac{1}{\log(1 + r_j)}\Bigr|

The weights are constants, although ranks and scores come from the policy. Equal labels make no pair; a prompt without pairs has
loss 0 and does not count in the mean over prompts. `normalize="pairs"` divides by the number of pairs, which the paper does
not.

Defaults: beta 0.1, the one all such losses here share; the paper's was not recovered. Labels are expected around [0, 1]; above
30 the gain overflows, which is an error.
"""

from typing import Literal

from torch import Tensor

from ..ops import LossOutput, listwise_loss
from ._about import About

about = About(
    name="LiPO-lambda",
    title="LiPO: Listwise Preference Optimization through Learning-to-Rank",
    arxiv="2402.01878",
    year=2024,
    family="listwise",
    evidence="paper",
    note="its equation, not read again",
)


def lipo_loss(
    logratio: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    normalize: Literal["sum", "pairs"] = "sum",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of B prompts with K responses. Gradient to logratio.

    logratio: [B, K], log pi - log pi_ref, summed over the tokens of each response.
    labels: [B, K], the higher the better. mask: bool [B, K]; responses that there are.

    Metrics: lists, top1, items of `prefkern.listwise_loss`.
    """
    return listwise_loss(
        logratio, labels, mask, kind="lambda", rank="scores", beta=beta, normalize=normalize, reduction=reduction
    )
