"""What `prefkern check` calls every op with, one module per room."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prefkern.cli.problems.advantages import advantage_problems
from prefkern.cli.problems.base import Problem, on
from prefkern.cli.problems.conflicts import conflict_problems, filter_problems
from prefkern.cli.problems.diffusion import diffusion_problems
from prefkern.cli.problems.diversity import diversity_problems
from prefkern.cli.problems.gaussian import gaussian_problems
from prefkern.cli.problems.groups import group_problems
from prefkern.cli.problems.lists import list_problems
from prefkern.cli.problems.logprobs import logprob_problems
from prefkern.cli.problems.meta import meta_problems
from prefkern.cli.problems.policy import policy_problems
from prefkern.cli.problems.preference import preference_problems
from prefkern.cli.problems.sampling import sampling_problems
from prefkern.cli.problems.sequence import sequence_problems
from prefkern.cli.problems.thompson import thompson_problems

__all__ = ["Problem", "all_problems", "on"]


def all_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Of every op, with inputs of this type on the CPU."""
    for problems in (
        logprob_problems,
        advantage_problems,
        policy_problems,
        preference_problems,
        list_problems,
        diffusion_problems,
        conflict_problems,
        filter_problems,
        sequence_problems,
        group_problems,
        sampling_problems,
        diversity_problems,
        gaussian_problems,
        meta_problems,
        thompson_problems,
    ):
        yield from problems(dtype)
