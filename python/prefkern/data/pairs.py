"""Pairs from ratings, from rewards, from a judge's scores; and which old ones come back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._names import choice


class RankedPair(NamedTuple):
    """Two responses to one prompt, by their places among its responses."""

    chosen: int
    rejected: int
    gap: float
    """Rating of the chosen response less that of the rejected one; above 0. A large gap is an easy pair."""


class Indices(list[int]):
    """Indices of what was selected, and why the rest was not."""

    def __init__(self, indices: Sequence[int] = (), *, skipped: dict[str, int], per_dialogue: dict[Any, int] | None = None):
        super().__init__(indices)
        self.skipped = skipped
        """How many were left out, by the reason."""
        self.per_dialogue = per_dialogue
        """How many were selected of each dialogue, if the dialogues were given."""


def floats(name: str, values: Any) -> list[float]:
    """One number per response, None as NaN; or an error that names the argument."""
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise ValueError(f"{name} has shape {list(values.shape)}; one number per response is expected")
        values = values.tolist()
    try:
        return [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {values!r}; one number per response is expected") from None


def ranked_pairs(
    ratings: Sequence[float | None] | Tensor, *, pairs: Literal["best_vs_rest", "all"] = "best_vs_rest"
) -> list[RankedPair]:
    """The pairs that the ratings of one prompt's responses make, easiest first (Curry-DPO).

    Args:
        ratings: one per response; higher is better. Ratings of a judge, minus the ranks of a human, or log-probs of the
            reference model. A NaN or None takes its response out.
        pairs: ``"best_vs_rest"``: the best response against each other. ``"all"``: every two that differ.

    Returns:
        The gap falls along the list. Among equal gaps the better chosen response comes first, then the worse rejected one;
        of equal ratings the first response ranks higher. Responses with equal ratings make no pair, so a prompt whose ratings
        are all equal, or which has fewer than two, has none.
    """
    choice("pairs", pairs, ("best_vs_rest", "all"))
    rating = floats("ratings", ratings)
    order = sorted((i for i, r in enumerate(rating) if not math.isnan(r)), key=lambda i: -rating[i])
    rank = {i: place for place, i in enumerate(order)}
    chosen = order[:1] if pairs == "best_vs_rest" else order
    found = [RankedPair(c, r, rating[c] - rating[r]) for c in chosen for r in order[rank[c] + 1 :] if rating[c] > rating[r]]
    return sorted(found, key=lambda pair: (-pair.gap, rank[pair.chosen], -rank[pair.rejected]))


@dataclass(frozen=True)
class GapSplit:
    """Pairs by how far their rewards lie apart; unpacks as ``easy, hard, noisy = ...``. bool [P] each, disjoint."""

    easy: Tensor
    hard: Tensor
    noisy: Tensor
    """The reward contradicts the label by more than gamma; none unless the mode is "signed"."""
    gamma: float
    """The threshold, given or found."""
    contradicted: int
    """How many easy pairs have a reward that contradicts their label: they keep it. 0 if the mode is "signed"."""
    not_finite: int
    """How many pairs have a NaN or infinite reward: they are in no part."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.easy, self.hard, self.noisy))


