"""Libraries that bring kernels of their own, through what they offer to others."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

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
    TOP_FRACTION,
    Logprobs,
    Peer,
    Rule,
    Unavailable,
)
from prefkern.bench.peers.objectives import TwoStep


class Torch(Peer):
    """PyTorch's own functions for the purpose: F.linear_cross_entropy as it comes, F.cross_entropy, and others."""

    name = "torch"
    about = "F.linear_cross_entropy and F.cross_entropy, reduction none; kthvalue; segment_reduce"

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

    def top_quantile_mask(self, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
        among = values[mask]
        n = len(among)
        if rule == "count":
            return (values >= among.kthvalue(n + 1 - math.ceil(TOP_FRACTION * n)).values) & mask
        place = (1 - TOP_FRACTION) * (n - 1)
        below = math.floor(place)
        low, high = (among.kthvalue(min(k, n)).values for k in (below + 1, below + 2))
        return (values >= torch.lerp(low, high, place - below)) & mask

    def sequence_sum(self, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            raise Unavailable("has no such op for padded sequences")
        return torch.segment_reduce(values, "sum", lengths=cu_seqlens.diff())


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

    def top_quantile_mask(self, values: Tensor, mask: Tensor, rule: Rule) -> Tensor:
        raise Unavailable("has no such op")

    def sequence_sum(self, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        raise Unavailable("has no such op")


class Liger(Peer):
    """Liger Kernel's losses that take the head's weight, in chunks of one response or pair, and the chunked selective
    log-probability of its policy losses: torch operations, no Triton kernel."""

    name = "liger"
    about = "liger_kernel.chunked_loss: fused linear GRPO, DPO, SimPO, ORPO, KTO; the head of its policy losses"

    def __init__(self) -> None:
        module = _import("liger_kernel.chunked_loss.fused_linear_ppo", "liger_kernel")
        self._function: Any = _member(module, "_ChunkedSelectiveLogProbFunction")
        self._chunk: int = _member(module, "_SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE")
        self._losses: dict[str, Any] = {}

    def _loss(self, name: str, **options: Any) -> Any:
        """The module of a loss, made once: what it compiles is compiled once, too."""
        key = f"{name} {options}"
        if key not in self._losses:
            self._losses[key] = _member(_import("liger_kernel.chunked_loss", "liger_kernel"), name)(**options)
        return self._losses[key]

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        _no_entropy(entropy)
        return self._function.apply(hidden, weight, targets, None, 1.0, self._chunk), None

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
        _no_entropy(HEAD_OBJECTIVES[objective].entropy_coef != 0)
        by_sequence = objective == "gspo"
        loss = self._loss(
            "LigerFusedLinearGRPOLoss", beta=0.0 if ref_logp is None else BETA, use_ref_model=ref_logp is not None,
            epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH, loss_type="grpo" if by_sequence else "bnpo",
            importance_sampling_level="sequence" if by_sequence else "token",
        )  # fmt: skip
        return loss(
            hidden, weight, targets, torch.ones_like(old_logp), advantages, ref_per_token_logps=ref_logp,
            old_per_token_logps=old_logp, vllm_is_ratio=token_weight,
        )[0]  # fmt: skip

    def linear_preference_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor | None, objective: str
    ) -> Tensor:
        options: dict[str, dict[str, Any]] = {
            "dpo": {"beta": PAIR_BETA, "use_ref_model": False},  # it takes the reference as hidden states only
            "simpo": {"beta": SIMPO_BETA, "gamma": SIMPO_GAMMA, "compute_nll_loss": False},
            "orpo": {"beta": ORPO_BETA},
        }
        names = {"dpo": "DPO", "simpo": "SimPO", "orpo": "ORPO"}
        loss = self._loss(f"LigerFusedLinear{names[objective]}Loss", **options[objective])
        return loss(weight, hidden, _own(targets))[0]

    def linear_unpaired_loss(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logp: Tensor, desirable: Tensor
    ) -> Tensor:
        loss = self._loss("LigerFusedLinearKTOLoss", beta=PAIR_BETA)
        # The reference is the same for all responses here: a constant, as the reference point is.
        return loss(hidden, weight, _own(targets), preference_labels=desirable, kl=ref_logp[0].sum())[0]


def _own(targets: Tensor) -> Tensor:
    """The same numbers in another object: Liger marks its size as dynamic, which a peer compiled for static shapes refuses."""
    return targets.view_as(targets)


class Trl(TwoStep):
    """TRL's chunked head, with losses in plain PyTorch behind it, and its functions over logits. Importing the latter takes the
    whole trainer along."""

    name = "trl"
    about = "trl.kernels.ChunkedLogProbFunction, plain PyTorch behind it; selective_log_softmax and entropy_from_logits"
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


class Verl(Peer):
    """verl's fused head, in Triton: for GPUs."""

    name = "verl"
    about = "verl.utils.kernel.linear_cross_entropy, which always gives the entropy"

    def __init__(self) -> None:
        module = _import("verl.utils.kernel.linear_cross_entropy", "verl")
        self._function: Callable[..., tuple[Tensor, Tensor]] = _member(module, "linear_cross_entropy")

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        _on_gpu(hidden)
        logp, both = self._function(hidden, weight, targets, 1.0, "none")
        return logp, both if entropy else None


class Quack(Peer):
    """QuACK's cross-entropy, in CuTe DSL, behind a product that keeps all logits, for GPUs. Its chunked head gives no loss of a
    row."""

    name = "quack"
    about = "quack.cross_entropy, reduction none, behind F.linear"

    def __init__(self) -> None:
        self._function: Callable[..., Tensor] = _member(_import("quack.cross_entropy", "quack"), "cross_entropy")

    def linear_logprobs(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        _on_gpu(hidden)
        return self.logits_logprobs(F.linear(hidden, weight), targets, entropy)

    def logits_logprobs(self, logits: Tensor, targets: Tensor, entropy: bool) -> Logprobs:
        _no_entropy(entropy)
        _on_gpu(logits)
        return -self._function(logits, targets, reduction="none"), None


def _on_gpu(t: Tensor) -> None:
    if not t.is_cuda:
        raise Unavailable("needs an NVIDIA GPU")


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
