"""The CUDA kernels of csrc/sampling, compiled for the CPU by tests/simt, against the CPU's and their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import _C, reference
from simt.harness import close, guards_hold, launches, misaligned, pointer, same_bits_in_every_order, tensor_like

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def words(module, launch, seed: int, row: int, first: int, blocks: int) -> Tensor:
    args, out = module.PhiloxArgs(), torch.zeros(blocks, 4, dtype=torch.int32)
    args.seed, args.row, args.first_block, args.blocks, args.words = seed, row, first, blocks, pointer(out)
    launch(args)
    return out


@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1])
@pytest.mark.parametrize(("row", "first"), [(0, 0), (2, 1), (2**32 - 1, 2**32 - 100), (7, 2**59)])
def test_words_have_the_same_bits(simt, seed, row, first):
    there = words(simt, simt.cuda_philox_words, seed, row, first, 300)
    assert torch.equal(there, words(_C, _C.cpu_philox_words, seed, row, first, 300))
    assert not torch.equal(there[:-1], there[1:])


def normal(
    simt, x: Tensor | None, out: Tensor, weights: Tensor | None, rows: int, first: int, scale: float, first_row: int
) -> Tensor:
    args = simt.NormalArgs()
    args.seed, args.first_row, args.rows, args.scale = 42, first_row, rows, scale
    args.first_element, args.count = first, out.numel()
    args.dtype = getattr(simt.DType, next(name for name, dtype in TYPES.items() if dtype == out.dtype))
    args.weights, args.add_to, args.out = pointer(weights), pointer(x), pointer(out)
    simt.cuda_seeded_normal(args)
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("first", [0, 2, 4 * 2**32 - 600])
@pytest.mark.parametrize("count", [1, 3, 4, 1030])
def test_sums(simt, dtype, first, count):
    weights, x = torch.randn(5), torch.randn(count).to(TYPES[dtype])
    exact = reference.seeded_normal_combine(42, weights, scale=0.3, add_to=x, first_row=9, element_offset=first)
    out = same_bits_in_every_order(simt, lambda: normal(simt, x, tensor_like(x), weights, 5, first, 0.3, 9))
    tolerance = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    close(out, exact, atol=4e-6, rtol=1.01 * tolerance)
    inplace = normal(simt, x, x, weights, 5, first, 0.3, 9)
    assert torch.equal(inplace, out)


def test_against_the_cpu(simt):
    """Numbers differ by what the compilers fuse."""
    out = normal(simt, None, torch.zeros(40_000), None, 1, 0, 1.0, 3)
    args, there = _C.NormalArgs(), torch.zeros(40_000)
    args.seed, args.first_row, args.rows, args.count, args.out = 42, 3, 1, 40_000, pointer(there)
    _C.cpu_seeded_normal(args)
    close(out, there, atol=1e-6, rtol=0)
    close(out, reference.seeded_normal(42, 3, 40_000), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_any_alignment_and_nothing_outside(simt, dtype):
    """Places that are no multiple of four elements are written one by one."""
    weights, values = torch.randn(2), torch.randn(9, 21)
    x = misaligned(values, TYPES[dtype])
    for row in x:
        out = tensor_like(row)
        first = 8
        normal(simt, row, out, weights, 2, first, 1.0, 0)
        exact = reference.seeded_normal_combine(42, weights, add_to=row, element_offset=first)
        close(out, exact, atol=4e-6, rtol=1e-6 if dtype == "float32" else 2.0**-8)
        assert guards_hold(out)
    for row in x:
        normal(simt, row, row, weights, 2, 1, 1.0, 0)
    assert guards_hold(x)


def test_more_rows_than_shared_memory_holds(simt):
    weights = torch.randn(2500)
    out = same_bits_in_every_order(simt, lambda: normal(simt, None, torch.zeros(9), weights, 2500, 3, 0.1, 0))
    close(out, reference.seeded_normal_combine(42, weights, 9, scale=0.1, element_offset=3), atol=2e-5, rtol=0)


def test_nothing_is_launched_for_nothing(simt):
    assert launches(simt, lambda: normal(simt, None, torch.zeros(0), torch.ones(1), 1, 0, 1.0, 0)) == 0
    assert launches(simt, lambda: words(simt, simt.cuda_philox_words, 0, 0, 0, 0)) == 0
    assert not normal(simt, None, torch.full((5,), 7.0), None, 0, 0, 1.0, 0).any()
