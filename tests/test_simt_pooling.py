"""The CUDA kernels of csrc/sequence that pool by step, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import INF, NAN, close, guards_hold, pointer, same_bits_in_every_order, tensor_like

LENGTHS = (0, 1, 0, 70, 300, 31, 33, 0)
WRONG = [(0, 20, 10, 40), (1, 20, 40), (0, 20, 39), (0, 20, 41), (0, -5, 40), (0, 2**30, 40)]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pool(simt, values, steps, *, n_steps=1, cu_seqlens=None, clamp=False):
    """Means, counts, and the gradient of the means times 1, 2, 3, ..."""
    hidden = values.dim() > steps.dim()
    args = simt.PoolArgs()
    args.layout.tokens = steps.numel()
    rows = steps.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    args.layout.sequences, args.layout.padded_length = rows, 0 if cu_seqlens is not None else steps.shape[1]
    args.layout.cu_seqlens = pointer(cu_seqlens)
    args.features, args.steps, args.clamp = values.shape[-1] if hidden else 1, n_steps, clamp
    args.dtype = getattr(simt.DType, str(values.dtype).removeprefix("torch."))
    if cu_seqlens is None:
        args.rows.inner, args.rows.outer_stride, args.rows.inner_stride = max(1, steps.shape[1]), *values.stride()[:2]
    else:
        args.rows.inner, args.rows.outer_stride, args.rows.inner_stride = max(1, len(steps)), 0, values.stride(0)
    features = values.shape[-1:] if hidden else ()
    means, counts = torch.full((rows, n_steps, *features), 7.0), torch.full((rows, n_steps), 77)
    upstream = torch.arange(1.0, means.numel() + 1).reshape(means.shape)
    grad = tensor_like(torch.empty((*steps.shape, *features), dtype=values.dtype))
    args.values, args.means, args.counts, args.upstream, args.grad = map(pointer, (values, means, counts, upstream, grad))
    args.mask, args.ids = (pointer(steps), 0) if steps.dtype == torch.bool else (0, pointer(steps))
    simt.cuda_pool(args)
    simt.cuda_pool_backward(args)
    assert guards_hold(grad)
    return {"means": means, "counts": counts.int(), "grad": grad}


def check(simt, values, steps, **options):
    out = same_bits_in_every_order(simt, lambda: pool(simt, values, steps, **options))
    leaf = values.double().requires_grad_()
    expected = reference.step_mean(leaf, steps.long(), options.pop("n_steps", 1), **options)
    close(out["means"], expected.means.detach(), atol=1e-6)
    assert torch.equal(out["counts"].long(), expected.counts)
    upstream = torch.arange(1.0, expected.means.numel() + 1).double().reshape(expected.means.shape)
    (gradient,) = torch.autograd.grad(expected.means, leaf, upstream)
    close(out["grad"], gradient.to(values.dtype), rtol=1e-6 if values.dtype == torch.float32 else 2**-7)
    assert not out["grad"][steps.long() == 0].any()


def sample(packed: bool, features: int | None, dtype: torch.dtype, steps: int) -> tuple[Tensor, Tensor, dict]:
    """Values with garbage where no step is, runs of step ids, and the layout."""
    shape = (sum(LENGTHS),) if packed else (4, 75)
    ids = torch.randint(0, steps + 1, (shape[-1] // 3 + 1,)).repeat_interleave(3)[: shape[-1]].expand(shape).clone()
    if not packed:
        ids[1], ids[2, 40:] = 0, 0
    values = torch.randn(*shape, *([] if features is None else [features])).to(dtype)
    values[ids == 0] = NAN
    options = {"cu_seqlens": torch.tensor((0, *LENGTHS)).cumsum(0).int()} if packed else {}
    return values, ids, options


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("features", [None, 1, 8, 130, 264])
@pytest.mark.parametrize("steps", [1, 3])
def test_steps(simt, packed, dtype, features, steps):
    """Numbers, and rows of hidden states of whole and of broken vectors, in one and in several tiles."""
    values, ids, options = sample(packed, features, dtype, steps)
    check(simt, values, ids, n_steps=steps, **options)


@pytest.mark.parametrize("features", [None, 12])
def test_a_mask(simt, features):
    values, ids, _ = sample(False, features, torch.float32, 1)
    check(simt, values, ids.bool())


@pytest.mark.parametrize("features", [None, 12])
def test_surplus_steps_join_the_last(simt, features):
    values, ids, options = sample(True, features, torch.float32, 5)
    check(simt, values, ids, n_steps=2, clamp=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_are_read_where_they_lie(simt, dtype):
    """hidden[:, 1:], and columns of a wider row: aligned and not."""
    memory, ids = torch.randn(3, 21, 40).to(dtype), torch.randint(0, 3, (3, 20))
    for values in (memory[:, 1:], memory[:, :-1, :24], memory[:, :-1, 3:35], memory.transpose(0, 1)[:3, :20][:, :3]):
        here = ids[:, : values.shape[1]].contiguous()
        check(simt, values, here, n_steps=2)


@pytest.mark.parametrize("features", [None, 12])
def test_a_wrong_id_makes_its_sequence_nan(simt, features):
    values = torch.randn(4, 40, *([] if features is None else [features]))
    ids = torch.randint(0, 3, (4, 40))
    ids[1, 39], ids[2, 3] = 3, -1
    for clamp, wrong in ((False, [1, 2]), (True, [2])):
        out = pool(simt, values, ids, n_steps=2, clamp=clamp)
        bad = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(wrong), True)
        for name in ("means", "grad"):
            assert torch.equal(out[name].isnan().flatten(1).all(1), bad)
            assert torch.equal(out[name].isnan().flatten(1).any(1), bad)
        assert torch.equal((out["counts"] == -1).all(1), bad)


@pytest.mark.parametrize("lengths", WRONG)
@pytest.mark.parametrize("features", [None, 12])
def test_a_wrong_layout_is_nan(simt, lengths, features):
    values, ids = torch.randn(40, *([] if features is None else [features])), torch.ones(40, dtype=torch.int64)
    out = pool(simt, values, ids, cu_seqlens=torch.tensor(lengths, dtype=torch.int32))
    assert out["means"].isnan().all() and out["grad"].isnan().all() and (out["counts"] == -1).all()


def test_a_zero_gradient_survives_infinity_in_the_mean(simt):
    values, ids = torch.full((1, 40), INF), torch.zeros(1, 40, dtype=torch.int64)
    ids[0, 5] = 1
    out = pool(simt, values, ids)
    assert out["means"].tolist() == [[INF]]
    assert out["grad"].nonzero().tolist() == [[0, 5]]


def test_nothing(simt):
    simt.cuda_pool(simt.PoolArgs())
    simt.cuda_pool_backward(simt.PoolArgs())
    for features in ([], [6], [0]):
        out = pool(simt, torch.empty(2, 0, *features), torch.empty(2, 0, dtype=torch.int64), n_steps=2)
        assert out["counts"].eq(0).all() and out["means"].eq(0).all()
