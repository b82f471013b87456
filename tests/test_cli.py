"""The command line and the benchmark behind it."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import prefkern
from prefkern import reference
from prefkern.bench import peers, report, runner, shapes, timing, workloads
from prefkern.cli import app, demo

SINGLE_PASS = ("linear_policy_loss", "linear_preference_loss", "linear_unpaired_loss")
DIFFERENTIABLE = {
    "diffusion_margin",
    "diffusion_pref_loss",
    "x0_regression_loss",
    "linear_logprobs",
    "logits_logprobs",
    "policy_loss",
    "masked_aggregate",
    "kl_penalty",
    "sequence_sum",
    "sequence_mean",
    "masked_mean_pool",
    "step_mean",
    "level_pairs",
    "group_normalize",
    "group_preference_loss",
    *SINGLE_PASS,
    "listwise_loss",
    "lpg_inner_loss",
    "reverse_gru_reset",
    "preference_loss",
    "skew_loss",
    "skew_score",
    "unpaired_loss",
}


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refuse(*arguments):
    """What is said beside exit code 2, with the line breaks of its frame taken out."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return re.sub(r"[\s│]+", " ", result.output)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_entry_point_is_installed():
    entries = metadata.entry_points(group="console_scripts", name="prefkern")
    assert {entry.value for entry in entries} == {"prefkern.cli:main"}
    assert callable(next(iter(entries)).load())


def test_the_command_lists_its_parts():
    output = succeed("--help")
    assert all(name in output for name in ("info", "check", "bench", "demo"))


def test_importing_the_command_is_light():
    heavy = ["matplotlib", "transformers", "prefkern.bench.runner", "prefkern.bench.peers", "prefkern.reference"]
    code = f"import sys, prefkern.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------------------------------- info


def test_info():
    output = succeed("info")
    capabilities = prefkern.capabilities()
    assert prefkern.build_info()["version"] in output
    assert torch.__version__.split("+")[0] in output
    assert capabilities["cpu_isa"] in output
    assert ("built without CUDA" in output) == (prefkern.build_info()["cuda_archs"] == "")


def test_info_as_json():
    facts = json.loads(succeed("info", "--json"))
    assert facts["prefkern"] == prefkern.build_info()["version"]
    assert facts["capabilities"]["cpu_isa"] in facts["capabilities"]["cpu_isas"]
    assert facts["threads"] == torch.get_num_threads()
    assert "plan" not in facts


def test_info_shows_the_plan():
    plans = json.loads(succeed("info", "--json", "--plan", 512, 64, 32000))["plan"]
    on_cpu = [plan for plan in plans if plan["device"] == "cpu"]
    passes = [(plan["dtype"], plan["pass"]) for plan in on_cpu]
    assert passes == [("fp32", "forward"), ("fp32", "backward"), ("bf16", "forward"), ("bf16", "backward")]
    for plan in on_cpu:
        dtype, backward = shapes.DTYPES[plan["dtype"]], plan["pass"] == "backward"
        expected = prefkern.plan_chunks(512, 64, 32000, dtype=dtype, backward=backward)
        assert (plan["row_chunk"], plan["vocab_block"]) == (expected.row_chunk, expected.vocab_block)
        assert plan["workspace_bytes"] == expected.workspace_bytes
    assert on_cpu[0]["logits_bytes"] == 512 * 32000 * 4
    table = succeed("info", "--plan", 512, 64, 32000)
    assert "N=512 H=64 V=32000" in table
    assert str(on_cpu[0]["vocab_block"]) in table


def test_info_shows_what_is_saved():
    saves = json.loads(succeed("info", "--json", "--plan", 512, 64, 32000))["save"]
    on_cpu = [plan for plan in saves if plan["device"] == "cpu"]
    frozen = [
        (p["save"], p["products"], p["saved_bytes"]) for p in on_cpu if p["dtype"] == "bf16" and p["gradients"] == ["hidden"]
    ]
    assert frozen == [("recompute", 3, 0), ("logits", 2, 512 * 32000 * 2), ("u", 2, 512 * 64 * 4)]
    full = [(p["save"], p["products"], p["saved_bytes"]) for p in on_cpu if p["dtype"] == "fp32" and len(p["gradients"]) == 2]
    assert full == [("recompute", 4, 0), ("logits", 3, 512 * 32000 * 4)]
    assert [p["save"] for p in on_cpu if p["default"]] == ["recompute", "u"] * 2
    for plan in on_cpu:
        dtype = shapes.DTYPES[plan["dtype"]]
        expected = prefkern.plan_backward(512, 64, 32000, dtype=dtype, needs=plan["gradients"], save=plan["save"])
        assert {name: plan[name] for name in expected._fields} == expected._asdict()
    table = succeed("info", "--plan", 512, 64, 32000)
    assert "u *" in table
    assert "F = 2.1 GFLOP" in table


