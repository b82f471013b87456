r"""Multi-objective GRPO: scores of several aspects are weighted, summed, and the sum is normalised in the group.

"Optimizing Safe and Aligned Language Generation: A Multi-Objective GRPO Approach", arXiv:2503.21819. Not the later
"MO-GRPO" that normalises by variance, nor GDPO (:mod:`prefkern.papers.gdpo`), which normalises before it sums.
Evidence: part. From the abstract, summaries and the definition of GRPO; the full text was not available and there is no
code. Not recovered: the weights, eps, and whether scores are rescaled first. The linear sum is from summaries. TRL's
`reward_weights` computes the same.

With scores :math:`z_{ik}` of K aspects (the paper's: politeness, meaningfulness, actionability, safety), from one reward model:

.. math:: R_i = \sum_k w_k z_{ik}, \qquad A_i = \frac{R_i - \mathrm{mean}(R)}{\mathrm{std}(R) + \epsilon}

then GRPO's loss. No gradient reaches scores. `order="norm_then_sum"` normalises each aspect first, :math:`\sum_k w_k
(z_{ik} - \mathrm{mean}_k) / (\mathrm{std}_k + \epsilon)`, which is a different method and the natural comparison. The
reward model is trained by regression on labelled entries (:func:`multilabel_regression_loss`; the mean squared error and
its mask are inferred).

Choices of this library: weights come before the statistics; scores are not rescaled, but on the CPU a warning says if the
range of one aspect is ten times another's, since the sum is then the larger one's; safety is a summand like others, not a
constraint. Defaults: weights 1/K, eps 1e-4, ddof 1. Groups of one and constant sums get 0, even if the aspects differ: two
that cancel give no signal, which `frac_zero_std` counts.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import group_advantages, group_reduce
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import may_look

about = About(
    name="MO-GRPO",
    title="Optimizing Safe and Aligned Language Generation: A Multi-Objective GRPO Approach",
    arxiv="2503.21819",
    year=2025,
    family="reward, advantage",
    evidence="part",
    note="abstract and summaries; weights, eps and scaling of the scores were not available",
)

ORDERS = ("sum_then_norm", "norm_then_sum")
NAN_RULES = ("error", "drop")


class MultiObjective(NamedTuple):
    """Advantages of N responses, and what they came from. Constants."""

    advantages: Tensor
    """[N]."""
    reward: Tensor
    """[N]: the weighted sum of scores."""
    stats: dict[str, Tensor]
    """`aspect_mean` [K], and 0-d `reward_mean`, `reward_std` (ddof 1) and `frac_zero_std`, the share of groups whose sums
    are all equal."""


def multi_objective_advantage(
    scores: Tensor,
    weights: Sequence[float] | Tensor | None,
    group: Tensor,
    *,
    order: Literal["sum_then_norm", "norm_then_sum"] = "sum_then_norm",
    eps: float = 1e-4,
    ddof: int = 1,
    nan: Literal["error", "drop"] = "error",
) -> MultiObjective:
    """Advantages of scores [N, K] (or [N]) in groups given by id [N].

    Args: weights: [K], any numbers but not all 0; None: 1/K each. Negative ones make penalties. order: see above. nan:
        "error", or "drop": a score that is missing (NaN) is left out, and the weights of the others of the row are scaled
        up so that they still sum to what all do. Those must not sum to 0 (on the CPU: ValueError)."""
    combine: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize" if choice("order", order, ORDERS) == 0 else "normalize_then_sum"
    )
    drop = choice("nan", nan, NAN_RULES) == 1
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores is {list(scores.shape)}; [N, K] is expected, or [N]")
    z = scores.detach()[:, None] if scores.dim() == 1 else scores.detach()
    z = z if z.dtype == torch.float64 else z.float()
    w = _weights(weights, z)
    there = ~z.isnan()
    if may_look(z):
        _check_scores(z, drop)
    present = torch.where(there, z, 0.0)
    reward, scale = (present * w).sum(1), None
    if drop:
        left = (there * w).sum(1)
        scale = torch.where(there.all(1), 1.0, w.sum() / left)
        if may_look(z) and not bool((usable := left != 0).all()):
            raise ValueError(f"scores[{int((~usable).nonzero()[0, 0])}]: the weights of the aspects it has sum to 0")
        reward = reward * scale
    if combine == "sum_then_normalize":
        a = group_advantages(reward, group, eps=eps, ddof=ddof).advantages
    else:
        a = group_advantages(
            z, group, eps=eps, ddof=ddof, weights=w, combine=combine, nan="ignore" if drop else "error"
        ).advantages
        a = a if scale is None else a * scale
    return MultiObjective(a, reward, _statistics(z, there, reward, group))


def _weights(weights: Sequence[float] | Tensor | None, z: Tensor) -> Tensor:
    aspects = z.shape[1]
    w = (
        z.new_full((aspects,), 1 / max(aspects, 1))
        if weights is None
        else torch.as_tensor(weights, dtype=z.dtype, device=z.device)
    )
    if w.shape != (aspects,):
        raise ValueError(f"weights is {list(w.shape)}; [{aspects}] is expected, one per aspect")
    if may_look(w) and not (bool(w.isfinite().all()) and bool((w != 0).any())):
        raise ValueError(f"weights is {w.tolist()}; finite numbers are expected, at least one of them not 0")
    return w


def _check_scores(z: Tensor, drop: bool) -> None:
    bad = z.isinf() if drop else ~z.isfinite()
    if bool(bad.any()):
        row, aspect = bad.nonzero()[0].tolist()
        raise ValueError(f"scores[{row}, {aspect}] is {z[row, aspect].item()}; a finite number is expected")
    if z.shape[0] == 0 or z.shape[1] < 2:
        return
    low, high = z.nan_to_num(nan=torch.inf).amin(0), z.nan_to_num(nan=-torch.inf).amax(0)
    span = (high - low).clamp_min(0)
    varies = span > 0
    if bool(varies.any()) and bool(span.max() >= 10 * span[varies].min()):
        warnings.warn(
            f"the scores of aspect {int(span.argmax())} range over {span.max().item():g}, ten times those of another; "
            "their sum is mostly that aspect",
            stacklevel=3,
        )


def _statistics(z: Tensor, there: Tensor, reward: Tensor, group: Tensor) -> dict[str, Tensor]:
    count = group_reduce(torch.ones_like(reward), group, reduce="count").to(reward.dtype)
    constant = group_reduce(reward, group, reduce="max") == group_reduce(reward, group, reduce="min")
    share = 1 / count
    return {
        "aspect_mean": torch.where(there, z, 0.0).sum(0) / there.sum(0),
        "reward_mean": reward.mean(),
        "reward_std": reward.std() if len(reward) > 1 else torch.zeros_like(reward.sum()),
        "frac_zero_std": (share * constant).sum() / share.sum(),
    }


def multilabel_regression_loss(pred: Tensor, target: Tensor, label_mask: Tensor | None = None) -> Tensor:
    """Mean squared error of scores over the labelled entries: 0-d, gradient to `pred`.

    pred, target: [N, K]. label_mask: bool [N, K]; None: all entries are labelled. No labelled entry: ValueError on the CPU,
    NaN on CUDA unless validation is on.
    """
    mask = torch.ones_like(target, dtype=torch.bool) if label_mask is None else label_mask.bool()
    if pred.shape != target.shape or mask.shape != target.shape:
        raise ValueError(
            f"pred is {list(pred.shape)} and label_mask {list(mask.shape)}; {list(target.shape)} is expected, as target"
        )
    if may_look(mask) and not bool(mask.any()):
        raise ValueError("label_mask has no labels; at least one labelled entry is expected")
    difference = torch.where(mask, pred, 0.0) - torch.where(mask, target.detach(), 0.0)
    return difference.square().sum() / mask.sum()


@dataclass(frozen=True)
class MOGRPO(Recipe):
    """The weighted sum of several scores, GRPO's advantages of it, and the clipped loss."""

    name: ClassVar[str] = "mo_grpo"
    weights: tuple[float, ...] | None = None
    order: Literal["sum_then_norm", "norm_then_sum"] = "sum_then_norm"
    eps: float = 1e-4
    nan: Literal["error", "drop"] = "error"
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        return multi_objective_advantage(
            rollout.rewards, self.weights, rollout.group, order=self.order, eps=self.eps, nan=self.nan
        ).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "beta": self.beta, "agg": self.agg}


recipe = MOGRPO()
