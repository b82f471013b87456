"""Losses of lists, of two groups and of skew-symmetric scores against their float64 definitions and worked numbers, and
everything they must refuse."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.testing import assert_close

import prefkern
from prefkern import group_preference_loss, listwise_loss, reference, skew_loss, skew_row_means, skew_score

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF = math.nan, math.inf
OPS = torch.ops.prefkern

# Every kind, with the options that change its formula.
VARIANTS = {
    "plackett_luce": {"kind": "plackett_luce", "beta": 0.7},
    "lambda": {"kind": "lambda", "beta": 0.7},
    "lambda by scores, linear, per pair": {"kind": "lambda", "rank": "scores", "gain": "linear", "normalize": "pairs"},
    "uniform": {"kind": "uniform", "beta": 1.3},
    "uniform per pair": {"kind": "uniform", "normalize": "pairs"},
    "rrhf": {"kind": "rrhf", "beta": 0.7},
    "exo": {"kind": "exo", "beta": 0.7, "label_temperature": 0.8},
    "exo smoothed": {"kind": "exo", "label_smoothing": 0.1},
    "infonca": {"kind": "infonca", "label_temperature": 0.8},
    "infonca hard": {"kind": "infonca", "label_smoothing": 0.0},
    "nca": {"kind": "nca", "beta": 0.7, "label_temperature": 0.8},
    "nca smoothed": {"kind": "nca", "label_smoothing": 0.1},
    "lire": {"kind": "lire", "beta": 0.7},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
each_kind = pytest.mark.parametrize("kind", ["plackett_luce", "lambda", "uniform", "exo", "infonca", "nca", "rrhf", "lire"])
each_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
only_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, tolerance=1e-9):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype, device=actual.device), rtol=0, atol=tolerance)


def skip_float64_on_cuda(device, dtype):
    if device == "cuda" and dtype == F64:
        pytest.skip("float64 is a CPU type")


def value_and_gradient(function, scores, *args, **options):
    """Of the loss, weighted by 1, 2, ... where it is not reduced."""
    leaf = scores.detach().clone().requires_grad_()
    out = function(leaf, *args, **options)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    weights = torch.arange(1.0, loss.numel() + 1, device=loss.device).to(loss.dtype).view_as(loss)
    (gradient,) = torch.autograd.grad(loss, leaf, weights)
    return out, gradient


def lists(rows, items, device="cpu", dtype=F32, ragged=True):
    """Scores, labels with ties, and a mask; behind it NaN. One list has one item, one nothing, one only ties."""
    scores, labels = torch.randn(rows, items), torch.randint(0, 4, (rows, items)) / 3
    mask = torch.rand(rows, items) < 0.7 if ragged else torch.ones(rows, items, dtype=torch.bool)
    if ragged:
        mask[0] = torch.arange(items) == 1
        mask[1:2] = False
    labels[2:3] = 0.5
    scores, labels = scores.masked_fill(~mask, NAN), labels.masked_fill(~mask, NAN)
    return scores.to(device, dtype), labels.to(device), mask.to(device)


# ---------------------------------------------------------------------------------------------------------- worked lists

TPO_R, TPO_V = f64([0.3, -0.1, 0.2]), f64([1, 0.5, 0])


def test_list_losses_of_tpo():
    out, gradient = value_and_gradient(listwise_loss, TPO_R, TPO_V, kind="lambda", beta=0.5, normalize="pairs")
    close(out.loss.detach(), 0.2430250969, 1e-10)
    close(gradient, [[-0.08201133316, 0.01639331399, 0.06561801917]], 1e-10)
    out, gradient = value_and_gradient(listwise_loss, TPO_R, TPO_V, kind="uniform", beta=0.5, normalize="pairs")
    close(out.loss.detach(), 0.6791851884, 1e-10)
    close(gradient, [[-0.156278101, -0.01454397378, 0.1708220748]], 1e-9)


def test_weights_of_tpo():
    """The loss is linear in the three weights, and three lists of scores tell them apart."""
    weights = {(0, 1): 0.3119053946, (0, 2): 0.7213475204, (1, 2): 0.07824150652}
    for scores in ([0.0, 0, 0], [-3.0, 2, 0], [0.0, -4, 5]):
        expected = sum(w * math.log1p(math.exp(scores[j] - scores[i])) for (i, j), w in weights.items())
        close(listwise_loss(f64(scores), TPO_V, kind="lambda").loss, expected, 1e-8)


def test_lambda_of_lipo():
    out = listwise_loss(f64([2, -1, 0.5]), f64([1, 2, 0]), kind="lambda", rank="scores")
    close(out.loss, 5.4695740958, 1e-10)


def test_plackett_luce_of_two_lists():
    scores, mask = f64([2, 1, 0], [0.5, 1.5, NAN]), torch.tensor([[True] * 3, [True, True, False]])
    for labels in (None, f64([5, 4, 0], [2, 1, NAN])):
        out = listwise_loss(scores, labels, mask, kind="plackett_luce", reduction="none")
        close(out.loss, [0.7208676520, 1.3132616875], 1e-10)
    close(listwise_loss(scores, None, mask, kind="plackett_luce").loss, (0.7208676520 + 1.3132616875) / 2, 1e-10)


def test_ranking_term_of_rrhf_and_lire():
    close(listwise_loss(f64([-1, -0.5, -2]), f64([3, 1, 2]), kind="rrhf").loss, 2.0, 1e-12)
    close(listwise_loss(f64([0, 1, -1]), f64([1, 0.5, 0]), kind="lire").loss, -0.5773489489, 1e-10)


X_W, X_L, WINS = f64(1, -0.5), f64(-0.5, 1), torch.tensor([[1, 0], [1, 0]])


def test_pairs_are_the_losses_of_pairs():
    """K = 2, beta 0.1: the values of trainers' exo_pair and nca_pair, and DPO."""
    pairs, options = torch.stack([X_W, X_L], 1), {"beta": 0.1, "reduction": "none"}
    close(listwise_loss(pairs, WINS, kind="exo", label_smoothing=1e-3, **options).loss, [2.5055165555, 3.0225540819], 1e-9)
    close(listwise_loss(pairs, WINS, kind="nca", label_smoothing=0.0, **options).loss, [1.3508248141, 1.4248878021], 1e-9)
    for kind in ("plackett_luce", "uniform"):
        out, gradient = value_and_gradient(listwise_loss, pairs, WINS, kind=kind, **options)
        close(out.loss.detach(), [0.6209570478, 0.7709570478], 1e-9)
        close(gradient[:, 0] / f64(1, 2), [-0.0462570155, -0.0537429845], 1e-9)
    # Logistic loss on two items is also InfoNCA with all of the target on the winner.
    close(listwise_loss(pairs, WINS, kind="infonca", label_smoothing=0.0, **options).loss, [0.6209570478, 0.7709570478], 1e-9)


