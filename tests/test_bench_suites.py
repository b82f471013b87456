"""The suites of `prefkern bench`, and the tables and figures made of their results."""

import json
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from prefkern.bench import curves, machine, peers, report, runner, shapes, suites, tables, timing
from prefkern.bench.shapes import Case
from prefkern.bench.workloads import WORKLOADS, products
from prefkern.cli import app

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("head", "losses", "small", "memory", "scaling")
LOSSES = ("linear_policy_loss", "linear_preference_loss", "linear_unpaired_loss")
F = 2 * 48 * 32 * 1000
"""Operations of one product in a quick head."""


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def refuse(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│]+", " ", result.output)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Each suite's results, measured when a test asks for them first."""
    found = {}

    def results(name):
        if name not in found:
            file = tmp_path_factory.mktemp("suite") / f"{name}.json"
            result = run(
                "bench", "--suite", name, "--quick", "--rounds", 2, "--budget", 0, "--against", "eager", "--json", file
            )
            assert result.exit_code == 0, result.output
            found[name] = json.loads(file.read_text())
        return found[name]

    return results


def ours(data, **conditions):
    rows = [row for row in data["rows"] if row["peer"].startswith("prefkern")]
    return [row for row in rows if all(row[key] == value for key, value in conditions.items())]


# --------------------------------------------------------------------------------------------------------------- suites


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_measures_this_library_and_its_peers(measured, name):
    data = measured(name)
    assert (data["suite"], data["size"], data["left_out"]) == (name, "quick", [])
    assert {row["peer"] for row in data["rows"]} >= {"prefkern", "eager"}
    for row in data["rows"]:
        assert row["status"] == "ok"
        if row["peer"].startswith("floor"):
            continue
        assert row["bit_stable"] is True
        # eager PyTorch rounds bfloat16 logits, and its gradients are bfloat16 as everybody's
        narrow = row["dtype"] == "bf16"
        assert row["max_error"] < (0.1 if narrow and row["peer"] == "eager" else 1e-4)
        assert row["grad_error"] is None or row["grad_error"] < (0.05 if narrow else 1e-4)
        assert row["mode"] == "fwd" or row["grad_error"] is not None


@pytest.mark.parametrize("name", ["head", "losses", "small", "scaling"])
def test_times_are_given_as_ratios_with_what_makes_them_doubtful(measured, name):
    data = measured(name)
    for row in data["rows"]:
        assert row["time_ms"] >= row["min_ms"] > 0
        assert min(row["ratio_floor"], row["ratio_min"], row["cpu_ratio_min"]) > 0
        assert row["ratio_spread"] >= 0
        assert row["rounds"] == 2
    assert all(row["ratio_min"] == 1.0 for row in data["rows"] if row["peer"] == "floor")
    assert data["noise"]["spread_max"] >= data["noise"]["spread_median"] >= 0
    assert set(data["noise"]) >= {"load_average_after", "other_cores", "other_cores_max"}


def test_the_head_has_floors_of_one_three_and_four_products(measured):
    rows = measured("head")["rows"]
    notes = {(row["dtype"], row["mode"], row["peer"]): row["note"] for row in rows if row["peer"].startswith("floor")}
    assert notes["fp32", "fwd", "floor"] == "torch.mm in fp32"
    assert notes["fp32", "bwd", "floor"] == "3 torch.mm in fp32"
    assert notes["fp32", "bwd", "floor-recompute"] == "4 torch.mm in fp32"
    assert ("fp32", "fwd", "floor-recompute") not in notes
    assert {row["outputs"] for row in rows if row["peer"] == "prefkern"} == {"logp", "logp+entropy"}


def test_losses_are_single_passes_and_two_steps_of_every_kind(measured):
    data = measured("losses")
    by_mode = {
        mode: {(row["op"], row["outputs"]) for row in ours(data, mode=mode)} for mode in ("bwd", "frozen", "active")
    }  # fmt: skip
    assert by_mode["bwd"] == {
        *(("linear_policy_loss", variant) for variant in ("grpo", "grpo+entropy", "gspo")),
        *(("linear_preference_loss", variant) for variant in ("dpo", "simpo", "orpo")),
        ("linear_unpaired_loss", "kto"),
    }
    assert ("linear_policy_loss", "grpo+entropy") in by_mode["frozen"]
    assert by_mode["active"] == {("linear_policy_loss", "clip")}
    for op in LOSSES:
        assert {row["peer"] for row in ours(data, op=op, dtype="fp32")} == {"prefkern", "prefkern-two-step"}
        assert {row["peer"] for row in ours(data, op=op, dtype="bf16")} > {"prefkern-fp32"}
    floors = {row["mode"]: row["note"] for row in data["rows"] if row["peer"] == "floor" and row["dtype"] == "fp32"}
    assert floors == {
        "bwd": "3 torch.mm in fp32", "frozen": "2 torch.mm in fp32", "active": "1 + 2 x 0.2 torch.mm in fp32",
    }  # fmt: skip


