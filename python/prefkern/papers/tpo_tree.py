r"""TPO: Tree Preference Optimization. A graded list of responses, whose rewards are means over steps of reasoning.

Liao, Chu, Wang, "Aligning Large Language Models with Multi-branch & Multi-step Preference Trees", arXiv:2410.12854 (ICLR 2025).
Evidence: paper. The weighted list loss is the paper's as recalled; the reward of a response (steps, their weights) was checked
against the authors' release, whose list loss is another. Triple Preference Optimization, also TPO, is another method.

Tokens have step ids from 1 (0: prompt and padding), and log-ratios :math:`\rho = \log\pi - \log\pi_\mathrm{ref}`. Ids above the
smallest number of steps of a prompt's responses become this number. With e the mean of the policy's last hidden state over a
step, and row 0 the gold response:

.. math::
    r_i = \frac{\sum_s w_{is}\, \mathrm{mean}_{t \in s}\, \rho_{it}}{\sum_s w_{is}}, \qquad w_{is} = 1 + \cos(e_{is}, e_{0s})

.. math::
    L = -\frac1Z \sum_{v_i > v_j} \Delta_{ij} \log\sigma(\beta(r_i - r_j)), \qquad
    \Delta_{ij} = |G_i - G_j| \Bigl|\frac{1}{\log(1 + \tau_i)} - \frac{1}{\log(1 + \tau_j)}\Bigr|, \quad G = 2^v - 1

:math:`\tau` is the rank by v from 1, of equal ones the first; Z the number of pairs (`normalize="sum"`: 1). Weights, of pairs
and of steps, are constants (in the release those of steps are not; a choice made here). `weighting="uniform"` has no
:math:`\Delta`.

Where the release differs it is not followed. Its total, :math:`-\log\sigma(\beta L_c)` of a list loss :math:`L_c` over all
ordered pairs, equal ones and the diagonal, without :math:`\Delta`, falls as :math:`L_c` grows: minimising it pushes the reward
of the best response down. :func:`published_losses` has both numbers, to be looked at. It also reads every token's log-prob at
position 0, and ignores its masks.

Defaults: beta 0.5, the paper's. Labels are expected in [0, 1]: `scale_labels` brings those of each prompt there,
`gain="linear"` takes any, and above 30 the gain is an error. No pair (one response, equal labels): loss 0. A step without
tokens is left out, a response without tokens is no part of its list, and neither is one whose label is NaN. Where all weights
of a response are 0 its reward is 0. A hidden vector of zeros has cosine 0.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, listwise_loss, step_mean
from ._about import About
from ._shared import may_look

about = About(
    name="TPO (tree)",
    title="TPO: Aligning Large Language Models with Multi-branch & Multi-step Preference Trees",
    arxiv="2410.12854",
    year=2024,
    family="listwise",
    evidence="paper",
    note="the weighted list loss, as recalled; steps and rewards were checked against the authors' release",
)


def align_steps(step_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Step ids [B, N, T] with the surplus steps of longer responses merged into the last one that all have.

    mask: bool [B, N]; responses that there are. One without tokens does not count.
    """
    steps = step_ids.amax(2) if step_ids.shape[2] else step_ids.sum(2)
    counts = steps > 0 if mask is None else (steps > 0) & mask
    fewest = torch.where(counts, steps, torch.iinfo(step_ids.dtype).max).amin(1)
    return torch.minimum(step_ids, fewest[:, None, None])


