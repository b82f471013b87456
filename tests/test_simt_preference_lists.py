"""The CUDA kernels of lists, groups and skew-symmetric scores, compiled for the CPU by tests/simt, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch

from prefkern import reference
from simt.harness import NAN, close, launches, pointer, same_bits_in_every_order, tensor_like

VARIANTS = {
    "plackett_luce": {"kind": "plackett_luce", "beta": 0.7},
    "lambda": {"kind": "lambda", "beta": 0.7},
    "lambda by scores": {"kind": "lambda", "rank": "scores", "gain": "linear", "normalize": "pairs"},
    "uniform": {"kind": "uniform", "normalize": "pairs"},
    "rrhf": {"kind": "rrhf", "beta": 0.7},
    "exo": {"kind": "exo", "beta": 0.7, "label_temperature": 0.8},
    "infonca": {"kind": "infonca", "label_smoothing": 0.1},
    "nca": {"kind": "nca", "label_temperature": 0.8},
    "lire": {"kind": "lire", "beta": 0.7},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
sizes = pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 7), (6, 45)])


class Rows:
    """Fills in RowLoss, and keeps alive what it points to."""

    def __init__(self, simt, rows, reduction="mean", norm=None):
        self.loss, self.inverse, self.metrics = torch.full((), NAN), torch.full((), NAN), torch.full((3,), NAN)
        self.losses = torch.full((rows,), NAN) if reduction == "none" else None
        self.sums, self.finished = torch.full((rows, 4), NAN, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
        self.norm, self.rows, self.reduction = norm, rows, getattr(simt.RowReduction, reduction)

    def fill(self, out):
        out.rows, out.reduction = self.rows, self.reduction
        if isinstance(self.norm, float):
            out.norm = self.norm
        elif self.norm is not None:
            out.norm_tensor = pointer(self.norm)
        out.sums, out.finished, out.losses = map(pointer, (self.sums, self.finished, self.losses))
        out.loss, out.inverse, out.metrics = map(pointer, (self.loss, self.inverse, self.metrics))

    def gradient(self, simt, unnormalised, upstream):
        args, grad = simt.RowGradArgs(), tensor_like(unnormalised)
        args.rows, args.columns, args.per_row = *unnormalised.shape, self.losses is not None
        args.unnormalised, args.upstream, args.inverse, args.grad = map(pointer, (unnormalised, upstream, self.inverse, grad))
        simt.cuda_row_gradient(args)
        return grad

    def result(self):
        return self.loss if self.losses is None else self.losses


def upstream_of(rows, reduction):
    return torch.arange(1.0, rows + 1) if reduction == "none" else torch.tensor(3.0)


def listwise(simt, scores, labels, mask, *, kind, beta=1.0, gain="exp2", rank="labels", normalize="sum", label_temperature=1.0,
             label_smoothing=None, reduction="mean", norm=None, with_grad=True):  # fmt: skip
    args, rows, unnormalised = simt.ListArgs(), Rows(simt, len(scores), reduction, norm), tensor_like(scores)
    rows.fill(args.out)
    rule = args.rule
    rule.kind, rule.gain, rule.rank = getattr(simt.ListKind, kind), getattr(simt.ListGain, gain), getattr(simt.ListRank, rank)
    rule.per_pair, rule.beta, rule.temperature = normalize == "pairs", beta, label_temperature
    rule.smoothing = -1.0 if label_smoothing is None else label_smoothing
    args.items = scores.shape[1]
    scratch = torch.full((*scores.shape, 3), NAN) if kind in ("plackett_luce", "lambda") else None
    args.scores, args.labels, args.mask, args.scratch = map(pointer, (scores, labels, mask, scratch))
    args.unnormalised = pointer(unnormalised) if with_grad else 0
    simt.cuda_listwise(args)
    out = {"loss": rows.result(), "metrics": rows.metrics}
    if with_grad:
        out["grad"] = rows.gradient(simt, unnormalised, upstream_of(len(scores), reduction))
    return out


def expected_of(function, metrics, scores, *args, reduction, **options):
    leaf = scores.double().requires_grad_()
    out = function(leaf, *args, reduction=reduction, **options)
    (grad,) = torch.autograd.grad(out.loss, leaf, upstream_of(len(scores), reduction).double())
    return {"loss": out.loss.detach(), "grad": grad, "metrics": torch.stack([out.metrics[name] for name in metrics])}


def lists(rows, items):
    scores, labels, mask = torch.randn(rows, items), torch.randint(0, 4, (rows, items)) / 3, torch.rand(rows, items) < 0.8
    if rows > 3:
        mask[0], labels[1], mask[2] = False, 0.5, torch.arange(items) == 1
    return scores.masked_fill(~mask, NAN), labels.masked_fill(~mask, NAN), mask


@each_variant
@sizes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_listwise(simt, options, size, reduction):
    scores, labels, mask = lists(*size)
    out = same_bits_in_every_order(simt, lambda: listwise(simt, scores, labels, mask, reduction=reduction, **options))
    expected = expected_of(
        reference.listwise_loss, ("lists", "top1", "items"), scores, labels, mask, reduction=reduction, **options
    )
    close(out["loss"], expected["loss"], atol=2e-6, rtol=3e-6)
    close(out["metrics"], expected["metrics"], atol=1e-6)
    close(out["grad"], expected["grad"].masked_fill(~mask, 0.0), atol=5e-6, rtol=1e-5)
    assert out["grad"][~mask].eq(0).all()
    without = listwise(simt, scores, labels, mask, reduction=reduction, with_grad=False, **options)
    assert torch.equal(without["loss"], out["loss"])


def test_the_order_of_the_items(simt):
    scores, _, mask = lists(5, 6)
    out = listwise(simt, scores, None, mask, kind="plackett_luce")
    expected = expected_of(
        reference.listwise_loss, ("lists", "top1", "items"), scores, None, mask, kind="plackett_luce", reduction="mean"
    )
    for name in ("loss", "metrics"):
        close(out[name], expected[name])
    close(out["grad"], expected["grad"].masked_fill(~mask, 0.0))


def test_no_mask_and_a_norm(simt):
    scores, labels = torch.randn(4, 5), torch.rand(4, 5)
    total = listwise(simt, scores, labels, None, kind="uniform", reduction="sum")
    for norm in (7.0, torch.tensor(7.0)):
        out = listwise(simt, scores, labels, None, kind="uniform", norm=norm)
        close(out["loss"], total["loss"] / 7)
        close(out["grad"], total["grad"] / 7)
    out = listwise(simt, scores, labels, None, kind="uniform", norm=torch.tensor(0.0))
    assert out["loss"] == 0 and not out["grad"].any()
    assert listwise(simt, scores, labels, None, kind="uniform", norm=torch.tensor(-1.0))["loss"].isnan()


@each_variant
def test_a_label_that_is_not_finite(simt, options):
    scores, labels = torch.randn(9, 5), torch.rand(9, 5)
    labels[2, 1], labels[5, 3], labels[7, 0] = NAN, float("inf"), 31.0
    out = listwise(simt, scores, labels, None, reduction="none", **options)
    too_large = options["kind"] == "lambda" and options.get("gain") != "linear"
    broken = torch.tensor([i in (2, 5) or (i == 7 and too_large) for i in range(9)])
    assert torch.equal(out["loss"].isnan(), broken)
    assert torch.equal(out["grad"].isnan().all(1), broken) and torch.equal(out["grad"].isnan().any(1), broken)


@each_variant
def test_scores_of_any_size_and_nan(simt, options):
    scores = torch.tensor([[1e4, -1e4, 0.0, 9e3], [-1e4, 1e4, 1e4, 0.0], [0.0, NAN, 1.0, 2.0]])
    labels = torch.tensor([[0.0, 1.0, 0.5, 0.2], [1.0, 0.0, 0.3, 0.3], [0.0, 1.0, 0.5, 0.2]])
    out = listwise(simt, scores, labels, None, reduction="none", **options)
    expected = reference.listwise_loss(scores[:2].double(), labels[:2], reduction="none", **options).loss
    close(out["loss"][:2], expected)
    assert out["grad"][:2].isfinite().all() and out["loss"][2].isnan() and out["grad"][2].isnan().any()


@sizes
@pytest.mark.parametrize("options", [{}, {"ddof": 1}, {"var_scale": "reward"}], ids=["ddof 0", "ddof 1", "reward"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_group_preference(simt, size, options, reduction):
    scores, _, mask = lists(*size)
    winner, given = torch.rand(size) < 0.5, {"beta": 0.6, "lam": 0.7, **options}

    def run():
        args, rows, unnormalised = simt.GroupPreferenceArgs(), Rows(simt, size[0], reduction), tensor_like(scores)
        rows.fill(args.out)
        args.rule.beta, args.rule.lam, args.rule.ddof = given["beta"], given["lam"], given.get("ddof", 0)
        args.rule.scale_variance = given.get("var_scale") == "reward"
        args.items = size[1]
        args.scores, args.winner, args.mask = map(pointer, (scores, winner, mask))
        args.unnormalised = pointer(unnormalised)
        simt.cuda_group_preference(args)
        grad = rows.gradient(simt, unnormalised, upstream_of(size[0], reduction))
        return {"loss": rows.result(), "metrics": rows.metrics, "grad": grad}

    out = same_bits_in_every_order(simt, run)
    metrics = ("rows", "preference", "variance")
    expected = expected_of(reference.group_preference_loss, metrics, scores, winner, mask, reduction=reduction, **given)
    close(out["loss"], expected["loss"])
    close(out["metrics"], expected["metrics"])
    close(out["grad"], expected["grad"].masked_fill(~mask, 0.0))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("size", [(1, 2), (5, 6), (300, 4)])
def test_skew_scores(simt, normalize, with_loss, size):
    a, b, scales, margin = torch.randn(size), torch.randn(size), torch.rand(size[0], size[1] // 2), torch.rand(size[0])
    a[0] = 0

    def run():
        args, rows = simt.SkewArgs(), Rows(simt, size[0], "mean" if with_loss else "none")
        grads = [tensor_like(t) for t in (a, b, scales)]
        rows.fill(args.out)
        args.rule.tau, args.rule.normalize, args.rule.with_loss = 0.3, normalize, with_loss
        args.width = size[1]
        args.left, args.right, args.scales, args.margin = map(pointer, (a, b, scales, margin if with_loss else None))
        args.left_grad, args.right_grad, args.scales_grad = map(pointer, grads)
        simt.cuda_skew(args)
        upstream = upstream_of(size[0], "mean" if with_loss else "none")
        left, right, of_scales = (rows.gradient(simt, grad, upstream) for grad in grads)
        return {"loss": rows.result(), "left": left, "right": right, "scales": of_scales}

    out = same_bits_in_every_order(simt, run)
    leaves = [t.double().requires_grad_() for t in (a, b, scales)]
    if with_loss:
        loss = reference.skew_loss(*leaves, tau=0.3, margin=margin, normalize=normalize).loss
    else:
        loss = reference.skew_score(*leaves, normalize=normalize)
    grads = torch.autograd.grad(loss, leaves, upstream_of(size[0], "mean" if with_loss else "none").double())
    close(out["loss"], loss.detach())
    for name, grad in zip(("left", "right", "scales"), grads, strict=True):
        close(out[name], grad, atol=1e-5 * max(1, 0 if with_loss else size[0]), rtol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 2), (5, 4, 6), (3, 70, 4)])
def test_skew_means(simt, normalize, size):
    v, scales, mask = torch.randn(size), torch.rand(size[0], size[2] // 2), torch.rand(size[:2]) < 0.8
    v[~mask] = NAN

    def run():
        args, means, scratch = simt.SkewMeansArgs(), torch.full(size[:2], NAN), torch.full((size[0], size[2]), NAN)
        args.rule.tau, args.rule.normalize = 0.3, normalize
        args.lists, args.items, args.width = size
        args.embeddings, args.scales, args.mask = map(pointer, (v, scales, mask))
        args.means, args.scratch = pointer(means), pointer(scratch)
        simt.cuda_skew_means(args)
        return means

    close(same_bits_in_every_order(simt, run), reference.skew_row_means(v, mask, scales, tau=0.3, normalize=normalize))


def test_no_rows_launch_nothing(simt):
    def run():
        simt.cuda_listwise(simt.ListArgs())
        simt.cuda_group_preference(simt.GroupPreferenceArgs())
        simt.cuda_skew(simt.SkewArgs())
        simt.cuda_skew_means(simt.SkewMeansArgs())
        simt.cuda_row_gradient(simt.RowGradArgs())

    assert launches(simt, run) == 0
