"""Means over steps and masked pooling against their float64 definitions and worked numbers, and everything they must
refuse."""

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
from prefkern import masked_mean_pool, reference, sequence_mean, step_mean

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern

only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
each_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")


def with_gradient(function, values, *args, **options):
    """Results, and the gradient of the means times 1, 2, 3, ..."""
    leaf = values.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(leaf, *args, **options)
    means = out.means if isinstance(out, tuple) else out
    upstream = torch.arange(1.0, means.numel() + 1, device=means.device, dtype=means.dtype).reshape(means.shape)
    (gradient,) = torch.autograd.grad(means, leaf, upstream)
    return means.detach(), gradient, out.counts if isinstance(out, tuple) else None


def test_steps_of_a_tree(device):
    """Log-ratios of two responses with two steps each, and their hidden states; padding holds garbage."""
    rho = torch.tensor([[0.2, 0.4, -0.1, 0.3], [0.1, -0.2, -0.6, 9]], device=device)
    ids = torch.tensor([[1, 1, 2, 2], [1, 2, 2, 0]], device=device)
    means, gradient, counts = with_gradient(step_mean, rho, ids, 2)
    assert_close(means.cpu(), torch.tensor([[0.3, 0.1], [0.1, -0.4]]))
    assert counts.tolist() == [[2, 2], [1, 2]]
    assert gradient.tolist() == [[0.5, 0.5, 1, 1], [3, 2, 2, 0]]
    hidden = torch.tensor([[[1, 0], [0, 1], [1, 1], [2, 0]], [[1, 0], [1, 0], [0, 2], [NAN, NAN]]], device=device).float()
    means, gradient, _ = with_gradient(step_mean, hidden, ids.int(), 2)
    assert means.tolist() == [[[0.5, 0.5], [1.5, 0.5]], [[1, 0], [0.5, 1]]]
    assert gradient[1].tolist() == [[5, 6], [3.5, 4], [3.5, 4], [0, 0]]
    cosine = torch.nn.functional.cosine_similarity(means[1], means[0], dim=-1)
    assert_close((1 + cosine).cpu(), torch.full((2,), 1.707106781))  # the step weights of TPO


def test_surplus_steps_join_the_last_common_one(device):
    values, ids = torch.tensor([[1.0, 2.0, 3.0, 6.0]], device=device), torch.tensor([[1, 2, 3, 4]], device=device)
    means, counts = step_mean(values, ids, 2, clamp=True)
    assert means.tolist() == [[1, 11 / 3]] or means[0, 1].item() == pytest.approx(11 / 3)
    assert counts.tolist() == [[1, 3]]


def test_a_step_that_is_not_there(device):
    means, gradient, counts = with_gradient(
        step_mean, torch.ones(2, 3, device=device), torch.tensor([[1, 3, 3], [0, 0, 0]]).to(device), 3
    )
    assert means.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert counts.tolist() == [[1, 0, 2], [0, 0, 0]]
    assert gradient.tolist() == [[1, 1.5, 1.5], [0, 0, 0]]


def test_pooling(device):
    hidden = torch.tensor([[[1.0, 0], [0, 1]], [[2, -1], [NAN, INF]], [[NAN] * 2] * 2], device=device)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]], device=device).bool()
    out, gradient, _ = with_gradient(masked_mean_pool, hidden, mask)
    assert out.tolist() == [[0.5, 0.5], [2, -1], [0, 0]]
    assert gradient.tolist() == [[[0.5, 1], [0.5, 1]], [[3, 4], [0, 0]], [[0, 0], [0, 0]]]
    packed = masked_mean_pool(hidden.view(-1, 2), mask.view(-1), cu_seqlens=boundaries([2, 2, 2], device))
    assert torch.equal(packed, out)
    assert masked_mean_pool(hidden[:1]).tolist() == [[0.5, 0.5]]


