"""A head's weight that data-parallel training keeps in parts, whole for a while: a DTensor (FSDP2), or a parameter that
DeepSpeed ZeRO-3 has partitioned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ..ops._arguments import check_tensors, is_dtensor

Gradient = Literal["mean", "sum", "same"]
_GRADIENTS = ("mean", "sum", "same")
Gather = Callable[[Tensor], AbstractContextManager[Any]]


@contextmanager
def gathered(weight: Tensor, *, gradient: Gradient = "mean", gather: Gather | None = None) -> Iterator[Tensor]:
    """The whole weight, for the forward of a head; gradients go to the part that this process keeps.

        with prefkern.distributed.gathered(model.lm_head.weight) as weight:
            out = prefkern.linear_logprobs(hidden, weight, targets)
        ...
        loss.backward()  # in the block or after it

    A collective call: every process that keeps a part enters, and runs its backward, in the same order. What it does depends
    on what the weight is:

    - a DTensor, of any placements: ``weight.full_tensor()``, which lives as long as the graph. Its gradient is brought back to
      the weight's placements, combined over the processes of its mesh as `gradient` says.
    - a parameter with a ``ds_id``, of DeepSpeed ZeRO-3: gathered by ``deepspeed.zero.GatheredParameters([weight],
      modifier_rank=None)`` in the block; partitioned between the forward and the backward, in which the head's saved weight is
      gathered a second time, until its gradient has been accumulated. What is then done with the gradient is DeepSpeed's.
      DeepSpeed is not among the packages that this is tested with: the tests have a stand-in with the same protocol.
    - anything else: itself.

    Args:
        weight: the parameter.
        gradient: of a DTensor. ``"mean"``: processes have rows of their own, the gradient is the mean over them, as FSDP2
            computes; where all have the same rows it is theirs. ``"sum"``: the sum. ``"same"``: all have the same rows, and
            nothing is sent.
        gather: of ZeRO-3, in place of DeepSpeed's: ``gather(weight)`` is a context manager in which ``weight.data`` is whole.
    """
    check_tensors(weight=weight)
    choice("gradient", gradient, _GRADIENTS)
    if is_dtensor(weight):
        yield whole(weight, gradient)
    elif not hasattr(weight, "ds_id"):
        yield weight
    else:
        again = _Again(weight, gather or _deepspeed)
        with again.gather(weight):
            borrowed: Tensor = _Borrowed.apply(weight, again)
            # By where it lies: a hook that held the tensor would keep it as long as the graph.
            place = _place(borrowed)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: again if _place(t) == place else t, _unpacked):
                yield borrowed


def whole(t: Tensor, gradient: Gradient) -> Tensor:
    """A DTensor as a tensor; any other tensor as it is."""
    full: Tensor = _Whole.apply(t, gradient) if is_dtensor(t) else t
    return full


class _Whole(torch.autograd.Function):
    """``full_tensor()`` itself takes the gradients of all processes for equal, and each keeps its part of its own."""

    @staticmethod
    def forward(ctx: Any, t: Any, gradient: Gradient) -> Tensor:
        ctx.mesh, ctx.placements, ctx.gradient = t.device_mesh, t.placements, gradient
        full: Tensor = t.full_tensor()
        return full.view_as(full)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh = ctx.mesh
        if ctx.gradient == "mean":
            g = g / mesh.size()
        each = Replicate() if ctx.gradient == "same" else Partial("sum")
        shared = DTensor.from_local(g.contiguous(), mesh, [each] * mesh.ndim, run_check=False)
        return shared.redistribute(mesh, ctx.placements), None


# ---- ZeRO-3 -----------------------------------------------------------------------------------------------------------


def _deepspeed(weight: Tensor) -> AbstractContextManager[Any]:
    import deepspeed  # type: ignore[import-not-found]

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([weight], modifier_rank=None)
    return context


class _Borrowed(torch.autograd.Function):
    """The parameter's present data, which outlives the partition; the gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, again: _Again) -> Tensor:
        ctx.again = again
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.again.open()  # for the accumulation, where the head has saved something else, as under autocast
        return g, None


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def _unpacked(saved: Any) -> Tensor:
    return saved.open() if isinstance(saved, _Again) else saved


class _Again:
    """What a graph holds in place of the whole weight: the means to have it once more."""

    def __init__(self, weight: Tensor, gather: Gather) -> None:
        self.weight, self.gather = weight, gather
        self.context: AbstractContextManager[Any] | None = None
        self.hook: Any = None

    def open(self) -> Tensor:
        if self.context is None:
            context = self.gather(self.weight)
            context.__enter__()
            self.context = context
            # Until the gradient is accumulated, which looks at the shape of the parameter; where it is not asked for, until the
            # backward ends.
            if self.weight.requires_grad and self.hook is None:
                self.hook = self.weight.register_post_accumulate_grad_hook(lambda _: self.close())
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.end)
        return self.weight.detach()

    def close(self) -> None:
        context, self.context = self.context, None
        if context is not None:
            context.__exit__(None, None, None)

    def end(self) -> None:
        self.close()
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
