"""Every kind, KL estimate and aggregation of policy_loss: worked numbers for the op and its definition alike, then one against
the other on all options and layouts, the gradient, what must not leak, and everything that must be refused."""

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
from policy_helpers import (
    F32,
    F64,
    INF,
    NAN,
    boundaries,
    close,
    compare,
    exactly,
    f64,
    make,
    names,
    only_cuda,
    per_token,
    value_and_gradient,
)
from prefkern import kl_penalty, masked_aggregate, policy_loss, reference
from prefkern.ops.policy import AGGREGATIONS, KINDS, KL_KINDS, METRICS

OPS = torch.ops.prefkern
RATIO_KINDS = KINDS[:-1]
ROW_KINDS = ("gspo", "gmpo")  # one loss per sequence
RHO, ADVANTAGES = f64(1.5, 0.5, 1.5, 0.5, 4), f64(1, 1, -1, -1, -1)

both = pytest.mark.parametrize("function", [policy_loss, reference.policy_loss], ids=["op", "definition"])
each_kind = pytest.mark.parametrize("kind", RATIO_KINDS)
each_agg = pytest.mark.parametrize("agg", AGGREGATIONS)


def module(function):
    return reference if function is reference.policy_loss else prefkern


def scale_of(agg):
    return {"scale": 4.0} if agg in ("trl-dr_grpo", "seq-mean-token-sum-norm") else {}


# ------------------------------------------------------------------------------------------------------- worked numbers

CASES = {
    "clip, dual clip 3": (
        {"eps_high": 0.28, "dual_clip": 3.0},
        [-1.28, -0.5, 1.5, 0.8, 3], [0, -0.5, 1.5, 0, 0],
    ),
    "clip, delta 2": ({"delta": 2.0}, [-1.2, -0.5, 1.5, 0.8, 2], [0, -0.5, 1.5, 0, 0]),
    "clip, delta under the bounds": (  # A > 0: min(rho, 0.75); A < 0: max(min(rho, 0.75), clip(rho, 0.8, 1.2))
        {"delta": 0.75}, [-0.75, -0.5, 1.2, 0.8, 1.2], [0, -0.5, 0, 0, 0],
    ),
    "clip, delta and dual clip": ({"delta": 2.0, "dual_clip": 1.75}, [-1.2, -0.5, 1.5, 0.8, 1.75], [0, -0.5, 1.5, 0, 0]),
    "clip, no lower bound": ({"eps_low": 1.0}, [-1.2, -0.5, 1.5, 0.5, 4], [0, -0.5, 1.5, 0.5, 4]),
    "cispo": (
        {"kind": "cispo"},
        [-0.4865581297, 0.5545177444, 0.4865581297, -0.5545177444, 1.6635532333], [-1.2, -0.8, 1.2, 0.8, 1.2],
    ),
    "cispo, cap 2": (
        {"kind": "cispo", "eps_low": 1.0, "eps_high": 1.0},
        [-1.5 * math.log(1.5), 0.5 * math.log(2), 1.5 * math.log(1.5), -0.5 * math.log(2), 2 * math.log(4)],
        [-1.5, -0.5, 1.5, 0.5, 2],
    ),
    "reinforce": (
        {"kind": "reinforce"}, [-math.log(1.5), math.log(2), math.log(1.5), -math.log(2), math.log(4)], [-1, -1, 1, 1, 1],
    ),
    "sapo": (
        {"kind": "sapo"},
        [-2.4898373248, -1.5101626752, 2.3935854792, 1.4159383303, 3.6529856069],
        [-1.4100222732, -0.4700074244, 1.4012097349, 0.4670699116, 0.6304445609],
    ),
    # A sequence of one token is its own mean.
    "gspo": ({"kind": "gspo", "dual_clip": 3.0}, [-1.2, -0.5, 1.5, 0.8, 3], [0, -0.5, 1.5, 0, 0]),
    "gspo_token": ({"kind": "gspo_token"}, [-1.2, -0.5, 1.5, 0.8, 4], [0, -0.5, 1.5, 0, 4]),
    "gmpo": (  # log-ratio at most 0.4 for A > 0, at least -0.4 for A < 0
        {"kind": "gmpo", "eps_low": 0.4, "eps_high": 0.4},
        [-math.exp(0.4), -0.5, 1.5, math.exp(-0.4), 4], [0, -0.5, 1.5, 0, 4],
    ),
}  # fmt: skip


@both
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_single_tokens(function, case):
    options, losses, gradients = CASES[case]
    loss, gradient = per_token(RHO.log(), torch.zeros(5, dtype=F64), ADVANTAGES, function=function, **options)
    tolerance = 1e-7 if options.get("kind") == "gmpo" else 1e-9  # the paper's count has 1e-8 added
    close(loss, losses, tolerance)
    close(gradient, gradients, tolerance)


@both
@pytest.mark.parametrize(("kind", "low", "high", "dual"), [
    ("clip", 0.2, 0.2, 0.4), ("cispo", 0.4, 0.6, 0.0), ("reinforce", 0, 0, 0), ("sapo", 0, 0, 0),
])  # fmt: skip
def test_clip_fractions(function, kind, low, high, dual):
    options = {"dual_clip": 1.4} if kind == "clip" else {}
    old, entropy = torch.zeros(1, 5, dtype=F64), f64(1, 2, 3, 4, 5)[None]
    out = function(RHO.log()[None], old, ADVANTAGES[None], kind=kind, entropy=entropy, **options)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert tuple(metrics) == METRICS
    assert [metrics[f"clip_fraction_{name}"] for name in ("low", "high", "dual")] == pytest.approx([low, high, dual])
    assert [metrics[name] for name in ("ratio_mean", "ratio_min", "ratio_max", "entropy", "tokens", "sequences")] == (
        pytest.approx([1.6, 0.5, 4.0, 3.0, 5, 1])
    )


