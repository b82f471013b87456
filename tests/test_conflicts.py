"""conflict_runs and conflict_weights against their definition and worked numbers, and everything they must refuse."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import prefkern
from prefkern import conflict_runs, conflict_weights, reference
from prefkern.ops.conflicts import _validate

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern

only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
both = pytest.mark.parametrize("module", [prefkern, reference], ids=["op", "definition"])


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def rows(*lists, pad=0, dtype=torch.int64):
    """Padded tokens and their mask."""
    longest = max(map(len, lists))
    tokens = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in lists], dtype=dtype)
    return tokens, prefix(torch.tensor([len(row) for row in lists]), longest)


def prefix(lengths, padded):
    return torch.arange(padded, device=lengths.device) < lengths[:, None]


def boundaries(lengths):
    return torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32, device=lengths.device)


def lists(runs):
    return [field.tolist() for field in runs]


def make(batch, length, *, agree=0.9, groups=3, dtype=torch.int64, device="cpu"):
    """Rows that agree with a common one from both ends but for a share of the tokens, and their lengths."""
    lengths = torch.randint(0, length + 1, (batch,))
    lengths[::2] = length
    front, back = torch.randint(-9, 2**31 - 1, (2, length))
    tokens = torch.where(torch.rand(batch, length) < 0.5, -7, front)
    for i, n in enumerate(lengths.tolist()):
        middle = n // 2
        tokens[i, :middle], tokens[i, middle:n] = front[:middle], back[length - (n - middle) :]
    wrong = torch.rand(batch, length) > agree
    tokens[wrong] = torch.randint(0, 2, (int(wrong.sum()),))
    advantages, group = torch.randint(-1, 2, (batch,)).float(), torch.randint(0, groups, (batch,)) * 2**40 - 5
    return tokens.to(dtype).to(device), advantages.to(device), group.to(device), lengths.to(device)


def assert_runs(actual, expected):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert a.dtype == torch.int64, name
        assert a.tolist() == e.tolist(), name


# ------------------------------------------------------------------------------------------------------- worked numbers

TOKENS, MASK = rows([5, 6, 7, 8, 2], [5, 6, 9, 2], [5, 4, 7, 8, 2])
ADVANTAGES, GROUP = torch.tensor([1, 0, 1]) - 2 / 3, torch.zeros(3, dtype=torch.int64)


@both
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_worked_numbers(module, order):
    order = list(order)
    tokens, advantages, mask = TOKENS[order], ADVANTAGES[order], MASK[order]
    forward, backward, length = (torch.tensor(field)[order] for field in ([2, 2, 1], [1, 1, 1], [5, 4, 5]))
    assert_runs(module.conflict_runs(tokens, advantages, GROUP, mask), (forward, backward, length))
    weights = module.conflict_weights(tokens, advantages, GROUP, mask)
    assert weights.dtype == F32
    assert weights.tolist() == torch.tensor([[2.0, 2, 1, 1, 2], [0, 0, 1, 0, 0], [2, 1, 1, 1, 2]])[order].tolist()


@both
def test_other_weights(module):
    weights = module.conflict_weights(TOKENS, ADVANTAGES, GROUP, MASK, w_pos=3.0, w_neg=0.5)
    assert weights.tolist() == [[3, 3, 1, 1, 3], [0.5, 0.5, 1, 0.5, 0], [3, 1, 1, 1, 3]]
    assert module.conflict_weights(TOKENS, ADVANTAGES, GROUP, MASK, w_pos=1, w_neg=1).tolist() == MASK.float().tolist()


@both
def test_a_token_in_both_runs(module):
    """Both rows are [1, 2, 3]: each token is in the forward and in the backward run."""
    tokens, advantages, group = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([1.0, -1.0]), torch.tensor([4, 4])
    assert lists(module.conflict_runs(tokens, advantages, group)) == [[3, 3], [3, 3], [3, 3]]
    options = {"w_pos": 3.0, "w_neg": 0.5}
    assert module.conflict_weights(tokens, advantages, group, **options).tolist() == [[3] * 3, [0.5] * 3]
    product = module.conflict_weights(tokens, advantages, group, combine="product", **options)
    assert product.tolist() == [[9] * 3, [0.25] * 3]
    # [1, 2, 3, 4] against [1, 2, 8, 3, 4]: nothing is in both.
    tokens, mask = rows([1, 2, 3, 4], [1, 2, 8, 3, 4])
    product = module.conflict_weights(tokens, advantages, group, mask, combine="product", **options)
    assert product.tolist() == [[3, 3, 3, 3, 0], [0.5, 0.5, 1, 0.5, 0.5]]


@both
def test_the_partner_may_change_on_the_way(module):
    tokens = torch.tensor([[1, 2, 3], [1, 9, 9], [8, 2, 3]])
    runs = module.conflict_runs(tokens, torch.tensor([2.0, -1.0, -3.0]), torch.zeros(3, dtype=torch.int64))
    assert lists(runs) == [[3, 1, 0], [3, 0, 2], [3, 3, 3]]


@both
def test_a_later_agreement_changes_nothing(module):
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 0, 3, 0, 5]])
    runs = module.conflict_runs(tokens, torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.int64))
    assert lists(runs) == [[1, 1], [1, 1], [5, 5]]


@both
def test_runs_end_with_the_shorter_row(module):
    """Nothing is compared with what lies behind a row's end: the padding of row 1 equals row 0."""
    tokens, mask = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 0, 0]]), prefix(torch.tensor([4, 2, 0]), 4)
    runs = module.conflict_runs(tokens, torch.tensor([1.0, -1.0, -1.0]), torch.zeros(3, dtype=torch.int64), mask)
    assert lists(runs) == [[2, 2, 0], [0, 0, 0], [4, 2, 0]]


