"""TPO on trees: steps, weights, rewards and losses against the numbers worked out for them."""

import pytest
import torch
import torch.nn.functional as F

from prefkern.papers.tpo_tree import align_steps, published_losses, step_cosine_weights, step_means, step_rewards, tpo_loss

NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


HIDDEN = f64([[[1, 0], [0, 1], [1, 1], [2, 0]], [[1, 0], [1, 0], [0, 2], [0, 0]]])
STEPS = torch.tensor([[[1, 1, 2, 2], [1, 2, 2, 0]]])
RHO, LABELS = f64([[0.2, 0.4, -0.1, 0.3], [0.1, -0.2, -0.6, 9]]), f64([1, 0])


def of_rewards(rewards, labels, **options):
    """One token, one step: the reward is the log-ratio."""
    leaf = rewards[..., None].clone().requires_grad_()
    out = tpo_loss(leaf, torch.ones(leaf.shape, dtype=torch.int64), labels, **options)
    return out, torch.autograd.grad(out.loss, leaf)[0][..., 0]


def test_list_losses() -> None:
    rewards, labels = f64([0.3, -0.1, 0.2]), f64([1, 0.5, 0])
    out, gradient = of_rewards(rewards, labels)
    close(out.loss.detach(), 0.2430250969, 1e-10)
    close(gradient, [[-0.08201133316, 0.01639331399, 0.06561801917]], 1e-10)
    close(out.metrics["reward"], 0.4 / 3)
    total, _ = of_rewards(rewards, labels, normalize="sum")
    close(total.loss.detach(), 3 * 0.2430250969)
    out, gradient = of_rewards(rewards, labels, weighting="uniform")
    close(out.loss.detach(), 0.6791851884, 1e-10)
    close(gradient, [[-0.156278101, -0.01454397378, 0.1708220748]])


def test_steps_weights_and_rewards() -> None:
    weights = step_cosine_weights(HIDDEN.requires_grad_(), STEPS)
    close(weights, [[[2, 2], [1.707106781, 1.707106781]]])
    assert not weights.requires_grad
    close(step_rewards(RHO, STEPS, weights), [[0.2, -0.15]])
    leaf = RHO.clone().requires_grad_()
    out = tpo_loss(leaf, STEPS, LABELS, step_weights=weights)
    close(out.loss.detach(), 0.3245160744)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    # Each step weighs the same here, and each token by the length of its step; none for the prompt's.
    share = f64([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0]])
    close(gradient, gradient.sum(2, keepdim=True) * share, 1e-12)
    close(gradient.sum(), 0.0, 1e-12)


def test_surplus_steps_merge_into_the_last_common_one() -> None:
    ids = torch.tensor([[[1, 2, 3, 4, 0], [1, 1, 2, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 3, 3]]])
    assert align_steps(ids).tolist() == [[[1, 2, 2, 2, 0], [1, 1, 2, 0, 0], [0] * 5, [1, 2, 2, 2, 2]]]
    mask = torch.tensor([[True, False, True, True]])
    assert align_steps(ids, mask)[0, 0].tolist() == [1, 2, 3, 3, 0]


def test_means_of_steps() -> None:
    means, there = step_means(RHO, STEPS, 3)
    close(means, [[[0.3, 0.1, 0], [0.1, -0.4, 0]]], 1e-12)
    assert there.tolist() == [[[True, True, False]] * 2]
    of_hidden, _ = step_means(HIDDEN, STEPS, 2)
    close(of_hidden.detach(), [[[[0.5, 0.5], [1.5, 0.5]], [[1, 0], [0.5, 1]]]])


def test_absent_steps_and_vectors_of_zeros() -> None:
    """A step that the response or the gold one lacks has weight 0; without any weight the reward is 0; cosine 0 for zeros."""
    ids = torch.tensor([[[1, 2, 3], [2, 2, 3], [1, 1, 3]]])
    weights = step_cosine_weights(torch.ones(1, 3, 3, 2), ids)
    close(weights, [[[2, 2, 2], [0, 2, 2], [2, 0, 2]]], 1e-6)
    zeros = step_cosine_weights(torch.zeros(1, 3, 3, 2), ids)
    assert zeros.tolist() == [[[1, 1, 1], [0, 1, 1], [1, 0, 1]]]
    assert step_rewards(torch.ones(1, 3, 3), ids, torch.zeros(1, 3, 3)).tolist() == [[0, 0, 0]]
    against = step_cosine_weights(torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 3, 2), ids)
    close(against[0, 1], [0, 0, 0], 1e-6)
    assert step_cosine_weights(torch.ones(1, 3, 3, 2), ids, ref_row=1)[0, 0].tolist()[0] == 0


