"""The definitions against numbers worked out by hand or printed in the papers' specifications."""

import math

import pytest
import torch

from prefkern import reference

NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- log-probabilities

LOG_2_3_5 = f64([math.log(2), math.log(3), math.log(5)], [0.0, 0.0, 0.0])  # softmax: [.2, .3, .5], [1/3, 1/3, 1/3]
ALL = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")


def test_logits_logprobs_of_known_probabilities():
    out = reference.logits_logprobs(LOG_2_3_5, torch.tensor([2, 0]), outputs=ALL)
    close(out.logp, [math.log(0.5), -math.log(3)])
    close(out.entropy, [-0.2 * math.log(0.2) - 0.3 * math.log(0.3) - 0.5 * math.log(0.5), math.log(3)])
    close(out.lse, [math.log(10), math.log(3)])
    close(out.sum_sq_probs, [0.38, 1 / 3])
    close(out.mean_logit, [math.log(30) / 3, 0.0])
    assert out.is_top1.tolist() == [True, True]  # of three equal logits the first is the top one


def test_the_first_maximum_is_the_top_one():
    assert reference.logits_logprobs(LOG_2_3_5[1:], torch.tensor([1]), outputs=["is_top1"]).is_top1.tolist() == [False]


def test_only_what_is_asked_for_is_returned():
    out = reference.logits_logprobs(LOG_2_3_5, torch.tensor([2, 0]), outputs=["lse"])
    assert out.lse is not None
    assert (out.entropy, out.sum_sq_probs, out.mean_logit, out.is_top1) == (None, None, None, None)


def test_temperature_scale_and_softcap():
    logits, target = f64(1.0, -2.0), torch.tensor([0])
    z = [3 * math.tanh(4 / 3) / 2, 3 * math.tanh(-8 / 3) / 2]
    expected = z[0] - math.log(math.exp(z[0]) + math.exp(z[1]))
    out = reference.logits_logprobs(logits.unsqueeze(0), target, temperature=2.0, softcap=3.0, logit_scale=4.0)
    close(out.logp, [expected])
    rows = logits.expand(2, 2)
    out = reference.logits_logprobs(rows, torch.tensor([0, 0]), temperature=f64(1.0, 3.0))
    close(out.logp, [-math.log(1 + math.exp(-3)), -math.log(1 + math.exp(-1))])


def test_gradients_of_logp_and_entropy():
    """d logp / dz = onehot - p;  d entropy / dz = -p (log p + entropy)."""
    logits = LOG_2_3_5[:1].clone().requires_grad_()
    out = reference.logits_logprobs(logits, torch.tensor([2]), outputs=["entropy"])
    (d_logp,) = torch.autograd.grad(out.logp.sum(), logits, retain_graph=True)
    close(d_logp, [[-0.2, -0.3, 0.5]])
    (d_entropy,) = torch.autograd.grad(out.entropy.sum(), logits)
    entropy = out.entropy.item()
    close(d_entropy, [[-p * (math.log(p) + entropy) for p in (0.2, 0.3, 0.5)]])


def test_a_token_that_cannot_be_drawn_adds_nothing():
    logits = f64([0.0, 0.0, -math.inf]).requires_grad_()
    out = reference.logits_logprobs(logits, torch.tensor([0]), outputs=["entropy"])
    close(out.entropy, [math.log(2)])
    (out.logp + out.entropy).sum().backward()
    close(logits.grad, [[0.5, -0.5, 0.0]])


def test_linear_logprobs_is_logits_logprobs_of_the_product():
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 3))
    options = {"temperature": 0.7, "softcap": 2.0, "logit_scale": 1.5, "outputs": ALL}
    a = reference.linear_logprobs(hidden, weight, targets, bias=bias, **options)
    b = reference.logits_logprobs(hidden @ weight.T + bias, targets, **options)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert a.logp.shape == (2, 3)

    def scalars(*leaves):
        out = reference.linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], **options)
        return out.logp, out.entropy, out.lse

    assert torch.autograd.gradcheck(scalars, (hidden, weight, bias))


