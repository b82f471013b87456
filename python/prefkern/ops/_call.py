"""How a public function calls its op: errors get their Python type back, and validation can be switched on."""

import os
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch

_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError, "RuntimeError": RuntimeError}
_MARKED = re.compile(r"\b(ValueError|TypeError|RuntimeError): (.*)", re.DOTALL)

_validation = os.environ.get("PREFKERN_VALIDATE", "") not in ("", "0")


def set_validation(enabled: bool) -> None:
    """Switch the checks on CUDA tensors that need a device synchronisation (targets out of range, temperatures that are
    not positive, rewards that are not finite). On the CPU they always run. On every device, switch the checks that
    log-probs inside a mask are finite, which otherwise show as NaN in the loss, and that ``keep`` of ``linear_logprobs`` holds
    every target, whose logp otherwise is -inf. Off by default; the environment variable
    ``PREFKERN_VALIDATE=1`` switches it on for a process. Without it the affected rows come out NaN."""
    global _validation  # noqa: PLW0603
    _validation = bool(enabled)


def validation() -> bool:
    """Whether the checks of :func:`set_validation` run."""
    return _validation


def translate(error: RuntimeError) -> Exception:
    """The exception that a failed op stands for. The stable ABI lets C++ throw only RuntimeError; our checks carry the
    Python type as a prefix of the message."""
    text = str(error)
    marked = _MARKED.search(text)
    if marked:
        return _KINDS[marked[1]](marked[2].strip())
    if "out of memory" in text and not isinstance(error, torch.OutOfMemoryError):
        return torch.OutOfMemoryError(text)
    return error


def call(op: Callable[..., Any], *args: Any) -> Any:
    """``op(*args)`` with the exceptions of :func:`translate`."""
    try:
        return op(*args)
    except RuntimeError as error:
        raise translate(error) from None


def no_double_backward(name: str) -> None:
    """Make a second differentiation of the backward op ``name`` an error instead of a silent zero."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name} cannot be differentiated twice; its backward has no derivative")

    torch.library.register_autograd(f"prefkern::{name}", backward)


def undivided(g: torch.Tensor) -> torch.Tensor:
    """With create_graph, a gradient that requires one: a second differentiation must not find a constant."""
    return g.detach().requires_grad_() if torch.is_grad_enabled() and not g.requires_grad else g


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, why: str) -> torch.Tensor:
        ctx.why = why
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(ctx.why)


def differentiated_once(t: torch.Tensor, why: str) -> torch.Tensor:
    """A gradient that no op of the graph made, as a backward returns it: under create_graph a second differentiation finds an
    error, and not a constant."""
    return _Refused.apply(t.detach().requires_grad_(), why) if torch.is_grad_enabled() else t


_keep_graph: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def keeps_graph() -> bool:
    """Whether the backward that runs may be followed by another one through the same graph, so that what was saved for it
    must stay as it is."""
    return True if _keep_graph is None else bool(_keep_graph())
