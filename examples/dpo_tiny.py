"""DPO, or another preference loss, on reversed strings: a whole run from pairs to a better model, small enough for a CPU core.

A language model of about 130 thousand parameters, built from a config (nothing is downloaded), is asked to turn strings
around: "dacb>" -> "bcad". It first learns from a sloppy teacher, three quarters of whose answers are wrong, in one of three
ways, and afterwards answers as the teacher does. Then it sees pairs of a right and a wrong answer, and nothing else:

    reference   log-probs of all answers under the sloppy model, once
    log-probs   prefkern.linear_logprobs: from last hidden states and head weight to a log-prob per token
    loss        one of prefkern.papers, by name: `recipe.loss(Pairs(...))`

The three mistakes are a copied string, an answer that stops a letter early, and one that says its last letter twice: so the
rejected answer can be as long as the chosen one, shorter or longer. What a loss promises is a wider margin between the two;
whether the right answer itself becomes likelier, "chosen logp" and "right answers" tell, and there losses differ.

    python examples/dpo_tiny.py                           # DPO
    python examples/dpo_tiny.py --loss simpo:beta=2.5     # or ipo, kto, sppo:eta=10.0, f_dpo:beta=1.0, orpo, ...
    python examples/dpo_tiny.py --loss dpo --loss simpo   # one after the other, from the same sloppy model
    python examples/dpo_tiny.py --out dpo_tiny.png --json dpo_tiny.json
    python examples/dpo_tiny.py --quick                   # a smoke run

A seed repeats exactly on the same machine with the same number of threads. Needed besides prefkern: transformers, and
matplotlib for --out, which the "demo" extra brings.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import prefkern
from prefkern.papers import PairRecipe, Pairs, load_pair_recipe

LETTERS, ASK, END, PAD = "abcdefgh", ">", ".", " "
VOCABULARY = PAD + END + ASK + LETTERS
IGNORE = -100  # the target at a position that does not belong to an answer
SHORTEST, LONGEST = 3, 4


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, together with its seed and the number of threads."""

    hidden_size: int = 64
    layers: int = 2
    attention_heads: int = 4
    held_out: int = 256
    right: float = 0.25  # of the teacher's answers
    sft_steps: int = 500
    sft_batch: int = 64
    sft_lr: float = 3e-3
    pairs: int = 1024
    steps: int = 80
    batch: int = 32  # pairs
    lr: float = 1e-4
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    eval_every: int = 10


QUICK = Settings(hidden_size=32, held_out=64, sft_steps=60, pairs=128, steps=20, lr=1e-3)


# The task


def copied(string: str) -> str:
    return string


def cut_short(string: str) -> str:
    return string[:0:-1]


def run_on(string: str) -> str:
    return string[::-1] + string[0]


MISTAKES = (copied, cut_short, run_on)


@dataclass(frozen=True)
class Pair:
    string: str
    rejected: str

    @property
    def chosen(self) -> str:
        return self.string[::-1]


def make_pairs(count: int, order: random.Random, without: frozenset[str] = frozenset()) -> list[Pair]:
    """Different strings, none of them a palindrome, whose copy would be right."""
    pairs: dict[str, Pair] = {}
    while len(pairs) < count:
        string = "".join(order.choices(LETTERS, k=order.randint(SHORTEST, LONGEST)))
        if string != string[::-1] and string not in without:
            pairs[string] = Pair(string, order.choice(MISTAKES)(string))
    return list(pairs.values())


def encode(prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] of "prompt>answer.", filled up on the right, and targets [B, L]: the token that follows, where it belongs
    to an answer, else IGNORE."""
    texts = [prompt + ASK + answer + END for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, texts))
    tokens = torch.tensor([[VOCABULARY.index(c) for c in text.ljust(width, PAD)] for text in texts])
    position = torch.arange(width - 1)
    first = torch.tensor([len(prompt) for prompt in prompts])[:, None]  # where the token after ASK is predicted
    end = torch.tensor([len(text) - 1 for text in texts])[:, None]
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:].where((position >= first) & (position < end), IGNORE)
    return tokens, targets


# The model


def build_model(settings: Settings) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=settings.hidden_size,
            intermediate_size=4 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.attention_heads,
            max_position_embeddings=32,
            pad_token_id=VOCABULARY.index(PAD),
            bos_token_id=None,
            eos_token_id=VOCABULARY.index(END),
            tie_word_embeddings=False,
        )
    )


def answer_logp(model: LlamaForCausalLM, tokens: Tensor, targets: Tensor) -> Tensor:
    """Log-prob of each answer token, [B, L]; 0 where the target is IGNORE. No logits are computed there."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return prefkern.linear_logprobs(hidden, model.lm_head.weight, targets, ignore_index=IGNORE).logp


