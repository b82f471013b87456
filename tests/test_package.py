"""What the package says of itself, its settings, its planner, and every instruction set it is compiled for."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import prefkern

TESTS = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


# --------------------------------------------------------------------------------------------------------- what it says


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", prefkern.__version__)
    assert prefkern.__version__ == importlib.metadata.version("prefkern") == prefkern.build_info()["version"]


def test_build_info():
    info = prefkern.build_info()
    assert set(info) == {
        "version", "compiler", "torch_built", "torch_target", "torch_running", "cuda_archs", "cuda_runtime", "cutlass",
    }  # fmt: skip
    assert re.match(r"\d+\.\d+", info["compiler"])
    running = re.match(r"\d+\.\d+\.\d+", torch.__version__)[0]
    assert info["torch_running"] == running
    numbers = [tuple(map(int, info[key].split("."))) for key in ("torch_target", "torch_built", "torch_running")]
    assert numbers[0] <= numbers[1]
    assert numbers[0] <= numbers[2]
    assert isinstance(info["cuda_runtime"], int)
    assert (info["cuda_archs"] == "") == (info["cuda_runtime"] == 0)
    assert re.fullmatch(r"(\d+\.\d+\.\d+)?", info["cutlass"])
    assert info["cutlass"] == "" or "90a" in info["cuda_archs"]


def test_capabilities():
    found = prefkern.capabilities()
    assert set(found) == {
        "cpu_isa", "cpu_isas", "cpu_features", "cpu_gemm", "cuda_compiled", "cuda_forward", "cuda_backward",
        "torch_cuda_stream_api",
    }  # fmt: skip
    assert found["cpu_gemm"] in {"own", "library"}
    assert found["cuda_forward"] in {"auto", "stage1", "stage2"}
    assert found["cuda_backward"] in {"auto", "dense", "compact"}
    assert found["cpu_isas"][0] == "base"
    assert found["cpu_isa"] in found["cpu_isas"]
    assert found["cuda_compiled"] == (prefkern.build_info()["cuda_runtime"] != 0)
    if torch.version.cuda is None:
        assert found["torch_cuda_stream_api"] is False
    cpu = Path("/proc/cpuinfo")
    flags = re.search(r"^flags.*", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    if flags:
        known = {"avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512bf16"}
        assert set(found["cpu_features"]) == known & set(flags[0].replace("avx512_bf16", "avx512bf16").split())


def test_everything_public_is_there_and_documented():
    for name in prefkern.__all__:
        assert getattr(prefkern, name).__doc__, name
    assert {"linear_logprobs", "logits_logprobs", "plan_chunks", "set_validation"} <= set(prefkern.__all__)


IMPORT = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import prefkern
seconds = time.process_time() - start
heavy = {"transformers", "tokenizers", "matplotlib", "rich", "typer", "triton", "pandas", "scipy"}
print(seconds, *sorted(heavy & (set(sys.modules) - before)))
"""


def test_import_is_quick(run_python):
    """Beside torch's own import; nothing heavy comes with it."""
    seconds, *heavy = run_python(IMPORT).split()
    assert heavy == []
    assert float(seconds) < 0.5


# ----------------------------------------------------------------------------------------------------------- validation


def test_set_validation(validation):
    for value in (True, False, 1, 0):
        validation(value)
        assert prefkern.validation() is bool(value)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False), (None, False)])
def test_validation_from_the_environment(monkeypatch, value, expected):
    """Read when the module is loaded: load it once more, beside the one in use."""
    monkeypatch.delenv("PREFKERN_VALIDATE", raising=False)
    if value is not None:
        monkeypatch.setenv("PREFKERN_VALIDATE", value)
    spec = importlib.util.find_spec("prefkern.ops._call")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.validation() is expected


# -------------------------------------------------------------------------------------------------------------- planner


SHAPES = [(1, 1, 1), (13, 32, 301), (4096, 4096, 128_256), (100_000, 64, 50_257), (7, 8192, 262_144)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # a plan needs no device
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 20, 1 << 24, 1 << 40])
def test_plan(dtype, backward, device, chunk_bytes):
    options = {"dtype": DTYPES[dtype], "device": device, "backward": backward, "chunk_bytes": chunk_bytes}
    for rows, hidden, vocab in SHAPES:
        plan = prefkern.plan_chunks(rows, hidden, vocab, **options)
        assert 1 <= plan.row_chunk <= rows
        assert 1 <= plan.vocab_block <= vocab
        accumulator = 8 if dtype == "float64" else 4
        assert plan.workspace_bytes >= plan.row_chunk * plan.vocab_block * accumulator
        smallest = accumulator + 12 * hidden  # one logit, its row and column widened, the column's gradient
        assert plan.workspace_bytes <= max(chunk_bytes or (512 << 20), smallest)
        fields = (plan.row_chunk, plan.vocab_block, plan.workspace_bytes, plan.fused)
        assert not plan.fused or (device == "cpu" and not backward and prefkern.capabilities()["cpu_gemm"] == "own")
        assert repr(plan) == "ChunkPlan(row_chunk={}, vocab_block={}, workspace_bytes={}, fused={})".format(*fields)
        assert repr(prefkern.plan_chunks(rows, hidden, vocab, **options)) == repr(plan)


