"""What the README states is executed or checked here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_are_what_ci_runs() -> None:
    first, second = (block.strip() for block in blocks("bash"))
    ci = (ROOT / ".ci" / "run").read_text()
    install, demo = first.split(" && ")
    install_tests, run_tests = second.split(" && ")
    assert demo == "prefkern demo"
    for part in (install, demo, install_tests, run_tests):
        assert part.replace("python -m ", "") in ci, part


def test_the_example_runs_and_trains() -> None:
    code, recipe = blocks("python")
    subprocess.run([sys.executable, "-c", recipe + "\nloss.backward()"], check=True)
    head, mark, single_pass = code.partition("\n# The same in one pass")
    code = (
        f"{head}\ntwo_steps = hidden.grad.clone(){mark}{single_pass}\n"
        "torch.testing.assert_close(hidden.grad, 2 * two_steps)\n"
        "print(hidden.grad.abs().sum() > 0, weight.grad.abs().sum() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, metrics, flags = done.stdout.strip().splitlines()
    assert "clip_fraction_low" in metrics
    assert flags == "tensor(True) tensor(True)"


def test_links_point_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_tables_are_those_of_the_committed_measurements() -> None:
    from prefkern.bench.report import markdown_table
    from prefkern.bench.tables import fill

    text = README + (ROOT / "docs/gpu.md").read_text()
    tables = re.findall(r"<!-- table: ([\w./-]+\.json) ([\w,]+) -->\n(.*?)\n<!-- table: end -->", text, re.DOTALL)
    assert len(tables) == 3
    for source, ops, stated in tables:
        assert f"]({source})" in README, f"README does not link {source}"
        assert stated.strip() == markdown_table(json.loads((ROOT / source).read_text()), ops.split(",")).strip(), source
    assert fill(README, ROOT) == README, "python benchmarks/tables.py README.md writes them"


def test_what_it_says_of_a_step_of_trl_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/cpu-epyc-trl-step.json").read_text())["rows"]
    ours, theirs = ({r["dtype"]: r for r in rows if r["peer"] == peer} for peer in ("prefkern", "trl"))
    single, half = (f"{ours[dtype]['ratio_trl']:.2f}x" for dtype in ("fp32", "bf16"))
    memory = [f"{of[dtype]['peak_mib']:.0f}" for of in (ours, theirs) for dtype in ("fp32", "bf16")]
    errors = [f"{of['bf16']['max_error']:.0e}".replace("e-0", "e-") for of in (ours, theirs)]
    said = " ".join(README.split())
    assert f"takes {single} of its time with its own head in float32 and {half} in bfloat16" in said
    assert "with {} and {} MiB where that takes {} and {}".format(*memory) in said
    assert "that are {} from float64 where those are {}".format(*errors) in said


def test_the_papers_it_lists_are_all_there_are() -> None:
    from prefkern.papers import about

    listed = re.search(
        r"For rollouts: (.*?)\.\nFor preference pairs.*?: (.*?)\.\nSamplers and.*?: (.*?)\.\n\n", README, re.DOTALL
    )
    assert listed
    names = [name for part in listed.groups() for name in " ".join(part.split()).split(", ")]
    assert sorted(names) == sorted(paper.name for paper in about().values())


@pytest.mark.parametrize("command", ["info", "papers", "check", "bench", "demo"])
def test_the_commands_it_names_exist(command: str) -> None:
    assert f"prefkern {command}" in README
    subprocess.run([sys.executable, "-m", "prefkern.cli", command, "--help"], capture_output=True, check=True)
