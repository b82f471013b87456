r"""GiGPO: a second group inside the group, the steps of several episodes that start from the same state of the environment.

"Group-in-Group Policy Optimization for LLM Agent Training", arXiv:2505.10978.
Evidence: code. Checked to 1e-12 against the same authors' later repository (DrMAS), which carries these formulas; the
original release was read in forks.

A row b is one step of an agent: a prompt and a response. It belongs to a task (`group`), an episode (`traj`) and, within
the episode, has a place (`step`); `anchor_ids` says which state of the environment it starts from. With rewards
:math:`\varrho_b` of steps and the return :math:`R_b` of the whole episode, on each of its rows (numbers as in the paper):

.. math::
    G_b &= \varrho_b + \gamma\,G_{\text{next step of the episode}} && (5) \\
    A^E_b &= \frac{R_b - \mathrm{mean}_g R}{F} && (3) \\
    A^S_b &= \frac{G_b - \mathrm{mean}_s G}{F} && (7) \\
    A_b &= A^E_b + w\,A^S_b && (8)

g is the task, s the rows of the same task with the same anchor (6). F is 1 (`mode="mean_norm"`) or the std of the same rows
with ddof 1, plus eps (`"mean_std_norm"`). A goes to every token of the row's response, into the clipped loss, in the
release with a KL in the loss. All constants.

Which rows (3) is over: all rows of the task by default (`episode_stats="rows"`, the code that made the results; a longer
episode counts more), or one per episode, its first (`"trajectories"`, the paper's equation and the later repository's
default). Groups of one differ at the two levels, as in the release: alone in its task, :math:`A^E = R` (R / (1 + eps) with
the std); alone with its anchor, :math:`A^S = 0`.

An invalid action takes `invalid_coef` off both R and G of its row, G after discounting, so that earlier steps do not pay
for it. With gamma 1 and a reward at the end only, an episode that visits a state twice learns nothing from comparing the
visits. Defaults: gamma 0.95, w 1, eps 1e-6, penalty 0.1. Defaults of the paper's F and of the similarity differ by task;
see :func:`anchor_groups`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import group_advantages, group_reduce, segmented_returns
from ..ops.policy import Aggregation
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_finite

about = About(
    name="GiGPO",
    title="Group-in-Group Policy Optimization for LLM Agent Training",
    arxiv="2505.10978",
    year=2025,
    family="advantage",
    evidence="code",
    note="the authors' later repository, to 1e-12",
)

MODES = ("mean_norm", "mean_std_norm")
EPISODE_STATS = ("rows", "trajectories")


def anchor_groups(anchors: Sequence[Any], group: Tensor, *, similarity: float | None = None) -> Tensor:
    """Ids [B] for observations of any kind, on the host: equal observations of the same group (ids [B]) get the same id.

    Tensors and arrays are compared by content, all else by hash and equality; ValueError for what cannot be hashed.
    similarity: for texts, how alike two must be to count as equal, by `difflib`'s ratio: each joins the first group whose
    first member it resembles that much. Off by default, as in the release, which uses 0.9 where it is on.
    """
    if len(anchors) != len(group):
        raise ValueError(f"anchors has {len(anchors)} rows; group has {len(group)}")
    if similarity is not None and not 0 < similarity <= 1:
        raise ValueError(f"similarity is {similarity}; accepted: above 0, up to 1, or None")
    ids: list[int] = []
    first: dict[Any, int] = {}
    texts: dict[int, list[tuple[str, int]]] = {}
    for row, (anchor, task) in enumerate(zip(anchors, group.tolist(), strict=True)):
        if similarity is not None:
            if not isinstance(anchor, str):
                raise ValueError(f"anchors[{row}] is a {type(anchor).__name__}; similarity compares texts")
            known = texts.setdefault(task, [])
            found = next((i for text, i in known if SequenceMatcher(None, anchor, text).ratio() >= similarity), None)
            if found is None:
                known.append((anchor, row))
                found = row
        else:
            try:
                found = first.setdefault((task, _content(anchor)), row)
            except TypeError:
                raise ValueError(f"anchors[{row}] is a {type(anchor).__name__}, which cannot be hashed") from None
        ids.append(found)
    return torch.tensor(ids, dtype=torch.int64, device=group.device)


def _content(anchor: Any) -> Any:
    """Something hashable that is equal for equal observations."""
    if isinstance(anchor, Tensor):
        anchor = anchor.detach().cpu()
        return (str(anchor.dtype), tuple(anchor.shape), bytes(anchor.flatten().view(torch.uint8).tolist()))
    if hasattr(anchor, "tobytes") and hasattr(anchor, "dtype"):
        return (str(anchor.dtype), tuple(anchor.shape), anchor.tobytes())
    return anchor


def gigpo_advantages(
    episode_return: Tensor,
    step_rewards: Tensor,
    group: Tensor,
    traj: Tensor,
    step: Tensor,
    anchor_ids: Tensor,
    *,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    mode: Literal["mean_norm", "mean_std_norm"] = "mean_norm",
    episode_stats: Literal["rows", "trajectories"] = "rows",
    eps: float = 1e-6,
    invalid: Tensor | None = None,
    invalid_coef: float = 0.1,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Advantages [B] of B steps in any order. Constants.

    Args: episode_return: [B], of the row's episode. step_rewards: [B]. group, traj, anchor_ids: int64 [B], ids of task,
        episode and state. Equal anchors in different groups are different states. step: int64 [B], the place in the
        episode; no two rows of one share it (on the CPU: ValueError). step_weight: w. mode, episode_stats, eps: see above.
        invalid: bool [B], which actions were; each costs invalid_coef. row_mask: bool [B], False for rows that only pad the
        batch: left out of all statistics, advantage 0."""
    rows_count = EPISODE_STATS[choice("episode_stats", episode_stats, EPISODE_STATS)] == "rows"
    estimator: Literal["grpo", "dr_grpo"] = ("dr_grpo", "grpo")[choice("mode", mode, MODES)]
    returns, rewards = episode_return.detach(), step_rewards.detach()
    if row_mask is not None:
        returns, rewards = returns.where(row_mask, 0.0), rewards.where(row_mask, 0.0)
        group, traj = _set_apart(group, row_mask), _set_apart(traj, row_mask)
    check_finite("episode_return", returns)
    check_finite("step_rewards", rewards)
    discounted = segmented_returns(rewards, traj, step, gamma=gamma)
    if invalid is not None:
        penalty = invalid_coef * invalid.to(discounted.dtype)
        returns, discounted = returns - penalty, discounted - penalty
    if rows_count:
        of_episode = group_advantages(returns, group, estimator=estimator, eps=eps, singleton="reward").advantages
    else:
        first = step == group_reduce(step.double(), traj, reduce="min").to(step.dtype)
        of_episode = _against_episodes(returns, group, first, estimator, eps)
    state = _pair_ids(group, anchor_ids)
    of_step = group_advantages(discounted, state, estimator=estimator, eps=eps, singleton="zero").advantages
    a = of_episode + step_weight * of_step
    return a if row_mask is None else a.where(row_mask, 0.0)