def split_by_reward_gap(
    chosen_rewards: Sequence[float] | Tensor,
    rejected_rewards: Sequence[float] | Tensor,
    *,
    gamma: float | None = None,
    easy_fraction: float | None = None,
    mode: Literal["abs", "signed"] = "abs",
) -> GapSplit:
    r"""Pairs split by the gap of their rewards, :math:`g = r_w - r_l` (Mixed Preference Optimization).

    Args:
        chosen_rewards, rejected_rewards: [P], of one reward model.
        gamma: the threshold, at least 0, in units of the reward. A gap of exactly gamma is hard.
        easy_fraction: f in [0, 1], instead of gamma: gamma is the :math:`(\lceil f n \rceil + 1)`-th largest of the n finite
            :math:`|g|`, so that at most :math:`\lceil f n \rceil` pairs are easy, fewer with ties. For f = 1 it lies just below
            the smallest; a pair without any gap stays hard.
        mode: ``"abs"``: easy is :math:`|g| > \gamma`, hard the rest. ``"signed"``: easy is :math:`g > \gamma`, hard
            :math:`|g| \le \gamma`, noisy :math:`g < -\gamma`; for noisy labels.
    """
    choice("mode", mode, ("abs", "signed"))
    chosen, rejected = (torch.as_tensor(r, dtype=torch.float64, device="cpu") for r in (chosen_rewards, rejected_rewards))
    if chosen.dim() != 1 or chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen_rewards has shape {list(chosen.shape)}, rejected_rewards {list(rejected.shape)}; [P] is expected of both"
        )
    if (gamma is None) == (easy_fraction is None):
        raise ValueError(f"gamma is {gamma} and easy_fraction is {easy_fraction}; one of the two is expected")
    finite = chosen.isfinite() & rejected.isfinite()
    gap = torch.where(finite, chosen - rejected, 0.0)
    size = gap.abs()
    if easy_fraction is not None:
        gamma = _gamma_of(size[finite], easy_fraction)
    assert gamma is not None
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must not be negative")
    apart = finite & (size > gamma)
    against = apart & (gap < 0)
    signed = mode == "signed"
    return GapSplit(
        easy=apart & ~against if signed else apart,
        hard=finite & ~apart,
        noisy=against if signed else torch.zeros_like(against),
        gamma=float(gamma),
        contradicted=0 if signed else int(against.sum()),
        not_finite=int((~finite).sum()),
    )


def _gamma_of(sizes: Tensor, fraction: float) -> float:
    if not 0 <= fraction <= 1:
        raise ValueError(f"easy_fraction is {fraction}; a number in [0, 1] is expected")
    n = len(sizes)
    if n == 0:
        return 0.0
    easy = math.ceil(round(fraction * n, 9))  # 0.07 * 100 is a little above 7
    falling = sizes.sort(descending=True).values
    return float(falling[easy]) if easy < n else max(math.nextafter(float(falling[-1]), -math.inf), 0.0)


