r"""What preference data and a training run say about each other: can the two sides of pairs be told apart too easily, and do a
trainer and the engine that samples for it agree on the log-probs of the tokens?

Pairs whose sides come from different models tend to be separable by cues that have nothing to do with content; a policy trained
on them learns the cue. The probe here is this library's own: the study that raised the question ("More is Less",
arXiv:2504.02193) names neither its classifier nor the layer. And separability alone does not prove that a cue is exploited:
compare it with that of surface features (:func:`surface_features`), and pairs with others of like margins.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._names import choice

SOLVERS = ("auto", "primal", "dual")
_WIDE = 4096  # features from which on the dual may be cheaper


class LinearProbe(NamedTuple):
    """A linear classifier: a score above 0 means chosen."""

    weight: Tensor
    """[H], float64."""
    bias: Tensor
    """[], float64: the middle between the two classes has the score 0."""

    def scores(self, features: Tensor) -> Tensor:
        """[B], of features [B, H]."""
        return features.to(self.weight.dtype) @ self.weight + self.bias


def linear_probe(
    f_chosen: Tensor, f_rejected: Tensor, *, ridge: float = 1e-3, solver: Literal["auto", "primal", "dual"] = "auto"
) -> LinearProbe:
    r"""Fisher's discriminant with a relative ridge.

    With class means :math:`\mu_c, \mu_r` and S the mean of the two covariances (divisor n),

    .. math::
        w = \bigl(S + \rho \tfrac{\mathrm{tr} S}{H} I\bigr)^{-1} (\mu_c - \mu_r), \qquad b = -w \cdot \tfrac{\mu_c + \mu_r}{2}

    Args:
        f_chosen, f_rejected: features [B, H], or [B] for a single one; computed in float64.
        ridge: rho, above 0. Without any variance the ridge is rho itself.
        solver: ``"primal"`` solves for H numbers, ``"dual"`` for 2B; the result is the same. ``"auto"`` takes the dual for H
            above 4096 if 2B is less than H.
    """
    chosen, rejected = _features(f_chosen, f_rejected)
    _check(ridge, solver)
    return _fit(chosen, rejected, ridge, solver)


def linear_separability(
    f_chosen: Tensor,
    f_rejected: Tensor,
    *,
    groups: Sequence[Hashable] | Tensor | None = None,
    n_folds: int = 5,
    ridge: float = 1e-3,
    solver: Literal["auto", "primal", "dual"] = "auto",
) -> dict[str, float]:
    """How well a linear probe tells chosen from rejected in pairs that it was not fitted to.

    The probe (:func:`linear_probe`) is fitted on all folds but one, scores the pairs of that one, and the scores of all folds
    are pooled. Both sides of a pair are in one fold: pair b in fold b mod n_folds.

    Args:
        f_chosen, f_rejected: features of the two sides, [B, H], or [B] for a single one: hidden states of a base model, pooled
            over the tokens of the response (:func:`pool_features`), say.
        groups: the prompt of each pair, so that all pairs of a prompt are in one fold; else what leaks between folds inflates
            everything. Counted in the order they appear.
        n_folds: at least 2.
        ridge, solver: of the probe.

    Returns:
        - ``accuracy``: mean of [s_c > 0] and [s_r < 0]; 0 counts half;
        - ``auc``: how often a chosen one scores above any rejected one; ties count half;
        - ``pair_accuracy``: how often s_c > s_r within a pair;
        - ``fisher``: (mean s_c - mean s_r)^2 over the mean of the two variances (divisor n); 0 for equal means.

    Raises:
        ValueError: fewer than 2 n_folds pairs, fewer groups than folds, or a feature that is not finite, with its row.
    """
    chosen, rejected = _features(f_chosen, f_rejected)
    _check(ridge, solver)
    if n_folds < 2:
        raise ValueError(f"n_folds is {n_folds}; at least 2 are expected")
    if len(chosen) < 2 * n_folds:
        raise ValueError(
            f"f_chosen has {len(chosen)} rows; at least {2 * n_folds} are expected, two pairs for each of the folds"
        )
    fold = _folds(groups, len(chosen), n_folds).to(chosen.device)
    scores = chosen.new_empty(2, len(chosen))
    for k in range(n_folds):
        out = fold == k
        probe = _fit(chosen[~out], rejected[~out], ridge, solver)
        scores[:, out] = torch.stack([probe.scores(chosen[out]), probe.scores(rejected[out])])
    s_c, s_r = scores
    gap = (s_c.mean() - s_r.mean()).square()
    spread = (s_c.var(correction=0) + s_r.var(correction=0)) / 2
    return {
        "accuracy": float(((s_c.sign() + 1) / 2).mean() + ((1 - s_r.sign()) / 2).mean()) / 2,
        "auc": auc(s_c, s_r),
        "pair_accuracy": float((s_c > s_r).double().mean()),
        "fisher": float(gap / spread) if gap > 0 else 0.0,
    }


def auc(positive: Tensor | Sequence[float], negative: Tensor | Sequence[float]) -> float:
    """How often a positive scores above a negative, ties counting half; of all pairs of the two."""
    p, n = (torch.as_tensor(scores, dtype=torch.float64) for scores in (positive, negative))
    for name, scores in (("positive", p), ("negative", n)):
        if scores.dim() != 1 or not len(scores):
            raise ValueError(f"{name} has shape {list(scores.shape)}; a score or more is expected")
        if bool(scores.isnan().any()):
            raise ValueError(f"{name}[{int(scores.isnan().nonzero()[0])}] is nan")
    n = n.to(p.device).sort().values
    below, not_above = (torch.searchsorted(n, p, right=right) for right in (False, True))
    return float((below + not_above).sum()) / (2 * len(p) * len(n))


def pool_features(hidden: Tensor, mask: Tensor, *, how: Literal["mean", "last"] = "mean") -> Tensor:
    """Features [B, H] of responses: the mean of hidden states [B, T, H] over the tokens that count, or the last of them.

    mask: bool [B, T]; True for tokens of the response. Those of the prompt are the same on both sides and say nothing. What
    lies outside is never looked at. float32, or float64 for float64. ValueError for a row without a token.
    """
    choice("how", how, ("mean", "last"))
    _check_mask(hidden, mask, 3)
    if how == "last":
        last = (mask.cumsum(1) * mask).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].to(_wide(hidden))
    total = torch.where(mask[..., None], hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))
    return total.sum(1, dtype=_wide(hidden)) / mask.sum(1, keepdim=True)


def surface_features(
    chosen_ids: Tensor,
    chosen_mask: Tensor,
    rejected_ids: Tensor,
    rejected_mask: Tensor,
    *,
    chosen_logp: Tensor | None = None,
    rejected_logp: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features that know nothing of content, (chosen, rejected) by name, each for :func:`linear_separability`.

    ``length`` in tokens, ``first_token`` (one column for each that occurs), and with token log-probs under a base model
    ``mean_logp``. If these alone separate as well as hidden states do, the cue is superficial.

    chosen_ids, rejected_ids: tokens [B, T], of any T each, with bool masks of those that count. chosen_logp, rejected_logp:
    like them.
    """
    sides = ((chosen_ids, chosen_mask), (rejected_ids, rejected_mask))
    for ids, mask in sides:
        _check_mask(ids, mask, 2)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    length = [mask.sum(1).double() for _, mask in sides]
    found["length"] = length[0][:, None], length[1][:, None]
    first = [ids.gather(1, mask.int().argmax(1, keepdim=True)) for ids, mask in sides]
    tokens = torch.cat(first).unique()
    found["first_token"] = (first[0] == tokens).double(), (first[1] == tokens).double()
    if (chosen_logp is None) != (rejected_logp is None):
        raise ValueError("one of chosen_logp and rejected_logp is None; both are expected, or neither")
    if chosen_logp is not None and rejected_logp is not None:
        _check_mask(chosen_logp, chosen_mask, 2)
        _check_mask(rejected_logp, rejected_mask, 2)
        means = [
            torch.where(mask, logp.double(), 0.0).sum(1) / mask.sum(1)
            for logp, mask in ((chosen_logp, chosen_mask), (rejected_logp, rejected_mask))
        ]
        found["mean_logp"] = means[0][:, None], means[1][:, None]
    return found


