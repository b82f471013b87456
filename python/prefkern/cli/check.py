"""`prefkern check`: every op on this machine against its definition in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORWARD_BOUND = 1e-4  # absolute: nats, advantages, losses
FLOAT64_BOUND = 1e-10
FLOAT32_GRADIENT_BOUND = 1e-5  # of the largest gradient
PLAIN_FACTOR = 2.0  # narrower gradients may be this many times as far off as plain PyTorch in the same type


def check(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Save the table.")] = None,
) -> None:
    """Compare every op with its float64 definition. The exit code is 1 if anything is out of bounds."""
    from prefkern.bench.shapes import UsageError, check_device

    try:
        check_device(device)
    except UsageError as error:
        typer.echo(f"prefkern check: {error}", err=True)
        raise typer.Exit(2) from None
    lines = run(device)
    if json_file is not None:
        from prefkern.bench.report import environment

        rows = [asdict(line) for line in lines]
        json_file.write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    _print(lines)
    if not all(line.ok for line in lines):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Line:
    """One op, in one type, with one set of options."""

    op: str
    dtype: str
    case: str
    forward: float | None
    """Largest error of any output: absolute, except that lse and mean_logit, which grow with the logits, count relative
    to their size where that exceeds 1."""
    forward_bound: float
    gradient: float | None = None
    """Largest error of a gradient over the largest entry of that gradient, where it comes closest to its bound."""
    gradient_bound: float | None = None
    ok: bool = False
    error: str = ""


@dataclass(frozen=True)
class Problem:
    """A call by keyword: `leaves` get gradients. The three functions take the same arguments."""

    op: str
    case: str
    leaves: dict[str, Tensor]
    options: dict[str, Any]
    ours: Callable[..., Any]
    exact: Callable[..., Any]
    plain: Callable[..., Any] = field(repr=False)
    """The definition as PyTorch computes it in the type of the inputs."""


def run(device: str) -> list[Line]:
    """All lines of the table."""
    import torch

    from prefkern.bench.shapes import DTYPES

    torch.manual_seed(0)
    lines = []
    for name, dtype in DTYPES.items():
        if device == "cuda" and dtype == torch.float64:
            continue  # the CUDA kernels have no float64
        lines += [_judge(problem, name, dtype) for problem in _problems(dtype, device)]
    return sorted(lines, key=lambda line: _ORDER.index(line.op))


_ORDER = ("linear_logprobs", "logits_logprobs", "group_advantages", "policy_loss")


# --------------------------------------------------------------------------------------------------------- the problems


def _problems(dtype: torch.dtype, device: str) -> Iterator[Problem]:
    yield from _head_problems(dtype, device)
    yield from _advantage_problems(dtype, device)
    yield from _policy_problems(dtype, device)


def _head_problems(dtype: torch.dtype, device: str) -> Iterator[Problem]:
    """Sizes that no tile divides; targets of which some are ignored and some are the most likely token."""
    import torch

    import prefkern
    from prefkern import reference

    shape, hidden_size, vocab = (3, 37), 72, 1003
    hidden = torch.randn(*shape, hidden_size).to(dtype)
    weight = (2 / math.sqrt(hidden_size) * torch.randn(vocab, hidden_size)).to(dtype)
    bias = torch.randn(vocab).to(dtype)
    logits = (hidden.double() @ weight.double().T).to(dtype)
    targets = torch.randint(vocab, shape)
    targets[0] = logits[0].argmax(-1)
    some = targets.masked_fill(torch.rand(shape) < 0.3, -100)
    every = {"targets": some, "outputs": ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")}
    bent = {**every, "temperature": 0.5 + torch.rand(shape), "softcap": 4.0, "logit_scale": 1.3}

    def plain_linear(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any = None, **options: Any) -> Any:
        y = hidden @ weight.T
        return reference.logits_logprobs(y if bias is None else y + bias, targets, **options)

    linear = (prefkern.linear_logprobs, reference.linear_logprobs, plain_linear)
    over_logits = (prefkern.logits_logprobs, reference.logits_logprobs, reference.logits_logprobs)
    both = {"hidden": hidden, "weight": weight}
    one, far = {"logits": logits}, {"logits": logits + 500}
    yield from _on(
        device,
        Problem("linear_logprobs", "logp", both, {"targets": targets}, *linear),
        Problem("linear_logprobs", "all outputs, ignored rows", both, every, *linear),
        Problem("linear_logprobs", "bias, softcap, temperatures", {**both, "bias": bias}, bent, *linear),
        Problem("logits_logprobs", "logp", one, {"targets": targets}, *over_logits),
        Problem("logits_logprobs", "all outputs, ignored rows", one, every, *over_logits),
        Problem("logits_logprobs", "softcap, temperatures", one, bent, *over_logits),
        Problem("logits_logprobs", "offset of 500", far, every, *over_logits),
    )


def _advantage_problems(dtype: torch.dtype, device: str) -> Iterator[Problem]:
    """Shuffled groups of uneven sizes: some of one, one with equal rewards."""
    import torch

    import prefkern
    from prefkern import reference

    group = torch.cat([torch.randint(0, 40, (300,)) * 7919 - 3, torch.arange(1000, 1010)])
    rewards = torch.rand(len(group)).to(dtype)
    rewards[group == group[0]] = 0.1
    order = torch.randperm(len(group))
    functions = (prefkern.group_advantages, reference.group_advantages, reference.group_advantages)
    for estimator in ("grpo", "dr_grpo", "rloo"):
        for singleton in ("zero", "reward"):
            options = {"rewards": rewards[order], "group": group[order], "estimator": estimator, "singleton": singleton}
            yield from _on(device, Problem("group_advantages", f"{estimator}, singleton {singleton}", {}, options, *functions))


def _policy_problems(dtype: torch.dtype, device: str) -> Iterator[Problem]:
    """Ratios on both sides of every bound, NaN outside the mask, an empty sequence."""
    import torch

    import prefkern
    from prefkern import reference

    shape = (9, 41)
    mask = torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1))
    mask[4] = False
    old = -torch.rand(shape)
    logp, ref = old + 0.7 * torch.randn(shape), old + 0.3 * torch.randn(shape)
    logp, old, ref = (x.masked_fill(~mask, math.nan).to(dtype) for x in (logp, old, ref))
    advantages = torch.randn(shape[0]).to(dtype)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
    padded = {"old_logp": old, "advantages": advantages, "mask": mask}
    packed = {"old_logp": old[mask], "advantages": advantages, "cu_seqlens": cu_seqlens}
    more = {"dual_clip": 1.5, "eps_high": 0.28, "beta": 0.1}
    functions = (prefkern.policy_loss, reference.policy_loss, reference.policy_loss)
    by_sequence = {"agg": "seq-mean-token-mean"}
    for case, leaf, options in (
        ("padded, token-mean", logp, padded),
        ("padded, seq-mean-token-mean, dual clip, k3", logp, padded | more | by_sequence | {"ref_logp": ref}),
        ("packed, token-mean, dual clip, k3", logp[mask], packed | more | {"ref_logp": ref[mask]}),
        ("packed, seq-mean-token-mean", logp[mask], packed | by_sequence),
    ):
        yield from _on(device, Problem("policy_loss", case, {"logp": leaf}, options, *functions))


def _on(device: str, *problems: Problem) -> Iterator[Problem]:
    for p in problems:
        leaves = {name: leaf.to(device) for name, leaf in p.leaves.items()}
        options = {name: x.to(device) if hasattr(x, "to") else x for name, x in p.options.items()}
        yield Problem(p.op, p.case, leaves, options, p.ours, p.exact, p.plain)


# ---------------------------------------------------------------------------------------------------------- the verdict


def _judge(problem: Problem, name: str, dtype: torch.dtype) -> Line:
    import torch

    wide = dtype == torch.float64
    forward_bound = FLOAT64_BOUND if wide else FORWARD_BOUND
    try:
        exact, exact_grads = _evaluate(problem.exact, *_in_float64(problem))
        ours, our_grads = _evaluate(problem.ours, problem.leaves, problem.options)
        _, plain_grads = _evaluate(problem.plain, problem.leaves, problem.options)
    except Exception as error:  # whatever an op raises here is a finding
        return Line(problem.op, name, problem.case, None, forward_bound, error=f"{type(error).__name__}: {error}")
    forward = max(_distance(ours[key], exact[key]) / _unit(key, exact[key]) for key in exact)
    ok, gradient, bound = forward <= forward_bound, None, None
    for key, truth in exact_grads.items():
        scale = max(truth.abs().max().item(), 1e-30)
        this = _distance(our_grads[key], truth) / scale
        if wide:
            limit = FLOAT64_BOUND
        elif dtype == torch.float32:
            limit = FLOAT32_GRADIENT_BOUND
        else:
            limit = max(PLAIN_FACTOR * _distance(plain_grads[key], truth) / scale, torch.finfo(dtype).eps)
        ok = ok and this <= limit
        if gradient is None or bound is None or this / limit > gradient / bound:
            gradient, bound = this, limit
    return Line(problem.op, name, problem.case, forward, forward_bound, gradient, bound, ok)


def _evaluate(
    function: Callable[..., Any], leaves: dict[str, Tensor], options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients by name."""
    import torch

    fresh = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    result = function(**fresh, **options)
    outputs = {name: value for name, value in result._asdict().items() if value is not None and name != "metrics"}
    if fresh:
        weights = torch.Generator().manual_seed(1)
        scalar = sum(
            (x * torch.randn(x.shape, generator=weights).to(x.device)).sum()
            for name, x in outputs.items()
            if name in ("logp", "entropy", "lse", "loss")
        )
        grads = dict(zip(fresh, torch.autograd.grad(scalar, list(fresh.values())), strict=True))
    else:
        grads = {}
    return {**outputs, **getattr(result, "metrics", {})}, grads


def _in_float64(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torch

    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {k: v.double() for k, v in problem.leaves.items()}, {k: widen(v) for k, v in problem.options.items()}


def _unit(output: str, truth: Tensor) -> float:
    return max(1.0, truth.abs().max().item()) if output in ("lse", "mean_logit") else 1.0


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where a is NaN."""
    return (a.double() - b.double()).abs().nan_to_num(nan=math.inf).max().item()


def _print(lines: list[Line]) -> None:
    from rich.table import Table

    from prefkern.cli.console import make_console

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    table = Table(title="against float64", title_justify="left")
    for column in ("op", "dtype", "case"):
        table.add_column(column, overflow="fold")
    for column in ("forward", "bound", "gradient", "bound", "ok"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            line.op,
            line.dtype,
            line.case,
            number(line.forward),
            number(line.forward_bound),
            number(line.gradient),
            number(line.gradient_bound),
            "yes" if line.ok else "[bold red]NO[/]",
        )
    console = make_console()
    console.print(table)
    for line in lines:
        if line.error:
            console.print(f"{line.op} {line.dtype} {line.case}: {line.error}", markup=False)
    bad = sum(not line.ok for line in lines)
    console.print(f"{len(lines) - bad} of {len(lines)} within bounds")