def dno_pairs(
    scores: Sequence[float | None] | Tensor,
    is_teacher: Sequence[bool] | Tensor,
    *,
    min_pos: float = 5,
    margin: float = 2,
    student_margin: float = 1,
    restrictive: bool = False,
) -> list[tuple[int, int]]:
    """The pairs (positive, negative) of one prompt's candidates by a judge's scores (DNO, section 5.1).

    Args:
        scores: one per candidate; NaN or None takes the candidate out.
        is_teacher: whether the candidate is the teacher's (the gold response) rather than a sample of the policy.
        min_pos: a positive scores at least this.
        margin, student_margin: how much lower the negative scores at least, if the positive is the teacher's, or a student's.
            Equal scores make no pair whatever the margin.
        restrictive: only pairs of a teacher's response over a student's (DNO-Restrictive).

    Returns:
        In the order of the candidates; empty for a prompt without a positive, or whose negatives are all too near.
    """
    score = floats("scores", scores)
    teacher = [bool(t) for t in is_teacher]
    if len(teacher) != len(score):
        raise ValueError(f"is_teacher has {len(teacher)} entries; {len(score)} are expected, one per score")
    for name, value in (("margin", margin), ("student_margin", student_margin)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must not be negative")

    def makes_a_pair(p: int, n: int) -> bool:
        gap = score[p] - score[n]
        far = gap > 0 and gap >= (margin if teacher[p] else student_margin)
        return score[p] >= min_pos and far and (not restrictive or (teacher[p] and not teacher[n]))

    return [(p, n) for p in range(len(score)) for n in range(len(score)) if makes_a_pair(p, n)]


def winrates(wins: Tensor, mask: Tensor | None = None) -> Tensor:
    """How often each of N candidates wins against the others, in [0, 1] (DNO's estimate of r from draws).

    Args:
        wins: [..., N, N]; ``wins[i, j]`` is 1 if i was preferred to j, 0 if not, or a probability. The diagonal is not looked
            at.
        mask: bool; [..., N], which candidates there are, or [..., N, N], which comparisons were made. None: all. What lies
            outside is not looked at.

    Returns:
        [..., N], divided by the number of real opponents; NaN for a candidate without any, and for one that is not there. The
        dtype of `wins`, or float32 if it is none of floats.
    """
    if wins.dim() < 2 or wins.shape[-1] != wins.shape[-2]:
        raise ValueError(f"wins has shape {list(wins.shape)}; [..., N, N] is expected")
    if not wins.is_floating_point():
        wins = wins.float()
    count = ~torch.eye(wins.shape[-1], dtype=torch.bool, device=wins.device).expand_as(wins)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in (wins.shape, wins.shape[:-1]):
            raise ValueError(
                f"mask is {mask.dtype} {list(mask.shape)}; bool {list(wins.shape[:-1])} or {list(wins.shape)} is expected"
            )
        count = count & (mask if mask.dim() == wins.dim() else mask[..., :, None] & mask[..., None, :])
    bad = count & ~((wins >= 0) & (wins <= 1))
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ValueError(f"wins{place} is {float(wins[tuple(place)])}; a number in [0, 1] is expected")
    won = torch.where(count, wins, 0.0).sum(-1)
    opponents = count.sum(-1)
    return torch.where(opponents > 0, won / opponents.clamp_min(1), torch.nan)


def replay(sizes: Sequence[int], *, fraction: float = 0.3, decay: float = 0.5, seed: int = 0) -> list[list[int]]:
    """Which pairs of each iteration to train on: all of the newest, and ever fewer of the older ones (DNO).

    Args:
        sizes: how many pairs each iteration made, oldest first; the last is the newest.
        fraction: how much of the iteration before it comes back at most: 30%; of the one before that `decay` times as much,
            15%, and so on. Rounded down.
        seed: equal seeds give equal picks. The picks of an iteration depend on the seed and on its place only, and as it ages
            they thin out: what is left is a part of what came back before.

    Returns:
        For each iteration the indices of its pairs, ascending.
    """
    for name, value in (("fraction", fraction), ("decay", decay)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; a number in [0, 1] is expected")
    kept = []
    for iteration, size in enumerate(sizes):
        if size < 0:
            raise ValueError(f"sizes[{iteration}] is {size}; it must not be negative")
        age = len(sizes) - 1 - iteration
        if age == 0:
            kept.append(list(range(size)))
            continue
        generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) % (1 << 63))
        share = math.floor(round(fraction * decay ** (age - 1) * size, 9))  # 0.29 * 100 is a little below 29
        kept.append(sorted(torch.randperm(size, generator=generator)[:share].tolist()))
    return kept


def self_rm_pair(scores: Sequence[float] | Tensor, valid: Sequence[bool] | Tensor) -> tuple[int, int] | None:
    """(chosen, rejected) among one prompt's own responses: those that a reward model puts highest and lowest.

    Args:
        scores: of a reward model, one per response.
        valid: which responses count (long enough, say).

    Returns:
        None with fewer than two that count, or if their scores are all equal. Of equal scores the first wins, on either side.
    """
    score = floats("scores", scores)
    keep = [bool(v) for v in valid]
    if len(keep) != len(score):
        raise ValueError(f"valid has {len(keep)} entries; {len(score)} are expected, one per score")
    rows = [i for i, v in enumerate(keep) if v]
    for i in rows:
        if math.isnan(score[i]):
            raise ValueError(f"scores[{i}] is nan; every response that counts needs a score")
    if len(rows) < 2:
        return None
    chosen, rejected = max(rows, key=score.__getitem__), min(rows, key=score.__getitem__)
    return (chosen, rejected) if score[chosen] > score[rejected] else None


def mix_pair(
    score_self: float | None = None, score_external: float | None = None, *, use_rm: bool
) -> tuple[Literal["self", "external"], Literal["self", "external"]]:
    """(chosen, rejected) of a model's own response and one of a stronger model.

    The external response is chosen. With `use_rm` the own one is, if its score is strictly higher; without, scores are not
    looked at.
    """
    if use_rm:
        given = {"score_self": score_self, "score_external": score_external}
        for name, value in given.items():
            if value is None or math.isnan(value):
                raise ValueError(f"{name} is {value}; use_rm needs a score of both")
        assert score_self is not None and score_external is not None
        if score_self > score_external:
            return "self", "external"
    return "external", "self"
