"""Quantiles and top values of all ranks: equal to one process's, bit by bit, ties and NaN as there."""

import math
import re
from collections.abc import Callable
from itertools import accumulate, product
from typing import Any

import pytest
import torch

import prefkern
from prefkern import distributed
from ranks import run_ranks

F64 = torch.float64
FRACTIONS = {2: (0.0, 0.07, 0.2, 0.5, 0.999, 1.0), 4: (0.13,)}
ROWS = {2: (9, 11), 4: (0, 12, 5, 3)}


def inputs() -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """[20, 7] each: entropies, few different values, both zeros, infinities, NaN inside and outside the mask, low precision."""
    mask = torch.rand(20, 7) < 0.7
    entropy = torch.rand(20, 7).square() * 3
    hidden_nan = entropy.masked_fill(~mask, math.nan)
    nan = hidden_nan.clone()
    nan[0, 0], nan[11, 3] = math.nan, math.nan
    every = mask.clone()
    every[0, 0], every[11, 3] = True, True
    extreme = torch.randn(20, 7) * 1e38 * 3
    extreme[torch.rand(20, 7) < 0.3] = math.inf
    extreme[torch.rand(20, 7) < 0.2] = -math.inf
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45])[torch.randint(4, (20, 7))]
    return [
        (entropy, None), (entropy, mask), (hidden_nan, mask), (nan, every), (entropy, torch.zeros_like(mask)),
        (torch.randint(4, (20, 7)).float(), mask), (torch.full((20, 7), -2.5), None), (extreme, mask), (zeros, None),
        (entropy.bfloat16(), mask), (entropy.half(), None), (torch.randn(20, 7, dtype=F64), mask),
        (torch.randint(-3, 3, (20, 7)).to(F64) * 1e300, None), ((torch.rand(7, 20) * 2).T, mask),
    ]  # fmt: skip


def share(rank: int, counts: tuple[int, ...], t: torch.Tensor) -> torch.Tensor:
    ends = [0, *accumulate(counts)]
    return t[ends[rank] : ends[rank + 1]]


def own_parts(rank: int, counts: tuple[int, ...]) -> None:
    fractions = FRACTIONS[len(counts)]
    for i, (values, mask) in enumerate(inputs()):
        own, own_mask = share(rank, counts, values), None if mask is None else share(rank, counts, mask)
        for fraction, rule in product(fractions, ("count", "trl")):
            found = distributed.top_quantile_mask(own, own_mask, fraction=fraction, rule=rule, process_group="world")
            whole = prefkern.top_quantile_mask(values, mask, fraction=fraction, rule=rule)
            assert found.shape == own.shape and torch.equal(found, share(rank, counts, whole)), (i, fraction, rule)
        for q, interpolation in product(fractions, ("linear", "lower", "higher")):
            at = distributed.masked_quantile(own, q, own_mask, interpolation=interpolation, process_group="world")
            expected = prefkern.masked_quantile(values, q, mask, interpolation=interpolation)
            assert at.dtype == expected.dtype and at.shape == ()
            assert torch.equal(at, expected) or (at.isnan() and expected.isnan()), (i, q, interpolation, at, expected)


@pytest.mark.parametrize("size", [2, 4])
def test_equal_to_one_process(size: int) -> None:
    run_ranks(own_parts, size, ROWS[size])


def kept_of_many(rank: int) -> None:
    values = torch.randn(3, 50_000).exp().round(decimals=3)  # many of them equal
    mask = torch.rand(3, 50_000) < 0.9
    for fraction in (0.2, 0.0123):
        found = distributed.top_quantile_mask(values[rank], mask[rank], fraction=fraction, process_group="world")
        assert torch.equal(found, prefkern.top_quantile_mask(values, mask, fraction=fraction)[rank])
    q = distributed.masked_quantile(values[rank], 0.37, mask[rank], process_group="world")
    assert torch.equal(q, prefkern.masked_quantile(values, 0.37, mask))


def test_many_values_of_few_kinds() -> None:
    run_ranks(kept_of_many, 3)


