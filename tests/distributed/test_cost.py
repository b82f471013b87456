"""The cost model: its arithmetic, that the functions send what it says, and that docs/scaling.md states what it prints."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import prefkern
from prefkern import distributed
from prefkern.distributed import cost
from prefkern.distributed.cost import Cost, Link, Message
from ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
REDUCE, GATHER = Message("", "all_reduce", 1000), Message("", "all_gather", 1000)


def test_worked_costs() -> None:
    assert cost.cost([REDUCE], 8) == Cost(1, 14, 1750.0)
    assert cost.cost([REDUCE], 8, "tree") == Cost(1, 6, 2000.0)
    assert cost.cost([GATHER], 8) == Cost(1, 7, 7000.0)
    assert cost.cost([GATHER], 8, "tree") == Cost(1, 3, 7000.0)
    assert cost.cost([GATHER], 9, "tree").sends == 4
    assert cost.cost([REDUCE, GATHER, GATHER], 2) == Cost(3, 4, 3000.0)
    assert cost.cost([REDUCE, GATHER], 1) == Cost(0, 0, 0.0)
    assert Cost(1, 14, 1750.0).seconds(Link(1e-5, 1e-9)) == pytest.approx(14e-5 + 1.75e-6)


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_a_link_is_found_again(algorithm: Any) -> None:
    link = Link(3e-5, 2e-10)
    measured = [
        (m.kind, n, r, cost.cost([m._replace(nbytes=n)], r, algorithm).seconds(link))
        for m in (REDUCE, GATHER) for n in (8, 10**4, 10**7) for r in (2, 4)
    ]  # fmt: skip
    assert cost.fit(measured, algorithm) == pytest.approx(link, rel=1e-9)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="ranks is 0; a positive number"):
        cost.cost([REDUCE], 0)
    with pytest.raises(ValueError, match="algorithm is 'star'; accepted: 'ring', 'tree'"):
        cost.cost([REDUCE], 2, "star")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="messages of at least two sizes"):
        cost.fit([("all_reduce", 8, 2, 1.0), ("all_reduce", 8, 2, 1.1)])


def test_sizes_as_text() -> None:
    texts = [cost.size_text(n) for n in (0, 8, 1000, 1023, 1024, 1536, 16448, 4 << 20, 1023 << 20, 3 << 40, 5 << 50)]
    expected = ["0 B", "8 B", "1000 B", "1023 B", "1 KiB", "1.5 KiB", "16.1 KiB", "4 MiB", "1023 MiB", "3 TiB", "5120 TiB"]
    assert texts == expected


# ---- what is sent


def workloads() -> list[tuple[str, list[Message], Callable[[int, int], Any]]]:
    """What the model says, and a call of a rank that does it."""
    world: Any = {"process_group": "world"}

    def rows(n: int, k: int = 1) -> dict[str, torch.Tensor]:
        return {"rewards": torch.rand(n, k) if k > 1 else torch.rand(n), "group": torch.arange(n) // 4}

    def grpo(rank: int, size: int) -> None:
        for part in (slice(0, 32), slice(32, 64)):
            distributed.top_quantile_mask(torch.rand(64, 100)[part], **world)
        distributed.group_advantages(**rows(64, 2), lengths=torch.ones(64, dtype=torch.int64), **world)
        distributed.global_count(torch.ones(64, 100, dtype=torch.bool), **world)

    def ragged(rank: int, size: int) -> None:
        distributed.group_advantages(**rows(300 if rank == 0 else 7), **world)

    return [
        ("a step", cost.grpo_step(64, rewards=2, lengths=True, micro_batches=2, top_entropy=True), grpo),
        ("plain", cost.grpo_step(64)[:1], lambda rank, size: distributed.group_advantages(**rows(64), **world)),
        ("ragged", cost.gathered_rows(300, [4, 8]), ragged),
        ("larger", cost.gathered_rows(5000, [8, 8]), lambda rank, size: distributed.gather_rows(
            {"a": torch.zeros(5000, 2), "b": torch.zeros(5000, dtype=torch.int64)}, **world)),
        ("sums", cost.summed(504), lambda rank, size: distributed.sequence_sum(torch.rand(504, 3), **world)),
        ("more sums", cost.summed(1000), lambda rank, size: distributed.sequence_mean(torch.rand(500, 3), **world)),
        ("moments", cost.batch_moments(), lambda rank, size: distributed.whiten(torch.rand(9), **world)),
        ("trl", cost.top_quantile_mask("trl"), lambda rank, size: distributed.top_quantile_mask(
            torch.rand(9), rule="trl", **world)),
        ("quantile", cost.top_quantile_mask("trl", wide=True), lambda rank, size: distributed.masked_quantile(
            torch.rand(9, dtype=torch.float64), 0.5, **world)),
    ]  # fmt: skip


def record(size: int) -> list[tuple[str, int]]:
    """Collective and bytes of each message that this rank gives from now on."""
    sent: list[tuple[str, int]] = []
    reduce, gather = dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda t, **options: (sent.append(("all_reduce", t.nbytes)), reduce(t, **options))

    def all_gather(out: list[torch.Tensor], t: torch.Tensor, **options: Any) -> None:
        assert [o.nbytes for o in out] == [t.nbytes] * size
        sent.append(("all_gather", t.nbytes))
        gather(out, t, **options)

    dist.all_gather = all_gather
    return sent


def recorded(rank: int, size: int) -> dict[str, list[tuple[str, int]]]:
    sent, result = record(size), {}
    for what, _, call in workloads():
        call(rank, size)  # ranks learn how large a message has to be
        sent.clear()
        call(rank, size)
        result[what] = list(sent)
    return result


@pytest.mark.parametrize("size", [2, 4])
def test_the_functions_send_what_the_model_says(size: int) -> None:
    for rank in run_ranks(recorded, size, size):
        grown = 0  # the size of a message of rows never shrinks
        for what, messages, _ in workloads():
            stated = sorted((m.kind, m.nbytes) for m in messages)
            if messages[0].kind == "all_gather" and messages[0].what in ("gather_rows", "group_advantages"):
                grown = max(grown, messages[0].nbytes)
                assert grown == messages[0].nbytes, "workloads grow, so that each needs what the model says"
            assert sorted(rank[what]) == stated, what


def head_of_a_range(rank: int, size: int) -> list[tuple[str, int]]:
    sent = record(size)
    hidden, weight = torch.randn(12, 16, requires_grad=True), torch.randn(10, 16, requires_grad=True)
    place = {"vocab_offset": 10 * rank, "vocab": 10 * size}
    logp = prefkern.linear_logprobs(hidden, weight, torch.arange(12), group=dist.group.WORLD, **place).logp
    logp.sum().backward()
    return sent


@pytest.mark.parametrize("size", [2, 4])
def test_the_head_sends_what_the_model_says(size: int) -> None:
    pytest.importorskip("prefkern.distributed.vocab_parallel")
    stated = [(m.kind, m.nbytes) for m in cost.vocabulary_parallel(12, 16)]
    assert run_ranks(head_of_a_range, size, size) == [stated] * size


# ---- docs/scaling.md


def tables() -> dict[str, str]:
    grpo = cost.grpo_step(64, micro_batches=8, top_entropy=True)
    head = cost.vocabulary_parallel(8192, 4096)
    return {
        "grpo messages": cost.messages_table(grpo), "grpo ranks": cost.ranks_table(grpo),
        "plain ranks": cost.ranks_table(cost.grpo_step(64)),
        "head messages": cost.messages_table(head), "head ranks": cost.ranks_table(head),
        "sequences": cost.messages_table([
            *cost.summed(64, "sequence_sum, 64 sequences"), *cost.summed(128, "sequence_mean, 64 sequences"),
            *cost.batch_moments(),
        ]),
        "measured": benchmark().report(json.loads((ROOT / "benchmarks/results/cpu-epyc-gloo.json").read_text())),
    }  # fmt: skip


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("collectives_benchmark", ROOT / "benchmarks/collectives.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_states_what_the_model_prints() -> None:
    text = (ROOT / "docs/scaling.md").read_text()
    stated = dict(re.findall(r"<!-- scaling: ([\w ]+) -->\n(.*?)\n<!-- scaling: end -->", text, re.DOTALL))
    assert set(stated) == set(tables())
    for name, table in tables().items():
        assert stated[name].strip() == table.strip(), f"table {name!r} of docs/scaling.md; it should be\n{table}"
