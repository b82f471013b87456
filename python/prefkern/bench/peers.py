"""Whom prefkern is compared with: one small adapter for each library.

An adapter imports its library when it is made, and raises `Unavailable` with the reason if that does not work or if the
library has no such op. Every method takes and returns tensors and is differentiable where the op is:

    linear_logprobs(hidden [N, H], weight [V, H], targets [N], entropy)  -> logp [N], entropy [N] or None
    logits_logprobs(logits [N, V], targets [N], entropy)                 -> logp [N], entropy [N] or None
    group_advantages(rewards [B], group [B], size)                       -> advantages [B]
    policy_loss(logp, old_logp, advantages, mask)                        -> loss and metrics; [B, T], advantages [B]

`size` is the size of the groups when they lie one behind the other, None when they do not.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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


class Torch(Peer):
    """PyTorch's own fused functions: F.linear_cross_entropy as it comes, and F.cross_entropy."""

    name = "torch"
    about = "F.linear_cross_entropy and F.cross_entropy, reduction none"

    def options(self) -> dict[str, Any]:
        return {}

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        _no_entropy(entropy)
        return -function(hidden, weight, targets, reduction="none", **self.options()), None

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        _no_entropy(entropy)
        return -F.cross_entropy(logits, targets, reduction="none"), None


class TorchChunked(Torch):
    """F.linear_cross_entropy with its options for little memory."""

    name = "torch-chunked"
    about = "F.linear_cross_entropy with LinearCrossEntropyOptions()"

    def options(self) -> dict[str, Any]:
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if options is None:
            raise Unavailable(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
        return {"options": options()}

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        raise Unavailable("has no such op")


class Liger(Peer):
    """Liger Kernel's chunked selective log-probability: torch operations, no Triton kernel."""

    name = "liger"
    about = "liger_kernel.chunked_loss, the head of its policy losses"

    def __init__(self) -> None:
        module = _import("liger_kernel.chunked_loss.fused_linear_ppo", "liger_kernel")
        self._function: Any = _member(module, "_ChunkedSelectiveLogProbFunction")
        self._chunk: int = _member(module, "_SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE")

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        _no_entropy(entropy)
        return self._function.apply(hidden, weight, targets, None, 1.0, self._chunk), None


class Trl(Peer):
    """TRL's chunked head, and its functions over logits. Importing the latter takes the whole trainer along."""

    name = "trl"
    about = "trl.kernels.ChunkedLogProbFunction; selective_log_softmax and entropy_from_logits"
    vocab_chunk = 32768  # what TRL's patched heads pass

    def __init__(self) -> None:
        self._function: Any = _member(_import("trl.kernels", "trl"), "ChunkedLogProbFunction")

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        outputs = ("entropy",) if entropy else ()
        arguments = (hidden, weight, None, targets, 1.0, self.vocab_chunk, None, 1.0, outputs)
        return self._function.apply(*arguments)[:2]

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        utils = _import("trl.trainer.utils", "trl")
        # These functions loop over sequences, so the rows are handed over as sequences of up to 256 tokens.
        rows = 256 if len(targets) % 256 == 0 else len(targets)
        sequences, index = logits.view(-1, rows, logits.shape[-1]), targets.view(-1, rows)
        if not entropy:
            return _member(utils, "selective_log_softmax")(sequences, index).view(-1), None
        logp, both = _member(utils, "selective_log_softmax_and_entropy")(sequences, index)
        return logp.view(-1), both.view(-1)


class Cce(Peer):
    """Apple's Cut Cross-Entropy; its torch.compile implementation where its kernels do not run."""

    name = "cce"
    about = "cut_cross_entropy, impl torch_compile on the CPU and cce on CUDA"

    def __init__(self) -> None:
        module = _import("cut_cross_entropy", "cut_cross_entropy")
        self._function: Callable[..., Tensor] = _member(module, "linear_cross_entropy")
        torch.compiler.reset()

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        _no_entropy(entropy)
        implementation = "cce" if hidden.is_cuda else "torch_compile"
        return -self._function(hidden, weight, targets, reduction="none", impl=implementation), None


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Prefkern, PrefkernFp32, PrefkernInplace, Eager, Compile, Torch, TorchChunked, Liger, Trl, Cce)
}
AGAINST = ("eager", "compile", "torch", "liger", "trl", "cce")  # whom a run compares with if nobody is named
NAMEABLE = (*AGAINST, "torch-chunked")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _no_entropy(entropy: bool) -> None:
    if entropy:
        raise Unavailable("gives no entropy")


def _import(module: str, package: str) -> Any:
    """The module, or `Unavailable`. A missing package and one that lacks something itself are told apart."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise Unavailable("not installed" if missing == package else f"needs {missing}") from None
    except Exception as error:  # a library may fail to import in any way
        raise Unavailable(f"does not import: {type(error).__name__}: {error}"[:160]) from error


def _member(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        raise Unavailable(f"this version has no {name}")
    return getattr(module, name)