def test_a_small_head_is_one_block():
    for backward in (False, True):
        plan = prefkern.plan_chunks(16, 64, 500, backward=backward)
        assert (plan.row_chunk, plan.vocab_block) == (16, 500)
        assert plan.fused or plan.workspace_bytes == 16 * 500 * 4


def test_a_plan_of_nothing_is_nothing():
    plan = prefkern.plan_chunks(0, 64, 500)
    assert (plan.row_chunk, plan.vocab_block, plan.workspace_bytes) == (0, 0, 0)


def test_a_larger_budget_gives_larger_blocks():
    sizes = [prefkern.plan_chunks(4096, 1024, 100_000, chunk_bytes=1 << k).workspace_bytes for k in range(12, 36)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 100 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 4, 5), ValueError, "rows is -1"),
        ((3, -4, 5), ValueError, "hidden is -4"),
        ((3, 4, -5), ValueError, "vocab is -5"),
        ((3.5, 4, 5), TypeError, "rows is 3.5"),
        ((3, "4", 5), TypeError, "hidden is '4'"),
        ((3, 4, None), TypeError, "vocab is None"),
    ],
)
def test_bad_sizes_of_a_plan_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        prefkern.plan_chunks(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64.*torch.float32"),
        ({"dtype": "float32"}, TypeError, "dtype is float32.*torch.float32"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0.*positive"),
        ({"chunk_bytes": 1.5}, TypeError, "chunk_bytes is 1.5.*integer"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'.*cpu.*cuda"),
        ({"device": 1.5}, ValueError, "device is 1.5.*cpu.*cuda"),
        ({"device": "meta"}, ValueError, "device is 'meta'.*cpu.*cuda"),
    ],
)
def test_bad_options_of_a_plan_are_named(options, error, message):
    with pytest.raises(error, match=message):
        prefkern.plan_chunks(3, 4, 5, **options)


# ----------------------------------------------------------------------------------------------------- instruction sets

RESULTS = """
import sys
import pytest
import torch
import prefkern

torch.manual_seed(0)
results = {"isa": prefkern.capabilities()["cpu_isa"]}
outputs = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for options in ({}, {"softcap": 5.0, "logit_scale": 1.5, "temperature": 0.7}):
        logits = (torch.randn(6, 3001) * 3).to(dtype).requires_grad_()
        targets = torch.tensor([0, 3000, -100, 17, 1024, 2048])
        out = prefkern.logits_logprobs(logits, targets, outputs=outputs, **options)
        (out.logp.sum() - 0.5 * out.entropy.sum() + 0.1 * out.lse.sum()).backward()
        results[f"{dtype} {options}"] = [*(t.detach() for t in out), logits.grad]
torch.save(results, sys.argv[1])
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]) if sys.argv[2:] else 0)
"""


@pytest.fixture(scope="module")
def best_results(run_python, tmp_path_factory):
    """Of the instruction set this machine takes when it is not told otherwise."""
    path = tmp_path_factory.mktemp("best") / "results.pt"
    run_python(RESULTS, path, PREFKERN_CPU_ISA=None)
    return torch.load(path)


ISAS = [pytest.param(isa, marks=pytest.mark.slow) if isa == "base" else isa for isa in prefkern.capabilities()["cpu_isas"]]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same(run_python, tmp_path, best_results, isa):
    """Equal within rounding; and the tests of the formulas and kernels pass with the narrower ones."""
    compiled = prefkern.capabilities()["cpu_isas"]
    if compiled.index(isa) > compiled.index(best_results["isa"]):
        pytest.skip(f"this CPU has no {isa}")
    path = tmp_path / "results.pt"
    # This process runs those tests with its own set; avx512_bf16 differs from avx512 in a conversion.
    elsewhere = {"base", "avx2"} - {prefkern.capabilities()["cpu_isa"]}
    tests = [TESTS / f"test_{name}.py" for name in ("softmax_math", "raw_kernels", "cpu_products")] if isa in elsewhere else []
    run_python(RESULTS, path, *tests, PREFKERN_CPU_ISA=isa, OMP_NUM_THREADS="1")
    results = torch.load(path)
    assert results.pop("isa") == isa
    for case, fields in results.items():
        dtype = DTYPES[case.split()[0].removeprefix("torch.")]
        *values, top, gradient = fields
        *expected, expected_top, expected_gradient = best_results[case]
        for a, b in zip(values, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12 if dtype == torch.float64 else 5e-6, msg=case)
        assert torch.equal(top, expected_top)
        error = (gradient.double() - expected_gradient.double()).norm() / expected_gradient.double().norm()
        assert error < {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-4}[case.split()[0][6:]], case
