"""`patch`: the head of TRL's trainers, replaced where all of them go through.

Each trainer calls its model with `fused_lm_head=True`; that forward calls one autograd function, which scores the labels in
chunks of the vocabulary. What stands in for it here is :func:`prefkern.linear_logprobs`, with the same arguments and results.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ... import linear_logprobs
from .._version import check_version

SUPPORTED = ((1, 16), (1, 17))
"""From which version of TRL, and to before which, this is tested."""
OUTPUTS = {"entropy": "entropy", "log_sum_sq_probs": "sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "is_top1"}
"""TRL's names of what comes along with the log-probs, in its order, and prefkern's."""
TRAINERS = ("GRPOTrainer", "RLOOTrainer", "DPOTrainer", "KTOTrainer", "SFTTrainer")
"""Those whose every training step goes through the head."""
ARGUMENTS = [
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
]  # fmt: skip
DEVICES = ("cpu", "cuda")

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class ChunkedLogProbFunction:
    """Stands in for TRL's autograd function of this name: it has its `apply`.

    Entropy and logits are those of the softmax of cap(scale (h W^T + b)) / temperature, as in TRL; `log_sum_sq_probs` is the
    logarithm of the sum of squares, `is_top1` gives ties to the first. log-probs and entropy have gradients to hidden, weight
    and bias, the others none. Results are float32 whatever the operands.
    """

    calls = 0

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Iterable[str] = tuple(OUTPUTS),
    ) -> Results:
        """chunk_size: not needed here; how the head is cut follows from its shapes (`prefkern.plan_chunks`)."""
        ChunkedLogProbFunction.calls += 1
        kind = hidden.device.type
        if kind not in DEVICES:
            original = _patched.original
            return original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, tuple(outputs)
            )
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wanted = set(outputs)
        options = {
            "temperature": float(temperature),
            "softcap": final_logit_softcapping,
            "logit_scale": float(logit_scale),
            "outputs": tuple(mine for theirs, mine in OUTPUTS.items() if theirs in wanted),
        }
        function = _PartitionedHead.apply if _weights_are_partitioned() else _head
        logp, entropy, sum_sq_probs, mean_logit, is_top1 = function(hidden, weight, bias, targets, dtype, options)
        return logp, entropy, None if sum_sq_probs is None else sum_sq_probs.log(), mean_logit, is_top1


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, options: dict[str, Any]
) -> Results:
    """As TRL, in the type of autocast, or else in that of the hidden states."""
    with torch.autocast(hidden.device.type, enabled=False):
        out = linear_logprobs(hidden.to(dtype), weight.to(dtype), targets, bias=bias, **options)
    return out.logp, out.entropy, out.sum_sq_probs, out.mean_logit, out.is_top1


class _PartitionedHead(torch.autograd.Function):
    """Under ZeRO-3 the weight is whole only while it is gathered, so that what the forward saved is empty in the backward:
    that gathers it again, and goes through the head once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        options: dict[str, Any],
    ) -> Results:
        out = _head(hidden, weight, bias, targets, dtype, options)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.dtype, ctx.options = dtype, {**options, "outputs": tuple({"entropy"} & set(options["outputs"]))}
        ctx.mark_non_differentiable(*(t for t in out[2:] if t is not None))
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        hidden, weight, bias, targets = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight, bias), torch.enable_grad():
            leaves: list[Any] = [
                None if t is None else t.detach().requires_grad_(wanted)
                for t, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
            ]
            out = _head(leaves[0], leaves[1], leaves[2], targets, ctx.dtype, ctx.options)
            pairs = [(t, g) for t, g in zip(out[:2], gradients[:2], strict=True) if t is not None and g is not None]
            wanted = [t for t in leaves if t is not None and t.requires_grad]
            found: list[Tensor | None] = [None] * len(wanted)
            if pairs:
                found = list(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs]))
        return (*(found.pop(0) if t is not None and t.requires_grad else None for t in leaves), None, None, None)


