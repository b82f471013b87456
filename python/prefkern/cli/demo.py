"""`prefkern demo`: the example that ships with the package."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import typer

MODULE = "prefkern._examples.grpo_arithmetic"
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def demo(context: typer.Context) -> None:
    """Train a small model with GRPO on this machine; arguments go to the example (try --help)."""
    try:
        example = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == MODULE or MODULE.startswith(missing + "."):
            _stop("the example is not part of this installation: run examples/grpo_arithmetic.py of the source tree")
        _stop(f'the example needs {missing}: pip install "prefkern[demo]"')
    sys.argv[0] = "prefkern demo"  # what the example's usage line says
    raise typer.Exit(example.main(context.args))


def _stop(message: str) -> NoReturn:
    typer.echo(f"prefkern demo: {message}", err=True)
    raise typer.Exit(2)
