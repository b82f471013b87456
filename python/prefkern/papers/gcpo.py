r"""GCPO: group contrastive policy optimisation. Auxiliary constructions are rewarded where they help, punished where not.

"GeometryZero: Improving Geometry Solving for LLM with Group Contrastive Policy Optimization", arXiv:2506.07160. Not the GCPO
that puts gold answers into groups (arXiv:2510.07790), nor others of that name.
Evidence: part. From the abstract and reviews that quote equation 3 and describe equation 4; the code was not to be had. The
inequality of the mask, the length reward and all weights are inferred; how the two arms are made is not verified.

For one question, completions with accuracy :math:`a_i`, a flag :math:`u_i` (the completion makes an auxiliary construction),
and an arm: with construction or without (default: the flag itself).

.. math::
    M = \begin{cases} +1 & \bar a_\text{with} > \bar a_\text{without} + \epsilon \\
    -1 & \bar a_\text{without} > \bar a_\text{with} + \epsilon \\ 0 & \text{else} \end{cases}, \qquad
    R_i = w_a a_i + w_f f_i + w_u M u_i + w_l \min(|o_i| / L_{\max}, 1)

Then GRPO over all completions of the question, of both arms. Nothing has a gradient before that.

With an arm empty M is 0. Where the label of the arm and the flag disagree the label decides M, and the flag who is rewarded;
the metric `mismatch` counts them. The sides are compared as integers would be, :math:`n_2 S_1` with
:math:`n_1 S_2 + \epsilon n_1 n_2`, so that ties of 0/1 accuracies are ties. M is a noisy sign: with four completions per arm
and equal success rates of 1/2 it is not 0 in 73 % of the questions. Defaults, none verified: eps 0, weights 1 for accuracy and
construction, 0 for length and format; std with ddof 1 and 1e-4.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..ops import group_advantages, group_reduce
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_rows, check_values

about = About(
    name="GCPO (GeometryZero)",
    title="GeometryZero: Improving Geometry Solving for LLM with Group Contrastive Policy Optimization",
    arxiv="2506.07160",
    year=2025,
    family="reward",
    evidence="part",
    note="abstract and reviews; the mask's inequality, the length reward and the weights are inferred",
)


class GCPORewards(NamedTuple):
    """Rewards and the contrastive mask of B completions."""

    rewards: Tensor
    """[B]."""
    mask_per_group: Tensor
    """[B], like the rewards: M of the completion's question, -1, 0 or 1."""
    stats: dict[str, Tensor]
    """0-d: helps and hurts (questions with M = 1 and -1), one_armed (questions with an arm empty), mismatch (share of
    completions whose arm and flag disagree)."""


def gcpo_rewards(
    acc: Tensor,
    has_aux: Tensor,
    group: Tensor,
    *,
    arm: Tensor | None = None,
    lengths: Tensor | None = None,
    fmt: Tensor | None = None,
    eps: float = 0.0,
    w_acc: float = 1.0,
    w_aux: float = 1.0,
    w_len: float = 0.0,
    w_fmt: float = 0.0,
    max_len: float | None = None,
) -> GCPORewards:
    """Rewards of completions to questions given by id [B]. Constants.

    acc: [B]. has_aux, arm: [B], bool or 0 and 1; arm None: has_aux. lengths: [B], and max_len, for w_len. fmt: [B], for w_fmt.
    eps: by how much one arm's mean accuracy must exceed the other's.
    """
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    if w_len != 0 and not (max_len is not None and max_len > 0):
        raise ValueError(f"max_len is {max_len}; w_len {w_len} needs a positive number")
    for name, weight, what, given in (("w_len", w_len, "lengths", lengths), ("w_fmt", w_fmt, "fmt", fmt)):
        if weight != 0 and given is None:
            raise ValueError(f"{what} is None; {name} {weight} needs it")
    check_rows(len(group), group=group, acc=acc, has_aux=has_aux, arm=arm, lengths=lengths, fmt=fmt)
    check_values("acc", acc, acc.isfinite(), "every accuracy must be finite")
    a = acc.detach() if acc.is_floating_point() else acc.float()
    aux = _flag("has_aux", has_aux, a)
    label = aux if arm is None else _flag("arm", arm, a)

    is_with, is_without = label == 1, label == 0
    n_with, n_without = (group_reduce(side.to(a.dtype), group) for side in (is_with, is_without))
    sum_with, sum_without = (group_reduce(a, group, mask=side) for side in (is_with, is_without))
    gap = n_without * sum_with - n_with * sum_without
    needed = eps * n_with * n_without
    mask = (gap > needed).to(a.dtype) - (-gap > needed).to(a.dtype)
    mask = torch.where(group_reduce(a * label, group).isnan(), torch.nan, mask)

    rewards = w_acc * a + w_aux * mask * aux
    if w_fmt != 0:
        assert fmt is not None
        rewards = rewards + w_fmt * fmt.detach().to(a.dtype)
    if w_len != 0:
        assert lengths is not None and max_len is not None
        rewards = rewards + w_len * (lengths.to(a.dtype) / max_len).clamp_max(1)
    share = 1 / group_reduce(torch.ones_like(a), group, reduce="count")  # of a completion in its question
    stats = {
        "helps": ((mask == 1) * share).sum().round(), "hurts": ((mask == -1) * share).sum().round(),
        "one_armed": (((n_with == 0) | (n_without == 0)) * share).sum().round(), "mismatch": (label != aux).to(a.dtype).mean(),
    }  # fmt: skip
    return GCPORewards(rewards, mask, stats)


def _flag(name: str, values: Tensor, like: Tensor) -> Tensor:
    """0 and 1; NaN for what is neither."""
    clear = (values == 0) | (values == 1)
    check_values(name, values, clear, "accepted are bool, or 0 and 1")
    return torch.where(clear, values.to(like.dtype), torch.nan)


@dataclass(frozen=True)
class GCPO(Recipe):
    """Rewards of both arms, then GRPO over them.

    `extra` holds acc and has_aux [B]; optional are arm and fmt [B]. The rollout's own rewards are not looked at.
    """

    name: ClassVar[str] = "gcpo"
    needs: ClassVar[tuple[str, ...]] = ("acc", "has_aux")
    eps: float = 0.0
    w_acc: float = 1.0
    w_aux: float = 1.0
    w_len: float = 0.0
    w_fmt: float = 0.0
    max_len: float | None = None
    eps_std: float = 1e-4
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    agg: str = "seq-mean-token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        acc, has_aux = (rollout.get(name) for name in self.needs)
        assert acc is not None and has_aux is not None
        rewards = gcpo_rewards(
            acc, has_aux, rollout.group, arm=rollout.get("arm"), lengths=rollout.token_counts() if self.w_len != 0 else None,
            fmt=rollout.get("fmt"), eps=self.eps, w_acc=self.w_acc, w_aux=self.w_aux, w_len=self.w_len, w_fmt=self.w_fmt,
            max_len=self.max_len,
        ).rewards  # fmt: skip
        return group_advantages(rewards, rollout.group, eps=self.eps_std).advantages

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "beta": self.beta, "agg": self.agg}


recipe = GCPO()
