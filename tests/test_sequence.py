"""Sums over sequences, returns and advantage estimates against their float64 definitions and worked numbers, and everything
they must refuse."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import discounted_returns, gae, reference, segmented_returns, sequence_mean, sequence_sum

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern

only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
each_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
each_sum = pytest.mark.parametrize("function", [sequence_sum, sequence_mean], ids=["sum", "mean"])
each_transform = pytest.mark.parametrize("transform", ["none", "exp"])


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype, device=actual.device), rtol=0, atol=tolerance)


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")


def wide(t):
    return t.detach().cpu().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def on_cpu(t):
    return t.cpu() if isinstance(t, torch.Tensor) else t


def exactly(function, *args, **options):
    """The definition, on the same numbers, in float64 on the CPU."""
    definition = getattr(reference, function.__name__)
    return definition(*(on_cpu(wide(t)) for t in args), **{name: on_cpu(wide(t)) for name, t in options.items()})


# ------------------------------------------------------------------------------------------------------- sums and means


def sums_and_gradient(function, values, *args, upstream=None, **options):
    leaf = values.detach().clone().requires_grad_()
    out = function(leaf, *args, **options)
    upstream = torch.arange(1.0, len(out) + 1, device=out.device, dtype=out.dtype) if upstream is None else upstream
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    return out.detach(), gradient


def test_worked_sums(device):
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], device=device)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], device=device).bool()
    assert sequence_sum(values, mask).tolist() == [4, 0, 24]
    assert sequence_mean(values, mask).tolist() == [2, 0, 8]
    assert sequence_sum(values, mask, minus=values - 1, weights=values).tolist() == [4, 0, 24]
    out, gradient = sums_and_gradient(sequence_mean, values, mask, weights=values)
    assert out.tolist() == [5, 0, pytest.approx((49 + 64 + 81) / 3)]
    close(gradient, [[0.5, 0, 1.5], [0, 0, 0], [7, 8, 9]], 1e-6)


def test_scores_of_disco():
    """Mean log-probabilities and mean token ratios: the scores of two sequences, the second with one token."""
    logp = torch.tensor([[0.5, 0.25], [0.1, 0.1]], dtype=F64).log()
    old, mask = logp + f64([0.02, 0], [0.02, NAN]), torch.tensor([[1, 1], [1, 0]]).bool()
    close(sequence_mean(logp, mask), [(math.log(0.5) + math.log(0.25)) / 2, math.log(0.1)])
    close(sequence_mean(logp, mask, minus=old, transform="exp"), [(math.exp(-0.02) + 1) / 2, math.exp(-0.02)])
    _, gradient = sums_and_gradient(sequence_mean, logp, mask, minus=old, transform="exp", upstream=f64(1, 1))
    close(gradient, [[math.exp(-0.02) / 2, 0.5], [math.exp(-0.02), 0]])


def test_length_normalised_log_ratios_of_trpa():
    logp = f64([-1, -2, -0.5], [-0.3, -0.3, 0], [-2, -1, -1], [-0.1, -0.2, -0.4])
    ref = f64([-1.2, -2.1, -0.9], [-0.2, -0.5, 0], [-1.5, -1, -1], [-0.4, -0.4, -0.4])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    close(sequence_mean(logp, mask, minus=ref), [0.2333333333, 0.05, -0.1666666667, 0.1666666667], 1e-10)


@each_dtype
@each_sum
@each_transform
@pytest.mark.parametrize("layout", ["padded", "masked", "packed", "packed and masked"])
@pytest.mark.parametrize("extras", ["", "minus", "weights", "both"])
def test_sums(device, dtype, function, transform, layout, extras):
    skip_float64_on_cuda(device, dtype)
    values, minus, weights = (torch.randn(5, 37, device=device).to(dtype) for _ in range(3))
    options = {"transform": transform}
    mask = torch.rand(5, 37, device=device) < 0.7 if "masked" in layout else None
    if mask is not None:
        mask[1], mask[2, 5:], mask[3] = False, False, True
    if extras in ("minus", "both"):
        options["minus"] = minus
    if extras in ("weights", "both"):
        options["weights"] = weights
    if "packed" in layout:
        values, mask = values.view(-1), None if mask is None else mask.view(-1)
        options = {name: t.view(-1) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
        options["cu_seqlens"] = boundaries([40, 0, 1, 100, 44], device)
    out, gradient = sums_and_gradient(function, values, mask, **options)
    leaf = wide(values).requires_grad_()
    options = {name: on_cpu(wide(t)) for name, t in options.items()}
    expected = getattr(reference, function.__name__)(leaf, on_cpu(mask), **options)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, torch.arange(1.0, len(expected) + 1, dtype=F64))
    assert out.dtype == (F64 if dtype == F64 else F32)
    assert gradient.dtype == dtype and gradient.shape == values.shape
    tolerance = 1e-12 if dtype == F64 else 2e-6
    assert_close(out.cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance * 10)
    if dtype in (F32, F64):
        assert_close(gradient.cpu().double(), expected_gradient, rtol=tolerance, atol=tolerance)
    else:
        assert_close(gradient.cpu(), expected_gradient.to(dtype), rtol=2**-7, atol=1e-6)


@each_sum
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 16), (2, 33), (3, 1024), (2, 5003), (0, 5), (3, 0)])
def test_sizes_of_sums(device, function, masked, shape):
    """Around a vector, a tile, a block, and nothing."""
    values = torch.randn(shape, device=device)
    mask = torch.rand(shape, device=device) < 0.5 if masked else None
    out, gradient = sums_and_gradient(function, values, mask)
    leaf = wide(values).requires_grad_()
    expected = getattr(reference, function.__name__)(leaf, on_cpu(mask))
    (expected_gradient,) = torch.autograd.grad(expected, leaf, torch.arange(1.0, shape[0] + 1, dtype=F64))
    assert_close(out.cpu().double(), expected.detach(), rtol=1e-6, atol=3e-5)
    assert_close(gradient.cpu().double(), expected_gradient, rtol=1e-6, atol=0)


def test_a_long_sum_loses_nothing(device):
    """A million float32 terms, and the difference of two sums that are 10^6 each."""
    logp = -torch.rand(1, 1_000_003, device=device) - 0.5
    old = logp + 1e-3 * torch.randn(logp.shape, device=device)
    for options in ({}, {"minus": old}):
        expected = exactly(sequence_sum, logp, **options)
        scale = exactly(sequence_sum, (logp - old if options else logp).abs()).item()
        assert abs(sequence_sum(logp, **options).item() - expected.item()) <= 1e-7 * scale


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
@each_sum
@each_transform
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_outside_the_mask_is_summed(device, poison, function, transform, packed):
    tensors = [torch.randn(6, 50, device=device) for _ in range(3)]
    mask = torch.rand(6, 50, device=device) < 0.6
    mask[2] = False  # a whole sequence
    mask[3, :32] = False  # whole vectors
    poisoned = [torch.where(mask, t, poison) for t in tensors]
    options = {"transform": transform}
    if packed:
        options["cu_seqlens"] = boundaries([50] * 6, device)
        tensors, poisoned, mask = [t.view(-1) for t in tensors], [t.view(-1) for t in poisoned], mask.view(-1)
    clean, clean_gradient = sums_and_gradient(function, tensors[0], mask, minus=tensors[1], weights=tensors[2], **options)
    out, gradient = sums_and_gradient(function, poisoned[0], mask, minus=poisoned[1], weights=poisoned[2], **options)
    assert torch.equal(out, clean)
    assert torch.equal(gradient, clean_gradient)
    assert gradient[~mask].eq(0).all()


@each_sum
@each_transform
def test_nan_inside_the_mask_stays_in_its_sequence(device, function, transform):
    values = torch.randn(4, 40, device=device)
    values[1, 17] = NAN
    out, gradient = sums_and_gradient(function, values, transform=transform)
    assert out.isnan().tolist() == [False, True, False, False]
    assert torch.equal(gradient.isnan(), values.isnan() & (transform == "exp"))


def test_a_zero_gradient_survives_a_nan_from_upstream(device):
    values, mask = torch.randn(2, 9, device=device), torch.arange(9, device=device).expand(2, 9) < 5
    _, gradient = sums_and_gradient(sequence_sum, values, mask, upstream=torch.full((2,), NAN, device=device))
    assert gradient[~mask].eq(0).all()
    assert gradient[mask].isnan().all()


@each_sum
@each_transform
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_sums(function, transform, packed):
    values, minus, weights = (torch.randn(4, 9, dtype=F64) for _ in range(3))
    mask = torch.rand(4, 9) < 0.8
    options = {"minus": minus, "weights": weights, "transform": transform}
    if packed:
        options.update(minus=minus.view(-1), weights=weights.view(-1), cu_seqlens=boundaries([10, 0, 20, 6]))
        values, mask = values.view(-1), mask.view(-1)
    assert torch.autograd.gradcheck(lambda x: function(x, mask, **options), values.requires_grad_())


def test_only_values_get_a_gradient(device):
    values, minus, weights = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(3))
    sequence_sum(values, minus=minus, weights=weights).sum().backward()
    assert values.grad is not None
    assert minus.grad is None and weights.grad is None
    assert not sequence_sum(values.detach(), minus=minus, weights=weights).requires_grad


@each_sum
def test_no_gradient_costs_nothing(device, function, op_log):
    values = torch.randn(3, 8, device=device, requires_grad=True)
    with torch.no_grad():
        assert not function(values).requires_grad
    assert op_log.names() == ["sequence_reduce_fwd"]


def test_the_backward_of_a_sum_cannot_be_differentiated(device):
    values = torch.randn(3, 8, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(sequence_sum(values, transform="exp").sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="sequence_reduce_backward cannot be differentiated twice"):
        gradient.sum().backward()


def test_strides_and_mixed_types(device):
    """Slices as a trainer cuts them, and constants in other types."""
    values, minus, mask = torch.randn(4, 40, device=device), torch.randn(4, 40, device=device), torch.rand(40, 4, device=device)
    mask = mask.T < 0.8
    out = sequence_sum(values[:, 3:], mask[:, 3:], minus=minus.half()[:, 3:])
    assert torch.equal(out, sequence_sum(values[:, 3:].clone(), mask[:, 3:].clone(), minus=minus.half().float()[:, 3:].clone()))


# ---------------------------------------------------------------------------------------------------- spans and places


def test_a_sum_over_a_span(device):
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]], device=device)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]], device=device).bool()
    starts, ends = torch.tensor([1, 4], device=device), torch.tensor([4, 4], device=device)
    assert sequence_sum(values, mask, starts=starts).tolist() == [10, 0]
    assert sequence_sum(values, mask, ends=ends - 1).tolist() == [3, 7]
    assert sequence_mean(values, mask, starts=starts, ends=ends).tolist() == [5, 0]
    _, gradient = sums_and_gradient(sequence_mean, values, mask, starts=starts, ends=ends)
    assert gradient.tolist() == [[0, 0.5, 0, 0.5], [0, 0, 0, 0]]


def test_the_tail_of_ld_dpo(device):
    """Tokens beyond the length that both responses share weigh alpha; only tokens that count are counted."""
    logp = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-1.0, NAN, -4.0, -8.0]], device=device)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]], device=device).bool()
    head = mask.sum(1).min().expand(2)  # 3
    out, gradient = sums_and_gradient(sequence_sum, logp, mask, head=head, tail_weight=0.5)
    assert out.tolist() == [-11, -13 * 2 / 2]
    assert gradient.tolist() == [[1, 1, 1, 0.5], [2, 0, 2, 2]]
    assert torch.equal(sequence_sum(logp, mask, head=head, tail_weight=1.0), sequence_sum(logp, mask))
    assert sequence_sum(logp, mask, head=torch.zeros_like(head).int(), tail_weight=-1.0).tolist() == [15, 13]


def test_the_decay_of_d2po(device):
    """g^t with t = 0 at the first token that counts."""
    values = torch.tensor([[9.0, 1.0, 1.0, 1.0], [1.0, 9.0, 1.0, 9.0]], device=device)
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0]], device=device).bool()
    out, gradient = sums_and_gradient(sequence_sum, values, mask, decay=0.5, upstream=torch.ones(2, device=device))
    assert out.tolist() == [1.75, 1.5]
    assert gradient.tolist() == [[0, 1, 0.5, 0.25], [1, 0, 0.5, 0]]
    assert sequence_sum(values, mask, decay=0.0).tolist() == [1, 1]
    assert torch.equal(sequence_sum(values, mask, decay=1.0), sequence_sum(values, mask))


def test_places_begin_at_the_span(device):
    values, starts = torch.ones(2, 5, device=device), torch.tensor([3, 0], device=device)
    assert sequence_sum(values, starts=starts, decay=0.5).tolist() == [1.5, 1.9375]
    options = {"head": torch.tensor([1, 2], device=device), "tail_weight": 10.0}
    assert sequence_sum(values, starts=starts, **options).tolist() == [11, 32]
    both = sequence_sum(values, starts=starts, decay=0.5, **options)
    assert both.tolist() == [1 + 5, 1.5 + 2.5 + 1.25 + 0.625]


PLACES = {
    "span": {"span"},
    "start": {"starts"},
    "end": {"ends"},
    "head": {"head"},
    "decay": {"decay"},
    "all": {"span", "head", "decay"},
}


@each_dtype
@each_sum
@each_transform
@pytest.mark.parametrize("layout", ["padded", "masked", "packed", "packed and masked"])
@pytest.mark.parametrize("places", PLACES)
def test_spans_and_places(device, dtype, function, transform, layout, places):
    """Rows longer than a tile of any kernel; NaN outside of what counts."""
    skip_float64_on_cuda(device, dtype)
    rows, columns = 5, 1500
    sizes = [1500, 0, 1, 3001, 2998] if "packed" in layout else [columns] * rows
    values, minus, weights = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(3))
    mask = torch.rand(rows, columns, device=device) < 0.7 if "masked" in layout else None
    options = {"transform": transform, "minus": minus, "weights": weights}
    if "packed" in layout:
        values, mask = values.view(-1), None if mask is None else mask.view(-1)
        options |= {"minus": minus.view(-1), "weights": weights.view(-1), "cu_seqlens": boundaries(sizes, device)}
    wanted = PLACES[places]
    starts = torch.tensor([size // 3 for size in sizes], device=device)
    ends = torch.tensor([size - size // 7 for size in sizes], device=device)
    if wanted & {"span", "starts"}:
        options["starts"] = starts
    if wanted & {"span", "ends"}:
        options["ends"] = ends.int()
    if "head" in wanted:
        options |= {"head": torch.tensor([40, 0, 7, 1025, 5000], device=device), "tail_weight": 0.25}
    if "decay" in wanted:
        options["decay"] = 0.999
    out, gradient = sums_and_gradient(function, values, mask, **options)
    leaf = wide(values).requires_grad_()
    exact = {name: on_cpu(wide(t)) for name, t in options.items()}
    expected = getattr(reference, function.__name__)(leaf, on_cpu(mask), **exact)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, torch.arange(1.0, len(expected) + 1, dtype=F64))
    tolerance = 1e-11 if dtype == F64 else 3e-6
    scale = 1 + (leaf - exact["minus"]).exp().mul(exact["weights"]).abs().max().item() if transform == "exp" else 1
    assert_close(out.cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance * 10 * scale)
    if dtype in (F32, F64):
        assert_close(gradient.cpu().double(), expected_gradient, rtol=tolerance, atol=tolerance)
    else:
        assert_close(gradient.cpu(), expected_gradient.to(dtype), rtol=2**-7, atol=1e-6)
    outside = expected_gradient == 0
    poisoned = torch.where(outside.to(device), torch.full_like(values, NAN), values)
    again, _ = sums_and_gradient(function, poisoned, mask, **options)
    assert torch.equal(again.isnan(), torch.zeros_like(again, dtype=torch.bool))


@each_sum
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_spans_and_places(function, packed):
    values, weights, mask = torch.randn(4, 9, dtype=F64), torch.randn(4, 9, dtype=F64), torch.rand(4, 9) < 0.8
    options = {
        "starts": torch.tensor([0, 0, 3, 2]), "ends": torch.tensor([9, 0, 8, 6]), "head": torch.tensor([2, 0, 1, 9]),
        "tail_weight": -0.5, "decay": 0.8, "transform": "exp",
    }  # fmt: skip
    if packed:
        options["cu_seqlens"] = boundaries([10, 0, 20, 6])
        values, weights, mask = values.view(-1), weights.view(-1), mask.view(-1)
    assert torch.autograd.gradcheck(lambda x: function(x, mask, weights=weights, **options), values.requires_grad_())


@given(st.integers(0, 2**31), st.integers(1, 60), st.floats(0, 1), st.floats(-2, 2))
def test_places_are_weights(seed, length, decay, tail):
    """What the kernel does without a tensor of weights is what it does with one."""
    torch.manual_seed(seed)
    values, mask = torch.randn(3, length), torch.rand(3, length) < 0.7
    head = torch.randint(0, length + 1, (3,))
    place = mask.cumsum(1) - 1
    weights = torch.where(place < head[:, None], 1.0, tail) * torch.tensor(decay, dtype=F64) ** place.double()
    out = sequence_sum(values, mask, head=head, tail_weight=tail, decay=decay)
    assert_close(out, sequence_sum(values, mask, weights=weights), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**31), st.integers(0, 40))
def test_a_prefix_and_its_suffix_make_the_sum(seed, cut):
    torch.manual_seed(seed)
    values, mask = torch.randn(2, 40, dtype=F64), torch.rand(2, 40) < 0.7
    at = torch.full((2,), cut)
    parts = sequence_sum(values, mask, ends=at) + sequence_sum(values, mask, starts=at)
    assert_close(parts, sequence_sum(values, mask), rtol=0, atol=1e-12)


def test_the_suffix_behind_the_first_difference(device):
    """Two responses of a search tree: log-ratios from the first token on that differs."""
    a, b = torch.tensor([[7, 8, 3, 4, 2]], device=device), torch.tensor([[7, 8, 5, 2]], device=device)
    k = prefkern.first_divergence(a, b)
    assert k.tolist() == [2]
    logp_a, ref_a = torch.tensor([[0, -1, -0.5, -0.7, -0.2]]).to(device), torch.tensor([[0, -1, -0.6, -0.6, -0.3]]).to(device)
    logp_b, ref_b = torch.tensor([[0, -1, -0.9, -0.4]]).to(device), torch.tensor([[0, -1, -0.8, -0.9]]).to(device)
    close(sequence_sum(logp_a, minus=ref_a, starts=k), [0.1], 1e-6)
    close(sequence_sum(logp_b, minus=ref_b, starts=k), [0.4], 1e-6)
    _, gradient = sums_and_gradient(sequence_sum, logp_a, minus=ref_a, starts=k)
    assert gradient.tolist() == [[0, 0, 1, 1, 1]]


@only_cuda
def test_a_wrong_span_is_nan(device, validation):
    x, starts = torch.randn(4, 8, device=device), torch.tensor([0, 9, -1, 5], device=device)
    ends, head = torch.tensor([8, 8, 8, 4], device=device), torch.tensor([0, 0, 0, 0], device=device)
    out, gradient = sums_and_gradient(sequence_sum, x, starts=starts, ends=ends, head=head, tail_weight=1.0)
    assert out.isnan().tolist() == [False, True, True, True]
    assert torch.equal(gradient.isnan(), out.isnan()[:, None].expand(4, 8))
    assert sequence_sum(x, head=head - 1, tail_weight=1.0).isnan().all()
    validation(True)
    with pytest.raises(ValueError, match=r"starts\[1\] is 9; it must lie in \[0, 8\]"):
        sequence_sum(x, starts=starts, ends=ends)
    with pytest.raises(ValueError, match=r"ends\[0\] is 9; it must lie in \[0, 8\]"):
        sequence_sum(x, ends=ends + 1)
    with pytest.raises(ValueError, match=r"head\[0\] is -1"):
        sequence_sum(x, head=head - 1, tail_weight=1.0)


# ----------------------------------------------------------------------------------------------------------- returns


def test_returns_of_reinforce_plus_plus(device):
    """What comes from behind a token that does not count is not discounted for it."""
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0], [1.0, 1.0, 1.0, NAN], [NAN, NAN, NAN, NAN]], device=device)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], device=device).bool()
    assert discounted_returns(rewards, mask, gamma=0.5).tolist() == [[3, 0, 4, 4], [1.75, 1.5, 1, 0], [0, 0, 0, 0]]
    assert discounted_returns(rewards[1:2, :3], gamma=1.0).tolist() == [[3, 2, 1]]
    assert discounted_returns(rewards[1:2, :3], gamma=0.0).tolist() == [[1, 1, 1]]


def test_the_outcome_reaches_every_token(device):
    """gamma = 1 with a reward at the end: every token's return is the score, as in REINFORCE++-baseline."""
    rewards = torch.zeros(3, 7, device=device)
    lengths = torch.tensor([7, 3, 1], device=device)
    rewards[torch.arange(3, device=device), lengths - 1] = torch.tensor([1.5, -2.0, 0.25], device=device)
    mask = torch.arange(7, device=device) < lengths[:, None]
    expected = torch.where(mask, torch.tensor([[1.5], [-2.0], [0.25]], device=device), 0.0)
    assert torch.equal(discounted_returns(rewards, mask, gamma=1.0), expected)


