"""seeded_normal and its sums: known words and numbers, the definition in float64, statistics, and everything they must refuse.
tests/test_package.py runs the raw kernels once per instruction set."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import _C, reference, seeded_normal, seeded_normal_add_, seeded_normal_combine, seeded_normal_combine_

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPS = torch.ops.prefkern
BIG = 2**64 - 5
OFFSETS = (0, 1, 7, 4 * 2**32 - 30)  # the last crosses the low word of the block


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def cpu_words(seed, row, first_block, blocks):
    """[blocks, 4] as int64."""
    args, words = _C.PhiloxArgs(), torch.zeros(blocks, 4, dtype=torch.int32)
    args.seed, args.row, args.first_block, args.blocks, args.words = seed, row, first_block, blocks, words.data_ptr()
    _C.cpu_philox_words(args)
    return words.long() & 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------------- worked numbers


def hexadecimal(words):
    return [f"{word:08x}" for word in words]


def test_known_words():
    zero = torch.zeros(1, dtype=torch.int64)
    assert hexadecimal(int(w) for w in reference.philox_words(0, zero, zero, zero, zero)) == [
        "6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8",
    ]  # fmt: skip
    assert hexadecimal(cpu_words(0, 0, 0, 1)[0].tolist()) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert hexadecimal(cpu_words(42, 2, 1, 1)[0].tolist()) == ["8fe60f5c", "e22cac8b", "c387c0fb", "aa23aa8d"]
    ones = torch.full((1,), 2**32 - 1)
    known = reference.philox_words(2**64 - 1, ones, ones, ones, ones)
    assert hexadecimal(int(w) for w in known) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


@pytest.mark.parametrize("seed", [0, 42, BIG])
@pytest.mark.parametrize("first", [0, 3, 2**32 - 9, 2**60])
def test_words_of_vectors_are_those_of_the_definition(seed, first):
    blocks = torch.arange(first, first + 37)
    row = torch.full_like(blocks, 2**32 - 2)
    expected = torch.stack(reference.philox_words(seed, blocks & 0xFFFFFFFF, blocks >> 32, row, torch.zeros_like(row)), 1)
    assert torch.equal(cpu_words(seed, 2**32 - 2, first, 37), expected)


ROW = [-1.3457069734, -0.1720508349, -0.4694823515, -1.2275587890, 0.7983992647, -0.7174222843]
SUM = [-2.9492125599, -2.1073771561, -0.3269101150]


def test_worked_numbers(device):
    for dtype, tolerance in ((F64, 5e-11), (F32, 1e-6)):
        if device == "cuda" and dtype == F64:
            continue
        row = seeded_normal(42, 2, 6, dtype=dtype, device=device)
        assert_close(row.cpu().double(), torch.tensor(ROW, dtype=F64), rtol=0, atol=tolerance)
        weights = torch.tensor([0.5, -1, 0.25], dtype=dtype, device=device)
        total = seeded_normal_combine(42, weights, 3)
        assert total.dtype == dtype
        assert_close(total.cpu().double(), torch.tensor(SUM, dtype=F64), rtol=0, atol=3 * tolerance)
    assert_close(reference.seeded_normal(42, 2, 6), torch.tensor(ROW, dtype=F64), rtol=0, atol=5e-11)
    exact = reference.seeded_normal_combine(42, torch.tensor([0.5, -1, 0.25]), 3)
    assert_close(exact, torch.tensor(SUM, dtype=F64), rtol=0, atol=5e-11)


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("seed", [7, BIG, -3])
def test_rows(device, offset, seed):
    expected = reference.seeded_normal(seed, 5, 150, element_offset=offset)
    found = seeded_normal(seed, 5, 150, element_offset=offset, device=device)
    assert found.dtype == F32
    assert_close(found.cpu().double(), expected, rtol=0, atol=1e-6)
    if device == "cpu":
        assert_close(seeded_normal(seed, 5, 150, element_offset=offset, dtype=F64), expected, rtol=0, atol=1e-13)


def test_the_largest_numbers_are_as_near_as_the_others(device):
    """Over four million words, with radii up to 5.5, and next to u = 1."""
    found = seeded_normal(1, 0, 4_000_000, device=device).cpu().double()
    expected = reference.seeded_normal(1, 0, 4_000_000)
    assert expected.abs().max() > 5
    assert (found - expected).abs().max() < 1e-6
    radius = expected.view(-1, 2).norm(dim=1)
    assert radius.min() < 2e-3


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=names)
@pytest.mark.parametrize("m", [1, 3, 1100])
def test_sums(device, dtype, m):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    n = 70 if m > 100 else 1500
    weights = torch.randn(m, dtype=F64)
    x = torch.randn(n, dtype=F64).to(dtype)
    wide = F64 if dtype == F64 else F32
    exact = reference.seeded_normal_combine(3, weights.to(wide), scale=0.3, add_to=x, first_row=2, element_offset=5)
    options = {"scale": 0.3, "first_row": 2, "element_offset": 5}
    out = seeded_normal_combine(3, weights.to(device), add_to=x.to(device), **options)
    assert out.dtype == dtype and out.shape == x.shape
    error = (out.cpu().double() - exact).abs()
    rounding = {F64: 0, F32: 0, BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    assert (error <= (1e-12 if dtype == F64 else 2e-6 * math.sqrt(m)) + 1.01 * rounding * exact.abs()).all()
    inplace = x.to(device, copy=True)
    assert seeded_normal_combine_(inplace, 3, weights.to(device), **options) is inplace
    assert torch.equal(inplace, out)
    alone = seeded_normal_combine(3, weights.to(wide).to(device), n, **options)
    assert alone.dtype == wide
    assert_close(alone.cpu().double(), exact - x.double(), rtol=0, atol=1e-12 if dtype == F64 else 2e-6 * math.sqrt(m) + 1e-6)


def test_bfloat16_is_rounded_once(device):
    """As the float32 result of the same numbers, rounded; weights of other types are widened, not rounded."""
    x, weights = torch.randn(3000, device=device).bfloat16(), torch.randn(5, device=device)
    wide = seeded_normal_combine(11, weights, add_to=x.float(), scale=0.01)
    assert torch.equal(seeded_normal_combine(11, weights, add_to=x, scale=0.01), wide.bfloat16())
    narrow = weights.bfloat16()
    assert torch.equal(seeded_normal_combine(11, narrow, 50), seeded_normal_combine(11, narrow.float(), 50))


def test_a_probe_is_one_row(device):
    x = torch.randn(6, 7, device=device)
    moved = seeded_normal_add_(x.clone(), 5, 9, 0.25, element_offset=3)
    row = torch.ones(1, device=device)
    assert torch.equal(moved, seeded_normal_combine(5, row, add_to=x, scale=0.25, first_row=9, element_offset=3))
    assert_close(moved, x + 0.25 * seeded_normal(5, 9, 42, element_offset=3, device=device).view(6, 7), rtol=0, atol=1e-6)
    undone = seeded_normal_add_(moved, 5, 9, -0.25, element_offset=3)
    assert_close(undone, x, rtol=0, atol=3e-7)
    wide = torch.randn(50, device=device, dtype=BF16)
    there = seeded_normal_add_(seeded_normal_add_(wide.clone(), 5, 9, 0.25), 5, 9, -0.25)
    assert not torch.equal(there, wide)  # what the documentation warns of


def test_numbers_are_those_of_the_place_and_not_of_the_tensor(device):
    """Bits: parts of a row, rows by themselves, any number of threads, any strides."""
    weights = torch.tensor([0.7, -2.0, 1e-3], device=device)
    whole = seeded_normal_combine(9, weights, 5000)
    for cuts in ((0, 1, 2, 3, 9, 5000), (0, 31, 64, 4097, 5000), (0, 1023, 1025, 5000)):
        parts = [seeded_normal_combine(9, weights, b - a, element_offset=a) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    x = torch.randn(50, 100, device=device)
    expected = seeded_normal_combine(9, weights, add_to=x, scale=0.5)
    for strided in (x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 1]):
        assert not strided.is_contiguous()
        assert torch.equal(seeded_normal_combine(9, weights, add_to=strided, scale=0.5), expected)
        assert torch.equal(seeded_normal_combine_(strided, 9, weights, scale=0.5), expected)
        assert not strided.is_contiguous()
    rows = [seeded_normal(9, i, 5000, device=device) for i in range(3)]
    assert_close(sum(w * r for w, r in zip(weights, rows, strict=True)), whole, rtol=0, atol=1e-6)


def test_any_number_of_threads_gives_the_same_bits(threads):
    weights, x = torch.randn(3), torch.randn(70_001)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(seeded_normal_combine(2, weights, add_to=x, element_offset=3))
    assert all(torch.equal(results[0], r) for r in results[1:])


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 6))
def test_any_part(n, offset, m):
    weights = torch.linspace(-1, 1, m, dtype=F64)
    expected = reference.seeded_normal_combine(1, weights, n, element_offset=offset)
    assert_close(seeded_normal_combine(1, weights, n, element_offset=offset), expected, rtol=0, atol=1e-12)
    assert_close(seeded_normal_combine(1, weights.float(), n, element_offset=offset).double(), expected, rtol=0, atol=6e-6)


def test_nothing_to_add(device):
    x = torch.randn(33, device=device)
    none = torch.empty(0, device=device)
    assert torch.equal(seeded_normal_combine(0, none, add_to=x), x)
    assert not seeded_normal_combine(0, none, 9).any()
    assert seeded_normal(0, 0, 0, device=device).shape == (0,)
    assert seeded_normal_add_(torch.empty(0, 3, device=device), 0, 0, 1.0).shape == (0, 3)
    assert seeded_normal_combine(0, torch.ones(1, device=device), add_to=torch.zeros((), device=device)).shape == ()


def test_a_weight_that_is_no_number_is_seen(device):
    weights = torch.tensor([1.0, math.nan], device=device)
    assert seeded_normal_combine(0, weights, 9).isnan().all()


def test_parameters_move_without_a_graph(device):
    layer = torch.nn.Linear(3, 4, device=device)
    before = layer.weight.detach().clone()
    product = (layer.weight**2).sum()
    seeded_normal_add_(layer.weight, 1, 0, 0.1)
    seeded_normal_combine_(layer.weight, 1, torch.ones(1, device=device, requires_grad=True), scale=-0.1)
    assert layer.weight.grad_fn is None and layer.weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert_close(layer.weight.detach(), before, rtol=0, atol=1e-6)
    with torch.inference_mode():
        x = torch.zeros(3, device=device)
        assert seeded_normal_add_(x, 1, 0, 0.1).any()
        assert seeded_normal_add_(layer.weight, 1, 0, 0.1) is layer.weight
    weights = torch.ones(2, requires_grad=True, device=device)
    assert not seeded_normal_combine(1, weights, add_to=layer.weight).requires_grad


@pytest.mark.parametrize("dtype", [F32, BF16], ids=names)
def test_memory_is_that_of_the_result(device, allocations, dtype):
    """Not m times as much; in place nothing but the weights."""
    weights = torch.randn(64, device=device)
    x = torch.zeros(100_000, dtype=dtype, device=device)
    size = x.element_size() * x.numel()
    assert allocations(lambda: seeded_normal_combine(1, weights, add_to=x)).peak <= size + 1024
    assert allocations(lambda: seeded_normal_combine_(x, 1, weights)).peak <= 1024


# ----------------------------------------------------------------------------------------------------------- statistics


def test_rows_are_standard_normal():
    """Chi-square over 64 cells of equal probability, moments, and the largest of a million; limits of five standard errors."""
    n = 1_000_000
    x = seeded_normal(2024, 1, n).double()
    assert abs(x.mean()) < 5 / math.sqrt(n) and abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n) and abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    cells = torch.special.ndtr(x).mul(64).long()
    counts = torch.bincount(cells, minlength=64).double()
    chi_square = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)
    assert 4.4 < x.abs().max() < 6.5
    uniform = torch.special.ndtr(x).sort().values
    places = (torch.arange(n, dtype=F64) + 0.5) / n
    assert (uniform - places).abs().max() < 2 / math.sqrt(n)  # Kolmogorov and Smirnov: beyond 1.95 in one of 1000


def test_rows_seeds_and_places_are_not_correlated():
    n = 200_000
    rows = [seeded_normal(5, i, n) for i in (0, 1, 2, 2**31)]
    others = [seeded_normal(seed, 0, n) for seed in (6, 5 + 2**32, -5)]
    shifted = [seeded_normal(5, 0, n, element_offset=o) for o in (1, 2, 4, 2**20, 2**34)]
    correlations = torch.corrcoef(torch.stack([*rows, *others, *shifted]))
    assert (correlations - torch.eye(len(correlations))).abs().max() < 5 / math.sqrt(n)
    squares = torch.corrcoef(torch.stack([*rows, *others, *shifted]).square())
    assert (squares - torch.eye(len(squares))).abs().max() < 6 / math.sqrt(n)
    of_four = torch.corrcoef(rows[0].view(-1, 4).mT)  # the places of a block, two of which share a radius
    assert (of_four - torch.eye(4)).abs().max() < 5 / math.sqrt(n / 4)


# ------------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=names)
def test_opcheck(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    x, weights = torch.randn(5, 7, device=device).to(dtype), torch.randn(3, device=device)
    opcheck(OPS.seeded_normal_combine.default, (weights, x, 42, 35, 1, 6, 0.5))
    opcheck(OPS.seeded_normal_combine.default, (weights.to(dtype), None, 42, 35, 1, 6, 0.5))
    opcheck(OPS.seeded_normal_combine_.default, (x, weights, -42, 1, 6, 0.5))
    opcheck(OPS.seeded_normal_add_.default, (x, 42, 1, 6, 0.5))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_elements(device, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def run(x, weights):
        y = seeded_normal_combine(3, weights, add_to=x * 2, scale=0.5)
        seeded_normal_add_(y, 3, 1, 0.1, element_offset=2)
        return seeded_normal_combine_(y, 4, weights) + 1

    for n, m in ((40, 3), (50, 4), (61, 7), (77, 8)):
        x, weights = torch.randn(n, device=device), torch.randn(m, device=device)
        y = seeded_normal_combine(3, weights, add_to=x * 2, scale=0.5)
        seeded_normal_add_(y, 3, 1, 0.1, element_offset=2)
        assert torch.equal(run(x, weights), seeded_normal_combine_(y, 4, weights) + 1)
    assert counter.frame_count <= 2


def test_meta_tensors():
    x, weights = torch.empty(3, 4, device="meta", dtype=BF16), torch.empty(2, device="meta")
    out = seeded_normal_combine(0, weights, add_to=x)
    assert (out.shape, out.dtype, out.device.type) == ((3, 4), BF16, "meta")
    assert seeded_normal_combine(0, weights.double(), 5).dtype == F64
    assert seeded_normal_combine_(x, 0, weights) is x
    assert seeded_normal_add_(x, 0, 0, 1.0) is x
    assert seeded_normal(0, 0, 7, device="meta").shape == (7,)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_same_bits_every_time_and_in_a_graph(device):
    x, weights = torch.randn(1_000_003, device=device), torch.randn(9, device=device)
    first = seeded_normal_combine(1, weights, add_to=x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = seeded_normal_combine(1, weights, add_to=x)
    graph.replay()
    assert torch.equal(captured, first)


# --------------------------------------------------------------------------------------------------------------- errors

X, W = torch.zeros(4, 3), torch.ones(2)
BAD = {
    "seed float": (dict(seed=1.5), TypeError, r"seed is 1\.5; an integer"),
    "seed large": (dict(seed=2**64), ValueError, r"seed is 18446744073709551616; an integer of 64 bits"),
    "seed small": (dict(seed=-(2**63) - 1), ValueError, r"seed is -9223372036854775809"),
    "scale": (dict(scale="half"), TypeError, r"scale is 'half'; a number"),
    "weights list": (dict(weights=[1.0]), TypeError, r"weights is a list; a torch\.Tensor"),
    "weights int": (dict(weights=W.int()), TypeError, r"weights has dtype Int; accepted: float32, float64"),
    "weights shape": (dict(weights=torch.ones(2, 1)), ValueError, r"weights has shape \[2, 1\]; \[m\] is expected"),
    "weights device": (dict(weights=W.to("meta")), ValueError, r"weights is on meta but .* is on cpu"),
    "x list": (dict(x=[1.0]), TypeError, r"(x|add_to) is a list; a torch\.Tensor"),
    "x int": (dict(x=X.int()), TypeError, r"(x|add_to) has dtype Int on cpu; accepted: float32, bfloat16"),
    "row negative": (dict(first_row=-1), ValueError, r"first_row is -1 for 2 rows; a seed has rows 0 to 2\^32 - 1"),
    "row large": (dict(first_row=2**32 - 1), ValueError, r"first_row is 4294967295 for 2 rows"),
    "row huge": (dict(first_row=2**63), ValueError, r"first_row is 9223372036854775808; it must be below"),
    "row float": (dict(first_row=0.0), TypeError, r"first_row is 0\.0; an integer"),
    "offset negative": (dict(element_offset=-4), ValueError, r"element_offset is -4 for 12 elements"),
    "offset large": (dict(element_offset=2**62), ValueError, r"element_offset is 4611686018427387904 for 12 elements"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    wrong, error, message = BAD[case]
    arguments = {"seed": 0, "weights": W, "x": X, **wrong}
    x = arguments.pop("x")
    with pytest.raises(error, match=message):
        seeded_normal_combine(add_to=x, **arguments)
    with pytest.raises(error, match=message):
        seeded_normal_combine_(x, **arguments)
    assert not X.any()


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: seeded_normal_combine(0, W), ValueError, "n and add_to are None"),
    (lambda: seeded_normal_combine(0, W, -1), ValueError, "n is -1; it must not be negative"),
    (lambda: seeded_normal_combine(0, W, 11, add_to=X), ValueError, "n is 11; add_to has 12 elements"),
    (lambda: seeded_normal_combine(0, W, 2.0), TypeError, r"n is 2\.0; an integer"),
    (lambda: seeded_normal(0, 2**32, 5), ValueError, "row is 4294967296"),
    (lambda: seeded_normal(0, 0, 5, dtype=BF16), TypeError, "dtype is torch.bfloat16; accepted: torch.float32"),
    (lambda: seeded_normal(0, 0, 5, element_offset=-1), ValueError, "element_offset is -1"),
    (lambda: seeded_normal_add_(X, 0, -1, 1.0), ValueError, "row is -1 for 1 rows"),
    (lambda: seeded_normal_add_(X, 0, 0, None), TypeError, "mu is None; a number"),
    (lambda: seeded_normal_add_(X.int(), 0, 0, 1.0), TypeError, "x has dtype Int"),
    (lambda: seeded_normal_add_(1.0, 0, 0, 1.0), TypeError, "x is a float"),
    (lambda: OPS.seeded_normal_add_(X.mT, 0, 0, 0, 1.0), RuntimeError, "x is not contiguous"),
    (lambda: reference.seeded_normal_combine(0, W), ValueError, "n: got None"),
])  # fmt: skip
def test_other_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not X.any()


def test_they_are_exported():
    for name in ("seeded_normal", "seeded_normal_add_", "seeded_normal_combine", "seeded_normal_combine_"):
        assert name in prefkern.__all__ and callable(getattr(prefkern, name))