@both
@pytest.mark.parametrize(
    ("advantages", "group"),
    [
        ([1.0, 2.0, 1.0], [0, 0, 0]),  # one sign
        ([-1.0, -2.0, -1.0], [0, 0, 0]),
        ([1.0, -1.0, 1.0], [0, 1, 2]),  # groups of one
        ([0.0, 0.0, -0.0], [0, 0, 0]),  # nobody is active
        ([1.0, 0.0, 0.0], [0, 0, 0]),  # inactive rows conflict with nothing
        ([-1.0, 0.0, 1.0], [0, 0, 1]),
    ],
)
def test_no_conflict(module, advantages, group):
    tokens = torch.full((3, 4), 7)
    advantages, group = torch.tensor(advantages), torch.tensor(group)
    assert lists(module.conflict_runs(tokens, advantages, group)) == [[0] * 3, [0] * 3, [4] * 3]
    assert module.conflict_weights(tokens, advantages, group).eq(1).all()


@both
def test_an_inactive_row_has_weight_one_among_conflicts(module):
    advantages = torch.tensor([1.0, 0.0, -1.0])
    tokens, group = torch.full((3, 2), 7), torch.zeros(3, dtype=torch.int64)
    assert module.conflict_weights(tokens, advantages, group).tolist() == [[2, 2], [1, 1], [0, 0]]


@both
def test_an_advantage_of_any_size_has_a_sign(module):
    tokens, group = torch.full((2, 2), 7), torch.zeros(2, dtype=torch.int64)
    for tiny, dtype in ((5e-324, F64), (1e-45, F32), (2.0**-24, F16), (1e-40, BF16)):
        advantages = torch.tensor([tiny, -tiny], dtype=dtype)
        assert advantages.ne(0).all()
        assert lists(module.conflict_runs(tokens, advantages, group)) == [[2, 2]] * 3
    assert lists(module.conflict_runs(tokens, torch.tensor([INF, -INF]), group)) == [[2, 2]] * 3


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=names)
@pytest.mark.parametrize(("batch", "length"), [(1, 5), (4, 1), (9, 63), (9, 64), (16, 65), (40, 200), (3, 1000)])
@pytest.mark.parametrize("agree", [1.0, 0.97, 0.5])
def test_values(device, dtype, batch, length, agree):
    tokens, advantages, group, lengths = make(batch, length, agree=agree, dtype=dtype, device=device)
    mask = prefix(lengths, length)
    arguments = (tokens, advantages, group, mask)
    expected = reference.conflict_runs(*(t.cpu() for t in arguments))
    runs = conflict_runs(*arguments)
    assert_runs(runs, expected)
    packed = (tokens[mask], advantages, group)
    cu_seqlens = boundaries(lengths)
    assert_runs(conflict_runs(*packed, cu_seqlens=cu_seqlens), expected)
    for combine in ("max_once", "product"):
        options = {"w_pos": 1.7, "w_neg": -0.3, "combine": combine}
        weights = conflict_weights(*arguments, **options)
        assert torch.equal(weights.cpu(), reference.conflict_weights(*(t.cpu() for t in arguments), **options))
        assert not weights[~mask].any()
        assert torch.equal(conflict_weights(*packed, cu_seqlens=cu_seqlens, **options), weights[mask])
        assert torch.equal(conflict_weights(*arguments, runs=runs, **options), weights)


