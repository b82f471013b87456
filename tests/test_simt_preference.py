"""The CUDA kernels of csrc/preference for pairs, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch

from preference_helpers import KINDS, SCORES, sample_pairs
from prefkern import reference
from prefkern.ops.preference import METRICS
from simt.harness import NAN, close, launches, pointer, same_bits_in_every_order, tensor_like

KERNEL_KIND = {
    "exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "squared_targets": "targets", "ipo": "squared",
    "sppo_hard": "targets",
}  # fmt: skip
KERNEL_SCORE = {"js_divergence": "js", "alpha_divergence": "alpha"}
PARAMETERS = {"tau", "penalty", "gamma", "nu", "sft"}
sizes = pytest.mark.parametrize("size", [1, 255, 700])


def option_values(kind="sigmoid", score="reverse_kl", beta=0.1, **options):
    """The kernel's options for those of the public function."""
    values = {"beta": beta, "rejected_beta": options.pop("rejected_beta", beta)}
    values |= {"chosen_reward": beta, "rejected_reward": values["rejected_beta"]}
    if kind in ("ipo", "sppo_hard", "cal_dpo"):
        values |= {"beta": 1.0, "rejected_beta": 1.0}
        targets = {"chosen_target": 0.5 / beta, "rejected_target": -0.5 / beta}
        values |= {"offset": 0.5 / beta} if kind == "ipo" else targets
    defaults = {"discopop": 0.05, "asft": 1.0}
    values["parameter"] = next((options.pop(name) for name in list(options) if name in PARAMETERS), defaults.get(kind, 1.0))
    if score == "alpha_divergence":
        values["alpha"] = options.pop("alpha")
    renamed = {"label_smoothing": "smoothing"}
    return (
        KERNEL_KIND.get(kind, kind),
        KERNEL_SCORE.get(score, score),
        values | {renamed.get(k, k): v for k, v in options.items()},
    )


def loss(simt, pairs, *, desirable=None, mask=None, weight=None, tie=None, lengths=None, average="none", reduction="mean",
         norm=None, upstream=1.0, arrays=None, unpaired=None, **options):  # fmt: skip
    args = simt.PreferenceArgs()
    kind, score, values = option_values(**options)
    if desirable is None:
        args.options.kind = getattr(simt.PreferenceKind, kind)
    else:
        args.options.unpaired = getattr(simt.UnpairedKind, unpaired)
    args.options.score, args.options.average = getattr(simt.ScoreKind, score), getattr(simt.LengthAverage, average)
    for name, value in values.items():
        setattr(args.options, name, value)
    args.reduction = getattr(simt.PairReduction, reduction)
    chosen = pairs["chosen_logp"]
    size = args.pairs = len(chosen)
    sides = 1 if desirable is not None else 2
    for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        setattr(args, name, pointer(pairs.get(f"{name}_logp")))
    args.mask, args.weight, args.tie, args.desirable = map(pointer, (mask, weight, tie, desirable))
    if lengths is not None:
        args.chosen_length, args.rejected_length = map(pointer, lengths)
    each = {"scale": 1, "offset": 2, "smoothing": 4, "chosen_target": 8, "rejected_target": 16}
    for name, values_of in (arrays or {}).items():
        setattr(args, name, pointer(values_of))
        args.each |= each[name] if values_of.dim() else 0
    args.norm = pointer(norm)
    blocks = simt.preference_blocks(size)
    partials, finished = torch.full((blocks, simt.PREFERENCE_SUMS), NAN), torch.zeros(1, dtype=torch.int32)
    losses, total, inverse = tensor_like(chosen), torch.full((), NAN), torch.full((), NAN)
    metrics = torch.full((simt.PREFERENCE_METRICS,), NAN)
    grads, grad = torch.full((sides, size), 7.0), torch.full((sides, size), 7.0)
    args.losses, args.loss = (pointer(losses), 0) if reduction == "none" else (0, pointer(total))
    args.metrics, args.inverse_norm, args.grads = map(pointer, (metrics, inverse, grads))
    args.partials, args.finished = pointer(partials), pointer(finished)
    simt.cuda_preference_loss(args)
    g = torch.as_tensor(upstream, dtype=torch.float32)
    backward = simt.PreferenceGradArgs()
    backward.pairs, backward.sides, backward.vector = size, sides, g.dim() == 1
    backward.unnormalised, backward.upstream, backward.inverse_norm, backward.grad = map(pointer, (grads, g, inverse, grad))
    simt.cuda_preference_loss_backward(backward)
    return {"loss": losses if reduction == "none" else total, "metrics": metrics, "grad": grad}


def expected(pairs, *, lengths=None, arrays=None, average=None, upstream=1.0, **options):
    leaves = {n: t.double().requires_grad_(not n.startswith("ref_")) for n, t in pairs.items()}
    if lengths is not None:
        options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "average": average}
    options |= {"label_smoothing" if n == "smoothing" else n: t for n, t in (arrays or {}).items()}
    out = reference.preference_loss(**leaves, **options)
    g = torch.as_tensor(upstream, dtype=torch.float64).expand_as(out.loss)
    grads = torch.autograd.grad(out.loss, [leaves["chosen_logp"], leaves["rejected_logp"]], g)
    return {"loss": out.loss.detach(), "metrics": torch.stack([out.metrics[m] for m in METRICS]), "grad": torch.stack(grads)}


