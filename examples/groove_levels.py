"""GROOVE on tabular levels: whether algorithmic regret finds the levels on which an agent is far from what is possible, and a
meta-training of a small update network.

A level is a random MDP of 5 states and 2 actions: where actions lead, what they pay, how noisy that is, after how many steps an
episode ends. What is possible on it is known exactly, by value iteration, and so is what an agent's policy earns.

1. A fixed rule, REINFORCE without a baseline, stands in for a learned update, and A2C is the antagonist. Of every level:
   algorithmic regret, what the agent misses in truth, and the score that prioritised level replay would use instead, the
   positive value loss. Rank correlations with the truth, over all levels and within each kind.
2. A small LPG is meta-trained by its meta-gradient through the agents' updates, on uniformly drawn levels and on levels that
   the buffer replays by regret, and then trains agents on levels it has not seen.

    python examples/groove_levels.py                      # tables, and groove_levels.png
    python examples/groove_levels.py --quick
    python examples/groove_levels.py --markdown --json numbers.json

A run repeats exactly on the same machine. Needed besides prefkern: matplotlib, which the "demo" extra brings.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from _report import Result, Rows, add_outputs, check_outputs, one_thread, show
from prefkern.papers import groove

F64 = torch.float64
STATES, ACTIONS, STEPS = 5, 2, 20  # of a rollout
KINDS = {"short": (5, 0.0), "short, noisy": (5, 2.0), "long": (20, 0.0), "long, noisy": (20, 2.0)}  # horizon, noise of a reward
WORKERS, JUDGES = 8, 64  # rollouts for an update; for a return
SCORES = ("algorithmic regret", "positive value loss", "random")


# Levels


@dataclass
class Levels:
    """L levels side by side."""

    transition: Tensor  # [L, S, A, S], probabilities
    reward: Tensor  # [L, S, A], expected
    noise: Tensor  # [L], standard deviation of a reward
    horizon: Tensor  # int64 [L]

    def __len__(self) -> int:
        return len(self.noise)


def make_levels(numbers: Sequence[int], seed: int) -> Levels:
    """The level of a number: its kind is the number modulo the number of kinds, all else is random."""
    transition, reward = [], []
    for number in numbers:
        g = torch.Generator().manual_seed(1_000_003 * seed + number)
        transition.append((3 * torch.randn(STATES, ACTIONS, STATES, dtype=F64, generator=g)).softmax(-1))
        reward.append(torch.randn(STATES, ACTIONS, dtype=F64, generator=g))
    kinds = [tuple(KINDS.values())[number % len(KINDS)] for number in numbers]
    horizon, noise = torch.tensor([k[0] for k in kinds]), torch.tensor([k[1] for k in kinds], dtype=F64)
    return Levels(torch.stack(transition), torch.stack(reward), noise, horizon)


def values(levels: Levels, policy: Tensor | None) -> Tensor:
    """Expected reward of an episode from state 0, [L]: of a policy [L, S, A], or of the best, which may look at the clock."""
    v, found = torch.zeros(len(levels), STATES, dtype=F64), torch.zeros(len(levels), dtype=F64)
    for left in range(1, int(levels.horizon.max()) + 1):
        q = levels.reward + (levels.transition @ v[:, None, :, None]).squeeze(-1)
        v = q.amax(-1) if policy is None else (policy * q).sum(-1)
        found = torch.where(levels.horizon == left, v[:, 0], found)
    return found


def drawn(probabilities: Tensor, g: torch.Generator) -> Tensor:
    """An index of the last dimension for each row."""
    u = torch.rand(probabilities.shape[:-1], dtype=F64, generator=g)
    return (u.unsqueeze(-1) > probabilities.cumsum(-1)[..., :-1]).sum(-1)


@dataclass
class Experience:
    """Rollouts of STEPS steps, [L, workers, STEPS] each; an episode ends after the level's horizon and the next begins."""

    obs: Tensor
    actions: Tensor
    reward: Tensor
    done: Tensor
    next_obs: Tensor


def roll(levels: Levels, policy: Tensor, workers: int, g: torch.Generator) -> Experience:
    where = torch.arange(len(levels))[:, None]
    state, steps = torch.zeros(len(levels), workers, dtype=torch.int64), []
    for t in range(STEPS):
        action = drawn(policy[where, state], g)
        paid = levels.reward[where, state, action]
        paid = paid + levels.noise[:, None] * torch.randn(paid.shape, dtype=F64, generator=g)
        following = drawn(levels.transition[where, state, action], g)
        done = ((t + 1) % levels.horizon == 0)[:, None].expand_as(state)
        steps.append((state, action, paid, done, following))
        state = torch.where(done, 0, following)
    return Experience(*(torch.stack(part, -1) for part in zip(*steps, strict=True)))


