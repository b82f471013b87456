"""Times collectives between processes of this machine over gloo, and what prefkern.distributed makes of them.

    python benchmarks/collectives.py benchmarks/results/NAME.json    # a minute; --markdown prints the tables of a file

The times fit the link of prefkern.distributed.cost, which then says what the functions' messages should take. Processes that
share a memory bus are no network: this checks the model, it does not predict a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prefkern import distributed
from prefkern.distributed import cost

SIZES = (4096, 16384, 65536, 262144, 1 << 20, 1 << 22)
RANKS = (2, 4)
REPEATS = 100


def calls() -> dict[str, tuple[Callable[[], Any], list[cost.Message]]]:
    """What is timed as a whole, and the messages that it sends."""
    rewards, group = torch.rand(64), torch.arange(64) // 8
    many, ids = torch.rand(4096), torch.arange(4096) // 8
    tokens, mask = torch.rand(8192), torch.rand(8192) < 0.9
    sums, hidden = torch.rand(64), torch.rand(512, 512)

    def head() -> None:
        state = torch.zeros(7 * 513)
        dist.all_gather(list(state.new_empty(dist.get_world_size(), len(state)).unbind(0)), state)
        dist.all_reduce(hidden)

    world: Any = {"process_group": "world"}
    return {
        "group_advantages, 64 rows a rank": (
            lambda: distributed.group_advantages(rewards, group, **world), cost.gathered_rows(64, [4, 8]),
        ),
        "group_advantages, 4096 rows a rank": (
            lambda: distributed.group_advantages(many, ids, **world), cost.gathered_rows(4096, [4, 8]),
        ),
        "global_count": (lambda: distributed.global_count(mask, **world), cost.summed(1)),
        "sequence_sum, 64 sequences": (lambda: distributed.sequence_sum(sums[:, None], **world), cost.summed(64)),
        "whiten, 8192 tokens a rank": (lambda: distributed.whiten(tokens, mask, **world), cost.batch_moments()),
        "top_quantile_mask, 8192 tokens a rank": (
            lambda: distributed.top_quantile_mask(tokens, mask, **world), cost.top_quantile_mask(),
        ),
        "messages of a vocabulary-parallel head, 512 x 512": (head, cost.vocabulary_parallel(512, 512)),
    }  # fmt: skip


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Seconds of the fastest call on this rank, with all ranks at the start together: what others do on the machine only
    adds."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    measured = []
    for nbytes in SIZES:
        message = torch.zeros(nbytes // 8, dtype=torch.float64)
        out = list(message.new_empty(size, len(message)).unbind(0))
        measured += [
            ("all_reduce", nbytes, size, timed(lambda m=message: dist.all_reduce(m))),
            ("all_gather", nbytes, size, timed(lambda m=message, o=out: dist.all_gather(o, m))),
        ]
    whole = [(what, size, timed(call)) for what, (call, _) in calls().items()]
    if rank == 0:
        Path(folder, "result").write_text(json.dumps({"measured": measured, "calls": whole}))
    dist.barrier()
    os._exit(0)  # without gloo's teardown


def report(data: dict[str, Any]) -> str:
    """Markdown: the links, how far their times are from the measured ones, and the calls."""
    links = {r: cost.fit([m for m in data["measured"] if m[2] == r]) for r in RANKS}
    columns = " | ".join(f"{r} processes, ms | model" for r in RANKS)
    rule = " | ".join(["--- | ---"] * len(RANKS))
    lines = ["| processes | alpha, us a message | 1 / beta, GB/s |", "| --- | --- | --- |"]
    lines += [f"| {r} | {link.alpha * 1e6:.0f} | {1e-9 / link.beta:.2f} |" for r, link in links.items()]
    lines += ["", f"| collective | bytes that a process gives | {columns} |", f"| --- | --- | {rule} |"]
    seconds = {tuple(key): value for *key, value in data["measured"]}

    def pairs(measured: Callable[[int], float], messages: list[cost.Message]) -> str:
        return " | ".join(f"{measured(r) * 1e3:.2f} | {cost.cost(messages, r).seconds(links[r]) * 1e3:.2f}" for r in RANKS)

    for kind in cost.KINDS:
        for nbytes in SIZES:
            row = pairs(lambda r, k=kind, n=nbytes: seconds[k, n, r], [cost.Message("", kind, nbytes)])
            lines.append(f"| {kind.replace('_', '-')} | {nbytes:,} | {row} |")
    lines += ["", f"| call | messages | {columns} |", f"| --- | --- | {rule} |"]
    whole = {(what, ranks): value for what, ranks, value in data["calls"]}
    for what, (_, messages) in calls().items():
        lines.append(f"| {what} | {len(messages)} | {pairs(lambda r, w=what: whole[w, r], messages)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print the tables of a file that is there")
    options = parser.parse_args()
    if not options.markdown:
        data: dict[str, Any] = {
            "machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__,
            "backend": "gloo, loopback",
            "measured": [], "calls": [],
        }  # fmt: skip
        for size in RANKS:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(measure, (size, folder), nprocs=size)
                part = json.loads(Path(folder, "result").read_text())
            data["measured"] += part["measured"]
            data["calls"] += part["calls"]
        options.file.write_text(json.dumps(data, indent=1) + "\n")
    print(report(json.loads(options.file.read_text())))


if __name__ == "__main__":
    main()
