"""The CUDA kernels of csrc/groups, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import NAN, close, pointer, same_bits, same_bits_in_every_order, tensor_like

by_order = pytest.mark.parametrize("sort", [False, True], ids=["scan", "sorted"])
sizes = pytest.mark.parametrize("size", [1, 2, 33, 500])
REDUCTIONS = ("sum", "mean", "min", "max", "logsumexp", "count")


class Rows:
    """Fills in GroupRows, and keeps alive what it points to."""

    def __init__(self, group: Tensor, sort: bool) -> None:
        self.ids, self.order = torch.sort(group, stable=True) if sort else (group, None)

    def fill(self, rows) -> None:
        rows.count = len(self.ids)
        rows.ids, rows.order = pointer(self.ids), pointer(self.order)


def sample_group(size: int) -> Tensor:
    group = torch.randint(-3, max(1, size // 9), (size,)) * 2**33
    group[1:4] = torch.arange(3)[: max(0, size - 1)] + 1
    return group


def group_reduce(simt, values, group, mask=None, *, sort=False, reduce="sum"):
    args, rows, result = simt.GroupReduceArgs(), Rows(group, sort), tensor_like(values)
    rows.fill(args.rows)
    args.reduction = getattr(simt.GroupReduction, reduce)
    args.values, args.mask, args.result = map(pointer, (values, mask, result))
    simt.cuda_group_reduce(args)
    return result


def group_normalize(simt, x, group, *, upstream, sort=False, eps=0.1, ddof=1, sigma_grad=False):
    args, rows = simt.NormalizeArgs(), Rows(group, sort)
    z, scale, slope, grad = (tensor_like(x) for _ in range(4))
    rows.fill(args.rows)
    args.rule.eps, args.rule.ddof, args.rule.sigma_grad = eps, ddof, sigma_grad
    args.x, args.z, args.scale, args.slope = map(pointer, (x, z, scale, slope))
    simt.cuda_group_normalize(args)
    backward = simt.NormalizeGradArgs()
    rows.fill(backward.rows)
    backward.upstream, backward.z, backward.scale, backward.slope = map(pointer, (upstream, z, scale, slope))
    backward.grad = pointer(grad)
    simt.cuda_group_normalize_backward(backward)
    return {"z": z, "grad": grad}


def level_pairs(simt, scores, group, levels, *, sort=False, upstream=1.0, with_grad=True, **options):
    args, rows = simt.PairArgs(), Rows(group, sort)
    rows.fill(args.rows)
    for name, value in options.items():
        setattr(args.rule, name, value)
    size = len(scores)
    unnormalised, grad, loss, pairs = tensor_like(scores), tensor_like(scores), torch.full((), NAN), torch.tensor(-1)
    partials, finished = torch.full((size, 2), NAN, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    args.scores, args.levels, args.loss, args.pairs = map(pointer, (scores, levels, loss, pairs))
    args.unnormalised = pointer(unnormalised) if with_grad else 0
    args.partials, args.finished = pointer(partials), pointer(finished)
    simt.cuda_level_pairs(args)
    out = {"loss": loss, "pairs": pairs.int()}
    if with_grad:
        g = torch.tensor(upstream)
        backward = simt.PairGradArgs()
        backward.count = size
        backward.unnormalised, backward.upstream, backward.pairs, backward.grad = map(pointer, (unnormalised, g, pairs, grad))
        simt.cuda_level_pairs_backward(backward)
        out["grad"] = grad
    return out


@by_order
@sizes
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_group_reduce(simt, sort, size, reduce, masked):
    values, group, mask = torch.randn(size), sample_group(size), None
    if masked:
        mask = torch.rand(size) < 0.5
        values = values.masked_fill(~mask, NAN)
    out = same_bits_in_every_order(simt, lambda: group_reduce(simt, values, group, mask, sort=sort, reduce=reduce))
    close(out, reference.group_reduce(values.double(), group, mask=mask, reduce=reduce), atol=1e-7, rtol=1e-7)


@by_order
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_group_reduce_of_nan(simt, sort, reduce):
    values, group = torch.randn(200), torch.arange(200) % 5
    clean = group_reduce(simt, values, group, sort=sort, reduce=reduce)
    values[13] = NAN
    out = group_reduce(simt, values, group, sort=sort, reduce=reduce)
    assert torch.equal(out.isnan(), (group == 3) & (reduce != "count"))
    assert same_bits(out[group != 3], clean[group != 3])


@by_order
def test_equal_values_have_exactly_their_value_as_mean(simt, sort):
    values, group = torch.full((100,), 0.1), torch.arange(100) % 3
    assert group_reduce(simt, values, group, sort=sort, reduce="mean").eq(values).all()


def test_ids_at_an_odd_address(simt):
    values, group = torch.randn(101), sample_group(101)
    moved = torch.cat([group[:1], group])[1:]
    assert moved.data_ptr() % 16 == 8
    close(group_reduce(simt, values, moved), group_reduce(simt, values, group), atol=1e-7)


@by_order
@sizes
@pytest.mark.parametrize("sigma_grad", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_normalize(simt, sort, size, sigma_grad, ddof):
    x, group, upstream = 3 + torch.randn(size), sample_group(size), torch.randn(size)
    x[group == group[0]] = 0.25  # a group of equal values
    options = {"eps": 0.1, "ddof": ddof, "sigma_grad": sigma_grad}
    out = same_bits_in_every_order(simt, lambda: group_normalize(simt, x, group, upstream=upstream, sort=sort, **options))
    leaf = x.double().requires_grad_()
    expected = reference.group_normalize(leaf, group, **options)
    close(out["z"], expected.detach(), atol=1e-7)
    close(out["grad"], torch.autograd.grad(expected, leaf, upstream.double())[0], atol=1e-5)
    assert not out["z"][group == group[0]].any()


@by_order
@sizes
@pytest.mark.parametrize("per_response", [False, True])
def test_level_pairs(simt, sort, size, per_response):
    scores, group, levels = torch.randn(size), sample_group(size), torch.randint(1, 5, (size,))
    options = {"beta": 0.6, "anisotropy": 1.7, "per_response": per_response}
    out = same_bits_in_every_order(simt, lambda: level_pairs(simt, scores, group, levels, sort=sort, upstream=3.0, **options))
    leaf = scores.double().requires_grad_()
    expected = reference.level_pairs(leaf, group, levels, **options)
    close(out["loss"], expected.loss.detach(), atol=1e-7)
    assert out["pairs"].item() == expected.pairs.item()
    close(out["grad"], torch.autograd.grad(3 * expected.loss, leaf)[0], atol=1e-9)
    without = level_pairs(simt, scores, group, levels, sort=sort, with_grad=False, **options)
    assert same_bits(without, {"loss": out["loss"], "pairs": out["pairs"]})


@by_order
def test_margins_of_any_size(simt, sort):
    group, levels = torch.zeros(2, dtype=torch.int64), torch.tensor([2, 3])
    for score, loss, slope in ((-1e4, 1e4, -1.0), (1e4, 0.0, 0.0)):
        out = level_pairs(simt, torch.tensor([score, 0.0]), group, levels, sort=sort, beta=1.0)
        assert out["loss"].item() == loss
        assert out["grad"].tolist() == [slope, -slope]


@by_order
def test_a_level_below_one_is_nan(simt, sort):
    scores, group, levels = torch.randn(90), torch.arange(90) // 30, torch.arange(90) % 4 + 1
    levels[35] = 0
    out = level_pairs(simt, scores, group, levels, sort=sort)
    assert out["loss"].isnan()
    assert torch.equal(out["grad"].isnan(), group == 1)
    alone = level_pairs(simt, scores[:1], group[:1], levels[35:36], sort=sort)
    assert alone["loss"].isnan() and alone["grad"].isnan().all() and alone["pairs"].item() == 0


def test_no_rows_launch_nothing(simt):
    simt.cuda_group_reduce(simt.GroupReduceArgs())
    simt.cuda_group_normalize(simt.NormalizeArgs())
    simt.cuda_group_normalize_backward(simt.NormalizeGradArgs())
    simt.cuda_level_pairs(simt.PairArgs())
    simt.cuda_level_pairs_backward(simt.PairGradArgs())
