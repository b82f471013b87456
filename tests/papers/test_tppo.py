"""T-PPO against its worked numbers, its invariants and its edge cases."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, load_recipe, take_rows, tppo

F64 = torch.float64
NAN = math.nan
# the first is cut at 4 and has two tokens in the window; the second ended in its first window
REWARDS = torch.tensor([[0, 0, 0, 0], [0, 0, 1, NAN]], dtype=F64)
VALUES = torch.tensor([[0.2, 0.4, 0.1, 0.5], [0.3, 0.6, 0.8, NAN]], dtype=F64)
LENGTHS = torch.tensor([4, 3])
START = torch.tensor([2, 0])
FINISHED = torch.tensor([False, True])
LOGP = torch.tensor([[-0.5, -0.6, -0.7, -0.8], [-0.5, -0.4, -0.3, NAN]], dtype=F64)
OLD = torch.tensor([[-0.5, -0.5, -1, -0.8], [-0.5, -0.9, -0.3, NAN]], dtype=F64)
MASK = torch.arange(4) < LENGTHS[:, None]


def close(actual, expected, atol=1e-12) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def test_worked_advantages() -> None:
    advantages, returns = tppo.egae(REWARDS, VALUES, LENGTHS, FINISHED, lam=0.9)
    close(advantages, [[0.254, 0.06, 0.4, 0], [0.642, 0.38, 0.2, 0]])
    close(returns, [[0.454, 0.46, 0.5, 0.5], [0.942, 0.98, 1, 0]])


def test_worked_losses() -> None:
    policy_mask, value_mask = tppo.tppo_masks(LENGTHS, START, FINISHED, 4)
    assert policy_mask.tolist() == [[False, False, True, True], [True, True, True, False]]
    assert value_mask.tolist() == [[False] * 4, [True, True, True, False]]
    advantages = tppo.egae(REWARDS, VALUES, LENGTHS, FINISHED, lam=0.9).advantages
    targets = tppo.value_targets(REWARDS, None, MASK)
    close(targets[1], [1, 1, 1, 0])
    logp, predictions = LOGP.clone().requires_grad_(), (VALUES + 0.1).requires_grad_()
    policy, value, metrics = tppo.tppo_loss(logp, OLD, advantages, predictions, targets, policy_mask, value_mask)
    close(policy.detach(), -0.3556)
    close(value.detach(), 0.0766666667, atol=1e-10)
    (policy + value).backward()
    assert logp.grad is not None and predictions.grad is not None
    close(logp.grad, [[0, 0, 0, 0], [-0.1284, 0, -0.04, 0]])  # the last token of the window has A = 0
    close(predictions.grad, [[0] * 4, [-0.2, -0.1, -0.0333333333, 0]], atol=1e-10)
    assert metrics["n_policy_tokens"] == 5 and metrics["n_value_tokens"] == 3
    assert metrics["clip_fraction_high"] == 0.4


def random_batch(rows=6, length=7):
    lengths = torch.randint(0, length + 1, (rows,))
    mask = torch.arange(length) < lengths[:, None]
    rewards, values = torch.randn(rows, length, dtype=F64), torch.randn(rows, length, dtype=F64)
    return lengths, mask, rewards.where(mask, NAN), values.where(mask, NAN)


@pytest.mark.parametrize("bootstrap", ["repeat", "critic", "zero"])
def test_bootstraps_are_those_of_the_definition(bootstrap) -> None:
    gamma, lam = 0.9, 0.8
    lengths, _, rewards, values = random_batch()
    finished, last = torch.rand(6) < 0.5, torch.randn(6, dtype=F64)
    options = {"bootstrap": bootstrap, "last_values": last if bootstrap == "critic" else None}
    advantages, returns = tppo.egae(rewards, values, lengths, finished, gamma=gamma, lam=lam, **options)
    for b, n in enumerate(lengths.tolist()):
        end = 0.0
        if n and not finished[b]:
            end = {"repeat": values[b, n - 1], "critic": last[b], "zero": 0.0}[bootstrap]
        delta = [rewards[b, t] + gamma * (values[b, t + 1] if t < n - 1 else end) - values[b, t] for t in range(n)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        close(advantages[b], expected + [0] * (7 - n))
        close(returns[b], [a + v for a, v in zip(expected, values[b], strict=False)] + [0] * (7 - n))


def test_without_discount_a_cut_completion_telescopes() -> None:
    advantages = tppo.egae(torch.zeros(1, 4, dtype=F64), VALUES[:1], LENGTHS[:1], FINISHED[:1], lam=1.0).advantages
    close(advantages[0], VALUES[0, 3] - VALUES[0])
    rewards = torch.randn(3, 200, dtype=F64)
    zeros, full = torch.zeros_like(rewards), torch.full((3,), 200)
    suffix = tppo.egae(rewards, zeros, full, torch.ones(3, dtype=torch.bool), lam=1.0).advantages
    assert_close(suffix, rewards.flip(1).cumsum(1).flip(1), rtol=1e-12, atol=1e-12)


def test_a_constant_on_the_values_moves_only_finished_completions() -> None:
    plain, moved = (tppo.egae(REWARDS, VALUES + c, LENGTHS, FINISHED, lam=0.9).advantages for c in (0, 3.0))
    close(moved[0], plain[0])
    close(plain[1, :3] - moved[1, :3], [3 * 0.9**2, 3 * 0.9, 3])


def test_finished_and_in_the_first_window_it_is_ppo_with_gae() -> None:
    lengths, mask, rewards, values = random_batch()
    every = torch.ones(6, dtype=torch.bool)
    advantages, returns = tppo.egae(rewards, values, lengths, every)
    expected = prefkern.gae(rewards, values, mask, lam=0.95)
    assert torch.equal(advantages, expected.advantages) and torch.equal(returns, expected.returns)
    policy_mask, value_mask = tppo.tppo_masks(lengths, torch.zeros(6, dtype=torch.int64), every, 7)
    assert torch.equal(policy_mask, mask) and torch.equal(value_mask, mask)
    logp = -torch.rand(6, 7, dtype=F64)
    old = logp + 0.3 * torch.randn(6, 7, dtype=F64)
    policy = tppo.tppo_loss(logp, old, advantages, values, returns, policy_mask, value_mask).policy_loss
    assert torch.equal(policy, prefkern.policy_loss(logp, old, advantages, mask).loss)


@given(steps=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_the_windows_of_a_completion_cover_each_token_once(steps) -> None:
    total = sum(steps)
    covered, start = torch.zeros(total, dtype=torch.int64), 0
    for step in steps:
        now = torch.tensor([start + step])
        covered += tppo.tppo_masks(now, torch.tensor([start]), torch.tensor([False]), total).policy_mask[0]
        start += step
    assert covered.tolist() == [1] * total


def test_empty_and_single_completions() -> None:
    lengths, finished = torch.tensor([0, 1, 1]), torch.tensor([False, False, True])
    rewards, values = torch.zeros(3, 2, dtype=F64), torch.tensor([[NAN, NAN], [0.7, NAN], [0.7, NAN]], dtype=F64)
    close(tppo.egae(rewards, values, lengths, finished).advantages[:, 0], [0, 0, -0.7])  # a finished one may lack its reward
    close(tppo.egae(rewards, values, lengths, finished, gamma=0.9).advantages[:, 0], [0, -0.07, -0.7])
    policy_mask, value_mask = tppo.tppo_masks(lengths, torch.zeros(3, dtype=torch.int64), finished, 2)
    assert policy_mask.tolist() == [[False, False], [True, False], [True, False]]
    assert value_mask.tolist() == [[False, False], [False, False], [True, False]]


def test_no_token_to_learn_from() -> None:
    none = torch.zeros(2, 4, dtype=torch.bool)
    logp, predictions = LOGP.clone().requires_grad_(), VALUES.clone().requires_grad_()
    zeros = torch.zeros(2, 4, dtype=F64)
    policy, value, metrics = tppo.tppo_loss(logp, OLD, zeros, predictions, zeros, none, none)
    (policy + value).backward()
    assert policy == 0 and value == 0 and metrics["n_value_tokens"] == 0 and metrics["n_policy_tokens"] == 0
    assert not logp.grad.any() and not predictions.grad.any()


def test_value_clip_takes_the_larger_error() -> None:
    predictions = torch.tensor([[1.0, 0.0, 0.5, 0.05, NAN]], dtype=F64, requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 1.0, 0.0, NAN]], dtype=F64)
    targets = torch.tensor([[2.0, 1.0, 0.0, 1.0, NAN]], dtype=F64)
    mask = torch.tensor([[True, True, True, True, False]])
    loss = tppo.value_loss(predictions, targets, mask, old_values=old, value_clip=0.1)
    loss.backward()
    # 0: clipped to 0.1, farther off. 2: clipped to 0.9, farther off. The others are within the clip.
    close(loss.detach(), (1.9**2 + 1 + 0.9**2 + 0.95**2) / 8)
    close(predictions.grad, [[0, -1 / 4, 0, -0.95 / 4, 0]])
    free = tppo.value_loss(predictions.detach(), targets, mask)
    close(free, (1 + 1 + 0.5**2 + 0.95**2) / 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tppo.tppo_masks(LENGTHS, torch.tensor([2, 4]), FINISHED, 4),
            r"win_start\[1\] is 4; it must lie between 0 and",
        ),
        (lambda: tppo.tppo_masks(LENGTHS, torch.tensor([-1, 0]), FINISHED, 4), r"win_start\[0\] is -1"),
        (lambda: tppo.tppo_masks(LENGTHS, START, FINISHED, 3), r"lengths\[0\] is 4; accepted are 0 to 3"),
        (lambda: tppo.egae(REWARDS, VALUES, LENGTHS + 1, FINISHED), r"lengths\[0\] is 5; accepted are 0 to 4"),
        (lambda: tppo.egae(REWARDS, VALUES, LENGTHS, FINISHED, bootstrap="last"), "bootstrap"),
        (lambda: tppo.egae(REWARDS, VALUES, LENGTHS, FINISHED, bootstrap="critic"), "last_values"),
        (lambda: tppo.value_targets(REWARDS, None, MASK, lam=0.9), "values is None; lam 0.9 needs them"),
        (lambda: tppo.value_loss(VALUES, VALUES, MASK, value_clip=0.1), "old_values is None; value_clip needs them"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


EXTRA = {"values": VALUES, "finished": FINISHED, "win_start": START}
ROLLOUT = Rollout(torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([0, 1]), MASK, OLD, extra=EXTRA)


def test_the_recipe_composes_it() -> None:
    recipe = load_recipe("tppo:lam=0.9")
    batch = recipe.prepare(ROLLOUT)
    close(batch["advantages"], [[0.254, 0.06, 0.4, 0], [0.642, 0.38, 0.2, 0]])
    logp, predictions = LOGP.clone().requires_grad_(), (VALUES + 0.1).requires_grad_()
    loss, metrics = recipe.loss(logp, batch)
    close(loss.detach(), -0.3556)
    assert metrics["tokens"] == 5
    value = recipe.value_loss(predictions, batch)
    close(value.detach(), 0.0766666667, atol=1e-10)
    rows = torch.tensor([0])
    part = take_rows(batch, rows)
    value = recipe.value_loss(predictions[rows], part)
    value.backward()
    assert value == 0 and not predictions.grad.any()
    close(recipe.loss(LOGP[rows], part).loss, -0.4 * 1.2 / 2)


def test_rewards_of_the_recipe() -> None:
    recipe = load_recipe("tppo:lam=0.9")
    plain = recipe.prepare(ROLLOUT)
    several = recipe.prepare(replace(ROLLOUT, rewards=torch.tensor([[0, 5.0], [0.25, 0.75]], dtype=F64)))
    tokens = recipe.prepare(replace(ROLLOUT, extra={**EXTRA, "token_rewards": REWARDS}))
    for other in (several, tokens):  # the 5 is of a completion that has not finished
        assert torch.equal(other["advantages"], plain["advantages"])
        assert torch.equal(other["value_targets"], plain["value_targets"])


def test_options_of_the_recipe() -> None:
    last = {**EXTRA, "last_values": torch.tensor([0.9, NAN], dtype=F64)}
    critic = load_recipe("tppo:lam=0.9,bootstrap=critic").prepare(replace(ROLLOUT, extra=last))["advantages"]
    expected = tppo.egae(REWARDS, VALUES, LENGTHS, FINISHED, lam=0.9, bootstrap="critic", last_values=last["last_values"])
    assert_close(critic, expected.advantages)
    targets = load_recipe("tppo:lam_value=0.5").prepare(ROLLOUT)["value_targets"]
    close(targets[1, :3], tppo.egae(REWARDS, VALUES, LENGTHS, FINISHED, lam=0.5).returns[1, :3])
    whitened = load_recipe("tppo:lam=0.9,whiten=True").prepare(ROLLOUT)["advantages"]
    window = torch.tensor([0.4, 0, 0.642, 0.38, 0.2], dtype=F64)
    expected = (window - window.mean()) / (window.var() + 1e-8).sqrt()
    close(whitened, [[0, 0, *expected[:2]], [*expected[2:], 0]], atol=1e-8)
    clipped = load_recipe("tppo:value_clip=0.05")
    moved = (VALUES + 0.1).requires_grad_()
    clipped.value_loss(moved, clipped.prepare(ROLLOUT)).backward()
    assert not moved.grad.any()  # each is farther off where it is clipped


@pytest.mark.parametrize("holes", [False, True])
def test_the_recipe_takes_packed_completions(holes) -> None:
    recipe = load_recipe("tppo:lam=0.9,gamma=0.95")
    lengths = torch.tensor([5, 3, 0, 6])
    inside = torch.arange(6) < lengths[:, None]
    mask = inside & (torch.rand(4, 6) < 0.6) if holes else inside
    count = mask.sum(1)
    finished, start = torch.tensor([True, False, True, True]), torch.minimum(torch.tensor([1, 1, 0, 2]), count)
    rewards, values, old = torch.randn(4, dtype=F64), torch.randn(4, 6, dtype=F64), -torch.rand(4, 6, dtype=F64)
    extra = {"values": values, "finished": finished, "win_start": start}
    padded = recipe.prepare(Rollout(rewards, torch.arange(4), mask, old, extra=extra))
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed = recipe.prepare(
        Rollout(
            rewards, torch.arange(4), mask[inside] if holes else None, old[inside], cu_seqlens=cu_seqlens,
            extra={**extra, "values": values[inside]},
        )
    )  # fmt: skip
    for key in ("advantages", "mask", "value_mask", "value_targets"):
        assert_close(packed[key], padded[key][inside], rtol=1e-12, atol=0)
    logp, predictions = (old + 0.2 * torch.randn(4, 6, dtype=F64)), values + 0.1
    assert_close(recipe.loss(logp[inside], packed).loss, recipe.loss(logp, padded).loss, rtol=1e-12, atol=0)
    value = recipe.value_loss(predictions[inside], packed)
    assert_close(value, recipe.value_loss(predictions, padded), rtol=1e-12, atol=0)
    assert padded["mask"].sum() == (count - start).sum() and padded["value_mask"].sum() == count[finished].sum()


@pytest.mark.parametrize("missing", ["values", "finished", "win_start"])
def test_the_recipe_names_what_is_missing(missing) -> None:
    extra = {key: value for key, value in EXTRA.items() if key != missing}
    with pytest.raises(ValueError, match=rf"recipe 'tppo' needs rollout\.extra\['{missing}'\]"):
        load_recipe("tppo").prepare(replace(ROLLOUT, extra=extra))


def test_the_recipe_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"values has shape \[2\]; that of the mask"):
        load_recipe("tppo").prepare(replace(ROLLOUT, extra={**EXTRA, "values": VALUES[:, 0]}))
    with pytest.raises(ValueError, match=r"finished has shape \[1\]; \[2\] is expected"):
        load_recipe("tppo").prepare(replace(ROLLOUT, extra={**EXTRA, "finished": FINISHED[:1]}))


def test_a_start_that_is_not_looked_at_makes_its_completion_nan(monkeypatch) -> None:
    """As on CUDA without validation."""
    monkeypatch.setattr("prefkern.papers._shared.may_look", lambda t: False)
    for start in (5, -1):
        batch = load_recipe("tppo").prepare(replace(ROLLOUT, extra={**EXTRA, "win_start": torch.tensor([2, start])}))
        assert batch["mask"][1].tolist() == [True, True, True, False]
        assert batch["advantages"][1, :3].isnan().all() and batch["advantages"][0].isfinite().all()
        assert load_recipe("tppo").loss(LOGP, batch).loss.isnan()


def test_losses_compile_without_a_break() -> None:
    def losses(logp, predictions):
        policy_mask, value_mask = tppo.tppo_masks(LENGTHS, START, FINISHED, 4)
        advantages = tppo.egae(REWARDS, VALUES, LENGTHS, FINISHED, lam=0.9).advantages
        targets = tppo.value_targets(REWARDS, None, MASK)
        policy, value, _ = tppo.tppo_loss(
            logp, OLD, advantages, predictions, targets, policy_mask, value_mask, old_values=VALUES, value_clip=0.2
        )
        return policy + value

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    logp, predictions = LOGP.clone().requires_grad_(), (VALUES + 0.1).requires_grad_()
    assert_close(compiled(logp, predictions), losses(logp, predictions), rtol=1e-12, atol=0)
