"""Sets of cases that belong together, for `prefkern bench --suite`.

head     a linear head to log-probs and entropy
losses   whole losses from hidden states; rows without a weight, frozen heads
small    everything that is no matrix product
memory   what heads and losses hold beyond inputs and gradients; nothing is timed
scaling  the head's cost against N, H, V and threads, one at a time

A suite comes in three sizes. "quick" takes seconds and says whether everything runs; "default" is made for two CPU cores and
some minutes, the most telling cases first, so that a time limit leaves out the others; "full" has all shapes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from prefkern.bench.runner import Row, default_peers, run_case
from prefkern.bench.shapes import DTYPES, Case, Shape, choose

SIZES = ("quick", "default", "full")
HEAD_PEERS = ("eager", "compile", "torch", "trl", "liger", "cce")
LOSS_PEERS = ("eager", "compile", "trl", "liger")
SMALL_PEERS = ("eager", "compile", "torch", "trl")
GPU_PEERS = {"linear_logprobs": ("verl", "quack"), "logits_logprobs": ("quack",)}  # who has kernels for no other device

Axes = dict[str, int]


@dataclass(frozen=True)
class Part:
    """A case, whom to compare with, and which of its variants to measure (None: all)."""

    case: Case
    against: tuple[str, ...]
    variants: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Suite:
    """`parts(size, device)` lists what is measured; `timed` is whether times are."""

    name: str
    about: str
    parts: Callable[[str, str], list[Part]]
    timed: bool = True


def _head(size: str, device: str) -> list[Part]:
    if size == "quick":
        shapes: list[tuple[Shape, str, Sequence[str]]] = [((48, 32, 1000), dtype, ("fwd", "bwd")) for dtype in ("fp32", "bf16")]
    elif size == "full":
        cuda = device == "cuda"
        tokens, widths = ((2048, 8192, 32768), (1024, 2048, 4096)) if cuda else ((512, 2048), (256, 1024, 4096))
        sizes = itertools.product(tokens, widths, (32000, 128256, 151936))
        shapes = [(s, dtype, ("fwd", "bwd", "frozen")) for s in sizes for dtype in (("bf16",) if cuda else ("fp32", "bf16"))]
    elif device == "cuda":
        gpu = ((4096, 4096, 128256), (8192, 2048, 151936), (8192, 1024, 32000))
        shapes = [(s, "bf16", ("fwd", "bwd", "frozen")) for s in gpu]
    else:
        shapes = [
            ((512, 1024, 32000), "fp32", ("fwd", "bwd")),
            ((512, 256, 128256), "fp32", ("fwd", "bwd")),
            ((512, 256, 32000), "bf16", ("fwd", "bwd")),
            ((2048, 256, 32000), "fp32", ("fwd", "bwd")),
            ((512, 256, 32000), "fp32", ("frozen", "active")),
            ((512, 4096, 32000), "fp32", ("fwd",)),
            ((512, 1024, 32000), "bf16", ("fwd", "bwd")),
        ]
    return [Part(Case("linear_logprobs", s, dtype, mode), HEAD_PEERS) for s, dtype, modes in shapes for mode in modes]


LOSSES = {"linear_policy_loss": 1, "linear_preference_loss": 2, "linear_unpaired_loss": 1}  # responses of a unit of the shape


def _losses(size: str, device: str) -> list[Part]:
    sequences, *rest = (
        (4, 12, 32, 1000) if size == "quick" else (16, 512, 4096, 128256) if device == "cuda" else (8, 64, 512, 32000)
    )
    dtypes = ("bf16",) if device == "cuda" and size != "quick" else ("fp32", "bf16") if size == "quick" else ("fp32",)
    shapes = [(sequences, *rest)]
    if size == "full":
        shapes += [(32, 64, 256, 32000), (8, 64, 1024, 32000), (8, 64, 1024, 128256)]
        dtypes = ("fp32", "bf16")
    parts = []
    for (count, *others), dtype in itertools.product(shapes, dtypes):
        for mode in ("bwd", "frozen", "active"):
            for op, responses in LOSSES.items():
                if mode != "active" or op == "linear_policy_loss":
                    parts.append(Part(Case(op, (count // responses, *others), dtype, mode), LOSS_PEERS))
    return parts


def _small(size: str, device: str) -> list[Part]:
    quick = size == "quick"
    logits = (64, 2000) if quick else (4096, 151936) if device == "cuda" else (256, 128256)
    large = size == "full" or device == "cuda"
    tokens = ((8, 64),) if quick else ((64, 4096), (8, 512), *(((1024, 8192),) if large else ()))
    samples = (64, 800) if quick else (4096, 100000, 1000000) if device == "cuda" else (1000, 10000, 100000, 1000000)
    policy = ("clip", "clip+k3", "gspo") if size == "default" else None
    parts = [
        Part(Case("logits_logprobs", logits, dtype, mode), SMALL_PEERS) for dtype in ("fp32", "bf16") for mode in ("fwd", "bwd")
    ]
    parts += [Part(Case("policy_loss", shape, "fp32", "bwd"), SMALL_PEERS, policy) for shape in tokens]
    for count in samples:
        # dictionaries of samples take 10 us a sample
        against = (*SMALL_PEERS, "python") if count <= 10000 and device == "cpu" else SMALL_PEERS
        variants = ("contiguous", "shuffled") if size == "default" else None
        parts.append(Part(Case("group_advantages", (count, 8), "fp32", "fwd"), against, variants))
    # Of eager PyTorch, gae and reverse_gru_reset loop over the columns; python loops over the tokens.
    others: dict[str, tuple[Shape, str]] = {
        "conflict_runs": ((8, 64, 2000) if quick else (8, 1024, 128256), "fwd"),
        "group_reduce": ((800, 8) if quick else (100000, 8), "bwd"),
        "preference_loss": ((64,) if quick else (65536,), "bwd"),
        "listwise_loss": ((16, 8) if quick else (4096, 64), "bwd"),
        "diffusion_pref_loss": ((2, 4, 8, 8) if quick else (8, 4, 128, 128), "bwd"),
        "top_quantile_mask": ((8, 64) if quick else (64, 4096), "fwd"),
        "sequence_sum": ((8, 64) if quick else (64, 4096), "bwd"),
        "gae": ((8, 64) if quick else (64, 4096), "fwd"),
        "seeded_normal_combine": ((1000, 3) if quick else (10_000_000, 8), "fwd"),
        "beta_thompson_topk": ((4096,) if quick else (1000000,), "fwd"),
        "knapsack_allocate": ((12, 6) if quick else (200, 8), "fwd"),
        "greedy_select": ((2, 20, 8) if quick else (8, 1024, 768), "fwd"),
        "gp_unique_posterior": ((20, 50, 2) if quick else (256, 10000, 2), "fwd"),
        "chol_append": ((20,) if quick else (256,), "fwd"),
        "lpg_inner_loss": ((64, 3, 4) if quick else (81920, 8, 8), "bwd"),
        "reverse_gru_reset": ((8, 4, 16) if quick else (256, 20, 256), "bwd"),
    }
    peers = ("eager", "torch", "python") if device == "cpu" else ("eager", "torch")
    if device == "cpu":  # where alone there are kernels for it
        others["self_bleu"] = ((2, 3, 20) if quick else (32, 8, 512), "fwd")
        others["edit_distance"] = ((2, 3, 20) if quick else (8, 8, 256), "fwd")
    parts += [Part(Case(op, shape, "fp32", mode), peers) for op, (shape, mode) in others.items()]
    return parts if quick else [*parts, Part(Case("overhead", (), "fp32", "fwd"), default_peers("overhead"))]


def _memory(size: str, device: str) -> list[Part]:
    if size == "quick":
        n, t, h, v = 48, 12, 32, 1000
    elif device == "cuda":
        n, t, h, v = 8192, 512, 4096, 128256
    else:
        n, t, h, v = 1024, 64, 256, 128256
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16") if size == "full" else ("fp32",)
    parts = []
    for dtype in dtypes:
        parts += [Part(Case("linear_logprobs", (n, h, v), dtype, mode), HEAD_PEERS) for mode in ("fwd", "bwd", "frozen")]
        for mode in ("bwd", "frozen"):
            for op, responses in LOSSES.items():
                parts.append(Part(Case(op, (n // t // responses, t, h, v), dtype, mode), LOSS_PEERS))
    return parts


def scaling_base(size: str, device: str) -> Axes:
    """What is held fixed in the curves, but for the one axis that varies."""
    if size == "quick":
        return {"N": 32, "H": 16, "V": 500}
    return {"N": 4096, "H": 2048, "V": 32000} if device == "cuda" else {"N": 256, "H": 256, "V": 32000}


def _scaling(size: str, device: str) -> list[Part]:
    base = scaling_base(size, device)
    factors = {
        "N": (0.5, 2) if size == "quick" else (0.25, 0.5, 2, 4, 8),
        "H": (0.5, 2) if size == "quick" else (0.5, 2, 4, 8),
        "V": (0.5, 2) if size == "quick" else (0.125, 0.25, 0.5, 2, 4),
    }
    if size == "full":
        factors["H"] = (0.5, 2, 4, 8, 16)
    points = [(base, 0)]
    for axis, steps in factors.items():
        points += [(base | {axis: round(base[axis] * step)}, 0) for step in steps]
    if device == "cpu":
        cpus = os.cpu_count() or 1
        threads = {1, *(2**k for k in range(1, 10) if 2**k < cpus), cpus} - {torch.get_num_threads()}
        points += [(base, count) for count in sorted(threads)]
    dtypes = ("bf16",) if device == "cuda" else ("fp32", "bf16") if size == "full" or _multiplies_bf16() else ("fp32",)
    return [
        Part(Case("linear_logprobs", tuple(point.values()), dtype, mode, count), ("eager",), ("logp+entropy",))
        for dtype in dtypes for mode in ("fwd", "bwd") for point, count in points
    ]  # fmt: skip


def _multiplies_bf16() -> bool:
    """Whether the CPU has products of bfloat16."""
    from prefkern.bench.workloads.products import quickest_type

    return quickest_type(torch.bfloat16, "cpu", True) == torch.bfloat16


SUITES = {
    suite.name: suite
    for suite in (
        Suite("head", "a linear head to log-probs and entropy, forward and with backward", _head),
        Suite("losses", "whole losses from hidden states; rows without a weight, frozen heads", _losses),
        Suite("small", "what is no matrix product: logits to log-probs, losses, advantages, ...", _small),
        Suite("memory", "what heads and losses hold beyond inputs and gradients", _memory, timed=False),
        Suite("scaling", "the head's cost against N, H, V and threads", _scaling),
    )
}


def parts_of(
    name: str,
    size: str = "default",
    *,
    device: str = "cpu",
    against: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
) -> list[Part]:
    """What a suite measures, of that only what has one of the dtypes and modes, compared with whom is named."""
    suite = SUITES[choose("suite", name, SUITES)]
    parts = suite.parts(choose("size", size, SIZES), device)
    parts = [p for p in parts if p.case.dtype in (dtypes or DTYPES) and (modes is None or p.case.mode in modes)]
    if device == "cuda" and name != "scaling":
        parts = [replace(p, against=(*p.against, *GPU_PEERS.get(p.case.op, ()))) for p in parts]
    return parts if against is None else [replace(part, against=tuple(against)) for part in parts]


def run_suite(
    name: str,
    parts: Sequence[Part],
    *,
    device: str = "cpu",
    rounds: int = 5,
    budget_s: float = 4.0,
    limit_s: float | None = None,
    each: Callable[[Case, list[Row]], None] = lambda case, rows: None,
) -> dict[str, Any]:
    """The `rows` of a suite, as JSON takes them, and which cases were `left_out` because `limit_s` seconds were over before
    their turn. A case that has begun is finished."""
    start, rows, left_out = time.perf_counter(), list[dict[str, object]](), list[str]()
    for part in parts:
        if limit_s is not None and time.perf_counter() - start > limit_s:
            left_out.append(part.case.title)
            continue
        found = run_case(
            part.case, part.against, device=device, rounds=rounds if SUITES[name].timed else 0, budget_s=budget_s,
            variants=part.variants,
        )  # fmt: skip
        each(part.case, found)
        rows += [asdict(row) for row in found]
    return {"rows": rows, "left_out": left_out}