@pytest.mark.parametrize("layout", ["padded", "masked", "packed", "packed and masked"])
@each_dtype
def test_discounted_returns(device, dtype, layout):
    skip_float64_on_cuda(device, dtype)
    rewards = torch.randn(4, 300, device=device).to(dtype)
    mask, options = None, {}
    if "masked" in layout:
        mask = torch.rand(4, 300, device=device) < 0.6
        mask[1], mask[2, 100:] = False, False
        rewards = rewards.masked_fill(~mask, NAN)
    if "packed" in layout:
        options["cu_seqlens"] = boundaries([0, 1, 500, 0, 127, 128, 129, 315], device)
        rewards, mask = rewards.view(-1), None if mask is None else mask.view(-1)
    for gamma in (0.0, 0.5, 0.97, 1.0):
        out = discounted_returns(rewards, mask, gamma=gamma, **options)
        assert out.dtype == (F64 if dtype == F64 else F32)
        expected = exactly(discounted_returns, rewards, mask, gamma=gamma, **options)
        assert_close(out.cpu().double(), expected, rtol=1e-13 if dtype == F64 else 1e-7, atol=1e-13 if dtype == F64 else 1e-5)
        if mask is not None:
            assert out[~mask].eq(0).all()


def test_a_suffix_sum_of_many_rewards(device):
    """gamma = 1 over a hundred thousand tokens: within rounding of one float of the exact suffix sum."""
    rewards = torch.rand(2, 100_000, device=device)
    exact = rewards.cpu().double().flip(1).cumsum(1).flip(1)
    assert_close(discounted_returns(rewards, gamma=1.0).cpu().double(), exact, rtol=1e-7, atol=0)
    exact = exactly(discounted_returns, rewards[:, -3000:], gamma=0.9999)
    assert_close(discounted_returns(rewards[:, -3000:], gamma=0.9999).cpu().double(), exact, rtol=1e-7, atol=0)


