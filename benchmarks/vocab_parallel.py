"""The head over a vocabulary that processes share, against one process that has all of it: a thread each, on one machine.

    python benchmarks/vocab_parallel.py --shapes 512x1024x32000 --dtype fp32,bf16 --mode fwd,bwd --json results.json

The floor is what perfect division would give, the time of one process over their number. One process alone and all together
take turns, and a ratio is the median over the turns. The JSON is that of `prefkern bench`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import prefkern
from prefkern.bench import report
from prefkern.bench.runner import Row
from prefkern.bench.shapes import DTYPES
from prefkern.distributed import vocab_shard

Results = list[dict[str, object]]


def inputs(shape: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, vocab = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocab, (rows,), generator=generator)


def call_of(hidden: Tensor, weight: Tensor, targets: Tensor, mode: str, **where: object) -> Callable[[], Tensor]:
    hidden, weight = hidden.requires_grad_(mode == "bwd"), weight.requires_grad_(mode == "bwd")

    def call() -> Tensor:
        hidden.grad = weight.grad = None
        logp = prefkern.linear_logprobs(hidden, weight, targets, **where).logp  # type: ignore[arg-type]
        if mode == "bwd":
            logp.sum().backward()
        return logp.detach()

    return call


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of this process on a processor, which other programs on the machine disturb less."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(shape: list[int], dtype: str, mode: str, rounds: int) -> Results:
    """What rank 0 has to tell."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, targets = inputs(shape, DTYPES[dtype])
    mine, group = weight.chunk(size)[rank].clone(), dist.group.WORLD
    assert group is not None
    shard = vocab_shard(mine, group, vocab=shape[2])
    together = call_of(hidden.clone(), mine, targets, mode, group=group, vocab_offset=shard.offset, vocab=shard.vocab)
    alone = call_of(hidden, weight, targets, mode)
    logp = {"together": together()}
    if rank == 0:
        logp["alone"] = alone()
    times: dict[str, list[tuple[float, float]]] = {"alone": [], "together": []}
    for _ in range(rounds):
        dist.barrier()
        if rank == 0:
            times["alone"].append(seconds(alone))
        dist.barrier()
        times["together"].append(seconds(together))  # no rank is done before all have sent their last message
    if rank:
        return []
    exact = prefkern.linear_logprobs(hidden.detach().double(), weight.detach().double(), targets).logp

    def row(peer: str, note: str, share: int, who: str, error: float | None = None) -> dict[str, object]:
        wall, cpu = ([1e3 * t[i] / share for t in times[who]] for i in (0, 1))
        ratios = [
            statistics.median(t[i] / share / alone[i] * size for t, alone in zip(times[who], times["alone"], strict=True))
            for i in (0, 1)
        ]
        found = Row("linear_logprobs", shape, dtype, mode, "logp", peer, "ok", note, max_error=error, rounds=rounds)
        return asdict(found) | {
            "time_ms": statistics.median(wall),
            "min_ms": min(wall),
            "cpu_ms": statistics.median(cpu),
            "ratio_floor": ratios[0],
            "cpu_ratio_floor": ratios[1],
        }

    errors = {who: (t.double() - exact).abs().max().item() for who, t in logp.items()}
    return [
        row("floor", f"the time of one process over {size}", size, "alone"),
        row("prefkern", "one process, one thread", 1, "alone", errors["alone"]),
        row(f"prefkern, {size} processes", "gloo, one thread each; cpu: of the first", 1, "together", errors["together"]),
    ]


def worker(rank: int, arguments: argparse.Namespace, folder: str, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), arguments.processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=arguments.processes, timeout=timedelta(seconds=arguments.timeout)
    )
    for shape in arguments.shapes:
        for dtype in arguments.dtype:
            for mode in arguments.mode:
                rows = measure(shape, dtype, mode, arguments.rounds)
                if rank == 0:
                    pipe.send(rows)
    dist.barrier()
    dist.destroy_process_group()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = str.split

    def shapes(text: str) -> list[list[int]]:
        found = [[int(n) for n in part.split("x")] for part in text.split(",")]
        if any(len(shape) != 3 or min(shape) < 1 for shape in found):
            raise argparse.ArgumentTypeError(f"{text!r}: NxHxV is expected, several with commas between")
        return found

    def some_of(accepted: tuple[str, ...]) -> Callable[[str], list[str]]:
        def some(text: str) -> list[str]:
            if wrong := set(found := names(text, ",")) - set(accepted):
                raise argparse.ArgumentTypeError(f"{sorted(wrong)}: accepted are {', '.join(accepted)}")
            return found

        return some

    parser.add_argument("--shapes", type=shapes, default=shapes("512x1024x32000"), help="NxHxV, with commas between")
    parser.add_argument("--dtype", type=some_of(tuple(DTYPES)), default=["fp32"], help=", ".join(DTYPES))
    parser.add_argument(
        "--mode", type=some_of(("fwd", "bwd")), default=["fwd", "bwd"], help="fwd, or bwd: forward and backward"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a process waits for another")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    surroundings = report.environment()
    context = multiprocessing.get_context("spawn")
    rows: Results = []
    with tempfile.TemporaryDirectory() as folder:
        receive, send = context.Pipe(duplex=False)
        workers = [context.Process(target=worker, args=(rank, arguments, folder, send)) for rank in range(arguments.processes)]
        for process in workers:
            process.start()
        send.close()
        for _ in range(len(arguments.shapes) * len(arguments.dtype) * len(arguments.mode)):
            found = receive.recv()  # EOFError where a process has died, which has said why
            rows += found
            _, alone, together = found
            shape = "x".join(map(str, alone["shape"]))
            print(
                f"{shape} {alone['dtype']} {alone['mode']}: one process {alone['time_ms']:.1f} ms, "
                f"{arguments.processes} processes {together['time_ms']:.1f} ms, "
                f"{together['ratio_floor']:.3f} of perfect division; on the processor {together['cpu_ratio_floor']:.3f}"
            )
        for process in workers:
            process.join()
    command = shlex.join(["python", "benchmarks/vocab_parallel.py", *sys.argv[1:]])
    if arguments.json:
        report.save(report.results(rows, surroundings, command), arguments.json)


if __name__ == "__main__":
    main()
