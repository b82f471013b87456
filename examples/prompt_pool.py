"""Which prompts to roll out, and how often: simulated pools of prompts, small enough for one CPU core and a minute.

    pool      VADE beside uniform sampling, its own halves, an oracle and DAPO's filter, on 2,000 prompts that get easier as
              they and others of their topic are trained: groups that teach nothing, signal per rollout, accuracy for equal
              numbers of rollouts
    budget    V_0's budgets, exact and greedy, beside uniform ones and ones by variance, on 200 prompts with noisy predictions:
              utility, mixed groups, and the accuracy of tabular GRPO
    router    V_0's router over three synthetic models, with a nearest-neighbour stand-in for the value model

A prompt here is a success probability, a rollout a coin. So the runs show what a sampler does with what it can know; what a
language model learns from a group is a rule of the simulation.

    python examples/prompt_pool.py pool                 # a table, and prompt_pool_pool.png
    python examples/prompt_pool.py budget --markdown    # the tables as docs/experiments_rollouts.md has them
    python examples/prompt_pool.py pool --quick --json numbers.json

A run repeats exactly on the same machine. Needed besides prefkern: matplotlib, which the "demo" extra brings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from _report import Result, Rows, add_outputs, check_outputs, one_thread, show
from prefkern.papers import v0
from prefkern.papers.mmr1 import VasSampler
from prefkern.papers.vade import VadeSampler, select_from_draws

F64 = torch.float64


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], form: str) -> str:
    """The mean of several, with the smallest and the largest; "-" without any."""
    if not values:
        return "-"
    said = form.format(mean(values))
    return said if len(values) == 1 else f"{said} ({form.format(min(values))} to {form.format(max(values))})"


# A pool of prompts that training changes

OWN_GAIN, TOPIC_GAIN = 0.3, 0.01  # logits that a group of the most signal adds to its prompt, and to every prompt of its topic


class Pool:
    """Prompts with success probabilities sigmoid(own + skill of the topic - difficulty)."""

    def __init__(self, prompts: int, topics: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.difficulty = 1.5 + 3 * torch.randn(prompts, generator=self.random)
        self.topic = torch.randint(topics, (prompts,), generator=self.random)
        self.own, self.skill = torch.zeros(prompts), torch.zeros(topics)
        self.rollouts = 0

    def __len__(self) -> int:
        return len(self.difficulty)

    def p(self) -> Tensor:
        return torch.sigmoid(self.own + self.skill[self.topic] - self.difficulty)

    def roll_out(self, ids: Tensor, n: int) -> Tensor:
        """Successes of n rollouts each."""
        self.rollouts += n * len(ids)
        return torch.binomial(torch.full(ids.shape, float(n)), self.p()[ids], generator=self.random)

    def train(self, ids: Tensor, successes: Tensor, n: int) -> None:
        """What a group teaches grows with the variance of its rewards, and is nothing where all agree."""
        gain = 4 * signal(successes, n)
        self.own.index_add_(0, ids, OWN_GAIN * gain)
        self.skill.index_add_(0, self.topic[ids], TOPIC_GAIN * gain)


def signal(successes: Tensor, n: int) -> Tensor:
    """s (n - s) / n^2, the variance of a group's rewards."""
    return successes * (n - successes) / n**2


@dataclass
class Groups:
    """What a step rolled out, and which of it was trained on."""

    ids: Tensor
    successes: Tensor
    kept: Tensor


class PoolSampler:
    """A way to fill batches from a pool. `belief` is its estimate of every success probability, None if it has none."""

    def __init__(self, pool: Pool, batch: int, rollouts: int, seed: int) -> None:
        self.pool, self.batch, self.n = pool, batch, rollouts
        self.random = torch.Generator().manual_seed(1000 + seed)

    def step(self) -> Groups:
        ids = self.choose()
        successes = self.pool.roll_out(ids, self.n)
        self.learn(ids, successes)
        return Groups(ids, successes, torch.ones(len(ids), dtype=torch.bool))

    def choose(self) -> Tensor:
        raise NotImplementedError

    def learn(self, ids: Tensor, successes: Tensor) -> None:
        pass

    def belief(self) -> Tensor | None:
        return None


class Uniform(PoolSampler):
    def choose(self) -> Tensor:
        return torch.randperm(len(self.pool), generator=self.random)[: self.batch]


