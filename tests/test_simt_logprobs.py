"""The CUDA kernels of csrc/logprobs, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from prefkern import reference
from simt.harness import (
    INF,
    NAN,
    close,
    guards_hold,
    misaligned,
    pointer,
    same_bits,
    same_bits_in_every_order,
    tensor_like,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = (1, 7, 31, 33, 127, 1003, 4097, 20001)  # around a pack, a warp, a tile, and in every launch configuration
FLOAT_OUTPUTS = ("logp", "entropy", "lse", "sum_sq_probs", "mean_logit")
STATISTICS = ("row_max", "row_log2_sum")
ALL_OUTPUTS = (*FLOAT_OUTPUTS, *STATISTICS)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_width = pytest.mark.parametrize("columns", COLUMNS)


@dataclass(frozen=True)
class Head:
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: Tensor | None = None


PLAIN = Head()


def row_map(simt, view: Tensor):
    result = simt.RowMap()
    if view.dim() == 2:
        result.inner, result.outer_stride, result.inner_stride = 1, view.stride(0), 0
    else:
        result.inner, result.outer_stride, result.inner_stride = view.shape[1], view.stride(0), view.stride(1)
    return result


def dtype_of(simt, view: Tensor):
    return getattr(simt.DType, str(view.dtype).removeprefix("torch."))


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


def fold(simt, logits, targets, head=PLAIN, *, cuts=(), entropy=True, extra=True, outputs=ALL_OUTPUTS, masked=False):
    """The outputs by name; the vocabulary is folded block by block if it is cut."""
    rows, vocab = targets.numel(), logits.shape[-1]
    out = {name: torch.full((rows,), NAN) for name in outputs}
    top1 = torch.full((rows,), 2, dtype=torch.uint8)
    state = torch.full((7, rows + 3), NAN)
    for first, last in pairwise((0, *cuts, vocab)):
        args = simt.FoldArgs()
        args.block = logit_block(simt, logits, targets, head, first, last)
        args.block.transform.masked = masked
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


def grad(simt, logits, targets, stats, upstream, head=PLAIN, *, into=None, cuts=(), masked=False):
    """d loss / d logits, written to `into`, where `stats` is what `fold` gave and `upstream` is by name."""
    into = tensor_like(logits) if into is None else into
    for first, last in pairwise((0, *cuts, logits.shape[-1])):
        args = simt.GradArgs()
        args.block = logit_block(simt, logits, targets, head, first, last)
        args.block.transform.masked = masked
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


def close_outputs(actual: dict[str, Tensor], expected, **tolerance) -> None:
    for name in FLOAT_OUTPUTS:
        close(actual[name], getattr(expected, name).detach(), **tolerance)
    assert torch.equal(actual["is_top1"], expected.is_top1)


def close_grad(actual: Tensor, expected: Tensor) -> None:
    close(actual, expected, atol=1e-6, rtol=max(2e-5, torch.finfo(actual.dtype).eps))


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
@pytest.mark.parametrize("columns", [24, 1000, 4096, 20000])
def test_bits_do_not_depend_on_where_rows_lie(simt, dtype, columns):
    """Rows at multiples of 16 bytes have a path of their own."""
    values, targets = sample(4, columns)
    targets[1] = -100
    aligned, elsewhere = values.to(dtype), misaligned(values, dtype)
    a, b = (fold(simt, logits, targets) for logits in (aligned, elsewhere))
    assert all(same_bits(a[name], b[name]) for name in a)
    close_outputs(a, definition(aligned, targets))
    gradients = [grad(simt, logits, targets, a, upstream_of(4)) for logits in (aligned, elsewhere)]
    assert same_bits(*gradients)
    counts = {name: g * (targets != -100) for name, g in upstream_of(4).items()}
    close_grad(gradients[0], definition_of_grad(aligned, targets.clamp(min=0), counts))


@pytest.mark.parametrize("columns", [1, 31, 33, 700])
@pytest.mark.parametrize("name", [*HEADS, None])
def test_the_gradient_of_the_bias(simt, columns, name):
    """It is the sum down the columns of the gradient of the logits before the softcap's input is scaled."""
    logits, targets = sample(37, columns)
    targets[5] = -100
    head = heads(37, columns)[name] if name else PLAIN
    stats, upstream = fold(simt, logits, targets, head), upstream_of(37)
    expected = grad(simt, logits, targets, stats, upstream, head, into=torch.full_like(logits, NAN)).double().sum(0)
    before = torch.randn(columns)

    def bias(add):
        args = simt.GradArgs()
        args.block = logit_block(simt, logits, targets, head, 0, columns)
        args.logits, args.logits_map = pointer(logits), row_map(simt, logits)
        for statistic in (*STATISTICS, "entropy"):
            setattr(args, statistic, pointer(stats[statistic]))
        for output, g in upstream.items():
            setattr(args, f"g_{output}", pointer(g))
        into = before.clone() if add else torch.full((columns,), NAN)
        args.d_bias, args.add_to_bias = pointer(into), add
        simt.cuda_grad_bias(args)
        return {"d_bias": into}

    close(same_bits_in_every_order(simt, lambda: bias(False))["d_bias"], expected, atol=2e-5)
    close(bias(True)["d_bias"], expected + before.double(), atol=2e-5)


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


