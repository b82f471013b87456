"""The losses of `linear_policy_loss`, `linear_preference_loss` and `linear_unpaired_loss` from log-probs, in plain PyTorch and
without metrics: what follows the head in eager and compiled PyTorch and behind the heads of others. Every token counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.bench.peers.base import (
    BETA,
    EPS_HIGH,
    EPS_LOW,
    HEAD_OBJECTIVES,
    ORPO_BETA,
    PAIR_BETA,
    SIMPO_BETA,
    SIMPO_GAMMA,
    Logprobs,
    Peer,
)


def policy_objective(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    advantages: Tensor,
    token_weight: Tensor | None,
    objective: str,
) -> Tensor:
    """GRPO's clipped loss, or GSPO's, with k3 and an entropy bonus where the objective has them. All [B, T]; advantages [B]."""
    a, d = advantages[:, None], logp - old_logp
    ratio = (d.mean(1, keepdim=True) if objective == "gspo" else d).exp()
    losses = torch.maximum(-a * ratio, -a * ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH))
    if token_weight is not None:
        losses = losses * token_weight
    if ref_logp is not None:
        to_ref = ref_logp - logp
        losses = losses + BETA * (to_ref.exp() - to_ref - 1)
    loss = losses.mean()
    return loss if entropy is None else loss - HEAD_OBJECTIVES[objective].entropy_coef * entropy.mean()


def pair_objective(logp: Tensor, ref_logp: Tensor | None, objective: str) -> Tensor:
    """DPO, SimPO or ORPO: log-probs [2P, T], chosen responses first."""
    if objective == "dpo":
        chosen, rejected = (logp if ref_logp is None else logp - ref_logp).sum(1).chunk(2)
        return -F.logsigmoid(PAIR_BETA * (chosen - rejected)).mean()
    chosen, rejected = logp.mean(1).chunk(2)
    if objective == "simpo":
        return -F.logsigmoid(SIMPO_BETA * (chosen - rejected) - SIMPO_GAMMA).mean()
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -ORPO_BETA * F.logsigmoid(odds).mean() - chosen.mean()


def unpaired_objective(logp: Tensor, ref_logp: Tensor, desirable: Tensor) -> Tensor:
    """KTO with its reference point at 0: log-probs [B, T]."""
    u = PAIR_BETA * (logp - ref_logp).sum(1)
    return (1 - torch.sigmoid(torch.where(desirable, u, -u))).mean()


class TwoStep(Peer):
    """A head of [N, H] with the plain objectives behind it: the three losses for whoever has `linear_logprobs`."""

    def _logp(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool = False) -> Logprobs:
        """Shaped like the targets."""
        logp, both = self.linear_logprobs(hidden.flatten(0, 1), weight, targets.flatten(), entropy)
        return logp.view_as(targets), None if both is None else both.view_as(targets)

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
        logp, entropy = self._logp(hidden, weight, targets, HEAD_OBJECTIVES[objective].entropy_coef != 0)
        return policy_objective(logp, entropy, old_logp, ref_logp, advantages, token_weight, objective)

    def linear_preference_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor | None, objective: str
    ) -> Tensor:
        return pair_objective(self._logp(hidden, weight, targets)[0], ref_logp, objective)

    def linear_unpaired_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, desirable: Tensor
    ) -> Tensor:
        return unpaired_objective(self._logp(hidden, weight, targets)[0], ref_logp, desirable)
