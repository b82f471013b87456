"""Python objects instead of tensors, as trainers do where no op was at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern import reference
from prefkern.bench.peers.base import ADVANTAGE_EPS, GAMMA, LAMBDA, Peer, Unavailable


class Python(Peer):
    """Dictionaries, sets and loops."""

    name = "python"
    about = "Python loops: a dictionary of the samples of each group, as in verl; sets of tokens; n-grams as NLTK counts them"

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None, estimator: str) -> Tensor:
        """Samples are gathered under their group's id one by one, and normalised one by one."""
        if estimator != "grpo":
            raise Unavailable("written for grpo")
        if size is None:
            raise Unavailable("takes the same for groups one behind the other")
        ids = group.tolist()
        members: dict[int, list[Tensor]] = {}
        for i, name in enumerate(ids):
            members.setdefault(name, []).append(rewards[i])
        statistics = {}
        for name, values in members.items():
            stacked = torch.stack(values)
            alone = len(values) == 1
            statistics[name] = (torch.tensor(0.0), torch.tensor(1.0)) if alone else (stacked.mean(), stacked.std())
        advantages = torch.empty_like(rewards)
        for i, name in enumerate(ids):
            mean, std = statistics[name]
            advantages[i] = (rewards[i] - mean) / (std + ADVANTAGE_EPS)
        return advantages

    def conflict_runs(self, tokens: Tensor, advantages: Tensor, mask: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        lengths, signs = mask.sum(1).tolist(), advantages.sign().tolist()
        rows = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        forward, backward = self._leading_runs(rows, signs), self._leading_runs([row[::-1] for row in rows], signs)
        return torch.tensor(forward, device=tokens.device), torch.tensor(backward, device=tokens.device)

    @staticmethod
    def _leading_runs(rows: list[list[int]], signs: list[float]) -> list[int]:
        """Place by place, until no row runs on."""
        runs = [0] * len(rows)
        running = [i for i, sign in enumerate(signs) if sign != 0]
        for t in range(max(map(len, rows), default=0)):
            positive = {row[t] for row, sign in zip(rows, signs, strict=True) if sign > 0 and t < len(row)}
            negative = {row[t] for row, sign in zip(rows, signs, strict=True) if sign < 0 and t < len(row)}
            both = positive & negative
            running = [i for i in running if t < len(rows[i]) and rows[i][t] in both]
            if not running:
                break
            for i in running:
                runs[i] += 1
        return runs

    def gae(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token by token over plain numbers."""
        result = [self._gae_of_row(*row) for row in zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)]
        advantages = torch.tensor(result, dtype=values.dtype, device=values.device)
        return advantages, (advantages + values) * mask

    @staticmethod
    def _gae_of_row(rewards: list[float], values: list[float], mask: list[bool]) -> list[float]:
        advantages, carry, following = [0.0] * len(rewards), 0.0, 0.0
        for t in range(len(rewards) - 1, -1, -1):
            if mask[t]:
                carry = rewards[t] + GAMMA * following - values[t] + GAMMA * LAMBDA * carry
                following = values[t]
                advantages[t] = carry
        return advantages

    def self_bleu(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        """Counters of tuples: for every response those of all others anew."""
        return reference.self_bleu(ids, cu_seqlens=cu_seqlens, cu_prompts=cu_prompts)

    def edit_distance(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        """Cell by cell."""
        return reference.edit_distance(ids, cu_seqlens=cu_seqlens, cu_prompts=cu_prompts)
