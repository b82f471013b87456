"""Losses of pairs of denoised latents."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import Peer
from prefkern.bench.peers.base import DIFFUSION_BETA
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import (
    Errors,
    Floor,
    Outputs,
    OutputsCall,
    Workload,
    copy_of,
    errors_against,
    fastest_read,
    gradient,
)

METRICS = ("margin", "accuracy")


class DiffusionPairWorkload(Workload):
    """Predictions of a policy near its reference, whose errors are large and cancel; noise that winner and loser share."""

    variants = ("sigmoid",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.target = self.normal(*case.shape)
        self.ref_w, self.ref_l = (self._near(self.target, 0.1) for _ in range(2))
        self.pred_w, self.pred_l = (self._near(ref, 0.01) for ref in (self.ref_w, self.ref_l))
        self.inputs = [self.pred_w, self.pred_l, self.target, self.ref_w, self.ref_l]

    def _near(self, x: Tensor, distance: float) -> Tensor:
        return (x.float() + distance * self.normal(*x.shape).float()).to(self.dtype)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def forward() -> Outputs:
            with torch.no_grad():
                loss, metrics = peer.diffusion_pref_loss(*self.inputs)
                return {"loss": loss, **{name: metrics[name] for name in METRICS}}

        def forward_backward() -> Outputs:
            winners, losers = (x.detach().requires_grad_() for x in (self.pred_w, self.pred_l))
            loss, metrics = peer.diffusion_pref_loss(winners, losers, *self.inputs[2:])
            loss.backward()
            grads = {"grad winners": gradient(winners), "grad losers": gradient(losers)}
            return {"loss": loss.detach(), **{name: metrics[name] for name in METRICS}, **grads}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        """The bytes that have to be moved: five tensors read once, then three read again and two written."""
        if self.backward:
            copy = copy_of(self.inputs)
            return Floor("copy_ of five tensors: as many reads and writes", copy.call)
        about, read = fastest_read(torch.stack(self.inputs).flatten(1), self.device)
        return Floor(about, read)

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        winners, losers = (x.double().requires_grad_(self.backward) for x in (self.pred_w, self.pred_l))
        target, ref_w, ref_l = (x.double() for x in self.inputs[2:])
        loss, metrics = reference.diffusion_pref_loss(winners, losers, target, ref_w=ref_w, ref_l=ref_l, beta=DIFFUSION_BETA)
        truth = {"loss": loss.detach(), **{name: metrics[name] for name in METRICS}}
        if self.backward:
            truth |= dict(zip(("grad winners", "grad losers"), torch.autograd.grad(loss, (winners, losers)), strict=True))
        return errors_against(outputs, truth)
