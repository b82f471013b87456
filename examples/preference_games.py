"""What five papers claim, on games small enough for one CPU core and half a minute, and what the runs show.

    extragradient   EGPO's last iterate beside mirror descent (online IPO) and Nash-MD, on KL-regularised games: gradient
                    evaluations to a dual gap of 1e-6, each method at its best step size
    momentum        APO (Nesterov) beside iterative DPO on a 20-armed bandit: exact steps, and DPO on sampled pairs
    selfplay        SPPO and DNO beside DPO with Bradley-Terry labels on win matrices that are cyclic: exploitability of
                    the last and of the average policy, DNO's bound, log-probabilities of chosen and rejected
    cycle           GPM's embeddings beside Bradley-Terry scores on a 3-cycle and an item that beats all of it

A policy here is a table: one logit per response, of one prompt. Every loss is the library's own, and is minimised by its
gradients. So the runs show whether a method's own argument holds, not what it does to a language model.

    python examples/preference_games.py extragradient            # a table, and preference_games_extragradient.png
    python examples/preference_games.py selfplay --markdown      # the tables as docs/experiments.md has them
    python examples/preference_games.py momentum --seeds 20 --json numbers.json

A run repeats exactly on the same machine. Needed besides prefkern: matplotlib, which the "demo" extra brings.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from _report import Result, Rows, add_outputs, check_outputs, one_thread, show
from prefkern import preference_loss
from prefkern.papers import apo_accel, dno, egpo, gpm, sppo

F64 = torch.float64


# Games


def from_upper(upper: Tensor) -> Tensor:
    """The win matrix [..., n, n] of which only what is above the diagonal is read."""
    a = upper.triu(1)
    return a + (1 - a).mT.tril(-1) + 0.5 * torch.eye(a.shape[-1], dtype=a.dtype)


def rock_paper_scissors(*wins: float) -> Tensor:
    """0 beats 1, 1 beats 2 and 2 beats 0, with these probabilities."""
    a, b, c = wins
    return from_upper(torch.tensor([[0, a, 1 - c], [0, 0, b], [0, 0, 0]], dtype=F64))


def random_game(n: int, seed: int) -> Tensor:
    """Every probability uniform in [0, 1]."""
    return from_upper(torch.rand(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed)))


def wins_against(preference: Tensor, logp: Tensor) -> Tensor:
    """How often each response beats one drawn from the policy."""
    return (preference @ logp.exp().unsqueeze(-1)).squeeze(-1)


def exploitability(preference: Tensor, policy: Tensor) -> Tensor:
    """How far above 1/2 the best response's win rate against a policy [..., n] is: 0 for the von Neumann winner."""
    return (policy @ preference.mT).amax(-1) - 0.5


# EGPO: the last iterate


def nash_md_step(logits: Tensor, ref: Tensor, preference: Tensor, *, beta: float, eta: Tensor) -> Tensor:
    """Nash-MD: mirror descent from the geometric mixture of policy and reference, against that mixture."""
    mixture = torch.lerp(logits, ref, (eta * beta).unsqueeze(-1))
    return mixture + eta.unsqueeze(-1) * wins_against(preference, torch.log_softmax(mixture, -1))


def mirror_descent_step(logits: Tensor, ref: Tensor, preference: Tensor, *, beta: float, eta: Tensor) -> Tensor:
    return egpo.egpo_tabular_step(logits, ref, preference, beta=beta, eta=eta)[0]


def extragradient_step(logits: Tensor, ref: Tensor, preference: Tensor, *, beta: float, eta: Tensor) -> Tensor:
    return egpo.egpo_tabular_step(logits, ref, preference, beta=beta, eta=eta)[1]


METHODS: dict[str, tuple[Callable[..., Tensor], int]] = {  # a step, and how many gradient evaluations it takes
    "mirror descent": (mirror_descent_step, 1),
    "Nash-MD": (nash_md_step, 1),
    "EGPO": (extragradient_step, 2),
}
RATES = [10 ** (-k / 8) for k in range(25)]  # eta * beta
GAP = 1e-6
BUDGETS = {0.1: (1500, 2), 0.01: (8000, 10)}  # by beta: how many evaluations, and after how many the gap is looked at


