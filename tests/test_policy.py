"""policy_loss against its float64 definition and worked numbers, its gradient, its metrics, and everything it must refuse."""

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
from policy_helpers import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    NAN,
    boundaries,
    close,
    compare,
    f64,
    make,
    names,
    only_cuda,
    per_token,
    value_and_gradient,
)  # fmt: skip
from prefkern import policy_loss, reference

AGGREGATIONS = ("token-mean", "seq-mean-token-mean")  # the others: tests/test_policy_kinds.py
OPS = torch.ops.prefkern

each_agg = pytest.mark.parametrize("agg", AGGREGATIONS)


# ------------------------------------------------------------------------------------------------------- worked numbers


def test_clipped_losses_and_gradients():
    rho, advantages = f64(1.5, 0.5, 1.5, 0.5, 4), f64(1, 1, -1, -1, -1)
    loss, gradient = per_token(rho.log(), torch.zeros(5, dtype=F64), advantages, eps_low=0.2, eps_high=0.28, dual_clip=3.0)
    close(loss, [-1.28, -0.5, 1.5, 0.8, 3])
    close(gradient, [0, -0.5, 1.5, 0, 0])
    out = policy_loss(rho.log()[None], torch.zeros(1, 5, dtype=F64), advantages[None], eps_high=0.28, dual_clip=3.0)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == metrics["clip_fraction_dual"] == 0.2
    assert metrics["tokens"] == 5
    assert [metrics[f"ratio_{name}"] for name in ("mean", "min", "max")] == pytest.approx([1.6, 0.5, 4.0])
    assert metrics["approx_kl"] == pytest.approx((rho - 1 - rho.log()).mean().item())
    assert metrics["kl"] == 0


@pytest.mark.parametrize(("rho", "advantage", "options"), [
    (2.0, 1.0, {"eps_high": 1.0}), (0.5, -1.0, {"eps_low": 0.5}), (2.0, -1.0, {"dual_clip": 2.0}),
    (1.0, 1.0, {"eps_high": 0.0}), (1.0, -1.0, {"eps_low": 0.0}),
])  # fmt: skip
def test_the_gradient_flows_at_the_bound(rho, advantage, options):
    logp = f64(math.log(rho))
    loss, gradient = per_token(logp, torch.zeros(1, dtype=F64), f64(advantage), **options)
    close(loss, [-advantage * rho])
    close(gradient, [-advantage * rho])


@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_the_log_ratio_is_clamped_without_gradient(dtype):
    logp, a = torch.tensor([3.0, -3.0, 1.5], dtype=dtype), torch.tensor([-1.0, 1.0, -1.0], dtype=dtype)
    old = torch.zeros(3, dtype=dtype)
    loss, gradient = per_token(logp, old, a, ratio_clamp=2.0)
    close(loss, [math.exp(2), -math.exp(-2), math.exp(1.5)], 1e-6)
    close(gradient, [0.0, 0.0, math.exp(1.5)], 1e-6)
    loss, gradient = per_token(logp, old, a, ratio_clamp=None)
    close(loss, [math.exp(3), -math.exp(-3), math.exp(1.5)], 3e-6)
    close(gradient, [math.exp(3), -math.exp(-3), math.exp(1.5)], 3e-6)


@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_a_ratio_that_overflows_under_a_bound_has_no_gradient(dtype):
    logp, a = torch.tensor([2000.0, 2000.0], dtype=dtype), torch.tensor([1.0, -1.0], dtype=dtype)
    loss, gradient = per_token(logp, torch.zeros(2, dtype=dtype), a, dual_clip=3.0, ratio_clamp=None)
    close(loss, [-1.2, 3.0], 1e-6)
    close(gradient, [0.0, 0.0])


def test_k3_values_and_gradients():
    logp, ref = f64(-1, -2, -0.5), f64(-1.2, -1, -0.5)
    for i, (value, slope) in enumerate([(0.0187307531, 0.1812692469), (0.7182818285, -1.7182818285), (0.0, 0.0)]):
        lp = logp[i].view(1, 1)
        out, gradient = value_and_gradient(lp, lp, f64(0), ref_logp=ref[i].view(1, 1), beta=1.0)
        close(out.loss.detach(), value, 1e-10)
        close(out.metrics["kl"], value, 1e-10)
        close(gradient, [[slope]], 1e-10)


