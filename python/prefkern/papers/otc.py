r"""OTC: optimal tool calls. The reward of a right answer is scaled by how few tool calls it took.

Wang et al., "Acting Less is Reasoning More! Teaching Model to Act Efficiently" (first: "OTC: Optimal Tool Calls via
Reinforcement Learning"), arXiv:2504.14870.
Evidence: paper. From its formulas as several notes quote them; no code was released, and the text was read in excerpt only.

For a trajectory with m tool calls and base reward r (0 or 1 for correctness; may include format),
:math:`r_\mathrm{otc} = \alpha\, r_\mathrm{tool}\, r`: multiplied, so that a wrong answer gains nothing by making no calls. With
c > 0, and n the fewest calls known to answer the question:

.. math::
    r_\mathrm{tool} = \cos\frac{m\pi}{2m + c} \;\text{(PPO, and GRPO with } n = 0), \qquad
    r_\mathrm{tool} = \sin\frac{f \pi}{2n}, \quad f = \frac{2mn}{m + n} \;\text{(GRPO)}

The first falls from 1 at m = 0 toward 0. The second is :math:`\sin\frac{\pi m}{m + n}`: 1 at m = n, 0 at m = 0, falling for m >
n, and equal for m/n and n/m. n is the minimum of m over the group's correct trajectories and, with a history, over all earlier
ones of the question. It takes part before the coefficients are computed, so no correct trajectory is below it. Without any
correct trajectory, ever, the PPO coefficient is used (inferred; matters only if wrong answers have a reward). A lucky guess
with few calls lowers n for good.

Defaults: alpha 1; c has none (the largest number of calls that a trajectory may make is a fair choice); neither is verified.
Both coefficients are evaluated as sines of at most :math:`\pi/2`, which keeps them in [0, 1] in any precision. Negative base
rewards are scaled too, as the formula says: many calls then shrink a penalty; `apply_to="positive"` leaves r <= 0 alone. An
additive mixture of both rewards, which others use, is not offered: the paper reports it as unstable. NaN rewards come out NaN.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import group_reduce
from ._about import About
from ._recipe import Rollout
from ._shared import check_rows, check_values
from .grpo import GRPO

about = About(
    name="OTC",
    title="Acting Less is Reasoning More! Teaching Model to Act Efficiently",
    arxiv="2504.14870",
    year=2025,
    family="reward",
    evidence="paper",
    note="its formulas as quoted in several notes; the fallback without a correct trajectory is inferred",
)


class OTCRewards(NamedTuple):
    """Rewards of B trajectories, each [B]."""

    rewards: Tensor
    coef: Tensor
    """r_tool."""
    n_per_group: Tensor
    """The fewest calls known for the trajectory's question; inf if none is."""


