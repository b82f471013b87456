"""masked_quantile and top_quantile_mask against their definitions, torch.quantile and worked numbers, and everything they
must refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import masked_quantile, reference, top_quantile_mask

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern
INTERPOLATIONS, RULES = ("linear", "lower", "higher"), ("count", "trl")

only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
both = pytest.mark.parametrize("module", [prefkern, reference], ids=["op", "definition"])
QUANTILES = (0.0, 0.05, 0.3, 0.5, 0.8, 1 - 0.1, 1 - 0.7, 0.999, 1.0)


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def on_cpu(*tensors):
    return [None if t is None else t.cpu() for t in tensors]


SAMPLES = {
    "normal": lambda n: torch.randn(n, dtype=F64),
    "wide": lambda n: torch.randn(n, dtype=F64) * 10 ** torch.randint(-30, 30, (n,)).double(),
    "few": lambda n: torch.randint(-2, 3, (n,)).double() * -0.5,  # with both zeros
    "equal": lambda n: torch.full((n,), 0.7, dtype=F64),
    "entropies": lambda n: torch.where(torch.rand(n) < 0.5, 0.0, 2 * torch.rand(n, dtype=F64)),
    "infinite": lambda n: torch.tensor([INF, -INF, 1.0, 2.0], dtype=F64)[torch.randint(4, (n,))],
}
SIZES = (1, 2, 7, 255, 256, 257, 3000)


# ------------------------------------------------------------------------------------------------------- worked numbers


@both
def test_worked_quantiles(module):
    values = torch.tensor([30.0, 10.0, 40.0, 20.0])
    expected = {
        0.0: (10, 10, 10),
        0.25: (17.5, 10, 20),
        0.5: (25, 20, 30),
        1 / 3: (20, 20, 20),
        0.9: (37, 30, 40),
        1.0: (40,) * 3,
    }
    for q, results in expected.items():
        for interpolation, result in zip(INTERPOLATIONS, results, strict=True):
            assert module.masked_quantile(values, q, interpolation=interpolation).item() == result, (q, interpolation)
    mask = torch.tensor([True, False, True, True])  # 20, 30, 40
    assert module.masked_quantile(values, 0.5, mask).item() == 30
    assert module.masked_quantile(values, 0.25, mask).item() == 25
    assert module.masked_quantile(values, 0.25, mask, interpolation="higher").item() == 30


@both
def test_worked_masks(module):
    values = torch.tensor([[3.0, 1.0, 2.0], [2.0, 2.0, 9.0]])

    def top(fraction, rule, mask=None):
        return module.top_quantile_mask(values, mask, fraction=fraction, rule=rule).int().tolist()

    assert top(1 / 6, "count") == [[0, 0, 0], [0, 0, 1]]
    assert top(0.5, "count") == [[1, 0, 1], [0, 0, 1]]  # of the three 2s the first
    assert top(0.6, "count") == [[1, 0, 1], [1, 0, 1]]  # ceil(3.6) = 4
    assert top(0.5, "trl") == [[1, 0, 1], [1, 1, 1]]  # the median is 2
    assert top(0.4, "trl") == [[1, 0, 1], [1, 1, 1]]  # from x_3 = 2 on
    assert top(0.3, "trl") == [[1, 0, 0], [0, 0, 1]]  # from 2.5 on
    for rule in RULES:
        assert top(1.0, rule) == [[1, 1, 1], [1, 1, 1]]
    assert top(0.0, "count") == [[0, 0, 0], [0, 0, 0]]
    assert top(0.0, "trl") == [[0, 0, 0], [0, 0, 1]]  # the maximum
    mask = torch.tensor([[True, True, False], [False, True, False]])  # 3, 1, 2
    assert top(0.5, "count", mask) == [[1, 0, 0], [0, 1, 0]]
    assert top(0.5, "trl", mask) == [[1, 0, 0], [0, 1, 0]]
    assert top(0.1, "trl", mask) == [[1, 0, 0], [0, 0, 0]]


@both
def test_products_that_round_are_whole(module):
    """0.07 * 100 is a little more than 7, and (1 - 0.7) * 10 a little more than 3; neither passes an integer here."""
    assert 0.07 * 100 > 7 and (1 - 0.7) * 10 > 3
    assert module.top_quantile_mask(torch.arange(100.0), fraction=0.07).sum() == 7
    values = torch.cat([torch.zeros(4), torch.arange(1.0, 8.0)]).double()  # x_3 = 0, x_4 = 1
    assert module.masked_quantile(values, 1 - 0.7).item() == 0
    assert module.masked_quantile(values, 1 - 0.7, interpolation="higher").item() == 0
    assert module.top_quantile_mask(values, fraction=0.7, rule="trl").all()
    for fraction, n in ((0.1, 30), (0.2, 5), (0.3, 10), (0.6, 5), (0.8, 250)):
        assert module.top_quantile_mask(torch.rand(n), fraction=fraction).sum() == round(fraction * n)


@both
def test_nothing_that_counts(module):
    for values, mask in ((torch.empty(0), None), (torch.empty(2, 0), None), (torch.ones(2, 3), torch.zeros(2, 3).bool())):
        assert module.masked_quantile(values, 0.5, mask).isnan()
        for rule in RULES:
            kept = module.top_quantile_mask(values, mask, rule=rule)
            assert kept.shape == values.shape and kept.dtype == torch.bool and not kept.any()


@both
def test_a_nan_that_counts(module):
    values = torch.tensor([1.0, NAN, 3.0, -NAN, 2.0])
    for q in (0.0, 0.5, 1.0):
        for interpolation in INTERPOLATIONS:
            assert module.masked_quantile(values, q, interpolation=interpolation).isnan()
    assert not module.top_quantile_mask(values, fraction=1.0, rule="trl").any()
    assert module.top_quantile_mask(values, fraction=0.5).int().tolist() == [0, 0, 1, 0, 1]  # ceil(0.5 * 3)
    assert module.top_quantile_mask(values, fraction=1.0).int().tolist() == [1, 0, 1, 0, 1]
    assert not module.top_quantile_mask(torch.full((3,), NAN), fraction=1.0).any()


@both
def test_infinite_values(module):
    values = torch.tensor([-INF, -INF, 0.0, INF])
    assert [module.masked_quantile(values, q).item() for q in (0.0, 0.25, 0.5, 0.8, 1.0)] == [-INF, -INF, -INF, INF, INF]
    assert module.masked_quantile(torch.tensor([-INF, INF]), 0.5).isnan()
    assert module.top_quantile_mask(values, fraction=0.5).int().tolist() == [0, 0, 1, 1]
    assert module.top_quantile_mask(values, fraction=1.0, rule="trl").all()


def test_the_two_zeros_are_equal(device):
    values = torch.tensor([0.0, -0.0, -0.0, 0.0, -1.0], device=device)
    assert top_quantile_mask(values, fraction=0.4).int().tolist() == [1, 1, 0, 0, 0]
    assert top_quantile_mask(values, fraction=0.2, rule="trl").int().tolist() == [1, 1, 1, 1, 0]
    assert masked_quantile(values, 0.5).item() == 0


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=names)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_values(device, sample, dtype, masked):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    for size in SIZES:
        values = SAMPLES[sample](size).to(dtype).to(device)
        mask = torch.rand(size, device=device) < 0.7 if masked else None
        if masked:
            values[~mask] = NAN
        for q in QUANTILES:
            for interpolation in INTERPOLATIONS:
                out = masked_quantile(values, q, mask, interpolation=interpolation)
                expected = reference.masked_quantile(*on_cpu(values), q, *on_cpu(mask), interpolation=interpolation)
                assert out.shape == () and out.dtype == (F64 if dtype == F64 else F32)
                close_quantile(out.cpu(), expected, values.cpu())
            for rule in RULES:
                kept = top_quantile_mask(values, mask, fraction=q, rule=rule)
                expected = reference.top_quantile_mask(*on_cpu(values, mask), fraction=q, rule=rule)
                assert torch.equal(kept.cpu(), expected), (size, q, rule)


def close_quantile(actual, expected, values):
    """A unit in the last place; of the values where their difference cancels."""
    largest = values.nan_to_num(0, 0, 0).abs().max().item()
    rtol = 3e-16 if expected.dtype == F64 else 6e-8
    assert_close(actual, expected, rtol=rtol, atol=3e-16 * largest, equal_nan=True)


@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
@pytest.mark.parametrize("size", [1, 2, 100, 5001])
def test_torch_quantile(device, dtype, size):
    """torch interpolates in the type of the values: in double, to be exact, and then ours is that, rounded."""
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    values = torch.randn(size, dtype=F64).to(dtype).to(device)
    for q in (*QUANTILES, *torch.rand(20, dtype=F64).tolist()):
        for interpolation in INTERPOLATIONS:
            out = masked_quantile(values, q, interpolation=interpolation)
            expected = torch.quantile(values.double(), q, interpolation=interpolation)
            if interpolation == "linear":
                assert_close(out.double(), expected, rtol=4e-16 if dtype == F64 else 6e-8, atol=4e-16 if dtype == F64 else 0)
            elif q not in (1 - 0.1, 1 - 0.7):  # where torch's q (n - 1) may pass an integer by its rounding
                assert out == expected.to(dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_mask_of_trl(device, masked):
    """As a trainer finds it: the threshold is torch.quantile's, of the masked tokens in float32."""
    values = torch.empty(16, 300, device=device).exponential_()
    mask = torch.arange(300, device=device) < torch.randint(1, 301, (16, 1), device=device)
    mask = mask if masked else torch.ones_like(mask)
    for fraction in (0.1, 0.2, 0.5, 0.8):
        threshold = torch.quantile(values[mask].float(), 1 - fraction)
        expected = (values * mask >= threshold) & mask
        assert torch.equal(top_quantile_mask(values, mask, fraction=fraction, rule="trl"), expected)