def test_the_penalty_is_reported_but_not_added_at_beta_zero():
    lp = f64(-1).view(1, 1)
    out, gradient = value_and_gradient(lp, lp, f64(0), ref_logp=f64(-1.2).view(1, 1))
    close(out.metrics["kl"], 0.0187307531, 1e-10)
    assert out.loss.item() == 0
    assert gradient.item() == 0
    out, gradient = value_and_gradient(lp, lp, f64(2), ref_logp=torch.full((1, 1), 5000.0))  # the penalty overflows
    assert out.loss.item() == -2
    assert gradient.item() == -2


@pytest.mark.parametrize(("agg", "expected"), [("token-mean", 4.0), ("seq-mean-token-mean", 4.9999999654)])
@pytest.mark.parametrize("packed", [False, True])
def test_aggregation(agg, expected, packed):
    """On policy the loss of a token is minus its advantage."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    loss = torch.full((4, 4), NAN, dtype=F64).masked_scatter(mask, f64(1, 2, 3, 4, 5, 6, 7))
    logp = torch.where(mask, -1.0, NAN).double()
    if packed:
        out, gradient = value_and_gradient(logp[mask], logp[mask], -loss[mask], cu_seqlens=boundaries([4, 2, 1, 0]), agg=agg)
        gradient = torch.zeros(4, 4, dtype=F64).masked_scatter(mask, gradient)
    else:
        out, gradient = value_and_gradient(logp, logp, -loss, mask, agg=agg)
    close(out.loss.detach(), expected, 1e-10)
    assert out.metrics["tokens"].item() == 7
    n = mask.sum(1, keepdim=True).double()
    close(gradient, torch.where(mask, loss * (1 / 7 if agg == "token-mean" else 1 / (3 * (n + 1e-8))), 0.0), 1e-12)


# ------------------------------------------------------------------------------------------------ against the definition

OPTIONS = {
    "defaults": {},
    "penalty": {"beta": 0.04},
    "reference only": {"beta": 0.0},
    "dapo": {"eps_low": 0.2, "eps_high": 0.28},
    "dual": {"dual_clip": 1.1, "eps_low": 0.0, "eps_high": 0.0},
    "everything": {"dual_clip": 1.3, "beta": 0.5, "eps_low": 0.1, "eps_high": 0.5, "ratio_clamp": 0.3},
    "no clamp": {"ratio_clamp": None},
}


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=names)
@pytest.mark.parametrize("options", OPTIONS)
@each_agg
@pytest.mark.parametrize("layout", ["padded", "masked", "packed", "packed and masked"])
@pytest.mark.parametrize("each", [False, True], ids=["one advantage", "token advantages"])
def test_values(device, dtype, options, agg, layout, each):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    logp, old, ref, advantages = make((5, 37), dtype, device, per_token=each)
    options = {**OPTIONS[options], "agg": agg}
    if "beta" in options:
        options["ref_logp"] = ref
    mask = torch.rand(5, 37, device=device) < 0.7 if "masked" in layout else None
    if mask is not None:
        mask[1], mask[2, 5:], mask[3] = False, False, True
    if "packed" in layout:
        options["cu_seqlens"] = boundaries([40, 0, 1, 100, 44], device)
        logp, old, mask = logp.view(-1), old.view(-1), None if mask is None else mask.view(-1)
        options["ref_logp"] = options["ref_logp"].view(-1) if "ref_logp" in options else None
        advantages = advantages.view(-1)
    compare(logp, old, advantages, mask, **options)


@each_agg
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 16), (2, 33), (3, 4096), (2, 5003), (0, 5), (3, 0)])
def test_sizes(device, agg, masked, shape):
    """Around a vector, a tile, a block's share, and nothing."""
    logp, old, ref, advantages = make(shape, F32, device)
    mask = torch.rand(shape, device=device) < 0.5 if masked else None
    compare(logp, old, advantages, mask, agg=agg, ref_logp=ref, beta=0.1, dual_clip=1.2)


@each_agg
def test_padded_is_packed(device, agg):
    lengths = [7, 64, 1, 33]
    logp, old, ref, advantages = make((4, 64), F32, device)
    mask = torch.arange(64, device=device) < torch.tensor(lengths, device=device)[:, None]
    options = {"agg": agg, "beta": 0.1, "dual_clip": 1.2, "upstream": 2.0}
    out, gradient = value_and_gradient(logp, old, advantages, mask, ref_logp=ref, **options)
    packed, packed_gradient = value_and_gradient(
        logp[mask], old[mask], advantages, ref_logp=ref[mask], cu_seqlens=boundaries(lengths, device), **options
    )
    assert_close(packed.loss, out.loss, rtol=1e-6, atol=0)
    for name in out.metrics:
        assert_close(packed.metrics[name], out.metrics[name], rtol=1e-6, atol=0)
    assert_close(packed_gradient, gradient[mask], rtol=1e-6, atol=0)
    assert gradient[~mask].eq(0).all()


