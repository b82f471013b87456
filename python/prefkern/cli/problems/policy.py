"""Policy objectives over tokens, and the weights and masks that go with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import prefkern
from prefkern import reference
from prefkern.cli.problems.base import Problem, problem, ragged

KINDS = ("clip", "cispo", "reinforce", "sapo", "gspo", "gspo_token", "gmpo")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
    "trl-grpo",
    "trl-dr_grpo",
)
KLS = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")
SCALED = ("seq-mean-token-sum-norm", "trl-dr_grpo")
ROWS, LENGTH = 9, 41


def policy_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Ratios on both sides of every bound, NaN outside the mask, an empty sequence; padded and packed."""
    shape, sequences = (ROWS, LENGTH), ragged(ROWS, LENGTH)
    mask = sequences.mask
    old = -torch.rand(shape)
    named = {
        "logp": old + 0.7 * torch.randn(shape),
        "old_logp": old,
        "ref_logp": old + 0.3 * torch.randn(shape),
        "rollout_logp": old + 0.3 * torch.randn(shape),
        "token_weight": torch.rand(shape),
        "entropy": torch.rand(shape),
        "values": torch.randn(shape),
    }
    padded = {name: sequences.pad(x, dtype) for name, x in named.items()}
    packed = {name: x[mask] for name, x in padded.items()}
    advantages = torch.randn(ROWS).to(dtype)
    layouts: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
        "padded": (padded, {"mask": mask}),
        "packed": (packed, {"cu_seqlens": sequences.cu_seqlens}),
    }

    def loss(layout: str, case: str, *names: str, **options: Any) -> Problem:
        tokens, where = layouts[layout]
        given = {"old_logp": tokens["old_logp"], "advantages": advantages} | {name: tokens[name] for name in names}
        return problem("policy_loss", f"{layout}, {case}", {"logp": tokens["logp"]}, given | where | options)

    for layout in layouts:
        yield loss(layout, "token-mean")
        yield loss(layout, "dual clip, k3, entropy", "ref_logp", "entropy", dual_clip=1.5, eps_high=0.28, beta=0.1)
        for kind in KINDS[1:]:
            yield loss(layout, kind, kind=kind, agg="seq-mean-token-mean")
        yield loss(layout, "delta, token weights", "token_weight", delta=1.6)
        yield loss(layout, "bounds per sequence", eps_low=torch.full((ROWS,), 0.1), eps_high=torch.rand(ROWS))
        anchor = torch.arange(ROWS) % 3 == 0
        for anchor_loss in ("shaped", "nll"):
            yield loss(layout, f"anchors, {anchor_loss}", anchor=anchor, anchor_loss=anchor_loss)
    for agg in AGGREGATIONS:
        yield loss("padded", agg, agg=agg, **({"scale": 50.0} if agg in SCALED else {}))
    yield loss("padded", "token-mean, norm 100", norm=100.0)
    for kl in KLS:
        yield loss("padded", f"{kl}", "ref_logp", beta=0.1, kl=kl)
    yield loss("packed", "k3 clamped, times the ratio", "ref_logp", beta=0.1, kl_clamp=0.05, kl_ratio=True)

    for layout, (tokens, where) in layouts.items():
        yield problem("masked_aggregate", layout, {"values": tokens["values"]}, where)
        yield problem("kl_penalty", f"{layout}, k3", {"logp": tokens["logp"]}, {"ref_logp": tokens["ref_logp"]} | where)
        mismatch = {"old_logp": tokens["old_logp"], "rollout_logp": tokens["rollout_logp"]} | where
        for level in ("token", "sequence", "geometric"):
            for mode in ("truncate", "mask"):
                bounds = {"level": level, "mode": mode, "clip_min": 0.5, "normalize": mode == "truncate"}
                yield problem("importance_weights", f"{layout}, {level}, {mode}", {}, mismatch | bounds)
        yield problem("off_policy_mask", layout, {}, {"advantages": advantages, "threshold": 0.01} | mismatch)
    yield from _linear_problems(dtype)


def _linear_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Straight from hidden states, padded, in one chunk and in many."""
    rows, length, hidden_size, vocab = 5, 9, 24, 301
    mask = ragged(rows, length).mask
    leaves = {
        "hidden": torch.randn(rows, length, hidden_size).to(dtype),
        "weight": (2 / math.sqrt(hidden_size) * torch.randn(vocab, hidden_size)).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
    }
    targets = torch.randint(vocab, (rows, length))
    logp = reference.linear_logprobs(leaves["hidden"].double(), leaves["weight"].double(), targets).logp.float()
    given = {
        "targets": targets, "mask": mask, "old_logp": logp + 0.3 * torch.randn(rows, length),
        "ref_logp": logp + 0.3 * torch.randn(rows, length), "advantages": torch.randn(rows), "beta": 0.1, "entropy_coef": 0.01,
    }  # fmt: skip

    def loss_of(head: Any, mask: Tensor, entropy_coef: float, chunk_bytes: int | None = None, **options: Any) -> Any:
        options = {name: x.to(head.logp.dtype) if isinstance(x, Tensor) else x for name, x in options.items()}
        out = reference.policy_loss(head.logp, mask=mask, entropy=head.entropy.detach(), **options)
        bonus = reference.masked_aggregate(head.entropy, mask, agg=options.get("agg", "token-mean"))
        return prefkern.LossOutput(out.loss - entropy_coef * bonus, out.metrics)

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor, *, targets: Tensor, **options: Any) -> Any:
        head = reference.linear_logprobs(hidden, weight, targets, bias=bias, outputs=("entropy",))
        return loss_of(head, **options)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor, *, targets: Tensor, **options: Any) -> Any:
        head = reference.logits_logprobs(hidden @ weight.T + bias, targets, outputs=("entropy",))
        return loss_of(head, **options)

    functions = (prefkern.linear_policy_loss, exact, plain)
    yield Problem("linear_policy_loss", "sapo, k3, entropy, one chunk", leaves, {**given, "kind": "sapo"}, *functions)
    wide = {"kind": "gspo", "eps_low": 1.0, "eps_high": 9.0, "agg": "seq-mean-token-mean", "chunk_bytes": 1}
    yield Problem("linear_policy_loss", "gspo, k3, entropy, a sequence a chunk", leaves, {**given, **wide}, *functions)
