"""GPM and GPO: the numbers of the preference model and of the policy's regression, selection, and a cycle that is learnt."""

import math

import pytest
import torch

from prefkern import skew_score
from prefkern.papers.gpm import gpm_loss, gpm_scales, gpm_scores, gpm_select, gpo_loss


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def unit(*degrees):
    angles = f64(*degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_loss_of_a_pair() -> None:
    chosen, rejected = f64([0.6, 0.8]).requires_grad_(), f64([0.8, -0.6])
    out = gpm_loss(chosen, rejected, normalize=False)
    close(out.loss.detach(), 10.0000454, 1e-7)
    close(out.metrics["prob"], 4.53978687e-05, 1e-13)
    close(torch.autograd.grad(out.loss, chosen)[0], [[5.999727613, 7.999636817]])
    close(torch.autograd.grad(gpm_loss(chosen, rejected).loss, chosen)[0], [[0.0, 0.0]], 1e-12)


def test_scaled_blocks() -> None:
    logits = f64([0.2, -0.1, 0.5]).requires_grad_()
    scales = gpm_scales(logits)
    close(scales.detach(), [[0.3235537039, 0.2396944792, 0.4367518169]], 1e-10)
    close(gpm_scales(logits.detach() * 8, kind="mean_one", temper=8.0), 3 * scales.detach(), 1e-12)
    chosen, rejected = f64([0.5, -0.2, 0.1, 0.4, -0.3, 0.7]), f64([0.2, 0.6, -0.5, 0.3, 0.1, 0.2]).requires_grad_()
    out = gpm_loss(chosen, rejected, scales=scales, normalize=False)
    close(out.loss.detach(), 0.2914556853)
    gradients = torch.autograd.grad(out.loss, (rejected, logits))
    close(gradients[0], [[-0.1636048503, -0.4090121257, 0.2424029082, -0.06060072704, 0.7729520685, 0.3312651722]])
    close(gradients[1].sum(), 0.0)  # of a softmax
    margin = gpm_loss(chosen, rejected, scales=scales, normalize=False, margin=f64(0.1083602533)).loss
    close(margin.detach(), math.log(2))


def test_scores_of_a_prompt_and_its_pair() -> None:
    v = unit(0, 30, 100, 200)[None]
    scores = gpm_scores(v)
    close(scores, [[2.856969024, 1.533351996, -2.349231552, -2.041089468]])
    close(gpm_scores(v, antisym_double=True), [[5.713938048, 3.066703992, -4.698463104, -4.082178937]])
    selected = gpm_select(scores)
    # The lowest mean is the third's: -2.349 lies below -2.041.
    assert (selected.chosen.item(), selected.rejected.item(), selected.keep.item()) == (0, 2, True)
    close(scores.sum(), 0.0, 1e-12)


def test_prompts_without_a_pair() -> None:
    v = torch.cat([unit(10, 20, 30)[None], unit(50, 50, 50)[None], unit(70, 80, 90)[None]])
    mask = torch.tensor([[True, True, True], [True, True, True], [False, True, False]])
    scores = gpm_scores(v, mask=mask)
    assert gpm_select(scores, mask).keep.tolist() == [True, False, False]
    assert scores[2].tolist() == [0, 0, 0] and gpm_select(scores, mask).chosen[2].item() == 1
    close(scores[0], gpm_scores(v[:1])[0], 1e-12)


def test_gpo() -> None:
    x, score = f64(3, -2).requires_grad_(), f64(0.4, -0.3).requires_grad_()
    out = gpo_loss(x, score, beta=0.1)
    close(out.loss.detach(), 1.0)
    gradients = torch.autograd.grad(out.loss, (x, score), allow_unused=True)
    close(gradients[0], [-1.0, 1.0])
    assert gradients[1] is None
    close(out.metrics["residual"], 1.0)
    close(gpo_loss(x, score, beta=0.1, log_z=0.1).loss.detach(), 2.0)  # targets 3 and -4
    close(gpo_loss(x, score, beta=0.1, clamp=3.5).loss.detach(), 0.625)
    at = gpo_loss(f64(4, -3).requires_grad_(), score, beta=0.1)
    assert at.loss.item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0.0}, "beta is 0.0; it must be positive"), ({"clamp": -1.0}, "clamp is -1.0; it must be positive, or None")],
)
def test_refusals_of_gpo(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        gpo_loss(f64(1.0), f64(1.0), **options)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"score has shape \[1\]; that of logratio, \[2\]"):
        gpo_loss(f64(1, 2), f64(1))
    with pytest.raises(ValueError, match="temper is 0; it must be positive"):
        gpm_scales(f64([1.0]), temper=0)
    with pytest.raises(ValueError, match="kind is 'one'; accepted: 'softmax', 'mean_one'"):
        gpm_scales(f64([1.0]), kind="one")
    with pytest.raises(ValueError, match="v_chosen has embeddings of 3 numbers"):
        gpm_loss(torch.ones(1, 3), torch.ones(1, 3))


def test_a_cycle_is_learnt() -> None:
    """Two dimensions order a cycle of three rightly; a reward, (r, 1), at most two of its three pairs."""
    wins, loses = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    embeddings = torch.randn(3, 2, requires_grad=True)
    reward = torch.randn(3, 1, requires_grad=True)
    optimizer = torch.optim.Adam([embeddings, reward], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        of_reward = torch.cat([reward, torch.ones(3, 1)], 1)
        loss = gpm_loss(embeddings[wins], embeddings[loses]).loss
        loss = loss + gpm_loss(of_reward[wins], of_reward[loses], tau=1.0, normalize=False).loss
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        of_reward = torch.cat([reward, torch.ones(3, 1)], 1)
        assert (skew_score(embeddings[wins], embeddings[loses]) > 0).all()
        assert (skew_score(of_reward[wins], of_reward[loses], normalize=False) > 0).sum() <= 2
