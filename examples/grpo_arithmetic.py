"""GRPO, or another recipe, on two-digit addition: a whole reinforcement-learning run, small enough for two CPU cores.

A language model of about 1.2 million parameters, built from a config (nothing is downloaded), first sees some
supervised batches of worked sums, and is stopped as soon as it gets part of them right. From there on it is only told
whether an answer that it sampled is right:

    rollout     8 sampled completions per prompt, exact-match reward
    recipe      one of prefkern.papers, by name: advantages, masks and weights once per rollout, then the loss
    log-probs   prefkern.linear_logprobs: from last hidden states and head weight to log-prob and entropy per token
    loss        several minibatches per rollout, so that ratios move

With `--recipe gdpo` there are two rewards, for the right answer and for its form (digits, then the end).

The task is "37+45=" -> "28": the sum is written with its ones digit first, because then each digit depends only on
digits and carries that are already there. That is what lets a model of this size learn addition within seconds; the
operands are written as usual, and a reward needs every digit and the end of the answer to be right. Held-out problems
share no pair of numbers with the training problems, in either order (37+45 and 45+37 are kept on the same side).

The vocabulary has 15 entries, so this run shows that the gradients are right and how the pieces fit together. It does
not show the memory that linear_logprobs saves: for that a vocabulary has to be large.

    python examples/grpo_arithmetic.py                        # one seed; the curves go to grpo_arithmetic.png
    python examples/grpo_arithmetic.py --seeds 3 --json curves.json
    python examples/grpo_arithmetic.py --recipe ngrpo         # or gdpo, gtpo, dgpo, "ngrpo:eps_neg=0.2", ...
    python examples/grpo_arithmetic.py --head eager           # GRPO with plain PyTorch in place of linear_logprobs
    python examples/grpo_arithmetic.py --quick                # a smoke run: the first few GRPO steps only

A seed repeats exactly on the same machine with the same number of threads. Needed besides prefkern: transformers,
tokenizers and matplotlib, which the "demo" extra brings.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prefkern
from prefkern.papers import Recipe, Rollout, load_recipe, take_rows

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
MAX_ANSWER_TOKENS = 4  # at most three digits (99 + 99 = 198), then EOS
IGNORE = -100  # the target at a position that does not belong to an answer


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, together with its seed and the number of threads."""

    device: str = "cpu"
    head: str = "prefkern"  # of the GRPO phase
    recipe: str = "grpo"  # what prefkern.papers.load_recipe takes
    hidden_size: int = 192
    layers: int = 2
    attention_heads: int = 4
    held_out_pairs: int = 256
    max_grad_norm: float = 1.0
    sft_steps: int = 400  # at most: see sft_stop_at
    sft_stop_at: float = 0.25  # end the supervised start at this greedy accuracy on a sample of training problems
    sft_batch: int = 64
    sft_lr: float = 1e-3
    rl_steps: int = 80
    prompts_per_step: int = 48
    group_size: int = 8
    minibatches: int = 4  # optimiser steps per rollout; one for a recipe that is on-policy
    rl_lr: float = 3e-4
    warmup_steps: int = 10
    temperature: float = 1.0
    eval_every: int = 5


QUICK = Settings(sft_steps=250, rl_steps=10, warmup_steps=3)


# The task


@dataclass(frozen=True)
class Problem:
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        """The sum, ones digit first."""
        return str(self.a + self.b)[::-1]


def split_problems(held_out_pairs: int) -> tuple[list[Problem], list[Problem]]:
    """All sums of two two-digit numbers as (training, held-out), the same split for every seed of a run."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random.Random(0).shuffle(pairs)

    def in_both_orders(some: list[tuple[int, int]]) -> list[Problem]:
        return [Problem(*ordered) for a, b in some for ordered in sorted({(a, b), (b, a)})]

    return in_both_orders(pairs[held_out_pairs:]), in_both_orders(pairs[:held_out_pairs])


def exact_match_reward(completion: str, problem: Problem) -> float:
    """1 for the right digits followed by EOS and nothing else, 0 for everything else."""
    return float(completion == problem.answer + EOS)


def format_reward(completion: str, problem: Problem) -> float:
    """1 for digits followed by EOS and nothing else, whether they are right or not."""
    return float(completion.endswith(EOS) and completion.removesuffix(EOS).isdecimal())


REWARDS = {"correct": exact_match_reward, "format": format_reward}


def rewards_of(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe is given: both rewards where it keeps them apart, else the one that counts."""
    return ("correct", "format") if recipe.name == "gdpo" else ("correct",)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, padding_side="right"
    )


