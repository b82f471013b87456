"""The fold of tiles that tensor cores leave in registers, and what joins them, on the CPU, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch

from simt.harness import INF, NAN, close, pointer, same_bits, same_bits_in_every_order
from test_simt_logprobs import PLAIN, STATISTICS, Head, definition, fold, logit_block

OUTPUTS = ("logp", "entropy", "lse", *STATISTICS)
HEADS = {
    "plain": lambda rows, columns: PLAIN,
    "temperature": lambda rows, columns: Head(temperature=0.7, logit_scale=1.3),
    "rows": lambda rows, columns: Head(temperature=torch.rand(rows) + 0.5),
    "bias": lambda rows, columns: Head(bias=torch.randn(columns)),
    "softcap": lambda rows, columns: Head(softcap=3.0, bias=torch.randn(columns), temperature=torch.rand(rows) + 0.5),
}


def sample(rows: int, columns: int):
    generator = torch.Generator().manual_seed(rows + columns)
    logits = torch.randn(rows, columns, generator=generator) * 4 + 50
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[-1] = columns - 1
    targets[0] = -100
    return logits, targets


def tiles(simt, logits, targets, head=PLAIN, *, width=32, first=0, last=None, state=None):
    """Outputs by name, through parts of `width` columns; of columns [first, last) only, the state."""
    rows, columns = logits.shape
    last = columns if last is None else last
    count = -(-(last - first) // width)
    parts, target_pre = torch.full((count, 3, rows), NAN), torch.full((rows,), NAN)
    args = simt.TileFoldArgs()
    args.block = logit_block(simt, logits, targets, head, first, last)
    args.parts, args.target_pre = pointer(parts), pointer(target_pre)
    own = logits[:, first:last].contiguous()
    simt.run_tiles(args, pointer(own), width)
    # NaN may also come from the logits; what no lane wrote would be NaN in all three.
    assert (torch.isfinite(logits).all() and torch.isfinite(parts).all()) or not torch.isfinite(logits).all()
    merge = simt.TileMergeArgs()
    merge.tiles, merge.count = args, count
    out = {name: torch.full((rows,), 7.0) for name in OUTPUTS}
    for name, tensor in out.items():
        setattr(merge.rows, {"entropy": "out_entropy"}.get(name, name), pointer(tensor))
    if state is not None:
        merge.rows.last, merge.rows.state, merge.rows.state_stride = False, pointer(state), state.stride(0)
    simt.cuda_merge_tiles(merge)
    return out


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [(1, 1, 32), (3, 31, 32), (65, 32, 32), (130, 33, 32), (9, 1003, 32), (70, 500, 192), (5, 2049, 256)],
)
def test_tiles(simt, name, rows, columns, width):
    """Of one column, of whole and of broken tiles and groups of rows; targets in the first and the last column."""
    logits, targets = sample(rows, columns)
    head = HEADS[name](rows, columns)
    out = same_bits_in_every_order(simt, lambda: tiles(simt, logits, targets, head, width=width))
    exact = definition(logits, targets, head)
    for field in ("logp", "entropy", "lse"):
        close(out[field], getattr(exact, field))
    whole = fold(simt, logits, targets, head)
    assert same_bits(out["row_max"], whole["row_max"])
    close(out["row_log2_sum"], whole["row_log2_sum"], atol=3e-6)


def test_every_column_is_folded_once(simt):
    """Each target of a row of distinct logits: its logit is read from where the matrix has it."""
    columns = 300
    logits = torch.randperm(columns, generator=torch.Generator().manual_seed(0)).float().expand(columns, columns) / 50
    targets = torch.arange(columns)
    for width in (32, 192, 256):
        out = tiles(simt, logits.contiguous(), targets, width=width)
        close(out["logp"], logits[0].double().log_softmax(-1))
        assert same_bits(out["lse"], out["lse"][:1].expand(columns).contiguous())


def test_what_is_not_finite(simt):
    """-inf, NaN and +inf in one row each; a row of -inf only; rows without a tile that has anything."""
    logits, targets = sample(8, 100)
    targets[0] = 3
    logits[1, 10], logits[2, 64:], logits[3, 70], logits[4, 5] = -INF, -INF, NAN, INF
    logits[5] = -INF
    logits[6, :32], logits[6, 40] = -INF, NAN
    logits[7, 32:64], logits[7, 35] = -INF, NAN
    targets[1:3] = torch.tensor([10, 20])
    out = same_bits_in_every_order(simt, lambda: tiles(simt, logits, targets))
    whole = fold(simt, logits, targets, extra=False)
    for name in ("logp", "entropy", "lse"):
        close(out[name], whole[name])
    assert out["logp"][1] == -INF
    assert out["logp"].isnan().tolist() == [False, False, False, True, True, True, True, True]


def test_targets_that_are_not_there(simt):
    """Out of the vocabulary: NaN. Ignored: 0, whatever the row holds."""
    logits, targets = sample(6, 70)
    targets[:4] = torch.tensor([-100, 70, -1, 2**40])
    logits[0, 5] = NAN
    out = tiles(simt, logits, targets)
    for name in ("logp", "entropy", "lse"):
        assert out[name].isnan().tolist() == [False, True, True, True, False, False]
        assert out[name][0] == 0
    assert out["row_max"][0] == 0


def test_states_of_ranges_join(simt):
    """The state of a range of columns is what the fold over memory leaves of it."""
    logits, targets = sample(40, 300)
    cuts = [(0, 90), (90, 91), (91, 300)]
    states = []
    for first, last in cuts:
        state = torch.full((7, 43), NAN)
        tiles(simt, logits, targets, first=first, last=last, state=state)
        states.append(state)
        args, expected = simt.FoldArgs(), torch.full((7, 43), NAN)
        args.block = logit_block(simt, logits, targets, PLAIN, first, last)
        own = logits[:, first:last].contiguous()
        args.logits = pointer(own)
        args.logits_map.outer_stride = last - first
        args.entropy, args.first, args.last = True, True, False
        args.state, args.state_stride = pointer(expected), 43
        simt.cuda_fold_logits(args)
        close(state, expected, atol=1e-5, rtol=3e-6)
        assert same_bits(state[5], expected[5])
        assert state[:, 40:].isnan().all()
    memory = torch.stack(states)
    merge = simt.ShardMergeArgs()
    merge.shards, merge.shard_stride = 3, memory.stride(0)
    block = merge.rows.block
    block.rows, block.vocab, block.targets = 40, 300, pointer(targets)
    logp = torch.full((40,), NAN)
    merge.rows.state, merge.rows.state_stride, merge.rows.logp = pointer(memory), 43, pointer(logp)
    simt.cuda_merge_shards(merge)
    close(logp, definition(logits, targets).logp)


def test_without_rows_and_without_the_kernel(simt):
    simt.cuda_merge_tiles(simt.TileMergeArgs())
    with pytest.raises(RuntimeError):
        simt.cuda_hopper_head(simt.HopperHeadArgs())  # the emulator has no tensor cores


# ------------------------------------------------------------------------------------------------ rows moved together


def masks(rows: int):
    generator = torch.Generator().manual_seed(rows)
    fifth = torch.rand(rows, generator=generator) < 0.2
    return {"none": torch.zeros(rows, dtype=torch.bool), "fifth": fifth, "all": torch.ones(rows, dtype=torch.bool)}


def compact(simt, targets):
    rows = targets.numel()
    out = {name: torch.full((rows,), -7) for name in ("index", "place")} | {"count": torch.full((1,), -7)}
    args = simt.CompactArgs()
    args.rows, args.targets = rows, pointer(targets)
    for name, tensor in out.items():
        setattr(args, name, pointer(tensor))
    simt.cuda_compact(args)
    return {name: tensor.view(torch.int32) for name, tensor in out.items()}


@pytest.mark.parametrize("fraction", ["none", "fifth", "all"])
@pytest.mark.parametrize("rows", [1, 31, 300, 4096, 9001])
def test_rows_move_together_in_order(simt, rows, fraction):
    active = masks(rows)[fraction]
    targets = torch.where(active, torch.arange(rows), -100)
    out = same_bits_in_every_order(simt, lambda: compact(simt, targets))
    index, place, count = (out[name].view(torch.int64) for name in ("index", "place", "count"))
    expected = active.nonzero().flatten()
    assert count.tolist() == [len(expected)]
    assert torch.equal(index[: len(expected)], expected)
    assert (index[len(expected) :] == -1).all()
    assert torch.equal(place[expected], torch.arange(len(expected)))
    assert (place[~active] == -1).all()


@pytest.mark.parametrize("fraction", ["none", "fifth", "all"])
@pytest.mark.parametrize(("rows", "width", "offset"), [(5, 8, 0), (300, 24, 0), (700, 17, 1)])
def test_gather_and_scatter(simt, rows, width, offset, fraction):
    """Matrices with a stride and at odd addresses; zeros up to a whole tile, and nothing behind it is written."""
    active = masks(rows)[fraction]
    targets = torch.where(active, torch.arange(rows) + 3, -100)
    places = {name: tensor.view(torch.int64) for name, tensor in compact(simt, targets).items()}
    count = int(places["count"])
    memory = torch.randn(rows * (width + 8) + offset).bfloat16()
    matrix = memory[offset:].as_strided((rows, width), (width + 8, 1), offset)

    def gather():
        out = torch.full((rows, width), 7.0, dtype=torch.bfloat16)
        args = simt.GatherRowsArgs()
        args.rows, args.bytes, args.in_stride = rows, 2 * width, 2 * (width + 8)
        args.index, args.count = pointer(places["index"]), pointer(places["count"])
        setattr(args, "in", pointer(matrix))
        args.out = pointer(out)
        simt.cuda_gather_rows(args)
        return out

    moved = same_bits_in_every_order(simt, gather)
    end = min(max(256, -(-count // 256) * 256), rows)
    assert torch.equal(moved[:count], matrix[active])
    assert not moved[count:end].any()
    assert (moved[end:] == 7).all()

    names = ("row_max", "row_log2_sum", "entropy", "g_logp", "g_entropy", "g_lse", "temperature")
    vectors = torch.randn(7, rows)
    args, out, out_targets = simt.GatherVectorsArgs(), torch.full((7, rows), 7.0), torch.full((rows,), 7)
    args.rows, args.index, args.targets = rows, pointer(places["index"]), pointer(targets)
    args.out, args.out_targets = pointer(out), pointer(out_targets)
    for name, vector in zip(names, vectors, strict=True):
        if name != "g_lse":
            setattr(args, name, pointer(vector))
    simt.cuda_gather_vectors(args)
    assert torch.equal(out_targets[:count], targets[active])
    assert (out_targets[count:] == -100).all()
    for k, name in enumerate(names):
        if name == "g_lse":
            assert (out[k] == 7).all()
            continue
        assert torch.equal(out[k, :count], vectors[k, active])
        assert (out[k, count:] == float(name == "temperature")).all()

    wide = torch.full((rows, width), NAN)
    wide[:count] = torch.randn(count, width)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        back = torch.full((rows, width), 7.0, dtype=dtype)
        put = simt.ScatterRowsArgs()
        put.rows, put.width, put.place = rows, width, pointer(places["place"])
        setattr(put, "in", pointer(wide))
        put.out, put.dtype = pointer(back), getattr(simt.DType, str(dtype).removeprefix("torch."))
        simt.cuda_scatter_rows(put)
        assert torch.equal(back[active], wide[:count].to(dtype))
        assert not back[~active].any()


@pytest.mark.parametrize(("count", "first"), [(0, 0), (5, 0), (300, 0), (300, 256), (300, 512), (600, 0)])
def test_gradients_of_rows_that_were_moved(simt, count, first):
    """Rows with a gradient as without a count; zeros up to a whole tile; behind it the logits are left alone."""
    rows, columns = 600, 40
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(rows, columns, generator=generator)
    targets = torch.where(torch.arange(rows) < count - first, torch.arange(rows) % columns, -100)
    stats = fold(simt, logits, targets, extra=False)
    g_logp, counted = torch.randn(rows, generator=generator), torch.tensor([count])

    def gradients(limit):
        z = logits.clone()
        args = simt.GradArgs()
        args.block = logit_block(simt, logits, targets, PLAIN, 0, columns)
        args.logits = args.grad = pointer(z)
        args.logits_map.outer_stride, args.grad_map.outer_stride = columns, 2 * columns
        args.grad_dtype = simt.DType.bfloat16
        args.row_max, args.row_log2_sum, args.g_logp = (pointer(t) for t in (stats["row_max"], stats["row_log2_sum"], g_logp))
        if limit:
            args.compact_count, args.compact_first = pointer(counted), first
        simt.cuda_grad_logits(args)
        return z

    z, every = same_bits_in_every_order(simt, lambda: gradients(True)), gradients(False)
    left = max(count - first, 0)
    end = min(max(256, -(-left // 256) * 256), rows)
    assert same_bits(z[:end], every[:end])
    assert not z.view(torch.bfloat16)[left:end, :columns].any()
    assert torch.equal(z[end:], logits[end:])


def test_nothing_to_move(simt):
    for args, launch in (
        (simt.GatherRowsArgs(), simt.cuda_gather_rows),
        (simt.GatherVectorsArgs(), simt.cuda_gather_vectors),
        (simt.ScatterRowsArgs(), simt.cuda_scatter_rows),
    ):
        launch(args)
    none = torch.full((1,), -7)
    args = simt.CompactArgs()
    args.count = pointer(none)
    simt.cuda_compact(args)
    assert none.item() == 0