def returns_of(levels: Levels, policy: Tensor, g: torch.Generator) -> Tensor:
    """[L, workers], by playing."""
    played = roll(levels, policy, JUDGES, g)
    return groove.first_episode_return(played.reward, played.done)


# Learners


def at(tables: Tensor, states: Tensor) -> Tensor:
    """Rows of tables [L, S, ...] for states [L, workers, steps]."""
    return tables[torch.arange(len(tables))[:, None, None], states]


def behind(e: Experience) -> Tensor:
    """All states of the rollouts and the one behind the last, [L, workers, STEPS + 1]."""
    return torch.cat([e.obs, e.next_obs[..., -1:]], -1)


def descend(loss: Tensor, *tables: tuple[Tensor, float]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, [t for t, _ in tables])
    return [(t - lr * grad).detach().requires_grad_() for (t, lr), grad in zip(tables, grads, strict=True)]


def table(levels: Levels, *shape: int) -> Tensor:
    return torch.zeros(len(levels), STATES, *shape, dtype=F64).requires_grad_()


POLICY_LR, CRITIC_LR, REINFORCE_LR = 4.0, 1.0, 0.5


def reinforce(levels: Levels, updates: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """REINFORCE without a baseline: the inner loss of LPG whose adjustment is minus the return to go. Policy, and values that
    are fitted beside it, which it does not use."""
    logits, critic = table(levels, ACTIONS), table(levels)
    for _ in range(updates):
        probs = logits.softmax(-1)
        e = roll(levels, probs.detach(), WORKERS, g)
        to_go = groove.rollout_advantages(e.reward, torch.zeros_like(at(critic, behind(e))), e.done, lam=1.0).advantages
        nothing = torch.ones(*e.reward.shape, 1, dtype=F64)
        loss = groove.lpg_inner_loss(at(probs, e.obs), e.actions, nothing, -to_go, nothing, alpha_y=0.0).loss
        fit = groove.critic_loss(at(critic, e.obs), to_go)
        logits, critic = descend(len(levels) * (loss + fit), (logits, REINFORCE_LR), (critic, CRITIC_LR))
    return logits.detach().softmax(-1), critic.detach()


def a2c(levels: Levels, updates: int, g: torch.Generator) -> Tensor:
    """The policy of the antagonist."""
    logits, critic = table(levels, ACTIONS), table(levels)
    for _ in range(updates):
        probs = logits.softmax(-1)
        e = roll(levels, probs.detach(), WORKERS, g)
        loss = groove.a2c_loss(at(probs, e.obs), e.actions, e.reward, at(critic, behind(e)), e.done, per_agent=True).loss
        logits, critic = descend(len(levels) * loss, (logits, POLICY_LR), (critic, CRITIC_LR))
    return logits.detach().softmax(-1)


# What scores say


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def judge(seed: int, each: int, updates: int) -> dict[str, Tensor]:
    """Of `each` levels of every kind."""
    levels = make_levels(range(each * len(KINDS)), seed)
    g = torch.Generator().manual_seed(seed)
    policy, critic = reinforce(levels, updates, g)
    antagonist = a2c(levels, updates, g)
    e = roll(levels, policy, JUDGES, g)
    advantages = groove.rollout_advantages(e.reward, at(critic, behind(e)), e.done).advantages
    regret = groove.algorithmic_regret(returns_of(levels, antagonist, g), returns_of(levels, policy, g))
    return {
        "algorithmic regret": regret,
        "positive value loss": advantages.clamp_min(0).mean((1, 2)),
        "random": torch.rand(len(levels), dtype=F64, generator=g),
        "missed": values(levels, None) - values(levels, policy),
        "missed by A2C": values(levels, None) - values(levels, antagonist),
        "kind": torch.arange(len(levels)) % len(KINDS),
    }


# Meta-training

WIDTH, GROUP, UPDATES, LIFETIME, HELD_OUT = 4, 16, 3, 6, 32  # W; agents; K; meta-steps of an agent's life; levels
LPG_LR, AGENT_LR = 3e-3, 2.0


def small_lpg(seed: int) -> groove.LPG:
    return groove.LPG(WIDTH, 8, 16, dtype=F64, generator=torch.Generator().manual_seed(seed))


def applied(agent: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    return at(agent["policy"], states).softmax(-1), at(agent["prediction"], states).softmax(-1)


def newborn(levels: Levels, g: torch.Generator) -> dict[str, Tensor]:
    prediction = torch.randn(len(levels), STATES, WIDTH, dtype=F64, generator=g)
    return {"policy": table(levels, ACTIONS), "prediction": prediction.requires_grad_()}


def taught(lpg: groove.LPG, agent: dict[str, Tensor], levels: Levels, g: torch.Generator, learn: bool) -> groove.AgentStep:
    e = roll(levels, agent["policy"].detach().softmax(-1), WORKERS, g)
    alive = torch.ones(len(levels), dtype=torch.bool)
    return groove.lpg_agent_step(
        lpg, agent, applied, e.obs, e.actions, e.reward, e.done, e.next_obs, lr=AGENT_LR, alive=alive, create_graph=learn
    )


@dataclass
class Training:
    lpg: groove.LPG
    losses: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    replayed: list[float] = field(default_factory=list)


def meta_train(seed: int, lifetimes: int, *, by_regret: bool) -> Training:
    """Levels by regret, or all of them new."""
    run = Training(small_lpg(seed))
    optimizer = torch.optim.Adam(run.lpg.parameters(), lr=LPG_LR)
    buffer = groove.LevelBuffer(4 * GROUP, p_replay=0.5 if by_regret else 0.0, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for life in range(lifetimes):
        batch = buffer.sample(life, GROUP)
        run.replayed.append(float(batch.replayed.double().mean()))
        levels = make_levels(batch.levels.tolist(), seed)
        agent, critic = newborn(levels, g), table(levels)
        for _ in range(LIFETIME):
            terms = []
            for _ in range(UPDATES):
                step = taught(run.lpg, agent, levels, g, True)
                agent = step.params
                terms.append(step.regularisers)
            e = roll(levels, agent["policy"].detach().softmax(-1), WORKERS, g)
            advantages, targets = groove.rollout_advantages(e.reward, at(critic, behind(e)).detach(), e.done)
            probs = applied(agent, e.obs)[0]
            loss = groove.lpg_meta_loss(probs, e.actions, advantages, groove.Regularisers.mean(terms), per_agent=True).loss
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad.norm() for p in run.lpg.parameters() if p.grad is not None]
            run.gradients.append(float(torch.stack(gradients).norm()))
            run.losses.append(float(loss.detach()))
            optimizer.step()
            (critic,) = descend(len(levels) * groove.critic_loss(at(critic, e.obs), targets), (critic, CRITIC_LR))
            agent = {name: t.detach().requires_grad_() for name, t in agent.items()}
        scores = torch.zeros(GROUP, dtype=F64)
        if by_regret:
            policy = agent["policy"].detach().softmax(-1)
            antagonist = a2c(levels, LIFETIME * UPDATES, g)
            scores = groove.algorithmic_regret(returns_of(levels, antagonist, g), returns_of(levels, policy, g))
        buffer.update(batch.slots, scores)
    return run


def share(levels: Levels, policy: Tensor) -> float:
    """How much of the way from the uniform policy to the best one: 0 to 1, the mean over levels."""
    uniform = values(levels, torch.full_like(policy, 1 / ACTIONS))
    return float(((values(levels, policy) - uniform) / (values(levels, None) - uniform)).mean())


def held_out(seed: int) -> dict[str, Callable[[Any], float]]:
    """What a rule makes of agents in one lifetime on levels that no training has seen."""
    levels = make_levels(range(10**6, 10**6 + HELD_OUT), seed)

    def by_lpg(lpg: groove.LPG) -> float:
        g = torch.Generator().manual_seed(seed)
        agent = newborn(levels, g)
        for _ in range(LIFETIME * UPDATES):
            agent = taught(lpg, agent, levels, g, False).params
        return share(levels, agent["policy"].detach().softmax(-1))

    def by_a2c(_: Any) -> float:
        return share(levels, a2c(levels, LIFETIME * UPDATES, torch.Generator().manual_seed(seed)))

    def by_reinforce(_: Any) -> float:
        return share(levels, reinforce(levels, LIFETIME * UPDATES, torch.Generator().manual_seed(seed))[0])

    return {"lpg": by_lpg, "A2C": by_a2c, "REINFORCE": by_reinforce}


# The run


def spread(found: Sequence[float], form: str = "{:.2f}") -> str:
    """Mean and standard deviation over seeds."""
    if len(found) == 1:
        return form.format(found[0])
    return f"{form.format(statistics.fmean(found))} ± {form.format(statistics.stdev(found))}"


def run(seeds: int = 5, each: int = 12, updates: int = 40, meta_seeds: int = 2, lifetimes: int = 8) -> Result:
    judged = [judge(seed, each, updates) for seed in range(seeds)]
    numbers: dict[str, Any] = {"kinds": {}, "correlations": {}, "rules": {}, "curves": {}}
    kinds = []
    for k, name in enumerate(KINDS):
        means = {
            key: [float(one[key][one["kind"] == k].mean()) for one in judged]
            for key in ("algorithmic regret", "missed", "missed by A2C", "positive value loss")
        }
        numbers["kinds"][name] = means
        kinds.append([name, *(spread(v) for v in means.values())])
    correlations = []
    for score in SCORES:
        overall = [spearman(one[score], one["missed"]) for one in judged]
        within = [
            statistics.fmean(spearman(one[score][one["kind"] == k], one["missed"][one["kind"] == k]) for k in range(len(KINDS)))
            for one in judged
        ]
        top = [float(one["missed"][one[score].argsort(descending=True)[: len(one["missed"]) // 4]].mean()) for one in judged]
        numbers["correlations"][score] = {"all": overall, "within": within, "top": top}
        correlations.append([score, spread(overall), spread(within), spread(top)])

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, name in enumerate(KINDS):
        mine = judged[0]["kind"] == k
        left.scatter(judged[0]["algorithmic regret"][mine], judged[0]["missed"][mine], s=14, label=name)
        middle.scatter(judged[0]["positive value loss"][mine], judged[0]["missed"][mine], s=14, label=name)
    left.set(title="seed 0", xlabel="algorithmic regret", ylabel="missed in truth")
    middle.set(title="seed 0", xlabel="positive value loss", ylabel="missed in truth")

    rules: dict[str, list[float]] = {name: [] for name in ("LPG, untrained", "LPG, uniform levels", "LPG, levels by regret")}
    rules |= {"REINFORCE": [], "A2C": []}
    for seed in range(meta_seeds):
        test = held_out(seed)
        rules["LPG, untrained"].append(test["lpg"](small_lpg(seed)))
        for name, by_regret in (("LPG, uniform levels", False), ("LPG, levels by regret", True)):
            trained = meta_train(seed, lifetimes, by_regret=by_regret)
            rules[name].append(test["lpg"](trained.lpg))
            numbers["curves"][f"{name}, {seed}"] = {
                "loss": trained.losses, "gradient": trained.gradients, "replayed": trained.replayed
            }  # fmt: skip
            right.plot(trained.gradients, linewidth=0.8, color="C1" if by_regret else "C0", label=name if seed == 0 else None)
        for name in ("REINFORCE", "A2C"):
            rules[name].append(test[name](None))
    numbers["rules"] = rules
    right.set(title="norm of the meta-gradient", xlabel="meta-step", yscale="log")
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    of = f"{each} levels of each kind, {seeds} seeds"
    columns = ["kind", "algorithmic regret", "missed in truth", "missed by A2C", "positive value loss"]
    tables = [
        Rows(f"REINFORCE without a baseline, A2C as antagonist: means of {of}", columns, kinds),
        Rows(
            f"Rank correlation with what REINFORCE misses, {of}",
            ["score", "all levels", "within a kind", "missed on the quarter that it ranks first"],
            correlations,
        ),
        Rows(
            f"Share of what is possible after {LIFETIME * UPDATES} updates, {HELD_OUT} levels not seen, seeds: {meta_seeds}",
            ["rule", "share", "by seed"],
            [[name, spread(v), ", ".join(f"{x:.2f}" for x in v)] for name, v in rules.items()],
        ),
    ]
    return Result(tables, figure, numbers)


QUICK = {"seeds": 2, "each": 6, "updates": 30, "meta_seeds": 1, "lifetimes": 3}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller run of some seconds")
    add_outputs(parser, "groove_levels.png")
    arguments = parser.parse_args(argv)
    check_outputs(parser, arguments, "groove_levels.png")
    with one_thread():
        result = run(**QUICK) if arguments.quick else run()
    show(result, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