def messages(rank: int) -> list[list[tuple[str, int]]]:
    sent: list[list[tuple[str, int]]] = []
    reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather
    torch.distributed.all_reduce = lambda t, **options: (sent[-1].append(("reduce", t.nbytes)), reduce(t, **options))
    torch.distributed.all_gather = lambda out, t, **options: (sent[-1].append(("gather", t.nbytes)), gather(out, t, **options))
    for n, dtype in ((10, torch.bfloat16), (5000, torch.float32), (10, F64)):
        sent.append([])
        distributed.top_quantile_mask(torch.rand(n, dtype=dtype), process_group="world")
    for rule, interpolation in (("trl", "linear"), ("trl", "lower")):
        sent.append([])
        if interpolation == "linear":
            distributed.top_quantile_mask(torch.rand(n), rule=rule, process_group="world")
        else:
            distributed.masked_quantile(torch.rand(n), 0.3, interpolation=interpolation, process_group="world")
    return sent


def test_messages_do_not_grow_with_the_values() -> None:
    round_of_counts = ("reduce", 8 * (2048 + 8))
    count = [round_of_counts] * 3 + [("gather", 8)]
    expected = [count, count, [round_of_counts] * 6 + [("gather", 8)], [round_of_counts] * 3 + [("reduce", 8)], count[:3]]
    assert run_ranks(messages, 2) == [expected] * 2


def test_without_a_group_it_is_the_op() -> None:
    for values, mask in inputs()[:3]:
        found = distributed.top_quantile_mask(values, mask, fraction=0.3, process_group=None)
        assert torch.equal(found, prefkern.top_quantile_mask(values, mask, fraction=0.3))
        at = distributed.masked_quantile(values, 0.3, mask, process_group=None)
        assert torch.equal(at, prefkern.masked_quantile(values, 0.3, mask))


def outcome(call: Callable[[], Any]) -> str:
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refused(rank: int) -> list[str]:
    values, other = torch.zeros(4), rank == 1
    top, quantile = distributed.top_quantile_mask, distributed.masked_quantile
    mask = torch.ones(4, dtype=torch.bool)
    calls: list[Callable[[], Any]] = [
        lambda: top(values.double() if other else values, process_group="world"),
        lambda: top(values, fraction=0.3 if other else 0.2, process_group="world"),
        lambda: top(values, rule="trl" if other else "count", process_group="world"),
        lambda: quantile(values, 0.5, process_group="world") if other else top(values, fraction=0.5, process_group="world"),
        lambda: top(values, mask[:3] if other else mask, process_group="world"),
        lambda: top(values, mask.int() if other else mask, rule="trl", process_group="world"),
        lambda: quantile(values.long() if other else values, 0.5, process_group="world"),
        lambda: quantile([0.0] if other else values, 0.5, process_group="world"),
        lambda: quantile(values, 1.5, process_group="world"),
        lambda: quantile(values, 0.5, interpolation="cubic", process_group="world"),
        lambda: top(values, fraction=0.25, process_group="world").sum().item(),
    ]
    return [outcome(call) for call in calls]


def test_a_bad_argument_is_an_error_on_every_rank() -> None:
    expected = [
        (
            r"ValueError: top_quantile_mask: the ranks .* disagree; rank 1 has fraction=0.2, rule=count of float64, another",
            None,
        ),
        ("ValueError: top_quantile_mask: the ranks .* disagree; rank 1 has fraction=0.3, rule=count of float32", None),
        ("ValueError: top_quantile_mask: .* rule=trl", None),
        ("ValueError: masked_quantile: .* disagree", None),
        (r"ValueError: mask has shape \[3\]; values has shape \[4\]", "RuntimeError: top_quantile_mask: rank 1 refuses"),
        ("TypeError: mask has dtype torch.int32", "RuntimeError: top_quantile_mask: rank 1 refuses"),
        ("TypeError: values has dtype torch.int64", "RuntimeError: masked_quantile: rank 1 refuses"),
        ("TypeError: values is a list", "RuntimeError: masked_quantile: rank 1 refuses"),
        (r"ValueError: q is 1.5; it must lie in \[0, 1\]", "ValueError: q is 1.5"),
        ("ValueError: interpolation is 'cubic'; accepted: 'linear'", "ValueError: interpolation is 'cubic'"),
        ("returned 0", "returned [30]"),
    ]
    ranks = run_ranks(refused, 3)
    for i, (on_rank_1, on_others) in enumerate(expected):
        for rank, heard in enumerate(ranks):
            pattern = (
                on_rank_1 if rank == 1 else on_others or "ValueError: top_quantile_mask: the ranks of process_group disagree"
            )
            assert re.search(pattern, heard[i]), (i, rank, heard[i])
    assert [heard[-1] for heard in ranks] == ["returned 3", "returned 0", "returned 0"]  # of equal ones, the first
