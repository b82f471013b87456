"""The output head of a model: what stands in for it, what its product is, and how log-probs take the product's place."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...ops import LinearLogprobs


class Unfit(Exception):
    """Why a model has to make its logits."""


# What the stand-in answers in place of logits. The smallest gives the scale of capped logits, the largest the cap.
# Powers of two, which no floating dtype rounds.
_SMALL, _LARGE = 2.0**-13, 2.0**100
KNOWN = torch.tensor([0.0, _SMALL, 1.0, -1.0, 4.0, -32.0, 256.0, _LARGE], dtype=torch.float64, device="cpu")


class StandIn(nn.Module):
    """In the place of an output head: keeps the hidden states and answers with known numbers, on the CPU, where to read them
    is to wait for nothing."""

    hidden: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.take_the_place_of(None)

    def take_the_place_of(self, head: nn.Module | None) -> None:
        self.__dict__.update(head=head, hidden=None)  # no module of this one

    def __getattr__(self, name: str) -> Any:
        head = self.__dict__.get("head")
        if head is None:
            return super().__getattr__(name)
        return getattr(head, name)

    @torch.compiler.disable
    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        if self.hidden is not None:
            raise Unfit("its forward applies its output head more than once")
        self.__dict__["hidden"] = hidden
        return KNOWN.expand(*hidden.shape[:-1], -1)


def scale_and_softcap(answer: Tensor) -> tuple[float, float | None]:
    """s and c (or None) if `answer` is c tanh(s x / c), or s x, of the known numbers x, in every row."""
    rows = answer.detach().reshape(-1, len(KNOWN)).to("cpu", torch.float64)
    if not len(rows):
        return 1.0, None
    found = dict(zip(KNOWN.tolist(), rows[0].tolist(), strict=True))
    limit = found[_LARGE]
    softcap = limit if abs(limit) < 2.0**50 else None
    scale = found[1.0] if softcap is None else found[_SMALL] / _SMALL
    expected = [scale * x if softcap is None else softcap * math.tanh(scale * x / softcap) for x in found] if limit else []
    right = torch.tensor(expected, dtype=torch.float64)
    if not (scale > 0 and limit > 0 and torch.allclose(rows, right.expand_as(rows), rtol=1e-5, atol=1e-9)):
        raise Unfit("it changes them by more than a factor and a soft cap")
    return (1.0 if abs(scale - 1) < 1e-6 else scale), softcap


class Adapter(NamedTuple):
    """One LoRA adapter of a head: W + scale B A, with the bias that B may have."""

    a: Any  # linear modules without their forward
    b: Any
    scale: float


class Product(NamedTuple):
    """What to call so that a head's product happens, and what is to be added to its weight."""

    module: nn.Module
    adapters: tuple[Adapter, ...] = ()

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """All adapters as one: their ranks add up."""
        pairs = [(adapter.a.weight.to(dtype), adapter.b.weight.to(dtype), adapter.scale) for adapter in self.adapters]
        if len(pairs) < 2:
            return pairs[0] if pairs else None
        return torch.cat([a for a, _, _ in pairs]), torch.cat([b * scale for _, b, scale in pairs], 1), 1.0

    def bias(self, bias: Tensor | None) -> Tensor | None:
        for adapter in self.adapters:
            if adapter.b.bias is not None:
                further = adapter.b.bias * adapter.scale
                bias = further if bias is None else bias + further
        return bias


class InsteadOfProduct(TorchFunctionMode):
    """Log-probs in the place of ``linear(x, weight)`` with a weight of V rows. A head is called under it, so that what brings
    its weight into place does so, for the backward too: the log-probs come out of the head packed, ``[..., n]``."""

    def __init__(self, vocab: int | None, logprobs: Callable[[Tensor, Tensor, Tensor | None], LinearLogprobs]) -> None:
        super().__init__()
        self.vocab, self.logprobs = vocab, logprobs
        self.result: LinearLogprobs | None = None
        self.packed: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.linear:
            return func(*args, **kwargs)
        x, weight, bias = linear_arguments(*args, **kwargs)
        if weight.shape[0] != self.vocab:
            return func(*args, **kwargs)
        if type(weight) not in (Tensor, nn.Parameter):
            raise Unfit(f"its output head's weight is a {type(weight).__name__}")
        self.result = self.logprobs(x, weight, bias)
        fields = [t for t in self.result if t is not None]
        self.packed = torch.stack([t.to(fields[0].dtype) for t in fields], -1)
        return self.packed

    def handed_over(self, out: Any, module: nn.Module, head: nn.Module) -> LinearLogprobs:
        """The result as `out`, which `module` returned, hands it over."""
        assert self.result is not None
        if out is not self.packed and not (
            isinstance(out, Tensor) and out.shape == self.packed.shape and torch.equal(out, self.packed)
        ):
            raise Unfit(f"its output head, {called(head)}, works on after its product")
        if out is self.packed and not any(hooked(m) for m in module.modules()):
            return self.result
        # A hook may hang on the tensor that came out: the gradient has to come by it.
        fields = iter(out.unbind(-1))
        return LinearLogprobs(next(fields), *(None if t is None else next(fields).to(t.dtype) for t in self.result[1:]))


def linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def hooked(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def product_of(head: nn.Module) -> Product:
    """How to have the product of a head. Only LoRA needs to be known, which adds a second product; all others are called as
    they are, whatever they put in front of the product: merged or disabled adapters, copies of the head that are trained."""
    if "peft" not in sys.modules:
        return Product(head)
    lora: Any = importlib.import_module("peft.tuners.lora")
    if not isinstance(head, lora.LoraLayer) or head.disable_adapters or head.merged:
        return Product(head)
    names = [name for name in head.active_adapters if name in head.lora_A]
    if not names:
        return Product(head)
    if type(head) is not lora.Linear or head.fan_in_fan_out:
        raise Unfit(f"its output head is a LoRA layer of {called(head.get_base_layer())}")
    for name in names:
        variant, dropout = head.lora_variant.get(name), head.lora_dropout[name]
        if variant is not None:
            raise Unfit(f"the LoRA adapter {name!r} of its output head is {called(variant)}")
        if dropout.training and getattr(dropout, "p", 0.0) > 0:
            raise Unfit(f"the LoRA adapter {name!r} of its output head has a dropout of {dropout.p}")
        for part in (head.lora_A[name], head.lora_B[name]):
            if type(part.weight) is not nn.Parameter or not part.weight.numel():
                raise Unfit(f"the LoRA adapter {name!r} of its output head is not in one piece")
    if hooked(head):  # a batch that mixes adapters, for one
        raise Unfit("its output head is a LoRA layer with hooks")
    adapters = (Adapter(head.lora_A[name], head.lora_B[name], head.scaling[name]) for name in names)
    return Product(head.base_layer, tuple(adapters))


def called(thing: Any) -> str:
    return getattr(thing, "__name__", None) or f"a {type(thing).__name__}"
