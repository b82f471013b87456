"""`prefkern bench`: this library beside the others and beside the floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prefkern.bench.shapes import Case
    from prefkern.bench.suites import Row


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP ...]", help="Ops to measure; all by default.")] = None,
    shapes: Annotated[str | None, typer.Option(metavar="NxHxV[,...]", help="Shapes, in the op's dimensions.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="fp32,bf16", help="Types of the inputs.")] = None,
    mode: Annotated[str | None, typer.Option(metavar="fwd,bwd", help="Forward, or forward and backward.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="eager,compile,...",
            help="Whom to compare with: eager, compile, torch, torch-chunked, python, liger, trl, cce, or none.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Save the results.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the results.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at most; fewer when a case takes long.")] = 5,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which a case starts no further round.")] = 4.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure ops side by side with other implementations, in one process.

    Times are medians; ratios are medians over rounds in which all run in turn.

    The floor is the least work that any implementation has to do.

    Without an OP, --shapes is about linear_logprobs.
    """
    import torch

    from prefkern.bench import report, suites
    from prefkern.bench.shapes import UsageError, check_device

    try:
        cases = _cases(ops, shapes, dtype, mode)
        peers = _peers(against)
        check_device(device)
        _check_plot(plot_file)
    except UsageError as error:
        typer.echo(f"prefkern bench: {error}", err=True)
        raise typer.Exit(2) from None
    if threads is not None:
        torch.set_num_threads(threads)
    # fewer rounds than three only when asked for
    surroundings = report.environment(device)
    rows = suites.run_cases(cases, peers, device=device, rounds=rounds, budget_s=budget, each=_print_case)
    data = report.results(rows, surroundings, _command())
    typer.echo(report.provenance(data))
    if warning := report.busy(data):
        typer.echo(warning)
    if json_file is not None:
        report.save(data, json_file)
    if plot_file is not None:
        report.plot(data, plot_file)


def _cases(ops: list[str] | None, shapes: str | None, dtype: str | None, mode: str | None) -> list[Case]:
    from prefkern.bench.shapes import DTYPES, MODES, choose_all, parse_shapes, plan_cases

    return plan_cases(
        ops or (),
        parse_shapes(shapes) if shapes else None,
        choose_all("dtype", dtype, DTYPES) if dtype else None,
        choose_all("mode", mode, MODES) if mode else None,
    )


def _peers(against: str | None) -> tuple[str, ...] | None:
    from prefkern.bench.peers import NAMEABLE
    from prefkern.bench.shapes import choose_all

    if against is None:
        return None
    return () if against == "none" else choose_all("peer", against, NAMEABLE)


def _check_plot(path: Path | None) -> None:
    """Before anything is measured: a run should not fail at its end."""
    from importlib.util import find_spec

    from prefkern.bench.shapes import UsageError

    if path is not None and find_spec("matplotlib") is None:
        raise UsageError('--plot needs matplotlib: pip install "prefkern[demo]"')


def _command() -> str:
    """The command without where its results went."""
    import shlex
    import sys

    kept, skip = [], False
    for word in sys.argv[1:]:
        option = word.partition("=")[0]
        if not skip and option not in ("--json", "--plot"):
            kept.append(word)
        skip = not skip and word in ("--json", "--plot")
    return shlex.join(["prefkern", *kept])


def _print_case(case: Case, rows: list[Row]) -> None:
    from rich.table import Table

    from prefkern.bench import report
    from prefkern.cli.console import make_console

    optional = {
        "grad error": any(row.grad_error is not None for row in rows),
        "kernels": any(row.kernel_ms is not None for row in rows),
        "launches": any(row.launches is not None for row in rows),
    }
    table = Table(title=case.title, title_justify="left")
    for name in ("outputs", "peer"):
        table.add_column(name, no_wrap=True)
    columns = [
        "time", "CPU time", "kernels", "/ eager", "/ floor", "extra MiB", "launches", "max error", "grad error", "bit-stable",
    ]  # fmt: skip
    shown = [name for name in columns if optional.get(name, True)]
    for name in shown:
        table.add_column(name, justify="right")
    for row in rows:
        if row.status != "ok":
            continue
        figures = {
            "time": report.milliseconds(row.time_ms),
            "CPU time": report.milliseconds(row.cpu_ms),
            "/ eager": report.times(row.ratio_eager),
            "/ floor": report.times(row.ratio_floor),
            "extra MiB": report.mebibytes(row.peak_mib),
            "kernels": report.milliseconds(row.kernel_ms),
            "launches": "" if row.launches is None else str(row.launches),
            "max error": report.scientific(row.max_error),
            "grad error": report.scientific(row.grad_error),
            "bit-stable": report.yes_no(row.bit_stable),
        }
        cells = [row.outputs, row.peer, *(figures[name] for name in shown)]
        table.add_row(*cells, style="bold" if row.peer.startswith("prefkern") else None)
    console = make_console()
    console.print(table)
    console.print(f"floor: {next(row.note for row in rows if row.peer == 'floor')}", style="dim")
    if reasons := _not_measured(rows):
        console.print(f"not measured: {reasons}", style="dim")
    console.print()


def _not_measured(rows: list[Row]) -> str:
    """Reasons, with the peers and outputs that share them."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault((row.peer, row.status), []).append(row.outputs)
    variants = {row.outputs for row in rows if row.outputs}
    named = (
        f"{peer}{'' if set(outputs) == variants else ' ' + ', '.join(outputs)} ({status})"
        for (peer, status), outputs in reasons.items()
    )
    return "; ".join(named)
