"""group_advantages against its float64 definition and worked numbers, its invariants, and everything it must refuse."""

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
from prefkern import group_advantages, reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ESTIMATORS = ("grpo", "dr_grpo", "rloo")
NAN, INF = math.nan, math.inf
OP = torch.ops.prefkern.group_advantages.default


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def exactly(rewards, group, **options):
    return reference.group_advantages(rewards.cpu().double(), group.cpu(), **options)


def assert_fields(actual, expected, rtol, atol=0.0):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert_close(a.cpu().to(e.dtype), e, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------------------------------------- values

REWARDS = [1, 0, 0, 0, 1, 1, 0.5, 1]
CHECKS = {
    "grpo": ([1.4999970, *[-0.4999990] * 3, 0.4999980, 0.4999980, -1.4999940, 0.4999980], 5e-8),
    "rloo": ([1, *[-0.3333333333] * 3, 0.1666666667, 0.1666666667, -0.5, 0.1666666667], 1e-10),
    "dr_grpo": ([0.75, *[-0.25] * 3, 0.125, 0.125, -0.375, 0.125], 0),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("order", [range(8), (5, 0, 7, 2, 4, 1, 3, 6)], ids=["adjacent", "mixed"])
def test_worked_numbers(estimator, order):
    expected, tolerance = CHECKS[estimator]
    order = list(order)
    rewards, group = torch.tensor(REWARDS, dtype=F64)[order], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])[order]
    out = group_advantages(rewards, group, estimator=estimator)
    assert_close(out.advantages, torch.tensor(expected, dtype=F64)[order], rtol=0, atol=tolerance)
    # [1, 0, 0, 0] has the mean 1/4 and the variance (9 + 3) / 16 / 3; [1, 1, .5, 1] half as much spread.
    assert_close(out.mean, torch.tensor([0.25, 0.875], dtype=F64)[group], rtol=0, atol=0)
    assert_close(out.std, torch.tensor([0.5, 0.25], dtype=F64)[group], rtol=1e-15, atol=0)
    assert out.count.tolist() == [4] * 8


def runs(size):
    """Ascending ids of groups of 1 to 9."""
    return torch.arange(size).repeat_interleave(torch.randint(1, 10, (size,)))[:size]


LAYOUTS = {
    "ascending": runs,
    "eights": lambda size: torch.arange(size) // 8,
    "adjacent": lambda size: torch.randperm(size)[runs(size)],
    "mixed": lambda size: runs(size)[torch.randperm(size)],
    "sparse": lambda size: (runs(size) * 0x123456789AB - 2**60)[torch.randperm(size)],
    "single": lambda size: torch.full((size,), -7),
    "alone": lambda size: torch.arange(size) * 3,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "size"), [*itertools.product([F64, F32, BF16, F16], [1, 7, 300]), (F32, 5003)], ids=names)
