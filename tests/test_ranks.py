"""The helper that the tests of several processes stand on: it must not pass what failed, nor wait for ever."""

import time

import pytest
import torch
import torch.distributed as dist

from ranks import rank_outcomes, run_ranks


def sum_over_ranks(rank: int, x: torch.Tensor) -> torch.Tensor:
    total = x * (rank + 1)
    dist.all_reduce(total)
    return total


def rank_one_raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("no luck")
    dist.barrier()


def rank_one_sleeps(rank: int) -> int:
    if rank == 1:
        time.sleep(60)
    return rank


def test_results_by_rank() -> None:
    assert [total.tolist() for total in run_ranks(sum_over_ranks, 4, torch.tensor([1.0, 2.0]))] == [[10.0, 20.0]] * 4


def test_a_failure_is_one_and_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1: Traceback[\s\S]*ValueError: no luck"):
        run_ranks(rank_one_raises, 2, timeout=90)
    assert time.monotonic() - start < 60


def test_who_does_not_answer_is_named() -> None:
    outcomes = rank_outcomes(rank_one_sleeps, 2, timeout=3)
    assert outcomes[1] == (False, "no answer within 3 s")