@each_dtype
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("features", [None, 1, 7, 40, 1300])
@pytest.mark.parametrize("steps", [1, 4])
def test_means(device, dtype, layout, features, steps):
    """Around a vector, a task and a tile; runs of a step longer than one that is added up at once, and single tokens."""
    skip_float64_on_cuda(device, dtype)
    values = torch.randn(4, 150, *([] if features is None else [features]), device=device).to(dtype)
    ids = torch.randint(0, steps + 1, (4, 150), device=device)
    ids[0], ids[1], ids[2, :100], ids[3] = 1, 0, steps, ids[3].sort().values
    values[ids == 0] = NAN
    options = {}
    if layout == "packed":
        values, ids = values.flatten(0, 1), ids.view(-1)
        options["cu_seqlens"] = boundaries([200, 0, 1, 150, 249], device)
    means, gradient, counts = with_gradient(step_mean, values, ids, steps, **options)
    assert means.dtype == (F64 if dtype == F64 else F32) and gradient.dtype == dtype and gradient.shape == values.shape
    options = {name: t.cpu() for name, t in options.items()}
    expected, expected_gradient, expected_counts = with_gradient(
        reference.step_mean, values.cpu().double(), ids.cpu(), steps, **options
    )
    assert_close(means.cpu().double(), expected, rtol=0, atol=1e-13 if dtype == F64 else 4e-7)
    assert torch.equal(counts.cpu(), expected_counts)
    tolerance = {F64: 1e-13, F32: 2e-7, BF16: 2**-8, F16: 2**-10}[dtype]
    assert_close(gradient.cpu().double(), expected_gradient, rtol=tolerance, atol=0)
    assert gradient[ids == 0].eq(0).all()
    if steps == 1 and features is not None:
        pooled = masked_mean_pool(values, ids == 1, **{name: t.to(device) for name, t in options.items()})
        assert torch.equal(pooled, means[:, 0])


def test_a_long_mean_loses_nothing(device):
    values = 1000 + torch.randn(1, 200_000, 2, device=device)
    exact = values.cpu().double().mean(1)
    assert_close(masked_mean_pool(values).cpu().double(), exact, rtol=2e-7, atol=0)


def test_slices_are_read_where_they_lie(device, allocations):
    """No copy of a slice of the hidden states, forward or backward: the gradient is all there is."""
    memory = torch.randn(4, 101, 512, device=device).bfloat16()
    mask = torch.rand(4, 100, device=device) < 0.7
    for hidden in (memory[:, 1:], memory[:, :-1, 64:448], memory.transpose(0, 1)[:4, :4].transpose(0, 1)):
        here = mask[:, : hidden.shape[1]]
        measured = allocations(lambda hidden=hidden, here=here: masked_mean_pool(hidden, here))
        assert torch.equal(measured.result, masked_mean_pool(hidden.contiguous(), here))
        assert measured.peak <= hidden.shape[0] * (hidden.shape[2] * 4 + hidden.shape[1] + 8) + 2048  # the result, a mask
    leaf = memory[:, 1:].detach().requires_grad_()
    out = masked_mean_pool(leaf, mask)
    measured = allocations(lambda: torch.autograd.grad(out.sum(), leaf))
    assert measured.peak < 1.2 * leaf.numel() * 2
    odd = memory.transpose(1, 2)[:, :300]  # features that are not adjacent are copied
    assert torch.equal(masked_mean_pool(odd), masked_mean_pool(odd.contiguous()))


def test_nan_stays_in_its_step(device):
    values, ids = torch.randn(3, 40, 8, device=device), torch.arange(40, device=device).expand(3, 40) // 10
    values[1, 15, 3] = NAN
    means = step_mean(values, ids, 3).means
    assert means.isnan().nonzero().tolist() == [[1, 0, 3]]
    leaf = torch.randn(1, 4, device=device, requires_grad=True)
    out = step_mean(leaf, torch.tensor([[0, 1, 2, 2]], device=device), 2).means
    (gradient,) = torch.autograd.grad(out, leaf, torch.tensor([[NAN, 1]], device=device))
    assert gradient.isnan().tolist() == [[False, True, False, False]]
    assert gradient[0, 0].item() == 0