def test_a_packed_row_may_use_only_its_beginning(device):
    """A mask beside cu_seqlens."""
    tokens, advantages, group, lengths = make(12, 90, device=device)
    outer = torch.full_like(lengths, 90)
    arguments = (tokens.reshape(-1), advantages, group, prefix(lengths, 90).reshape(-1))
    expected = conflict_runs(tokens, advantages, group, prefix(lengths, 90))
    assert_runs(conflict_runs(*arguments, cu_seqlens=boundaries(outer)), expected)
    weights = conflict_weights(*arguments, cu_seqlens=boundaries(outer))
    assert torch.equal(weights.view(12, 90), conflict_weights(tokens, advantages, group, prefix(lengths, 90)))


@pytest.mark.parametrize("batch", [33, 300])
def test_a_large_group(device, batch):
    tokens, advantages, group, _ = make(batch, 70, agree=0.8, groups=1, device=device)
    expected = reference.conflict_runs(tokens.cpu(), advantages.cpu(), group.cpu())
    assert_runs(conflict_runs(tokens, advantages, group), expected)
    assert expected.forward.max() > 0


def test_every_length_of_a_run(device):
    """Two rows that differ in one token, at every place."""
    length = 140
    tokens = torch.arange(length, device=device).repeat(2 * length, 1)
    where = torch.arange(length, device=device)
    tokens[2 * where, where] = -1
    advantages = torch.tensor([1.0, -1.0], device=device).repeat(length)
    runs = conflict_runs(tokens, advantages, where.repeat_interleave(2))
    assert torch.equal(runs.forward, where.repeat_interleave(2))
    assert torch.equal(runs.backward, length - 1 - where.repeat_interleave(2))


def test_only_the_signs_matter(device):
    tokens, advantages, group, lengths = make(20, 50, device=device)
    mask = prefix(lengths, 50)
    expected = conflict_runs(tokens, advantages, group, mask)
    for dtype in (F32, BF16, F16, *([F64] if device == "cpu" else [])):
        scaled = (advantages * torch.rand(20, device=device).add(0.5)).to(dtype)
        assert_runs(conflict_runs(tokens, scaled, group, mask), expected)
        weights = conflict_weights(tokens, scaled, group, mask, w_pos=1.1)
        assert weights.dtype == (F64 if dtype == F64 else F32)
        assert torch.equal(weights[mask & (weights > 1)].unique(), torch.tensor([1.1], dtype=weights.dtype, device=device))
    assert_runs(conflict_runs(tokens, -advantages, group, mask), expected)


def test_what_lies_outside_the_mask_changes_nothing(device):
    tokens, advantages, group, lengths = make(20, 50, device=device)
    mask = prefix(lengths, 50)
    other = torch.where(mask, tokens, torch.randint(0, 3, tokens.shape, device=device))
    assert_runs(conflict_runs(other, advantages, group, mask), conflict_runs(tokens, advantages, group, mask))


def test_strides_and_narrow_ids(device):
    tokens, advantages, group, lengths = make(20, 50, groups=2, device=device)
    group = (group != group[0]).long()
    mask = prefix(lengths, 50)
    expected = conflict_runs(tokens, advantages, group, mask)
    scattered = tokens.T.contiguous().T, advantages.repeat_interleave(2)[::2], group.repeat_interleave(2)[::2]
    assert_runs(conflict_runs(*scattered, mask.T.contiguous().T), expected)
    assert_runs(conflict_runs(tokens, advantages, group.int(), mask), expected)
    weights = conflict_weights(tokens, advantages, group, mask)
    assert torch.equal(conflict_weights(*scattered, mask.T.contiguous().T), weights)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (0, 0), (3, 0)])