@pytest.mark.parametrize("fraction", [0.0, 0.013, 0.2, 0.5, 0.99, 1.0])
def test_exactly_so_many_are_kept_and_of_equal_ones_the_first(device, fraction):
    values = torch.randint(0, 12, (40, 700), device=device).float()
    mask = torch.rand(40, 700, device=device) < 0.6
    kept = top_quantile_mask(values, mask, fraction=fraction)
    n = int(mask.sum())
    wanted = math.ceil(fraction * n)
    assert kept.sum() == wanted
    assert not kept[~mask].any()
    order = values[mask].argsort(descending=True, stable=True)
    assert torch.equal(kept[mask].nonzero()[:, 0], order[:wanted].sort().values)


def test_a_quantile_that_is_no_value_lies_between_two(device):
    """The next value above is far away in memory, in digits and in size."""
    values = torch.full((9000,), -3.0, device=device)
    values[8999] = 1e20
    assert masked_quantile(values, 8998.5 / 8999).item() == torch.tensor(5e19 - 1.5).item()
    assert masked_quantile(values, 8998.5 / 8999, interpolation="lower").item() == -3
    assert masked_quantile(values, 8998.5 / 8999, interpolation="higher").item() == torch.tensor(1e20).item()
    assert masked_quantile(values, 0.5).item() == -3