def test_strides_and_mixed_types(device):
    """Slices as a trainer cuts them, and constants in other types."""
    logp, old, ref, advantages = make((4, 40), F32, device)
    mask = torch.rand(40, 4, device=device).T < 0.8
    options = {"ref_logp": ref.half()[:, 3:], "beta": 0.1}
    out, gradient = value_and_gradient(logp[:, 3:], old.bfloat16()[:, 3:], advantages.half()[::1], mask[:, 3:], **options)
    options["ref_logp"] = ref.half().float()[:, 3:].clone()
    expected, expected_gradient = value_and_gradient(
        logp[:, 3:].clone(), old.bfloat16().float()[:, 3:].clone(), advantages.half().float(), mask[:, 3:].clone(), **options
    )
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


# ----------------------------------------------------------------------------------------------------- what must not leak


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
@each_agg
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_nothing_outside_the_mask_is_used(device, poison, agg, packed, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    tensors = make((6, 50), dtype, device, per_token=True)
    mask = torch.rand(6, 50, device=device) < 0.6
    mask[2] = False  # a whole sequence
    mask[3, :32] = False  # whole vectors
    poisoned = [torch.where(mask, t, poison) for t in tensors]
    options = {"agg": agg, "beta": 0.3, "dual_clip": 1.2, "ratio_clamp": None}
    if packed:
        options["cu_seqlens"] = boundaries([50] * 6, device)
        tensors, poisoned, mask = [t.view(-1) for t in tensors], [t.view(-1) for t in poisoned], mask.view(-1)
    results = []
    for logp, old, ref, advantages in (tensors, poisoned):
        results.append(value_and_gradient(logp, old, advantages, mask, ref_logp=ref, **options))
    (clean, clean_gradient), (out, gradient) = results
    assert torch.equal(out.loss, clean.loss)
    assert all(torch.equal(out.metrics[name], clean.metrics[name]) for name in clean.metrics)
    assert torch.equal(gradient, clean_gradient)
    assert gradient[~mask].eq(0).all()


def test_an_advantage_of_a_sequence_without_tokens_is_not_used(device):
    logp, old, _, advantages = make((3, 20), F32, device)
    mask = torch.ones(3, 20, dtype=torch.bool, device=device)
    mask[1] = False
    expected, _ = value_and_gradient(logp, old, advantages, mask)
    advantages[1] = NAN
    out, gradient = value_and_gradient(logp, old, advantages, mask)
    assert torch.equal(out.loss, expected.loss)
    assert gradient.isfinite().all()


@each_agg
@pytest.mark.parametrize("source", ["logp", "old_logp", "ref_logp", "advantages"])
def test_nan_inside_the_mask_stays_visible_and_local(device, agg, source):
    tensors = dict(zip(("logp", "old_logp", "ref_logp", "advantages"), make((3, 40), F32, device, per_token=True), strict=True))
    tensors[source][1, 17] = NAN
    out, gradient = value_and_gradient(**tensors, beta=0.1, agg=agg)
    assert out.loss.isnan()
    expected = torch.zeros(3, 40, dtype=torch.bool, device=device)
    expected[1, 17] = True
    assert torch.equal(gradient.isnan(), expected)
    if source in ("logp", "old_logp"):
        assert all(out.metrics[f"ratio_{name}"].isnan() for name in ("mean", "min", "max"))
        assert out.metrics["approx_kl"].isnan()


@each_agg
@pytest.mark.parametrize("shape", [(3, 20), (1, 1), (0, 4), (4, 0)])
def test_an_empty_mask_gives_zeros(device, agg, shape):
    logp = torch.full(shape, NAN, device=device)
    advantages = torch.ones(shape[0], device=device)
    out, gradient = value_and_gradient(
        logp, logp, advantages, torch.zeros(shape, dtype=torch.bool, device=device), agg=agg, ref_logp=logp, beta=1.0
    )
    assert out.loss.item() == 0
    assert gradient.eq(0).all()
    assert [m.item() for m in out.metrics.values()] == [0] * 11
    packed = policy_loss(logp.view(-1)[:0], logp.view(-1)[:0], advantages[:0], cu_seqlens=boundaries([], device), agg=agg)
    assert packed.loss.item() == 0


def test_a_zero_gradient_survives_a_nan_from_upstream(device):
    logp, old, _, advantages = make((2, 9), F32, device)
    mask = torch.arange(9, device=device).expand(2, 9) < 5
    _, gradient = value_and_gradient(logp, old, advantages, mask, upstream=NAN)
    assert gradient[~mask].eq(0).all()
    assert gradient[mask].isnan().any()


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize(("dtype", "bound"), [(F32, 3e-6), (F64, 1e-14)], ids=names)
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_keeps_its_digits_where_it_is_small(dtype, bound, sign):
    """exp(x) - 1 - x computed as written has none left at x = 1e-4 in float32."""
    for exponent in torch.linspace(-12, 4, 60).tolist():
        x = torch.tensor([[sign * 2.0**exponent]], dtype=dtype)
        zero = torch.zeros_like(x)
        out, gradient = value_and_gradient(zero, -x, torch.zeros(1, dtype=dtype), ref_logp=x, beta=1.0, ratio_clamp=None)
        exact = x.item()
        expected = math.expm1(exact) - exact
        if abs(exact) < 1:
            expected = math.fsum(exact**k / math.factorial(k) for k in range(2, 25))
        for value in (out.loss, out.metrics["kl"], out.metrics["approx_kl"]):
            assert value.item() == pytest.approx(expected, rel=bound)
        assert gradient.item() == pytest.approx(-math.expm1(exact), rel=bound)


def test_ratios_of_every_size():
    for d in torch.linspace(-87, 88, 120):
        out = policy_loss(d.view(1, 1), torch.zeros(1, 1), torch.ones(1), ratio_clamp=None)
        assert out.metrics["ratio_mean"].item() == pytest.approx(math.exp(d.item()), rel=3e-7)


def test_a_long_sequence_loses_nothing(device):
    """A million float32 terms in one row."""
    logp, old, ref, advantages = make((1, 1_000_003), F32, device)
    out = policy_loss(logp, old, advantages + 3, ref_logp=ref, beta=1.0)
    expected = reference.policy_loss(logp.double(), old.double(), advantages.double() + 3, ref_logp=ref.double(), beta=1.0)
    assert_close(out.loss.double(), expected.loss, rtol=1e-6, atol=0)
    for name in out.metrics:
        few = 5e-6 if "fraction" in name else 0.0  # ratios at a bound fall on either side
        assert_close(out.metrics[name].double(), expected.metrics[name].double(), rtol=1e-6, atol=few, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@each_agg
def test_gradcheck(packed, agg):
    logp, old, ref, advantages = make((4, 9), F64)
    mask = torch.rand(4, 9) < 0.8
    options = {"agg": agg, "beta": 0.2, "dual_clip": 1.3, "ref_logp": ref}
    if packed:
        options.update(cu_seqlens=boundaries([10, 0, 20, 6]), ref_logp=ref.view(-1))
        logp, old, mask = logp.view(-1), old.view(-1), mask.view(-1)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, mask, **options).loss, logp.requires_grad_())


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from(AGGREGATIONS), st.integers(0, 2**31))
def test_on_policy_the_gradient_is_minus_the_advantage(rows, columns, agg, seed):
    generator = torch.Generator().manual_seed(seed)
    logp, advantages = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    out, gradient = value_and_gradient(logp, logp, advantages, mask, agg=agg)
    n = mask.sum(1, keepdim=True)
    weight = 1 / mask.sum().clamp_min(1) if agg == "token-mean" else 1 / (n.clamp_min(1) * (n > 0).sum().clamp_min(1))
    assert_close(gradient, torch.where(mask, -advantages * weight, 0.0), rtol=1e-6, atol=0)
    assert out.metrics["approx_kl"].item() == 0
    assert out.metrics["ratio_max"].item() == (1 if mask.any() else 0)