@pytest.mark.parametrize("features", [[], [3]])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(features, packed):
    values, ids = torch.randn(3, 8, *features, dtype=F64), torch.randint(0, 4, (3, 8))
    options = {"clamp": True}
    if packed:
        values, ids, options = values.flatten(0, 1), ids.view(-1), {"clamp": True, "cu_seqlens": boundaries([5, 0, 19])}
    assert torch.autograd.gradcheck(lambda x: step_mean(x, ids, 2, **options).means, values.requires_grad_())


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 5))
def test_properties(seed, length, steps):
    """Means of a constant are it; the gradient of their sum sums to the number of steps that are there; order does not
    matter; one step is the mean of the sequence."""
    torch.manual_seed(seed)
    ids, values = torch.randint(0, steps + 1, (2, length)), torch.randn(2, length, dtype=F64, requires_grad=True)
    means, counts = step_mean(values, ids, steps)
    assert torch.equal(step_mean(torch.full_like(values, 3), ids, steps).means, (counts > 0) * F64_3)
    (gradient,) = torch.autograd.grad(means.sum(), values)
    assert_close(gradient.sum(1), (counts > 0).sum(1).double(), rtol=0, atol=1e-12)
    order = torch.randperm(length)
    assert_close(step_mean(values[:, order], ids[:, order], steps).means, means, rtol=0, atol=1e-12)
    assert_close(step_mean(values, ids, 1, clamp=True).means[:, 0], sequence_mean(values, ids > 0), rtol=0, atol=1e-12)
    assert counts.sum().item() == (ids > 0).sum().item()


F64_3 = torch.tensor(3.0, dtype=F64)


def test_no_gradient_costs_nothing(device, op_log):
    hidden, mask = torch.randn(2, 3, 4, device=device, requires_grad=True), torch.ones(2, 3, device=device).bool()
    with torch.no_grad():
        assert not masked_mean_pool(hidden, mask).requires_grad
    assert op_log.names() == ["step_pool_fwd"]


