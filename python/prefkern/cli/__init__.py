"""The command line: `prefkern info | papers | check | bench | plot | demo`."""

from __future__ import annotations

import typer

from prefkern.cli import bench, check, demo, info, papers, plot

app = typer.Typer(
    help="Kernels for preference optimisation and reinforcement learning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("info")(info.info)
app.command("papers")(papers.papers)
app.command("check")(check.check)
app.command("bench")(bench.bench)
app.command("plot")(plot.plot)
app.command("demo", context_settings=demo.CONTEXT)(demo.demo)


def main() -> None:
    """The `prefkern` command."""
    app()
