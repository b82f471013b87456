r"""CGPO: constrained generative policy optimisation. A mixture of judges decides which answers may be rewarded at all.

Xu et al., "The Perfect Blend: Redefining RLHF with Mixture of Judges", arXiv:2409.20370.
Evidence: paper. From its equations; the authors released no code. For positive rewards values and gradients were checked
against TRL's unmerged pull request #2190.

Of a response: reward r, reward :math:`r_b` of the prompt's baseline response, `ok` if every judge is satisfied, and sums over
its tokens of log-probs under the current policy, the one that sampled (old) and the reference. Equations 5, 8 and 11:

.. math::
    R_\mathrm{calib} &= \sigma(r - r_b) \\
    \tilde R &= \max\Bigl(1 - \frac{\log\pi_\mathrm{old} - \log\pi_\mathrm{ref}}{\mathrm{KL}_{\max}},\, 0\Bigr)\,
    R_\mathrm{calib} \,[\mathrm{ok}]

The factor is above 1 where the old policy is below the reference (`kl_factor_max` caps it; not in the paper).

- **CRPG** (12): :math:`L = -\frac1n \sum (\tilde R - \mathrm{mean}\,\tilde R) \log\pi`, the mean being over the whole batch:
  violators are pushed down by it. `norm="token"` divides by the tokens of all responses instead.
- **CODPO** (13 to 15): of each prompt the best response that is ok against the worst that is not, or if all are ok against the
  worst: :math:`-\log\sigma(\beta(h_c - h_r)) - \frac{\lambda}{|a_c|} \log\pi(a_c)`, :math:`h = \log\pi - \log\pi_\mathrm{ref}`;
  mean over the prompts that have such a pair.
- **CRRAFT** (17, 18): of each prompt the best response that is ok and has
  :math:`\log\pi_\mathrm{old} - \log\pi_\mathrm{ref} \le \mathrm{KL}_{\max}`, else the baseline response if it is:
  :math:`-\frac1n \sum R_\mathrm{calib} \log\pi`, n all prompts. The baseline's own weight is 1/2.
- Several tasks: a weighted sum of their losses (:func:`cgpo_multitask`).

No gradient flows through rewards, verdicts or the old policy. Where the paper slips it is read as meant: equation 15 descends,
the KL of CRRAFT is a log-ratio, judges are combined by "all". TRL's CODPO multiplies rewards by the verdict and so picks
otherwise when rewards are negative; here verdicts mask. Ties go to the first row; a pair of a response with itself is skipped.
Defaults: beta 0.1 and lambda 5 are TRL's; KL_max has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, group_reduce, sequence_sum
from ._about import About
from ._recipe import Recipe, Rollout
from ._shared import check_rows, check_values

about = About(
    name="CGPO",
    title="The Perfect Blend: Redefining RLHF with Mixture of Judges",
    arxiv="2409.20370",
    year=2024,
    family="reward, pairwise, ranking",
    evidence="paper",
    note="its equations; TRL's unmerged pull request agrees for positive rewards",
)

Norm = Literal["sequence", "token"]
NORMS = ("sequence", "token")


class ConstrainedPairs(NamedTuple):
    """One pair of rows per prompt, or none."""

    chosen: Tensor
    """bool [B]: at most one row of a prompt."""
    rejected: Tensor
    """bool [B]: another row of the same prompt, wherever one is chosen."""


def cgpo_rewards(
    rewards: Tensor,
    r_base: Tensor,
    judge_pass: Tensor | None,
    old_logp: Tensor,
    ref_logp: Tensor,
    kl_max: float,
    *,
    kl_factor_max: float | None = None,
) -> Tensor:
    """Regularised rewards [B]. Constants.

    rewards, r_base: [B], of the response and of its prompt's baseline. old_logp, ref_logp: [B], sums over tokens.
    judge_pass: bool, or 0 and 1, [B] or for several judges [B, J]; None: there are no judges.
    """
    if not kl_max > 0:
        raise ValueError(f"kl_max is {kl_max}; it must be positive")
    check_rows(len(rewards), rewards=rewards, r_base=r_base, old_logp=old_logp, ref_logp=ref_logp)
    ok = _verdicts(judge_pass, rewards)
    factor = (1 - (old_logp - ref_logp).detach() / kl_max).clamp(0, kl_factor_max)
    return factor * _calibrated(rewards, r_base) * ok


def crpg_loss(logp: Tensor, rewards: Tensor, *, norm: Norm = "sequence", lengths: Tensor | None = None) -> LossOutput:
    """CRPG, from sums of log-probs [B] and the rewards [B] of :func:`cgpo_rewards`. Gradient to logp.

    lengths: [B], for norm "token".
    """
    check_rows(len(logp), logp=logp, rewards=rewards, lengths=lengths)
    weights = (rewards - rewards.mean()).detach().to(logp.dtype)
    loss = -(weights * logp).sum() / _divisor(norm, lengths, len(logp))
    return LossOutput(loss, {"reward_mean": rewards.detach().mean(), "rewarded": (rewards > 0).to(logp.dtype).mean()})


def constrained_select(rewards: Tensor, judge_pass: Tensor | None, group: Tensor) -> ConstrainedPairs:
    """The best row that is ok, and the worst that is not, or if all are ok the worst; of prompts given by id [B].

    A prompt without a row that is ok, or whose two rows are the same, has neither.
    """
    rewards = rewards.detach() if rewards.is_floating_point() else rewards.detach().float()
    ok = _verdicts(judge_pass, rewards) == 1
    chosen = _first(rewards, group, ok, "max")
    all_ok = group_reduce((~ok).to(rewards.dtype), group, reduce="max") == 0
    rejected = _first(rewards, group, ~ok | all_ok, "min")
    pair = (group_reduce(chosen.to(rewards.dtype), group) > 0) & (
        group_reduce((chosen & rejected).to(rewards.dtype), group) == 0
    )
    return ConstrainedPairs(chosen & pair, rejected & pair)


def codpo_loss(
    logp: Tensor,
    ref_logp: Tensor,
    rewards: Tensor,
    judge_pass: Tensor | None,
    group: Tensor,
    lengths: Tensor,
    *,
    beta: float = 0.1,
    lam: float = 5.0,
) -> LossOutput:
    """CODPO, from sums of log-probs [B] of responses to prompts given by id [B]. Gradient to logp.

    lengths: [B], tokens of each response. lam: weight of the chosen response's mean negative log-prob; 0 is DPO on the pair.

    Metrics: prompts (that have a pair), margin (mean of h_c - h_r over them). Without a prompt that has a pair the loss is 0.
    """
    check_rows(len(logp), logp=logp, ref_logp=ref_logp, rewards=rewards, group=group, lengths=lengths)
    check_values("lengths", lengths, lengths > 0, "a response needs tokens")
    r = rewards.detach().to(logp.dtype)
    chosen, rejected = constrained_select(r, judge_pass, group)
    h = logp - ref_logp.detach().to(logp.dtype)
    margin = h - group_reduce(h, group, mask=rejected)
    size = torch.where(lengths > 0, lengths, torch.nan)
    each = F.softplus(-beta * margin) - lam * logp / size
    prompts = chosen.sum()
    of_chosen = torch.where(chosen, torch.stack([each, margin.detach()]), 0.0).sum(1) / prompts.clamp_min(1)
    loss = of_chosen[0] + _poison(r, _verdicts(judge_pass, r), size)
    return LossOutput(loss, {"prompts": prompts, "margin": of_chosen[1].detach()})


def crraft_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    rewards: Tensor,
    r_base: Tensor,
    judge_pass: Tensor | None,
    group: Tensor,
    *,
    kl_max: float,
    is_base: Tensor | None = None,
    norm: Norm = "sequence",
    lengths: Tensor | None = None,
) -> LossOutput:
    """CRRAFT, from sums of log-probs [B] of responses to prompts given by id [B]. Gradient to logp.

    is_base: bool [B]: rows that hold a prompt's baseline response, with its reward r_base; None: there are none.
    kl_max: any number. lengths: [B], for norm "token", which divides by the tokens of the responses that were picked.

    Metrics: prompts (all), picked, picked_base.
    """
    check_rows(
        len(logp), logp=logp, old_logp=old_logp, ref_logp=ref_logp, rewards=rewards, r_base=r_base, group=group,
        is_base=is_base, lengths=lengths,
    )  # fmt: skip
    r = rewards.detach().to(logp.dtype)
    verdicts = _verdicts(judge_pass, r)
    feasible = (verdicts == 1) & ((old_logp - ref_logp).detach() <= kl_max)
    base = torch.zeros_like(feasible) if is_base is None else is_base
    sampled = _first(r, group, feasible & ~base, "max")
    fallback = _first(r, group, feasible & base, "max") & (group_reduce(sampled.to(r.dtype), group) == 0)
    picked = sampled | fallback
    weights = _calibrated(r, r_base.to(r.dtype))
    prompts = (1 / group_reduce(torch.ones_like(r), group, reduce="count")).sum().round()
    divisor = _divisor(norm, None if lengths is None else torch.where(picked, lengths, 0), prompts)
    loss = -torch.where(picked, weights * logp, 0.0).sum() / divisor + _poison(r, verdicts)
    return LossOutput(loss, {"prompts": prompts, "picked": picked.sum(), "picked_base": fallback.sum()})


def cgpo_multitask(losses: Sequence[LossOutput | Tensor], rho: Sequence[float]) -> LossOutput:
    """sum_l rho_l L_l over tasks, each with judges, reward model and KL_max of its own. Metrics: loss_0, loss_1, ..."""
    if len(losses) != len(rho) or not losses:
        raise ValueError(f"rho has {len(rho)} weights for {len(losses)} losses; one for each is expected")
    values = [task.loss if isinstance(task, LossOutput) else task for task in losses]
    total = torch.stack([weight * value for weight, value in zip(rho, values, strict=True)]).sum()
    return LossOutput(total, {f"loss_{i}": value.detach() for i, value in enumerate(values)})


def _verdicts(judge_pass: Tensor | None, rewards: Tensor) -> Tensor:
    """Whether all judges are satisfied: 1 or 0, like the rewards [B], which are checked with it. NaN for what is neither."""
    check_values("rewards", rewards, rewards.isfinite(), "every reward must be finite")
    if judge_pass is None:
        return torch.ones_like(rewards)
    if judge_pass.dim() not in (1, 2) or len(judge_pass) != len(rewards):
        raise ValueError(f"judge_pass has shape {list(judge_pass.shape)}; [{len(rewards)}], or that by judges, is expected")
    judges = judge_pass[:, None] if judge_pass.dim() == 1 else judge_pass
    clear = ((judges == 0) | (judges == 1)).all(1)
    check_values("judge_pass", judge_pass, clear, "accepted are bool, or 0 and 1")
    return torch.where(clear, (judges == 1).all(1).to(rewards.dtype), torch.nan)


def _calibrated(rewards: Tensor, r_base: Tensor) -> Tensor:
    check_values("r_base", r_base, r_base.isfinite(), "every reward must be finite")
    return torch.sigmoid(rewards.detach() - r_base.detach())


def _first(rewards: Tensor, group: Tensor, mask: Tensor, reduce: Literal["min", "max"]) -> Tensor:
    """bool [B]: of each group's rows in the mask the first that has their extreme reward."""
    tied = mask & (rewards == group_reduce(rewards, group, mask=mask, reduce=reduce))
    row = torch.arange(len(rewards), device=rewards.device, dtype=torch.float32)
    return tied & (row == group_reduce(row, group, mask=tied, reduce="min"))


