"""What is run for each op: inputs, the calls of every peer, the floor, and how far the results are from float64.

The floor is the least that an implementation of the same kind has to do, in plain PyTorch with buffers made before:

    linear_logprobs   the bare torch.mm products in the type of the inputs: one forward; four with backward, of which
                      the second recomputes the logits that are not kept
    logits_logprobs   the fastest plain read of the logits; with backward two reads and one write
    group_advantages  a copy of rewards and group ids
    policy_loss       a copy of the inputs
    overhead          x + 1 on a tiny tensor; all on one thread, since waking the others is not what is asked for
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench import peers
from prefkern.bench.peers import PEERS, Peer, Unavailable
from prefkern.bench.shapes import DTYPES, Case
from prefkern.bench.timing import Timing, compare, describe

ERROR_ROWS = 32  # linear and logits results are compared with float64 on this many rows, spread over all
ENTROPY_GRADIENT = 1e-3  # upstream gradient of the entropies in a backward pass: an entropy bonus

Outputs = dict[str, Tensor]  # gradients are named "grad ..."
OutputsCall = Callable[[], Outputs]


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
    max_error: float | None = None
    """Largest absolute error of the results against float64."""
    grad_error: float | None = None
    """Largest error of the gradients (that of hidden for linear_logprobs), over the largest gradient."""
    bit_stable: bool | None = None
    rounds: int = 0


@dataclass(frozen=True)
class Floor:
    about: str
    call: Callable[[], object]


@dataclass(frozen=True)
class Errors:
    forward: float
    gradient: float | None = None


class Workload(ABC):
    """The inputs of one case and what can be done with them."""

    variants: tuple[str, ...]

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.dtype = DTYPES[case.dtype]
        self.backward = case.mode == "bwd"
        self.random = torch.Generator().manual_seed(0)

    @abstractmethod
    def call(self, peer: Peer, variant: str) -> OutputsCall:
        """What to time for this peer."""

    @abstractmethod
    def floor(self) -> Floor: ...

    @abstractmethod
    def errors(self, outputs: Outputs, variant: str) -> Errors: ...

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.random) * scale).to(self.dtype).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.random).to(self.device)


class _Logprobs(Workload):
    """What linear_logprobs and logits_logprobs have in common."""

    variants = ("logp", "logp+entropy")
    leaves: dict[str, Tensor]

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        n, v = case.shape[0], case.shape[-1]
        self.targets = self.integers(v, n)
        self.upstream = torch.randn(n, generator=self.random).to(device)
        self.rows = torch.linspace(0, n - 1, min(n, ERROR_ROWS)).long().to(device)
        self._truth: dict[str, Outputs] = {}

    @abstractmethod
    def apply(self, peer: Peer, leaves: dict[str, Tensor], entropy: bool) -> peers.Logprobs: ...

    @abstractmethod
    def truth(self, entropy: bool) -> Outputs:
        """The results in float64, of `self.rows` only."""

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        entropy = variant == "logp+entropy"
        wide = isinstance(peer, peers.PrefkernFp32)
        leaves = {name: leaf.float() if wide else leaf for name, leaf in self.leaves.items()}

        def forward() -> Outputs:
            with torch.no_grad():
                return _named(*self.apply(peer, leaves, entropy))

        def forward_backward() -> Outputs:
            fresh = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
            logp, ent = self.apply(peer, fresh, entropy)
            self.scalar(logp, ent, self.upstream).backward()
            return _named(logp, ent) | {f"grad {name}": _gradient(leaf) for name, leaf in fresh.items()}

        return forward_backward if self.backward else forward

    def scalar(self, logp: Tensor, entropy: Tensor | None, upstream: Tensor) -> Tensor:
        loss = (logp * upstream).sum()
        return loss if entropy is None else loss + ENTROPY_GRADIENT * entropy.sum()

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        if variant not in self._truth:
            self._truth[variant] = self.truth(variant == "logp+entropy")
        truth = self._truth[variant]
        return _errors({name: outputs[name][self.rows] for name in truth}, truth)


class LinearWorkload(_Logprobs):
    """Hidden states and head weight such that the logits have standard deviation 2."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        n, h, v = case.shape
        self.leaves = {"hidden": self.normal(n, h), "weight": self.normal(v, h, scale=2 / math.sqrt(h))}

    def apply(self, peer: Peer, leaves: dict[str, Tensor], entropy: bool) -> peers.Logprobs:
        return peer.linear_logprobs(leaves["hidden"], leaves["weight"], self.targets, entropy)

    def floor(self) -> Floor:
        hidden, weight = self.leaves["hidden"], self.leaves["weight"]
        logits = torch.empty(len(hidden), len(weight), dtype=self.dtype, device=self.device)

        def product() -> None:
            torch.mm(hidden, weight.T, out=logits)

        if not self.backward:
            return Floor(f"torch.mm in {self.case.dtype}", product)
        d_logits = torch.randn_like(logits)
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def products() -> None:
            product()
            product()
            torch.mm(d_logits, weight, out=d_hidden)
            torch.mm(d_logits.T, hidden, out=d_weight)

        return Floor(f"4 torch.mm in {self.case.dtype}", products)

    def truth(self, entropy: bool) -> Outputs:
        """The weight is widened block by block: all of it in float64 might not fit."""
        hidden, blocks = self.leaves["hidden"][self.rows].double(), self.leaves["weight"].split(4096)
        logits = torch.cat([hidden @ block.double().T for block in blocks], dim=1)
        truth, d_logits = _truth_of_logits(self, logits, entropy)
        if d_logits is not None:
            pairs = zip(d_logits.split(4096, dim=1), blocks, strict=True)
            truth["grad hidden"] = sum((d @ block.double() for d, block in pairs), torch.zeros_like(hidden))
        return truth