@pytest.mark.parametrize("sizes", [(512, 64, 0), (512, 64, "many"), (512, 64)])
def test_info_refuses_a_bad_plan(sizes):
    assert "--plan" in refuse("info", "--plan", *sizes)


# ---------------------------------------------------------------------------------------------------------------- check


def test_check_passes_on_this_machine(tmp_path):
    file = tmp_path / "check.json"
    output = succeed("check", "--json", file)
    saved = json.loads(file.read_text())
    rows = saved["rows"]
    every = {(op, dtype) for op in (*reference.__all__, *SINGLE_PASS) for dtype in ("fp32", "bf16", "fp16", "fp64")}
    every -= {("ddim_invert_step", dtype) for dtype in ("bf16", "fp16")}  # its result has the type of its inputs
    assert {(row["op"], row["dtype"]) for row in rows} == every
    assert all(row["ok"] and row["forward"] <= row["forward_bound"] for row in rows)
    for row in rows:
        if row["op"] == "group_reduce":
            assert (row["gradient"] is not None) == row["case"].startswith(("sum", "mean", "logsumexp"))
        else:
            assert (row["gradient"] is not None) == (row["op"] in DIFFERENTIABLE)
        assert row["gradient"] is None or row["gradient"] <= row["gradient_bound"]
    assert saved["environment"]["prefkern"] == prefkern.build_info()["version"]
    assert f"{len(rows)} of {len(rows)} within bounds" in output


def test_check_of_some_ops(tmp_path):
    file = tmp_path / "check.json"
    succeed("check", "gae", "masked_quantile", "--json", file)
    assert {row["op"] for row in json.loads(file.read_text())["rows"]} == {"gae", "masked_quantile"}
    assert "'gea'; did you mean 'gae'" in refuse("check", "gea")


def test_check_notices_a_wrong_result(monkeypatch):
    right = prefkern.group_advantages

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return out._replace(advantages=out.advantages + 2e-4)

    monkeypatch.setattr(prefkern, "group_advantages", wrong)
    result = run("check")
    assert result.exit_code == 1
    bad = [line for line in result.output.splitlines() if "NO" in line]
    assert bad
    assert all("group_advantages" in line for line in bad)


def test_check_notices_a_wrong_gradient(monkeypatch):
    right = prefkern.policy_loss

    def wrong(logp, *args, **kwargs):
        return right(logp + 1e-3 * (logp - logp.detach()), *args, **kwargs)

    monkeypatch.setattr(prefkern, "policy_loss", wrong)
    result = run("check")
    assert result.exit_code == 1
    assert {line.split()[1] for line in result.output.splitlines() if "NO" in line} == {"policy_loss"}


def test_check_notices_nan_and_errors(monkeypatch):
    def raises(*args, **kwargs):
        raise RuntimeError("no such kernel")

    def gives_nan(rewards, group, **kwargs):
        return right(rewards, group, **kwargs)._replace(advantages=torch.full(group.shape, float("nan")))

    right = prefkern.group_advantages
    monkeypatch.setattr(prefkern, "linear_logprobs", raises)
    monkeypatch.setattr(prefkern, "group_advantages", gives_nan)
    result = run("check")
    assert result.exit_code == 1
    assert "RuntimeError: no such kernel" in result.output
    bad = {line.split()[1] for line in result.output.splitlines() if "NO" in line}
    assert bad == {"linear_logprobs", "group_advantages"}


def has_cuda():
    return torch.cuda.is_available() and prefkern.capabilities()["cuda_compiled"]


