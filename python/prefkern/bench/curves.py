"""The figure of `prefkern bench --suite scaling`: for each dtype four panels, cost against N, H, V and threads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefkern.bench.report import Results, busy, provenance

AXES = ("N", "H", "V", "threads")
Curve = list[tuple[int, float]]
"""Points of an axis and milliseconds, ascending."""


def curves(data: Results, dtype: str, axis: str) -> dict[tuple[str, str], Curve]:
    """(peer, mode) -> points along the axis, everything else held at the base. Of a busy machine the least times."""
    base, env = data["base"], data["environment"]
    fixed = [name for name in AXES[:3] if name != axis]
    value = "ms" if busy(data) is None else "least"
    found: dict[tuple[str, str], Curve] = {}
    for row in data["rows"]:
        if row["status"] != "ok" or row["dtype"] != dtype or row["peer"] == "floor-recompute":
            continue
        place = dict(zip(AXES, [*row["shape"], row["threads"] or env["threads"]], strict=True))
        if any(place[name] != base[name] for name in fixed) or (axis != "threads" and row["threads"]):
            continue
        time = {"ms": row["time_ms"], "least": row["min_ms"]}[value]
        found.setdefault((row["peer"], row["mode"]), []).append((place[axis], time))
    return {key: sorted(points) for key, points in found.items()}


def plot(data: Results, path: Path) -> None:
    """A row of four panels for each dtype: a line for the floor and each peer, forward solid, with backward dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = draw(data)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(data: Results) -> Any:
    """The figure, not yet saved."""
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in data["rows"]))
    figure, grid = plt.subplots(
        max(len(dtypes), 1), 4, figsize=(14, 3.6 * max(len(dtypes), 1) + 0.6), squeeze=False, layout="constrained"
    )  # fmt: skip
    peers = list(dict.fromkeys(row["peer"] for row in data["rows"] if row["peer"] != "floor-recompute"))
    colours = {peer: "black" if peer == "floor" else f"C{i % 10}" for i, peer in enumerate(peers)}
    for dtype, panels in zip(dtypes, grid, strict=False):
        for axis, panel in zip(AXES, panels, strict=True):
            _draw_panel(panel, curves(data, dtype, axis), colours)
            panel.set_xlabel(f"{axis}   ({_held(data, axis)})", fontsize=8)
            panel.set_title(f"{dtype}: time against {axis}", fontsize=9)
        panels[0].set_ylabel("ms", fontsize=8)
        panels[0].legend(fontsize=7)
    figure.suptitle(textwrap.fill(" ".join(filter(None, (provenance(data), busy(data)))), 200), fontsize=7)
    return figure


def _held(data: Results, axis: str) -> str:
    held: Mapping[str, int] = data["base"] | {"threads": data["environment"]["threads"]}
    return ", ".join(f"{name} {value}" for name, value in held.items() if name != axis)


def _draw_panel(panel: Any, lines: Mapping[tuple[str, str], Curve], colours: Mapping[str, str]) -> None:
    for (peer, mode), points in lines.items():
        style = "-" if mode == "fwd" else "--"
        panel.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=colours[peer], label=f"{peer} {mode}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    panel.set_xticks(ticks, [str(x) for x in ticks], rotation=45)
    panel.minorticks_off()
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)