@given(st.integers(0, 2**31), st.sampled_from(AGGREGATIONS))
def test_permuting_sequences_changes_nothing(seed, agg):
    torch.manual_seed(seed)
    logp, old, ref, advantages = make((6, 21), F64)
    mask, order = torch.rand(6, 21) < 0.5, torch.randperm(6)
    options = {"agg": agg, "beta": 0.1}
    out, gradient = value_and_gradient(logp, old, advantages, mask, ref_logp=ref, **options)
    permuted, permuted_gradient = value_and_gradient(
        logp[order], old[order], advantages[order], mask[order], ref_logp=ref[order], **options
    )
    assert_close(permuted.loss, out.loss, rtol=1e-13, atol=1e-14)
    assert torch.equal(permuted_gradient, gradient[order])


def run_bits(logp, old, ref, advantages, mask, agg):
    out, gradient = value_and_gradient(logp, old, advantages, mask, ref_logp=ref, beta=0.1, agg=agg)
    return [out.loss, *out.metrics.values(), gradient]


@each_agg
def test_same_bits_on_any_number_of_threads(threads, agg):
    logp, old, ref, advantages = make((37, 3001))
    mask = torch.rand(37, 3001) < 0.9
    results = []
    for n in (1, 2, 2):
        threads(n)
        results.append(run_bits(logp, old, ref, advantages, mask, agg))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@only_cuda
