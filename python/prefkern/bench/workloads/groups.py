"""Reductions over the rows of a group."""

from __future__ import annotations

import torch

from prefkern import reference
from prefkern.bench.peers import Peer, Reduction
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import (
    Errors,
    Floor,
    Outputs,
    OutputsCall,
    Workload,
    copy_of,
    errors_against,
    gradient,
    grouped,
)

# how they are reduced, and whether they are shuffled
VARIANTS: dict[str, tuple[Reduction, bool]] = {
    "sum": ("sum", False),
    "logsumexp": ("logsumexp", False),
    "sum shuffled": ("sum", True),
    "logsumexp shuffled": ("logsumexp", True),
}


class GroupReduceWorkload(Workload):
    """B values in groups of G, lying one group behind the other or shuffled."""

    variants = tuple(VARIANTS)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        samples, size = case.shape
        values = torch.randn(samples, generator=self.random).to(self.dtype)
        self.upstream = self.normal(samples)
        self.inputs = {name: grouped(values, size, self.random, shuffled, device) for name, (_, shuffled) in VARIANTS.items()}

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        values, group, size = self.inputs[variant]
        reduce, _ = VARIANTS[variant]

        def forward() -> Outputs:
            with torch.no_grad():
                return {"result": peer.group_reduce(values, group, size, reduce)}

        def forward_backward() -> Outputs:
            leaf = values.detach().requires_grad_()
            result = peer.group_reduce(leaf, group, size, reduce)
            result.backward(self.upstream)
            return {"result": result.detach(), "grad values": gradient(leaf)}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return copy_of(list(self.inputs["sum"][:2]))

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        values, group, _ = self.inputs[variant]
        leaf = values.double().requires_grad_(self.backward)
        result = reference.group_reduce(leaf, group, reduce=VARIANTS[variant][0])
        truth = {"result": result.detach()}
        if self.backward:
            truth["grad values"] = torch.autograd.grad(result, leaf, self.upstream.double())[0]
        return errors_against(outputs, truth)
