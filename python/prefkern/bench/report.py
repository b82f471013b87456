"""What becomes of a benchmark's results: JSON with the machine they are from, a Markdown table, a plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from prefkern.bench import machine

SCHEMA = 1

Results = Mapping[str, Any]


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a run was made."""
    import prefkern

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else machine.cpu_model(),
        "cpu": machine.cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": machine.caches(),
        "cpu_flags": machine.cpu_flags(),
        "memory_gib": machine.memory_gib(),
        "blas": machine.blas(),
        "load_average": machine.load_average(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "prefkern": prefkern.build_info()["version"],
        "commit": git_commit(),
        "build": prefkern.build_info(),
        "capabilities": prefkern.capabilities(),
    }


def git_commit() -> str | None:
    """The commit this package is at, with "-dirty" for changes on top; None unless git tracks this very file."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", here.name) is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def results(
    rows: Sequence[Mapping[str, object]], surroundings: Mapping[str, Any], command: str, **more: object
) -> dict[str, Any]:
    """The rows of a run together with its `environment`, as it was before, what disturbed it, and more under names."""
    data = {"schema": SCHEMA, "command": command, "environment": dict(surroundings), **more}
    return data | {"noise": noise(rows), "rows": list(rows)}


def noise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells a quiet machine from a busy one: the load now, cores that others had while there was timing, and how far the
    ratios of the rounds lay apart (the median over what was compared with the floor, and the worst)."""
    spreads = [row["ratio_spread"] for row in rows if row.get("ratio_spread") and not row["peer"].startswith("floor")]
    others = [row["other_cores"] for row in rows if row.get("other_cores") is not None]
    return {
        "load_average_after": machine.load_average(),
        "other_cores": statistics.mean(others) if others else None,
        "other_cores_max": max(others, default=None),
        "spread_median": statistics.median(spreads) if spreads else None,
        "spread_max": max(spreads, default=None),
    }


def save(data: Results, path: Path) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def load(path: Path) -> Results:
    """Results saved earlier."""
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {data.get('schema')!r}, expected {SCHEMA}")
    return data


# ----------------------------------------------------------------------------------------------------------- formatting


def milliseconds(value: float | None) -> str:
    """Three digits, in the unit that suits."""
    if value is None:
        return ""
    for unit, size in (("us", 1e-3), ("ms", 1.0)):
        if value < 999.5 * size:  # more would be rounded to 1e+03
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} s"


def times(value: float | None) -> str:
    """Two decimals while they say something; two digits of what is smaller, no decimals of what is larger."""
    if value is None:
        return ""
    return f"{value:.2g}x" if value < 0.1 else f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def yes_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def case_title(row: Mapping[str, Any]) -> str:
    """Such as "linear_logprobs 512x1024x32000 fp32 fwd"."""
    threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}" if row.get("threads") else ""
    words = [row["op"], "x".join(map(str, row["shape"])), row["dtype"], row["mode"], threads]
    return " ".join(word for word in words if word)


# --------------------------------------------------------------------------------------------------------------- tables


