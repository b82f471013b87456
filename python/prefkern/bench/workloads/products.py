"""What a linear head cannot do without: its matrix products, by torch.mm into buffers made before."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from prefkern.bench.shapes import DTYPES, Case
from prefkern.bench.timing import seconds_of
from prefkern.bench.workloads.base import Floor

ACTIVE = 0.2
"""Of the rows, in mode "active": those that have a gradient."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
NARROW = (torch.bfloat16, torch.float16)


def active_rows(rows: int) -> int:
    """How many of so many rows have a gradient in mode "active"."""
    return max(1, round(ACTIVE * rows))


def head_floor(hidden: Tensor, weight: Tensor, mode: str, forward: int = 1) -> Floor:
    """The products of a head over hidden [N, H] and weight [V, H]: hidden W^T `forward` times, and with F the cost of one:

    fwd     forward only                                             1 F
    bwd     gradients of hidden and weight                           3 F
    frozen  gradient of hidden                                       2 F
    active  both gradients of the active rows, the first of all      (1 + 2 ACTIVE) F

    Narrow types are multiplied in float32 on a CPU where that is quicker: the least work is then that.
    """
    rows = len(hidden)
    with_gradient = 0 if mode == "fwd" else active_rows(rows) if mode == "active" else rows
    dtype = quickest_type(hidden.dtype, hidden.device.type, mode != "fwd")
    about = f"torch.mm in {NAMES[dtype]}"
    if mode == "active":
        about = f"{forward} + 2 x {ACTIVE:g} {about}"
    else:
        count = forward + {"fwd": 0, "frozen": 1}.get(mode, 2)
        about = f"{count} {about}" if count > 1 else about
    if dtype != hidden.dtype:
        about += f", quicker here than in {NAMES[hidden.dtype]}"
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    logits = torch.empty(rows, len(weight), dtype=dtype, device=hidden.device)
    d_hidden, d_weight = (
        torch.empty_like(hidden[:with_gradient]),
        torch.empty_like(weight if mode in ("bwd", "active") else weight[:0]),
    )

    def products() -> None:
        for _ in range(forward):
            torch.mm(hidden, weight.T, out=logits)
        if with_gradient:
            torch.mm(logits[:with_gradient], weight, out=d_hidden)
        if len(d_weight):
            torch.mm(logits[:with_gradient].T, hidden[:with_gradient], out=d_weight)

    return Floor(about, products)


def quickest_type(dtype: torch.dtype, device: str, backward: bool) -> torch.dtype:
    """The type itself, or float32 if products in that are quicker: CPUs without instructions for a narrow type."""
    if dtype not in NARROW or device != "cpu":
        return dtype
    own, wide = (_seconds_per_flop(t, backward, torch.get_num_threads()) for t in (dtype, torch.float32))
    return torch.float32 if wide < own else dtype


def seconds_in_own_type(case: Case, device: str) -> float:
    """About how long the products of a case take in its own type, which is what plain PyTorch does with them.

    0 where that type is the quickest there is, or there are no products.
    """
    dtype, backward = DTYPES[case.dtype], case.mode != "fwd"
    if not case.op.startswith("linear_") or quickest_type(dtype, device, backward) == dtype:
        return 0.0
    *rows, width, vocab = case.shape
    count = 2 if case.op == "linear_preference_loss" else 1
    for n in rows:
        count *= n
    passes = 3 if backward else 1
    return passes * 2.0 * count * width * vocab * _seconds_per_flop(dtype, backward, torch.get_num_threads())


@lru_cache
def _seconds_per_flop(dtype: torch.dtype, backward: bool, threads: int) -> float:
    """Of the products of a small head."""
    n, h, v = 64, 256, 1024
    hidden, weight = torch.ones(n, h, dtype=dtype), torch.ones(v, h, dtype=dtype)
    logits = hidden @ weight.T

    def products() -> None:
        torch.mm(hidden, weight.T)
        if backward:
            torch.mm(logits, weight)
            torch.mm(logits.T, hidden)

    products()
    return min(seconds_of(products) for _ in range(3)) / ((3 if backward else 1) * 2 * n * h * v)
