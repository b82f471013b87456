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
OWN_SUMS = ("opo", "mad", "pass_at_k", "pass_at_k_no_std")
STATS = ("mean", "std", "count")
ALL_STATS = (*STATS, "min", "max")
NAN, INF = math.nan, math.inf
OP, STATS_OP = torch.ops.prefkern.group_advantages.default, torch.ops.prefkern.group_advantages_stats.default


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def with_stats(rewards, group, **options):
    """Advantages, mean, std and count."""
    return group_advantages(rewards, group, outputs=STATS, **options)


def bits(t):
    return t.view({1: torch.uint8, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return all(x is y is None or torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


DEFAULTS = dict(
    estimator=0, singleton=0, ddof=1, eps=1e-6, combine=0, nan=0, virtual_value=1.0, virtual_count=0, batch=0, batch_eps=1e-6,
)  # fmt: skip


def op_options(**options):
    """The options of the op itself, in the order of its schema."""
    return tuple({**DEFAULTS, **options}.values())


def exactly(rewards, group, **options):
    return reference.group_advantages(rewards.cpu().double(), group.cpu(), **options)


def assert_fields(actual, expected, rtol, atol=0.0):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is None:
            continue
        assert a.shape == e.shape, name
        assert_close(a.cpu().to(e.dtype), e.cpu(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


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
    out = with_stats(rewards, group, estimator=estimator)
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
    "gaps": lambda size: (runs(size) * 3 + 11)[torch.randperm(size)],
    "wide gaps": lambda size: (runs(size) * 15 - 4)[torch.randperm(size)],
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
        out = with_stats(rewards, group, **options)
        assert [t.dtype for t in out[:4]] == [F64 if dtype == F64 else F32] * 3 + [torch.int64]
        assert {t.device for t in out[:4]} == {rewards.device}
        # Everything is computed in double: only the results are rounded.
        assert_fields(
            out, exactly(rewards, group, outputs=STATS, **options), *((1e-11, 1e-13) if dtype == F64 else (1.2e-7, 1e-13))
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_one(device, estimator):
    rewards, group = torch.tensor([2.0, 5.0, 5.0, -3.0], device=device), torch.tensor([9, 4, 4, 6], device=device)
    out = with_stats(rewards, group, estimator=estimator)
    assert out.advantages.tolist() == [0, 0, 0, 0]
    assert out.mean.tolist() == [2, 5, 5, -3]
    assert out.std.tolist() == [0, 0, 0, 0]
    assert out.count.tolist() == [1, 2, 2, 1]
    kept = with_stats(rewards, group, estimator=estimator, singleton="reward", eps=1.0)
    assert kept.advantages.tolist() == ([1, 0, 0, -1.5] if estimator == "grpo" else [2, 0, 0, -3])
    assert same_bits(kept[1:], out[1:])  # statistics are plain statistics


def test_no_rewards(device):
    out = with_stats(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert [t.shape for t in out[:4]] == [(0,)] * 4
    assert [t.dtype for t in out[:4]] == [F32, F32, F32, torch.int64]


def test_extreme_ids(device):
    low, high = -(2**63), 2**63 - 1
    group = torch.tensor([high, 0, low, -1, low, high, 0, -1], device=device)
    rewards = torch.arange(8.0, device=device)
    assert_fields(with_stats(rewards, group), exactly(rewards, group, outputs=STATS), 1e-7)
    order = group.argsort()
    assert_fields(with_stats(rewards, group[order]), exactly(rewards, group[order], outputs=STATS), 1e-7)


@pytest.mark.parametrize("stride", [2, 3])
def test_strides_and_narrow_ids(device, stride):
    rewards, group = torch.randn(60, device=device)[::stride], torch.randint(0, 6, (60,), device=device)[::stride]
    expected = with_stats(rewards.clone(), group.clone())
    assert same_bits(with_stats(rewards, group), expected)
    assert same_bits(with_stats(rewards, group.int()), expected)


def rewards_and_groups(dtype=F32):
    values = st.floats(-100, 100, width=32)
    rows = st.lists(st.tuples(values, st.integers(-2, 3)), min_size=1, max_size=60)
    return rows.map(lambda r: (torch.tensor([v for v, _ in r], dtype=dtype), torch.tensor([g for _, g in r])))


# -------------------------------------------------------------------------------------------------------------- options


def table_with_nan(size, columns, dtype=F64):
    """Rewards with NaN: some alone, whole rows, a column that a group lacks, and one that only one sample of it has."""
    group = LAYOUTS["mixed"](size)
    rewards = torch.randn(size, columns).to(dtype)
    rewards[torch.rand(size, columns) < 0.2] = NAN
    rewards[torch.rand(size) < 0.1] = NAN
    members = (group == group[0]).nonzero()[:, 0]
    rewards[members, 0] = NAN
    rewards[members[1:], 1] = NAN
    rewards[members[0], 1] = 2
    return rewards, group


@pytest.mark.parametrize("estimator", [*ESTIMATORS, *OWN_SUMS])
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
def test_tables_of_rewards(device, estimator, combine, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    for size, layout in ((1, "alone"), (7, "mixed"), (300, "mixed"), (300, "eights"), (5000, "sparse")):
        rewards, group = torch.randn(size, 3).to(dtype), LAYOUTS[layout](size)
        rewards[group == group[0]] = rewards[0].clone()  # a constant group
        lengths, weights = torch.randint(1, 9, (size,)), torch.tensor([1.0, -0.5, 3.0], dtype=F64)
        for singleton, ddof in (("zero", 1), ("reward", 0)):
            options = dict(
                estimator=estimator, combine=combine, singleton=singleton, ddof=ddof, eps=1e-4, outputs=ALL_STATS,
                weights=weights,
            )  # fmt: skip
            out = group_advantages(rewards.to(device), group.to(device), lengths=lengths.to(device), **options)
            expected = exactly(rewards, group, lengths=lengths, **options)
            assert_fields(out, expected, *((1e-11, 1e-12) if dtype == F64 else (2e-7, 1e-8)))
            if size > 1 and (group == group[0]).sum() > 1:
                assert out.advantages[group == group[0]].eq(0).all()
        assert torch.equal(
            out.advantages,
            group_advantages(
                rewards.to(device), group.to(device), lengths=lengths.to(device),
                **{**options, "outputs": (), "weights": weights.tolist()},
            ).advantages,
        )  # fmt: skip


@pytest.mark.parametrize("estimator", OWN_SUMS)
def test_estimators_with_sums_of_their_own(device, estimator):
    for layout in LAYOUTS.values():
        rewards, group = torch.randint(0, 4, (200,)).float() / 3, layout(200)
        lengths = torch.randint(0, 9, (200,)) + (torch.arange(200) % 2)
        lengths[group == group[0]] += 1
        options = dict(estimator=estimator, eps=1e-4, singleton="reward", outputs=("max", "count"))
        try:
            expected = exactly(rewards, group, lengths=lengths, **options)
        except ValueError:
            lengths = lengths + 1
            expected = exactly(rewards, group, lengths=lengths, **options)
        out = group_advantages(rewards.to(device), group.to(device), lengths=lengths.to(device), **options)
        assert_fields(out, expected, 1.2e-7, 1e-12)


def test_the_first_of_equal_rewards_is_the_best(device):
    group = torch.tensor([3, 1, 3, 1, 3, 1, 3], device=device)
    rewards = torch.tensor([0.5, 1.0, 2.0, 0.0, 2.0, 0.25, 1.0], device=device)
    out = group_advantages(rewards, group, estimator="pass_at_k_no_std").advantages
    assert out.tolist() == [0, 0.75, 0, 0, 0, 0, 0]  # the best two of group 3 are equal: 2 - 2
    rewards[4] = 1.5
    assert group_advantages(rewards, group, estimator="pass_at_k_no_std").advantages.tolist() == [0, 0.75, 0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("rule", ["zero", "ignore"])
@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("batch", ["none", "seq", "token", "std", "nonzero"])
def test_rewards_that_are_nan(device, rule, combine, batch):
    if combine == "normalize_then_sum" and batch in ("std", "nonzero"):
        pytest.skip("refused")
    for size, dtype in ((40, F32), (300, F32), (5000, F32), *([] if device == "cuda" else [(300, F64)])):
        rewards, group = table_with_nan(size, 3, dtype)
        lengths = torch.randint(0, 9, (size,))
        for estimator, singleton in (("grpo", "zero"), ("dr_grpo", "reward"), ("grpo", "reward")):
            options = dict(
                estimator=estimator, combine=combine, nan=rule, singleton=singleton, eps=1e-3, batch=batch, outputs=ALL_STATS,
            )  # fmt: skip
            out = group_advantages(rewards.to(device), group.to(device), lengths=lengths.to(device), **options)
            expected = exactly(rewards, group, lengths=lengths, **options)
            assert_fields(out, expected, *((1e-10, 1e-11) if dtype == F64 else (1e-6, 1e-6)))
            if rule == "ignore":
                assert out.advantages[rewards.isnan().all(1)].eq(0).all()
                assert out.advantages.isfinite().all()


def test_nan_in_one_column(device):
    """By the fast walk where there is none, and by the other where there is."""
    rewards, group = torch.randn(100, device=device), torch.arange(100, device=device) // 8
    assert same_bits(with_stats(rewards, group, nan="ignore"), with_stats(rewards, group))
    rewards[8:16:2] = NAN
    out = with_stats(rewards, group, nan="ignore")
    assert_fields(out, exactly(rewards, group, nan="ignore", outputs=STATS), 1.2e-7, 1e-12)
    assert out.count[8] == 4
    zero = with_stats(rewards, group, nan="zero")
    assert_fields(zero, with_stats(rewards.nan_to_num(0.0), group), 1.2e-7, 1e-9)


def test_nothing_but_nan(device):
    rewards, group = torch.full((4, 2), NAN, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    for batch in ("none", "seq", "std"):
        out = group_advantages(rewards, group, nan="ignore", batch=batch, outputs=("count", "mean"))
        assert out.advantages.tolist() == [0] * 4
        assert out.count.tolist() == [0] * 4
        assert out.mean.isnan().all()


@pytest.mark.parametrize("batch", ["std", "seq", "token", "nonzero"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=names)
def test_batch_stage(device, batch, estimator, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    for size in (1, 2, 9, 300, 10_000):
        rewards, group, lengths = torch.randint(0, 3, (size,)).to(dtype), LAYOUTS["mixed"](size), torch.randint(2, 90, (size,))
        options = dict(estimator=estimator, batch=batch, eps=1e-3, lengths=lengths)
        for batch_eps in (None, 0.25) if batch != "nonzero" else (None,):
            out = group_advantages(
                rewards.to(device), group.to(device), **{**options, "lengths": lengths.to(device)}, batch_eps=batch_eps
            )
            expected = exactly(rewards, group, **options, batch_eps=batch_eps)
            assert_fields(out, expected, *((1e-10, 1e-11) if dtype == F64 else (1e-6, 1e-6)))


def test_a_batch_of_constant_groups(device):
    rewards, group = torch.tensor([0.1, 0.1, 0.3, 0.3], device=device), torch.tensor([0, 0, 1, 1], device=device)
    lengths = torch.tensor([2, 1, 1, 1], device=device)
    for batch in ("std", "seq", "token", "nonzero"):
        for batch_eps in (None, 0.0) if batch != "nonzero" else (None,):
            out = group_advantages(rewards, group, batch=batch, batch_eps=batch_eps, lengths=lengths)
            assert out.advantages.tolist() == [0] * 4


def test_a_constant_group_among_tokens_is_below_the_mean(device):
    """verl's own behaviour: the mean over tokens is not 0, and a group of equal rewards gets its negative."""
    rewards, group = torch.tensor([1.0, 0.0, 1.0, 1.0], device=device), torch.tensor([0, 0, 1, 1], device=device)
    out = group_advantages(rewards, group, batch="token", lengths=torch.tensor([9, 1, 1, 1], device=device)).advantages
    assert out[2] == out[3] < 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 4), st.sampled_from(["grpo", "dr_grpo"]))
def test_virtual_samples_are_samples(values, count, estimator):
    """The closed form against a group that really has them."""
    rewards = torch.tensor(values, dtype=F64) / 3
    group = torch.zeros(len(values), dtype=torch.int64)
    joined, ids = (
        torch.cat([rewards, torch.full((count,), 0.8, dtype=F64)]),
        torch.zeros(len(values) + count, dtype=torch.int64),
    )
    out = group_advantages(
        rewards, group, estimator=estimator, virtual_value=0.8, virtual_count=count, singleton="calibrate", outputs=STATS
    )
    expected = group_advantages(joined, ids, estimator=estimator).advantages[: len(values)]
    assert_close(out.advantages, expected, rtol=1e-10, atol=1e-12)
    assert same_bits(out[1:], with_stats(rewards, group)[1:])  # of the real samples


def test_virtual_samples_in_every_walk(device):
    for layout in LAYOUTS.values():
        rewards, group = torch.randn(300), layout(300)
        for singleton in ("zero", "reward", "calibrate"):
            options = dict(virtual_value=2.0, virtual_count=3, singleton=singleton, outputs=ALL_STATS)
            out = group_advantages(rewards.to(device), group.to(device), **options)
            assert_fields(out, exactly(rewards, group, **options), 2e-7, 1e-12)
            plain = group_advantages(rewards.to(device), group.to(device), **{**options, "outputs": ()}).advantages
            assert_close(plain, out.advantages, rtol=2e-7, atol=1e-12)
    equal = group_advantages(
        torch.full((5,), 0.1, dtype=F64), torch.zeros(5, dtype=torch.int64), virtual_value=0.1, virtual_count=2
    )
    assert equal.advantages.tolist() == [0] * 5


@given(rewards_and_groups(F64), st.sampled_from(["mad", "opo"]))
def test_invariants_of_the_other_estimators(data, estimator):
    """sum |A| of mad is n, and sum l A of opo is 0."""
    rewards, group = data
    lengths = torch.arange(len(rewards)) % 5 + 1
    out = group_advantages(rewards, group, estimator=estimator, eps=0.0, lengths=lengths, outputs=("min", "max", "count"))
    for g in group.unique():
        rows = group == g
        a, n = out.advantages[rows], rows.sum()
        if out.min[rows][0] == out.max[rows][0]:
            assert a.eq(0).all()
        elif estimator == "mad":
            assert_close(a.abs().sum(), n.double(), rtol=1e-9, atol=0)
        else:
            assert abs((a * lengths[rows]).sum()) <= 1e-10 * (1 + (a * lengths[rows]).abs().sum())


@given(rewards_and_groups(F64), st.floats(-5, 5))
def test_apart_a_shift_or_scale_of_one_reward_changes_nothing(data, shift):
    rewards, group = data
    table = torch.stack([rewards, rewards.sin()], 1)
    moved = torch.stack([rewards * 2, rewards.sin() + shift * (group == group[0])], 1)
    a, b = (group_advantages(t, group, combine="normalize_then_sum", eps=0.0, outputs=("std",)) for t in (table, moved))
    well = (a.std > 1e-3).all(1)  # elsewhere rounding of the shift is most of the spread
    assert_close(a.advantages[well], b.advantages[well], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_only_what_is_named_is_allocated(device, allocations):
    rewards, group = torch.randn(100_000), torch.arange(100_000) // 8
    group_advantages(rewards, group)
    assert allocations(lambda: group_advantages(rewards, group)).peak == 400_000
    out = allocations(lambda: group_advantages(rewards, group, outputs=("max",)))
    assert out.peak == 800_000
    assert (out.result.mean, out.result.min) == (None, None)


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
    out = with_stats(rewards, group, estimator=estimator, eps=0.0)
    assert torch.equal(out.advantages, group_advantages(rewards, group, estimator=estimator, eps=0.0).advantages)
    assert out.advantages[1:-1].eq(0).all()
    assert out.std[1:-1].eq(0).all()
    assert out.mean[1:-1].eq(value).all()


def test_a_small_spread_on_a_large_offset(device):
    """E[r^2] - m^2 would have nothing left here."""
    rewards = torch.tensor([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3], device=device)
    out = with_stats(rewards, torch.zeros(4, dtype=torch.int64, device=device), eps=0.0)
    assert_close(out.std.cpu(), torch.full((4,), math.sqrt(5 / 3)), rtol=1e-7, atol=0)
    assert_close(out.advantages.cpu(), torch.tensor([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(5 / 3), rtol=1e-7, atol=0)


@given(rewards_and_groups(), st.randoms(use_true_random=False), st.sampled_from(ESTIMATORS))
def test_permuting_rows_permutes_the_results(data, random, estimator):
    rewards, group = data
    order = list(range(len(rewards)))
    random.shuffle(order)
    out = with_stats(rewards, group, estimator=estimator)
    permuted = with_stats(rewards[order], group[order], estimator=estimator)
    for a, b in zip(permuted[:3], out[:3], strict=True):  # one unit in the last place
        assert_close(a, b[order], rtol=1.2e-7, atol=1e-11)
    assert torch.equal(permuted.count, out.count[order])


@given(rewards_and_groups(F64), st.sampled_from(ESTIMATORS))
def test_advantages_of_a_group_add_up_to_zero(data, estimator):
    rewards, group = data
    out = with_stats(rewards, group, estimator=estimator)
    for g in group.unique():
        members = group == g
        assert abs(out.advantages[members].sum()) <= 1e-12 * (1 + out.advantages[members].abs().sum())
        assert out.count[members].eq(members.sum()).all()


@given(rewards_and_groups(F64))
def test_rloo_is_a_scaled_dr_grpo_and_leaves_oneself_out(data):
    rewards, group = data
    rloo, dr_grpo = (with_stats(rewards, group, estimator=e) for e in ("rloo", "dr_grpo"))
    n = rloo.count.double()
    assert_close(rloo.advantages, torch.where(n > 1, n / (n - 1), 0.0) * dr_grpo.advantages, rtol=1e-13, atol=1e-13)
    for i in range(len(rewards)):
        others = (group == group[i]) & (torch.arange(len(rewards)) != i)
        if others.any():
            assert_close(rloo.advantages[i], rewards[i] - rewards[others].mean(), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("layout", ["ascending", "eights", "mixed", "sparse"])
def test_same_bits_on_any_number_of_threads(threads, layout):
    rewards, group = torch.randn(100_003), LAYOUTS[layout](100_003)
    for options in ({}, {"outputs": STATS}, {"estimator": "mad", "batch": "seq"}):
        results = []
        for n in (1, 2, 2):
            threads(n)
            results.append(group_advantages(rewards, group, **options))
        assert same_bits(results[0], results[1])
        assert same_bits(results[1], results[2])


def test_a_run_that_spans_several_tasks(threads):
    """Work is cut at fixed rows; groups are not."""
    threads(2)
    rewards, group = torch.randn(200_000), torch.zeros(200_000, dtype=torch.int64)
    group[150_001:] = 5
    assert_fields(with_stats(rewards, group), exactly(rewards, group, outputs=STATS), 1.2e-7, 1e-9)


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
    out = with_stats(rewards, group)
    assert not any(t.requires_grad for t in out[:4])
    assert same_bits(out, with_stats(rewards.detach(), group))
    with torch.inference_mode():
        assert same_bits(out, with_stats(rewards, group))


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=names)
def test_opcheck(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")
    group, r = torch.randint(0, 3, (10,), device=device), torch.randn(10, device=device).to(dtype)
    opcheck(OP, (r, group, None, None, *op_options()))
    opcheck(OP, (r[:0], group[:0].int(), None, None, *op_options(estimator=2, singleton=1)))
    table, weights, n = torch.randn(10, 3, device=device).to(dtype), torch.rand(3, dtype=F64), torch.arange(10, device=device)
    opcheck(OP, (table, group, weights, n, *op_options(combine=1, batch=3)))
    for combine in (0, 1):
        for outputs in (0, 0b10110, 0b11111):
            opcheck(STATS_OP, (table, group, None, n, *op_options(estimator=3, combine=combine), outputs))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_rewards(device, dynamic):
    """fullgraph, four sizes, at most two compilations (the second has a symbolic B)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def plain(rewards, group):
        out = with_stats(rewards * 2, group, estimator="rloo")
        table = group_advantages(torch.stack([rewards, -rewards], 1), group, weights=(1, 2), combine="normalize_then_sum")
        return out.advantages * 2 + out.mean + table.advantages

    run = torch.compile(plain, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (6, 11, 30, 31):
        rewards, group = torch.randn(size, device=device), torch.randint(0, 4, (size,), device=device)
        assert torch.equal(run(rewards, group), plain(rewards, group))
    assert counter.frame_count <= 2


def test_meta_tensors():
    out = with_stats(torch.empty(5, device="meta"), torch.empty(5, dtype=torch.int64, device="meta"))
    assert [(t.shape, t.dtype, t.device.type) for t in out[:4]] == [((5,), d, "meta") for d in (F32, F32, F32, torch.int64)]


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
    out = with_stats(rewards, group)
    affected = (group == 1) | (group == 4)
    for t in out[:3]:
        assert torch.equal(t.isnan(), affected)
    validation(True)
    with pytest.raises(ValueError, match=r"rewards\[7\] is nan"):
        group_advantages(rewards, group)


R, G, N = torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
T = torch.zeros(4, 2)
BAD = {
    "rewards list": (dict(rewards=[1.0]), TypeError, r"rewards is a list; a torch\.Tensor"),
    "group list": (dict(group=[1]), TypeError, r"group is a list; a torch\.Tensor"),
    "rewards int": (dict(rewards=R.long()), TypeError, r"rewards has dtype Long.*float32, bfloat16"),
    "rewards 3-d": (dict(rewards=R.view(4, 1, 1)), ValueError, r"rewards has shape \[4, 1, 1\]; expected \[B\] or \[B, K\]"),
    "rewards 0-d": (dict(rewards=R[0]), ValueError, r"rewards has shape \[\]"),
    "no columns": (dict(rewards=torch.zeros(4, 0)), ValueError, r"rewards has shape \[4, 0\]; 1 to 64 columns"),
    "many columns": (dict(rewards=torch.zeros(4, 65)), ValueError, r"rewards has shape \[4, 65\]; 1 to 64 columns"),
    "group float": (dict(group=R), TypeError, r"group has dtype Float; accepted: int64, int32"),
    "group bool": (dict(group=G.bool()), TypeError, r"group has dtype Bool"),
    "group length": (dict(group=G[:3]), ValueError, r"group has shape \[3\].*\[4\]"),
    "group of a table": (dict(rewards=T, group=torch.zeros(8, dtype=torch.int64)), ValueError, r"group has shape \[8\].*\[4\]"),
    "group 2-d": (dict(group=G.view(4, 1)), ValueError, r"group has shape \[4, 1\]"),
    "group device": (dict(group=G.to("meta")), ValueError, r"group is on meta but rewards is on cpu"),
    "estimator": (dict(estimator="reinforce"), ValueError, r"estimator is 'reinforce'; accepted: 'grpo', 'dr_grpo', 'rloo'"),
    "estimator type": (dict(estimator=0), ValueError, r"estimator is 0; accepted: 'grpo'"),
    "singleton": (dict(singleton="mean"), ValueError, r"singleton is 'mean'; accepted: 'zero', 'reward', 'calibrate'"),
    "eps negative": (dict(eps=-1e-6), ValueError, r"eps is -1e-06; it must be finite and not negative"),
    "eps nan": (dict(eps=NAN), ValueError, r"eps is nan"),
    "eps inf": (dict(eps=INF), ValueError, r"eps is inf"),
    "eps string": (dict(eps="small"), TypeError, r"eps is 'small'; a number"),
    "eps tensor": (dict(eps=torch.ones(())), TypeError, r"eps is tensor"),
    "ddof": (dict(ddof=2), ValueError, r"ddof is 2; accepted: 0, 1"),
    "ddof float": (dict(ddof=1.0), TypeError, r"ddof is 1.0; an integer"),
    "weights length": (dict(rewards=T, weights=[1.0]), ValueError, r"weights has shape \[1\]; .*\[4, 2\], so \[2\]"),
    "weights of one": (dict(weights=(1, 2)), ValueError, r"weights has shape \[2\]; rewards has shape \[4\], so \[1\]"),
    "weights nan": (dict(rewards=T, weights=[1.0, NAN]), ValueError, r"weights\[1\] is nan; every weight must be finite"),
    "weights string": (dict(rewards=T, weights="11"), TypeError, r"weights is '11'; a sequence of numbers"),
    "weights number": (dict(rewards=T, weights=2.0), TypeError, r"weights is 2.0; a sequence of numbers"),
    "weights of strings": (dict(rewards=T, weights=[1.0, "a"]), TypeError, r"weights\[1\] is 'a'; a number"),
    "weights 2-d": (dict(rewards=T, weights=torch.ones(1, 2)), ValueError, r"weights has shape \[1, 2\]"),
    "weights int": (dict(rewards=T, weights=torch.ones(2).int()), TypeError, r"weights has dtype Int.*float32"),
    "combine": (dict(combine="sum"), ValueError, r"combine is 'sum'; accepted: 'sum_then_normalize', 'normalize_then_sum'"),
    "nan": (dict(nan="drop"), ValueError, r"nan is 'drop'; accepted: 'error', 'zero', 'ignore'"),
    "lengths list": (dict(lengths=[1] * 4), TypeError, r"lengths is a list; a torch\.Tensor"),
    "lengths float": (dict(lengths=R), TypeError, r"lengths has dtype Float; accepted: int64, int32"),
    "lengths shape": (dict(lengths=N[:3]), ValueError, r"lengths has shape \[3\].*\[4\]"),
    "lengths device": (dict(lengths=N.to("meta")), ValueError, r"lengths is on meta but rewards is on cpu"),
    "lengths negative": (dict(lengths=-N, estimator="opo"), ValueError, r"lengths\[0\] is -1; it must not be negative"),
    "opo without lengths": (dict(estimator="opo"), ValueError, r"lengths is None; estimator 'opo' and batch 'token' need it"),
    "opo without tokens": (dict(estimator="opo", lengths=N * 0), ValueError, r"lengths of the group of row 0 add up to 0"),
    "tokens without lengths": (dict(batch="token"), ValueError, r"lengths is None"),
    "one token": (dict(batch="token", lengths=torch.tensor([0, 0, 1, 0])), ValueError, r"lengths add up to 1; .*2 tokens"),
    "virtual value": (dict(virtual_value=INF, virtual_count=1), ValueError, r"virtual_value is inf; it must be finite"),
    "virtual value string": (dict(virtual_value="1"), TypeError, r"virtual_value is '1'; a number"),
    "virtual count": (dict(virtual_count=-1), ValueError, r"virtual_count is -1; it must not be negative"),
    "virtual count float": (dict(virtual_count=0.5), TypeError, r"virtual_count is 0.5; an integer"),
    "virtual rloo": (dict(virtual_count=1, estimator="rloo"), ValueError, r"virtual_count is 1; .*'grpo' and 'dr_grpo'"),
    "batch": (dict(batch="group"), ValueError, r"batch is 'group'; accepted: 'none', 'std', 'seq', 'token', 'nonzero'"),
    "batch eps": (dict(batch="seq", batch_eps=-1.0), ValueError, r"batch_eps is -1; it must be finite and not negative"),
    "batch eps string": (dict(batch="seq", batch_eps="1"), TypeError, r"batch_eps is '1'; a number or None"),
    "batch eps for none": (dict(batch_eps=1.0), ValueError, r"batch_eps is 1.0 but batch is 'none'"),
    "std of rloo": (dict(batch="std", estimator="rloo"), ValueError, r"batch is 'std'.*'grpo' and 'dr_grpo'"),
    "std apart": (dict(rewards=T, batch="std", combine="normalize_then_sum"), ValueError, r"batch is 'std' with combine"),
    "nonzero apart": (dict(rewards=T, batch="nonzero", combine="normalize_then_sum"), ValueError, r"batch is 'nonzero' with"),
    "outputs": (dict(outputs=("median",)), ValueError, r"outputs has 'median'; accepted: 'mean', 'std', 'count', 'min', 'max'"),
    "outputs string": (dict(outputs="mean"), ValueError, r"outputs is the string 'mean'; a tuple"),
    "outputs number": (dict(outputs=3), TypeError, r"outputs is 3; a tuple"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    wrong, error, message = BAD[case]
    arguments = {"rewards": R, "group": G, **wrong}
    with pytest.raises(error, match=message):
        group_advantages(arguments.pop("rewards"), arguments.pop("group"), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("estimator", 7), ("estimator", -1), ("singleton", 3), ("combine", 2), ("nan", 3), ("batch", 5), ("ddof", -1)],
)
def test_the_op_itself_refuses_unknown_options(name, value):
    with pytest.raises(RuntimeError, match=rf"{name} is {value}; accepted"):
        OP(R, G, None, None, *op_options(**{name: value}))
    with pytest.raises(RuntimeError, match=r"outputs is 32; accepted: 0 to 31"):
        STATS_OP(R, G, None, None, *op_options(), 32)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_reward_of_a_table_is_named_by_row_and_column(bad):
    rewards = torch.randn(6, 3)
    rewards[4, 1] = bad
    for combine in ("sum_then_normalize", "normalize_then_sum"):
        with pytest.raises(ValueError, match=rf"rewards\[4, 1\] is {bad}; every reward must be finite$"):
            group_advantages(rewards, torch.zeros(6, dtype=torch.int64), combine=combine)
    for rule in ("zero", "ignore"):
        rewards[4, 1] = INF
        with pytest.raises(ValueError, match=r"rewards\[4, 1\] is inf; every reward must be finite or NaN"):
            group_advantages(rewards, torch.zeros(6, dtype=torch.int64), nan=rule)


def test_they_are_exported():
    assert prefkern.group_advantages is group_advantages
    names = {
        "batch_moments", "batch_normalize", "group_advantages", "merge_moments", "pair_masked_advantages", "question_weights",
        "whiten",
    }  # fmt: skip
    assert names <= set(prefkern.__all__)
    assert names <= set(reference.__all__)
