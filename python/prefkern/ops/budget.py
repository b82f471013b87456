"""A budget of rollouts shared out among prompts. Kernel: ``csrc/sampling/budget.cpp``. On the CPU, in float64."""

from typing import Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, integer
from ._call import call

_allocate = torch.ops.prefkern.knapsack_allocate.default

METHODS = ("exact", "greedy")


def knapsack_allocate(utilities: Tensor, total: int, *, b_min: int = 0, method: Literal["exact", "greedy"] = "exact") -> Tensor:
    r"""Budgets :math:`B_i \in [b_\min, b_\min + K - 1]` of n prompts with :math:`\sum_i B_i \le` total and
    :math:`\sum_i U_i(B_i)` as large as that allows, for any tables U.

    Args:
        utilities: ``[n, K]`` on the CPU, any floating type, finite: ``utilities[i, j]`` is what a budget of b_min + j is worth
            to prompt i. It need neither rise nor be concave.
        total: at least n b_min. What is beyond n (b_min + K - 1), and what nobody gains from, stays unspent:
            ``total - budgets.sum()``.
        b_min: what everybody gets.
        method: ``"exact"``: a dynamic programme, O(n S K) time and O(n S) memory for a surplus S = total - n b_min; of equal
            sums the one that gives less to the later prompt. ``"greedy"``: one at a time to the prompt that gains most by it,
            the first of equal ones, while somebody gains; where U is not concave that can be far from the most.

    Returns:
        int64 ``[n]``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(utilities=utilities)
    total, least = integer("total", total), integer("b_min", b_min)
    how = choice("method", method, METHODS)
    if least < 0:
        raise ValueError(f"b_min is {least}; it must not be negative")
    prompts = utilities.shape[0] if utilities.dim() else 0
    if total < prompts * least:
        raise ValueError(f"total is {total}; {prompts} prompts take at least {prompts * least}, {least} each")
    budgets: Tensor = call(_allocate, utilities.detach(), total - prompts * least, how)
    return budgets + least


@torch.library.register_fake("prefkern::knapsack_allocate")
def _fake_allocate(utilities: Tensor, surplus: int, method: int) -> Tensor:
    torch._check(utilities.dim() == 2, lambda: f"utilities has shape {list(utilities.shape)}; expected [n, K]")
    return utilities.new_empty((utilities.shape[0],), dtype=torch.int64)