def test_shapes_and_strides(device):
    values, mask = torch.rand(6, 5, 4, 3, device=device), torch.rand(6, 5, 4, 3, device=device) < 0.5
    kept = top_quantile_mask(values, mask, fraction=0.4)
    assert torch.equal(kept, top_quantile_mask(values.reshape(-1), mask.reshape(-1), fraction=0.4).view(kept.shape))
    moved, moved_mask = values.permute(2, 0, 3, 1), mask.permute(2, 0, 3, 1)  # without ties order does not matter
    assert torch.equal(top_quantile_mask(moved, moved_mask, fraction=0.4), kept.permute(2, 0, 3, 1))
    assert torch.equal(masked_quantile(moved, 0.3, moved_mask), masked_quantile(values, 0.3, mask))
    assert masked_quantile(values[0, 0, 0, 0], 0.3) == values[0, 0, 0, 0]
    assert top_quantile_mask(values[0, 0, 0, 0]).item() is True
    for wrong in (values[:, ::2], values.expand(2, 6, 5, 4, 3)):
        assert torch.equal(masked_quantile(wrong, 0.7), masked_quantile(wrong.clone().contiguous(), 0.7))


@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_same_bits_on_any_number_of_threads(threads, dtype):
    values, mask = torch.randint(0, 5000, (300_001,)).to(dtype), torch.rand(300_001) < 0.9
    results = []
    for n in (1, 2, 5):
        threads(n)
        kept = [top_quantile_mask(values, mask, fraction=f, rule=rule) for f in (0.2, 0.777) for rule in RULES]
        quantiles = [masked_quantile(values, q, mask) for q in (0.1, 0.5001)]
        results.append([*kept, *quantiles])
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    assert torch.equal(results[0][2], reference.top_quantile_mask(values, mask, fraction=0.777))