class LogitsWorkload(_Logprobs):
    """Normal logits of standard deviation 2."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.leaves = {"logits": self.normal(*case.shape, scale=2.0)}

    def apply(self, peer: Peer, leaves: dict[str, Tensor], entropy: bool) -> peers.Logprobs:
        return peer.logits_logprobs(leaves["logits"], self.targets, entropy)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        if not (self.backward and isinstance(peer, peers.PrefkernInplace)):
            return super().call(peer, variant)
        logits, work = self.leaves["logits"], self.leaves["logits"].clone()
        g_entropy = torch.full_like(self.upstream, ENTROPY_GRADIENT) if variant == "logp+entropy" else None
        fresh = 2  # the first calls are looked at; timed ones run on what the last one left, which costs the same

        def forward_backward() -> Outputs:
            nonlocal fresh
            if fresh > 0:
                work.copy_(logits)
                fresh -= 1
            logp, entropy = peer.logits_forward_backward(work, self.targets, self.upstream, g_entropy)
            return _named(logp, entropy) | {"grad logits": work.clone() if fresh else work}

        return forward_backward

    def floor(self) -> Floor:
        logits = self.leaves["logits"]
        about, read = fastest_read(logits, self.device)
        if not self.backward:
            return Floor(f"one read: {about}", read)
        gradient = torch.empty_like(logits)

        def read_and_copy() -> None:
            read()
            gradient.copy_(logits)

        return Floor(f"two reads, one write: {about}, then copy_", read_and_copy)

    def truth(self, entropy: bool) -> Outputs:
        truth, d_logits = _truth_of_logits(self, self.leaves["logits"][self.rows].double(), entropy)
        return truth if d_logits is None else truth | {"grad logits": d_logits}


class AdvantagesWorkload(Workload):
    """B rewards in groups of G, lying one group behind the other or shuffled."""

    variants = ("contiguous", "shuffled")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        samples, size = case.shape
        rewards = torch.rand(samples, generator=self.random).to(self.dtype)
        group = torch.arange(samples // size).repeat_interleave(size)
        order = torch.randperm(samples, generator=self.random)
        self.inputs = {
            "contiguous": (rewards.to(device), group.to(device), size),
            "shuffled": (rewards[order].to(device), group[order].to(device), None),
        }

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"advantages": peer.group_advantages(*self.inputs[variant])}

    def floor(self) -> Floor:
        return _copy_of(list(self.inputs["shuffled"][:2]))

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        rewards, group, _ = self.inputs[variant]
        truth = reference.group_advantages(rewards.double(), group, eps=peers.ADVANTAGE_EPS)
        return _errors(outputs, {"advantages": truth.advantages})


class PolicyWorkload(Workload):
    """Log-probs that have moved by a standard deviation of 0.2, a tenth of the tokens masked."""

    variants = ("loss+metrics",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        old = -torch.rand(case.shape, generator=self.random)
        logp = old + 0.2 * torch.randn(case.shape, generator=self.random)
        self.logp, self.old_logp = (x.to(self.dtype).to(device) for x in (logp, old))
        self.advantages = self.normal(case.shape[0])
        self.mask = (torch.rand(case.shape, generator=self.random) < 0.9).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def forward() -> Outputs:
            with torch.no_grad():
                loss, metrics = peer.policy_loss(self.logp, self.old_logp, self.advantages, self.mask)
                return {"loss": loss, **metrics}

        def forward_backward() -> Outputs:
            logp = self.logp.detach().requires_grad_()
            loss, metrics = peer.policy_loss(logp, self.old_logp, self.advantages, self.mask)
            loss.backward()
            return {"loss": loss.detach(), **metrics, "grad logp": _gradient(logp)}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return _copy_of([self.logp, self.old_logp, self.advantages, self.mask])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        logp = self.logp.double().requires_grad_(self.backward)
        loss, metrics = reference.policy_loss(
            logp,
            self.old_logp.double(),
            self.advantages.double(),
            self.mask,
            eps_low=peers.EPS_LOW,
            eps_high=peers.EPS_HIGH,
            dual_clip=peers.DUAL_CLIP,
        )
        truth = {"loss": loss.detach()} | {name: value for name, value in metrics.items() if name in outputs}
        if self.backward:
            truth["grad logp"] = torch.autograd.grad(loss, logp)[0]
        return _errors(outputs, truth)


class OverheadWorkload(Workload):
    """Every op on inputs so small that only the way to the kernel takes time."""

    variants = ("linear_logprobs", "logits_logprobs", "group_advantages", "policy_loss")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        shapes = ((2, 16, 32), (2, 32), (16, 4), (2, 8))
        self.tiny = {
            op: WORKLOADS[op](Case(op, shape, "fp32", "fwd"), device) for op, shape in zip(self.variants, shapes, strict=True)
        }

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return self.tiny[variant].call(peer, self.tiny[variant].variants[0])

    def floor(self) -> Floor:
        x = self.normal(4)
        return Floor("x + 1 on 4 numbers, one thread", lambda: x + 1)

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        return self.tiny[variant].errors(outputs, self.tiny[variant].variants[0])


WORKLOADS: dict[str, type[Workload]] = {
    "linear_logprobs": LinearWorkload,
    "logits_logprobs": LogitsWorkload,
    "group_advantages": AdvantagesWorkload,
    "policy_loss": PolicyWorkload,
    "overhead": OverheadWorkload,
}


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


def fastest_read(x: Tensor, device: str) -> tuple[str, Callable[[], object]]:
    """The quickest of torch's ways to read every byte of x once, tried out on the spot, and what it is."""
    flat = x.view(-1)
    reads: dict[str, Callable[[], object]] = {
        "amax of each row": lambda: x.amax(-1),
        "sum of each row": lambda: x.sum(-1),
    }
    if x.dtype in (torch.float32, torch.float64):
        reads["torch.dot with itself"] = lambda: torch.dot(flat, flat)
    if flat.numel() * flat.element_size() % 8 == 0:  # wide words may read faster than narrow numbers
        words = flat.view(torch.int64)
        reads["sum of the bytes as int64"] = words.sum
    seconds = {name: min(_seconds(read, device) for _ in range(5)) for name, read in reads.items()}
    best = min(seconds, key=lambda name: seconds[name])
    return best, reads[best]


