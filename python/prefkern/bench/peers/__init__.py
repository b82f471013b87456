"""Whom prefkern is compared with: one small adapter for each library.

An adapter imports its library when it is made, and raises `Unavailable` with the reason if that does not work or if the
library has no such op. Every method takes and returns tensors and is differentiable where the op is:

    linear_logprobs(hidden [N, H], weight [V, H], targets [N], entropy)  -> logp [N], entropy [N] or None
    logits_logprobs(logits [N, V], targets [N], entropy)                 -> logp [N], entropy [N] or None
    group_advantages(rewards [B], group [B], size)                       -> advantages [B]
    policy_loss(logp, old_logp, advantages, mask)                        -> loss and metrics; [B, T], advantages [B]

`size` is the size of the groups when they lie one behind the other, None when they do not.
"""

from prefkern.bench.peers.base import ADVANTAGE_EPS, DUAL_CLIP, EPS_HIGH, EPS_LOW, Logprobs, LossAndMetrics, Peer, Unavailable
from prefkern.bench.peers.libraries import Cce, Liger, Torch, TorchChunked, Trl
from prefkern.bench.peers.ours import Prefkern, PrefkernFp32, PrefkernInplace
from prefkern.bench.peers.plain import Compile, Eager

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Prefkern, PrefkernFp32, PrefkernInplace, Eager, Compile, Torch, TorchChunked, Liger, Trl, Cce)
}
AGAINST = ("eager", "compile", "torch", "liger", "trl", "cce")  # whom a run compares with if nobody is named
NAMEABLE = (*AGAINST, "torch-chunked")

__all__ = [
    "ADVANTAGE_EPS",
    "AGAINST",
    "DUAL_CLIP",
    "EPS_HIGH",
    "EPS_LOW",
    "NAMEABLE",
    "PEERS",
    "Cce",
    "Compile",
    "Eager",
    "Liger",
    "Logprobs",
    "LossAndMetrics",
    "Peer",
    "Prefkern",
    "PrefkernFp32",
    "PrefkernInplace",
    "Torch",
    "TorchChunked",
    "Trl",
    "Unavailable",
]