def test_gradients_of_pairs():
    pairs = torch.stack([X_W, X_L], 1)
    for options, expected in (
        ({"kind": "exo", "label_smoothing": 1e-3}, [-0.1679722526, -0.1754302228]),
        ({"kind": "nca", "label_smoothing": 0.0}, [-0.0212531219, -0.0268746095]),
    ):
        _, gradient = value_and_gradient(listwise_loss, pairs, WINS, beta=0.1, reduction="none", **options)
        close(gradient[:, 0] / f64(1, 2), expected, 1e-9)


# --------------------------------------------------------------------------------------------------- against definitions


@each_variant
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_lists(device, options, dtype, reduction):
    skip_float64_on_cuda(device, dtype)
    for rows, items, ragged in ((1, 1, False), (3, 2, False), (5, 4, True), (37, 9, True), (9, 33, True)):
        scores, labels, mask = lists(rows, items, device, dtype, ragged)
        arguments = {**options, "reduction": reduction}
        out, gradient = value_and_gradient(listwise_loss, scores, labels, mask, **arguments)
        expected, expected_gradient = value_and_gradient(
            reference.listwise_loss, scores.cpu().double(), labels.cpu(), mask.cpu(), **arguments
        )
        assert out.loss.dtype == (F64 if dtype == F64 else F32) and gradient.dtype == dtype
        assert out.loss.shape == ((rows,) if reduction == "none" else ())
        tight = dtype == F64
        assert_close(
            out.loss.detach().cpu().double(),
            expected.loss.detach(),
            rtol=1e-12 if tight else 3e-6,
            atol=1e-12 if tight else 2e-6,
        )
        for name, value in expected.metrics.items():
            close(out.metrics[name], value.item(), 1e-6)
        assert gradient[~mask].eq(0).all()
        expected_gradient = expected_gradient.masked_fill(~mask.cpu(), 0.0)
        size = max(1.0, expected_gradient.abs().max().item())
        tolerance = {F64: 1e-12, F32: 2e-6}.get(dtype, 2**-7) * size
        assert_close(gradient.cpu().double(), expected_gradient, rtol=0, atol=tolerance)
        assert torch.equal(listwise_loss(scores, labels, mask, **arguments).loss, out.loss)


@each_variant
def test_gradcheck(options):
    scores, labels, mask = lists(4, 5, dtype=F64)
    leaf = scores.masked_fill(~mask, 0.3).requires_grad_()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: listwise_loss(s, labels, mask, reduction=r, **options).loss, leaf, nondet_tol=0
        )


@each_variant
def test_nothing_to_compare(device, options):
    """One item that counts, none, or equal labels: loss and gradient are exactly 0, and the list does not count."""
    scores, labels, mask = lists(3, 4, device)
    out, gradient = value_and_gradient(listwise_loss, scores, labels, mask, **options)
    assert out.loss.item() == 0 and gradient.eq(0).all()
    assert [value.item() for value in out.metrics.values()] == [0, 0, 0]
    with_another = torch.cat([scores, torch.randn(1, 4, device=device)]), torch.cat([labels, torch.eye(4, device=device)[:1]])
    out = listwise_loss(*with_another, torch.cat([mask, torch.ones_like(mask[:1])]), **options)
    alone = listwise_loss(with_another[0][3:], with_another[1][3:], **options)
    assert torch.equal(out.loss, alone.loss) and out.metrics["lists"].item() == 1


@each_kind
def test_no_lists(device, kind):
    for shape in ((0, 4), (3, 0)):
        empty = torch.zeros(shape, device=device)
        out, gradient = value_and_gradient(listwise_loss, empty, empty, kind=kind)
        assert out.loss.item() == 0 and gradient.shape == shape
        assert listwise_loss(empty, empty, kind=kind, reduction="none").loss.tolist() == [0.0] * shape[0]


@each_variant
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_scores_of_any_size(device, options, dtype):
    """Scores of 1e4: the same loss as in float64 from the definition, and finite gradients."""
    skip_float64_on_cuda(device, dtype)
    scores = torch.tensor([[1e4, -1e4, 0.0, 9e3], [-1e4, 1e4, 1e4, 0.0]], device=device, dtype=dtype)
    labels = torch.tensor([[0.0, 1.0, 0.5, 0.2], [1.0, 0.0, 0.3, 0.3]], device=device)
    out, gradient = value_and_gradient(listwise_loss, scores, labels, **options)
    expected, expected_gradient = value_and_gradient(reference.listwise_loss, scores.cpu().double(), labels.cpu(), **options)
    assert_close(out.loss.detach().cpu().double(), expected.loss.detach(), rtol=1e-6, atol=1e-6)
    assert gradient.isfinite().all()
    if options["kind"] != "exo":  # log p - log t cancels: p f - p sum(p f)
        assert_close(gradient.cpu().double(), expected_gradient, rtol=1e-5, atol=1e-6)


def test_a_tail_of_a_list_that_vanishes(device):
    """Plackett-Luce needs the logsumexp of what is left, however small it is beside what is gone."""
    scores = torch.tensor([[1e4, 0.0, -1.0, -2.0]], device=device)
    out, gradient = value_and_gradient(listwise_loss, scores, kind="plackett_luce")
    tail = listwise_loss(torch.tensor([[0.0, -1.0, -2.0]], dtype=F64), kind="plackett_luce").loss
    assert_close(out.loss.detach().cpu().double(), tail, rtol=1e-6, atol=0)
    assert gradient[0, 0].item() == 0 and abs(gradient.sum().item()) < 1e-6


