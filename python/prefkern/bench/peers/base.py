"""What a peer can be asked for, and with which constants."""

from __future__ import annotations

from torch import Tensor

EPS_LOW, EPS_HIGH, DUAL_CLIP = 0.2, 0.28, 3.0  # of the policy loss that is measured
ADVANTAGE_EPS = 1e-6

Logprobs = tuple[Tensor, Tensor | None]
LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


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

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None) -> Tensor:
        raise Unavailable("has no such op")

    def policy_loss(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> LossAndMetrics:
        raise Unavailable("has no such op")
