"""Run a function in several processes that share a gloo process group.

The processes are forked from a server that has imported torch and prefkern once, so that four of them start in a fraction of
a second. They end without the interpreter's teardown: gloo's threads may still be at work by then, and that aborts a process
whose work is long done.
"""

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "prefkern"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(rank, *args)` in `world_size` processes; what each returned, by rank.

    `function` is one that a process can import (at a module's top level). An exception of any rank, or `timeout` seconds
    without an end, is an AssertionError here that says what each rank did.
    """
    outcomes = rank_outcomes(function, world_size, *args, timeout=timeout)
    bad = [f"rank {rank}: {outcome}" for rank, (good, outcome) in enumerate(outcomes) if not good]
    assert not bad, "\n".join(bad)
    return [outcome for _, outcome in outcomes]


def rank_outcomes(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[tuple[bool, Any]]:
    """As `run_ranks`, for tests of failures: (True, what it returned) or (False, the traceback as text) of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, os.path.join(folder, "args"))  # as bytes: shared memory would have to outlive its owner
        ranks = []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(theirs, function, rank, world_size, folder, timeout), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        end = time.monotonic() + timeout
        outcomes: list[tuple[bool, Any]] = []
        for process, ours in ranks:
            try:
                heard = ours.poll(max(0.0, end - time.monotonic()))
                outcomes.append(
                    torch.load(io.BytesIO(ours.recv_bytes()), weights_only=False)
                    if heard
                    else (False, f"no answer within {timeout:g} s")
                )
            except EOFError:
                process.join()
                outcomes.append((False, f"died with exit code {process.exitcode}"))
        for process, _ in ranks:
            process.join(0 if time.monotonic() > end else 5)
            if process.is_alive():
                process.kill()
                process.join()
        return outcomes


def _rank(pipe: Any, function: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def send(*outcome: Any) -> None:
        buffer = io.BytesIO()
        torch.save(outcome, buffer)
        pipe.send_bytes(buffer.getvalue())

    try:
        args = torch.load(os.path.join(folder, "args"), weights_only=False)
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
        result = function(rank, *args)
        with contextlib.suppress(Exception):
            dist.barrier()  # nobody leaves while another still reads from it
        send(True, result)
    except BaseException:
        send(False, traceback.format_exc())
    os._exit(0)
