"""What a peer can be asked for, and with which constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

ADVANTAGE_EPS = 1e-6
VIRTUAL_REWARD = 1.0  # of the one virtual sample of "ngrpo"
GAMMA, LAMBDA = 0.99, 0.95  # of gae
TOP_FRACTION = 0.2  # of top_quantile_mask
BETA = 0.04  # of the policy loss with a KL term
DIFFUSION_BETA = 2000.0  # of the loss of pairs of latents


@dataclass(frozen=True)
class Estimator:
    """Advantages as `prefkern.group_advantages` is asked for them."""

    options: dict[str, Any]
    rewards: int = 1
    """How many rewards a sample has."""


ESTIMATORS = {
    "grpo": Estimator({}),
    "gdpo": Estimator({"combine": "normalize_then_sum", "batch": "seq"}, rewards=2),
    "ngrpo": Estimator({"virtual_value": VIRTUAL_REWARD, "virtual_count": 1, "singleton": "calibrate"}),
    "mad": Estimator({"estimator": "mad"}),
}


@dataclass(frozen=True)
class Objective:
    """A policy loss as `prefkern.policy_loss` is asked for it."""

    options: dict[str, Any]
    reference: bool = False
    """Whether it gets `ref_logp` and `entropy`, for a KL term and their metrics."""


EPS_LOW, EPS_HIGH, DUAL_CLIP = 0.2, 0.28, 3.0
TAU_POS, TAU_NEG = 1.0, 1.05
CLIP: dict[str, Any] = {"eps_low": EPS_LOW, "eps_high": EPS_HIGH}
OBJECTIVES = {
    "clip": Objective(CLIP | {"dual_clip": DUAL_CLIP}),
    "clip+k3": Objective(CLIP | {"dual_clip": DUAL_CLIP, "beta": BETA}, reference=True),
    "gspo": Objective(CLIP | {"kind": "gspo", "agg": "seq-mean-token-mean"}),
    "cispo": Objective(CLIP | {"kind": "cispo"}),
    "sapo": Objective({"kind": "sapo", "tau_pos": TAU_POS, "tau_neg": TAU_NEG}),
}


@dataclass(frozen=True)
class HeadObjective:
    """A policy loss from hidden states as `prefkern.linear_policy_loss` is asked for it."""

    options: dict[str, Any]
    reference: bool = False
    entropy_coef: float = 0.0


ENTROPY_COEF = 1e-3
HEAD_OBJECTIVES = {
    "clip": HeadObjective(CLIP),
    "grpo": HeadObjective(CLIP | {"beta": BETA}, reference=True),
    "grpo+entropy": HeadObjective(CLIP | {"beta": BETA}, reference=True, entropy_coef=ENTROPY_COEF),
    "gspo": HeadObjective(CLIP | {"kind": "gspo", "agg": "trl-grpo"}),
}


@dataclass(frozen=True)
class PairObjective:
    """A loss of pairs as `prefkern.preference_loss` is asked for it."""

    options: dict[str, Any]
    reference: bool = True
    lengths: bool = False


PAIR_BETA, SIMPO_BETA, SIMPO_GAMMA = 0.1, 2.0, 0.5
PAIR_OBJECTIVES = {
    "dpo": PairObjective({"beta": PAIR_BETA}),
    "simpo": PairObjective({"beta": SIMPO_BETA, "offset": SIMPO_GAMMA, "average": "logp"}, reference=False, lengths=True),
    "exo": PairObjective({"beta": PAIR_BETA, "kind": "exo_pair", "label_smoothing": 1e-3}),
}
ORPO_BETA = 0.1
# As `prefkern.linear_preference_loss` is asked. ORPO's beta is a factor of the odds, beside a likelihood of weight 1: taken as
# one of the whole, HEAD_PAIR_SCALE, it divides that weight.
HEAD_PAIR_OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": PAIR_OBJECTIVES["dpo"].options,
    "simpo": PAIR_OBJECTIVES["simpo"].options,
    "orpo": {"beta": 1.0, "score": "log_odds", "average": "logp", "sft_weight": 1 / ORPO_BETA},
}

LIST_OBJECTIVES: dict[str, dict[str, Any]] = {
    "lambda": {"kind": "lambda", "beta": 0.5},
    "plackett_luce": {"kind": "plackett_luce"},
    "exo": {"kind": "exo"},
}
HEAD_PAIR_SCALE = {"orpo": ORPO_BETA}

Logprobs = tuple[Tensor, Tensor | None]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
Reduction = Literal["sum", "logsumexp"]
Rule = Literal["trl", "count"]
ThompsonMode = Literal["thompson", "mean"]
KnapsackMethod = Literal["exact", "greedy"]
GpKernelName = Literal["rbf", "matern52"]


class Unavailable(Exception):
    """Why a peer has nothing to measure here."""


class Peer:
    """A peer that has none of the ops."""

    name = ""
    about = ""

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        raise Unavailable("has no such op")

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        raise Unavailable("has no such op")

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None, estimator: str) -> Tensor:
        raise Unavailable("has no such op")

    def group_reduce(self, values: Tensor, group: Tensor, size: int | None, reduce: Reduction) -> Tensor:
        raise Unavailable("has no such op")

    def conflict_runs(self, tokens: Tensor, advantages: Tensor, mask: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        raise Unavailable("has no such op")

    def policy_loss(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logp: Tensor | None,
        entropy: Tensor | None,
        objective: str,
    ) -> LossAndMetrics:
        raise Unavailable("has no such op")

    def preference_loss(
        self,
        chosen: Tensor,
        rejected: Tensor,
        refs: tuple[Tensor, ...] | None,
        lengths: tuple[Tensor, ...] | None,
        objective: str,
    ) -> LossAndMetrics:
        raise Unavailable("has no such op")

    def diffusion_pref_loss(
        self, pred_w: Tensor, pred_l: Tensor, target: Tensor, ref_w: Tensor, ref_l: Tensor
    ) -> LossAndMetrics:
        raise Unavailable("has no such op")

    def listwise_loss(self, scores: Tensor, labels: Tensor, objective: str) -> Tensor:
        raise Unavailable("has no such op")

    def linear_policy_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor | None,
        advantages: Tensor,
        token_weight: Tensor | None,
        objective: str,
    ) -> Tensor:
        raise Unavailable("has no such op")

    def linear_preference_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor | None, objective: str
    ) -> Tensor:
        raise Unavailable("has no such op")

    def linear_unpaired_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, desirable: Tensor
    ) -> Tensor:
        raise Unavailable("has no such op")

    def top_quantile_mask(self, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
        raise Unavailable("has no such op")

    def sequence_sum(self, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        raise Unavailable("has no such op")

    def gae(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        raise Unavailable("has no such op")

    def seeded_normal_combine(self, seed: int, weights: Tensor, n: int) -> Tensor:
        raise Unavailable("has no such op")

    def beta_thompson_topk(self, alpha: Tensor, beta: Tensor, k: int, mode: ThompsonMode) -> tuple[Tensor, Tensor]:
        raise Unavailable("has no such op")

    def knapsack_allocate(self, utilities: Tensor, total: int, b_min: int, method: KnapsackMethod) -> Tensor:
        raise Unavailable("has no such op")

    def self_bleu(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        raise Unavailable("has no such op")

    def edit_distance(self, ids: Tensor, cu_seqlens: Tensor, cu_prompts: Tensor) -> Tensor:
        raise Unavailable("has no such op")

    def greedy_select(self, emb: Tensor, types: Tensor, seeds: Tensor, quotas: tuple[int, ...], reduce: str) -> Tensor:
        raise Unavailable("has no such op")

    def gp_unique_posterior(
        self, L: Tensor, a: Tensor, U: Tensor, X: Tensor, kernel: GpKernelName, length: float
    ) -> tuple[Tensor, Tensor]:
        raise Unavailable("has no such op")

    def chol_append(self, factor: Tensor, row: Tensor, matrix: Tensor) -> Tensor:
        raise Unavailable("has no such op")

    def lpg_inner_loss(self, actions: Tensor, probs: Tensor, y: Tensor, pi_hat: Tensor, y_hat: Tensor) -> Tensor:
        raise Unavailable("has no such op")

    def reverse_gru_reset(
        self, x: Tensor, done: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_n: Tensor
    ) -> Tensor:
        raise Unavailable("has no such op")
