"""The CUDA kernels' own sources, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt import build

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = (1, 7, 31, 33, 127, 1003, 4097, 20001)  # around a pack, a warp, a tile, and in every launch configuration
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
FLOAT_OUTPUTS = ("logp", "entropy", "lse", "sum_sq_probs", "mean_logit")
STATISTICS = ("row_max", "row_log2_sum")
ALL_OUTPUTS = (*FLOAT_OUTPUTS, *STATISTICS)
GUARD = 7.0  # what fills the memory that a kernel must leave alone

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_width = pytest.mark.parametrize("columns", COLUMNS)


@pytest.fixture(scope="session")
def cache(request, tmp_path_factory):
    pytest_cache = getattr(request.config, "cache", None)
    return pytest_cache.mkdir("prefkern_simt") if pytest_cache else tmp_path_factory.mktemp("prefkern_simt")


@pytest.fixture(scope="session")
def module(cache):
    if path := os.environ.get("PREFKERN_SIMT_MODULE"):
        return build.load(Path(path))
    if missing := build.missing():
        pytest.skip(f"needs {missing}")
    return build.load(build.build(cache))


@pytest.fixture
def simt(module):
    set_order(module, "forward", 0)
    return module


def set_order(simt, order: str, seed: int) -> None:
    simt.set_order(getattr(simt.Order, order), seed)


# -------------------------------------------------------------------------------------------------- calling the kernels


@dataclass(frozen=True)
class Head:
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: Tensor | None = None


PLAIN = Head()


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


def row_map(simt, view: Tensor):
    result = simt.RowMap()
    if view.dim() == 2:
        result.inner, result.outer_stride, result.inner_stride = 1, view.stride(0), 0
    else:
        result.inner, result.outer_stride, result.inner_stride = view.shape[1], view.stride(0), view.stride(1)
    return result


def dtype_of(simt, view: Tensor):
    return getattr(simt.DType, str(view.dtype).removeprefix("torch."))


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def logit_block(simt, logits: Tensor, targets: Tensor, head: Head, first: int, last: int):
    block = simt.LogitBlock()
    block.dtype = dtype_of(simt, logits)
    block.rows, block.vocab = targets.numel(), logits.shape[-1]
    block.first_col, block.cols = first, last - first
    block.targets = pointer(targets)
    block.transform.scale = head.logit_scale
    block.transform.softcap = head.softcap or 0.0
    block.transform.bias = pointer(head.bias[first:]) if head.bias is not None else 0
    if isinstance(head.temperature, Tensor):
        block.transform.row_temperature = pointer(head.temperature)
    else:
        block.transform.temperature = head.temperature
    return block


def fold(simt, logits, targets, head=PLAIN, *, cuts=(), entropy=True, extra=True, outputs=ALL_OUTPUTS):
    """The outputs by name; the vocabulary is folded block by block if it is cut."""
    rows, vocab = targets.numel(), logits.shape[-1]
    out = {name: torch.full((rows,), NAN) for name in outputs}
    top1 = torch.full((rows,), 2, dtype=torch.uint8)
    state = torch.full((7, rows + 3), NAN)
    for first, last in pairwise((0, *cuts, vocab)):
        args = simt.FoldArgs()
        args.block = logit_block(simt, logits, targets, head, first, last)
        args.logits, args.logits_map = pointer(logits[..., first:]), row_map(simt, logits)
        args.entropy, args.extra = entropy, extra
        args.first, args.last = first == 0, last == vocab
        if cuts:
            args.state, args.state_stride = pointer(state), state.stride(0)
        for name, tensor in out.items():
            setattr(args, {"entropy": "out_entropy"}.get(name, name), pointer(tensor))
        args.is_top1 = pointer(top1) if extra else 0
        simt.cuda_fold_logits(args)
    if extra:
        assert set(top1.tolist()) <= {0, 1}
        out["is_top1"] = top1.bool()
    return out


def grad(simt, logits, targets, stats, upstream, head=PLAIN, *, into=None, cuts=()):
    """d loss / d logits, written to `into`, where `stats` is what `fold` gave and `upstream` is by name."""
    into = tensor_like(logits) if into is None else into
    for first, last in pairwise((0, *cuts, logits.shape[-1])):
        args = simt.GradArgs()
        args.block = logit_block(simt, logits, targets, head, first, last)
        args.logits, args.logits_map = pointer(logits[..., first:]), row_map(simt, logits)
        args.grad, args.grad_map = pointer(into[..., first:]), row_map(simt, into)
        args.grad_dtype = dtype_of(simt, into)
        for name in (*STATISTICS, "entropy"):
            setattr(args, name, pointer(stats[name]))
        for name, tensor in upstream.items():
            setattr(args, f"g_{name}", pointer(tensor))
        simt.cuda_grad_logits(args)
    return into


# ------------------------------------------------------------------------------------------------------------ the truth


def definition(logits: Tensor, targets: Tensor, head: Head = PLAIN):
    """In float64, of one row per target; `logits` may require grad."""
    y = logits.double().reshape(-1, logits.shape[-1])
    y = y + head.bias.double() if head.bias is not None else y
    return reference.logits_logprobs(
        y,
        targets.reshape(-1),
        temperature=head.temperature.double() if isinstance(head.temperature, Tensor) else head.temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        outputs=("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1"),
    )


def definition_of_grad(logits: Tensor, targets: Tensor, upstream: dict[str, Tensor], head: Head = PLAIN) -> Tensor:
    leaf = logits.detach().double().requires_grad_()
    out = definition(leaf, targets, head)
    sum((getattr(out, name) * g.double()).sum() for name, g in upstream.items()).backward()
    return leaf.grad


def close(actual: Tensor, expected: Tensor, *, atol: float = 1e-5, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol, equal_nan=True)


def close_outputs(actual: dict[str, Tensor], expected, **tolerance) -> None:
    for name in FLOAT_OUTPUTS:
        close(actual[name], getattr(expected, name).detach(), **tolerance)
    assert torch.equal(actual["is_top1"], expected.is_top1)


def close_grad(actual: Tensor, expected: Tensor) -> None:
    close(actual, expected, atol=1e-6, rtol=max(2e-5, torch.finfo(actual.dtype).eps))


def same_bits(a: dict[str, Tensor] | Tensor, b: dict[str, Tensor] | Tensor) -> bool:
    if isinstance(a, dict):
        return all(same_bits(a[name], b[name]) for name in a)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def same_bits_in_every_order(simt, compute):
    """What `compute` returns, whichever thread and block runs first."""
    results = []
    for order in (*ORDERS, ORDERS[0]):
        set_order(simt, *order)
        results.append(compute())
    assert all(same_bits(results[0], result) for result in results[1:])
    return results[0]


def sample(rows: int, columns: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every third is the largest logit."""
    generator = torch.Generator().manual_seed(seed + columns)
    logits = torch.randn(rows, columns, generator=generator) * 3
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[::3] = logits[::3].bfloat16().argmax(-1)
    return logits, targets


