"""The ops under a vocabulary-parallel head: the fold of a range of columns, the join of ranges, the backward of one. What
processes do with them is in tests/distributed."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.testing import assert_close

OPS = torch.ops.prefkern
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
PLAIN = (1.0, 0.0, 1.0, -100)  # temperature, softcap, logit_scale, ignore_index
CUTS = [(), (1,), (150,), (64, 64, 65), (7, 100, 300)]


def make(device="cpu", dtype=F32, rows=13, vocab=301, width=32):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[::2] = (hidden.double() @ weight.double().mT).argmax(-1)[::2]
    targets[1::3] = -100
    return hidden.to(device), weight.to(device), targets.to(device)


def part(t, a, b):
    return None if t is None else t[a:b]


def ranges(cuts, vocab):
    return list(pairwise((0, *cuts, vocab)))


def states(hidden, weight, targets, cuts, *, bias=None, tau=None, options=PLAIN, outputs=31, chunk=0):
    vocab = weight.shape[0]
    return torch.stack(
        [
            OPS.linear_shard(
                hidden, weight[a:b], targets, part(bias, a, b), tau, *options, outputs, chunk, a, vocab
            )
            for a, b in ranges(cuts, vocab)
        ]
    )  # fmt: skip


def distance(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("chunk", [0, 3000])
def test_ranges_joined_are_the_whole(device, dtype, cuts, chunk):
    """Values, and gradients: hidden's is the sum over the ranges, in the accumulator type; the others are the range's own."""
    hidden, weight, targets = make(device, dtype)
    bias, tau = torch.randn(301, device=device), torch.rand(13, device=device) + 0.5
    options = (1.0, 4.0, 1.7, -100)
    joined = OPS.merge_linear_shards(
        states(hidden, weight, targets, cuts, bias=bias, tau=tau, options=options, chunk=chunk), targets, tau, *options, 63, 301
    )
    whole = OPS.linear_logprobs_fwd(hidden, weight, targets, bias, tau, *options, 63, 0)
    for a, e in zip(joined, whole, strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, rtol=0, atol=1e-12 if dtype == F64 else 5e-6)
    upstream = [torch.randn(13, dtype=joined[0].dtype, device=device) for _ in range(3)]
    common = (targets, bias, tau, whole[1], whole[6], *options)
    e_hidden, e_weight, e_bias = OPS.linear_logprobs_backward(*upstream, hidden, weight, *common, 7, 0)
    shares = [
        OPS.linear_shard_backward(
            *upstream, hidden, weight[a:b], targets, bias[a:b], tau, whole[1], whole[6], *options, 7, chunk, a, 301
        )
        for a, b in ranges(cuts, 301)
    ]
    d_hidden = sum(d for d, _, _ in shares)
    assert d_hidden.dtype == (F64 if dtype == F64 else F32)
    bound = {F64: 1e-12, F32: 2e-6, BF16: 4e-3, F16: 6e-4}[dtype]
    assert distance(d_hidden, e_hidden) < bound
    assert distance(torch.cat([d for _, d, _ in shares]), e_weight) < bound
    assert distance(torch.cat([d for _, _, d in shares]), e_bias) < max(bound, 2e-6)
    assert {d.dtype for _, d, _ in shares} == {dtype}
    assert d_hidden[1::3].eq(0).all()


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_any_ranges(sizes, rows, seed):
    torch.manual_seed(seed)
    vocab, cuts = sum(sizes), torch.tensor(sizes).cumsum(0)[:-1].tolist()
    hidden, weight = torch.randint(-2, 3, (rows, 3)).double(), torch.randint(-2, 3, (vocab, 3)).double()  # many ties
    targets = torch.randint(0, vocab, (rows,))
    joined = OPS.merge_linear_shards(states(hidden, weight, targets, cuts), targets, None, *PLAIN, 63, vocab)
    whole = OPS.linear_logprobs_fwd(hidden, weight, targets, None, None, *PLAIN, 63, 0)
    for a, e in zip(joined, whole, strict=True):
        assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_what_a_state_holds(device, dtype):
    """Max, sum of 2^t, of t 2^t, of squares, of logits; the target's logit, the largest one before it."""
    hidden = torch.eye(4, dtype=dtype, device=device)[:3]
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    z = torch.tensor([[0.0, -1, -2, -1], [1, 1, -1, 0], [9, 9, 9, 9]], dtype=dtype, device=device) * math.log(2)
    weight = torch.cat([z.mT, torch.zeros(4, 1, dtype=dtype, device=device)], 1)
    targets = torch.tensor([12, 11, -100], device=device)  # columns 2 and 1 of a range that begins at 10
    state = OPS.linear_shard(hidden, weight, targets, None, None, *PLAIN, 31, 0, 10, 20).cpu().double()
    log2 = math.log(2)
    expected = torch.tensor(
        [
            [0, log2, -INF],
            [1 + 0.5 + 0.25 + 0.5, 1 + 1 + 0.25 + 0.5, 0],
            [-0.5 - 0.5 - 0.5, -2 * 0.25 - 0.5, 0],
            [1 + 0.25 + 0.0625 + 0.25, 2 + 0.0625 + 0.25, 0],
            [-4 * log2, 1 * log2, 0],
            [-2 * log2, log2, NAN],
            [0, log2, -INF],
        ],
        dtype=F64,
    )
    assert_close(state, expected, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("first", [0, 50, 299])
def test_a_target_elsewhere(device, first):
    hidden, weight, _ = make(device, vocab=5)
    targets = torch.full((13,), 60 if first != 50 else 3, device=device)
    state = OPS.linear_shard(hidden, weight, targets, None, None, *PLAIN, 31, 0, first, 304)
    assert state[5].isnan().all()
    z = hidden.double() @ weight.double().mT
    assert_close(state[0].double(), z.amax(-1), rtol=1e-6, atol=1e-6)


def test_a_range_without_columns_and_ignored_rows_hold_nothing(device):
    hidden, weight, targets = make(device)
    nothing = torch.tensor([-INF, 0, 0, 0, 0, NAN, -INF], device=device)
    none = OPS.linear_shard(hidden, weight[:0], targets, None, None, *PLAIN, 31, 0, 301, 301)
    assert_close(none, nothing[:, None].expand(7, 13), rtol=0, atol=0, equal_nan=True)
    some = OPS.linear_shard(hidden, weight, targets, None, None, *PLAIN, 31, 0, 0, 301)
    ignored = targets == -100
    assert_close(some[:, ignored], nothing[:, None].expand(7, int(ignored.sum())), rtol=0, atol=0, equal_nan=True)
    _, _, *stats = OPS.linear_logprobs_fwd(hidden, weight, targets, None, None, *PLAIN, 63, 0)
    d_hidden, d_weight, d_bias = OPS.linear_shard_backward(
        torch.ones(13, device=device), None, None, hidden, weight[:0], targets, torch.zeros(0, device=device), None, stats[0],
        stats[-1], *PLAIN, 7, 0, 301, 301,
    )  # fmt: skip
    assert d_hidden.shape == (13, 32)
    assert d_hidden.eq(0).all()
    assert d_weight.shape == (0, 32)
    assert d_bias.shape == (0,)


def test_ranges_that_overlap_or_leave_a_gap_give_nan(device):
    """Where it shows: a target that lies in two ranges, or in none."""
    hidden, weight, _ = make(device)
    targets = torch.tensor([0, 99, 100, 105, 110, 300] + [-100] * 7, device=device)

    def joined(*pairs):
        all_ = [OPS.linear_shard(hidden, weight[a:b], targets, None, None, *PLAIN, 31, 0, a, 301) for a, b in pairs]
        return OPS.merge_linear_shards(torch.stack(all_), targets, None, *PLAIN, 31, 301)

    twice = [False, False, True, True, False, False]
    for out in joined((0, 110), (100, 301))[:4]:
        assert out.isnan().tolist() == twice + [False] * 7
    assert not joined((0, 110), (100, 301))[5].cpu()[torch.tensor(twice + [False] * 7)].any()
    assert joined((0, 100), (110, 301))[0].isnan().tolist() == twice + [False] * 7


def test_poison_stays_in_its_row(device):
    hidden, weight, targets = make(device)
    targets = targets.clamp_min(0)
    hidden[3], hidden[5] = NAN, INF
    clean = torch.ones(13, dtype=torch.bool, device=device)
    clean[3] = clean[5] = False
    whole = OPS.linear_logprobs_fwd(hidden, weight, targets, None, None, *PLAIN, 63, 0)
    joined = OPS.merge_linear_shards(states(hidden, weight, targets, (100, 200)), targets, None, *PLAIN, 63, 301)
    for a, e in zip(joined[:5], whole[:5], strict=True):
        assert a[3].isnan()
        assert a[5].isnan()
        assert_close(a[clean], e[clean], rtol=0, atol=5e-6)
    assert torch.equal(joined[5][clean], whole[5][clean])


def test_tokens_that_cannot_be_drawn(device):
    """A range of -inf only, and a row of nothing else."""
    hidden, weight, targets = make(device)
    targets = targets.clamp_min(250)
    bias = torch.zeros(301, device=device)
    bias[:200] = -INF
    whole = OPS.linear_logprobs_fwd(hidden, weight, targets, bias, None, *PLAIN, 63, 0)
    joined = OPS.merge_linear_shards(states(hidden, weight, targets, (100, 250), bias=bias), targets, None, *PLAIN, 63, 301)
    for a, e in zip(joined, whole, strict=True):
        assert_close(a, e, rtol=0, atol=5e-6)
    bias[:] = -INF
    nothing = OPS.merge_linear_shards(states(hidden, weight, targets, (100, 250), bias=bias), targets, None, *PLAIN, 63, 301)
    assert nothing[0].isnan().all()


def test_states_may_lie_apart(device):
    hidden, weight, targets = make(device)
    together = states(hidden, weight, targets, (100, 200))
    expected = OPS.merge_linear_shards(together, targets, None, *PLAIN, 63, 301)
    memory = torch.full((3, 7 * 13 + 5), NAN, device=device)
    memory[:, : 7 * 13] = together.view(3, -1)
    apart = memory[:, : 7 * 13].view(3, 7, 13)
    transposed = together.mT.contiguous().mT
    assert not apart.is_contiguous()
    for same in (apart, transposed):
        for a, e in zip(OPS.merge_linear_shards(same, targets, None, *PLAIN, 63, 301), expected, strict=True):
            assert torch.equal(a, e)


def test_only_what_is_asked_for(device):
    hidden, weight, targets = make(device)
    everything = OPS.merge_linear_shards(states(hidden, weight, targets, (100,)), targets, None, *PLAIN, 63, 301)
    for outputs in (0, 1, 2, 3):
        few = states(hidden, weight, targets, (100,), outputs=outputs)
        assert few[:, 3:5].eq(0).all()  # the sums that only other outputs need
        out = OPS.merge_linear_shards(few, targets, None, *PLAIN, outputs, 301)
        assert [t.numel() > 0 for t in out] == [True, bool(outputs & 1), bool(outputs & 2), False, False, False, False]
        assert_close(out[0], everything[0], rtol=0, atol=1e-6)


def test_one_range_of_everything_has_the_bits_of_the_head():
    """The same blocks, the same fold, the same last step."""
    hidden, weight, targets = make()
    joined = OPS.merge_linear_shards(states(hidden, weight, targets, ()), targets, None, *PLAIN, 63, 301)
    whole = OPS.linear_logprobs_fwd(hidden, weight, targets, None, None, *PLAIN, 63, 0)
    assert all(torch.equal(a, e) for a, e in zip(joined, whole, strict=True))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_threads(threads, dtype):
    hidden, weight, targets = make(dtype=dtype, rows=5000, vocab=70, width=4)
    runs = []
    for n in (1, 3, 3):
        threads(n)
        runs.append(OPS.merge_linear_shards(states(hidden, weight, targets, (9, 30)), targets, None, *PLAIN, 63, 70))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert_close(a, b, rtol=0, atol=1e-12 if dtype == F64 else 2e-6)
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(device, dtype):
    hidden, weight, targets = make(device, dtype, 6, 9, 4)
    bias, tau = torch.randn(4, device=device), torch.rand(6, device=device) + 0.5
    inside = targets % 4 + 2  # a row without its target holds NaN, which opcheck does not take for equal
    for b, t in ((None, None), (bias, tau)):
        opcheck(OPS.linear_shard.default, (hidden, weight[2:6], inside, b, t, *PLAIN, 31, 0, 2, 9))
    both = states(hidden, weight, targets, (4,))
    for outputs in (0, 9, 63):
        opcheck(OPS.merge_linear_shards.default, (both, targets, tau, *PLAIN, outputs, 9))
    out = OPS.merge_linear_shards(both, targets, None, *PLAIN, 63, 9)
    upstream = (torch.randn(6, device=device), None, torch.randn(6, device=device))
    for needs in range(1, 8):
        opcheck(
            OPS.linear_shard_backward.default,
            (*upstream, hidden, weight[2:6], targets, bias, None, out[1], out[6], *PLAIN, needs, 0, 2, 9),
        )


H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 6])

