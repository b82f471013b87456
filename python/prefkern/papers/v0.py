r"""V_0: what a policy can do, guessed from how it did on other prompts: budgets of rollouts, a router, and the loss it is
trained with.

"V_0: A Generalist Value Model for Any Policy at State Zero", arXiv:2602.03584.
Evidence: part. The loss follows the authors' release, read and not run; budget and router are the paper's equations through
another's account, derived again here. The value model itself, an embedding model with a TabPFN head, is not here: the predictor
is a stand-in of this library's own.

The value :math:`V_0(x, C) = P(r = 1 \mid x, C)` reads a context C of the policy's past prompts and results, so that it follows
the policy without training.

Loss (`value_ranking_loss`), of one context, queries in pairs, positive first: with :math:`s = z_1 - z_0`

.. math::
    L = \alpha \operatorname{mean}_\text{pairs} \log(1 + e^{-(s_+ - s_-)})
    + (1 - \alpha) \operatorname{mean}_n w_n \bigl[ y_n \log(1 + e^{-s_n}) + (1 - y_n) \log(1 + e^{s_n}) \bigr]

The first part does not change when a constant is added to every s of a context: guessing the policy's mean does not lower it.

Budget (`allocate_budget`): the most of :math:`\sum_i U(B_i, p_i)` with :math:`\sum_i B_i` no larger than a total, where

.. math::
    U(B, p) = B (1 - p) \bigl[ 1 - (1 - p)^{B - 1} \bigr]

is the expected number of wrong rollouts in a group that has right ones too. U is not concave: with q = 1 - p the rollout after
B adds :math:`q + q^B (B - (B + 1) q)`, which for p < 2/3 rises at first and tends to q, never to 0. So the greedy method of the
paper's account tends to pour what is left into one prompt, and for large totals the hardest ones take everything up to their
cap. `method="exact"`, a dynamic programme, is the default. `p_floor` takes prompts below it as hopeless, because how well small
p are calibrated decides where the budget goes.

Router (`router_labels`, `route`): the context of each model has the label :math:`\beta r + (1 - \beta)(1 - \tilde c)` with its
cost scaled to [0, 1] in place of r; the model with the largest value is asked. Sweeping beta gives the trade-off.

Where paper and code differ: the code's loss is the cross-entropy alone by default, and its alpha 0.5; the paper's results have
the composite with 0.25, the default here; `alpha=0.0` is the code's loss. Budgets of 2 to 128, as in the paper's account.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, knapsack_allocate, preference_loss
from ..ops._arguments import check_tensors, integer, number, positive_int
from ._about import About
from ._shared import check_rows, check_values

__all__ = [
    "Allocation",
    "about",
    "allocate_budget",
    "class_weights",
    "knn_success",
    "rollout_utility",
    "route",
    "router_labels",
    "value_ranking_loss",
]

about = About(
    name="V_0",
    title="V_0: A Generalist Value Model for Any Policy at State Zero",
    arxiv="2602.03584",
    year=2026,
    family="value model, budget",
    evidence="part",
    note="the loss follows the release, read and not run; budget and router from an account of the paper; no value model",
)


class Allocation(NamedTuple):
    """How a total of rollouts is shared out among n prompts."""

    budgets: Tensor
    """int64 [n]."""
    utility: Tensor
    """float64, 0-d: the sum of `rollout_utility`, with a p below p_floor taken as 0."""


def rollout_utility(budget: Tensor | int, p: Tensor) -> Tensor:
    """U(B, p), the expected number of wrong rollouts in a group that has right ones too; float64, of both shapes broadcast.

    0 for B < 2, and for p of 0 or 1. p: on any device, in [0, 1].
    """
    check_tensors(p=p)
    p = _probabilities("p", p)
    b = torch.as_tensor(budget, device=p.device)
    if b.is_floating_point() or b.dtype == torch.bool:
        raise TypeError(f"budget has dtype {b.dtype}; integers are expected")
    check_values("budget", b.flatten(), b.flatten() >= 0, "a number of rollouts is not negative")
    q = 1 - p
    # 1 - q^(B - 1) without cancellation; where p is 1 the logarithm would be infinite.
    mixed = -torch.expm1((b - 1) * torch.log1p(-p.clamp_max(1 - 2.0**-53)))
    return torch.where((b < 2) | (p == 0) | (p == 1), 0.0, b * q * mixed)


def allocate_budget(
    p: Tensor,
    total: int,
    *,
    b_min: int = 2,
    b_max: int = 128,
    method: Literal["exact", "greedy"] = "exact",
    p_floor: float = 0.0,
) -> Allocation:
    """Share out a total of rollouts so that the sum of `rollout_utility` is as large as it can be.

    What nobody gains from (every p is 0 or 1, or all are at their caps) stays unspent: `total - budgets.sum()`.

    Args:
        p: success probabilities [n] on the CPU, in [0, 1].
        total: at least n b_min.
        b_min, b_max: the least and the most that a prompt gets, 0 <= b_min <= b_max.
        method: ``"exact"``, or ``"greedy"``: one rollout at a time to who gains most, which can be far from the most.
        p_floor: a smaller p is taken as 0, and keeps b_min.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(p=p)
    if p.dim() != 1:
        raise ValueError(f"p has shape {list(p.shape)}; [n] is expected")
    if p.device.type != "cpu":
        raise ValueError(f"p is on {p.device}; budgets are allocated on the CPU")
    choice("method", method, ("exact", "greedy"))
    least, most = integer("b_min", b_min), integer("b_max", b_max)
    if not 0 <= least <= most:
        raise ValueError(f"b_min is {least} and b_max {most}; 0 <= b_min <= b_max is expected")
    floor = number("p_floor", p_floor)
    if not 0 <= floor <= 1:
        raise ValueError(f"p_floor is {floor}; it must lie in [0, 1]")
    p = _probabilities("p", p)
    p = torch.where(p < floor, 0.0, p)
    reach = min(most, max(least, integer("total", total) - (len(p) - 1) * least))  # more than this nobody can have
    table = rollout_utility(torch.arange(least, reach + 1), p[:, None])
    budgets = knapsack_allocate(table, total, b_min=least, method=method)
    return Allocation(budgets, table.gather(1, (budgets - least)[:, None]).sum())


