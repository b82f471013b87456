"""DPO against GRPO on token sequences that stand for images: who is ahead on prompts that were trained on, who on others?

A study of image generation with RL (prefkern.papers.image_cot_rl) says: DPO is stronger in-domain, GRPO generalises better, and
a reward that generalises better makes a policy that does. Here an image is six tokens out of eight, a prompt is one of four
shapes and one of four colours, and a rule says which token is right in each place: even places by the shape, odd ones by the
colour, the last by both, in a way that nothing about other prompts tells. Twelve prompts are trained on; four, one of each
shape and colour, are held out.

    policy    embeddings of shape, colour, place and the token before, tanh, a head; its teacher is mostly wrong
    DPO       best over worst of N candidates, all drawn before the training (in each iteration): image_dpo_loss
    GRPO      N candidates of each prompt at every step: image_grpo_loss
    rewards   the share of right tokens; or one fitted to some of the teacher's images of the twelve prompts, by shape and by
              colour ("fitted"), or for each prompt by itself ("per prompt")

Both see as many sequences and take as many steps of Adam, each at the learning rate of five that gives the highest reward it is
trained on. Expected rewards are exact: a token depends only on the one before.

    python examples/image_tokens.py
    python examples/image_tokens.py --markdown --json image_tokens.json     # the table as docs/experiments_diffusion.md has it

A run repeats exactly on the same machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from _report import Result, Rows, add_outputs, check_outputs, one_thread, show
from prefkern import logits_logprobs
from prefkern.papers import image_cot_rl as study

SHAPES, COLOURS, PLACES, TOKENS = 4, 4, 6, 8
PROMPTS = torch.cartesian_prod(torch.arange(SHAPES), torch.arange(COLOURS))
UNSEEN = (PROMPTS.sum(1) % 4 == 3).nonzero().flatten()
SEEN = (PROMPTS.sum(1) % 4 != 3).nonzero().flatten()
START = TOKENS  # what is before the first token
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Settings:
    width: int = 24
    right: float = 0.3  # of the teacher's tokens, besides those that are right by chance
    teacher_steps: int = 150
    rounds: int = 48  # steps; groups of N candidates per prompt
    fitted_to: int = 16  # images of each prompt
    ridge: float = 0.3
    sizes: tuple[int, ...] = (2, 4, 8, 16)


# Rewards: tables [prompts, places, tokens], whose entries add up


def right_tokens() -> Tensor:
    """[prompts, places]."""
    shape, colour = PROMPTS[:, :1], PROMPTS[:, 1:]
    place = torch.arange(PLACES)
    tokens = torch.where(place % 2 == 0, (shape + place // 2) % 4, 4 + (colour + place // 2) % 4)
    tokens[:, -1] = (3 * PROMPTS[:, 0] + 5 * PROMPTS[:, 1] ** 2) % TOKENS
    return tokens


def exact_reward() -> Tensor:
    return torch.nn.functional.one_hot(right_tokens(), TOKENS).float() / PLACES


def total(table: Tensor, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Rewards [..., B] of tokens [..., B, places] for prompts [B]."""
    return table[prompts[:, None], torch.arange(PLACES), tokens].sum(-1)


def fitted_reward(tokens: Tensor, prompts: Tensor, rewards: Tensor, ridge: float, *, per_prompt: bool) -> Tensor:
    """The table that ridge regression finds from B images [B, places]: a part by shape and one by colour, or one per prompt."""
    images = torch.nn.functional.one_hot(tokens, TOKENS).double().flatten(1)
    if per_prompt:
        which = torch.nn.functional.one_hot(torch.arange(len(PROMPTS)), len(PROMPTS)).double()
    else:
        which = torch.cat([torch.nn.functional.one_hot(c, 4) for c in PROMPTS.unbind(1)], 1).double()
    x = torch.einsum("bi,bf->bif", which[prompts], images).flatten(1)
    mean = rewards.double().mean()
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    found = torch.linalg.solve(gram, x.T @ (rewards.double() - mean)).view(which.shape[1], -1)
    return ((which @ found).view(-1, PLACES, TOKENS) + mean / PLACES).float()


# The policy: R of them, one for each seed, side by side

Policy = dict[str, Tensor]


def new_policies(seeds: int, width: int) -> Policy:
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=g) for g in generators])

    return {
        "shape": 0.5 * draw(SHAPES, width), "colour": 0.5 * draw(COLOURS, width), "place": 0.5 * draw(PLACES, width),
        "before": 0.5 * draw(TOKENS + 1, width), "head": draw(TOKENS, width) / width**0.5, "bias": torch.zeros(seeds, TOKENS),
    }  # fmt: skip