class Oracle(PoolSampler):
    """VADE's utility of the true probabilities."""

    def choose(self) -> Tensor:
        return select_from_draws(self.pool.p(), self.batch).ids


class DapoFilter(Uniform):
    """Uniform batches until one of groups that disagree is full; the others are thrown away, and were rolled out."""

    most = 10  # batches for one

    def step(self) -> Groups:
        parts, kept = [], 0
        while kept < self.batch and len(parts) < self.most:
            ids = self.choose()
            successes = self.pool.roll_out(ids, self.n)
            parts.append((ids, successes))
            kept += int((signal(successes, self.n) > 0).sum())
        ids, successes = (torch.cat(t) for t in zip(*parts, strict=True))
        mixed = signal(successes, self.n) > 0
        return Groups(ids, successes, mixed & (mixed.cumsum(0) <= self.batch))


class Vade(PoolSampler):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, pool: Pool, batch: int, rollouts: int, seed: int) -> None:
        super().__init__(pool, batch, rollouts, seed)
        self.sampler = VadeSampler(len(pool), batch, seed=seed, **self.options)

    def choose(self) -> Tensor:
        return self.sampler.sample()

    def learn(self, ids: Tensor, successes: Tensor) -> None:
        self.sampler.update(ids, successes, self.n)

    def belief(self) -> Tensor:
        return self.sampler.success_probability()


class VadeNoFast(Vade):
    options: ClassVar[dict[str, Any]] = {"lam1": 1.0}


class VadeNoGradual(Vade):
    options: ClassVar[dict[str, Any]] = {"lam2": 1.0}


class VadeNoDecay(Vade):
    options: ClassVar[dict[str, Any]] = {"lam1": 1.0, "lam2": 1.0}


class Vas(PoolSampler):
    """MMR1's sampler, by the variance of rewards alone, since rollouts have no text here. Every so often all prompts are rolled
    out to be scored; these rollouts are counted, and train nothing."""

    every, score_with = 56, 8

    def __init__(self, pool: Pool, batch: int, rollouts: int, seed: int) -> None:
        super().__init__(pool, batch, rollouts, seed)
        self.sampler, self.steps = VasSampler(len(pool), batch, seed=seed), 0

    def choose(self) -> Tensor:
        if self.steps % self.every == 0:
            self.sampler.update(signal(self.pool.roll_out(torch.arange(len(self.pool)), self.score_with), self.score_with))
        self.steps += 1
        return self.sampler.sample(self.steps - 1)


SAMPLERS: dict[str, type[PoolSampler]] = {
    "uniform": Uniform,
    "VADE": Vade,
    "VADE, lam1 = 1": VadeNoFast,
    "VADE, lam2 = 1": VadeNoGradual,
    "VADE, no decay": VadeNoDecay,
    "oracle": Oracle,
    "DAPO's filter": DapoFilter,
    "MMR1's VAS": Vas,
}


@dataclass
class PoolRun:
    """Of one sampler on one pool. Per step: rollouts so far, groups, share of them that agree, signal per rollout, accuracy."""

    rollouts: list[int]
    groups: list[int]
    silent: list[float]
    signal: list[float]
    accuracy: list[float]
    steps: int
    error: float | None
    """Mean distance between belief and probability, over the second half."""
    bias: float | None
    """Likewise belief minus probability, of the prompts that were rolled out."""


def run_pool(sampler: type[PoolSampler], *, prompts: int, topics: int, batch: int, n: int, steps: int, seed: int) -> PoolRun:
    """Until as many rollouts are used as `steps` steps without waste take."""
    pool = Pool(prompts, topics, seed)
    chooser = sampler(pool, batch, n, seed)
    run = PoolRun([], [], [], [], [], 0, None, None)
    errors, biases = [], []
    budget = steps * batch * n
    while pool.rollouts < budget:
        before = pool.rollouts
        groups = chooser.step()
        of_groups = signal(groups.successes, n)
        belief = chooser.belief()
        if belief is not None and 2 * pool.rollouts > budget:
            off = belief - pool.p()
            errors.append(off.abs().mean().item())
            biases.append(off[groups.ids].mean().item())
        pool.train(groups.ids[groups.kept], groups.successes[groups.kept], n)
        run.rollouts.append(pool.rollouts)
        run.groups.append(len(groups.ids))
        run.silent.append((of_groups == 0).double().mean().item())
        run.signal.append((of_groups[groups.kept].sum() * n / (pool.rollouts - before)).item())
        run.accuracy.append(pool.p().mean().item())
    run.steps = len(run.rollouts)
    if errors:
        run.error, run.bias = mean(errors), mean(biases)
    return run


