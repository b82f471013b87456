"""Runs cases: every workload by every peer, and a row of figures for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from prefkern.bench import peers
from prefkern.bench.peers import PEERS, Peer, Unavailable
from prefkern.bench.shapes import Case
from prefkern.bench.timing import Timing, compare, describe
from prefkern.bench.workloads import WORKLOADS, Errors, OutputsCall, Workload


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
    peak_mib: float | None = None
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


def run_case(case: Case, against: Sequence[str], *, device: str = "cpu", rounds: int = 5, budget_s: float = 4.0) -> list[Row]:
    """Measures one case: the floor first, then for each variant this library and everybody it is compared with."""
    if case.op != "overhead":
        return _run_case(case, against, device, rounds, budget_s)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run_case(case, against, device, rounds, budget_s)
    finally:
        torch.set_num_threads(threads)


def _run_case(case: Case, against: Sequence[str], device: str, rounds: int, budget_s: float) -> list[Row]:
    workload = WORKLOADS[case.op](case, device)
    names = ["prefkern", *against]
    if case.dtype in ("bf16", "fp16"):
        names.insert(1, "prefkern-fp32")
    if case.op == "logits_logprobs" and workload.backward:
        names.insert(1, "prefkern-inplace")
    if case.op == "linear_preference_loss":
        names.insert(1, "prefkern-two-step")
    adapters = {name: _adapter(name) for name in names}
    floor = workload.floor()
    floor.call()
    probes = {(v, name): _probe(workload, adapters[name], v) for v in workload.variants for name in names}
    calls: dict[str, Callable[[], object]] = {"floor": floor.call}
    calls |= {f"{name} {v}": probe.call for (v, name), probe in probes.items() if probe.call is not None}
    timings = compare(calls, device=device, rounds=rounds, budget_s=budget_s, warmup=0)

    rows = [_row(case, "", "floor", timings["floor"], timings, _Probe(), note=floor.about)]
    for (variant, name), probe in probes.items():
        timing = timings.get(f"{name} {variant}", Timing(error=probe.reason))
        rows.append(_row(case, variant, name, timing, timings, probe, note=PEERS[name].about))
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


def _row(case: Case, variant: str, name: str, timing: Timing, timings: dict[str, Timing], probe: _Probe, note: str) -> Row:
    common = (case.op, list(case.shape), case.dtype, case.mode, variant, name)
    if not timing.wall_s:
        return Row(*common, status=timing.error or "not measured", note=note)
    floor, eager = timings["floor"], timings.get(f"eager {variant}", Timing())
    return Row(
        *common,
        status="ok",
        note=note,
        time_ms=timing.median_ms,
        min_ms=timing.min_ms,
        cpu_ms=timing.cpu_ms,
        ratio_floor=timing.ratio(floor),
        ratio_eager=timing.ratio(eager) if eager.wall_s else None,
        cpu_ratio_floor=timing.cpu_ratio(floor),
        cpu_ratio_eager=timing.cpu_ratio(eager) if eager.wall_s else None,
        peak_mib=None if timing.peak_bytes is None else timing.peak_bytes / 2**20,
        launches=timing.launches,
        kernel_ms=None if timing.kernel_s is None else 1e3 * timing.kernel_s,
        max_error=probe.errors.forward if probe.errors else None,
        grad_error=probe.errors.gradient if probe.errors else None,
        bit_stable=probe.bit_stable,
        rounds=len(timing.wall_s),
    )
