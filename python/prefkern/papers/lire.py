r"""LIRE: the expected reward under the policy's own softmax over a list of responses.

Zhu et al., "LIRE: listwise reward enhancement for preference alignment", arXiv:2405.13516.
Evidence: paper. Its equation as known from the paper, not read again.

With the sequence log-probs of K responses to one prompt and their rewards R:

.. math::
    L = -\sum_j P_j R_j, \qquad P = \mathrm{softmax}(\log\pi / T), \qquad
    \frac{\partial L}{\partial \log\pi_j} = -\frac{P_j}{T} \Bigl(R_j - \sum_i P_i R_i\Bigr)

The rewards are constants; there is no reference. A constant added to the rewards adds it to -L and changes no gradient.
A prompt whose responses all have one reward has no gradient; its loss is 0 here, and it does not count in the mean over
prompts. `temperature` 1; the paper's was not recovered.
"""

from typing import Literal

from torch import Tensor

from ..ops import LossOutput, listwise_loss
from ._about import About

about = About(
    name="LIRE",
    title="LIRE: listwise reward enhancement for preference alignment",
    arxiv="2405.13516",
    year=2024,
    family="listwise",
    evidence="paper",
    note="its equation, not read again",
)


def lire_loss(
    logp: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of B prompts with K responses. Gradient to logp.

    logp: [B, K], summed over the tokens of each response. rewards: [B, K]. mask: bool [B, K]; responses that there are.

    Metrics: lists, top1, items of `prefkern.listwise_loss`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    return listwise_loss(logp, rewards, mask, kind="lire", beta=1 / temperature, reduction=reduction)