# ---------------------------------------------------------------------------------------------------------- merge_shards


def shard_states(simt, logits, targets, head=PLAIN, *, cuts=(), extra=True):
    """[ranges, 7, rows], with a gap behind each: what a process folds of its columns only."""
    rows = targets.numel()
    memory = torch.full((len(cuts) + 1, 7 * rows + 5), NAN)
    states = memory[:, : 7 * rows].view(-1, 7, rows)
    for state, (first, last) in zip(states, pairwise((0, *cuts, logits.shape[-1])), strict=True):
        args = simt.FoldArgs()
        args.block = logit_block(simt, logits, targets, head, first, last)
        args.logits, args.logits_map = pointer(logits[..., first:]), row_map(simt, logits)
        args.entropy, args.extra, args.first, args.last = True, extra, True, False
        args.state, args.state_stride = pointer(state), rows
        simt.cuda_fold_logits(args)
    return states


def merge(simt, states, targets, vocab, head=PLAIN):
    rows = targets.numel()
    args = simt.ShardMergeArgs()
    args.shards, args.shard_stride = len(states), states.stride(0)
    block = args.rows.block
    block.rows, block.vocab, block.targets = rows, vocab, pointer(targets)
    block.transform.scale, block.transform.softcap = head.logit_scale, head.softcap or 0.0
    if isinstance(head.temperature, Tensor):
        block.transform.row_temperature = pointer(head.temperature)
    else:
        block.transform.temperature = head.temperature
    args.rows.state, args.rows.state_stride = pointer(states), rows
    out = {name: torch.full((rows,), NAN) for name in ALL_OUTPUTS}
    for name, tensor in out.items():
        setattr(args.rows, {"entropy": "out_entropy"}.get(name, name), pointer(tensor))
    top1 = torch.full((rows,), 2, dtype=torch.uint8)
    args.rows.is_top1 = pointer(top1)
    simt.cuda_merge_shards(args)
    assert set(top1.tolist()) <= {0, 1}
    return {**out, "is_top1": top1.bool()}


@pytest.mark.parametrize("name", [*HEADS, None])
@pytest.mark.parametrize(("columns", "cuts"), [(7, ()), (127, (64,)), (1003, (1, 500, 1002)), (20001, (2048, 19000))])
def test_merge(simt, name, columns, cuts):
    """More rows than a block has threads."""
    rows = 140 if columns < 200 else 9
    values, targets = sample(rows, columns)
    targets[1] = -100
    targets[2:4] = torch.tensor([cuts[0] - 1, cuts[0]]) if cuts else 0
    head = heads(rows, columns)[name] if name else PLAIN
    out = same_bits_in_every_order(
        simt, lambda: merge(simt, shard_states(simt, values, targets, head, cuts=cuts), targets, columns, head)
    )
    close_outputs(out, definition(values, targets, head))
    whole = fold(simt, values, targets, head)
    for output in STATISTICS:
        close(out[output], whole[output], atol=3e-6, rtol=1e-6)
    assert same_bits(out["row_max"], whole["row_max"])
    assert torch.equal(out["is_top1"], whole["is_top1"])