def encode(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerFast,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B, 6], all of one length, and right answers [B, up to MAX_ANSWER_TOKENS], filled up with IGNORE."""
    prompts = tokenizer([p.prompt for p in problems], return_tensors="pt")
    answers = tokenizer([p.answer + EOS for p in problems], return_tensors="pt", padding=True)
    targets = answers.input_ids.masked_fill(answers.attention_mask == 0, IGNORE)
    return prompts.input_ids.to(device), targets.to(device)


def score(
    completions: torch.Tensor,
    mask: torch.Tensor,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str] = ("correct",),
) -> torch.Tensor:
    """The rewards of each completion, [B, K]."""
    rows = [tokens[belongs] for tokens, belongs in zip(completions.cpu(), mask.cpu(), strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=False)
    rewards = [[REWARDS[name](text, problem) for name in names] for text, problem in zip(texts, problems, strict=True)]
    return torch.tensor(rewards, device=completions.device)


# The model: sampling from it, and what training needs of it


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.attention_heads,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(settings.device)


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    prompts: torch.Tensor,
    group_size: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Completions [prompts * group_size, MAX_ANSWER_TOKENS]; temperature 0 is greedy. What follows EOS has no meaning.

    A prompt is read once; its key-value cache is then repeated for the members of its group.
    """
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    logits = logits.repeat_interleave(group_size, dim=0)
    tokens = [pick_token(logits, temperature, generator)]
    while len(tokens) < MAX_ANSWER_TOKENS:
        logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits[:, -1]
        tokens.append(pick_token(logits, temperature, generator))
    return torch.cat(tokens, dim=1)


def pick_token(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)


def up_to_eos(completions: torch.Tensor, eos: int) -> torch.Tensor:
    """Mask of the tokens that belong to a completion: all up to its first EOS, that one included."""
    is_eos = (completions == eos).long()
    return is_eos.cumsum(dim=1) - is_eos == 0


