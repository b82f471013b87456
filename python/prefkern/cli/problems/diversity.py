"""How much the responses to prompts differ; sets of candidates unlike each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefkern.cli.problems.base import Problem, problem, ragged


def diversity_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Responses of uneven lengths, of two prompts; candidates of three types."""
    sequences = ragged(12, 33)
    mask = sequences.mask
    tokens = torch.randint(4, mask.shape).masked_fill(~mask, -7)
    cu_prompts = torch.tensor([0, 5, 12], dtype=torch.int32)
    for layout, where in (
        ("padded", {"ids": tokens, "mask": mask, "cu_prompts": cu_prompts}),
        ("packed", {"ids": tokens[mask], "cu_seqlens": sequences.cu_seqlens, "cu_prompts": cu_prompts}),
    ):
        more: dict[str, dict[str, Any]] = {"self_bleu": {}, "distinct_n": {"n": 2}, "edit_distance": {"normalize": True}}
        for op, options in more.items():
            given = problem(op, layout, {}, where | options)
            yield replace(given, ours=_on_the_cpu(given.ours))

    emb, types = torch.randn(3, 40, 17).to(dtype), torch.arange(40) % 3
    quotas = torch.tensor([[4, 3, 2], [1, 5, 1], [8, 1, 0]])
    for reduce in ("min", "max"):
        sets = {"emb": emb, "type_id": types, "seeds": torch.tensor([0, 4, 9]), "quotas": quotas}
        yield problem("greedy_select", reduce, {}, sets | {"size": 9, "reduce": reduce})


def _on_the_cpu(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """These ops have no kernel elsewhere."""

    def call(ids: Tensor, **options: Any) -> Tensor:
        there = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
        return op(ids.cpu(), **there).to(ids.device)

    return call