def test_merge_breaks_ties_as_the_whole_does(simt):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (300, 40), generator=generator).float()
    best = logits == logits.max(-1, keepdim=True).values
    first = best.int().argmax(-1)
    for targets in (first, 39 - best.int().flip(-1).argmax(-1), torch.randint(40, (300,), generator=generator)):
        out = merge(simt, shard_states(simt, logits, targets, cuts=(1, 2, 3, 20)), targets, 40)
        assert torch.equal(out["is_top1"], targets == first)


def test_the_cpu_state_and_the_cuda_state_join_alike(simt):
    """They may differ in what lies left of a target that is elsewhere; the join does not read it."""
    values, targets = sample(9, 300)
    states = shard_states(simt, values, targets, cuts=(100, 200))
    out = merge(simt, states, targets, 300)
    elsewhere = states[:, 5].isnan()
    assert elsewhere.sum() == 2 * 9
    assert states[:, 6][elsewhere].isfinite().any()
    others = states.clone()
    others[:, 6][elsewhere] = -INF
    assert all(same_bits(merge(simt, others, targets, 300)[name], out[name]) for name in ALL_OUTPUTS)


def test_merge_of_what_cannot_be(simt):
    """A target in two ranges, in none, out of the vocabulary; a range that nothing was folded into; -inf and NaN."""
    values, targets = sample(6, 90)
    values[3, :60], values[4, 70] = -INF, NAN
    targets[:5] = torch.tensor([10, 40, 89, 80, 5])
    nothing = torch.tensor([-INF, 0, 0, 0, 0, NAN, -INF])[:, None].expand(7, 6)
    expected = definition(values, targets)
    states = shard_states(simt, values, targets, cuts=(30, 60))
    out = merge(simt, torch.cat([nothing[None], states, nothing[None]]), targets, 90)
    close_outputs(out, expected)
    twice = merge(simt, torch.cat([states, states[:1]]), targets, 90)
    assert twice["logp"].isnan().tolist() == [True, False, False, False, True, bool(targets[5] < 30)]
    assert merge(simt, states[:2], targets, 90)["logp"].isnan().tolist() == [False, False, *(targets[2:] >= 60).tolist()]
    outside = merge(simt, states, torch.where(torch.arange(6) == 0, 90, targets), 90)
    assert all(outside[name][0].isnan() for name in FLOAT_OUTPUTS)


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
    simt.cuda_merge_shards(simt.ShardMergeArgs())


# --------------------------------------------------------------------------------------------------------- round_logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 8, 1003, 4096])
@pytest.mark.parametrize("biased", [False, True])
def test_rounding(simt, dtype, columns, biased):
    """As PyTorch rounds the sum of both, wherever the block lies in memory."""
    values, _ = sample(5, columns)
    values[0, 0], values[1, 0], values[2, 0], values[3, 0] = NAN, INF, -INF, 1e5
    bias = torch.randn(columns) if biased else None
    expected = (values if bias is None else values + bias).to(dtype).float()

    def rounded(block):
        args = simt.RoundArgs()
        args.logits, args.rows, args.cols = pointer(block), 5, columns
        args.bias, args.to = 0 if bias is None else pointer(bias), getattr(simt.DType, str(dtype).removeprefix("torch."))
        simt.cuda_round_logits(args)
        return block

    for block in (values.clone(), misaligned(values.view(1, -1), torch.float32).view(5, columns)):
        torch.testing.assert_close(rounded(block), expected, rtol=0, atol=0, equal_nan=True)
    unknown = simt.RoundArgs()
    unknown.rows = unknown.cols = 1
    unknown.to = simt.DType.float32
    with pytest.raises(RuntimeError, match="invalid argument"):
        simt.cuda_round_logits(unknown)
    simt.cuda_round_logits(simt.RoundArgs())  # no rows launch nothing


# ---------------------------------------------------------------------------------------------------------- keep_logits


