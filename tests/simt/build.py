"""Compiles every CUDA source of the project for the CPU, with the emulator of simt.h: one Python module, simt_kernels.

`build` keeps objects and modules in a directory of the caller's, named by a hash of all that goes into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WEEK = 7 * 24 * 3600

# The namespace gets another name: pybind11 refuses to register a type that prefkern._C has registered in this process.
COMMON = [
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas",
    "-DPK_SIMT", "-DPREFKERN_NO_CUTLASS", "-Dprefkern=prefkern_simt", '-DPREFKERN_CUDA_ARCHS="simt"',
    "-I", str(ROOT / "csrc"), "-I", str(HERE),
]  # fmt: skip
PYTHON = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
SANITIZERS = "-fsanitize=address,undefined"
# A GPU's compiler fuses products and sums wherever it can: what must not be fused has to fail here, too.
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
FUSED = ["-ffp-contract=fast", *(["-mfma"] if re.search(r"^flags\b.*\bfma\b", CPU_FLAGS, re.MULTILINE) else [])]
VARIANTS = {
    "plain": ["-O2", *FUSED],
    "sanitize": ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", SANITIZERS],
}


def compiler() -> list[str]:
    """The command; empty if there is none."""
    return shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")


def missing() -> str | None:
    """What this machine lacks to build the module."""
    if not compiler():
        return "a C++ compiler"
    return None if Path(sysconfig.get_paths()["include"], "Python.h").exists() else "Python.h"


def build(directory: Path, variant: str = "plain") -> Path:
    """The path of the compiled module."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = COMMON + VARIANTS[variant]
    # There are no tensor cores here to emulate Hopper's.
    kernels = [path for path in sorted(ROOT.glob("csrc/*/*.cu")) if not path.name.startswith("hopper_")]
    kernels += [ROOT / "csrc/core/without_cutlass.cpp", HERE / "simt.cpp", HERE / "misuse.cpp", HERE / "tiles.cpp"]
    # The bindings hold no device code: one object serves all variants, and no time goes into optimising it.
    jobs = [(HERE / "module.cpp", [*COMMON, *PYTHON, "-O0", "-g0"]), *((kernel, flags) for kernel in kernels)]
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait and find it done
        _remove_unused(directory)
        shared_key = _shared_key()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: _compile(directory, *job, shared_key), jobs))
        link = ["-shared", *(flag for flag in flags if flag == SANITIZERS)]
        return _make(directory / f"simt_kernels-{_hash([*link, *map(str, objects)])}.so", link, objects)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("simt_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str] | None:
    """What lets an interpreter without sanitizers load the `sanitize` variant; None where the compiler lacks them."""
    # libstdc++ too, or AddressSanitizer would not find the __cxa_throw that it wraps.
    libraries = [Path(_run([f"-print-file-name={name}"]).strip()) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(library.is_absolute() for library in libraries):
        return None
    return {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _shared_key() -> str:
    """A hash of what every object depends on."""
    headers = sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *HERE.glob("*.h")])
    versions = [*compiler(), _run(["--version"]), pybind11.__version__, sys.version]
    return _hash([*versions, *(f"{path}\n{path.read_text()}" for path in headers)])


def _compile(directory: Path, source: Path, flags: list[str], shared_key: str) -> Path:
    command = [*flags, "-x", "c++", "-c"]
    key = _hash([shared_key, *command, str(source), source.read_text()])
    return _make(directory / f"{source.stem}-{key}.o", command, [source])


def _make(output: Path, command: list[str], sources: list[Path]) -> Path:
    if not output.exists():
        partial = output.with_suffix(".partial")
        _run([*command, *map(str, sources), "-o", str(partial)])
        partial.rename(output)
    output.touch()
    return output


def _remove_unused(directory: Path) -> None:
    for path in directory.iterdir():
        if path.stat().st_mtime < time.time() - WEEK:
            path.unlink()


def _run(arguments: list[str]) -> str:
    command = [*compiler(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
