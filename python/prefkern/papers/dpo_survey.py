r"""The DPO survey: which of its methods this library has, and the losses among them that need no module of their own.

Liu et al., "A Survey of Direct Preference Optimization", arXiv:2503.11701.
Evidence: part. The survey's material names the methods; the formulas are each method's own, and the table says of each whether
it was confirmed against code, is known from its paper, or is not verified and therefore withheld.

`coverage()` is the table, with what it says about this library looked up in it. `prefkern papers --survey` prints it.

With log-ratios :math:`x = \log\pi - \log\pi_\mathrm{ref}` summed over responses, :math:`z = \beta (x_w - x_l)`,
:math:`\ell(t) = -\log\sigma(t)`, a the mean log-prob of a response's tokens, the losses here are

.. math::
    \text{GPO}\quad& \ell(z),\ \max(0, 1 - z),\ (z - 1)^2,\ e^{-z},\ \max(0, 1 - z)^2,\ \sigma(-z)^2 \\
    \text{FocalPO}\quad& \sigma(z)^\gamma\,\ell(z) \\
    \text{Dr. DPO}\quad& -b \log \tfrac{1}{P} \textstyle\sum e^{-\ell(z) / b} \\
    \text{Cal-DPO}\quad& \ell(x_w - x_l) + (x_w - \tfrac{1}{2 \beta})^2 + (x_l + \tfrac{1}{2 \beta})^2 \\
    \text{ties}\quad& \text{Rao-Kupper (DPO-RK, TODO) and Davidson (DPO-D)} \\
    \chi\text{PO}\quad& \ell(\beta (\phi(x_w) - \phi(x_l))),\ \phi(x) = x + e^x \\
    \text{SimPER}\quad& e^{a_l} - e^{a_w} \\
    \text{NPO, SimNPO}\quad& \tfrac{2}{\beta} \ell(-\beta x_l),\ \tfrac{2}{\beta} \ell(-\beta a_l - \gamma) \\
    \text{DPO-Shift, Flex-DPO}\quad& \ell(\beta_w x_w - \beta_l x_l)

and more below, each with its formula. All are averaged over pairs unless said. Weights, offsets, targets and scales are
constants.

The same letters mean different methods: GPO (generalized, here, or general preference: `prefkern.papers.gpm`), GDPO (geometric,
here; `prefkern.papers.gdpo` is the decoupled normalisation), GRPO (group robust, here; or `prefkern.papers.grpo`), RPO
(relative, here; the likelihood-regularised one is `prefkern.papers.rpo`), D2PO, CPO, APO, SPO, ADPO, TPO, VPO and MPO.

Defaults: beta 0.1 and sums over tokens throughout; a method's own parameter has a default only where the method is known by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss, unpaired_loss
from ..ops.preference import Kind, Reduction
from ._about import About
from ._pairs import check_pair_lengths
from ._registry import NAMES, module, pair_recipes
from ._shared import check_rows, check_values, may_look, per_token
from ._survey_rows import ROWS, Row
from .dpo import dpo_loss
from .ld_dpo import token_places

about = About(
    name="DPO survey",
    title="A Survey of Direct Preference Optimization",
    arxiv="2503.11701",
    year=2025,
    family="survey: a table, and small losses",
    evidence="part",
    note="per row of its table; formulas that were not verified are withheld",
)

Status = Literal["here", "missing", "withheld", "outside"]
STATUSES: dict[str, str] = {
    "here": "this library has it, at the path given",
    "missing": "this version does not have it",
    "withheld": "its formula was not verified, and is not guessed",
    "outside": "it is no loss",
}


@dataclass(frozen=True)
class Covered(Row):
    """A row, and what this library has of it."""

    status: Status = "missing"
    recipe: str | None = None
    """The recipe for pairs that a trainer can name."""


def coverage() -> tuple[Covered, ...]:
    """The survey's methods with what is here of each, looked up in the registry of papers and in their modules."""
    return tuple(_covered(row) for row in ROWS)


def _covered(row: Row) -> Covered:
    values: dict[str, Any] = {f.name: getattr(row, f.name) for f in fields(Row)}
    if row.where is None:
        return Covered(**values, status="withheld" if row.source == "unverified" else "outside")
    return Covered(**values, status="here" if _exists(row.where) else "missing", recipe=_recipe(row.where))


def _exists(where: str) -> bool:
    """Whether there is a paper's module, or a function in it, at this path below `prefkern`."""
    package, paper, *function = where.split(".")
    if package != "papers" or paper not in NAMES:
        return False
    return not function or (len(function) == 1 and callable(getattr(module(paper), function[0], None)))


