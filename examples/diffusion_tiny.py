"""Diffusion-DPO, SmPO or Diffusion-NPO on pictures of coloured shapes: from noise to a model that draws, and from pairs to one
that draws what is preferred, on one CPU core.

A diffusion transformer (DiT) in plain PyTorch learns to draw pictures of 16 x 16 pixels: by class a disc, a square, a diamond
or a cross, of any colour, size and place. Then it sees pairs of pictures of one class, of which a script prefers one, and
nothing else:

    error       the mean square of what is left of the noise, of both pictures, under the model and under the model as it was
    loss        prefkern.diffusion_pref_loss: the winner's error should fall against the loser's

    diffusion_dpo   both pictures of a pair get the same random noise
    smpo            pairs weigh what their scores differ by, and the noise is what the model itself inverts each picture to
    npo             winner and loser exchanged: a model of what is not wanted, from which guidance leads away

What a loss promises is a wider margin between the errors. Whether samples then show more of what was preferred, and are still
the shapes they should be, is measured on the samples: the same noise before and after.

    python examples/diffusion_tiny.py                            # Diffusion-DPO towards warm colours
    python examples/diffusion_tiny.py --prefer large             # or bright
    python examples/diffusion_tiny.py --loss diffusion_dpo --loss smpo --loss npo    # from the same model
    python examples/diffusion_tiny.py --out diffusion_tiny.png --json diffusion_tiny.json
    python examples/diffusion_tiny.py --quick                    # a smoke run

A seed repeats exactly on the same machine with the same number of threads. Needed besides prefkern: matplotlib for --out, which
the "demo" extra brings.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from prefkern import LossOutput, diffusion_pref_loss
from prefkern.papers.self_npo import npo_cfg
from prefkern.papers.smpo_diffusion import renoise_invert, smooth_weight

SIZE, LEVELS = 16, 1000
LOSSES = ("diffusion_dpo", "smpo", "npo")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, together with its seed, the preference and the number of threads."""

    width: int = 48
    layers: int = 2
    heads: int = 4
    patch: int = 2
    train_steps: int = 700
    train_batch: int = 32
    train_lr: float = 2e-3
    pairs: int = 512
    steps: int = 60
    batch: int = 24  # pairs
    lr: float = 1e-4
    beta: float = 2000.0
    gamma: float = 10.0  # of SmPO's weights
    inversion_steps: int = 5
    guidance: float = 1.5  # of NPO's samples
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    held_out: int = 128  # pairs
    eval_every: int = 20
    samples: int = 64
    sample_steps: int = 25


QUICK = Settings(
    width=32, train_steps=150, train_batch=24, pairs=128, steps=24, batch=16, lr=2e-4, held_out=64, eval_every=12, samples=32,
    sample_steps=15,
)  # fmt: skip


# The pictures

# The distance from the middle of a shape, at whose outline it is the radius; and the area of the shape of radius 1.
SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "disc": (lambda x, y: (x * x + y * y).sqrt(), math.pi),
    "square": (torch.maximum, 4.0),
    "diamond": (torch.add, 2.0),
    "cross": (lambda x, y: torch.minimum(torch.maximum(x, 3 * y), torch.maximum(3 * x, y)), 20 / 9),
}


