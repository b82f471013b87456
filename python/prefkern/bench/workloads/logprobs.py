"""Log-probabilities from hidden states and from logits."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench import peers
from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, errors_against, fastest_read, gradient
from prefkern.bench.workloads.products import active_rows, head_floor

ERROR_ROWS = 32  # results are compared with float64 on this many rows, spread over all
ENTROPY_GRADIENT = 1e-3  # upstream gradient of the entropies in a backward pass: an entropy bonus


class _Logprobs(Workload):
    """What linear_logprobs and logits_logprobs have in common."""

    variants = ("logp", "logp+entropy")
    leaves: dict[str, Tensor]
    trained: tuple[str, ...]
    """Those of the leaves that get a gradient."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        n, v = case.shape[0], case.shape[-1]
        self.targets = self.integers(v, n)
        active = spread_rows(n, active_rows(n)) if case.mode == "active" else slice(None)
        weights = torch.zeros(n)
        weights[active] = 1.0
        self.upstream = (torch.randn(n, generator=self.random) * weights).to(device)
        self.bonus = (ENTROPY_GRADIENT * weights).to(device)
        self.rows = spread_rows(n, ERROR_ROWS).to(device)
        self._truth: dict[str, Outputs] = {}

    @abstractmethod
    def apply(self, peer: Peer, leaves: dict[str, Tensor], entropy: bool) -> peers.Logprobs: ...

    @abstractmethod
    def truth(self, entropy: bool) -> Outputs:
        """The results in float64, of `self.rows` only."""

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        entropy = variant == "logp+entropy"
        wide = isinstance(peer, peers.PrefkernFp32)
        leaves = {name: leaf.float() if wide else leaf for name, leaf in self.leaves.items()}

        def forward() -> Outputs:
            with torch.no_grad():
                return _named(*self.apply(peer, leaves, entropy))

        def forward_backward() -> Outputs:
            fresh = {name: leaf.detach().requires_grad_(name in self.trained) for name, leaf in leaves.items()}
            logp, ent = self.apply(peer, fresh, entropy)
            self.scalar(logp, ent, self.upstream, self.bonus).backward()
            return _named(logp, ent) | {f"grad {name}": gradient(fresh[name]) for name in self.trained}

        return forward_backward if self.backward else forward

    def gradient_bytes(self) -> int:
        return sum(self.leaves[name].nbytes for name in self.trained) if self.backward else 0

    def scalar(self, logp: Tensor, entropy: Tensor | None, upstream: Tensor, bonus: Tensor) -> Tensor:
        loss = (logp * upstream).sum()
        return loss if entropy is None else loss + (entropy * bonus).sum()

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        if variant not in self._truth:
            self._truth[variant] = self.truth(variant == "logp+entropy")
        truth = self._truth[variant]
        return errors_against({name: outputs[name][self.rows] for name in truth}, truth)


class LinearWorkload(_Logprobs):
    """Hidden states and head weight such that the logits have standard deviation 2."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        n, h, v = case.shape
        self.leaves = {"hidden": self.normal(n, h), "weight": self.normal(v, h, scale=2 / math.sqrt(h))}
        self.trained = ("hidden",) if case.mode == "frozen" else ("hidden", "weight")

    def apply(self, peer: Peer, leaves: dict[str, Tensor], entropy: bool) -> peers.Logprobs:
        return peer.linear_logprobs(leaves["hidden"], leaves["weight"], self.targets, entropy)

    def floor(self) -> Floor:
        return head_floor(self.leaves["hidden"], self.leaves["weight"], self.case.mode)

    def more_floors(self) -> dict[str, Floor]:
        """With the logits computed again: what is left for those who keep nothing of theirs."""
        if not self.backward:
            return {}
        return {"floor-recompute": head_floor(self.leaves["hidden"], self.leaves["weight"], self.case.mode, forward=2)}

    def truth(self, entropy: bool) -> Outputs:
        """The weight is widened block by block: all of it in float64 might not fit."""
        hidden, blocks = self.leaves["hidden"][self.rows].double(), self.leaves["weight"].split(4096)
        logits = torch.cat([hidden @ block.double().T for block in blocks], dim=1)
        truth, d_logits = _truth_of_logits(self, logits, entropy)
        if d_logits is not None:
            pairs = zip(d_logits.split(4096, dim=1), blocks, strict=True)
            truth["grad hidden"] = sum((d @ block.double() for d, block in pairs), torch.zeros_like(hidden))
        return truth


class LogitsWorkload(_Logprobs):
    """Normal logits of standard deviation 2."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.leaves = {"logits": self.normal(*case.shape, scale=2.0)}
        self.trained = ("logits",)

    def apply(self, peer: Peer, leaves: dict[str, Tensor], entropy: bool) -> peers.Logprobs:
        return peer.logits_logprobs(leaves["logits"], self.targets, entropy)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        if not (self.backward and isinstance(peer, peers.PrefkernInplace)):
            return super().call(peer, variant)
        logits, work = self.leaves["logits"], self.leaves["logits"].clone()
        g_entropy = self.bonus if variant == "logp+entropy" else None
        fresh = 2  # the first calls are looked at; timed ones run on what the last one left, which costs the same

        def forward_backward() -> Outputs:
            nonlocal fresh
            if fresh > 0:
                work.copy_(logits)
                fresh -= 1
            logp, entropy = peer.logits_forward_backward(work, self.targets, self.upstream, g_entropy)
            return _named(logp, entropy) | {"grad logits": work.clone() if fresh else work}

        return forward_backward

    def floor(self) -> Floor:
        logits = self.leaves["logits"]
        about, read = fastest_read(logits, self.device)
        if not self.backward:
            return Floor(f"one read: {about}", read)
        gradient = torch.empty_like(logits)

        def read_and_copy() -> None:
            read()
            gradient.copy_(logits)

        return Floor(f"two reads, one write: {about}, then copy_", read_and_copy)

    def truth(self, entropy: bool) -> Outputs:
        truth, d_logits = _truth_of_logits(self, self.leaves["logits"][self.rows].double(), entropy)
        return truth if d_logits is None else truth | {"grad logits": d_logits}


def spread_rows(rows: int, count: int) -> Tensor:
    """So many of the rows, or all, evenly spread."""
    return torch.linspace(0, rows - 1, min(rows, count)).long()


def _named(logp: Tensor, entropy: Tensor | None) -> Outputs:
    results = {"logp": logp.detach()}
    return results if entropy is None else results | {"entropy": entropy.detach()}


def _truth_of_logits(workload: _Logprobs, logits: Tensor, entropy: bool) -> tuple[Outputs, Tensor | None]:
    """Results in float64 of the logits of `workload.rows`, and the gradient of those logits in a backward case."""
    logits = logits.requires_grad_(workload.backward)
    outputs = ("entropy",) if entropy else ()
    out = reference.logits_logprobs(logits, workload.targets[workload.rows], outputs=outputs)
    truth = _named(out.logp, out.entropy)
    if not workload.backward:
        return truth, None
    upstream, bonus = (x[workload.rows].double() for x in (workload.upstream, workload.bonus))
    loss = workload.scalar(out.logp, out.entropy, upstream, bonus)
    return truth, torch.autograd.grad(loss, logits)[0]
