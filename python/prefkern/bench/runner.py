"""Runs cases: every workload by every peer, and a row of figures for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from prefkern.bench import peers
from prefkern.bench.machine import Watch
from prefkern.bench.peers import PEERS, Peer, Unavailable
from prefkern.bench.shapes import Case
from prefkern.bench.timing import Timing, compare, describe
from prefkern.bench.workloads import WORKLOADS, Errors, OutputsCall, Workload
from prefkern.bench.workloads.products import seconds_in_own_type

PATIENCE_S = 2.0
"""Nobody waits longer than this for a call whose products run in a type that the CPU has no instructions for."""
HEAD_LOSSES = ("linear_policy_loss", "linear_preference_loss", "linear_unpaired_loss")


@dataclass(frozen=True)
class Row:
    """One line of the results: one case by one peer, or by the floor. Figures are None unless `status` is "ok"."""

    op: str
    shape: list[int]
    dtype: str
    mode: str
    outputs: str
    """What was computed; for `overhead`, by which op."""
    peer: str
    """One of `peers.PEERS`, or a floor: "floor" is what ratios are to, "floor-..." others."""
    status: str
    """"ok", or why there is nothing to report."""
    note: str = ""
    time_ms: float | None = None
    min_ms: float | None = None
    cpu_ms: float | None = None
    ratio_floor: float | None = None
    ratio_eager: float | None = None
    cpu_ratio_floor: float | None = None
    cpu_ratio_eager: float | None = None
    ratio_min: float | None = None
    """The least time over the floor's least."""
    cpu_ratio_min: float | None = None
    """The same of CPU time."""
    ratio_spread: float | None = None
    """How far apart the ratios of the rounds lie, over their median."""
    other_cores: float | None = None
    """Cores that others had while this case was timed, on average."""
    peak_mib: float | None = None
    gradient_mib: float | None = None
    """What the gradients take that a call has to return; these are in `peak_mib`."""
    launches: int | None = None
    """Kernels that a call starts on the GPU; None on the CPU."""
    kernel_ms: float | None = None
    """How long those kernels run; the rest of the time the GPU waits for the processor."""
    max_error: float | None = None
    """Largest absolute error of the results against float64."""
    grad_error: float | None = None
    """Largest error of the gradients (that of hidden for linear_logprobs), over the largest gradient."""
    bit_stable: bool | None = None
    rounds: int = 0
    threads: int = 0
    """0: those of the run's environment."""