@each_variant
def test_nan_in_a_score(device, options):
    scores, labels, mask = lists(9, 6, device)
    mask[5] = True
    labels[5] = torch.arange(6, device=device) / 6
    scores[5] = torch.randn(6, device=device)
    scores[5, 3] = NAN
    out, gradient = value_and_gradient(listwise_loss, scores, labels, mask, reduction="none", **options)
    assert torch.equal(out.loss.isnan(), torch.arange(9, device=device) == 5)
    assert gradient[5].isnan().any() and not gradient[torch.arange(9, device=device) != 5].isnan().any()
    assert listwise_loss(scores, labels, mask, **options).loss.isnan()


def test_norm(device):
    scores, labels, mask = lists(8, 5, device)
    total, of_total = value_and_gradient(listwise_loss, scores, labels, mask, kind="uniform", reduction="sum")
    for norm in (4, 4.0, torch.tensor(4.0, device=device), torch.tensor([4], device=device, dtype=F16)):
        out, gradient = value_and_gradient(listwise_loss, scores, labels, mask, kind="uniform", norm=norm)
        close(out.loss.detach(), total.loss.item() / 4, 1e-6)
        close(gradient, of_total / 4, 1e-6)
    out, gradient = value_and_gradient(listwise_loss, scores, labels, mask, kind="uniform", norm=0)
    assert out.loss.item() == 0 and gradient.eq(0).all()


@given(st.integers(0, 2**31), st.sampled_from(sorted(VARIANTS)), st.floats(-100, 100))
def test_properties(seed, name, shift):
    """The order of the items says nothing, a constant added to a list nothing but to nca, and gradients sum to 0."""
    torch.manual_seed(seed)
    options = VARIANTS[name]
    scores, labels = torch.randn(3, 6, dtype=F64), torch.rand(3, 6, dtype=F64)
    out, gradient = value_and_gradient(listwise_loss, scores, labels, **options)
    order = torch.randperm(6)
    moved, moved_gradient = value_and_gradient(listwise_loss, scores[:, order], labels[:, order], **options)
    close(moved.loss.detach(), out.loss.detach(), 1e-12)
    close(moved_gradient, gradient[:, order], 1e-12)
    if options["kind"] != "nca":
        close(gradient.sum(1), torch.zeros(3), 1e-12)
        shifted, shifted_gradient = value_and_gradient(listwise_loss, scores + shift, labels, **options)
        close(shifted.loss.detach(), out.loss.detach(), 1e-10)
        close(shifted_gradient, gradient, 1e-10)


@each_variant
def test_weights_and_labels_are_constants(options):
    scores, labels = torch.randn(2, 4, dtype=F64, requires_grad=True), torch.rand(2, 4, dtype=F64, requires_grad=True)
    grads = torch.autograd.grad(listwise_loss(scores, labels, **options).loss, (scores, labels), allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is None


def test_metrics_of_lists(device):
    scores = torch.tensor([[3.0, 1, 2], [0, 1, 2], [5, 5, 1]], device=device)
    labels = torch.tensor([[2, 1, 0], [2, 1, 0], [0, 2, 2]], device=device)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], device=device).bool()
    metrics = listwise_loss(scores, labels, mask, kind="uniform").metrics
    assert metrics["lists"].item() == 3
    close(metrics["top1"], 1 / 3, 1e-7)  # of two highest scores the first one is looked at
    close(metrics["items"], 8 / 3, 1e-6)


@pytest.mark.parametrize("kind", ["lambda", "plackett_luce", "nca"])
def test_memory_is_linear(device, allocations, kind):
    scores, labels = torch.randn(2, 4000, device=device), torch.rand(2, 4000, device=device)
    measured = allocations(lambda: value_and_gradient(listwise_loss, scores, labels, kind=kind))
    assert measured.peak <= 64 * 8000 + (1 << 20) * (device == "cuda")


def test_integer_labels_and_strides(device):
    scores, labels = torch.randn(4, 10, device=device)[:, ::2], torch.randint(0, 5, (4, 10), device=device)[:, ::2]
    expected = listwise_loss(scores.clone(), labels.float(), kind="lambda").loss
    for dtype in (torch.int64, torch.int32, F16, F64):
        assert torch.equal(listwise_loss(scores, labels.to(dtype), kind="lambda").loss, expected)
    mask = torch.ones(4, 10, dtype=torch.bool, device=device)[:, ::2]
    assert torch.equal(listwise_loss(scores, labels, mask, kind="lambda").loss, expected)


# ------------------------------------------------------------------------------------------------------------ two groups

