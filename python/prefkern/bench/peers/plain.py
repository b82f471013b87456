"""PyTorch as it is usually written, eager and compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.bench.peers.base import ADVANTAGE_EPS, DUAL_CLIP, EPS_HIGH, EPS_LOW, Logprobs, LossAndMetrics, Peer, Unavailable


class Eager(Peer):
    """The usual plain PyTorch."""

    name = "eager"
    about = "plain PyTorch: log_softmax, gather, exp"

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._of_log_softmax(F.log_softmax(_wide(hidden @ weight.T), dim=-1), targets, entropy)

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._of_log_softmax(F.log_softmax(_wide(logits), dim=-1), targets, entropy)

    @staticmethod
    def _of_log_softmax(log_p: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        logp = log_p.gather(1, targets[:, None]).squeeze(1)
        return logp, -(log_p.exp() * log_p).sum(-1) if entropy else None

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None) -> Tensor:
        if size is not None:
            r = rewards.view(-1, size)
            return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + ADVANTAGE_EPS)).view(-1)
        ids, index = torch.unique(group, return_inverse=True)
        zeros = rewards.new_zeros(len(ids))
        count = zeros.index_add(0, index, torch.ones_like(rewards))
        centred = rewards - (zeros.index_add(0, index, rewards) / count)[index]
        variance = zeros.index_add(0, index, centred.square()) / (count - 1).clamp_min(1)
        return centred / (variance.sqrt()[index] + ADVANTAGE_EPS)

    def policy_loss(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> LossAndMetrics:
        a, m = advantages[:, None], mask.to(logp.dtype)
        tokens = m.sum()
        d = (logp - old_logp).clamp(-20.0, 20.0)
        ratio = d.exp()
        plain, bounded = -a * ratio, -a * ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
        clipped = torch.maximum(plain, bounded)
        cap = -a * DUAL_CLIP
        loss = (torch.where(a < 0, torch.minimum(clipped, cap), clipped) * m).sum() / tokens
        with torch.no_grad():
            clips = (bounded > plain).to(m.dtype) * m
            metrics = {
                "clip_fraction_low": (clips * (a < 0)).sum() / tokens,
                "clip_fraction_high": (clips * (a > 0)).sum() / tokens,
                "clip_fraction_dual": (((clipped > cap) & (a < 0)) * m).sum() / tokens,
                "ratio_mean": (ratio * m).sum() / tokens,
                "ratio_min": ratio.masked_fill(~mask, torch.inf).min(),
                "ratio_max": ratio.masked_fill(~mask, -torch.inf).max(),
                "approx_kl": ((ratio - 1 - d) * m).sum() / tokens,
            }
        return loss, metrics


class Compile(Peer):
    """torch.compile of the eager definitions, static shapes."""

    name = "compile"
    about = "torch.compile of eager, static shapes"

    def __init__(self) -> None:
        torch.compiler.reset()  # each case compiles its own, and none meets the recompilation limit
        eager = Eager()
        self._linear = torch.compile(eager.linear_logprobs, dynamic=False)
        self._logits = torch.compile(eager.logits_logprobs, dynamic=False)
        self._advantages = torch.compile(eager.group_advantages, dynamic=False)
        self._policy = torch.compile(eager.policy_loss, dynamic=False)

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._linear(hidden, weight, targets, entropy)

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        return self._logits(logits, targets, entropy)

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None) -> Tensor:
        if size is None:
            raise Unavailable("torch.unique is not compiled")
        return self._advantages(rewards, group, size)

    def policy_loss(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> LossAndMetrics:
        return self._policy(logp, old_logp, advantages, mask)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
