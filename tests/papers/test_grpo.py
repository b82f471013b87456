"""Papers are compositions: each is held to its equation in float64."""

import torch
from torch.testing import assert_close

from prefkern import reference
from prefkern.papers import grpo


def test_grpo_advantages_are_those_of_the_paper() -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0.5, 1], dtype=torch.float64)
    a = grpo.advantages(rewards, torch.arange(8) // 4).advantages
    assert_close(
        a, torch.tensor([1.4999970, *[-0.4999990] * 3, 0.4999980, 0.4999980, -1.4999940, 0.4999980]).double(), rtol=0, atol=5e-8
    )


def test_grpo_loss_averages_over_tokens_then_completions() -> None:
    torch.manual_seed(0)
    logp, old, ref = (-torch.rand(3, 5, dtype=torch.float64) for _ in range(3))
    logp.requires_grad_()
    a = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    loss, _ = grpo.loss(logp, old, a, mask, ref_logp=ref, beta=0.04)

    rho, x = torch.exp(logp - old), ref - logp
    surrogate = torch.minimum(rho * a[:, None], rho.clamp(0.8, 1.2) * a[:, None])
    token = -surrogate + 0.04 * (torch.exp(x) - x - 1)
    expected = ((token * mask).sum(1) / mask.sum(1)).mean()
    assert_close(loss, expected, rtol=1e-7, atol=0)  # the paper has no 1e-8 in the denominator
    assert_close(*(torch.autograd.grad(value, logp)[0] for value in (loss, expected)), rtol=1e-7, atol=1e-12)
    exactly = reference.policy_loss(logp, old, a, mask, agg="seq-mean-token-mean", ref_logp=ref, beta=0.04)
    assert_close(loss, exactly.loss, rtol=1e-12, atol=0)
