"""`prefkern info`: what is installed, what it was built for, what it uses here."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plan: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="N H V", help="Also show how linear_logprobs cuts up such a call."),
    ] = None,
) -> None:
    """Show versions, what the library was built for, and what it uses on this machine."""
    if plan is not None and min(plan) < 1:
        raise typer.BadParameter("sizes must be positive", param_hint="--plan")
    facts = collect()
    plans = None if plan is None else collect_plans(*plan)
    if as_json:
        typer.echo(json.dumps(facts if plans is None else facts | {"plan": plans}, indent=1))
        return
    print_facts(facts)
    if plan is not None and plans is not None:
        print_plans(plan, plans)


def collect() -> dict[str, Any]:
    """Everything there is to say, JSON-ready."""
    import platform

    import torch

    import prefkern
    from prefkern.bench.machine import cpu_model

    build, capabilities = prefkern.build_info(), prefkern.capabilities()
    cuda = torch.cuda.is_available()
    return {
        "prefkern": build["version"],
        "python": platform.python_version(),
        "build": build,
        "capabilities": capabilities,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "validation": prefkern.validation(),
    }


def collect_plans(rows: int, hidden: int, vocab: int) -> list[dict[str, Any]]:
    """The chunk plans of linear_logprobs for the usual types, forward and backward, on every kind of device here."""
    import torch

    import prefkern

    on_cuda = torch.cuda.is_available() and prefkern.capabilities()["cuda_compiled"]
    plans = []
    for device in ["cpu", "cuda"] if on_cuda else ["cpu"]:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for backward in (False, True):
                plan = prefkern.plan_chunks(rows, hidden, vocab, dtype=dtype, device=device, backward=backward)
                plans.append(
                    {
                        "device": device,
                        "dtype": name,
                        "pass": "backward" if backward else "forward",
                        "row_chunk": plan.row_chunk,
                        "vocab_block": plan.vocab_block,
                        "workspace_bytes": plan.workspace_bytes,
                        "logits_bytes": rows * vocab * torch.finfo(dtype).bits // 8,
                    }
                )
    return plans


def print_facts(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from prefkern.cli.console import make_console

    build, capabilities = facts["build"], facts["capabilities"]
    cuda = f"{build['cuda_archs']}, runtime {build['cuda_runtime']}" if build["cuda_archs"] else "built without CUDA"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in (
        ("prefkern", facts["prefkern"]),
        ("python", facts["python"]),
        ("torch", f"{build['torch_running']} (built with {build['torch_built']}, ABI target {build['torch_target']})"),
        ("compiler", build["compiler"]),
        ("CPU", facts["cpu"]),
        ("CPU features", ", ".join(capabilities["cpu_features"]) or "none that matter"),
        ("instruction set", f"{capabilities['cpu_isa']} (compiled in: {', '.join(capabilities['cpu_isas'])})"),
        ("threads", str(facts["threads"])),
        ("CUDA", cuda),
        ("CUDA devices", ", ".join(facts["cuda_devices"]) or "none seen by torch"),
        ("validation", "on" if facts["validation"] else "off (inputs on CUDA are not checked for values)"),
    ):
        table.add_row(name, value)
    make_console().print(table)


def print_plans(shape: tuple[int, int, int], plans: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from prefkern.cli.console import make_console

    table = Table(title=f"linear_logprobs, N={shape[0]} H={shape[1]} V={shape[2]}", title_justify="left")
    for name in ("device", "dtype", "pass"):
        table.add_column(name)
    for name in ("rows", "vocabulary", "workspace MiB", "all logits MiB"):
        table.add_column(name, justify="right")
    for plan in plans:
        sizes = (plan["workspace_bytes"] / 2**20, plan["logits_bytes"] / 2**20)
        table.add_row(
            plan["device"],
            plan["dtype"],
            plan["pass"],
            str(plan["row_chunk"]),
            str(plan["vocab_block"]),
            *(f"{size:.1f}" for size in sizes),
        )
    make_console().print(table)