def markdown_table(data: Results, ops: Iterable[str] | None = None) -> str:
    """A Markdown table: a line for each case and kind of output, a column for each peer that ran anywhere.

    Cells are times over the floor of the same case; what lies beyond the peers is about this library alone.
    """
    rows = _measured(data, ops)
    peers = _unique(row["peer"] for row in rows if not row["peer"].startswith("floor"))
    floors = {case_title(row): row for row in rows if row["peer"] == "floor"}
    head = ["case", "output", "floor", *peers, "extra MiB", "eager MiB", "max error"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (title, outputs), group in _by_case(rows).items():
        ours, eager = group.get("prefkern", {}), group.get("eager", {})
        cells = [
            title,
            outputs,
            milliseconds(floors[title]["time_ms"]) if title in floors else "",
            *(times(group.get(peer, {}).get("ratio_floor")) for peer in peers),
            mebibytes(ours.get("peak_mib")),
            mebibytes(eager.get("peak_mib")),
            scientific(ours.get("max_error")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def provenance(data: Results) -> str:
    """One sentence that says where the figures are from."""
    env = data["environment"]
    dirty = "-dirty" if (env.get("commit") or "").endswith("-dirty") else ""
    commit = f", commit {env['commit'][:12]}{dirty}" if env.get("commit") else ""
    threads = f"{env['threads']} thread{'s' if env['threads'] != 1 else ''}"
    versions = f"prefkern {env['prefkern']}{commit}, torch {env['torch']}"
    return f"`{data['command']}` on {env['device_name']}, {threads}; {versions}; {env['time'][:10]}."


OTHER_CORES, SPREAD = 0.1, 0.1  # quiet: others have less of each CPU, and ratios repeat this well


def busy(data: Results) -> str | None:
    """A warning if others wanted the cores: before the run, while there was timing, or by what it did to the ratios. None of
    results without times, which others do not change."""
    if all(row.get("time_ms") is None for row in data["rows"]):
        return None
    env, noise = data["environment"], data.get("noise") or {}
    load, cpus = (env.get("load_average") or [0.0])[0], env.get("cpus") or 1
    others, spread = noise.get("other_cores"), noise.get("spread_median") or 0.0
    reasons = []
    if others is None and load > cpus / 2:  # it may be what this very program did before: only for want of better
        reasons.append(f"load average {load:.1f} on {cpus} CPUs before the run")
    if others is not None and others > OTHER_CORES * cpus:
        reasons.append(f"others had {others:.1f} of {cpus} CPUs while it timed")
    if spread > SPREAD:
        reasons.append(f"ratios of a case lay {spread:.0%} apart from round to round")
    if not reasons:
        return None
    return f"The machine was busy: {'; '.join(reasons)}. Minima and CPU times suffer less than medians of times."


def yardstick(data: Results) -> tuple[str, str]:
    """Which of a row's ratios to the floor to believe, and what that is: medians of a quiet machine, else minima, and of one
    thread minima of CPU time. More threads wait for each other with the CPU at work, so there CPU time is no help."""
    if busy(data) is None:
        return "ratio_floor", "medians of the ratios of rounds"
    if data["environment"].get("threads") == 1 and all(row.get("threads", 0) <= 1 for row in data["rows"]):
        return "cpu_ratio_min", "ratios of the least CPU times, since the machine was busy"
    return "ratio_min", "ratios of the least times, since the machine was busy"


def plot(data: Results, path: Path) -> None:
    """Bars of the time over the floor: a panel for each case, a bar for each peer and kind of output. Where nothing was timed,
    of the MiB beyond gradients."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = _measured(data, None)
    timed = any(row["time_ms"] is not None for row in rows)
    rows = [row for row in rows if row["ratio_floor" if timed else "peak_mib"] is not None]
    groups = _by_case(rows)
    titles = _unique(title for title, _ in groups)
    colours = {
        peer: f"C{i % 10}" for i, peer in enumerate(_unique(r["peer"] for r in rows if not r["peer"].startswith("floor")))
    }
    heights = [1 + sum(len(group) for (t, _), group in groups.items() if t == title) for title in titles]
    figure, axes = plt.subplots(
        max(len(titles), 1), 1, figsize=(9, 0.28 * sum(heights) + 0.7 * max(len(titles), 1) + 0.8), squeeze=False,
        gridspec_kw={"height_ratios": heights or [1]}, layout="constrained",
    )  # fmt: skip
    for axis, title in zip(axes[:, 0], titles, strict=False):
        bars = [row for (t, _), group in groups.items() if t == title for row in group.values()]
        ratios = [row["ratio_floor"] if timed else max(0.0, row["peak_mib"] - (row["gradient_mib"] or 0.0)) for row in bars]
        labels = [f"{row['peer']}  {row['outputs']}" for row in bars]
        axis.barh(labels, ratios, color=[colours[row["peer"]] for row in bars])
        for i, ratio in enumerate(ratios):
            axis.annotate(f" {times(ratio) if timed else mebibytes(ratio)}", (ratio, i), va="center", fontsize=8)
        floor = next((row["note"] for row in rows if row["peer"] == "floor" and case_title(row) == title), "")
        if timed:
            axis.axvline(1.0, color="black", linewidth=0.8)
        if timed and max(ratios, default=1.0) > 20:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(f"{title}   (1 = {floor})" if timed else title, fontsize=9, loc="left")
    figure.supxlabel("time over the floor" if timed else "MiB beyond inputs and gradients", fontsize=9)
    figure.suptitle(textwrap.fill(provenance(data), 130), fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _measured(data: Results, ops: Iterable[str] | None) -> list[Mapping[str, Any]]:
    wanted = None if ops is None else set(ops)
    return [row for row in data["rows"] if row["status"] == "ok" and (wanted is None or row["op"] in wanted)]


def _by_case(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """(case, kind of output) -> peer -> row, without the floors."""
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if not row["peer"].startswith("floor"):
            groups.setdefault((case_title(row), row["outputs"]), {})[row["peer"]] = row
    return groups


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
