"""Token-level policy objectives."""

from __future__ import annotations

import torch

from prefkern import reference
from prefkern.bench import peers
from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against, gradient


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
            return {"loss": loss.detach(), **metrics, "grad logp": gradient(logp)}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return copy_of([self.logp, self.old_logp, self.advantages, self.mask])

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
        return errors_against(outputs, truth)