# ------------------------------------------------------------------------------------------------------------------ gae

TPPO_REWARDS, TPPO_VALUES = f64([0, 0, 0, 0], [0, 0, 1, NAN]), f64([0.2, 0.4, 0.1, 0.5], [0.3, 0.6, 0.8, NAN])
TPPO_LENGTHS, TPPO_FINISHED = torch.tensor([4, 3]), torch.tensor([False, True])
TPPO_ADVANTAGES, TPPO_RETURNS = [[0.254, 0.06, 0.4, 0], [0.642, 0.38, 0.2, 0]], [[0.454, 0.46, 0.5, 0.5], [0.942, 0.98, 1, 0]]


@pytest.mark.parametrize("layout", ["lengths", "mask", "packed"])
def test_egae_of_tppo(layout):
    """A sequence that was cut, and one that is finished; nothing behind its end is read."""
    mask = torch.arange(4) < TPPO_LENGTHS[:, None]
    options = {"finished": TPPO_FINISHED, "gamma": 1.0, "lam": 0.9, "bootstrap": "repeat"}
    if layout == "packed":
        out = gae(TPPO_REWARDS[mask], TPPO_VALUES[mask], cu_seqlens=boundaries([4, 3]), **options)
        out = [torch.zeros(2, 4, dtype=F64).masked_scatter(mask, t) for t in out]
    else:
        out = gae(TPPO_REWARDS, TPPO_VALUES, **({"mask": mask} if layout == "mask" else {"lengths": TPPO_LENGTHS}), **options)
    close(out[0], TPPO_ADVANTAGES, 1e-12)
    close(out[1], TPPO_RETURNS, 1e-12)
    assert out[0][0, 3].item() == 0  # exactly: no reward, and the value once more


