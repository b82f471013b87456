"""Argument checks that several ops share."""

from typing import Any

import torch
from torch import Tensor

from ._call import validation


def check_tensors(**tensors: Any) -> None:
    """TypeError naming the first argument that is no tensor."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; a torch.Tensor is expected")


def constant(name: str, t: Tensor | None) -> Tensor | None:
    """The tensor, or None, as what no gradient goes to; TypeError for anything else."""
    if t is None:
        return None
    if not isinstance(t, Tensor):
        check_tensors(**{name: t})
    return t.detach() if t.requires_grad else t


def is_dtensor(t: Any) -> bool:
    """Whether `t` is a DTensor, asked of every call: torch.distributed.tensor need not be imported for it."""
    return type(t) is not Tensor and type(t) is not torch.nn.Parameter and hasattr(t, "device_mesh") and isinstance(t, Tensor)


def number(name: str, value: Any, accepted: str = "a number") -> float:
    """A number as a float, or a TypeError that names the argument."""
    if isinstance(value, float):  # first: under dynamic shapes a compiler's symbolic floats know nothing but this
        return value
    if isinstance(value, Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; {accepted} is expected")
    return float(value)


def integer(name: str, value: Any) -> int:
    """An integer, or a TypeError that names the argument."""
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; an integer is expected")
    return int(value)


def positive_int(name: str, value: int) -> int:
    """A positive integer that fits the op's schema, or an error that names the argument."""
    number = integer(name, value)
    if not 0 < number < 1 << 63:
        raise ValueError(f"{name} is {number}; it must be positive and below 2^63, or None for the default")
    return number


def check_layout(cu_seqlens: Any, tokens: Tensor, name: str, mask: Any = None) -> None:
    """TypeError unless `mask` and `cu_seqlens` are tensors or None; on CUDA, under validation, also :func:`check_ends`. On the
    CPU the op itself looks."""
    if mask is not None:
        check_tensors(mask=mask)
    if cu_seqlens is not None:
        check_tensors(cu_seqlens=cu_seqlens)
        if cu_seqlens.is_cuda and validation() and not torch.compiler.is_compiling():
            check_ends(cu_seqlens, tokens, name)


def check_ends(cu_seqlens: Tensor, tokens: Tensor, name: str, cu_name: str = "cu_seqlens") -> None:
    """ValueError unless `cu_seqlens` cuts all of `tokens` into rows. Waits for the device."""
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens.numel() or ends != sorted(ends):
        raise ValueError(f"{cu_name} is {ends}; it must ascend from 0 to the {tokens.numel()} tokens of {name}")


def accumulator(t: Tensor) -> torch.dtype:
    """The dtype results of this input have: float64 for float64, else float32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def same_device(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """For fake implementations: ValueError unless all tensors are on the device of `reference`."""
    # One tensor on the meta device brings the whole call here, and results on another device would never be written.
    for name, t in tensors.items():
        if t is not None and t.device != reference.device:
            raise ValueError(
                f"{name} is on {t.device} but {reference_name} is on {reference.device}; they must be on the same device"
            )
