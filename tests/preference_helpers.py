"""What the tests of preference losses share: every kind with options that it takes, and pairs to try them on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

F64 = torch.float64
NAN, INF = math.nan, math.inf

KINDS = {
    "sigmoid": {}, "smoothed": {"kind": "sigmoid", "label_smoothing": 0.2},
    "robust": {"kind": "robust", "label_smoothing": 0.1},
    "hinge": {"kind": "hinge"}, "squared": {"kind": "squared", "offset": 0.3}, "ipo": {"kind": "ipo"},
    "exo": {"kind": "exo_pair", "label_smoothing": 1e-3}, "nca": {"kind": "nca_pair"},
    "bco": {"kind": "bco_pair", "offset": 0.07},
    "targets": {"kind": "squared_targets", "chosen_target": 0.4, "rejected_target": -0.1, "factor": 0.5},
    "sppo": {"kind": "sppo_hard"}, "apo_zero": {"kind": "apo_zero"}, "apo_down": {"kind": "apo_down"},
    "discopop": {"kind": "discopop"}, "wide discopop": {"kind": "discopop", "tau": 0.7, "beta": 1.0},
    "dpop": {"kind": "dpop", "penalty": 5.0}, "focal": {"kind": "focal", "gamma": 0.5},
    "win": {"kind": "rao_kupper", "nu": 3.0},
    "davidson": {"kind": "davidson", "nu": 1.0}, "exponential": {"kind": "exponential"},
    "quadratic": {"kind": "truncated_quadratic"}, "savage": {"kind": "savage"}, "cal": {"kind": "cal_dpo", "beta": 0.5},
    "linear": {"kind": "linear"}, "asft": {"kind": "asft", "score": "log_odds", "beta": 1.0, "sft": 0.7},
    "shift": {"rejected_beta": 0.075}, "scaled": {"scale": 2.0, "offset": 0.4}, "clipped": {"clip": 0.05},
}  # fmt: skip
"""Names of test cases to options of preference_loss."""

SCORES = {
    "reverse_kl": {}, "forward_kl": {"score": "forward_kl"}, "js": {"score": "js_divergence"},
    "alpha": {"score": "alpha_divergence", "alpha": 0.3}, "negative alpha": {"score": "alpha_divergence", "alpha": -0.5},
    "log_odds": {"score": "log_odds"}, "capped odds": {"score": "log_odds", "max_p": 0.5}, "chi": {"score": "chi"},
    "exp": {"score": "exp"}, "held": {"score": "forward_kl", "exp_cap": 0.5},
}  # fmt: skip


def sample_pairs(size: int, dtype: torch.dtype = F64, spread: float = 2.0) -> dict[str, Tensor]:
    """Log-probs below 0 whose ratios to the reference stay below 0 too, as the log-odds need."""
    ref = {f"ref_{side}_logp": -0.2 * torch.rand(size, dtype=F64) for side in ("chosen", "rejected")}
    logp = {
        f"{side}_logp": ref[f"ref_{side}_logp"] - 0.05 - spread * torch.rand(size, dtype=F64) for side in ("chosen", "rejected")
    }
    return {name: t.to(dtype) for name, t in (logp | ref).items()}


def run(function, pairs: dict[str, Tensor], upstream: float | Tensor = 1.0, **options):
    """LossOutput, and the gradients to the policy's log-probs."""
    leaves = {name: t.detach().clone().requires_grad_(not name.startswith("ref_")) for name, t in pairs.items()}
    out = function(**leaves, **options)
    wanted = [t for t in leaves.values() if t.requires_grad]
    g = torch.as_tensor(upstream, dtype=out.loss.dtype, device=out.loss.device).expand_as(out.loss)
    return out, torch.autograd.grad(out.loss, wanted, g)