BAD_RANGES = {
    "before the vocabulary": ({"first_col": -1}, "weight has 5 rows from token -1 on"),
    "beyond it": ({"first_col": 3}, "weight has 5 rows from token 3 on, but the vocabulary has 7"),
    "no vocabulary": ({"vocab": 0, "weight": W[:0]}, "vocab is 0"),
    "target outside": ({"vocab": 6}, r"targets\[2\] is 6; accepted: 0 to 5"),
    "another width": ({"weight": W[:, :3]}, "hidden has H = 4 and weight has H = 3"),
    "another width, without columns": ({"weight": W[:0, :3]}, "hidden has H = 4 and weight has H = 3"),
    "bias of another length": ({"bias": torch.zeros(7)}, r"bias has shape \[7\]; expected \[5\]"),
    "bias, without columns": ({"weight": W[:0], "bias": torch.zeros(1)}, r"bias has shape \[1\]; expected \[0\]"),
    "chunk_bytes": ({"chunk": -1}, "chunk_bytes is -1"),
}


@pytest.mark.parametrize("name", BAD_RANGES)
def test_bad_ranges_are_named(name):
    changes, message = BAD_RANGES[name]
    a = {"weight": W, "bias": None, "chunk": 0, "first_col": 0, "vocab": 7, **changes}
    tail = (a["chunk"], a["first_col"], a["vocab"])
    with pytest.raises(RuntimeError, match=f"ValueError: {message}"):
        OPS.linear_shard(H, a["weight"], T, a["bias"], None, *PLAIN, 0, *tail)
    none, stats = torch.zeros(0), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=f"ValueError: {message}"):
        OPS.linear_shard_backward(None, None, None, H, a["weight"], T, a["bias"], None, none, stats, *PLAIN, 1, *tail)


