"""What rankings alone are good for: ZO-RankSGD on problems small enough for one CPU core and some seconds.

    cosine    how near the direction that a ranking gives comes to the gradient: (m, k) = (10, 10), (10, 3), (10, 1) and five
              pairs, at ten evaluations each, with the paper's weights and the code's
    race      a quadratic and Rosenbrock's function against evaluations, beside an estimate from values; and the same runs with
              f replaced by an increasing function of it
    align     a small network that draws pictures, and a judge who says which of some are better and no more

    python examples/zo_alignment.py align                    # a table, and zo_alignment_align.png
    python examples/zo_alignment.py cosine --markdown        # the tables as docs/experiments_search.md has them
    python examples/zo_alignment.py race --quick --json numbers.json

A run repeats exactly on the same machine. Needed besides prefkern: matplotlib, which the "demo" extra brings.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from _report import Result, Rows, add_outputs, check_outputs, one_thread, show
from prefkern import seeded_normal
from prefkern.papers.zo_ranksgd import (
    Ranker,
    RankSGD,
    line_search_candidates,
    rank_weights,
    ranking_oracle,
    zo_rank_step,
)

F64 = torch.float64


# How near to the gradient

DIMENSIONS, PROBES = 20, 10


def directions(xi: Tensor, values: Tensor, k: int, variant: str) -> Tensor:
    """Directions of descent [..., d] from probes xi [..., m, d] and their values [..., m], of which the k best are ranked."""
    m = xi.shape[-2]
    weights = rank_weights(range(k), m, variant=variant).to(xi.dtype)  # of rank 0, 1, ..., then of the others
    best_first = xi.gather(-2, values.argsort(-1).unsqueeze(-1).expand_as(xi))
    return (weights.unsqueeze(-1) * best_first).sum(-2)


def of_pairs(xi: Tensor, values: Tensor, variant: str) -> Tensor:
    """The mean of the directions of m / 2 comparisons of two probes each."""
    pairs = directions(xi.unflatten(-2, (-1, 2)), values.unflatten(-1, (-1, 2)), 2, variant)
    return pairs.mean(-2)


def cosines(draws: int, variant: str) -> dict[str, Tensor]:
    """Cosines [draws] of each estimate with minus the gradient of a linear f, from the same probes."""
    slope = seeded_normal(7, 0, DIMENSIONS, dtype=F64)
    xi = seeded_normal(1, 0, draws * PROBES * DIMENSIONS, dtype=F64).view(draws, PROBES, DIMENSIONS)
    values = xi @ slope
    found = {f"({PROBES}, {k})": directions(xi, values, k, variant) for k in range(PROBES, 0, -1)}
    found[f"{PROBES // 2} pairs"] = of_pairs(xi, values, variant)
    return {name: torch.cosine_similarity(d, -slope.expand_as(d), dim=-1) for name, d in found.items()}


def cosine(quick: bool = False) -> Result:
    draws = 300 if quick else 3000
    found = {variant: cosines(draws, variant) for variant in ("paper", "code")}
    numbers = {
        variant: {name: {"mean": c.mean().item(), "error": c.std().item() / math.sqrt(draws)} for name, c in by_name.items()}
        for variant, by_name in found.items()
    }
    shown = [f"({PROBES}, {PROBES})", f"({PROBES}, 3)", f"{PROBES // 2} pairs", f"({PROBES}, 1)"]
    rows = []
    for name in shown:
        paper, code = numbers["paper"][name], numbers["code"][name]
        lost = (found["paper"][name] - found["code"][name]).mean().item()
        rows.append([name, f"{paper['mean']:.3f} ± {paper['error']:.3f}", f"{code['mean']:.3f}", f"{lost:+.4f}"])
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    ax = figure.subplots()
    ranked = range(1, PROBES + 1)
    for variant, style in (("paper", "o-"), ("code", "s--")):
        ax.plot(ranked, [numbers[variant][f"({PROBES}, {k})"]["mean"] for k in ranked], style, label=f"{variant} weights")
    ax.axhline(numbers["paper"][shown[2]]["mean"], color="grey", linestyle=":", label=shown[2])
    ax.set(xlabel=f"k ranked of m = {PROBES}", ylabel="mean cosine with the gradient", title=f"linear f, d = {DIMENSIONS}")
    ax.set_xticks(list(ranked))
    ax.grid(alpha=0.3)
    ax.legend()
    title = f"Mean cosine with the gradient, linear f, d = {DIMENSIONS}, {draws} draws, {PROBES} evaluations each"
    return Result([Rows(title, ["estimate", "paper", "code", "paper - code, same draws"], rows)], figure, numbers)


# f against evaluations

CURVATURES = torch.logspace(-1, 0, DIMENSIONS, dtype=F64)
OFFERED, MU = 5, 0.01  # step sizes in the line search; the smoothing
ETAS = (0.5, 2.0)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (CURVATURES * x.square()).sum(-1)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[..., 1:] - x[..., :-1].square()).square() + (1 - x[..., :-1]).square()).sum(-1) / 100


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "quadratic": (quadratic, 1.0),
    "Rosenbrock": (rosenbrock, -0.5),
}
ESTIMATES = (f"({PROBES}, {PROBES})", f"({PROBES}, 3)", f"({PROBES}, 1)", f"{PROBES // 2} pairs", "values, two points")


def ranked_steps(f: Callable[[Tensor], Tensor], x: Tensor, k: int, eta: float, seed: int, steps: int) -> list[float]:
    """f along zo_rank_step with a line search."""
    curve = [f(x).item()]
    options: dict[str, Any] = {"m": PROBES, "k": k, "mu": MU, "eta": eta, "seed": seed, "line_search": OFFERED}
    for step in range(steps):
        zo_rank_step(x, f, step=step, **options)
        curve.append(f(x).item())
    return curve


def other_steps(f: Callable[[Tensor], Tensor], x: Tensor, name: str, eta: float, seed: int, steps: int) -> list[float]:
    """f along other estimates from ten evaluations, with the same line search. That from values has length one on average, as
    have those of rankings."""
    curve = [f(x).item()]
    for step in range(steps):
        if name.endswith("pairs"):
            xi = seeded_normal(seed, step, PROBES * DIMENSIONS, dtype=F64).view(PROBES, DIMENSIONS)
            d = of_pairs(xi, f(x + MU * xi), "paper")
        else:
            xi = seeded_normal(seed, step, PROBES // 2 * DIMENSIONS, dtype=F64).view(-1, DIMENSIONS)
            d = -((f(x + MU * xi) - f(x - MU * xi)).unsqueeze(-1) * xi).mean(0)
            d = d / d.norm().clamp_min(1e-300) * math.sqrt(DIMENSIONS / PROBES)
        candidates = line_search_candidates(x, d, eta=eta, n=OFFERED)
        x = candidates[ranking_oracle(f(candidates), 1)[0]]
        curve.append(f(x).item())
    return curve


def descend(f: Callable[[Tensor], Tensor], start: float, name: str, eta: float, seed: int, steps: int) -> list[float]:
    x = torch.full((DIMENSIONS,), start, dtype=F64)
    if name.startswith("("):
        return ranked_steps(f, x, int(name[1:-1].split(",")[1]), eta, seed, steps)
    return other_steps(f, x, name, eta, seed, steps)


def race(quick: bool = False) -> Result:
    seeds, steps = (2, 10) if quick else (3, 80)
    spent = PROBES + OFFERED
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    rows, numbers = [], dict[str, Any]()
    for ax, (what, (f, start)) in zip(figure.subplots(1, len(FUNCTIONS)), FUNCTIONS.items(), strict=True):
        for name in ESTIMATES:
            curves = {
                eta: torch.tensor([descend(f, start, name, eta, seed, steps) for seed in range(seeds)], dtype=F64)
                for eta in ETAS
            }
            best = min(ETAS, key=lambda eta: float(curves[eta][:, -1].log().mean()))
            ends = curves[best][:, -1].sort().values
            numbers[f"{what}, {name}"] = {"eta": best, "start": curves[best][0, 0].item(), "ends": ends.tolist()}
            middle = f"{ends[len(ends) // 2]:.1e} ({ends[0]:.0e} to {ends[-1]:.0e})"
            rows.append([what, name, f"{curves[best][0, 0]:.2g}", middle, f"{best:g}"])
            evaluations = range(0, spent * (steps + 1), spent)
            ax.semilogy(evaluations, curves[best].median(0).values, label=name, linewidth=1.2)
        ax.set(title=what, xlabel="evaluations", ylabel=f"f, median of {seeds} seeds")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    numbers["changed by a transform"] = changed_by_transforms(steps)
    title = f"f after {spent * steps} evaluations, {OFFERED} step sizes offered, the best of eta = {', '.join(map(str, ETAS))}"
    return Result([Rows(title, ["function", "estimate", "start", "end, median and range", "eta"], rows)], figure, numbers)


def changed_by_transforms(steps: int) -> int:
    """How many iterates differ when f is replaced by an increasing function of it."""
    transforms: tuple[Callable[[Tensor], Tensor], ...] = (lambda v: v, lambda v: v.exp() - 9, lambda v: -1 / (v + 1))
    points = [torch.full((DIMENSIONS,), 1.0, dtype=F64) for _ in transforms]
    changed = 0
    for step in range(steps):
        for x, transform in zip(points, transforms, strict=True):
            zo_rank_step(
                x,
                lambda at, t=transform: t(quadratic(at)),
                m=PROBES,
                k=3,
                mu=0.1,
                eta=1.0,
                seed=0,
                step=step,
                line_search=OFFERED,
            )
        changed += sum(not torch.equal(points[0], x) for x in points[1:])
    return changed


# A generator and a judge

SIDE, ROUNDS, STEP, CANDIDATES = 16, 100, 0.1, 8


class Painter(nn.Module):
    """A picture [side, side] of brightness in [0, 1]: a network from places to brightness, 337 parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid()
            )
        line = torch.linspace(-2, 2, SIDE)
        self.places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)

    def forward(self) -> Tensor:
        picture: Tensor = self.layers(self.places)
        return picture.view(SIDE, SIDE)


