r"""GEPO (OORL): groups of equivalent winners against groups of losers, by their means, with a penalty on the winners' spread.

"On-Policy Optimization with Group Equivalent Preference for Multi-Programming Language Understanding", arXiv:2505.12723.
Evidence: part. The objective is rebuilt from the paper's sentences, its display formulas being missing; the variance's divisor
and scale are this library's choice. No code was found. Group Expectation Policy Optimization, also GEPO, is another method.

With the sequence log-ratios :math:`\hat r = \log\pi - \log\pi_\mathrm{ref}` of a prompt's n winners W, which are equivalent to
each other, and m losers:

.. math::
    L = -\log\sigma\Bigl(\beta\bigl[\tfrac1n \sum_{i \in W} \hat r_i - \tfrac1m \sum_{j \notin W} \hat r_j\bigr]\Bigr)
        + \lambda \mathrm{Var}_{i \in W}\, \hat r_i, \qquad L_\mathrm{OORL} = L_\mathrm{RL} + 0.01\, L

averaged over prompts. Only the reference is a constant. A constant added to all ratios of a prompt, such as its log partition
function, changes nothing. The penalty keeps the winners' proportions under the reference: it does not make them equally likely.

What the paper leaves open, and what is taken: the variance has the divisor n (`ddof=1`: n - 1) and is of the log-ratios
(`var_scale="reward"`: of :math:`\beta\hat r`); ratios are sums over tokens. Sums of long responses of different lengths vary
with their length, so that the penalty can outweigh the preference by orders of magnitude: the metrics hold both terms, and
means over tokens may be passed instead. `beta` 0.1 is not the paper's, which is not visible; lam 1 and the weights 1 and 0.01
are.

One winner has variance 0, with one loser too this is DPO. A prompt without winners or without losers is left out of the mean.
All members of a prompt must be in one micro-batch.
"""

from typing import Literal

from torch import Tensor

from ..ops import LossOutput, group_preference_loss
from ._about import About

about = About(
    name="GEPO",
    title="On-Policy Optimization with Group Equivalent Preference for Multi-Programming Language Understanding",
    arxiv="2505.12723",
    year=2025,
    family="listwise, groups",
    evidence="part",
    note="rebuilt from the paper's sentences; divisor and scale of the variance are inferred",
)


def gepo_loss(
    logratio: Tensor,
    is_winner: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    lam: float = 1.0,
    ddof: int = 0,
    var_scale: Literal["logratio", "reward"] = "logratio",
) -> LossOutput:
    """The loss of B prompts with G responses. Gradient to logratio.

    logratio: [B, G], log pi - log pi_ref, summed over the tokens of each response.
    is_winner: bool [B, G]. mask: bool [B, G]; responses that there are.

    Metrics: rows (prompts that count), preference and variance (means of the two terms, the second without lam).
    """
    return group_preference_loss(logratio, is_winner, mask, beta=beta, lam=lam, ddof=ddof, var_scale=var_scale)


def oorl_loss(rl_loss: Tensor, gepo_loss: Tensor, *, w_rl: float = 1.0, w_gepo: float = 0.01) -> Tensor:
    """The weighted sum of an on-policy loss, in the paper that of REINFORCE++ on verified rewards, and GEPO's. The two are of
    different data."""
    return w_rl * rl_loss + w_gepo * gepo_loss
