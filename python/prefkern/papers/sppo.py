r"""SPPO: self-play in which log-ratios are regressed on win probabilities, each response by itself.

Wu et al., "Self-Play Preference Optimization for Language Model Alignment", arXiv:2405.00675.
Evidence: code. Losses, gradients, win probabilities and the choice of pairs were checked against the authors' release.

Of K responses to one prompt, drawn from :math:`\pi_t` and scored :math:`s_1..s_K` by a preference model (log-odds):

.. math:: P_{ij} = \sigma(s_i - s_j), \quad P_{ii} = \tfrac12, \qquad p_i = \frac1K \sum_j P_{ij}

(`win_probability`). The pair w, l is the first best and the first worst, and :math:`p_{wl} = P_{wl}` (`sppo_select`). With
:math:`r_y = \log\pi(y) - \log\pi_t(y)`, sums over tokens, and :math:`\eta = 1/\beta`:

.. math::
    \text{"sppo"} &:\ \tfrac12 \bigl[(r_w - \eta(p_w - \tfrac12))^2 + (r_l - \eta(p_l - \tfrac12))^2\bigr] \\
    \text{"single"} &:\ \tfrac12 \bigl[(r_w - \eta(p_{wl} - \tfrac12))^2 + (r_l + \eta(p_{wl} - \tfrac12))^2\bigr] \\
    \text{"hard"} &:\ (r_w - \tfrac\eta2)^2 + (r_l + \tfrac\eta2)^2 \\
    \text{all responses} &:\ \bigl(r_y - \eta(p_y - \tfrac12)\bigr)^2

each averaged (`sppo_loss`, `sppo_all_loss`). Targets and :math:`\pi_t` are constants. In the next iteration the new policy
samples and is the reference.

Where paper and release differ: the paper regresses every response, the release the best and the worst ("sppo", the default).
The release counts a response's comparison with itself, which pulls p towards 1/2 by (K-1)/K; `include_self=False` leaves it
out. "hard" is what TRL and Liger call `sppo_hard`: twice "single" with :math:`p_{wl} = 1`; their beta of 0.1 is an eta of 10.
verl's recipe has another target, :math:`\eta (R - \log \overline{e^{R}})` with the mean over the whole batch, rewards R and
eta 1 (`target="centered_reward"` of `sppo_all_loss`). The release's losses become float64 by accident; here they have the dtype
of the log-probs.

The loss drops :math:`\log Z`: where :math:`\pi` is free to be unnormalised, its minimiser :math:`\pi_t e^{\eta(p - 1/2)}` need
not sum to 1.

Defaults: eta 1000, K = 5, three iterations. Targets of hundreds of nats, and losses of 1e5, are normal. Equal scores leave no
pair: w = l = 0, targets 0, and `keep` is False unless `drop_ties=False`. K = 1 is a warning: its target is 0.
"""

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice
from ..ops import LossOutput, preference_loss
from ..ops.preference import Reduction
from ._about import About
from ._pairs import PairRecipe, Pairs
from ._shared import check_rows, check_values, may_look

about = About(
    name="SPPO",
    title="Self-Play Preference Optimization for Language Model Alignment",
    arxiv="2405.00675",
    year=2024,
    family="pairwise, self-play",
    evidence="code",
    note="the authors' release; verl's target as its recipe documents it",
)


Mode = Literal["sppo", "single", "hard"]
MODES = ("sppo", "single", "hard")
Target = Literal["win_probability", "centered_reward"]
TARGETS = ("win_probability", "centered_reward")


class SPPOPairs(NamedTuple):
    """The pair of each prompt, all [B]: indices, win probabilities against the group and of the pair, and which pairs count."""

    chosen: Tensor
    rejected: Tensor
    chosen_win: Tensor
    rejected_win: Tensor
    pair_win: Tensor
    keep: Tensor