def _recipe(where: str) -> str | None:
    paper = where.split(".")[1]
    return paper if paper in pair_recipes() else None


# ---- pairs

GPO_KINDS: dict[str, tuple[Kind, float]] = {
    "logistic": ("sigmoid", 0.0),
    "hinge": ("hinge", 0.0),
    "squared": ("squared", 1.0),
    "exponential": ("exponential", 0.0),
    "truncated_quadratic": ("truncated_quadratic", 0.0),
    "savage": ("savage", 0.0),
}
"""By name, the kind of `prefkern.preference_loss` and its offset."""


def gpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    kind: str,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """GPO, generalized preference optimisation (Tang et al., arXiv:2402.05749): a loss of z by `kind`, one of
    `GPO_KINDS`.

    "squared", (z - 1)^2, is beta^2 times IPO, whose own beta is half of this one.
    """
    choice("kind", kind, tuple(GPO_KINDS))
    op_kind, offset = GPO_KINDS[kind]
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind=op_kind, beta=beta, offset=offset,
        reduction=reduction,
    )  # fmt: skip


def focal_po_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    gamma: float = 0.05,
    reduction: Reduction = "mean",
) -> LossOutput:
    """FocalPO: s(z)^gamma l(z): pairs that are ordered wrongly count for less. The factor has a gradient. gamma 0 is DPO."""
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="focal", beta=beta, gamma=gamma,
        reduction=reduction,
    )  # fmt: skip


def dr_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    b: float,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Dr. DPO, distributionally robust over pairs: -b log mean exp(-l(z) / b), of the whole batch: pairs of large loss count
    for less, the more so the smaller b. Its limit for large b is DPO's mean."""
    if not (b > 0 and math.isfinite(b)):
        raise ValueError(f"b is {b}; it must be finite and positive")
    out = dpo_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, label_smoothing=label_smoothing,
        reduction="none",
    )  # fmt: skip
    if len(out.loss) == 0:
        return LossOutput(out.loss.sum(), out.metrics)
    return LossOutput(-b * (torch.logsumexp(-out.loss / b, 0) - math.log(len(out.loss))), out.metrics)


def cal_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Cal-DPO: l(x_w - x_l), without beta, and each log-ratio drawn to +-1 / (2 beta)."""
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="cal_dpo", beta=beta, reduction=reduction
    )


def tie_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    tie: Tensor,
    model: Literal["rao_kupper", "davidson"] = "rao_kupper",
    nu: float,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO-RK and DPO-D: DPO where pairs may be judged equal, bool `tie` [P]; in a tie the sides are interchangeable.

    nu: how common ties are: above 1 with Rao and Kupper, from 0 with Davidson, at whose lower ends both are DPO on pairs that
    are no ties.
    """
    choice("model", model, ("rao_kupper", "davidson"))
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind=model, beta=beta, nu=nu, tie=tie,
        reduction=reduction,
    )  # fmt: skip


def todo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    tie: Tensor,
    alpha: float,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """TODO, ternary preferences: Rao and Kupper's ties with nu = e^alpha, alpha positive."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}; it must be finite and positive")
    return tie_dpo_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, tie=tie, nu=math.exp(alpha), beta=beta,
        reduction=reduction,
    )  # fmt: skip


def chi_po_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float = 0.1,
    clip: float | None = None,
    exp_cap: float = 80.0,
    reduction: Reduction = "mean",
) -> LossOutput:
    """chi-PO (Huang et al., arXiv:2407.13399): DPO with phi(u) = u + log u of the ratio u = pi / ref in place of log u.

    clip: z is held in [-clip, clip], with no gradient outside; None for no bound. exp_cap: x is held there in e^x.
    """
    for name, reference in (("ref_chosen_logp", ref_chosen_logp), ("ref_rejected_logp", ref_rejected_logp)):
        if reference is None:
            raise ValueError(f"{name} is None; chi-PO has no form without a reference")
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, score="chi", beta=beta, clip=clip, exp_cap=exp_cap,
        reduction=reduction,
    )  # fmt: skip


def simper_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    reduction: Reduction = "mean",
) -> LossOutput:
    """SimPER: e^{a_l} - e^{a_w} of mean log-probs, the inverse perplexities: without reference and parameters, in [-1, 1]."""
    check_pair_lengths(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    return preference_loss(
        chosen_logp, rejected_logp, kind="linear", score="exp", beta=1.0, average="logp", chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths, reduction=reduction,
    )  # fmt: skip


def flex_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_beta: float,
    rejected_beta: float,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Flex-DPO: l(beta_w x_w - beta_l x_l)."""
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=chosen_beta, rejected_beta=rejected_beta,
        reduction=reduction,
    )  # fmt: skip


