"""Group reductions, level pairs and group normalisation against their float64 definitions and worked numbers, and everything
they must refuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import group_normalize, group_reduce, level_pairs, reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
REDUCTIONS = ("sum", "mean", "min", "max", "logsumexp", "count")
SMOOTH = ("sum", "mean", "logsumexp")
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern

only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
each_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
each_reduction = pytest.mark.parametrize("reduce", REDUCTIONS)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype, device=actual.device), rtol=0, atol=tolerance)


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")


def gradient_of(function, x, *args, upstream=None, **options):
    """Result, and the gradient of its elements weighted by 1, 2, 3, ... or `upstream`."""
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf, *args, **options)
    weights = torch.arange(1.0, out.numel() + 1, device=x.device) if upstream is None else upstream
    (gradient,) = torch.autograd.grad(out, leaf, weights.to(out.dtype))
    return out.detach(), gradient


def runs(size):
    """Ascending ids of groups of 1 to 9."""
    return torch.arange(size).repeat_interleave(torch.randint(1, 10, (size,)))[:size]


LAYOUTS = {
    "ascending": runs,
    "eights": lambda size: torch.arange(size) // 8,
    "mixed": lambda size: runs(size)[torch.randperm(size)],
    "sparse": lambda size: (runs(size) * 0x123456789AB - 2**60)[torch.randperm(size)],
    "single": lambda size: torch.full((size,), -7),
    "alone": lambda size: torch.arange(size) * 3,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


# ----------------------------------------------------------------------------------------------------------- reductions


def test_worked_reductions(device):
    """Group 2 has no row that counts."""
    values, group = torch.tensor([1.0, 5.0, NAN, 3.0, NAN, 7.0], device=device), torch.tensor([4, 0, 4, 4, 2, 0], device=device)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], device=device).bool()
    expected = {
        "sum": [4, 12, 4, 4, 0, 12], "mean": [2, 6, 2, 2, 0, 6], "count": [2, 2, 2, 2, 0, 2],
        "min": [1, 5, 1, 1, INF, 5], "max": [3, 7, 3, 3, -INF, 7],
    }  # fmt: skip
    for reduce, result in expected.items():
        assert group_reduce(values, group, mask=mask, reduce=reduce).tolist() == result, reduce
    first, second = math.log(math.exp(1) + math.exp(3)), math.log(math.exp(5) + math.exp(7))
    close(group_reduce(values, group, mask=mask, reduce="logsumexp"), [first, second, first, first, -INF, second], 1e-6)


def test_two_arms_of_gcpo(device):
    """Mean accuracy with and without: 2/3 against 1/3 with explicit arms, 0 against 1 of an aux split, and an empty arm."""
    group = torch.zeros(6, dtype=torch.int64, device=device)
    accuracy = torch.tensor([1.0, 1, 0, 1, 0, 0], device=device)
    with_arm = torch.tensor([1, 1, 1, 0, 0, 0], device=device).bool()
    close(group_reduce(accuracy, group, mask=with_arm, reduce="mean"), [2 / 3] * 6, 1e-7)
    close(group_reduce(accuracy, group, mask=~with_arm, reduce="mean"), [1 / 3] * 6, 1e-7)
    assert group_reduce(accuracy, group, mask=torch.ones_like(with_arm), reduce="count").tolist() == [6] * 6
    assert group_reduce(accuracy, group, mask=torch.zeros_like(with_arm), reduce="count").tolist() == [0] * 6


def test_step_advantages_of_gigpo():
    """Returns of the steps relative to those of the same anchor state, [a, b, c, a, b, a]."""
    returns, anchor = f64(9.025, 9.5, 10, 0, 0, 0), torch.tensor([0, 1, 2, 0, 1, 0])
    expected = [6.0166666667, 4.75, 0, -3.0083333333, -4.75, -3.0083333333]
    close(returns - group_reduce(returns, anchor, reduce="mean"), expected, 1e-10)


def test_fewest_calls_of_otc(device):
    """The minimum over correct trajectories: m = [1, 3, 2, 0], correct = [1, 1, 0, 0] gives n = 1 for all of them."""
    calls, correct = torch.tensor([1.0, 3, 2, 0], device=device), torch.tensor([1, 1, 0, 0], device=device).bool()
    group = torch.zeros(4, dtype=torch.int64, device=device)
    assert group_reduce(calls, group, mask=correct, reduce="min").tolist() == [1] * 4
    assert group_reduce(calls, group, mask=torch.zeros_like(correct), reduce="min").isinf().all()


def test_objective_and_weights_of_disco():
    """Check B: log-likelihood scores, tau = 1. J = mean of positives - logmeanexp of negatives; its gradient in the scores is
    1 on positives and minus the softmax of the negatives."""
    p = f64(0.5, 0.25, 0.2, 0.4, 0.1, 0.1, 0.8, 0.5).log()
    scores = torch.stack([(p[0] + p[1]) / 2, (p[2] + p[3]) / 2, p[4], (p[6] + p[7]) / 2]).requires_grad_()
    group, positive = torch.zeros(4, dtype=torch.int64), torch.tensor([True, False, False, False])
    hardest = group_reduce(scores, group, mask=~positive, reduce="logsumexp")
    negatives = group_reduce(scores, group, mask=~positive, reduce="count")
    objective = (group_reduce(scores, group, mask=positive, reduce="mean") - (hardest - negatives.log()))[0]
    close(-objective.detach(), -0.0437091115, 1e-10)
    (gradient,) = torch.autograd.grad(-objective, scores)
    close(gradient, [-1.0, 2 * 0.1392904568, 0.0984932265, 2 * 0.3114629300], 1e-9)


def test_group_form_of_copg():
    """Check 2, k = 3: loss = -(k / (k - 1)) sum_i (R_i - mean) rho_i with R = r - beta/2 rho, and its gradient."""
    rho, rewards, beta = f64(1, -1, 0.5).requires_grad_(), f64(1, 0.2, 0.5), 0.1
    group = torch.zeros(3, dtype=torch.int64)
    centred = rewards - beta / 2 * rho
    centred = centred - group_reduce(centred, group, reduce="mean")
    loss = -(3 / 2) * (centred * rho).sum()
    close(loss.detach(), -0.9875, 1e-12)
    close(torch.autograd.grad(loss, rho)[0], [-0.525, 0.375, 0.15], 1e-12)


@each_layout
@each_dtype
@each_reduction
@pytest.mark.parametrize("masked", [False, True])
def test_reductions(device, layout, dtype, reduce, masked):
    skip_float64_on_cuda(device, dtype)
    for size in (0, 1, 7, 300):
        values, group = torch.randn(size, device=device).to(dtype), LAYOUTS[layout](size).to(device)
        mask = torch.rand(size, device=device) < 0.5 if masked else None
        if masked:
            values = values.masked_fill(~mask, NAN)
        out = group_reduce(values, group, mask=mask, reduce=reduce)
        expected = reference.group_reduce(
            values.cpu().double(), group.cpu(), mask=mask if mask is None else mask.cpu(), reduce=reduce
        )
        assert out.dtype == (F64 if dtype == F64 else F32)
        tolerance = (1e-13, 1e-13) if dtype == F64 else (1.2e-7, 1e-7)
        assert_close(out.cpu().double(), expected, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("reduce", SMOOTH)
@pytest.mark.parametrize("masked", [False, True])
@each_dtype
def test_gradients_of_reductions(device, dtype, reduce, masked):
    skip_float64_on_cuda(device, dtype)
    values, group = torch.randn(60, device=device).to(dtype), LAYOUTS["mixed"](60).to(device)
    mask = torch.rand(60, device=device) < 0.5 if masked else None
    if masked:
        values = values.masked_fill(~mask, NAN)
    _, gradient = gradient_of(group_reduce, values, group, mask=mask, reduce=reduce)
    expected = gradient_of(
        reference.group_reduce, values.cpu().double(), group.cpu(), mask=mask if mask is None else mask.cpu(), reduce=reduce
    )[1]
    assert gradient.dtype == dtype
    if masked:
        assert gradient[~mask].eq(0).all()
        expected = expected.masked_fill(~mask.cpu(), 0.0)
    if dtype in (F64, F32):
        assert_close(
            gradient.cpu().double(), expected, rtol=1e-12 if dtype == F64 else 1e-6, atol=1e-6 if dtype == F32 else 1e-12
        )
    else:
        assert_close(gradient.cpu(), expected.to(dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("reduce", SMOOTH)
def test_gradcheck_of_reductions(reduce):
    """First and second derivatives."""
    values, group = torch.randn(9, dtype=F64, requires_grad=True), torch.tensor([3, 0, 3, 3, 1, 0, 1, 3, 5])
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 0, 1, 1]).bool()
    for m in (None, mask):
        assert torch.autograd.gradcheck(lambda x, m=m: group_reduce(x, group, mask=m, reduce=reduce)[group != 1], values)
        assert torch.autograd.gradgradcheck(lambda x, m=m: group_reduce(x, group, mask=m, reduce=reduce)[group != 1], values)


@pytest.mark.parametrize("reduce", ["min", "max", "count"])
def test_reductions_without_a_gradient(device, reduce):
    values = torch.randn(4, device=device, requires_grad=True)
    assert not group_reduce(values, torch.zeros(4, dtype=torch.int64, device=device), reduce=reduce).requires_grad


@given(
    st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(1, 700), st.booleans(), st.sampled_from([F32, F64])
)
def test_equal_values_have_exactly_their_value_as_mean(value, count, mixed, dtype):
    if dtype == F64:
        value = value / 3 if abs(value) > 1e-30 else value  # all 53 bits in use
    values, group = torch.full((count + 2,), value, dtype=dtype), torch.zeros(count + 2, dtype=torch.int64)
    values[[0, -1]] = torch.tensor([1.0, 2.0], dtype=dtype)
    group[[0, -1]] = -1 if mixed else torch.tensor([-1, 1])
    assert group_reduce(values, group, reduce="mean")[1:-1].eq(value).all()
    assert group_normalize(values, group, eps=0.0)[1:-1].eq(0).all()


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_a_log_sum_exp_of_any_size(device, scale):
    values, group = torch.tensor([1.0, -1.0, 1.0], device=device) * scale, torch.tensor([0, 1, 0], device=device)
    out, gradient = gradient_of(group_reduce, values, group, reduce="logsumexp")
    assert_close(out, values + torch.tensor([math.log(2), 0, math.log(2)], device=device), rtol=1e-7, atol=0)
    close(gradient, [2, 2, 2], 1e-6)


def test_what_cannot_happen_has_no_weight(device):
    """-inf among the values, and nothing else in the second group."""
    values, group = torch.tensor([-INF, 0.0, 0.0, -INF], device=device), torch.tensor([0, 0, 0, 1], device=device)
    out, gradient = gradient_of(group_reduce, values, group, reduce="logsumexp")
    close(out, [math.log(2)] * 3 + [-INF], 1e-6)
    close(gradient, [0, 3, 3, 0], 1e-6)


@each_reduction
def test_nan_stays_in_its_group(device, reduce):
    values, group = torch.randn(40, device=device), torch.arange(40, device=device) % 5
    values[13] = NAN
    nan = group_reduce(values, group, reduce=reduce).isnan()
    assert torch.equal(nan, (group == 3) & (reduce != "count"))


def test_narrow_ids_and_strides(device):
    values, group = torch.randn(60, device=device)[::2], torch.randint(0, 6, (60,), device=device)[::2]
    expected = group_reduce(values.clone(), group.clone())
    assert torch.equal(group_reduce(values, group.int()), expected)
    assert torch.equal(group_reduce(values, group, mask=torch.ones(60, device=device).bool()[::2]), expected)


# ---------------------------------------------------------------------------------------------------------- level pairs

TRPA_SCORES, TRPA_LEVELS = f64(0.7 / 3, 0.05, -0.5 / 3, 0.5 / 3), torch.tensor([1, 2, 4, 2])
ZERO = torch.zeros(4, dtype=torch.int64)


def pair_loss_and_gradient(scores, *args, function=level_pairs, upstream=1.0, **options):
    leaf = scores.detach().clone().requires_grad_()
    out = function(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(out.loss * upstream, leaf)
    return out, gradient


def test_pairs_of_trpa():
    """Check 1: five pairs, beta 0.1, anisotropy 2.5."""
    out, gradient = pair_loss_and_gradient(TRPA_SCORES, ZERO, TRPA_LEVELS)
    close(out.loss.detach(), 0.6717460460, 1e-10)
    assert out.pairs.item() == 5
    margins = f64(0.0458333333, 0.1, 0.0166666667, 0.0216666667, 0.0333333333)
    close(F.softplus(-margins).mean(), out.loss.item(), 1e-10)
    s = torch.sigmoid(-margins) * 0.1 / 5  # of pairs (1>2), (1>3), (1>4), (2>3), (4>3)
    expected = [-2.5 * (s[0] + s[1] + s[2]), 2.5 * s[0] - s[3], 2.5 * s[1] + s[3] + s[4], 2.5 * s[2] - s[4]]
    close(gradient, torch.stack(expected), 1e-10)
    # First tokens of the check: the trust region adds (1 - exp(x)) / 11 * 1e-3 per token, x = old_logp - logp.
    x = f64(0.1, 0.2, 0.0, -0.2)
    token = gradient / f64(3, 2, 3, 3) + 1e-3 * (1 - x.exp()) / 11
    close(token, [-0.0243328596, 0.0072476288, 0.0144920201, 0.0050025866], 1e-10)


def test_without_pairs_the_loss_is_zero(device):
    """Check 3's groups: every response of a group at one level. And groups of one, and nothing at all."""
    scores = torch.randn(4, device=device)
    for group, levels in (([0, 0, 1, 1], [1, 1, 3, 3]), ([0, 1, 2, 3], [1, 2, 3, 4])):
        arguments = (torch.tensor(group, device=device), torch.tensor(levels, device=device))
        out, gradient = pair_loss_and_gradient(scores, *arguments)
        assert out.loss.item() == 0 and out.pairs.item() == 0
        assert gradient.eq(0).all()
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    out, gradient = pair_loss_and_gradient(scores[:0], nothing, nothing)
    assert out.loss.item() == 0 and out.pairs.item() == 0 and gradient.shape == (0,)


