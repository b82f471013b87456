"""Normal numbers that are made from a seed where they are needed, and never stored. Kernels: ``csrc/sampling``; formulas:
``csrc/core/philox.h``, ``csrc/math/normal.h``."""

import torch
from torch import Tensor

from ._arguments import accumulator, check_tensors, integer, number, same_device
from ._call import call

_OPS = torch.ops.prefkern
_combine, _combine_inplace = _OPS.seeded_normal_combine.default, _OPS.seeded_normal_combine_.default
_add_inplace = _OPS.seeded_normal_add_.default


def seeded_normal(
    seed: int,
    row: int,
    n: int,
    *,
    element_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Elements ``element_offset`` to ``element_offset + n`` of one row of standard normal numbers.

    Element e of row i of a seed is a function of the three alone. Philox4x32-10, with the seed as its key and the counter
    ``(b low, b high, i, 0)``, gives the block :math:`b = \lfloor e / 4 \rfloor` of four elements its words; the first two and
    the last two become two numbers each (Box and Muller), of :math:`u = (\mathrm{word} + \frac12) 2^{-32}`:

    .. math::
        \sqrt{-2 \ln u_a} \cos 2\pi u_b, \qquad \sqrt{-2 \ln u_a} \sin 2\pi u_b

    The words are the same on every device, the numbers within 1e-6 of the definition in float32.

    Args:
        seed: 64 bits: an integer from :math:`-2^{63}` to :math:`2^{64} - 1`, a negative one standing for its two's complement.
        row: i, from 0 to :math:`2^{32} - 1`.
        n: how many elements.
        element_offset: where in the row they begin. The parameters of one model take consecutive parts of a row.
        dtype: float32, or float64 on the CPU.
        device: where to.

    Returns:
        ``[n]``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype is {dtype}; accepted: torch.float32, and torch.float64 on the CPU")
    one = torch.ones(1, dtype=dtype, device=device)
    first_row, start = _in_int64("row", row), _in_int64("element_offset", element_offset)
    _check_rows("row", first_row, 1)
    result: Tensor = call(_combine, one, None, _bits(seed), _in_int64("n", n), first_row, start, 1.0)
    return result


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
    r"""A weighted sum of rows of :func:`seeded_normal`, none of which is ever in memory:
    ``add_to`` :math:`+\ \mathrm{scale} \sum_i w_i N(\mathrm{seed}, i, e)`.

    Time O(m n), memory that of the result. The same bits for any number of threads, and however the elements are cut.

    Args:
        seed: as for :func:`seeded_normal`.
        weights: w, ``[m]``, of rows ``first_row`` to ``first_row + m``, added up in that order; float32, float64, bfloat16 or
            float16, on the device of ``add_to``. Constants: nothing here has a gradient.
        n: how many elements; with ``add_to`` that number, or None.
        scale: a factor of the sum.
        add_to: any shape; float32, bfloat16 or float16 (float64 on the CPU). Computed in float32 (float64) and rounded once.
        first_row: the row of the first weight.
        element_offset: where in the rows the elements begin.

    Returns:
        Shaped like ``add_to`` and of its dtype, its elements in row-major order whatever its strides; without it ``[n]``,
        float32, or float64 for float64 weights.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(weights=weights)
    if add_to is not None:
        check_tensors(add_to=add_to)
        same_device("add_to", add_to, weights=weights)
    elif n is None:
        raise ValueError("n and add_to are None; one of them is expected")
    count = -1  # that of add_to, of which a compiled graph need not know how many elements it has
    if n is not None:
        count = _in_int64("n", n)
        if count < 0:
            raise ValueError(f"n is {count}; it must not be negative")
    rows, start = _in_int64("first_row", first_row), _in_int64("element_offset", element_offset)
    numbers = (_bits(seed), count, rows, start, number("scale", scale))
    result: Tensor = call(_combine, weights.detach(), None if add_to is None else add_to.detach(), *numbers)
    return result


def seeded_normal_combine_(
    x: Tensor, seed: int, weights: Tensor, *, scale: float = 1.0, first_row: int = 0, element_offset: int = 0
) -> Tensor:
    """:func:`seeded_normal_combine` added to ``x`` in place: a step along directions that are known by their seed. Whether it
    requires a gradient does not matter; no graph is made.

    Args:
        x: a parameter, say, any shape; float32, bfloat16 or float16 (float64 on the CPU). No memory beside it is needed if it
            is contiguous. Computed in float32 (float64) and rounded once.
        seed, weights, scale, first_row, element_offset: as for :func:`seeded_normal_combine`.

    Returns:
        x.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(x=x, weights=weights)
    same_device("x", x, weights=weights)
    rows, start = _in_int64("first_row", first_row), _in_int64("element_offset", element_offset)
    factor, key, constants = number("scale", scale), _bits(seed), weights.detach()
    with torch.no_grad():
        flat = x.detach().contiguous()
        call(_combine_inplace, flat, constants, key, rows, start, factor)
        _written(x, flat)
    return x


def seeded_normal_add_(x: Tensor, seed: int, row: int, mu: float, *, element_offset: int = 0) -> Tensor:
    """``x += mu * seeded_normal(seed, row, ...)`` in place: a probe of a zeroth-order method, its direction in no memory.

    The same call with ``-mu`` takes it back but for what rounding lost: in float32 an ulp of the larger of the two numbers, in
    bfloat16 far more. Where that matters, keep a copy and put it back.

    Args:
        x: as for :func:`seeded_normal_combine_`.
        seed, row, element_offset: as for :func:`seeded_normal`.
        mu: a factor, the smoothing of the probe.

    Returns:
        x.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(x=x)
    index, start = _in_int64("row", row), _in_int64("element_offset", element_offset)
    factor, key = number("mu", mu), _bits(seed)
    with torch.no_grad():
        flat = x.detach().contiguous()
        call(_add_inplace, flat, key, index, start, factor)
        _written(x, flat)
    return x


def _written(x: Tensor, flat: Tensor) -> None:
    """What the op has written into `flat` into `x`, and to its version, by which autograd finds that a saved tensor changed."""
    if not x.is_contiguous():
        x.copy_(flat)
    elif not (torch.compiler.is_compiling() or x.is_inference()):
        torch.autograd.graph.increment_version(x)


def _bits(seed: int) -> int:
    """The 64 bits of a seed as the op's schema has them."""
    value = integer("seed", seed)
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"seed is {value}; an integer of 64 bits is expected")
    return value - (1 << 64) if value >= 1 << 63 else value