def test_ignored_rows_are_not_looked_at():
    hidden = torch.full((3, 2), NAN)
    hidden[1] = 1.0
    hidden.requires_grad_()
    weight = torch.ones(4, 2, requires_grad=True)
    out = reference.linear_logprobs(hidden, weight, torch.tensor([-100, 3, -100]), outputs=ALL)
    close(out.logp, [0.0, -math.log(4), 0.0], 1e-6)
    close(out.entropy, [0.0, math.log(4), 0.0], 1e-6)
    assert out.is_top1.tolist() == [False, False, False]
    out.logp.sum().backward()
    assert hidden.grad[[0, 2]].eq(0).all()
    assert weight.grad.isfinite().all()


def test_bfloat16_is_widened_before_the_product():
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(9, 8).bfloat16()
    targets = torch.arange(5)
    out = reference.linear_logprobs(hidden, weight, targets)
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets)
    assert out.logp.dtype == torch.float32
    close(out.logp.double(), exact.logp, 1e-5)


def test_a_low_rank_update_of_the_head():
    """h = (1, 2), a = (1, 1): t = 3; b = (0, 1, 0), s = 2 add 6 to the second logit."""
    hidden, weight = f64([1.0, 2.0]).requires_grad_(), torch.zeros(3, 2, dtype=torch.float64)
    a, b = f64([1.0, 1.0]).requires_grad_(), f64([0.0, 1.0, 0.0]).T.requires_grad_()
    out = reference.linear_logprobs(hidden, weight, torch.tensor([1]), lora=(a, b, 2.0))
    close(out.logp, [6 - math.log(math.exp(6) + 2)])
    p = math.exp(out.logp.item())
    out.logp.sum().backward()
    close(hidden.grad, [[2 * (1 - p), 2 * (1 - p)]])
    close(a.grad, [[2 * (1 - p), 4 * (1 - p)]])
    close(b.grad, [[-3 * (1 - p)], [6 * (1 - p)], [-3 * (1 - p)]])


def test_logits_are_rounded_after_the_bias():
    """1 + 2^-8 lies between two bfloat16 numbers, and rounds to the even one; its sum with 2^-9 rounds up."""
    hidden, weight = f64([1.0]).T, f64([1 + 2**-8, 0.0]).T
    for bias, expected in ((f64(0.0, 0.0), 1.0), (f64(2**-9, 0.0), 1 + 2**-7)):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        out = reference.linear_logprobs(*leaves[:2], torch.tensor([0]), bias=leaves[2], logits_dtype="bfloat16")
        close(out.logp, [-math.log1p(math.exp(-expected))])
        (grad,) = torch.autograd.grad(out.logp.sum(), leaves[2])
        q = 1 / (1 + math.exp(expected))
        close(grad, [q, -q])


def test_statistics_over_kept_tokens():
    keep = (torch.tensor([0, 2, 2, 4]), torch.tensor([0, 2, 1, 2]))
    logits = f64([0.0, 5.0, 0.0], [NAN, NAN, NAN], [math.log(4), math.log(3), 0.0])
    identity, targets = torch.eye(3, dtype=torch.float64), torch.tensor([2, -100, 0])
    leaf = logits.clone().requires_grad_()
    out = reference.linear_logprobs(leaf, identity, targets, keep=keep, outputs=ALL)
    close(out.logp, [-math.log(2), 0.0, -math.inf])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    close(out.entropy, [math.log(2), 0.0, entropy])
    close(out.lse, [math.log(2), 0.0, math.log(4)])
    close(out.sum_sq_probs, [0.5, 0.0, 0.625])
    close(out.mean_logit, [0.0, 0.0, math.log(3) / 2])
    assert out.is_top1.tolist() == [False, False, False]
    (grad,) = torch.autograd.grad(out.logp.sum(), leaf, retain_graph=True)
    close(grad, [[-0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    (grad,) = torch.autograd.grad(out.lse.sum(), leaf)
    close(grad, [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.75, 0.25]])
    with pytest.raises(ValueError, match="row 2 keeps no token"):
        reference.linear_logprobs(logits, identity, targets, keep=(torch.tensor([0, 2, 2, 2]), keep[1]))


def test_log_probability_arguments_are_checked():
    with pytest.raises(ValueError, match=r"outputs.*entropi"):
        reference.logits_logprobs(LOG_2_3_5, torch.tensor([0, 0]), outputs=["entropi"])
    with pytest.raises(ValueError, match=r"targets.*\[0, 3\)"):
        reference.logits_logprobs(LOG_2_3_5, torch.tensor([0, 3]))


# ----------------------------------------------------------------------------------------------------- group advantages

REWARDS = f64(1, 0, 0, 0, 1, 1, 0.5, 1)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("estimator", "expected", "tolerance"),
    [
        ("grpo", [1.4999970, -0.4999990, -0.4999990, -0.4999990, 0.4999980, 0.4999980, -1.4999940, 0.4999980], 5e-8),
        ("rloo", [1, -1 / 3, -1 / 3, -1 / 3, 1 / 6, 1 / 6, -0.5, 1 / 6], 1e-12),
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25, 0.125, 0.125, -0.375, 0.125], 1e-12),
    ],
)
def test_advantages_of_two_groups(estimator, expected, tolerance):
    out = reference.group_advantages(REWARDS, GROUP, estimator=estimator, outputs=("mean", "std", "count"))
    close(out.advantages, expected, tolerance)
    close(out.mean, [0.25] * 4 + [0.875] * 4)
    close(out.std, [0.5] * 4 + [0.25] * 4)
    assert out.count.tolist() == [4] * 8


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_group_ids_and_order_are_free(estimator):
    order = torch.tensor([6, 0, 4, 2, 7, 1, 5, 3])
    ids = torch.tensor([-5, 10**12])[GROUP]
    shuffled = reference.group_advantages(REWARDS[order], ids[order], estimator=estimator)
    straight = reference.group_advantages(REWARDS, GROUP, estimator=estimator)
    close(shuffled.advantages, straight.advantages[order], 1e-14)


