"""The advantage ops and their definitions against numbers worked out elsewhere, one table for both."""

import math

import pytest
import torch
from torch.testing import assert_close

import prefkern
from prefkern import reference

F64 = torch.float64
NAN = math.nan


@pytest.fixture(params=[prefkern, reference], ids=["op", "definition"])
def ops(request):
    """The module that has the functions: the kernels, or the definitions."""
    return request.param


def f64(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=6e-11):
    """To the printed digits."""
    assert_close(actual, torch.tensor(expected, dtype=F64), rtol=0, atol=atol)


REWARDS, GROUP, LENGTHS = f64(1, 0, 0, 0, 1, 1, 0.5, 1), torch.arange(8) // 4, torch.tensor([3, 1, 2, 4, 2, 2, 4, 1])
BASELINES = {
    "grpo": (dict(eps=1e-6), [1.4999970, *[-0.4999990] * 3, 0.4999980, 0.4999980, -1.4999940, 0.4999980], 6e-8),
    "rloo": (dict(estimator="rloo"), [1, *[-0.3333333333] * 3, 0.1666666667, 0.1666666667, -0.5, 0.1666666667], 6e-11),
    "opo": (
        dict(estimator="opo", lengths=LENGTHS), [0.7, *[-0.3] * 3, *[0.2222222222] * 2, -0.2777777778, 0.2222222222], 6e-11,
    ),
    "gpg": (dict(estimator="dr_grpo", batch="nonzero"), [1.2, *[-0.4] * 3, 0.2, 0.2, -0.6, 0.2], 1e-15),
    "scaled by the batch": (
        dict(eps=1e-4, batch="std"),
        [1.5132695444, *[-0.5044231815] * 3, *[0.2522115907] * 2, -0.7566347722, 0.2522115907], 6e-11,
    ),
    "reinforce++ baseline": (
        dict(estimator="dr_grpo", batch="token", lengths=LENGTHS),
        [1.9663633481, *[-0.5882283520] * 3, *[0.3697435355] * 2, -0.9075523146, 0.3697435355], 6e-11,
    ),
    "the best of a group": (dict(estimator="pass_at_k_no_std"), [1, 0, 0, 0, 0, 0, 0, 0], 0),
    "the best of a group, scaled": (dict(estimator="pass_at_k", eps=0), [2, 0, 0, 0, 0, 0, 0, 0], 1e-15),
}  # fmt: skip


@pytest.mark.parametrize("case", BASELINES)
def test_baselines(ops, case):
    options, expected, atol = BASELINES[case]
    close(ops.group_advantages(REWARDS, GROUP, **options).advantages, expected, atol)


