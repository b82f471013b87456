r"""GPM and GPO: preferences by embeddings that may form cycles, and a policy regressed on their scores.

Zhang et al., "General Preference Modeling with Preference Representations for Aligning Language Models", arXiv:2410.02197
(ICML 2025 as "Beyond Bradley-Terry Models").
Evidence: code. The preference model was checked against the authors' release. The policy loss GPO is the paper's equation; its
trainer is not released, and the mean over a selected pair is inferred. Generalized Preference Optimization, also GPO, is
another method.

Each response has an embedding v of 2k numbers, each prompt k scales s (1 by default):

.. math::
    s(i \succ j) = \sum_l s_l (v_{i,2l} v_{j,2l+1} - v_{i,2l+1} v_{j,2l}), \qquad
    L = -\log\sigma\bigl((s(c \succ r) - m) / \tau\bigr), \qquad \hat s_i = \frac1K \sum_j s(i \succ j) / \tau

.. math::
    L_\mathrm{GPO} = \bigl(\log\pi(y) - \log\pi_t(y) - (\hat s_y - \log Z) / \beta\bigr)^2

Scores are skew-symmetric: a response against itself has 0, and the mean scores of a prompt sum to 0. With k = 1 and (r, 1) they
are differences of rewards. The gradient of L flows to both embeddings and to the scales; in the second, scores, :math:`\pi_t`
and log Z, in practice 0, are constants. The target is the raw score, where SPPO's is a probability less 1/2.

Where paper and code differ:

- Embeddings are divided by their length in the paper and in the released inference, not in training: `normalize=True`.
- Scales are a softmax in inference, k times a softmax of logits over the root of the hidden size in training:
:func:`gpm_scales`.
- The release's scripts average T - T', twice the paper's score: `antisym_double`. The same as half of beta.

Defaults: tau 0.1 (the release's; its training scripts also pass 1), beta 0.001. A prompt with one response, or with equal
scores, has no pair: :func:`gpm_select` says so. An embedding of zeros has score 0. NaN in an embedding makes its pair, or its
prompt, NaN. Cycles are what this adds: a downstream gain over Bradley-Terry is not claimed.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, skew_loss, skew_row_means, unpaired_loss
from ._about import About

about = About(
    name="GPM",
    title="General Preference Modeling with Preference Representations for Aligning Language Models",
    arxiv="2410.02197",
    year=2024,
    family="pairwise",
    evidence="code",
    note="the authors' preference model; GPO's loss is the paper's, its form for pairs inferred",
)


class Selected(NamedTuple):
    """The pair of each prompt, [B] each."""

    chosen: Tensor
    """int64: the response with the highest score, the first of equal ones."""
    rejected: Tensor
    """int64: with the lowest."""
    keep: Tensor
    """bool: whether the two differ."""


def gpm_loss(
    v_chosen: Tensor,
    v_rejected: Tensor,
    *,
    scales: Tensor | None = None,
    tau: float = 0.1,
    margin: Tensor | None = None,
    normalize: bool = True,
) -> LossOutput:
    """The preference model's loss over B pairs, whose embeddings are [B, 2k]. Gradient to both and to the scales [B, k].

    margin: [B], a constant.

    Metrics: rows, prob (mean of sigmoid((s - m) / tau)), accuracy.
    """
    return skew_loss(v_chosen, v_rejected, scales, tau=tau, margin=margin, normalize=normalize)


def gpm_scales(prompt_logits: Tensor, *, kind: Literal["softmax", "mean_one"] = "softmax", temper: float = 1.0) -> Tensor:
    """The scales [B, k] of prompts from the logits [B, k] of the prompt head, differentiable: the softmax of logits / temper,
    or k times it. The training copy: "mean_one", with the root of the hidden size as temper."""
    choice("kind", kind, ("softmax", "mean_one"))
    if not temper > 0:
        raise ValueError(f"temper is {temper}; it must be positive")
    scales = (prompt_logits / temper).softmax(-1)
    return scales * scales.shape[-1] if kind == "mean_one" else scales


def gpm_scores(
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scales: Tensor | None = None,
    tau: float = 0.1,
    normalize: bool = True,
    antisym_double: bool = False,
) -> Tensor:
    """The score of each response over the policy, the mean over the K of its prompt, [B, K]: constants, 0 outside the mask.

    v: [B, K, 2k]. mask: bool [B, K]; responses that there are. No table of pairs is formed.
    """
    means = skew_row_means(v, mask, scales, tau=tau, normalize=normalize)
    return means * 2 if antisym_double else means


def gpm_select(scores: Tensor, mask: Tensor | None = None) -> Selected:
    """The best and the worst response of each prompt by scores [B, K]."""
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    best, chosen = scores.masked_fill(~keep, -torch.inf).max(1)
    worst, rejected = scores.masked_fill(~keep, torch.inf).min(1)
    return Selected(chosen, rejected, best > worst)


def gpo_loss(
    logratio: Tensor, score: Tensor, *, beta: float = 1e-3, log_z: float | Tensor = 0.0, clamp: float | None = None
) -> LossOutput:
    """The mean squared error of log-ratios [N] to (score - log_z) / beta. Gradient to logratio.

    logratio: log pi - log pi_t, summed over the tokens of each response; of a pair both, so that its loss is the mean of two.
    score: of :func:`gpm_scores`, a constant. clamp: bounds the target to [-clamp, clamp].

    Metrics: target (mean), residual (mean absolute error).
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp is {clamp}; it must be positive, or None")
    if score.shape != logratio.shape:
        raise ValueError(f"score has shape {list(score.shape)}; that of logratio, {list(logratio.shape)}, is expected")
    x = logratio if logratio.dtype == torch.float64 else logratio.float()
    target = (score.detach().to(x.dtype) - log_z) / beta
    if isinstance(log_z, Tensor):
        target = target.detach()
    if clamp is not None:
        target = target.clamp(-clamp, clamp)
    x, target = x.flatten(), target.flatten()
    every = torch.ones_like(x, dtype=torch.bool)
    loss = unpaired_loss(x, None, every, kind="squared", beta=1.0, offset=target, factor=2.0).loss  # that kind has a half
    count = max(x.numel(), 1)
    metrics = {"target": target.sum() / count, "residual": (x.detach() - target).abs().sum() / count}
    return LossOutput(loss, metrics)
