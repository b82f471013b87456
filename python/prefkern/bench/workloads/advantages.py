"""Advantages of samples against the others of their group."""

from __future__ import annotations

import torch

from prefkern import reference
from prefkern.bench import peers
from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against


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
        return copy_of(list(self.inputs["shuffled"][:2]))

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        rewards, group, _ = self.inputs[variant]
        truth = reference.group_advantages(rewards.double(), group, eps=peers.ADVANTAGE_EPS)
        return errors_against(outputs, {"advantages": truth.advantages})
