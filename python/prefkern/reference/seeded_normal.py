"""Normal numbers from a seed, a row and a place in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_words(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32 bits each: four words for every counter, the seed's 64 bits being the key."""
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wrap around in 64 bits, which are the right ones
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ key[0], b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ key[1], a & _LOW
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def seeded_normal(seed: int, row: int, n: int, *, element_offset: int = 0) -> Tensor:
    """Elements element_offset to element_offset + n of a row, float64: of block b = e // 4 the words of counter
    (b low, b high, row, 0), u = (word + 1/2) / 2^32, and of words (0, 1) and (2, 3)

        sqrt(-2 ln u_a) cos(2 pi u_b),  sqrt(-2 ln u_a) sin(2 pi u_b)
    """
    first = element_offset // 4
    blocks = torch.arange(first, (element_offset + n + 3) // 4)
    zero = torch.zeros_like(blocks)
    words = philox_words(seed, blocks & _LOW, blocks >> 32, zero + row, zero)
    u = [(w.double() + 0.5) * 2.0**-32 for w in words]
    numbers = []
    for a, b in (u[:2], u[2:]):
        radius, angle = (-2 * a.log()).sqrt(), 2 * math.pi * b
        numbers += [radius * angle.cos(), radius * angle.sin()]
    skip = element_offset - 4 * first
    return torch.stack(numbers, 1).reshape(-1)[skip : skip + n]


def seeded_normal_combine(
    seed: int,
    weights: Tensor,
    n: int | None = None,
    *,
    scale: float = 1.0,
    add_to: Tensor | None = None,
    first_row: int = 0,
    element_offset: int = 0,
) -> Tensor:
    """add_to + scale sum_i weights[i] seeded_normal(seed, first_row + i), float64: [n], or shaped like add_to."""
    if add_to is not None:
        n = add_to.numel()
    elif n is None:
        raise ValueError("n: got None, accepted with add_to only")
    total = torch.zeros(n, dtype=torch.float64)
    for i, weight in enumerate(weights.tolist()):
        total += weight * seeded_normal(seed, first_row + i, n, element_offset=element_offset)
    total = scale * total
    return total if add_to is None else add_to.double() + total.view(add_to.shape)
