"""`prefkern info`: what is installed, what it was built for, what it uses here."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plan: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="N H V", help="Also show how linear_logprobs cuts up such a call, and what it may save."),
    ] = None,
) -> None:
    """Show versions, what the library was built for, and what it uses on this machine."""
    if plan is not None and min(plan) < 1:
        raise typer.BadParameter("sizes must be positive", param_hint="--plan")
    facts = collect()
    if plan is not None:
        facts |= {"plan": collect_plans(*plan), "save": collect_saves(*plan)}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    print_facts(facts)
    if plan is not None:
        print_plans(plan, facts["plan"])
        print_saves(plan, facts["save"])


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


def device_kinds() -> list[str]:
    """Those of this machine."""
    import torch

    import prefkern

    return ["cpu", "cuda"] if torch.cuda.is_available() and prefkern.capabilities()["cuda_compiled"] else ["cpu"]


def collect_plans(rows: int, hidden: int, vocab: int) -> list[dict[str, Any]]:
    """The chunk plans of linear_logprobs for the usual types, forward and backward, on every kind of device here."""
    import torch

    import prefkern

    plans = []
    for device in device_kinds():
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


def collect_saves(rows: int, hidden: int, vocab: int) -> list[dict[str, Any]]:
    """What a forward may save for its backward, in full and with a frozen head, and what it saves by default."""
    import torch

    import prefkern

    saves = []
    for device in device_kinds():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for needs in (("hidden", "weight"), ("hidden",)):
                default = prefkern.plan_backward(rows, hidden, vocab, dtype=dtype, device=device, needs=needs).save
                for save in ("recompute", "logits", "u"):
                    if save == "u" and (len(needs) > 1 or device == "cuda"):
                        continue
                    plan = prefkern.plan_backward(rows, hidden, vocab, dtype=dtype, device=device, needs=needs, save=save)
                    saves.append(
                        {"device": device, "dtype": name, "gradients": list(needs), "default": save == default}
                        | {"products": plan.products}
                        | plan._asdict()
                    )
    return saves


def cuda_head(build: dict[str, Any], capabilities: dict[str, Any]) -> str:
    """Which kernels linear_logprobs takes on CUDA."""
    stage2 = f"stage 2 compiled with CUTLASS {build['cutlass']}" if build["cutlass"] else "built without stage 2"
    return f"forward {capabilities['cuda_forward']}, backward {capabilities['cuda_backward']} ({stage2})"


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
        ("matrix products", "this library's" if capabilities["cpu_gemm"] == "own" else "those of torch's CPU library"),
        ("threads", str(facts["threads"])),
        ("CUDA", cuda),
        ("CUDA head", cuda_head(build, capabilities)),
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


def print_saves(shape: tuple[int, int, int], saves: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from prefkern.cli.console import make_console

    rows, hidden, vocab = shape
    title = f"what the forward saves; F = {2e-9 * rows * hidden * vocab:,.1f} GFLOP, one product of the head"
    table = Table(
        title=title, title_justify="left", caption="* by default; save= and save_bytes= choose", caption_justify="left"
    )
    for name in ("device", "dtype", "gradients", "save"):
        table.add_column(name)
    for name in ("forward F", "backward F", "saved MiB", "workspace MiB"):
        table.add_column(name, justify="right")
    for plan in saves:
        table.add_row(
            plan["device"],
            plan["dtype"],
            ", ".join(plan["gradients"]),
            plan["save"] + " *" * plan["default"],
            str(plan["forward_products"]),
            str(plan["backward_products"]),
            f"{plan['saved_bytes'] / 2**20:.1f}",
            f"{plan['workspace_bytes'] / 2**20:.1f}",
        )
    make_console().print(table)
