"""Sums of normal numbers that are made from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against

SEED = 42
LOOKED_AT = 100_000  # elements that are compared with the definition, which takes half a microsecond for each and each row


class SeededNormalWorkload(Workload):
    """M rows of D numbers under weights that add up to 0, as a direction of ZO-RankSGD. Every peer has numbers of its own."""

    variants = ("sum",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.size, rows = case.shape
        self.weights = torch.linspace(1, -1, rows, dtype=torch.float64).to(self.dtype).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"sum": peer.seeded_normal_combine(SEED, self.weights, self.size)}

    def floor(self) -> Floor:
        return copy_of([torch.zeros(self.size, dtype=self.dtype, device=self.device)])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """Against this library's numbers or those of torch's generator, whichever they are."""
        first = {"sum": outputs["sum"][:LOOKED_AT].cpu()}
        exact = reference.seeded_normal_combine(SEED, self.weights.double(), min(self.size, LOOKED_AT))
        found = errors_against(first, {"sum": exact})
        return found if found.forward < 1 else errors_against(outputs, {"sum": self.of_torch()})

    def of_torch(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(SEED)
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for weight in self.weights.double():
            total += weight * torch.randn(self.size, generator=generator, dtype=self.dtype, device=self.device)
        return total
