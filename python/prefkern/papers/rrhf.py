r"""RRHF: a ranking loss on length-averaged log-probs, and the likelihood of the best response.

Yuan et al., "RRHF: Rank Responses to Align Language Models with Human Feedback without tears", arXiv:2304.05302.
Evidence: paper. Its equations as known from the paper, not read again.

With a the mean log-prob over the tokens of each of K responses to one prompt, and rewards r:

.. math::
    L = \sum_{r_i < r_j} \max(0, a_i - a_j) - a_{\arg\max r}

There is no reference, no margin, and no temperature. Equal rewards make no pair. The gradient of the hinge at 0 is 0.

The second term is the mean over the tokens of the best response (of equal ones the first); with `lengths` it is their sum, the
usual cross-entropy. A prompt whose responses are all as good has only this term; one without a response does not count in the
mean over prompts. Default: `nll_coef` 1, as in the paper.
"""

import torch
from torch import Tensor

from ..ops import LossOutput, listwise_loss
from ._about import About

about = About(
    name="RRHF",
    title="RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
    arxiv="2304.05302",
    year=2023,
    family="listwise",
    evidence="paper",
    note="its equations, not read again",
)


def rrhf_loss(
    logp: Tensor, rewards: Tensor, mask: Tensor | None = None, *, nll_coef: float = 1.0, lengths: Tensor | None = None
) -> LossOutput:
    """The loss of B prompts with K responses. Gradient to logp.

    logp: [B, K], averaged over the tokens of each response.
    rewards: [B, K]. mask: bool [B, K]; responses that there are. lengths: [B, K], tokens of each; see above.

    Metrics: ranking, nll (means of the two terms over the prompts), lists, top1.
    """
    ranking = listwise_loss(logp, rewards, mask, kind="rrhf", reduction="none")
    keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    best = rewards.detach().masked_fill(~keep, -torch.inf).argmax(1, keepdim=True)
    if lengths is not None and lengths.shape != logp.shape:
        raise ValueError(f"lengths has shape {list(lengths.shape)}; {list(logp.shape)} is expected")
    some = keep.any(1)
    nll = -torch.where(some, logp.gather(1, best)[:, 0], 0.0).to(ranking.loss.dtype)
    if lengths is not None:
        nll = nll * lengths.gather(1, best)[:, 0]
    prompts = some.sum().clamp_min(1)
    first, second = ranking.loss.sum() / prompts, nll.sum() / prompts
    metrics = {"ranking": first.detach(), "nll": second.detach(), **{k: ranking.metrics[k] for k in ("lists", "top1")}}
    return LossOutput(first + nll_coef * second, metrics)
