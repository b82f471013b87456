"""What can be measured: ops, their shapes and types, and how they are spelled on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from prefkern._names import nearest_hint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MODES = ("fwd", "bwd", "frozen", "active")
BOTH = MODES[:2]

Shape = tuple[int, ...]


class UsageError(ValueError):
    """The caller asked for something that does not exist; the message says what does."""


@dataclass(frozen=True)
class Op:
    """An op that can be measured, and what is measured when nothing else is asked for."""

    name: str
    dims: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]

    @property
    def pattern(self) -> str:
        return "x".join(self.dims)


OPS = {
    op.name: op
    for op in (
        Op("linear_logprobs", ("N", "H", "V"), ((512, 1024, 32000),), tuple(DTYPES), MODES),
        Op("logits_logprobs", ("N", "V"), ((256, 128256),), tuple(DTYPES), BOTH),
        Op("group_advantages", ("B", "G"), ((100000, 8),), ("fp32", "fp64"), ("fwd",)),
        Op("group_reduce", ("B", "G"), ((100000, 8),), ("fp32", "fp64"), BOTH),
        Op("conflict_runs", ("G", "L", "V"), ((16, 1024, 128256),), ("fp32",), ("fwd",)),
        Op("policy_loss", ("B", "T"), ((64, 4096),), ("fp32", "fp64"), BOTH),
        Op("preference_loss", ("P",), ((65536,),), ("fp32", "fp64"), BOTH),
        Op("listwise_loss", ("B", "K"), ((4096, 64),), ("fp32", "fp64"), BOTH),
        Op("diffusion_pref_loss", ("B", "C", "H", "W"), ((8, 4, 128, 128),), tuple(DTYPES), BOTH),
        Op("linear_policy_loss", ("B", "T", "H", "V"), ((8, 64, 1024, 32000),), tuple(DTYPES), MODES),
        Op("linear_preference_loss", ("P", "T", "H", "V"), ((8, 64, 1024, 32000),), tuple(DTYPES), MODES[:3]),
        Op("linear_unpaired_loss", ("B", "T", "H", "V"), ((8, 64, 1024, 32000),), tuple(DTYPES), MODES[:3]),
        Op("top_quantile_mask", ("B", "T"), ((64, 4096),), ("fp32", "fp64"), ("fwd",)),
        Op("sequence_sum", ("B", "T"), ((64, 4096),), ("fp32", "fp64"), BOTH),
        Op("gae", ("B", "T"), ((64, 4096),), ("fp32", "fp64"), ("fwd",)),
        Op("seeded_normal_combine", ("D", "M"), ((10_000_000, 8),), ("fp32",), ("fwd",)),
        Op("beta_thompson_topk", ("M",), ((1000000,),), ("fp32", "fp64"), ("fwd",)),
        Op("knapsack_allocate", ("N", "B"), ((200, 8),), ("fp32", "fp64"), ("fwd",)),
        Op("self_bleu", ("P", "K", "L"), ((32, 8, 512),), ("fp32",), ("fwd",)),
        Op("edit_distance", ("P", "K", "L"), ((8, 8, 256),), ("fp32",), ("fwd",)),
        Op("greedy_select", ("Q", "K", "D"), ((8, 1024, 768),), ("fp32", "bf16", "fp16", "fp64"), ("fwd",)),
        Op("gp_unique_posterior", ("Q", "M", "D"), ((256, 10000, 2),), ("fp32", "fp64"), ("fwd",)),
        Op("chol_append", ("Q",), ((256,),), ("fp32", "fp64"), ("fwd",)),
        Op("lpg_inner_loss", ("N", "A", "W"), ((81920, 8, 8),), ("fp32", "fp64"), BOTH),
        Op("reverse_gru_reset", ("B", "T", "H"), ((256, 20, 256),), ("fp32", "fp64"), BOTH),
        Op("overhead", (), ((),), ("fp32",), ("fwd",)),
    )
}
DEFAULT_DTYPES = ("fp32",)
DEFAULT_MODES = ("fwd",)


@dataclass(frozen=True)
class Case:
    """One op at one shape, in one type. Modes: "fwd" is forward alone; the others are forward and backward together, with
    every gradient ("bwd"), without that of the weight ("frozen"), with a fifth of the rows having any ("active")."""

    op: str
    shape: Shape
    dtype: str
    mode: str
    threads: int = 0
    """0: as many as are set."""

    @property
    def title(self) -> str:
        dims = "x".join(map(str, self.shape))
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else ""
        return " ".join(word for word in (self.op, dims, self.dtype, self.mode, threads) if word)


def choose(kind: str, name: str, accepted: Iterable[str]) -> str:
    """`name` if it is one of `accepted`; else an error with the nearest that is."""
    names = list(accepted)
    if name in names:
        return name
    raise UsageError(f"unknown {kind} {name!r}{nearest_hint(name, names)} Accepted: {', '.join(names)}")


def choose_all(kind: str, text: str, accepted: Iterable[str]) -> tuple[str, ...]:
    """The names in a comma-separated list, each of them checked."""
    names = list(accepted)
    return tuple(dict.fromkeys(choose(kind, part.strip(), names) for part in text.split(",")))


def check_device(device: str) -> None:
    """An error unless prefkern can run there."""
    import prefkern

    if choose("device", device, ("cpu", "cuda")) == "cpu":
        return
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device")
    if not prefkern.capabilities()["cuda_compiled"]:
        raise UsageError("--device cuda: this prefkern was built without CUDA")


def parse_shapes(text: str) -> list[Shape]:
    """'512x1024x32000,2048x256x32000' -> [(512, 1024, 32000), (2048, 256, 32000)]."""
    return [_parse_shape(part.strip()) for part in text.split(",")]


def _parse_shape(text: str) -> Shape:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise UsageError(f"bad shape {text!r}: expected positive sizes joined by 'x', such as 512x1024x32000")
    shape = tuple(int(part) for part in text.split("x"))
    if 0 in shape:
        raise UsageError(f"bad shape {text!r}: sizes must be positive")
    return shape


def plan_cases(
    ops: Sequence[str] = (),
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of a run.

    Shapes without an op are shapes of linear_logprobs; without either, every op runs its default. An op that was named
    refuses what it does not have, or if there are several, having nothing of what was asked for; one that was not is left
    out instead.
    """
    named = list(ops) or (["linear_logprobs"] if shapes else [])
    cases: list[Case] = []
    for name in named or OPS:
        op = OPS[choose("op", name, OPS)]
        op_shapes = [_fit(op, shape) for shape in shapes] if shapes else op.shapes
        op_dtypes = _having("dtype", op, dtypes or DEFAULT_DTYPES, op.dtypes, len(named))
        op_modes = _having("mode", op, modes or DEFAULT_MODES, op.modes, len(named))
        cases += [Case(op.name, s, d, m) for s in op_shapes for d in op_dtypes for m in op_modes]
    return cases


def _fit(op: Op, shape: Shape) -> Shape:
    got = "x".join(map(str, shape))
    if not op.dims:
        raise UsageError(f"{op.name} takes no shape, got {got}")
    if len(shape) != len(op.dims):
        raise UsageError(f"{op.name} takes shapes {op.pattern}, got {got}")
    if op.dims == ("B", "G") and shape[0] % shape[1]:
        raise UsageError(f"{op.name} takes shapes BxG with B a multiple of the group size G, got {got}")
    return shape


def _having(kind: str, op: Op, wanted: Sequence[str], accepted: Sequence[str], named: int) -> list[str]:
    has = [name for name in wanted if name in accepted]
    if (named == 1 and len(has) < len(wanted)) or (named > 1 and not has):
        lacks = ", ".join(name for name in wanted if name not in accepted)
        raise UsageError(f"{op.name} is not measured with {kind} {lacks}. Accepted: {', '.join(accepted)}")
    return has
