"""The CUDA kernels of csrc/conflicts, compiled for the CPU by tests/simt, against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import reference
from prefkern.ops.types import ConflictRuns
from simt.harness import INF, NAN, pointer, same_bits_in_every_order, tensor_like


def layout_of(simt, tokens, cu_seqlens):
    layout = simt.SequenceLayout()
    layout.tokens = tokens.numel()
    layout.sequences = tokens.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    layout.padded_length = tokens.shape[1] if cu_seqlens is None else 0
    layout.cu_seqlens = pointer(cu_seqlens)
    return layout


def conflict_runs(simt, tokens, advantages, group, mask=None, *, cu_seqlens=None) -> dict[str, Tensor]:
    """Runs by name, as int32."""
    narrow = tokens.dtype == torch.int32
    args = simt.ConflictArgs32() if narrow else simt.ConflictArgs()
    args.layout = layout_of(simt, tokens, cu_seqlens)
    ids, order = torch.sort(group, stable=True)
    args.tokens, args.advantages, args.group, args.order, args.mask = map(pointer, (tokens, advantages, ids, order, mask))
    out = {name: tensor_like(advantages, fill=-7, dtype=torch.int64) for name in ConflictRuns._fields}
    args.forward, args.backward, args.length = map(pointer, out.values())
    (simt.cuda_conflict_runs32 if narrow else simt.cuda_conflict_runs)(args)
    return {name: values.int() for name, values in out.items()}


def conflict_weights(simt, tokens, advantages, runs, *, cu_seqlens=None, w_pos=1.7, w_neg=-0.3, combine="max_once"):
    args = simt.ConflictWeightArgs()
    args.layout = layout_of(simt, tokens, cu_seqlens)
    args.rule.combine, args.rule.w_pos, args.rule.w_neg = getattr(simt.ConflictCombine, combine), w_pos, w_neg
    wide = [runs[name].long() for name in ConflictRuns._fields]
    args.advantages, args.forward, args.backward, args.length = map(pointer, (advantages, *wide))
    weights = tensor_like(tokens, dtype=torch.float32)
    args.weights = pointer(weights)
    simt.cuda_conflict_weights(args)
    return weights


def sample(batch: int, length: int, *, groups: int = 3, agree: float = 0.95) -> tuple[Tensor, ...]:
    """Tokens that agree from both ends but for a share of them, advantages, ids, lengths."""
    lengths = torch.randint(0, length + 1, (batch,))
    lengths[::2] = length
    common = torch.randint(0, 2**31 - 1, (length,))
    tokens = common.repeat(batch, 1)
    for i, n in enumerate(lengths.tolist()):
        tokens[i, n // 2 : n] = common[length - (n - n // 2) :]
    tokens[torch.rand(batch, length) > agree] = 5
    return tokens, torch.randint(-1, 2, (batch,)).float(), torch.randint(0, groups, (batch,)) * 2**33 - 9, lengths


def prefix(lengths: Tensor, padded: int) -> Tensor:
    return torch.arange(padded) < lengths[:, None]


def boundaries(lengths: Tensor) -> Tensor:
    return torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)


def check(simt, tokens, advantages, group, mask=None, **options) -> dict[str, Tensor]:
    """Runs and weights against the definition, in every order."""
    out = same_bits_in_every_order(simt, lambda: conflict_runs(simt, tokens, advantages, group, mask, **options))
    expected = reference.conflict_runs(tokens, advantages, group, mask, **options)
    for name in expected._fields:
        assert out[name].tolist() == getattr(expected, name).tolist(), name
    for combine in ("max_once", "product"):
        weights = conflict_weights(simt, tokens, advantages, out, combine=combine, **options)
        rule = {"w_pos": 1.7, "w_neg": -0.3, "combine": combine}
        assert torch.equal(weights, reference.conflict_weights(tokens, advantages, group, mask, **rule, **options))
    return out


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("batch", "length"), [(1, 3), (7, 31), (12, 32), (9, 33), (20, 300)])
def test_conflict_runs(simt, dtype, packed, masked, batch, length):
    tokens, advantages, group, lengths = sample(batch, length)
    tokens, mask = tokens.to(dtype), prefix(lengths, length)
    if not packed:
        check(simt, tokens, advantages, group, mask if masked else None)
        return
    # Behind the boundaries a mask may end a row early.
    inner = prefix((lengths + 1) // 2, length)[mask] if masked else None
    check(simt, tokens[mask], advantages, group, inner, cu_seqlens=boundaries(lengths))


@pytest.mark.parametrize("batch", [32, 33, 150])
@pytest.mark.parametrize("agree", [0.99, 0.6])
def test_conflict_runs_of_a_large_group(simt, batch, agree):
    """More rows than a warp has lanes; partners on both sides of that boundary."""
    tokens, advantages, group, lengths = sample(batch, 70, groups=1, agree=agree)
    out = check(simt, tokens, advantages, group, prefix(lengths, 70))
    assert out["forward"].max() > 3


def test_conflict_runs_whose_partner_changes(simt):
    """Row 0 agrees with a different row at every token; what one of them misses the next one has."""
    length = 96
    tokens = torch.full((length + 1, length), -1)
    tokens[0] = torch.arange(length)
    tokens[1 + torch.arange(length), torch.arange(length)] = torch.arange(length)
    advantages = torch.cat([torch.ones(1), -torch.ones(length)])
    out = check(simt, tokens, advantages, torch.zeros(length + 1, dtype=torch.int64))
    assert out["forward"][0] == out["backward"][0] == length
    assert out["forward"][1] == out["backward"][length] == 1
    assert out["forward"][2:].sum() == out["backward"][1:length].sum() == 0


def test_conflict_runs_of_every_length(simt):
    length = 70
    where = torch.arange(length)
    tokens = where.repeat(2 * length, 1)
    tokens[2 * where, where] = -1
    out = check(simt, tokens, torch.tensor([0.5, -INF]).repeat(length), where.repeat_interleave(2))
    assert torch.equal(out["forward"].long(), where.repeat_interleave(2))


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (0, 0), (1, 0), (-1, 0)])
def test_no_conflict(simt, signs):
    advantages = torch.tensor(signs).float().repeat(3)
    out = check(simt, torch.full((6, 40), 3), advantages, torch.zeros(6, dtype=torch.int64))
    assert not out["forward"].any() and not out["backward"].any()


@pytest.mark.parametrize("what", ["hole", "hole at the start", "nan"])
def test_a_group_with_a_bad_row_is_unknown(simt, what):
    tokens, advantages, group, lengths = sample(40, 50)
    mask, row = prefix(lengths, 50), 8
    if what == "nan":
        advantages[row] = NAN
    else:
        mask[row] = True
        mask[row, 0 if what == "hole at the start" else 30] = False
    bad = group == group[row]
    out = same_bits_in_every_order(simt, lambda: conflict_runs(simt, tokens, advantages, group, mask))
    assert out["length"][bad].eq(-1).all() and not out["forward"][bad].any() and not out["backward"][bad].any()
    expected = reference.conflict_runs(tokens[~bad], advantages[~bad], group[~bad], mask[~bad])
    for name in expected._fields:
        assert out[name][~bad].tolist() == getattr(expected, name).tolist()
    weights = conflict_weights(simt, tokens, advantages, out)
    assert torch.equal(weights.isnan(), bad[:, None].expand_as(weights))


@pytest.mark.parametrize(
    ("lengths", "unknown"),
    [
        ((0, 20, 10, 40), range(40)),
        ((1, 20, 40), range(40)),
        ((0, 20, 39), range(40)),
        ((0, 20, 41), range(40)),
        ((0, -5, 40), range(40)),
        ((0, 2**30, 40), range(40)),
        ((-1, 20, 40), range(40)),
        ((3,), range(40)),
    ],
)
def test_a_wrong_layout_is_unknown(simt, lengths, unknown):
    """All rows are of one group: nothing of them is known."""
    rows = len(lengths) - 1
    arguments = (torch.full((40,), 3), torch.tensor([1.0, -1.0, 1.0])[:rows], torch.zeros(rows, dtype=torch.int64))
    for mask in (None, torch.ones(40, dtype=torch.bool)):
        cu_seqlens = torch.tensor(lengths, dtype=torch.int32)
        out = conflict_runs(simt, *arguments, mask, cu_seqlens=cu_seqlens)
        assert out["length"].eq(-1).all() and not out["forward"].any() and not out["backward"].any()
        weights = conflict_weights(simt, arguments[0], arguments[1], out, cu_seqlens=cu_seqlens)
        assert weights.isnan().nonzero()[:, 0].tolist() == list(unknown)


def test_a_wrong_layout_leaves_other_groups_alone(simt):
    tokens, cu_seqlens = torch.full((40,), 3), torch.tensor([0, 10, 20, 30, 41], dtype=torch.int32)
    advantages, group = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 1])
    out = conflict_runs(simt, tokens, advantages, group, cu_seqlens=cu_seqlens)
    assert out["length"].tolist() == [10, 10, -1, -1]
    assert out["forward"].tolist() == [10, 10, 0, 0]
    weights = conflict_weights(simt, tokens, advantages, out, cu_seqlens=cu_seqlens, w_neg=0.5)
    assert weights[:20].tolist() == torch.tensor([1.7] * 10 + [0.5] * 10).tolist()
    assert weights[20:].isnan().all()


def test_weights_of_more_tokens_than_the_grid_has_threads(simt):
    batch, length = 3, (4096 * 256) // 3 + 9
    tokens = torch.zeros(batch, length, dtype=torch.int8)
    lengths = torch.tensor([length, 5, length - 1], dtype=torch.int32)
    runs = {"forward": torch.tensor([2, 5, 0]), "backward": torch.tensor([3, 0, 1]), "length": lengths}
    weights = conflict_weights(simt, tokens, torch.tensor([1.0, -1.0, -1.0]), runs, w_pos=2.0, w_neg=0.0)
    assert weights.sum(1).tolist() == [length + 5, 0, length - 2]
    assert weights[2, -3:].tolist() == [1, 0, 0]


def first_divergence(simt, a, b, mask_a=None, mask_b=None, *, cu_seqlens_a=None, cu_seqlens_b=None):
    narrow = a.dtype == torch.int32
    args = simt.DivergenceArgs32() if narrow else simt.DivergenceArgs()
    args.layout_a, args.layout_b = layout_of(simt, a, cu_seqlens_a), layout_of(simt, b, cu_seqlens_b)
    out = torch.full((args.layout_a.sequences,), -7)
    args.ids_a, args.ids_b, args.mask_a, args.mask_b, args.position = map(pointer, (a, b, mask_a, mask_b, out))
    (simt.cuda_first_divergence32 if narrow else simt.cuda_first_divergence)(args)
    return out.int()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", ["padded", "masked", "packed"])
def test_first_divergence(simt, dtype, layout):
    """Around a warp and a tile of 512 tokens."""
    places = (0, 1, 31, 127, 128, 511, 512, 599, None)
    a = torch.randint(-(2**31), 2**31 - 1, (len(places), 600)).to(dtype)
    b, options = a.clone(), {}
    for row, place in enumerate(places):
        if place is not None:
            b[row, place:] += 1
    lengths = torch.tensor([600, 0, 31, 100, 600, 511, 513, 600, 599])
    if layout == "masked":
        options = {"mask_a": torch.arange(600) < lengths[:, None], "mask_b": torch.arange(600) < lengths.flip(0)[:, None]}
    if layout == "packed":
        options = {"cu_seqlens_a": torch.tensor((0, *lengths.tolist())).cumsum(0).int()}
        a = a[torch.arange(600) < lengths[:, None]]
    out = same_bits_in_every_order(simt, lambda: first_divergence(simt, a, b, **options))
    assert torch.equal(out.long(), reference.first_divergence(a, b, **options))


def test_first_divergence_of_what_is_wrong(simt):
    a = torch.zeros(3, 40, dtype=torch.int64)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, 7] = False
    assert first_divergence(simt, a, a, None, mask).tolist() == [40, -1, 40]
    for ends in ((0, 50, 40, 120), (0, 40, 80, 119), (0, -3, 40, 120), (1, 40, 80, 120)):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        assert first_divergence(simt, a.view(-1), a, cu_seqlens_a=cu_seqlens).tolist() == [-1] * 3


def test_no_rows_launch_nothing(simt):
    simt.cuda_first_divergence(simt.DivergenceArgs())
    simt.cuda_first_divergence32(simt.DivergenceArgs32())
    simt.cuda_conflict_runs(simt.ConflictArgs())
    simt.cuda_conflict_runs32(simt.ConflictArgs32())
    simt.cuda_conflict_weights(simt.ConflictWeightArgs())