def _against_episodes(returns: Tensor, group: Tensor, first: Tensor, estimator: str, eps: float) -> Tensor:
    """Equation 3 with one value per episode: the rows marked `first`."""
    own = group_advantages(returns, _set_apart(group, first), estimator="dr_grpo", outputs=("mean", "std", "count"))
    assert own.mean is not None and own.std is not None and own.count is not None
    mean, std, count = (
        group_reduce(x.to(returns.dtype), group, mask=first, reduce="max") for x in (own.mean, own.std, own.count)
    )
    alone = count == 1
    centred = returns - mean.masked_fill(alone, 0.0)
    if estimator == "dr_grpo":
        return centred
    divisor = std.masked_fill(alone, 1.0) + eps
    return torch.where(divisor == 0, 0.0, centred / divisor)


def _dense(ids: Tensor) -> Tensor:
    """The same ids as numbers from 0 to less than B, whatever they were."""
    values, order = ids.long().sort(stable=True)
    step = torch.ones_like(values)
    step[1:] = values[1:] != values[:-1]
    return torch.empty_like(values).scatter_(0, order, step.cumsum(0) - 1)


def _pair_ids(a: Tensor, b: Tensor) -> Tensor:
    """One id for each pair of ids."""
    return _dense(a) * len(a) + _dense(b)


def _set_apart(ids: Tensor, keep: Tensor) -> Tensor:
    """Ids in which each row that is not kept is alone."""
    return torch.where(keep, _dense(ids), len(ids) + torch.arange(len(ids), device=ids.device))


@dataclass(frozen=True)
class GiGPO(Recipe):
    """Advantages of episodes and of steps from the same state; the clipped loss. `rewards` are the returns of episodes."""

    name: ClassVar[str] = "gigpo"
    needs: ClassVar[tuple[str, ...]] = ("step_rewards", "traj", "step", "anchor_ids")
    gamma: float = 0.95
    step_weight: float = 1.0
    mode: Literal["mean_norm", "mean_std_norm"] = "mean_norm"
    episode_stats: Literal["rows", "trajectories"] = "rows"
    eps: float = 1e-6
    invalid_coef: float = 0.1
    """With `invalid` in extra."""
    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    agg: Aggregation = "token-mean"

    def advantages(self, rollout: Rollout) -> Tensor:
        rewards, traj, step, anchors = (rollout.get(name) for name in self.needs)
        assert rewards is not None and traj is not None and step is not None and anchors is not None
        return gigpo_advantages(
            rollout.rewards, rewards, rollout.group, traj, step, anchors, gamma=self.gamma, step_weight=self.step_weight,
            mode=self.mode, episode_stats=self.episode_stats, eps=self.eps, invalid=rollout.get("invalid"),
            invalid_coef=self.invalid_coef, row_mask=rollout.get("row_mask"),
        )  # fmt: skip

    def loss_options(self, batch: Batch) -> dict[str, Any]:
        return {"eps_low": self.eps_low, "eps_high": self.eps_high, "beta": self.beta, "agg": self.agg}


recipe = GiGPO()
