"""The definition of ``prefkern.ops.budget``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def knapsack_allocate(utilities: Tensor, total: int, *, b_min: int = 0, method: Literal["exact", "greedy"] = "exact") -> Tensor:
    """See :func:`prefkern.knapsack_allocate`."""
    table = utilities.double().tolist()
    n, most = len(table), utilities.shape[1] - 1
    surplus = min(total - n * b_min, n * most)
    extra = [0] * n
    if method == "greedy":
        for _ in range(surplus):
            gains = [(u[j + 1] - u[j], -i) for i, (u, j) in enumerate(zip(table, extra, strict=True)) if j < most]
            if not gains or max(gains)[0] <= 0:
                break
            extra[-max(gains)[1]] += 1
        return torch.tensor(extra, dtype=torch.int64) + b_min
    best, chosen = [0.0] * (surplus + 1), []
    for u in table:
        options = [[best[s - j] + u[j] for j in range(min(s, most) + 1)] for s in range(surplus + 1)]
        best = [max(sums) for sums in options]
        chosen.append([sums.index(max(sums)) for sums in options])
    for i in range(n - 1, -1, -1):
        extra[i] = chosen[i][surplus]
        surplus -= extra[i]
    return torch.tensor(extra, dtype=torch.int64) + b_min