LP = f64([-1, -0.9, -1.1], [-0.2, -2, NAN])
OLD = f64([-1.2, -1, -1], [-0.5, -1, NAN])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@both
@pytest.mark.parametrize("kind", ["gspo", "gspo_token"])
def test_gspo(function, kind):
    """Unclipped: every token has an n-th of -A s, the mean over sequences halves it."""
    s = f64(1.0689391057, 0.7046880897)
    out, gradient = value_and_gradient(
        LP, OLD, f64(1, -1), MASK, kind=kind, eps_low=0.3, eps_high=0.3, agg="trl-grpo", function=function
    )
    close(torch.stack([out.metrics["ratio_max"], out.metrics["ratio_min"]]), s)
    close(out.metrics["ratio_mean"], (3 * s[0] + 2 * s[1]) / 5)
    close(out.loss.detach(), (-s[0] + s[1]) / 2)
    close(gradient, [[-s[0] / 6] * 3, [s[1] / 4, s[1] / 4, 0]])
    clipped, gradient = value_and_gradient(
        LP, OLD, f64(1, -1), MASK, kind=kind, eps_low=3e-4, eps_high=4e-4, agg="trl-grpo", function=function
    )
    close(clipped.loss.detach(), (-1.0004 + 0.9997) / 2)
    assert gradient.eq(0).all()
    assert clipped.metrics["clip_fraction_high"].item() == pytest.approx(0.6)
    assert clipped.metrics["clip_fraction_low"].item() == pytest.approx(0.4)


@both
def test_gspo_token_of_one_advantage_is_gspo(function):
    logp, old, _, advantages = make((4, 9), F64)
    mask = torch.rand(4, 9) < 0.8
    results = [
        value_and_gradient(logp, old, a, mask, kind=kind, agg="seq-mean-token-mean", function=function)
        for kind, a in (("gspo", advantages), ("gspo_token", advantages[:, None].expand(4, 9)))
    ]
    (one, gradient), (token, token_gradient) = results
    close(token.loss.detach(), one.loss.detach(), 1e-14)
    close(token_gradient, gradient, 1e-14)


@both
def test_gspo_spreads_its_gradient_evenly_whatever_the_weights(function):
    """loss = sum_t w_t (-A s) / 3: d/dlogp_t = -A s / 3 times the mean of the w."""
    weights = f64([3, 0, 0])
    out, gradient = value_and_gradient(
        LP[:1], OLD[:1], f64(1), kind="gspo", eps_high=0.3, token_weight=weights, function=function
    )
    s = 1.0689391057
    close(out.loss.detach(), -s)
    close(gradient, [[-s / 3] * 3])
    _, gradient = value_and_gradient(
        LP[:1], OLD[:1], f64(1), kind="gspo_token", eps_high=0.3, token_weight=weights, function=function
    )
    close(gradient, [[-s, 0, 0]])


@both
def test_the_clamp_of_a_sequence_ratio_is_on_its_logarithm(function):
    """verl's gspo: at most 10, without gradient above."""
    logp, old = f64([-1, -1], [-1, -1]), f64([-30, -10], [-1.5, -0.9])
    for kind in ("gspo", "gspo_token"):
        out, gradient = value_and_gradient(
            logp, old, f64(-1, -1), kind=kind, ratio_clamp=(None, 10.0), agg="trl-grpo", function=function
        )
        close(out.loss.detach(), (math.exp(10) + math.exp(0.2)) / 2, 1e-8)
        close(gradient, [[0, 0], [math.exp(0.2) / 4] * 2])


@both
def test_gmpo(function):
    """verl's geo_mean: the mean over all rows is trl-grpo. A = 0 has ratio 1."""
    logp = f64([0.3, -0.7, 0.1], [0.6, -0.9, 0.0], [5.0, 5.0, 5.0])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    out, gradient = value_and_gradient(
        logp, torch.zeros_like(logp), f64(1, -2, 0), mask, kind="gmpo", eps_low=0.4, eps_high=0.2, agg="trl-grpo",
        function=function,
    )  # fmt: skip
    r = [math.exp((0.2 - 0.7 + 0.1) / 3), math.exp((0.6 - 0.4) / 2)]
    close(out.loss.detach(), (-r[0] + 2 * r[1]) / 3, 1e-7)
    close(gradient, [[0, -r[0] / 9, -r[0] / 9], [2 * r[1] / 6, 0, 0], [0, 0, 0]], 1e-7)
    assert out.metrics["clip_fraction_low"].item() == pytest.approx(1 / 8)
    assert out.metrics["clip_fraction_high"].item() == pytest.approx(1 / 8)
    close(out.metrics["ratio_mean"], (3 * r[0] + 2 * r[1] + 3) / 8, 1e-7)


KL = {  # logp [-1, -2, -.5], ref [-1.2, -1, -.5]
    "k1": ([0.2, -1, 0], [1, 1, 1]),
    "abs": ([0.2, 1, 0], [1, -1, 0]),
    "k2": ([0.02, 0.5, 0], [0.2, -1, 0]),
    "k3": ([0.0187307531, 0.7182818285, 0], [0.1812692469, -1.7182818285, 0]),
    "k1+": ([0.2, -1, 0], [0.2, -1, 0]),
    "abs+": ([0.2, 1, 0], [0.2, -1, 0]),
    "k3+": ([0.0187307531, 0.7182818285, 0], [0.2, -1, 0]),
}


@both
@pytest.mark.parametrize("kl", KL)
def test_kl_estimates(function, kl):
    values, gradients = KL[kl]
    logp, ref = f64([-1, -2, -0.5]), f64([-1.2, -1, -0.5])
    leaf = logp.clone().requires_grad_()
    loss = module(function).kl_penalty(leaf, ref, kl=kl, agg="token-sum")
    close(loss.detach(), sum(values))
    close(torch.autograd.grad(loss, leaf)[0], [gradients])
    out, gradient = value_and_gradient(logp, logp, f64(0), ref_logp=ref, beta=3.0, kl=kl, function=function)
    close(out.loss.detach(), sum(values))
    close(out.metrics["kl"], sum(values) / 3)
    close(gradient, [gradients])


@both
@pytest.mark.parametrize(("kl", "gradient"), [("k3", [1 - math.exp(-2), 0.0, 0.0]), ("k3+", [2.0, -3.0, 9.0])])
def test_the_kl_is_clamped(function, kl, gradient):
    """k3 at 2: e^-2 + 1; at -3: e^3 - 4 > 10; at 9: e^-9 + 8 < 10. verl's low_var_kl and TRPA clamp at 10, here at 8."""
    logp = f64([2, -3, 9])
    leaf = logp.clone().requires_grad_()
    loss = module(function).kl_penalty(leaf, torch.zeros_like(logp), kl=kl, kl_clamp=8.0, agg="token-sum")
    close(loss.detach(), math.exp(-2) + 1 + 8 + 8)
    close(torch.autograd.grad(loss, leaf)[0], [gradient])
    k1 = module(function).kl_penalty(f64([-5, 3]), f64([0, 0]), kl="k1", kl_clamp=4.0, agg="token-sum")
    close(k1, -4 + 3)