def _in_int64(name: str, value: int | None) -> int:
    result = integer(name, value)
    if not -(1 << 63) <= result < 1 << 63:
        raise ValueError(f"{name} is {result}; it must be below 2^63")
    return result


def _check_rows(name: str, first: int, count: int) -> None:
    if first < 0 or first + count > 1 << 32:
        raise ValueError(f"{name} is {first} for {count} rows; a seed has rows 0 to 2^32 - 1")


# ---- fake implementations --------------------------------------------------------------------------------------------


@torch.library.register_fake("prefkern::seeded_normal_combine")
def _fake_combine(
    weights: Tensor, add_to: Tensor | None, seed: int, n: int, first_row: int, first_element: int, scale: float
) -> Tensor:
    if add_to is None:
        return weights.new_empty((n,), dtype=accumulator(weights))
    same_device("add_to", add_to, weights=weights)
    return add_to.new_empty(add_to.shape)


@torch.library.register_fake("prefkern::seeded_normal_combine_")
def _fake_combine_inplace(x: Tensor, weights: Tensor, seed: int, first_row: int, first_element: int, scale: float) -> None:
    same_device("x", x, weights=weights)


@torch.library.register_fake("prefkern::seeded_normal_add_")
def _fake_add_inplace(x: Tensor, seed: int, row: int, first_element: int, mu: float) -> None:
    return None
