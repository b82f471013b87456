"""The tokens above a quantile."""

from __future__ import annotations

import torch

from prefkern import reference
from prefkern.bench.peers import Peer, Rule
from prefkern.bench.peers.base import TOP_FRACTION
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against

RULES: dict[str, Rule] = {"trl": "trl", "count": "count"}


class TopQuantileWorkload(Workload):
    """Entropies as language models have them, most of them near zero; a tenth of the tokens masked."""

    variants = tuple(RULES)

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        entropy = torch.randn(case.shape, generator=self.random, dtype=torch.float64).square() ** 2
        self.values = entropy.to(self.dtype).to(device)
        self.mask = (torch.rand(case.shape, generator=self.random) < 0.9).to(device)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"mask": peer.top_quantile_mask(self.values, self.mask, RULES[variant])}

    def floor(self) -> Floor:
        return copy_of([self.values, self.mask])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """Between float64 thresholds of these very values: 0 or 1, as one token more or less is a wrong result."""
        truth = reference.top_quantile_mask(self.values.double(), self.mask, fraction=TOP_FRACTION, rule=RULES[variant])
        return errors_against(outputs, {"mask": truth.double()})
