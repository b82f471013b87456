"""Stages of a curriculum, and whose reference they have."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefkern.data import Curriculum, ranked_pairs

RATINGS = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6)


def stages(curriculum):
    return [curriculum.stage(i) for i in range(len(curriculum))]


def test_stage_i_has_the_ith_easiest_pair_of_every_prompt() -> None:
    curriculum = Curriculum([ranked_pairs([5, 4, 3, 2]), ranked_pairs([1, 9, 8, 2])])
    assert stages(curriculum) == [
        [(0, 0, 3, 3.0), (1, 1, 0, 8.0)], [(0, 0, 2, 2.0), (1, 1, 3, 7.0)], [(0, 0, 1, 1.0), (1, 1, 2, 1.0)],
    ]  # fmt: skip


def test_worked_global_buckets() -> None:
    gaps = [3, 0.5, 2, 1, 2.5, 0.2, 1.5]
    curriculum = Curriculum([[(0, 1, gap)] for gap in gaps], bucket="global")
    where = {pair.prompt: i for i, stage in enumerate(stages(curriculum)) for pair in stage}
    assert [where[p] for p in range(7)] == [0, 2, 0, 1, 0, 2, 1]


def test_prompts_with_fewer_or_more_pairs_than_stages() -> None:
    curriculum = Curriculum([ranked_pairs([3, 2, 1]), ranked_pairs([6, 5, 4, 3, 2, 1]), ranked_pairs([1, 1])])
    per_prompt = [[[pair.gap for pair in stage if pair.prompt == p] for stage in stages(curriculum)] for p in range(3)]
    assert per_prompt == [[[2], [1], []], [[5, 4], [3, 2], [1]], [[], [], []]]
    assert curriculum.without_pairs == 1


@given(RATINGS, st.integers(1, 4), st.sampled_from(["rank", "global"]), st.sampled_from(["best_vs_rest", "all"]))
def test_stages_hold_each_pair_once_and_get_harder(ratings, n, bucket, pairs) -> None:
    given = [ranked_pairs(r, pairs=pairs) for r in ratings]
    dealt = stages(Curriculum(given, n_stages=n, bucket=bucket))
    flat = [pair for stage in dealt for pair in stage]
    assert sorted(flat) == sorted((p, *pair) for p, prompt in enumerate(given) for pair in prompt)
    for prompt in range(len(given)) if bucket == "rank" else [None]:
        parts = [[pair.gap for pair in stage if prompt in (None, pair.prompt)] for stage in dealt]
        bounds = [(max(part), min(part)) for part in parts if part]
        assert all(easier[1] >= harder[0] for easier, harder in itertools.pairwise(bounds))
        sizes = [len(part) for part in parts]
        assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


def test_gaps_of_different_sources_are_not_compared() -> None:
    pairs = [[(0, 1, gap)] for gap in (30.0, 10.0, 3.0, 1.0)]
    assert [[p.prompt for p in s] for s in stages(Curriculum(pairs, n_stages=2, bucket="global"))] == [[0, 1], [2, 3]]
    apart = Curriculum(pairs, n_stages=2, bucket="global", source=["a", "a", "b", "b"])
    assert [[p.prompt for p in s] for s in stages(apart)] == [[0, 2], [1, 3]]


def test_the_reference_is_the_stage_before() -> None:
    pairs = [ranked_pairs([4, 3, 2, 1])]
    curriculum = Curriculum(pairs)
    assert [curriculum.reference_of(i) for i in range(3)] == [None, 0, 1]
    assert [Curriculum(pairs, reference="fixed").reference_of(i) for i in range(3)] == [None] * 3
    assert Curriculum(pairs, n_stages=1).stage(0) == [(0, 0, 3, 3.0), (0, 0, 2, 2.0), (0, 0, 1, 1.0)]


def test_a_stage_without_pairs_leaves_the_reference() -> None:
    late = Curriculum([ranked_pairs([2, 1])], n_stages=4, reverse=True)
    assert [len(stage) for stage in stages(late)] == [0, 0, 0, 1]
    assert [late.reference_of(i) for i in range(4)] == [None] * 4
    early = Curriculum([ranked_pairs([3, 2, 1])], n_stages=4)
    assert [early.reference_of(i) for i in range(4)] == [None, 0, 1, 1]


def test_reversed_stages_are_the_same_ones() -> None:
    pairs = [ranked_pairs([4, 3, 2, 1]), ranked_pairs([4, 1])]
    assert stages(Curriculum(pairs, reverse=True)) == stages(Curriculum(pairs))[::-1]


def test_a_seed_shuffles_alike() -> None:
    curriculum = Curriculum([ranked_pairs([2, 1])] * 30)
    shuffled = curriculum.stage(0, seed=1)
    assert shuffled == curriculum.stage(0, seed=1) != curriculum.stage(0)
    assert sorted(shuffled) == curriculum.stage(0) and shuffled != curriculum.stage(0, seed=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Curriculum([], bucket="ranks"), r"bucket is 'ranks'; accepted: 'rank', 'global'; did you mean 'rank'\?"),
        (lambda: Curriculum([], reference="none"), "reference is 'none'; accepted: 'previous', 'fixed'"),
        (lambda: Curriculum([], n_stages=0), "n_stages is 0; a positive integer"),
        (lambda: Curriculum([[]], source=[]), "source has 0 entries; 1 are expected"),
        (lambda: Curriculum([[(0, 1, 0.0)]]), r"pairs_per_prompt\[0\] has \(0, 1, 0.0\); .* a gap above 0"),
        (lambda: Curriculum([[], [(0, 1)]]), r"pairs_per_prompt\[1\] has \(0, 1\)"),
        (lambda: Curriculum([]).stage(3), "stage is 3; accepted: 0 to 2"),
        (lambda: Curriculum([]).reference_of(-1), "stage is -1"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
