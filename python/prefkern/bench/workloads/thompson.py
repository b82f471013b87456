"""Which prompts to roll out, and how often."""

from __future__ import annotations

import torch

from prefkern import reference
from prefkern.bench.peers import Eager, KnapsackMethod, Peer, ThompsonMode
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against

MODES: dict[str, ThompsonMode] = {"thompson": "thompson", "mean": "mean"}
METHODS: dict[str, KnapsackMethod] = {"exact": "exact", "greedy": "greedy"}
MOST_UTILITY = 4 / 27  # of p (1 - p)^2
CAP = 128


class ThompsonWorkload(Workload):
    """M prompts of 0 to 10 rollouts, of which the best 512, or an eighth of a small pool, are chosen. "mean" is the same
    without random numbers: what it takes more than that is the cost of the draws."""

    variants = tuple(MODES)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        (prompts,) = case.shape
        rollouts = 10 * torch.rand(prompts, generator=self.random)
        alpha = rollouts * torch.rand(prompts, generator=self.random)
        self.alpha, self.beta = (x.to(self.dtype).to(device) for x in (alpha, rollouts - alpha))
        self.k = max(1, min(512, prompts // 8))

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"utilities": peer.beta_thompson_topk(self.alpha, self.beta, self.k, MODES[variant])[1]}

    def floor(self) -> Floor:
        return copy_of([self.alpha, self.beta])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """Draws differ from peer to peer: the best of them is compared with the largest utility there is."""
        if variant == "thompson":
            best = {"utilities": outputs["utilities"][:1]}
            return errors_against(best, {"utilities": torch.full_like(best["utilities"], MOST_UTILITY, dtype=torch.float64)})
        truth = reference.beta_thompson_topk(self.alpha.double(), self.beta.double(), self.k, mode="mean")
        return errors_against(outputs, {"utilities": truth.utilities})


class KnapsackWorkload(Workload):
    """N prompts that share B rollouts each among them, 2 to 128 for each, worth what V_0 says they are."""

    variants = tuple(METHODS)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        from prefkern.papers.v0 import rollout_utility

        prompts, each = case.shape
        p = torch.rand(prompts, generator=self.random, dtype=torch.float64)
        self.total, self.b_min = prompts * each, min(2, each)
        most = max(self.b_min, min(CAP, self.total - (prompts - 1) * self.b_min))
        self.utilities = rollout_utility(torch.arange(self.b_min, most + 1), p[:, None]).to(self.dtype)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"utility": self._worth(peer, variant)}

    def _worth(self, peer: Peer, variant: str) -> torch.Tensor:
        budgets = peer.knapsack_allocate(self.utilities, self.total, self.b_min, METHODS[variant])
        return self.utilities.double().gather(1, (budgets - self.b_min)[:, None]).sum()

    def floor(self) -> Floor:
        return copy_of([self.utilities])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """How far the sums of utilities are from those of plain PyTorch in float64, relative to these."""
        truth = self._worth(Eager(), variant)
        return errors_against({"utility": outputs["utility"] / truth}, {"utility": torch.ones_like(truth)})
