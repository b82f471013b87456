"""Advantages of samples against the others of their group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from prefkern.cli.problems.base import Problem, problem

EVERY_STATISTIC = ("mean", "std", "count", "min", "max")


def advantage_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Shuffled groups of uneven sizes: some of one, one with equal rewards."""
    group = torch.cat([torch.randint(0, 40, (300,)) * 7919 - 3, torch.arange(1000, 1010)])
    group = group[torch.randperm(len(group))]
    samples = len(group)
    rewards, lengths = torch.rand(samples, 3).to(dtype), torch.randint(1, 50, (samples,))
    rewards[group == group[0]] = 0.1
    one = rewards[:, 0].contiguous()
    some_nan = rewards.masked_fill(torch.rand(rewards.shape) < 0.2, math.nan)
    two = {"rewards": rewards, "weights": (0.5, 1.0, 2.0), "combine": "normalize_then_sum"}

    def advantages(case: str, **options: Any) -> Problem:
        return problem("group_advantages", case, {}, {"rewards": one, "group": group} | options)

    for estimator in ("grpo", "dr_grpo", "rloo", "opo", "mad", "pass_at_k", "pass_at_k_no_std"):
        more = {"lengths": lengths} if estimator == "opo" else {}
        for singleton in ("zero", "reward"):
            yield advantages(f"{estimator}, singleton {singleton}", estimator=estimator, singleton=singleton, **more)
    yield advantages("every statistic", outputs=EVERY_STATISTIC)
    yield advantages("ddof 0", ddof=0)
    yield advantages("ngrpo", virtual_value=1.0, virtual_count=2, singleton="calibrate")
    for batch in ("std", "seq", "token", "nonzero"):
        more = {"lengths": lengths} if batch == "token" else {}
        yield advantages(f"batch {batch}", estimator="dr_grpo" if batch == "nonzero" else "grpo", batch=batch, **more)
    yield advantages("three rewards, sum_then_normalize", **(two | {"combine": "sum_then_normalize"}))
    yield advantages("three rewards, normalize_then_sum, seq (gdpo)", batch="seq", **two)
    yield advantages("three rewards, normalize_then_sum, token", batch="token", lengths=lengths, **two)
    yield advantages("NaN ignored", nan="ignore", batch="seq", **(two | {"rewards": some_nan}))
    yield advantages("NaN as zero", nan="zero", **(two | {"rewards": some_nan}))

    accuracy = (one > 0.5).to(dtype)
    for case, more in (("rewards", {}), ("lengths and accuracy", {"lengths": lengths, "main_rewards": accuracy})):
        yield problem("question_weights", case, {}, {"rewards": one, "group": group} | more)
    scores = torch.rand(samples).to(dtype)
    for mode in ("gap", "abs"):
        for level in ("pair", "sequence"):
            options = {"rewards": one, "scores": scores, "group": group, "mode": mode, "level": level}
            yield problem("pair_masked_advantages", f"{mode}, {level}", {}, options)

    values, mask = torch.randn(9, 41).to(dtype), torch.rand(9, 41) < 0.7
    yield problem("batch_moments", "all", {}, {"values": values})
    yield problem("batch_moments", "masked", {}, {"values": values, "weights": mask})
    parts = torch.tensor([[3.0, 0.5, 2.0], [0.0, 0.0, 0.0], [5.0, -1.5, 4.0]], dtype=torch.float64)
    yield problem("merge_moments", "three parts, one empty", {}, {"moments": parts})
    merged = torch.tensor([8.0, -0.75, 13.5], dtype=torch.float64)
    for mode in ("seq", "token"):
        normalised = {"values": values, "moments": merged, "mask": mask}
        yield problem("batch_normalize", mode, {}, normalised | {"mode": mode, "eps": 1e-4})
    yield problem("whiten", "masked", {}, {"values": values, "mask": mask})
