r"""DisCO: right answers are scored above wrong ones, question by question, under a bound on the step's KL.

Li et al., "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization", arXiv:2505.12366.
Evidence: code. Value and gradient of all four objectives were checked against the authors' release.

Scores of completion i with :math:`L_i` tokens, :math:`d_{it} = \log\pi(o_{it}) - \log\pi_\mathrm{old}(o_{it})`; no clipping
anywhere:

.. math:: s_i = \frac1{L_i}\sum_t \log\pi(o_{it}) \;\text{(logL)}, \qquad s_i = \frac1{L_i}\sum_t e^{d_{it}} \;\text{(Lratio)}

Positive is a reward of exactly 1, negative of exactly 0; any other finite one is neither. With V the questions that have both,
Q all of them:

.. math::
    J_\mathrm{b} &= \frac1Q \sum_{g \in V} \Bigl[\mathrm{mean}_+ s - \mathrm{mean}_- s\Bigr] && \text{(DisCO-b)} \\
    J &= \frac1Q \sum_{g \in V} \Bigl[\mathrm{mean}_+ s - \tau \log \mathrm{mean}_-\, e^{s/\tau}\Bigr] && \text{(DisCO)} \\
    L &= -J + \tfrac{\beta}{2} \max(\mathrm{KL} - \delta, 0)^2

`tau=None` is DisCO-b. KL is one number for the batch, over its M tokens: :math:`\frac1M\sum -d` ("k1", can be negative; the
release's `kl`) or :math:`\frac1M\sum (e^d - 1 - d)` ("k3", its `low_var_kl`). Nothing is detached. :math:`\beta` is the
coefficient of the gradient, :math:`\beta \max(\mathrm{KL} - \delta, 0) \nabla \mathrm{KL}`, as in the release; a penalty
printed as :math:`\beta [\cdot]_+^2` is twice that.

The loss is the true value above. What the release prints, in the metric `loss_reference`, has the same gradient but another
value: it replaces :math:`\tau \log\mathrm{mean}\, e^{s/\tau}` by :math:`\tau`, and the penalty by
:math:`\beta \max(\mathrm{KL} - \delta, 0)\,\mathrm{KL}`. At the checked commit its dispatch of `disco_Lratio` fails and the
scripts for DisCO-b select DisCO; the functions are followed.

Defaults are those of the release's scripts: beta 1e3, delta 1e-4, k1; tau 10 for logL, 1 for Lratio. A question with answers of
one class adds nothing to J but counts in Q (`count_degenerate=False`: in neither), and its tokens count in KL. A completion
without tokens is in no class. An empty mask is a ValueError; without a valid question only the penalty is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, group_reduce, sequence_mean, sequence_sum
from ._about import About
from ._recipe import Batch, Recipe, Rollout
from ._shared import check_rows, check_values, may_look

about = About(
    name="DisCO",
    title="DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization",
    arxiv="2505.12366",
    year=2025,
    family="objective",
    evidence="code",
    note="the authors' release, all four objectives",
)


def disco_scores(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    score: Literal["logL", "Lratio"] = "logL",
) -> Tensor:
    """s, [B]; 0 for a completion without tokens. Gradient to logp.

    logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens. old_logp is not looked at for "logL".
    """
    choice("score", score, ("logL", "Lratio"))
    if score == "logL":
        return sequence_mean(logp, mask, cu_seqlens=cu_seqlens)
    return sequence_mean(logp, mask, cu_seqlens=cu_seqlens, minus=old_logp, transform="exp")


def disco_loss(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor | None,
    group: Tensor,
    rewards: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    score: Literal["logL", "Lratio"] = "logL",
    tau: float | None = None,
    beta: float = 1e3,
    delta: float = 1e-4,
    kl: Literal["k1", "k3"] = "k1",
    count_degenerate: bool = True,
    process_group: Any = None,
) -> LossOutput:
    """The loss of completions in groups given by id [B], with rewards [B]. Gradient to logp only.

    logp, old_logp: [B, T] with a bool mask, or packed [N] with cu_seqlens.
    tau: None is DisCO-b.
    process_group: a group of torch.distributed, or "world". The KL, J and Q are then those of all its ranks together, each
    holding whole groups, by one all-reduce: every rank returns the loss of all, with a gradient whose mean over the ranks is
    that loss's. Where one rank refuses its arguments, the others raise too; a rank may have no token.

    Metrics: loss_reference, kl, objective (J), n_valid (questions in V), questions.
    """

    def sums() -> Tensor:
        return _sums(logp, old_logp, mask, group, rewards, cu_seqlens, score, tau, kl)

    gain, plus_sum, n_valid, questions, kl_sum, tokens = _over_ranks(sums, logp, process_group).unbind(0)
    if may_look(tokens) and not bool(tokens != 0):
        raise ValueError("empty mask: no token counts; at least one must")
    divisor = (questions if count_degenerate else n_valid).clamp_min(1)
    objective, step = gain / divisor, kl_sum / tokens
    excess = (step - delta).clamp_min(0)
    loss = -objective + beta / 2 * excess.square()

    printed = objective if tau is None else (plus_sum - tau * n_valid) / divisor
    metrics = {
        "loss_reference": -printed + beta * excess * step, "kl": step, "objective": objective, "n_valid": n_valid,
        "questions": questions,
    }  # fmt: skip
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def _sums(
    logp: Tensor, old_logp: Tensor, mask: Tensor | None, group: Tensor, rewards: Tensor, cu_seqlens: Tensor | None,
    score: Literal["logL", "Lratio"], tau: float | None, kl: str,
) -> Tensor:  # fmt: skip
    """What the loss is made of, [6]: the sum of J's terms, of their positive parts, |V|, Q, the sum of the KL, M."""
    choice("kl", kl, ("k1", "k3"))
    if tau is not None and not tau > 0:
        raise ValueError(f"tau is {tau}; it must be positive, or None for DisCO-b")
    check_rows(len(group), group=group, rewards=rewards)
    check_values("rewards", rewards, rewards.isfinite(), "every reward must be finite")
    lengths = sequence_sum(torch.ones_like(old_logp), mask, cu_seqlens=cu_seqlens)
    s = disco_scores(logp, old_logp, mask, cu_seqlens=cu_seqlens, score=score)
    positive, negative = ((rewards == value) & (lengths > 0) for value in (1, 0))
    n_pos, n_neg = (group_reduce(of.to(s.dtype), group) for of in (positive, negative))
    valid = (n_pos > 0) & (n_neg > 0)
    plus = group_reduce(s, group, mask=positive, reduce="mean")
    if tau is None:
        minus = group_reduce(s, group, mask=negative, reduce="mean")
    else:
        minus = tau * (group_reduce(s / tau, group, mask=negative, reduce="logsumexp") - n_neg.clamp_min(1).log())

    share = 1 / group_reduce(torch.ones_like(n_pos), group, reduce="count")  # of a row in its question
    d = sequence_sum(logp, mask, cu_seqlens=cu_seqlens, minus=old_logp)
    if kl == "k3":
        d = d + lengths - sequence_sum(logp, mask, cu_seqlens=cu_seqlens, minus=old_logp, transform="exp")
    return torch.stack([
        (torch.where(valid, plus - minus, 0.0) * share).sum(),
        (torch.where(valid, plus, 0.0) * share).sum().detach(),
        (valid * share).sum().round(),
        share.sum().round(),
        -d.sum() + (rewards.detach() * 0).sum().to(d.dtype),  # NaN if a reward is not finite: it would else be of no class
        lengths.sum(),
    ])  # fmt: skip