def test_groups_may_be_ragged():
    out = reference.group_advantages(f64(1, 3, 5, 2, 4), torch.tensor([0, 1, 1, 0, 1]), estimator="rloo", outputs=("count",))
    close(out.advantages, [-1.0, -1.5, 1.5, 1.0, 0.0])
    assert out.count.tolist() == [2, 3, 3, 2, 3]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_give_exact_zeros(estimator):
    """The mean of seven 0.1 is not 0.1 in floating point."""
    rewards = torch.full((7,), 0.1)
    group = torch.zeros(7, dtype=torch.int64)
    out = reference.group_advantages(rewards, group, estimator=estimator, outputs=("mean", "std"))
    assert out.advantages.tolist() == [0.0] * 7
    assert out.std.tolist() == [0.0] * 7
    assert torch.equal(out.mean, rewards)


@pytest.mark.parametrize(
    ("estimator", "singleton", "expected"),
    [
        ("grpo", "zero", 0.0),
        ("grpo", "reward", 0.5 / (1 + 1e-6)),
        ("dr_grpo", "zero", 0.0),
        ("dr_grpo", "reward", 0.5),
        ("rloo", "zero", 0.0),
        ("rloo", "reward", 0.5),
    ],
)
def test_a_group_of_one(estimator, singleton, expected):
    out = reference.group_advantages(
        f64(0.5), torch.tensor([3]), estimator=estimator, singleton=singleton, outputs=("mean", "std", "count")
    )
    close(out.advantages, [expected], 1e-15)
    assert (out.mean.item(), out.std.item(), out.count.item()) == (0.5, 0.0, 1)


def test_invariants_of_advantages():
    torch.manual_seed(0)
    rewards, group = torch.rand(60, dtype=torch.float64), torch.randint(0, 7, (60,))
    dr = reference.group_advantages(rewards, group, estimator="dr_grpo", outputs=("count",))
    rloo = reference.group_advantages(rewards, group, estimator="rloo").advantages
    size = dr.count.double()
    close(rloo, size / (size - 1) * dr.advantages, 1e-14)
    for g in range(7):
        assert abs(rloo[group == g].sum()) < 1e-13


def test_advantage_arguments_are_checked():
    with pytest.raises(ValueError, match=r"estimator.*'gpro'.*'grpo'"):
        reference.group_advantages(REWARDS, GROUP, estimator="gpro")
    with pytest.raises(ValueError, match=r"singleton.*'one'"):
        reference.group_advantages(REWARDS, GROUP, singleton="one")
    for value in (NAN, math.inf):
        with pytest.raises(ValueError, match=r"rewards.*finite"):
            reference.group_advantages(f64(1, value), torch.tensor([0, 0]))


# ---------------------------------------------------------------------------------------------------------- policy loss

RHO = f64(1.5, 0.5, 1.5, 0.5, 4)
ADVANTAGES = f64(1, 1, -1, -1, -1)