def test_whiten_of_tokens_is_the_token_stage(ops):
    """REINFORCE++-baseline from the tokens themselves, T = 4."""
    mask = torch.arange(4) < LENGTHS[:, None]
    tokens = reference.group_advantages(REWARDS, GROUP, estimator="dr_grpo").advantages[:, None].expand(8, 4)
    out = ops.whiten(tokens.where(mask, NAN), mask)
    rows = ops.group_advantages(REWARDS, GROUP, estimator="dr_grpo", batch="token", lengths=LENGTHS).advantages
    assert_close(out, rows[:, None] * mask, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------- several rewards per sample

TWO = f64(*[[1, 0], [0, 1], [0, 0], [1, 1], [1, 0], [1, 0], [0, 0], [1, 1]])
GDPO = dict(combine="normalize_then_sum", eps=1e-4, batch="seq")


def test_rewards_normalised_apart(ops):
    close(
        ops.group_advantages(TWO, GROUP, **GDPO).advantages,
        [0, 0, -1.2246770063, 1.2246770063, 0, 0, -1.4140973144, 1.4140973144],
    )
    close(
        ops.group_advantages(TWO, GROUP, weights=(1, 0.5), **GDPO).advantages,
        [0.3929228429, -0.3929228429, -1.1787685288, 1.1787685288, 0.2268480318, 0.2268480318, -1.5879362227, 1.1342401591],
    )


def test_rewards_normalised_apart_over_tokens(ops):
    lengths = torch.tensor([3, 1, 2, 3, 2, 3, 1, 3])
    out = ops.group_advantages(TWO, GROUP, combine="normalize_then_sum", eps=1e-6, batch="token", lengths=lengths)
    close(
        out.advantages,
        [-0.2430855703, -0.2430855703, -1.5652405418, 1.0790694012, -0.2430855703, -0.2430855703, -1.7697782186, 1.2836070780],
    )


def test_rewards_that_do_not_apply(ops):
    rewards = TWO.clone()
    rewards[2], rewards[5, 1] = NAN, NAN
    out = ops.group_advantages(rewards, GROUP, nan="ignore", **GDPO).advantages
    close(
        out,
        [-0.4634730103, -0.4634730103, 0, 0.9269460207, -0.0621043622, 0.4013686481, -1.6675789548, 1.3283146688],
    )
    assert out[2] == 0


def test_a_sum_confuses_what_apart_stays_apart(ops):
    rewards, group = f64([1, 1], [0, 0], [1, 0], [0, 0]), torch.tensor([0, 0, 1, 1])
    together = ops.group_advantages(rewards, group, eps=1e-4).advantages
    close(together, [0.7070567847, -0.7070567847, 0.7070067953, -0.7070067953])
    close(ops.group_advantages(rewards, group, **GDPO).advantages, [1.0953602568, -1.0953602568, 0.5476801284, -0.5476801284])


def test_weighted_aspects(ops):
    aspects = f64([0.9, 0.2, 0.5, 0.1], [0.4, 0.6, 0.5, 0.9], [0.7, 0.7, 0.5, 0.4], [0.2, 0.3, 0.5, 0.8])
    options = dict(weights=[0.25] * 4, eps=1e-4)
    group = torch.zeros(4, dtype=torch.int64)
    out = ops.group_advantages(aspects, group, outputs=("mean", "min", "max"), **options)
    close(out.advantages, [-0.9954820518, 0.9954820518, 0.7110586085, -0.7110586085])
    close(torch.stack([out.mean[0], out.min[0], out.max[0]]), [0.5125, 0.425, 0.6], 1e-15)
    apart = ops.group_advantages(aspects, group, combine="normalize_then_sum", **options).advantages
    close(apart, [-0.2853344226, 0.2735157533, 0.2816057452, -0.2697870759])
    assert apart.argmax() == 2


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_two_aspects_that_cancel(ops, combine):
    rewards, group = f64([1, 0], [0, 1]), torch.zeros(2, dtype=torch.int64)
    assert ops.group_advantages(rewards, group, weights=[0.5, 0.5], combine=combine).advantages.tolist() == [0, 0]
    first, second = ops.group_advantages(rewards, group, weights=[0.6, 0.4], combine=combine).advantages
    assert first > 0 > second


# ------------------------------------------------------------------------------------------------------ virtual samples

NGRPO = dict(singleton="calibrate", virtual_count=1)
VIRTUAL = {
    "all wrong": ([0, 0, 0, 0], 1, [-0.4472125955] * 4),
    "all wrong, two of them": ([0, 0, 0, 0], 2, [-0.6454959744] * 4),
    "one right": ([1, 0, 0, 0], 1, [1.0954431150, *[-0.7302954100] * 3]),
    "one wrong": ([1, 1, 1, 0], 1, [*[0.4472125955] * 3, -1.7888503820]),
    "all right": ([1, 1, 1, 1], 1, [0, 0, 0, 0]),
    "none of them": ([1, 0, 0, 0], 0, [1.4999970000, *[-0.4999990000] * 3]),
}


@pytest.mark.parametrize("case", VIRTUAL)
def test_virtual_samples(ops, case):
    rewards, count, expected = VIRTUAL[case]
    out = ops.group_advantages(f64(*rewards), torch.zeros(4, dtype=torch.int64), virtual_count=count).advantages
    close(out, expected, 2e-10 if count else 1e-8)
    if count == 0:
        assert torch.equal(out, ops.group_advantages(f64(*rewards), torch.zeros(4, dtype=torch.int64)).advantages)


def test_one_sample_beside_a_virtual_one(ops):
    """0 and 1: mean 1/2, standard deviation sqrt(1/2)."""
    rewards, group = f64(0), torch.tensor([5])
    expected = -0.5 / (math.sqrt(0.5) + 1e-6)
    close(ops.group_advantages(rewards, group, **NGRPO).advantages, [expected], 1e-15)
    for singleton, alone in (("zero", 0.0), ("reward", 0.25 / (1 + 1e-6))):
        close(ops.group_advantages(rewards + 0.25, group, singleton=singleton, virtual_count=3).advantages, [alone], 1e-15)
    assert ops.group_advantages(rewards + 0.25, group, singleton="calibrate").advantages.tolist() == [0]


# -------------------------------------------------------------------------------------------------- mean absolute deviation

QUESTIONS = f64(1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0)
QUESTION = torch.arange(12) // 4
TOKENS = torch.tensor([10, 20, 30, 40, *[10] * 4, *[5] * 4])


def test_mean_absolute_deviation(ops):
    out = ops.group_advantages(QUESTIONS, QUESTION, estimator="mad", eps=1e-4).advantages
    close(out, [1.9998666756, *[-0.6666222252] * 3, *[0.6666222252] * 3, -1.9998666756, 0, 0, 0, 0])
    single = ops.group_advantages(f64(0.2, 0.7, 0.9, 0.2), torch.zeros(4, dtype=torch.int64), estimator="mad", eps=1e-4)
    close(single.advantages, [-0.9999166736, 0.6666111157, 1.3332222315, -0.9999166736])


def test_question_weights(ops):
    out = ops.question_weights(QUESTIONS, QUESTION, lengths=TOKENS)
    close(out.weights, [*[1.1243530018] * 4, *[0.8756469982] * 4, *[1] * 4])
    assert out.valid.tolist() == [True] * 8 + [False] * 4
    close(out.scale, 1.1428571429)
    a = ops.group_advantages(QUESTIONS, QUESTION, estimator="mad", eps=1e-4).advantages
    close(
        a * out.weights * out.scale,
        [2.5697783998, *[-0.8565927999] * 3, *[0.6671151434] * 3, -2.0013454301, 0, 0, 0, 0],
    )


def test_questions_that_other_rewards_make_valid(ops):
    rewards, group = f64(0.3, 0, 1, 0), torch.tensor([0, 0, 1, 1])
    main = f64(0, 0, 1, 0)
    close(ops.question_weights(rewards, group, main_rewards=main).weights, [*[0.8756469982] * 2, *[1.1243530018] * 2])
    paper = ops.question_weights(rewards, group, main_rewards=main, zero_accuracy_as_easy=False)
    close(paper.weights, [*[1.1243530018] * 2, *[0.8756469982] * 2])
    assert paper.scale == 1


# ---------------------------------------------------------------------------------------------------------- masked pairs


def test_a_pair_that_scores_alike_is_masked(ops):
    rewards, scores, group = f64(1, 1, 0, 0), f64(0.9, 0.55, 0.5, 0.1), torch.zeros(4, dtype=torch.int64)
    out = ops.pair_masked_advantages(rewards, scores, group, tau=0.2)
    close(out.advantages, [0.8660239038, 0.4330119519, -0.4330119519, -0.8660239038])
    assert out.masked_pairs.tolist() == [0, 1, 1, 0]
    assert out.kept.all()
    sequence = ops.pair_masked_advantages(rewards, scores, group, tau=0.2, level="sequence")
    close(sequence.advantages, [0.8660239038, 0.8660239038, -0.8660239038, -0.8660239038])


def test_an_anchor_and_a_rollout_that_scores_like_it(ops):
    rewards, scores = f64(0, 0, 0, 1), f64(0.2, 0.9, 0.1, 1)
    out = ops.pair_masked_advantages(rewards, scores, torch.zeros(4, dtype=torch.int64), tau=0.2)
    close(out.advantages, [-0.4999990, 0, -0.4999990, 0.9999980], 6e-8)
    assert out.kept.tolist() == [True, False, True, True]
    assert out.masked_pairs.tolist() == [0, 1, 0, 1]