def kept_ids(simt, offsets: Tensor, ids: Tensor):
    kept = simt.KeptIds()
    kept.begin, kept.end = pointer(offsets), pointer(offsets[1:])
    kept.ids, kept.wide, kept.count = pointer(ids), ids.dtype == torch.int64, len(ids)
    return kept


def csr(rows: list[list[int]], dtype=torch.int64) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return offsets, torch.tensor([i for row in rows for i in row], dtype=dtype)


def keep(simt, logits, targets, kept, head=PLAIN, *, cuts=()):
    """A copy of `logits` with -inf for what is not kept, and the mean logit of what is."""
    mean = torch.full((len(targets),), NAN)
    parts = []
    for first, last in pairwise((0, *cuts, logits.shape[-1])):
        part = logits[:, first:last].clone(memory_format=torch.contiguous_format)
        args = simt.KeepArgs()
        args.block = logit_block(simt, logits, targets, head, first, last)
        args.block.transform.masked = True
        args.kept, args.logits, args.mean_logit = kept, pointer(part), pointer(mean)
        simt.cuda_keep_logits(args)
        parts.append(part)
    return {"logits": torch.cat(parts, 1), "mean_logit": mean}


@each_dtype
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("columns", "cuts"), [(1, ()), (127, (1, 64)), (1003, ()), (20001, (8192, 9000))])
@pytest.mark.parametrize("name", [None, "softcap", "all"])
def test_keep(simt, dtype, ids_dtype, columns, cuts, name):
    """-inf goes to what a row does not keep, in every order of the threads; fold and grad then are those of what it keeps."""
    values, targets = sample(6, columns)
    logits, head = values.to(dtype), heads(6, columns)[name] if name else PLAIN
    targets[1] = -100
    generator = torch.Generator().manual_seed(columns)
    chosen = torch.rand(6, columns, generator=generator) < torch.tensor([[1.0], [0.0], [0.02], [0.3], [0.9], [0.0]])
    chosen[torch.arange(6), targets.clamp_min(0)] = True
    chosen[1] = False
    offsets, ids = csr([row.nonzero().flatten().tolist() for row in chosen], ids_dtype)
    out = same_bits_in_every_order(simt, lambda: keep(simt, logits, targets, kept_ids(simt, offsets, ids), head, cuts=cuts))
    expected = logits.masked_fill(~chosen, -INF)
    expected[1] = logits[1]  # an ignored row is left alone
    assert torch.equal(out["logits"], expected)

    leaf = logits.double().requires_grad_()
    y = leaf + (head.bias.double() if head.bias is not None else 0)
    options = {
        "temperature": head.temperature.double() if isinstance(head.temperature, Tensor) else head.temperature,
        "softcap": head.softcap, "logit_scale": head.logit_scale,
        "outputs": ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1"),
    }  # fmt: skip
    if columns > 2000:  # its definition would take an identity matrix of that size
        return
    exact = reference.linear_logprobs(y, torch.eye(columns, dtype=torch.float64), targets, keep=(offsets, ids), **options)
    close(out["mean_logit"], exact.mean_logit.detach())

    stats = fold(simt, out["logits"], targets, head, masked=True)
    for field in ("logp", "entropy", "lse", "sum_sq_probs"):
        close(stats[field], getattr(exact, field).detach())
    assert torch.equal(stats["is_top1"], exact.is_top1)
    upstream = upstream_of(6)
    sum((getattr(exact, field) * g.double()).sum() for field, g in upstream.items()).backward()
    g = grad(simt, out["logits"], targets, stats, upstream, head, masked=True)
    close_grad(g, leaf.grad)
    assert not g[~chosen].any()