@both
def test_trpa_trust_region(function):
    """Token mean of k3 to the old policy: the numbers of the paper's check."""
    logp = f64([-1, -2, -0.5], [-0.3, -0.3, 0], [-2, -1, -1], [-0.1, -0.2, -0.4])
    old = logp + f64([0.1, -0.1, 0], [0.2, 0, 0], [0, 0, 0.3], [-0.2, 0, 0])
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    close(module(function).kl_penalty(logp, old, mask, kl_clamp=10.0), 0.0090909686, 1e-10)


@both
@pytest.mark.parametrize(("kl", "value", "slope"), [("k3", 0.0187307531, 0.1812692469), ("k2+", None, None), ("k1+", 0.2, 0.2)])
def test_the_kl_times_the_ratio(function, kl, value, slope):
    """d(rho k) = rho (k' + k); where the ratio is clamped it is a constant."""
    if kl == "k2+":
        with pytest.raises(ValueError, match="kl"):
            function(f64([0]), f64([0]), f64(1), kl=kl)
        return
    options = {"ref_logp": f64([-1.2]), "beta": 0.5, "kl": kl, "kl_ratio": True, "function": function}
    for kind in ("clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token"):
        out, gradient = value_and_gradient(f64([-1]), f64([-1.4]), f64(0), kind=kind, **options)
        rho = math.exp(0.4)
        close(out.loss.detach(), 0.5 * rho * value)
        close(out.metrics["kl"], value)
        close(gradient, [[0.5 * rho * (slope + value)]])
        _, gradient = value_and_gradient(f64([-1]), f64([-1.4]), f64(0), kind=kind, ratio_clamp=0.3, **options)
        close(gradient, [[0.5 * math.exp(0.3) * slope]])


LOSSES = f64([1, 2, 3, 4], [5, 6, NAN, NAN], [7, NAN, NAN, NAN], [NAN] * 4)
SUMS = {  # worked out by hand; each token's weight by its row's length
    "token-mean": (4.0, lambda n: 1 / 7),
    "seq-mean-token-mean": (4.9999999654, lambda n: 1 / (n + 1e-8) / 3),
    "seq-mean-token-sum": (9.3333333333, lambda n: 1 / 3),
    "seq-mean-token-sum-norm": (2.3333333333, lambda n: 1 / 12),
    "token-sum": (28.0, lambda n: 1.0),
    "trl-grpo": (3.75, lambda n: 1 / n / 4),
    "trl-dr_grpo": (1.75, lambda n: 1 / 16),
}


@both
@each_agg
@pytest.mark.parametrize("packed", [False, True])
def test_aggregation(function, agg, packed):
    expected, weight = SUMS[agg]
    mask, options = ~LOSSES.isnan(), {"agg": agg, **(scale_of(agg) if packed or agg == "trl-dr_grpo" else {})}
    losses = LOSSES
    if packed:
        losses, options["cu_seqlens"] = LOSSES[mask], boundaries([4, 2, 1, 0])
    leaf = losses.clone().requires_grad_()
    result = module(function).masked_aggregate(leaf, None if packed else mask, **options)
    close(result.detach(), expected, 1e-10)
    gradient = torch.autograd.grad(result, leaf)[0]
    n = mask.sum(1, keepdim=True).double().expand(4, 4)
    expected_gradient = torch.where(mask, torch.tensor([[weight(x) if x else 0.0 for x in row] for row in n.tolist()]), 0.0)
    close(gradient, expected_gradient[mask] if packed else expected_gradient, 1e-7)
    out = function(losses, losses, -losses, None if packed else mask, **options)  # on policy the loss is minus the advantage
    close(out.loss, expected, 1e-10)
    assert out.metrics["sequences"].item() == 3


@both
@each_agg
def test_norm_replaces_the_count(function, agg):
    mask, options = ~LOSSES.isnan(), {"agg": agg, **scale_of(agg)}
    plain = module(function).masked_aggregate(LOSSES, mask, **options).item()
    count = {"token-mean": 7, "token-sum": 1, "trl-grpo": 4, "trl-dr_grpo": 4}.get(agg, 3)
    for norm in (10, 10.0, torch.tensor(10), torch.tensor(10.0), torch.tensor([10.0], dtype=F64)):
        close(module(function).masked_aggregate(LOSSES, mask, norm=norm, **options), plain * count / 10, 1e-9)
    for norm in (0.0, torch.tensor(0)):
        leaf = LOSSES.clone().requires_grad_()
        zero = module(function).masked_aggregate(leaf, mask, norm=norm, **options)
        assert zero.item() == 0
        assert torch.autograd.grad(zero, leaf)[0].eq(0).all()


@both
def test_anchors(function):
    """DaGRPO: -A p / (p + g), d = -A g p / (p + g)^2; no ratio: their old log-probs are not even looked at."""
    logp = f64([math.log(0.5), math.log(0.2)], [-1, -1], [-200.0, -INF])
    old = f64([NAN, NAN], [-1.1, -0.9], [NAN, NAN])
    anchor, a = torch.tensor([True, False, True]), f64(2, 1, 1)
    out, gradient = value_and_gradient(logp, old, a, anchor=anchor, agg="token-sum", function=function)
    p = [0.5, 0.2]
    rho = [math.exp(0.1), math.exp(-0.1)]
    close(out.loss.detach(), sum(-2 * x / (x + 0.1) for x in p) - sum(rho))
    close(gradient, [[-2 * 0.1 * x / (x + 0.1) ** 2 for x in p], [-r for r in rho], [0, 0]])
    close(out.metrics["ratio_mean"], sum(rho) / 2)
    close(torch.stack([out.metrics["ratio_min"], out.metrics["ratio_max"]]), sorted(rho))
    assert [out.metrics[name].item() for name in ("tokens", "sequences")] == [6, 3]
    out, gradient = value_and_gradient(
        logp[:2], old[:2], a[:2], anchor=anchor[:2], anchor_loss="nll", agg="token-sum", function=function
    )
    close(out.loss.detach(), -2 * math.log(0.1) - sum(rho))
    close(gradient, [[-2, -2], [-r for r in rho]])
    out, gradient = value_and_gradient(
        logp[:1], old[:1], a[:1], anchor=anchor[:1], anchor_gamma=0.5, ref_logp=logp[:1] - 1, beta=0.5, kl="k1", kl_ratio=True,
        agg="token-sum", function=function,
    )  # fmt: skip
    close(out.loss.detach(), -2 * (0.5 + 0.2 / 0.7) + 0.5 * 2)
    assert [out.metrics[name].item() for name in METRICS[:7]] == [0] * 7  # no ratio at all
    close(out.metrics["kl"], 1.0)