def test_memory_is_told_beyond_gradients_and_without_times(measured):
    data = measured("memory")
    assert all(row["time_ms"] is None and row["ratio_floor"] is None for row in data["rows"])
    assert not [row for row in data["rows"] if row["peer"].startswith("floor")]
    gradients = {row["mode"]: row["gradient_mib"] for row in data["rows"] if row["op"] == "linear_logprobs"}
    hidden, weight = 48 * 32 * 4 / 2**20, 1000 * 32 * 4 / 2**20
    assert gradients == {"fwd": 0.0, "bwd": hidden + weight, "frozen": hidden}
    assert {row["op"] for row in data["rows"]} == {"linear_logprobs", *LOSSES}
    assert report.busy(data) is None


@pytest.mark.skipif(timing.peak_extra_bytes(lambda: None) is None, reason="this kernel does not tell")
def test_memory_of_a_head_is_less_than_its_logits():
    rows = runner.run_case(Case("linear_logprobs", (256, 16, 40000), "fp32", "fwd"), ["eager"], rounds=0)
    peak = {(row.peer, row.outputs): row.peak_mib for row in rows}
    logits = 256 * 40000 * 4 / 2**20
    assert peak["eager", "logp"] > logits * 0.9
    assert peak["prefkern", "logp"] < logits / 2


def test_scaling_varies_one_axis_at_a_time(measured):
    data = measured("scaling")
    base = data["base"]
    assert base == {"N": 32, "H": 16, "V": 500}
    for row in data["rows"]:
        differs = [name for name, value in zip("NHV", row["shape"], strict=True) if value != base[name]]
        assert len(differs) + (row["threads"] != 0) <= 1
    threads = {row["threads"] for row in data["rows"]} - {0}
    assert (threads | {torch.get_num_threads()}) >= {1, os.cpu_count()}


def test_small_ops_have_a_copy_or_a_read_as_floor(measured):
    data = measured("small")
    floors = {row["op"]: row["note"] for row in data["rows"] if row["peer"] == "floor" and row["mode"] == "fwd"}
    assert floors["logits_logprobs"].startswith("one read")
    assert floors["group_advantages"] == "copy_ of the inputs"
    assert {row["op"] for row in data["rows"]} == set(shapes.OPS) - {"linear_logprobs", *LOSSES, "overhead"}


@pytest.mark.parametrize("size", suites.SIZES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SUITES)
def test_every_case_of_a_suite_exists(name, device, size):
    parts = suites.parts_of(name, size, device=device)
    assert parts
    for part in parts:
        op = shapes.OPS[part.case.op]
        assert len(part.case.shape) == len(op.dims)
        assert part.case.dtype in op.dtypes
        assert part.case.mode in op.modes
        assert set(part.against) <= set(peers.PEERS)
    assert len({part.case for part in parts}) == len(parts)


def test_the_full_head_has_every_shape():
    parts = suites.parts_of("head", "full")
    assert {part.case.shape for part in parts} == {
        (n, h, v) for n in (512, 2048) for h in (256, 1024, 4096) for v in (32000, 128256, 151936)
    }
    assert {part.case.dtype for part in parts} == {"fp32", "bf16"}


def test_the_full_head_on_a_gpu_has_every_shape():
    parts = suites.parts_of("head", "full", device="cuda")
    assert {part.case.shape for part in parts} == {
        (n, h, v) for n in (2048, 8192, 32768) for h in (1024, 2048, 4096) for v in (32000, 128256, 151936)
    }
    assert {part.case.dtype for part in parts} == {"bf16"}


