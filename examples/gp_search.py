"""What mini-GP-UCB claims, on functions drawn from a Gaussian process: regret, unique points, and what a decision costs.

GP-UCB chooses anew before every evaluation; mini-GP-UCB and mini-GP-EI evaluate a choice as often as their variance allows (the
constant C), and form the posterior only then. Functions on 400 candidates, in one dimension and in two, are drawn from the
kernel that all methods know, Matern 5/2 with length 0.2, and are seen with noise of standard deviation 0.1.

    python examples/gp_search.py                       # two tables, and gp_search.png
    python examples/gp_search.py --quick               # one function each, 300 evaluations
    python examples/gp_search.py --json numbers.json --markdown

A run repeats exactly on the same machine, but for its times. Needed besides prefkern: matplotlib, of the "demo" extra.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from _report import Result, Rows, add_outputs, check_outputs, one_thread, show
from prefkern.papers.gp_mini import Kernel, MiniGP, ucb

F64 = torch.float64
KERNEL = Kernel("matern52", length=0.2)
NOISE = 0.1
LAM = NOISE**2
BETA = 0.3  # with deviations in units of the noise: three of the posterior
DIMENSIONS = {"1-D": 1, "2-D": 2}


@dataclass(frozen=True)
class Method:
    name: str
    C: float
    rule: str = "ucb"
    mini: bool = True
    """False: one evaluation per choice, which is GP-UCB."""


METHODS = (
    Method("GP-UCB", 1.05, mini=False),
    Method("mini-GP-UCB, C = 1.05", 1.05),
    Method("mini-GP-UCB, C = 1.2", 1.2),
    Method("mini-GP-UCB, C = 2", 2.0),
    Method("mini-GP-EI, C = 1.2", 1.2, "ei"),
)


@dataclass(frozen=True)
class Problem:
    """A function on a grid of candidates."""

    candidates: Tensor
    f: Tensor
    seed: int

    def reward(self, candidate: int, first: int, count: int) -> Tensor:
        """Evaluations `first` to `first + count` of a run: the noise depends on those numbers alone."""
        generator = torch.Generator().manual_seed(1000 * self.seed + first)
        return self.f[candidate] + NOISE * torch.randn(count, dtype=F64, generator=generator)


def grid(dimensions: int) -> Tensor:
    """400 points of the unit cube, [400, d]."""
    side = torch.linspace(0, 1, round(400 ** (1 / dimensions)), dtype=F64)
    return torch.cartesian_prod(*[side] * dimensions).reshape(-1, dimensions)


def sample_path(dimensions: int, seed: int) -> Problem:
    candidates = grid(dimensions)
    K = KERNEL(candidates, candidates) + 1e-9 * torch.eye(len(candidates), dtype=F64)
    draw = torch.randn(len(K), dtype=F64, generator=torch.Generator().manual_seed(seed))
    return Problem(candidates, torch.linalg.cholesky(K) @ draw, seed)


@dataclass
class Run:
    """Of one method on one problem."""

    regret: Tensor
    """Cumulative, after each evaluation."""
    unique: Tensor
    """How many candidates were evaluated until then."""
    switches: int
    decisions: int
    seconds: float
    """Of CPU time, without the evaluations."""
    shrunk: float
    """By how much a batch of repeats changed a variance of any candidate, at most."""
    picks: list[int]


def search(problem: Problem, method: Method, budget: int, *, look_every: int = 0) -> Run:
    """`look_every`: at so many decisions the variances are compared with those after their batch; 0: never."""
    rule: Any = method.rule
    sampler = MiniGP(problem.candidates, KERNEL, lam=LAM, C=method.C, beta=BETA, rule=rule, budget=budget)
    picks: list[int] = []
    seconds, shrunk, decisions = 0.0, 1.0, 0
    while sampler.spent < budget:
        start = time.process_time()
        candidate, repeats = sampler.sample()
        seconds += time.process_time() - start
        repeats = repeats if method.mini else 1
        rewards = problem.reward(candidate, sampler.spent, repeats)
        looks = look_every and repeats > 1 and decisions % look_every == 0
        before = sampler.gp.posterior(problem.candidates).var if looks else None
        start = time.process_time()
        sampler.update(candidate, rewards)
        seconds += time.process_time() - start
        if before is not None:
            shrunk = max(shrunk, float((before / sampler.gp.posterior(problem.candidates).var).max()))
        picks += [candidate] * repeats
        decisions += 1
    seen: set[int] = set()
    unique = []
    for pick in picks:
        seen.add(pick)
        unique.append(len(seen))
    regret = (problem.f.max() - problem.f[picks]).cumsum(0)
    return Run(regret, torch.tensor(unique), sampler.switches, decisions, seconds, shrunk, picks)


def direct_posterior(x: Tensor, y: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """From the matrix of all t observations."""
    K, k = KERNEL(x, x), KERNEL(x, candidates)
    L = torch.linalg.cholesky(K + LAM * torch.eye(len(x), dtype=F64))
    v = torch.linalg.solve_triangular(L, torch.cat([y[:, None], k], 1), upper=False)
    return v[:, 1:].T @ v[:, 0], KERNEL.variance - v[:, 1:].square().sum(0)


def same_choices(problem: Problem, picks: Sequence[int]) -> int:
    """How many of the first choices of GP-UCB are those of the t x t matrix."""
    for t in range(len(picks)):
        x = problem.candidates[list(picks[:t])]
        y = torch.cat([problem.reward(pick, i, 1) for i, pick in enumerate(picks[:t])]) if t else torch.zeros(0, dtype=F64)
        mean, var = direct_posterior(x, y, problem.candidates)
        if int(ucb(mean, var.clamp_min(0), LAM, beta=BETA).argmax()) != picks[t]:
            return t
    return len(picks)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """CPU time, the least of several."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def decision_costs(problem: Problem, picks: Sequence[int], sizes: Sequence[int]) -> list[dict[str, float]]:
    """Of one posterior of all candidates after t evaluations, from all of them and from the unique ones."""
    costs = []
    for t in sizes:
        x = problem.candidates[list(picks[:t])]
        y = torch.cat([problem.reward(pick, i, 1) for i, pick in enumerate(picks[:t])])
        sampler = MiniGP(problem.candidates, KERNEL, lam=LAM, C=1.1, beta=BETA)
        sampler.gp.update(x, y)
        costs.append({
            "t": t, "unique": len(sampler.gp),
            "all": seconds_of(lambda x=x, y=y: direct_posterior(x, y, problem.candidates), 3),
            "unique_seconds": seconds_of(sampler.scores, 7),
        })  # fmt: skip
    return costs


