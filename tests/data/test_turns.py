"""Which turns of a dialogue become pairs."""

import itertools
import math

import pytest

from prefkern.data import ecpo_satisfaction, ecpo_select

SCORES = [4, 0, 3, None, 1, 5]
ORIGINALS = ["Ask[x]"] * 6
REWRITES = ["Ask[y]", "Ask[y]", "Recommend[b]", "Ask[y]", "Ask[x]", "Ask[y]"]


@pytest.mark.parametrize(("lam", "min_score", "expected"), [(4, 1, [2]), (5, 1, [0, 2]), (5, 0, [0, 1, 2])])
def test_worked_selection(lam, min_score, expected) -> None:
    selected = ecpo_select(SCORES, ORIGINALS, REWRITES, lam=lam, min_score=min_score)
    assert selected == expected
    assert sum(selected.skipped.values()) + len(selected) == 6


def test_what_was_left_out_is_counted_by_reason() -> None:
    scores = [None, math.nan, 5, 0, 2, 2, 2, 2, 2, 2, 2]
    rewrites = [
        "Ask[a]", "Ask[a]", "no", "Ask[a]", None, "Recommend[The Ring [Special Edition]]", "Ask[]", "ask[a]", "Ask[x]",
        "Search[a]", "Ask[b]",
    ]  # fmt: skip
    selected = ecpo_select(scores, ["Ask[x]"] * 11, rewrites, lam=4, min_score=1, same_action=True)
    assert selected == [10]
    assert selected.skipped == {
        "no_score": 2, "good_enough": 1, "below_min_score": 1, "no_rewrite": 1, "inner_brackets": 1, "bad_format": 2,
        "unchanged": 1, "other_action": 1,
    }  # fmt: skip
    assert ecpo_select(scores, ["Ask[x]"] * 11, rewrites, lam=4, min_score=1) == [9, 10]
    loose = ecpo_select(scores, ["Ask[x]"] * 11, rewrites, lam=4, min_score=1, check_format=False)
    assert loose == [5, 6, 7, 9, 10] and loose.skipped["inner_brackets"] == loose.skipped["bad_format"] == 0


def test_the_selection_grows_with_the_threshold() -> None:
    found = [ecpo_select(SCORES, ORIGINALS, REWRITES, lam=lam) for lam in range(7)]
    assert all(set(less) <= set(more) for less, more in itertools.pairwise(found))
    assert found[0] == [] and found[6] == [0, 1, 2, 5]


def test_pairs_are_counted_by_dialogue() -> None:
    assert ecpo_select(SCORES, ORIGINALS, REWRITES, lam=5, dialogue=list("aabbcc")).per_dialogue == {"a": 2, "b": 1, "c": 0}
    assert ecpo_select(SCORES, ORIGINALS, REWRITES, lam=5).per_dialogue is None


def test_worked_satisfaction() -> None:
    assert [ecpo_satisfaction(*points) for points in ((0, 0, 0), (1, 2, 0), (2, 2, 1))] == [5, 2, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ecpo_satisfaction(3, 0, 0), "flexibility is 3; accepted: 0, 1, 2"),
        (lambda: ecpo_satisfaction(0, -1, 0), "coherence is -1"),
        (lambda: ecpo_satisfaction(0, 0, 2), "guidance is 2; accepted: 0, 1"),
        (lambda: ecpo_select([1], [], ["Ask[y]"], lam=4), "originals has 0 entries; 1 are expected, one per turn"),
        (lambda: ecpo_select([1], ["a"], [], lam=4), "rewrites has 0 entries"),
        (lambda: ecpo_select([1], ["a"], ["b"], lam=4, dialogue=[1, 2]), "dialogue has 2 entries"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