def upstream_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {name: torch.randn(rows, generator=generator) for name in ("logp", "entropy", "lse")}


def heads(rows: int, columns: int) -> dict[str, Head]:
    generator = torch.Generator().manual_seed(columns)
    row_temperature = torch.rand(rows, generator=generator) + 0.5
    bias = torch.randn(columns, generator=generator)
    return {
        "temperature": Head(temperature=0.7),
        "row temperature": Head(temperature=row_temperature),
        "scale": Head(logit_scale=0.4),
        "bias": Head(bias=bias),
        "softcap": Head(softcap=5.0),
        "all": Head(row_temperature, softcap=8.0, logit_scale=1.5, bias=bias),
    }


HEADS = tuple(heads(1, 1))

# ---------------------------------------------------------------------------------------------------------- fold_logits


@each_dtype
@each_width
def test_fold(simt, dtype, columns):
    values, targets = sample(4, columns)
    logits = misaligned(values, dtype)
    targets[1] = -100
    out = same_bits_in_every_order(simt, lambda: fold(simt, logits, targets))
    close_outputs(out, definition(logits, targets))
    counts = targets != -100
    close(out["row_max"], logits.double().amax(-1) * counts)
    close(out["row_max"] * counts + out["row_log2_sum"] * torch.log(torch.tensor(2.0)), out["lse"])


@each_dtype
@pytest.mark.parametrize("columns", [8, 127, 4096])
def test_fold_takes_a_slice_of_a_batch(simt, dtype, columns):
    values, targets = sample(15, columns)
    logits = values.to(dtype).view(3, 5, columns)[:, :-1]
    targets = targets[:12].view(3, 4)
    close_outputs(fold(simt, logits, targets), definition(logits, targets))


@each_dtype
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("columns", [33, 2050])
def test_fold_transforms_the_logits(simt, dtype, name, columns):
    values, targets = sample(5, columns)
    head = heads(5, columns)[name]
    logits = misaligned(values, dtype)
    out = same_bits_in_every_order(simt, lambda: fold(simt, logits, targets, head))
    close_outputs(out, definition(logits, targets, head))


@each_dtype
@pytest.mark.parametrize(
    ("columns", "cuts"),
    [(7, (1,)), (127, (64,)), (1003, (1, 500, 1002)), (4097, (4096,)), (20001, (2048, 3000, 19000))],
)
@pytest.mark.parametrize("name", ["all", None])
def test_fold_of_a_vocabulary_in_blocks(simt, dtype, columns, cuts, name):
    values, targets = sample(6, columns)
    targets[1] = -100
    targets[2], targets[4] = cuts[0] - 1, cuts[0]  # last of a block, first of the next
    head = heads(6, columns)[name] if name else PLAIN
    logits = misaligned(values, dtype)
    out = same_bits_in_every_order(simt, lambda: fold(simt, logits, targets, head, cuts=cuts))
    close_outputs(out, definition(logits, targets, head))
    whole = fold(simt, logits, targets, head)
    for output in ALL_OUTPUTS:
        close(out[output], whole[output], atol=3e-6, rtol=1e-6)
    assert same_bits(out["row_max"], whole["row_max"])
    assert torch.equal(out["is_top1"], whole["is_top1"])


def test_fold_writes_only_what_is_wanted(simt):
    values, targets = sample(4, 1003)
    whole = fold(simt, values, targets)
    for outputs, entropy in ((("logp",), False), (("logp", "lse"), False), (("entropy",), True), (STATISTICS, False)):
        out = fold(simt, values, targets, entropy=entropy, extra=False, outputs=outputs)
        for name in outputs:
            close(out[name], whole[name], atol=1e-6)