def coverage(kind: Tensor, middle: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel [B, 16, 16] lies inside: kind [B], middle [B, 2] and radius [B] in pixels."""
    grid = torch.arange(SIZE, dtype=middle.dtype)
    x, y = (grid - middle[:, :1]).abs()[:, None, :], (grid - middle[:, 1:]).abs()[:, :, None]
    x, y = torch.broadcast_tensors(x, y)
    distance = torch.stack([shape(x, y) for shape, _ in SHAPES.values()])[kind, torch.arange(len(kind))]
    return (radius[:, None, None] - distance + 0.5).clamp(0, 1)


def make_pictures(kind: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, 16, 16] in [-1, 1], of one shape each on black."""
    rows = len(kind)
    middle = SIZE / 2 - 0.5 + 2 * torch.rand(rows, 2, generator=generator) - 1
    radius = 3.5 + 2.5 * torch.rand(rows, generator=generator)
    hue = torch.rand(rows, 1, generator=generator) + torch.arange(3) / 3
    colour = (0.5 + 0.5 * torch.cos(2 * math.pi * hue)) * (0.4 + 0.6 * torch.rand(rows, 1, generator=generator))
    return 2 * coverage(kind, middle, radius)[:, None] * colour[:, :, None, None] - 1


def kinds(count: int) -> Tensor:
    """Classes [count], each as often as the others."""
    return torch.arange(count) % len(SHAPES)


def strength(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pixel [B, 16, 16] its strongest channel, in [0, 1], and that over the picture's largest but a few."""
    strongest = ((pictures.clamp(-1, 1) + 1) / 2).amax(1)
    top = strongest.flatten(1).quantile(0.97, dim=1).clamp_min(1e-3)
    return strongest, (strongest / top[:, None, None]).clamp_max(1)


def warmth(pictures: Tensor) -> Tensor:
    """Red less blue, of all light: [B] in [-1, 1]."""
    red, green, blue = ((pictures.clamp(-1, 1) + 1) / 2).sum((2, 3)).unbind(1)
    return (red - blue) / (red + green + blue).clamp_min(1e-3)


def brightness(pictures: Tensor) -> Tensor:
    """Mean of the strongest channel where the shape is: [B] in [0, 1]."""
    strongest, inside = strength(pictures)
    return (strongest * inside).sum((1, 2)) / inside.sum((1, 2))


def area(pictures: Tensor) -> Tensor:
    """Share of the picture that the shape covers: [B] in [0, 1]."""
    return strength(pictures)[1].mean((1, 2))


PREFERENCES: dict[str, Callable[[Tensor], Tensor]] = {"warm": warmth, "bright": brightness, "large": area}


def recognise(pictures: Tensor) -> Tensor:
    """The shape [B] which, put at the centre of what is seen and with its area, covers the same pixels best."""
    _, inside = strength(pictures)
    total = inside.sum((1, 2))
    grid = torch.arange(SIZE, dtype=inside.dtype)
    middle = torch.stack([(inside.sum(1) * grid).sum(1), (inside.sum(2) * grid).sum(1)], 1) / total[:, None]
    overlaps = []
    for kind, (_, unit_area) in enumerate(SHAPES.values()):
        fitted = coverage(torch.full((len(pictures),), kind), middle, (total / unit_area).sqrt())
        overlaps.append(torch.minimum(fitted, inside).sum((1, 2)) / torch.maximum(fitted, inside).sum((1, 2)))
    return torch.stack(overlaps).argmax(0)


@dataclass
class PicturePairs:
    """P pairs of one class each; the first of two pictures has the higher score."""

    winners: Tensor
    losers: Tensor
    kind: Tensor
    scores: Tensor
    """[2, P]."""

    def __len__(self) -> int:
        return len(self.kind)

    def rows(self, which: Tensor) -> PicturePairs:
        return PicturePairs(self.winners[which], self.losers[which], self.kind[which], self.scores[:, which])

    def both(self) -> tuple[Tensor, Tensor]:
        """Pictures and classes of 2P rows, the winners first."""
        return torch.cat([self.winners, self.losers]), self.kind.repeat(2)


def make_pairs(count: int, prefer: str, generator: torch.Generator) -> PicturePairs:
    kind = kinds(count)
    first, second = make_pictures(kind, generator), make_pictures(kind, generator)
    scores = torch.stack([PREFERENCES[prefer](first), PREFERENCES[prefer](second)])
    wins = (scores[0] >= scores[1])[:, None, None, None]
    sorted_scores = scores.sort(0, descending=True).values
    return PicturePairs(torch.where(wins, first, second), torch.where(wins, second, first), kind, sorted_scores)


# The model


def waves(values: Tensor, width: int, longest: float) -> Tensor:
    """Cosines and sines [..., width] of values [...], of wavelengths up to about `longest`."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(longest) / (width // 2)))
    angles = values.float().unsqueeze(-1) * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates start closed (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulate(condition)[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.merge(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift)


class DiT(nn.Module):
    """Noise in pictures [B, 3, 16, 16] at levels t [B] (0 to 999), given their classes [B]. Inside it predicts v, a mixture of
    noise and picture: where there is little but noise, what is seen passes for it, and a small network has the rest to find."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, self.patch, self.width = settings.width, settings.patch, settings.width
        side = SIZE // settings.patch
        along = waves(torch.arange(side), width // 2, 100.0)
        across = along[:, None].expand(side, side, -1), along[None].expand(side, side, -1)
        self.place = nn.Parameter(torch.cat(across, -1).flatten(0, 1))
        self.embed = nn.Linear(3 * self.patch**2, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.kind = nn.Embedding(len(SHAPES), width)
        self.blocks = nn.ModuleList(Block(width, settings.heads) for _ in range(settings.layers))
        self.norm, self.modulate = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, 3 * self.patch**2)
        for layer in (self.modulate, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, pictures: Tensor, t: Tensor, kind: Tensor) -> Tensor:
        condition = F.silu(self.time(waves(t, self.width, 10_000.0)) + self.kind(kind))
        x = self.embed(F.pixel_unshuffle(pictures, self.patch).flatten(2).mT) + self.place
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulate(condition)[:, None].chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift).mT
        side = SIZE // self.patch
        signal, level = mix(t)
        return level * pictures + signal * F.pixel_shuffle(x.unflatten(2, (side, side)), self.patch)


# Noise


def signal_levels() -> Tensor:
    """abar_t [1000], float64: what is left of a picture's variance at level t (Stable Diffusion's "scaled linear" schedule)."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, LEVELS, dtype=torch.float64) ** 2, 0)


ABAR = signal_levels()


def mix(t: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of picture and noise at levels t [B], [B, 1, 1, 1] each."""
    abar = ABAR[t].view(-1, 1, 1, 1)
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def add_noise(pictures: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    signal, level = mix(t)
    return signal * pictures + level * noise


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def levels(count: int, generator: torch.Generator) -> Tensor:
    """Uniform over all levels, one in each of `count` equal parts."""
    return (
        ((torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) * (LEVELS / count))
        .long()
        .clamp_max(LEVELS - 1)
    )


@torch.no_grad()
def sample(eps: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Pictures by deterministic DDIM from noise, with eps(x, t [B]); what it takes for the picture is held in [-1, 1]."""
    x = noise
    grid = torch.linspace(LEVELS - 1, 0, steps + 1).long().tolist()
    for k, (level, following) in enumerate(itertools.pairwise(grid)):
        t = torch.full((len(x),), level)
        signal, scale = mix(t)
        picture = ((x - scale * eps(x, t)) / signal).clamp(-1, 1)
        if k == steps - 1:
            return picture
        x = add_noise(picture, (x - signal * picture) / scale, torch.full_like(t, following))
    return x


# The training


class Optimiser:
    """AdamW on clipped gradients; the learning rate rises, then falls to a tenth over all steps."""

    def __init__(self, model: DiT, lr: float, steps: int, settings: Settings) -> None:
        self.parameters = list(model.parameters())
        self.max_norm = settings.max_grad_norm
        self.adam = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

        def scale(step: int) -> float:
            return min((step + 1) / settings.warmup_steps, max(0.1, 1 - step / max(1, steps)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, scale)

    def step(self, loss: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.adam.step()
        self.schedule.step()


def learn_to_draw(settings: Settings, generator: torch.Generator) -> tuple[DiT, list[float]]:
    """A model, and its loss step by step: the mean square error of v, which is that of the noise over abar."""
    model = DiT(settings)
    optimiser = Optimiser(model, settings.train_lr, settings.train_steps, settings)
    losses = []
    kind = kinds(settings.train_batch)
    for _ in range(settings.train_steps):
        pictures = make_pictures(kind, generator)
        noise, t = normal(pictures, generator), levels(len(kind), generator)
        loss = ((model(add_noise(pictures, noise, t), t, kind) - noise) / mix(t)[0]).square().mean()
        optimiser.step(loss)
        losses.append(loss.item())
    return model, losses


def pair_loss(
    name: str, model: DiT, reference: DiT, pairs: PicturePairs, bounds: tuple[float, float], settings: Settings,
    generator: torch.Generator,
) -> LossOutput:  # fmt: skip
    """One of LOSSES, of P pairs: winner and loser of a pair at the same level of noise."""
    pictures, kind = pairs.both()
    t = levels(len(pairs), generator).repeat(2)
    weight = None
    if name == "smpo":
        _, weight = smooth_weight(*pairs.scores, gamma=settings.gamma, smin=bounds[0], smax=bounds[1])
        x, target, t = renoise_invert(
            lambda x, level: model(x, level, kind), pictures, t, abar=ABAR, n_steps=settings.inversion_steps
        )
    else:
        target = normal(pairs.winners, generator).repeat(2, 1, 1, 1)
        x = add_noise(pictures, target, t)
    with torch.no_grad():
        ref_w, ref_l = reference(x, t, kind).chunk(2)
    pred_w, pred_l = model(x, t, kind).chunk(2)
    target_w, target_l = target.chunk(2)
    return diffusion_pref_loss(
        pred_w, pred_l, target_w, ref_w=ref_w, ref_l=ref_l, target_l=target_l, beta=settings.beta, weight=weight,
        negative=name == "npo",
    )  # fmt: skip


class HeldOut:
    """Pairs with their noise and levels, and the errors of the reference on them."""

    def __init__(self, pairs: PicturePairs, reference: DiT, generator: torch.Generator) -> None:
        pictures, self.kind = pairs.both()
        self.t = levels(len(pairs), generator).repeat(2)
        self.noise = normal(pairs.winners, generator).repeat(2, 1, 1, 1)
        self.x = add_noise(pictures, self.noise, self.t)
        self.reference = self.errors(reference)

    @torch.no_grad()
    def errors(self, model: DiT) -> Tensor:
        """[2, P]: of winners and losers."""
        return (model(self.x, self.t, self.kind) - self.noise).square().mean((1, 2, 3)).view(2, -1)

    def evaluate(self, model: DiT, beta: float) -> dict[str, float]:
        """The margin of Diffusion-DPO, how often it is positive, and by how much errors grew over the reference's."""
        errors = self.errors(model)
        winner, loser = (errors - self.reference).unbind(0)
        margin = 0.5 * beta * (loser - winner)
        grown = errors.mean(1) / self.reference.mean(1) - 1
        return {
            "margin": margin.mean().item(),
            "accuracy": (margin > 0).float().mean().item(),
            "winner error": grown[0].item(),
            "loser error": grown[1].item(),
        }


@dataclass
class Record:
    """What a loss leaves behind."""

    loss: str
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    samples: dict[str, float] = field(default_factory=dict)


def learn_from_pairs(
    name: str, model: DiT, reference: DiT, pairs: PicturePairs, held_out: HeldOut, settings: Settings, seed: int
) -> Record:
    record = Record(name)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    optimiser = Optimiser(model, settings.lr, settings.steps, settings)
    bounds = pairs.scores.min().item(), pairs.scores.max().item()
    shuffled = torch.empty(0, dtype=torch.long)
    for step in range(settings.steps + 1):
        if step % settings.eval_every == 0 or step == settings.steps:
            record.step.append(step)
            record.held_out.append(held_out.evaluate(model, settings.beta))
        if step == settings.steps:
            break
        if len(shuffled) < settings.batch:
            shuffled = torch.randperm(len(pairs), generator=generator)
        which, shuffled = shuffled[: settings.batch], shuffled[settings.batch :]
        loss = pair_loss(name, model, reference, pairs.rows(which), bounds, settings, generator).loss
        optimiser.step(loss)
        record.losses.append(loss.item())
    record.seconds = time.perf_counter() - began
    return record


def draw_samples(name: str | None, model: DiT, reference: DiT, noise: Tensor, settings: Settings) -> Tensor:
    """What a model draws from given noise; after NPO what the reference draws, guided away from it."""
    kind = kinds(len(noise))

    def eps(x: Tensor, t: Tensor) -> Tensor:
        if name == "npo":
            return npo_cfg(reference(x, t, kind), model(x, t, kind), settings.guidance)
        return model(x, t, kind)

    return sample(eps, noise, settings.sample_steps)


def compare(before: Tensor, after: Tensor, prefer: str) -> dict[str, float]:
    """Of samples from the same noise: the mean score, its change with a standard error, how often it rose, how many shapes are
    those asked for."""
    first, second = PREFERENCES[prefer](before), PREFERENCES[prefer](after)
    change, kind = second - first, kinds(len(before))
    return {
        "before": first.mean().item(),
        "after": second.mean().item(),
        "change": change.mean().item(),
        "error": (change.std() / len(change) ** 0.5).item(),
        "rose": (change > 0).float().mean().item(),
        "shapes before": (recognise(before) == kind).float().mean().item(),
        "shapes after": (recognise(after) == kind).float().mean().item(),
    }


@dataclass
class Run:
    """Everything of a run that is reported."""

    train_losses: list[float]
    records: list[Record]
    pictures: dict[str, Tensor]
    """Samples, by who drew them."""


def run(names: Sequence[str], prefer: str, settings: Settings, seed: int, console: Console) -> Run:
    """Every loss from the same model, on the same pairs."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the initial weights
    began = time.perf_counter()
    reference, train_losses = learn_to_draw(settings, generator)
    reference.requires_grad_(False)
    pairs = make_pairs(settings.pairs, prefer, generator)
    held_out = HeldOut(make_pairs(settings.held_out, prefer, generator), reference, generator)
    noise = torch.randn(settings.samples, 3, SIZE, SIZE, generator=generator)
    pictures = {"before": draw_samples(None, reference, reference, noise, settings)}
    console.print(
        f"seed {seed}: {sum(p.numel() for p in reference.parameters())} parameters, loss "
        f"{mean_of_last(train_losses):.3f} after {settings.train_steps} steps ({time.perf_counter() - began:.0f} s)",
        highlight=False,
    )
    records = []
    for name in names:
        model = copy.deepcopy(reference).requires_grad_(True)
        record = learn_from_pairs(name, model, reference, pairs, held_out, settings, seed)
        pictures[name] = draw_samples(name, model, reference, noise, settings)
        record.samples = compare(pictures["before"], pictures[name], prefer)
        records.append(record)
    return Run(train_losses, records, pictures)


def mean_of_last(losses: Sequence[float], share: float = 0.1) -> float:
    last = losses[-max(1, round(share * len(losses))) :]
    return sum(last) / len(last) if last else math.nan


# The report


def summary_table(result: Run, prefer: str, seed: int) -> Table:
    table = Table(title=f"Before and after, preferred: {prefer} (seed {seed})")
    table.add_column("loss", overflow="fold")
    for heading in ("margin", "accuracy", "errors w, l", PREFERENCES[prefer].__name__, "shapes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in result.records:
        held_out, samples = record.held_out[-1], record.samples
        table.add_row(
            record.loss,
            f"[bold]{held_out['margin']:.1f}[/]",
            f"[bold]{held_out['accuracy']:.0%}[/]",
            f"{held_out['winner error']:+.0%}, {held_out['loser error']:+.0%}",
            f"{samples['before']:.2f} -> [bold]{samples['after']:.2f}[/]",
            f"{samples['shapes before']:.0%} -> [bold]{samples['shapes after']:.0%}[/]",
        )
    return table


def draw(result: Run, path: Path) -> None:
    """Samples before and after, from the same noise, and the curves."""
    from matplotlib.figure import Figure

    rows = len(result.pictures)
    figure = Figure(figsize=(11, 1.75 * rows + 3), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[1] * rows + [1.7])
    for row, (name, pictures) in enumerate(result.pictures.items()):
        ax = figure.add_subplot(grid[row, :])
        ax.imshow(tiled(pictures).numpy(), interpolation="nearest")
        ax.set_ylabel(name)
        ax.set_xticks([])
        ax.set_yticks([])
    left, right = (figure.add_subplot(grid[rows, k]) for k in range(2))
    left.semilogy(result.train_losses, linewidth=0.8)
    left.set(title="Loss while it learns to draw", xlabel="step")
    for record in result.records:
        right.plot(record.step, [numbers["margin"] for numbers in record.held_out], label=record.loss, marker=".")
    right.set(title="Margin of held-out pairs", xlabel="step")
    right.legend()
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")


def tiled(pictures: Tensor, down: int = 4, across: int = 16) -> Tensor:
    """The first pictures as one, [16 down, 16 across, 3] in [0, 1], a row for each class."""
    chosen = pictures[: down * across]
    chosen = chosen[: len(chosen) // down * down].unflatten(0, (-1, down))  # classes take turns
    tiles = ((chosen.clamp(-1, 1) + 1) / 2).permute(1, 3, 0, 4, 2)
    return tiles.flatten(2, 3).flatten(0, 1)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Diffusion-DPO, SmPO or Diffusion-NPO on pictures of coloured shapes: a small DiT, then pairs only."
    )
    add = parser.add_argument
    add("--loss", action="append", choices=LOSSES, help="default diffusion_dpo; may be repeated")
    add("--prefer", choices=tuple(PREFERENCES), default="warm", help="what the script prefers (default warm)")
    add("--steps", type=int, metavar="N", help=f"optimiser steps on pairs (default {Settings().steps})")
    add("--lr", type=float, metavar="X", help=f"their learning rate (default {Settings().lr})")
    add("--beta", type=float, metavar="X", help=f"of the loss (default {Settings().beta:g})")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="a smoke run: a smaller model and fewer steps")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    add("--out", type=Path, metavar="PNG", help="samples before and after, and curves, as a picture")
    add("--json", type=Path, metavar="FILE", help="all numbers")
    arguments = parser.parse_args(argv)
    # What would fail only after the training fails here.
    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"argument {option}: there is no directory {path.parent}")
    for option, least in (("steps", 0), ("seed", 0), ("threads", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            parser.error(f"argument --{option}: {value} is less than {least}")
    for option in ("lr", "beta"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument --{option}: {value} is not finite and positive")
    arguments.loss = list(dict.fromkeys(arguments.loss or ["diffusion_dpo"]))
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    given = {name: getattr(arguments, name) for name in ("steps", "lr", "beta") if getattr(arguments, name) is not None}
    settings = replace(QUICK if arguments.quick else Settings(), **given)
    console = Console()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        result = run(arguments.loss, arguments.prefer, settings, arguments.seed, console)
    finally:
        torch.set_num_threads(threads_before)
    console.print(summary_table(result, arguments.prefer, arguments.seed))
    if arguments.out is not None:
        draw(result, arguments.out)
        console.print(f"picture: {arguments.out}", highlight=False, soft_wrap=True)
    if arguments.json is not None:
        document = {
            "settings": asdict(settings), "seed": arguments.seed, "prefer": arguments.prefer,
            "train_losses": result.train_losses, "runs": [asdict(record) for record in result.records],
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"numbers: {arguments.json}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
