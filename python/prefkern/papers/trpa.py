r"""TRPA: preference levels instead of rewards; all pairs of a group, and a KL to the policy that sampled.

Su et al., "Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM reasoning",
arXiv:2504.04524.
Evidence: code. Value and gradient were checked against the authors' release.

Every completion has a level, 1 being the best. With :math:`h_i` the mean over its tokens of
:math:`\log\pi - \log\pi_\mathrm{ref}`, and P the pairs (i, j) of one group with level i below level j, of all groups of the
batch together:

.. math::
    m_{ij} = \kappa_i \beta (h_i - h_j), \quad
    \kappa_i = \begin{cases} 2.5 & \text{level}_i = 1 \\ 1 & \text{else} \end{cases}, \qquad
    L_\mathrm{pair} = \frac1P \sum_{(i,j)} -\log\sigma(m_{ij})

.. math::
    \mathrm{KL} = \frac1M \sum_{i,t} \mathrm{clamp}(e^{x} - x - 1, -10, 10), \quad x = \log\pi_\mathrm{old} - \log\pi, \qquad
    L = L_\mathrm{pair} + c\,\mathrm{KL} \;\text{ or }\; L_\mathrm{pair} + c \sqrt{\mathrm{KL} + \tfrac14}

Where the clamp binds the KL has no gradient. The reference and the old policy are constants. Groups with many pairs weigh more.
A batch without any pair gets, as in the release, the mean of :math:`-\log\sigma(\pm h_i)`, plus at level 1, without beta and
kappa (`no_pairs="fallback"`), or nothing (`"zero"`); the metric `n_pairs` says so.

Where the paper differs from the release, which is followed: it states sequence log-ratios (`length_norm=False`), and by a
reader's account a factor that belongs to each response rather than to the winner of the pair (`per_response=True`; inferred).
The release forms pairs within a micro-batch, here within what the loss is given. Its entropy bonus is off by default and left
to the caller; its KL to the reference is logged, not added, and here left out.

Defaults are those of the main script: beta 0.1, anisotropy 2.5, tr_coef 1e-3. A group of one makes no pair (the release
raises). A completion without tokens and a level below 1 are ValueErrors.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, kl_penalty, level_pairs, sequence_mean, sequence_sum
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_rows, check_values

about = About(
    name="TRPA",
    title="Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM reasoning",
    arxiv="2504.04524",
    year=2025,
    family="pairwise on groups",
    evidence="code",
    note="the authors' release",
)


def logic_levels(well_formed: Tensor, answered: Tensor, correct: Tensor) -> Tensor:
    """The release's levels for logic puzzles, int64 [B], from bools [B].

    1: well formed and correct. 2: well formed, an answer that is wrong. 3: well formed, no answer can be parsed. 4: ill formed.
    """
    levels = torch.where(correct & answered, 1, torch.where(answered, 2, 3))
    return torch.where(well_formed, levels, 4)


def trpa_loss(
    logp: Tensor,
    ref_logp: Tensor,
    old_logp: Tensor,
    mask: Tensor | None,
    group: Tensor,
    levels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    anisotropy: float = 2.5,
    tr_coef: float = 1e-3,
    sqrt_kl: bool = False,
    kl_clamp: float | None = 10.0,
    length_norm: bool = True,
    no_pairs: Literal["fallback", "zero"] = "fallback",
    per_response: bool = False,
) -> LossOutput:
    """The loss of completions in groups given by id [B], with int64 levels [B] from 1. Gradient to logp only.

    logp, ref_logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens.

    Metrics: pair_loss, kl (to the old policy), n_pairs, log_ratio (mean h).
    """
    choice("no_pairs", no_pairs, ("fallback", "zero"))
    check_rows(len(group), group=group, levels=levels)
    lengths = sequence_sum(torch.ones_like(old_logp), mask, cu_seqlens=cu_seqlens)
    check_values("lengths", lengths, lengths > 0, "every completion needs a token that counts")
    reduce = sequence_mean if length_norm else sequence_sum
    h = reduce(logp, mask, cu_seqlens=cu_seqlens, minus=ref_logp)
    h = torch.where(lengths > 0, h, torch.nan)
    pair_loss, pairs = level_pairs(h, group, levels, beta=beta, anisotropy=anisotropy, per_response=per_response)
    if no_pairs == "fallback":
        pair_loss = torch.where(pairs > 0, pair_loss, F.softplus(torch.where(levels == 1, -h, h)).mean())
    kl = kl_penalty(logp, old_logp, mask, cu_seqlens=cu_seqlens, kl="k3", kl_clamp=kl_clamp)
    trust = (kl + 0.25).sqrt() if sqrt_kl else kl
    metrics = {"pair_loss": pair_loss.detach(), "kl": kl.detach(), "n_pairs": pairs, "log_ratio": h.detach().mean()}
    return LossOutput(pair_loss + tr_coef * trust, metrics)


@dataclass(frozen=True)
class TRPA(Recipe):
    """Pairs of levels within each group, and a trust region around the policy that sampled."""

    name: ClassVar[str] = "trpa"
    needs: ClassVar[tuple[str, ...]] = ("levels", "ref_logp")
    takes: ClassVar[tuple[str, ...]] = ("levels",)
    whole_groups: ClassVar[bool] = True
    takes_token_weight: ClassVar[bool] = False
    beta: float = 0.1
    anisotropy: float = 2.5
    tr_coef: float = 1e-3
    sqrt_kl: bool = False
    kl_clamp: float | None = 10.0
    length_norm: bool = True
    no_pairs: Literal["fallback", "zero"] = "fallback"
    per_response: bool = False

    def advantages(self, rollout: Rollout) -> Tensor:
        """The rewards, which the loss does not look at: levels are all it knows."""
        return rollout.rewards

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        output = trpa_loss(
            logp, batch["ref_logp"], batch.get("old_logp", logp.detach()), batch.get("mask"), batch["group"], batch["levels"],
            cu_seqlens=batch.get("cu_seqlens"), **self.options(),
        )  # fmt: skip
        return self.with_entropy(output, batch, entropy)


recipe = TRPA()
