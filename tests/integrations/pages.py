"""The pages of docs/integrations."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs" / "integrations"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def paths(page: str) -> set[str]:
    """What the page names of prefkern's integrations, such as "prefkern.integrations.slime.loss"."""
    return set(re.findall(r"prefkern\.integrations\.[\w.]*\w", (DOCS / page).read_text()))
