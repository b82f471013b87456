"""`prefkern check`: every op on this machine against its definition in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prefkern.cli.problems import Problem

FORWARD_BOUND = 1e-4  # absolute: nats, advantages, losses
FLOAT64_BOUND = 1e-10
FLOAT32_GRADIENT_BOUND = 1e-5  # of the largest gradient
PLAIN_FACTOR = 2.0  # narrower gradients may be this many times as far off as plain PyTorch in the same type


def check(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP ...]", help="Ops to compare; all by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Save the table.")] = None,
) -> None:
    """Compare every op, or those named, with its float64 definition. The exit code is 1 if anything is out of bounds."""
    import torch

    from prefkern.bench.shapes import UsageError, check_device, choose
    from prefkern.cli.problems import all_problems

    try:
        check_device(device)
        if ops:
            known = sorted({problem.op for problem in all_problems(torch.float32)})
            ops = [choose("op", op, known) for op in ops]
    except UsageError as error:
        typer.echo(f"prefkern check: {error}", err=True)
        raise typer.Exit(2) from None
    lines = run(device, ops)
    if json_file is not None:
        from prefkern.bench.report import environment

        rows = [asdict(line) for line in lines]
        json_file.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    _print(lines)
    if not all(line.ok for line in lines):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Line:
    """One op, in one type, with one set of options."""

    op: str
    dtype: str
    case: str
    forward: float | None
    """Largest error of any output: absolute, except that lse and mean_logit, which grow with the logits, count relative
    to their size where that exceeds 1."""
    forward_bound: float
    gradient: float | None = None
    """Largest error of a gradient over the largest entry of that gradient, where it comes closest to its bound."""
    gradient_bound: float | None = None
    ok: bool = False
    error: str = ""


def run(device: str, ops: Sequence[str] | None = None) -> list[Line]:
    """All lines of the table, or those of some ops."""
    import torch

    from prefkern.bench.shapes import DTYPES
    from prefkern.cli.problems import all_problems, on

    torch.manual_seed(0)
    lines = []
    for name, dtype in DTYPES.items():
        if device == "cuda" and dtype == torch.float64:
            continue  # the CUDA kernels have no float64
        problems = [problem for problem in all_problems(dtype) if not ops or problem.op in ops]
        lines += [_judge(on(device, problem), name, dtype) for problem in problems]
    order = list(dict.fromkeys(line.op for line in lines))
    return sorted(lines, key=lambda line: order.index(line.op))


# ---------------------------------------------------------------------------------------------------------- the verdict


def _judge(problem: Problem, name: str, dtype: torch.dtype) -> Line:
    import torch

    wide = dtype == torch.float64
    forward_bound = FLOAT64_BOUND if wide else FORWARD_BOUND
    try:
        exact, exact_grads = _evaluate(problem.exact, *_in_float64(problem))
        ours, our_grads = _evaluate(problem.ours, problem.leaves, problem.options)
        _, plain_grads = _evaluate(problem.plain, problem.leaves, problem.options)
    except Exception as error:  # whatever an op raises here is a finding
        return Line(problem.op, name, problem.case, None, forward_bound, error=f"{type(error).__name__}: {error}")
    forward = max(_distance(ours[key], exact[key]) / _unit(key, exact[key]) for key in exact)
    ok, gradient, bound = forward <= forward_bound, None, None
    for key, truth in exact_grads.items():
        scale = max(truth.abs().max().item(), 1e-30)
        this = _distance(our_grads[key], truth) / scale
        if wide:
            limit = FLOAT64_BOUND
        elif dtype == torch.float32:
            limit = FLOAT32_GRADIENT_BOUND
        else:
            limit = max(PLAIN_FACTOR * _distance(plain_grads[key], truth) / scale, torch.finfo(dtype).eps)
        ok = ok and this <= limit
        if gradient is None or bound is None or this / limit > gradient / bound:
            gradient, bound = this, limit
    return Line(problem.op, name, problem.case, forward, forward_bound, gradient, bound, ok)


def _evaluate(
    function: Callable[..., Any], leaves: dict[str, Tensor], options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients by name."""
    import torch

    fresh = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    result = function(**fresh, **options)
    fields: dict[str, Any] = {"result": result} if isinstance(result, torch.Tensor) else result._asdict()
    outputs = {name: value for name, value in fields.items() if value is not None and name != "metrics"}
    if fresh:
        weights = torch.Generator().manual_seed(1)
        terms = [(x * torch.randn(x.shape, generator=weights).to(x.device)).sum() for x in outputs.values() if x.requires_grad]
        grads = dict(zip(fresh, torch.autograd.grad(torch.stack(terms).sum(), list(fresh.values())), strict=True))
    else:
        grads = {}
    return {**outputs, **fields.get("metrics", {})}, grads


def _in_float64(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torch

    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {k: v.double() for k, v in problem.leaves.items()}, {k: widen(v) for k, v in problem.options.items()}


def _unit(output: str, truth: Tensor) -> float:
    return max(1.0, truth.abs().max().item()) if output in ("lse", "mean_logit") else 1.0


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where a is NaN, or where only one is infinite."""
    a, b = a.double(), b.double()
    return (a - b).abs().masked_fill(a == b, 0.0).nan_to_num(nan=math.inf).max().item()


def _print(lines: list[Line]) -> None:
    from rich.table import Table

    from prefkern.cli.console import make_console

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    table = Table(title="against float64", title_justify="left")
    for column in ("op", "dtype", "case"):
        table.add_column(column, overflow="fold")
    for column in ("forward", "bound", "gradient", "bound", "ok"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            line.op,
            line.dtype,
            line.case,
            number(line.forward),
            number(line.forward_bound),
            number(line.gradient),
            number(line.gradient_bound),
            "yes" if line.ok else "[bold red]NO[/]",
        )
    console = make_console()
    console.print(table)
    for line in lines:
        if line.error:
            console.print(f"{line.op} {line.dtype} {line.case}: {line.error}", markup=False)
    bad = sum(not line.ok for line in lines)
    console.print(f"{len(lines) - bad} of {len(lines)} within bounds")