# ----------------------------------------------------------------------------------------------------------- properties

floats = st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40)


sixty_fourths = st.integers(0, 64).map(lambda k: k / 64)  # q (n - 1) and 1 - q do not round


@given(floats, sixty_fourths, st.sampled_from(INTERPOLATIONS), st.sampled_from([F32, F64]), st.randoms(use_true_random=False))
def test_quantiles_are_order_statistics(values, q, interpolation, dtype, random):
    values = torch.tensor(values, dtype=dtype)
    out = masked_quantile(values, q, interpolation=interpolation)
    close_quantile(out, reference.masked_quantile(values, q, interpolation=interpolation), values)
    if interpolation != "linear":
        assert (values == out).any()
    order = list(range(len(values)))
    random.shuffle(order)
    assert torch.equal(masked_quantile(values[order], q, interpolation=interpolation).nan_to_num(7), out.nan_to_num(7))
    low, high = (masked_quantile(-values, 1 - q, interpolation=i) for i in ("lower", "higher"))
    assert -high == masked_quantile(values, q, interpolation="lower")
    assert -low == masked_quantile(values, q, interpolation="higher")


@given(floats, st.floats(0, 1), st.sampled_from(RULES))
def test_nothing_larger_is_left_out(values, fraction, rule):
    values = torch.tensor(values)
    kept = top_quantile_mask(values, fraction=fraction, rule=rule)
    assert torch.equal(kept, reference.top_quantile_mask(values, fraction=fraction, rule=rule))
    if kept.any() and not kept.all():
        assert values[kept].min() >= values[~kept].max()


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


def test_values_are_constants():
    leaf = torch.rand(9, requires_grad=True)
    quantile, kept = masked_quantile(leaf, 0.3), top_quantile_mask(leaf)
    assert not quantile.requires_grad
    with torch.inference_mode():
        assert torch.equal(masked_quantile(leaf, 0.3), quantile)
        assert torch.equal(top_quantile_mask(leaf), kept)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
