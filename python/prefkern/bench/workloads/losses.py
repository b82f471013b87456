"""Whole losses straight from hidden states: one pass over the head where the gradient can be found in the forward."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import HEAD_OBJECTIVES, PAIR_OBJECTIVES, Peer, PrefkernFp32
from prefkern.bench.peers.base import ORPO_BETA, PAIR_BETA
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, errors_against, gradient
from prefkern.bench.workloads.logprobs import ERROR_ROWS, spread_rows
from prefkern.bench.workloads.products import active_rows, head_floor

BLOCK = 4096  # of the vocabulary, and a quarter of it of the rows: what is widened to float64 at a time


class _HeadLoss(Workload):
    """Responses of T tokens, all of which count; logits have standard deviation 2."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        count, length, width, vocab = case.shape
        responses = self.responses(count)
        weight = self.normal(vocab, width, scale=2 / math.sqrt(width))
        self.leaves = {"hidden": self.normal(responses, length, width), "weight": weight}
        self.trained = ("hidden",) if case.mode == "frozen" else ("hidden", "weight")
        self.targets = self.integers(vocab, responses, length)
        self._logp64, self._entropy64 = self._statistics()
        self._truth: dict[str, Outputs] = {}

    @staticmethod
    def responses(count: int) -> int:
        """How many responses a shape's first number means."""
        return count

    @abstractmethod
    def loss_of(self, peer: Peer, leaves: dict[str, Tensor], variant: str) -> Tensor: ...

    @abstractmethod
    def true_loss(self, logp: Tensor, entropy: Tensor, variant: str) -> Tensor:
        """From float64 log-probs and entropies, shaped like the targets."""

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        wide = isinstance(peer, PrefkernFp32)
        leaves = {name: leaf.float() if wide else leaf for name, leaf in self.leaves.items()}

        def forward() -> Outputs:
            with torch.no_grad():
                return {"loss": self.loss_of(peer, leaves, variant)}

        def forward_backward() -> Outputs:
            fresh = {name: leaf.detach().requires_grad_(name in self.trained) for name, leaf in leaves.items()}
            loss = self.loss_of(peer, fresh, variant)
            loss.backward()
            return {"loss": loss.detach()} | {f"grad {name}": gradient(fresh[name]) for name in self.trained}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        return head_floor(self.leaves["hidden"].flatten(0, 1), self.leaves["weight"], self.case.mode)

    def gradient_bytes(self) -> int:
        return sum(self.leaves[name].nbytes for name in self.trained) if self.backward else 0

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """Of the loss, and of the gradient of hidden on some rows."""
        truth = self._truth.get(variant) or self._truth_of(variant)
        self._truth[variant] = truth
        rows = spread_rows(self.targets.numel(), ERROR_ROWS)
        own = {"loss": outputs["loss"]}
        if self.backward:
            own["grad hidden"] = outputs["grad hidden"].flatten(0, 1)[rows]
        return errors_against(own, truth)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies in float64."""
        hidden, targets = self.leaves["hidden"].flatten(0, 1), self.targets.view(-1)
        parts = [self._of_rows(h, t) for h, t in zip(hidden.split(BLOCK // 4), targets.split(BLOCK // 4), strict=True)]
        logp, entropy = (torch.cat(part).view_as(self.targets) for part in zip(*parts, strict=True))
        return logp, entropy

    def _of_rows(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self.leaves["weight"].split(BLOCK)
        logits = torch.cat([hidden.double() @ block.double().T for block in blocks], dim=1)
        out = reference.logits_logprobs(logits, targets, outputs=("entropy",))
        assert out.entropy is not None
        return out.logp, out.entropy

    def _truth_of(self, variant: str) -> Outputs:
        logp, entropy = (x.clone().requires_grad_(self.backward) for x in (self._logp64, self._entropy64))
        loss = self.true_loss(logp, entropy, variant)
        if not self.backward:
            return {"loss": loss}
        upstream = torch.autograd.grad(loss, (logp, entropy), materialize_grads=True)
        rows = spread_rows(self.targets.numel(), ERROR_ROWS)
        hidden = self.leaves["hidden"].flatten(0, 1)[rows].double().requires_grad_()
        statistics = self._of_rows(hidden, self.targets.view(-1)[rows])
        total = sum((x * g.reshape(-1)[rows]).sum() for x, g in zip(statistics, upstream, strict=True))
        assert isinstance(total, Tensor)
        return {"loss": loss.detach(), "grad hidden": torch.autograd.grad(total, hidden)[0]}


class LinearPolicyWorkload(_HeadLoss):
    """B responses of a policy that has moved by a standard deviation of 0.2 in each log-prob. "active": a fifth of the tokens
    has a weight, the others have none, as with a mask by entropy."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.variants = {"bwd": ("grpo", "grpo+entropy", "gspo"), "active": ("clip",)}.get(case.mode, ("grpo", "grpo+entropy"))
        noise = 0.2 * torch.randn(2, *self.targets.shape, generator=self.random)
        self.old_logp, self.ref_logp = (self._logp64.float() + noise.to(device)).unbind()
        self.advantages = torch.randn(case.shape[0], generator=self.random).to(device)
        self.token_weight: Tensor | None = None
        if case.mode == "active":
            weights = torch.zeros(self.targets.numel())
            weights[spread_rows(len(weights), active_rows(len(weights)))] = 1.0
            self.token_weight = weights.view_as(self.targets).to(device)

    def loss_of(self, peer: Peer, leaves: dict[str, Tensor], variant: str) -> Tensor:
        ref_logp = self.ref_logp if HEAD_OBJECTIVES[variant].reference else None
        return peer.linear_policy_loss(
            **leaves, targets=self.targets, old_logp=self.old_logp, ref_logp=ref_logp, advantages=self.advantages,
            token_weight=self.token_weight, objective=variant,
        )  # fmt: skip

    def true_loss(self, logp: Tensor, entropy: Tensor, variant: str) -> Tensor:
        objective = HEAD_OBJECTIVES[variant]
        ref_logp = self.ref_logp.double() if objective.reference else None
        weight = None if self.token_weight is None else self.token_weight.double()
        old_logp, advantages = self.old_logp.double(), self.advantages.double()
        loss = reference.policy_loss(
            logp, old_logp, advantages, ref_logp=ref_logp, token_weight=weight, **objective.options
        ).loss  # fmt: skip
        return loss - objective.entropy_coef * entropy.mean()