def test_who_has_kernels_for_gpus_only_is_compared_with_there():
    for device, expected in (("cpu", set()), ("cuda", {"verl", "quack"})):
        parts = [*suites.parts_of("head", device=device), *suites.parts_of("memory", device=device)]
        heads = [part for part in parts if part.case.op == "linear_logprobs"]
        assert heads
        assert all(set(part.against) & {"verl", "quack"} == expected for part in heads)
    assert all("verl" not in part.against for part in suites.parts_of("losses", device="cuda"))


def test_peers_for_gpus_say_so_on_a_cpu(monkeypatch):
    import importlib
    from types import SimpleNamespace

    modules = {
        "verl.utils.kernel.linear_cross_entropy": SimpleNamespace(linear_cross_entropy=None),
        "quack.cross_entropy": SimpleNamespace(cross_entropy=None),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    for name in ("verl", "quack"):
        with pytest.raises(peers.Unavailable, match="needs an NVIDIA GPU"):
            peers.PEERS[name]().linear_logprobs(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2]), False)


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "package"), [("verl", "verl"), ("quack", "quack")])
def test_heads_for_gpus_are_the_same(name, package):
    pytest.importorskip(package)
    rows = runner.run_case(Case("linear_logprobs", (64, 256, 1024), "bf16", "bwd"), [name], device="cuda", rounds=0)
    done = [row for row in rows if row.peer == name and row.status == "ok"]
    assert done
    assert all(row.max_error < 0.05 for row in done)


def test_dtypes_and_modes_leave_out_cases_and_peers_replace_those_of_the_suite():
    parts = suites.parts_of("head", "quick", against=["eager"], dtypes=["bf16"], modes=["fwd"])
    assert [(part.case.dtype, part.case.mode, part.against) for part in parts] == [("bf16", "fwd", ("eager",))]


def test_cases_after_the_limit_are_left_out_and_named():
    parts = suites.parts_of("head", "quick")
    found = suites.run_suite("head", parts, limit_s=0.0)
    assert found == {"rows": [], "left_out": [part.case.title for part in parts]}


def test_a_case_with_threads_of_its_own_leaves_those_of_others_alone():
    before = torch.get_num_threads()
    rows = runner.run_case(Case("linear_logprobs", (8, 8, 50), "fp32", "fwd", threads=before + 1), [], rounds=1)
    assert torch.get_num_threads() == before
    assert {row.threads for row in rows} == {before + 1}
    assert report.case_title({**vars(rows[0])}).endswith(f"fwd {before + 1} threads")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "haed"], "unknown suite 'haed'; did you mean 'head'?"),
        (["policy_loss", "--suite", "head"], "--suite has ops and shapes of its own"),
        (["--suite", "head", "--shapes", "4x4x4"], "--suite has ops and shapes of its own"),
        (["--suite", "head", "--quick", "--full"], "--quick and --full are given"),
        (["--suite", "head", "--dtype", "fp64"], "suite head has nothing with --dtype fp64"),
        (["--suite", "head", "--mode", "frozne"], "unknown mode 'frozne'; did you mean 'frozen'?"),
        (["overhead", "--quick"], "are about a --suite"),
        (["overhead", "--limit", "3"], "are about a --suite"),
        (["logits_logprobs", "--mode", "frozen"], "logits_logprobs is not measured with mode frozen"),
    ],
)
def test_bench_refuses(arguments, message):
    assert message in refuse("bench", *arguments)


# --------------------------------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize(
    ("op", "shape"),
    [("linear_logprobs", (48, 32, 1000)), *((op, (2 if op == LOSSES[1] else 4, 12, 32, 1000)) for op in LOSSES)],
)
@pytest.mark.parametrize(("mode", "passes"), [("fwd", 1), ("bwd", 3), ("frozen", 2), ("active", 1 + 2 * 10 / 48)])
def test_a_floor_multiplies_as_often_as_it_says(monkeypatch, op, shape, mode, passes):
    if mode not in shapes.OPS[op].modes:
        pytest.skip("has no such mode")
    workload = WORKLOADS[op](Case(op, shape, "fp32", mode), "cpu")
    floor, operations, mm = workload.floor(), [], torch.mm

    def counted(a, b, **options):
        operations.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", counted)
    floor.call()
    assert sum(operations) == pytest.approx(passes * F)


def test_the_gradient_of_a_frozen_weight_is_not_asked_for():
    workload = WORKLOADS["linear_logprobs"](Case("linear_logprobs", (8, 8, 50), "fp32", "frozen"), "cpu")
    assert set(workload.call(peers.Eager(), "logp")()) == {"logp", "grad hidden"}


