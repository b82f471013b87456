"""The elementary functions of the CPU kernels, and how they are stored and loaded: every bit pattern or a dense sweep,
through the launchers, both in vectors and in the scalar tail of a row. tests/test_package.py runs this file once per
instruction set."""

import math

import numpy as np
import pytest
import torch

from prefkern import _C

F32 = np.float32
WIDE = 16  # columns: whole vectors of any instruction set
TAIL = 1  # too few for a vector: the scalar path


def address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def exp2(t, columns=None):
    """2^t as the gradient of lse gives it: a row with maximum 0, log2 sum 0 and factor 1 has p = 2^(x log2 e).
    Returns the t that came of rounding, and the result."""
    x = (t / F32(math.log2(math.e))).astype(F32)
    out = np.empty_like(x)
    columns = columns or x.size
    rows = x.size // columns
    zero, one, target = np.zeros(rows, F32), np.ones(rows, F32), np.zeros(rows, np.int64)
    a = _C.GradArgs()
    block = a.block
    block.rows, block.cols, block.vocab, block.targets = rows, columns, columns, address(target)
    for row_map in (a.logits_map, a.grad_map):
        row_map.inner, row_map.outer_stride = 1, columns
    a.logits, a.grad, a.row_max, a.row_log2_sum, a.g_lse = map(address, (x, out, zero, zero, one))
    _C.cpu_grad_logits(a)
    return (x * F32(math.log2(math.e))).astype(np.float64), out.astype(np.float64)


def pre_logits(values, columns, softcap=0.0, dtype=_C.DType.float32):
    """Each value as a row of equal logits; what the kernel makes of it before the softmax is the row's maximum."""
    logits = np.repeat(values, columns).reshape(-1, columns)
    rows = len(values)
    targets, state = np.zeros(rows, np.int64), np.empty((7, rows), F32)
    a = _C.FoldArgs()
    block, row_map = a.block, a.logits_map
    block.dtype, block.rows, block.cols, block.vocab, block.targets = dtype, rows, columns, columns, address(targets)
    block.transform.softcap = softcap
    row_map.inner, row_map.outer_stride = 1, columns
    a.last, a.state, a.state_stride = False, address(state), rows  # the state, instead of the outputs
    a.logits = address(logits)
    _C.cpu_fold_logits(a)
    return state[0]


@pytest.mark.parametrize("columns", [None, WIDE, TAIL])
def test_exp2(columns):
    """Relative error at most 1.9e-7; below 2^-126 to the spacing of subnormals, or 0."""
    t, result = exp2(np.linspace(-150.9, 126.9, 1_000_000, dtype=F32), columns)
    exact = np.exp2(t)
    normal = t >= -126
    assert np.abs(result / exact - 1)[normal].max() <= 1.9e-7
    kept = ~normal & (result != 0)
    assert np.all(np.abs(result - exact)[kept] <= 1.9e-7 * exact[kept] + 2.0**-149)
    assert (result >= 0).all()


@pytest.mark.parametrize("columns", [WIDE, TAIL])
def test_exp2_of_integers_is_exact(columns):
    t, result = exp2(np.repeat(np.arange(-126, 127, dtype=F32), WIDE), columns)
    whole = t == np.round(t)  # where the way there did not round
    assert whole.sum() > 100
    assert (result[whole] == np.exp2(t[whole])).all()