def copied(policy: Policy) -> Policy:
    return {name: t.detach().clone() for name, t in policy.items()}


def place_logits(policy: Policy, prompts: Tensor, before: Tensor, place: int | slice) -> Tensor:
    """[R, B, ..., tokens] behind tokens `before` [R, B, ...], whose last dimension is that of the places."""
    rows = torch.arange(len(before)).view(-1, *(1,) * (before.dim() - 1))
    of_prompt = policy["shape"][:, PROMPTS[prompts, 0]] + policy["colour"][:, PROMPTS[prompts, 1]]
    at = policy["place"][:, place]
    at = at[:, None] if at.dim() == 3 else at[:, None, None]
    h = torch.tanh(of_prompt[:, :, None] + at + policy["before"][rows, before])
    return torch.einsum("rbld,rvd->rblv", h, policy["head"]) + policy["bias"][:, None, None]


def token_logps(policy: Policy, prompts: Tensor, tokens: Tensor) -> Tensor:
    """[R B, places] of tokens [R, B, places]."""
    before = torch.cat([torch.full_like(tokens[..., :1], START), tokens[..., :-1]], -1)
    logits = place_logits(policy, prompts, before, slice(None))
    return logits_logprobs(logits.flatten(0, 1), tokens.flatten(0, 1)).logp


