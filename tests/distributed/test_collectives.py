"""Sums in one message, counts, process groups that are none, and ranks that do not come."""

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import prefkern
from prefkern import distributed
from ranks import run_ranks

F64 = torch.float64


def sums(rank: int) -> dict[str, Any]:
    sizes: list[int] = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda t, **options: (sizes.append(t.nbytes), reduce(t, **options))
    table = torch.arange(6.0).view(2, 3) + rank
    number, many = torch.tensor(rank + 1, dtype=torch.int32), torch.full((3, 400), 0.1, dtype=F64)
    low = torch.tensor([1.0, rank], dtype=torch.bfloat16)
    found = distributed.packed_sum(table.T, number, low, torch.zeros(0), process_group="world")
    (large,) = distributed.packed_sum(many * rank, process_group="world")
    big = 2**51 + rank
    (exact,) = distributed.packed_sum(torch.tensor([big, -big]), process_group="world")
    weights = torch.linspace(0, 1, 1200, dtype=F64).view(3, 400).requires_grad_()
    (total,) = distributed.packed_sum(weights, process_group="world", gradient="mean")
    (total * many).sum().backward()
    return {"found": found, "large": large, "exact": exact, "grad": weights.grad, "sizes": sizes}


@pytest.mark.parametrize("size", [2, 4])
def test_packed_sum(size: int) -> None:
    ranks = run_ranks(sums, size)
    all_of_them = size * (size - 1) // 2
    for rank in ranks:
        table, number, low, empty = rank["found"]
        assert torch.equal(table, (torch.arange(6.0).view(2, 3) * size + all_of_them).T)
        assert number.dtype == torch.int64 and number.shape == () and number == all_of_them + size
        assert low.dtype == torch.float32 and low.tolist() == [size, all_of_them]
        assert empty.shape == (0,)
        assert_close(rank["large"], torch.full((3, 400), 0.1 * all_of_them, dtype=F64))
        assert torch.equal(rank["large"], ranks[0]["large"])
        assert rank["exact"].tolist() == [size * 2**51 + all_of_them, -size * 2**51 - all_of_them]
        assert torch.equal(rank["grad"], torch.full((3, 400), 0.1, dtype=F64) * size)
        assert rank["sizes"] == [4096, 4096, 8 * (1200 - 504), 4096, 4096, 8 * (1200 - 504)]


def counts(rank: int) -> list[torch.Tensor]:
    """A loss over all tokens of all ranks: its parts add up to that of one process, and so do the gradients."""
    logp = -torch.rand(4, 9, dtype=F64)
    old, advantages = logp + 0.3 * torch.randn(4, 9, dtype=F64), torch.randn(4, dtype=F64)
    mask = torch.rand(4, 9) < 0.5
    whole = logp.clone().requires_grad_()
    expected = prefkern.policy_loss(whole, old, advantages, mask).loss
    expected.backward()
    rows = slice(0, 1) if rank == 0 else slice(1, 4)
    own = logp[rows].clone().requires_grad_()
    norm = distributed.global_count(mask[rows], process_group="world")
    assert norm.dtype == torch.int64 and norm.shape == () and norm == mask.sum()
    loss = prefkern.policy_loss(own, old[rows], advantages[rows], mask[rows], norm=norm).loss
    loss.backward()
    assert_close(own.grad, whole.grad[rows], rtol=1e-12, atol=1e-15)
    return [loss.detach(), expected.detach()]


def test_the_count_that_a_loss_is_divided_by() -> None:
    (one, expected), (other, _) = run_ranks(counts, 2)
    assert_close(one + other, expected, rtol=1e-12, atol=0)
    assert distributed.global_count(torch.tensor([True, False]), process_group=None) == 1


# ---- process groups


def outcome(call: Callable[[], Any]) -> str:
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def in_groups(rank: int) -> list[str]:
    pairs = [dist.new_group([0, 2]), dist.new_group([1])]
    x = torch.tensor([rank + 1.0])
    own = pairs[rank % 2]
    rows = {"x": torch.full((rank + 1,), rank)}
    return [
        outcome(lambda: float(distributed.packed_sum(x, process_group=own)[0])),
        outcome(lambda: list(map(int, distributed.gather_rows(rows, process_group=own).tensors["x"]))),
        outcome(lambda: distributed.gather_rows(rows, process_group=own).own),
        outcome(lambda: distributed.top_quantile_mask(x, fraction=0.5, process_group=own).item()),
        outcome(lambda: float(distributed.packed_sum(x, process_group=pairs[1 - rank % 2])[0])),
        outcome(lambda: float(distributed.packed_sum(x, process_group=dist.group.WORLD)[0])),
    ]