def class_weights(context_labels: Tensor, y: Tensor) -> Tensor:
    """Weights [n] of the queries' cross-entropy that balance the classes of their context: its size over twice the class's.

    Labels of both are hardened at 0.5. A context of one class gives weight 1 to all.
    """
    check_tensors(context_labels=context_labels, y=y)
    positive = context_labels >= 0.5
    count, of_positive = positive.numel(), positive.sum()
    of_negative = count - of_positive
    weight = count / (2.0 * torch.where(y >= 0.5, of_positive, of_negative))
    return torch.where((of_positive > 0) & (of_negative > 0), weight, 1.0)


def value_ranking_loss(logits: Tensor, y: Tensor, *, alpha: float = 0.25, weights: Tensor | None = None) -> LossOutput:
    """The composite loss of one context's queries. Gradient to the logits.

    Args:
        logits: z [n, 2]; s = z[:, 1] - z[:, 0].
        y: labels [n] in [0, 1], in pairs, the larger first. Of an odd number the last has no pair; two equal labels make none.
        alpha: weight of the ranking, in [0, 1]; 0: cross-entropy alone.
        weights: [n] of the cross-entropy, as from `class_weights`.

    Metrics: rank, ce, and pairs, how many there are. Without pairs rank is 0.
    """
    check_tensors(logits=logits, y=y)
    weight = number("alpha", alpha)
    if not 0 <= weight <= 1:
        raise ValueError(f"alpha is {weight}; it must lie in [0, 1]")
    if logits.dim() != 2 or logits.shape[1] != 2 or not logits.is_floating_point():
        raise ValueError(f"logits is {logits.dtype} {list(logits.shape)}; floating [n, 2] is expected")
    check_rows(len(logits), y=y, weights=weights)
    y = y.detach().to(logits.dtype)
    check_values("y", y, (y >= 0) & (y <= 1), "a label in [0, 1] is expected")
    if weights is not None:
        check_values("weights", weights, (weights >= 0) & weights.isfinite(), "a weight is finite and not negative")
    paired = len(y) // 2 * 2
    first, second = y[0:paired:2], y[1:paired:2]
    check_values("y", y[1:paired:2], second <= first, "of two queries that follow one another the first has the larger label")
    s = logits[:, 1] - logits[:, 0]
    rank, metrics = preference_loss(s[0:paired:2], s[1:paired:2], beta=1.0, mask=first > second)
    losses = y * F.softplus(-s) + (1 - y) * F.softplus(s)
    ce = (losses if weights is None else losses * weights.detach()).sum() / max(len(y), 1)
    values = {"rank": rank.detach(), "ce": ce.detach(), "pairs": metrics["pairs"]}
    return LossOutput(weight * rank + (1 - weight) * ce, values)