def margin_saturation_step(
    accuracies: Sequence[float] | Tensor, *, threshold: float = 0.99, steps: Sequence[int] | None = None
) -> int | None:
    """The step at which the reward accuracy of training first exceeds the threshold; None if it never does.

    accuracies: as logged, in order. steps: when; None: 0, 1, 2, ... An early one means that the pairs were easily told apart.
    """
    values = accuracies.tolist() if isinstance(accuracies, Tensor) else list(accuracies)
    when = range(len(values)) if steps is None else steps
    if len(when) != len(values):
        raise ValueError(f"steps has {len(when)} entries; {len(values)} are expected, one per accuracy")
    return next((int(step) for step, value in zip(when, values, strict=True) if value > threshold), None)


# ---- trainer and rollout


QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


class MismatchedToken(NamedTuple):
    """A token whose log-probs differ."""

    row: int
    position: int
    trainer_logp: float
    rollout_logp: float
    token: int | None = None
    """Its id, where ids were given."""

    @property
    def difference(self) -> float:
        """trainer_logp - rollout_logp; 0 where both are -inf."""
        return 0.0 if self.trainer_logp == self.rollout_logp else self.trainer_logp - self.rollout_logp


@dataclass(frozen=True)
class LogprobMismatch:
    r"""How far a trainer's log-probs lie from those of the engine that sampled the tokens; see :func:`logprob_mismatch`.

    With d = trainer_logp - rollout_logp of a token and its ratio exp(d). Statistics are over the tokens in the mask whose two
    log-probs are finite. Printing it gives a report.
    """

    tokens: int
    """How many tokens that is."""
    mean_abs: float
    """Mean of abs(d), in nats."""
    max_abs: float
    mean_ratio: float
    """Mean of exp(d): 1 in expectation if the tokens were sampled from the rollout's distribution over all of its support."""
    k1: float
    """Mean of -d. Like k2 and k3 it estimates KL(rollout || trainer) per token, from samples of the rollout."""
    k2: float
    """Mean of d^2 / 2."""
    k3: float
    """Mean of exp(d) - 1 - d; never negative."""
    ratio_quantiles: dict[float, float]
    """Of exp(d), at ``QUANTILES``, interpolated linearly."""
    outside: float
    """Fraction of ratios below 0.5 or above 2."""
    trainer_inf: int
    """Tokens to which the trainer gives -inf: outside of the support it keeps, say."""
    rollout_inf: int
    """Tokens to which the rollout gives -inf, which it cannot have sampled."""
    worst: tuple[MismatchedToken, ...]
    """The tokens with the largest abs(d), those with one -inf first."""
    sequence_log_ratio: Tensor
    """[B], float64, on the CPU: sum of d over the tokens of each row; nan for a row without one."""
    sequences: int
    """Rows with a token."""
    ess: float
    """Effective sample size of the sequence ratios w: (sum w)^2 / sum w^2, from 1 to ``sequences``."""

    @property
    def sequence_ratio(self) -> Tensor:
        """[B]: exp(sequence_log_ratio)."""
        return self.sequence_log_ratio.exp()

    def __str__(self) -> str:
        quantiles = "  ".join(f"{100 * q:g}%: {value:.4g}" for q, value in self.ratio_quantiles.items())
        rows = self.sequence_log_ratio[~self.sequence_log_ratio.isnan()]
        spread = rows.std(correction=0)
        lines = [
            f"log-probs of {self.tokens} tokens, trainer minus rollout",
            f"  difference   mean abs {self.mean_abs:.4g}, max abs {self.max_abs:.4g}",
            f"  ratio        mean {self.mean_ratio:.6g}, outside [0.5, 2]: {100 * self.outside:.3g} %",
            f"               {quantiles}",
            f"  KL(rollout || trainer) per token   k1 {self.k1:.4g}, k2 {self.k2:.4g}, k3 {self.k3:.4g}",
            f"  sequences    {self.sequences}; log ratio mean {float(rows.mean()):.4g}, std {float(spread):.4g}, "
            f"min {float(rows.min()):.4g}, max {float(rows.max()):.4g}; effective sample size {self.ess:.4g}",
        ]
        if self.trainer_inf or self.rollout_inf:
            lines.append(f"  left out     -inf in the trainer: {self.trainer_inf}, in the rollout: {self.rollout_inf}")
        if self.worst:
            lines.append("  worst tokens (row, position: trainer, rollout)")
        for token in self.worst:
            name = "" if token.token is None else f"  token {token.token}"
            lines.append(
                f"    {token.row}, {token.position}: {token.trainer_logp:.4f}, {token.rollout_logp:.4f}"
                f"  ({token.difference:+.4f}){name}"
            )
        return "\n".join(lines)


