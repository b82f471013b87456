"""`prefkern plot`: figures of saved results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    results: Annotated[Path, typer.Argument(metavar="FILE.json", help="What `prefkern bench --json` saved.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Where to draw; by default beside the results.")] = None,
) -> None:
    """Draw saved results: curves for the suite "scaling" (cost against N, H, V and threads), bars for everything else."""
    from prefkern.bench import curves, report
    from prefkern.bench.shapes import UsageError
    from prefkern.cli.bench import check_plot

    path = out or results.with_suffix(".png")
    try:
        check_plot("plot", path)
        if not results.is_file():
            raise UsageError(f"{results} is no file")
        data = report.load(results)
    except ValueError as error:  # UsageError is one, and so is JSON that is none
        typer.echo(f"prefkern plot: {error}", err=True)
        raise typer.Exit(2) from None
    (curves if data.get("suite") == "scaling" else report).plot(data, path)
    typer.echo(str(path))
