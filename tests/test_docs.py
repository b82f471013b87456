"""What docs/ states is executed or compared with where it comes from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefkern.cli import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_list_of_papers_is_the_registry() -> None:
    stated = re.search(r"<!-- papers: begin -->\n(.*?)\n<!-- papers: end -->", (DOCS / "papers.md").read_text(), re.DOTALL)
    assert stated
    assert stated[1].strip() == CliRunner().invoke(app, ["papers", "--markdown"]).output.strip()


@pytest.mark.parametrize("page", [page for page in PAGES if "/" not in page])  # tests/integrations has the others
def test_its_examples_run(page: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


@pytest.mark.parametrize("page", PAGES)
def test_its_links_point_to_files(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / page).read_text()) if "://" not in link]
    assert not [link for link in links if not ((DOCS / page).parent / link).exists()]