def test_a_fifth_of_the_rows_is_active():
    workload = WORKLOADS["linear_logprobs"](Case("linear_logprobs", (50, 8, 60), "fp32", "active"), "cpu")
    grads = workload.call(peers.Eager(), "logp+entropy")()["grad hidden"]
    assert int((grads != 0).any(1).sum()) == products.active_rows(50) == 10


@pytest.mark.parametrize(
    ("quicker", "note"), [("bf16", "3 torch.mm in bf16"), ("fp32", "3 torch.mm in fp32, quicker here than in bf16")]
)
def test_the_floor_of_a_narrow_type_is_the_quicker_product(monkeypatch, quicker, note):
    speed = {torch.bfloat16: 1.0, torch.float32: 0.5 if quicker == "fp32" else 2.0}
    monkeypatch.setattr(products, "_seconds_per_flop", lambda dtype, backward, threads: speed[dtype] * 1e-9)
    floor = products.head_floor(torch.ones(4, 8).bfloat16(), torch.ones(16, 8).bfloat16(), "bwd")
    assert floor.about == note
    floor.call()


def test_nobody_waits_for_products_that_the_cpu_has_no_instructions_for(monkeypatch):
    monkeypatch.setattr(
        products, "_seconds_per_flop", lambda dtype, backward, threads: 1e-3 if dtype == torch.bfloat16 else 1e-9
    )
    rows = runner.run_case(Case("linear_logprobs", (8, 8, 50), "bf16", "fwd"), ["eager"], rounds=1)
    statuses = {row.peer: row.status for row in rows if row.outputs}
    assert statuses == {
        "prefkern": "ok", "prefkern-fp32": "ok", "eager": "products in bf16 would take 6 s a call on this CPU",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.slow
@pytest.mark.parametrize("op", LOSSES)
def test_compiled_losses_are_the_same(op):
    case = Case(op, (2, 8, 16, 200), "fp32", "bwd")
    rows = [row for row in runner.run_case(case, ["compile"], rounds=0) if row.peer == "compile"]
    assert rows
    assert all(row.status == "ok" and row.max_error < 1e-5 and row.grad_error < 1e-4 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "package"), [("liger", "liger_kernel"), ("trl", "trl")])
@pytest.mark.parametrize("op", LOSSES)
def test_losses_of_other_libraries_are_the_same(op, peer, package):
    pytest.importorskip(package)
    for mode in ("bwd", "active") if op == "linear_policy_loss" else ("bwd",):
        rows = [row for row in runner.run_case(Case(op, (4, 8, 16, 200), "fp32", mode), [peer], rounds=0) if row.peer == peer]
        assert {row.status for row in rows} <= {"ok", "gives no entropy"}
        done = [row for row in rows if row.status == "ok"]
        assert done
        assert all(row.max_error < 1e-5 and row.grad_error < 1e-4 for row in done)


def test_libraries_that_are_missing_say_so(monkeypatch):
    import importlib

    real = importlib.import_module

    def import_module(name, package=None):
        if name.partition(".")[0] in ("liger_kernel", "trl"):
            raise ModuleNotFoundError(name=name.partition(".")[0])
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    rows = runner.run_case(Case("linear_unpaired_loss", (2, 4, 8, 50), "fp32", "bwd"), ["liger", "trl"], rounds=1)
    assert {(row.peer, row.status) for row in rows if row.status != "ok"} == {
        ("liger", "not installed"),
        ("trl", "not installed"),
    }


# -------------------------------------------------------------------------------------------------------------- machine


def test_ratios_of_minima_and_spread():
    mine, floor = timing.Timing([2.0, 6.0], [1.0, 1.5]), timing.Timing([1.0, 2.0], [0.5, 1.0])
    assert mine.min_ratio(floor) == 2.0
    assert mine.cpu_min_ratio(floor) == 2.0
    assert mine.ratio(floor) == 2.5
    assert mine.spread(floor) == pytest.approx((3.0 - 2.0) / 2.5)
    assert timing.Timing([1.0], [1.0]).spread(floor) is None


