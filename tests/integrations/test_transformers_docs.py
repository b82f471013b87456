"""The code in docs/integrations runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "transformers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_its_examples_run(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error::UserWarning:prefkern", "-c", code], check=True)


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 2
