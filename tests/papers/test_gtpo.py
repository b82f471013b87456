"""GTPO against its worked numbers in both variants, its gradients, its invariants and its edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, gtpo, load_recipe, take_rows

F64 = torch.float64
TOKENS = torch.tensor([[5, 6, 7, 8, 2, 0], [5, 6, 9, 2, 0, 0], [5, 4, 7, 8, 2, 0]])
MASK = torch.arange(6) < torch.tensor([[5], [4], [5]])
REWARDS = torch.tensor([1, 0, 1], dtype=F64)
GROUP = torch.zeros(3, dtype=torch.int64)
ADVANTAGES = torch.tensor([1 / 3, -2 / 3, 1 / 3], dtype=F64)
WEIGHTS = torch.tensor([[2, 2, 1, 1, 2, 0], [0, 0, 1, 0, 0, 0], [2, 1, 1, 1, 2, 0]], dtype=F64)
LOGITS = torch.tensor([[3.0, 0, 0], [4, 0, 0], [1, 0, 0]], dtype=F64)
LOG_P = LOGITS.log_softmax(1)
H = -(LOG_P.exp() * LOG_P).sum(1)
ENTROPY = H[:, None].expand(3, 6).where(MASK, torch.nan)


def close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    assert_close(actual.detach(), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def run(variant="paper", logp=None, entropy=ENTROPY, advantages=ADVANTAGES, **options):
    """The loss and its gradient to logp."""
    logp = (torch.randn(3, 6, dtype=F64) if logp is None else logp.clone()).requires_grad_()
    weights, divisor = gtpo.gtpo_weights(TOKENS, advantages, GROUP, MASK, variant=variant)
    out = gtpo.gtpo_objective(logp, entropy, advantages, weights, MASK, divisor=divisor, variant=variant, **options)
    out.loss.backward()
    return out, logp.grad


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_worked_conflicts(variant) -> None:
    runs = prefkern.conflict_runs(TOKENS, ADVANTAGES, GROUP, MASK)
    assert runs.forward.tolist() == [2, 2, 1] and runs.backward.tolist() == [1, 1, 1]
    weights, divisor = gtpo.gtpo_weights(TOKENS, ADVANTAGES, GROUP, MASK, variant=variant)
    close(weights, WEIGHTS)
    close(divisor, [2, 2, 1] if variant == "code" else [1, 1, 1])


def test_worked_entropies() -> None:
    close(H, [0.3665939609, 0.1773236759, 0.9753278292])
    hidden = LOGITS[:, None].expand(3, 6, 3)
    head = prefkern.linear_logprobs(hidden, torch.eye(3, dtype=F64), torch.zeros(3, 6).long(), outputs=("entropy",))
    close(head.entropy, H[:, None].expand(3, 6))


def test_worked_release() -> None:
    out, gradient = run("code")
    close(out.loss, -0.1517892705)
    close(gradient[0], [-0.0593347874, -0.0593347874, -0.0296673937, -0.0296673937, -0.0593347874, 0])
    close(gradient[1], [0, 0, 0.0855498793, 0, 0, 0])
    close(gradient[2], [0] * 6)
    close(out.metrics["sequence_entropy"], H.mean())
    close(out.metrics["kept_sequences"], 2 / 3)


def test_worked_paper() -> None:
    out, gradient = run("paper", h_init=0.3)
    close(out.loss, -0.1011928470)
    close(gradient[1], [0, 0, 0.0570332529, 0, 0, 0])
    close(gradient[0], torch.tensor([2, 2, 1, 1, 2, 0], dtype=F64) * -0.2966739372 / 15)
    close(gradient[2], [0] * 6)
    assert torch.equal(run("paper")[0].loss, out.loss)  # without h_init the filter is on


def test_worked_filter_that_is_off() -> None:
    """A policy that starts above ln 2 is not filtered."""
    shaped = torch.tensor([0.2966739372, -0.6843990343, 0.2358005504], dtype=F64)
    close(ADVANTAGES - 0.1 * H, shaped)
    out, gradient = run("paper", h_init=0.9)
    close(gradient, -(shaped / torch.tensor([5, 4, 5]))[:, None] * WEIGHTS / 3)
    close(out.loss, gradient.sum())


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_loss_does_not_depend_on_logp_but_its_gradient_is_that_of_the_ratio(variant) -> None:
    first, second = (run(variant, logp=torch.randn(3, 6, dtype=F64)) for _ in range(2))
    close(first[0].loss, second[0].loss, atol=1e-14)
    close(first[1], second[1], atol=1e-14)
    close(first[1].sum(), first[0].loss, atol=1e-14)


def test_thresholds_of_the_variants() -> None:
    between = torch.full((3, 6), 0.6965, dtype=F64)  # ln 2 is 0.6931
    assert run("paper", entropy=between)[0].loss == 0
    assert run("code", entropy=between)[0].loss != 0
    assert run("paper", entropy=between, threshold=0.7)[0].loss != 0
    assert run("code", entropy=between, threshold=0.69)[0].loss == 0
    assert run("paper", entropy=between, h_init=math.log(2))[0].loss == 0
    assert run("paper", entropy=between, h_init=0.7)[0].loss != 0
    assert run("code", entropy=ENTROPY, h_init=5.0)[0].loss == run("code")[0].loss  # the release always filters


def test_a_token_in_both_runs() -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 2, 3]])
    a, group, mask = torch.tensor([0.5, -0.5], dtype=F64), GROUP[:2], torch.ones(2, 3, dtype=torch.bool)
    for variant, twice in (("paper", 2.0), ("code", 4.0)):
        weights, divisor = gtpo.gtpo_weights(tokens, a, group, mask, variant=variant)
        close(weights, [[twice] * 3, [0] * 3])
        close(divisor, [3, 3] if variant == "code" else [1, 1])
    weights, _ = gtpo.gtpo_weights(tokens, a, group, mask, w_pos=3.0, w_neg=0.5, variant="code")
    close(weights, [[9] * 3, [0.25] * 3])


def test_no_gradient_flows_through_the_entropy() -> None:
    entropy = ENTROPY.nan_to_num(0.0).requires_grad_()
    logp = torch.zeros(3, 6, dtype=F64, requires_grad=True)
    gtpo.gtpo_objective(logp, entropy, ADVANTAGES, WEIGHTS, MASK).loss.backward()
    assert entropy.grad is None and logp.grad.any()


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_order_of_completions_does_not_matter(variant) -> None:
    order = torch.tensor([2, 0, 1])
    logp = torch.randn(3, 6, dtype=F64)
    out, gradient = run(variant, logp=logp)
    shuffled = logp[order].requires_grad_()
    weights, divisor = gtpo.gtpo_weights(TOKENS[order], ADVANTAGES[order], GROUP, MASK[order], variant=variant)
    again = gtpo.gtpo_objective(
        shuffled, ENTROPY[order], ADVANTAGES[order], weights, MASK[order], divisor=divisor, variant=variant
    )
    again.loss.backward()
    close(again.loss, out.loss.detach(), atol=1e-14)
    close(shuffled.grad, gradient[order], atol=1e-14)


def test_switched_off_it_is_reinforce_with_centred_rewards() -> None:
    logp = torch.randn(3, 6, dtype=F64, requires_grad=True)
    weights, _ = gtpo.gtpo_weights(TOKENS, ADVANTAGES, GROUP, MASK, w_pos=1.0, w_neg=1.0)
    gtpo.gtpo_objective(logp, ENTROPY, ADVANTAGES, weights, MASK, gamma=0.0, threshold=math.inf).loss.backward()
    expected = prefkern.policy_loss(logp, None, ADVANTAGES, MASK, kind="reinforce", agg="seq-mean-token-mean").loss
    close(logp.grad, torch.autograd.grad(expected, logp)[0], atol=1e-8)  # that mode adds 1e-8 to the lengths


@st.composite
def groups(draw):
    rows, length = draw(st.integers(2, 6)), draw(st.integers(1, 6))
    tokens = draw(st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=rows, max_size=rows))
    lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=rows, max_size=rows))
    return torch.tensor(tokens), torch.tensor(lengths), torch.tensor(rewards, dtype=F64)


@given(groups())
def test_conflict_tokens_of_negative_rows_get_no_gradient(batch) -> None:
    tokens, lengths, rewards = batch
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    group = torch.zeros(len(rewards), dtype=torch.int64)
    a = prefkern.group_advantages(rewards, group, estimator="dr_grpo").advantages
    runs = prefkern.conflict_runs(tokens, a, group, mask)
    assert bool((runs.forward <= lengths).all() and (runs.backward <= lengths).all())
    weights, divisor = gtpo.gtpo_weights(tokens, a, group, mask, variant="code")
    logp = torch.zeros(tokens.shape, dtype=F64, requires_grad=True)
    gtpo.gtpo_objective(logp, torch.zeros_like(logp), a, weights, mask, divisor=divisor, variant="code").loss.backward()
    at = torch.arange(tokens.shape[1])
    inside = (at < runs.forward[:, None]) | (at >= (lengths - runs.backward)[:, None])
    assert not logp.grad[inside & (a < 0)[:, None]].any()
    assert not logp.grad[~mask].any()
    if rewards.max() == rewards.min():
        assert torch.equal(weights, mask.to(weights.dtype))


def test_equal_rewards_leave_pure_entropy_pressure() -> None:
    zero = torch.zeros(3, dtype=F64)
    for variant in ("paper", "code"):
        out, gradient = run(variant, advantages=zero)
        count = 3 if variant == "paper" else 1
        close(out.loss, 0.1 * H[:2].sum() / count)
        close(gradient[0], (0.1 * H[0] / 5 / count) * MASK[0])


def test_one_sign_or_one_completion_has_no_conflicts() -> None:
    a = torch.tensor([1.0, 2, 0], dtype=F64)
    weights, divisor = gtpo.gtpo_weights(TOKENS, a, GROUP, MASK, variant="code")
    assert torch.equal(weights, MASK.to(weights.dtype)) and divisor.tolist() == [1, 1, 1]
    apart, _ = gtpo.gtpo_weights(TOKENS, ADVANTAGES, torch.arange(3), MASK)
    assert torch.equal(apart, MASK.to(apart.dtype))


def test_a_kept_row_may_turn_negative_and_keeps_its_weights() -> None:
    out, gradient = run("paper", gamma=1.0)
    assert H[0] > ADVANTAGES[0]
    close(gradient[0], -(ADVANTAGES[0] - H[0]) * WEIGHTS[0] / 15)
    assert bool((gradient[0, :5] > 0).all()) and bool(out.loss.isfinite())


def test_a_completion_without_tokens_adds_nothing() -> None:
    mask = MASK.clone()
    mask[1] = False
    weights, divisor = gtpo.gtpo_weights(TOKENS, ADVANTAGES, GROUP, mask)
    logp = torch.zeros(3, 6, dtype=F64, requires_grad=True)
    gtpo.gtpo_objective(logp, ENTROPY, ADVANTAGES, weights, mask, divisor=divisor).loss.backward()
    assert not logp.grad[1].any() and logp.grad[0].any()


def test_nan_entropy_drops_a_row() -> None:
    entropy = ENTROPY.clone()
    entropy[0, 2] = math.nan
    out, gradient = run("code", entropy=entropy)
    assert bool(out.loss.isfinite()) and not gradient[0].any() and gradient[1].any()


def test_packed_equals_padded() -> None:
    out, gradient = run("code")
    keep = MASK.flatten()
    cu = torch.tensor([0, 5, 9, 14], dtype=torch.int32)
    tokens = TOKENS.flatten()[keep]
    weights, divisor = gtpo.gtpo_weights(tokens, ADVANTAGES, GROUP, cu_seqlens=cu, variant="code")
    logp = torch.zeros(14, dtype=F64, requires_grad=True)
    packed = gtpo.gtpo_objective(
        logp, ENTROPY.flatten()[keep], ADVANTAGES, weights, cu_seqlens=cu, divisor=divisor, variant="code"
    )
    packed.loss.backward()
    close(packed.loss, out.loss.detach(), atol=1e-14)
    close(logp.grad, gradient.flatten()[keep], atol=1e-14)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_from_hidden_states(variant) -> None:
    hidden = torch.randn(3, 6, 4, dtype=F64).masked_fill(~MASK[..., None], math.nan).requires_grad_()
    weight = (0.3 * torch.randn(10, 4, dtype=F64)).requires_grad_()
    out = gtpo.gtpo_loss(hidden, weight, TOKENS, MASK, REWARDS, GROUP, threshold=3.0, variant=variant)
    logits = hidden.masked_fill(~MASK[..., None], 0.0) @ weight.T
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logp = log_p.gather(-1, TOKENS[..., None]).squeeze(-1)
    h = torch.where(MASK, entropy, 0.0).sum(1) / MASK.sum(1)
    shaped = (ADVANTAGES - 0.1 * h).detach()
    if variant == "code":
        shaped = shaped / torch.tensor([2.0, 2, 1], dtype=F64)
    per_row = (WEIGHTS * (logp - logp.detach()).exp()).sum(1) / MASK.sum(1)
    expected = -(shaped * per_row).sum() / (3 if variant == "paper" else 1)
    assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    for got, wanted in zip(
        torch.autograd.grad(out.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_recipe(variant) -> None:
    recipe = load_recipe("gtpo", variant=variant)
    assert recipe.needs_entropy
    batch = recipe.prepare(Rollout(REWARDS, GROUP, MASK, tokens=TOKENS))
    logp = torch.randn(3, 6, dtype=F64, requires_grad=True)
    out = recipe.loss(logp, batch, entropy=ENTROPY)
    out.loss.backward()
    expected, gradient = run(variant)
    close(out.loss, expected.loss.detach(), atol=1e-14)
    close(logp.grad, gradient, atol=1e-14)
    rows = torch.tensor([1])  # conflicts were found in the whole group
    part = recipe.loss(logp[rows], take_rows(batch, rows), entropy=ENTROPY[rows])
    share = 1 if variant == "code" else 3
    close(part.loss, gradient[1].sum() * share, atol=1e-14)
    weighted = recipe.prepare(Rollout(REWARDS, GROUP, MASK, tokens=TOKENS, token_weight=torch.tensor([1.0, 0.5, 1])))
    halved = gradient.sum() - 0.5 * gradient[1].sum()
    close(recipe.loss(logp, weighted, entropy=ENTROPY).loss, halved, atol=1e-14)


def test_below_ln_2_some_token_has_probability_above_one_half() -> None:
    log_p = (6 * torch.randn(4000, 8, dtype=F64)).log_softmax(1)
    h = -(log_p.exp() * log_p).sum(1)
    largest = log_p.exp().max(1).values
    assert bool((largest[h < math.log(2)] > 0.5).all())
    assert bool((h > math.log(2)).any() and (largest[h > math.log(2)] <= 0.5).any())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gtpo.gtpo_weights(TOKENS, ADVANTAGES, GROUP, MASK, variant="trl"),
            "variant is 'trl'; accepted: 'paper', 'code'",
        ),
        (lambda: gtpo.gtpo_objective(ENTROPY, ENTROPY, ADVANTAGES, WEIGHTS, MASK, variant="trl"), "variant is 'trl'"),
        (lambda: gtpo.gtpo_weights(TOKENS, ADVANTAGES, GROUP, MASK.flip(1)), "mask"),
        (lambda: gtpo.gtpo_weights(TOKENS, ADVANTAGES * math.nan, GROUP, MASK), "advantages"),
        (lambda: load_recipe("gtpo").prepare(Rollout(REWARDS, GROUP, MASK)), "needs rollout.tokens, which is None"),
        (
            lambda: load_recipe("gtpo").loss(
                ENTROPY, load_recipe("gtpo").prepare(Rollout(REWARDS, GROUP, MASK, tokens=TOKENS))
            ),
            "entropy is None; recipe 'gtpo' needs",
        ),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