@pytest.mark.cuda
@pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with CUDA")
def test_check_passes_on_the_gpu():
    succeed("check", "--device", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_cuda_is_refused():
    assert "no CUDA device" in refuse("check", "--device", "cuda")
    assert "no CUDA device" in refuse("bench", "--device", "cuda")


def test_check_refuses_an_unknown_device():
    assert "'tpu'" in refuse("check", "--device", "tpu")


# ---------------------------------------------------------------------------------------------------------------- bench


def measure(tmp_path, *arguments):
    file = tmp_path / "bench.json"
    output = succeed("bench", *arguments, "--rounds", 2, "--json", file)
    return json.loads(file.read_text()), output


def test_bench_of_linear_logprobs(tmp_path):
    plot = tmp_path / "bench.png"
    options = ("--shapes", "24x16x500", "--mode", "fwd,bwd", "--against", "eager,torch", "--plot", plot)
    data, output = measure(tmp_path, "linear_logprobs", *options)
    rows = data["rows"]
    assert {row["mode"] for row in rows} == {"fwd", "bwd"}
    done = {(row["mode"], row["outputs"], row["peer"]): row for row in rows if row["status"] == "ok"}
    for mode, products in (("fwd", "torch.mm in fp32"), ("bwd", "3 torch.mm in fp32")):
        assert done[mode, "", "floor"]["note"] == products
        assert done[mode, "logp+entropy", "eager"]["ratio_eager"] == 1.0
        for outputs in ("logp", "logp+entropy"):
            ours = done[mode, outputs, "prefkern"]
            assert ours["bit_stable"] is True
            assert ours["time_ms"] > 0
            assert ours["ratio_floor"] > 0
            assert ours["rounds"] == 2
            assert ours["max_error"] < 1e-5
            assert (ours["grad_error"] is None) == (mode == "fwd")
            assert ours["grad_error"] is None or ours["grad_error"] < 1e-5
    unmeasured = {(row["peer"], row["outputs"], row["status"]) for row in rows if row["status"] != "ok"}
    has_it = hasattr(torch.nn.functional, "linear_cross_entropy")
    assert ("torch", "logp+entropy", "gives no entropy") in unmeasured or not has_it
    assert all("time_ms" in row and row["time_ms"] is None for row in rows if row["status"] != "ok")
    assert "linear_logprobs 24x16x500 fp32 bwd" in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = report.markdown_table(data)
    assert "| linear_logprobs 24x16x500 fp32 fwd | logp+entropy |" in table


def test_bench_in_bf16_shows_what_float32_would_take(tmp_path):
    options = ("--shapes", "24x16x500", "--dtype", "bf16", "--against", "eager")
    data, _ = measure(tmp_path, "linear_logprobs", *options)
    rows = {(row["outputs"], row["peer"]): row for row in data["rows"]}
    assert rows["", "floor"]["note"] in ("torch.mm in bf16", "torch.mm in fp32, quicker here than in bf16")
    assert rows["logp", "prefkern"]["max_error"] < 1e-4 < rows["logp", "eager"]["max_error"]
    assert rows["logp", "prefkern-fp32"]["status"] == "ok"


@pytest.mark.parametrize(
    ("op", "shape", "mode", "outputs"),
    [
        ("logits_logprobs", "24x500", "bwd", {"logp", "logp+entropy"}),
        ("group_advantages", "64x8", "fwd", {"contiguous", "shuffled", "gdpo", "ngrpo", "mad"}),
        ("group_reduce", "64x8", "bwd", {"sum", "logsumexp", "sum shuffled", "logsumexp shuffled"}),
        ("conflict_runs", "6x64x500", "fwd", {"template", "long runs"}),
        ("policy_loss", "4x32", "bwd", {"clip", "clip+k3", "gspo", "cispo", "sapo"}),
        ("top_quantile_mask", "4x32", "fwd", {"trl", "count"}),
        ("sequence_sum", "4x32", "bwd", {"padded", "packed"}),
        ("gae", "4x32", "fwd", {"padded"}),
        ("seeded_normal_combine", "500x3", "fwd", {"sum"}),
        ("self_bleu", "3x4x30", "fwd", {"1 to 3"}),
        ("edit_distance", "2x3x30", "fwd", {"tokens"}),
        ("greedy_select", "2x24x8", "fwd", {"min", "max"}),
    ],
)
def test_bench_of_the_other_ops(tmp_path, op, shape, mode, outputs):
    data, _ = measure(tmp_path, op, "--shapes", shape, "--mode", mode, "--against", "eager")
    rows = [row for row in data["rows"] if row["peer"] != "floor"]
    ours = {"prefkern", "prefkern-inplace"} if op == "logits_logprobs" else {"prefkern"}
    assert {(row["peer"], row["outputs"]) for row in rows} == {(p, o) for p in ours | {"eager"} for o in outputs}
    for row in rows:
        assert row["status"] == "ok"
        assert row["max_error"] < 1e-5
        assert row["bit_stable"] is True
        assert row["launches"] is None
        assert row["kernel_ms"] is None
        assert row["cpu_ratio_floor"] > 0
        assert (row["cpu_ratio_eager"] == 1.0) or row["peer"] != "eager"
        assert (row["grad_error"] is None) == (mode == "fwd")


@pytest.mark.parametrize(
    ("op", "shape", "peer", "outputs"),
    [
        ("group_advantages", "64x8", "python", {"contiguous"}),
        ("conflict_runs", "6x64x500", "python", {"template", "long runs"}),
        ("gae", "4x32", "python", {"padded"}),
        ("self_bleu", "3x4x30", "python", {"1 to 3"}),
        ("edit_distance", "2x3x30", "python", {"tokens"}),
        ("top_quantile_mask", "4x32", "torch", {"trl", "count"}),
        ("sequence_sum", "4x32", "torch", {"packed"}),
    ],
)
def test_other_ways_to_the_same_result(tmp_path, op, shape, peer, outputs):
    data, _ = measure(tmp_path, op, "--shapes", shape, "--against", peer)
    rows = {row["outputs"]: row for row in data["rows"] if row["peer"] == peer and row["status"] == "ok"}
    assert set(rows) == outputs
    assert all(row["max_error"] < 1e-5 for row in rows.values())


@pytest.mark.slow
def test_compiled_peers_give_the_same_result(tmp_path):
    for op, mode in (("group_advantages", "fwd"), ("policy_loss", "bwd"), ("sequence_sum", "bwd"), ("group_reduce", "bwd")):
        data, _ = measure(tmp_path, op, "--shapes", "64x8", "--mode", mode, "--against", "compile")
        rows = [row for row in data["rows"] if row["peer"] == "compile" and row["status"] == "ok"]
        assert rows
        assert all(row["max_error"] < 1e-5 for row in rows)


def test_a_table_that_memory_does_not_hold_is_a_reason_not_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.plain, "free_bytes", lambda device: 2**20)
    data, _ = measure(tmp_path, "conflict_runs", "--shapes", "6x64x5000", "--against", "eager")
    statuses = {row["status"] for row in data["rows"] if row["peer"] == "eager"}
    assert statuses == {"needs 0.0 GiB, more than half of the free 0.0 GiB"}