def test_elastic_bounds():
    """ETR: a bound per sequence, and the same per token."""
    a = f64(1.4999970, -0.4999990, -0.4999990, -0.4999990, 0.8660239038, 0.8660239038, -0.8660239038, -0.8660239038)
    scale = f64(1.0937486875, 0.6562495625, 0.6562495625, 0.6562495625, *[0.9330119519] * 4)
    rho = f64(1.3, 0.7, 0.9, 1.1, 1.3, 1.1, 0.7, 0.85)
    logp = rho.log()[:, None]
    for function, shape in itertools.product((policy_loss, reference.policy_loss), ((8,), (8, 1))):
        eps = (0.2 * scale).view(shape)
        out, gradient = value_and_gradient(logp, torch.zeros_like(logp), a, eps_low=eps, eps_high=eps, function=function)
        close(out.loss.detach(), -0.1166823765)
        assert out.metrics["clip_fraction_low"].item() + out.metrics["clip_fraction_high"].item() == 0.5
        expected = [0, 0, 0.0562498875, 0.0687498625, 0, -0.1190782868, 0, 0.0920150398]
        close(gradient[:, 0], expected)


@both
def test_ngrpo_bounds(function):
    rho = f64(1.3, 0.8, 1.3, 0.8)
    out, gradient = value_and_gradient(
        rho.log()[:, None], torch.zeros(4, 1, dtype=F64), f64(1, 1, -1, -1), eps_low=0.16, eps_high=0.24, function=function
    )
    close(out.loss.detach(), 0.025)
    close(gradient[:, 0], [0, -0.2, 0.325, 0])


@both
def test_token_weights_do_not_reach_the_kl(function):
    """Policy term x weight, then + beta KL."""
    logp, old, ref = f64([-1, -2]), f64([-1.2, -1.9]), f64([-1.2, -1])
    plain, g = value_and_gradient(logp, old, f64(2), agg="token-sum", function=function)
    for weight in (f64(0.5), f64([0.5, 0.5])):
        out, gradient = value_and_gradient(
            logp, old, f64(2), token_weight=weight, ref_logp=ref, beta=2.0, agg="token-sum", function=function
        )
        close(out.loss.detach(), 0.5 * plain.loss.item() + 2 * (0.0187307531 + 0.7182818285), 1e-9)
        close(gradient, 0.5 * g + 2 * f64([0.1812692469, -1.7182818285]), 1e-9)
    assert out.metrics["ratio_mean"].item() == plain.metrics["ratio_mean"].item()


# ------------------------------------------------------------------------------------------------ against the definition


def options_of(generator, kind, shape, rows, dtype, device, packed):
    """A random choice of every option."""

    def chance(p):
        return torch.rand((), generator=generator).item() < p

    def one_of(*values):
        return values[torch.randint(len(values), (), generator=generator)]

    def random(size, low=0.0, high=1.0):
        return (low + (high - low) * torch.rand(size, generator=generator, dtype=F64)).to(dtype).to(device)

    o = {"kind": kind, "agg": one_of(*AGGREGATIONS), "ratio_clamp": one_of(20.0, None, 0.3, (None, 0.5), (-0.2, None))}
    if o["agg"] == "trl-dr_grpo" or (o["agg"] == "seq-mean-token-sum-norm" and (packed or chance(0.5))):
        o["scale"] = 13.0
    if chance(0.3):
        o["norm"] = one_of(17.0, torch.tensor(17, device=device), torch.tensor(3.5, device=device))
    for name in ("eps_low", "eps_high"):
        sizes = [None, (rows,)] + ([] if kind == "gspo" else [shape])
        size = one_of(*sizes)
        o[name] = one_of(0.1, 0.2, 0.4) if size is None else random(size, 0.0, 0.5)
    if kind in ("clip", "gspo", "gspo_token"):
        o |= {"dual_clip": one_of(None, 1.3), "delta": one_of(None, 1.1, 1.5, 0.7)}
    if chance(0.5):
        o["token_weight"] = random(one_of(shape, (rows,)), 0.0, 2.0)
    if kind == "none" or chance(0.7):
        beta = 0.3 if kind == "none" else one_of(0.0, 0.3)
        o |= {"beta": beta, "kl": one_of(*KL_KINDS), "kl_clamp": one_of(None, None, 0.2), "ref_logp": True}
        o["kl_ratio"] = kind != "gmpo" and chance(0.4)
    if kind != "none" and chance(0.4):
        o["anchor"] = (torch.rand(rows, generator=generator) < 0.5).to(device)
        o |= {"anchor_loss": one_of("shaped", "nll"), "anchor_gamma": 0.3}
    if chance(0.4):
        o["entropy"] = random(shape)
    return o


@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_all_options_together(device, dtype, kind, packed, masked):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    generator = torch.Generator().manual_seed(0)
    for length, wanted in itertools.product((1, 7, 37, 200), (False, True)):
        rows, each = 5, wanted and kind not in ROW_KINDS
        logp, old, ref, advantages = make((rows, length), dtype, device, per_token=each)
        advantages[0] = 0
        mask = (torch.rand(rows, length) < 0.7).to(device) if masked else None
        if mask is not None:
            mask[1] = False
        shape = (rows * length,) if packed else (rows, length)
        o = options_of(generator, kind, shape, rows, dtype, device, packed)
        if packed:
            half = length // 2
            o["cu_seqlens"] = boundaries([length + half, 0, length - half, 2 * length, length], device)
        if o.pop("ref_logp", False):
            o["ref_logp"] = ref.view(shape)
        flat = [None if t is None else t.view(shape) for t in (logp, old, mask)]
        tolerance = 1e-12 if dtype == F64 else 2e-5  # terms of both signs nearly cancel
        compare(*flat[:2], advantages.view(shape) if each else advantages, flat[2], tolerance=tolerance, **o)


@each_kind
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 4103), (0, 5), (3, 0)])
def test_sizes(device, kind, shape):
    logp, old, ref, advantages = make(shape, F32, device)
    mask = torch.rand(shape, device=device) < 0.5
    compare(
        logp, old, advantages, mask, kind=kind, agg="seq-mean-token-sum", ref_logp=ref, beta=0.1, eps_low=0.01, eps_high=0.01
    )