def test_a_watch_tells_what_others_had(monkeypatch):
    clock = iter([(0.0, 10.0, 1.0), (1.0, 11.8, 2.0), (5.0, 20.0, 2.0), (6.0, 21.5, 3.0)])
    monkeypatch.setattr(machine, "_snapshot", lambda: next(clock))
    watch = machine.Watch()
    for _ in range(2):
        with watch:
            pass
    assert watch.other_cores == pytest.approx((0.8 + 0.5) / 2)


@pytest.mark.parametrize(("seconds", "everybody"), [(0.1, 0.1), (1.0, 0.0)])
def test_a_watch_that_cannot_tell_says_nothing(monkeypatch, seconds, everybody):
    clock = iter([(0.0, 0.0, 0.0), (seconds, everybody, seconds)])
    monkeypatch.setattr(machine, "_snapshot", lambda: next(clock))
    watch = machine.Watch()
    with watch:
        pass
    assert watch.other_cores is None


def test_the_machine_is_described(tmp_path):
    for index, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "512K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert machine.caches(str(tmp_path)) == {"L1d": "32K", "L2": "512K"}
    assert machine.caches(str(tmp_path / "none")) == {}
    env = report.environment()
    assert set(env) >= {"caches", "cpu_flags", "memory_gib", "blas", "load_average"}
    assert set(env["cpu_flags"]) <= set(machine.FLAGS)
    assert any(line.startswith("BLAS") for line in env["blas"]) or not torch.backends.mkl.is_available()


def results_of(rows, **more):
    env = {
        "commit": "0123456789abcdef-dirty", "threads": 1, "prefkern": "0.1", "torch": "2", "device_name": "abacus",
        "time": "2026-01-02T03", "cpus": 2, "load_average": [0.5, 0.0, 0.0], "caches": {"L2": "512K"}, "blas": ["BLAS: mkl"],
        "capabilities": {"cpu_isa": "avx2"},
    }  # fmt: skip
    return {"schema": 1, "command": "prefkern bench --suite head", "environment": env, "left_out": [], "rows": rows} | more


def row_of(peer, outputs="logp", mode="fwd", **more):
    figures = {"time_ms": 2.0, "min_ms": 1.0, "ratio_floor": 1.5, "ratio_min": 1.4, "cpu_ratio_min": 1.3, "peak_mib": 6.0,
               "gradient_mib": 4.0, "max_error": 2e-6, "grad_error": None, "bit_stable": True}  # fmt: skip
    row = {"op": "linear_logprobs", "shape": [8, 4, 16], "dtype": "fp32", "mode": mode, "outputs": outputs, "peer": peer,
           "status": "ok", "note": "about", "threads": 0}  # fmt: skip
    return row | figures | more


def floor_of(mode="fwd", **more):
    return row_of("floor", "", mode, **{"note": "torch.mm in fp32", "time_ms": 0.5, "ratio_floor": 1.0} | more)


@pytest.mark.parametrize(
    ("noise", "threads", "measure", "reason"),
    [
        ({"other_cores": 0.1, "spread_median": 0.05}, 1, "ratio_floor", None),
        ({"other_cores": 0.9, "spread_median": 0.05}, 1, "cpu_ratio_min", "others had 0.9 of 2 CPUs while it timed"),
        ({"other_cores": 0.9, "spread_median": 0.05}, 2, "ratio_min", "others had 0.9 of 2 CPUs while it timed"),
        ({"other_cores": 0.0, "spread_median": 0.3}, 1, "cpu_ratio_min", "ratios of a case lay 30% apart"),
    ],
)
def test_a_busy_machine_is_recognised_and_judged_by_minima(noise, threads, measure, reason):
    data = results_of([row_of("prefkern")], noise=noise)
    data["environment"]["threads"] = threads
    assert report.yardstick(data)[0] == measure
    said = report.busy(data)
    assert (said is None) == (reason is None)
    assert reason is None or reason in said


def test_a_load_of_our_own_making_is_no_sign_of_others():
    data = results_of([row_of("prefkern")], noise={"other_cores": 0.0})
    data["environment"]["load_average"] = [2.0, 2.0, 2.0]
    assert report.busy(data) is None


def test_noise_sums_up_the_rows():
    rows = [floor_of(ratio_spread=9.0, other_cores=0.5), row_of("prefkern", ratio_spread=0.1, other_cores=0.5),
            row_of("eager", ratio_spread=0.3, other_cores=0.1)]  # fmt: skip
    noise = report.noise(rows)
    assert noise["spread_median"] == pytest.approx(0.2)
    assert noise["spread_max"] == 0.3
    assert noise["other_cores_max"] == 0.5
    assert report.noise([])["other_cores"] is None


