"""Losses of lists and of groups, and skew-symmetric scores."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from prefkern.cli.problems.base import Problem, problem

LISTS, ITEMS = 13, 11
KINDS = ("plackett_luce", "lambda", "uniform", "exo", "infonca", "nca", "rrhf", "lire")


def list_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Ragged lists with NaN outside the mask, one of a single item; groups; embeddings with and without scales."""
    mask = torch.arange(ITEMS) < torch.randint(2, ITEMS + 1, (LISTS, 1))
    mask[3] = torch.arange(ITEMS) == 0
    scores = torch.randn(LISTS, ITEMS).masked_fill(~mask, math.nan).to(dtype)
    labels = torch.rand(LISTS, ITEMS).masked_fill(~mask, math.nan).to(dtype)
    for kind in KINDS:
        yield problem("listwise_loss", kind, {"scores": scores}, {"labels": labels, "mask": mask, "kind": kind, "beta": 0.5})
    by_score = {"labels": labels, "mask": mask, "kind": "lambda", "rank": "scores", "normalize": "pairs"}
    yield problem("listwise_loss", "lambda by scores", {"scores": scores}, by_score)
    winner = torch.arange(ITEMS) % 2 == 0
    group = {"is_winner": winner.expand(LISTS, ITEMS).contiguous(), "mask": mask}
    for scale in ("logratio", "reward"):
        options = {**group, "var_scale": scale, "lam": 0.3}
        yield problem("group_preference_loss", f"variance of the {scale}", {"scores": scores}, options)

    left, right = (torch.randn(LISTS, 6).to(dtype) for _ in range(2))
    scales = torch.rand(LISTS, 3).to(dtype)
    for normalize in (True, False):
        case = "normalised" if normalize else "as they are"
        yield problem("skew_score", case, {"v_i": left, "v_j": right, "scales": scales}, {"normalize": normalize})
        both = {"v_chosen": left, "v_rejected": right}
        yield problem("skew_loss", case, both, {"normalize": normalize, "tau": 0.5, "margin": scales[:, 0]})
        embeddings = {"v": torch.randn(LISTS, ITEMS, 6).to(dtype), "mask": mask}
        yield problem("skew_row_means", case, {}, {**embeddings, "normalize": normalize, "tau": 0.5})
