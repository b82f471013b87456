"""Tables of documents, made from results: what stands between

    <!-- results: benchmarks/results/cpu-epyc-head.json ratios op=linear_logprobs dtype=fp32 -->
    <!-- results: end -->

is written by `fill`. Behind the file comes the kind of table, then what its rows must have:

ratios   times over the floor: a line for each case and output, a column for each peer; below, who is missing and why
memory   MiB beyond inputs and gradients, likewise
errors   the largest errors against float64 and whether equal calls gave equal bits, a line for each peer
machine  where and with what the run was made, how quiet it was, and what it left out
plot     an image, named by `image=`

Of a file that does not exist, and of cases that a run may have left out, it says so: not yet measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefkern.bench import report
from prefkern.bench.report import Results, case_title, mebibytes, milliseconds, provenance, scientific, times

NOT_MEASURED = "Not yet measured."
BLOCK = re.compile(r"<!-- results: (\S+\.json) (\w+)((?: \S+=\S+)*) -->\n.*?<!-- results: end -->", re.DOTALL)

Row = Mapping[str, Any]


def fill(text: str, root: Path) -> str:
    """The text with every table as the results under `root` have it now."""

    def block(found: re.Match[str]) -> str:
        file, kind, conditions = found[1], found[2], _conditions(found[3])
        body = table(report.load(root / file), kind, conditions) if (root / file).exists() else NOT_MEASURED
        return f"<!-- results: {file} {kind}{found[3]} -->\n{body.strip()}\n<!-- results: end -->"

    return BLOCK.sub(block, text)


def images(text: str) -> dict[str, str]:
    """The images of a text, and the results that each is drawn from."""
    return {_conditions(m[3])["image"]: m[1] for m in BLOCK.finditer(text) if m[2] == "plot"}


def rename(text: str, kind: str, name: str) -> str:
    """The text with tables of another run: of files benchmarks/results/KIND-NAME-SUITE.json, such as kind "cpu"."""
    return re.sub(rf"(<!-- results: \S*/{kind}-)\S+?(-(?:head|losses|small|memory|scaling)\.json )", rf"\g<1>{name}\g<2>", text)


def table(data: Results, kind: str, conditions: Mapping[str, str] | None = None) -> str:
    """A table of some kind, of the rows that meet the conditions, such as {"dtype": "fp32"}; several values by commas."""
    conditions = dict(conditions or {})
    if kind == "plot":
        return f"![{provenance(data)}]({conditions['image']})"
    kinds = {"ratios": _ratios, "memory": _memory, "errors": _errors, "machine": _machine}
    if kind not in kinds:
        raise ValueError(f"unknown kind of table {kind!r}; accepted: {', '.join((*kinds, 'plot'))}")
    rows = [row for row in data["rows"] if all(str(row[key]) in value.split(",") for key, value in conditions.items())]
    if not rows and data.get("left_out"):
        return NOT_MEASURED
    if not rows:
        raise ValueError(f"no rows with {conditions}")
    return kinds[kind](data, rows)


def _conditions(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


def _ratios(data: Results, rows: Sequence[Row]) -> str:
    measure, about = report.yardstick(data)
    floors = {case_title(row): row for row in rows if row["peer"] == "floor"}
    cell = {
        (case_title(row), row["outputs"], row["peer"]): times(row[measure]) for row in rows if _compared(row) and row["time_ms"]
    }
    lines = _by_peer(rows, cell, {title: milliseconds(row["time_ms"]) for title, row in floors.items()})
    return f"{lines}\n\nTimes over the floor: {about}. The floor: {_floors(list(floors.values()))}.{_missing(rows)}"


def _floors(rows: Sequence[Row]) -> str:
    """What the floors are, with the modes and dtypes, or the ops, that share one."""
    ops = {row["op"] for row in rows}
    named: dict[str, list[str]] = {}
    for row in rows:
        words = [row["op"] if not row["op"].startswith("linear_") or len(ops) == 1 else "", row["dtype"], row["mode"]]
        named.setdefault(row["note"], []).append(" ".join(word for word in words[len(ops) == 1 :] if word))
    return "; ".join(f"{note} ({', '.join(dict.fromkeys(where))})" for note, where in named.items())


def _memory(data: Results, rows: Sequence[Row]) -> str:
    beyond = {
        (case_title(row), row["outputs"], row["peer"]): mebibytes(max(0.0, row["peak_mib"] - (row["gradient_mib"] or 0.0)))
        for row in rows if _compared(row) and row["peak_mib"] is not None
    }  # fmt: skip
    gradients = {case_title(row): mebibytes(row["gradient_mib"]) for row in rows if _compared(row)}
    return f"{_by_peer(rows, beyond, gradients, 'gradients')}\n\nMiB.{_missing(rows)}"


def _by_peer(
    rows: Sequence[Row], cells: Mapping[tuple[str, str, str], str], second: Mapping[str, str], name: str = "floor"
) -> str:
    """A line for each case and output that has a cell, a column for each peer that does."""
    peers = list(dict.fromkeys(peer for *_, peer in cells))
    own = [peer for peer in peers if peer.startswith("prefkern")]
    peers = own + [peer for peer in peers if peer not in own]
    body = [
        [title, outputs, second.get(title, ""), *(cells.get((title, outputs, peer), "") for peer in peers)]
        for title, outputs in dict.fromkeys((title, outputs) for title, outputs, _ in cells)
    ]
    return _markdown(["case", "output", name, *peers], body)


def _errors(data: Results, rows: Sequence[Row]) -> str:
    measured = [row for row in rows if _compared(row) and row["max_error"] is not None]
    body = []
    for peer in dict.fromkeys(row["peer"] for row in measured):
        for dtype in dict.fromkeys(row["dtype"] for row in measured if row["peer"] == peer):
            mine = [row for row in measured if (row["peer"], row["dtype"]) == (peer, dtype)]
            gradients = [row["grad_error"] for row in mine if row["grad_error"] is not None]
            stable = sum(bool(row["bit_stable"]) for row in mine)
            body.append([
                peer, dtype, scientific(max(row["max_error"] for row in mine)), scientific(max(gradients, default=None)),
                "always" if stable == len(mine) else f"{stable} of {len(mine)} cases",
            ])  # fmt: skip
    return _markdown(["peer", "dtype", "largest error", "of the gradient, relative", "equal bits"], body)


def _machine(data: Results, rows: Sequence[Row]) -> str:
    env, noise = data["environment"], data.get("noise") or {}
    caches = ", ".join(f"{name} {size}" for name, size in (env.get("caches") or {}).items())
    isa = (env.get("capabilities") or {}).get("cpu_isa")
    facts = [
        provenance(data),
        f"{env['cpus']} CPUs, caches {caches or 'unknown'}, kernels for {isa}; {'; '.join(env.get('blas') or ())}.",
    ]
    if noise.get("other_cores") is not None:
        facts.append(f"While it timed others had {noise['other_cores']:.2f} CPUs; load average before {_load(env)}.")
    if warning := report.busy(data):
        facts.append(f"**{warning}**")
    if data.get("left_out"):
        facts.append(f"Left out, for want of time: {'; '.join(data['left_out'])}.")
    return "\n".join(facts)


def _load(env: Mapping[str, Any]) -> str:
    return f"{env['load_average'][0]:.2f}" if env.get("load_average") else "unknown"


def _compared(row: Row) -> bool:
    return row["status"] == "ok" and not row["peer"].startswith("floor")


def _missing(rows: Sequence[Row]) -> str:
    """Who is missing, and why; outputs that a peer does not have at all are said once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["peer"], row["status"]), []).append(f"{row['op']} {row['outputs']}".strip())
    if not reasons:
        return ""
    everything = {f"{row['op']} {row['outputs']}".strip() for row in rows if row["outputs"]}
    told = [
        f"{peer}{'' if set(where) == everything else ' for ' + ', '.join(dict.fromkeys(where))} ({why})"
        for (peer, why), where in reasons.items()
    ]
    return f" Missing: {'; '.join(told)}."


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
