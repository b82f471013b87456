"""Sums over the tokens of each sequence, and recursions that run backwards through them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from prefkern.cli.problems.base import Problem, problem, ragged

ROWS, LENGTH = 9, 41


def sequence_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """NaN outside the mask, an empty sequence; padded and packed."""
    sequences = ragged(ROWS, LENGTH)
    mask = sequences.mask
    names = ("values", "minus", "weights", "rewards")
    padded = {name: sequences.pad(torch.randn(ROWS, LENGTH), dtype) for name in names}
    packed = {name: x[mask] for name, x in padded.items()}
    finished, last_values = torch.arange(ROWS) % 2 == 0, torch.randn(ROWS).to(dtype)
    layouts: tuple[tuple[str, dict[str, torch.Tensor], dict[str, Any]], ...] = (
        ("padded", padded, {"mask": mask}),
        ("packed", packed, {"cu_seqlens": sequences.cu_seqlens}),
    )
    for layout, tokens, where in layouts:
        leaf = {"values": tokens["values"]}
        difference = {"minus": tokens["minus"], "weights": tokens["weights"], "transform": "exp"}
        for op in ("sequence_sum", "sequence_mean"):
            yield problem(op, layout, leaf, where)
            yield problem(op, f"{layout}, weighted exp of a difference", leaf, where | difference)
        rewards = {"rewards": tokens["rewards"]} | where
        yield problem("discounted_returns", layout, {}, rewards | {"gamma": 0.9})
        given = rewards | leaf | {"gamma": 0.99}
        yield problem("gae", f"{layout}, finished", {}, given)
        for bootstrap in ("repeat", "critic", "zero"):
            more = {"last_values": last_values} if bootstrap == "critic" else {}
            options = {"finished": finished, "bootstrap": bootstrap} | more
            yield problem("gae", f"{layout}, {bootstrap}", {}, given | options)
        sizes = mask.sum(1)
        places = {"starts": sizes // 4, "ends": sizes, "head": sizes // 2, "tail_weight": 0.5, "decay": 0.97}
        for op in ("sequence_sum", "sequence_mean"):
            yield problem(op, f"{layout}, spans and places", leaf, where | places)
    lengths = {"lengths": mask.sum(1), "finished": finished}
    yield problem("gae", "lengths", {}, {"rewards": padded["rewards"], "values": padded["values"]} | lengths)
    rows = {"rewards": torch.randn(60).to(dtype), "segment": torch.randint(0, 7, (60,)), "order": torch.randperm(60)}
    hidden = torch.randn(ROWS, LENGTH, 21).to(dtype).masked_fill(~mask[..., None], torch.nan)
    steps = torch.randint(0, 4, (ROWS, LENGTH)).masked_fill(~mask, 0)
    cu_seqlens = {"cu_seqlens": sequences.cu_seqlens}
    yield problem("masked_mean_pool", "padded", {"hidden": hidden}, {"mask": mask})
    yield problem("masked_mean_pool", "packed", {"hidden": hidden[mask]}, cu_seqlens)
    yield problem("step_mean", "hidden states", {"values": hidden}, {"step_ids": steps, "n_steps": 3})
    merged = {"step_ids": steps[mask], "n_steps": 2, "clamp": True} | cu_seqlens
    yield problem("step_mean", "packed numbers, surplus steps merged", {"values": packed["values"]}, merged)
    yield problem("segmented_returns", "seven segments", {}, rows | {"gamma": 0.9})