@torch.no_grad()
def greedy_answers(model: LlamaForCausalLM, prompts: Sequence[str]) -> list[str]:
    """What the model says up to END, or up to a letter more than any answer has."""
    texts = [prompt + ASK for prompt in prompts]
    rows = torch.arange(len(texts))
    for _ in range(LONGEST + 2):
        width = max(map(len, texts))
        tokens = torch.tensor([[VOCABULARY.index(c) for c in text.ljust(width, PAD)] for text in texts])
        last = torch.tensor([len(text) - 1 for text in texts])
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[rows, last]
        texts = [text + VOCABULARY[i] for text, i in zip(texts, model.lm_head(hidden).argmax(-1).tolist(), strict=True)]
    return [text.partition(ASK)[2].partition(END)[0] for text in texts]


# The training


class Encoded:
    """Pairs as tensors of 2P rows, the chosen answers first."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        prompts = [pair.string for pair in pairs]
        self.tokens, self.targets = encode(2 * prompts, [p.chosen for p in pairs] + [p.rejected for p in pairs])

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, which: Tensor) -> Tensor:
        """Those of some pairs."""
        return torch.cat([which, which + len(self)])


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: Encoded) -> dict[str, float]:
    """How far the right answer is ahead of the wrong one, how often it is, and how often the model says it."""
    logp = answer_logp(model, held_out.tokens, held_out.targets)
    chosen, rejected = logp.sum(1).chunk(2)
    lengths, rejected_lengths = (held_out.targets != IGNORE).sum(1).chunk(2)
    answers = greedy_answers(model, [pair.string for pair in held_out.pairs])
    return {
        "margin": (chosen - rejected).mean().item(),
        "accuracy": (chosen > rejected).float().mean().item(),
        "per-token accuracy": (chosen / lengths > rejected / rejected_lengths).float().mean().item(),
        "right answers": sum(a == pair.chosen for a, pair in zip(answers, held_out.pairs, strict=True)) / len(held_out),
        "chosen logp": chosen.mean().item(),
    }


class Optimiser:
    """AdamW on clipped gradients; the learning rate rises, then falls to a tenth over all steps."""

    def __init__(self, model: LlamaForCausalLM, lr: float, steps: int, settings: Settings) -> None:
        self.parameters = list(model.parameters())
        self.max_norm = settings.max_grad_norm
        self.adam = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

        def scale(step: int) -> float:
            return min((step + 1) / settings.warmup_steps, max(0.1, 1 - step / max(1, steps)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, scale)

    def step(self, loss: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.adam.step()
        self.schedule.step()


def learn_from_the_teacher(settings: Settings, without: frozenset[str], order: random.Random) -> LlamaForCausalLM:
    model = build_model(settings)
    optimiser = Optimiser(model, settings.sft_lr, settings.sft_steps, settings)
    for _ in range(settings.sft_steps):
        pairs = make_pairs(settings.sft_batch, order, without)
        answers = [p.chosen if order.random() < settings.right else p.rejected for p in pairs]
        tokens, targets = encode([p.string for p in pairs], answers)
        logp = answer_logp(model, tokens, targets)
        optimiser.step(-logp.sum() / (targets != IGNORE).sum())
    return model


@dataclass
class Record:
    """What a loss leaves behind."""

    loss: str
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)


def known_of_pairs(count: int) -> dict[str, Tensor]:
    """What some recipes ask for: how likely each answer wins. Here the judge is sure, and every other answer loses too."""
    return {"chosen_win": torch.ones(count), "rejected_win": torch.zeros(count), "pair_win": torch.ones(count)}


def learn_from_pairs(
    name: str, model: LlamaForCausalLM, pairs: Encoded, held_out: Encoded, settings: Settings, seed: int
) -> Record:
    recipe = recipe_from(name)
    record = Record(name)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        ref_logp = answer_logp(model, pairs.tokens, pairs.targets) if "ref_logp" in recipe.needs else None
    optimiser = Optimiser(model, settings.lr, settings.steps, settings)
    shuffled = torch.empty(0, dtype=torch.long)
    for step in range(settings.steps + 1):
        if step % settings.eval_every == 0 or step == settings.steps:
            record.step.append(step)
            record.held_out.append(evaluate(model, held_out))
        if step == settings.steps:
            break
        if len(shuffled) < settings.batch:
            shuffled = torch.randperm(len(pairs), generator=generator)
        which, shuffled = shuffled[: settings.batch], shuffled[settings.batch :]
        rows = pairs.rows(which)
        tokens, targets = pairs.tokens[rows], pairs.targets[rows]
        batch = Pairs(
            logp=answer_logp(model, tokens, targets),
            mask=targets != IGNORE,
            ref_logp=None if ref_logp is None else ref_logp[rows],
            extra=known_of_pairs(len(which)),
        )
        loss = recipe.loss(batch).loss
        optimiser.step(loss)
        record.losses.append(loss.item())
    record.seconds = time.perf_counter() - began
    return record


def recipe_from(text: str) -> PairRecipe:
    """The recipe of that name, if it is one of pairs and this task has what it needs."""
    recipe = load_pair_recipe(text)
    if not isinstance(recipe, PairRecipe):
        raise ValueError(f"recipe {recipe.name!r} is not one of pairs")
    lacking = sorted(set(recipe.needs) - {"ref_logp", *known_of_pairs(0)})
    if lacking:
        raise ValueError(f"recipe {recipe.name!r} needs {', '.join(lacking)}, which this task does not have")
    return recipe


def run(names: Sequence[str], settings: Settings, seed: int, console: Console) -> list[Record]:
    """Every loss from the same sloppy model, on the same pairs."""
    torch.manual_seed(seed)  # the initial weights
    order = random.Random(seed)
    held_out = Encoded(make_pairs(settings.held_out, order))
    without = frozenset(pair.string for pair in held_out.pairs)
    began = time.perf_counter()
    sloppy = learn_from_the_teacher(settings, without, order)
    pairs = Encoded(make_pairs(settings.pairs, order, without))
    said = evaluate(sloppy, held_out)["right answers"]
    console.print(f"seed {seed}: after the teacher {said:.0%} right ({time.perf_counter() - began:.0f} s)", highlight=False)
    return [learn_from_pairs(name, copy.deepcopy(sloppy), pairs, held_out, settings, seed) for name in names]


# The report


def summary_table(records: Sequence[Record], seed: int) -> Table:
    table = Table(title=f"Held-out pairs, before and after (seed {seed})")
    table.add_column("loss", overflow="fold")
    for heading in ("margin", "accuracy", "right answers", "chosen logp"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        before, after = record.held_out[0], record.held_out[-1]

        def change(name: str, form: str, before: dict[str, float] = before, after: dict[str, float] = after) -> str:
            return f"{before[name]:{form}} -> [bold]{after[name]:{form}}[/]"

        shares = [change(name, ".0%") for name in ("accuracy", "right answers")]
        table.add_row(record.loss, change("margin", ".1f"), *shares, change("chosen logp", ".1f"))
    return table


def draw(records: Sequence[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    titles = {
        "right answers": "Held-out strings that come out right, greedy",
        "accuracy": "Held-out pairs whose right answer is the likelier",
        "margin": "log p(chosen) - log p(rejected)",
        "chosen logp": "log p(chosen)",
    }
    for (name, title), ax in zip(titles.items(), figure.subplots(2, 2).flat, strict=True):
        for record in records:
            curve = [numbers[name] for numbers in record.held_out]
            ax.plot(record.step, curve, label=record.loss, marker=".", linewidth=1.2)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    figure.axes[2].legend(loc="lower right")  # margins only rise
    figure.savefig(path, dpi=130, format="png")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="DPO, or another preference loss, on reversed strings: a small model, a sloppy teacher, then pairs only."
    )
    add = parser.add_argument
    add("--loss", action="append", metavar="NAME[:OPTION=VALUE,...]", help="of prefkern.papers (default dpo); may be repeated")
    add("--steps", type=int, metavar="N", help=f"optimiser steps on pairs (default {Settings().steps})")
    add("--lr", type=float, metavar="X", help=f"their learning rate (default {Settings().lr})")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a smoke run: a smaller model and the first few steps only")
    # One thread by default: matrices are small, and threads that wait for each other make it slower.
    add("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    add("--out", type=Path, metavar="PNG", help="curves as a picture")
    add("--json", type=Path, metavar="FILE", help="curves as JSON")
    arguments = parser.parse_args(argv)
    # What would fail only after the training fails here.
    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"argument {option}: there is no directory {path.parent}")
    for option, least in (("steps", 0), ("seed", 0), ("threads", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            parser.error(f"argument --{option}: {value} is less than {least}")
    arguments.loss = arguments.loss or ["dpo"]
    try:
        for name in arguments.loss:
            recipe_from(name)
    except ValueError as error:
        parser.error(f"argument --loss: {error}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    given = {name: getattr(arguments, name) for name in ("steps", "lr") if getattr(arguments, name) is not None}
    settings = replace(QUICK if arguments.quick else Settings(), **given)
    console = Console()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        records = run(arguments.loss, settings, arguments.seed, console)
    finally:
        torch.set_num_threads(threads_before)
    console.print(summary_table(records, arguments.seed))
    if arguments.out is not None:
        draw(records, arguments.out)
        console.print(f"curves: {arguments.out}", highlight=False, soft_wrap=True)
    if arguments.json is not None:
        document = {"settings": asdict(settings), "seed": arguments.seed, "runs": [asdict(record) for record in records]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"numbers: {arguments.json}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