def value_and_gradient(logp, *args, **kwargs):
    logp = logp.clone().requires_grad_()
    out = reference.policy_loss(logp, *args, **kwargs)
    (gradient,) = torch.autograd.grad(out.loss, logp)
    return out, gradient


def per_token(logp, old_logp, advantages, **kwargs):
    """Every token as a batch of its own: its loss and gradient."""
    results = [
        value_and_gradient(lp.view(1, 1), ol.view(1, 1), a.view(1), **kwargs)
        for lp, ol, a in zip(logp, old_logp, advantages, strict=True)
    ]
    return torch.stack([r[0].loss for r in results]).detach(), torch.cat([r[1].view(1) for r in results])


def test_clip_and_dual_clip():
    loss, gradient = per_token(RHO.log(), torch.zeros(5), ADVANTAGES, eps_low=0.2, eps_high=0.28, dual_clip=3.0)
    close(loss, [-1.28, -0.5, 1.5, 0.8, 3.0])
    close(gradient, [0.0, -0.5, 1.5, 0.0, 0.0])


def test_clip_without_dual_clip():
    loss, gradient = per_token(RHO.log(), torch.zeros(5), ADVANTAGES)
    close(loss, [-1.2, -0.5, 1.5, 0.8, 4.0])
    close(gradient, [0.0, -0.5, 1.5, 0.0, 4.0])


def test_metrics_of_the_clipped_loss():
    out, gradient = value_and_gradient(
        RHO.log().view(1, 5), torch.zeros(1, 5), ADVANTAGES.view(1, 5), eps_high=0.28, dual_clip=3.0
    )
    close(out.loss, (-1.28 - 0.5 + 1.5 + 0.8 + 3.0) / 5)
    close(gradient, [[0.0, -0.1, 0.3, 0.0, 0.0]])
    metrics = {name: value.item() for name, value in out.metrics.items()}
    d = RHO.log()
    assert metrics == pytest.approx(
        {
            "clip_fraction_low": 0.2,
            "clip_fraction_high": 0.2,
            "clip_fraction_dual": 0.2,
            "ratio_mean": 1.6,
            "ratio_min": 0.5,
            "ratio_max": 4.0,
            "approx_kl": (RHO - 1 - d).mean().item(),
            "kl": 0.0,
            "entropy": 0.0,
            "tokens": 5,
            "sequences": 1,
        }
    )


@pytest.mark.parametrize(("rho", "advantage"), [(1.25, 1.0), (0.75, -1.0), (2.0, -1.0)])
def test_at_a_bound_the_gradient_flows(rho, advantage):
    """Bounds and ratios that are exact in binary: 1 + 1/4, 1 - 1/4, dual clip 2."""
    bounds = {"eps_low": 0.25, "eps_high": 0.25, "dual_clip": 2.0}
    logp = f64(math.log(rho))
    assert logp.exp().item() == rho
    _, gradient = per_token(logp, torch.zeros(1), f64(advantage), **bounds)
    close(gradient, [-advantage * rho])


def test_the_log_ratio_is_clamped_without_gradient():
    logp, old = f64(3.0, -3.0, 2.0), torch.zeros(3)
    a = f64(-1, 1, -1)
    loss, gradient = per_token(logp, old, a, ratio_clamp=2.0)
    close(loss, [math.exp(2), -math.exp(-2), math.exp(2)])
    close(gradient, [0.0, 0.0, math.exp(2)])  # at the bound it flows
    loss, gradient = per_token(logp, old, a, ratio_clamp=None)
    close(loss, [math.exp(3), -math.exp(-3), math.exp(2)])
    close(gradient, [math.exp(3), -math.exp(-3), math.exp(2)])


def test_a_ratio_that_overflows_under_a_bound_has_no_gradient():
    loss, gradient = per_token(f64(2000.0, 2000.0), torch.zeros(2), f64(1, -1), dual_clip=3.0, ratio_clamp=None)
    close(loss, [-1.2, 3.0])
    close(gradient, [0.0, 0.0])


def test_k3_value_and_gradient():
    logp, ref = f64(-1, -2, -0.5), f64(-1.2, -1, -0.5)
    results = [
        value_and_gradient(x.view(1, 1), x.view(1, 1), f64(0), ref_logp=r.view(1, 1), beta=1.0)
        for x, r in zip(logp, ref, strict=True)
    ]
    k3 = [0.0187307531, 0.7182818285, 0.0]
    close(torch.stack([out.loss for out, _ in results]).detach(), k3, 1e-10)
    close(torch.stack([out.metrics["kl"] for out, _ in results]), k3, 1e-10)
    close(torch.cat([g.view(1) for _, g in results]), [0.1812692469, -1.7182818285, 0.0], 1e-10)