def test_nothing(device, batch, length):
    tokens = torch.empty(batch, length, dtype=torch.int64, device=device)
    advantages = torch.tensor([1.0, -1.0, 1.0], device=device)[:batch]
    runs = conflict_runs(tokens, advantages, torch.zeros(batch, dtype=torch.int64, device=device))
    assert lists(runs) == [[0] * batch] * 3
    weights = conflict_weights(tokens, advantages, torch.zeros(batch, dtype=torch.int64, device=device))
    assert weights.shape == (batch, length)
    empty = torch.zeros(1, dtype=torch.int32, device=device)
    assert conflict_weights(tokens.reshape(-1), advantages[:0], advantages[:0].long(), cu_seqlens=empty).shape == (0,)


# ----------------------------------------------------------------------------------------------------------- properties

few_tokens = st.lists(st.integers(0, 2), max_size=8)
batches = st.lists(st.tuples(few_tokens, st.sampled_from([-1.5, 0.0, 2.0]), st.integers(0, 1)), min_size=1, max_size=12)


@given(batches, st.randoms(use_true_random=False))
def test_invariants(batch, random):
    tokens, mask = rows(*(row for row, _, _ in batch))
    advantages, group = torch.tensor([a for _, a, _ in batch]), torch.tensor([g for _, _, g in batch])
    runs = conflict_runs(tokens, advantages, group, mask)
    assert_runs(runs, reference.conflict_runs(tokens, advantages, group, mask))
    assert ((runs.forward <= runs.length) & (runs.backward <= runs.length)).all()
    order = list(range(len(batch)))
    random.shuffle(order)
    assert_runs(conflict_runs(tokens[order], advantages[order], group[order], mask[order]), [r[order] for r in runs])
    reversed_rows = rows(*(row[::-1] for row, _, _ in batch))[0]  # the two directions change places
    mirrored = conflict_runs(reversed_rows, advantages, group, mask)
    assert_runs(mirrored, (runs.backward, runs.forward, runs.length))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_same_on_any_number_of_threads(threads, packed):
    tokens, advantages, group, lengths = make(400, 600, agree=0.99, groups=50)
    mask = prefix(lengths, 600)
    arguments = (tokens[mask], advantages, group) if packed else (tokens, advantages, group, mask)
    options = {"cu_seqlens": boundaries(lengths)} if packed else {}
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append((*conflict_runs(*arguments, **options), conflict_weights(*arguments, **options)))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    assert_runs(conflict_runs(*arguments, **options), reference.conflict_runs(tokens, advantages, group, mask))


def test_memory_does_not_depend_on_the_tokens(device, allocations):
    """No histogram over the vocabulary, nothing as large as the batch: three numbers per row, and what sorting ids takes."""
    tokens, advantages, group, lengths = make(16, 4096, agree=1.0, groups=1, device=device)
    tokens[0, 0] = 2**50
    mask = prefix(lengths, 4096)
    assert allocations(lambda: conflict_runs(tokens, advantages, group, mask)).peak <= 1 << 14
    assert tokens.nbytes == 1 << 19


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