def check(actual, wanted):
    for name, value in wanted.items():
        close(actual[name], value, atol=3e-6, rtol=3e-6)


@sizes
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_kinds(simt, options, size):
    pairs, mask, weight = sample_pairs(size, torch.float32), torch.arange(size) % 5 != 3, torch.rand(size)
    extra = {"tie": torch.arange(size) % 3 == 0} if options.get("kind") in ("rao_kupper", "davidson") else {}
    for t in pairs.values():
        t[~mask] = NAN
    options = {**options, **extra, "mask": mask, "weight": weight}
    result = same_bits_in_every_order(simt, lambda: loss(simt, pairs, reduction="weighted_mean", upstream=1.5, **options))
    check(result, expected(pairs, reduction="weighted_mean", upstream=1.5, **options))


@pytest.mark.parametrize("average", ["logp", "score"])
@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
def test_scores_losses_of_pairs_and_arrays(simt, options, average):
    size = 300
    pairs, upstream = sample_pairs(size, torch.float32), torch.rand(size)
    lengths = [torch.randint(1, 9, (size,)).float() for _ in range(2)]
    arrays = {"scale": torch.rand(size) + 0.5, "offset": torch.rand(size), "smoothing": torch.rand(size)}
    given = {**options, "arrays": arrays, "lengths": lengths, "average": average, "reduction": "none", "upstream": upstream}
    check(loss(simt, pairs, **given), expected(pairs, **given))


def test_numbers_in_tensors(simt):
    pairs = sample_pairs(64, torch.float32)
    arrays = {"scale": torch.tensor(1.4), "chosen_target": torch.tensor(0.3), "rejected_target": torch.tensor(-0.2)}
    norm = torch.tensor(5.0)
    check(
        loss(simt, pairs, kind="squared_targets", arrays=arrays, norm=norm),
        expected(pairs, kind="squared_targets", arrays=arrays, norm=norm),
    )


@sizes
@pytest.mark.parametrize("kind", ["kto", "bco", "squared"])
def test_single_responses(simt, kind, size):
    logp, ref = (sample_pairs(size, torch.float32)[f"{n}chosen_logp"] for n in ("", "ref_"))
    good, mask = torch.rand(size) < 0.4, torch.arange(size) % 4 != 1
    weights = {"chosen_weight": 0.7, "rejected_weight": 1.3}
    rows, options = {"chosen_logp": logp, "ref_chosen_logp": ref}, {"mask": mask, "unpaired": kind, "offset": 0.2, **weights}
    result = same_bits_in_every_order(simt, lambda: loss(simt, rows, desirable=good, **options))
    leaf = logp.double().requires_grad_()
    out = reference.unpaired_loss(
        leaf, ref, good, kind=kind, offset=0.2, mask=mask, desirable_weight=0.7, undesirable_weight=1.3
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    metrics = torch.stack([out.metrics[m] for m in METRICS])
    check(result, {"loss": out.loss.detach(), "metrics": metrics, "grad": grad[None]})


def test_what_means_nothing_comes_out_nan(simt):
    pairs = sample_pairs(4, torch.float32)
    smoothing = torch.tensor([0.1, -0.1, 1.5, NAN])
    out = loss(simt, pairs, arrays={"smoothing": smoothing}, reduction="none")
    assert out["loss"].isnan().tolist() == [False, True, True, True]
    without = {name: torch.zeros(4) for name in pairs}  # a response without tokens has the log-prob 0
    lengths = [torch.tensor([1.0, 0, 2, 3]), torch.ones(4)]
    out = loss(simt, without, lengths=lengths, average="logp", reduction="none")
    assert out["loss"].isnan().tolist() == [False, True, False, False]
    assert loss(simt, pairs, norm=torch.tensor(-1.0))["loss"].isnan()
    assert loss(simt, pairs, norm=torch.tensor(0.0))["loss"] == 0


def test_one_launch_each_way(simt):
    pairs = sample_pairs(3000, torch.float32)
    assert launches(simt, lambda: loss(simt, pairs)) == 2


def test_posteriors(simt):
    margin, eta, who = torch.randn(300) * 4, torch.tensor([0.0, 0.4, 0.9, 1.0]), torch.randint(0, 4, (300,))
    bad = who.clone()
    bad[5], bad[6] = -1, 4
    args, result = simt.PosteriorArgs(), tensor_like(margin)
    args.pairs, args.annotators = 300, 4
    args.margin, args.reliability, args.annotator, args.posterior = map(pointer, (margin, eta, bad, result))
    simt.cuda_label_posterior(args)
    assert result.isnan().nonzero().flatten().tolist() == [5, 6]
    known = bad == who
    close(result[known], reference.label_posterior(margin.double(), eta.double(), who)[known])