def test_kl_is_reported_but_not_added_at_beta_zero():
    logp = f64(-1).view(1, 1)
    out, gradient = value_and_gradient(logp, logp, f64(0), ref_logp=f64(-1.2).view(1, 1))
    close(out.metrics["kl"], 0.0187307531, 1e-10)
    assert out.loss.item() == 0.0
    assert gradient.item() == 0.0


def losses_by_advantage():
    """On policy the loss of a token is minus its advantage: [[1, 2, 3, 4], [5, 6], [7], []]."""
    loss = torch.full((4, 4), NAN, dtype=torch.float64)
    loss[0] = f64(1, 2, 3, 4)
    loss[1, :2] = f64(5, 6)
    loss[2, 0] = 7
    return loss, ~loss.isnan()


@pytest.mark.parametrize(("agg", "expected"), [("token-mean", 4.0), ("seq-mean-token-mean", 4.9999999654)])
@pytest.mark.parametrize("packed", [False, True])
def test_aggregation(agg, expected, packed):
    loss, mask = losses_by_advantage()
    logp = torch.where(mask, 0.0, NAN).double()
    if packed:
        lengths = mask.sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        out, gradient = value_and_gradient(logp[mask], logp[mask], -loss[mask], cu_seqlens=cu_seqlens, agg=agg)
        gradient = torch.zeros(4, 4, dtype=torch.float64).masked_scatter(mask, gradient)
    else:
        out, gradient = value_and_gradient(logp, logp, -loss, mask, agg=agg)
    close(out.loss, expected, 1e-10)
    assert out.metrics["tokens"].item() == 7
    n = mask.sum(1, keepdim=True).double()
    weight = 1 / 7 if agg == "token-mean" else 1 / (3 * (n + 1e-8))
    close(gradient, torch.where(mask, loss * weight, 0.0), 1e-12)


def test_one_advantage_per_sequence():
    torch.manual_seed(0)
    logp, old = -torch.rand(2, 3, 5, dtype=torch.float64)
    a = torch.randn(3, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.7
    one, _ = value_and_gradient(logp, old, a, mask)
    each, _ = value_and_gradient(logp, old, a[:, None].expand(3, 5), mask)
    assert one.loss.item() == each.loss.item()


def test_on_policy_the_gradient_is_minus_the_advantage():
    logp = -torch.rand(3, 5, dtype=torch.float64)
    a = torch.randn(3, 5, dtype=torch.float64)
    _, gradient = value_and_gradient(logp, logp, a)
    close(gradient, -a / 15)


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean"])
def test_an_empty_mask_gives_zeros(agg):
    logp = torch.full((2, 3), NAN)
    out, gradient = value_and_gradient(logp, logp, torch.ones(2), torch.zeros(2, 3, dtype=torch.bool), agg=agg)
    assert out.loss.item() == 0.0
    assert gradient.eq(0).all()
    assert all(value.item() == 0 for value in out.metrics.values())


def test_policy_gradcheck():
    torch.manual_seed(1)
    logp = -torch.rand(4, 6, dtype=torch.float64)
    old, ref = logp + 0.3 * torch.randn(2, 4, 6, dtype=torch.float64)
    a, mask = torch.randn(4, dtype=torch.float64), torch.rand(4, 6) < 0.8

    def loss(x):
        return reference.policy_loss(x, old, a, mask, dual_clip=1.5, ref_logp=ref, beta=0.1, agg="seq-mean-token-mean").loss

    assert torch.autograd.gradcheck(loss, logp.requires_grad_())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "clipped"}, "kind.*'clipped'.*'clip'"),
        ({"agg": "mean"}, "agg.*'mean'.*'token-mean'"),
        ({"kl": "k9"}, "kl.*'k9'.*'k3'"),
        ({"dual_clip": 1.0}, "dual_clip.*1.0.*greater than 1"),
        ({"beta": 0.1}, "beta.*ref_logp"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
    ],
)
def test_policy_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        reference.policy_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2), **options)


def test_a_single_sequence_without_cu_seqlens_is_refused():
    with pytest.raises(ValueError, match=r"logp.*cu_seqlens"):
        reference.policy_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4))