def spread(values: Sequence[float], form: str) -> str:
    """The median, with the smallest and the largest of several."""
    ordered = sorted(values)
    n = len(ordered)
    middle = ordered[n // 2] if n % 2 else sum(ordered[n // 2 - 1 : n // 2 + 1]) / 2
    said = [form.format(value) for value in (middle, ordered[0], ordered[-1])]
    return said[0] if n == 1 else f"{said[0]} ({said[1]} to {said[2]})"


def compare(seeds: int = 5, budget: int = 3000) -> Result:
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    numbers: dict[str, Any] = {"budget": budget, "runs": {}}
    rows: list[list[str]] = []
    early, half = max(1, budget // 10), budget // 2
    first_picks: dict[str, tuple[Problem, list[int]]] = {}
    for row, (title, dimensions) in zip(axes, DIMENSIONS.items(), strict=True):
        problems = [sample_path(dimensions, seed) for seed in range(seeds)]
        for method in METHODS:
            runs = [search(problem, method, budget, look_every=5) for problem in problems]
            if not method.mini:
                first_picks[title] = problems[0], runs[0].picks
            found = {
                "regret": [float(run.regret[-1]) for run in runs],
                "regret_half": [float(run.regret[half - 1]) for run in runs],
                "unique": [int(run.unique[-1]) for run in runs],
                "unique_early": [int(run.unique[early - 1]) for run in runs],
                "unique_half": [int(run.unique[half - 1]) for run in runs],
                "switches": [run.switches for run in runs],
                "decisions": [run.decisions for run in runs],
                "shrunk": [run.shrunk for run in runs],
                "seconds": [run.seconds for run in runs],
            }
            numbers["runs"][f"{title}, {method.name}"] = found
            rows.append([
                title, method.name, spread(found["regret"], "{:.1f}"), spread(found["unique_early"], "{:.0f}"),
                spread(found["unique"], "{:.0f}"), spread(found["switches"], "{:.0f}"), spread(found["decisions"], "{:.0f}"),
                f"{max(found['shrunk']):.2f}" if method.mini else "-",
            ])  # fmt: skip
            steps = range(1, budget + 1)
            row[0].plot(steps, torch.stack([run.regret for run in runs]).mean(0), label=method.name, linewidth=1.2)
            row[1].semilogx(steps, torch.stack([run.unique.double() for run in runs]).mean(0), label=method.name, linewidth=1.2)
            row[2].scatter(found["unique"], found["regret"], s=22, label=method.name)
        row[0].set(title=f"{title}: cumulative regret, mean", xlabel="evaluations", ylabel="regret")
        row[1].set(title=f"{title}: unique points, mean", xlabel="evaluations", ylabel="unique points")
        row[2].set(title=f"{title}: after {budget} evaluations", xlabel="unique points", ylabel="regret")
        for ax in row:
            ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)

    problem, picks = first_picks["2-D"]
    sizes = [t for t in (100, 300, 1000) if t <= budget]
    numbers["costs"] = decision_costs(problem, picks, sizes)
    numbers["same_choices"] = same_choices(problem, picks[: min(100, budget)])
    per_decision = [[
        str(cost["t"]), str(cost["unique"]), f"{1e3 * cost['all']:.3g}", f"{1e3 * cost['unique_seconds']:.3g}",
    ] for cost in numbers["costs"]]  # fmt: skip
    columns = [
        "functions", "method", "cumulative regret", f"unique points, t = {early}", f"t = {budget}", "switches", "decisions",
        "largest change of a variance",
    ]  # fmt: skip
    return Result(
        [
            Rows(f"{budget} evaluations, {seeds} function{'s' if seeds > 1 else ''} each", columns, rows),
            Rows(
                "One decision of GP-UCB among 400 candidates in 2-D, milliseconds of CPU time",
                ["t", "unique points", "from all t observations", "from the unique points"],
                per_decision,
            ),
        ],
        figure,
        numbers,
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="mini-GP-UCB and mini-GP-EI beside GP-UCB on functions of one and two dimensions."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one function each, 300 evaluations")
    add("--seeds", type=int, metavar="N", help="functions of each dimension (default 5)")
    add("--budget", type=int, metavar="T", help="evaluations (default 3000)")
    add_outputs(parser, "gp_search.png")
    arguments = parser.parse_args(argv)
    arguments.seeds = arguments.seeds if arguments.seeds is not None else 1 if arguments.quick else 5
    arguments.budget = arguments.budget if arguments.budget is not None else 300 if arguments.quick else 3000
    if arguments.seeds < 1:
        parser.error(f"argument --seeds: {arguments.seeds} is less than 1")
    if arguments.budget < 100:
        parser.error(f"argument --budget: {arguments.budget} is less than 100")
    check_outputs(parser, arguments, "gp_search.png")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with one_thread():
        result = compare(arguments.seeds, arguments.budget)
    if not math.isfinite(sum(map(sum, (run["regret"] for run in result.numbers["runs"].values())))):
        raise RuntimeError("a regret is not finite")
    show(result, arguments)
    print(f"the first {result.numbers['same_choices']} choices of GP-UCB are those of the matrix of all observations")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