@torch.no_grad()
def drawn(policy: Policy, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [R, B, places]."""
    policies = len(policy["bias"])
    before = torch.full((policies, len(prompts), 1), START)
    tokens = []
    for place in range(PLACES):
        p = place_logits(policy, prompts, before, place).softmax(-1)
        before = torch.multinomial(p.flatten(0, 2), 1, generator=generator).view_as(before)
        tokens.append(before)
    return torch.cat(tokens, -1)


@torch.no_grad()
def expected(policy: Policy, table: Tensor, prompts: Tensor) -> Tensor:
    """Rewards [R], expected and averaged over prompts: exact, from the chances of a token given the one before."""
    every = torch.arange(TOKENS + 1).expand(len(policy["bias"]), len(prompts), -1)
    chance = None
    reward = torch.zeros(len(policy["bias"]), len(prompts))
    for place in range(PLACES):
        p = place_logits(policy, prompts, every, place).softmax(-1)  # [R, B, before, token]
        chance = p[:, :, START] if chance is None else torch.einsum("rbi,rbij->rbj", chance, p[:, :, :TOKENS])
        reward += (chance * table[prompts, place]).sum(-1)
    return reward.mean(1)


# The training


def adam(policy: Policy, lr: float) -> tuple[Policy, torch.optim.Adam]:
    trained = {name: t.detach().clone().requires_grad_() for name, t in policy.items()}
    return trained, torch.optim.Adam(trained.values(), lr=lr)


def step(optimiser: torch.optim.Adam, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def taught(settings: Settings, seeds: int) -> Policy:
    """Policies that answer all prompts as a teacher does whose tokens are mostly drawn at random."""
    policy, optimiser = adam(new_policies(seeds, settings.width), 0.02)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.arange(len(PROMPTS)).repeat(4)
    right = right_tokens()[prompts].expand(seeds, -1, -1)
    for _ in range(settings.teacher_steps):
        knows = torch.rand(right.shape, generator=generator) < settings.right
        tokens = torch.where(knows, right, torch.randint(TOKENS, right.shape, generator=generator))
        step(optimiser, -token_logps(policy, prompts, tokens).mean() * seeds)
    return copied(policy)


def learn_by_dpo(base: Policy, table: Tensor, size: int, iterations: int, lr: float, rounds: int, seed: int) -> Policy:
    """Each iteration draws its pool, and takes four times through its pairs, best over worst, in batches of 48 prompts."""
    generator = torch.Generator().manual_seed(seed)
    policy, optimiser = adam(base, lr)
    policies = len(base["bias"])
    for _ in range(iterations):
        ref = copied(policy)
        groups = SEEN.repeat(rounds // iterations)
        prompts = groups.repeat_interleave(size)
        tokens = drawn(ref, prompts, generator)
        pairs = study.pick_pairs(total(table, prompts, tokens).flatten(), size)
        sides = [tokens.flatten(0, 1)[of].view(policies, len(groups), PLACES) for of in (pairs.chosen, pairs.rejected)]
        keep = pairs.keep.view(policies, len(groups))
        for _ in range(4):
            for batch in torch.randperm(len(groups), generator=generator).split(48):
                kept = keep[:, batch].flatten()
                lp, ref_lp = ([token_logps(p, groups[batch], side[:, batch])[kept] for side in sides] for p in (policy, ref))
                step(optimiser, study.image_dpo_loss(*lp, *ref_lp).loss * policies)
    return copied(policy)


def learn_by_grpo(base: Policy, table: Tensor, size: int, iterations: int, lr: float, rounds: int, seed: int) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    policy, optimiser = adam(base, lr)
    prompts = SEEN.repeat_interleave(size)
    for _ in range(iterations):
        ref = copied(policy)
        for _ in range(rounds // iterations):
            tokens = drawn(policy, prompts, generator)
            rewards = total(table, prompts, tokens).flatten()
            lp, ref_lp = (token_logps(p, prompts, tokens) for p in (policy, ref))
            loss = study.image_grpo_loss(lp, ref_lp, rewards, group=size).loss
            step(optimiser, loss * len(base["bias"]))
    return copied(policy)


METHODS: dict[str, Callable[..., Policy]] = {"DPO": learn_by_dpo, "GRPO": learn_by_grpo}


def experiment(settings: Settings, seeds: int) -> dict[str, Any]:
    """Rewards by the rule, of each seed, on seen and unseen prompts, by reward trained on, N, iterations and method."""
    base, rule = taught(settings, seeds), exact_reward()
    prompts = SEEN.repeat_interleave(settings.fitted_to)
    tokens = drawn(base, prompts, torch.Generator().manual_seed(1))[0]
    of_teacher = tokens, prompts, total(rule, prompts, tokens), settings.ridge
    tables = {
        "exact": rule,
        "fitted": fitted_reward(*of_teacher, per_prompt=False),
        "per prompt": fitted_reward(*of_teacher, per_prompt=True),
    }
    new = drawn(base, SEEN.repeat(20), torch.Generator().manual_seed(2))[0]
    truth = total(rule, SEEN.repeat(20), new)
    agrees = {
        name: torch.corrcoef(torch.stack([total(table, SEEN.repeat(20), new), truth]))[0, 1].item()
        for name, table in tables.items()
    }
    runs = []
    for name, table in tables.items():
        for size in settings.sizes if name == "exact" else settings.sizes[-1:]:
            for iterations in (1, 3):
                for method, learn in METHODS.items():
                    ends = [learn(base, table, size, iterations, lr, settings.rounds, 3) for lr in RATES]
                    best = max(range(len(RATES)), key=lambda k: expected(ends[k], table, SEEN).mean().item())
                    runs.append({
                        "reward": name, "N": size, "iterations": iterations, "method": method, "lr": RATES[best],
                        "seen": expected(ends[best], rule, SEEN).tolist(),
                        "unseen": expected(ends[best], rule, UNSEEN).tolist(),
                    })  # fmt: skip
    start = {"seen": expected(base, rule, SEEN).tolist(), "unseen": expected(base, rule, UNSEEN).tolist()}
    return {"start": start, "agreement of the rewards with the rule": agrees, "runs": runs}


# The report

COLUMNS = ("reward", "N", "iterations", "DPO, seen", "GRPO, seen", "GRPO - DPO", "DPO, unseen", "GRPO, unseen", "GRPO - DPO")


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    """Mean of a - b and its standard error."""
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    return f"{d.mean():+.3f} ± {d.std() / len(d) ** 0.5:.3f}"


def rows(numbers: dict[str, Any]) -> list[list[str]]:
    lines = []
    runs = numbers["runs"]
    for dpo, grpo in zip(runs[::2], runs[1::2], strict=True):
        line = [dpo["reward"], str(dpo["N"]), str(dpo["iterations"])]
        for prompts in ("seen", "unseen"):
            line += [f"{sum(run[prompts]) / len(run[prompts]):.3f}" for run in (dpo, grpo)]
            line.append(difference(grpo[prompts], dpo[prompts]))
        lines.append(line)
    return lines


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="DPO against GRPO on seen and unseen prompts, on six tokens for an image.")
    add = parser.add_argument
    add("--seeds", type=int, default=5, metavar="N", help="policies, each with its own start (default 5)")
    add_outputs(parser, None)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error(f"argument --seeds: {arguments.seeds} is less than 2")
    check_outputs(parser, arguments, None)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with one_thread():
        numbers = experiment(Settings(), arguments.seeds)
    start = {prompts: sum(values) / len(values) for prompts, values in numbers["start"].items()}
    title = f"Share of right tokens, mean of {arguments.seeds} seeds (start: {start['seen']:.3f}, {start['unseen']:.3f})"
    show(Result([Rows(title, COLUMNS, rows(numbers))], None, numbers), arguments)
    agreement = numbers["agreement of the rewards with the rule"]
    print("correlation with the rule, on new images: " + ", ".join(f"{name} {value:.2f}" for name, value in agreement.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
