"""How much the responses to prompts differ; sets of candidates unlike each other."""

from __future__ import annotations

from typing import Any

import torch

from prefkern import reference
from prefkern.bench.peers import Peer
from prefkern.bench.shapes import Case
from prefkern.bench.workloads.base import Errors, Floor, Outputs, OutputsCall, Workload, copy_of, errors_against

VOCABULARY, LOOKED_AT, MOST_CHOSEN = 32000, 2, 45


class _Responses(Workload):
    """P prompts with K responses of L tokens each, some tokens much more frequent than others."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        prompts, responses, length = case.shape
        u = torch.rand(prompts * responses * length, dtype=torch.float64, generator=self.random)
        self.ids = (VOCABULARY**u).long().to(device)
        self.cu_seqlens = (torch.arange(prompts * responses + 1) * length).int().to(device)
        self.cu_prompts = (torch.arange(prompts + 1) * responses).int().to(device)

    def floor(self) -> Floor:
        return copy_of([self.ids])

    def first(self, outputs: Outputs) -> tuple[Outputs, dict[str, Any]]:
        """Of the first prompts what came out, and where they are: the definition takes a second for a few more."""
        prompts, responses, length = self.case.shape
        some = min(LOOKED_AT, prompts)
        where = {"cu_seqlens": self.cu_seqlens[: some * responses + 1], "cu_prompts": self.cu_prompts[: some + 1]}
        few = {name: values[:some] for name, values in outputs.items()}
        return few, {"ids": self.ids[: some * responses * length], **where}


class SelfBleuWorkload(_Responses):
    variants = ("1 to 3",)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"bleu": peer.self_bleu(self.ids, self.cu_seqlens, self.cu_prompts)}

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        few, where = self.first(outputs)
        return errors_against(few, {"bleu": reference.self_bleu(**where)})


class EditDistanceWorkload(_Responses):
    variants = ("tokens",)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"distance": peer.edit_distance(self.ids, self.cu_seqlens, self.cu_prompts)}

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        few, where = self.first(outputs)
        return errors_against(few, {"distance": reference.edit_distance(**where)})


class GreedySelectWorkload(Workload):
    """Q seeds with K candidates of their own, of two types, of which up to 45 are chosen."""

    variants = ("min", "max")

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        seeds, candidates, _ = case.shape
        self.emb = self.normal(*case.shape)
        self.types = (torch.arange(candidates) % 2).expand(seeds, candidates).contiguous().to(device)
        self.seeds = torch.arange(seeds).remainder(candidates).mul(2).remainder(candidates).to(device)
        total = max(1, min(MOST_CHOSEN, candidates // 2))
        self.quotas = (total - total // 2, total // 2)

    def call(self, peer: Peer, variant: str) -> OutputsCall:
        return lambda: {"chosen": peer.greedy_select(self.emb, self.types, self.seeds, self.quotas, variant)}

    def floor(self) -> Floor:
        return copy_of([self.emb])

    def errors(self, outputs: Outputs, variant: str) -> Errors:
        """The share of candidates that differ from those of float64 in one of the first sets."""
        some = min(LOOKED_AT, len(self.seeds))
        given = (self.emb[:some].double(), self.types[:some], self.seeds[:some], self.quotas)
        exact = reference.greedy_select(*given, reduce="max" if variant == "max" else "min")
        return Errors(float((outputs["chosen"][:some] != exact).double().mean()))