def dpo_shift_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    factor: float,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """DPO-Shift: l(beta (x_w - f x_l)), `factor` f in (0, 1]: so that the chosen response does not lose likelihood with the
    rejected one. f 1 is DPO."""
    if not 0 < factor <= 1:
        raise ValueError(f"factor is {factor}; it must be in (0, 1]")
    return flex_dpo_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, chosen_beta=beta, rejected_beta=factor * beta,
        reduction=reduction,
    )  # fmt: skip


def spin_loss(
    data_logp: Tensor,
    generated_logp: Tensor,
    ref_data_logp: Tensor | None = None,
    ref_generated_logp: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """SPIN: DPO of responses from the data, as chosen, against the last iterate's own, which is also the reference."""
    return dpo_loss(data_logp, generated_logp, ref_data_logp, ref_generated_logp, beta=beta, reduction=reduction)


def xpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    sampled_logp: Tensor,
    alpha: float,
    beta: float = 0.1,
) -> LossOutput:
    """XPO: DPO plus alpha times the mean of `sampled_logp` [S], the policy's log-probs of responses drawn from the reference:
    optimism, which makes what is usual less likely. Gradient to all three."""
    out = dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta)
    term = sampled_logp.sum() / max(len(sampled_logp), 1)
    return LossOutput(out.loss + alpha * term, {**out.metrics, "sampled_logp": term.detach()})


def reward_distillation_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Reward distillation, of e-DPO: (r_w - r_l - z)^2: the policy's implicit margin is drawn to that of a reward model, [P]
    each."""
    check_rows(len(chosen_logp), chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, kind="squared", beta=beta,
        offset=chosen_rewards - rejected_rewards, reduction=reduction,
    )  # fmt: skip


def pmpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    kl: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """PMPO: -alpha log pi_w + (1 - alpha) log pi_l + beta KL(ref, pi), with `kl` [P] or of one element, such as
    `prefkern.papers.tdpo.position_kl` summed over a response. Gradient to all three. alpha in (0, 1)."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must be in (0, 1)")
    if kl.dim() > 0:
        check_rows(len(chosen_logp), kl=kl)
    out = preference_loss(chosen_logp, rejected_logp, kind="linear", beta=alpha, rejected_beta=1 - alpha, reduction=reduction)
    term = kl if reduction == "none" else kl.expand_as(chosen_logp).sum()
    if reduction in ("mean", "weighted_mean"):
        term = term / max(len(chosen_logp), 1)
    return LossOutput(out.loss + beta * term, {**out.metrics, "kl": kl.detach().sum() / max(kl.numel(), 1)})


# ---- weights, scales and masks of pairs and tokens


def geometric_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    soft_label: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """GDPO, geometric averages for soft labels: l((2 p - 1) z), `soft_label` p [P] the probability that the chosen response is
    the better one. An even pair, p = 1/2, has no gradient; p = 1 is DPO."""
    check_rows(len(chosen_logp), soft_label=soft_label)
    check_values("soft_label", soft_label, (soft_label >= 0) & (soft_label <= 1), "a probability is expected")
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, scale=2 * soft_label - 1,
        reduction=reduction,
    )  # fmt: skip


def mallows_po_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    dispersion: Tensor,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """MallowsPO: l(phi z), `dispersion` phi [P] the weight of the pair's prompt, by how far people agree on it. 1 is DPO."""
    check_rows(len(chosen_logp), dispersion=dispersion)
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, scale=dispersion, reduction=reduction
    )


def ns_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    age: Tensor,
    gamma: float,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """NS-DPO, for preferences that drift: gamma^age l(z), `age` [P] how long ago a pair was judged. gamma in (0, 1]; 1 is
    DPO."""
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must be in (0, 1]")
    check_rows(len(chosen_logp), age=age)
    weight = torch.exp(math.log(gamma) * age.to(torch.promote_types(chosen_logp.dtype, torch.float32)))
    return dpo_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, weight=weight, reduction=reduction
    )


