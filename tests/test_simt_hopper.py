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
    ("rows", "columns", "width"), [(1, 1, 32), (3, 31, 32), (65, 32, 32), (130, 33, 32), (9, 1003, 32), (70, 500, 192), (5, 2049, 256)]
)  # fmt: skip
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