def test_value_targets_of_tppo():
    """Check 3: the Monte-Carlo return of the finished sequence."""
    close(discounted_returns(TPPO_REWARDS[1:, :3], gamma=1.0), [[1, 1, 1]])


def test_a_cut_sequence_without_rewards_is_a_difference_of_values():
    """gamma = lam = 1: A_t = V_{l-1} - V_t."""
    values = torch.randn(3, 50)
    out = gae(torch.zeros(3, 50), values, finished=torch.zeros(3, dtype=torch.bool), lam=1.0)
    assert_close(out.advantages, values[:, -1:] - values, rtol=0, atol=3e-7)


def test_bootstraps():
    """One token, cut: V behind it is the last value, the critic's, or 0."""
    rewards, values, cut = f64([2.0], [2.0]), f64([5.0], [5.0]), torch.tensor([False, True])
    options = {"gamma": 0.5, "finished": cut}
    close(gae(rewards, values, bootstrap="repeat", **options).advantages, [[2 + 2.5 - 5], [2 - 5]])
    close(gae(rewards, values, bootstrap="zero", **options).advantages, [[2 - 5], [2 - 5]])
    out = gae(rewards, values, bootstrap="critic", last_values=f64(8, NAN), **options)  # of finished ones it is not read
    close(out.advantages, [[2 + 4 - 5], [2 - 5]])
    close(gae(rewards, values, bootstrap="critic", last_values=f64(8, 9), gamma=0.5).advantages, [[-3], [-3]])