def step_means(values: Tensor, step_ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Means over the tokens of each step from 1 to `steps`, and which steps have any: [B, N, S] or [B, N, S, H] from [B, N, T]
    or [B, N, T, H], and bool [B, N, S]. Tokens of step 0 are never looked at."""
    means, counts = step_mean(values.flatten(0, 1), step_ids.flatten(0, 1), max(steps, 1))
    return means.unflatten(0, step_ids.shape[:2]), (counts > 0).unflatten(0, step_ids.shape[:2])


def step_cosine_weights(hidden: Tensor, step_ids: Tensor, ref_row: int = 0, *, steps: int | None = None) -> Tensor:
    """The weight of each step, 1 + cos to the same step of row `ref_row`, [B, N, S]: constants, 0 where either has no such
    step.

    hidden: [B, N, T, H], last hidden states. step_ids: int [B, N, T]; see :func:`align_steps`, which is applied.
    """
    _check_ids(step_ids, hidden.shape[:3])
    ids = align_steps(step_ids)
    means, there = step_means(hidden.detach(), ids, _steps(ids, steps))
    length = means.norm(dim=-1).clamp_min(1e-8)
    gold = slice(ref_row, ref_row + 1)
    cosine = (means * means[:, gold]).sum(-1) / (length * length[:, gold])
    return torch.where(there & there[:, gold], 1 + cosine, 0.0)


def step_rewards(logratio: Tensor, step_ids: Tensor, step_weights: Tensor | None = None, *, steps: int | None = None) -> Tensor:
    """The rewards r of the responses, [B, N]. Gradient to logratio; ids are taken as they are."""
    count = _steps(step_ids, steps) if step_weights is None else step_weights.shape[2]
    means, there = step_means(logratio, step_ids, count)
    weights = there.to(means.dtype) if step_weights is None else step_weights.detach().to(means.dtype) * there
    total = weights.sum(2)
    return (weights * means).sum(2) / total.masked_fill(total == 0, 1.0)


def tpo_loss(
    logratio: Tensor,
    step_ids: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    step_weights: Tensor | None = None,
    steps: int | None = None,
    beta: float = 0.5,
    weighting: Literal["lambda", "uniform"] = "lambda",
    gain: Literal["exp2", "linear"] = "exp2",
    normalize: Literal["pairs", "sum"] = "pairs",
    scale_labels: bool = False,
) -> LossOutput:
    """The loss of B prompts with N responses. Gradient to logratio.

    logratio: [B, N, T], log pi - log pi_ref of each token. step_ids: int [B, N, T]; :func:`align_steps` is applied.
    labels: [B, N], scores, the higher the better. mask: bool [B, N]; responses that there are.
    step_weights: [B, N, S] of :func:`step_cosine_weights`; None: 1.
    steps: the largest number of steps; needed on CUDA, where looking for it would wait for the device.
    scale_labels: bring the labels of each prompt to [0, 1] first.

    Metrics: lists, top1, items of `prefkern.listwise_loss`, reward (mean r of the responses that count).
    """
    choice("weighting", weighting, ("lambda", "uniform"))
    _check_ids(step_ids, logratio.shape)
    if labels.shape != logratio.shape[:2]:
        raise ValueError(f"labels has shape {list(labels.shape)}; {list(logratio.shape[:2])} is expected")
    keep = (step_ids > 0).any(2) & ~labels.isnan()
    keep = keep if mask is None else keep & mask
    ids = align_steps(step_ids, keep)
    rewards = step_rewards(logratio, ids, step_weights, steps=steps)
    labels = labels.detach().masked_fill(~keep, 0.0)
    if scale_labels:
        low = labels.masked_fill(~keep, torch.inf).amin(1, keepdim=True)
        span = labels.masked_fill(~keep, -torch.inf).amax(1, keepdim=True) - low
        labels = torch.where(keep, (labels - low) / torch.where(span > 0, span, 1.0), 0.0)
    output = listwise_loss(rewards, labels, keep, kind=weighting, beta=beta, gain=gain, normalize=normalize)
    mean = rewards.detach().masked_fill(~keep, 0.0).sum() / keep.sum().clamp_min(1)
    return LossOutput(output.loss, {**output.metrics, "reward": mean})


def published_losses(rewards: Tensor, labels: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """The release's list loss and its total, [B] each, of rewards and labels [B, N]. Never to be minimised: the total falls as
    the order gets worse."""
    sign = (labels[:, :, None] - labels[:, None, :]).sign()
    n = rewards.shape[1]
    lists = -F.logsigmoid((rewards[:, :, None] - rewards[:, None, :]) * sign).sum((1, 2)) / max(n * (n - 1), 1)
    return lists, -F.logsigmoid(beta * lists)


def _check_ids(step_ids: Tensor, shape: torch.Size) -> None:
    if step_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"step_ids has dtype {step_ids.dtype}; int64 or int32 is expected")
    if step_ids.dim() != 3 or step_ids.shape != shape:
        raise ValueError(f"step_ids has shape {list(step_ids.shape)}; {list(shape)} is expected, [B, N, T]")
    if may_look(step_ids) and bool((step_ids < 0).any()):
        raise ValueError(f"step_ids has {int(step_ids.min())}; steps begin at 1, and 0 is none")


def _steps(step_ids: Tensor, steps: int | None) -> int:
    if steps is not None:
        return steps
    if not may_look(step_ids):
        raise ValueError("steps is None; where values may not be looked at the largest number of steps is needed")
    return int(step_ids.max()) if step_ids.numel() else 0