@pytest.mark.parametrize("kl_ratio", [False, True])
@each_kind
def test_gradcheck(kind, kl_ratio):
    if kind in ("cispo", "gspo_token"):
        pytest.skip("its loss has a factor that is a constant only for the gradient")
    logp, old, ref, advantages = make((4, 9), F64)
    mask = torch.rand(4, 9) < 0.8
    options = {
        "kind": kind, "agg": "trl-grpo", "beta": 0.2, "ref_logp": ref, "token_weight": torch.rand(4, 9, dtype=F64),
        "eps_high": torch.rand(4, dtype=F64), "anchor": torch.tensor([False, True, False, False]),
        "kl_ratio": kl_ratio and kind != "gmpo", "entropy": ref,
    }  # fmt: skip
    for lp in (logp, logp + 0.01 * torch.randn(4, 9, dtype=F64)):
        assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, mask, **options).loss, lp.requires_grad_())


@pytest.mark.parametrize("kl", [name for name in KL_KINDS if not name.endswith("+")])
@each_agg
def test_gradcheck_of_the_penalty(kl, agg):
    logp, ref = (-torch.rand(3, 7, dtype=F64) for _ in range(2))
    mask = torch.rand(3, 7) < 0.8
    options = {"agg": agg, **scale_of(agg)}
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, ref, mask, kl=kl, **options), logp.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: masked_aggregate(x, mask, **options), logp)


@given(
    st.integers(1, 5), st.integers(1, 30), st.sampled_from(RATIO_KINDS), st.sampled_from(AGGREGATIONS), st.integers(0, 2**31)
)
def test_on_policy_the_gradient_is_minus_the_advantage(rows, columns, kind, agg, seed):
    """Times the token's weight W, of every kind."""
    torch.manual_seed(seed)
    logp, advantages = torch.randn(rows, columns, dtype=F64), torch.randn(rows, dtype=F64)
    mask = torch.rand(rows, columns) < 0.7
    options = {"agg": agg, **scale_of(agg)}
    _, gradient = value_and_gradient(logp, logp, advantages, mask, kind=kind, **options)
    ones = torch.ones(rows, columns, dtype=F64, requires_grad=True)
    (weight,) = torch.autograd.grad(reference.masked_aggregate(ones, mask, **options), ones)
    expected = torch.where(mask, -advantages[:, None] * weight, 0.0)
    assert_close(gradient, expected, rtol=1e-7 if kind == "gmpo" else 1e-12, atol=1e-15)


@given(st.sampled_from(["cispo", "reinforce", "sapo"]), st.floats(-3, 3.4), st.sampled_from([-1.0, 1.0]))
def test_soft_kinds_always_have_a_gradient(kind, d, advantage):
    _, gradient = value_and_gradient(f64([d]), f64([0]), f64(advantage), kind=kind)
    assert gradient.item() * advantage < 0


def test_scalar_bounds_are_those_of_constant_tensors(device):
    logp, old, ref, advantages = make((5, 70), F32, device)
    mask = torch.rand(5, 70, device=device) < 0.8
    options = {"ref_logp": ref, "beta": 0.1, "dual_clip": 1.4}
    for kind in ("clip", "cispo", "gmpo", "gspo_token"):
        options["dual_clip"] = 1.4 if kind in ("clip", "gspo_token") else None
        expected, expected_gradient = value_and_gradient(logp, old, advantages, mask, kind=kind, eps_low=0.1, **options)
        for shape in ((5,), (5, 70)):
            low, high = (torch.full(shape, x, device=device) for x in (0.1, 0.2))
            out, gradient = value_and_gradient(logp, old, advantages, mask, kind=kind, eps_low=low, eps_high=high, **options)
            assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)
            assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_padded_is_packed(device):
    lengths = [7, 64, 1, 33]
    logp, old, ref, advantages = make((4, 64), F32, device)
    mask = torch.arange(64, device=device) < torch.tensor(lengths, device=device)[:, None]
    for kind in RATIO_KINDS:
        options = {"kind": kind, "agg": "trl-grpo", "beta": 0.1, "upstream": 2.0}
        out, gradient = value_and_gradient(logp, old, advantages, mask, ref_logp=ref, **options)
        packed, packed_gradient = value_and_gradient(
            logp[mask], old[mask], advantages, ref_logp=ref[mask], cu_seqlens=boundaries(lengths, device), **options
        )
        assert_close(packed.loss, out.loss, rtol=1e-5, atol=1e-6)
        assert_close(packed_gradient, gradient[mask], rtol=1e-5, atol=1e-7)
        assert gradient[~mask].eq(0).all()


def test_as_many_sequences_as_tokens(device):
    """Packed: [N] is one per token, but for a loss of the sequence one per sequence."""
    logp, old, _, _ = make((1, 4), F32, device)
    logp, old, a = logp[0], old[0], torch.tensor([1.0, -1.0, 2.0, 3.0], device=device)
    ends = boundaries([2, 0, 1, 1], device)
    for kind in ("clip", "gspo", "gmpo"):
        compare(logp, old, a, cu_seqlens=ends, kind=kind, eps_low=a.abs() / 4, eps_high=a.abs() / 4)


# --------------------------------------------------------------------------------------------------- values at the edges


@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
@pytest.mark.parametrize("function", [policy_loss, reference.policy_loss], ids=["op", "definition"])
def test_sapo_of_every_ratio(function, dtype):
    """Saturated far from 1: no NaN, whatever overflows."""
    d = torch.tensor([2000.0, 88.0, 20.0, 5.0, -5.0, -60.0, -2000.0], dtype=dtype)
    zeros = torch.zeros(7, dtype=dtype)
    for sign, clamp in itertools.product((1.0, -1.0), (None, 20.0)):
        a = torch.full((7,), sign, dtype=dtype)
        loss, gradient = per_token(d, zeros, a, kind="sapo", ratio_clamp=clamp, function=function)
        tau = 1.0 if sign > 0 else 1.05
        low = 4 / tau / (1 + math.exp(tau))
        top = [-sign * 4 / tau] * 4
        close(loss, [*top, -sign * 4 / tau / (1 + math.exp(-tau * (math.exp(-5) - 1))), -sign * low, -sign * low], 1e-5)
        assert gradient[:4].abs().le(1e-50).all()
        assert gradient.isfinite().all()


@each_kind
def test_nan_inside_the_mask_stays_visible(device, kind):
    logp, old, _, advantages = make((3, 40), F32, device)
    logp[1, 17] = NAN
    out, gradient = value_and_gradient(logp, old, advantages, kind=kind, agg="trl-grpo")
    assert out.loss.isnan()
    if kind not in ("reinforce", "cispo"):  # whose gradient does not depend on logp, or through the ratio alone
        assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()
    if kind == "gmpo":  # a token that its bound holds keeps its 0
        assert torch.equal(gradient[1].isnan(), gradient[1] != 0)
    else:
        assert gradient[1].isnan().sum().item() in ((40,) if kind in ("gspo", "gspo_token") else (0, 1))