def over_halves(run: PoolRun, values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the second half of the rollouts."""
    at, w, y = torch.tensor(run.rollouts), torch.tensor(weights, dtype=F64), torch.tensor(values, dtype=F64)
    first = at <= at[-1] / 2
    halves = [((w * y * part).sum() / (w * part).sum()).item() for part in (first, ~first)]
    return halves[0], halves[1]


def used(run: PoolRun) -> list[int]:
    """Rollouts of each step."""
    return [b - a for a, b in zip([0, *run.rollouts], run.rollouts, strict=False)]


def smoothed(values: Sequence[float], weights: Sequence[float], window: int) -> Tensor:
    """Weighted means over the last `window` entries."""
    w, y = torch.tensor([0.0, *weights], dtype=F64), torch.tensor([0.0, *values], dtype=F64)
    above, below = (w * y).cumsum(0), w.cumsum(0)
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp_min(0)
    return (above[ends] - above[starts]) / (below[ends] - below[starts])


def pool(seeds: int = 3, quick: bool = False) -> Result:
    size = {"prompts": 300, "topics": 5, "batch": 16, "n": 8, "steps": 60} if quick else {}
    size = {"prompts": 2000, "topics": 20, "batch": 64, "n": 8, "steps": 300} | size
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    rows, numbers = [], {}
    for name, sampler in SAMPLERS.items():
        runs = [run_pool(sampler, **size, seed=seed) for seed in range(seeds)]
        silent = [over_halves(run, run.silent, run.groups) for run in runs]
        signals = [over_halves(run, run.signal, used(run)) for run in runs]
        numbers[name] = found = {
            "silent": [list(s) for s in silent], "signal": [list(s) for s in signals],
            "accuracy": [run.accuracy[-1] for run in runs], "steps": [run.steps for run in runs],
            "error": [run.error for run in runs if run.error is not None],
            "bias": [run.bias for run in runs if run.bias is not None],
        }  # fmt: skip
        rows.append([
            name, spread([s[0] for s in silent], "{:.3f}"), spread([s[1] for s in silent], "{:.3f}"),
            spread([s[0] for s in signals], "{:.3f}"), spread([s[1] for s in signals], "{:.3f}"),
            spread(found["accuracy"], "{:.3f}"), spread(found["steps"], "{:.0f}"),
            spread(found["error"], "{:.3f}"), spread(found["bias"], "{:+.3f}"),
        ])  # fmt: skip
        style = "--" if name.startswith("VADE,") else "-"
        for ax, values in zip(panels, ("silent", "signal", "accuracy"), strict=True):
            weights = used(runs[0]) if values == "signal" else runs[0].groups
            curve = smoothed(getattr(runs[0], values), weights, 1 if values == "accuracy" else 15)
            ax.plot([at / 1000 for at in runs[0].rollouts], curve, style, label=name, linewidth=1.2)
    titles = ("share of groups that agree", "signal per rollout, discarded ones counted", "accuracy over the pool")
    for ax, title in zip(panels, titles, strict=True):
        ax.set(title=title, xlabel="rollouts, thousands")
        ax.grid(alpha=0.3)
    panels[2].legend(fontsize=7)
    columns = [
        "sampler", "silent groups, first half", "second half", "signal per rollout, first half", "second half",
        "accuracy at the end", "steps", "belief off by", "of the chosen",
    ]  # fmt: skip
    title = f"{size['prompts']} prompts, batches of {size['batch']} x {size['n']}, {size['steps']} batches of rollouts"
    return Result([Rows(f"{title}, {seeds} pools", columns, rows)], figure, numbers)


# V_0: how often to roll out each prompt

B_MIN, B_MAX, EACH = 2, 128, 8
RATE = 0.1  # of tabular GRPO


def by_variance(p: Tensor, total: int) -> Tensor:
    """B_MIN each, and what is left in proportion to p (1 - p), rounded down; the largest remainders get one more."""
    weights = p * (1 - p)
    weights = weights if weights.sum() > 0 else torch.ones_like(p)
    share = (total - B_MIN * len(p)) * weights / weights.sum()
    budgets = share.floor().long()
    more = (share - budgets).sort(descending=True, stable=True).indices[: total - B_MIN * len(p) - int(budgets.sum())]
    budgets[more] += 1
    return (budgets + B_MIN).clamp_max(B_MAX)


def even(p: Tensor, total: int) -> Tensor:
    return torch.full((len(p),), total // len(p))


ALLOCATORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "uniform": even,
    "variance": by_variance,
    "V_0, greedy": lambda p, total: v0.allocate_budget(p, total, method="greedy").budgets,
    "V_0, exact": lambda p, total: v0.allocate_budget(p, total).budgets,
    "V_0, exact, floor 0.05": lambda p, total: v0.allocate_budget(p, total, p_floor=0.05).budgets,
}


def predicted(p: Tensor, sigma: float, random: torch.Generator) -> Tensor:
    return (p + sigma * torch.randn(p.shape, dtype=F64, generator=random)).clamp(0, 1)


def mixed_share(budgets: Tensor, p: Tensor) -> Tensor:
    """The expected share of groups that hold both results."""
    b = budgets.double()
    return (1 - p**b - (1 - p) ** b).mean()


def advantage_mass(budgets: Tensor, p: Tensor) -> Tensor:
    """The expected sum of |A| over a group, 2 sqrt(k (B - k)), averaged over the prompts."""
    b = budgets.double()[:, None]
    k = torch.arange(int(budgets.max()) + 1, dtype=F64)
    inside = (k > 0) & (k < b)
    p = p[:, None].clamp(1e-12, 1 - 1e-12)
    log_chance = torch.lgamma(b + 1) - torch.lgamma(k + 1) - torch.lgamma((b - k + 1).clamp_min(1)) + k * p.log()
    chance = (log_chance + (b - k) * torch.log1p(-p)).exp()
    return torch.where(inside, chance * 2 * (k * (b - k)).clamp_min(0).sqrt(), 0.0).sum(1).mean()


def tabular_grpo(allocate: Callable[[Tensor, int], Tensor], p: Tensor, sigma: float, *, steps: int, seed: int) -> list[float]:
    """Accuracies [steps + 1] of one logit per prompt. The gradient of a group of k successes in B, advantages over their
    standard deviation, is sqrt(k (B - k)) in its logit, of the mean over all rollouts."""
    random = torch.Generator().manual_seed(seed)
    logits, total = p.logit(eps=1e-6), EACH * len(p)
    accuracy = [p.mean().item()]
    for _ in range(steps):
        p = logits.sigmoid()
        budgets = allocate(predicted(p, sigma, random), total)
        k = torch.binomial(budgets.double(), p, generator=random)
        logits = logits + RATE * len(p) * (k * (budgets - k)).sqrt() / total
        accuracy.append(logits.sigmoid().mean().item())
    return accuracy


def budget(seeds: int = 2, quick: bool = False) -> Result:
    prompts, steps = (40, 15) if quick else (200, 100)
    sigmas = (0.0, 0.1, 0.3)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, len(sigmas), sharey=True)
    rows, numbers = [], {}
    pools = [arcsine_like(prompts, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    for ax, sigma in zip(panels, sigmas, strict=True):
        for name, allocate in ALLOCATORS.items():
            found: dict[str, list[float]] = {key: [] for key in ("utility", "mixed", "mass", "largest", "accuracy", "start")}
            for seed, p in enumerate(pools):
                budgets = allocate(predicted(p, sigma, torch.Generator().manual_seed(500 + seed)), EACH * prompts)
                found["utility"].append(v0.rollout_utility(budgets, p).sum().item() / prompts)
                found["mixed"].append(mixed_share(budgets, p).item())
                found["mass"].append(advantage_mass(budgets, p).item())
                found["largest"].append(float(budgets.max()))
                curve = tabular_grpo(allocate, p, sigma, steps=steps, seed=seed)
                found["accuracy"].append(curve[-1])
                found["start"].append(curve[0])
                if seed == 0:
                    ax.plot(curve, label=name, linewidth=1.2)
            numbers[f"{name}, {sigma:g}"] = found
            forms = (
                ("utility", "{:.2f}"),
                ("mixed", "{:.3f}"),
                ("mass", "{:.2f}"),
                ("largest", "{:.0f}"),
                ("accuracy", "{:.3f}"),
            )
            rows.append([f"{sigma:g}", name, *(spread(found[key], form) for key, form in forms)])
        ax.set(title=f"noise {sigma:g}", xlabel="step", ylabel="accuracy of tabular GRPO")
        ax.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    columns = [
        "noise of p", "budgets", "U per prompt", "mixed groups", "mean sum of abs A", "largest budget",
        f"accuracy, {steps} steps",
    ]  # fmt: skip
    title = f"{prompts} prompts, {EACH} rollouts each on average, {seeds} pools"
    return Result([Rows(title, columns, rows)], figure, numbers)


def arcsine_like(count: int, random: torch.Generator) -> Tensor:
    """Draws of Beta(0.6, 0.6), by Johnk's method: most prompts are easy or hard."""
    x = torch.empty(0, dtype=F64)
    while len(x) < count:
        u, v = torch.rand(2, 4 * count, dtype=F64, generator=random) ** (1 / 0.6)
        inside = u + v <= 1
        x = torch.cat([x, (u / (u + v))[inside]])
    return x[:count]


# V_0: whom to ask

COSTS = (1.0, 3.0, 10.0)
BETAS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def model_skills(x: Tensor) -> Tensor:
    """Success probabilities [n, 3] at places [n, 2]: a cheap model good on one side, a middling one on the other, a
    strong one."""
    logits = [2 - 3 * x[:, 0], 1.5 * x[:, 0] + 1.5 * x[:, 1], 2 - 0.5 * x.square().sum(1)]
    return torch.sigmoid(torch.stack(logits, 1))


def router(seeds: int = 5, quick: bool = False) -> Result:
    context, queries = (64, 200) if quick else (256, 1000)
    points: dict[float, list[tuple[float, float]]] = {beta: [] for beta in BETAS}
    alone: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        random = torch.Generator().manual_seed(seed)
        seen = torch.randn(context, 2, dtype=F64, generator=random)
        results = (torch.rand(context, len(COSTS), dtype=F64, generator=random) < model_skills(seen)).double()
        asked = torch.randn(queries, 2, dtype=F64, generator=random)
        truth, costs = model_skills(asked), torch.tensor(COSTS, dtype=F64)
        for beta in BETAS:
            labels = v0.router_labels(results, costs.expand_as(results), beta)
            scores = torch.stack([v0.knn_success(asked, seen, labels[:, m]) for m in range(len(COSTS))], 1)
            model = v0.route(scores)
            points[beta].append((costs[model].mean().item(), truth.gather(1, model[:, None]).mean().item()))
        for m, cost in enumerate(COSTS):
            alone.setdefault(f"model {m + 1} alone", []).append((cost, truth[:, m].mean().item()))
        best = truth.argmax(1)
        alone.setdefault("oracle of accuracy", []).append((costs[best].mean().item(), truth.amax(1).mean().item()))
    named = {f"beta {beta:g}": values for beta, values in points.items()} | alone
    rows = [[name, spread([c for c, _ in v], "{:.2f}"), spread([a for _, a in v], "{:.3f}")] for name, v in named.items()]
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(
        [mean([c for c, _ in v]) for v in points.values()],
        [mean([a for _, a in v]) for v in points.values()],
        "o-",
        label="router",
    )
    for name, values in alone.items():
        ax.plot(mean([c for c, _ in values]), mean([a for _, a in values]), "s", label=name)
    ax.set(xlabel="mean cost", ylabel="accuracy", title="Three models, nearest neighbours for the value")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    return Result(
        [Rows(f"{queries} queries, contexts of {context}, {seeds} draws", ["router", "mean cost", "accuracy"], rows)],
        figure,
        {name: {"cost": [c for c, _ in v], "accuracy": [a for _, a in v]} for name, v in named.items()},
    )


# The command

EXPERIMENTS: dict[str, Callable[..., Result]] = {"pool": pool, "budget": budget, "router": router}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which prompts to roll out, and how often, on simulated pools of prompts.")
    add = parser.add_argument
    add("experiment", choices=tuple(EXPERIMENTS))
    add("--seeds", type=int, metavar="N", help="pools or draws (default 3, 2, 5)")
    add("--quick", action="store_true", help="a small pool and few steps: whether everything runs")
    add_outputs(parser, "prompt_pool_EXPERIMENT.png")
    arguments = parser.parse_args(argv)
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error(f"argument --seeds: {arguments.seeds} is less than 1")
    check_outputs(parser, arguments, f"prompt_pool_{arguments.experiment}.png")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with one_thread():
        seeds = {} if arguments.seeds is None else {"seeds": arguments.seeds}
        result = EXPERIMENTS[arguments.experiment](quick=arguments.quick, **seeds)
    show(result, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