def test_bench_of_overhead(tmp_path):
    data, _ = measure(tmp_path, "overhead", "--against", "none")
    rows = {row["outputs"]: row for row in data["rows"] if row["peer"] == "prefkern"}
    measured = set(shapes.OPS) - {"overhead"}
    assert set(rows) == measured | {"policy_loss 8x512", "policy_loss 8x512 bwd", "preference_loss bwd"}
    assert all(row["status"] == "ok" and row["ratio_eager"] is None for row in rows.values())
    assert {row["peer"] for row in data["rows"]} == {"prefkern", "floor"}


def test_bench_says_where_it_was_run(tmp_path, monkeypatch):
    words = [
        "prefkern",
        "bench",
        "overhead",
        "--json",
        "somewhere/secret.json",
        "--plot=elsewhere.png",
        "--rounds",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", words)
    data, output = measure(tmp_path, "overhead", "--against", "none", "--threads", torch.get_num_threads())
    env = data["environment"]
    assert data["command"] == "prefkern bench overhead --rounds 2"
    assert (env["torch"], env["threads"]) == (torch.__version__, torch.get_num_threads())
    assert env["prefkern"] == prefkern.build_info()["version"]
    assert env["device_name"]
    assert len(env["load_average"]) == 3
    assert env["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", env["commit"])
    assert f"torch {torch.__version__}" in output


def importing(monkeypatch, outcomes):
    """Makes the import of a module with one of these names give the outcome: a module, or an exception."""
    real = importlib.import_module

    def import_module(name, package=None):
        outcome = outcomes.get(name)
        if isinstance(outcome, Exception):
            raise outcome
        return real(name, package) if outcome is None else outcome

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.cuda
@pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with CUDA")
def test_bench_on_the_gpu(tmp_path):
    options = ("--device", "cuda", "--dtype", "fp32,bf16", "--mode", "fwd,bwd", "--against", "eager")
    data, _ = measure(tmp_path, "linear_logprobs", "--shapes", "64x128x4000", *options)
    rows = [row for row in data["rows"] if row["peer"] == "prefkern"]
    assert len(rows) == 8
    assert all(row["status"] == "ok" and row["max_error"] < 1e-4 and row["bit_stable"] for row in rows)


@pytest.mark.cuda
@pytest.mark.skipif(not has_cuda(), reason="needs a GPU and a build with CUDA")
def test_bench_counts_launches_on_the_gpu(tmp_path):
    data, output = measure(tmp_path, "policy_loss", "--shapes", "16x128", "--device", "cuda", "--against", "eager")
    launches = {(row["outputs"], row["peer"]): row["launches"] for row in data["rows"]}
    assert 1 <= launches["clip", "prefkern"] < launches["clip", "eager"]
    assert all(row["kernel_ms"] > 0 for row in data["rows"])
    assert "launches" in output


def test_a_missing_peer_is_a_reason_not_a_failure(tmp_path, monkeypatch):
    modules = ("liger_kernel.chunked_loss.fused_linear_ppo", "trl.kernels", "cut_cross_entropy")
    importing(monkeypatch, {name: ModuleNotFoundError(name=name.partition(".")[0]) for name in modules})
    data, output = measure(tmp_path, "linear_logprobs", "--shapes", "8x8x50", "--against", "liger,trl,cce")
    rows = [row for row in data["rows"] if row["peer"] in ("liger", "trl", "cce")]
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"not installed"}
    assert "liger (not installed)" in output


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "needs triton"),
        (AttributeError("half a module"), "does not import: AttributeError: half a module"),
        (types.ModuleType("cut_cross_entropy"), "this version has no linear_cross_entropy"),
    ],
)
def test_a_peer_that_is_installed_but_useless_says_why(monkeypatch, outcome, status):
    importing(monkeypatch, {"cut_cross_entropy": outcome})
    rows = runner.run_case(shapes.Case("linear_logprobs", (8, 8, 50), "fp32", "fwd"), ["cce"], rounds=1)
    assert {row.status for row in rows if row.peer == "cce"} == {status}