@pytest.mark.parametrize("bootstrap", ["repeat", "critic", "zero"])
@pytest.mark.parametrize("layout", ["padded", "lengths", "masked", "packed", "packed and masked"])
@each_dtype
def test_gae(device, dtype, layout, bootstrap):
    skip_float64_on_cuda(device, dtype)
    rewards, values = (torch.randn(6, 200, device=device).to(dtype) for _ in range(2))
    mask, options = None, {"bootstrap": bootstrap}
    lengths = torch.tensor([200, 0, 1, 127, 129, 199], device=device)
    if "masked" in layout:
        mask = torch.rand(6, 200, device=device) < 0.5
        mask[1], mask[2, 30:], mask[3, -3:] = False, False, False
        outside = ~mask
    elif layout == "lengths":
        options["lengths"] = lengths.int()
        outside = torch.arange(200, device=device) >= lengths[:, None]
    else:
        outside = torch.zeros(6, 200, dtype=torch.bool, device=device)
    rewards, values = rewards.masked_fill(outside, NAN), values.masked_fill(outside, INF)
    sequences = 6
    if "packed" in layout:
        options["cu_seqlens"] = boundaries([0, 1, 500, 0, 127, 128, 129, 315], device)
        rewards, values, outside, mask = (None if t is None else t.view(-1) for t in (rewards, values, outside, mask))
        sequences = 8
    options["finished"] = torch.arange(sequences, device=device) % 3 == 1
    if bootstrap == "critic":
        options["last_values"] = torch.randn(sequences, device=device)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.5, 0.0)):
        out = gae(rewards, values, mask, gamma=gamma, lam=lam, **options)
        expected = exactly(gae, rewards, values, mask, gamma=gamma, lam=lam, **options)
        for actual, exact in zip(out, expected, strict=True):
            assert actual.dtype == (F64 if dtype == F64 else F32)
            assert_close(
                actual.cpu().double(), exact, rtol=1e-12 if dtype == F64 else 1e-7, atol=1e-12 if dtype == F64 else 2e-6
            )
            assert actual[outside].eq(0).all()


@given(st.integers(0, 2**31), st.floats(-5, 5), st.integers(1, 40))
def test_a_constant_added_to_the_values(seed, constant, length):
    """With gamma = 1 it leaves cut sequences alone; finished ones shift by -c lam^(l - 1 - t)."""
    torch.manual_seed(seed)
    rewards, values, lam = torch.randn(2, length, dtype=F64), torch.randn(2, length, dtype=F64), 0.9
    finished = torch.tensor([False, True])
    before, after = (gae(rewards, v, finished=finished, lam=lam).advantages for v in (values, values + constant))
    assert_close(after[0], before[0], rtol=0, atol=1e-12)
    shift = -constant * lam ** torch.arange(length - 1, -1, -1, dtype=F64)
    assert_close(after[1], before[1] + shift, rtol=0, atol=1e-12)


def test_gae_without_values_is_discounted_returns(device):
    rewards, mask = torch.randn(3, 90, device=device), torch.rand(3, 90, device=device) < 0.7
    out = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, lam=1.0)
    assert torch.equal(out.advantages, discounted_returns(rewards, mask, gamma=0.9))
    assert torch.equal(out.advantages, out.returns)


def test_nan_in_a_reward_reaches_what_lies_before(device):
    rewards = torch.zeros(2, 300, device=device)
    rewards[1, 140] = NAN
    nan = gae(rewards, torch.zeros_like(rewards)).advantages.isnan()
    assert not nan[0].any()
    assert torch.equal(nan[1], torch.arange(300, device=device) <= 140)


