"""`prefkern bench`: this library beside the others and beside the floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prefkern.bench.runner import Row
    from prefkern.bench.shapes import Case
    from prefkern.bench.suites import Part


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP ...]", help="Ops to measure; all by default.")] = None,
    shapes: Annotated[str | None, typer.Option(metavar="NxHxV[,...]", help="Shapes, in the op's dimensions.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="fp32,bf16", help="Types of the inputs.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="fwd,bwd,...",
            help="fwd; bwd: forward and backward; frozen: without the weight's gradient; active: for a fifth of the rows.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="eager,compile,...",
            help="Whom to compare with: eager, compile, torch, torch-chunked, python, liger, trl, cce, verl, quack, or none.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Save the results.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the results.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at most; fewer when a case takes long.")] = 5,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of ops a suite: head, losses, small, memory or scaling.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A suite in seconds: whether everything runs.")] = False,
    full: Annotated[bool, typer.Option("--full", help="A suite with all its shapes: hours on a CPU.")] = False,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which a suite begins no further case; what is left out is saved.")
    ] = None,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which a case starts no further round.")] = 4.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure ops side by side with other implementations, in one process.

    Times are medians; ratios are medians over rounds in which all run in turn.

    The floor is the least work that any implementation has to do.

    Without an OP, --shapes is about linear_logprobs. --dtype and --mode leave out cases of a suite.
    """
    import torch

    from prefkern.bench import report, runner
    from prefkern.bench.shapes import UsageError, check_device

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        peers = _peers(against)
        check_device(device)
        check_plot("--plot", plot_file)
        if suite is not None:
            size = _size(quick, full)
            parts = _parts(suite, size, device, peers, ops, shapes, dtype, mode)
        elif quick or full or limit is not None:
            raise UsageError("--quick, --full and --limit are about a --suite")
        else:
            cases = _cases(ops, shapes, dtype, mode)
    except UsageError as error:
        typer.echo(f"prefkern bench: {error}", err=True)
        raise typer.Exit(2) from None
    surroundings = report.environment(device)
    if suite is not None:
        from prefkern.bench.suites import run_suite, scaling_base

        found = run_suite(
            suite, parts, device=device, rounds=rounds, budget_s=budget, limit_s=limit, each=_print_case
        )  # fmt: skip
        more = {"suite": suite, "size": size, "left_out": found["left_out"]}
        if suite == "scaling":
            more["base"] = scaling_base(size, device)
        data = report.results(found["rows"], surroundings, _command(), **more)
        if found["left_out"]:
            typer.echo(f"Left out, for want of time: {', '.join(found['left_out'])}.")
    else:
        rows = runner.run_cases(cases, peers, device=device, rounds=rounds, budget_s=budget, each=_print_case)
        data = report.results(rows, surroundings, _command())
    typer.echo(report.provenance(data))
    if warning := report.busy(data):
        typer.echo(warning)
    if json_file is not None:
        report.save(data, json_file)
    if plot_file is not None:
        from prefkern.bench import curves

        (curves if suite == "scaling" else report).plot(data, plot_file)


def _cases(ops: list[str] | None, shapes: str | None, dtype: str | None, mode: str | None) -> list[Case]:
    from prefkern.bench.shapes import DTYPES, MODES, choose_all, parse_shapes, plan_cases

    return plan_cases(
        ops or (),
        parse_shapes(shapes) if shapes else None,
        choose_all("dtype", dtype, DTYPES) if dtype else None,
        choose_all("mode", mode, MODES) if mode else None,
    )


def _size(quick: bool, full: bool) -> str:
    from prefkern.bench.shapes import UsageError

    if quick and full:
        raise UsageError("--quick and --full are given; one of them is expected")
    return "quick" if quick else "full" if full else "default"


def _parts(
    suite: str,
    size: str,
    device: str,
    peers: tuple[str, ...] | None,
    ops: list[str] | None,
    shapes: str | None,
    dtype: str | None,
    mode: str | None,
) -> list[Part]:
    from prefkern.bench.shapes import DTYPES, MODES, UsageError, choose_all
    from prefkern.bench.suites import parts_of

    if ops or shapes:
        raise UsageError("--suite has ops and shapes of its own; none are expected beside it")
    parts = parts_of(
        suite, size, device=device, against=peers,
        dtypes=choose_all("dtype", dtype, DTYPES) if dtype else None,
        modes=choose_all("mode", mode, MODES) if mode else None,
    )  # fmt: skip
    if not parts:
        raise UsageError(f"suite {suite} has nothing with --dtype {dtype} --mode {mode}")
    return parts


def _peers(against: str | None) -> tuple[str, ...] | None:
    from prefkern.bench.peers import NAMEABLE
    from prefkern.bench.shapes import choose_all

    if against is None:
        return None
    return () if against == "none" else choose_all("peer", against, NAMEABLE)


def check_plot(what: str, path: Path | None) -> None:
    """Before anything is measured: a run should not fail at its end."""
    from importlib.util import find_spec

    from prefkern.bench.shapes import UsageError

    if path is not None and find_spec("matplotlib") is None:
        raise UsageError(f'{what} needs matplotlib: pip install "prefkern[demo]"')


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
        "time": any(row.time_ms is not None for row in rows),
    }
    optional |= dict.fromkeys(("CPU time", "/ eager", "/ floor"), optional["time"])
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
    for row in rows:
        if row.peer == "floor":
            console.print(f"floor: {row.note}", style="dim")
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
