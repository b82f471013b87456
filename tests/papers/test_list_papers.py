"""Plackett-Luce, LiPO-lambda, RRHF and LIRE: their numbers, how they are related, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from prefkern.papers.lipo import lipo_loss
from prefkern.papers.lire import lire_loss
from prefkern.papers.plackett_luce import plackett_luce_loss
from prefkern.papers.rrhf import rrhf_loss


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def test_plackett_luce() -> None:
    x, mask = f64([2, 1, 0], [0.5, 1.5, float("nan")]), torch.tensor([[True] * 3, [True, True, False]])
    close(plackett_luce_loss(x, mask=mask, beta=1.0, reduction="none").loss, [0.7208676520, 1.3132616875])
    shuffled = plackett_luce_loss(x[:1, [2, 0, 1]], f64([0, 9, 5]), beta=1.0).loss
    close(shuffled, 0.7208676520)


def test_two_responses_are_dpo() -> None:
    """beta 0.1, log-ratios of two pairs."""
    x = f64([1, -0.5], [-0.5, 1]).requires_grad_()
    out = plackett_luce_loss(x)
    close(out.loss.detach(), (0.6209570478 + 0.7709570478) / 2)
    close(gradient(out.loss, x)[:, 0], [-0.0462570155 / 2, -0.0537429845 / 2])


def test_equal_labels_are_not_compared() -> None:
    x = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    out = plackett_luce_loss(x, torch.ones(1, 4))
    assert out.loss.item() == 0 and not gradient(out.loss, x).any() and out.metrics["lists"].item() == 0
    tied = plackett_luce_loss(x, f64([1, 1, 0, 0]), beta=1.0).loss
    below = torch.logsumexp(x[0, 2:], 0)
    close(tied.detach(), (F.softplus(below - x[0, 0]) + F.softplus(below - x[0, 1])).detach())


def test_lipo() -> None:
    x, labels = f64([2, -1, 0.5]).requires_grad_(), f64([1, 2, 0])
    out = lipo_loss(x, labels, beta=1.0)
    close(out.loss.detach(), 5.4695740958, 1e-10)
    close(gradient(out.loss, x).sum(), 0.0)
    close(lipo_loss(x, labels, beta=1.0, normalize="pairs").loss.detach(), 5.4695740958 / 3, 1e-10)
    weighted = 0.0  # by hand: ranks by score are 1, 3, 2
    rank = torch.log1p(f64(1, 3, 2))
    for i, j in ((1, 0), (1, 2), (0, 2)):
        weight = abs(2 ** labels[0, i] - 2 ** labels[0, j]) * abs(1 / rank[i] - 1 / rank[j])
        weighted += weight * F.softplus(x[0, j] - x[0, i])
    close(gradient(lipo_loss(x, labels, beta=1.0).loss, x), gradient(weighted, x))
    with pytest.raises(ValueError, match=r"labels\[0, 0\] is 100; gain 'exp2' takes finite labels up to 30"):
        lipo_loss(x, labels * 100, beta=1.0)


def test_rrhf() -> None:
    a, rewards = f64([-1, -0.5, -2]).requires_grad_(), f64([3, 1, 2])
    out = rrhf_loss(a, rewards)
    close(out.loss.detach(), 3.0)
    close(out.metrics["ranking"], 2.0)
    close(out.metrics["nll"], 1.0)
    close(gradient(out.loss, a), [[-2.0, 2.0, -1.0]])
    close(rrhf_loss(a, rewards, nll_coef=0.5).loss.detach(), 2.5)
    close(rrhf_loss(a, rewards, lengths=torch.tensor([[7, 5, 6]])).loss.detach(), 9.0)


def test_rrhf_of_ragged_prompts() -> None:
    """One prompt with equal rewards has only the second term, one without responses does not count."""
    a = f64([-1, -2, float("nan")], [-3, -4, -5], [-1, -1, -1]).requires_grad_()
    rewards = f64([1, 1, 9], [2, 0, 1], [1, 2, 3])
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    out = rrhf_loss(a, rewards, mask)
    close(out.loss.detach(), (1.0 + (3.0 + 0.0)) / 2 + 1.0 / 2)  # in the second -4 lies above -5, the other pairs in order
    assert gradient(out.loss, a)[~mask].eq(0).all() and out.metrics["lists"].item() == 1
    empty = rrhf_loss(a, rewards, torch.zeros_like(mask))
    assert empty.loss.item() == 0 and not gradient(empty.loss, a).any()
    with pytest.raises(ValueError, match=r"lengths has shape \[3\]; \[3, 3\] is expected"):
        rrhf_loss(a, rewards, mask, lengths=torch.ones(3))


def test_lire() -> None:
    logp, rewards = f64([0, 1, -1]).requires_grad_(), f64([1, 0.5, 0])
    out = lire_loss(logp, rewards)
    close(out.loss.detach(), -0.5773489489, 1e-10)
    p = logp.detach().softmax(1)
    close(gradient(out.loss, logp), -p * (rewards - 0.5773489489))
    close(lire_loss(logp, rewards, temperature=2.0).loss.detach(), -((logp / 2).softmax(1) * rewards).sum().detach())
    moved = lire_loss(logp, rewards + 5)
    close(moved.loss.detach(), -5.5773489489, 1e-10)
    close(gradient(moved.loss, logp), -p * (rewards - 0.5773489489))
    with pytest.raises(ValueError, match=r"temperature is 0; it must be positive"):
        lire_loss(logp, rewards, temperature=0)


@pytest.mark.parametrize("loss", [plackett_luce_loss, lipo_loss, rrhf_loss, lire_loss])
def test_labels_are_constants_and_one_response_is_no_list(loss) -> None:
    x, labels = torch.randn(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    grads = torch.autograd.grad(loss(x, labels).loss, (x, labels), allow_unused=True)
    assert grads[0].any() and grads[1] is None
    one = loss(x[:, :1], labels[:, :1])
    assert one.metrics["lists"].item() == 0 and one.loss.item() == (0 if loss is not rrhf_loss else -x[:, 0].mean().item())
