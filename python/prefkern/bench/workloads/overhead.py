"""What a call costs before its kernel does anything."""

from __future__ import annotations

from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.advantages import AdvantagesWorkload
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload
from prefkern.bench.workloads.logprobs import LinearWorkload, LogitsWorkload
from prefkern.bench.workloads.policy import PolicyWorkload

TINY: dict[str, tuple[type[Workload], tuple[int, ...]]] = {
    "linear_logprobs": (LinearWorkload, (2, 16, 32)),
    "logits_logprobs": (LogitsWorkload, (2, 32)),
    "group_advantages": (AdvantagesWorkload, (16, 4)),
    "policy_loss": (PolicyWorkload, (2, 8)),
}


class OverheadWorkload(Workload):
    """Every op on inputs so small that only the way to the kernel takes time."""

    variants = tuple(TINY)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.tiny = {op: workload(Case(op, shape, "fp32", "fwd"), device) for op, (workload, shape) in TINY.items()}

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return self.tiny[variant].call(peer, self.tiny[variant].variants[0])

    def floor(self) -> Floor:
        x = self.normal(4)
        return Floor("x + 1 on 4 numbers, one thread", lambda: x + 1)

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        return self.tiny[variant].errors(outputs, self.tiny[variant].variants[0])