def test_returns_are_constants(device):
    rewards, values = (torch.randn(2, 5, device=device, requires_grad=True) for _ in range(2))
    assert not discounted_returns(rewards, gamma=0.9).requires_grad
    assert not any(t.requires_grad for t in gae(rewards, values))
    row = torch.arange(5, device=device)
    assert not segmented_returns(rewards[0], row // 2, row, gamma=0.9).requires_grad


# ------------------------------------------------------------------------------------------------------ segmented returns


@pytest.mark.parametrize("order", [range(6), (3, 0, 5, 1, 4, 2)], ids=["in order", "mixed"])
def test_step_returns_of_gigpo(order):
    order = list(order)
    rewards, segment = f64(0, 0, 10, 0, 0, 0)[order], torch.tensor([0, 0, 0, 1, 1, 2])[order]
    step = torch.tensor([0, 1, 2, 0, 1, 0])[order]
    expected = f64(9.025, 9.5, 10, 0, 0, 0)[order]
    close(segmented_returns(rewards, segment, step, gamma=0.95), expected, 1e-12)


@each_dtype
@pytest.mark.parametrize("size", [0, 1, 7, 300, 5003])
def test_segmented_returns(device, dtype, size):
    skip_float64_on_cuda(device, dtype)
    rewards = torch.randn(size, device=device).to(dtype)
    segment = (torch.randint(-3, max(1, size // 40), (size,), device=device)) * 2**40
    order = torch.randperm(size, device=device) * 3 - 50
    for gamma in (0.0, 0.95, 1.0):
        out = segmented_returns(rewards, segment, order, gamma=gamma)
        expected = exactly(segmented_returns, rewards, segment, order, gamma=gamma)
        assert out.dtype == (F64 if dtype == F64 else F32)
        assert_close(out.cpu().double(), expected, rtol=1e-13 if dtype == F64 else 1e-7, atol=1e-12 if dtype == F64 else 1e-5)
    assert torch.equal(segmented_returns(rewards, segment, order.int(), gamma=1.0), out)


def test_a_segment_that_is_a_sequence(device):
    rewards = torch.randn(4, 130, device=device)
    segment = torch.arange(4, device=device).repeat_interleave(130)
    order = torch.arange(130, device=device).repeat(4)
    out = segmented_returns(rewards.view(-1), segment, order, gamma=0.9)
    assert torch.equal(out.view(4, 130), discounted_returns(rewards, gamma=0.9))


@only_cuda
def test_a_place_that_occurs_twice_makes_its_segment_nan(device, validation):
    segment, order = torch.arange(12, device=device) // 4, torch.arange(12, device=device)
    order[6] = order[5]
    out = segmented_returns(torch.ones(12, device=device), segment, order, gamma=1.0)
    assert torch.equal(out.isnan(), segment == 1)
    validation(True)
    with pytest.raises(ValueError, match=r"order is 5 in more than one row of segment 1"):
        segmented_returns(torch.ones(12, device=device), segment, order, gamma=1.0)


# ------------------------------------------------------------------------------------------- same bits, however it is run


def everything(device="cpu", rows=37, columns=3001):
    values, rewards, minus, weights = (torch.randn(rows, columns, device=device) for _ in range(4))
    mask = torch.rand(rows, columns, device=device) < 0.9
    row, step = torch.randint(0, 9, (rows,), device=device), torch.randperm(rows, device=device)

    def run():
        out, gradient = sums_and_gradient(sequence_mean, values, mask, minus=minus, weights=weights, transform="exp")
        advantages = gae(rewards, values, mask, finished=row > 4)
        return [out, gradient, *advantages, segmented_returns(rewards[:, 0], row, step, gamma=0.9)]

    return run


def test_same_bits_on_any_number_of_threads(threads):
    run, results = everything(), []
    for n in (1, 2, 2):
        threads(n)
        results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@only_cuda
def test_same_bits_every_time_and_in_a_graph(device):
    run = everything(device)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


INSTRUCTION_SETS = """
import json, torch, prefkern
torch.manual_seed(0)
values, minus, weights = (torch.randn(4, 1001) for _ in range(3))
mask = torch.rand(4, 1001) < 0.8
results = []
for transform in ("none", "exp"):
    out = prefkern.sequence_mean(values.requires_grad_(), mask, minus=minus, weights=weights, transform=transform)
    (gradient,) = torch.autograd.grad(out.sum(), values)
    results += [*out.tolist(), *gradient.flatten()[::17].tolist()]
print(json.dumps([prefkern.capabilities()["cpu_isa"], results]))
"""


@pytest.mark.slow
def test_every_instruction_set_agrees(run_python):
    """Vectors of 4, 8 and 16 floats."""
    results = {}
    for isa in prefkern.capabilities()["cpu_isas"][:3]:
        used, values = json.loads(run_python(INSTRUCTION_SETS, PREFKERN_CPU_ISA=isa).splitlines()[-1])
        results[used] = torch.tensor(values, dtype=F64)
    assert "base" in results
    for values in results.values():
        assert_close(values, results["base"], rtol=2e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_opcheck(device, dtype):
    skip_float64_on_cuda(device, dtype)
    x, y, w = (torch.randn(3, 8, device=device, dtype=dtype) for _ in range(3))
    mask, cu = torch.rand(3, 8, device=device) < 0.7, boundaries([5, 0, 19], device)
    leaf = x.clone().requires_grad_()
    opcheck(OPS.sequence_reduce.default, (leaf, mask, None, y, w, 1, True))
    opcheck(OPS.sequence_reduce.default, (leaf.view(-1), None, cu, None, None, 0, False))
    opcheck(OPS.sequence_reduce_backward.default, (x[:, 0].clone(), x, mask, None, y, w, 1, True))
    spans = (
        torch.tensor([0, 2, 8], device=device),
        torch.tensor([8, 7, 8], device=device),
        torch.tensor([1, 2, 0], device=device),
    )
    opcheck(OPS.sequence_reduce.default, (leaf, mask, None, y, w, 1, True, *spans, 0.5, 0.9))
    opcheck(OPS.sequence_reduce_backward.default, (x[:, 0].clone(), x, mask, None, y, w, 1, True, *spans, 0.5, 0.9))
    opcheck(OPS.discounted_returns.default, (x, mask, None, 0.9))
    opcheck(OPS.discounted_returns.default, (x.view(-1), None, cu, 0.9))
    lengths, finished = torch.tensor([8, 0, 3], device=device), torch.tensor([True, False, False], device=device)
    opcheck(OPS.gae.default, (x, y, None, lengths, None, finished, w[:, 0].clone(), 0.9, 0.8, 1))
    opcheck(OPS.gae.default, (x.view(-1), y.view(-1), mask.view(-1), None, cu, finished, None, 0.9, 0.8, 0))
    row = torch.arange(8, device=device)
    opcheck(OPS.segmented_returns.default, (x[0], row % 3, row, 0.9))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_tokens(device, dynamic):
    """fullgraph, four sizes, at most two compilations (the second has symbolic sizes)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, y, mask, cu, row):
        score = sequence_mean(x, mask, minus=y, transform="exp")
        packed = sequence_sum(x.view(-1), cu_seqlens=cu)
        score = score + sequence_sum(x, mask, starts=row % 3, head=row, tail_weight=0.5, decay=0.9)
        estimate = gae(x, y, mask, finished=row % 2 == 0, lam=0.9)
        together = discounted_returns(x, mask, gamma=0.9) + estimate.advantages
        return score.sum() + packed.sum(), together, segmented_returns(x[:, 0], row % 2, row, gamma=0.5)

    run = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows, columns in ((4, 7), (5, 12), (6, 30), (7, 31)):
        x = torch.randn(rows, columns, device=device)
        y, mask = torch.randn_like(x), torch.rand(rows, columns, device=device) < 0.7
        arguments = (y, mask, boundaries([columns] * rows, device), torch.arange(rows, device=device))
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled, eager = run(leaf, *arguments), step(other, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
        compiled[0].backward()
        eager[0].backward()
        assert torch.equal(leaf.grad, other.grad)
    assert counter.frame_count <= 2


def test_meta_tensors():
    x, row = torch.empty(3, 5, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    assert sequence_sum(x).shape == (3,)
    assert sequence_mean(x.view(-1), cu_seqlens=torch.empty(7, dtype=torch.int32, device="meta")).shape == (6,)
    assert [t.shape for t in gae(x.bfloat16(), x)] == [(3, 5)] * 2
    assert gae(x.bfloat16(), x).returns.dtype == F32
    assert discounted_returns(x.half(), gamma=1.0).dtype == F32
    assert segmented_returns(x[:, 0], row, row, gamma=1.0).device.type == "meta"


# --------------------------------------------------------------------------------------------------------------- errors

X, MASK = torch.zeros(2, 3), torch.ones(2, 3).bool()


def cu(*ends):
    return torch.tensor(ends, dtype=torch.int32)


LAYOUTS = {
    "mask float": (dict(mask=X), TypeError, r"mask has dtype Float; accepted: bool"),
    "mask shape": (dict(mask=MASK[:1]), ValueError, r"mask has shape \[1, 3\]; NAME has shape \[2, 3\]"),
    "mask list": (dict(mask=[[True]]), TypeError, r"mask is a list; a torch\.Tensor"),
    "cu_seqlens padded": (dict(cu_seqlens=cu(0, 3, 6)), ValueError, r"NAME has shape \[2, 3\]; with cu_seqlens \[N\]"),
    "cu_seqlens list": (dict(cu_seqlens=[0, 6]), TypeError, r"cu_seqlens is a list"),
    "cu_seqlens int64": (dict(NAME=X.view(-1), cu_seqlens=cu(0, 6).long()), TypeError, r"cu_seqlens has dtype Long.*int32"),
    "cu_seqlens end": (dict(NAME=X.view(-1), cu_seqlens=cu(0, 3, 5)), ValueError, r"cu_seqlens ends at 5; NAME has 6 tokens"),
    "cu_seqlens descends": (dict(NAME=X.view(-1), cu_seqlens=cu(0, 7, 6)), ValueError, r"cu_seqlens\[2\] is 6 after 7"),
    "cu_seqlens alone": (dict(NAME=X.view(-1), cu_seqlens=cu(0)), ValueError, r"cu_seqlens ends at 0; NAME has 6 tokens"),
    "1-d": (dict(NAME=X[0]), ValueError, r"NAME has shape \[3\]; expected \[B, T\], or \[N\] with cu_seqlens"),
    "int": (dict(NAME=X.long()), TypeError, r"NAME has dtype Long.*float32"),
    "list": (dict(NAME=[[1.0]]), TypeError, r"NAME is a list; a torch\.Tensor"),
}
SUMS = {
    "minus shape": (dict(minus=X[:1]), ValueError, r"minus has shape \[1, 3\]; values has shape \[2, 3\]"),
    "minus int": (dict(minus=X.long()), TypeError, r"minus has dtype Long"),
    "minus number": (dict(minus=1.0), TypeError, r"minus is a float; a torch\.Tensor"),
    "minus device": (dict(minus=X.to("meta")), ValueError, r"minus is on meta but values is on cpu"),
    "weights shape": (dict(weights=X[0]), ValueError, r"weights has shape \[3\]; values has shape \[2, 3\]"),
    "weights bool": (dict(weights=MASK), TypeError, r"weights has dtype Bool"),
    "starts float": (dict(starts=torch.zeros(2)), TypeError, r"starts has dtype Float; accepted: int64, int32"),
    "starts shape": (dict(starts=torch.zeros(3).long()), ValueError, r"starts has shape \[3\]; expected \[2\] \(one per"),
    "starts far": (dict(starts=torch.tensor([0, 4])), ValueError, r"starts\[1\] is 4; it must lie in \[0, 3\]"),
    "starts negative": (dict(starts=torch.tensor([-1, 0])), ValueError, r"starts\[0\] is -1"),
    "starts behind ends": (
        dict(starts=torch.tensor([0, 3]), ends=torch.tensor([3, 2])), ValueError, r"starts\[1\] is 3; it must lie in \[0, 2\]"
    ),
    "starts number": (dict(starts=1), TypeError, r"starts is a int; a torch\.Tensor"),
    "starts device": (dict(starts=torch.zeros(2).long().to("meta")), ValueError, r"starts is on meta but values is on cpu"),
    "ends far": (dict(ends=torch.tensor([4, 0])), ValueError, r"ends\[0\] is 4; it must lie in \[0, 3\]"),
    "ends bool": (dict(ends=torch.ones(2).bool()), TypeError, r"ends has dtype Bool"),
    "head negative": (dict(head=torch.tensor([1, -2]), tail_weight=1.0), ValueError, r"head\[1\] is -2; it must not be"),
    "head alone": (dict(head=torch.tensor([1, 2])), ValueError, r"head is given but tail_weight is None"),
    "tail_weight alone": (dict(tail_weight=0.5), ValueError, r"tail_weight is given but head is None"),
    "tail_weight inf": (dict(head=torch.tensor([1, 2]), tail_weight=INF), ValueError, r"tail_weight is inf; it must be finite"),
    "tail_weight string": (dict(head=torch.tensor([1, 2]), tail_weight="1"), TypeError, r"tail_weight is '1'; a number"),
    "decay": (dict(decay=1.5), ValueError, r"decay is 1\.5; it must lie in \[0, 1\]"),
    "decay nan": (dict(decay=NAN), ValueError, r"decay is nan"),
    "transform": (dict(transform="log"), ValueError, r"transform is 'log'; accepted: 'none', 'exp'"),
}  # fmt: skip
FACTORS = {
    "gamma negative": (dict(gamma=-0.1), ValueError, r"gamma is -0\.1; it must lie in \[0, 1\]"),
    "gamma large": (dict(gamma=1.5), ValueError, r"gamma is 1\.5; it must lie in \[0, 1\]"),
    "gamma nan": (dict(gamma=NAN), ValueError, r"gamma is nan"),
    "gamma string": (dict(gamma="1"), TypeError, r"gamma is '1'; a number"),
}
CRITIC = dict(bootstrap="critic", last_values=torch.zeros(2))
GAE = {
    "values shape": (dict(values=X[:1]), ValueError, r"values has shape \[1, 3\]; rewards has shape \[2, 3\]"),
    "values int": (dict(values=X.long()), TypeError, r"values has dtype Long"),
    "values device": (dict(values=X.to("meta")), ValueError, r"values is on meta but rewards is on cpu"),
    "lam": (dict(lam=1.01), ValueError, r"lam is 1\.01; it must lie in \[0, 1\]"),
    "bootstrap": (dict(bootstrap="mean"), ValueError, r"bootstrap is 'mean'; accepted: 'repeat', 'critic', 'zero'"),
    "no last_values": (dict(bootstrap="critic"), ValueError, r"last_values is None; bootstrap 'critic' needs it"),
    "last_values": (dict(last_values=torch.zeros(2)), ValueError, r"last_values is given; it belongs to bootstrap 'critic'"),
    "last_values shape": (
        {**CRITIC, "last_values": X}, ValueError, r"last_values has shape \[2, 3\]; expected \[2\] \(one per sequence\)"
    ),
    "last_values int": ({**CRITIC, "last_values": torch.zeros(2).long()}, TypeError, r"last_values has dtype Long"),
    "finished float": (dict(finished=torch.zeros(2)), TypeError, r"finished has dtype Float; accepted: bool"),
    "finished shape": (dict(finished=MASK[0]), ValueError, r"finished has shape \[3\]; expected \[2\]"),
    "finished list": (dict(finished=[True, True]), TypeError, r"finished is a list"),
    "lengths float": (dict(lengths=torch.ones(2)), TypeError, r"lengths has dtype Float; accepted: int64, int32"),
    "lengths shape": (dict(lengths=torch.ones(3).long()), ValueError, r"lengths has shape \[3\]"),
    "lengths long": (dict(lengths=torch.tensor([3, 4])), ValueError, r"lengths\[1\] is 4; it must lie in \[0, 3\]"),
    "lengths negative": (dict(lengths=torch.tensor([-1, 3])), ValueError, r"lengths\[0\] is -1"),
    "lengths and mask": (dict(lengths=torch.tensor([3, 3]), mask=MASK), ValueError, r"lengths is given with a mask"),
    "lengths packed": (
        dict(rewards=X.view(-1), values=X.view(-1), cu_seqlens=cu(0, 3, 6), lengths=torch.tensor([3, 3, 3, 3, 3, 3])),
        ValueError,
        r"lengths is given with cu_seqlens",
    ),
}  # fmt: skip
SEGMENTS = {
    "rewards 2-d": (dict(rewards=X), ValueError, r"rewards has shape \[2, 3\]; expected \[B\]"),
    "rewards int": (dict(rewards=X[0].long()), TypeError, r"rewards has dtype Long"),
    "segment float": (dict(segment=X[0]), TypeError, r"segment has dtype Float; accepted: int64, int32"),
    "segment length": (dict(segment=torch.zeros(2).long()), ValueError, r"segment has shape \[2\].*\[3\]"),
    "segment list": (dict(segment=[0, 0, 0]), TypeError, r"segment is a list"),
    "order float": (dict(order=X[0]), TypeError, r"order has dtype Float; accepted: int64, int32"),
    "order length": (dict(order=torch.zeros(2).long()), ValueError, r"order has shape \[2\].*\[3\]"),
    "order device": (dict(order=torch.zeros(3).long().to("meta")), ValueError, r"order is on meta but rewards is on cpu"),
    "order twice": (dict(order=torch.tensor([2, 1, 1])), ValueError, r"order\[\d\] is 1, as in another row of its segment"),
}
ROWS = {"rewards": X[0], "segment": torch.zeros(3).long(), "order": torch.arange(3), "gamma": 1.0}


def cases(function, first, good, *tables):
    for table in tables:
        for name, (wrong, error, message) in table.items():
            arguments = {**good, **{first if key == "NAME" else key: value for key, value in wrong.items()}}
            if "NAME" in wrong and function is gae and isinstance(arguments["rewards"], torch.Tensor):
                arguments["values"] = arguments["rewards"].float()
            yield pytest.param(function, arguments, error, message.replace("NAME", first), id=f"{function.__name__}: {name}")


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        *cases(sequence_sum, "values", {"values": X}, LAYOUTS, SUMS),
        *cases(sequence_mean, "values", {"values": X}, LAYOUTS, SUMS),
        *cases(discounted_returns, "rewards", {"rewards": X, "gamma": 1.0}, LAYOUTS, FACTORS),
        *cases(gae, "rewards", {"rewards": X, "values": X}, LAYOUTS, FACTORS, GAE),
        *cases(segmented_returns, "rewards", ROWS, FACTORS, SEGMENTS),
    ],
)
def test_errors(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)


def test_the_ops_themselves_refuse_unknown_options():
    with pytest.raises(RuntimeError, match="transform is 2; accepted: 0, 1"):
        OPS.sequence_reduce(X, None, None, None, None, 2, False)
    with pytest.raises(RuntimeError, match="values has dtype BFloat16; accepted: float32"):
        OPS.sequence_reduce(X.bfloat16(), None, None, None, None, 0, False)
    with pytest.raises(RuntimeError, match=r"g has shape \[3\]; expected \[2\]"):
        OPS.sequence_reduce_backward(torch.zeros(3), X, None, None, None, None, 0, False)
    with pytest.raises(RuntimeError, match="bootstrap is 3; accepted: 0 to 2"):
        OPS.gae(X, X, None, None, None, None, None, 1.0, 1.0, 3)


@only_cuda
@pytest.mark.parametrize("ends", [[0, 4, 9], [1, 4, 8], [0, 5, 4, 8], [0, 4, 7], [0, -3, 8]])
def test_a_wrong_layout_is_nan(device, validation, ends):
    x, cu_seqlens = torch.randn(8, device=device), torch.tensor(ends, dtype=torch.int32, device=device)
    out, gradient = sums_and_gradient(sequence_sum, x, cu_seqlens=cu_seqlens)
    results = [out, gradient, *gae(x, x, cu_seqlens=cu_seqlens), discounted_returns(x, gamma=1.0, cu_seqlens=cu_seqlens)]
    assert all(t.isnan().all() for t in results)
    validation(True)
    for function in (sequence_sum, lambda t, **k: gae(t, t, **k), lambda t, **k: discounted_returns(t, gamma=1.0, **k)):
        with pytest.raises(ValueError, match=r"cu_seqlens is \["):
            function(x, cu_seqlens=cu_seqlens)


@only_cuda
def test_a_wrong_length_is_nan(device, validation):
    x, lengths = torch.randn(3, 5, device=device), torch.tensor([5, 6, -1], device=device)
    assert gae(x, x, lengths=lengths).advantages.isnan().all(1).tolist() == [False, True, True]
    validation(True)
    with pytest.raises(ValueError, match=r"lengths\[1\] is 6"):
        gae(x, x, lengths=lengths)