def test_hidden_states_are_not_kept(device):
    """The gradient is made of ids, counts and what comes from upstream."""
    hidden, saved = torch.randn(2, 3, 64, device=device, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        masked_mean_pool(hidden, torch.ones(2, 3, device=device).bool())
    assert saved and max(saved) <= 6


def test_the_backward_cannot_be_differentiated(device):
    values = torch.randn(3, 8, device=device, requires_grad=True)
    out = step_mean(values, torch.ones(3, 8, device=device).long(), 1).means
    (gradient,) = torch.autograd.grad(out.sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="step_pool_backward cannot be differentiated twice"):
        gradient.sum().backward()


def test_counts_have_no_gradient(device):
    values = torch.randn(3, 8, device=device, requires_grad=True)
    assert not step_mean(values, torch.ones(3, 8, device=device).long(), 1).counts.requires_grad


# ------------------------------------------------------------------------------------------- same bits, however it is run


def test_same_bits_on_any_number_of_threads(threads):
    hidden, ids, results = torch.randn(3, 700, 1500).bfloat16(), torch.randint(0, 5, (3, 700)), []
    for n in (1, 2, 2):
        threads(n)
        results.append(with_gradient(step_mean, hidden, ids, 4))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@only_cuda
def test_same_bits_every_time_and_in_a_graph(device):
    hidden, ids = torch.randn(3, 700, 1500, device=device).bfloat16(), torch.randint(0, 5, (3, 700), device=device)
    first = with_gradient(step_mean, hidden, ids, 4)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, with_gradient(step_mean, hidden, ids, 4), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradient(step_mean, hidden, ids, 4)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


INSTRUCTION_SETS = """
import json, torch, prefkern
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    hidden = torch.randn(3, 90, 37).to(dtype).requires_grad_()
    means, counts = prefkern.step_mean(hidden, torch.randint(0, 4, (3, 90)), 3)
    (gradient,) = torch.autograd.grad(means.square().sum(), hidden)
    results += [*means.flatten().tolist(), *gradient.float().flatten()[::17].tolist()]
print(json.dumps([prefkern.capabilities()["cpu_isa"], results]))
"""


@pytest.mark.slow
def test_every_instruction_set_agrees(run_python):
    """Vectors of 4, 8 and 16 floats add and divide alike: the same bits."""
    results = {}
    for isa in prefkern.capabilities()["cpu_isas"]:
        used, values = json.loads(run_python(INSTRUCTION_SETS, PREFKERN_CPU_ISA=isa).splitlines()[-1])
        results[used] = values
    assert "base" in results
    for values in results.values():
        assert values == results["base"]


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
def test_opcheck(device, dtype):
    skip_float64_on_cuda(device, dtype)
    x, ids = torch.randn(3, 8, 4, device=device).to(dtype), torch.randint(0, 3, (3, 8), device=device)
    cu, leaf = boundaries([5, 0, 19], device), x.clone().requires_grad_()
    means, counts = step_mean(x, ids, 2)
    kind = [F32, BF16, F16, F64].index(dtype)
    opcheck(OPS.step_pool.default, (leaf, ids, None, 2, False))
    opcheck(OPS.step_pool.default, (leaf.view(24, 4), ids.view(24) > 0, cu, 1, False))
    opcheck(OPS.step_pool.default, (leaf[..., 0], ids.int(), None, 1, True))
    opcheck(OPS.step_pool_backward.default, (means.clone(), counts, ids, None, False, kind))
    opcheck(OPS.step_pool_backward.default, (means[..., 0].clone(), counts, ids, None, False, kind))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_tokens(device, dynamic):
    """fullgraph, four sizes, at most two compilations (the second has symbolic sizes)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, ids, cu):
        means, counts = step_mean(x, ids, 3)
        ratios = step_mean(x[..., 0], ids, 2, clamp=True).means
        pooled = masked_mean_pool(x.flatten(0, 1), ids.view(-1) > 0, cu_seqlens=cu)
        return means.square().sum() + pooled.sum() + ratios.sum() + masked_mean_pool(x).sum(), counts

    run = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows, columns in ((4, 7), (5, 12), (6, 30), (7, 31)):
        x, ids = torch.randn(rows, columns, 6, device=device), torch.randint(0, 4, (rows, columns), device=device)
        arguments = (ids, boundaries([columns] * rows, device))
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled, eager = run(leaf, *arguments), step(other, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
        compiled[0].backward()
        eager[0].backward()
        assert torch.equal(leaf.grad, other.grad)
    assert counter.frame_count <= 2


def test_meta_tensors():
    x, ids = torch.empty(3, 5, 6, device="meta", dtype=BF16), torch.empty(3, 5, dtype=torch.int64, device="meta")
    means, counts = step_mean(x, ids, 4)
    assert means.shape == (3, 4, 6) and means.dtype == F32
    assert counts.shape == (3, 4) and counts.dtype == torch.int64
    assert step_mean(x[..., 0], ids, 4).means.shape == (3, 4)
    cu = torch.empty(8, dtype=torch.int32, device="meta")
    assert masked_mean_pool(x.view(15, 6), cu_seqlens=cu).shape == (7, 6)


# --------------------------------------------------------------------------------------------------------------- errors

X, IDS, MASK = torch.zeros(2, 3, 4), torch.ones(2, 3).long(), torch.ones(2, 3).bool()
STEP, POOL = {"values": X, "step_ids": IDS, "n_steps": 2}, {"hidden": X, "mask": MASK}
ERRORS = {
    "values list": (step_mean, dict(values=[[1.0]]), TypeError, r"values is a list; a torch\.Tensor"),
    "values int": (step_mean, dict(values=X.long()), TypeError, r"values has dtype Long.*float32"),
    "values shape": (step_mean, dict(values=X[:, :2]), ValueError, r"values has shape \[2, 2, 4\]; step_ids has shape"),
    "values 4-d": (step_mean, dict(values=X[..., None]), ValueError, r"values has shape \[2, 3, 4, 1\]"),
    "ids float": (step_mean, dict(step_ids=X[..., 0]), TypeError, r"step_ids has dtype Float; accepted: int64, int32"),
    "ids bool": (step_mean, dict(step_ids=MASK), TypeError, r"step_ids has dtype bool; accepted: int64, int32"),
    "ids 1-d": (step_mean, dict(step_ids=IDS[0]), ValueError, r"step_ids has shape \[3\]; expected \[B, T\], or \[N\]"),
    "ids large": (step_mean, dict(step_ids=3 * IDS), ValueError, r"step_ids\[0\] of the flattened tokens is 3; accepted: 0"),
    "ids negative": (step_mean, dict(step_ids=-IDS, clamp=True), ValueError, r"step_ids\[0\].*is -1; accepted.*and above"),
    "ids device": (step_mean, dict(step_ids=IDS.to("meta")), ValueError, r"step_ids is on meta but values is on cpu"),
    "n_steps 0": (step_mean, dict(n_steps=0), ValueError, r"n_steps is 0; it must be positive"),
    "n_steps float": (step_mean, dict(n_steps=2.0), TypeError, r"n_steps is 2\.0; an integer"),
    "n_steps tensor": (step_mean, dict(n_steps=IDS.max()), TypeError, r"n_steps is tensor\(1\); an integer"),
    "clamp": (step_mean, dict(clamp=1), TypeError, r"clamp is 1; a bool"),
    "cu list": (step_mean, dict(cu_seqlens=[0, 6]), TypeError, r"cu_seqlens is a list"),
    "cu padded": (step_mean, dict(cu_seqlens=boundaries([3, 3])), ValueError, r"step_ids has shape \[2, 3\]; with cu_seqlens"),
    "cu end": (
        step_mean, dict(values=X.view(6, 4), step_ids=IDS.view(6), cu_seqlens=boundaries([3, 2])), ValueError,
        r"cu_seqlens ends at 5; step_ids has 6 tokens",
    ),
    "hidden 2-d": (masked_mean_pool, dict(hidden=X[..., 0]), ValueError, r"hidden has shape \[2, 3\]; expected \[B, T, H\]"),
    "hidden packed": (
        masked_mean_pool, dict(hidden=X, cu_seqlens=boundaries([3, 3])), ValueError, r"hidden has shape \[2, 3, 4\]; expected"
    ),
    "hidden int": (masked_mean_pool, dict(hidden=X.long()), TypeError, r"hidden has dtype Long"),
    "mask float": (masked_mean_pool, dict(mask=X[..., 0]), TypeError, r"mask has dtype float32; accepted: bool"),
    "mask shape": (masked_mean_pool, dict(mask=MASK[:1]), ValueError, r"mask has shape \[1, 3\]; hidden has shape \[2, 3"),
    "mask list": (masked_mean_pool, dict(mask=[[True]]), TypeError, r"mask is a list"),
    "mask device": (masked_mean_pool, dict(mask=MASK.to("meta")), ValueError, r"mask is on meta but hidden is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "wrong", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(function, wrong, error, message):
    with pytest.raises(error, match=message):
        function(**{**(STEP if function is step_mean else POOL), **wrong})


def test_the_ops_themselves_refuse():
    with pytest.raises(RuntimeError, match="n_steps is 2; a mask has one step"):
        OPS.step_pool(X, MASK, None, 2, False)
    with pytest.raises(RuntimeError, match="dtype is 4; accepted: 0 to 3"):
        OPS.step_pool_backward(torch.zeros(2, 1), IDS[:, :1], IDS, None, False, 4)
    with pytest.raises(RuntimeError, match=r"g has shape \[3, 1\]; expected \[2, 1\]"):
        OPS.step_pool_backward(torch.zeros(3, 1), IDS[:, :1], IDS, None, False, 0)
    with pytest.raises(RuntimeError, match="g has dtype Double; Float is expected"):
        OPS.step_pool_backward(torch.zeros(2, 1, dtype=F64), IDS[:, :1], IDS, None, False, 0)


@only_cuda
def test_wrong_ids_and_layouts_are_nan(device, validation):
    hidden, ids = torch.randn(3, 8, 4, device=device), torch.ones(3, 8, device=device).long()
    ids[1, 7] = 3
    means, gradient, counts = with_gradient(step_mean, hidden, ids, 2)
    assert means.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert gradient.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert counts.eq(-1).all(1).tolist() == [False, True, False]
    cu = torch.tensor([0, 9, 5, 24], dtype=torch.int32, device=device)
    assert masked_mean_pool(hidden.flatten(0, 1), cu_seqlens=cu).isnan().all()
    validation(True)
    with pytest.raises(ValueError, match=r"step_ids\[15\] of the flattened tokens is 3"):
        step_mean(hidden, ids, 2)
    with pytest.raises(ValueError, match=r"cu_seqlens is \["):
        masked_mean_pool(hidden.flatten(0, 1), cu_seqlens=cu)
