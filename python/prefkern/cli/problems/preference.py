"""Losses of preference pairs, of single judged responses, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import prefkern
from prefkern import reference
from prefkern.cli.problems.base import Problem, problem

PAIRS = 53
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}, "hinge": {}, "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3}, "nca_pair": {}, "bco_pair": {"offset": 0.07}, "sppo_hard": {},
    "squared_targets": {"chosen_target": 0.4, "rejected_target": -0.1}, "apo_zero": {}, "apo_down": {}, "discopop": {},
    "dpop": {"penalty": 5.0}, "focal": {"gamma": 0.5}, "rao_kupper": {"nu": 3.0}, "davidson": {"nu": 1.0}, "squared": {},
    "exponential": {}, "truncated_quadratic": {}, "savage": {}, "cal_dpo": {"beta": 0.5}, "linear": {},
    "asft": {"score": "log_odds", "beta": 1.0},
}  # fmt: skip
SCORES = ("forward_kl", "js_divergence", "alpha_divergence", "log_odds", "chi", "exp")


def preference_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Every kind and every score, NaN in pairs that do not count; log-ratios below 0, as log-odds need."""
    ref = {f"ref_{side}_logp": (-0.3 * torch.rand(PAIRS)).to(dtype) for side in ("chosen", "rejected")}
    logp = {name.removeprefix("ref_"): (x.float() - 0.05 - 2 * torch.rand(PAIRS)).to(dtype) for name, x in ref.items()}
    mask = torch.arange(PAIRS) % 7 != 2
    for x in (*logp.values(), *ref.values()):
        x[~mask] = math.nan
    weight = torch.rand(PAIRS).to(dtype)
    lengths = {name.replace("logp", "lengths"): torch.randint(1, 30, (PAIRS,)) for name in logp}

    def loss(case: str, **options: Any) -> Problem:
        return problem("preference_loss", case, logp, ref | {"mask": mask} | options)

    for kind, options in KINDS.items():
        yield loss(kind, kind=kind, **options)
    for score in SCORES:
        yield loss(f"sigmoid, {score}", score=score)
    for average in ("logp", "score"):
        yield loss(f"ipo, {average} per token", kind="ipo", average=average, **lengths)
    yield loss("ties", kind="davidson", nu=0.7, tie=torch.arange(PAIRS) % 3 == 0)
    yield loss("weighted mean", weight=weight, reduction="weighted_mean")
    yield loss("a scale, an offset and a soft label per pair", scale=weight + 0.5, offset=weight, label_smoothing=weight)

    yield from _linear_problems(dtype)
    good = torch.rand(PAIRS) < 0.4
    single = {"ref_logp": ref["ref_chosen_logp"], "desirable": good, "mask": mask}
    for kind, options in {"kto": {"kl": 0.3}, "bco": {"offset": 0.1}, "squared": {"offset": -0.3}, "apo_zero": {}}.items():
        yield problem("unpaired_loss", kind, {"logp": logp["chosen_logp"]}, single | {"kind": kind} | options)
    who = torch.randint(0, 4, (PAIRS,))
    posterior = {
        "margin": (3 * torch.randn(PAIRS)).to(dtype),
        "reliability": torch.tensor([0.0, 0.5, 0.9, 1.0]),
        "annotator": who,
    }
    yield problem("label_posterior", "four annotators", {}, posterior)


def _linear_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Pairs and judged responses straight from hidden states, padded, in one chunk and in many."""
    pairs, length, hidden_size, vocab = 4, 9, 24, 301
    mask = torch.arange(length) < torch.randint(1, length + 1, (2 * pairs, 1))
    leaves = {
        "hidden": torch.randn(2 * pairs, length, hidden_size).to(dtype),
        "weight": (2 / math.sqrt(hidden_size) * torch.randn(vocab, hidden_size)).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
    }
    given = {"targets": torch.randint(vocab, (2 * pairs, length)), "mask": mask, "ref_logp": -6 + torch.rand(2 * pairs, length)}

    def loss_of(logp: Tensor, mask: Tensor, ref_logp: Tensor, options: dict[str, Any]) -> Any:
        ratios = torch.where(mask, logp - ref_logp.to(logp.dtype), 0.0).sum(1)
        if (desirable := options.pop("desirable", None)) is not None:
            return reference.unpaired_loss(ratios, None, desirable, **options)
        return reference.preference_loss(*ratios.chunk(2), **options)

    def exact(
        hidden: Tensor, weight: Tensor, bias: Tensor, *, targets: Tensor, mask: Tensor, ref_logp: Tensor, **options: Any
    ) -> Any:
        options.pop("chunk_bytes", None)
        return loss_of(reference.linear_logprobs(hidden, weight, targets, bias=bias).logp, mask, ref_logp, options)

    def plain(
        hidden: Tensor, weight: Tensor, bias: Tensor, *, targets: Tensor, mask: Tensor, ref_logp: Tensor, **options: Any
    ) -> Any:
        options.pop("chunk_bytes", None)
        logp = reference.logits_logprobs(hidden @ weight.T + bias, targets).logp
        return loss_of(logp, mask, ref_logp, options)

    functions = (prefkern.linear_preference_loss, exact, plain)
    yield Problem("linear_preference_loss", "one chunk", leaves, given, *functions)
    yield Problem(
        "linear_preference_loss", "a pair a chunk, ipo", leaves, {**given, "chunk_bytes": 1, "kind": "ipo"}, *functions
    )
    judged = {**given, "desirable": torch.arange(2 * pairs) % 3 != 1}
    single = (prefkern.linear_unpaired_loss, exact, plain)
    yield Problem("linear_unpaired_loss", "kto, one chunk", leaves, {**judged, "kl": 0.2}, *single)
    yield Problem(
        "linear_unpaired_loss", "bco, a response a chunk", leaves, {**judged, "kind": "bco", "chunk_bytes": 1}, *single
    )