def spot() -> Tensor:
    """What the judge has in mind: a bright spot above the middle, to the right."""
    line = torch.linspace(-2, 2, SIDE)
    return torch.exp(-((line[:, None] + 0.7) ** 2 + (line - 0.6) ** 2) / 0.8)


WANTED = spot().flatten() - spot().mean()


def likeness(picture: Tensor) -> float:
    """The correlation of a picture with the spot: what the judge goes by, and never says."""
    centred = picture.flatten() - picture.mean()
    return float(centred @ WANTED / (centred.norm() * WANTED.norm()))


class Judge:
    """Looks at pictures and says which are the best, best first. `slips` is by how much a likeness may be misjudged, each time
    anew (the standard deviation)."""

    def __init__(self, slips: float = 0.0, seed: int = 0) -> None:
        self.slips, self.generator = slips, torch.Generator().manual_seed(seed)
        self.looks = 0

    def observe(self, painter: Painter) -> Tensor:
        self.looks += 1
        return painter()

    def rank(self, pictures: list[Tensor], k: int) -> list[int]:
        noise = self.slips * torch.randn(len(pictures), generator=self.generator)
        return ranking_oracle([n - likeness(p) for p, n in zip(pictures, noise.tolist(), strict=True)], k)

    def ranker(self) -> Ranker[Tensor]:
        return Ranker(self.observe, self.rank)


