"""Sums over the tokens of each sequence, and recursions that run backwards through them."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import Peer
from prefkern.bench.peers.base import GAMMA, LAMBDA
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against, gradient


def lengths_of(case: Case, random: torch.Generator) -> Tensor:
    """Of B sequences of up to T tokens, the shortest half as long."""
    return torch.randint(case.shape[1] // 2, case.shape[1] + 1, (case.shape[0],), generator=random)


class SequenceSumWorkload(Workload):
    """Log-probabilities of completions, padded with a mask or packed one behind the other."""

    variants = ("padded", "packed")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        lengths = lengths_of(case, self.random)
        mask = torch.arange(case.shape[1]) < lengths[:, None]
        values = -torch.rand(case.shape, generator=self.random).to(self.dtype)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        self.upstream = self.normal(case.shape[0])
        self.inputs: dict[str, tuple[Tensor, Tensor | None, Tensor | None]] = {
            "padded": (values.to(device), mask.to(device), None),
            "packed": (values[mask].to(device), None, cu_seqlens.to(device)),
        }

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        values, mask, cu_seqlens = self.inputs[variant]

        def forward() -> Outputs:
            with torch.no_grad():
                return {"sums": peer.sequence_sum(values, mask, cu_seqlens)}

        def forward_backward() -> Outputs:
            leaf = values.detach().requires_grad_()
            sums = peer.sequence_sum(leaf, mask, cu_seqlens)
            sums.backward(self.upstream)
            return {"sums": sums.detach(), "grad values": gradient(leaf)}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return copy_of([x for x in self.inputs["padded"] if x is not None])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        values, mask, cu_seqlens = self.inputs[variant]
        leaf = values.double().requires_grad_(self.backward)
        sums = reference.sequence_sum(leaf, mask, cu_seqlens=cu_seqlens)
        truth = {"sums": sums.detach()}
        if self.backward:
            truth["grad values"] = torch.autograd.grad(sums, leaf, self.upstream.double())[0]
        return errors_against(outputs, truth)


class GaeWorkload(Workload):
    """Token rewards and values of padded completions."""

    variants = ("padded",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.mask = (torch.arange(case.shape[1]) < lengths_of(case, self.random)[:, None]).to(device)
        self.rewards, self.values = self.normal(*case.shape, scale=0.1), self.normal(*case.shape)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def estimate() -> Outputs:
            advantages, returns = peer.gae(self.rewards, self.values, self.mask)
            return {"advantages": advantages, "returns": returns}

        return estimate

    def floor(self) -> Floor:
        return copy_of([self.rewards, self.values, self.mask])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        rewards, values = self.rewards.double(), self.values.double()
        truth = reference.gae(rewards, values, self.mask, gamma=GAMMA, lam=LAMBDA)
        return errors_against(outputs, {"advantages": truth.advantages, "returns": truth.returns})
