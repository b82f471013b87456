r"""beta-DPO: a beta for every batch from how far apart its pairs are, and only pairs near the usual distance.

Wu et al., "beta-DPO: Direct Preference Optimization with Dynamic beta", arXiv:2407.08639.
Evidence: code. Batch beta, statistics, losses and the law of the selection were checked against the authors' release.

With the gap :math:`D = x_w - x_l` of log-ratios summed over each response, constant in all but the loss, its running mean
:math:`M_0` and standard deviation :math:`S_0`, and a selection S of :math:`\lfloor P (1 - \rho) \rfloor` pairs drawn without
replacement with probabilities proportional to :math:`\exp(-(D - M_0)^2 / (2 S_0^2))`:

.. math::
    \beta_b = \max\Bigl(10^{-3},\ \beta \bigl(1 + a (\tfrac{1}{|S|} \sum_S D - M_0)\bigr)\Bigr), \qquad
    L = -\frac{1}{|S|} \sum_S \log\sigma(\beta_b D)

:math:`M_0` and :math:`S_0` (`GapStatistics`) start at 0 and are moving averages, :math:`M_0 \leftarrow 0.9 M_0 + 0.1\,\bar D`,
of the mean and the standard deviation (of the sample: over P - 1) of a batch's gaps, taken before that batch's loss. On several
ranks they, the selection and the batch beta are over the gaps of all: gather those, then use the functions below with them.

    statistics.update(gap)                                        # gap [P], of all ranks
    selected = beta_dpo_select(gap, statistics.mean, statistics.std, generator=generator)
    batch_beta = beta_dpo_beta(gap, selected, statistics.mean)
    out = beta_dpo_loss(*sides, batch_beta=batch_beta, selected=selected)

Where this differs from the release: the selection is drawn with keys :math:`\log w + g`, g from Gumbel's law, which is the same
law and never runs out of pairs whose weight is above 0 in floating point; it holds at least one pair; while :math:`S_0` is 0
all pairs weigh alike. A batch of one pair, which has no standard deviation, leaves :math:`S_0` as it was. There all three give
NaN or an error. The release draws from the global generator; here from the one given.

The recipe takes `extra["gap_mean"]` (one element: `statistics.mean`) and, if there, `extra["selected"]` (bool [P]); without it
all pairs count.

Defaults of the release: rho 0.2 (`mode_weight`) and a 0, which leaves beta fixed: set it; the default here is 0.6. Bound 1e-3,
moving average 0.9. beta 0.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_finite, check_rows

about = About(
    name="beta-DPO",
    title="beta-DPO: Direct Preference Optimization with Dynamic beta",
    arxiv="2407.08639",
    year=2024,
    family="pairwise, beta",
    evidence="code",
    note="the authors' release",
)


@dataclass
class GapStatistics:
    """Moving averages of the mean and the standard deviation of a batch's gaps, as tensors of one element."""

    momentum: float = 0.9
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    std: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be in [0, 1)")

    def update(self, gap: Tensor) -> None:
        """Take in the gaps [P] of a batch. Their device and type become those of the averages."""
        if gap.dim() != 1 or len(gap) == 0:
            raise ValueError(f"gap has shape {list(gap.shape)}; [P] with at least one pair is expected")
        gap = gap.detach()
        check_finite("gap", gap)
        self.mean = torch.lerp(gap.mean(), self.mean.to(gap), self.momentum)
        self.std = torch.lerp(gap.std(), self.std.to(gap), self.momentum) if len(gap) > 1 else self.std.to(gap)

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "mean": self.mean.clone(), "std": self.std.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError for keys that are missing or unknown."""
        expected = {"momentum", "mean", "std"}
        if set(state) != expected:
            raise ValueError(f"state has keys {sorted(state)}; accepted: {sorted(expected)}")
        self.momentum, self.mean, self.std = state["momentum"], state["mean"].clone(), state["std"].clone()


def beta_dpo_select(
    gap: Tensor, mean: Tensor, std: Tensor, *, rho: float = 0.2, generator: torch.Generator | None = None
) -> Tensor:
    """bool [P]: the pairs that are kept, drawn by their gaps [P]. generator: on the device of the gaps; equal states give equal
    selections."""
    if not 0 <= rho < 1:
        raise ValueError(f"rho is {rho}; it must be in [0, 1)")
    check_rows(len(gap), gap=gap)
    gap = gap.detach()
    count = min(len(gap), max(1, int(len(gap) * (1 - rho))))
    distance = torch.where(std > 0, (gap - mean) / std, 0.0)
    waiting = torch.empty_like(gap).exponential_(generator=generator)
    keys = -0.5 * distance.square() - waiting.log()
    return torch.zeros_like(gap, dtype=torch.bool).scatter_(0, keys.topk(count).indices, True)


def beta_dpo_beta(
    gap: Tensor, selected: Tensor | None, mean: Tensor, *, beta: float = 0.1, a: float = 0.6, minimum: float = 1e-3
) -> Tensor:
    """The beta of a batch, a constant of one element. selected: bool [P]; None for all pairs."""
    check_rows(len(gap), gap=gap, selected=selected)
    gap = gap.detach()
    if selected is None:
        selected = torch.ones_like(gap, dtype=torch.bool)
    of_selected = torch.where(selected, gap, 0.0).sum() / selected.sum().clamp_min(1)
    return (beta * (1 + a * (of_selected - mean))).clamp_min(minimum)


def beta_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    batch_beta: float | Tensor,
    selected: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of the selected of P pairs, from log-probs summed over each response, [P] each.

    Gradient to chosen_logp and rejected_logp, none to batch_beta. Metrics: those of `prefkern.preference_loss` over the
    selected pairs, rewards being the log-ratios times batch_beta, and batch_beta.
    """
    out = preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=1.0, scale=batch_beta, mask=selected,
        reduction=reduction,
    )  # fmt: skip
    used = batch_beta.detach() if isinstance(batch_beta, Tensor) else out.metrics["pairs"].new_tensor(batch_beta)
    rewards = {name: out.metrics[name] * used for name in ("chosen_reward", "rejected_reward", "reward_margin")}
    return LossOutput(out.loss, {**out.metrics, **rewards, "batch_beta": used})


@dataclass(frozen=True)
class BetaDPO(PairRecipe):
    """DPO with the batch's own beta, from the running mean in `extra["gap_mean"]`."""

    name: ClassVar[str] = "beta_dpo"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp", "gap_mean")
    beta: float = 0.1
    a: float = 0.6
    minimum: float = 1e-3

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        chosen, rejected = pairs.log_ratios()
        selected = pairs.get("selected")
        batch_beta = beta_dpo_beta(chosen - rejected, selected, pairs.require("gap_mean"), **self.options())
        return beta_dpo_loss(chosen, rejected, batch_beta=batch_beta, selected=selected)


recipe = BetaDPO()
