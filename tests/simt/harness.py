"""What the tests of CUDA kernels on the CPU share: memory that shows stray writes, and results in every order of threads."""

from __future__ import annotations

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
GUARD = 7.0  # what fills the memory that a kernel must leave alone


def set_order(simt, order: str, seed: int) -> None:
    simt.set_order(getattr(simt.Order, order), seed)


def launches(simt, call) -> int:
    """How many kernels `call` launches."""
    before = simt.launches()
    call()
    return simt.launches() - before


def tensor_like(logits: Tensor, *, fill: float = GUARD, dtype: torch.dtype | None = None) -> Tensor:
    """Same shape and strides, in memory of its own that ends with the last element."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(logits.shape, logits.stride(), strict=True))
    offset = logits.storage_offset()
    memory = torch.full((offset + size,), fill, dtype=dtype or logits.dtype)
    return memory.as_strided(logits.shape, logits.stride(), offset)


def misaligned(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [rows, columns] with rows that begin at every alignment."""
    rows, columns = values.shape
    odd = columns + 1 + columns % 2
    memory = torch.full((1 + (rows - 1) * odd + columns,), GUARD, dtype=dtype)
    return memory.as_strided((rows, columns), (odd, 1), 1).copy_(values)


def guards_hold(view: Tensor) -> bool:
    """Whether the memory around and between the elements of `view` is untouched."""
    memory = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).clone()
    memory.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(GUARD)
    return bool((memory == GUARD).all())


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def close(actual: Tensor, expected: Tensor, *, atol: float = 1e-5, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol, equal_nan=True)


def same_bits(a: dict[str, Tensor] | Tensor, b: dict[str, Tensor] | Tensor) -> bool:
    if isinstance(a, dict):
        return all(same_bits(a[name], b[name]) for name in a)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def same_bits_in_every_order(simt, compute):
    """What `compute` returns, whichever thread and block runs first."""
    results = []
    for order in (*ORDERS, ORDERS[0]):
        set_order(simt, *order)
        results.append(compute())
    assert all(same_bits(results[0], result) for result in results[1:])
    return results[0]