def powers_of_halves(x, tag):
    """2^(x log2 e), x <= 0, as the forward takes it of half-precision logits: the sum of a row that holds 0, x and minus
    infinities, less 1. Errors below the spacing of the sum are not seen. Returns the exponent, that, and the sum u."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[tag.name]
    logits = torch.full((len(x), 2 * WIDE), -math.inf, dtype=dtype)
    logits[:, 0], logits[:, WIDE + 3] = 0, torch.from_numpy(x)
    rows = len(x)
    targets, state = np.zeros(rows, np.int64), np.empty((7, rows), F32)
    a = _C.FoldArgs()
    a.block.dtype, a.block.rows, a.block.cols, a.block.vocab, a.block.targets = tag, rows, 2 * WIDE, 2 * WIDE, address(targets)
    a.logits_map.inner, a.logits_map.outer_stride = 1, 2 * WIDE
    a.entropy, a.last, a.state, a.state_stride = True, False, address(state), rows
    a.logits = address(logits)
    _C.cpu_fold_logits(a)
    t = logits[:, WIDE + 3].double().numpy() * math.log2(math.e)
    return t, state[1].astype(np.float64) - 1, state[2].astype(np.float64)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_exp2_of_halves(name):
    """Relative error at most 3e-6, and 1.2e-7 for the sum; u = t 2^t has that and what rounding t costs."""
    x = np.concatenate([np.linspace(-1.4, 0, 20_001), -np.geomspace(1e-4, 80, 4_001)]).astype(F32)
    t, result, u = powers_of_halves(x, getattr(_C.DType, name))
    exact = np.exp2(t)
    assert np.abs(result - exact).max() > 2e-7  # the coarse one is what is looked at
    assert (np.abs(result - exact) <= 3e-6 * exact + 1.2e-7).all()
    assert (np.abs(u - t * exact) <= (3e-6 + 1.2e-7 * (1 - t)) * np.abs(t * exact) + 1e-30).all()


def test_exp2_of_zero_and_far_below():
    _, result = exp2(np.array([0.0] * 17 + [-151, -200, -1e4, -1e30, -np.inf] * 20, F32))
    assert (result[:17] == 1).all()
    assert (result[17:] == 0).all()


def test_exp2_of_nan():
    values = np.zeros(35, F32)
    values[[2, 17, 34]] = np.nan
    _, result = exp2(values)
    assert np.isnan(result).tolist() == np.isnan(values).tolist()


@pytest.mark.parametrize("columns", [WIDE, TAIL])
def test_tanh(columns):
    """Absolute error at most 2e-7 for every magnitude; odd; flat at the ends."""
    x = np.concatenate([np.linspace(-12, 12, 60_001), np.geomspace(1e-30, 1e30, 20_000), [0.0, np.inf]]).astype(F32)
    x = np.concatenate([x, -x])
    result = pre_logits(x, columns, softcap=1.0).astype(np.float64)
    assert np.abs(result - np.tanh(x.astype(np.float64))).max() <= 2e-7
    half = len(x) // 2
    assert (result[:half] == -result[half:]).all()
    assert np.abs(result).max() == 1
    near = np.abs(x) < 1e-3
    assert np.abs(result / np.where(x == 0, 1, np.tanh(x.astype(np.float64))) - 1)[near & (x != 0)].max() <= 2.5e-7


@pytest.mark.parametrize("columns", [WIDE, TAIL])
@pytest.mark.parametrize("softcap", [0.5, 30.0, 50.0])
def test_softcap(columns, softcap):
    x = np.linspace(-300, 300, 20_001, dtype=F32)
    result = pre_logits(x, columns, softcap=softcap).astype(np.float64)
    assert np.abs(result - softcap * np.tanh(x.astype(np.float64) / softcap)).max() <= 4e-7 * softcap


def test_tanh_of_nan():
    """A NaN is no maximum, but it makes the sums NaN."""
    out = torch.empty(3)
    logits, targets = torch.zeros(3, 40), torch.zeros(3, dtype=torch.int64)
    logits[0, 3] = logits[1, 39] = math.nan  # in a vector, in the tail
    a = _C.FoldArgs()
    a.block.rows, a.block.cols, a.block.vocab, a.block.targets = 3, 40, 40, address(targets)
    a.block.transform.softcap = 2.0
    a.logits_map.inner, a.logits_map.outer_stride = 1, 40
    a.logits, a.logp = address(logits), address(out)
    _C.cpu_fold_logits(a)
    assert out.isnan().tolist() == [True, True, False]
    assert out[2].item() == pytest.approx(-math.log(40), abs=1e-6)


HALVES = {"bfloat16": (torch.bfloat16, _C.DType.bfloat16), "float16": (torch.float16, _C.DType.float16)}


@pytest.mark.parametrize("columns", [WIDE, TAIL])
@pytest.mark.parametrize("name", HALVES)
def test_every_half_precision_number_is_loaded_exactly(name, columns):
    """All 65536 patterns: subnormals, both zeros, infinities."""
    dtype, tag = HALVES[name]
    bits = np.arange(65536, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    result = pre_logits(bits, columns, dtype=tag)
    finite = ~np.isnan(values)
    assert (result[finite] == values[finite]).all()
    assert (result[~finite] == -np.inf).all()  # NaN is no maximum


def stored(values, dtype, tag):
    """`values` written by the kernel as gradients in `dtype`: g_logp of a row whose target has p = 0, column 0."""
    rows = len(values)
    logits = torch.full((rows, 33), -math.inf, dtype=dtype)
    logits[:, 1] = 0.0
    targets, zero = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
    a = _C.GradArgs()
    block = a.block
    block.dtype, block.rows, block.cols, block.vocab, block.targets = tag, rows, 33, 33, address(targets)
    for row_map in (a.logits_map, a.grad_map):
        row_map.inner, row_map.outer_stride = 1, 33
    a.grad_dtype = tag
    a.logits = a.grad = address(logits)
    a.row_max = a.row_log2_sum = address(zero)
    a.g_logp = address(values)
    _C.cpu_grad_logits(a)
    return logits


@pytest.mark.parametrize("name", HALVES)
def test_gradients_are_rounded_to_nearest_even(name):
    """Column 0 (scalar store) holds g, column 1 (vector store) holds -g: exactly torch's rounding, over all exponents
    and at the midpoints between two numbers."""
    dtype, tag = HALVES[name]
    bits = torch.arange(0, 0x7F800000, 48_611, dtype=torch.int64).int()
    steps = torch.arange(0, 2048, dtype=torch.int32)
    halfway = 0x3F800000 + steps * 0x800 if name == "bfloat16" else 0x38000000 + steps * 0x100  # all low bits matter
    values = torch.cat([bits, halfway]).view(torch.float32)
    values = torch.cat([values, -values])
    written = stored(values, dtype, tag)
    assert torch.equal(written[:, 0], values.to(dtype))
    assert torch.equal(written[:, 1], (-values).to(dtype))
    assert written[:, 2:].eq(0).all()


@pytest.mark.parametrize("name", HALVES)
def test_gradients_that_are_nan_stay_nan(name):
    dtype, tag = HALVES[name]
    assert stored(torch.tensor([math.nan, 1.0]), dtype, tag)[0].isnan().all()


def test_log_and_sum_of_a_long_row():
    """A million equal logits: neither the sum nor its logarithm drifts."""
    for columns in (1 << 20, (1 << 20) + 7):
        logits, targets = np.full(columns, F32(3.25)), np.zeros(1, np.int64)
        lse, entropy = np.empty(1, F32), np.empty(1, F32)
        a = _C.FoldArgs()
        a.block.rows, a.block.cols, a.block.vocab, a.block.targets = 1, columns, columns, address(targets)
        a.entropy = True
        a.logits, a.lse, a.out_entropy = address(logits), address(lse), address(entropy)
        _C.cpu_fold_logits(a)
        assert abs(float(entropy[0]) - math.log(columns)) <= 2e-6
        assert abs(float(lse[0]) - 3.25 - math.log(columns)) <= 2e-6
