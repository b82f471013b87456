"""Self-supervised SPO: key words, views, the loss on them, its definition, and edge cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers.spo_self import degree_loss, degree_views, distinct_views, rake_scores, spo_loss, view_features

F64, NAN = torch.float64, math.nan
WORDS = ["deep", "neural", "networks", "and", "deep", "learning", "for", "the", "web"]
SCORES = [2.5, 3, 3, 0, 2.5, 2, 0, 0, 1]


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-9):
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def test_rake() -> None:
    assert rake_scores(WORDS, {"and", "for", "the"}) == SCORES
    assert rake_scores(["Deep", "DEEP", ",", "deep"], {"THE"}) == [5 / 3, 5 / 3, 0, 5 / 3]  # 2 + 2 + 1, three times
    assert rake_scores(["...", "the"], ["the"]) == [0, 0] and rake_scores([], []) == []
    assert rake_scores(["a", "b"], []) == [2, 2]
    with pytest.raises(TypeError, match="words is a str"):
        rake_scores("deep learning", [])


def test_views() -> None:
    keep = degree_views(SCORES, [0, 0.5, 1])
    assert keep.int().tolist() == [[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 1, 1, 0]]
    assert degree_views(SCORES).shape == (4, 9)  # 0, 1/4, 1/2, 1
    assert torch.equal(degree_views(f64(*SCORES), [0, 0.5, 1]), keep)
    assert degree_views([1.0, 1.0, 1.0], [0, 1 / 3]).int().tolist() == [[1, 1, 1], [0, 1, 1]]  # of equal ones the first
    assert degree_views([1.0, 2.0, 3.0], [0, 1]).int().tolist() == [[1, 1, 1], [1, 0, 0]]  # the last to go stays
    assert degree_views([0.0, 0.0], [0, 1]).all()
    assert degree_views([], [0, 1]).shape == (2, 0)
    tenths = degree_views(torch.ones(10), [0, 0.1, 0.3, 0.7])  # 0.7 * 10 is 7, not 8
    assert tenths.sum(1).tolist() == [10, 9, 7, 3]


def test_views_of_a_batch() -> None:
    scores = torch.tensor([[5.0, *SCORES, 9.0], [*SCORES, 7.0, 7.0]])
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 1:10], mask[1, :9] = True, True
    keep = degree_views(scores, [0, 0.5, 1], mask)
    alone = degree_views(SCORES, [0, 0.5, 1])
    assert torch.equal(keep[0, :, 1:10], alone) and torch.equal(keep[1, :, :9], alone)
    assert not keep[~mask[:, None].expand_as(keep)].any()


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0]), min_size=1, max_size=20), st.integers(1, 8))
def test_views_are_nested(scores, count) -> None:
    keep = degree_views(scores, [k / count for k in range(count + 1)])
    assert keep[0].all() and keep.any(1).all()
    assert not (keep[1:] & ~keep[:-1]).any()
    assert keep[:, torch.tensor(scores) == 0].all()
    n = sum(s > 0 for s in scores)
    for k in range(count + 1):
        assert (~keep[k]).sum().item() == min(math.ceil(k / count * n - 1e-12), len(scores) - 1)


def test_views_that_differ() -> None:
    keep = torch.tensor([[[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]], [[1, 1, 1]] * 4]).bool()
    assert distinct_views(keep).int().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]  # no key words: nothing to tell apart
    assert distinct_views(keep[0]).int().tolist() == [1, 0, 1, 0]
    assert distinct_views(keep[:, :1]).int().tolist() == [[0], [0]]


HIDDEN = f64([[1, 0], [0, 1]], [[2, -1], [0.5, 0.5]])
KEEP = torch.tensor([[1, 1], [1, 0]]).bool()
HEAD, BIAS, LABELS = f64([0.5, -0.5], [0, 1]), f64(0.1, -0.1), torch.tensor([0, 1])


def with_gradients(hidden, keep, head, bias, labels, **options):
    leaves = [t.clone().requires_grad_() for t in (hidden, head, bias)]
    loss = degree_loss(leaves[0], keep, leaves[1], leaves[2], labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def test_worked_loss() -> None:
    loss, hidden, head, bias = with_gradients(HIDDEN, KEEP, HEAD, BIAS, LABELS)
    close(loss, 1.8096994031)
    close(bias, [0.1812920636, -0.1812920636])
    close(head, [[0.7934160147, -0.6121239512], [-0.7934160147, 0.6121239512]])
    close(hidden[0], [[-0.0718053146, 0.2154159438]] * 2)
    close(hidden[1], [[0.2342566610, -0.7027699830], [0, 0]])


def test_dropped_tokens_are_never_looked_at() -> None:
    hidden = HIDDEN.clone()
    hidden[1, 1] = NAN
    out = with_gradients(hidden, KEEP, HEAD, BIAS, LABELS)
    assert all(torch.equal(a, b) for a, b in zip(out, with_gradients(HIDDEN, KEEP, HEAD, BIAS, LABELS), strict=True))


@given(st.integers(0, 2**31))
def test_one_pass_pools_what_a_pass_per_view_would(seed) -> None:
    """Pooling the full text under every mask: the means, and the gradient of the loss."""
    torch.manual_seed(seed)
    hidden, scores = torch.randn(3, 12, 5, dtype=F64), torch.randint(0, 4, (3, 12)).double()
    mask = torch.rand(3, 12) < 0.8
    mask[:, 0] = True
    keep = degree_views(scores, mask=mask)
    expected = (hidden[:, None] * keep[..., None]).sum(2) / keep.sum(2, keepdim=True)
    close(view_features(hidden, keep), expected, 1e-12)
    head, bias, labels = torch.randn(4, 5, dtype=F64), torch.randn(4, dtype=F64), torch.arange(4).expand(3, 4)
    valid = distinct_views(keep)
    one = with_gradients(hidden, keep, head, bias, labels, valid=valid)
    leaf = hidden.clone().requires_grad_()
    copies = leaf[:, None].expand(3, 4, 12, 5).reshape(12, 12, 5)
    loss = degree_loss(copies, keep.view(12, 12), head, bias, labels.reshape(-1), valid=valid.view(-1))
    close(one[0], loss.detach(), 1e-12)
    close(one[1], torch.autograd.grad(loss, leaf)[0], 1e-12)
    each = F.cross_entropy((expected @ head.T + bias).view(12, 4), labels.reshape(-1), reduction="none")
    count = valid.sum().clamp_min(1)
    close(one[0], (each * valid.view(-1)).sum() / count, 1e-12)
    close(one[3].sum(), 0.0, 1e-12)
    assert not one[1][~keep.any(1)].any()


def test_what_does_not_count() -> None:
    loss, hidden, _, _ = with_gradients(HIDDEN, KEEP, HEAD, BIAS, LABELS, valid=torch.tensor([True, False]))
    close(loss, F.cross_entropy(f64([0.1, 0.4]), torch.tensor([0])))
    assert not hidden[1].any()
    loss, hidden, _, bias = with_gradients(HIDDEN, KEEP, HEAD, BIAS, LABELS, valid=torch.zeros(2, dtype=torch.bool))
    assert loss == 0 and not hidden.any() and not bias.any()
    one_class = with_gradients(HIDDEN, KEEP, HEAD[:1], BIAS[:1], torch.zeros(2).long())
    assert one_class[0] == 0 and not one_class[2].any()  # K = 1


def test_low_precision_hidden_states() -> None:
    leaf = HIDDEN.bfloat16().requires_grad_()
    loss = degree_loss(leaf, KEEP, HEAD.float(), None, LABELS)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    close(loss.double().detach(), degree_loss(HIDDEN, KEEP, HEAD, None, LABELS), 1e-6)


def test_the_sum_of_losses() -> None:
    align, chosen, rejected = f64(0.7).sum(), f64(1.0).sum(), f64(3.0).sum()
    close(spo_loss(align, chosen, rejected), 0.7 + 0.1 * 4)
    close(spo_loss(align, chosen, gamma=0.5), 1.2)
    assert spo_loss(align, f64(NAN).sum(), gamma=0) is align
    with pytest.raises(ValueError, match=r"gamma is -1\.0; it must not be negative"):
        spo_loss(align, chosen, gamma=-1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: degree_views(SCORES, [0, 1.5]), ValueError, r"fractions has 1\.5; it must lie in \[0, 1\]"),
        (lambda: degree_views(SCORES, [0, -0.5]), ValueError, r"fractions has -0\.5 behind 0|fractions has -0\.5; it must"),
        (lambda: degree_views(SCORES, [0.5, 0.5]), ValueError, r"fractions has 0\.5 behind 0\.5; they must ascend"),
        (lambda: degree_views(SCORES, []), ValueError, "fractions is empty"),
        (lambda: degree_views(torch.zeros(1, 2, 3)), ValueError, r"scores has shape \[1, 2, 3\]"),
        (lambda: degree_views(SCORES, mask=KEEP), ValueError, r"mask has shape \[2, 2\]; scores has shape \[9\]"),
        (lambda: view_features(HIDDEN, KEEP), ValueError, r"keep has shape \[2, 2\]; \[B, K, T\] is expected"),
        (lambda: view_features(HIDDEN[:1], ~KEEP[None]), ValueError, "keep has a token that comes back"),
        (lambda: degree_loss(HIDDEN, KEEP, HEAD, BIAS, LABELS[:1]), ValueError, r"labels has shape \[1\]; keep has shape"),
        (lambda: degree_loss(HIDDEN, KEEP, HEAD, BIAS, LABELS, valid=KEEP), ValueError, r"valid has shape \[2, 2\]"),
        (lambda: degree_loss(HIDDEN, KEEP, [[1.0]], BIAS, LABELS), TypeError, "head_weight is a list"),
        (lambda: degree_loss(HIDDEN * NAN, KEEP, HEAD, BIAS, LABELS), ValueError, r"features\[0\] is \[nan, nan\]"),
        (
            lambda: degree_loss(HIDDEN, KEEP & False, HEAD, BIAS, LABELS), ValueError,
            r"keep\[0\] is False; every view that counts keeps a token",
        ),
    ],
)  # fmt: skip
def test_refusals(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
