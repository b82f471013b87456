"""Definitions of the ops of ``prefkern.ops.thompson``: Philox in 64-bit integers, and one prompt at a time where that reads
better."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prefkern.ops.thompson import ThompsonTopk

WORD = 0xFFFFFFFF
STREAM = 0x42657461


def philox(seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 of a 64-bit key and four 32-bit counters."""
    key0, key1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ key0, b & WORD, a >> 32 ^ c3 ^ key1, a & WORD
        key0, key1 = key0 + 0x9E3779B9 & WORD, key1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def beta_draw(alpha: float, beta: float, seed: int, step: int, prompt: int) -> float:
    """p of Beta(alpha + 1, beta + 1). Words 0 and 1 of an attempt make two normal proposals by Box and Muller, one for each
    gamma variate; words 2 and 3 decide, by Marsaglia and Tsang, whether they are taken."""
    shapes, taken = (alpha + 1, beta + 1), [0.0, 0.0]
    attempt = 0
    while 0.0 in taken:
        words = philox(seed, attempt, prompt, step, STREAM)
        unit = [((word >> 1) + 0.5) * 2.0**-31 for word in words]
        radius, angle = math.sqrt(-2 * math.log(unit[0])), math.tau * words[1] * 2.0**-32
        for which, normal in enumerate((radius * math.cos(angle), radius * math.sin(angle))):
            d = shapes[which] - 1 / 3
            v = (1 + normal / math.sqrt(9 * d)) ** 3
            if not taken[which] and v > 0 and math.log(unit[2 + which]) < normal**2 / 2 + d * (1 - v + math.log(v)):
                taken[which] = d * v
        attempt += 1
    return taken[0] / (taken[0] + taken[1])


def thompson_utility(p: Tensor, utility: Literal["p1mp2", "p1mp"] = "p1mp2") -> Tensor:
    """What a success probability is worth."""
    return p * (1 - p) ** 2 if utility == "p1mp2" else p * (1 - p)


def expected_thompson_utility(alpha: Tensor, beta: Tensor, utility: Literal["p1mp2", "p1mp"] = "p1mp2") -> Tensor:
    """Its expectation under Beta(alpha + 1, beta + 1)."""
    a, b = alpha + 1, beta + 1
    s = a + b
    return a * b * (b + 1) / (s * (s + 1) * (s + 2)) if utility == "p1mp2" else a * b / (s * (s + 1))


def beta_thompson_topk(
    alpha: Tensor,
    beta: Tensor,
    k: int,
    *,
    eligible: Tensor | None = None,
    utility: Literal["p1mp2", "p1mp"] = "p1mp2",
    mode: Literal["thompson", "mean"] = "thompson",
    seed: int = 0,
    step: int = 0,
    return_draws: bool = False,
) -> ThompsonTopk:
    """See :func:`prefkern.beta_thompson_topk`."""
    if mode == "mean":
        draws = (alpha + 1) / (alpha + beta + 2)
        worth = expected_thompson_utility(alpha, beta, utility)
    else:
        counts = enumerate(zip(alpha.tolist(), beta.tolist(), strict=True))
        draws = torch.tensor([beta_draw(a, b, seed, step, i) for i, (a, b) in counts], dtype=alpha.dtype)
        worth = thompson_utility(draws, utility)
    if eligible is not None:
        worth = torch.where(eligible, worth, -math.inf)
    values, ids = worth.sort(descending=True, stable=True)
    return ThompsonTopk(ids[:k], values[:k], draws if return_draws else None)


def decayed_beta_update_(
    alpha: Tensor, beta: Tensor, ids: Tensor, successes: Tensor, n: Tensor | int, *, lam1: float = 0.2, lam2: float = 0.999
) -> None:
    """See :func:`prefkern.decayed_beta_update_`."""
    for counts, added in ((alpha, successes), (beta, n - successes)):
        new = lam1 * counts[ids] + added
        counts.mul_(lam2)
        counts[ids] = new.to(counts.dtype)