RHAT, WINNERS = f64([0.6, 0.2, -0.4, -0.1], [1, 0.3, 0.5, -0.2]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
GROUP_OPTIONS = {"ddof 0": {}, "ddof 1": {"ddof": 1}, "reward": {"var_scale": "reward"}, "no penalty": {"lam": 0.0}}
each_group_option = pytest.mark.parametrize("options", GROUP_OPTIONS.values(), ids=GROUP_OPTIONS)


def test_groups_of_gepo():
    out, gradient = value_and_gradient(group_preference_loss, RHAT, WINNERS)
    close(out.loss.detach(), 0.7208944233, 1e-10)
    expected = [
        [0.08790610703, -0.112093893, 0.01209389297, 0.01209389297],
        [0.1253331557, -0.1080001777, -0.041333511, 0.02400053299],
    ]
    close(gradient, expected, 1e-10)
    for options, rows, mean in (
        ({}, [0.7011752126, 0.740613634], 0.7208944233),
        ({"ddof": 1}, [0.7411752126, 0.7839469673], 0.76256109),
        ({"var_scale": "reward"}, [0.6615752126, 0.654813634], 0.6581944233),
    ):
        close(group_preference_loss(RHAT, WINNERS, reduction="none", **options).loss, rows, 1e-9)
        close(group_preference_loss(RHAT, WINNERS, **options).loss, mean, 1e-9)


@each_group_option
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_groups(device, options, dtype, reduction):
    skip_float64_on_cuda(device, dtype)
    for rows, items in ((1, 2), (6, 5), (40, 35)):
        scores, _, mask = lists(rows, items, device, dtype, rows > 5)
        winner = torch.rand(rows, items, device=device) < 0.4
        arguments = {**options, "beta": 0.6, "reduction": reduction}
        out, gradient = value_and_gradient(group_preference_loss, scores, winner, mask, **arguments)
        expected, expected_gradient = value_and_gradient(
            reference.group_preference_loss, scores.cpu().double(), winner.cpu(), mask.cpu(), **arguments
        )
        tolerance = {F64: 1e-12, F32: 2e-6}.get(dtype, 2**-6)
        assert_close(out.loss.detach().cpu().double(), expected.loss.detach(), rtol=1e-12 if dtype == F64 else 2e-6, atol=1e-6)
        for name, value in expected.metrics.items():
            close(out.metrics[name], value.item(), 1e-5)
        expected_gradient = expected_gradient.masked_fill(~mask.cpu(), 0.0)
        assert_close(
            gradient.cpu().double(), expected_gradient, rtol=0, atol=tolerance * max(1.0, rows if reduction == "none" else 1)
        )
        assert gradient.dtype == dtype and gradient[~mask].eq(0).all()


@each_group_option
def test_gradcheck_of_groups(options):
    leaf, mask = torch.randn(4, 5, dtype=F64, requires_grad=True), torch.rand(4, 5) < 0.9
    winner = torch.rand(4, 5) < 0.5
    assert torch.autograd.gradcheck(lambda s: group_preference_loss(s, winner, mask, **options).loss, leaf)


def test_one_of_each_is_dpo():
    x = torch.randn(6, 2, dtype=F64)
    winner = torch.tensor([[True, False]] * 6)
    for ddof in (0, 1):
        out, gradient = value_and_gradient(group_preference_loss, x, winner, beta=0.7, ddof=ddof)
        close(out.loss.detach(), -F.logsigmoid(0.7 * (x[:, 0] - x[:, 1])).mean(), 1e-12)
        close(gradient.sum(1), torch.zeros(6), 1e-15)


def test_a_row_without_winners_or_losers(device):
    scores = torch.randn(3, 4, device=device)
    winner = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]], device=device).bool()
    out, gradient = value_and_gradient(group_preference_loss, scores, winner)
    assert torch.equal(out.loss, group_preference_loss(scores[2:], winner[2:]).loss)
    assert out.metrics["rows"].item() == 1 and gradient[:2].eq(0).all()
    out, gradient = value_and_gradient(group_preference_loss, scores[:2], winner[:2])
    assert out.loss.item() == 0 and gradient.eq(0).all()


@given(st.integers(0, 2**31), st.floats(-100, 100))
def test_properties_of_groups(seed, shift):
    """The gradient of a row sums to 0; a constant added to it, or another order inside a group, change nothing; winners that
    move towards their mean lower the loss."""
    torch.manual_seed(seed)
    scores, winner = torch.randn(3, 6, dtype=F64), torch.tensor([[1, 1, 1, 0, 0, 0]] * 3).bool()
    out, gradient = value_and_gradient(group_preference_loss, scores, winner)
    close(gradient.sum(1), torch.zeros(3), 1e-14)
    close(group_preference_loss(scores + shift, winner).loss, out.loss.detach(), 1e-10)
    order = torch.cat([torch.randperm(3), 3 + torch.randperm(3)])
    close(group_preference_loss(scores[:, order], winner).loss, out.loss.detach(), 1e-12)
    mean = scores[:, :3].mean(1, keepdim=True)
    nearer = torch.cat([mean + 0.5 * (scores[:, :3] - mean), scores[:, 3:]], 1)
    assert group_preference_loss(nearer, winner).loss < out.loss


def test_large_and_missing_scores(device):
    scores = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, NAN]], device=device)
    winner = torch.tensor([[1, 0, 0], [1, 0, 1]], device=device).bool()
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]], device=device).bool()
    out, gradient = value_and_gradient(group_preference_loss, scores, winner, mask, beta=1.0, reduction="none")
    assert out.loss.tolist() == [2e4, 0]
    assert gradient.tolist() == [[-1, 1, 0], [0, 0, 0]]
    out, gradient = value_and_gradient(group_preference_loss, scores, winner, reduction="none")
    assert out.loss.isnan().tolist() == [False, True] and not gradient[0].isnan().any()


# ---------------------------------------------------------------------------------------------------------- skew scores

V_C, V_R = f64([0.6, 0.8]), f64([0.8, -0.6])
SCALES = f64([0.3235537039, 0.2396944792, 0.4367518169])
SIX_C, SIX_R = f64([0.5, -0.2, 0.1, 0.4, -0.3, 0.7]), f64([0.2, 0.6, -0.5, 0.3, 0.1, 0.2])


def test_scores_of_gpm():
    close(skew_score(V_C, V_R, normalize=False), [-1.0], 1e-12)
    out, gradient = value_and_gradient(skew_loss, V_C, V_R, normalize=False)
    close(out.loss.detach(), 10.0000454, 1e-7)
    close(out.metrics["prob"], 4.53978687e-05, 1e-13)
    close(gradient, [[5.999727613, 7.999636817]], 1e-9)
    _, gradient = value_and_gradient(skew_loss, V_C, V_R)  # parallel to v_c
    close(gradient, [[0, 0]], 1e-12)


def test_scaled_scores_of_gpm():
    close(skew_score(SIX_C, SIX_R, SCALES, normalize=False), [0.1083602533], 1e-10)
    out, gradient = value_and_gradient(lambda r: skew_loss(SIX_C, r, SCALES, normalize=False), SIX_R)
    close(out.loss.detach(), 0.2914556853, 1e-9)
    expected = [-0.1636048503, -0.4090121257, 0.2424029082, -0.06060072704, 0.7729520685, 0.3312651722]
    close(gradient, [expected], 1e-8)


def test_row_means_of_gpm(device):
    angles = torch.deg2rad(torch.tensor([0.0, 30, 100, 200]))
    v = torch.stack([angles.cos(), angles.sin()], 1)[None].to(device)
    close(skew_row_means(v), [[2.856969024, 1.533351996, -2.349231552, -2.041089468]], 1e-5)
    close(skew_row_means(3 * v), [[2.856969024, 1.533351996, -2.349231552, -2.041089468]], 1e-5)