@pytest.mark.parametrize("poison", [NAN, INF, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_the_mask_is_used(device, poison, kind):
    shape = (6, 50)
    logp, old, ref, advantages = make(shape, F32, device, per_token=kind not in ROW_KINDS)
    mask = torch.rand(shape, device=device) < 0.6
    mask[2], mask[3, :32] = False, False
    per_token = {"ref_logp": ref, "token_weight": torch.rand(shape, device=device), "entropy": -ref}
    if kind != "gspo":
        per_token |= {"eps_low": torch.rand(shape, device=device), "eps_high": torch.rand(shape, device=device)}
    others = {"kind": kind, "beta": 0.3, "agg": "trl-grpo", "kl_ratio": kind != "gmpo"}
    if kind != "none":
        others["anchor"] = torch.tensor([False, True, False, False, False, True], device=device)
    results = []
    for change in (lambda t: t, lambda t: torch.where(mask, t, poison)):
        a = change(advantages) if kind not in ROW_KINDS else advantages
        options = others | {name: change(t) for name, t in per_token.items()}
        results.append(value_and_gradient(change(logp), change(old), a, mask, **options))
    (clean, clean_gradient), (out, gradient) = results
    assert torch.equal(out.loss, clean.loss)
    assert all(torch.equal(out.metrics[name], clean.metrics[name]) for name in clean.metrics)
    assert torch.equal(gradient, clean_gradient)
    assert gradient[~mask].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@each_agg
def test_an_empty_mask_gives_zeros(device, kind, agg):
    logp = torch.full((3, 20), NAN, device=device)
    mask = torch.zeros(3, 20, dtype=torch.bool, device=device)
    out, gradient = value_and_gradient(
        logp, logp, torch.ones(3, device=device), mask, kind=kind, agg=agg, ref_logp=logp, beta=1.0, **scale_of(agg)
    )
    assert out.loss.item() == 0
    assert gradient.eq(0).all()
    assert all(value.item() == 0 for value in out.metrics.values())


def test_without_old_log_probs_the_policies_are_equal(device):
    logp, _, ref, advantages = make((3, 40), F32, device)
    for kind, a in (("reinforce", advantages), ("none", None)):
        out, _ = value_and_gradient(logp, None, a, kind=kind, ref_logp=ref, beta=0.1)
        assert [out.metrics[name].item() for name in METRICS[3:7]] == [1, 1, 1, 0]
    compare(logp, None, advantages, kind="reinforce")


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


def run_bits(logp, old, ref, advantages, mask, kind):
    options = {"kind": kind, "token_weight": -ref, "agg": "trl-grpo"}
    out, gradient = value_and_gradient(logp, old, advantages, mask, ref_logp=ref, beta=0.1, **options)
    return [out.loss, *out.metrics.values(), gradient]


@each_kind
def test_same_bits_on_any_number_of_threads(threads, kind):
    logp, old, ref, advantages = make((17, 1501))
    mask = torch.rand(17, 1501) < 0.9
    results = []
    for n in (1, 2, 2):
        threads(n)
        results.append(run_bits(logp, old, ref, advantages, mask, kind))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@only_cuda
@each_kind
def test_same_bits_every_time_and_in_a_graph(device, kind):
    logp, old, ref, advantages = make((3, 70_001), F32, device)
    mask = torch.rand(3, 70_001, device=device) < 0.9
    first = run_bits(logp, old, ref, advantages, mask, kind)
    assert all(torch.equal(a, b) for a, b in zip(first, run_bits(logp, old, ref, advantages, mask, kind), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_bits(logp, old, ref, advantages, mask, kind)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


def test_only_logp_gets_a_gradient():
    logp, old, ref, advantages = (t.requires_grad_() for t in make())
    constants = {"token_weight": torch.rand(5), "eps_low": torch.rand(5), "entropy": -ref, "norm": torch.tensor(3.0)}
    leaves = [old, ref, advantages, *(t.requires_grad_() for t in constants.values() if t.is_leaf)]
    policy_loss(logp, old, advantages, ref_logp=ref, beta=0.1, **constants).loss.backward()
    assert logp.grad is not None
    assert all(t.grad is None for t in leaves)


def op_arguments(device, dtype, kind, packed):
    logp, old, ref, advantages = make((3, 7), dtype, device)
    mask, weight, entropy = torch.rand(3, 7, device=device) < 0.7, torch.rand(3, device=device).to(dtype), -ref
    if packed:
        logp, old, ref, mask, entropy = (t.reshape(-1) for t in (logp, old, ref, mask, entropy))
    lows, norm = torch.full((3,), 0.1, dtype=dtype, device=device), torch.tensor(9.0, dtype=dtype, device=device)
    anchor = None if kind == "none" else torch.tensor([False, True, False], device=device)
    return (
        logp.requires_grad_(), old, None if kind == "none" else advantages, mask,
        boundaries([4, 0, 17], device) if packed else None, ref, weight, lows, lows, anchor, entropy, norm,
        KINDS.index(kind), AGGREGATIONS.index("trl-grpo"), KL_KINDS.index("k3+"), 0,
        0.2, 0.3, INF, INF, 1.0, 1.05, -20.0, 20.0, 0.1, 10.0, 0.1, 0.0, -1.0, True,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["gspo", "gmpo", "cispo", "none"])
def test_opcheck(device, kind, packed):
    dtype = F32 if device == "cuda" else F64
    arguments = op_arguments(device, dtype, kind, packed)
    opcheck(OPS.policy_loss.default, arguments)
    opcheck(OPS.policy_loss_fwd.default, (arguments[0].detach(), *arguments[1:-1], False))


@pytest.mark.parametrize("packed", [False, True])
def test_one_graph_for_any_shape(device, packed):
    """fullgraph, forward and backward, with every tensor argument and symbolic sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(logp, old, advantages, mask, cu_seqlens, weight, low, anchor, norm):
        out = policy_loss(
            logp * 1.5, old, advantages, mask, cu_seqlens=cu_seqlens, kind="clip", token_weight=weight, eps_low=low,
            eps_high=0.25, anchor=anchor, norm=norm, ref_logp=old, beta=0.25, kl="k3+", kl_ratio=True, entropy=weight,
            ratio_clamp=(None, 10.0), agg="trl-dr_grpo", scale=0.25,
        )  # fmt: skip
        extra = masked_aggregate(logp, mask, cu_seqlens=cu_seqlens, norm=0.25) + kl_penalty(
            logp, old, mask, cu_seqlens=cu_seqlens
        )
        return out.loss + extra, out.metrics

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for rows, columns in ((3, 5), (4, 9), (6, 13)):
        logp, old, weight, _ = make((rows, columns), F32, device)
        advantages, low, norm = torch.randn(rows), torch.rand(rows), torch.tensor(columns)
        advantages, low, norm, anchor = (t.to(device) for t in (advantages, low, norm, torch.rand(rows) < 0.5))
        mask, cu_seqlens = torch.rand(rows, columns, device=device) < 0.7, None
        if packed:
            logp, old, weight, mask = (t.reshape(-1) for t in (logp, old, weight, mask))
            cu_seqlens = boundaries([columns] * rows, device)
        results = []
        for function in (run, compiled):
            leaf = logp.clone().requires_grad_()
            loss, metrics = function(leaf, old, advantages, mask, cu_seqlens, weight, low, anchor, norm)
            results.append([loss, *metrics.values(), *torch.autograd.grad(loss, leaf)])
        for a, b in zip(*results, strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2


def test_meta_tensors():
    logp = torch.empty(3, 4, device="meta", requires_grad=True)
    for kind in KINDS:
        policy_loss(logp, logp.detach(), torch.empty(3, device="meta"), kind=kind, ref_logp=logp.detach()).loss.backward()
    assert logp.grad.shape == (3, 4)
    assert masked_aggregate(logp).shape == kl_penalty(logp, logp.detach()).shape == ()


# --------------------------------------------------------------------------------------------------------------- errors

Z, A = torch.zeros(2, 3), torch.zeros(2)
BOOL = torch.zeros(2, dtype=torch.bool)

BAD = {
    "advantages none": (dict(advantages=None), TypeError, r"advantages is a NoneType; a torch\.Tensor"),
    "advantages none, reinforce": (dict(advantages=None, kind="reinforce"), TypeError, r"advantages is a NoneType"),
    "old_logp none, cispo": (dict(old_logp=None, kind="cispo"), TypeError, r"old_logp is None; kind 'cispo' needs a torch"),
    "old_logp none, kl_ratio": (
        dict(old_logp=None, kind="reinforce", kl_ratio=True, ref_logp=Z),
        TypeError, r"old_logp is None; kind 'reinforce' with kl_ratio needs a torch",
    ),
    "token advantages, gspo": (
        dict(advantages=Z, kind="gspo"),
        ValueError, r"advantages has shape \[2, 3\]; kind 'gspo' has one per .*'gspo_token' takes one per token",
    ),
    "token advantages, gmpo": (dict(advantages=Z, kind="gmpo"), ValueError, r"kind 'gmpo' has one per sequence, \[2\]"),
    "token bounds, gspo": (dict(eps_low=Z, kind="gspo"), ValueError, r"eps_low has shape \[2, 3\]; kind 'gspo' has one per"),
    "token_weight shape": (dict(token_weight=torch.zeros(3)), ValueError, r"token_weight has shape \[3\]; expected \[2\].*"),
    "token_weight int": (dict(token_weight=Z.long()), TypeError, r"token_weight has dtype Long"),
    "token_weight number": (dict(token_weight=1.0), TypeError, r"token_weight is a float; a torch\.Tensor"),
    "token_weight device": (dict(token_weight=A.to("meta")), ValueError, r"token_weight is on meta but logp is on cpu"),
    "eps_low shape": (dict(eps_low=torch.zeros(2, 1)), ValueError, r"eps_low has shape \[2, 1\]"),
    "eps_low negative": (dict(eps_low=torch.tensor([0.1, -0.5])), ValueError, r"eps_low\[1\] is -0\.5; it must be between 0"),
    "eps_low large": (dict(eps_low=Z + 1.5), ValueError, r"eps_low\[0\] is 1\.5; it must be between 0 and 1"),
    "eps_low negative, gmpo": (dict(eps_low=-1.0, kind="gmpo"), ValueError, r"eps_low is -1; it must be finite and not"),
    "eps_high nan": (dict(eps_high=torch.tensor([NAN, 0.1])), ValueError, r"eps_high\[0\] is nan; it must be finite"),
    "eps_high int": (dict(eps_high=A.int()), TypeError, r"eps_high has dtype Int"),
    "eps_high string": (dict(eps_high="1"), TypeError, r"eps_high is '1'; a number or a torch\.Tensor"),
    "delta zero": (dict(delta=0.0), ValueError, r"delta is 0; it must be positive, or None"),
    "delta nan": (dict(delta=NAN), ValueError, r"delta is nan"),
    "delta, cispo": (dict(delta=2.0, kind="cispo"), ValueError, r"delta is 2 but kind is 'cispo'; clip, gspo and gspo"),
    "dual_clip, sapo": (dict(dual_clip=3.0, kind="sapo"), ValueError, r"dual_clip is 3 but kind is 'sapo'"),
    "tau_pos": (dict(tau_pos=0.0), ValueError, r"tau_pos is 0; it must be finite and positive"),
    "tau_neg": (dict(tau_neg=INF), ValueError, r"tau_neg is inf; it must be finite and positive"),
    "tau_neg tensor": (dict(tau_neg=torch.tensor(1.0)), TypeError, r"tau_neg is tensor"),
    "norm negative": (dict(norm=-2.0), ValueError, r"norm is -2\.0; it must be finite and not negative"),
    "norm minus one": (dict(norm=-1.0), ValueError, r"norm is -1\.0"),
    "norm inf": (dict(norm=INF), ValueError, r"norm is inf"),
    "norm nan tensor": (dict(norm=torch.tensor(NAN)), ValueError, r"norm is nan; it must be finite and not negative"),
    "norm vector": (dict(norm=torch.ones(2)), ValueError, r"norm has shape \[2\]; expected one element"),
    "norm device": (dict(norm=torch.ones((), device="meta")), ValueError, r"norm is on meta but logp is on cpu"),
    "norm string": (dict(norm="7"), TypeError, r"norm is '7'; a number, a torch\.Tensor or None"),
    "scale missing": (dict(agg="trl-dr_grpo"), ValueError, r"scale is None; trl-dr_grpo.* need it"),
    "scale zero": (dict(agg="trl-dr_grpo", scale=0), ValueError, r"scale is 0; it must be finite and positive"),
    "scale nan": (dict(agg="trl-dr_grpo", scale=NAN), ValueError, r"scale is nan"),
    "scale unused": (dict(scale=3.0), ValueError, r"scale is 3; only seq-mean-token-sum-norm and trl-dr_grpo"),
    "scale string": (dict(agg="trl-dr_grpo", scale="3"), TypeError, r"scale is '3'; a number or None"),
    "kl_clamp": (dict(kl_clamp=0.0), ValueError, r"kl_clamp is 0; it must be positive, or None"),
    "kl_clamp tensor": (dict(kl_clamp=torch.tensor(1.0)), TypeError, r"kl_clamp is tensor"),
    "kl_ratio without reference": (dict(kl_ratio=True), ValueError, r"ref_logp is None; kind 'none' and kl_ratio need it"),
    "kl_ratio, gmpo": (dict(kl_ratio=True, kind="gmpo", ref_logp=Z), ValueError, r"kl_ratio is True but kind is 'gmpo'"),
    "none without reference": (dict(kind="none"), ValueError, r"ref_logp is None; kind 'none' and kl_ratio need it"),
    "none with anchors": (dict(kind="none", ref_logp=Z, anchor=BOOL), ValueError, r"anchor is given but kind is 'none'"),
    "anchor float": (dict(anchor=A), TypeError, r"anchor has dtype Float; accepted: bool"),
    "anchor shape": (dict(anchor=Z.bool()), ValueError, r"anchor has shape \[2, 3\]; expected \[2\]"),
    "anchor list": (dict(anchor=[True, False]), TypeError, r"anchor is a list"),
    "anchor_gamma": (dict(anchor_gamma=0.0), ValueError, r"anchor_gamma is 0; it must be finite and positive"),
    "anchor_loss": (dict(anchor_loss="mle"), ValueError, r"anchor_loss is 'mle'; accepted: 'shaped', 'nll'"),
    "entropy shape": (dict(entropy=A), ValueError, r"entropy has shape \[2\]; logp has shape \[2, 3\]"),
    "entropy int": (dict(entropy=Z.int()), TypeError, r"entropy has dtype Int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_errors(case, requires_grad):
    wrong, error, message = BAD[case]
    arguments = {"logp": Z.clone().requires_grad_(requires_grad), "old_logp": Z, "advantages": A, **wrong}
    with pytest.raises(error, match=message):
        policy_loss(**arguments)


def test_a_packed_norm_needs_a_scale():
    with pytest.raises(ValueError, match="scale is None; trl-dr_grpo, and seq-mean-token-sum-norm of packed tokens"):
        policy_loss(Z.view(-1), Z.view(-1), A, cu_seqlens=boundaries([3, 3]), agg="seq-mean-token-sum-norm")


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (dict(values=1.0), TypeError, r"values is a float; a torch\.Tensor"),
    (dict(values=torch.zeros(6)), ValueError, r"values has shape \[6\]; expected \[B, T\]"),
    (dict(values=Z, mask=Z), TypeError, r"mask has dtype Float"),
    (dict(values=Z, mask=BOOL), ValueError, r"mask has shape \[2\]; values has shape \[2, 3\]"),
    (dict(values=Z.int()), TypeError, r"values has dtype Int"),
    (dict(values=Z, agg="sum"), ValueError, r"agg is 'sum'; accepted: 'token-mean'"),
    (dict(values=Z, norm=-1.0), ValueError, r"norm is -1\.0"),
    (dict(values=Z, scale=1.0), ValueError, r"scale is 1; only"),
    (dict(values=torch.zeros(6), cu_seqlens=[0, 6]), TypeError, r"cu_seqlens is a list"),
])  # fmt: skip
def test_errors_of_masked_aggregate(arguments, error, message):
    with pytest.raises(error, match=message):
        masked_aggregate(**arguments)


def test_errors_of_kl_penalty():
    with pytest.raises(TypeError, match="ref_logp is a NoneType"):
        kl_penalty(Z, None)
    with pytest.raises(ValueError, match="kl is 'k4'; accepted: 'k1'"):
        kl_penalty(Z, Z, kl="k4")


@pytest.mark.parametrize(
    "case", [name for name in BAD if any(x in name for x in ("none", "delta", "dual", "scale", "kl_ratio"))]
)
def test_the_definition_refuses_the_same(case):
    wrong, _, _ = BAD[case]
    if "string" in case or "nan" in case:
        pytest.skip("the definition leaves types to Python")
    with pytest.raises((ValueError, TypeError)):
        reference.policy_loss(**{"logp": Z, "old_logp": Z, "advantages": A, **wrong})


@only_cuda
@pytest.mark.parametrize(("name", "value"), [("eps_low", [0.1, -0.1]), ("eps_high", [NAN, 0.1]), ("norm", [-1.0])])
def test_on_cuda_wrong_data_is_nan(device, validation, name, value):
    logp, old, _, advantages = make((2, 40), F32, device)
    options = {name: torch.tensor(value, device=device)}
    out, gradient = value_and_gradient(logp, old, advantages, **options)
    assert out.loss.isnan()
    assert gradient.isnan().any(1).tolist() == ([True, True] if name == "norm" else [not 0 <= v <= 1 for v in value])
    validation(True)
    with pytest.raises(ValueError, match=name):
        policy_loss(logp, old, advantages, **options)


def test_exact_gradients_in_float32_stay_close():
    """All kinds on one batch of usual size."""
    logp, old, ref, advantages = make((8, 300), F32)
    for kind in RATIO_KINDS:
        _, gradient = value_and_gradient(logp, old, advantages, kind=kind, ref_logp=ref, beta=0.04)
        _, expected = exactly(logp, old, advantages, kind=kind, ref_logp=ref, beta=0.04)
        assert (gradient.double() - expected).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["logp", "old_logp", "ref_logp"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_validation_finds_a_log_prob_that_is_not_finite(device, validation, name, value):
    tensors = {key: -torch.rand(3, 4, device=device) for key in ("logp", "old_logp", "ref_logp")}
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[0, 1] = False
    tensors[name][0, 1] = value  # outside the mask
    advantages = torch.ones(3, device=device)

    def call(**options):
        return policy_loss(tensors["logp"], tensors["old_logp"], advantages, mask, ref_logp=tensors["ref_logp"], **options)

    validation(True)
    assert call().loss.isfinite()
    tensors[name][2, 3] = value
    with pytest.raises(ValueError, match=rf"{name}\[2, 3\] is .*; every log-prob inside the mask must be finite"):
        call()
    if name == "old_logp":
        assert call(anchor=torch.tensor([False, False, True], device=device)).loss.isfinite()
    validation(False)
    if math.isnan(value):
        assert call(beta=0.1).loss.isnan()
