"""Losses of preference pairs, of lists, and of pairs straight from hidden states."""

from __future__ import annotations

import math

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


class LinearPreferenceWorkload(Workload):
    """DPO on P pairs of responses of T tokens, straight from hidden states; logits have standard deviation 2."""

    variants = ("dpo",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        pairs, length, width, vocab = case.shape
        weight = self.normal(vocab, width, scale=2 / math.sqrt(width))
        self.leaves = {"hidden": self.normal(2 * pairs, length, width), "weight": weight}
        self.targets = self.integers(vocab, 2 * pairs, length)
        self.ref_logp = (-8 - torch.rand(2 * pairs, length, generator=self.random)).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def forward() -> Outputs:
            with torch.no_grad():
                return {"loss": peer.linear_preference_loss(**self.leaves, targets=self.targets, ref_logp=self.ref_logp)}

        def forward_backward() -> Outputs:
            leaves = {name: x.detach().requires_grad_() for name, x in self.leaves.items()}
            loss = peer.linear_preference_loss(**leaves, targets=self.targets, ref_logp=self.ref_logp)
            loss.backward()
            return {"loss": loss.detach()} | {f"grad {name}": gradient(x) for name, x in leaves.items()}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        hidden, weight = self.leaves["hidden"].flatten(0, 1), self.leaves["weight"]
        logits = torch.empty(len(hidden), len(weight), dtype=self.dtype, device=self.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def products() -> None:
            torch.mm(hidden, weight.T, out=logits)
            if self.backward:
                torch.mm(logits, weight, out=d_hidden)
                torch.mm(logits.T, hidden, out=d_weight)

        return Floor(f"{3 if self.backward else 1} torch.mm in {self.case.dtype}", products)

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """Of the loss and the gradient of hidden, in float64 a pair at a time: all logits at once might not fit."""
        hidden, weight = (x.double() for x in self.leaves.values())
        rows = len(hidden) // 2
        losses, grads = [], torch.empty_like(hidden)
        for p in range(rows):
            own = [p, rows + p]
            x = hidden[own].requires_grad_(self.backward)
            logp = torch.log_softmax(x @ weight.T, -1).gather(-1, self.targets[own][..., None])[..., 0]
            chosen, rejected = (logp - self.ref_logp[own]).sum(1)
            loss = reference.preference_loss(chosen[None], rejected[None]).loss / rows
            losses.append(loss.detach())
            if self.backward:
                grads[own] = torch.autograd.grad(loss, x)[0]
        truth = {"loss": torch.stack(losses).sum()}
        return errors_against(outputs, truth | ({"grad hidden": grads} if self.backward else {}))
