"""Side-by-side timing of several calls in one process.

The calls run interleaved, in an order that rotates and turns round from one round to the next, so that a busy neighbour
or a warm clock meets all of them alike. What is compared are then pairs: the ratio of two calls is the median, over the
rounds, of the ratio of their times in the same round. A call that takes over a second and over ten times as long as the
quickest takes part in the first two rounds only: its ratio is not in doubt.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from prefkern.bench.machine import Watch

SAMPLE_SECONDS = 20e-3  # shorter calls are repeated back to back until a sample takes about this long
MAX_REPEATS = 2000
SLOW_SECONDS, SLOW_FACTOR, SLOW_ROUNDS = 1.0, 10.0, 2

Call = Callable[[], object]


@dataclass
class Timing:
    """What was measured of one call: one entry for each round that it took part in, or why there is none."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    launches: int | None = None
    kernel_s: float | None = None
    error: str | None = None

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.wall_s)

    @property
    def min_ms(self) -> float:
        return 1e3 * min(self.wall_s)

    @property
    def cpu_ms(self) -> float:
        return 1e3 * statistics.median(self.cpu_s)

    def ratio(self, other: Timing) -> float:
        """Median of the per-round ratios of wall time, this one over the other."""
        return _median_ratio(self.wall_s, other.wall_s)

    def cpu_ratio(self, other: Timing) -> float:
        """The same of CPU time, which waiting for a core does not lengthen."""
        return _median_ratio(self.cpu_s, other.cpu_s)

    def min_ratio(self, other: Timing) -> float:
        """The least wall time over the other's least: what is left when each was once undisturbed."""
        return min(self.wall_s) / max(min(other.wall_s), 1e-9)

    def cpu_min_ratio(self, other: Timing) -> float:
        """The same of CPU time."""
        return min(self.cpu_s) / max(min(other.cpu_s), 1e-9)

    def spread(self, other: Timing) -> float | None:
        """How far apart the ratios of the rounds lie, over their median: a sign of disturbance. None of a single round."""
        ratios = _ratios(self.wall_s, other.wall_s)
        return (max(ratios) - min(ratios)) / statistics.median(ratios) if len(ratios) > 1 else None


def compare(
    calls: Mapping[str, Call],
    *,
    device: str = "cpu",
    rounds: int = 5,
    min_rounds: int = 3,
    budget_s: float = 60.0,
    warmup: int = 1,
    watch: Watch | None = None,
) -> dict[str, Timing]:
    """Times the calls against each other, for `rounds` rounds; after `min_rounds` the end of `budget_s` stops it, too.

    The time of slow calls does not count towards the budget. `watch` looks on while there is timing. With `rounds=0` memory
    alone is measured.

    A call that raises while it warms up is left out, and its `error` says why.
    """
    gc.collect()
    gc.freeze()  # what is there now is no garbage of the calls: the collections between samples pass over it
    try:
        return _compare(calls, device, rounds, min_rounds, budget_s, warmup, watch or Watch())
    finally:
        gc.unfreeze()


def _compare(
    calls: Mapping[str, Call], device: str, rounds: int, min_rounds: int, budget_s: float, warmup: int, watch: Watch
) -> dict[str, Timing]:
    timings = {name: Timing() for name in calls}
    repeats: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for name, call in calls.items():
        try:
            for _ in range(warmup):
                call()
            start = time.perf_counter()
            timings[name].peak_bytes = peak_extra_bytes(call, device)
            seconds[name] = time.perf_counter() - start
            if rounds == 0:
                continue
            long = seconds[name] > 50 * SAMPLE_SECONDS
            repeats[name] = 1 if long else _repeats(call, device)
            timings[name].launches, timings[name].kernel_s = look_at_kernels(call, device)
        except Exception as error:  # a peer may fail in any way; the others are still worth measuring
            timings[name].error = describe(error)
    alive = list(repeats)
    quickest = min((seconds[name] for name in alive), default=0.0)
    slow = {name for name in alive if seconds[name] > max(SLOW_SECONDS, SLOW_FACTOR * quickest)}
    spent = 0.0
    for done in range(rounds):
        if done >= min_rounds and spent > budget_s:
            break
        for name in _order([name for name in alive if done < SLOW_ROUNDS or name not in slow], done):
            start = time.perf_counter()
            with watch:
                wall, cpu = _sample(calls[name], repeats[name], device)
            timings[name].wall_s.append(wall)
            timings[name].cpu_s.append(cpu)
            if name not in slow:
                spent += time.perf_counter() - start
    return timings


def describe(error: BaseException) -> str:
    """The first line of an error, shortened."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:160]


def seconds_of(call: Call, device: str = "cpu") -> float:
    """Of one call, by the clock."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_extra_bytes(call: Call, device: str = "cpu") -> int | None:
    """Most memory the call needed at once beyond what was in use before it; None where this cannot be told.

    On the CPU this is resident memory as the kernel counts it, with free heap handed back first.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _hand_back_free_heap()
    if not _reset_high_water_mark():
        return None
    resident = _proc_status("VmRSS")
    call()
    peak = _proc_status("VmHWM")
    return None if resident is None or peak is None else max(0, peak - resident)


def free_bytes(device: str = "cpu") -> int | None:
    """Memory that a call could still get; None where this cannot be told."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _size_in("/proc/meminfo", "MemAvailable")


def look_at_kernels(call: Call, device: str) -> tuple[int | None, float | None]:
    """How many kernels a call starts on the GPU, and the seconds that they run; None on the CPU and where no profiler says.

    A call on little data takes much longer than its kernels: the processor is what it waits for.
    """
    if device != "cuda":
        return None, None
    try:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        events = seen.key_averages()
        launches = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
        count = sum(event.count for event in events if event.key in launches)
        kernels = (event for event in events if event.device_type == DeviceType.CUDA)
        seconds = sum(event.self_device_time_total for event in kernels) / 1e6
        return count or None, seconds or None
    except Exception:  # profiling needs permissions and a library that may be missing; times need neither
        return None, None


def _median_ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(_ratios(mine, theirs))


def _ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """Of the rounds that both took part in."""
    return [x / max(y, 1e-9) for x, y in zip(mine, theirs, strict=False)]


def _order(names: list[str], done: int) -> list[str]:
    if not names:
        return []
    shift = done % len(names)
    order = names[shift:] + names[:shift]
    return order[::-1] if done % 2 else order


def _repeats(call: Call, device: str) -> int:
    wall, _ = _sample(call, 1, device)
    return max(1, min(MAX_REPEATS, int(SAMPLE_SECONDS / max(wall, 1e-7))))


def _sample(call: Call, repeats: int, device: str) -> tuple[float, float]:
    """Seconds per call: wall (device time on CUDA, from events) and CPU."""
    gc.collect()
    gc.disable()  # a collection in the middle would be charged to whoever happens to run
    try:
        if device == "cuda":
            return _sample_cuda(call, repeats)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall / repeats, cpu / repeats
    finally:
        gc.enable()


def _sample_cuda(call: Call, repeats: int) -> tuple[float, float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    cpu = time.process_time()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    cpu = time.process_time() - cpu
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats, cpu / repeats


def _hand_back_free_heap() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: freed memory may still count as resident
        return


def _reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _proc_status(key: str) -> int | None:
    return _size_in("/proc/self/status", key)


def _size_in(path: str, key: str) -> int | None:
    """A size in bytes from a file of /proc with lines such as "VmRSS: 1024 kB"."""
    try:
        with open(path) as file:
            sizes = [line.split()[1] for line in file if line.startswith(key + ":")]
    except OSError:
        return None
    return int(sizes[0]) * 1024 if sizes else None