@pytest.mark.parametrize(
    ("states", "vocab", "message"),
    [
        (torch.zeros(2, 6, 3), 7, r"states has shape \[2, 6, 3\]; expected \[R, 7, N\]"),
        (torch.zeros(0, 7, 3), 7, r"states has shape \[0, 7, 3\]"),
        (torch.zeros(7, 3), 7, r"states has shape \[7, 3\]"),
        (torch.zeros(2, 7, 4), 7, r"targets has shape \[3\]; states has 4 rows"),
        (torch.zeros(2, 7, 3).half(), 7, "states has dtype Half"),
        (torch.zeros(2, 7, 3), 0, "vocab is 0"),
        (torch.zeros(2, 7, 3), 6, r"targets\[2\] is 6"),
    ],
)
def test_bad_states_are_named(states, vocab, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.merge_linear_shards(states, T, None, *PLAIN, 0, vocab)


def test_the_backward_cannot_be_differentiated_twice():
    hidden, weight, targets = make()
    hidden.requires_grad_()
    out = OPS.merge_linear_shards(states(hidden.detach(), weight, targets, ()), targets, None, *PLAIN, 63, 301)
    d_hidden, *_ = OPS.linear_shard_backward(
        torch.ones(13), None, None, hidden, weight, targets, None, None, out[1], out[6], *PLAIN, 1, 0, 0, 301
    )
    with pytest.raises(RuntimeError, match="twice"):
        d_hidden.sum().backward()
