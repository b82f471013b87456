"""The inner loss of a learned policy update, and the recurrent network that makes its targets."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against, gradient

INPUTS = 5  # of the network: reward, terminal or not, probability, two embeddings


class InnerLossWorkload(Workload):
    """N steps of agents with A actions and predictions over W numbers. "meta" is a step of the agent and the gradient through
    it to the targets: what a meta-gradient costs."""

    variants: tuple[str, ...] = ("loss",)
    leaves = ("probs", "y", "pi_hat", "y_hat")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        rows, actions, width = case.shape
        self.variants = ("loss", "meta") if self.backward else ("loss",)
        self.given = {
            name: self.normal(rows, n).softmax(-1) for name, n in (("probs", actions), ("y", width), ("y_hat", width))
        }
        self.given["pi_hat"] = self.normal(rows)
        self.actions = self.integers(actions, rows)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def forward() -> Outputs:
            with torch.no_grad():
                return {"loss": peer.lpg_inner_loss(self.actions, **self.given)}

        def forward_backward() -> Outputs:
            leaves = {name: t.detach().requires_grad_() for name, t in self.given.items()}
            loss = peer.lpg_inner_loss(self.actions, **leaves)
            return {"loss": loss.detach(), **self._gradients(loss, leaves, variant)}

        return forward_backward if self.backward else forward

    def _gradients(self, loss: Tensor, leaves: dict[str, Tensor], variant: str) -> Outputs:
        if variant == "loss":
            loss.backward()
            return {f"grad {name}": gradient(leaves[name]) for name in self.leaves}
        by_agent = torch.autograd.grad(loss, (leaves["probs"], leaves["y"]), create_graph=True)
        stepped = [leaves[name] - len(self.actions) * grad for name, grad in zip(("probs", "y"), by_agent, strict=True)]
        total = sum((t.square().sum() for t in stepped), loss.new_zeros(()))
        by_targets = torch.autograd.grad(total, (leaves["pi_hat"], leaves["y_hat"]))
        return {f"grad {name}": grad for name, grad in zip(("pi_hat", "y_hat"), by_targets, strict=True)}

    def floor(self) -> Floor:
        return copy_of([*self.given.values(), self.actions])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        leaves = {name: t.double().requires_grad_(self.backward) for name, t in self.given.items()}
        loss = reference.lpg_inner_loss(leaves["probs"], self.actions, leaves["y"], leaves["pi_hat"], leaves["y_hat"]).loss
        truth = {"loss": loss.detach()}
        if self.backward:
            truth |= self._gradients(loss, leaves, variant)
        return errors_against(outputs, truth)


class ReverseGruWorkload(Workload):
    """B rows of T steps, a tenth of them terminal, H hidden units."""

    variants = ("states",)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        rows, steps, hidden = case.shape
        self.given = {
            "x": self.normal(rows, steps, INPUTS),
            "weight_ih": self.normal(3 * hidden, INPUTS, scale=INPUTS**-0.5),
            "weight_hh": self.normal(3 * hidden, hidden, scale=hidden**-0.5),
            "bias_ih": self.normal(3 * hidden, scale=0.1),
            "bias_n": self.normal(hidden, scale=0.1),
        }
        self.done = (torch.rand(rows, steps, generator=self.random) < 0.1).to(device)
        self.upstream = self.normal(rows, steps, hidden)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def forward() -> Outputs:
            with torch.no_grad():
                return {"states": peer.reverse_gru_reset(done=self.done, **self.given)}

        def forward_backward() -> Outputs:
            leaves = {name: t.detach().requires_grad_() for name, t in self.given.items()}
            states = peer.reverse_gru_reset(done=self.done, **leaves)
            states.backward(self.upstream)
            return {"states": states.detach(), **{f"grad {name}": gradient(leaf) for name, leaf in leaves.items()}}

        return forward_backward if self.backward else forward

    def floor(self) -> Floor:
        """The bare products with the state."""
        rows, steps, hidden = self.case.shape
        state, gates = self.normal(rows, hidden), self.normal(rows, 3 * hidden)
        up, all_gates, all_states = (
            self.given["weight_hh"],
            self.normal(rows * steps, 3 * hidden),
            self.normal(rows * steps, hidden),
        )
        product, back, by_weight = torch.empty_like(gates), torch.empty_like(state), torch.empty_like(up)

        def multiply() -> None:
            for _ in range(steps - 1):
                torch.mm(state, up.T, out=product)
            if not self.backward:
                return
            for _ in range(steps - 1):
                torch.mm(gates, up, out=back)
            torch.mm(all_gates.T, all_states, out=by_weight)

        return Floor("torch.mm of the products with the state", multiply)

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        leaves = {name: t.double().requires_grad_(self.backward) for name, t in self.given.items()}
        states = reference.reverse_gru_reset(done=self.done, **leaves)
        truth = {"states": states.detach()}
        if self.backward:
            grads = torch.autograd.grad(states, list(leaves.values()), self.upstream.double())
            truth |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return errors_against(outputs, truth)