def logprob_mismatch(
    trainer_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    top: int = 20,
    tokens: Tensor | None = None,
    plot: str | PathLike[str] | None = None,
) -> LogprobMismatch:
    r"""How far the log-probs of a trainer lie from those that the sampling engine reported for the same tokens.

    Kernels, precision, sampling parameters and stale weights make the two differ, and importance ratios inherit that. With the
    same weights on both sides d should be rounding: what is left is a mismatch of temperature, of top-k or top-p, of the head's
    precision or of the tokens themselves.

    Args:
        trainer_logp, rollout_logp: ``[B, T]``, any floating dtype; computed in float64.
        mask: bool ``[B, T]``; True counts. Nothing outside is looked at.
        top: how many of the worst tokens are listed.
        tokens: ``[B, T]`` ids, to be listed with them.
        plot: a file to which a histogram of d and a scatter of the two log-probs are saved; the name's end says which format.
            Needs matplotlib.

    Returns:
        LogprobMismatch. -inf on either side is counted, listed first among the worst and left out of every statistic.

    Raises:
        ValueError: for shapes, a mask without a token, and a log-prob in the mask that is nan or +inf, with its place; also
            where every token in the mask has a -inf.
    """
    if trainer_logp.dim() != 2 or rollout_logp.shape != trainer_logp.shape:
        raise ValueError(
            f"trainer_logp has shape {list(trainer_logp.shape)}, rollout_logp {list(rollout_logp.shape)}; "
            "[B, T] is expected of both"
        )
    if mask.dtype != torch.bool or mask.shape != trainer_logp.shape:
        raise ValueError(
            f"mask is {mask.dtype} {list(mask.shape)}; torch.bool {list(trainer_logp.shape)} is expected, as of the log-probs"
        )
    if tokens is not None and tokens.shape != mask.shape:
        raise ValueError(f"tokens has shape {list(tokens.shape)}; {list(mask.shape)} is expected, as of the log-probs")
    if top < 0:
        raise ValueError(f"top is {top}; it must not be negative")
    if not bool(mask.any()):
        raise ValueError("mask has no token that counts")
    where = mask.nonzero().cpu()
    sides = [logp.detach()[mask].double().cpu() for logp in (trainer_logp, rollout_logp)]
    for name, side in zip(("trainer_logp", "rollout_logp"), sides, strict=True):
        bad = side.isnan() | (side == math.inf)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(f"{name}[{int(where[first, 0])}, {int(where[first, 1])}] is {float(side[first])}")
    trainer, rollout = sides
    finite = trainer.isfinite() & rollout.isfinite()
    if not bool(finite.any()):
        raise ValueError("every token in the mask has a log-prob of -inf on one side; nothing can be compared")
    d = (trainer - rollout)[finite]
    ratio = d.exp()
    row = where[finite, 0]
    rows = len(mask)
    log_ratio = torch.zeros(rows, dtype=d.dtype).index_add_(0, row, d)
    has_token = torch.zeros(rows, dtype=torch.bool).index_fill_(0, row, True)
    log_ratio[~has_token] = math.nan
    weights = (log_ratio[has_token] - log_ratio[has_token].max()).exp()
    sizes = torch.where(finite, (trainer - rollout).abs(), math.inf).masked_fill(trainer == rollout, 0.0)
    order = sizes.argsort(descending=True, stable=True)[:top].tolist()
    ids = None if tokens is None else tokens.detach()[mask].cpu()
    found = LogprobMismatch(
        tokens=len(d),
        mean_abs=float(d.abs().mean()),
        max_abs=float(d.abs().max()),
        mean_ratio=float(ratio.mean()),
        k1=float(-d.mean()),
        k2=float(d.square().mean() / 2),
        k3=float((d.expm1() - d).mean()),
        ratio_quantiles=_quantiles(ratio),
        outside=float(((ratio < 0.5) | (ratio > 2)).double().mean()),
        trainer_inf=int(trainer.isinf().sum()),
        rollout_inf=int(rollout.isinf().sum()),
        worst=tuple(
            MismatchedToken(
                int(where[i, 0]), int(where[i, 1]), float(trainer[i]), float(rollout[i]), None if ids is None else int(ids[i])
            )
            for i in order
        ),
        sequence_log_ratio=log_ratio,
        sequences=int(has_token.sum()),
        ess=float(weights.sum().square() / weights.square().sum()),
    )
    if plot is not None:
        _plot_mismatch(plot, trainer[finite], rollout[finite], found)
    return found