class ToolCallHistory:
    """The fewest calls with which each question was ever answered, by question id. To be saved with a checkpoint.

    It lives on the host: an update copies a batch's ids and minima there.
    """

    def __init__(self) -> None:
        self._fewest: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._fewest)

    def get(self, question: int) -> float:
        """inf for a question that was never answered."""
        return self._fewest.get(question, math.inf)

    def update(self, question: Tensor, fewest: Tensor) -> Tensor:
        """Take in minima [B] (inf: none) of questions given by id [B]; returns what is now known, like `fewest`."""
        ids = question.tolist()
        for key, calls in zip(ids, fewest.tolist(), strict=True):
            if calls < self.get(key):
                self._fewest[key] = calls
        return torch.tensor([self.get(key) for key in ids], dtype=fewest.dtype, device=fewest.device)

    def state_dict(self) -> dict[str, Tensor]:
        """question: int64 ids. calls: int64."""
        return {
            "question": torch.tensor(list(self._fewest), dtype=torch.int64),
            "calls": torch.tensor(list(self._fewest.values()), dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned, in place of what is here."""
        self._fewest = dict(zip(state["question"].tolist(), map(float, state["calls"].tolist()), strict=True))


def otc_coefficient(m: Tensor, *, c: float, n: Tensor | float | None = None) -> Tensor:
    """r_tool of m tool calls [B], in [0, 1]; float64 for float64, else float32.

    n: fewest calls, [B] or a number; None, or inf for a row, is the coefficient of PPO.
    """
    if not c > 0:
        raise ValueError(f"c is {c}; it must be positive")
    check_values("m", m, _is_count(m), "a number of calls is expected")
    calls = _counts(m)
    smooth = torch.sin(math.pi / 2 * c / (2 * calls + c))  # cos(m pi / (2 m + c))
    if n is None:
        return smooth
    fewest = torch.as_tensor(n, dtype=calls.dtype, device=m.device).expand_as(calls)
    check_values("n", fewest, _is_count(fewest) | fewest.isposinf(), "a number of calls, or inf, is expected")
    known = (fewest > 0) & fewest.isfinite()
    sharp = torch.sin(math.pi * torch.minimum(calls, fewest) / torch.where(known, calls + fewest, 1.0))
    return torch.where(known, sharp, torch.where(fewest.isnan(), torch.nan, smooth))


def otc_rewards(
    m: Tensor,
    correct: Tensor,
    base_reward: Tensor,
    group: Tensor,
    *,
    c: float,
    alpha: float = 1.0,
    history: ToolCallHistory | None = None,
    question: Tensor | None = None,
    variant: Literal["grpo", "ppo"] = "grpo",
    apply_to: Literal["all", "positive"] = "all",
) -> OTCRewards:
    """Rewards of trajectories of questions given by id [B]. Constants.

    m: [B], tool calls. correct: bool [B]. base_reward: [B].
    history: updated with this batch before it is used. question: int64 [B], ids that stay the same from batch to batch, for the
    history; None: group. variant: "ppo" looks at no other trajectory.
    """
    choice("variant", variant, ("grpo", "ppo"))
    choice("apply_to", apply_to, ("all", "positive"))
    check_rows(len(group), group=group, m=m, correct=correct, base_reward=base_reward, question=question)
    if correct.dtype != torch.bool:
        raise TypeError(f"correct is {correct.dtype}; torch.bool is expected")
    check_values("m", m, _is_count(m), "a number of calls is expected")
    r = base_reward.detach() if base_reward.dtype == torch.float64 else base_reward.detach().float()
    calls = _counts(m).to(r.dtype)
    question = group if question is None else question
    n = group_reduce(calls, question if history is not None else group, mask=correct, reduce="min")
    if history is not None:
        n = history.update(question, n)
    coef = otc_coefficient(calls, c=c, n=n if variant == "grpo" else None)
    rewards = alpha * coef * r
    return OTCRewards(rewards if apply_to == "all" else torch.where(r > 0, rewards, r), coef, n)


def tool_productivity(correct: Tensor, m: Tensor) -> Tensor:
    """Correct answers per tool call over a test set, 0-d. Without any call: inf if an answer is correct, else 0."""
    right, calls = correct.sum().to(_counts(m).dtype), _counts(m).sum()
    return torch.where(right == 0, 0.0, right / calls)


def _is_count(m: Tensor) -> Tensor:
    return m >= 0 if not m.is_floating_point() else (m >= 0) & (m == m.floor()) & m.isfinite()


def _counts(m: Tensor) -> Tensor:
    """As floats; NaN for what counts nothing."""
    m = m if m.dtype == torch.float64 else m.float()
    return torch.where(_is_count(m), m, torch.nan)


@dataclass(frozen=True)
class OTC(GRPO):
    """Rewards scaled by tool efficiency, then GRPO. `c` must be set.

    `extra` holds tool_calls and correct (bool), [B]; with a history also question, int64 [B], unless groups have ids that last.
    """

    name: ClassVar[str] = "otc"
    needs: ClassVar[tuple[str, ...]] = ("tool_calls", "correct")
    c: float | None = None
    alpha: float = 1.0
    history: ToolCallHistory | None = None
    variant: Literal["grpo", "ppo"] = "grpo"
    apply_to: Literal["all", "positive"] = "all"

    def advantages(self, rollout: Rollout) -> Tensor:
        m, correct = (rollout.get(name) for name in self.needs)
        assert m is not None and correct is not None
        if self.c is None:
            raise ValueError("c is None; recipe 'otc' needs a positive number, such as the most calls a trajectory may make")
        rewards = otc_rewards(
            m, correct, rollout.rewards, rollout.group, c=self.c, alpha=self.alpha, history=self.history,
            question=rollout.get("question"), variant=self.variant, apply_to=self.apply_to,
        ).rewards  # fmt: skip
        return super().advantages(replace(rollout, rewards=rewards))


recipe = OTC()