def sppo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_win: Tensor | None = None,
    rejected_win: Tensor | None = None,
    pair_win: Tensor | None = None,
    *,
    eta: float = 1000.0,
    mode: Mode = "sppo",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of P pairs, all [P]. Gradient to chosen_logp and rejected_logp.

    chosen_logp ...: sums over tokens; the reference is the policy that sampled in this iteration.
    chosen_win, rejected_win: "sppo" reads these two, the win probabilities against the group. pair_win: "single" reads this
    one, that chosen beats rejected. "hard" reads none. All are in [0, 1] and as `sppo_select` gives them.
    mask: bool, the pairs that count: `keep` of `sppo_select`.

    Metrics: those of `prefkern.preference_loss`; rewards are r_w and r_l ("hard": divided by eta).
    """
    choice("mode", mode, MODES)
    _check_eta(eta)
    wins = {"chosen_win": chosen_win, "rejected_win": rejected_win, "pair_win": pair_win}
    reads = {"sppo": ("chosen_win", "rejected_win"), "single": ("pair_win",), "hard": ()}[mode]
    check_rows(len(chosen_logp), mask=mask, **wins)
    targets = []
    for name in reads:
        p = wins[name]
        if p is None:
            raise ValueError(f"{name} is None; mode {mode!r} needs it")
        p = _checked_wins(name, p, mask)
        targets.append(eta * (p.to(torch.promote_types(chosen_logp.dtype, torch.float32)) - 0.5))
    pairs = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    if mode == "hard":
        return preference_loss(*pairs, kind="sppo_hard", beta=1 / eta, mask=mask, reduction=reduction)
    return preference_loss(
        *pairs, kind="squared_targets", beta=1.0, factor=0.5, chosen_target=targets[0],
        rejected_target=targets[1] if mode == "sppo" else -targets[0], mask=mask, reduction=reduction,
    )  # fmt: skip


def sppo_all_loss(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor | None = None,
    *,
    win: Tensor | None = None,
    eta: float | None = None,
    target: Target = "win_probability",
    include_self: bool = True,
    reduction: Reduction = "mean",
) -> LossOutput:
    """The loss of all K responses to each of B prompts, all [B, K]. Gradient to logp.

    scores: of a preference model, in log-odds; or `win`, probabilities in [0, 1] of beating the policy that sampled.
    target: "centered_reward" takes scores as rewards and centres them by the log of the mean of their exponentials over the
    whole batch.
    eta: None is 1000, or 1 for "centered_reward".

    Metrics: log_ratio (mean r), target (mean), error (the mean of their absolute differences).
    """
    choice("target", target, TARGETS)
    choice("reduction", reduction, ("mean", "sum", "none"))
    if (scores is None) == (win is None):
        raise ValueError("exactly one of scores and win is expected")
    if target == "centered_reward" and scores is None:
        raise ValueError('scores is None; target "centered_reward" needs them')
    eta = eta if eta is not None else 1.0 if target == "centered_reward" else 1000.0
    _check_eta(eta)
    for name, t in (("ref_logp", ref_logp), ("scores", scores), ("win", win)):
        if t is not None and t.shape != logp.shape:
            raise ValueError(f"{name} has shape {list(t.shape)}; {list(logp.shape)} is expected")
    dtype = torch.promote_types(logp.dtype, torch.float32)
    r = logp.to(dtype) - ref_logp.detach().to(dtype)
    if scores is not None and target == "centered_reward":
        if may_look(scores) and not bool(scores.isfinite().all()):
            raise ValueError('scores has an entry that is not finite; target "centered_reward" needs finite rewards')
        scores = scores.detach().to(dtype)
        goal = eta * (scores - (scores.flatten().logsumexp(0) - math.log(max(scores.numel(), 1))))
    else:
        p = win_probability(scores, include_self=include_self) if scores is not None else win
        assert p is not None
        goal = eta * (_checked_wins("win", p, None).to(dtype) - 0.5)
    squares = (r - goal).square()
    metrics = {
        "log_ratio": r.detach().mean(), "target": goal.mean(), "error": (r.detach() - goal).abs().mean()
    }  # fmt: skip
    if reduction == "none":
        return LossOutput(squares, metrics)
    return LossOutput(squares.mean() if reduction == "mean" else squares.sum(), metrics)


def win_probability(scores: Tensor, *, include_self: bool = True) -> Tensor:
    """How likely each of K responses beats one of its group, [..., K], from scores [..., K] in log-odds.

    include_self: count the comparison of a response with itself, 1/2, as the release does. Without it K = 1 gives 1/2.
    """
    scores = _checked_scores(scores)
    k = scores.shape[-1]
    total = _pair_wins(scores).sum(-1)  # its diagonal is 1/2
    if include_self:
        return total / k
    return (total - 0.5) / (k - 1) if k > 1 else total


def sppo_select(scores: Tensor, *, include_self: bool = True, drop_ties: bool = True) -> SPPOPairs:
    """The first best and the first worst of each prompt's K responses, from scores [B, K].

    drop_ties: keep is False where all scores are equal, since such a "pair" is one response twice.
    """
    scores = _checked_scores(scores)
    if scores.dim() != 2:
        raise ValueError(f"scores has shape {list(scores.shape)}; [B, K] is expected")
    chosen, rejected = scores.argmax(-1), scores.argmin(-1)
    win = win_probability(scores, include_self=include_self)

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    pair_win = torch.sigmoid(_difference(at(scores, chosen), at(scores, rejected)))
    keep = chosen != rejected if drop_ties else torch.ones_like(chosen, dtype=torch.bool)
    return SPPOPairs(chosen, rejected, at(win, chosen), at(win, rejected), pair_win, keep)


def _checked_wins(name: str, p: Tensor, mask: Tensor | None) -> Tensor:
    """Win probabilities as constants; NaN where they are none and that may not be looked at."""
    p = p.detach()
    good = (p >= 0) & (p <= 1)
    check_values(name, p, good if mask is None else good | ~mask, "a probability in [0, 1] is expected")
    return torch.where(good, p, torch.nan)


def _check_eta(eta: float) -> None:
    if not 0 < eta < math.inf:
        raise ValueError(f"eta is {eta}; it must be positive and finite")


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b, and 0 for equal infinities."""
    return torch.where(a == b, 0.0, a - b)