def _over_ranks(make: Callable[[], Tensor], like: Tensor, process_group: Any) -> Tensor:
    """The sum over ranks. Its gradient is that of the local part times the number of ranks, for ranks that average theirs."""
    if process_group is None:
        return make()
    from ..distributed._ranks import ranks_of
    from ..distributed.collectives import sum_of

    return sum_of(lambda: [make()], ranks_of(process_group), "disco_loss", "mean", like)[0]


@dataclass(frozen=True)
class DisCO(Recipe):
    """Right above wrong within each question, under a bound on the KL of the step."""

    name: ClassVar[str] = "disco"
    whole_groups: ClassVar[bool] = True
    takes_token_weight: ClassVar[bool] = False
    score: Literal["logL", "Lratio"] = "logL"
    tau: float | None = 10.0
    """10 belongs to "logL", 1 to "Lratio"; None is DisCO-b."""
    beta: float = 1e3
    delta: float = 1e-4
    kl: Literal["k1", "k3"] = "k1"
    count_degenerate: bool = True
    process_group: Any = None

    def advantages(self, rollout: Rollout) -> Tensor:
        """The rewards: the loss itself compares them."""
        return rollout.rewards

    def loss(self, logp: Tensor, batch: Batch, *, entropy: Tensor | None = None) -> LossOutput:
        output = disco_loss(
            logp, batch.get("old_logp", logp.detach()), batch.get("mask"), batch["group"], batch["advantages"],
            cu_seqlens=batch.get("cu_seqlens"), **self.options(),
        )  # fmt: skip
        return self.with_entropy(output, batch, entropy)


recipe = DisCO()