def temporal_decay_weights(
    like: Tensor, mask: Tensor | None = None, *, gamma: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """D2PO's token weights, gamma^t with t = 0 at the first token that counts; shaped like `like`, [B, T] or packed [N].

    For `Pairs.sums(weights=...)` or `prefkern.sequence_sum`. gamma in (0, 1]; 1 is DPO.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must be in (0, 1]")
    places = (token_places(like, mask, cu_seqlens) - 1).clamp_min(0)
    return torch.exp(math.log(gamma) * places.to(torch.promote_types(like.dtype, torch.float32)))


def dmpo_token_weights(turn: Tensor, turns: Tensor, *, gamma: float, cu_seqlens: Tensor | None = None) -> Tensor:
    r"""DMPO's token weights, g^t (1 - g^{T - t}) / (1 - g^T): for each token the `turn` t, from 0, that it belongs to, [B, T]
    or packed [N], of the `turns` T [B] of its row. float32.

    1 at the first turn, and falling; g = 1 is the limit (T - t) / T. Tokens outside the response may have any turn of their
    row.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must be in (0, 1]")
    t, total = turn.float(), per_token(turns, turn, cu_seqlens).float()
    if may_look(turn) and bool(((t < 0) | (t >= total)).any()):
        raise ValueError("turn has entries that are not in [0, turns) of their row")
    if gamma == 1:
        return (total - t) / total
    rate = math.log(gamma)
    return torch.exp(rate * t) * torch.expm1(rate * (total - t)) / torch.expm1(rate * total)


def sampo_mask(mask: Tensor, *, cu_seqlens: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """SamPO's mask: of each of the 2P responses, [2P, T] or packed [N], chosen ones first, as many of the tokens that count,
    drawn evenly, as the shorter response of its pair has. generator: on the mask's device; equal states give equal masks."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; torch.bool is expected")
    keys = torch.rand(mask.shape, generator=generator, device=mask.device)
    keys = torch.where(mask, keys, 2.0)  # what does not count comes last
    if cu_seqlens is None:
        order = keys.argsort(dim=-1, stable=True)
        rank = order.argsort(-1)
        counts = mask.sum(-1)
    else:
        rows = per_token(torch.arange(len(cu_seqlens) - 1, device=mask.device), mask, cu_seqlens)
        order = keys.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]  # by row, then by key
        rank = order.argsort() - cu_seqlens[:-1].long()[rows]
        before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        counts = before[cu_seqlens[1:].long()] - before[cu_seqlens[:-1].long()]
    if len(counts) % 2:
        raise ValueError(f"mask has {len(counts)} responses; chosen and rejected ones, so an even number is expected")
    shared = torch.minimum(*counts.chunk(2))
    return mask & (rank < per_token(torch.cat([shared, shared]), rank, cu_seqlens))


# ---- several responses a prompt


def multi_sample_dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    beta: float = 0.1,
    reduction: Reduction = "mean",
) -> LossOutput:
    """mDPO, of several samples: l(beta (mean_k x_wk - mean_k x_lk)), log-probs [P, K] of chosen and [P, L] of rejected
    responses, bool masks alike. One sample each is DPO. (Not the multimodal mDPO.)"""
    means = (
        _sample_mean("chosen", chosen_logp, ref_chosen_logp, chosen_mask),
        _sample_mean("rejected", rejected_logp, ref_rejected_logp, rejected_mask),
    )
    return dpo_loss(*means, beta=beta, reduction=reduction)


def _sample_mean(side: str, logp: Tensor, ref_logp: Tensor | None, mask: Tensor | None) -> Tensor:
    if logp.dim() != 2:
        raise ValueError(f"{side}_logp has shape {list(logp.shape)}; [P, K] is expected")
    for name, t in ((f"ref_{side}_logp", ref_logp), (f"{side}_mask", mask)):
        if t is not None and t.shape != logp.shape:
            raise ValueError(f"{name} has shape {list(t.shape)}; {list(logp.shape)} is expected, like {side}_logp")
    x = logp if ref_logp is None else logp - ref_logp.detach()
    if mask is None:
        mask = torch.ones_like(logp, dtype=torch.bool)
    counts = mask.sum(1)
    check_values(f"{side}_mask", mask, counts > 0, "a pair needs at least one sample on each side")
    return torch.where(mask, x, 0.0).sum(1) / counts


def relative_po_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    omega: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """RPO, relative: the mean over all i, j of l(omega_ij beta (x_wi - x_lj)): every chosen response, [P], against every
    rejected one, [Q], of whatever prompt, with `omega` [P, Q] by how alike the prompts are. Metrics are over these P Q
    pairs."""
    shape = (len(chosen_logp), len(rejected_logp))
    if omega.shape != shape:
        raise ValueError(f"omega has shape {list(omega.shape)}; {list(shape)} is expected")

    def spread(t: Tensor | None, dim: int) -> Tensor | None:
        return None if t is None else t.unsqueeze(dim).expand(shape).reshape(-1)

    chosen, rejected = spread(chosen_logp, 1), spread(rejected_logp, 0)
    assert chosen is not None and rejected is not None
    return preference_loss(
        chosen, rejected, spread(ref_chosen_logp, 1), spread(ref_rejected_logp, 0), beta=beta, scale=omega.reshape(-1)
    )


class GroupRobust(NamedTuple):
    """A loss over groups, and the groups' weights for the next batch."""

    loss: Tensor
    """0-d."""
    weights: Tensor
    """[G], without gradient, of sum 1."""
    group_losses: Tensor
    """[G], without gradient; 0 for a group without pairs."""


def group_robust_loss(losses: Tensor, group: Tensor, weights: Tensor, *, step_size: float) -> GroupRobust:
    """GRPO, group robust preference optimisation: sum_g q_g L_g with the mean loss L_g of each group, where the `weights` q
    [G] have first moved to q_g e^{step_size L_g}, normalised: the worst group counts most.

    losses [P]: such as `dpo_loss(..., reduction="none").loss`; gradient to them. group: int64 [P], 0 to G - 1. A group without
    pairs keeps its weight up to normalisation.
    """
    check_rows(len(losses), losses=losses, group=group)
    if weights.dim() != 1 or len(weights) == 0:
        raise ValueError(f"weights has shape {list(weights.shape)}; [G] is expected")
    check_values("group", group, (group >= 0) & (group < len(weights)), f"0 to {len(weights) - 1} is expected")
    member = (group[:, None] == torch.arange(len(weights), device=group.device)).to(losses.dtype)
    group_losses = member.T @ losses / member.sum(0).clamp_min(1)
    constant = group_losses.detach()
    moved = torch.softmax(weights.detach().log() + step_size * constant, 0)
    return GroupRobust(moved @ group_losses, moved, constant)


# ---- single responses


def npo_loss(logp: Tensor, ref_logp: Tensor | None = None, *, beta: float = 0.1, reduction: Reduction = "mean") -> LossOutput:
    """NPO, of undesirable responses alone: (2 / beta) l(-beta x), [N]. Its gradient fades once a response has been unlearnt."""
    none = torch.zeros_like(logp, dtype=torch.bool)
    return unpaired_loss(logp, ref_logp, none, kind="bco", beta=beta, factor=_npo_factor(beta), reduction=reduction)


def simnpo_loss(
    logp: Tensor, lengths: Tensor, *, beta: float = 0.1, gamma: float = 0.0, reduction: Reduction = "mean"
) -> LossOutput:
    """SimNPO: (2 / beta) l(-beta a - gamma) with the mean log-prob a, from log-probs summed over responses, [N], and their
    lengths; without a reference."""
    check_pair_lengths(lengths=lengths)
    none = torch.zeros_like(logp, dtype=torch.bool)
    return unpaired_loss(
        logp, None, none, kind="bco", beta=beta, average="logp", lengths=lengths, offset=-gamma, factor=_npo_factor(beta),
        reduction=reduction,
    )  # fmt: skip


def _npo_factor(beta: float) -> float:
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta is {beta}; it must be finite and positive")
    return 2 / beta


def dro_v_loss(
    logp: Tensor, ref_logp: Tensor | None, rewards: Tensor, values: Tensor, *, tau: float = 0.1, reduction: str = "mean"
) -> LossOutput:
    """DRO-V: 1/2 (r - V - tau x)^2 of single responses with rewards [N], and the `values` [N] of their prompts, which are
    learnt
    with the policy: gradient to logp and to values."""
    choice("reduction", reduction, ("mean", "sum", "none"))
    check_rows(len(logp), logp=logp, ref_logp=ref_logp, rewards=rewards, values=values)
    x = logp if ref_logp is None else logp - ref_logp.detach()
    losses = 0.5 * (rewards.detach() - values - tau * x).square()
    loss = {"none": losses, "sum": losses.sum()}.get(reduction, losses.sum() / max(len(losses), 1))
    reward = tau * x.detach().sum() / max(len(losses), 1)
    return LossOutput(loss, {"reward": reward, "value": values.detach().sum() / max(len(losses), 1)})
