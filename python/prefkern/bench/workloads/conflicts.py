"""Tokens on which completions of both signs agree."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, errors_against


class ConflictRunsWorkload(Workload):
    """One group of G completions of up to L tokens, the shortest half as long. All begin and end alike: with a template of
    32 and 8 tokens, or so that only the middle half of the shortest differs."""

    variants = ("template", "long runs")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        rows, length, _ = case.shape
        self.advantages = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0).to(device)
        lengths = torch.randint(length // 2, length + 1, (rows,), generator=self.random)
        self.mask = (torch.arange(length) < lengths[:, None]).to(device)
        shares = {"template": (min(32, length // 8), min(8, length // 8)), "long runs": (length // 8, length // 8)}
        self.tokens = {name: self._completions(lengths, *share).to(device) for name, share in shares.items()}

    def _completions(self, lengths: Tensor, front: int, back: int) -> Tensor:
        rows, length, vocab = self.case.shape
        tokens, common = (torch.randint(vocab, shape, generator=self.random) for shape in ((rows, length), (length,)))
        tokens[:, :front] = common[:front]
        for row, n in zip(tokens, lengths.tolist(), strict=True):
            row[n - back : n] = common[length - back :]
        return tokens

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        def runs() -> Outputs:
            tokens = self.tokens[variant]
            forward, backward = peer.conflict_runs(tokens, self.advantages, self.mask, self.case.shape[2])
            return {"forward": forward, "backward": backward}

        return runs

    def floor(self) -> Floor:
        tokens = self.tokens["template"]
        buffer = torch.empty_like(tokens)
        return Floor("copy_ of the tokens", lambda: buffer.copy_(tokens))

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        group = torch.zeros(len(self.mask), dtype=torch.int64, device=self.device)
        runs = reference.conflict_runs(self.tokens[variant], self.advantages, group, self.mask)
        return errors_against(outputs, {"forward": runs.forward, "backward": runs.backward})
