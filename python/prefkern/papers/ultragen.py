r"""UltraGen: sets of many attributes that go together and are unlike each other, and DPO on how many of them a text satisfies.

Yun et al., "UltraGen: Extremely Fine-grained Controllable Generation via Attribute Reconstruction and Global Preference
Optimization", arXiv:2502.12375.
Evidence: part. Selection, set sizes, the encoder's triplet loss and conflicts follow the authors' code. What scores a text and
makes pairs is not in it: the satisfaction rate and the pair rule here are inferred from how the metric is described.

A set begins with a soft attribute. Candidates are its K nearest neighbours in the space of a correlation encoder; among them
one after the other is taken that is least similar, by cosine of another embedding, to what has been taken, until there are so
many soft and hard ones as were drawn (:func:`attribute_sets`, over :func:`prefkern.greedy_select`). The encoder is trained on
triplets of normalised vectors, an attribute that occurs with the anchor against one that does not
(:func:`triplet_margin_loss`):

.. math::
    L = \mathrm{mean} \max(0, \lVert a - p \rVert^2 - \lVert a - n \rVert^2 + m)

A text's satisfaction rate is satisfied over valid attributes, :math:`\mathrm{CSR}_i = \sum_j s_{ij} v_{ij} / \sum_j v_{ij}`,
its mean over texts the macro, the ratio of the sums the micro rate (:func:`csr`); :func:`csr_by_position` is the rate in bins
of an attribute's place among those of its text, :math:`\lfloor \mathrm{bins} \cdot \mathrm{rank} / n \rfloor`, which shows
whether late ones are forgotten. Of the candidates for one set the best and the worst make a pair (:func:`build_pairs`), and
training is DPO with beta 0.1 (:func:`gpo_loss`):

.. math::
    L = -\log\sigma\bigl(\beta [(w - w_\mathrm{ref}) - (l - l_\mathrm{ref})]\bigr)

Where paper and code disagree, and which one is the default:

- The paper wants attributes of low similarity. The code keeps the least cosine to what was taken, so that one is taken which is
  unlike any one of them and may nearly repeat another: `reduce="min"`, the default. `reduce="max"` is farthest point.
- The code's option for how to select is ignored: only the nearest-then-unlike strategy runs.
- The code trains its encoder on one vector and searches with another, not normalised. Here the caller gives the vectors.
- The code's general resolver of conflicts is never called; a rule about case removes every rule about the first word, silently:
  :func:`resolve_conflicts`, with `case_drops_start=False` to keep both where the check ignores case.

Defaults of the code: 10 to 50 attributes, K = 1024, margin 1, beta 0.1. The paper speaks of about 45 attributes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import LossOutput, greedy_select, preference_loss
from ._about import About
from ._shared import may_look

about = About(
    name="UltraGen",
    title="UltraGen: Extremely Fine-grained Controllable Generation via Attribute Reconstruction and Global Preference "
    "Optimization",
    arxiv="2502.12375",
    year=2025,
    family="sampler, pairwise",
    evidence="part",
    note="selection, triplets and conflicts follow the authors' code; satisfaction rate and pairs are inferred",
)


class Csr(NamedTuple):
    """How many of their attributes B texts satisfy. float32, or float64 for float64 input."""

    per_sample: Tensor
    """[B]; NaN for a text without a valid attribute."""
    macro: Tensor
    """0-d: mean over the texts that have one."""
    micro: Tensor
    """0-d: satisfied over valid, of all texts together."""


class PositionCsr(NamedTuple):
    """Of each bin of relative positions, [bins] each."""

    rate: Tensor
    """Satisfied over valid; NaN for an empty bin. float32."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """int64: valid attributes."""


class ScorePairs(NamedTuple):
    """Of P groups of candidates, [P] each."""

    chosen: Tensor
    """int64: the candidate with the highest score; of equal ones the first, in both."""
    rejected: Tensor
    """int64: that with the lowest."""
    keep: Tensor
    """bool: whether their scores are further apart than the gap."""
    gap: Tensor
    """How far; NaN for a group without two scores."""


class SetSizes(NamedTuple):
    """How many attributes sets have, int64 [Q] each."""

    soft: Tensor
    hard: Tensor


class Attribute(NamedTuple):
    """An attribute as text, and what it is: "soft", "start" (the first word), "case", or any other."""

    kind: str
    text: str


# ---- sets of attributes ----------------------------------------------------------------------------------------------


def sample_set_sizes(
    sets: int, *, least: int = 10, most: int = 50, most_soft: int = 10, generator: torch.Generator | None = None
) -> SetSizes:
    """Sizes uniform in [least, most]; of those, soft attributes uniform in [1, min(size, most_soft) - 1], the others hard.

    ValueError unless 2 <= least <= most and most_soft >= 2: there would be no soft attribute to begin with.
    """
    if not 2 <= least <= most:
        raise ValueError(f"least is {least}, most is {most}; 2 <= least <= most is expected")
    if most_soft < 2:
        raise ValueError(f"most_soft is {most_soft}; at least 2 is expected")
    if sets < 0:
        raise ValueError(f"sets is {sets}; it must not be negative")
    size = torch.randint(least, most + 1, (sets,), generator=generator)
    above = size.clamp_max(most_soft)  # exclusive
    u = torch.rand(sets, dtype=torch.float64, generator=generator)
    soft = 1 + (u * (above - 1)).long().minimum(above - 2)
    return SetSizes(soft, size - soft)


def nearest_candidates(correlation: Tensor, seeds: Tensor, k: int = 1024) -> Tensor:
    """The seed, then its nearest neighbours by Euclidean distance, of equal ones the first: int64 [Q, min(k, N)].

    correlation: [N, d], the vectors to search. seeds: int64 [Q], rows of it.
    """
    if k < 1:
        raise ValueError(f"k is {k}; a positive integer is expected")
    x = correlation if correlation.dtype == torch.float64 else correlation.float()
    distance = torch.cdist(x[seeds], x, compute_mode="donot_use_mm_for_euclid_dist")
    distance[torch.arange(len(seeds), device=seeds.device), seeds] = -1.0  # before its copies
    return distance.argsort(dim=1, stable=True)[:, :k]


def attribute_sets(
    semantic: Tensor,
    is_soft: Tensor,
    seeds: Tensor,
    n_soft: Tensor | int,
    n_hard: Tensor | int,
    *,
    correlation: Tensor | None = None,
    candidates: int = 1024,
    reduce: Literal["min", "max"] = "min",
) -> Tensor:
    """For each seed a set of attributes: int64 [Q, size], ids from 0 to N - 1, the seed first, -1 behind a set's last.

    Args:
        semantic: [N, d], what must be unlike: cosines of these.
        is_soft: bool [N].
        seeds: int64 [Q], soft attributes; each counts as one of its set's soft ones.
        n_soft, n_hard: [Q] or numbers, as from `sample_set_sizes`.
        correlation: [N, e], what must go together: candidates are the nearest of these. None: all N are candidates.
        candidates: K.
        reduce: `"min"` as in the code, `"max"` for farthest point.

    ValueError: as `prefkern.greedy_select`; for a set that asks for more of a kind than its candidates have with both counts.
    """
    if is_soft.dtype != torch.bool or is_soft.shape != (len(semantic),):
        raise ValueError(f"is_soft is {is_soft.dtype} {list(is_soft.shape)}; bool [{len(semantic)}] is expected")
    if may_look(is_soft, seeds) and len(seeds):
        if bool(((seeds < 0) | (seeds >= len(semantic))).any()):
            raise ValueError(f"seeds are {seeds.tolist()}; ids from 0 to {len(semantic) - 1} are expected")
        if not bool(is_soft[seeds].all()):
            q = int((~is_soft[seeds]).nonzero()[0])
            raise ValueError(f"seeds[{q}] is {int(seeds[q])}, a hard attribute; a set begins with a soft one")
    soft, hard = (torch.as_tensor(n, device=seeds.device).expand(len(seeds)) for n in (n_soft, n_hard))
    quotas = torch.stack([hard, soft], 1)
    if correlation is None:
        return greedy_select(semantic, is_soft.long(), seeds, quotas, reduce=reduce)
    if len(correlation) != len(semantic):
        raise ValueError(f"correlation has {len(correlation)} rows; {len(semantic)}, as semantic, are expected")
    near = nearest_candidates(correlation, seeds, candidates)
    chosen = greedy_select(semantic[near], is_soft.long()[near], torch.zeros_like(seeds), quotas, reduce=reduce)
    return torch.where(chosen < 0, -1, near.gather(1, chosen.clamp_min(0)))


def resolve_conflicts(attributes: Iterable[Attribute], *, case_drops_start: bool = True) -> list[Attribute]:
    """The attributes that can hold together, in their order: of equal ones the first; of rules about the first word the first;
    of rules about case the first, and with one no rule about the first word at all.

    case_drops_start: False keeps both kinds, which holds where texts are checked without regard to case.
    """
    distinct = list(dict.fromkeys(Attribute(*a) for a in attributes))
    has_case = any(a.kind == "case" for a in distinct)
    kept, seen = [], set()
    for a in distinct:
        if a.kind in ("start", "case"):
            if a.kind in seen or (a.kind == "start" and has_case and case_drops_start):
                continue
            seen.add(a.kind)
        kept.append(a)
    return kept


def triplet_margin_loss(a: Tensor, p: Tensor, n: Tensor, margin: float = 1.0) -> LossOutput:
    """The encoder's loss on triplets of vectors [T, d], which are normalised here. Gradients to all three.

    Metrics: accuracy, the share with the positive strictly nearer. ValueError for a zero vector.
    """
    if not margin >= 0:
        raise ValueError(f"margin is {margin}; it must not be negative")
    units = []
    for name, x in (("a", a), ("p", p), ("n", n)):
        if x.dim() != 2 or x.shape != a.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; [T, d], all alike, is expected")
        wide = x if x.dtype == torch.float64 else x.float()
        norm = wide.norm(dim=1, keepdim=True)
        if may_look(norm) and not bool((norm > 0).all()):
            raise ValueError(f"{name}[{int((~(norm > 0)).nonzero()[0, 0])}] has norm 0 or NaN; it has no direction")
        units.append(wide / norm)
    anchor, positive, negative = units
    near, far = (anchor - positive).square().sum(1), (anchor - negative).square().sum(1)
    count = max(1, len(a))
    loss = (near - far + margin).clamp_min(0).sum() / count
    return LossOutput(loss, {"accuracy": (near < far).to(loss.dtype).sum() / count})


# ---- how many attributes hold ----------------------------------------------------------------------------------------


def csr(sat: Tensor, valid: Tensor | None = None) -> Csr:
    """The satisfaction rates of B texts.

    sat: [B, n], bool, or any numbers of which those above 0 are satisfied. valid: the same, which attributes a text has; what
    is not valid is never looked at. None: all. ValueError, if values may be looked at, where no text has a valid attribute.
    """
    held, real = _satisfied(sat, valid)
    good, of = held.sum(1), real.sum(1)
    if may_look(of) and not bool((of > 0).any()):
        raise ValueError(f"valid has no attribute of any of {len(of)} texts; there is no rate")
    dtype = torch.float64 if sat.dtype == torch.float64 else torch.float32
    rate = good.to(dtype) / of  # 0 / 0 is NaN
    return Csr(rate, rate.nanmean(), good.sum().to(dtype) / of.sum())


def csr_by_position(sat: Tensor, valid: Tensor | None = None, bins: int = 10) -> PositionCsr:
    """The satisfaction rate by where an attribute stands among the n valid ones of its text: in bin floor(bins rank / n), rank
    from 0.

    sat, valid: as for `csr`.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins is {bins!r}; a positive integer is expected")
    held, real = _satisfied(sat, valid)
    rank = real.long().cumsum(1) - 1
    place = torch.where(real, bins * rank // real.sum(1, keepdim=True).clamp_min(1), bins)  # what is not valid: behind the last
    mine = place.flatten() == torch.arange(bins, device=sat.device)[:, None]  # in a fixed order: no atomics
    count = mine.sum(1)
    return PositionCsr((mine & held.flatten()).sum(1).float() / count, count)


def build_pairs(score: Tensor, *, min_gap: float = 0.0) -> ScorePairs:
    """The best and the worst of N candidates for each of P sets.

    score: [P, N], such as `csr(...).per_sample` of each set's candidates. NaN, a candidate without a score, is neither.
    min_gap: not negative; pairs must be further apart.
    """
    if score.dim() != 2 or not score.is_floating_point() or score.shape[1] < 1:
        raise ValueError(f"score is {score.dtype} {list(score.shape)}; floating [P, N] is expected")
    if not min_gap >= 0:
        raise ValueError(f"min_gap is {min_gap}; it must not be negative")
    unknown = score.isnan()
    high, low = score.masked_fill(unknown, -torch.inf), score.masked_fill(unknown, torch.inf)
    chosen, rejected = _first(high == high.amax(1, keepdim=True)), _first(low == low.amin(1, keepdim=True))
    gap = (score.gather(1, chosen[:, None]) - score.gather(1, rejected[:, None])).squeeze(1)
    gap = torch.where((~unknown).sum(1) > 1, gap, torch.nan)
    return ScorePairs(chosen, rejected, gap > min_gap, gap)


def gpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    keep: Tensor | None = None,
    *,
    beta: float = 0.1,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> LossOutput:
    """DPO from the log-prob sums of P pairs [P], `prefkern.preference_loss`. Gradient to the first two. keep: bool [P], pairs
    that count, as of `build_pairs`."""
    return preference_loss(
        chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta=beta, mask=keep, reduction=reduction
    )


def _satisfied(sat: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """bool [B, n] each: satisfied and valid, and valid."""
    if sat.dim() != 2:
        raise ValueError(f"sat has shape {list(sat.shape)}; [B, n] is expected")
    if valid is not None and valid.shape != sat.shape:
        raise ValueError(f"valid has shape {list(valid.shape)}; {list(sat.shape)}, as sat, is expected")
    real = torch.ones_like(sat, dtype=torch.bool) if valid is None else valid > 0
    return (sat > 0) & real, real


def _first(where: Tensor) -> Tensor:
    """The first True of each row."""
    return where.to(torch.uint8).argmax(1)
