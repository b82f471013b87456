"""The machine a run was made on, and who else was at work on it."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from types import TracebackType

import torch

FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
)


def cpu_model() -> str:
    """The CPU's name for itself."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Those instruction sets of `FLAGS` that the CPU has."""
    lines = [line.partition(":")[2].split() for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))]
    return [flag for flag in FLAGS if lines and flag in lines[0]]


def caches(root: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[str, str]:
    """The caches that the first CPU sees, such as {"L1d": "32K", "L2": "512K", "L3": "32768K"}."""
    found = {}
    for index in sorted(Path(root).glob("index*")):
        level, kind, size = ("".join(_lines(str(index / name))).strip() for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return found


def blas() -> list[str]:
    """The libraries that torch.mm runs in, and the instruction set that torch itself uses."""
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    kept = [re.sub(r" \(Git.*", "", line) for line in lines if line.startswith(("Intel", "OpenBLAS", "CPU capability"))]
    info = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return [*kept, f"BLAS: {info[1]}"] if info else kept


def memory_gib() -> float | None:
    """How much memory there is."""
    sizes = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")]
    return round(int(sizes[0]) / 2**20, 1) if sizes else None


def load_average() -> list[float] | None:
    """How many processes wanted a core, over the last 1, 5 and 15 minutes."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


class Watch:
    """How many cores others had while this process was timing: `with watch:` around what is timed, any number of times."""

    def __init__(self) -> None:
        self.seconds = self.everybody = self.own = 0.0

    def __enter__(self) -> Watch:
        self._start = _snapshot()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        wall, everybody, own = (now - then for now, then in zip(_snapshot(), self._start, strict=True))
        self.everybody += everybody
        self.own += own
        self.seconds += wall

    @property
    def other_cores(self) -> float | None:
        """Cores busy with others, on average; None where the kernel does not say, or nothing was timed long enough to tell."""
        stands_still = self.everybody < self.own / 2  # as a container may show it
        return None if stands_still or self.seconds < 0.2 else max(0.0, self.everybody - self.own) / self.seconds


def _snapshot() -> tuple[float, float, float]:
    """Seconds: of the clock; of all CPUs at work, or withheld by a hypervisor; of this process and children it waited for."""
    fields = next((line.split()[1:9] for line in _lines("/proc/stat") if line.startswith("cpu ")), [])
    user, nice, system, _idle, _iowait, irq, soft, steal = (*map(int, fields), *[0] * (8 - len(fields)))
    ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    own = os.times()
    return time.perf_counter(), (user + nice + system + irq + soft + steal) / ticks, sum(own[:4])


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
