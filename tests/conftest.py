"""Fixtures of every test: a seed, the devices, threads, and what a call allocates.

`pytest` runs the matrix on the CPU; `pytest -m cuda` runs the same matrix on a GPU.
"""

import importlib.util
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import hypothesis
import pytest
import torch

import prefkern
from simt import build, harness

hypothesis.settings.register_profile("prefkern", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("prefkern")

HAS_CUDA = torch.cuda.is_available() and prefkern.capabilities()["cuda_compiled"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Most inputs here are too small to share out; on a busy machine threads would mostly wait for each other. What
    depends on threads asks for them with the fixture below."""
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """`device` is the CPU, and CUDA where there is one or the command line speaks of it."""
    marks = metafunc.definition.iter_markers("parametrize")
    given = any("device" in (m.args[0].split(",") if isinstance(m.args[0], str) else m.args[0]) for m in marks)
    if "device" not in metafunc.fixturenames or given:
        return
    devices = ["cpu"]
    if HAS_CUDA or "cuda" in metafunc.config.getoption("-m"):
        devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
    metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture(scope="module")
def load_example():
    """Import a file of examples/ by its name, as Python finds what is beside it when it runs as a program."""
    folder, names = Path(__file__).parents[1] / "examples", []

    def load(name):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        names.append(name)
        sys.modules[name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    sys.path.insert(0, str(folder))
    yield load
    sys.path.remove(str(folder))
    for name in names:
        del sys.modules[name]


@pytest.fixture
def device(request):
    if request.param == "cuda" and not HAS_CUDA:
        pytest.skip("needs an NVIDIA GPU and a build with CUDA")
    return request.param


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def validation():
    """Set validation; the old setting comes back afterwards."""
    before = prefkern.validation()
    yield prefkern.set_validation
    prefkern.set_validation(before)


class Allocations:
    """Bytes that went through torch's allocator during a call: the largest piece, and the most held at once."""

    def __init__(self, device, call):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.result = call()
            torch.cuda.synchronize()
            self.peak = self.largest = torch.cuda.max_memory_allocated() - before
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.result = call()
        events = profile.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        self.peak = max(accumulate(sizes), default=0)
        self.largest = max(sizes, default=0)


@pytest.fixture
def allocations(device):
    return lambda call: Allocations(device, call)


@pytest.fixture(scope="session")
def run_python():
    """Run a script in a process of its own and return what it printed. A variable that is None is unset there."""

    def run(script, *args, **environment):
        environment = {**os.environ, **environment}
        process = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout.strip()

    return run


class OpLog(torch.utils._python_dispatch.TorchDispatchMode):
    """Which prefkern ops ran, with their arguments: [(name, args)]."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prefkern":
            self.calls.append((func.name().removeprefix("prefkern::"), args))
        return func(*args, **(kwargs or {}))

    def args(self, name):
        (found,) = [args for called, args in self.calls if called == name]
        return found

    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture
def op_log():
    with OpLog() as log:
        yield log


# ---- CUDA kernels on the CPU ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def simt_cache(request, tmp_path_factory):
    pytest_cache = getattr(request.config, "cache", None)
    return pytest_cache.mkdir("prefkern_simt") if pytest_cache else tmp_path_factory.mktemp("prefkern_simt")


@pytest.fixture(scope="session")
def simt_module(simt_cache):
    if path := os.environ.get("PREFKERN_SIMT_MODULE"):
        return build.load(Path(path))
    if missing := build.missing():
        pytest.skip(f"needs {missing}")
    return build.load(build.build(simt_cache))


@pytest.fixture
def simt(simt_module):
    harness.set_order(simt_module, "forward", 0)
    return simt_module


@pytest.fixture(scope="session")
def sanitized(simt_cache):
    """Runs Python with the sanitized module, whose path is in PREFKERN_SIMT_MODULE."""
    if missing := build.missing():
        pytest.skip(f"needs {missing}")
    environment = build.sanitizer_environment()
    if environment is None:
        pytest.skip("the compiler has no sanitizers")
    path = build.build(simt_cache, "sanitize")
    environment = {**os.environ, **environment, "PREFKERN_SIMT_MODULE": str(path), "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "cwd": build.HERE.parent, "capture_output": True, "text": True}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], check=False, **options)

    return run