# --------------------------------------------------------------------------------------------------------------- tables

ROWS = [
    floor_of(),
    row_of("eager", ratio_floor=2.5, max_error=3e-6, bit_stable=False),
    row_of("prefkern", ratio_floor=0.9),
    row_of("prefkern", "logp+entropy", ratio_floor=1.1),
    row_of("liger", "logp+entropy", status="gives no entropy", time_ms=None, peak_mib=None, max_error=None),
    row_of("liger", "logp", ratio_floor=1.7),
    row_of("cce", "logp", status="not installed", time_ms=None, peak_mib=None, max_error=None),
    row_of("cce", "logp+entropy", status="not installed", time_ms=None, peak_mib=None, max_error=None),
]


def test_a_table_of_ratios_has_a_column_for_each_peer_and_says_who_is_missing():
    assert tables.table(results_of(ROWS), "ratios") == (
        "| case | output | floor | prefkern | eager | liger |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| linear_logprobs 8x4x16 fp32 fwd | logp | 500 us | 0.90x | 2.50x | 1.70x |\n"
        "| linear_logprobs 8x4x16 fp32 fwd | logp+entropy | 500 us | 1.10x |  |  |\n\n"
        "Times over the floor: medians of the ratios of rounds. The floor: torch.mm in fp32 (fp32 fwd). "
        "Missing: liger for linear_logprobs logp+entropy (gives no entropy); cce (not installed)."
    )


def test_a_table_of_ratios_takes_minima_from_a_busy_machine():
    table = tables.table(results_of(ROWS, noise={"other_cores": 1.0}), "ratios")
    assert "| logp | 500 us | 1.30x |" in table
    assert "ratios of the least CPU times, since the machine was busy" in table


def test_a_table_of_memory_leaves_out_gradients():
    table = tables.table(results_of(ROWS), "memory", {"outputs": "logp"})
    assert table.splitlines()[0] == "| case | output | gradients | prefkern | eager | liger |"
    assert table.splitlines()[2] == "| linear_logprobs 8x4x16 fp32 fwd | logp | 4.0 | 2.0 | 2.0 | 2.0 |"


def test_a_table_of_errors_has_the_worst_of_each_peer():
    table = tables.table(results_of([*ROWS, row_of("prefkern", mode="bwd", max_error=5e-6, grad_error=1e-7)]), "errors")
    assert "| prefkern | fp32 | 5.0e-06 | 1.0e-07 | always |" in table
    assert "| eager | fp32 | 3.0e-06 |  | 0 of 1 cases |" in table
    assert "cce" not in table


def test_what_is_said_of_the_machine():
    data = results_of(ROWS, noise={"other_cores": 1.0}, left_out=["linear_logprobs 9x9x9 fp32 fwd"])
    said = tables.table(data, "machine")
    assert "abacus, 1 thread" in said
    assert "commit 0123456789ab-dirty" in said
    assert "caches L2 512K, kernels for avx2; BLAS: mkl" in said
    assert "others had 1.00 CPUs; load average before 0.50" in said
    assert "**The machine was busy" in said
    assert "Left out, for want of time: linear_logprobs 9x9x9 fp32 fwd." in said


def test_conditions_choose_rows():
    assert "logp+entropy" not in tables.table(results_of(ROWS), "memory", {"outputs": "logp", "dtype": "fp32,bf16"})
    with pytest.raises(ValueError, match=r"no rows with \{'dtype': 'bf16'\}"):
        tables.table(results_of(ROWS), "ratios", {"dtype": "bf16"})
    cut_short = results_of(ROWS, left_out=["linear_logprobs 8x4x16 bf16 fwd"])
    assert tables.table(cut_short, "ratios", {"dtype": "bf16"}) == "Not yet measured."
    with pytest.raises(ValueError, match="unknown kind of table 'ratio'; accepted: ratios, memory"):
        tables.table(results_of(ROWS), "ratio")


