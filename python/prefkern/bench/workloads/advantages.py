"""Advantages of samples against the others of their group."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import ESTIMATORS, Peer
from prefkern.bench.peers.base import ADVANTAGE_EPS
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against, grouped


class AdvantagesWorkload(Workload):
    """B rewards in groups of G, lying one group behind the other or shuffled; other estimators one behind the other."""

    variants = ("contiguous", "shuffled", "gdpo", "ngrpo", "mad")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        samples, size = case.shape
        rewards = torch.rand(samples, 2, generator=self.random).to(self.dtype)
        first = rewards[:, 0].contiguous()
        orders = {"contiguous": False, "shuffled": True}
        self.inputs: dict[str, tuple[Tensor, Tensor, int | None, str]] = {
            name: (*grouped(first, size, self.random, shuffled, device), "grpo") for name, shuffled in orders.items()
        }
        for name in ("gdpo", "ngrpo", "mad"):
            values = rewards if ESTIMATORS[name].rewards == 2 else first
            self.inputs[name] = (*grouped(values, size, self.random, False, device), name)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"advantages": peer.group_advantages(*self.inputs[variant])}

    def floor(self) -> Floor:
        return copy_of(list(self.inputs["shuffled"][:2]))

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        rewards, group, _, estimator = self.inputs[variant]
        options = ESTIMATORS[estimator].options
        truth = reference.group_advantages(rewards.double(), group, eps=ADVANTAGE_EPS, **options)
        return errors_against(outputs, {"advantages": truth.advantages})
