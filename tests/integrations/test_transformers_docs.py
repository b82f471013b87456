"""The code in docs/integrations/transformers.md runs."""

import subprocess
import sys

import pytest

from integrations.pages import blocks

BLOCKS = blocks("transformers.md", "python")


@pytest.mark.parametrize("code", BLOCKS)
def test_its_examples_run(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error::UserWarning:prefkern", "-c", code], check=True)


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 2