def test_groups_of_some_ranks() -> None:
    """Ranks are those of the group; a group of one sends nothing; who is no member is told so, and nobody waits for him."""
    none = r"ValueError: process_group is one that this rank does not belong to; only its members may call"
    zero, one, two = run_ranks(in_groups, 3)
    assert zero == [
        "returned 4.0",
        "returned [0, 2, 2, 2]",
        "returned slice(0, 1, None)",
        "returned False",
        none,
        "returned 6.0",
    ]
    assert two == ["returned 4.0", "returned [0, 2, 2, 2]", "returned slice(1, 4, None)", "returned True", none, "returned 6.0"]
    assert one == ["returned 2.0", "returned [1, 1]", "returned slice(0, 2, None)", "returned True", none, "returned 6.0"]


@pytest.mark.parametrize(
    ("process_group", "error", "message"),
    [
        ("world", ValueError, "process_group is 'world' but torch.distributed is not initialised; call"),
        ("World", TypeError, "process_group is 'World'; 'world', a process group of torch.distributed or None is expected"),
        (3, TypeError, "process_group is 3; 'world', a process group"),
        (type("DeviceMesh", (), {})(), TypeError, r"of a DeviceMesh, pass mesh.get_group\(\)"),
    ],
)
def test_what_is_no_process_group(process_group: Any, error: type[Exception], message: str) -> None:
    x, group = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    calls: list[Callable[[], Any]] = [
        lambda: distributed.group_advantages(x, group, process_group=process_group),
        lambda: distributed.gather_rows({"x": x}, process_group=process_group),
        lambda: distributed.packed_sum(x, process_group=process_group),
        lambda: distributed.global_count(x > 0, process_group=process_group),
        lambda: distributed.batch_moments(x, process_group=process_group),
        lambda: distributed.whiten(x, process_group=process_group),
        lambda: distributed.masked_quantile(x, 0.5, process_group=process_group),
        lambda: distributed.top_quantile_mask(x, process_group=process_group),
        lambda: distributed.sequence_sum(x[None], process_group=process_group),
        lambda: distributed.sequence_mean(x[None], process_group=process_group),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def refused(rank: int) -> list[str]:
    x, other = torch.zeros(3), rank == 1
    packed, count = distributed.packed_sum, distributed.global_count
    calls: list[Callable[[], Any]] = [
        lambda: packed(*([] if other else [x]), process_group="world"),
        lambda: packed(x, "x" if other else x, process_group="world"),
        lambda: packed(x > 0 if other else x, process_group="world"),
        lambda: packed(x, x.long() if other else x, process_group="world"),
        lambda: count(x if other else x > 0, process_group="world"),
        lambda: count(x >= 0, process_group="world").item(),
    ]
    return [outcome(call) for call in calls]


def test_a_bad_argument_is_an_error_on_every_rank() -> None:
    expected = [
        ("ValueError: no tensors are given", "RuntimeError: packed_sum: rank 1 refuses its arguments; its own error says why"),
        (r"TypeError: tensors\[1\] is a str", "RuntimeError: packed_sum: rank 1 refuses"),
        (r"TypeError: tensors\[0\] has dtype torch.bool; accepted: floating, int64, int32", "RuntimeError: packed_sum: rank 1"),
        (r"ValueError: packed_sum: .* disagree; rank 1 has packed_sum of tensor 0 float32 \[3\], tensor 1 int64 \[3\]",
         r"ValueError: packed_sum: .* tensor 1 float32 \[3\]"),
        ("TypeError: mask has dtype torch.float32; accepted: bool", "RuntimeError: global_count: rank 1 refuses"),
        ("returned 6", "returned 6"),
    ]  # fmt: skip
    for rank, heard in enumerate(run_ranks(refused, 2)):
        for (on_rank_1, on_rank_0), text in zip(expected, heard, strict=True):
            assert re.search(on_rank_1 if rank else on_rank_0, text), (rank, text)


# ---- a rank that does not come


def one_does_not_come(rank: int) -> tuple[str, float]:
    """Rank 1 raises before its call, and lives on; the others wait for it no longer than the group's timeout."""
    group = dist.new_group(timeout=timedelta(seconds=4))
    dist.barrier()
    start = time.monotonic()
    try:
        if rank == 1:
            raise ValueError("no luck")
        distributed.group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), process_group=group)
    except (RuntimeError, ValueError) as error:
        waited = time.monotonic() - start
        time.sleep(9 if rank == 1 else 0)
        return type(error).__name__, waited
    raise AssertionError("it did not raise")


@pytest.mark.slow
def test_the_others_wait_for_the_timeout_of_the_group_and_no_longer() -> None:
    outcomes = run_ranks(one_does_not_come, 2)
    assert outcomes[1][0] == "ValueError"
    assert outcomes[0][0] != "ValueError"  # gloo's own, a RuntimeError
    assert 3 < outcomes[0][1] < 8.5
