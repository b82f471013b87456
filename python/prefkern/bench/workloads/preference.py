"""Losses of preference pairs and of lists."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import LIST_OBJECTIVES, PAIR_OBJECTIVES, Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against, gradient

METRICS = ("chosen_reward", "rejected_reward", "reward_margin", "accuracy")


class PreferenceWorkload(Workload):
    """Log-probs of P pairs a few nats from the reference. Loss, rewards, margin and accuracy each time."""

    variants = tuple(PAIR_OBJECTIVES)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        (pairs,) = case.shape
        ref = -50 - 100 * torch.rand(2, pairs, generator=self.random)
        logp = ref + 4 * torch.randn(2, pairs, generator=self.random)
        self.logp = logp.to(self.dtype).to(device)
        self.ref = ref.to(self.dtype).to(device)
        self.lengths = torch.randint(20, 200, (2, pairs), generator=self.random).to(self.dtype).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        objective = PAIR_OBJECTIVES[variant]
        refs = tuple(self.ref.unbind()) if objective.reference else None
        lengths = tuple(self.lengths.unbind()) if objective.lengths else None

        def loss_of(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = peer.preference_loss(chosen, rejected, refs, lengths, variant)
            return loss, {name: metrics[name] for name in METRICS}

        def forward() -> Outputs:
            with torch.no_grad():
                loss, metrics = loss_of(*self.logp.unbind())
                return {"loss": loss, **metrics}

        def forward_backward() -> Outputs:
            chosen, rejected = (x.detach().requires_grad_() for x in self.logp.unbind())
            loss, metrics = loss_of(chosen, rejected)
            loss.backward()
            grads = {"grad chosen": gradient(chosen), "grad rejected": gradient(rejected)}
            return {"loss": loss.detach(), **metrics, **grads}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return copy_of([self.logp, self.ref])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        objective = PAIR_OBJECTIVES[variant]
        chosen, rejected = (x.double().requires_grad_(self.backward) for x in self.logp.unbind())
        refs = self.ref.double().unbind() if objective.reference else (None, None)
        options = dict(objective.options)
        if objective.lengths:
            options |= {"chosen_lengths": self.lengths[0], "rejected_lengths": self.lengths[1]}
        loss, metrics = reference.preference_loss(chosen, rejected, *refs, **options)
        truth = {"loss": loss.detach()} | {name: metrics[name] for name in METRICS}
        if self.backward:
            grads = torch.autograd.grad(loss, (chosen, rejected))
            truth |= dict(zip(("grad chosen", "grad rejected"), grads, strict=True))
        return errors_against(outputs, truth)


class ListwiseWorkload(Workload):
    """B lists of K responses with normal scores and labels in [0, 1]. The loss alone."""

    variants = tuple(LIST_OBJECTIVES)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.scores = self.normal(*case.shape)
        self.labels = torch.rand(case.shape, generator=self.random).to(self.dtype).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def forward() -> Outputs:
            with torch.no_grad():
                return {"loss": peer.listwise_loss(self.scores, self.labels, variant)}

        def forward_backward() -> Outputs:
            scores = self.scores.detach().requires_grad_()
            loss = peer.listwise_loss(scores, self.labels, variant)
            loss.backward()
            return {"loss": loss.detach(), "grad scores": gradient(scores)}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return copy_of([self.scores, self.labels])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        scores = self.scores.double().requires_grad_(self.backward)
        loss = reference.listwise_loss(scores, self.labels.double(), **LIST_OBJECTIVES[variant]).loss
        truth = {"loss": loss.detach()}
        if self.backward:
            truth["grad scores"] = torch.autograd.grad(loss, scores)[0]
        return errors_against(outputs, truth)