def router_labels(r: Tensor, cost: Tensor, beta: float) -> Tensor:
    """What takes the place of r in the contexts: beta r + (1 - beta)(1 - c), with costs scaled to c in [0, 1].

    r: results in [0, 1]; cost: of the same shape, finite. Equal costs are all c = 0. beta: in [0, 1]; 1: results alone.
    """
    check_tensors(r=r, cost=cost)
    weight = number("beta", beta)
    if not 0 <= weight <= 1:
        raise ValueError(f"beta is {weight}; it must lie in [0, 1]")
    if r.shape != cost.shape:
        raise ValueError(f"cost has shape {list(cost.shape)}; r has shape {list(r.shape)}, so the same is expected")
    check_values("r", r.flatten(), ((r >= 0) & (r <= 1)).flatten(), "a result in [0, 1] is expected")
    check_values("cost", cost.flatten(), cost.isfinite().flatten(), "a finite cost is expected")
    if cost.numel() == 0:
        return r.clone()
    cost = cost.to(torch.promote_types(r.dtype, torch.float32))
    low, high = cost.min(), cost.max()
    scaled = torch.where(high > low, (cost - low) / torch.where(high > low, high - low, 1.0), 0.0)
    return weight * r + (1 - weight) * (1 - scaled)


def route(scores: Tensor) -> Tensor:
    """The model to ask for each query, int64 [Q]: the one with the largest score of [Q, models], of equal ones the first."""
    check_tensors(scores=scores)
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores has shape {list(scores.shape)}; [Q, models] is expected")
    check_values("scores", scores, ~scores.isnan().any(1), "a NaN cannot be compared")
    places = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(scores == scores.amax(1, keepdim=True), places, scores.shape[1]).amin(1)


def knn_success(
    queries: Tensor,
    context: Tensor,
    labels: Tensor,
    *,
    k: int | None = 16,
    prior: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """A stand-in for the value model, of this library's own: success probabilities [Q] from the results of near prompts.

    (a + the sum of the labels of the k nearest) / (a + b + k), by Euclidean distance, with the prior's a and b. It needs no
    weights, and exercises budget and router; it says nothing about the paper's model.

    Args:
        queries, context: embeddings [Q, d] and [C, d].
        labels: [C] in [0, 1].
        k: how many; no more than C are taken. None: all, the smoothed mean of the context. An empty context leaves the prior.
    """
    check_tensors(queries=queries, context=context, labels=labels)
    if queries.dim() != 2 or context.dim() != 2 or queries.shape[1] != context.shape[1]:
        raise ValueError(
            f"queries has shape {list(queries.shape)}, context {list(context.shape)}; [Q, d] and [C, d] are expected"
        )
    check_rows(len(context), labels=labels)
    check_values("labels", labels, (labels >= 0) & (labels <= 1), "a label in [0, 1] is expected")
    a, b = prior
    if not (a >= 0 and b >= 0 and a + b > 0):
        raise ValueError(f"prior is {prior}; two numbers that are not negative, and not both 0, are expected")
    near = len(context) if k is None else min(positive_int("k", k), len(context))
    values = labels.to(queries.dtype)
    if near == len(context):
        return ((a + values.sum()) / (a + b + near)).expand(len(queries)).clone()
    nearest = torch.cdist(queries, context).topk(near, dim=1, largest=False).indices
    return (a + values[nearest].sum(1)) / (a + b + near)


def _probabilities(name: str, p: Tensor) -> Tensor:
    """float64 in [0, 1]."""
    p = p.detach().double()
    check_values(name, p.flatten(), ((p >= 0) & (p <= 1)).flatten(), "a probability is expected")
    return p
