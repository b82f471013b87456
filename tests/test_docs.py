"""What docs/ states is executed or compared with where it comes from."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefkern.bench.report import markdown_table
from prefkern.bench.suites import SUITES
from prefkern.bench.tables import BLOCK, fill
from prefkern.cli import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_list_of_papers_is_the_registry() -> None:
    found = re.search(r"<!-- papers: begin -->\n(.*?)\n<!-- papers: end -->", (DOCS / "papers.md").read_text(), re.DOTALL)
    assert found
    assert found[1].strip() == CliRunner().invoke(app, ["papers", "--markdown"]).output.strip()


@pytest.mark.parametrize("page", [page for page in PAGES if "/" not in page])  # tests/integrations has the others
def test_its_examples_run(page: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def measured(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((DOCS.parent / "benchmarks/results" / name).read_text())
    return results


def stated(page: str, table: str) -> str:
    found = re.search(rf"<!-- table: {table} -->\n(.*?)\n<!-- table: end -->", (DOCS / page).read_text(), re.DOTALL)
    assert found
    return found[1].strip()


def test_the_tables_are_those_of_the_committed_measurements() -> None:
    step = runpy.run_path(str(DOCS.parent / "benchmarks/trl_step.py"))
    assert stated("integrations/trl.md", "trl step") == step["table"](measured("cpu-epyc-trl-step.json")["rows"])
    shared = markdown_table(measured("cpu-epyc-vocab-parallel.json"), ["linear_logprobs"])
    assert stated("scaling.md", "vocabulary") == shared.strip()


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_suites_are_as_their_results_have_them(page: str) -> None:
    text = (DOCS / page).read_text()
    assert fill(text, DOCS.parent) == text, "python benchmarks/tables.py writes them"


def test_performance_has_a_table_of_every_suite() -> None:
    named = {match[1] for match in BLOCK.finditer((DOCS / "performance.md").read_text())}
    for suite in SUITES:
        assert any(name.startswith("benchmarks/results/cpu-") and name.endswith(f"-{suite}.json") for name in named), suite


@pytest.mark.parametrize("page", PAGES)
def test_its_links_point_to_files(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / page).read_text()) if "://" not in link]
    assert not [link for link in links if not ((DOCS / page).parent / link).exists()]