def test_documents_are_filled_from_results(tmp_path):
    report.save(results_of(ROWS), tmp_path / "cpu-a-head.json")
    text = (
        "Before.\n<!-- results: cpu-a-head.json memory outputs=logp -->\nold\n<!-- results: end -->\nBetween.\n"
        "<!-- results: gpu-a-head.json ratios -->\n<!-- results: end -->\nAfter.\n"
        "<!-- results: cpu-a-head.json plot image=head.png -->\n<!-- results: end -->\n"
    )
    filled = tables.fill(text, tmp_path)
    assert "old" not in filled
    assert "| logp | 4.0 | 2.0 | 2.0 | 2.0 |" in filled
    assert "<!-- results: gpu-a-head.json ratios -->\nNot yet measured.\n<!-- results: end -->\nAfter." in filled
    assert "](head.png)" in filled
    assert tables.fill(filled, tmp_path) == filled
    assert tables.images(filled) == {"head.png": "cpu-a-head.json"}


def test_documents_change_over_to_another_run():
    text = "<!-- results: benchmarks/results/cpu-epyc-zen3-head.json ratios -->\n<!-- results: end -->"
    assert tables.rename(text, "cpu", "xeon") == text.replace("epyc-zen3", "xeon")
    assert tables.rename(text, "gpu", "h100") == text


# -------------------------------------------------------------------------------------------------------------- figures


def points(peer, mode, shape, ms, threads=0):
    return row_of(
        peer, "" if peer == "floor" else "logp+entropy", mode, shape=shape, time_ms=ms, min_ms=ms / 2, threads=threads
    )


SCALING = [
    points(peer, mode, shape, ms, threads)
    for peer in ("floor", "prefkern", "floor-recompute")
    for mode in ("fwd", "bwd")
    for shape, ms, threads in (
        ([8, 4, 16], 1.0, 0), ([16, 4, 16], 2.0, 0), ([8, 8, 16], 3.0, 0), ([8, 4, 32], 4.0, 0), ([8, 4, 16], 0.6, 2),
    )
]  # fmt: skip
BASE = {"N": 8, "H": 4, "V": 16}


def scaling():
    return results_of(SCALING, suite="scaling", base=BASE, noise={"other_cores": 0.0})


@pytest.mark.parametrize(
    ("axis", "line"),
    [
        ("N", [(8, 1.0), (16, 2.0)]),
        ("H", [(4, 1.0), (8, 3.0)]),
        ("V", [(16, 1.0), (32, 4.0)]),
        ("threads", [(1, 1.0), (2, 0.6)]),
    ],
)
def test_a_curve_holds_everything_else(axis, line):
    found = curves.curves(scaling(), "fp32", axis)
    assert set(found) == {("floor", "fwd"), ("floor", "bwd"), ("prefkern", "fwd"), ("prefkern", "bwd")}
    assert found["prefkern", "fwd"] == line


def test_curves_of_a_busy_machine_are_least_times():
    found = curves.curves(scaling() | {"noise": {"other_cores": 1.0}}, "fp32", "N")
    assert found["prefkern", "fwd"] == [(8, 0.5), (16, 1.0)]


def test_the_figure_has_four_panels_for_each_dtype():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    data = scaling()
    data["rows"] = data["rows"] + [row | {"dtype": "bf16"} for row in data["rows"]]
    figure = curves.draw(data)
    panels = figure.axes
    assert len(panels) == 8
    assert [panel.get_title() for panel in panels[:4]] == [f"fp32: time against {axis}" for axis in curves.AXES]
    assert panels[1].get_xlabel() == "H   (N 8, V 16, threads 1)"
    assert {line.get_label() for line in panels[0].get_lines()} == {"floor fwd", "floor bwd", "prefkern fwd", "prefkern bwd"}
    assert list(panels[2].get_lines()[0].get_xdata()) == [16, 32]
    assert (panels[0].get_xscale(), panels[0].get_yscale()) == ("log", "log")
    plt.close(figure)


@pytest.mark.parametrize("suite", ["head", "memory", "scaling"])
def test_plot_draws_saved_results(tmp_path, suite):
    pytest.importorskip("matplotlib")
    untimed = [row | {"time_ms": None, "ratio_floor": None} for row in ROWS if row["peer"] != "floor"]
    data = {"head": results_of(ROWS), "memory": results_of(untimed), "scaling": scaling()}[suite]
    file = tmp_path / "results.json"
    report.save(data, file)
    result = run("plot", file)
    assert result.exit_code == 0, result.output
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", file, "--out", tmp_path / "other.png").exit_code == 0
    assert (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is no file"), ('{"schema": 0}', "schema 0, expected 1"), ("no JSON", "Expecting value")]
)
def test_plot_refuses(tmp_path, content, message):
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    assert message in refuse("plot", file)