@dataclass
class Run:
    """A painter's way: likeness after each round, pictures at the start, after a tenth and at the end."""

    curve: list[float]
    looks: int
    moved: float
    pictures: list[Tensor]


def aligned(k: int, *, seed: int, rounds: int, slips: float = 0.0, pooled: bool = True) -> Run:
    """Rounds of RankSGD, or without pooling steps of zo_rank_step, from a painter with random weights."""
    painter, judge = Painter(seed), Judge(slips, seed)
    eta = STEP / rank_weights(range(k), PROBES).norm().item()  # the same length of a step for every k
    options: dict[str, Any] = {"m": PROBES, "k": k, "mu": 0.05, "eta": eta, "gamma": 0.4, "seed": seed}
    optimizer = RankSGD(painter, n_query=CANDIDATES, **options)
    curve, pictures, moved = [], [], 0
    for step in range(rounds + 1):
        with torch.no_grad():
            picture = painter()
        curve.append(likeness(picture))
        if step in (0, rounds // 10, rounds):
            pictures.append(picture)
        if step == rounds:
            break
        if pooled:
            moved += optimizer.step(judge.ranker()).moved
        else:
            zo_rank_step(painter, judge.ranker(), step=step, line_search=CANDIDATES - 1, **options)
            moved += 1
    return Run(curve, judge.looks, moved / rounds, pictures)


CONTESTANTS: dict[str, dict[str, Any]] = {
    "(10, 10)": {"k": 10},
    "(10, 3)": {"k": 3},
    "(10, 1)": {"k": 1},
    "(10, 10), judge slips": {"k": 10, "slips": 0.02},
    "(10, 10), no pooling": {"k": 10, "pooled": False},
    "(10, 10), no pooling, judge slips": {"k": 10, "slips": 0.02, "pooled": False},
}


def align(quick: bool = False) -> Result:
    seeds, rounds = (1, 10) if quick else (3, ROUNDS)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.add_gridspec(3, 6)
    ax = figure.add_subplot(grid[:, :3])
    rows, numbers = [], dict[str, Any]()
    for i, (name, options) in enumerate(CONTESTANTS.items()):
        runs = [aligned(seed=seed, rounds=rounds, **options) for seed in range(seeds)]
        curves = torch.tensor([run.curve for run in runs], dtype=F64)
        mean, looks = curves.mean(0), runs[0].looks
        numbers[name] = {"curves": curves.tolist(), "looks": looks, "moved": [run.moved for run in runs]}
        stops = (0, rounds // 10, rounds // 3, rounds)
        moved = sum(run.moved for run in runs) / seeds
        rows.append([name, *(f"{mean[t]:.3f}" for t in stops), f"{moved:.0%}" if options.get("pooled", True) else "-"])
        ax.plot(
            torch.linspace(0, looks, rounds + 1), mean, label=name, linewidth=1.2, linestyle="--" if "slips" in name else "-"
        )
        if i < 3:
            for column, picture in enumerate(runs[0].pictures):
                place = figure.add_subplot(grid[i, 3 + column])
                place.imshow(picture.numpy(), cmap="magma", vmin=0, vmax=1)
                place.set_xticks([])
                place.set_yticks([])
                place.set_title(f"{name}, {('start', f'round {rounds // 10}', f'round {rounds}')[column]}", fontsize=7)
    ax.set(xlabel="pictures looked at", ylabel=f"likeness, mean of {seeds}", ylim=(-0.5, 1.02))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    looks = numbers["(10, 10)"]["looks"]
    title = f"Correlation with the spot, mean of {seeds} painters, {rounds} rounds of {looks // rounds} pictures"
    columns = ["judge ranks (m, k)", *(f"round {t}" for t in (0, rounds // 10, rounds // 3, rounds)), "rounds that moved"]
    return Result([Rows(title, columns, rows)], figure, numbers)


# The command

EXPERIMENTS: dict[str, Callable[..., Result]] = {"cosine": cosine, "race": race, "align": align}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What rankings alone are good for, in seconds on one CPU core.")
    add = parser.add_argument
    add("experiment", choices=tuple(EXPERIMENTS))
    add("--quick", action="store_true", help="a small run, to see whether everything works")
    add_outputs(parser, "zo_alignment_EXPERIMENT.png")
    arguments = parser.parse_args(argv)
    check_outputs(parser, arguments, f"zo_alignment_{arguments.experiment}.png")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with one_thread():
        result = EXPERIMENTS[arguments.experiment](quick=arguments.quick)
    show(result, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