def test_two_responses_at_levels_two_and_three_are_dpo():
    scores = torch.randn(6, dtype=F64)
    out, gradient = pair_loss_and_gradient(scores, torch.arange(6) // 2, torch.tensor([2, 3, 3, 2, 2, 3]), beta=0.7)
    margin = 0.7 * torch.stack([scores[0] - scores[1], scores[3] - scores[2], scores[4] - scores[5]])
    close(out.loss.detach(), -F.logsigmoid(margin).mean(), 1e-12)
    assert abs(gradient.sum()) < 1e-15


def test_anisotropy_of_a_response():
    """Each score times its own factor: 2.5 beta at level 1, beta elsewhere."""
    scores, levels = f64(0.4, -0.2, 0.3), torch.tensor([1, 2, 3])
    out, gradient = pair_loss_and_gradient(scores, ZERO[:3], levels, per_response=True)
    margins = f64(0.25 * 0.4 + 0.1 * 0.2, 0.25 * 0.4 - 0.1 * 0.3, 0.1 * (-0.2 - 0.3))
    close(out.loss.detach(), F.softplus(-margins).mean(), 1e-12)
    s = torch.sigmoid(-margins) / 3
    close(gradient, torch.stack([-0.25 * (s[0] + s[1]), 0.1 * (s[0] - s[2]), 0.1 * (s[1] + s[2])]), 1e-12)


@each_layout
@each_dtype
@pytest.mark.parametrize("per_response", [False, True])
def test_level_pairs(device, layout, dtype, per_response):
    skip_float64_on_cuda(device, dtype)
    for size in (1, 7, 100):
        scores, group = torch.randn(size, device=device).to(dtype), LAYOUTS[layout](size).to(device)
        levels = torch.randint(1, 5, (size,), device=device)
        options = {"beta": 0.6, "anisotropy": 1.7, "per_response": per_response}
        out, gradient = pair_loss_and_gradient(scores, group, levels, upstream=3.0, **options)
        expected, expected_gradient = pair_loss_and_gradient(
            scores.cpu().double(), group.cpu(), levels.cpu(), upstream=3.0, function=reference.level_pairs, **options
        )
        assert out.loss.dtype == (F64 if dtype == F64 else F32) and out.pairs.dtype == torch.int64
        assert out.loss.shape == out.pairs.shape == ()
        assert out.pairs.item() == expected.pairs.item()
        tolerance = 1e-13 if dtype == F64 else 1.2e-7
        assert_close(out.loss.detach().cpu().double(), expected.loss.detach(), rtol=tolerance, atol=0)
        if dtype in (F64, F32):
            assert_close(gradient.cpu().double(), expected_gradient, rtol=1e-12 if dtype == F64 else 1e-6, atol=1e-9)
        else:
            assert_close(gradient.cpu(), expected_gradient.to(dtype), rtol=2**-7, atol=1e-6)
        assert torch.equal(level_pairs(scores, group.int(), levels.int(), **options).loss, out.loss)


@pytest.mark.parametrize("per_response", [False, True])
def test_gradcheck_of_pairs(per_response):
    scores, group = torch.randn(9, dtype=F64, requires_grad=True), torch.tensor([3, 0, 3, 3, 1, 0, 1, 3, 5])
    levels = torch.tensor([1, 2, 3, 2, 1, 1, 4, 1, 1])
    assert torch.autograd.gradcheck(lambda x: level_pairs(x, group, levels, per_response=per_response).loss, scores)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_margins_of_any_size(device, dtype):
    """-log sigmoid of -10^4 is 10^4, where log(sigmoid()) has long been infinite; of 10^4 it is 0."""
    skip_float64_on_cuda(device, dtype)
    group, levels = torch.zeros(2, dtype=torch.int64, device=device), torch.tensor([2, 3], device=device)
    for score, loss, slope in ((-1e4, 1e4, -1.0), (1e4, 0.0, 0.0), (-104.5, 104.5, -1.0), (0.0, math.log(2), -0.5)):
        scores = torch.tensor([score, 0.0], device=device, dtype=dtype)
        out, gradient = pair_loss_and_gradient(scores, group, levels, beta=1.0)
        assert out.loss.item() == pytest.approx(loss, rel=1e-7)
        close(gradient, [slope, -slope], 1e-7)


@given(st.integers(0, 2**31))
def test_raising_the_best_never_raises_the_loss(seed):
    """And raising the worst never lowers it; the gradient sums to 0; only the order of levels counts beside level 1."""
    torch.manual_seed(seed)
    scores, group, levels = torch.randn(30, dtype=F64), torch.randint(0, 4, (30,)), torch.randint(1, 6, (30,))
    out, gradient = pair_loss_and_gradient(scores, group, levels)
    best = group_reduce(levels.double(), group, reduce="min") == levels
    worst = group_reduce(levels.double(), group, reduce="max") == levels
    assert (gradient[best & ~worst] <= 0).all()
    assert (gradient[worst & ~best] >= 0).all()
    assert abs(gradient.sum()) < 1e-15
    stretched = torch.where(levels == 1, 1, levels * 10)
    assert torch.equal(level_pairs(scores, group, stretched).loss, out.loss.detach())


def test_nan_in_a_score(device):
    scores, group = torch.randn(12, device=device), torch.arange(12, device=device) // 4
    levels = torch.arange(12, device=device) % 4 + 1
    scores[5] = NAN
    out, gradient = pair_loss_and_gradient(scores, group, levels)
    assert out.loss.isnan() and out.pairs.item() == 18
    assert torch.equal(gradient.isnan(), group == 1)


@pytest.mark.parametrize("size", [300, 5000])
def test_pairs_take_no_memory(device, allocations, size):
    """The pairs of one group of 5000 rows are twelve million."""
    scores, levels = torch.randn(size, device=device), torch.randint(1, 5, (size,), device=device)
    group = torch.zeros(size, dtype=torch.int64, device=device)
    measured = allocations(lambda: level_pairs(scores, group, levels))
    assert measured.peak <= 64 * size + (1 << 20) * (device == "cuda")


# -------------------------------------------------------------------------------------------------------- normalisation

REG_A, REG_X = f64(0.8658754298, -0.8658754298, -0.8658754298, 0.8658754298), f64(0.3, -0.2, 0.1, 0.4)


@pytest.mark.parametrize(("sigma_grad", "expected"), [
    (False, [-0.5649240955, -0.8636365342, 1.2792044103, 0.1493562194]),
    (True, [-0.7012900136, -0.5454493919, 1.3246597163, -0.0779203109]),
])  # fmt: skip
def test_regression_of_reg_grpo(sigma_grad, expected):
    x = REG_X.clone().requires_grad_()
    z = group_normalize(x, ZERO, eps=1e-6, sigma_grad=sigma_grad)
    close(z.detach(), [0.5669445667, -1.3228706556, -0.1889815222, 0.9449076111], 1e-10)
    loss = (REG_A - z).square().mean()
    close(loss.detach(), 0.1906589363, 1e-10)
    (gradient,) = torch.autograd.grad(loss, x)
    close(gradient, expected, 1e-9)
    assert abs(gradient.sum()) < 1e-12


@pytest.mark.parametrize("sigma_grad", [False, True])
def test_the_on_policy_start_of_reg_grpo(sigma_grad):
    """x = 0: z = 0 and a finite gradient in both modes, where autograd through a standard deviation gives NaN."""
    x = torch.zeros(4, dtype=F64, requires_grad=True)
    z = group_normalize(x, ZERO, eps=1e-2, sigma_grad=sigma_grad)
    assert z.eq(0).all()
    loss = (REG_A - z).square().mean()
    close(loss.detach(), 0.7497402599, 1e-10)
    close(torch.autograd.grad(loss, x)[0], [-43.2937714880, 43.2937714880, 43.2937714880, -43.2937714880], 1e-8)


@pytest.mark.parametrize("sigma_grad", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_equal_values_and_no_eps(device, dtype, sigma_grad):
    skip_float64_on_cuda(device, dtype)
    x, group = torch.tensor([0.1, 0.1, 0.1, 3.0], device=device, dtype=dtype), torch.tensor([0, 0, 0, 1], device=device)
    out, gradient = gradient_of(group_normalize, x, group, eps=0.0, sigma_grad=sigma_grad)
    assert out.eq(0).all()
    assert gradient.eq(0).all()


@each_layout
@each_dtype
@pytest.mark.parametrize("sigma_grad", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
def test_normalisation(device, layout, dtype, sigma_grad, ddof):
    skip_float64_on_cuda(device, dtype)
    for size in (0, 1, 7, 300):
        x, group = (3 + torch.randn(size, device=device)).to(dtype), LAYOUTS[layout](size).to(device)
        options = {"eps": 0.1, "ddof": ddof, "sigma_grad": sigma_grad}
        upstream = torch.randn(size, device=device)
        out, gradient = gradient_of(group_normalize, x, group, upstream=upstream, **options)
        expected, expected_gradient = gradient_of(
            reference.group_normalize, x.cpu().double(), group.cpu(), upstream=upstream.cpu(), **options
        )
        assert out.dtype == (F64 if dtype == F64 else F32) and gradient.dtype == dtype
        tolerance = 1e-11 if dtype == F64 else 2e-7
        assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)
        scale = max(1.0, expected_gradient.abs().max().item()) if size else 1.0
        if dtype in (F64, F32):
            assert_close(gradient.cpu().double(), expected_gradient, rtol=0, atol=(1e-11 if dtype == F64 else 1e-6) * scale)
        else:
            assert_close(gradient.cpu().double(), expected_gradient, rtol=2**-7, atol=2**-7 * scale)


@pytest.mark.parametrize("sigma_grad", [False, True])
def test_gradcheck_of_normalisation(sigma_grad):
    """With a constant sigma that is the gradient of (x - m) / constant."""
    x, group = torch.randn(9, dtype=F64), torch.tensor([3, 0, 3, 3, 1, 0, 1, 3, 5])
    if sigma_grad:
        leaf = x.requires_grad_()
        assert torch.autograd.gradcheck(lambda v: group_normalize(v, group, eps=0.1, sigma_grad=True), leaf)
        return
    d = x - group_reduce(x, group, reduce="mean")
    n = group_reduce(x, group, reduce="count")
    divisor = (group_reduce(d * d, group) / (n - 1).clamp_min(1)).sqrt() + 0.1
    _, gradient = gradient_of(group_normalize, x, group, eps=0.1)
    _, expected = gradient_of(lambda v: (v - group_reduce(v, group, reduce="mean")) / divisor, x)
    assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**31), st.floats(-50, 50), st.floats(0.1, 10))