def _weights_are_partitioned() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def _score_labelled_rows(device: torch.device) -> bool:
    """In place of TRL's question whether rows without a label are left out before the head: they cost as much as others."""
    return device.type in DEVICES or _patched.compacts(device)


def _checked_training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The trainer's training step, which must come through the head: RuntimeError if it did not."""
    from trl.trainer.base_trainer import _BaseTrainer

    before = ChunkedLogProbFunction.calls
    out = super(_BaseTrainer, self).training_step(*args, **kwargs)
    if ChunkedLogProbFunction.calls == before and any(
        cls.__name__ in TRAINERS and cls.__module__.startswith("trl.trainer.") for cls in type(self).__mro__
    ):
        raise RuntimeError(
            f"{type(self).__name__} did a training step in which prefkern's head was not called, though patch() is on: the "
            "forward of the model, or trl.trainer.utils._ChunkedLogProbFunction, was replaced after it. Call patch() again, "
            "or unpatch() to train with what is there"
        )
    return out


class _Patched:
    """What was there before."""

    original: Any = None
    compacts: Any = None


_patched = _Patched()


class Patch:
    """What :func:`patch` returns; as a context manager it undoes what that call did."""

    def __init__(self, installed: bool) -> None:
        self._installed = installed
        self._calls = ChunkedLogProbFunction.calls

    @property
    def calls(self) -> int:
        """How often the head was called since."""
        return ChunkedLogProbFunction.calls - self._calls

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._installed:
            unpatch()

    def __repr__(self) -> str:
        return f"Patch(calls={self.calls})"


def patch() -> Patch:
    """Let TRL's trainers compute log-probs, entropies and what else they take from the head with `prefkern.linear_logprobs`.

    Losses and metrics stay what they are. Trainers and models that exist already are included, as are modules that imported
    TRL's function by name. On the CPU only labelled rows are scored, as TRL does on GPUs. A second call changes nothing.

    Returns:
        Patch, whose `calls` counts calls of the head. `with patch(): ...` undoes it at the end, unless it was on before.

    Raises:
        ImportError: without TRL, or for one outside :data:`SUPPORTED`.
        RuntimeError: for one whose hooks are not those expected; later on, from a training step of the GRPO, RLOO, DPO, KTO or
            SFT trainer in which the head was not called.
    """
    check_version("trl", *SUPPORTED)
    from trl.trainer import base_trainer, utils

    if utils._ChunkedLogProbFunction is ChunkedLogProbFunction:
        return Patch(installed=False)
    original = _patched.original or utils._ChunkedLogProbFunction
    arguments = list(inspect.signature(original.forward).parameters)
    if arguments != ARGUMENTS or not hasattr(utils, "_use_triton"):
        raise RuntimeError(
            f"trl.trainer.utils._ChunkedLogProbFunction takes {arguments}; {ARGUMENTS} is expected, as in trl 1.16"
        )
    if _patched.original is None:  # else somebody else has put something over ours
        _patched.original, _patched.compacts = original, utils._use_triton
        utils._use_triton = _score_labelled_rows
        base_trainer._BaseTrainer.training_step = _checked_training_step
    utils._ChunkedLogProbFunction = ChunkedLogProbFunction
    _replace(original, ChunkedLogProbFunction)
    return Patch(installed=True)


def unpatch() -> None:
    """Undo :func:`patch`; nothing if it was not called."""
    if _patched.original is None:
        return
    from trl.trainer import base_trainer, utils

    _replace(ChunkedLogProbFunction, _patched.original)
    utils._ChunkedLogProbFunction, utils._use_triton = _patched.original, _patched.compacts
    del base_trainer._BaseTrainer.training_step
    _patched.original = _patched.compacts = None


def _replace(old: Any, new: Any) -> None:
    """Every global name of a loaded module that is `old`, but where it is defined."""
    defined = {old.__module__, new.__module__}
    for name, module in list(sys.modules.items()):
        if module is None or name in defined:
            continue
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, key, new)
