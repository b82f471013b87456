r"""BCO: a binary classifier between good and bad responses, around a reward shift.

Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656.
Evidence: code. The pair form in TRL and Liger-Kernel, values and gradients; TRL's BCO trainer and its shift were read, not run.

With :math:`u = \beta (\log\pi - \log\pi_\mathrm{ref})` summed over a response and the shift :math:`\delta`, a constant:

.. math:: L = -\log\sigma(u_w - \delta) - \omega \log\sigma(\delta - u_l)

averaged over pairs (:func:`bco_pair_loss`), or each term by itself over all responses (:func:`bco_loss`), as in TRL's BCO
trainer: half of it where both sides are as many. :math:`\delta` is the mean of u over all responses seen so far, of both sides
(:class:`RewardShift`), which has seen this batch too before it is used:

.. math::
    n \leftarrow n + m, \qquad \delta \leftarrow \delta + (\bar u - \delta) \frac{m}{n}, \qquad \delta_0 = 0,\ n_0 = 10^{-24}

of m new rewards, of all ranks together. :math:`\omega`, 1 unless given, is a density ratio of prompts (the paper's underlying
distribution matching), a constant of each rejected response.

Where libraries differ: TRL's `bco_pair` had such a shift up to 0.28 (there a mean of the batches' means), and has had none
since, as Liger; the BCO trainer has it. That trainer averages with NaN left out; here NaN makes the loss NaN, and is an error
of the shift.

Defaults: beta 0.1, delta 0, as TRL's DPO trainer has it now.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss, unpaired_loss
from ..ops._arguments import check_tensors
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_finite

about = About(
    name="BCO",
    title="Binary Classifier Optimization for Large Language Model Alignment",
    arxiv="2404.04656",
    year=2024,
    family="pairwise or unpaired, each side by itself",
    evidence="code",
    note="the pair form in TRL and Liger-Kernel; the running shift as read in TRL",
)

START_COUNT = 1e-24


class RewardShift:
    """The mean of all rewards seen so far, in float64 where they are: BCO's shift.

        delta = shift.update(rewards)             # before the loss of the same batch

    all_reduce: what sums a float64 tensor [2], the sum and the number of new rewards, over all ranks and returns it.
    """

    def __init__(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.all_reduce = all_reduce
        self.mean = torch.zeros((), dtype=torch.float64)
        self.count = torch.full((), START_COUNT, dtype=torch.float64)

    def update(self, rewards: Tensor) -> Tensor:
        """Take in rewards [N], beta times the log-ratios of both sides, and return the mean, 0-d and without gradient.

        A reward that is not finite is a ValueError, or, where it may not be looked at, gives this mean and leaves the next ones
        without this batch.
        """
        check_tensors(rewards=rewards)
        check_finite("rewards", rewards)
        new = rewards.detach().double()
        total = new.sum()
        totals = torch.stack([total, torch.full_like(total, new.numel())])
        if self.all_reduce is not None:
            totals = self.all_reduce(totals)
        total, number = totals.unbind()
        mean, count = self.mean.to(new.device), self.count.to(new.device)
        # With nothing seen and nothing new the mean stays.
        after = mean + (total - number * mean) / (count + number)
        good = after.isfinite()
        self.mean, self.count = torch.where(good, after, mean), torch.where(good, count + number, count)
        return after.to(torch.promote_types(rewards.dtype, torch.float32))

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """ValueError for a state with other keys."""
        if set(state) != {"mean", "count"}:
            raise ValueError(f"state has keys {sorted(state)}; accepted: 'count', 'mean'")
        self.mean, self.count = (torch.as_tensor(state[key]).detach().double().clone() for key in ("mean", "count"))


def bco_pair_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 0.0,
    rejected_weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """The loss of P pairs, from log-probs summed over each response, [P] each. Gradient to chosen_logp and rejected_logp.

    delta: the shift, a number, a tensor of one element, or [P]. rejected_weight: [P] constants, not negative.
    Metrics are those of `prefkern.preference_loss`; rewards are before the shift.
    """
    choice("reduction", reduction, ("mean", "sum", "none"))
    logps = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    if rejected_weight is None:
        return preference_loss(*logps, kind="bco_pair", beta=beta, offset=delta, reduction=reduction)
    check_tensors(chosen_logp=chosen_logp, rejected_logp=rejected_logp, rejected_weight=rejected_weight)
    for name, t in (("rejected_logp", rejected_logp), ("rejected_weight", rejected_weight)):
        if t.shape != chosen_logp.shape:
            raise ValueError(f"{name} has shape {list(t.shape)}; chosen_logp has shape {list(chosen_logp.shape)}, so the same")
    # The op has one weight a pair, so the two sides are single responses here.
    pairs = len(chosen_logp)
    refs = None if ref_chosen_logp is None and ref_rejected_logp is None else torch.cat([
        torch.zeros_like(logp) if ref is None else ref for logp, ref in zip(logps[:2], logps[2:], strict=True)
    ])  # fmt: skip
    both = torch.cat(logps[:2])
    chosen = torch.arange(2 * pairs, device=both.device) < pairs
    shift = delta.repeat(2) if isinstance(delta, Tensor) and delta.shape == chosen_logp.shape else delta
    weight = torch.cat([torch.ones_like(rejected_weight), rejected_weight])
    out = unpaired_loss(both, refs, chosen, kind="bco", beta=beta, offset=shift, weight=weight, reduction="none")
    losses = out.loss[:pairs] + out.loss[pairs:]
    x_w, x_l = (both if refs is None else both - refs).detach().chunk(2)
    accuracy = (x_w > x_l).to(losses.dtype).sum() / max(1, pairs)
    metrics = {**out.metrics, "accuracy": accuracy, "pairs": out.metrics["pairs"] / 2}
    if reduction == "none":
        return LossOutput(losses, metrics)
    return LossOutput(losses.sum() / (max(1, pairs) if reduction == "mean" else 1), metrics)


def bco_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of N single responses, from summed log-probs [N] and bools [N]: the mean over all of them. Gradient to logp.

    delta: as there. weight: [N] constants, such as density ratios of undesirable responses, 1 for the others; "mean" still
    divides by N. Metrics are those of `prefkern.unpaired_loss`.
    """
    return unpaired_loss(logp, ref_logp, desirable, kind="bco", beta=beta, offset=delta, weight=weight, reduction=reduction)


@dataclass(frozen=True)
class BCO(PairRecipe):
    """A classifier of each side. `extra` may have "delta", a :class:`RewardShift`'s mean, in place of the option, and
    "density_weight" [P] of the rejected responses."""

    name: ClassVar[str] = "bco"
    beta: float = 0.1
    delta: float = 0.0

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        delta = pairs.get("delta")
        return bco_pair_loss(
            *pairs.log_ratios(), beta=self.beta, delta=self.delta if delta is None else delta,
            rejected_weight=pairs.get("density_weight"),
        )  # fmt: skip


recipe = BCO()
