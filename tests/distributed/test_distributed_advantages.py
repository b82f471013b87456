"""Advantages whose groups lie on several ranks: the bits of one process, however the rows are spread."""

import math
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern import distributed
from prefkern.papers.gdpo import gdpo_advantages
from prefkern.papers.ngrpo import ngrpo_advantages
from ranks import run_ranks

F64 = torch.float64
STATISTICS = ("mean", "std", "count", "min", "max")
SPLITS = {2: ((7, 12), (0, 19)), 4: ((5, 0, 6, 8), (1, 9, 7, 2))}


def batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """19 completions of 5 prompts, in no order, one of them alone; two rewards, some of them the same in a group."""
    group = torch.tensor([3, -1, 3, 3, 9, 9, -1, 4, 4, 3, 9, 9, 4, -1, 3, 70, 4, 9, -1])
    rewards = torch.randn(19, 2).to(dtype)
    rewards[group == 9] = rewards[group == 9][0].clone()
    return {"rewards": rewards, "group": group, "lengths": torch.randint(1, 9, (19,))}


def share(rank: int, counts: tuple[int, ...], rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ends = [0, *accumulate(counts)]
    return {name: t[ends[rank] : ends[rank + 1]] for name, t in rows.items()}


def cases() -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    rows = batch()
    one = {**rows, "rewards": rows["rewards"][:, 0].contiguous()}
    with_nan = rows["rewards"].clone()
    with_nan[[2, 5, 6], [0, 1, 1]] = math.nan
    return [
        *((one, {"estimator": e, "outputs": STATISTICS}) for e in prefkern.ops.advantages.ESTIMATORS),
        *((one, {"estimator": "dr_grpo", "batch": b}) for b in ("std", "seq", "token", "nonzero")),
        (rows, {"combine": "normalize_then_sum", "batch": "seq", "weights": (1.0, 0.25), "outputs": {"std", "count"}}),
        (rows, {"combine": "sum_then_normalize", "weights": torch.tensor([0.5, 2.0]), "singleton": "reward"}),
        ({**rows, "rewards": with_nan}, {"combine": "normalize_then_sum", "batch": "token", "nan": "ignore"}),
        ({**rows, "rewards": with_nan}, {"nan": "zero", "eps": 1e-4, "ddof": 0}),
        (one, {"virtual_count": 1, "singleton": "calibrate", "batch": "std", "batch_eps": 1e-3}),
        ({**batch(torch.bfloat16), "group": rows["group"].int()}, {"estimator": "rloo"}),
        (batch(F64), {"estimator": "mad"}),
    ]


def advantages_of_a_share(rank: int, splits: tuple[tuple[int, ...], ...]) -> None:
    for rows, options in cases():
        expected = prefkern.group_advantages(rows["rewards"], rows["group"], lengths=rows["lengths"], **options)
        for counts in splits:
            own = share(rank, counts, rows)
            found = distributed.group_advantages(
                own["rewards"], own["group"], lengths=own["lengths"], process_group="world", **options
            )
            for name, t in zip(found._fields, found, strict=True):
                whole = getattr(expected, name)
                assert (t is None) == (whole is None), (name, options)
                if t is not None:
                    assert torch.equal(t.nan_to_num(7.0), share(rank, counts, {"": whole})[""].nan_to_num(7.0)), (name, options)
                    assert t.dtype == whole.dtype


@pytest.mark.parametrize("size", [2, 4])
def test_the_bits_of_one_process(size: int) -> None:
    run_ranks(advantages_of_a_share, size, SPLITS[size])


def papers_of_a_share(rank: int) -> list[torch.Tensor]:
    rows = batch()
    own = share(rank, (4, 15), rows)
    found = distributed.gather_rows({**own, "extra": None}, process_group="world")
    assert sorted(found.tensors) == ["group", "lengths", "rewards"]
    assert found.own == (slice(0, 4) if rank == 0 else slice(4, 19))
    for name, t in found.tensors.items():
        assert torch.equal(t, rows[name])
    rewards, group = found.tensors["rewards"], found.tensors["group"]
    return [
        ngrpo_advantages(rewards[:, 0], group, r_max=5.0)[found.own],
        prefkern.question_weights(rewards[:, 0], group, lengths=found.tensors["lengths"]).weights[found.own],
        gdpo_advantages(rewards, group)[found.own],
    ]


def test_any_estimator_of_gathered_rows() -> None:
    rows = batch()
    rewards, group = rows["rewards"], rows["group"]
    ngrpo, questions, gdpo = (torch.cat(parts) for parts in zip(*run_ranks(papers_of_a_share, 2), strict=True))
    assert torch.equal(ngrpo, ngrpo_advantages(rewards[:, 0], group, r_max=5.0))
    assert torch.equal(questions, prefkern.question_weights(rewards[:, 0], group, lengths=rows["lengths"]).weights)
    assert torch.equal(gdpo, gdpo_advantages(rewards, group))


def any_rows(rank: int) -> dict[str, torch.Tensor]:
    rows = {
        "bool": torch.tensor([rank == 1] * 3), "half": torch.full((3, 2, 1), rank + 0.5, dtype=torch.float16),
        "byte": torch.full((3,), 200 + rank, dtype=torch.uint8), "strided": torch.arange(12.0).view(4, 3).T + rank,
        "empty": torch.zeros(3, 0),
    }  # fmt: skip
    return distributed.gather_rows(rows, process_group=torch.distributed.group.WORLD).tensors


def test_rows_of_any_kind() -> None:
    for found in run_ranks(any_rows, 2):
        assert found["bool"].tolist() == [False] * 3 + [True] * 3
        assert found["half"].flatten().tolist() == [0.5] * 6 + [1.5] * 6 and found["half"].shape == (6, 2, 1)
        assert found["byte"].tolist() == [200] * 3 + [201] * 3
        assert torch.equal(found["strided"], torch.cat([torch.arange(12.0).view(4, 3).T + r for r in range(2)]))
        assert found["empty"].shape == (6, 0)


def test_without_a_group_it_is_the_op() -> None:
    rows = batch()
    found = distributed.group_advantages(rows["rewards"], rows["group"], process_group=None, outputs=("std",))
    expected = prefkern.group_advantages(rows["rewards"], rows["group"], outputs=("std",))
    assert torch.equal(found.advantages, expected.advantages) and torch.equal(found.std, expected.std)
    assert distributed.gather_rows(rows, process_group=None).own == slice(0, 19)
    assert torch.equal(distributed.whiten(rows["rewards"], process_group=None), prefkern.whiten(rows["rewards"]))
    moments = distributed.batch_moments(rows["rewards"], process_group=None)
    assert torch.equal(moments, prefkern.batch_moments(rows["rewards"]))


# ---- batch statistics


def statistics_of_a_share(rank: int, counts: tuple[int, ...], values: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    own = share(rank, counts, {"values": values, "mask": mask})
    weights = own["mask"].to(values.dtype) * 0.5
    return [
        distributed.batch_moments(own["values"], process_group="world"),
        distributed.batch_moments(own["values"], weights, process_group="world"),
        distributed.whiten(own["values"], own["mask"], process_group="world"),
        distributed.whiten(own["values"], own["mask"], eps=0.1, process_group="world"),
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_batch_statistics(size: int) -> None:
    values, mask = torch.randn(19, 6) + 1000, torch.rand(19, 6) < 0.6
    values[0, 0], mask[0, 0] = math.nan, False
    values[0, 1] = 1000.0
    safe = values.nan_to_num(1000.0)
    for counts in SPLITS[size]:
        ranks = run_ranks(statistics_of_a_share, size, counts, safe, mask)
        for found in zip(*ranks, strict=True):
            if found[0].shape == (3,):
                assert all(torch.equal(found[0], other) for other in found)
        whole, weighted, white, soft = ([rank[i] for rank in ranks] for i in range(4))
        assert_close(whole[0], prefkern.batch_moments(safe), rtol=1e-12, atol=0)
        assert_close(weighted[0], prefkern.batch_moments(safe, mask * 0.5), rtol=1e-12, atol=0)
        assert_close(torch.cat(white), prefkern.whiten(safe, mask), rtol=1e-6, atol=1e-7)
        assert_close(torch.cat(soft), prefkern.whiten(safe, mask, eps=0.1), rtol=1e-6, atol=1e-7)


def gdpo_on_whole_groups(rank: int) -> torch.Tensor:
    rows = batch(F64)
    own = rows["group"] > 3 if rank else rows["group"] <= 3
    a = gdpo_advantages(rows["rewards"][own], rows["group"][own], batch_norm="none")
    moments = distributed.batch_moments(a, process_group="world")
    found = prefkern.batch_normalize(a, moments, mode="seq", eps=1e-4)
    assert_close(found, gdpo_advantages(rows["rewards"], rows["group"])[own], rtol=1e-12, atol=1e-14)
    return moments


def test_gdpo_needs_only_moments_where_groups_are_whole() -> None:
    one, other = run_ranks(gdpo_on_whole_groups, 2)
    assert torch.equal(one, other)


# ---- messages: one, of a size that all agree on


def messages_of_growing_batches(rank: int) -> list[list[int]]:
    sizes: list[list[int]] = []
    gather = torch.distributed.all_gather
    torch.distributed.all_gather = lambda out, t, **options: (sizes[-1].append(t.nbytes), gather(out, t, **options))
    for rows in (16, 16, 400, 400, 16):
        sizes.append([])
        n = rows if rank == 1 else 3
        rewards, group = torch.randn(n), torch.zeros(n, dtype=torch.int64)
        found = distributed.group_advantages(rewards, group, process_group="world", outputs=("count",))
        assert found.count.tolist() == [rows + 3] * n
    return sizes


def test_one_message_but_for_the_first_with_more_rows_than_ever() -> None:
    # 400 rows of 12 bytes and the head of 512
    assert run_ranks(messages_of_growing_batches, 2) == [[[4096], [4096], [4096, 8192], [8192], [8192]]] * 2


# ---- refusals: on every rank, and nobody waits


def outcome(call: Callable[[], Any]) -> str:
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


REFUSED: dict[str, tuple[str, str | None]] = {  # what rank 1 hears, and the others, if that is something else
    "K": (r"ValueError: group_advantages: ranks of process_group disagree: rank 0 has rewards=float32 \[rows, 2\], "
          r"rank 1 has rewards=float32 \[rows, 3\]", None),
    "dtype": (r"ValueError: .*rank 1 has rewards=float64 \[rows, 2\]", None),
    "group dtype": (r"ValueError: .*rank 0 has group=int64 \[rows\], rank 1 has group=int32 \[rows\]", None),
    "lengths": ("ValueError: .*disagree", None),
    "option": ("ValueError: .*rank 0 has eps=1e-06, rank 1 has eps=0.0001", None),
    "weights": (r"ValueError: .*rank 0 has weights=\[0.0, 0.0\], rank 1 has weights=\[1.0, 1.0\]", None),
    "not a tensor": ("TypeError: group is a list; a torch.Tensor", "RuntimeError: group_advantages: rank 1 of process_group "
                     "refuses its arguments: TypeError: group is a list"),
    "rows": (r"ValueError: group has shape \[3\]; \[4\] is expected", "RuntimeError: .*rank 1.*ValueError: group has"),
    "integers": ("TypeError: rewards has dtype torch.int64", "RuntimeError: .*rank 1.*TypeError: rewards has"),
    "reward": (r"ValueError: rewards\[6, 1\] is nan.*rows of all ranks in order; rank 1, this one, has 4 from 4 on",
               r"ValueError: rewards\[6, 1\] is nan.*; rank [02], this one, has 4 from [08] on"),
    "unknown option": ("TypeError: .*'epsilon'", None),
    "call": ("ValueError: gather_rows: ranks of process_group disagree: rank 0 has call=group_advantages, rank 1 has "
             "call=gather_rows", "ValueError: group_advantages: ranks of process_group disagree"),
    "moments": (r"ValueError: weights has shape \[3\]", "RuntimeError: batch_moments: rank 1 of process_group refuses"),
    "mask": ("TypeError: mask has dtype torch.int64", "RuntimeError: whiten: rank 1 of process_group refuses"),
    "too few": ("ValueError: moments has n = 1; mode 'token' needs at least 2 tokens", None),
    "nothing": (r"returned \[0.0, 0.0, 0.0, 0.0\]", None),
}  # fmt: skip


def refused(rank: int) -> list[str]:
    def attempt(what: str) -> Any:
        rewards, group = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
        options: dict[str, Any] = {}
        if what in ("option", "weights", "unknown option"):
            value: dict[str, Any] = {"option": ("eps", 1e-4 if rank == 1 else 1e-6), "weights": ("weights", [float(rank)] * 2)}
            options = dict([value.get(what, ("epsilon", 1))])
        elif what == "moments":
            return distributed.batch_moments(rewards[:, 0], torch.zeros(3 if rank == 1 else 4), process_group="world")
        elif what == "mask":
            mask = torch.ones(4, dtype=torch.int64 if rank == 1 else torch.bool)
            return distributed.whiten(rewards[:, 0], mask, process_group="world")
        elif what == "too few":
            mask = torch.tensor([rank == 1, False, False, False])
            return distributed.whiten(rewards[:, 0], mask, process_group="world")
        elif rank == 1:
            if what == "call":
                return distributed.gather_rows({"rewards": rewards, "group": group}, process_group="world")
            if what == "reward":
                rewards[2, 1] = math.nan
            rewards = {"K": torch.zeros(4, 3), "dtype": rewards.double(), "integers": rewards.long()}.get(what, rewards)
            changed: dict[str, Any] = {"group dtype": group.int(), "not a tensor": [0] * 4, "rows": group[:3]}
            group = changed.get(what, group)
            options = {"lengths": torch.ones(4, dtype=torch.int64)} if what == "lengths" else {}
        return distributed.group_advantages(rewards, group, process_group="world", **options).advantages.tolist()

    return [outcome(lambda what=what: attempt(what)) for what in REFUSED]  # the group goes on after each


def test_a_bad_argument_is_an_error_on_every_rank() -> None:
    ranks = run_ranks(refused, 3)
    for i, (what, (on_rank_1, on_others)) in enumerate(REFUSED.items()):
        for rank, heard in enumerate(ranks):
            expected = on_rank_1 if rank == 1 or on_others is None else on_others
            assert re.search(expected, heard[i]), (what, rank, heard[i])


def test_one_process_refuses_as_the_op_does() -> None:
    with pytest.raises(ValueError, match=r"rewards\[0\] is nan"):
        distributed.group_advantages(torch.tensor([math.nan]), torch.zeros(1, dtype=torch.int64), process_group=None)
    for rows, error, message in (
        ({}, ValueError, "rows has no tensors"),
        ([1], TypeError, "rows is a list; a mapping"),
        ({"a": torch.zeros(())}, ValueError, r"a has shape \[\]; \[B, ...\] is expected"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, ValueError, "b has 3 rows but a has 2"),
        ({"a": 3}, TypeError, "a is a int; a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            distributed.gather_rows(rows, process_group=None)
