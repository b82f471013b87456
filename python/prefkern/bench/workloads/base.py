"""What every workload is made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefkern.bench.peers import Peer
from prefkern.bench.shapes import DTYPES, Case
from prefkern.bench.timing import seconds_of

Outputs = dict[str, Tensor]  # gradients are named "grad ..."
OutputsCall = Callable[[], Outputs]


@dataclass(frozen=True)
class Floor:
    about: str
    call: Callable[[], object]


@dataclass(frozen=True)
class Errors:
    forward: float
    gradient: float | None = None


class Workload(ABC):
    """The inputs of one case and what can be done with them."""

    variants: tuple[str, ...]

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.dtype = DTYPES[case.dtype]
        self.backward = case.mode != "fwd"
        self.random = torch.Generator().manual_seed(0)
        # What is large is drawn where it is used: a GPU draws gigabytes faster than they reach it.
        self.there = self.random if device == "cpu" else torch.Generator(device).manual_seed(0)

    @abstractmethod
    def call(self, peer: Peer, variant: str) -> OutputsCall:
        """What to time for this peer."""

    @abstractmethod
    def floor(self) -> Floor: ...

    def more_floors(self) -> dict[str, Floor]:
        """Others worth knowing, by what they are called."""
        return {}

    def gradient_bytes(self) -> int | None:
        """What the gradients take that a call of this case has to return; None where nobody asks."""
        return None

    @abstractmethod
    def errors(self, outputs: Outputs, variant: str) -> Errors: ...

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.there, device=self.device) * scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.random).to(self.device)


def gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError("no gradient arrived")
    return leaf.grad


def errors_against(outputs: Outputs, truth: Outputs) -> Errors:
    """Of the outputs that have a truth; infinite where a result is NaN."""
    forward, gradient = 0.0, None
    for name, expected in truth.items():
        worst = (outputs[name].double() - expected).abs().nan_to_num(nan=math.inf).max().item()
        if name.startswith("grad "):
            relative = worst / max(expected.abs().max().item(), 1e-30)
            gradient = relative if gradient is None else max(gradient, relative)
        else:
            forward = max(forward, worst)
    return Errors(forward, gradient)


def copy_of(inputs: list[Tensor]) -> Floor:
    buffers = [torch.empty_like(x) for x in inputs]

    def copy() -> None:
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)

    return Floor("copy_ of the inputs", copy)


def fastest_read(x: Tensor, device: str) -> tuple[str, Callable[[], object]]:
    """The quickest of torch's ways to read every byte of x once, tried out on the spot, and what it is."""
    flat = x.view(-1)
    reads: dict[str, Callable[[], object]] = {
        "amax of each row": lambda: x.amax(-1),
        "sum of each row": lambda: x.sum(-1),
    }
    if x.dtype in (torch.float32, torch.float64):
        reads["torch.dot with itself"] = lambda: torch.dot(flat, flat)
    if flat.numel() * flat.element_size() % 8 == 0:  # wide words may read faster than narrow numbers
        words = flat.view(torch.int64)
        reads["sum of the bytes as int64"] = words.sum
    seconds = {name: min(seconds_of(read, device) for _ in range(5)) for name, read in reads.items()}
    best = min(seconds, key=lambda name: seconds[name])
    return best, reads[best]


def grouped(
    values: Tensor, size: int, random: torch.Generator, shuffled: bool, device: str
) -> tuple[Tensor, Tensor, int | None]:
    """Values [B, ...] with the ids of their groups, and the size of those if they lie one behind the other."""
    group = torch.arange(len(values) // size).repeat_interleave(size)
    if not shuffled:
        return values.to(device), group.to(device), size
    order = torch.randperm(len(values), generator=random)
    return values[order].to(device), group[order].to(device), None