@each_dtype
@pytest.mark.parametrize("cuts", [(), (60,), (64, 65)])
def test_fold_of_tokens_that_cannot_be_drawn(simt, dtype, cuts):
    values, targets = sample(6, 200)
    values[:, 3::5] = -INF
    values[0, :100] = -INF  # whole threads, and with cuts a whole block, see nothing else
    values[1, 1:] = -INF  # one token is certain
    targets[:] = 101
    targets[1] = 0
    targets[2] = 3
    out = same_bits_in_every_order(simt, lambda: fold(simt, values.to(dtype), targets, cuts=cuts))
    close_outputs(out, definition(values.to(dtype), targets))
    assert (out["logp"][1], out["entropy"][1], out["sum_sq_probs"][1]) == (0, 0, 1)
    assert out["logp"][2] == -INF


@each_dtype
@pytest.mark.parametrize("columns", [33, 2051])
@pytest.mark.parametrize("poison", [NAN, -INF])
def test_a_poisoned_row_poisons_itself_alone(simt, dtype, columns, poison):
    values, targets = sample(5, columns)
    clean = fold(simt, values.to(dtype), targets)
    if poison == -INF:  # no token of the row can be drawn
        values[2] = -INF
    else:
        values[2, columns // 2] = NAN
        values[4, columns // 2] = NAN
        targets[4] = -100
    out = same_bits_in_every_order(simt, lambda: fold(simt, values.to(dtype), targets))
    for name in ("logp", "entropy", "sum_sq_probs"):
        assert out[name].isnan().tolist() == [False, False, True, False, False], name
    if poison == -INF:
        assert out["lse"][2] == out["mean_logit"][2] == -INF
    else:
        assert out["lse"].isnan().tolist() == out["mean_logit"].isnan().tolist() == [False, False, True, False, False]
    for row in (0, 1, 3):
        assert all(same_bits(out[name][row], clean[name][row]) for name in out)
    if poison != -INF:  # an ignored row may hold anything
        assert all(out[name][4] == 0 for name in out)


def test_a_nan_among_tokens_that_cannot_be_drawn(simt):
    values = torch.full((3, 300), -INF)
    values[0, 200] = values[1, 0] = values[2, 299] = NAN
    values[1, 150] = 2.0
    values[2, 0] = 1.0
    for cuts in ((), (140,)):
        out = fold(simt, values, torch.tensor([0, 150, 0]), cuts=cuts)
        assert all(out[name].isnan().all() for name in FLOAT_OUTPUTS)


@each_dtype
def test_fold_of_huge_and_equal_logits(simt, dtype):
    values, targets = sample(6, 1003)
    values[0] += 1e4
    values[1] -= 1e4
    values[2] = torch.where(values[2] > 0, 1e4, -1e4)
    values[3] = 1e4
    values[4] = -3.0
    targets[3] = targets[4] = 0
    logits = values.to(dtype)
    out = same_bits_in_every_order(simt, lambda: fold(simt, logits, targets))
    close_outputs(out, definition(logits, targets), rtol=1e-6)
    close(out["logp"][3:5], torch.full((2,), 1003.0).log().neg())


@each_dtype
def test_the_first_of_equal_maxima_is_the_top_one(simt, dtype):
    values = torch.zeros(4, 700)
    values[:2, 40] = values[:2, 300] = 2.5
    targets = torch.tensor([40, 300, 0, 1])
    for cuts in ((), (40,), (41, 300), (299, 301)):
        out = same_bits_in_every_order(simt, lambda cuts=cuts: fold(simt, values.to(dtype), targets, cuts=cuts))
        assert out["is_top1"].tolist() == [True, False, True, False]


def test_fold_of_a_vocabulary_of_one(simt):
    out = fold(simt, torch.tensor([[3.0], [-INF], [-2e4]]), torch.tensor([0, 0, -100]))
    assert out["logp"].tolist()[::2] == out["entropy"].tolist()[::2] == [0, 0]
    assert out["lse"].tolist() == [3.0, -INF, 0.0]
    assert out["is_top1"].tolist()[::2] == [True, False]


@pytest.mark.parametrize("bad", [-1, 127, -(2**62), 2**62])
def test_a_target_outside_the_vocabulary_gives_nan(simt, bad):
    values, targets = sample(4, 127)
    clean = fold(simt, values, targets)
    targets[2] = bad
    for cuts in ((), (60,)):
        out = fold(simt, values, targets, cuts=cuts)
        assert all(out[name][2].isnan() for name in FLOAT_OUTPUTS)
        assert not out["is_top1"][2]
        for row in (0, 1, 3):
            assert cuts or all(same_bits(out[name][row], clean[name][row]) for name in out)
    g = grad(simt, values, targets, out, upstream_of(4))
    assert g.isnan().any(-1).tolist() == [False, False, True, False]
    assert g[2].isnan().all()


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_a_temperature_that_is_not_positive_gives_nan(simt, bad):
    values, targets = sample(3, 127)
    out = fold(simt, values, targets, Head(temperature=torch.tensor([1.0, bad, 1.0])))
    for name in ("logp", "entropy", "lse"):
        assert out[name].isnan().tolist() == [False, True, False], name


def test_another_ignore_index(simt):
    values, targets = sample(3, 50)
    targets[1] = 0
    args = simt.FoldArgs()
    args.block = logit_block(simt, values, targets, PLAIN, 0, 50)
    args.block.ignore_index = 0
    args.logits, args.logits_map = pointer(values), row_map(simt, values)
    logp = torch.full((3,), NAN)
    args.logp = pointer(logp)
    simt.cuda_fold_logits(args)
    assert logp[1] == 0
    close(logp[[0, 2]], definition(values, targets).logp[[0, 2]])


# ---------------------------------------------------------------------------------------------------------- grad_logits


@each_dtype
@each_width
def test_grad(simt, dtype, columns):
    values, targets = sample(4, columns)
    logits, upstream = misaligned(values, dtype), upstream_of(4)
    targets[1] = -100
    stats = fold(simt, logits, targets)
    g = same_bits_in_every_order(simt, lambda: grad(simt, logits, targets, stats, upstream))
    close_grad(g, definition_of_grad(logits, targets, upstream))
    assert guards_hold(grad(simt, logits, targets, stats, upstream))
    assert guards_hold(logits)


@each_dtype
@pytest.mark.parametrize("columns", [8, 512, 1003, 4096, 4100, 20008])
def test_grad_of_a_slice_of_a_batch(simt, dtype, columns):
    values, targets = sample(6, columns)  # aligned rows, where columns allow: whole packs
    logits, targets, upstream = values.to(dtype).view(2, 3, columns)[:, :-1], targets[:4].view(2, 2), upstream_of(4)
    stats = fold(simt, logits, targets)
    g = same_bits_in_every_order(simt, lambda: grad(simt, logits, targets, stats, upstream))
    close_grad(g, definition_of_grad(logits, targets, upstream))
    assert guards_hold(grad(simt, logits, targets, stats, upstream))


@each_dtype
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("columns", [40, 4097])
def test_grad_through_the_transforms(simt, dtype, name, columns):
    values, targets = sample(5, columns)
    head, upstream = heads(5, columns)[name], upstream_of(5)
    logits = values.to(dtype)
    g = grad(simt, logits, targets, fold(simt, logits, targets, head), upstream, head)
    close_grad(g, definition_of_grad(logits, targets, upstream, head))


@pytest.mark.parametrize("name", ["logp", "entropy", "lse"])
def test_grad_from_one_output(simt, name):
    values, targets = sample(5, 300)
    upstream = {name: upstream_of(5)[name]}
    stats = fold(simt, values, targets)
    if name != "entropy":
        stats["entropy"] = None
    close_grad(grad(simt, values, targets, stats, upstream), definition_of_grad(values, targets, upstream))


@each_dtype
@pytest.mark.parametrize(("columns", "cuts"), [(127, (1, 64)), (1003, (512,)), (8000, (4096,))])
def test_grad_of_a_vocabulary_in_blocks(simt, dtype, columns, cuts):
    values, targets = sample(4, columns)
    targets[1], targets[2] = cuts[0] - 1, cuts[0]
    logits, upstream, head = values.to(dtype), upstream_of(4), heads(4, columns)["all"]
    stats = fold(simt, logits, targets, head, cuts=cuts)
    whole = grad(simt, logits, targets, stats, upstream, head)
    assert same_bits(grad(simt, logits, targets, stats, upstream, head, cuts=cuts), whole)
    close_grad(whole, definition_of_grad(logits, targets, upstream, head))


IN_PLACE = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


@pytest.mark.parametrize(("dtype", "grad_dtype"), IN_PLACE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("columns", [1, 8, 33, 512, 1003, 4096, 4097, 9000])
def test_grad_over_the_logits(simt, dtype, grad_dtype, columns):
    """The same bits as in other memory. A gradient of a narrower type takes the first half of its row."""
    values, targets = sample(3, columns)
    upstream = upstream_of(3)
    stats = fold(simt, values.to(dtype), targets)
    apart = tensor_like(values, dtype=grad_dtype)
    grad(simt, values.to(dtype), targets, stats, upstream, into=apart)

    def in_place():
        logits = values.to(dtype).clone()
        into = logits.view(grad_dtype)[:, :columns]
        return grad(simt, logits, targets, stats, upstream, into=into)

    assert same_bits(same_bits_in_every_order(simt, in_place), apart)
    close_grad(apart, definition_of_grad(values.to(dtype), targets, upstream))


@each_dtype
def test_grad_of_extreme_logits(simt, dtype):
    values, targets = sample(6, 1003)
    values[0, 3::5] = -INF
    values[1] += 1e4
    values[2] = torch.where(values[2] > 0, 1e4, -1e4)
    values[3, 1:] = -INF
    values[4] = NAN
    targets[0], targets[3], targets[4] = 2, 0, -100
    logits, upstream = values.to(dtype), upstream_of(6)
    g = grad(simt, logits, targets, fold(simt, logits, targets), upstream)
    close_grad(g, definition_of_grad(logits, targets, upstream))
    assert not g[4].any()


# ----------------------------------------------------------------------------------------------------- group_advantages


def group_advantages(simt, rewards, group, *, order=None, estimator="grpo", eps=1e-6, singleton="zero"):
    """Outputs by name. With `order`, `group` is sorted and `order` says where its ids come from."""
    out = {name: tensor_like(rewards, fill=NAN) for name in ("advantages", "mean", "std")}
    sizes = tensor_like(rewards, fill=-1, dtype=torch.int64)
    args = simt.GroupArgs()
    args.rule.estimator = getattr(simt.AdvantageEstimator, estimator)
    args.rule.singleton = getattr(simt.SingletonRule, singleton)
    args.rule.eps = eps
    args.count = len(rewards)
    args.rewards, args.group, args.order, args.sizes = map(pointer, (rewards, group, order, sizes))
    for name, tensor in out.items():
        setattr(args, name, pointer(tensor))
    simt.cuda_group_advantages(args)
    return {**out, "count": sizes.int()}


def sample_groups(size: int) -> tuple[Tensor, Tensor]:
    """Rewards, and ids of groups of all sizes, among them one of equal rewards and, if there is room, groups of one."""
    rewards, group = torch.randn(size), torch.randint(-3, max(1, size // 9), (size,)) * 2**33
    rewards[group == group[0]] = 0.1
    group[1:4] = torch.arange(3)[: max(0, size - 1)] + 1
    return rewards, group


@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("singleton", ["zero", "reward"])
@pytest.mark.parametrize("size", [1, 2, 8, 33, 500])
def test_group_advantages(simt, by_order, estimator, singleton, size):
    rewards, group = sample_groups(size)
    ids, order = torch.sort(group, stable=True) if by_order else (group, None)
    options = {"estimator": estimator, "singleton": singleton, "eps": 0.01}
    out = same_bits_in_every_order(simt, lambda: group_advantages(simt, rewards, ids, order=order, **options))
    expected = reference.group_advantages(rewards.double(), group, **options)
    for name in ("advantages", "mean", "std"):
        close(out[name], getattr(expected, name), atol=1e-7, rtol=5e-7)
    assert torch.equal(out["count"].long(), expected.count)
    if singleton == "zero":
        assert not out["advantages"][group == group[0]].any()


def test_group_advantages_of_ids_at_an_odd_address(simt):
    rewards, group = sample_groups(101)
    moved = torch.cat([group[:1], group])[1:]
    assert moved.data_ptr() % 16 == 8
    for name, values in group_advantages(simt, rewards, group).items():
        close(group_advantages(simt, rewards, moved)[name], values, atol=1e-7)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("by_order", [False, True], ids=["scan", "sorted"])
def test_group_advantages_of_a_reward_that_is_not_finite(simt, bad, by_order):
    rewards, group = torch.randn(40), torch.arange(40) % 5
    ids, order = torch.sort(group, stable=True) if by_order else (group, None)
    clean = group_advantages(simt, rewards, ids, order=order)
    rewards[13] = bad
    out = group_advantages(simt, rewards, ids, order=order)
    for name in ("advantages", "mean", "std"):
        assert torch.equal(out[name].isnan(), group == 3)
        assert same_bits(out[name][group != 3], clean[name][group != 3])


# ---------------------------------------------------------------------------------------------------------- policy_loss

METRICS = (
    "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "ratio_mean", "ratio_min", "ratio_max",
    "approx_kl", "kl", "tokens",
)  # fmt: skip


def policy_loss(
    simt, logp, old_logp, advantages, mask=None, *, slices=None, with_grad=True, upstream=1.0, into=None, **options
):
    """Loss, metrics and the gradient by name; `into` is for the forward's part of it, per token.

    The options are those of prefkern.policy_loss.
    """
    args = simt.PolicyArgs()
    lengths, ref_logp = options.pop("cu_seqlens", None), options.pop("ref_logp", None)
    args.layout.tokens = logp.numel()
    args.layout.sequences = logp.shape[0] if lengths is None else len(lengths) - 1
    args.layout.padded_length = logp.shape[1] if lengths is None else 0
    args.layout.cu_seqlens = pointer(lengths)
    args.options.agg = getattr(simt.Aggregation, options.pop("agg", "token-mean").replace("-", "_"))
    args.options.kl = simt.KlKind.none if ref_logp is None else simt.KlKind.k3
    for name, value in options.items():
        setattr(args.options, name, INF if value is None else value)
    args.logp, args.old_logp, args.ref_logp, args.mask = map(pointer, (logp, old_logp, ref_logp, mask))
    args.advantages, args.token_advantages = pointer(advantages), advantages.shape == logp.shape
    args.slices = slices or simt.policy_slices(args.layout)

    unnormalised = tensor_like(logp) if into is None else into
    grad_logp = tensor_like(logp)
    scalars = {name: torch.full((), NAN) for name in ("loss", "inverse_norm")}
    metrics = torch.full((simt.POLICY_METRICS,), NAN)
    partials = torch.full((args.layout.sequences * args.slices, simt.POLICY_SUMS), NAN)
    finished = torch.zeros(1, dtype=torch.int32)
    args.grad = pointer(unnormalised) if with_grad else 0
    args.loss, args.inverse_norm = pointer(scalars["loss"]), pointer(scalars["inverse_norm"])
    args.metrics, args.partials, args.finished = map(pointer, (metrics, partials, finished))
    simt.cuda_policy_loss(args)
    result = {"loss": scalars["loss"], "metrics": metrics}
    if with_grad:
        grad_of_loss = torch.tensor(upstream)
        backward = simt.PolicyGradArgs()
        backward.tokens = logp.numel()
        backward.unnormalised, backward.upstream = pointer(unnormalised), pointer(grad_of_loss)
        backward.inverse_norm, backward.grad = pointer(scalars["inverse_norm"]), pointer(grad_logp)
        simt.cuda_policy_loss_backward(backward)
        result["grad"] = grad_logp
    return result


def check_policy_loss(simt, logp, old_logp, advantages, mask=None, **options):
    def compute():
        return policy_loss(simt, logp, old_logp, advantages, mask, upstream=3.0, **options)

    out = same_bits_in_every_order(simt, compute)
    options.pop("slices", None)
    leaf = logp.double().requires_grad_()
    options["ref_logp"] = options["ref_logp"].double() if options.get("ref_logp") is not None else None
    expected = reference.policy_loss(leaf, old_logp.double(), advantages.double(), mask, **options)
    (3.0 * expected.loss).backward()
    close(out["loss"], expected.loss.detach(), atol=1e-6)
    close(out["metrics"], torch.stack([expected.metrics[name].double() for name in METRICS]), atol=1e-6, rtol=2e-6)
    close(out["grad"], leaf.grad, atol=1e-7, rtol=1e-5)
    return out


def sample_policy(shape: tuple[int, ...], *, offset: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, old_logp, ref_logp and a mask, `offset` elements into their memory, with garbage outside the mask."""
    size = torch.Size(shape).numel()
    old_logp, mask = -2 * torch.rand(size), torch.rand(size) < 0.7
    mask[: min(3 * shape[-1], size) : 2] = False
    logp, ref_logp = (old_logp + 0.4 * torch.randn(size) for _ in range(2))
    for tensor, garbage in ((logp, NAN), (old_logp, INF), (ref_logp, -INF)):
        tensor[~mask] = garbage
    return tuple(at_offset(tensor.view(shape), offset) for tensor in (logp, old_logp, ref_logp, mask))


def at_offset(values: Tensor, offset: int) -> Tensor:
    """A copy that begins `offset` elements into its memory."""
    return torch.cat([values.flatten()[:offset], values.flatten()])[offset:].view(values.shape)


def all_kept(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.nan_to_num(tensor, nan=-0.5, posinf=-0.4, neginf=-0.3) for tensor in tensors)


@pytest.mark.parametrize("moved", ["logp", "old_logp", "advantages", "mask", "ref_logp", "into"])
def test_policy_loss_of_one_tensor_at_an_odd_address(simt, moved):
    logp, old_logp, ref_logp, mask = sample_policy((3, 400))
    tensors = {
        "logp": logp, "old_logp": old_logp, "advantages": torch.randn(3, 400), "mask": mask, "ref_logp": ref_logp,
        "into": torch.empty(3, 400),
    }  # fmt: skip
    options = {"agg": "seq-mean-token-mean", "beta": 0.1}
    expected = policy_loss(simt, **tensors, **options)
    out = policy_loss(simt, **{**tensors, moved: at_offset(tensors[moved], 1)}, **options)
    for name, values in expected.items():
        close(out[name], values, atol=1e-7)


LENGTHS = (0, 1, 0, 300, 3, 4, 5, 64, 1027, 0)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("with_ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("per_token", [False, True], ids=["A of sequence", "A of token"])
@pytest.mark.parametrize("offset", [0, 1])
def test_policy_loss(simt, masked, packed, agg, with_ref, per_token, offset):
    shape = (sum(LENGTHS),) if packed else (5, 83)
    logp, old_logp, ref_logp, mask = sample_policy(shape, offset=offset)
    if not masked:
        logp, old_logp, ref_logp = all_kept(logp, old_logp, ref_logp)
    advantages = torch.randn(shape) if per_token else torch.randn(len(LENGTHS) if packed else 5)
    out = check_policy_loss(
        simt, logp, old_logp, advantages, mask if masked else None, agg=agg, dual_clip=1.5, eps_low=0.1, eps_high=0.3,
        cu_seqlens=torch.tensor((0, *LENGTHS)).cumsum(0).int() if packed else None,
        ref_logp=ref_logp if with_ref else None, beta=0.2 if with_ref else 0.0,
    )  # fmt: skip
    assert not masked or not out["grad"][~mask].any()


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_policy_loss_of_few_long_sequences(simt, agg, packed):
    """Several blocks share a sequence."""
    logp, old_logp, ref_logp, mask = sample_policy((2, 5003))
    options = {"agg": agg, "beta": 0.1}
    if packed:
        logp, old_logp, ref_logp, mask = (tensor.view(-1) for tensor in (logp, old_logp, ref_logp, mask))
        options["cu_seqlens"] = torch.tensor([0, 4001, 10006], dtype=torch.int32)
    layout = simt.SequenceLayout()
    layout.sequences, layout.tokens = 2, 10006
    assert simt.policy_slices(layout) == 3
    check_policy_loss(simt, logp, old_logp, torch.tensor([1.0, -0.5]), mask, ref_logp=ref_logp, **options)
    check_policy_loss(simt, logp, old_logp, torch.tensor([1.0, -0.5]), mask, ref_logp=ref_logp, slices=7, **options)


@pytest.mark.parametrize("ratio_clamp", [2.0, None])
@pytest.mark.parametrize("dual_clip", [3.0, None])
def test_policy_loss_of_ratios_far_from_one(simt, ratio_clamp, dual_clip):
    old_logp = torch.zeros(2, 100)
    logp = torch.linspace(-9, 9, 200).view(2, 100)
    logp[0, 3], logp[0, 4] = 0.0, 1e-4
    for sign in (1.0, -1.0, 0.0):
        check_policy_loss(
            simt, logp, old_logp, torch.full((2,), sign), ratio_clamp=ratio_clamp, dual_clip=dual_clip, agg="token-mean"
        )


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_policy_loss_of_an_empty_mask_is_zero(simt, agg):
    nothing = torch.full((3, 50), NAN)
    out = policy_loss(simt, nothing, nothing, torch.full((3,), NAN), torch.zeros(3, 50, dtype=torch.bool), agg=agg)
    assert not any(tensor.any() for tensor in out.values())
    out = policy_loss(simt, torch.empty(3, 0), torch.empty(3, 0), torch.ones(3), agg=agg)
    assert not any(tensor.any() for tensor in out.values())


def test_policy_loss_without_gradient(simt):
    logp, old_logp, _, mask = sample_policy((4, 60))
    arguments = (simt, logp, old_logp, torch.randn(4), mask)
    with_grad, without = policy_loss(*arguments), policy_loss(*arguments, with_grad=False)
    assert all(same_bits(without[name], with_grad[name]) for name in without)


@pytest.mark.parametrize("token", [0, 77])
def test_policy_loss_of_nan(simt, token):
    logp, old_logp = torch.randn(4, 30), torch.randn(4, 30)
    logp.view(-1)[token] = NAN
    out = policy_loss(simt, logp, old_logp, torch.ones(4))
    assert out["loss"].isnan()
    assert [name for name, value in zip(METRICS, out["metrics"], strict=True) if value.isnan()] == [
        "ratio_mean", "ratio_min", "ratio_max", "approx_kl",
    ]  # fmt: skip
    assert torch.equal(out["grad"].isnan(), logp.isnan())


@pytest.mark.parametrize(
    "lengths", [(0, 20, 10, 40), (1, 20, 40), (0, 20, 39), (0, 20, 41), (0, -5, 40), (0, 2**30, 40), (-1, 20, 40)]
)
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_policy_loss_of_a_wrong_layout_is_nan(simt, lengths, agg):
    logp, old_logp, mask = torch.randn(40), torch.randn(40), torch.rand(40) < 0.5
    advantages = torch.ones(len(lengths) - 1)
    for m in (None, mask):
        out = policy_loss(simt, logp, old_logp, advantages, m, cu_seqlens=torch.tensor(lengths, dtype=torch.int32), agg=agg)
        assert all(tensor.isnan().all() for tensor in out.values())


def test_policy_loss_backward_leaves_zeros_alone(simt):
    logp, old_logp, _, mask = sample_policy((3, 70))
    out = policy_loss(simt, logp, old_logp, torch.ones(3), mask, upstream=INF)
    assert not out["grad"][~mask].any()
    assert out["grad"].isinf().any()


def test_backward_of_more_tokens_than_the_grid_has_threads(simt):
    tokens = 4096 * 256 * 4 + 5
    unnormalised, grad_logp = torch.randn(tokens), torch.full((tokens,), NAN)
    upstream, inverse_norm = torch.tensor(0.5), torch.tensor(0.25)
    args = simt.PolicyGradArgs()
    args.tokens = tokens
    args.unnormalised, args.grad = pointer(unnormalised), pointer(grad_logp)
    args.upstream, args.inverse_norm = pointer(upstream), pointer(inverse_norm)
    simt.cuda_policy_loss_backward(args)
    assert torch.equal(grad_logp, unnormalised * 0.125)


# ------------------------------------------------------------------------------------------------------------ launchers


def test_what_the_launchers_refuse(simt):
    values, targets = sample(2, 10)
    stats = fold(simt, values, targets)
    with pytest.raises(RuntimeError, match="invalid argument"):
        fold(simt, values.double(), targets)
    with pytest.raises(RuntimeError, match="invalid argument"):
        grad(simt, values.bfloat16(), targets, stats, upstream_of(2), into=torch.empty(2, 10))


def test_no_rows_launch_nothing(simt):
    simt.cuda_fold_logits(simt.FoldArgs())
    simt.cuda_grad_logits(simt.GradArgs())
    simt.cuda_group_advantages(simt.GroupArgs())
    simt.cuda_policy_loss(simt.PolicyArgs())
    simt.cuda_policy_loss_backward(simt.PolicyGradArgs())


# -------------------------------------------------------------------------------------------------- the emulator itself


def misuse(simt, name: str, threads: int = 64, *, blocks: int = 1) -> list[float]:
    out = (ctypes.c_float * 4096)()
    simt.run_misuse(name, blocks, threads, ctypes.addressof(out))
    return list(out)


@pytest.mark.parametrize(("right", "wrong"), [("neighbour", "missing_barrier"), ("neighbour_in_warp", "missing_warp_barrier")])
def test_a_missing_barrier_shows_in_some_order(simt, right, wrong):
    results = {right: [], wrong: []}
    for order in ORDERS:
        set_order(simt, *order)
        for name, found in results.items():
            found.append(misuse(simt, name, 32)[:32])
    expected = [(t + 1.0) % 32 for t in range(32)]
    assert all(found == expected for found in results[right])
    assert all(found != expected for found in results[wrong])  # shared memory starts out as NaN
    assert any(str(found) != str(results[wrong][0]) for found in results[wrong])


def test_counting_a_block_before_it_has_written_shows_in_some_order(simt):
    found = {"sum_by_the_last_block": [], "missing_barrier_before_the_count": []}
    for seed in range(10):
        set_order(simt, "random", seed)
        for name, sums in found.items():
            sums.append(misuse(simt, name, blocks=10)[0])
    right, wrong = found.values()
    assert set(right) == {640}
    assert min(wrong) < 640


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_barriers", r"__syncthreads\(\) at .*misuse.cpp:\d+ while other threads wait at .*misuse.cpp:\d+"),
        ("barrier_against_shuffle", "deadlock: 1 threads in __syncthreads.., 31 in a warp operation, 32 have exited"),
        ("overrun", "write outside a shared array of 256 bytes"),
        ("underrun", "write outside a shared array of 256 bytes"),
        ("too_much_shared", "shared arrays of 49156 bytes"),
        ("caller_not_in_mask", "the calling lane is not in its own mask"),
        ("lane_absent", "the mask has a lane that has exited|a lane in its mask has exited"),
        ("lane_leaves", "a lane in its mask has exited while others wait"),
        ("masks_differ", "lanes wait for one another with other masks or operations"),
        ("operations_differ", "lanes wait for one another with other masks or operations"),
        ("source_not_in_mask", "lane 0 reads lane 16, which is not in the mask"),
        ("misaligned_load", "misaligned load of 16 bytes"),
    ],
)
def test_misuse_is_an_error(simt, name, message):
    with pytest.raises(RuntimeError, match=message):
        misuse(simt, name)
    assert misuse(simt, "neighbour")[:3] == [1, 2, 3]  # and the next launch works


def test_launches_that_no_gpu_accepts(simt):
    for threads in (0, 1025):
        with pytest.raises(RuntimeError, match=f"launch with blocks of {threads}x1x1"):
            misuse(simt, "neighbour", threads)
    assert misuse(simt, "neighbour", 1024)[:1024] == [*range(1, 1024), 0]


def test_what_is_allowed(simt):
    assert misuse(simt, "barrier_after_exit")[:4] == [0, 1, 0, 1]
    misuse(simt, "write_last")
    assert all(map(math.isnan, misuse(simt, "read_unwritten")[:64]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_rounds_like_pytorch(simt, dtype):
    """The gradient of lse is exactly its upstream if there is but one token."""
    info, generator = torch.finfo(dtype), torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 18, (1000,), generator=generator)
    halfway = torch.randint(2**9, 2**12, (1000,), generator=generator) * 2.0**exponents
    edges = [0.0, -0.0, info.max, info.max * (1 + info.eps / 4), -info.max * (1 + info.eps / 2), INF, -INF]
    values = torch.cat([torch.tensor(edges), halfway, -halfway, torch.randn(1000, generator=generator)])
    rows = len(values)
    logits, targets = torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64)
    stats = {"row_max": torch.zeros(rows), "row_log2_sum": torch.zeros(rows), "entropy": None}
    g = grad(simt, logits, targets, stats, {"lse": values}, into=torch.empty(rows, 1, dtype=dtype))
    expected = (values + 0.0).to(dtype).view(-1, 1)  # the kernel adds 0, which turns -0 into 0
    assert same_bits(g, expected)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_warp_operations(simt, order):
    set_order(simt, *order)
    rows = [misuse(simt, "warp_operations")[k * 64 : k * 64 + 64] for k in range(13)]
    lanes = [*range(32)] * 2
    assert rows == [
        [5] * 64,
        [lane // 8 * 8 + 1 for lane in lanes],
        [lane ^ 3 for lane in lanes],
        [lane if lane ^ 9 > lane | 7 else lane ^ 9 for lane in lanes],
        [lane - 2 if lane >= 2 else lane for lane in lanes],
        [lane + 2 if lane % 16 < 14 else lane for lane in lanes],
        [1] * 64,
        [11] * 64,
        [80] * 64,
        [1] * 64,
        [0] * 64,
        [1] * 64,
        [0] * 64,
    ]
    assert misuse(simt, "halves")[:32] == [*range(16, 32)] + [sum(range(16))] * 16


# ----------------------------------------------------------------------------------------------------------- sanitizers

SANITIZED = "(test_fold or test_grad or loss or advantages) and not 20001 and not 20008"


@pytest.fixture(scope="session")
def sanitized(cache):
    """Runs Python with the sanitized module, whose path is in PREFKERN_SIMT_MODULE."""
    if missing := build.missing():
        pytest.skip(f"needs {missing}")
    environment = build.sanitizer_environment()
    if environment is None:
        pytest.skip("the compiler has no sanitizers")
    path = build.build(cache, "sanitize")
    environment = {**os.environ, **environment, "PREFKERN_SIMT_MODULE": str(path), "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "cwd": build.HERE.parent, "capture_output": True, "text": True}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], check=False, **options)

    return run


@pytest.mark.slow
@pytest.mark.skipif("PREFKERN_SIMT_MODULE" in os.environ, reason="runs inside of it")
@pytest.mark.parametrize("name", ["overrun", "underrun"])
def test_the_sanitizer_sees_the_kernels(sanitized, name):
    script = "import os, sys; from simt import build; build.load(os.environ['PREFKERN_SIMT_MODULE'])"
    done = sanitized("-c", f"{script}.run_misuse('{name}', 1, 64, 0)")
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "write_at" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif("PREFKERN_SIMT_MODULE" in os.environ, reason="runs inside of it")
def test_under_sanitizers(sanitized):
    options = ("-q", "-x", "--capture=no", "-p", "no:cacheprovider")  # a report goes to stderr, and the process ends
    done = sanitized("-m", "pytest", *options, "-k", SANITIZED, __file__)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
