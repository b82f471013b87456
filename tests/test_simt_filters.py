"""The CUDA kernels of csrc/filters, compiled for the CPU by tests/simt, against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import INF, NAN, pointer, same_bits_in_every_order, tensor_like

INTERPOLATIONS = ("linear", "lower", "higher")


def arguments(simt, values, mask):
    args = simt.SelectArgs()
    args.count = values.numel()
    args.values, args.mask = pointer(values), pointer(mask)
    workspace = torch.zeros(simt.select_workspace(args.count), dtype=torch.int64)
    args.workspace = pointer(workspace)
    return args, workspace


def quantile(simt, values, q, mask=None, interpolation="linear") -> Tensor:
    args, workspace = arguments(simt, values, mask)
    args.q, args.interpolation = q, getattr(simt.Interpolation, interpolation)
    out = torch.full((), 7.0)
    args.quantile = pointer(out)
    simt.cuda_quantile(args)
    assert workspace.any() or not values.numel()
    return out


def keep_largest(simt, values, fraction, mask=None) -> Tensor:
    args, _workspace = arguments(simt, values, mask)
    args.fraction = fraction
    keep = tensor_like(values, dtype=torch.uint8)
    args.keep = pointer(keep)
    simt.cuda_keep_largest(args)
    return keep


def keep_from(simt, values, threshold, mask=None) -> Tensor:
    args, _workspace = arguments(simt, values, mask)
    keep, threshold = tensor_like(values, dtype=torch.uint8), torch.tensor(threshold)
    args.keep, args.quantile = pointer(keep), pointer(threshold)
    simt.cuda_keep_from(args)
    return keep


SAMPLES = {
    "normal": torch.randn,
    "wide": lambda n: torch.randn(n) * 10.0 ** torch.randint(-30, 30, (n,)),
    "few": lambda n: torch.randint(-2, 3, (n,)) * -0.5,  # with both zeros
    "equal": lambda n: torch.full((n,), 0.7),
    "infinite": lambda n: torch.tensor([INF, -INF, 1.0, 2.0])[torch.randint(4, (n,))],
}
FRACTIONS = (0.0, 0.07, 0.5, 1 - 0.2)


def masked(values: Tensor) -> Tensor:
    """A mask, with garbage behind it."""
    mask = torch.rand(len(values)) < 0.7
    values[~mask] = NAN
    return mask


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("size", [1, 2, 300])
def test_quantile(simt, sample, with_mask, size):
    values = SAMPLES[sample](size)
    mask = masked(values) if with_mask else None
    for q in FRACTIONS:
        for interpolation in INTERPOLATIONS:
            out = same_bits_in_every_order(simt, lambda q=q, i=interpolation: quantile(simt, values, q, mask, i))
            expected = reference.masked_quantile(values, q, mask, interpolation=interpolation)
            assert out.item() == pytest.approx(expected.item(), rel=6e-8, abs=0, nan_ok=True)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("size", [1, 2, 300])
def test_keep_largest(simt, sample, with_mask, size):
    values = SAMPLES[sample](size)
    mask = masked(values) if with_mask else None
    for fraction in FRACTIONS:
        out = same_bits_in_every_order(simt, lambda f=fraction: keep_largest(simt, values, f, mask))
        assert torch.equal(out.bool(), reference.top_quantile_mask(values, mask, fraction=fraction))


@pytest.mark.parametrize("sample", ["normal", "few", "equal"])
@pytest.mark.parametrize("size", [8193, 20_001])
def test_several_blocks(simt, sample, size):
    """Ties are kept in the order of memory across the blocks."""
    values = SAMPLES[sample](size)
    mask = masked(values)
    for fraction in (0.11, 0.5, 0.93):
        out = same_bits_in_every_order(simt, lambda f=fraction: keep_largest(simt, values, f, mask))
        assert torch.equal(out.bool(), reference.top_quantile_mask(values, mask, fraction=fraction))
        out = same_bits_in_every_order(simt, lambda f=fraction: quantile(simt, values, f, mask))
        assert out.item() == pytest.approx(reference.masked_quantile(values, fraction, mask).item(), rel=6e-8, abs=0)


def test_more_values_than_blocks_take_at_once(simt):
    """As many blocks as there may be, each with a larger share."""
    size = 512 * 8192 + 12_345
    values = (torch.arange(size) * 7919 % 1001).float()
    kept = keep_largest(simt, values, 0.25).bool()
    assert kept.sum() == math.ceil(0.25 * size)
    assert torch.equal(kept, reference.top_quantile_mask(values, fraction=0.25))
    assert quantile(simt, values, 0.5) == reference.masked_quantile(values, 0.5)


def test_the_next_value_is_far_away(simt):
    values = torch.full((9000,), -3.0)
    values[17] = 1e20
    assert quantile(simt, values, 8998.5 / 8999).item() == torch.tensor(5e19 - 1.5).item()
    assert quantile(simt, values, 8998.5 / 8999, None, "lower").item() == -3


@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("size", [1, 300, 5000])
def test_keep_from(simt, with_mask, size):
    values = SAMPLES["few"](size)
    mask = masked(values) if with_mask else torch.ones(size, dtype=torch.bool)
    for threshold in (-INF, -0.5, -0.0, 0.0, 0.7, INF):
        out = same_bits_in_every_order(simt, lambda t=threshold: keep_from(simt, values, t, mask if with_mask else None))
        assert torch.equal(out.bool(), mask & (values >= threshold))
    assert not keep_from(simt, values, NAN, mask).any()


def test_keep_from_of_more_values_than_the_grid_has_threads(simt):
    values = torch.arange(4096 * 256 + 100).float()
    assert keep_from(simt, values, 50.0).bool().sum() == len(values) - 50


@pytest.mark.parametrize("size", [0, 1, 9000])
def test_nothing_that_counts(simt, size):
    values, mask = torch.full((size,), NAN), torch.zeros(size, dtype=torch.bool)
    for q in (0.0, 1.0):
        for m in (mask, None):
            assert quantile(simt, values, q, m).isnan()
            assert not keep_largest(simt, values, q, m).any()


def test_nan_that_counts(simt):
    values = torch.randn(9000)
    values[[3, 8999]] = torch.tensor([NAN, -NAN])
    assert all(quantile(simt, values, q, None, i).isnan() for q in (0.0, 0.5, 1.0) for i in INTERPOLATIONS)
    for fraction in (0.3, 1.0):
        kept = keep_largest(simt, values, fraction).bool()
        assert torch.equal(kept, reference.top_quantile_mask(values, fraction=fraction))
        assert kept.sum() == math.ceil(fraction * 8998)