def _quantiles(values: Tensor) -> dict[float, float]:
    # torch.quantile takes no more than 2^24 values
    ordered = values.sort().values
    found = {}
    for q in QUANTILES:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        found[q] = float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
    return found


def _plot_mismatch(path: str | PathLike[str], trainer: Tensor, rollout: Tensor, found: LogprobMismatch) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ImportError('plot needs matplotlib: pip install "prefkern[demo]"') from None

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    d: Any = (trainer - rollout).numpy()
    axes[0].hist(d, bins=100, log=True, color="#4477aa")
    axes[0].set(xlabel="trainer - rollout (nats)", ylabel="tokens", title=f"mean abs {found.mean_abs:.3g}, k3 {found.k3:.3g}")
    axes[1].scatter(rollout.numpy(), trainer.numpy(), s=4, alpha=0.4, color="#4477aa", linewidths=0)
    low = float(torch.minimum(trainer.min(), rollout.min()))
    axes[1].plot([low, 0], [low, 0], color="black", linewidth=0.8)
    axes[1].set(xlabel="rollout log-prob", ylabel="trainer log-prob", title=f"{found.tokens} tokens")
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- inside


def _features(f_chosen: Tensor, f_rejected: Tensor) -> tuple[Tensor, Tensor]:
    if f_chosen.dim() not in (1, 2) or f_chosen.shape != f_rejected.shape or f_chosen.numel() == 0:
        raise ValueError(
            f"f_chosen has shape {list(f_chosen.shape)}, f_rejected {list(f_rejected.shape)}; [B, H] is expected of both"
        )
    sides = []
    for name, given in (("f_chosen", f_chosen), ("f_rejected", f_rejected)):
        features = given.detach().double().reshape(len(given), -1)
        finite = features.isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(f"{name}[{int((~finite).nonzero()[0])}] has a feature that is not finite")
        sides.append(features)
    return sides[0], sides[1]


