"""GEPO: its numbers, its terms, and what OORL adds them to."""

import pytest
import torch
import torch.nn.functional as F

from prefkern.papers.gepo import gepo_loss, oorl_loss

RHAT = torch.tensor([[0.6, 0.2, -0.4, -0.1], [1, 0.3, 0.5, -0.2]], dtype=torch.float64)
WINNER = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 0.7208944233), ({"ddof": 1}, 0.76256109), ({"var_scale": "reward"}, 0.6581944233)],
    ids=["ddof 0", "ddof 1", "reward"],
)
def test_loss(options, expected) -> None:
    close(gepo_loss(RHAT, WINNER, **options).loss, expected)


def test_gradient_and_terms() -> None:
    leaf = RHAT.clone().requires_grad_()
    out = gepo_loss(leaf, WINNER)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    close(gradient[0], [0.08790610703, -0.112093893, 0.01209389297, 0.01209389297])
    close(gradient[1], [0.1253331557, -0.1080001777, -0.041333511, 0.02400053299])
    means = torch.tensor([0.4 + 0.25, 0.6 + 0.2], dtype=torch.float64)
    close(out.metrics["preference"], -F.logsigmoid(0.1 * means).mean().item())
    variance = (RHAT[0, :2].var(correction=0) + RHAT[1, :3].var(correction=0)) / 2
    close(out.metrics["variance"], variance.item())
    close(out.loss.detach(), (out.metrics["preference"] + out.metrics["variance"]).item())


def test_oorl() -> None:
    close(oorl_loss(torch.tensor(0.2, dtype=torch.float64), gepo_loss(RHAT, WINNER).loss), 0.2072089442)
    close(oorl_loss(torch.tensor(2.0), torch.tensor(3.0), w_rl=0.5, w_gepo=1.0), 4.0, 1e-6)


def test_without_penalty_only_the_means_count() -> None:
    """lam = 0: the multi-sample mDPO; with one of each, DPO whatever lam and ddof are."""
    spread = RHAT + torch.tensor([[1, -1, 2, -2], [1, 1, -2, 0]])
    close(gepo_loss(spread, WINNER, lam=0.0).loss, gepo_loss(RHAT, WINNER, lam=0.0).loss.item())
    pair = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    for ddof in (0, 1):
        out = gepo_loss(pair, torch.tensor([[True, False]] * 2), ddof=ddof, lam=3.0)
        close(out.loss, (0.6209570478 + 0.7709570478) / 2)
        assert out.metrics["variance"].item() == 0


def test_prompts_left_out() -> None:
    rhat = torch.cat([RHAT, torch.full((2, 4), float("nan"), dtype=torch.float64)])
    mask = torch.tensor([[True] * 4, [True] * 4, [False] * 4, [True] * 4])
    winner = torch.cat([WINNER, torch.ones(2, 4, dtype=torch.bool)])
    leaf = rhat.clone().requires_grad_()
    out = gepo_loss(leaf, winner, mask)
    close(out.loss.detach(), 0.7208944233)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert out.metrics["rows"].item() == 2 and gradient[2:].eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lam": -1.0}, "lam is -1; it must be finite and not negative"), ({"beta": 0.0}, "beta is 0"), ({"ddof": 2}, "ddof is 2"),
     ({"var_scale": "log"}, "var_scale is 'log'; accepted: 'logratio', 'reward'")],
)  # fmt: skip
def test_refusals(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        gepo_loss(RHAT, WINNER, **options)