@each_agg
def test_same_bits_every_time_and_in_a_graph(device, agg):
    logp, old, ref, advantages = make((3, 70_001), F32, device)
    mask = torch.rand(3, 70_001, device=device) < 0.9
    first = run_bits(logp, old, ref, advantages, mask, agg)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run_bits(logp, old, ref, advantages, mask, agg), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_bits(logp, old, ref, advantages, mask, agg)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


INSTRUCTION_SETS = """
import json, torch, prefkern
torch.manual_seed(0)
logp = -torch.rand(4, 1001); old, ref = (logp + 0.4 * torch.randn(4, 1001) for _ in range(2))
mask, advantages, group = torch.rand(4, 1001) < 0.8, torch.randn(4), torch.arange(300).div(7, rounding_mode="floor")
out = prefkern.policy_loss(logp.requires_grad_(), old, advantages, mask, ref_logp=ref, beta=0.1, agg="seq-mean-token-mean")
out.loss.backward()
names = ("mean", "std", "count")
both = (group, group[torch.randperm(300)])
groups = [t for g in both for t in prefkern.group_advantages(torch.randn(300), g, outputs=names)[:4]]
values = [out.loss, *out.metrics.values(), *logp.grad.flatten()[::17], *torch.cat([t.double() for t in groups])]
print(json.dumps([prefkern.capabilities()["cpu_isa"], [float(v) for v in values]]))
"""