def _pair_wins(scores: Tensor) -> Tensor:
    return torch.sigmoid(_difference(scores.unsqueeze(-1), scores.unsqueeze(-2)))


def _checked_scores(scores: Tensor) -> Tensor:
    """Scores as constants in float32 or float64; no NaN, which would win every argmax."""
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores has shape {list(scores.shape)}; [..., K] with K of at least 1 is expected")
    if scores.shape[-1] == 1:
        warnings.warn("scores has one response per prompt: every win probability is 1/2 and every target 0", stacklevel=3)
    if may_look(scores) and bool(scores.isnan().any()):
        raise ValueError(f"scores{scores.isnan().nonzero()[0].tolist()} is nan; a number is expected")
    scores = scores.detach()
    return scores if scores.dtype == torch.float64 else scores.float()


@dataclass(frozen=True)
class SPPO(PairRecipe):
    """Both log-ratios regressed on win probabilities. The reference is the policy that sampled.

    `pairs.extra` holds what the mode reads, "chosen_win" and "rejected_win", or "pair_win", [P] each, and may hold "keep",
    bool: all as `sppo_select` gives them.
    """

    name: ClassVar[str] = "sppo"
    eta: float = 1000.0
    mode: Mode = "sppo"

    def pair_loss(self, pairs: Pairs) -> LossOutput:
        chosen, rejected = pairs.log_ratios()
        sides = (chosen, rejected, torch.zeros_like(chosen).detach(), torch.zeros_like(rejected).detach())
        wins = (pairs.get("chosen_win"), pairs.get("rejected_win"), pairs.get("pair_win"))
        return sppo_loss(*sides, *wins, eta=self.eta, mode=self.mode, mask=pairs.get("keep"))


recipe = SPPO()
