"""Token-level and sequence-level policy objectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import OBJECTIVES, Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against, gradient


class PolicyWorkload(Workload):
    """Log-probs that have moved by a standard deviation of 0.2, a tenth of the tokens masked. Loss and metrics each time."""

    variants = tuple(OBJECTIVES)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        old = -torch.rand(case.shape, generator=self.random)
        logp = old + 0.2 * torch.randn(case.shape, generator=self.random)
        ref = old + 0.2 * torch.randn(case.shape, generator=self.random)
        self.logp, self.old_logp, self.ref_logp = (x.to(self.dtype).to(device) for x in (logp, old, ref))
        self.entropy = torch.rand(case.shape, generator=self.random).to(self.dtype).to(device)
        self.advantages = self.normal(case.shape[0])
        self.mask = (torch.rand(case.shape, generator=self.random) < 0.9).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        ref_logp, entropy = (self.ref_logp, self.entropy) if OBJECTIVES[variant].reference else (None, None)

        def loss_of(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return peer.policy_loss(logp, self.old_logp, self.advantages, self.mask, ref_logp, entropy, variant)

        def forward() -> Outputs:
            with torch.no_grad():
                loss, metrics = loss_of(self.logp)
                return {"loss": loss, **metrics}

        def forward_backward() -> Outputs:
            logp = self.logp.detach().requires_grad_()
            loss, metrics = loss_of(logp)
            loss.backward()
            return {"loss": loss.detach(), **metrics, "grad logp": gradient(logp)}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return copy_of([self.logp, self.old_logp, self.advantages, self.mask])  # what every objective reads

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        logp = self.logp.double().requires_grad_(self.backward)
        options: dict[str, Any] = dict(OBJECTIVES[variant].options)
        if OBJECTIVES[variant].reference:
            options |= {"ref_logp": self.ref_logp.double(), "entropy": self.entropy.double()}
        loss, metrics = reference.policy_loss(logp, self.old_logp.double(), self.advantages.double(), self.mask, **options)
        truth = {"loss": loss.detach()} | {name: value for name, value in metrics.items() if name in outputs}
        if self.backward:
            truth["grad logp"] = torch.autograd.grad(loss, logp)[0]
        return errors_against(outputs, truth)