class LinearPreferenceWorkload(_HeadLoss):
    """P pairs of responses. The reference's log-probs are 0 where there is a reference: Liger's losses take it as hidden states
    only, of which they compute the head themselves, and so have as much to do as everybody else."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.variants = ("dpo",) if case.mode == "frozen" else ("dpo", "simpo", "orpo")
        self.ref_logp = torch.zeros(self.targets.shape, device=device)

    @staticmethod
    def responses(count: int) -> int:
        return 2 * count

    def loss_of(self, peer: Peer, leaves: dict[str, Tensor], variant: str) -> Tensor:
        ref_logp = self.ref_logp if variant == "dpo" else None
        return peer.linear_preference_loss(**leaves, targets=self.targets, ref_logp=ref_logp, objective=variant)

    def true_loss(self, logp: Tensor, entropy: Tensor, variant: str) -> Tensor:
        length = logp.shape[1]
        chosen, rejected = logp.sum(1).chunk(2)
        if variant == "orpo":
            odds = reference.preference_loss(chosen / length, rejected / length, beta=1.0, score="log_odds").loss
            return ORPO_BETA * odds - chosen.mean() / length
        if variant == "simpo":
            chosen, rejected = chosen / length, rejected / length
        options = {name: value for name, value in PAIR_OBJECTIVES[variant].options.items() if name != "average"}
        return reference.preference_loss(chosen, rejected, **options).loss


class LinearUnpairedWorkload(_HeadLoss):
    """B responses, every other one of which is desirable. The reference gives every token the policy's mean log-prob, so that
    no loss is saturated; Liger, which takes the reference as hidden states only, gets its sum as KTO's reference point."""

    variants = ("kto",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.desirable = (torch.arange(case.shape[0]) % 2 == 0).to(device)
        self.ref_logp = torch.full(self.targets.shape, self._logp64.mean().item(), device=device)

    def loss_of(self, peer: Peer, leaves: dict[str, Tensor], variant: str) -> Tensor:
        return peer.linear_unpaired_loss(**leaves, targets=self.targets, ref_logp=self.ref_logp, desirable=self.desirable)

    def true_loss(self, logp: Tensor, entropy: Tensor, variant: str) -> Tensor:
        return reference.unpaired_loss(logp.sum(1), self.ref_logp.double().sum(1), self.desirable, beta=PAIR_BETA).loss
