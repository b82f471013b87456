"""Accelerated preference optimisation: worked iterations, the closed form, the three spaces, the anchored loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from prefkern.papers import apo_accel

F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-9) -> None:
    assert_close(actual, vector(*expected), rtol=0, atol=atol)


UNIFORM = torch.full((3,), -math.log(3), dtype=F64)
REWARD = vector(1, 0.5, 0)


def test_worked_iterations() -> None:
    policies, ahead = apo_accel.apo_tabular(UNIFORM, REWARD, beta=1, alpha=0.3, steps=2)
    assert policies.shape == ahead.shape == (3, 3) and policies[0].equal(ahead[0])
    close(policies[1], [-0.6802696706, -1.180269671, -1.680269671])
    close(ahead[1], [-0.5847696571, -1.234769657, -1.884769657])
    close(policies[2], [-0.3484682905, -1.49846829, -2.64846829])


def test_worked_coefficients() -> None:
    """log pi_t = log pi_0 + c_t r / beta + const, so log pi_t[0] - log pi_t[2] is c_t here."""
    policies, ahead = apo_accel.apo_tabular(UNIFORM, REWARD, beta=1, alpha=0.3, steps=4)
    close(policies[:, 0] - policies[:, 2], [0, 1, 2.3, 3.69, 5.107], 1e-12)
    close(ahead[:, 0] - ahead[:, 2], [0, 1.3, 2.69, 4.107, 5.5321], 1e-12)


def test_worked_extrapolations() -> None:
    new, old = vector(0.6, 0.3, 0.1).log(), vector(0.4, 0.4, 0.2).log()
    close(apo_accel.extrapolate(new, old, alpha=0.5, space="policy"), [-0.3714107416, -1.411131512, -2.712476355])
    (weights,) = apo_accel.extrapolate([vector(1, 2)], [vector(0.5, 3)], alpha=0.1)
    close(weights, [1.05, 1.9], 1e-15)
    close(apo_accel.extrapolate(vector(1, 2), vector(0.5, 3), alpha=0.1, space="logits"), [1.05, 1.9], 1e-15)


def test_worked_loss() -> None:
    logps = [vector(-9, -7), vector(-11, -6.5), vector(-10, -7.2), vector(-10.5, -7)]
    for logp in logps:
        logp.requires_grad_()
    loss, metrics = apo_accel.apo_dpo_loss(*logps, beta=0.1)
    assert_close(loss.detach(), vector(0.6646083621)[0], rtol=0, atol=1e-10)
    loss.backward()
    close(logps[0].grad, [-0.02312850773, -0.02537497188], 1e-11)
    assert logps[1].grad.equal(-logps[0].grad)
    assert logps[2].grad is None and logps[3].grad is None and metrics["pairs"] == 2


@given(st.integers(0, 10_000), st.floats(0, 0.95), st.floats(0.1, 10))
def test_properties(seed, alpha, beta) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, reward = torch.randn(2, 3, 6, dtype=F64, generator=generator)
    policies, ahead = apo_accel.apo_tabular(start, reward, beta=beta, alpha=alpha, steps=5)
    for logp in (policies, ahead):
        assert_close(logp.exp().sum(-1), torch.ones(6, 3, dtype=F64), rtol=0, atol=1e-12)
    shifted = apo_accel.apo_tabular(start + 3, reward - 2, beta=beta, alpha=alpha, steps=5)
    assert_close(shifted[0], policies, rtol=0, atol=1e-9)
    same = apo_accel.extrapolate_policy(policies[1], policies[1], alpha)
    assert_close(same, policies[1], rtol=0, atol=1e-12)
    for t in range(5):
        assert_close(policies[t + 1], torch.log_softmax(ahead[t] + reward / beta, -1), rtol=0, atol=1e-12)
        mix = policies[t + 1] + alpha * (policies[t + 1] - policies[t])
        assert_close(ahead[t + 1], torch.log_softmax(mix, -1), rtol=0, atol=1e-12)


def test_no_momentum_is_iterated_dpo() -> None:
    policies, ahead = apo_accel.apo_tabular(UNIFORM, REWARD, beta=2, alpha=0, steps=6)
    assert_close(ahead, policies, rtol=0, atol=1e-14)
    steps = torch.arange(7, dtype=F64)[:, None]
    assert_close(policies, torch.log_softmax(steps * REWARD / 2, -1), rtol=0, atol=1e-13)


def test_momentum_is_ahead_by_its_larger_step() -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(20, dtype=F64, generator=generator)

    def regret(alpha, beta=2.0):
        policies, _ = apo_accel.apo_tabular(torch.zeros(20, dtype=F64), reward, beta=beta, alpha=alpha, steps=400)
        return reward.max() - (policies.exp() * reward).sum(-1)

    plain, fast = regret(0.0), regret(0.6)
    assert (fast[2:200] < plain[2:200]).all() and fast[1] == plain[1]
    slopes = [(regret(alpha)[250] / regret(alpha)[300]).log() for alpha in (0.0, 0.3)]
    assert slopes[1] / slopes[0] == pytest.approx(1 / (1 - 0.3), rel=0.05)
    assert_close(regret(0.0, beta=2.0 * 0.4)[300], fast[301], rtol=0.1, atol=1e-9)  # in the end it is beta (1 - alpha)


def test_weights_and_policy_agree_where_the_policy_is_linear() -> None:
    features = torch.randn(5, 3, dtype=F64)
    new, old = (nn.Linear(3, 1, bias=False, dtype=F64) for _ in range(2))
    logps = [torch.log_softmax(model(features)[:, 0], 0).detach() for model in (new, old)]
    apo_accel.extrapolate(new, old, alpha=0.4, out=new)
    assert_close(
        torch.log_softmax(new(features)[:, 0], 0).detach(), apo_accel.extrapolate_policy(*logps, 0.4), rtol=0, atol=1e-13
    )


def test_logits_of_a_token_are_the_policy_of_a_token() -> None:
    new, old = torch.randn(2, 4, 7, dtype=F64)
    logits = apo_accel.extrapolate_logits(new, old)
    policy = apo_accel.extrapolate_policy(torch.log_softmax(new, -1), torch.log_softmax(old, -1))
    assert_close(torch.log_softmax(logits, -1), policy, rtol=0, atol=1e-13)


def test_responses_that_neither_policy_gives() -> None:
    new, old = vector(0.5, 0.5, 0).log(), vector(0.8, 0.2, 0).log()
    found = apo_accel.extrapolate_policy(new, old, 0.5)
    assert found[2] == -math.inf and found.exp().sum() == pytest.approx(1)
    assert_close(found[:2], apo_accel.extrapolate_policy(new[:2], old[:2], 0.5), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match=r"new_logp\[2\] is -inf; where one of the two is, the other must be"):
        apo_accel.extrapolate_policy(new, UNIFORM)
    with pytest.raises(ValueError, match=r"old_logits\[0, 2\] is -inf"):
        apo_accel.extrapolate_logits(UNIFORM[None], new[None])


def test_on_a_gpu_one_sided_infinities_are_nan(device) -> None:
    new, old = vector(0.5, 0.5, 0).log().to(device), UNIFORM.to(device)
    if device == "cpu":
        with pytest.raises(ValueError, match="is -inf"):
            apo_accel.extrapolate_logits(new, old)
    else:
        assert apo_accel.extrapolate_logits(new, old).isnan().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: apo_accel.extrapolate(UNIFORM, UNIFORM, space="weights"),
            "space is 'weights'; accepted: 'params', 'logits', 'policy'",
        ),
        (lambda: apo_accel.extrapolate([UNIFORM], [UNIFORM], alpha=1.0), r"alpha is 1.0; a number in \[0, 1\)"),
        (lambda: apo_accel.extrapolate_policy(UNIFORM, UNIFORM, -0.1), "alpha is -0.1"),
        (lambda: apo_accel.extrapolate_policy(UNIFORM, UNIFORM[:2]), r"old_logp has shape \[2\]; \[3\] is expected"),
        (lambda: apo_accel.extrapolate(UNIFORM, UNIFORM, space="policy", lora="merge"), "lora is given but space is 'policy'"),
        (lambda: apo_accel.apo_tabular(UNIFORM, REWARD, beta=0, alpha=0.3, steps=1), "beta is 0; it must be positive"),
        (lambda: apo_accel.apo_tabular(UNIFORM, REWARD, beta=1, alpha=1, steps=1), "alpha is 1"),
        (lambda: apo_accel.apo_tabular(UNIFORM, REWARD, beta=1, alpha=0, steps=-1), "steps is -1"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