@pytest.mark.slow
def test_every_instruction_set_agrees(run_python):
    """policy_loss and group_advantages, on vectors of 4, 8 and 16 floats."""
    results = {}
    for isa in prefkern.capabilities()["cpu_isas"][:3]:
        used, values = json.loads(run_python(INSTRUCTION_SETS, PREFKERN_CPU_ISA=isa).splitlines()[-1])
        results[used] = torch.tensor(values, dtype=F64)
    assert "base" in results
    for values in results.values():
        assert_close(values, results["base"], rtol=2e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


def test_only_logp_gets_a_gradient(device):
    logp, old, ref, advantages = (t.requires_grad_() for t in make(device=device))
    out = policy_loss(logp, old, advantages, ref_logp=ref, beta=0.1)
    assert not any(m.requires_grad for m in out.metrics.values())
    out.loss.backward()
    assert logp.grad is not None
    assert old.grad is None and ref.grad is None and advantages.grad is None
    alone = policy_loss(logp.detach(), old, advantages, ref_logp=ref, beta=0.1)
    assert not alone.loss.requires_grad
    assert torch.equal(alone.loss, out.loss.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_costs_nothing(mode, device, allocations):
    logp, old, ref, advantages = make((64, 500), device=device)
    expected = policy_loss(logp.requires_grad_(), old, advantages, ref_logp=ref)
    with mode():
        measured = allocations(lambda: policy_loss(logp, old, advantages, ref_logp=ref))
    assert not measured.result.loss.requires_grad
    assert torch.equal(measured.result.loss, expected.loss)
    assert measured.largest <= (4096 if device == "cpu" else 256 * 1024)


def test_the_backward_can_run_twice_but_not_be_differentiated(device):
    logp, old, _, advantages = make(device=device)
    loss = policy_loss(logp.requires_grad_(), old, advantages).loss
    (first,) = torch.autograd.grad(loss, logp, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logp, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="policy_loss_backward cannot be differentiated twice"):
        second.sum().backward()


def test_the_gradient_is_written_over_what_was_saved_unless_the_graph_is_kept(device, op_log):
    logp, old, _, advantages = make(device=device)
    loss = policy_loss(logp.requires_grad_(), old, advantages).loss
    first, again = (torch.autograd.grad(2 * loss, logp, retain_graph=True)[0] for _ in range(2))
    (last,) = torch.autograd.grad(2 * loss, logp)
    assert first.abs().sum() > 0 and torch.equal(first, again) and torch.equal(first, last)
    backward = "policy_loss_backward"
    assert [name for name in op_log.names() if name.startswith(backward)] == [backward, backward, f"{backward}_"]
    unnormalised, (inverse, g) = torch.randn(3, 9, device=device), torch.tensor([0.5, 3.0], device=device)
    expected = OPS.policy_loss_backward(g, unnormalised, inverse)
    OPS.policy_loss_backward_(g, unnormalised, inverse)
    assert torch.equal(unnormalised, expected)
    with pytest.raises(RuntimeError, match="unnormalised is not contiguous"):
        OPS.policy_loss_backward_(g, torch.randn(9, 3, device=device).T, inverse)


def test_changing_metrics_and_loss_in_place_is_allowed(device):
    """A trainer scales the loss and reduces metrics over ranks in place before the backward."""
    logp, old, _, advantages = make(device=device)
    _, expected = value_and_gradient(logp, old, advantages)
    out = policy_loss(logp.requires_grad_(), old, advantages)
    for metric in out.metrics.values():
        metric.mul_(2)
    out.loss.div_(4)
    out.loss.backward()
    assert_close(logp.grad * 4, expected, rtol=1e-6, atol=0)


def op_arguments(device, dtype=F32, packed=False, masked=True, ref=True, requires_grad=False):
    logp, old, reference_logp, advantages = make((3, 7), dtype, device)
    mask = torch.rand(3, 7, device=device) < 0.7
    if packed:
        logp, old, reference_logp, mask = (t.reshape(-1) for t in (logp, old, reference_logp, mask))
    return (
        logp.requires_grad_(requires_grad), old, advantages, mask if masked else None,
        boundaries([4, 0, 17], device) if packed else None, reference_logp if ref else None,
        None, None, None, None, None, None, 0, int(packed), 3, 0,
        0.2, 0.3, INF, INF, 1.0, 1.05, -20.0, 20.0, 0.1 if ref else 0.0, INF, 0.1, 0.0, -1.0, True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_opcheck(device, dtype, packed, plain):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    arguments = op_arguments(device, dtype, packed, not plain, not plain, requires_grad=True)
    opcheck(OPS.policy_loss.default, arguments)
    arguments = (arguments[0].detach(), *arguments[1:-1])
    opcheck(OPS.policy_loss_fwd.default, (*arguments, False))
    _, _, unnormalised, inverse_norm = OPS.policy_loss_fwd(*arguments, True)
    opcheck(OPS.policy_loss_backward.default, (torch.ones((), dtype=dtype, device=device), unnormalised, inverse_norm))


def test_the_op_and_the_function_agree(device):
    arguments = op_arguments(device, requires_grad=True)
    loss, metrics, *_ = OPS.policy_loss(*arguments)
    (gradient,) = torch.autograd.grad(loss, arguments[0])
    logp, old, advantages, mask, _, ref = arguments[:6]
    out, expected = value_and_gradient(logp, old, advantages, mask, ref_logp=ref, eps_high=0.3, beta=0.1)
    assert torch.equal(loss, out.loss)
    assert torch.equal(metrics, torch.stack(list(out.metrics.values())))
    assert torch.equal(gradient, expected)
    with pytest.raises(ValueError, match="with_grad is False"):
        OPS.policy_loss(*arguments[:-1], False)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("packed", [False, True])
def test_one_graph_for_any_shape(device, packed, dynamic):
    """fullgraph, forward and backward, four shapes, at most two compilations (the second has symbolic sizes)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(logp, old, advantages, mask, cu_seqlens, ref):
        out = policy_loss(
            logp * 1.5, old, advantages, mask, cu_seqlens=cu_seqlens, ref_logp=ref, beta=0.1, agg="seq-mean-token-mean"
        )
        return out.loss * 2 + out.metrics["kl"], out.metrics

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows, columns in ((3, 5), (4, 9), (6, 13), (9, 40)):
        logp, old, ref, advantages = make((rows, columns), F32, device)
        mask, cu_seqlens = torch.rand(rows, columns, device=device) < 0.7, None
        if packed:
            logp, old, ref, mask = (t.reshape(-1) for t in (logp, old, ref, mask))
            cu_seqlens = boundaries([columns] * rows, device)
        results = []
        for function in (run, compiled):
            leaf = logp.clone().requires_grad_()
            loss, metrics = function(leaf, old, advantages, mask, cu_seqlens, ref)
            results.append([loss, *metrics.values(), *torch.autograd.grad(loss, leaf)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count <= 2


def test_autocast_changes_nothing(device):
    logp, old, _, advantages = make(device=device)
    expected = policy_loss(logp, old, advantages).loss
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(policy_loss(logp, old, advantages).loss, expected)


def test_meta_tensors():
    logp = torch.empty(3, 4, device="meta", requires_grad=True)
    out = policy_loss(logp, logp, torch.empty(3, device="meta"))
    out.loss.backward()
    assert (out.loss.shape, logp.grad.shape, len(out.metrics)) == ((), (3, 4), 11)


# --------------------------------------------------------------------------------------------------------------- errors

LP, A = torch.zeros(2, 3), torch.zeros(2)
PACKED = {"logp": torch.zeros(6), "old_logp": torch.zeros(6)}


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "logp list": (dict(logp=[[0.0]]), TypeError, r"logp is a list; a torch\.Tensor"),
    "logp int": (dict(logp=LP.int()), TypeError, r"logp has dtype Int.*float32"),
    "logp 1-d": (dict(logp=torch.zeros(6)), ValueError, r"logp has shape \[6\]; expected \[B, T\], or \[N\] with cu_seqlens"),
    "logp 3-d": (dict(logp=torch.zeros(1, 2, 3)), ValueError, r"logp has shape \[1, 2, 3\]"),
    "old_logp shape": (dict(old_logp=torch.zeros(2, 4)), ValueError, r"old_logp has shape \[2, 4\]; logp has shape \[2, 3\]"),
    "old_logp rank": (dict(old_logp=torch.zeros(6)), ValueError, r"old_logp has shape \[6\]"),
    "old_logp int": (dict(old_logp=LP.long()), TypeError, r"old_logp has dtype Long"),
    "old_logp none": (dict(old_logp=None), TypeError, r"old_logp is None; kind 'clip' needs a torch\.Tensor"),
    "old_logp list": (dict(old_logp=[[0.0]]), TypeError, r"old_logp is a list; a torch\.Tensor"),
    "old_logp device": (dict(old_logp=LP.to("meta")), ValueError, r"old_logp is on meta but logp is on cpu"),
    "ref_logp shape": (dict(ref_logp=torch.zeros(3, 2)), ValueError, r"ref_logp has shape \[3, 2\]"),
    "ref_logp bool": (dict(ref_logp=LP.bool()), TypeError, r"ref_logp has dtype Bool"),
    "ref_logp number": (dict(ref_logp=0.0), TypeError, r"ref_logp is a float; a torch\.Tensor"),
    "advantages length": (dict(advantages=torch.zeros(3)), ValueError, r"advantages has shape \[3\]; expected \[2\].*\[2, 3\]"),
    "advantages shape": (dict(advantages=torch.zeros(2, 1)), ValueError, r"advantages has shape \[2, 1\]"),
    "advantages int": (dict(advantages=A.long()), TypeError, r"advantages has dtype Long"),
    "advantages number": (dict(advantages=1.0), TypeError, r"advantages is a float"),
    "mask float": (dict(mask=LP), TypeError, r"mask has dtype Float; accepted: bool"),
    "mask int": (dict(mask=LP.long()), TypeError, r"mask has dtype Long; accepted: bool"),
    "mask shape": (dict(mask=torch.ones(2, 2).bool()), ValueError, r"mask has shape \[2, 2\]; logp has shape \[2, 3\]"),
    "mask list": (dict(mask=[[True]]), TypeError, r"mask is a list"),
    "cu_seqlens padded": (dict(cu_seqlens=cu(0, 3, 6)), ValueError, r"logp has shape \[2, 3\]; with cu_seqlens \[N\]"),
    "cu_seqlens int64": (dict(**PACKED, cu_seqlens=cu(0, 3, 6).long()), TypeError, r"cu_seqlens has dtype Long.*int32"),
    "cu_seqlens 2-d": (
        dict(**PACKED, cu_seqlens=cu(0, 3, 6)[None]),
        ValueError,
        r"cu_seqlens has shape \[1, 3\]; expected \[B",
    ),
    "cu_seqlens empty": (dict(**PACKED, cu_seqlens=cu()), ValueError, r"cu_seqlens has shape \[0\]"),
    "cu_seqlens start": (dict(**PACKED, cu_seqlens=cu(1, 3, 6)), ValueError, r"cu_seqlens\[0\] is 1; it must be 0"),
    "cu_seqlens end": (dict(**PACKED, cu_seqlens=cu(0, 3, 5)), ValueError, r"cu_seqlens ends at 5; logp has 6 tokens"),
    "cu_seqlens descends": (dict(**PACKED, cu_seqlens=cu(0, 7, 6)), ValueError, r"cu_seqlens\[2\] is 6 after 7"),
    "cu_seqlens list": (dict(**PACKED, cu_seqlens=[0, 3, 6]), TypeError, r"cu_seqlens is a list"),
    "kind": (dict(kind="ppo"), ValueError, r"kind is 'ppo'; accepted: 'clip', 'cispo', .*'none'"),
    "kind none": (dict(kind=None), ValueError, r"kind is None; accepted: 'clip'"),
    "agg": (dict(agg="mean"), ValueError, r"agg is 'mean'; accepted: 'token-mean', 'seq-mean-token-mean', .*'trl-dr_grpo'"),
    "kl": (dict(kl="k9"), ValueError, r"kl is 'k9'; accepted: 'k1', 'abs', 'k2', 'k3', 'k1\+'"),
    "eps_low negative": (dict(eps_low=-0.1), ValueError, r"eps_low is -0\.1; it must be between 0 and 1"),
    "eps_low large": (dict(eps_low=1.5), ValueError, r"eps_low is 1\.5; it must be between 0 and 1"),
    "eps_low nan": (dict(eps_low=NAN), ValueError, r"eps_low is nan"),
    "eps_low string": (dict(eps_low="0.2"), TypeError, r"eps_low is '0\.2'; a number or a torch\.Tensor"),
    "eps_high negative": (dict(eps_high=-1.0), ValueError, r"eps_high is -1; it must be finite and not negative"),
    "eps_high nan": (dict(eps_high=NAN), ValueError, r"eps_high is nan"),
    "eps_high inf": (dict(eps_high=INF), ValueError, r"eps_high is inf"),
    "dual_clip one": (dict(dual_clip=1.0), ValueError, r"dual_clip is 1; it must be greater than 1, or None"),
    "dual_clip zero": (dict(dual_clip=0), ValueError, r"dual_clip is 0;"),
    "dual_clip nan": (dict(dual_clip=NAN), ValueError, r"dual_clip is nan"),
    "dual_clip tensor": (dict(dual_clip=torch.tensor(3.0)), TypeError, r"dual_clip is tensor.*a number or None"),
    "beta negative": (dict(beta=-0.1, ref_logp=LP), ValueError, r"beta is -0\.1; it must be finite and not negative"),
    "beta nan": (dict(beta=NAN, ref_logp=LP), ValueError, r"beta is nan"),
    "beta alone": (dict(beta=0.1), ValueError, r"beta is 0\.1 but ref_logp is None"),
    "ratio_clamp zero": (dict(ratio_clamp=0.0), ValueError, r"ratio_clamp is \(-0, 0\); it must be positive, a negative and"),
    "ratio_clamp negative": (dict(ratio_clamp=-20), ValueError, r"ratio_clamp is \(20, -20\)"),
    "ratio_clamp nan": (dict(ratio_clamp=NAN), ValueError, r"ratio_clamp is \(-?nan, nan\)"),
    "ratio_clamp pair": (dict(ratio_clamp=(0.5, 1.0)), ValueError, r"ratio_clamp is \(0\.5, 1\)"),
    "ratio_clamp three": (dict(ratio_clamp=(1, 2, 3)), ValueError, r"ratio_clamp is \(1, 2, 3\); a number, a pair or None"),
    "ratio_clamp string": (dict(ratio_clamp="20"), TypeError, r"ratio_clamp is '20'; a number or None"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors(case, requires_grad):
    wrong, error, message = BAD[case]
    arguments = {"logp": LP, "old_logp": LP, "advantages": A, **wrong}
    if requires_grad and isinstance(arguments["logp"], torch.Tensor) and arguments["logp"].is_floating_point():
        arguments["logp"] = arguments["logp"].clone().requires_grad_()
    with pytest.raises(error, match=message):
        policy_loss(**arguments)


@pytest.mark.parametrize(("position", "value"), [(12, 8), (13, 7), (14, 7), (15, 4), (12, -1)])
def test_the_op_itself_refuses_unknown_options(position, value):
    arguments = list(op_arguments("cpu"))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=r"(kind|agg|kl|flags) is"):
        OPS.policy_loss_fwd(*arguments)


@only_cuda
@pytest.mark.parametrize("ends", [[0, 4, 9], [1, 4, 8], [0, 5, 4, 8], [0, 4, 7], [0, -3, 8]])
@each_agg
def test_a_wrong_layout_is_nan(device, validation, ends, agg):
    logp = torch.randn(8, device=device)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    advantages = torch.ones(len(ends) - 1, device=device)
    out, gradient = value_and_gradient(logp, logp, advantages, cu_seqlens=cu_seqlens, agg=agg)
    assert out.loss.isnan()
    assert gradient.isnan().all()
    validation(True)
    with pytest.raises(ValueError, match=r"cu_seqlens is \["):
        policy_loss(logp, logp, advantages, cu_seqlens=cu_seqlens)


def test_it_is_exported():
    assert prefkern.policy_loss is policy_loss