def test_values(device, layout, dtype, size):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    rewards, group = torch.randn(size).to(dtype).to(device), LAYOUTS[layout](size).to(device)
    for estimator, singleton in itertools.product(ESTIMATORS, ("zero", "reward")):
        options = {"estimator": estimator, "singleton": singleton, "eps": 1e-4}
        out = group_advantages(rewards, group, **options)
        assert [t.dtype for t in out] == [F64 if dtype == F64 else F32] * 3 + [torch.int64]
        assert {t.device for t in out} == {rewards.device}
        # Everything is computed in double: only the results are rounded.
        assert_fields(out, exactly(rewards, group, **options), *((1e-11, 1e-13) if dtype == F64 else (1.2e-7, 1e-13)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_one(device, estimator):
    rewards, group = torch.tensor([2.0, 5.0, 5.0, -3.0], device=device), torch.tensor([9, 4, 4, 6], device=device)
    out = group_advantages(rewards, group, estimator=estimator)
    assert out.advantages.tolist() == [0, 0, 0, 0]
    assert out.mean.tolist() == [2, 5, 5, -3]
    assert out.std.tolist() == [0, 0, 0, 0]
    assert out.count.tolist() == [1, 2, 2, 1]
    kept = group_advantages(rewards, group, estimator=estimator, singleton="reward", eps=1.0)
    assert kept.advantages.tolist() == ([1, 0, 0, -1.5] if estimator == "grpo" else [2, 0, 0, -3])
    assert same_bits(kept[1:], out[1:])  # statistics are plain statistics


def test_no_rewards(device):
    out = group_advantages(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert [t.shape for t in out] == [(0,)] * 4
    assert [t.dtype for t in out] == [F32, F32, F32, torch.int64]


def test_extreme_ids(device):
    low, high = -(2**63), 2**63 - 1
    group = torch.tensor([high, 0, low, -1, low, high, 0, -1], device=device)
    rewards = torch.arange(8.0, device=device)
    assert_fields(group_advantages(rewards, group), exactly(rewards, group), 1e-7)
    order = group.argsort()
    assert_fields(group_advantages(rewards, group[order]), exactly(rewards, group[order]), 1e-7)


@pytest.mark.parametrize("stride", [2, 3])
def test_strides_and_narrow_ids(device, stride):
    rewards, group = torch.randn(60, device=device)[::stride], torch.randint(0, 6, (60,), device=device)[::stride]
    expected = group_advantages(rewards.clone(), group.clone())
    assert same_bits(group_advantages(rewards, group), expected)
    assert same_bits(group_advantages(rewards, group.int()), expected)


# ------------------------------------------------------------------------------------------------------------- numerics


@given(
    st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(1, 700), st.booleans(),
    st.sampled_from([F32, F64]), st.sampled_from(ESTIMATORS),
)  # fmt: skip
def test_equal_rewards_give_exactly_zero(value, count, mixed, dtype, estimator):
    if dtype == F64:
        value = value / 3 if abs(value) > 1e-30 else value  # all 53 bits in use
    rewards, group = torch.full((count + 2,), value, dtype=dtype), torch.zeros(count + 2, dtype=torch.int64)
    rewards[[0, -1]] = torch.tensor([1.0, 2.0], dtype=dtype)
    group[[0, -1]] = -1 if mixed else torch.tensor([-1, 1])
    out = group_advantages(rewards, group, estimator=estimator, eps=0.0)
    assert out.advantages[1:-1].eq(0).all()
    assert out.std[1:-1].eq(0).all()
    assert out.mean[1:-1].eq(value).all()


def test_a_small_spread_on_a_large_offset(device):
    """E[r^2] - m^2 would have nothing left here."""
    rewards = torch.tensor([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3], device=device)
    out = group_advantages(rewards, torch.zeros(4, dtype=torch.int64, device=device), eps=0.0)
    assert_close(out.std.cpu(), torch.full((4,), math.sqrt(5 / 3)), rtol=1e-7, atol=0)
    assert_close(out.advantages.cpu(), torch.tensor([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(5 / 3), rtol=1e-7, atol=0)


def rewards_and_groups(dtype=F32):
    values = st.floats(-100, 100, width=32)
    rows = st.lists(st.tuples(values, st.integers(-2, 3)), min_size=1, max_size=60)
    return rows.map(lambda r: (torch.tensor([v for v, _ in r], dtype=dtype), torch.tensor([g for _, g in r])))


@given(rewards_and_groups(), st.randoms(use_true_random=False), st.sampled_from(ESTIMATORS))
def test_permuting_rows_permutes_the_results(data, random, estimator):
    rewards, group = data
    order = list(range(len(rewards)))
    random.shuffle(order)
    out = group_advantages(rewards, group, estimator=estimator)
    permuted = group_advantages(rewards[order], group[order], estimator=estimator)
    for a, b in zip(permuted[:3], out[:3], strict=True):  # one unit in the last place
        assert_close(a, b[order], rtol=1.2e-7, atol=1e-11)
    assert torch.equal(permuted.count, out.count[order])


@given(rewards_and_groups(F64), st.sampled_from(ESTIMATORS))
def test_advantages_of_a_group_add_up_to_zero(data, estimator):
    rewards, group = data
    out = group_advantages(rewards, group, estimator=estimator)
    for g in group.unique():
        members = group == g
        assert abs(out.advantages[members].sum()) <= 1e-12 * (1 + out.advantages[members].abs().sum())
        assert out.count[members].eq(members.sum()).all()


@given(rewards_and_groups(F64))
def test_rloo_is_a_scaled_dr_grpo_and_leaves_oneself_out(data):
    rewards, group = data
    rloo, dr_grpo = (group_advantages(rewards, group, estimator=e) for e in ("rloo", "dr_grpo"))
    n = rloo.count.double()
    assert_close(rloo.advantages, torch.where(n > 1, n / (n - 1), 0.0) * dr_grpo.advantages, rtol=1e-13, atol=1e-13)
    for i in range(len(rewards)):
        others = (group == group[i]) & (torch.arange(len(rewards)) != i)
        if others.any():
            assert_close(rloo.advantages[i], rewards[i] - rewards[others].mean(), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("layout", ["ascending", "eights", "mixed", "sparse"])
def test_same_bits_on_any_number_of_threads(threads, layout):
    rewards, group = torch.randn(100_003), LAYOUTS[layout](100_003)
    results = []
    for n in (1, 2, 2):
        threads(n)
        results.append(group_advantages(rewards, group))
    assert same_bits(results[0], results[1])
    assert same_bits(results[1], results[2])


def test_a_run_that_spans_several_tasks(threads):
    """Work is cut at fixed rows; groups are not."""
    threads(2)
    rewards, group = torch.randn(200_000), torch.zeros(200_000, dtype=torch.int64)
    group[150_001:] = 5
    assert_fields(group_advantages(rewards, group), exactly(rewards, group), 1.2e-7, 1e-9)


@only_cuda
@pytest.mark.parametrize("size", [1000, 4096, 4097, 300_000])
def test_same_bits_every_time_and_in_a_graph(device, size):
    rewards, group = torch.randn(size, device=device), torch.randint(0, size // 8, (size,), device=device)
    first = group_advantages(rewards, group)
    assert all(same_bits(group_advantages(rewards, group), first) for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_advantages(rewards, group)
    graph.replay()
    assert same_bits(captured, first)


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


def test_rewards_are_constants():
    rewards, group = torch.randn(8, requires_grad=True), torch.arange(8) // 4
    out = group_advantages(rewards, group)
    assert not any(t.requires_grad for t in out)
    assert same_bits(out, group_advantages(rewards.detach(), group))
    with torch.inference_mode():
        assert same_bits(out, group_advantages(rewards, group))


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
def test_opcheck(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    group = torch.randint(0, 3, (10,), device=device)
    opcheck(OP, (torch.randn(10, device=device).to(dtype), group, 0, 1e-6, 0))
    opcheck(OP, (torch.randn(0, device=device).to(dtype), group[:0].int(), 2, 1e-6, 1))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_rewards(device, dynamic):
    """fullgraph, four sizes, at most two compilations (the second has a symbolic B)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
    def run(rewards, group):
        out = group_advantages(rewards * 2, group, estimator="rloo")
        return out.advantages * 2 + out.mean

    for size in (6, 11, 30, 31):
        rewards, group = torch.randn(size, device=device), torch.randint(0, 4, (size,), device=device)
        out = group_advantages(rewards * 2, group, estimator="rloo")
        assert torch.equal(run(rewards, group), out.advantages * 2 + out.mean)
    assert counter.frame_count <= 2


def test_meta_tensors():
    out = group_advantages(torch.empty(5, device="meta"), torch.empty(5, dtype=torch.int64, device="meta"))
    assert [(t.shape, t.dtype, t.device.type) for t in out] == [((5,), d, "meta") for d in (F32, F32, F32, torch.int64)]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("layout", ["eights", "mixed", "sparse"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=names)
def test_a_reward_that_is_not_finite_is_named(bad, layout, dtype):
    rewards, group = torch.randn(50).to(dtype), LAYOUTS[layout](50)
    rewards[[23, 40]] = bad
    with pytest.raises(ValueError, match=rf"rewards\[23\] is {str(bad).replace('+', '')}.*finite"):
        group_advantages(rewards, group)


@only_cuda
@pytest.mark.parametrize("size", [50, 5000])
def test_rows_of_a_group_that_is_not_finite_are_nan(device, validation, size):
    rewards, group = torch.randn(size, device=device), torch.arange(size, device=device) // 5
    rewards[7], rewards[21] = NAN, INF
    out = group_advantages(rewards, group)
    affected = (group == 1) | (group == 4)
    for t in out[:3]:
        assert torch.equal(t.isnan(), affected)
    validation(True)
    with pytest.raises(ValueError, match=r"rewards\[7\] is nan"):
        group_advantages(rewards, group)


R, G = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
BAD = {
    "rewards list": (dict(rewards=[1.0]), TypeError, r"rewards is a list; a torch\.Tensor"),
    "group list": (dict(group=[1]), TypeError, r"group is a list; a torch\.Tensor"),
    "rewards int": (dict(rewards=R.long()), TypeError, r"rewards has dtype Long.*float32, bfloat16"),
    "rewards 2-d": (dict(rewards=R.view(2, 2)), ValueError, r"rewards has shape \[2, 2\]; expected \[B\]"),
    "rewards 0-d": (dict(rewards=R[0]), ValueError, r"rewards has shape \[\]"),
    "group float": (dict(group=R), TypeError, r"group has dtype Float; accepted: int64, int32"),
    "group bool": (dict(group=G.bool()), TypeError, r"group has dtype Bool"),
    "group length": (dict(group=G[:3]), ValueError, r"group has shape \[3\].*\[4\]"),
    "group 2-d": (dict(group=G.view(4, 1)), ValueError, r"group has shape \[4, 1\]"),
    "group device": (dict(group=G.to("meta")), ValueError, r"group is on meta but rewards is on cpu"),
    "estimator": (dict(estimator="reinforce"), ValueError, r"estimator is 'reinforce'; accepted: 'grpo', 'dr_grpo', 'rloo'"),
    "estimator type": (dict(estimator=0), ValueError, r"estimator is 0; accepted: 'grpo'"),
    "singleton": (dict(singleton="mean"), ValueError, r"singleton is 'mean'; accepted: 'zero', 'reward'"),
    "eps negative": (dict(eps=-1e-6), ValueError, r"eps is -1e-06; it must be finite and not negative"),
    "eps nan": (dict(eps=NAN), ValueError, r"eps is nan"),
    "eps inf": (dict(eps=INF), ValueError, r"eps is inf"),
    "eps string": (dict(eps="small"), TypeError, r"eps is 'small'; a number"),
    "eps tensor": (dict(eps=torch.ones(())), TypeError, r"eps is tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    wrong, error, message = BAD[case]
    arguments = {"rewards": R, "group": G, **wrong}
    with pytest.raises(error, match=message):
        group_advantages(arguments.pop("rewards"), arguments.pop("group"), **arguments)


@pytest.mark.parametrize(("estimator", "singleton"), [(3, 0), (-1, 0), (0, 2)])
def test_the_op_itself_refuses_unknown_options(estimator, singleton):
    with pytest.raises(RuntimeError, match=r"(estimator|singleton) is"):
        OP(R, G, estimator, 1e-6, singleton)


def test_it_is_exported():
    assert prefkern.group_advantages is group_advantages