def test_normalisation_forgets_shift_and_scale(seed, shift, scale):
    torch.manual_seed(seed)
    x, group = torch.randn(20, dtype=F64), torch.randint(0, 4, (20,))
    z, gradient = gradient_of(group_normalize, x, group, eps=0.0, sigma_grad=True)
    assert_close(group_normalize(x * scale + shift, group, eps=0.0), z, rtol=0, atol=1e-10)
    size = gradient.abs().max()
    deviations = x - group_reduce(x, group, reduce="mean")
    assert_close(group_reduce(gradient, group), torch.zeros(20, dtype=F64), rtol=0, atol=1e-10 * float(size))
    assert_close(group_reduce(gradient * deviations, group), torch.zeros(20, dtype=F64), rtol=0, atol=1e-10 * float(size))


def test_a_small_spread_on_a_large_offset(device):
    """E[x^2] - m^2, or a mean in float32, would have nothing left here."""
    x = torch.tensor([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3], device=device)
    z = group_normalize(x, torch.zeros(4, dtype=torch.int64, device=device), eps=0.0)
    assert_close(z.cpu(), torch.tensor([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(5 / 3), rtol=1e-7, atol=0)


def test_nan_makes_its_group_nan(device):
    x, group = torch.randn(20, device=device), torch.arange(20, device=device) % 4
    x[6] = NAN
    out, gradient = gradient_of(group_normalize, x, group, eps=0.1, sigma_grad=True)
    assert torch.equal(out.isnan(), group == 2)
    assert torch.equal(gradient.isnan(), group == 2)


# ------------------------------------------------------------------------------------------- same bits, however it is run


def everything(size, groups, device="cpu"):
    x, group = torch.randn(size, device=device), torch.randint(0, groups, (size,), device=device)
    levels, mask = torch.randint(1, 5, (size,), device=device), torch.rand(size, device=device) < 0.8

    def run():
        reductions = [group_reduce(x, group, mask=mask, reduce=reduce) for reduce in REDUCTIONS]
        pairs, pairs_gradient = pair_loss_and_gradient(x, group, levels)
        return [*reductions, *pairs, pairs_gradient, *gradient_of(group_normalize, x, group, eps=0.1, sigma_grad=True)]

    return run


def test_same_bits_on_any_number_of_threads(threads):
    run, results = everything(50_003, 3000), []
    for n in (1, 2, 2):
        threads(n)
        results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@only_cuda
@pytest.mark.parametrize("size", [1000, 4096, 4097, 50_000])
def test_same_bits_every_time_and_in_a_graph(device, size):
    run = everything(size, size // 8, device)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


@only_cuda
@pytest.mark.parametrize("size", [4096, 4097, 20_000])
def test_many_rows(device, size):
    """Ids are looked through, or sorted first."""
    x, group = torch.randn(size, device=device), torch.randint(0, size // 8, (size,), device=device)
    levels = torch.randint(1, 5, (size,), device=device)
    for reduce in REDUCTIONS:
        expected = reference.group_reduce(x.cpu().double(), group.cpu(), reduce=reduce)
        assert_close(group_reduce(x, group, reduce=reduce).cpu().double(), expected, rtol=1e-6, atol=1e-6)
    out, gradient = pair_loss_and_gradient(x, group, levels)
    expected, expected_gradient = pair_loss_and_gradient(x.cpu(), group.cpu(), levels.cpu())
    assert out.pairs.item() == expected.pairs.item()
    assert_close(out.loss.cpu(), expected.loss, rtol=1e-6, atol=0)
    assert_close(gradient.cpu(), expected_gradient, rtol=1e-5, atol=1e-10)
    z = group_normalize(x, group, eps=0.1)
    assert_close(z.cpu().double(), reference.group_normalize(x.cpu().double(), group.cpu(), eps=0.1), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("name", ["group_normalize", "level_pairs"])
def test_backwards_that_cannot_be_differentiated(device, name):
    x, group = torch.randn(8, device=device, requires_grad=True), torch.arange(8, device=device) // 4
    levels = torch.arange(8, device=device) % 4 + 1
    out = group_normalize(x, group, eps=0.1) if name == "group_normalize" else level_pairs(x, group, levels).loss
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}_backward cannot be differentiated twice"):
        gradient.sum().backward()


def test_no_gradient_costs_nothing(device, op_log):
    """Nothing is saved, and no formula for a gradient is met."""
    x, group = torch.randn(8, device=device, requires_grad=True), torch.arange(8, device=device) // 4
    with torch.no_grad():
        out = [group_reduce(x, group), group_normalize(x, group, eps=0.1), *level_pairs(x, group, group + 1)]
    assert not any(t.requires_grad for t in out)
    assert op_log.names() == ["group_reduce_fwd", "group_normalize_fwd", "level_pairs_fwd"]
    assert op_log.args("level_pairs_fwd")[-1] is False


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_opcheck(device, dtype):
    skip_float64_on_cuda(device, dtype)
    x, group = torch.randn(10, device=device, dtype=dtype), torch.randint(0, 3, (10,), device=device)
    leaf, mask, levels = (
        x.clone().requires_grad_(),
        torch.rand(10, device=device) < 0.5,
        torch.randint(1, 4, (10,), device=device),
    )
    for reduction, m in ((1, mask), (3, None), (4, mask)):
        opcheck(OPS.group_reduce.default, (leaf, group, m, reduction))
    if dtype == F64:
        return
    opcheck(OPS.group_normalize.default, (leaf, group, 0.1, 1, True))
    z, scale, slope = OPS.group_normalize(x, group, 0.1, 1, True)
    opcheck(OPS.group_normalize_backward.default, (x, group, z, scale, slope))
    opcheck(OPS.level_pairs.default, (leaf, group, levels, 0.1, 2.5, False, True))
    opcheck(OPS.level_pairs.default, (x, group.int(), levels.int(), 0.1, 2.5, True, False))
    _, pairs, unnormalised = OPS.level_pairs(x, group, levels, 0.1, 2.5, False, True)
    opcheck(OPS.level_pairs_backward.default, (x[0].clone(), unnormalised, pairs))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_rows(device, dynamic):
    """fullgraph, four sizes, at most two compilations (the second has a symbolic B)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, group, mask, levels):
        total = level_pairs(x, group, levels).loss + (group_normalize(x, group, eps=0.1, sigma_grad=True) * x).sum()
        for reduce in SMOOTH:
            total = total + group_reduce(x, group, mask=mask, reduce=reduce).clamp_min(-100).sum()
        return total, group_reduce(x, group, reduce="max")

    run = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (6, 11, 30, 31):
        x, group = torch.randn(size, device=device), torch.randint(0, 4, (size,), device=device)
        mask, levels = torch.rand(size, device=device) < 0.9, torch.randint(1, 4, (size,), device=device)
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled, eager = run(leaf, group, mask, levels), step(other, group, mask, levels)
        assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
        compiled[0].backward()
        eager[0].backward()
        assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2


def test_meta_tensors():
    x, group = torch.empty(5, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
    assert group_reduce(x, group).shape == group_normalize(x, group, eps=0.1).shape == (5,)
    out = level_pairs(x.bfloat16(), group, group)
    assert out.loss.shape == () and out.loss.dtype == F32 and out.pairs.dtype == torch.int64


# --------------------------------------------------------------------------------------------------------------- errors

R, G = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
COMMON = {
    "list": (dict(NAME=[1.0]), TypeError, r"NAME is a list; a torch\.Tensor"),
    "int": (dict(NAME=R.long()), TypeError, r"NAME has dtype Long.*float32"),
    "2-d": (dict(NAME=R.view(2, 2)), ValueError, r"NAME has shape \[2, 2\]; expected \[B\]"),
    "0-d": (dict(NAME=R[0]), ValueError, r"NAME has shape \[\]; expected \[B\]"),
    "group list": (dict(group=[1]), TypeError, r"group is a list; a torch\.Tensor"),
    "group float": (dict(group=R), TypeError, r"group has dtype Float; accepted: int64, int32"),
    "group length": (dict(group=G[:3]), ValueError, r"group has shape \[3\].*\[4\]"),
    "group device": (dict(group=G.to("meta")), ValueError, r"group is on meta but NAME is on cpu"),
}
REDUCE = {
    "mask float": (dict(mask=R), TypeError, r"mask has dtype Float; accepted: bool"),
    "mask shape": (dict(mask=R[:3].bool()), ValueError, r"mask has shape \[3\]; values has shape \[4\]"),
    "mask list": (dict(mask=[True]), TypeError, r"mask is a list"),
    "reduce": (
        dict(reduce="prod"),
        ValueError,
        r"reduce is 'prod'; accepted: 'sum', 'mean', 'min', 'max', 'logsumexp', 'count'",
    ),
}
NORMALIZE = {
    "eps negative": (dict(eps=-1e-6), ValueError, r"eps is -1e-06; it must be finite and not negative"),
    "eps nan": (dict(eps=NAN), ValueError, r"eps is nan"),
    "eps inf": (dict(eps=INF), ValueError, r"eps is inf"),
    "eps tensor": (dict(eps=torch.ones(())), TypeError, r"eps is tensor"),
    "ddof": (dict(ddof=2), ValueError, r"ddof is 2; accepted: 0, 1"),
    "ddof negative": (dict(ddof=-1), ValueError, r"ddof is -1; accepted: 0, 1"),
    "ddof float": (dict(ddof=1.0), TypeError, r"ddof is 1\.0; an integer"),
}
PAIRS = {
    "levels list": (dict(levels=[1]), TypeError, r"levels is a list"),
    "levels float": (dict(levels=R), TypeError, r"levels has dtype Float; accepted: int64, int32"),
    "levels length": (dict(levels=G[:3] + 1), ValueError, r"levels has shape \[3\].*\[4\]"),
    "levels zero": (dict(levels=torch.tensor([1, 2, 0, 4])), ValueError, r"levels\[2\] is 0; levels begin at 1, the best"),
    "beta inf": (dict(beta=INF), ValueError, r"beta is inf; it must be finite"),
    "beta string": (dict(beta="0.1"), TypeError, r"beta is '0\.1'; a number"),
    "anisotropy nan": (dict(anisotropy=NAN), ValueError, r"anisotropy is nan; it must be finite"),
}


def cases(function, first, good, *tables):
    for name, (wrong, error, message) in itertools.chain(*(table.items() for table in tables)):
        arguments = {**good, **{first if key == "NAME" else key: value for key, value in wrong.items()}}
        yield pytest.param(function, arguments, error, message.replace("NAME", first), id=f"{function.__name__}: {name}")


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        *cases(group_reduce, "values", {"values": R, "group": G}, COMMON, REDUCE),
        *cases(group_normalize, "x", {"x": R, "group": G, "eps": 0.1}, COMMON, NORMALIZE),
        *cases(level_pairs, "scores", {"scores": R, "group": G, "levels": G + 1}, COMMON, PAIRS),
    ],
)
def test_errors(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)


def test_the_ops_themselves_refuse_unknown_options():
    with pytest.raises(RuntimeError, match="reduction is 6; accepted: 0 to 5"):
        OPS.group_reduce(R, G, None, 6)
    with pytest.raises(RuntimeError, match="values has dtype BFloat16; accepted: float32"):
        OPS.group_reduce(R.bfloat16(), G, None, 0)
    with pytest.raises(RuntimeError, match=r"g has shape \[3\]; z has shape \[4\]"):
        OPS.group_normalize_backward(R[:3], G, R, R, R)
    with pytest.raises(RuntimeError, match="scale has dtype Double; that of z, Float"):
        OPS.group_normalize_backward(R, G, R, R.double(), R)
    with pytest.raises(RuntimeError, match="expected one element each"):
        OPS.level_pairs_backward(R, R, G[0])
    with pytest.raises(ValueError, match="with_grad is False"):
        OPS.level_pairs(R.clone().requires_grad_(), G, G + 1, 0.1, 2.5, False, False)


@only_cuda
def test_a_level_below_one_is_nan(device, validation):
    scores, group = torch.randn(12, device=device), torch.arange(12, device=device) // 4
    levels = torch.arange(12, device=device) % 4 + 1
    levels[5] = 0
    out, gradient = pair_loss_and_gradient(scores, group, levels)
    assert out.loss.isnan()
    assert torch.equal(gradient.isnan(), group == 1)
    validation(True)
    with pytest.raises(ValueError, match=r"levels\[5\] is 0"):
        level_pairs(scores, group, levels)


def test_they_are_exported():
    assert prefkern.group_reduce is group_reduce
    assert prefkern.level_pairs is level_pairs
    assert prefkern.group_normalize is group_normalize
