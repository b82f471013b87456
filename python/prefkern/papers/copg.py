r"""CoPG: contrastive policy gradient. Pairs with any scalar rewards, from any policy, without importance weights.

Flet-Berliac et al., "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion",
arXiv:2406.19185.
Evidence: paper. From its equations; no code was released. The form for groups follows from its property 2 and the Command A
report.

For two responses y, y' to one prompt, with the sum over tokens :math:`\rho = \log\pi(y) - \log\pi_\mathrm{ref}(y)`,
:math:`\Delta r = r - r'`, :math:`\Delta\rho = \rho - \rho'` (equations 1, 7 and 18):

.. math::
    \ell = \bigl(R_{\beta/2}(y) - R_{\beta/2}(y')\bigr)(\rho - \rho') = (\Delta r - \tfrac{\beta}{2} \Delta\rho)\,\Delta\rho,
    \qquad R_b(y) = r - b\rho, \qquad L = -\frac1P \sum \ell

.. math:: \nabla \ell = (\Delta r - \beta \Delta\rho)(\nabla \log\pi(y) - \nabla \log\pi(y'))

Nothing is detached: the rewards R contain the policy, which is why the objective has :math:`\beta/2` and its gradient
:math:`\beta`. L is :math:`\frac{1}{2\beta}(\beta\Delta\rho - \Delta r)^2` less the constant :math:`\Delta r^2 / (2\beta)`,
which is not added. (The paper speaks of minimising by gradient ascent; this is the loss to minimise.) The optimum is
:math:`\pi_\mathrm{ref} e^{r/\beta}` whatever policy sampled.

For groups of k, over their pairs but in linear time, with Q the number of groups:

- `scale="rloo"`: :math:`L = -\frac1Q \sum_g \frac{1}{k-1} \sum_{i<j} \ell_{ij}`; its gradient in :math:`\log\pi(y_i)` is
  :math:`-\frac1Q (A_i - \mathrm{mean}_{j \ne i} A_j)` with :math:`A = r - \beta\rho`: RLOO, off-policy.
- `"mean"`: :math:`\frac{2}{k(k-1)}`, the mean over a prompt's pairs.
- `"squared"`: Command A's :math:`\frac1Q \sum_g \frac{1}{k-1} \sum_{i<j} (A_i - A_j)^2`; its gradient is :math:`2\beta` times
  that of "rloo".

Defaults: beta 0.1, within the paper's sweep {0.01, 0.03, 0.06, 0.1, 0.3, 1}. A pair with equal rewards is a regulariser and
stays. beta = 0 is contrastive REINFORCE, unbounded below: allowed, with a warning. A group of one contributes 0 and counts in
Q, unless `drop_singletons`. `clip_margin`, not in the paper, bounds the factor of the gradient (of the pair; in groups
:math:`A_i - \mathrm{mean}_{j \ne i} A_j`), since one long outlier can dominate a batch; the metric `max_residual` shows that.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, group_reduce, sequence_sum
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_rows, check_values

about = About(
    name="CoPG",
    title="Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion",
    arxiv="2406.19185",
    year=2024,
    family="pairwise, any reward",
    evidence="paper",
    note="its equations; the form for groups by its property 2",
)

Scale = Literal["rloo", "mean", "squared"]
SCALES = ("rloo", "mean", "squared")


def copg_loss(
    logp: Tensor,
    ref_logp: Tensor,
    rewards: Tensor,
    *,
    pair_logp: Tensor | None = None,
    pair_ref_logp: Tensor | None = None,
    pair_rewards: Tensor | None = None,
    group: Tensor | None = None,
    pair_group: Tensor | None = None,
    beta: float = 0.1,
    scale: Scale = "rloo",
    drop_singletons: bool = False,
    clip_margin: float | None = None,
) -> LossOutput:
    """The loss of P pairs, whose other halves are `pair_...`, or of B responses in groups given by id.

    Gradient to logp and pair_logp.

    logp, ref_logp: sums over the tokens of each response, [P] or [B]; from tokens take
    `prefkern.sequence_sum(logp, mask, minus=ref_logp)` as logp and zeros as ref_logp, which loses fewest digits.
    group, pair_group: with pairs, optional ids of the prompts of both halves, which must agree.
    scale, drop_singletons: for groups.

    Metrics: max_residual (largest |beta drho - dr| over all pairs), log_ratio (mean rho), groups (Q, or P for pairs).
    """
    choice("scale", scale, SCALES)
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; it must not be negative")
    if beta == 0:
        warnings.warn("beta is 0: the loss is unbounded below", stacklevel=2)
    if clip_margin is not None and not clip_margin > 0:
        raise ValueError(f"clip_margin is {clip_margin}; it must be positive, or None")
    check_rows(len(logp), logp=logp, ref_logp=ref_logp, rewards=rewards, group=group)
    check_values("rewards", rewards, rewards.isfinite(), "every reward must be finite")
    rho = logp - ref_logp.detach().to(logp.dtype)
    rewards = rewards.detach().to(rho.dtype)
    given = {"pair_logp": pair_logp, "pair_ref_logp": pair_ref_logp, "pair_rewards": pair_rewards}
    if all(half is None for half in given.values()):
        if group is None:
            raise ValueError("group is None; groups need the ids, pairs need pair_logp, pair_ref_logp and pair_rewards")
        return _of_groups(rho, rewards, group, beta, scale, drop_singletons, clip_margin)

    for name, half in given.items():
        if half is None:
            raise ValueError(f"{name} is None; pairs need pair_logp, pair_ref_logp and pair_rewards")
    assert pair_logp is not None and pair_ref_logp is not None and pair_rewards is not None
    check_rows(len(logp), **given, pair_group=pair_group)
    check_values("pair_rewards", pair_rewards, pair_rewards.isfinite(), "every reward must be finite")
    if pair_group is not None and group is not None:
        check_values("pair_group", pair_group, pair_group == group, "both halves of a pair must have one prompt")
    other = pair_logp - pair_ref_logp.detach().to(pair_logp.dtype)
    return _of_pairs(rho - other, rewards - pair_rewards.detach().to(rho.dtype), (rho, other), beta, clip_margin)


def _of_pairs(drho: Tensor, dr: Tensor, ratios: tuple[Tensor, Tensor], beta: float, clip_margin: float | None) -> LossOutput:
    pairs = max(len(drho), 1)
    gap = drho.detach()
    value = -((dr - beta / 2 * gap) * gap).sum() / pairs
    residual = dr - beta * gap
    return _output(value, drho, -_clipped(residual, clip_margin) / pairs, {
        "max_residual": torch.cat([residual.abs(), residual.new_zeros(1)]).max(),
        "log_ratio": torch.cat(ratios).detach().mean(),
        "groups": torch.full_like(value, len(drho)),
    })  # fmt: skip


def _of_groups(
    rho: Tensor, rewards: Tensor, group: Tensor, beta: float, scale: Scale, drop_singletons: bool, clip_margin: float | None
) -> LossOutput:
    """sum_{i<j} (x_i - x_j)(y_i - y_j) = k sum_i (x_i - mean x)(y_i - mean y): no pair is formed."""
    x = rho.detach()
    k = group_reduce(torch.ones_like(x), group, reduce="count").to(x.dtype)
    counts = torch.where(k > 1, 1.0, 0.0) if drop_singletons else torch.ones_like(k)
    groups = (counts / k).sum().round()
    each = torch.where(k > 1, k / (k - 1).clamp_min(1), 0.0) / groups.clamp_min(1)

    def centred(values: Tensor) -> Tensor:
        return values - group_reduce(values, group, reduce="mean")

    a = rewards - beta * x
    d = centred(a)
    leave_one_out = _clipped(torch.where(k > 1, k / (k - 1).clamp_min(1), 0.0) * d, clip_margin)
    if scale == "squared":
        value = (each * d.square()).sum()
        slope = 2 * beta * leave_one_out / groups.clamp_min(1)
    else:
        share = each if scale == "rloo" else each * 2 / k
        value = (share * centred(rewards - beta / 2 * x) * centred(x)).sum()
        slope = leave_one_out / groups.clamp_min(1) * (1 if scale == "rloo" else 2 / k)
        value = -value
    residual = group_reduce(a, group, reduce="max") - group_reduce(a, group, reduce="min")
    return _output(value, rho, -slope, {
        "max_residual": torch.cat([residual, residual.new_zeros(1)]).max(), "log_ratio": x.mean(), "groups": groups
    })  # fmt: skip


def _clipped(factor: Tensor, bound: float | None) -> Tensor:
    return factor if bound is None else factor.clamp(-bound, bound)


def _output(value: Tensor, x: Tensor, slope: Tensor, metrics: dict[str, Tensor]) -> LossOutput:
    """A loss with this value, and this gradient in x."""
    return LossOutput(value + (slope * (x - x.detach())).sum(), metrics)


@dataclass(frozen=True)
class CoPG(Recipe):
    """All pairs of each group, on- or off-policy; no ratios, no clipping."""

    name: ClassVar[str] = "copg"
    needs: ClassVar[tuple[str, ...]] = ("ref_logp",)
    whole_groups: ClassVar[bool] = True
    takes_token_weight: ClassVar[bool] = False
    beta: float = 0.1
    scale: Scale = "rloo"
    drop_singletons: bool = False
    clip_margin: float | None = None

    def advantages(self, rollout: Rollout) -> Tensor:
        """The rewards: what they are worth against the policy's own ratio only the loss can tell."""
        return rollout.rewards

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        rho = sequence_sum(logp, batch.get("mask"), cu_seqlens=batch.get("cu_seqlens"), minus=batch["ref_logp"])
        output = copg_loss(rho, torch.zeros_like(rho), batch["advantages"], group=batch["group"], **self.options())
        return self.with_entropy(output, batch, entropy)


recipe = CoPG()