# -------------------------------------------------------------------------------------------------------------- scripts


def test_the_script_for_cpus_runs_every_suite_within_its_time(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nshift 2\necho "$@" >>"$0.log"\n')
    stub.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks/run_cpu.sh"), "abacus", "--threads", "2", "--out", str(tmp_path / "results")]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(stub)}, capture_output=True, text=True, check=True)
    calls = (tmp_path / "python.log").read_text().splitlines()
    limits = []
    for name, call in zip(SUITES, calls, strict=True):
        found = re.fullmatch(
            rf"bench --suite {name} --threads 2 --limit (\d+) --json {tmp_path}/results/cpu-abacus-{name}.json", call
        )
        assert found, call
        limits.append(int(found[1]))
    assert 0.85 * 20 * 60 < limits[-1] <= 0.9 * 20 * 60  # nothing took any time, so the last one has all of it
    assert limits == sorted(limits)
    assert "s in all" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a name of letters"),
        (["a", "b"], "two names, a and b"),
        (["../a"], "a name of letters"),
        (["a", "--suites", "heads"], "unknown suite heads"),
        (["a", "--thread", "2"], "unknown option --thread"),
        (["a", "--threads"], "--threads needs a value"),
    ],
)
def test_the_script_for_cpus_refuses(arguments, message):
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/run_cpu.sh"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "tets"], "unknown step tets"),
        (["--suites", "head,tail"], "unknown suite tail"),
        (["--suite", "head"], "unknown argument --suite"),
        (["--limit"], "--limit needs a value"),
    ],
)
def test_the_script_for_gpus_refuses(arguments, message):
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/run_gpu.sh"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_the_script_for_documents_writes_tables_and_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "benchmarks/tables.py"))
    monkeypatch.setitem(script["main"].__globals__, "ROOT", tmp_path)
    report.save(results_of(ROWS), tmp_path / "cpu-new-head.json")
    report.save(scaling(), tmp_path / "cpu-new-scaling.json")
    document = tmp_path / "page.md"
    document.write_text(
        "<!-- results: ./cpu-old-head.json ratios -->\n<!-- results: end -->\n"
        "<!-- results: ./cpu-old-scaling.json plot image=curves.png -->\n<!-- results: end -->\n"
    )
    assert script["main"]([str(document), "--cpu", "new", "--check"]) == 1
    assert "cpu-old" in document.read_text()
    assert script["main"]([str(document), "--cpu", "new"]) == 0
    assert "| linear_logprobs 8x4x16 fp32 fwd | logp | 500 us | 0.90x |" in document.read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert script["main"]([str(document), "--check"]) == 0
    assert "differs from its results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("peer", "mode", "save"),
    [("prefkern-recompute", "bwd", "recompute"), ("prefkern-kept", "bwd", "logits"), ("prefkern-u", "frozen", "u")],
)
def test_ways_of_saving_are_peers_of_their_own(monkeypatch, peer, mode, save):
    import prefkern

    real, asked = prefkern.linear_logprobs, []

    def linear_logprobs(*tensors, **options):
        asked.append(options["save"])
        return real(*tensors, **options)

    monkeypatch.setattr(prefkern, "linear_logprobs", linear_logprobs)
    workload = WORKLOADS["linear_logprobs"](Case("linear_logprobs", (8, 8, 50), "fp32", mode), "cpu")
    outputs = workload.call(peers.PEERS[peer](), "logp+entropy")()
    assert asked == [save]
    errors = workload.errors(outputs, "logp+entropy")
    assert errors.forward < 1e-5
    assert errors.gradient < 1e-5
    assert set(runner.ours(Case("linear_logprobs", (8, 8, 50), "fp32", "frozen"))) > {"prefkern-u", "prefkern-kept"}


def test_stages_are_for_cuda():
    names = runner.ours(Case("linear_logprobs", (8, 8, 50), "bf16", "fwd"), "cuda")
    assert set(names) > {"prefkern-stage1", "prefkern-stage2"}
    rows = runner.run_case(Case("linear_logprobs", (8, 8, 50), "fp32", "fwd"), ["prefkern-stage2"], rounds=1)
    (status,) = {row.status for row in rows if row.peer == "prefkern-stage2"}
    assert status in ("this build has one forward on CUDA", "is for CUDA")
