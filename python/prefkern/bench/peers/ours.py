"""This library, in the ways in which it is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.bench.peers.base import ADVANTAGE_EPS, DUAL_CLIP, EPS_HIGH, EPS_LOW, Logprobs, LossAndMetrics, Peer


class Prefkern(Peer):
    """This library, through its public functions."""

    name = "prefkern"
    about = "this library"

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        import prefkern

        out = prefkern.linear_logprobs(hidden, weight, targets, outputs=("entropy",) if entropy else ())
        return out.logp, out.entropy

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        import prefkern

        out = prefkern.logits_logprobs(logits, targets, outputs=("entropy",) if entropy else ())
        return out.logp, out.entropy

    def group_advantages(self, rewards: Tensor, group: Tensor, size: int | None) -> Tensor:
        import prefkern

        return prefkern.group_advantages(rewards, group, eps=ADVANTAGE_EPS).advantages

    def policy_loss(self, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> LossAndMetrics:
        import prefkern

        return prefkern.policy_loss(logp, old_logp, advantages, mask, eps_low=EPS_LOW, eps_high=EPS_HIGH, dual_clip=DUAL_CLIP)


class PrefkernFp32(Prefkern):
    """This library with narrow inputs widened to float32 beforehand: what the narrow path must be worth."""

    name = "prefkern-fp32"
    about = "this library, given the same numbers in float32"


class PrefkernInplace(Prefkern):
    """This library overwriting the logits with their gradient, by the ops themselves: autograd would want a producer."""

    name = "prefkern-inplace"
    about = "this library, the gradient written over the logits"

    def logits_forward_backward(
        self, logits: Tensor, targets: Tensor, g_logp: Tensor, g_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ops, options = torch.ops.prefkern, (1.0, 0.0, 1.0, -100)
        outputs = 33 if g_entropy is not None else 32  # logprobs/ops.h: kSaveStats and kEntropy
        logp, entropy, _, _, _, _, stats = ops.logits_logprobs_fwd(logits, targets, None, *options, outputs, True)
        ops.logits_logprobs_backward_(g_logp, g_entropy, None, logits, targets, None, entropy, stats, *options)
        return logp, entropy if g_entropy is not None else None