def _seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
        max_error=probe.errors.forward if probe.errors else None,
        grad_error=probe.errors.gradient if probe.errors else None,
        bit_stable=probe.bit_stable,
        rounds=len(timing.wall_s),
    )


def _named(logp: Tensor, entropy: Tensor | None) -> Outputs:
    results = {"logp": logp.detach()}
    return results if entropy is None else results | {"entropy": entropy.detach()}


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError("no gradient arrived")
    return leaf.grad


def _truth_of_logits(workload: _Logprobs, logits: Tensor, entropy: bool) -> tuple[Outputs, Tensor | None]:
    """Results in float64 of the logits of `workload.rows`, and the gradient of those logits in a backward case."""
    logits = logits.requires_grad_(workload.backward)
    outputs = ("entropy",) if entropy else ()
    out = reference.logits_logprobs(logits, workload.targets[workload.rows], outputs=outputs)
    truth = _named(out.logp, out.entropy)
    if not workload.backward:
        return truth, None
    loss = workload.scalar(out.logp, out.entropy, workload.upstream[workload.rows].double())
    return truth, torch.autograd.grad(loss, logits)[0]


def _errors(outputs: Outputs, truth: Outputs) -> Errors:
    """Of the outputs that have a truth; infinite where a result is NaN."""
    forward, gradient = 0.0, None
    for name, expected in truth.items():
        worst = (outputs[name].double() - expected).abs().nan_to_num(nan=math.inf).max().item()
        if name.startswith("grad "):
            relative = worst / max(expected.abs().max().item(), 1e-30)
            gradient = relative if gradient is None else max(gradient, relative)
        else:
            forward = max(forward, worst)
    return Errors(forward, gradient)


def _copy_of(inputs: list[Tensor]) -> Floor:
    buffers = [torch.empty_like(x) for x in inputs]

    def copy() -> None:
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)

    return Floor("copy_ of the inputs", copy)