def _check(ridge: float, solver: str) -> None:
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge is {ridge}; it must be positive")
    choice("solver", solver, SOLVERS)


def _check_mask(values: Tensor, mask: Tensor, dims: int) -> None:
    if values.dim() != dims or mask.dtype != torch.bool or mask.shape != values.shape[:2]:
        expected = "[B, T, H]" if dims == 3 else "[B, T]"
        raise ValueError(
            f"mask is {mask.dtype} {list(mask.shape)} for {list(values.shape)}; bool [B, T] is expected for {expected}"
        )
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise ValueError(f"mask[{int(empty.nonzero()[0])}] has no token that counts")


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _folds(groups: Sequence[Hashable] | Tensor | None, rows: int, n_folds: int) -> Tensor:
    if groups is None:
        return torch.arange(rows) % n_folds
    ids = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(ids) != rows:
        raise ValueError(f"groups has {len(ids)} entries; {rows} are expected, one per pair")
    number: dict[Hashable, int] = {}
    of_pair = [number.setdefault(i, len(number)) for i in ids]
    if len(number) < n_folds:
        raise ValueError(f"groups has {len(number)} different ids; at least {n_folds} are expected, one for each fold")
    return torch.tensor(of_pair) % n_folds


def _fit(chosen: Tensor, rejected: Tensor, ridge: float, solver: str) -> LinearProbe:
    mu_c, mu_r = chosen.mean(0), rejected.mean(0)
    difference = mu_c - mu_r
    centred = torch.cat([chosen - mu_c, rejected - mu_r])
    rows, width = centred.shape
    trace = centred.square().sum() / rows
    shift = torch.where(trace > 0, ridge * trace / width, ridge)
    if solver == "dual" or (solver == "auto" and width > _WIDE and rows < width):
        # (S + shift I)^-1 d with S = Z'Z / rows, by what Woodbury's identity makes of it
        gram = centred @ centred.T
        gram.diagonal().add_(shift * rows)
        inner = _solve(gram, centred @ difference)
        weight = (difference - centred.T @ inner) / shift
    else:
        scatter = centred.T @ centred / rows
        scatter.diagonal().add_(shift)
        weight = _solve(scatter, difference)
    return LinearProbe(weight, -weight @ (mu_c + mu_r) / 2)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(matrix))[:, 0]
