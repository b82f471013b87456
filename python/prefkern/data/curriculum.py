"""From easy pairs to hard ones, in stages (Curry-DPO)."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from .._names import choice


class CurriculumPair(NamedTuple):
    """A pair, and the prompt it belongs to."""

    prompt: int
    chosen: int
    rejected: int
    gap: float


class Curriculum:
    """Pairs dealt out to stages, easiest first; each stage is trained with the model before it as reference.

        curriculum = Curriculum([ranked_pairs(r) for r in ratings])
        for i in range(curriculum.n_stages):
            if curriculum.stage(i):                       # a stage without pairs is passed over
                source = curriculum.reference_of(i)       # None: the model that training starts from
                ...

    At the first step of a stage the policy is its reference, so the loss there is exactly log 2: a cheap check of the wiring.

    Args:
        pairs_per_prompt: for each prompt its pairs (chosen, rejected, gap), as from :func:`ranked_pairs`. They are sorted by
            falling gap; equal gaps keep their order.
        n_stages: how many. 1: all pairs pooled, one reference.
        bucket: ``"rank"``: stage i holds the i-th easiest pair of every prompt; a prompt with fewer pairs than stages is in
            the first of them, one with more is cut into nearly equal parts, the larger first. ``"global"``: all pairs
            sorted together and cut alike; by source, as gaps of different raters do not compare.
        reference: ``"previous"``: the reference of a stage is what the stage before it produced. ``"fixed"``: always the model
            that training starts from.
        source: for ``"global"``, the data set that each prompt is from; None: all are from one.
        reverse: the hardest stage first: the control of any claim about order.
    """

    def __init__(
        self,
        pairs_per_prompt: Sequence[Sequence[Sequence[Any]]],
        *,
        n_stages: int = 3,
        bucket: Literal["rank", "global"] = "rank",
        reference: Literal["previous", "fixed"] = "previous",
        source: Sequence[Hashable] | None = None,
        reverse: bool = False,
    ) -> None:
        choice("bucket", bucket, ("rank", "global"))
        choice("reference", reference, ("previous", "fixed"))
        if isinstance(n_stages, bool) or not isinstance(n_stages, int) or n_stages < 1:
            raise ValueError(f"n_stages is {n_stages!r}; a positive integer is expected")
        if source is not None and len(source) != len(pairs_per_prompt):
            raise ValueError(f"source has {len(source)} entries; {len(pairs_per_prompt)} are expected, one per prompt")
        self.n_stages = n_stages
        self.bucket = bucket
        self.reference = reference
        prompts = [[_pair(prompt, pair) for pair in pairs] for prompt, pairs in enumerate(pairs_per_prompt)]
        self.without_pairs = sum(not pairs for pairs in prompts)
        """How many prompts have no pair, and so are in no stage."""
        self._stages: list[list[CurriculumPair]] = [[] for _ in range(n_stages)]
        for pairs in prompts if bucket == "rank" else _by_source(prompts, source):
            falling = sorted(pairs, key=lambda pair: -pair.gap)
            for stage, part in zip(self._stages, _cut(falling, n_stages), strict=True):
                stage.extend(part)
        for stage in self._stages:
            stage.sort(key=lambda pair: pair.prompt)  # stable: the pairs of a prompt stay easiest first
        if reverse:
            self._stages.reverse()

    def __len__(self) -> int:
        return self.n_stages

    def stage(self, i: int, *, seed: int | None = None) -> list[CurriculumPair]:
        """The pairs of stage i, from 0, by prompt; or shuffled, alike for equal seeds."""
        pairs = list(self._stages[self._index(i)])
        if seed is not None:
            random.Random(f"{seed} {i}").shuffle(pairs)
        return pairs

    def reference_of(self, i: int) -> int | None:
        """The stage that produced the reference of stage i: the nearest before it with pairs. None: the model that training
        starts from."""
        i = self._index(i)
        if self.reference == "fixed":
            return None
        return next((before for before in range(i - 1, -1, -1) if self._stages[before]), None)

    def _index(self, i: int) -> int:
        if not 0 <= i < self.n_stages:
            raise ValueError(f"stage is {i}; accepted: 0 to {self.n_stages - 1}")
        return i


def _pair(prompt: int, pair: Sequence[Any]) -> CurriculumPair:
    if len(pair) != 3 or not pair[2] > 0:
        raise ValueError(
            f"pairs_per_prompt[{prompt}] has {tuple(pair)}; (chosen, rejected, gap) with a gap above 0 is expected"
        )
    return CurriculumPair(prompt, *pair)


def _by_source(prompts: list[list[CurriculumPair]], source: Sequence[Hashable] | None) -> list[list[CurriculumPair]]:
    pooled: dict[Hashable, list[CurriculumPair]] = {}
    for prompt, pairs in enumerate(prompts):
        pooled.setdefault(None if source is None else source[prompt], []).extend(pairs)
    return list(pooled.values())


def _cut(pairs: list[CurriculumPair], parts: int) -> list[list[CurriculumPair]]:
    """Nearly equal parts, the larger first."""
    size, larger = divmod(len(pairs), parts)
    ends = [i * size + min(i, larger) for i in range(parts + 1)]
    return [pairs[start:end] for start, end in pairwise(ends)]