def test_a_peer_that_fails_is_a_reason_not_a_failure(tmp_path, monkeypatch):
    def linear_logprobs(self, *args):
        raise RuntimeError("out of luck\nand much more")

    monkeypatch.setattr(peers.Eager, "linear_logprobs", linear_logprobs)
    data, _ = measure(tmp_path, "linear_logprobs", "--shapes", "8x8x50", "--against", "eager")
    assert {r["status"] for r in data["rows"] if r["peer"] == "eager"} == {"RuntimeError: out of luck"}
    assert {r["ratio_eager"] for r in data["rows"]} == {None}


def test_results_that_are_not_finite_are_not_timed(tmp_path, monkeypatch):
    def linear_logprobs(self, hidden, weight, targets, entropy):
        return torch.full((len(hidden),), float("nan")), None

    monkeypatch.setattr(peers.Eager, "linear_logprobs", linear_logprobs)
    data, _ = measure(tmp_path, "linear_logprobs", "--shapes", "8x8x50", "--against", "eager")
    (row,) = (r for r in data["rows"] if (r["peer"], r["outputs"]) == ("eager", "logp"))
    assert (row["status"], row["time_ms"]) == ("results are not finite", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear_logprob"], "unknown op 'linear_logprob'; did you mean 'linear_logprobs'?"),
        (["entropy", "policy_loss"], "unknown op 'entropy'"),
        (["--shapes", "12x4q"], "bad shape '12x4q'"),
        (["--shapes", "0x4x4"], "sizes must be positive"),
        (["--shapes", "12x4"], "linear_logprobs takes shapes NxHxV, got 12x4"),
        (["logits_logprobs", "--shapes", "12x4x4"], "logits_logprobs takes shapes NxV, got 12x4x4"),
        (["group_advantages", "--shapes", "12x5"], "multiple of the group size G"),
        (["overhead", "--shapes", "4x4x4"], "overhead takes no shape"),
        (["--against", "eagre"], "unknown peer 'eagre'; did you mean 'eager'?"),
        (["--dtype", "bf61"], "unknown dtype 'bf61'; did you mean 'bf16'?"),
        (["--mode", "backwards"], "unknown mode 'backwards'"),
        (["group_advantages", "--mode", "bwd"], "group_advantages is not measured with mode bwd"),
        (["group_advantages", "--mode", "fwd,bwd"], "group_advantages is not measured with mode bwd"),
        (["policy_loss", "gae", "--mode", "bwd"], "gae is not measured with mode bwd"),
        (["policy_loss", "--dtype", "bf16"], "policy_loss is not measured with dtype bf16"),
        (["group_reduce", "--shapes", "12x5"], "multiple of the group size G"),
        (["conflict_runs", "--shapes", "16x1024"], "conflict_runs takes shapes GxLxV, got 16x1024"),
        (["--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_bench_refuses(arguments, message):
    assert message in refuse("bench", *arguments)


def test_bench_refuses_to_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "prefkern[demo]"' in refuse("bench", "overhead", "--plot", "x.png")


def test_cases_of_a_plain_run_cover_every_op():
    cases = shapes.plan_cases()
    assert [case.op for case in cases] == list(shapes.OPS)
    assert {(case.dtype, case.mode) for case in cases} == {("fp32", "fwd")}


def test_unnamed_ops_are_left_out_where_they_lack_something():
    cases = shapes.plan_cases(dtypes=["bf16"], modes=["bwd"])
    heads = {"linear_logprobs", "linear_policy_loss", "linear_preference_loss", "linear_unpaired_loss"}
    assert {case.op for case in cases} == heads | {"logits_logprobs", "diffusion_pref_loss"}


def test_several_named_ops_run_what_they_have():
    cases = shapes.plan_cases(["policy_loss", "gae"], modes=["fwd", "bwd"])
    assert [(case.op, case.mode) for case in cases] == [("policy_loss", "fwd"), ("policy_loss", "bwd"), ("gae", "fwd")]


# --------------------------------------------------------------------------------------------------------------- timing


def test_compare_times_every_call_in_every_round():
    calls = {"short": lambda: time.sleep(0.005), "long": lambda: time.sleep(0.05)}
    result = timing.compare(calls, rounds=3, warmup=0)
    assert [len(t.wall_s) for t in result.values()] == [3, 3]
    assert result["long"].ratio(result["short"]) > 2
    assert result["short"].ratio(result["short"]) == 1.0
    assert result["long"].median_ms >= result["long"].min_ms >= 50
    assert result["long"].cpu_ms < result["long"].median_ms


def test_slow_calls_take_part_in_the_first_rounds_only(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_SECONDS", 0.05)
    calls = {"quick": lambda: None, "slow": lambda: time.sleep(0.1)}
    result = timing.compare(calls, rounds=5, budget_s=1.0, warmup=0)
    assert [len(t.wall_s) for t in result.values()] == [5, timing.SLOW_ROUNDS]
    assert result["slow"].ratio(result["quick"]) > 100
    alike = timing.compare({"one": calls["slow"], "other": calls["slow"]}, rounds=3, warmup=0)
    assert [len(t.wall_s) for t in alike.values()] == [3, 3]


def test_free_memory_is_less_than_all_of_it():
    free = timing.free_bytes()
    if free is None:
        pytest.skip("this kernel does not tell")
    assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_compare_goes_on_without_a_call_that_raises():
    def broken():
        raise ValueError("first line\nsecond line")

    result = timing.compare({"broken": broken, "fine": lambda: None}, rounds=2)
    assert result["broken"].error == "ValueError: first line"
    assert result["broken"].wall_s == []
    assert len(result["fine"].wall_s) == 2


def test_compare_stops_when_its_budget_is_spent():
    result = timing.compare({"a": lambda: time.sleep(0.01)}, rounds=1000, min_rounds=2, budget_s=0.0)
    assert len(result["a"].wall_s) == 2


def test_every_call_comes_first_in_some_round():
    names = ["a", "b", "c"]
    assert {timing._order(names, done)[0] for done in range(12)} == set(names)
    assert all(sorted(timing._order(names, done)) == names for done in range(12))


def test_peak_memory_of_a_call():
    size = 64 * 2**20
    peak = timing.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8))
    if peak is None:
        pytest.skip("this kernel does not tell")
    assert size * 0.95 < peak < size * 1.25
    assert timing.peak_extra_bytes(lambda: None) < size * 0.1


@pytest.mark.parametrize("dtype", list(shapes.DTYPES.values()))
@pytest.mark.parametrize("shape", [(4, 64), (3, 5)])
def test_a_plain_read_exists_for_every_type_and_size(dtype, shape):
    about, read = workloads.fastest_read(torch.ones(shape, dtype=dtype), "cpu")
    assert about
    assert read() is not None


# --------------------------------------------------------------------------------------------------------------- report


def some_results():
    common = {"op": "linear_logprobs", "shape": [4, 2, 9], "dtype": "fp32", "mode": "fwd"}
    figures = {"max_error": 2e-6, "peak_mib": 0.25, "status": "ok", "note": "torch.mm in fp32"}
    rows = [
        common | figures | {"outputs": "", "peer": "floor", "time_ms": 0.5, "ratio_floor": 1.0},
        common | figures | {"outputs": "logp", "peer": "prefkern", "time_ms": 0.45, "ratio_floor": 0.9},
        common | figures | {"outputs": "logp", "peer": "eager", "time_ms": 1.0, "ratio_floor": 2.0, "peak_mib": 125.4},
        common | {"outputs": "logp", "peer": "cce", "status": "not installed"},
    ]
    env = {
        "commit": None,
        "threads": 1,
        "prefkern": "0.1",
        "torch": "2",
        "device_name": "abacus",
        "time": "2026-01-02T03",
    }
    return {"schema": 1, "command": "prefkern bench", "environment": env, "rows": rows}


def test_markdown_table():
    assert report.markdown_table(some_results()) == (
        "| case | output | floor | prefkern | eager | extra MiB | eager MiB | max error |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| linear_logprobs 4x2x9 fp32 fwd | logp | 500 us | 0.90x | 2.00x | 0.2 | 125 | 2.0e-06 |\n"
    )
    assert "linear" not in report.markdown_table(some_results(), ops=["policy_loss"])


def test_provenance():
    assert report.provenance(some_results()) == "`prefkern bench` on abacus, 1 thread; prefkern 0.1, torch 2; 2026-01-02."


def test_a_busy_machine_is_mentioned():
    data = some_results()
    assert report.busy(data) is None
    data["environment"] |= {"load_average": [3.0, 1.0, 1.0], "cpus": 2}
    assert "load average 3.0 on 2 CPUs" in report.busy(data)
    data["environment"] |= {"cpus": 8}
    assert report.busy(data) is None


def test_plot_of_saved_results(tmp_path):
    file, image = tmp_path / "results.json", tmp_path / "plot.png"
    report.save(some_results(), file)
    report.plot(report.load(file), image)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_results_of_another_schema_are_refused(tmp_path):
    file = tmp_path / "results.json"
    report.save(some_results() | {"schema": 0}, file)
    with pytest.raises(ValueError, match="schema 0, expected 1"):
        report.load(file)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.01234, "12.3 us"), (1.5, "1.5 ms"), (123.4, "123 ms"), (2500.0, "2.5 s"), (0.9998, "1 ms"), (999.7, "1 s")],
)
def test_milliseconds_have_three_digits(value, text):
    assert report.milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.00000423, "4.2e-06x"), (0.0512, "0.051x"), (0.1, "0.10x"), (12.345, "12.35x"), (2345.6, "2346x")],
)
def test_ratios_keep_what_they_say(value, text):
    assert report.times(value) == text


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo_without_the_example(monkeypatch):
    monkeypatch.setattr(demo, "MODULE", "prefkern._examples.no_such_example")
    assert "not part of this installation" in refuse("demo")


def test_demo_without_its_requirements(monkeypatch):
    importing(monkeypatch, {demo.MODULE: ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")})
    message = refuse("demo")
    assert "needs tokenizers" in message
    assert 'pip install "prefkern[demo]"' in message


@pytest.mark.parametrize("code", [0, 3])
def test_demo_hands_its_arguments_on(monkeypatch, code):
    received = []
    example = types.SimpleNamespace(main=lambda argv: received.extend(argv) or code)
    importing(monkeypatch, {demo.MODULE: example})
    assert run("demo", "--quick", "--seeds", 2, "--help").exit_code == code
    assert received == ["--quick", "--seeds", "2", "--help"]
