"""Pair builders against worked examples, their definitions and their edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefkern.data import (
    RankedPair,
    dno_pairs,
    mix_pair,
    ranked_pairs,
    replay,
    self_rm_pair,
    split_by_reward_gap,
    winrates,
)

RATINGS = [4.5, 3, 3, 1, 5]
MANY = st.lists(st.floats(-10, 10), min_size=0, max_size=7)


# ---- ranked pairs


def test_worked_best_against_the_rest() -> None:
    assert ranked_pairs(RATINGS) == [(4, 3, 4.0), (4, 2, 2.0), (4, 1, 2.0), (4, 0, 0.5)]
    assert ranked_pairs(torch.tensor(RATINGS)) == ranked_pairs(RATINGS)
    assert isinstance(ranked_pairs(RATINGS)[0], RankedPair)


def test_worked_all_pairs() -> None:
    assert ranked_pairs(RATINGS, pairs="all") == [
        (4, 3, 4.0), (0, 3, 3.5), (4, 2, 2.0), (4, 1, 2.0), (1, 3, 2.0), (2, 3, 2.0), (0, 2, 1.5), (0, 1, 1.5), (4, 0, 0.5),
    ]  # fmt: skip


@given(MANY, st.sampled_from(["best_vs_rest", "all"]))
def test_pairs_are_those_of_the_definition(ratings, pairs) -> None:
    found = ranked_pairs(ratings, pairs=pairs)
    best = max(ratings, default=0)
    first = ratings.index(best) if ratings else None
    expected = {
        (i, j) for i, a in enumerate(ratings) for j, b in enumerate(ratings) if a > b and (pairs == "all" or i == first)
    }
    assert {(c, r) for c, r, _ in found} == expected and len(found) == len(expected)
    assert all(gap == ratings[c] - ratings[r] for c, r, gap in found)
    assert [pair.gap for pair in found] == sorted((pair.gap for pair in found), reverse=True)


@given(st.permutations(range(5)), st.sampled_from(["best_vs_rest", "all"]))
def test_permuting_responses_permutes_indices_only(order, pairs) -> None:
    ratings = [4.5, 3.25, 2.0, 1.5, 5.0]
    moved = ranked_pairs([ratings[i] for i in order], pairs=pairs)
    assert [(order[c], order[r], gap) for c, r, gap in moved] == ranked_pairs(ratings, pairs=pairs)


def test_responses_that_make_no_pair() -> None:
    assert ranked_pairs([]) == ranked_pairs([1.0]) == ranked_pairs([2.0, 2.0, 2.0]) == []
    assert ranked_pairs([3.0, 3.0, 1.0]) == [(0, 2, 2.0)]  # a tie with the best is dropped, the first stands for both
    assert ranked_pairs([3.0, 3.0, 1.0], pairs="all") == [(0, 2, 2.0), (1, 2, 2.0)]
    assert ranked_pairs([math.nan, 3.0, None, 1.0]) == [(1, 3, 2.0)]
    assert ranked_pairs([math.nan, 3.0]) == []
    assert ranked_pairs([0.0, -math.inf, -math.inf]) == [(0, 2, math.inf), (0, 1, math.inf)]


# ---- reward gap

CHOSEN, REJECTED = [2.1, 0.3, -1.5, 0.9, 4], [0.2, 0.1, 0.4, 0.9, 0.5]


def lists(split):
    return [part.int().tolist() for part in split]


def test_worked_split() -> None:
    split = split_by_reward_gap(CHOSEN, REJECTED, gamma=1)
    assert lists(split) == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0] * 5]
    assert (split.gamma, split.contradicted, split.not_finite) == (1.0, 1, 0)
    signed = split_by_reward_gap(CHOSEN, REJECTED, gamma=1, mode="signed")
    assert lists(signed) == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert signed.contradicted == 0


def test_worked_fraction() -> None:
    split = split_by_reward_gap(CHOSEN, REJECTED, easy_fraction=0.6)
    assert split.gamma == pytest.approx(0.2, abs=1e-15)
    assert lists(split)[0] == [1, 0, 1, 0, 1]


@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), max_size=9), st.integers(0, 8), st.booleans())
def test_parts_are_disjoint_and_cover_what_is_finite(pairs, gamma, signed) -> None:
    mode = "signed" if signed else "abs"
    chosen, rejected = ([float(p[side]) for p in pairs] + [math.nan, math.inf][side : side + 1] for side in (0, 1))
    split = split_by_reward_gap(chosen, rejected, gamma=gamma, mode=mode)
    parts = torch.stack(list(split)).int().sum(0)
    assert parts.tolist() == [1] * len(pairs) + [0] and split.not_finite == 1
    wider = split_by_reward_gap(chosen, rejected, gamma=gamma + 1, mode=mode)
    assert wider.easy.sum() <= split.easy.sum() and not (wider.easy & ~split.easy).any()
    gap = torch.tensor([c - r for c, r in pairs] + [0])
    assert split.hard[:-1].tolist() == (gap.abs() <= gamma)[:-1].tolist()
    assert split.contradicted == (0 if signed else int((gap < -gamma).sum()))
    assert split.noisy.tolist() == ((gap < -gamma) & signed).tolist()


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8), st.floats(0, 1))
def test_a_fraction_bounds_the_easy_pairs(gaps, fraction) -> None:
    split = split_by_reward_gap(gaps, [0.0] * len(gaps), easy_fraction=fraction)
    most = math.ceil(round(fraction * len(gaps), 9))
    sizes = sorted(map(abs, gaps), reverse=True)
    assert split.gamma == [*sizes, max(math.nextafter(sizes[-1], -1), 0)][most]
    assert split.easy.tolist() == [abs(g) > split.gamma for g in gaps]
    assert split.easy.sum() <= most and (split.easy.sum() == most or len(set(sizes)) < len(sizes) or 0 in sizes)


def test_fractions_at_the_ends() -> None:
    distinct = [5.0, 4, 3, 2, 1, 0.5, 7, 9, 8, 6]
    zeros = [0.0] * 10
    assert [int(split_by_reward_gap(distinct, zeros, easy_fraction=f).easy.sum()) for f in (0, 0.1, 0.7, 0.95, 1)] == [
        0,
        1,
        7,
        10,
        10,
    ]
    everything = split_by_reward_gap([2.0, 1.0], [0.0, 0.0], easy_fraction=1)
    assert everything.gamma == math.nextafter(1.0, 0) and everything.easy.all()
    tied = split_by_reward_gap([0.0, 1.0], [0.0, 0.0], easy_fraction=1)
    assert tied.gamma == 0 and tied.hard.tolist() == [True, False]
    for mode in ("abs", "signed"):
        assert not split_by_reward_gap([], [], easy_fraction=0.5, mode=mode).easy.any()
    assert int(split_by_reward_gap(list(range(1, 101)), [0.0] * 100, easy_fraction=0.07).easy.sum()) == 7


def test_gaps_at_the_ends() -> None:
    exact = split_by_reward_gap([1.0, -1.0, 0.0], [0.0, 0.0, 0.0], gamma=1.0, mode="signed")
    assert exact.hard.all()
    assert split_by_reward_gap([1.0, -1.0, 0.0], [0.0] * 3, gamma=0).easy.tolist() == [True, True, False]
    assert split_by_reward_gap([1.0, -9.0], [0.0] * 2, gamma=math.inf).hard.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "gamma is None and easy_fraction is None; one of the two"),
        ({"gamma": 1, "easy_fraction": 0.5}, "gamma is 1 and easy_fraction is 0.5"),
        ({"gamma": -0.1}, "gamma is -0.1; it must not be negative"),
        ({"gamma": math.nan}, "gamma is nan"),
        ({"easy_fraction": 1.5}, r"easy_fraction is 1.5; a number in \[0, 1\]"),
        ({"gamma": 1, "mode": "sign"}, r"mode is 'sign'; accepted: 'abs', 'signed'; did you mean 'signed'\?"),
        ({"gamma": 1, "rejected_rewards": [1.0]}, r"chosen_rewards has shape \[5\], rejected_rewards \[1\]"),
    ],
)
def test_splits_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        split_by_reward_gap(**{"chosen_rewards": CHOSEN, "rejected_rewards": REJECTED, **options})


# ---- DNO


SCORES, TEACHER = [6, 5, 4, 3, 2, 6], [False] * 5 + [True]


def test_worked_dno_pairs() -> None:
    expected = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (5, 2), (5, 3), (5, 4)]
    assert dno_pairs(SCORES, TEACHER) == expected
    assert dno_pairs(torch.tensor(SCORES), torch.tensor(TEACHER)) == expected
    assert dno_pairs(SCORES, TEACHER, restrictive=True) == [(5, 2), (5, 3), (5, 4)]
    assert dno_pairs(SCORES, TEACHER, min_pos=6, student_margin=3) == [(0, 3), (0, 4), (5, 2), (5, 3), (5, 4)]


def test_prompts_without_dno_pairs() -> None:
    assert dno_pairs([4, 0, 1], [True, False, False]) == []  # no positive
    assert dno_pairs([5, 5, 4], [True, True, True]) == []  # all too near
    assert dno_pairs([5, 5], [False, False], margin=0, student_margin=0) == []  # a tie
    assert dno_pairs([6], [True]) == dno_pairs([], []) == []
    assert dno_pairs([6, math.nan, None, 2], TEACHER[:4]) == [(0, 3)]
    with pytest.raises(ValueError, match="is_teacher has 1 entries; 2 are expected"):
        dno_pairs([1, 2], [True])
    with pytest.raises(ValueError, match="student_margin is -1; it must not be negative"):
        dno_pairs([1, 2], [True, True], student_margin=-1)


def test_win_rates() -> None:
    wins = torch.tensor([[9.0, 1, 0], [0, math.nan, 1], [1, 0, -7]], dtype=torch.float64)
    assert winrates(wins).tolist() == [0.5, 0.5, 0.5]
    ragged = winrates(wins, torch.tensor([True, True, False]))
    assert ragged[:2].tolist() == [1, 0] and ragged[2].isnan()
    made = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    rates = winrates(wins, made)
    assert rates[0] == 0.5 and rates[1].isnan() and rates[2] == 0
    assert winrates(torch.ones(1, 1)).isnan().all()
    both = winrates(torch.stack([wins, wins]), torch.tensor([[True] * 3, [True, True, False]]))
    assert both[0].tolist() == [0.5] * 3 and both[1, :2].tolist() == [1, 0]
    draws = torch.tensor([[0, 1], [0, 0]], dtype=torch.bool)
    assert winrates(draws).tolist() == [1, 0] and winrates(draws).dtype == torch.float32


@pytest.mark.parametrize(
    ("wins", "mask", "message"),
    [
        (torch.zeros(2, 3), None, r"wins has shape \[2, 3\]; \[..., N, N\]"),
        (torch.tensor([[0, 1.5], [0, 0]]), None, r"wins\[0, 1\] is 1.5; a number in \[0, 1\]"),
        (torch.tensor([[0, 1], [math.nan, 0]]), None, r"wins\[1, 0\] is nan"),
        (torch.zeros(2, 2), torch.ones(3, dtype=torch.bool), r"mask is torch.bool \[3\]; bool \[2\] or \[2, 2\]"),
        (torch.zeros(2, 2), torch.ones(2), r"mask is torch.float32 \[2\]"),
    ],
)
def test_win_rates_refused(wins, mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        winrates(wins, mask)


def test_replay_halves() -> None:
    kept = replay([1000, 40, 100, 60])
    assert [len(part) for part in kept] == [75, 6, 30, 60]
    assert kept[3] == list(range(60))
    for part, size in zip(kept, [1000, 40, 100, 60], strict=True):
        assert part == sorted(set(part)) and all(0 <= i < size for i in part)
    assert replay([]) == [] and replay([3]) == [[0, 1, 2]] and replay([3, 0]) == [[], []]
    assert [len(part) for part in replay([100, 0], fraction=0.29)] == [29, 0]


def test_replay_depends_on_seed_and_place_only() -> None:
    assert replay([50, 50, 9], seed=3) == replay([50, 50, 9], seed=3)
    assert replay([50, 50, 9], seed=3) != replay([50, 50, 9], seed=4)
    assert set(replay([50, 50, 9])[0]) < set(replay([50, 50])[0])  # thins out with age
    one, other = replay([50, 50, 9], decay=1)[:2]
    assert len(one) == len(other) and one != other


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([3, 4], {"fraction": 1.2}, r"fraction is 1.2; a number in \[0, 1\]"),
        ([3, 4], {"decay": -1}, "decay is -1"),
        ([3, -4], {}, r"sizes\[1\] is -4"),
    ],
)
def test_replay_refused(sizes, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        replay(sizes, **options)


# ---- pairs from own and others' responses


def test_worked_self_rm_pair() -> None:
    assert self_rm_pair([2, -1, 7, 3], [1, 1, 0, 1]) == (3, 1)
    assert self_rm_pair(torch.tensor([2.0, -1, 7, 3]), torch.tensor([True, True, False, True])) == (3, 1)
    assert self_rm_pair([2, -1, 7, 3], [0, 1, 0, 0]) is None


def test_self_rm_pairs_with_ties() -> None:
    assert self_rm_pair([1, 3, 3, 1], [1] * 4) == (1, 0)
    assert self_rm_pair([2, 2], [1, 1]) is None and self_rm_pair([], []) is None
    assert self_rm_pair([math.nan, 2, 1], [0, 1, 1]) == (1, 2)
    with pytest.raises(ValueError, match=r"scores\[0\] is nan; every response that counts needs a score"):
        self_rm_pair([math.nan, 2, 1], [1, 1, 1])
    with pytest.raises(ValueError, match="valid has 1 entries; 3 are expected"):
        self_rm_pair([1, 2, 3], [1])


def test_mixing() -> None:
    assert mix_pair(use_rm=False) == mix_pair(9, 1, use_rm=False) == ("external", "self")
    assert mix_pair(2, 1, use_rm=True) == ("self", "external")
    assert mix_pair(1, 1, use_rm=True) == mix_pair(0, 1, use_rm=True) == ("external", "self")
    with pytest.raises(ValueError, match="score_external is None; use_rm needs a score of both"):
        mix_pair(1, use_rm=True)
    with pytest.raises(ValueError, match="score_self is nan"):
        mix_pair(math.nan, 1.0, use_rm=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ranked_pairs([1.0], pairs="best"), ValueError, r"pairs is 'best'; accepted: 'best_vs_rest', 'all'"),
        (lambda: ranked_pairs(torch.zeros(2, 2)), ValueError, r"ratings has shape \[2, 2\]; one number per response"),
        (lambda: ranked_pairs(["a"]), TypeError, r"ratings is \['a'\]; one number per response"),
        (lambda: self_rm_pair(3, [1]), TypeError, "scores is 3; one number per response"),
    ],
)
def test_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