def test_a_kept_logit_of_minus_infinity_under_a_softcap(simt):
    for dtype, lowest in (
        (torch.float32, torch.finfo(torch.bfloat16).min), (torch.bfloat16, None), (torch.float16, None)
    ):  # fmt: skip
        logits = torch.tensor([[-INF, 1.0, -INF, 2.0]]).to(dtype)
        kept = csr([[0, 1]])
        out = keep(simt, logits, torch.tensor([1]), kept_ids(simt, *kept), Head(softcap=3.0))
        assert out["logits"][0, 0] == (torch.finfo(dtype).min if lowest is None else lowest)
        assert out["logits"][0, 1:].tolist() == [1.0, -INF, -INF]
        close(out["mean_logit"], torch.tensor([(-3 + 3 * math.tanh(1 / 3)) / 2]))
        plain = keep(simt, logits, torch.tensor([1]), kept_ids(simt, *kept))
        assert plain["logits"][0].tolist() == [-INF, 1.0, -INF, -INF]


@each_dtype
def test_wrong_ids_stay_within_bounds(simt, dtype):
    """Whatever offsets and ids hold, no row but its own is written, and nothing beyond the ids is read."""
    values, targets = sample(5, 40)
    offsets = torch.tensor([-(2**62), 3, 2**62, 1, 4, 6])
    ids = torch.tensor([39, 2**62, -(2**63), 7, 3, 3])
    for kind in (torch.int64, torch.int32):
        logits, given = values.to(dtype), ids.clamp(-(2**31), 2**31 - 1).to(kind)
        out = keep(simt, logits, targets, kept_ids(simt, offsets, given))
        same = (out["logits"] == logits) | (out["logits"] == -INF)
        assert same.all()
        assert out["logits"][4].tolist() == [logits[4, i].item() if i == 3 else -INF for i in range(40)]


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_the_upstream_of_targets_that_are_not_kept(simt, ids_dtype):
    generator = torch.Generator().manual_seed(0)
    rows = [sorted(torch.randperm(50, generator=generator)[: 1 + i % 20].tolist()) for i in range(300)]
    targets = torch.randint(50, (300,), generator=generator)
    targets[7], rows[9] = -100, []
    offsets, ids = csr(rows, ids_dtype)
    g = torch.randn(300, generator=generator)
    g[[i for i in range(300) if int(targets[i]) not in rows[i]]] = NAN

    def kept():
        args = simt.KeptUpstreamArgs()
        out = torch.full((300,), NAN)
        args.rows, args.targets, args.kept = 300, pointer(targets), kept_ids(simt, offsets, ids)
        args.g, args.out = pointer(g), pointer(out)
        simt.cuda_kept_upstream(args)
        return {"out": out}

    out = same_bits_in_every_order(simt, kept)["out"]
    assert torch.equal(out, g.nan_to_num(0))
    assert 0 < out.count_nonzero() < 300


@pytest.mark.parametrize("given", [("g_logp",), ("g_entropy", "g_lse"), ("g_logp", "g_entropy", "g_lse"), ()], ids=str)
def test_targets_of_the_rows_that_contribute(simt, given):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(50, (300,), generator=generator)
    upstream = {name: torch.randn(300, generator=generator) * (torch.rand(300, generator=generator) < 0.3) for name in given}
    for g in upstream.values():
        g[5], g[6] = NAN, -0.0

    def active():
        args = simt.ActiveTargetsArgs()
        out = torch.full((300,), 99)
        args.rows, args.targets, args.ignore_index, args.out = 300, pointer(targets), -7, pointer(out)
        for name, g in upstream.items():
            setattr(args, name, pointer(g))
        simt.cuda_active_targets(args)
        return {"out": out.int()}

    out = same_bits_in_every_order(simt, active)["out"].long()
    used = torch.stack([g != 0 for g in upstream.values()]).any(0) if given else torch.zeros(300, dtype=torch.bool)
    assert torch.equal(out, torch.where(used, targets, -7))
    assert bool(used[5]) == bool(given) and not used[6]


def test_kept_of_no_rows_and_float64(simt):
    simt.cuda_active_targets(simt.ActiveTargetsArgs())
    simt.cuda_keep_logits(simt.KeepArgs())
    simt.cuda_kept_upstream(simt.KeptUpstreamArgs())
    values, targets = sample(2, 10)
    offsets, ids = csr([[0], [1]])
    with pytest.raises(RuntimeError, match="invalid argument"):
        keep(simt, values.double(), targets, kept_ids(simt, offsets, ids))