def test_advantages_are_constants():
    tokens, advantages, group, _ = make(6, 9)
    leaf = advantages.clone().requires_grad_()
    assert not any(field.requires_grad for field in conflict_runs(tokens, leaf, group))
    weights = conflict_weights(tokens, leaf, group)
    assert not weights.requires_grad
    with torch.inference_mode():
        assert torch.equal(weights, conflict_weights(tokens, advantages, group))


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(device, dtype, packed):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    tokens, advantages, group, lengths = make(6, 9, device=device)
    mask, advantages = prefix(lengths, 9), advantages.to(dtype)
    cu_seqlens = boundaries(lengths) if packed else None
    tokens, mask = (tokens[mask].int(), None) if packed else (tokens, mask)
    opcheck(OPS.conflict_runs.default, (tokens, advantages, group, mask, cu_seqlens))
    runs = OPS.conflict_runs(tokens, advantages, group, mask, cu_seqlens)
    opcheck(OPS.conflict_weights.default, (tokens, advantages, *runs, cu_seqlens, 2.0, 0.0, 1))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_graph_for_any_number_of_tokens(device, dynamic, packed):
    """fullgraph, four sizes, at most two compilations (the second has symbolic sizes)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def run(tokens, advantages, group, mask, cu_seqlens):
        runs = conflict_runs(tokens, advantages, group, mask, cu_seqlens=cu_seqlens)
        options = {"cu_seqlens": cu_seqlens, "combine": "product"}
        return conflict_weights(tokens, advantages, group, mask, runs=runs, **options) * 2, runs.forward + runs.backward

    for batch, length in ((6, 9), (11, 30), (12, 31), (30, 65)):
        tokens, advantages, group, lengths = make(batch, length, device=device)
        mask, cu_seqlens = prefix(lengths, length), None
        if packed:
            tokens, mask, cu_seqlens = tokens[mask], None, boundaries(lengths)
        weights, both_runs = run(tokens, advantages, group, mask, cu_seqlens)
        runs = conflict_runs(tokens, advantages, group, mask, cu_seqlens=cu_seqlens)
        assert torch.equal(both_runs, runs.forward + runs.backward)
        expected = conflict_weights(tokens, advantages, group, mask, cu_seqlens=cu_seqlens, combine="product")
        assert torch.equal(weights, expected * 2)
    assert counter.frame_count <= 2


def test_meta_tensors():
    tokens, advantages, group = (t.to("meta") for t in make(4, 5)[:3])
    assert [(t.shape, t.dtype, t.device.type) for t in conflict_runs(tokens, advantages, group)] == [
        ((4,), torch.int64, "meta")
    ] * 3
    weights = conflict_weights(tokens, advantages, group)
    assert (weights.shape, weights.dtype, weights.device.type) == ((4, 5), F32, "meta")


# ------------------------------------------------------------------------------------------------------- unknown on CUDA


@only_cuda
def test_runs_are_equal_every_time_and_in_a_graph(device):
    tokens, advantages, group, lengths = make(64, 500, agree=0.99, device=device)
    arguments = (tokens, advantages, group, prefix(lengths, 500))
    first = (*conflict_runs(*arguments), conflict_weights(*arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (*conflict_runs(*arguments), conflict_weights(*arguments))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


@only_cuda
@pytest.mark.parametrize("what", ["hole", "nan"])
def test_a_group_with_a_bad_row_is_unknown(device, validation, what):
    tokens, advantages, group, lengths = make(30, 40, device=device)
    mask = prefix(lengths, 40)
    row = 8
    if what == "hole":
        mask[row], mask[row, 3] = True, False
    else:
        advantages[row] = NAN
    bad = group == group[row]
    assert 1 < bad.sum() < 30
    runs, weights = conflict_runs(tokens, advantages, group, mask), conflict_weights(tokens, advantages, group, mask)
    assert runs.length[bad].eq(-1).all() and runs.forward[bad].eq(0).all() and runs.backward[bad].eq(0).all()
    assert torch.equal(weights.isnan(), bad[:, None].expand_as(weights))
    good = ~bad
    expected = conflict_runs(tokens[good], advantages[good], group[good], mask[good])
    assert_runs(prefkern.ConflictRuns(*(field[good] for field in runs)), expected)
    validation(True)
    message = r"mask of row 8 has a token that counts behind" if what == "hole" else r"advantages\[8\] is nan"
    with pytest.raises(ValueError, match=message):
        conflict_runs(tokens, advantages, group, mask)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_validation_finds(validation, packed):
    """What runs on CUDA tensors, on tensors of any device: the same errors as on the CPU."""
    validation(True)
    tokens, advantages, _, lengths = make(30, 40)
    mask, cu_seqlens = prefix((lengths + 1) // 2, 40), None
    if packed:
        tokens, mask, cu_seqlens = tokens[prefix(lengths, 40)], mask[prefix(lengths, 40)], boundaries(lengths)
    _validate(tokens, advantages, mask, cu_seqlens)
    _validate(tokens, advantages, torch.ones_like(mask), cu_seqlens)
    _validate(tokens, advantages, None, cu_seqlens)
    start = int(lengths[:4].sum()) if packed else 4 * 40
    for kept in ([True, False, True], [False, True, True]):
        broken = mask.clone()
        broken.view(-1)[start : start + 3] = torch.tensor(kept)
        with pytest.raises(ValueError, match="mask of row 4 has a token that counts behind one that does not"):
            _validate(tokens, advantages, broken, cu_seqlens)
    with pytest.raises(ValueError, match=r"advantages\[7\] is nan; its sign is needed"):
        _validate(tokens, advantages.index_fill(0, torch.tensor([7, 9]), NAN), mask, cu_seqlens)
    if packed:
        with pytest.raises(ValueError, match=r"cu_seqlens is \[1, .*it must ascend from 0 to the"):
            _validate(tokens, advantages, mask, cu_seqlens + 1)
    validation(False)
    _validate(tokens, advantages * NAN, mask, cu_seqlens)


@only_cuda
def test_validation_knows_where_packed_rows_begin(device, validation):
    validation(True)
    tokens, advantages, group, lengths = make(30, 40, device=device)
    inner = prefix((lengths + 1) // 2, 40)[prefix(lengths, 40)]
    arguments = (tokens[prefix(lengths, 40)], advantages, group)
    assert_runs(
        conflict_runs(*arguments, inner, cu_seqlens=boundaries(lengths)),
        conflict_runs(tokens, advantages, group, prefix((lengths + 1) // 2, 40)),
    )
    start = int(lengths[:4].sum())
    inner[start : start + 3] = torch.tensor([True, False, True], device=device)
    with pytest.raises(ValueError, match="mask of row 4 has"):
        conflict_runs(*arguments, inner, cu_seqlens=boundaries(lengths))
    with pytest.raises(ValueError, match="cu_seqlens is"):
        conflict_runs(*arguments, cu_seqlens=boundaries(lengths) + 1)


# --------------------------------------------------------------------------------------------------------------- errors


@both
@pytest.mark.parametrize("kept", [[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 1]], ids=str)
def test_a_mask_with_a_hole_is_refused(module, kept):
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = torch.tensor(kept, dtype=torch.bool)
    arguments = (torch.zeros(3, 4, dtype=torch.int64), torch.ones(3), torch.zeros(3, dtype=torch.int64), mask)
    for function in (module.conflict_runs, module.conflict_weights):
        with pytest.raises(ValueError, match=r"mask.*run of True from the first"):
            function(*arguments)
    if module is prefkern:
        with pytest.raises(ValueError, match="mask of row 1 has"):
            conflict_runs(*arguments)


@both
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=names)
def test_an_advantage_without_sign_is_refused(module, dtype):
    advantages = torch.tensor([1.0, NAN, -1.0], dtype=dtype)
    with pytest.raises(ValueError, match=r"advantages.*sign"):
        module.conflict_runs(torch.zeros(3, 2, dtype=torch.int64), advantages, torch.zeros(3, dtype=torch.int64))


T, A, G, M = torch.zeros(4, 3, dtype=torch.int64), torch.ones(4), torch.zeros(4, dtype=torch.int64), torch.ones(4, 3).bool()
CU = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
BAD = {
    "tokens list": (dict(tokens=[[1]]), TypeError, r"tokens is a list; a torch\.Tensor"),
    "advantages list": (dict(advantages=[1.0]), TypeError, r"advantages is a list"),
    "group list": (dict(group=[1]), TypeError, r"group is a list"),
    "mask list": (dict(mask=[True]), TypeError, r"mask is a list"),
    "cu_seqlens list": (dict(cu_seqlens=[0]), TypeError, r"cu_seqlens is a list"),
    "tokens float": (dict(tokens=T.float()), TypeError, r"tokens has dtype Float; accepted: int64, int32"),
    "tokens int16": (dict(tokens=T.short()), TypeError, r"tokens has dtype Short"),
    "tokens 1-d": (dict(tokens=T[:, 0]), ValueError, r"tokens has shape \[4\]; expected \[B, T\], or \[N\] with cu_seqlens"),
    "tokens 3-d": (dict(tokens=T[None]), ValueError, r"tokens has shape \[1, 4, 3\]"),
    "advantages int": (dict(advantages=G), TypeError, r"advantages has dtype Long.*float32, bfloat16"),
    "advantages length": (dict(advantages=A[:3], group=G[:3]), ValueError, r"advantages has shape \[3\]; expected \[4\]"),
    "advantages per token": (dict(advantages=M.float()), ValueError, r"advantages has shape \[4, 3\]; expected \[4\]"),
    "advantages device": (dict(advantages=A.to("meta")), ValueError, r"advantages is on meta but tokens is on cpu"),
    "group float": (dict(group=A), TypeError, r"group has dtype Float; accepted: int64, int32"),
    "group length": (dict(group=G[:3]), ValueError, r"group has shape \[3\].*\[4\]"),
    "group device": (dict(group=G.to("meta")), ValueError, r"group is on meta but tokens is on cpu"),
    "mask float": (dict(mask=M.float()), TypeError, r"mask has dtype Float; accepted: bool"),
    "mask shape": (dict(mask=M[:, :2]), ValueError, r"mask has shape \[4, 2\].*\[4, 3\]"),
    "mask device": (dict(mask=M.to("meta")), ValueError, r"mask is on meta but tokens is on cpu"),
    "padded with cu_seqlens": (dict(cu_seqlens=CU), ValueError, r"tokens has shape \[4, 3\]; with cu_seqlens \[N\]"),
    "cu_seqlens dtype": (dict(tokens=T.view(-1), cu_seqlens=CU.long()), TypeError, r"cu_seqlens has dtype Long"),
    "cu_seqlens start": (dict(tokens=T.view(-1), cu_seqlens=CU + 1), ValueError, r"cu_seqlens\[0\] is 1"),
    "cu_seqlens end": (dict(tokens=T.view(-1)[:9], cu_seqlens=CU), ValueError, r"cu_seqlens ends at 12"),
    "cu_seqlens rows": (
        dict(tokens=T.view(-1)[:9], cu_seqlens=CU[:4]),
        ValueError,
        r"advantages has shape \[4\]; expected \[3\]",
    ),
}
BAD_WEIGHTS = {
    "w_pos nan": (dict(w_pos=NAN), ValueError, r"w_pos is nan; it must be finite"),
    "w_neg inf": (dict(w_neg=-INF), ValueError, r"w_neg is -inf; it must be finite"),
    "w_pos tensor": (dict(w_pos=torch.ones(())), TypeError, r"w_pos is tensor"),
    "w_neg string": (dict(w_neg="0"), TypeError, r"w_neg is '0'; a number"),
    "combine": (dict(combine="sum"), ValueError, r"combine is 'sum'; accepted: 'max_once', 'product'"),
    "runs tensor": (dict(runs=G), TypeError, r"runs is a Tensor; the ConflictRuns"),
    "runs of two": (dict(runs=(G, G)), TypeError, r"runs is a tuple; the ConflictRuns"),
    "runs of lists": (dict(runs=([0], G, G)), TypeError, r"forward is a list"),
    "runs dtype": (dict(runs=(G.int(), G, G)), TypeError, r"runs.forward has dtype Int; accepted: int64"),
    "runs shape": (dict(runs=(G, G[:3], G)), ValueError, r"runs.backward has shape \[3\]; expected \[4\]"),
    "runs device": (dict(runs=(G, G, G.to("meta"))), ValueError, r"length is on meta but tokens is on cpu"),
}  # fmt: skip


def call(function, wrong):
    arguments = {"tokens": T, "advantages": A, "group": G, **wrong}
    positional = [arguments.pop(name) for name in ("tokens", "advantages", "group")]
    return function(*positional, **arguments)


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    wrong, error, message = BAD[case]
    for function in (conflict_runs, conflict_weights):
        with pytest.raises(error, match=message):
            call(function, wrong)


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_errors_of_weights(case):
    wrong, error, message = BAD_WEIGHTS[case]
    with pytest.raises(error, match=message):
        call(conflict_weights, wrong)


def test_the_op_itself_refuses_unknown_options():
    for combine in (-1, 2):
        with pytest.raises(RuntimeError, match="combine is"):
            OPS.conflict_weights(T, A, G, G, G, None, 2.0, 0.0, combine)


@pytest.mark.parametrize(("options", "message"), [
    ({"combine": "sum"}, "combine.*max_once"), ({"cu_seqlens": CU}, "cu_seqlens"),
])  # fmt: skip
def test_the_definition_refuses_it_too(options, message):
    with pytest.raises(ValueError, match=message):
        reference.conflict_weights(T, A, G, **options)
    with pytest.raises(ValueError, match=r"tokens.*cu_seqlens"):
        reference.conflict_runs(T.view(-1), A, G)


def test_they_are_exported():
    assert prefkern.conflict_runs is conflict_runs
    assert prefkern.conflict_weights is conflict_weights