def test_opcheck(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    values, mask = torch.randn(5, 7, device=device).to(dtype), torch.rand(5, 7, device=device) < 0.5
    for option in (0, 1):
        for m in (mask, None):
            opcheck(OPS.masked_quantile.default, (values, m, 0.3, option))
            opcheck(OPS.top_quantile_mask.default, (values, m, 0.3, option))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("rule", RULES)
def test_one_graph_for_any_number_of_values(device, dynamic, rule):
    """fullgraph, four sizes, at most two compilations (the second has symbolic sizes)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def run(values, mask):
        return top_quantile_mask(values * 2, mask, fraction=0.3, rule=rule) & mask, masked_quantile(values, 0.4, mask) + 1

    for batch, length in ((4, 6), (5, 11), (7, 30), (8, 31)):
        values, mask = torch.randn(batch, length, device=device), torch.rand(batch, length, device=device) < 0.8
        kept, quantile = run(values, mask)
        assert torch.equal(kept, top_quantile_mask(values * 2, mask, fraction=0.3, rule=rule))
        assert quantile == masked_quantile(values, 0.4, mask) + 1
    assert counter.frame_count <= 2


def test_meta_tensors():
    values, mask = torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta", dtype=torch.bool)
    quantile, kept = masked_quantile(values.bfloat16(), 0.5, mask), top_quantile_mask(values, mask)
    assert (quantile.shape, quantile.dtype, quantile.device.type) == ((), F32, "meta")
    assert (kept.shape, kept.dtype, kept.device.type) == ((3, 4), torch.bool, "meta")


@only_cuda
@pytest.mark.parametrize("size", [1, 1000, 5_000_000])
def test_same_bits_every_time_and_in_a_graph(device, size):
    values, mask = torch.randn(size, device=device).mul(50).round(), torch.rand(size, device=device) < 0.9

    def compute():
        kept = [top_quantile_mask(values, mask, fraction=0.3, rule=rule) for rule in RULES]
        return [*kept, masked_quantile(values, 0.77, mask).nan_to_num(7)]

    first = compute()
    assert torch.equal(first[0].cpu(), reference.top_quantile_mask(*on_cpu(values, mask), fraction=0.3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


# --------------------------------------------------------------------------------------------------------------- errors

V, M = torch.zeros(4, 3), torch.ones(4, 3).bool()
BAD = {
    "values list": (dict(values=[1.0]), TypeError, r"values is a list; a torch\.Tensor"),
    "values int": (dict(values=V.long()), TypeError, r"values has dtype Long.*float32, bfloat16"),
    "values bool": (dict(values=M), TypeError, r"values has dtype Bool"),
    "mask list": (dict(mask=[True]), TypeError, r"mask is a list; a torch\.Tensor"),
    "mask float": (dict(mask=M.float()), TypeError, r"mask has dtype Float; accepted: bool"),
    "mask shape": (dict(mask=M[:, :2]), ValueError, r"mask has shape \[4, 2\]; values has shape \[4, 3\]"),
    "mask flat": (dict(mask=M.view(-1)), ValueError, r"mask has shape \[12\]; values has shape \[4, 3\]"),
    "mask device": (dict(mask=M.to("meta")), ValueError, r"mask is on meta but values is on cpu"),
}
BAD_NUMBERS = {
    "negative": (-0.1, ValueError, r"is -0\.1; it must lie in \[0, 1\]"),
    "too large": (1.5, ValueError, r"is 1\.5; it must lie in \[0, 1\]"),
    "nan": (NAN, ValueError, r"is nan; it must lie in \[0, 1\]"),
    "string": ("half", TypeError, r"is 'half'; a number"),
    "tensor": (torch.ones(()), TypeError, r"is tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    wrong, error, message = BAD[case]
    arguments = {"values": V, "mask": None, **wrong}
    with pytest.raises(error, match=message):
        masked_quantile(arguments["values"], 0.5, arguments["mask"])
    for rule in RULES:
        with pytest.raises(error, match=message):
            top_quantile_mask(arguments["values"], arguments["mask"], rule=rule)


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_errors_of_numbers(case):
    wrong, error, message = BAD_NUMBERS[case]
    with pytest.raises(error, match="q " + message):
        masked_quantile(V, wrong)
    with pytest.raises(error, match="fraction " + message):
        top_quantile_mask(V, fraction=wrong)


def test_errors_of_options():
    with pytest.raises(ValueError, match=r"interpolation is 'nearest'; accepted: 'linear', 'lower', 'higher'"):
        masked_quantile(V, 0.5, interpolation="nearest")
    with pytest.raises(ValueError, match=r"rule is 'top'; accepted: 'count', 'trl'"):
        top_quantile_mask(V, rule="top")
    for option in (-1, 3):
        with pytest.raises(RuntimeError, match="interpolation is"):
            OPS.masked_quantile(V, None, 0.5, option)
        with pytest.raises(RuntimeError, match="rule is"):
            OPS.top_quantile_mask(V, None, 0.5, option)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: reference.masked_quantile(V, 0.5, interpolation="nearest"), "interpolation.*linear"),
    (lambda: reference.masked_quantile(V, 1.5), "q: got 1.5"),
    (lambda: reference.top_quantile_mask(V, rule="top"), "rule.*count"),
    (lambda: reference.top_quantile_mask(V, fraction=-1.0), "fraction: got -1"),
])  # fmt: skip
def test_the_definition_refuses_it_too(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_they_are_exported():
    assert prefkern.masked_quantile is masked_quantile
    assert prefkern.top_quantile_mask is top_quantile_mask