def run_case(
    case: Case,
    against: Sequence[str],
    *,
    device: str = "cpu",
    rounds: int = 5,
    budget_s: float = 4.0,
    variants: Sequence[str] | None = None,
) -> list[Row]:
    """Measures one case: the floor first, then for each variant, or those that are named, this library and everybody it is
    compared with. With `rounds=0` memory and errors alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if case.op == "overhead" else case.threads or before)
    try:
        return _run_case(case, against, device, rounds, budget_s, variants)
    finally:
        torch.set_num_threads(before)


def ours(case: Case, device: str = "cpu") -> list[str]:
    """This library, in the ways that there are for a case."""
    names = ["prefkern"]
    if case.op == "logits_logprobs" and case.mode != "fwd":
        names.append("prefkern-inplace")
    if case.op == "linear_logprobs" and case.mode in ("bwd", "frozen"):
        names += ["prefkern-kept"] if case.mode == "bwd" else ["prefkern-recompute", "prefkern-kept", "prefkern-u"]
    if case.op == "linear_logprobs" and device == "cuda":
        names += ["prefkern-stage1", "prefkern-stage2"]
    if case.op in HEAD_LOSSES:
        names.append("prefkern-two-step")
    if case.dtype in ("bf16", "fp16"):
        names.append("prefkern-fp32")
    return names


def _run_case(
    case: Case, against: Sequence[str], device: str, rounds: int, budget_s: float, variants: Sequence[str] | None
) -> list[Row]:
    workload = WORKLOADS[case.op](case, device)
    names = list(dict.fromkeys([*ours(case, device), *against]))
    adapters = {name: _adapter(name) for name in names}
    slow = seconds_in_own_type(case, device)
    if slow > PATIENCE_S:
        reason = f"products in {case.dtype} would take {slow:.0f} s a call on this CPU"
        adapters |= {name: reason for name in names if not name.startswith("prefkern")}
    floors = {"floor": workload.floor(), **workload.more_floors()} if rounds else {}
    for floor in floors.values():
        floor.call()
    chosen = [v for v in workload.variants if variants is None or v in variants]
    probes = {(v, name): _probe(workload, adapters[name], v) for v in chosen for name in names}
    calls: dict[str, Callable[[], object]] = {name: floor.call for name, floor in floors.items()}
    calls |= {f"{name} {v}": probe.call for (v, name), probe in probes.items() if probe.call is not None}
    watch = Watch()
    timings = compare(calls, device=device, rounds=rounds, budget_s=budget_s, warmup=0, watch=watch)

    def bare(variant: str, name: str, note: str) -> Row:
        return Row(
            case.op, list(case.shape), case.dtype, case.mode, variant, name, "ok", note, threads=case.threads,
            other_cores=watch.other_cores, gradient_mib=_mebibytes(workload.gradient_bytes()),
        )  # fmt: skip

    rows = [_row(bare("", name, floor.about), timings[name], timings, _Probe()) for name, floor in floors.items()]
    for (variant, name), probe in probes.items():
        timing = timings.get(f"{name} {variant}", Timing(error=probe.reason))
        rows.append(_row(bare(variant, name, PEERS[name].about), timing, timings, probe))
    return rows


def run_cases(
    cases: Iterable[Case],
    against: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    rounds: int = 5,
    budget_s: float = 4.0,
    each: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> list[dict[str, object]]:
    """The rows of all cases, as JSON takes them. `each` is called after every case."""
    results: list[dict[str, object]] = []
    for case in cases:
        chosen = default_peers(case.op) if against is None else tuple(against)
        rows = run_case(case, chosen, device=device, rounds=rounds, budget_s=budget_s)
        each(case, rows)
        results += [asdict(row) for row in rows]
    return results


def default_peers(op: str) -> tuple[str, ...]:
    """Overhead is compared with what needs no compilation: that would take longer than everything else."""
    return ("eager", "torch") if op == "overhead" else peers.AGAINST


@dataclass(frozen=True)
class _Probe:
    """What two first runs of a call have shown."""

    call: OutputsCall | None = None
    reason: str = ""
    errors: Errors | None = None
    bit_stable: bool | None = None


def _adapter(name: str) -> Peer | str:
    """The peer, or why there is none."""
    try:
        return PEERS[name]()
    except Unavailable as reason:
        return str(reason)
    except Exception as error:  # a broken installation is no reason to stop
        return describe(error)


def _probe(workload: Workload, peer: Peer | str, variant: str) -> _Probe:
    if isinstance(peer, str):
        return _Probe(reason=peer)
    call = workload.call(peer, variant)
    try:
        first, second = call(), call()
        stable = all(torch.equal(first[name], second[name]) for name in first)
        errors = workload.errors(first, variant)
    except Unavailable as reason:
        return _Probe(reason=str(reason))
    except Exception as error:  # a peer may fail in any way; ours too, and then the row says so
        return _Probe(reason=describe(error))
    if not math.isfinite(errors.forward + (errors.gradient or 0.0)):
        return _Probe(reason="results are not finite")
    return _Probe(call, "", errors, stable)


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _row(bare: Row, timing: Timing, timings: dict[str, Timing], probe: _Probe) -> Row:
    """The row with what was found, or with why nothing was."""
    if not timing.wall_s and (timing.error or probe.call is None):
        return replace(bare, status=timing.error or "not measured")
    errors = probe.errors
    row = replace(
        bare,
        peak_mib=_mebibytes(timing.peak_bytes),
        launches=timing.launches,
        kernel_ms=None if timing.kernel_s is None else 1e3 * timing.kernel_s,
        max_error=errors.forward if errors else None,
        grad_error=errors.gradient if errors else None,
        bit_stable=probe.bit_stable,
    )
    if not timing.wall_s:
        return row
    floor, eager = timings["floor"], timings.get(f"eager {bare.outputs}", Timing())
    return replace(
        row,
        time_ms=timing.median_ms,
        min_ms=timing.min_ms,
        cpu_ms=timing.cpu_ms,
        ratio_floor=timing.ratio(floor),
        ratio_eager=timing.ratio(eager) if eager.wall_s else None,
        cpu_ratio_floor=timing.cpu_ratio(floor),
        cpu_ratio_eager=timing.cpu_ratio(eager) if eager.wall_s else None,
        ratio_min=timing.min_ratio(floor),
        cpu_ratio_min=timing.cpu_min_ratio(floor),
        ratio_spread=timing.spread(floor),
        rounds=len(timing.wall_s),
    )
