"""GiGPO against its worked numbers, loops over dictionaries, its invariants and its edge cases."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import prefkern
from prefkern.papers import Rollout, gigpo, load_recipe

F64 = torch.float64
GROUP = torch.zeros(6, dtype=torch.int64)
TRAJ = torch.tensor([0, 0, 0, 1, 1, 2])
STEP = torch.tensor([0, 1, 2, 0, 1, 0])
ANCHOR = gigpo.anchor_groups(list("abcaba"), GROUP)
RETURNS = torch.tensor([10, 10, 10, 0, 0, 0], dtype=F64)
REWARDS = torch.tensor([0, 0, 10, 0, 0, 0], dtype=F64)


def run(**options):
    return gigpo.gigpo_advantages(RETURNS, REWARDS, GROUP, TRAJ, STEP, ANCHOR, **options)


def close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def test_worked_numbers() -> None:
    close(prefkern.segmented_returns(REWARDS, TRAJ, STEP, gamma=0.95), [9.025, 9.5, 10, 0, 0, 0])
    close(run(step_weight=0.0), [5, 5, 5, -5, -5, -5])
    steps = [6.0166666667, 4.75, 0, -3.0083333333, -4.75, -3.0083333333]
    close(run() - run(step_weight=0.0), steps)
    close(run(), [11.0166666667, 9.75, 5, -8.0083333333, -9.75, -8.0083333333])


def test_worked_numbers_with_std() -> None:
    episodes = run(mode="mean_std_norm", step_weight=0.0)
    close(episodes, [0.9128707625] * 3 + [-0.9128707625] * 3)
    steps = [1.1547003168, 0.7071066759, 0, -0.5773501584, -0.7071066759, -0.5773501584]
    close(run(mode="mean_std_norm") - episodes, steps)


def test_worked_numbers_per_trajectory() -> None:
    episodes = run(episode_stats="trajectories", step_weight=0.0)
    close(episodes, [6.6666666667] * 3 + [-3.3333333333] * 3)
    close(run(episode_stats="trajectories") - episodes, run() - run(step_weight=0.0))


def by_definition(returns, rewards, group, traj, step, anchor, gamma, w, std, rows, eps, penalty):
    """With dictionaries, as the release does."""
    n = len(returns)
    discounted = [0.0] * n
    for e in set(traj):
        carry = 0.0
        for b in sorted((b for b in range(n) if traj[b] == e), key=lambda b: -step[b]):
            carry = rewards[b] + gamma * carry
            discounted[b] = carry
    returns = [r - p for r, p in zip(returns, penalty, strict=True)]
    discounted = [r - p for r, p in zip(discounted, penalty, strict=True)]

    def statistics(values, alone):
        result = {}
        for key, xs in values.items():
            mean = sum(xs) / len(xs)
            if len(xs) == 1:
                result[key] = alone(xs[0])
            else:
                result[key] = mean, math.sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - 1))
        return result

    episodes, seen = defaultdict(list), set()
    for b in sorted(range(n), key=lambda b: step[b]):
        if rows or traj[b] not in seen:
            episodes[group[b]].append(returns[b])
        seen.add(traj[b])
    states = defaultdict(list)
    for b in range(n):
        states[group[b], anchor[b]].append(discounted[b])
    of_group = statistics(episodes, lambda x: (0.0, 1.0))
    of_state = statistics(states, lambda x: (x, 1.0))
    result = []
    for b in range(n):
        (m, s), (ms, ss) = of_group[group[b]], of_state[group[b], anchor[b]]
        first, second = returns[b] - m, discounted[b] - ms
        if std:
            first, second = first / (s + eps), second / (ss + eps)
        result.append(first + w * second)
    return result


@pytest.mark.parametrize("mode", ["mean_norm", "mean_std_norm"])
@pytest.mark.parametrize("episode_stats", ["rows", "trajectories"])
def test_against_the_definition(mode, episode_stats) -> None:
    generator = torch.Generator().manual_seed(3)
    traj = torch.randint(0, 9, (40,), generator=generator)
    group = traj % 3 * 1000 - 7  # any ids
    group[traj == 8] = 55  # an episode alone
    step = torch.zeros(40, dtype=torch.int64)
    for e in range(9):
        rows = (traj == e).nonzero()[:, 0]
        step[rows] = torch.randperm(len(rows), generator=generator) * 3 + 5
    anchor = torch.randint(0, 4, (40,), generator=generator) * 2**40
    rewards = torch.randn(40, dtype=F64, generator=generator)
    returns = torch.stack([rewards[traj == e].sum() for e in traj.tolist()])
    invalid = torch.rand(40, generator=generator) < 0.3
    a = gigpo.gigpo_advantages(
        returns, rewards, group, traj, step, anchor, gamma=0.9, step_weight=0.7, mode=mode, episode_stats=episode_stats,
        eps=1e-3, invalid=invalid, invalid_coef=0.2,
    )  # fmt: skip
    expected = by_definition(
        returns.tolist(), rewards.tolist(), group.tolist(), traj.tolist(), step.tolist(), anchor.tolist(), 0.9, 0.7,
        mode == "mean_std_norm", episode_stats == "rows", 1e-3, (0.2 * invalid.double()).tolist(),
    )  # fmt: skip
    close(a, expected, atol=1e-9)


@pytest.mark.parametrize("episode_stats", ["rows", "trajectories"])
def test_rows_that_pad_the_batch_change_nothing(episode_stats) -> None:
    def padded(x, fill):
        return torch.cat([x, torch.full((3,), fill, dtype=x.dtype)])

    mask = torch.tensor([True] * 6 + [False] * 3)
    a = gigpo.gigpo_advantages(
        padded(RETURNS, math.nan), padded(REWARDS, math.inf), padded(GROUP, 0), padded(TRAJ, 2), padded(STEP, 0),
        padded(ANCHOR, int(ANCHOR[0])), episode_stats=episode_stats, row_mask=mask,
    )  # fmt: skip
    close(a, [*run(episode_stats=episode_stats).tolist(), 0, 0, 0], atol=1e-12)


def test_an_invalid_action_costs_its_own_row_only() -> None:
    invalid = torch.tensor([False, True, False, False, False, False])
    distinct = torch.arange(6)
    a, b = (
        gigpo.gigpo_advantages(RETURNS, REWARDS, GROUP, TRAJ, STEP, distinct, invalid=x, invalid_coef=0.6)
        for x in (invalid, torch.zeros_like(invalid))
    )
    close(a - b, [0.1, 0.1 - 0.6, 0.1, 0.1, 0.1, 0.1])


def test_groups_of_one_differ_at_the_two_levels() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    r = torch.tensor([3.0], dtype=F64)
    for stats in ("rows", "trajectories"):
        close(gigpo.gigpo_advantages(r, r, one, one, one, one, episode_stats=stats), [3.0])
        a = gigpo.gigpo_advantages(r, r, one, one, one, one, mode="mean_std_norm", eps=1.0, episode_stats=stats)
        close(a, [1.5])


def test_a_constant_state_says_nothing_and_two_visits_are_compared() -> None:
    group, traj, step, anchor = (torch.zeros(3, dtype=torch.int64) for _ in range(4))
    step = torch.arange(3)
    anchor = torch.tensor([0, 1, 0])
    returns, rewards = torch.full((3,), 1.0, dtype=F64), torch.tensor([0, 0, 1], dtype=F64)
    a = gigpo.gigpo_advantages(returns, rewards, group, traj, step, anchor, gamma=0.5)
    close(a, [-0.375, 0, 0.375])
    assert not gigpo.gigpo_advantages(returns, rewards, group, traj, step, anchor, gamma=1.0).any()


@st.composite
def batches(draw):
    episodes = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.floats(-2, 2)), min_size=1, max_size=8))
    rows = [(g, e, t, r, t == n - 1) for e, (g, n, r) in enumerate(episodes) for t in range(n)]
    order = draw(st.permutations(range(len(rows))))
    return [rows[i] for i in order], draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))


@given(batches())
def test_invariants(batch) -> None:
    rows, anchors = batch
    group, traj, step = (torch.tensor([row[i] for row in rows]) for i in range(3))
    returns = torch.tensor([row[3] for row in rows], dtype=F64)
    rewards = torch.tensor([row[3] if row[4] else 0.0 for row in rows], dtype=F64)
    anchor = torch.tensor(anchors)
    episodes = gigpo.gigpo_advantages(returns, rewards, group, traj, step, anchor, step_weight=0.0)
    steps = gigpo.gigpo_advantages(returns, rewards, group, traj, step, anchor) - episodes
    for g in set(group.tolist()):
        if (group == g).sum() > 1:
            assert abs(float(episodes[group == g].sum())) < 1e-9
        for s in set(anchors):
            assert abs(float(steps[(group == g) & (anchor == s)].sum())) < 1e-9
    grpo = prefkern.group_advantages(returns, group, estimator="dr_grpo", singleton="reward").advantages
    close(episodes, grpo, atol=1e-12)
    distinct = gigpo.gigpo_advantages(returns, rewards, group, traj, step, torch.arange(len(rows)))
    close(distinct, episodes, atol=1e-12)
    same = gigpo.gigpo_advantages(returns, rewards, group, traj, step, torch.zeros_like(anchor), gamma=1.0)
    shared = torch.tensor([bool((group == g).sum() > 1) for g in group.tolist()])
    close(torch.where(shared, same - episodes, 0.0), torch.where(shared, episodes, 0.0), atol=1e-9)


def test_observations_are_compared_by_content_within_their_group() -> None:
    group = torch.tensor([0, 0, 1, 0])
    assert gigpo.anchor_groups(["x", "y", "x", "x"], group).tolist() == [0, 1, 2, 0]
    arrays = [torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 2]), torch.tensor([1, 2])]
    assert gigpo.anchor_groups(arrays, group).tolist() == [0, 1, 2, 0]
    assert gigpo.anchor_groups([a.numpy() for a in arrays], group).tolist() == [0, 1, 2, 0]
    different = [torch.tensor([1]), torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor(1)]
    assert gigpo.anchor_groups(different, torch.zeros(4).long()).tolist() == [0, 1, 2, 3]
    assert gigpo.anchor_groups([(1, "a"), (1, "b"), (1, "a"), (1, "a")], group).tolist() == [0, 1, 2, 0]


def test_similar_texts_share_a_group() -> None:
    texts = ["you are in the kitchen", "you are in the kitchens", "you are in a cellar", "you are in the kitchen"]
    group = torch.tensor([0, 0, 0, 1])
    assert gigpo.anchor_groups(texts, group, similarity=0.9).tolist() == [0, 0, 2, 3]
    assert gigpo.anchor_groups(texts, group).tolist() == [0, 1, 2, 3]


def test_an_empty_batch() -> None:
    none, ids = torch.zeros(0, dtype=F64), torch.zeros(0, dtype=torch.int64)
    assert gigpo.gigpo_advantages(none, none, ids, ids, ids, ids).shape == (0,)


def test_recipe() -> None:
    mask = torch.arange(4) < torch.randint(1, 5, (6, 1))
    old = -torch.rand(6, 4, dtype=F64)
    logp = old + 0.3 * torch.randn(6, 4, dtype=F64)
    invalid = torch.tensor([False, True, False, False, False, True])
    extra = {"step_rewards": REWARDS, "traj": TRAJ, "step": STEP, "anchor_ids": ANCHOR, "invalid": invalid}
    recipe = load_recipe("gigpo", gamma=0.9, step_weight=0.5, beta=0.01)
    out = recipe.loss(logp, recipe.prepare(Rollout(RETURNS, GROUP, mask, old, old - 0.1, extra=extra)))
    a = run(gamma=0.9, step_weight=0.5, invalid=invalid)
    expected = prefkern.policy_loss(logp, old, a, mask, ref_logp=old - 0.1, beta=0.01)
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)


def call(**changes):
    arguments = {
        "episode_return": RETURNS, "step_rewards": REWARDS, "group": GROUP, "traj": TRAJ, "step": STEP, "anchor_ids": ANCHOR,
    }  # fmt: skip
    return gigpo.gigpo_advantages(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: call(mode="std"), "mode is 'std'; accepted: 'mean_norm', 'mean_std_norm'"),
        (lambda: call(episode_stats="steps"), "episode_stats is 'steps'; accepted: 'rows', 'trajectories'"),
        (lambda: call(gamma=1.1), "gamma"),
        (lambda: call(step=torch.zeros(6, dtype=torch.int64)), "order"),
        (lambda: call(episode_return=RETURNS.index_fill(0, torch.tensor([4]), math.nan)), r"episode_return\[4\] is nan"),
        (lambda: call(step_rewards=REWARDS.index_fill(0, torch.tensor([1]), math.inf)), r"step_rewards\[1\] is inf"),
        (lambda: gigpo.anchor_groups([[1], [2]], torch.zeros(2).long()), r"anchors\[0\] is a list, which cannot be hashed"),
        (lambda: gigpo.anchor_groups(["a"], torch.zeros(2).long()), "anchors has 1 rows; group has 2"),
        (lambda: gigpo.anchor_groups([1, 2], torch.zeros(2).long(), similarity=0.9), r"anchors\[0\] is a int; similarity"),
        (lambda: gigpo.anchor_groups(["a"], torch.zeros(1).long(), similarity=0.0), "similarity is 0.0"),
        (lambda: load_recipe("gigpo").prepare(Rollout(RETURNS, GROUP)), r"needs rollout.extra\['step_rewards'\]"),
    ],
)
def test_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
