"""Losses of preference pairs, of single judged responses, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

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