def race(preference: Tensor, *, beta: float, budget: int, every: int) -> dict[str, Tensor]:
    """Dual gaps [budget / every + 1, games, step sizes] of each method, from the reference, which is uniform."""
    games, n, _ = preference.shape
    eta = torch.tensor(RATES, dtype=F64) / beta
    ref = torch.zeros(n, dtype=F64)
    boards = preference.unsqueeze(1)
    gaps = {}
    for name, (step, cost) in METHODS.items():
        logits = torch.zeros(games, len(eta), n, dtype=F64)
        curve = [egpo.dual_gap(logits, ref, boards, beta=beta)]
        for _ in range(budget // every):
            for _ in range(every // cost):
                logits = step(logits, ref, boards, beta=beta, eta=eta)
            curve.append(egpo.dual_gap(logits, ref, boards, beta=beta))
        gaps[name] = torch.stack(curve)
    return gaps


def best_rate(gaps: Tensor, every: int) -> int:
    """Which of the curves [times, step sizes] is first at GAP; the lowest at the end if none is."""
    needed = evaluations_to(gaps, GAP, every)
    return int(gaps[-1].argmin() if needed.isinf().all() else needed.argmin())


def evaluations_to(gaps: Tensor, level: float, every: int) -> Tensor:
    """Evaluations until a curve along the first dimension is at this level for the first time; infinity if it never is."""
    reached = gaps <= level
    return torch.where(reached.any(0), float(every) * reached.int().argmax(0), math.inf)


def late_slope(gaps: Tensor, every: int) -> float:
    """Decades per evaluation of one curve, by least squares over its way from 1e-3 to 1e-9; NaN if it does not end below."""
    inside = ((gaps <= 1e-3) & (gaps >= 1e-9)).nonzero().flatten()
    if len(inside) < 3 or gaps[-1] > 1e-9:
        return math.nan
    x, y = every * inside.double(), gaps[inside].log10()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def extragradient(seeds: int = 5) -> Result:
    games = {
        "rock, paper, scissors": rock_paper_scissors(0.9, 0.8, 0.7).unsqueeze(0),
        "random 10 x 10": torch.stack([random_game(10, seed) for seed in range(seeds)]),
    }
    rows, stability, numbers = [], [], []
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = dict(zip(games, figure.subplots(1, len(games)), strict=True))
    for game, preference in games.items():
        each = range(len(preference))
        for beta, (budget, every) in BUDGETS.items():
            gaps = race(preference, beta=beta, budget=budget, every=every)
            best = {name: [best_rate(g[:, i], every) for i in each] for name, g in gaps.items()}
            for name, g in gaps.items():
                curves = [g[:, i, best[name][i]] for i in each]
                found = {
                    "game": game, "beta": beta, "method": name,
                    "evaluations": [evaluations_to(c, GAP, every).item() for c in curves],
                    "rate": [RATES[best[name][i]] for i in each],
                    "slope": [late_slope(c, every) for c in curves],
                    "end": [c[-1].item() for c in curves],
                    "end_at_the_rate_of_egpo": [g[-1, i, best["EGPO"][i]].item() for i in each],
                }  # fmt: skip
                numbers.append(found)
                rows.append([
                    game, f"{beta:g}", name, spread(found["evaluations"], "{:.0f}"), spread(found["rate"], "{:.2g}"),
                    spread([-100 * slope for slope in found["slope"]], "{:.2g}"), spread(found["end"], "{:.0e}"),
                ])  # fmt: skip
                if beta == min(BUDGETS):
                    stability.append([game, name, spread(found["end_at_the_rate_of_egpo"], "{:.0e}")])
                    axes[game].semilogy(range(0, budget + 1, every), curves[0].clamp_min(1e-16), label=name)
    for game, ax in axes.items():
        ax.set(title=f"{game}, beta {min(BUDGETS):g}", xlabel="gradient evaluations", ylabel="dual gap of the last iterate")
        ax.grid(alpha=0.3)
        ax.legend()
    columns = ["game", "beta", "method", "evaluations to 1e-6", "best eta beta", "decades per 100", "gap at the end"]
    return Result(
        [
            Rows("Dual gap of the last iterate, each method at its best step size", columns, rows),
            Rows(
                f"Dual gap after {BUDGETS[min(BUDGETS)][0]} evaluations at EGPO's best step size, beta {min(BUDGETS):g}",
                ["game", "method", "gap at the end"],
                stability,
            ),
        ],
        figure,
        {"runs": numbers},
    )


def spread(values: Sequence[float], form: str) -> str:
    """The median of several, with the smallest and the largest; "never" for infinity; NaN is left out, "-" if all are."""

    def said(value: float) -> str:
        return "never" if value == math.inf else "-" if math.isnan(value) else form.format(value)

    ordered = sorted(value for value in values if not math.isnan(value)) or [math.nan]
    middle = ordered[len(ordered) // 2] if len(ordered) % 2 else sum(ordered[len(ordered) // 2 - 1 :][:2]) / 2
    return said(middle) if len(ordered) == 1 else f"{said(middle)} ({said(ordered[0])} to {said(ordered[-1])})"


# APO: momentum between outer steps

ARMS, ALPHAS, BETA = 20, (0.0, 0.3, 0.6, 0.9), 2.0
EXACT_STEPS, SAMPLED_STEPS, INNER_STEPS, INNER_LR = 150, 15, 100, 0.05


def bandit(seed: int) -> Tensor:
    """Rewards of the arms: standard normal."""
    return torch.randn(ARMS, dtype=F64, generator=torch.Generator().manual_seed(seed))


def log_regret(logp: Tensor, reward: Tensor) -> Tensor:
    """log(max r - E r), which keeps its digits where the policy is nearly pure."""
    return torch.logsumexp(logp + (reward.amax(-1, keepdim=True) - reward).log(), -1)


def exact_outer_steps(reward: Tensor, *, beta: float, alpha: float) -> Tensor:
    """log regret [steps + 1] of the policies of APO from the uniform one."""
    logp, _ = apo_accel.apo_tabular(torch.zeros_like(reward), reward, beta=beta, alpha=alpha, steps=EXACT_STEPS)
    return log_regret(logp, reward)


def sampled_outer_steps(seeds: int, pairs: int, settings: Sequence[tuple[float, float]]) -> Tensor:
    """Regrets [steps + 1, settings, seeds] of (alpha, beta): each outer step is DPO on pairs that the extrapolated policy
    sampled, from where it stands. The rows of all settings and seeds are minimised side by side."""
    generators = [torch.Generator().manual_seed(10_000 + seed) for _ in settings for seed in range(seeds)]
    reward = torch.stack([bandit(seed) for _ in settings for seed in range(seeds)])
    alpha, beta = torch.tensor(settings, dtype=F64).repeat_interleave(seeds, 0).unsqueeze(1).unbind(-1)
    logp = extrapolated = torch.full_like(reward, -math.log(ARMS))

    def regret() -> Tensor:
        return (reward.amax(-1) - (logp.exp() * reward).sum(-1)).view(len(settings), seeds)

    regrets = [regret()]
    for _ in range(SAMPLED_STEPS):
        drawn = [
            torch.multinomial(p, 2 * pairs, True, generator=g) for p, g in zip(extrapolated.exp(), generators, strict=True)
        ]
        first, second = torch.stack(drawn).chunk(2, -1)
        chance = torch.sigmoid(reward.gather(-1, first) - reward.gather(-1, second))
        won = torch.stack([torch.rand(pairs, dtype=F64, generator=g) for g in generators]) < chance
        chosen, rejected = torch.where(won, first, second), torch.where(won, second, first)

        logits = extrapolated.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=INNER_LR)
        scale = beta.expand_as(chosen).flatten()
        for _ in range(INNER_STEPS):
            optimizer.zero_grad()
            new = torch.log_softmax(logits, -1)
            sides = [of.gather(-1, arms).flatten() for of in (new, extrapolated) for arms in (chosen, rejected)]
            # Over the pairs of one row, so that each row has the gradient of its own mean.
            loss = preference_loss(*sides, kind="sigmoid", beta=1.0, scale=scale, reduction="sum").loss / pairs
            loss.backward()
            optimizer.step()
        new = torch.log_softmax(logits.detach(), -1)
        logp, extrapolated = new, torch.log_softmax(new + alpha * (new - logp), -1)
        regrets.append(regret())
    return torch.stack(regrets)


def momentum(seeds: int = 10) -> Result:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings = {f"alpha {alpha:g}": (alpha, BETA) for alpha in ALPHAS}
    settings |= {f"alpha 0, beta x {1 - alpha:.1f}": (0.0, BETA * (1 - alpha)) for alpha in ALPHAS if alpha > 0}
    numbers: dict[str, Any] = {"exact": {}, "sampled": {}}
    rows: list[list[str]] = []
    rewards = [bandit(seed) for seed in range(seeds)]
    exact = {name: [exact_outer_steps(r, beta=beta, alpha=alpha) for r in rewards] for name, (alpha, beta) in settings.items()}
    plain = exact["alpha 0"]
    for name, curves in exact.items():
        pairs = list(zip(curves, plain, strict=True))
        slopes = [((c[-1] - c[-31]) / (p[-1] - p[-31])).item() for c, p in pairs]
        needed = [first_below(c, math.log(1e-2)) for c in curves]
        ahead = all(bool((c[2:] < p[2:]).all()) for c, p in pairs)
        numbers["exact"][name] = {
            "slopes": slopes, "steps": needed, "ahead": ahead, "curves": [c.tolist() for c in curves]
        }  # fmt: skip
        rows.append([name, spread(needed, "{:.0f}"), spread(slopes, "{:.2f}"), "yes" if ahead else "-"])
        style = "--" if "beta" in name else "-"
        left.plot(curves[0] / math.log(10), label=name, linestyle=style, linewidth=1.2)
    left.set(title="Exact outer steps, seed 0", xlabel="outer step", ylabel="log10 of max r - E r", xlim=(0, 60), ylim=(-12, 1))

    sampled_rows = []
    for count, style in ((50, ":"), (500, "-")):
        regrets = sampled_outer_steps(seeds, count, list(settings.values()))
        excess = regrets - regrets[:, :1]
        for k, name in enumerate(settings):
            mean, above = regrets[:, k].mean(-1), excess[-1, k]
            found = {"mean": mean.tolist(), "above": above.mean().item(), "error": above.std().item() / math.sqrt(seeds)}
            numbers["sampled"][f"{count}, {name}"] = found
            said = f"{found['above']:+.3f} ± {found['error']:.3f}" if k else "-"
            sampled_rows.append([str(count), name, *(f"{mean[t]:.3f}" for t in (2, 5, SAMPLED_STEPS)), said])
            if k < len(ALPHAS):
                right.semilogy(mean, label=f"{name}, {count} pairs", linewidth=1.2, linestyle=style, color=f"C{k}")
    right.set(title=f"DPO on sampled pairs, mean of {seeds} seeds", xlabel="outer step", ylabel="max r - E r")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    columns = ["pairs", "run", "t = 2", "t = 5", f"t = {SAMPLED_STEPS}", "over alpha 0, same seeds"]
    return Result(
        [
            Rows(
                "Exact outer steps", ["run", "outer steps to 0.01", "late slope over that of alpha 0", "ahead from t = 2"], rows
            ),
            Rows(f"DPO on sampled pairs: max r - E r, mean of {seeds} seeds", columns, sampled_rows),
        ],
        figure,
        numbers,
    )


def first_below(curve: Tensor, level: float) -> float:
    below = (curve < level).nonzero()
    return float(below[0]) if len(below) else math.inf


# SPPO and DNO: self-play

ROUNDS, DNO_ROUNDS = 200, 20
Round = Callable[[Tensor], Tensor]


def minimised(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Log-probs of the table that minimises a loss of log-probs, from this one."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=60, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(torch.log_softmax(logits, -1))
        value.backward()
        return value

    optimizer.step(closure)
    return torch.log_softmax(logits.detach(), -1)


def sppo_round(preference: Tensor, eta: float) -> Round:
    """SPPO's loss of all responses, in expectation over what the policy samples."""

    def step(logp: Tensor) -> Tensor:
        win = wins_against(preference, logp)[None]

        def loss(new: Tensor) -> Tensor:
            each = sppo.sppo_all_loss(new[None], logp[None], win=win, eta=eta, reduction="none").loss
            return (logp.exp() * each[0]).sum()

        return minimised(loss, logp)

    return step


def dno_round(preference: Tensor, eta: float) -> Round:
    """DNO's loss over all pairs."""
    i, j = torch.triu_indices(*preference.shape, 1)

    def step(logp: Tensor) -> Tensor:
        win = wins_against(preference, logp)
        return minimised(lambda new: dno.dno_loss(new[i], new[j], logp[i], logp[j], win[i], win[j], eta=eta).loss, logp)

    return step


def dpo_round(preference: Tensor, eta: float, *, on_policy: bool) -> Round:
    """DPO, whose reference is the policy of the last round, over pairs that are labelled by the win matrix.

    Pairs are drawn from the current policy, or are the uniform ones of the start in every round.
    """
    i, j = torch.triu_indices(*preference.shape, 1)

    def step(logp: Tensor) -> Tensor:
        weight = (logp[i] + logp[j]).softmax(0) if on_policy else torch.full((len(i),), 1 / len(i), dtype=F64)

        def loss(new: Tensor) -> Tensor:
            each = preference_loss(
                new[i], new[j], logp[i], logp[j], kind="sigmoid", beta=1 / eta,
                label_smoothing=preference[j, i], reduction="none",
            )  # fmt: skip
            return (weight * each.loss).sum()

        return minimised(loss, logp)

    return step


def play(preference: Tensor, step: Round, rounds: int) -> Tensor:
    """Log-probs [rounds + 1, n] from the uniform policy."""
    n = len(preference)
    logps = [torch.full((n,), -math.log(n), dtype=F64)]
    for _ in range(rounds):
        logps.append(step(logps[-1]))
    return torch.stack(logps)


def displaced(problems: int, kind: str, *, alike: bool) -> tuple[Tensor, Tensor]:
    """By how much one pair's log-probs have moved, (chosen, rejected) [problems], where responses share parameters.

    A policy over 20 responses with 8 random features each, trained on one pair alone. Both losses are least where the two
    log-ratios are 2 apart: SPPO's targets are +1 and -1, DPO's label is sigmoid(2).
    alike: the rejected response's features are mostly the chosen one's, longer or shorter.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(problems, 20, 8, dtype=F64, generator=generator)
    if alike:
        length = 0.5 + torch.rand(problems, 1, dtype=F64, generator=generator)
        features[:, 1] = length * features[:, 0] + 0.3 * features[:, 1]
    start = torch.full((problems, 20), -math.log(20), dtype=F64)
    weights = torch.zeros(problems, 8, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    wins = {"chosen_win": torch.full((problems,), 0.75, dtype=F64), "rejected_win": torch.full((problems,), 0.25, dtype=F64)}
    smoothing = torch.sigmoid(torch.tensor(-2.0, dtype=F64)).item()

    def policy() -> Tensor:
        return torch.log_softmax((features @ weights.unsqueeze(-1)).squeeze(-1), -1)

    for _ in range(400):
        optimizer.zero_grad()
        logp = policy()
        sides = (logp[:, 0], logp[:, 1], start[:, 0], start[:, 1])
        if kind == "SPPO":
            loss = sppo.sppo_loss(*sides, **wins, eta=4.0, reduction="sum").loss
        else:
            loss = preference_loss(*sides, kind="sigmoid", beta=1.0, label_smoothing=smoothing, reduction="sum").loss
        loss.backward()
        optimizer.step()
    moved = policy().detach() - start
    return moved[:, 0], moved[:, 1]


def selfplay(seeds: int = 5) -> Result:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    biased = rock_paper_scissors(0.9, 0.8, 0.7)
    uniform = torch.full((3,), 1 / 3, dtype=F64)
    numbers: dict[str, Any] = {"play": {}, "dno": [], "displaced": {}}
    rows = []
    for eta in (0.5, 2.0):
        contestants = {
            "SPPO": sppo_round(biased, eta),
            "DNO": dno_round(biased, 1 / eta),
            "DPO, pairs of the start": dpo_round(biased, eta, on_policy=False),
            "DPO, pairs on-policy": dpo_round(biased, eta, on_policy=True),
        }
        for name, step in contestants.items():
            policies = play(biased, step, ROUNDS).exp()
            average = policies.cumsum(0) / torch.arange(1, ROUNDS + 2, dtype=F64)[:, None]
            last, mean = exploitability(biased, policies), exploitability(biased, average)
            start = policies @ biased @ uniform
            previous = ((policies[1:] @ biased) * policies[:-1]).sum(-1)
            numbers["play"][f"{name}, {eta:g}"] = {
                "average": mean.tolist(), "last": last.tolist(), "start": start.tolist(), "previous": previous.tolist(),
            }  # fmt: skip
            rows.append([
                f"{eta:g}", name, *(f"{mean[t]:.3f}" for t in (20, ROUNDS)), f"{last[ROUNDS // 2 :].max():.3f}",
                f"{previous.min():.3f}", f"{start[1:].min():.3f} to {start[1:].max():.3f}",
            ])  # fmt: skip
            if eta == 0.5:
                style = "--" if name == "DNO" else "-"  # it lies on top of SPPO
                left.semilogy(mean, label=name, linestyle=style)
                right.plot(last, label=name, linestyle=style)
    left.set(title="Average policy, eta 0.5", xlabel="round", ylabel="exploitability")
    right.set(title="Last policy, eta 0.5", xlabel="round", ylabel="exploitability")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend(fontsize=8)

    bound_rows = []
    boards = {"rock, paper, scissors": [biased], "random 6 x 6": [random_game(6, seed) for seed in range(seeds)]}
    for game, preferences in boards.items():
        found = [dno_bound(preference) for preference in preferences]
        numbers["dno"] += [{"game": game, **one} for one in found]
        bound_rows.append([
            game, f"{min(min(f['previous']) for f in found):.4f}", f"{min(min(f['slack']) for f in found):.1e}",
            *(spread([f["start"][t] for f in found], "{:.3f}") for t in (1, 5, DNO_ROUNDS)),
            spread([f["average"][1] for f in found], "{:.3f}"), spread([f["average"][-1] for f in found], "{:.3f}"),
        ])  # fmt: skip

    problems = 40 * seeds
    moved_rows = []
    for alike in (False, True):
        for kind in ("SPPO", "DPO"):
            chosen, rejected = displaced(problems, kind, alike=alike)
            features = "alike" if alike else "unrelated"
            numbers["displaced"][f"{kind}, {features}"] = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
            moved_rows.append([
                features, kind, str(int((chosen < 0).sum())), str(int((rejected > 0).sum())),
                spread(chosen.tolist(), "{:+.2f}"), spread(rejected.tolist(), "{:+.2f}"),
            ])  # fmt: skip
    return Result(
        [
            Rows(
                f"{ROUNDS} rounds of self-play on biased rock, paper, scissors: exploitability and win rates",
                [
                    "eta", "method", "average policy, t = 20", f"t = {ROUNDS}", f"last policy, worst of t >= {ROUNDS // 2}",
                    "lowest win rate against the previous", "win rate against the start",
                ], rows,
            ),
            Rows(
                f"DNO, {DNO_ROUNDS} iterations at eta 0.1",
                [
                    "game", "lowest win rate against the previous", "smallest distance to the bound",
                    "win rate against the start, t = 1", "t = 5", f"t = {DNO_ROUNDS}",
                    "exploitability of the average, t = 1", f"of the average, t = {DNO_ROUNDS}",
                ], bound_rows,
            ),
            Rows(
                f"One pair, shared parameters, {problems} problems: what training on it does to its log-probs",
                ["features of the pair", "loss", "chosen falls", "rejected rises", "chosen moved by", "rejected moved by"],
                moved_rows,
            ),
        ],
        figure,
        numbers,
    )  # fmt: skip


def dno_bound(preference: Tensor, eta: float = 0.1) -> dict[str, list[float]]:
    """Each iteration of DNO against its bound, 1/2 + eta KL, against the start, and the average so far."""
    logps = play(preference, dno_round(preference, eta), DNO_ROUNDS)
    policies = logps.exp()
    previous = ((policies[1:] @ preference) * policies[:-1]).sum(-1)
    kl = (policies[1:] * (logps[1:] - logps[:-1])).sum(-1)
    average = policies.cumsum(0) / torch.arange(1, len(policies) + 1, dtype=F64)[:, None]
    return {
        "previous": previous.tolist(),
        "slack": (previous - 0.5 - eta * kl).tolist(),
        "start": (policies @ preference @ policies[0]).tolist(),
        "average": exploitability(preference, average).tolist(),
    }


# GPM: what an embedding can represent

PAIRS = {
    "the cycle": [(0, 1), (1, 2), (2, 0)],
    "cycle and the item above it": [(0, 1), (1, 2), (2, 0), (3, 0), (3, 1), (3, 2)],
}
TAU, FIT_STEPS = 0.1, 500
MODELS = {"Bradley-Terry": 1, "GPM, d = 2": 2, "GPM, d = 4": 4}


def scores(v: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """GPM's score of each pair [seeds, pairs], from normalised vectors, or Bradley-Terry's r - r'."""
    if v.shape[-1] == 1:
        return (v[:, chosen] - v[:, rejected]).squeeze(-1)
    a, b = (torch.nn.functional.normalize(v[:, items], dim=-1).unflatten(-1, (-1, 2)) for items in (chosen, rejected))
    return (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).sum(-1)


def fit_embeddings(pairs: Sequence[tuple[int, int]], dimension: int, seeds: int) -> tuple[Tensor, Tensor]:
    """Share of the pairs that are ordered right [seeds], and the probabilities given to them [seeds, pairs].

    Dimension 1 is Bradley-Terry: GPM whose vectors are (r, 1).
    """
    chosen, rejected = torch.tensor(pairs).unbind(-1)
    v = torch.randn(seeds, 4, dimension, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.05)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        vectors = torch.cat([v, torch.ones_like(v)], -1) if dimension == 1 else v
        sides = (vectors[:, items].flatten(0, 1) for items in (chosen, rejected))
        loss = gpm.gpm_loss(*sides, tau=TAU, normalize=dimension > 1).loss
        (loss * seeds).backward()
        optimizer.step()
    found = scores(v.detach(), chosen, rejected)
    return (found > 0).double().mean(-1), torch.sigmoid(found / TAU)


def cycle(seeds: int = 20) -> Result:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    rows, numbers = [], {}
    for ax, (what, pairs) in zip(figure.subplots(1, len(PAIRS)), PAIRS.items(), strict=True):
        for k, (model, dimension) in enumerate(MODELS.items()):
            right, probability = fit_embeddings(pairs, dimension, seeds)
            perfect = int((right == 1).sum())
            numbers[f"{model}, {what}"] = {"right": right.tolist(), "probability": probability.tolist()}
            rows.append([
                what, model, f"{right.mean():.3f}", f"{right.max():.3f}", f"{perfect} of {seeds}", f"{probability.mean():.3f}",
            ])  # fmt: skip
            places = [p + 0.22 * (k - 1) for p in range(len(pairs))]
            ax.scatter([x for x in places for _ in range(seeds)], probability.mT.flatten(), s=9, label=model, alpha=0.6)
        ax.set(title=what, ylabel="probability given to the right order", ylim=(-0.03, 1.03))
        ax.set_xticks(range(len(pairs)), [f"{a} over {b}" for a, b in pairs])
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    columns = ["pairs", "model", "right, mean", "right, best start", "all right", "probability, mean"]
    return Result(
        [Rows(f"Share of pairs ordered right after {FIT_STEPS} steps of Adam, {seeds} starts", columns, rows)], figure, numbers
    )


# The command

EXPERIMENTS: dict[str, Callable[..., Result]] = {
    "extragradient": extragradient,
    "momentum": momentum,
    "selfplay": selfplay,
    "cycle": cycle,
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What five papers claim, on games small enough for one CPU core and half a minute."
    )
    add = parser.add_argument
    add("experiment", choices=tuple(EXPERIMENTS))
    add("--seeds", type=int, metavar="N", help="random games, runs or starts (default 5, 10, 5, 20)")
    add_outputs(parser, "preference_games_EXPERIMENT.png")
    arguments = parser.parse_args(argv)
    if arguments.seeds is not None and arguments.seeds < 2:
        parser.error(f"argument --seeds: {arguments.seeds} is less than 2")
    check_outputs(parser, arguments, f"preference_games_{arguments.experiment}.png")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with one_thread():
        result = EXPERIMENTS[arguments.experiment](**({} if arguments.seeds is None else {"seeds": arguments.seeds}))
    show(result, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