def embeddings(rows, width, device="cpu", dtype=F32):
    shape = (rows, width)
    return [t.to(device, dtype) for t in (torch.randn(shape), torch.randn(shape), torch.rand(rows, width // 2))]


@each_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_skew_scores_and_losses(device, dtype, normalize, scaled):
    skip_float64_on_cuda(device, dtype)
    for rows, width in ((1, 2), (5, 4), (37, 8), (3, 34)):
        a, b, scales = embeddings(rows, width, device, dtype)
        margin = torch.rand(rows, device=device)
        given = (a, b, scales) if scaled else (a, b)

        def run(module, given, margin, rows=rows):
            leaves = [t.detach().clone().requires_grad_() for t in given]
            score = module.skew_score(*leaves, normalize=normalize)
            score_grads = torch.autograd.grad(score, leaves, torch.arange(1.0, rows + 1, device=score.device).to(score.dtype))
            out = module.skew_loss(*leaves, tau=0.3, margin=margin, normalize=normalize)
            return score.detach(), out, [*score_grads, *torch.autograd.grad(out.loss, leaves)]

        score, out, grads = run(prefkern, given, margin)
        expected = run(reference, [t.cpu().double() for t in given], margin.cpu())
        tolerance = 1e-12 if dtype == F64 else 3e-6
        assert score.dtype == out.loss.dtype == (F64 if dtype == F64 else F32)
        assert_close(score.cpu().double(), expected[0], rtol=tolerance, atol=tolerance)
        assert_close(
            out.loss.detach().cpu().double(), expected[1].loss.detach(), rtol=1e-5 if dtype != F64 else 1e-12, atol=1e-6
        )
        for name, value in expected[1].metrics.items():
            close(out.metrics[name], value.item(), 1e-5)
        for mine, theirs, leaf in zip(grads, expected[2], (*given, *given), strict=True):
            assert mine.dtype == leaf.dtype
            size = max(1.0, theirs.abs().max().item())
            assert_close(mine.cpu().double(), theirs, rtol=0, atol={F64: 1e-11, F32: 1e-5}.get(dtype, 2**-7) * size)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_of_scores(normalize):
    leaves = [t.requires_grad_() for t in embeddings(3, 4, dtype=F64)]
    assert torch.autograd.gradcheck(lambda a, b, s: skew_score(a, b, s, normalize=normalize), leaves)
    assert torch.autograd.gradcheck(lambda a, b, s: skew_loss(a, b, s, tau=0.4, normalize=normalize).loss, leaves)
    assert torch.autograd.gradcheck(lambda a: skew_score(a, leaves[1].detach(), normalize=normalize), leaves[:1])


@each_dtype
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_row_means(device, dtype, normalize, scaled):
    skip_float64_on_cuda(device, dtype)
    for lists_, items, width in ((1, 1, 2), (5, 4, 6), (19, 33, 8)):
        v = torch.randn(lists_, items, width).to(device, dtype)
        scales = torch.rand(lists_, width // 2).to(device, dtype) if scaled else None
        mask = torch.rand(lists_, items, device=device) < 0.7
        mask[:1] = False
        v[~mask] = NAN
        means = skew_row_means(v, mask, scales, tau=0.5, normalize=normalize)
        expected = reference.skew_row_means(
            v.cpu().double(), mask.cpu(), None if scales is None else scales.cpu().double(), tau=0.5, normalize=normalize
        )
        assert means.dtype == (F64 if dtype == F64 else F32) and means[~mask].eq(0).all()
        assert_close(means.cpu().double(), expected, rtol=0, atol=1e-12 if dtype == F64 else 3e-6)


@given(st.integers(0, 2**31), st.floats(-3, 3))
def test_properties_of_scores(seed, angle):
    """Skew-symmetric to the bit; row means sum to 0; a rotation of every block changes nothing; with (r, 1) Bradley-Terry."""
    torch.manual_seed(seed)
    a, b, scales = embeddings(4, 6, dtype=F64)
    score = skew_score(a, b, scales)
    assert torch.equal(score, -skew_score(b, a, scales))
    assert skew_score(a, a, scales).abs().max() < 1e-15
    close(skew_row_means(torch.stack([a, b], 1), scales=scales).sum(1), torch.zeros(4), 1e-13)
    c, s = math.cos(angle), math.sin(angle)
    turned = [torch.stack([c * v[:, ::2] - s * v[:, 1::2], s * v[:, ::2] + c * v[:, 1::2]], 2).flatten(1) for v in (a, b)]
    close(skew_score(*turned, scales), score, 1e-12)
    r = torch.randn(2, 4, dtype=F64)
    close(skew_score(*(torch.stack([x, torch.ones(4)], 1) for x in r), normalize=False), r[0] - r[1], 1e-12)


def test_a_cycle_of_three():
    angles = f64(0, 120, 240).deg2rad()
    v = torch.stack([angles.cos(), angles.sin()], 1)
    assert (skew_score(v, v.roll(-1, 0)) > 0.8).all()


def test_an_embedding_of_zeros(device):
    zero, other = torch.zeros(1, 4, device=device), torch.randn(1, 4, device=device)
    out, gradient = value_and_gradient(skew_loss, zero, other)
    close(out.loss.detach(), math.log(2), 1e-6)
    assert gradient.isfinite().all()
    assert skew_row_means(torch.stack([zero, other], 1)).eq(0).all()


def test_large_scores_and_nan(device):
    a = torch.tensor([[1e2, 0.0], [-1e2, 0.0], [NAN, 0.0]], device=device)
    b = torch.tensor([[0.0, 1e1], [0.0, 1e1], [1.0, 1.0]], device=device)
    out, gradient = value_and_gradient(skew_loss, a, b, normalize=False, reduction="none")
    assert out.loss[:2].tolist() == [0, 1e4] and out.loss[2].isnan()
    assert gradient[2].isnan().any() and not gradient[:2].isnan().any()


def test_row_means_take_no_memory(device, allocations):
    v = torch.randn(4, 3000, 4, device=device)
    measured = allocations(lambda: skew_row_means(v))
    assert measured.peak <= 64 * 3000 * 4 + (1 << 20) * (device == "cuda")


# ------------------------------------------------------------------------------------------- same bits, however it is run


def everything(device="cpu"):
    scores, labels, mask = lists(333, 7, device)
    a, b, scales = embeddings(5000, 4, device)
    v = torch.randn(300, 5, 4, device=device)
    winner = labels > 0.5

    def run():
        results = []
        for options in VARIANTS.values():
            out, gradient = value_and_gradient(listwise_loss, scores, labels, mask, **options)
            results += [out.loss, gradient, *out.metrics.values()]
        out, gradient = value_and_gradient(group_preference_loss, scores, winner, mask)
        results += [out.loss, gradient, *out.metrics.values()]
        out, gradient = value_and_gradient(skew_loss, a, b, scales)
        return [*results, out.loss, gradient, skew_row_means(v)]

    return run


def test_same_bits_on_any_number_of_threads(threads):
    run, results = everything(), []
    for n in (1, 2, 2):
        threads(n)
        results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_list_does_not_depend_on_its_neighbours():
    """Whatever lane it has, alone or among others."""
    scores, labels, mask = lists(21, 6)
    for options in VARIANTS.values():
        together = value_and_gradient(listwise_loss, scores, labels, mask, reduction="none", **options)
        for i in (3, 8, 20):
            alone = value_and_gradient(
                listwise_loss, scores[i : i + 1], labels[i : i + 1], mask[i : i + 1], reduction="none", **options
            )
            assert torch.equal(alone[0].loss, together[0].loss[i : i + 1])
            assert_close(alone[1] * (i + 1), together[1][i : i + 1], rtol=1e-6, atol=0)


@only_cuda
def test_same_bits_every_time_and_in_a_graph(device):
    run = everything(device)
    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


# ------------------------------------------------------------------------------------------------- a citizen of PyTorch


def test_backwards_that_cannot_be_differentiated(device):
    a, b, _ = embeddings(3, 4, device)
    labels = torch.rand(3, 4, device=device)
    for loss in (
        lambda x: listwise_loss(x, labels, kind="uniform").loss,
        lambda x: group_preference_loss(x, labels > 0.5).loss,
        lambda x: skew_score(x, b).sum(),
    ):
        leaf = a.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf) ** 2, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="preference_rows_backward cannot be differentiated twice"):
            gradient.sum().backward()


def test_no_gradient_costs_nothing(device, op_log):
    x, labels = torch.randn(3, 4, device=device, requires_grad=True), torch.rand(3, 4, device=device)
    with torch.no_grad():
        out = [listwise_loss(x, labels, kind="nca").loss, group_preference_loss(x, labels > 0.5).loss, skew_score(x, x)]
    assert not any(t.requires_grad for t in out)
    assert op_log.names() == ["listwise_loss_fwd", "group_preference_loss_fwd", "skew_score_fwd"]
    assert not any(args[-1] for _, args in op_log.calls)


def test_only_the_gradients_that_are_wanted(device, op_log):
    a, b, scales = embeddings(3, 4, device)
    for needed, bits in (((a,), 1), ((b,), 2), ((scales,), 4), ((a, scales), 5)):
        op_log.calls.clear()
        leaves = [t.clone().requires_grad_(any(t is n for n in needed)) for t in (a, b, scales)]
        skew_loss(*leaves).loss.backward()
        assert op_log.args("skew_score_fwd")[-1] == bits
        assert op_log.names().count("preference_rows_backward") == len(needed)
        assert [leaf.grad is not None for leaf in leaves] == [any(t is n for n in needed) for t in (a, b, scales)]


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_opcheck(device, dtype):
    skip_float64_on_cuda(device, dtype)
    x, labels = torch.randn(3, 4, device=device, dtype=dtype), torch.rand(3, 4, device=device, dtype=dtype)
    leaf, mask = x.clone().requires_grad_(), torch.rand(3, 4, device=device) < 0.8
    for kind in (0, 1, 3):
        opcheck(OPS.listwise_loss.default, (leaf, labels, mask, None, kind, 0, 0, False, 0, 1.0, 1.0, -1.0, -1.0, True))
    opcheck(OPS.listwise_loss.default, (leaf, labels, None, x[0, 0].abs(), 2, 0, 0, True, 0, 1.0, 1.0, -1.0, -1.0, True))
    opcheck(OPS.listwise_loss_fwd.default, (x, labels, mask, None, 0, 0, 0, False, 2, 1.0, 1.0, -1.0, -1.0, False))
    opcheck(OPS.group_preference_loss.default, (leaf, labels > 0.5, mask, None, 0, False, 2, 0.1, 1.0, -1.0, True))
    scales = torch.rand(3, 2, device=device, dtype=dtype).requires_grad_()
    opcheck(OPS.skew_score.default, (leaf, x, scales, x[:, 0].clone(), None, True, True, 0, 0.1, -1.0, 5))
    opcheck(OPS.skew_score.default, (leaf, x, None, None, None, True, False, 2, 1.0, -1.0, 1))
    opcheck(OPS.skew_row_means.default, (x.view(1, 3, 4), mask[:, :3][:1], None, True, 0.1))
    for g in (x[0, 0].clone(), x[:, 0].clone()):
        opcheck(OPS.preference_rows_backward.default, (g, x, x[1, 1].clone()))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_for_any_number_of_lists(device, dynamic):
    """fullgraph, four sizes, at most two compilations (the second has a symbolic B)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, labels, mask, scales):
        total = group_preference_loss(x, labels > 0.5, mask).loss + skew_loss(x, x.flip(1), scales).loss
        total = total + skew_score(x, x.roll(1, 1)).sum()
        for kind in ("plackett_luce", "lambda", "nca"):
            total = total + listwise_loss(x, labels, mask, kind=kind).loss
        return total + listwise_loss(x, labels, kind="uniform", reduction="none").loss.sum(), skew_row_means(x[None])

    run = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (6, 11, 30, 31):
        x, labels = torch.randn(size, 4, device=device), torch.rand(size, 4, device=device)
        mask, scales = torch.rand(size, 4, device=device) < 0.9, torch.rand(size, 2, device=device)
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled, eager = run(leaf, labels, mask, scales), step(other, labels, mask, scales)
        assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
        compiled[0].backward()
        eager[0].backward()
        assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


def test_meta_tensors():
    x = torch.empty(5, 4, device="meta")
    assert listwise_loss(x.bfloat16(), x, kind="exo", reduction="none").loss.shape == (5,)
    assert group_preference_loss(x, x.bool()).loss.shape == ()
    assert skew_score(x, x).shape == (5,) and skew_row_means(x[None]).shape == (1, 5)


# --------------------------------------------------------------------------------------------------------------- errors

S, L = torch.zeros(3, 4), torch.rand(3, 4)
M, W = torch.ones(3, 4, dtype=torch.bool), torch.eye(3, 4).bool()
SCORES = {
    "list": (dict(scores=[1.0]), TypeError, r"scores is a list; a torch\.Tensor"),
    "int": (dict(scores=S.long()), TypeError, r"scores has dtype Long.*float32"),
    "1-d": (dict(scores=S[0]), ValueError, r"scores has shape \[4\]; expected \[B, [KG]\]"),
    "mask float": (dict(mask=S), TypeError, r"mask has dtype Float; accepted: bool"),
    "mask shape": (dict(mask=M[:2]), ValueError, r"mask has shape \[2, 4\]; scores has shape \[3, 4\]"),
    "mask list": (dict(mask=[True]), TypeError, r"mask is a list"),
    "reduction": (dict(reduction="avg"), ValueError, r"reduction is 'avg'; accepted: 'mean', 'sum', 'none'"),
    "beta zero": (dict(beta=0), ValueError, r"beta is 0; it must be finite and positive"),
    "beta inf": (dict(beta=INF), ValueError, r"beta is inf; it must be finite and positive"),
    "beta nan": (dict(beta=NAN), ValueError, r"beta is nan"),
    "beta text": (dict(beta="1"), TypeError, r"beta is '1'; a number"),
    "norm": (dict(norm=-1.0), ValueError, r"norm is -1\.0; it must be finite and not negative"),
    "norm nan": (dict(norm=torch.tensor(NAN)), ValueError, r"norm is nan; it must be finite"),
    "norm shape": (dict(norm=torch.ones(2)), ValueError, r"norm has shape \[2\]; expected one element"),
    "norm int tensor": (dict(norm=torch.tensor(2)), TypeError, r"norm has dtype Long"),
    "norm text": (dict(norm="2"), TypeError, r"norm is '2'"),
    "norm device": (dict(norm=torch.ones((), device="meta")), ValueError, r"norm is on meta but scores is on cpu"),
}
LISTS = {
    "kind": (dict(kind="placket_luce"), ValueError, r"kind is 'placket_luce'.*'lire'; did you mean 'plackett_luce'\?"),
    "kind number": (dict(kind=3), ValueError, r"kind is 3; accepted"),
    "labels list": (dict(labels=[1.0]), TypeError, r"labels is a list"),
    "labels bool": (dict(labels=M), TypeError, r"labels has dtype bool; numbers"),
    "labels shape": (dict(labels=L[:, :3]), ValueError, r"labels has shape \[3, 3\]; scores has shape \[3, 4\]"),
    "labels None": (dict(labels=None), ValueError, r"labels is None; only kind 'plackett_luce'"),
    "labels device": (dict(labels=L.to("meta")), ValueError, r"labels is on meta but scores is on cpu"),
    "labels nan": (dict(labels=L.masked_fill(torch.arange(12).view(3, 4) == 6, NAN)), ValueError,
                   r"labels\[1, 2\] is nan; gain 'exp2' takes finite labels up to 30"),
    "labels inf": (dict(kind="uniform", labels=L - INF), ValueError, r"labels\[0, 0\] is -inf; every label"),
    "labels large": (dict(labels=L + 31), ValueError, r"labels\[0, 0\] is 31.*up to 30: scale them, or take gain 'linear'"),
    "gain": (dict(gain="log"), ValueError, r"gain is 'log'; accepted: 'exp2', 'linear'"),
    "rank": (dict(rank="score"), ValueError, r"rank is 'score'; accepted: 'labels', 'scores'; did you mean 'scores'\?"),
    "normalize": (dict(normalize="mean"), ValueError, r"normalize is 'mean'; accepted: 'sum', 'pairs'"),
    "no pairs": (dict(kind="nca", normalize="pairs"), ValueError, r"normalize is 'pairs', but the loss has no pairs"),
    "temperature": (dict(label_temperature=0.0), ValueError, r"label_temperature is 0; it must be finite and positive"),
    "smoothing": (dict(label_smoothing=1.0), ValueError, r"label_smoothing is 1\.0; it must be at least 0 and below 1"),
    "smoothing text": (dict(label_smoothing="a"), TypeError, r"label_smoothing is 'a'"),
    "exo": (dict(kind="exo", label_smoothing=0.0), ValueError, r"label_smoothing is 0; kind 'exo' takes the logarithm"),
}  # fmt: skip
GROUPS = {
    "winner list": (dict(is_winner=[True]), TypeError, r"is_winner is a list"),
    "winner float": (dict(is_winner=S), TypeError, r"is_winner has dtype Float; accepted: bool"),
    "winner shape": (dict(is_winner=W[:2]), ValueError, r"is_winner has shape \[2, 4\]; scores has shape \[3, 4\]"),
    "winner device": (dict(is_winner=W.to("meta")), ValueError, r"is_winner is on meta but scores is on cpu"),
    "lam": (dict(lam=-0.1), ValueError, r"lam is -0\.1; it must be finite and not negative"),
    "ddof": (dict(ddof=2), ValueError, r"ddof is 2; accepted: 0, 1"),
    "ddof float": (dict(ddof=1.0), TypeError, r"ddof is 1\.0; an integer"),
    "var_scale": (
        dict(var_scale="rewards"),
        ValueError,
        r"var_scale is 'rewards'; accepted: 'logratio', 'reward'; did you mean 'reward'",
    ),
}
EMBEDDINGS = {
    "list": (dict(A=[1.0]), TypeError, r"A is a list"),
    "int": (dict(A=S.long()), TypeError, r"A has dtype Long"),
    "odd": (dict(A=S[:, :3], B=S[:, :3]), ValueError, r"A has embeddings of 3 numbers; an even number is expected"),
    "1-d": (dict(A=S[0]), ValueError, r"A has shape \[4\]; expected \[B, 2k\]"),
    "shapes": (dict(B=S[:2]), ValueError, r"B has shape \[2, 4\]; A has shape \[3, 4\]"),
    "dtypes": (dict(B=S.double()), TypeError, r"B has dtype Double; that of A, Float"),
    "device": (dict(B=S.to("meta")), ValueError, r"B is on meta but A is on cpu"),
    "scales list": (dict(scales=[1.0]), TypeError, r"scales is a list"),
    "scales shape": (dict(scales=S), ValueError, r"scales has shape \[3, 4\]; expected \[3, 2\]"),
    "scales int": (dict(scales=S[:, :2].long()), TypeError, r"scales has dtype Long"),
}
LOSS = {
    "tau": (dict(tau=0.0), ValueError, r"tau is 0; it must be finite and positive"),
    "margin list": (dict(margin=[1.0]), TypeError, r"margin is a list"),
    "margin shape": (dict(margin=S), ValueError, r"margin has shape \[3, 4\]; expected \[3\]"),
    "reduction": (dict(reduction="max"), ValueError, r"reduction is 'max'"),
}
MEANS = {
    "list": (dict(v=[1.0]), TypeError, r"v is a list"),
    "2-d": (dict(v=S), ValueError, r"v has shape \[3, 4\]; expected \[B, K, 2k\]"),
    "odd": (dict(v=S[None, :, :3]), ValueError, r"v has embeddings of 3 numbers"),
    "none": (dict(v=S[None, :, :0]), ValueError, r"v has embeddings of 0 numbers"),
    "mask shape": (dict(mask=M), ValueError, r"mask has shape \[3, 4\]; expected \[1, 3\]"),
    "mask float": (dict(mask=S[None, :, 0]), TypeError, r"mask has dtype Float"),
    "scales shape": (dict(scales=S), ValueError, r"scales has shape \[3, 4\]; expected \[1, 2\]"),
    "tau": (dict(tau=-1.0), ValueError, r"tau is -1; it must be finite and positive"),
}


def cases(function, good, *tables, names=()):
    for name, (wrong, error, message) in itertools.chain(*(table.items() for table in tables)):
        arguments = {**good, **{dict(names).get(key, key): value for key, value in wrong.items()}}
        named = re.sub(r"(?<!\[)\b[AB]\b", lambda m: dict(names)[m[0]], message) if names else message
        yield pytest.param(function, arguments, error, named, id=f"{function.__name__}: {name}")


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        *cases(listwise_loss, {"scores": S, "labels": L, "kind": "lambda"}, SCORES, LISTS),
        *cases(group_preference_loss, {"scores": S, "is_winner": W}, SCORES, GROUPS),
        *cases(skew_score, {"v_i": S, "v_j": S}, EMBEDDINGS, names=[("A", "v_i"), ("B", "v_j")]),
        *cases(skew_loss, {"v_chosen": S, "v_rejected": S}, EMBEDDINGS, LOSS, names=[("A", "v_chosen"), ("B", "v_rejected")]),
        *cases(skew_row_means, {"v": S[None]}, MEANS),
    ],
)
def test_errors(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)


def test_labels_behind_the_mask_are_not_looked_at():
    labels, mask = L.clone(), M.clone()
    labels[1, 2], mask[1, 2] = 1e9, False
    assert listwise_loss(S, labels, mask, kind="lambda").loss.isfinite()


def test_the_ops_themselves_refuse_unknown_options():
    with pytest.raises(RuntimeError, match="kind is 8; accepted: 0 to 7"):
        OPS.listwise_loss(S, L, None, None, 8, 0, 0, False, 0, 1.0, 1.0, -1.0, -1.0, False)
    with pytest.raises(RuntimeError, match="scores has dtype BFloat16; accepted: float32"):
        OPS.listwise_loss(S.bfloat16(), L, None, None, 0, 0, 0, False, 0, 1.0, 1.0, -1.0, -1.0, False)
    with pytest.raises(RuntimeError, match="reduction is 3; accepted: 0, 1, 2"):
        OPS.group_preference_loss(S, W, None, None, 0, False, 3, 0.1, 1.0, -1.0, False)
    with pytest.raises(RuntimeError, match="reduction is 0; scores are not reduced"):
        OPS.skew_score(S, S, None, None, None, True, False, 0, 0.1, -1.0, 0)
    with pytest.raises(RuntimeError, match=r"expected \[\] or \[3\], and one element"):
        OPS.preference_rows_backward(S[0], S, S[0, 0])
    with pytest.raises(RuntimeError, match="g_loss and inverse have dtypes Double and Float"):
        OPS.preference_rows_backward(S[0, 0].double(), S, S[0, 0])
    with pytest.raises(ValueError, match="with_grad is False"):
        OPS.listwise_loss(S.clone().requires_grad_(), L, None, None, 0, 0, 0, False, 0, 1.0, 1.0, -1.0, -1.0, False)
    with pytest.raises(ValueError, match="needs is 0, but v_i requires a gradient"):
        OPS.skew_score(S.clone().requires_grad_(), S, None, None, None, True, True, 0, 0.1, -1.0, 0)


@only_cuda
def test_a_label_that_is_not_finite(device, validation):
    scores, labels = torch.randn(4, 5, device=device), torch.rand(4, 5, device=device)
    labels[2, 1] = NAN
    for kind in ("uniform", "plackett_luce", "lire"):
        out, gradient = value_and_gradient(listwise_loss, scores, labels, kind=kind, reduction="none")
        assert out.loss.isnan().tolist() == [False, False, True, False]
        assert torch.equal(gradient.isnan().any(1), out.loss.isnan())
    validation(True)
    with pytest.raises(ValueError, match=r"labels\[2, 1\] is nan"):
        listwise_loss(scores, labels, kind="uniform")
