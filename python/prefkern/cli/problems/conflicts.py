"""Tokens on which completions of both signs agree; tokens above a quantile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prefkern.cli.problems.base import Problem, problem, ragged


def conflict_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Groups of uneven sizes whose completions agree here and there; advantages of both signs, and 0. Pairs of sequences."""
    sequences = ragged(12, 33)
    mask = sequences.mask
    tokens = torch.randint(2, mask.shape).masked_fill(~mask, -7)
    advantages = torch.randint(-1, 2, (12,)).to(dtype)
    group = torch.randint(0, 3, (12,)) * 7919 - 3
    given = {"advantages": advantages, "group": group}
    for layout, where in (
        ("padded", {"tokens": tokens, "mask": mask}),
        ("packed", {"tokens": tokens[mask], "cu_seqlens": sequences.cu_seqlens}),
    ):
        yield problem("conflict_runs", layout, {}, where | given)
        for combine in ("max_once", "product"):
            yield problem("conflict_weights", f"{layout}, {combine}", {}, where | given | {"combine": combine})

    shared = torch.randint(2, mask.shape)
    ids = {"ids_a": shared.masked_fill(~mask, -7), "ids_b": torch.where(torch.rand(mask.shape) < 0.1, 3, shared)}
    yield problem("first_divergence", "padded", {}, ids | {"mask_a": mask})
    packed = {"ids_a": tokens[mask], "cu_seqlens_a": sequences.cu_seqlens, "ids_b": ids["ids_b"]}
    yield problem("first_divergence", "packed and padded", {}, packed)


def filter_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Values of which some are equal."""
    sequences = ragged(9, 41)
    values = sequences.pad((torch.randn(9, 41) * 8).round() / 8, dtype)
    given = {"values": values, "mask": sequences.mask}
    for interpolation in ("linear", "lower", "higher"):
        for q in (0.0, 0.8, 1.0):
            yield problem("masked_quantile", f"{q}, {interpolation}", {}, given | {"q": q, "interpolation": interpolation})
    for rule in ("count", "trl"):
        for fraction in (0.2, 1.0):
            yield problem("top_quantile_mask", f"{rule}, {fraction}", {}, given | {"fraction": fraction, "rule": rule})