def answer_token_stats(
    model: LlamaForCausalLM, prompts: torch.Tensor, targets: torch.Tensor, head: str, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of each answer token, both [B, T]; 0 where the target is IGNORE.

    Only the hidden states that predict an answer token reach the head, so no logits are computed for prompts.
    """
    answers = targets.where(targets != IGNORE, model.config.pad_token_id)
    inputs = torch.cat([prompts, answers[:, :-1]], dim=1)
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return HEADS[head](hidden[:, prompts.shape[1] - 1 :], model.lm_head.weight, targets, temperature)


def prefkern_head(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = prefkern.linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        ignore_index=IGNORE,
        outputs=("entropy",),
    )
    return out.logp, out.entropy


def eager_head(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two numbers in plain PyTorch, through logits of the whole batch: what --head eager compares with."""
    counts = targets != IGNORE
    log_probs = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    logp = log_probs.gather(-1, targets.where(counts, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return logp.where(counts, 0.0), entropy.where(counts, 0.0)


HEADS = {"prefkern": prefkern_head, "eager": eager_head}


# The recipe


def recipe_from(text: str) -> Recipe:
    """The recipe of that name, if this task has what it needs."""
    recipe = load_recipe(text)
    lacking = sorted(set(recipe.needs) - {"tokens", "old_logp"})
    if lacking:
        raise ValueError(f"recipe {recipe.name!r} needs {', '.join(lacking)}, which this task does not have")
    return recipe


# The training


class Trainer:
    """One seed: the model, its data and its optimiser, and a method for each kind of step."""

    def __init__(self, settings: Settings, seed: int) -> None:
        torch.manual_seed(seed)  # the initial weights
        self.settings = settings
        self.recipe = recipe_from(settings.recipe)
        self.tokenizer = build_tokenizer()
        self.model = build_model(settings, self.tokenizer)
        self.training, self.held_out = split_problems(settings.held_out_pairs)
        self.order = random.Random(seed)
        self.generator = torch.Generator(device=settings.device).manual_seed(seed)
        # When to end the supervised start is decided on training problems: held-out ones decide nothing.
        self.probe = self.order.sample(self.training, 256)

    def accuracy(self, problems: Sequence[Problem]) -> float:
        """Share of the problems that greedy decoding gets exactly right."""
        prompts, _ = encode(problems, self.tokenizer, self.settings.device)
        completions = generate(self.model, prompts)
        mask = up_to_eos(completions, self.tokenizer.eos_token_id)
        return score(completions, mask, problems, self.tokenizer).mean().item()

    def start_phase(self, lr: float, decay_steps: int = 0) -> None:
        """A fresh optimiser: linear warm-up, then linear decay to a tenth over decay_steps (0: constant)."""
        warmup = self.settings.warmup_steps

        def scale(step: int) -> float:
            decayed = 1.0 if not decay_steps else max(0.1, 1.0 - step / decay_steps)
            return min((step + 1) / warmup, decayed)

        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scale)

    def update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()

    def supervised_step(self) -> float:
        s = self.settings
        problems = self.order.sample(self.training, s.sft_batch)
        prompts, targets = encode(problems, self.tokenizer, s.device)
        # Never s.head: so GRPO starts from the same weights whatever the head, and its curves can be compared.
        logp, _ = answer_token_stats(self.model, prompts, targets, "prefkern", temperature=1.0)
        loss = -logp.sum() / (targets != IGNORE).sum()  # logp is 0 where there is no answer token
        self.update(loss)
        self.schedule.step()
        return loss.item()

    def rl_step(self) -> dict[str, float]:
        s = self.settings
        problems = self.order.sample(self.training, s.prompts_per_step)
        prompts, _ = encode(problems, self.tokenizer, s.device)
        completions = generate(self.model, prompts, s.group_size, s.temperature, self.generator)
        mask = up_to_eos(completions, self.tokenizer.eos_token_id)
        names = rewards_of(self.recipe)
        rewards = score(completions, mask, [p for p in problems for _ in range(s.group_size)], self.tokenizer, names)
        group = torch.arange(len(problems), device=s.device).repeat_interleave(s.group_size)

        prompts = prompts.repeat_interleave(s.group_size, dim=0)
        targets = completions.where(mask, IGNORE)
        with torch.no_grad():
            old_logp, entropy = answer_token_stats(self.model, prompts, targets, s.head, s.temperature)
        seen = rewards if len(names) > 1 else rewards[:, 0]
        batch = self.recipe.prepare(Rollout(seen, group, mask, old_logp, tokens=completions))

        losses, metrics = [], []
        for rows in self.minibatches(len(problems)):
            # Only in the first minibatch are the ratios 1: after it the policy is no longer the one that sampled.
            logp, current = answer_token_stats(self.model, prompts[rows], targets[rows], s.head, s.temperature)
            loss, metric = self.recipe.loss(logp, take_rows(batch, rows), entropy=current)
            self.update(loss)
            losses.append(loss.detach())
            metrics.append(metric)
        self.schedule.step()

        def mean(name: str) -> float:
            return torch.stack([metric[name] for metric in metrics if name in metric] or [rewards.new_zeros(())]).mean().item()

        return {
            "reward": rewards[:, 0].mean().item(),
            **{f"{name} reward": rewards[:, k].mean().item() for k, name in enumerate(names) if k > 0},
            "entropy": (entropy.sum() / mask.sum()).item(),
            "clip_fraction": mean("clip_fraction_low") + mean("clip_fraction_high"),
            "approx_kl": mean("approx_kl"),
            "loss": torch.stack(losses).mean().item(),
        }

    def minibatches(self, groups: int) -> Sequence[torch.Tensor]:
        """Rows in random order; groups in random order where the loss compares the members of a group. All of them at once
        where the loss does not see how far the policy has moved."""
        s = self.settings
        parts_of_rollout = 1 if self.recipe.on_policy else s.minibatches
        parts = groups if self.recipe.whole_groups else groups * s.group_size
        shuffled = torch.randperm(parts, generator=self.generator, device=s.device)
        if self.recipe.whole_groups:
            members = torch.arange(s.group_size, device=s.device)
            return [(chunk[:, None] * s.group_size + members).flatten() for chunk in shuffled.chunk(parts_of_rollout)]
        return shuffled.chunk(parts_of_rollout)


@dataclass
class Record:
    """What a seed leaves behind."""

    seed: int
    accuracy: dict[str, float] = field(default_factory=dict)  # held-out, at "start", after "supervised", after "rl"
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each phase, its evaluations included
    supervised_loss: list[float] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)  # what rl_step returned
    held_out_step: list[int] = field(default_factory=list)
    held_out_accuracy: list[float] = field(default_factory=list)

    def curve(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]

    def evaluated(self, step: int, accuracy: float) -> None:
        self.held_out_step.append(step)
        self.held_out_accuracy.append(accuracy)

    def as_json(self) -> dict[str, object]:
        names = self.steps[0].keys() if self.steps else ()
        return {
            "seed": self.seed,
            "accuracy": self.accuracy,
            "seconds": self.seconds,
            "supervised": {"loss": self.supervised_loss},
            "rl": {name: self.curve(name) for name in names},
            "held_out": {"step": self.held_out_step, "accuracy": self.held_out_accuracy},
        }


def supervised_phase(trainer: Trainer, record: Record, progress: Progress) -> None:
    s = trainer.settings
    bar = progress.add_task(f"seed {record.seed} SFT", total=s.sft_steps, numbers="")
    trainer.start_phase(s.sft_lr)
    for step in range(1, s.sft_steps + 1):
        loss = trainer.supervised_step()
        record.supervised_loss.append(loss)
        progress.update(bar, advance=1, numbers=f"loss {loss:.3f}")
        if step % s.eval_every == 0 and trainer.accuracy(trainer.probe) >= s.sft_stop_at:
            progress.update(bar, total=step)
            break


def rl_phase(trainer: Trainer, record: Record, progress: Progress) -> None:
    s = trainer.settings
    bar = progress.add_task(f"seed {record.seed} RL", total=s.rl_steps, numbers="")
    trainer.start_phase(s.rl_lr, decay_steps=s.rl_steps)
    record.evaluated(0, record.accuracy["supervised"])
    for step in range(1, s.rl_steps + 1):
        numbers = trainer.rl_step()
        record.steps.append(numbers)
        evaluate = step % s.eval_every == 0 or step == s.rl_steps
        if evaluate:
            record.evaluated(step, trainer.accuracy(trainer.held_out))
        line = (
            f"reward {numbers['reward']:.2f} entropy {numbers['entropy']:.2f} clip {numbers['clip_fraction']:.2f}"
            f" acc {record.held_out_accuracy[-1]:.0%}"
        )
        progress.update(bar, advance=1, numbers=line)
        if evaluate and not progress.console.is_terminal:  # a log file shows no moving bar
            progress.console.print(f"seed {record.seed} RL step {step}: {line}", highlight=False, soft_wrap=True)


def train(settings: Settings, seed: int, progress: Progress) -> Record:
    """Supervised start, then GRPO, for one seed."""
    record = Record(seed)
    trainer = Trainer(settings, seed)
    record.accuracy["start"] = trainer.accuracy(trainer.held_out)
    for name, phase in (("supervised", supervised_phase), ("rl", rl_phase)):
        began = time.perf_counter()
        phase(trainer, record, progress)
        record.accuracy[name] = trainer.accuracy(trainer.held_out)
        record.seconds[name] = time.perf_counter() - began
    return record


# The report


def summary_table(records: Sequence[Record]) -> Table:
    table = Table(title="Held-out accuracy (greedy, exact match)")
    for heading in ("seed", "start", "supervised", "RL", "gain", "SFT steps", "seconds"):
        table.add_column(heading, justify="right")
    for r in records:
        start, supervised, trained = r.accuracy["start"], r.accuracy["supervised"], r.accuracy["rl"]
        table.add_row(
            str(r.seed),
            f"{start:.1%}",
            f"{supervised:.1%}",
            f"[bold]{trained:.1%}[/]",
            f"{100 * (trained - supervised):+.1f} points",
            str(len(r.supervised_loss)),
            " + ".join(f"{seconds:.0f}" for seconds in r.seconds.values()),
        )
    return table


def draw(records: Sequence[Record], settings: Settings, path: Path) -> None:
    # A Figure without pyplot draws with Agg and leaves the caller's backend alone.
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = dict(zip(("reward", "held_out", "entropy", "clip_fraction"), figure.subplots(2, 2).flat, strict=True))
    titles = {
        "reward": "Reward: sampled answers that are right",
        "held_out": "Held-out accuracy, greedy",
        "entropy": "Entropy of answer tokens (nats)",
        "clip_fraction": "Share of tokens clipped",
    }
    for record in records:
        label = f"seed {record.seed}"
        steps = range(1, len(record.steps) + 1)
        for name in ("reward", "entropy", "clip_fraction"):
            axes[name].plot(steps, record.curve(name), label=label, linewidth=1.2)
        axes["held_out"].plot(record.held_out_step, record.held_out_accuracy, label=label, marker=".", linewidth=1.2)
    for name, ax in axes.items():
        ax.set(title=titles[name], xlabel="RL step")
        ax.grid(alpha=0.3)
    axes["reward"].set_ylim(0, 1)
    axes["held_out"].set_ylim(0, 1)
    axes["entropy"].set_ylim(bottom=0)
    axes["clip_fraction"].set_ylim(bottom=0)
    axes["held_out"].legend(loc="lower right")
    figure.suptitle(f"Two-digit addition, recipe: {settings.recipe}, head: {settings.head}, {settings.device}")
    figure.savefig(path, dpi=130, format="png")


def count(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is at least minimum."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    parse.__name__ = "whole number"  # argparse puts it into its message for text that is no number
    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(
        description="GRPO, or another recipe, on two-digit addition: a small model, a supervised start, then rewards only."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--recipe", default=default.recipe, metavar="NAME[:OPTION=VALUE,...]", help="of prefkern.papers (default grpo)")
    add("--head", choices=tuple(HEADS), default="prefkern", help="log-probs and entropy in GRPO")
    add("--seed", type=count(0), default=0, help="the first seed (default 0)")
    add("--seeds", type=count(1), default=1, metavar="N", help="run N seeds, one after the other (default 1)")
    add("--steps", type=count(0), metavar="N", help=f"GRPO steps (default {default.rl_steps})")
    add(
        "--sft-steps",
        type=count(0),
        metavar="N",
        help=f"most supervised steps (default {default.sft_steps}); they end early once "
        f"{default.sft_stop_at:.0%}% of a sample of training problems is solved",
    )
    add("--quick", action="store_true", help="a smoke run: the first few GRPO steps only")
    # One thread by default: matrices are small, and where others use the cores too, threads that wait for each other
    # make the run several times slower.
    add("--threads", type=count(1), default=1, metavar="N", help="CPU threads (default 1)")
    add("--out", type=Path, default=Path("grpo_arithmetic.png"), metavar="PNG", help="curves as a picture")
    add("--json", type=Path, metavar="FILE", help="curves as JSON")
    arguments = parser.parse_args(argv)
    # What would fail only after the training fails here.
    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"argument {option}: there is no directory {path.parent}")
    try:
        recipe_from(arguments.recipe)
    except ValueError as error:
        parser.error(f"argument --recipe: {error}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not available here")
    return arguments


def settings_from(arguments: argparse.Namespace) -> Settings:
    given = {"rl_steps": arguments.steps, "sft_steps": arguments.sft_steps}
    return replace(
        QUICK if arguments.quick else Settings(),
        device=arguments.device,
        head=arguments.head,
        recipe=arguments.recipe,
        **{name: value for name, value in given.items() if value is not None},
    )


def run(settings: Settings, seeds: Sequence[int], console: Console) -> list[Record]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        return [train(settings, seed, progress) for seed in seeds]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    settings = settings_from(arguments)
    console = Console()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        records = run(settings, range(arguments.seed, arguments.seed + arguments.seeds), console)
    finally:
        torch.set_num_threads(threads_before)
    console.print(summary_table(records))
    draw(records, settings, arguments.out)
    console.print(f"curves: {arguments.out}", highlight=False, soft_wrap=True)
    if arguments.json is not None:
        document = {"settings": asdict(settings), "threads": arguments.threads, "runs": [r.as_json() for r in records]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"numbers: {arguments.json}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
