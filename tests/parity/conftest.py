"""`api`: what is compared with TRL and verl. With `PREFKERN_PARITY_API=reference` it is the definitions, not the kernels."""

import os

import pytest

import prefkern
from prefkern import reference


@pytest.fixture(scope="session")
def api():
    name = os.environ.get("PREFKERN_PARITY_API", "prefkern")
    return {"prefkern": prefkern, "reference": reference}[name]
