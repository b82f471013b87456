r"""GTPO (group-relative trajectory-based policy optimisation): tokens that right and wrong completions share are protected.

"GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control", arXiv:2508.03772. Not "GTPO and GRPO-S"
(arXiv:2508.04349), which rewards tokens by their entropy.
Evidence: code, in two variants: conflict counts, weights, entropies, loss and gradient were checked against the authors'
release.

For one prompt with completions i, advantages centred only, :math:`A_i = r_i - \mathrm{mean}(r)`; P are the rows with A > 0, N
those with A < 0; rows with A = 0 neither make conflicts nor are weighted.

- *Conflicts.* A position t of row i is one if some row of P and some row of N carry row i's token there. :math:`f_i` is the
  length of the run of conflicts from the first token on, :math:`b_i` the same from the last token backwards. Weights
  :math:`\lambda_{it}`: :math:`w_+ = 2` for P and :math:`w_- = 0` for N inside a run, else 1.
- *Entropy.* :math:`H_i` is the mean entropy of the current policy over row i's tokens; no gradient flows through it.
  :math:`\tilde A_i = d_i (A_i - \gamma H_i)`, where :math:`d_i` drops rows above a threshold.

.. math::
    L_\text{paper} = -\frac1G \sum_i \frac1{n_i} \sum_t \rho_{it} \tilde A_i \lambda_{it}, \qquad
    L_\text{code} = -\sum_i \frac1{n_i C_i} \sum_t \rho_{it} \tilde A_i \lambda_{it}, \qquad \rho_{it} = \pi / \mathrm{sg}(\pi)

`variant="paper"` (default) is the documented objective: threshold ln 2, which applies unless the initial policy's entropy
`h_init` is already above it; a token in both runs gets w once; the mean over the group. `variant="code"` is the released
trainer: threshold 0.7 always, :math:`w^2` on tokens in both runs, and an extra division by :math:`C_i = \max(1, f_i, b_i)`,
summed over the group. The release leaves out tokens equal to one hard-coded pad id; here the mask alone decides. It floors p
at 1e-6 inside the logarithm of the entropy; `linear_logprobs` gives the exact entropy, which differs by the tokens below
that.

With equal rewards there are no conflicts and every kept row is pushed down by :math:`\gamma H_i`: pure entropy pressure, as
in the release. A kept row with A > 0 can turn negative if :math:`\gamma H_i > A_i`; its weights stay those of P. NaN entropy
drops a row.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops import LossOutput, conflict_runs, conflict_weights, group_advantages, linear_logprobs, policy_loss, sequence_mean
from ._about import About
from ._recipe import Batch, Recipe, Rollout, multiply

about = About(
    name="GTPO",
    title="GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control",
    arxiv="2508.03772",
    year=2025,
    family="mask, objective",
    evidence="code",
    note="the authors' release, in two variants",
)

Variant = Literal["paper", "code"]
THRESHOLDS = {"paper": math.log(2), "code": 0.7}


def gtpo_weights(
    tokens: Tensor,
    advantages: Tensor,
    group: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    w_pos: float = 2.0,
    w_neg: float = 0.0,
    variant: Variant = "paper",
) -> tuple[Tensor, Tensor]:
    """The weights of the tokens, like `tokens`, and what the release divides each row by, [B]: 1 in the paper."""
    _check_variant(variant)
    runs = conflict_runs(tokens, advantages, group, mask, cu_seqlens=cu_seqlens)
    combine: Literal["max_once", "product"] = "product" if variant == "code" else "max_once"
    weights = conflict_weights(
        tokens, advantages, group, mask, cu_seqlens=cu_seqlens, w_pos=w_pos, w_neg=w_neg, combine=combine, runs=runs
    )
    longest = torch.maximum(runs.forward, runs.backward).clamp_min(1)
    return weights, longest.to(weights.dtype) if variant == "code" else torch.ones_like(longest, dtype=weights.dtype)


def gtpo_objective(
    logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    divisor: Tensor | None = None,
    gamma: float = 0.1,
    threshold: float | None = None,
    h_init: float | None = None,
    variant: Variant = "paper",
    token_weight: Tensor | None = None,
) -> LossOutput:
    """The loss, from log-probs and entropies of the current policy and the weights of :func:`gtpo_weights`.

    logp, entropy, weights: [B, T] with a bool mask, or packed [N] with cu_seqlens. advantages: [B], centred. divisor: [B].
    Gradient to logp only. threshold: None for the variant's own.
    """
    _check_variant(variant)
    threshold = THRESHOLDS[variant] if threshold is None else threshold
    h = sequence_mean(entropy.detach(), mask, cu_seqlens=cu_seqlens)
    shaped = advantages - gamma * h
    if variant == "code" or h_init is None or h_init <= threshold:
        shaped = torch.where(h <= threshold, shaped, 0.0)  # false for NaN
    if divisor is not None:
        shaped = shaped / divisor
    loss, metrics = policy_loss(
        logp, logp.detach(), shaped, mask, cu_seqlens=cu_seqlens, token_weight=multiply(weights, token_weight), agg="trl-grpo",
        norm=1.0 if variant == "code" else None,
    )  # fmt: skip
    kept = (h <= threshold).to(h.dtype).mean()
    return LossOutput(loss, {**metrics, "sequence_entropy": h.mean(), "kept_sequences": kept})


def gtpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor,
    rewards: Tensor,
    group: Tensor,
    *,
    gamma: float = 0.1,
    threshold: float | None = None,
    h_init: float | None = None,
    w_pos: float = 2.0,
    w_neg: float = 0.0,
    variant: Variant = "paper",
) -> LossOutput:
    """Everything in one call, from hidden states [B, T, H] at the positions that predict `tokens` [B, T], and the head [V, H].

    Gradient to hidden and weight. mask: bool [B, T], True for the tokens of a completion, which must be a prefix of its row.
    """
    head = linear_logprobs(hidden, weight, tokens.masked_fill(~mask, -100), outputs=("entropy",))
    assert head.entropy is not None
    advantages = group_advantages(rewards, group, estimator="dr_grpo").advantages
    weights, divisor = gtpo_weights(tokens, advantages, group, mask, w_pos=w_pos, w_neg=w_neg, variant=variant)
    return gtpo_objective(
        head.logp, head.entropy, advantages, weights, mask, divisor=divisor, gamma=gamma, threshold=threshold, h_init=h_init,
        variant=variant,
    )  # fmt: skip


def _check_variant(variant: str) -> None:
    if variant not in THRESHOLDS:
        raise ValueError(f"variant is {variant!r}; accepted: 'paper', 'code'")


@dataclass(frozen=True)
class GTPO(Recipe):
    """Centred rewards, conflict weights, entropy filter and pressure; no ratios against an older policy."""

    name: ClassVar[str] = "gtpo"
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    needs_entropy: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True
    gamma: float = 0.1
    threshold: float | None = None
    h_init: float | None = None
    w_pos: float = 2.0
    w_neg: float = 0.0
    variant: Variant = "paper"

    def advantages(self, rollout: Rollout) -> Tensor:
        return group_advantages(rollout.rewards, rollout.group, estimator="dr_grpo").advantages

    def prepare(self, rollout: Rollout) -> Batch:
        batch = super().prepare(rollout)
        assert rollout.tokens is not None
        batch["weights"], batch["divisor"] = gtpo_weights(
            rollout.tokens, batch["advantages"], rollout.group, rollout.mask, cu_seqlens=rollout.cu_seqlens, w_pos=self.w_pos,
            w_neg=self.w_neg, variant=self.variant,
        )  # fmt: skip
        return batch

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        h = self.checked_entropy(entropy)
        assert h is not None
        return gtpo_objective(
            logp, h, batch["advantages"], batch["weights"], batch.get("mask"), cu_seqlens=batch.get("cu_seqlens"),
            divisor=batch["divisor"], gamma=self.gamma, threshold=self.threshold, h_init=self.h_init, variant=self.variant,
            token_weight=batch.get("token_weight"),
        )  # fmt: skip


recipe = GTPO()
