"""Reductions over the rows of a group."""

from __future__ import annotations

import torch

from prefkern import reference
from prefkern.bench.peers import Peer
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


class GroupReduceWorkload(Workload):
    """B values in groups of G, lying one group behind the other or shuffled."""

    variants = ("sum", "logsumexp", "sum shuffled", "logsumexp shuffled")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        samples, size = case.shape
        values = torch.randn(samples, generator=self.random).to(self.dtype)
        self.upstream = self.normal(samples)
        contiguous, shuffled = (grouped(values, size, self.random, each, device) for each in (False, True))
        self.inputs = {name: shuffled if name.endswith("shuffled") else contiguous for name in self.variants}

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        values, group, size = self.inputs[variant]
        reduce = variant.removesuffix(" shuffled")

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
        result = reference.group_reduce(leaf, group, reduce=variant.removesuffix(" shuffled"))
        truth = {"result": result.detach()}
        if self.backward:
            truth["grad values"] = torch.autograd.grad(result, leaf, self.upstream.double())[0]
        return errors_against(outputs, truth)