def test_prompt_and_padding_never_matter() -> None:
    moved = RHO.clone()
    moved[0, 1, 3] = NAN
    clean = tpo_loss(RHO, STEPS, LABELS)
    leaf = moved.requires_grad_()
    out = tpo_loss(leaf, STEPS, LABELS)
    assert torch.equal(out.loss.detach(), clean.loss)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert gradient[0, 1, 3].item() == 0 and gradient.isfinite().all()


def test_responses_that_are_no_part_of_the_list() -> None:
    """Without tokens, with a label that is NaN, or outside the mask: as if they were not there."""
    rho, ids = torch.randn(1, 5, 4, dtype=torch.float64), torch.tensor([1, 1, 2, 2]).expand(1, 5, 4).clone()
    ids[0, 2] = 0
    labels, mask = f64([1, 0.2, 0.4, NAN, 0.6]), torch.tensor([[True, True, True, True, False]])
    ids[0, 4] = 1  # would merge all steps of the prompt into one
    out = tpo_loss(rho, ids, labels, mask=mask)
    alone = tpo_loss(rho[:, :2], ids[:, :2], labels[:, :2])
    close(out.loss, alone.loss.item(), 1e-15)
    assert out.metrics["items"].item() == 2


def test_no_pair_has_no_loss() -> None:
    for labels in (f64([0.5, 0.5, 0.5]), f64([1, NAN, NAN])):
        out, gradient = of_rewards(f64([0.3, -0.1, 0.2]), labels)
        assert out.loss.item() == 0 and not gradient.any()


def test_two_responses_are_dpo() -> None:
    rewards = torch.randn(4, 2, dtype=torch.float64)
    out, _ = of_rewards(rewards, f64([1, 0]).expand(4, 2), weighting="uniform")
    close(out.loss.detach(), -F.logsigmoid(0.5 * (rewards[:, 0] - rewards[:, 1])).mean(), 1e-12)


def test_properties() -> None:
    """A constant added to all rewards changes nothing; the order of the rows does not matter."""
    rewards, labels = torch.randn(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    out, gradient = of_rewards(rewards, labels)
    shifted, moved = of_rewards(rewards + 3, labels)
    close(shifted.loss.detach(), out.loss.detach(), 1e-12)
    close(moved, gradient, 1e-12)
    order = torch.randperm(5)
    permuted, moved = of_rewards(rewards[:, order], labels[:, order])
    close(permuted.loss.detach(), out.loss.detach(), 1e-12)
    close(moved, gradient[:, order], 1e-12)
    close(gradient.sum(1), torch.zeros(2), 1e-12)


def test_labels_far_outside() -> None:
    rewards, labels = f64([0.3, -0.1, 0.2]), f64([100, 0, -100])
    with pytest.raises(ValueError, match=r"labels\[0, 0\] is 100; gain 'exp2' takes finite labels up to 30"):
        of_rewards(rewards, labels)
    close(of_rewards(rewards, labels, scale_labels=True)[0].loss.detach(), 0.2430250969)
    linear, _ = of_rewards(rewards, labels / 100, gain="linear")
    assert linear.loss.isfinite() and linear.loss > 0
    assert of_rewards(rewards, f64([7, 7, 7]), scale_labels=True)[0].loss.item() == 0


def test_the_released_losses_point_the_wrong_way() -> None:
    labels = f64([1, 0.5, 0])
    rewards = f64([0.3, -0.1, 0.2]).requires_grad_()
    lists, total = published_losses(rewards, labels)
    close(lists.detach(), [1.017162643])
    close(total.detach(), [0.470845833])
    assert torch.autograd.grad(total.sum(), rewards)[0][0, 0] > 0  # descent lowers the best response's reward
    close(published_losses(f64([-0.1, 0.3, 0.2]), labels)[1], [0.4463289207])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"step_ids has shape \[1, 2, 3\]; \[1, 2, 4\] is expected"):
        tpo_loss(RHO, STEPS[..., :3], LABELS)
    with pytest.raises(TypeError, match=r"step_ids has dtype torch\.float32; int64 or int32"):
        tpo_loss(RHO, STEPS.float(), LABELS)
    with pytest.raises(ValueError, match="step_ids has -1; steps begin at 1"):
        tpo_loss(RHO, STEPS - 1, LABELS)
    with pytest.raises(ValueError, match=r"labels has shape \[1, 3\]; \[1, 2\] is expected"):
        tpo_loss(RHO, STEPS, f64([1, 2, 3]))
    with pytest.raises(ValueError, match="weighting is 'lamda'; accepted: 'lambda', 'uniform'"):
        tpo_loss(RHO, STEPS, LABELS, weighting="lamda")
    with pytest.raises(ValueError, match="steps is None"):
        tpo_loss(RHO.to("meta"), STEPS.to("meta"), LABELS.to("meta"))
    close(tpo_loss(RHO, STEPS, LABELS, steps=7).loss, tpo_loss(RHO, STEPS, LABELS).loss.item(), 1e-15)