def _divisor(norm: str, lengths: Tensor | None, sequences: int | Tensor) -> int | Tensor:
    choice("norm", norm, NORMS)
    if norm == "sequence":
        return sequences
    if lengths is None:
        raise ValueError("lengths is None; norm 'token' needs them")
    return lengths.sum().clamp_min(1)


def _poison(*tensors: Tensor) -> Tensor:
    """0; NaN if something is not finite, which a selection by comparing would pass over."""
    return torch.stack([(t.detach() * 0).sum() for t in tensors]).sum()


@dataclass(frozen=True)
class CGPO(Recipe):
    """CRPG. `extra` holds r_base [B] and judge_pass [B] or [B, J]. `kl_max` must be set."""

    name: ClassVar[str] = "cgpo"
    needs: ClassVar[tuple[str, ...]] = ("r_base", "judge_pass", "old_logp", "ref_logp")
    kl_max: float | None = None
    kl_factor_max: float | None = None
    norm: Norm = "sequence"

    def advantages(self, rollout: Rollout) -> Tensor:
        """R - mean R over the rollout."""
        r_base, judge_pass, old_logp, ref_logp = (rollout.get(name) for name in self.needs)
        assert r_base is not None and old_logp is not None
        if self.kl_max is None:
            raise ValueError("kl_max is None; recipe 'cgpo' needs a positive number, by task")
        log_ratio = sequence_sum(old_logp, rollout.mask, cu_seqlens=rollout.cu_seqlens, minus=ref_logp)
        r = cgpo_rewards(
            rollout.rewards, r_base, judge_pass, log_ratio, torch.zeros_like(log_ratio), self.kl_max,
            kl_factor_max=self.kl_factor_max,
        )  # fmt: skip
        return r - r.mean()

    def loss_options(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        choice("norm", self.norm, NORMS)
        if self.norm == "token":
            return {"kind": "reinforce", "agg": "token-mean"}
        return {"kind": "reinforce", "agg": "trl-dr_grpo", "scale": 1.0}  # token sums, over all rows


recipe = CGPO()
