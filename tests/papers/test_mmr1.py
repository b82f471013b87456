"""MMR1's scores, weights and batches: the paper's and the release's sign, draws by weight, states that resume."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.data import DataLoader

from prefkern.papers import mmr1
from prefkern.papers.mmr1 import VasSampler, batch_split, minmax_weights, pack_rollouts, vps_scores

F64 = torch.float64
S = [[1, 2, 3, 4, 5], [1, 2, 3, 9, 5], [7, 8, 2, 3]]
SEQUENCES = [S, [[1, 2, 3]] * 3, [[1, 2], [3, 4], [5, 6]]]
CORRECT = [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def close(actual, expected, atol=5e-11):
    assert_close(actual, torch.tensor(expected, dtype=F64), rtol=0, atol=atol, equal_nan=True)


# ---- scores


def test_worked_by_the_papers_sign():
    out = vps_scores(CORRECT, SEQUENCES)
    close(out.vps, [0.2991351089, 0.1777777778, 0.2])
    close(out.tds, [1 - 0.3932133441, 0, 1])
    close(out.ovs, [2 / 9, 2 / 9, 0])
    close(out.accuracy, [2 / 3, 1 / 3, 1])
    close(minmax_weights(out.vps), [0.9999999176, 0, 0.1831139510])
    assert set(out.ranges) == {"ovs", "tds", "vps"}
    assert out.ranges["ovs"] == pytest.approx((0, 0.8 * 2 / 9)) and out.ranges["tds"] == pytest.approx((0, 0.2))
    assert out.ranges["vps"] == (out.vps.min().item(), out.vps.max().item())


def test_worked_by_the_sign_of_the_code():
    """The ranking changes."""
    out = vps_scores(CORRECT, SEQUENCES, tds="self_bleu_code")
    close(out.vps, [0.2564204466, 0.3777777778, 0])
    close(minmax_weights(out.vps), [0.6787599878, 0.9999999735, 0])


@pytest.mark.parametrize(
    ("tds", "expected"),
    [("distinct_3", [0.875, 1 / 3, 0]), ("edit", [3, 0, 2]), ("edit_norm", [0.6, 0, 1]),
     ("one_minus_self_bleu", [1 - 0.3932133441, 0, 1]), ("self_bleu_code", [0.3932133441, 1, 0])],
)  # fmt: skip
def test_every_diversity(tds, expected):
    close(vps_scores(CORRECT, SEQUENCES, tds=tds).tds, expected)
    out = vps_scores(CORRECT, SEQUENCES, alpha=0, beta=2, tds=tds)
    close(out.vps, [2 * x for x in expected], 1e-10)


@pytest.mark.parametrize("tds", mmr1.TDS)
def test_one_rollout_has_no_variance(tds):
    out = vps_scores([[1], [0.5], [1]], [[[1, 2, 3, 4]], [[]], [[1, 2, 3, 1, 2, 3]]], tds=tds)
    close(out.ovs, [0, 0.25, 0])
    close(out.tds, [1, 0, 0.75] if tds == "distinct_3" else [0, 0, 0])


def test_what_rollouts_may_come_as():
    expected = vps_scores(CORRECT, SEQUENCES).vps
    packed = pack_rollouts(SEQUENCES)
    assert packed.cu_seqlens.tolist() == [0, 5, 10, 14, 17, 20, 23, 25, 27, 29] and packed.cu_prompts.tolist() == [0, 3, 6, 9]
    tensors = [[torch.tensor(tokens, dtype=torch.int32) for tokens in rollouts] for rollouts in SEQUENCES]
    matrix = torch.tensor(CORRECT)
    for sequences in (packed, tensors, pack_rollouts(tensors)):
        for correct in (CORRECT, matrix, matrix.bool(), matrix.flatten(), matrix.double().mean(1)):
            assert torch.equal(vps_scores(correct, sequences).vps, expected)
    ragged = vps_scores([[1, 0], [1]], [S[:2], S[2:]])
    close(ragged.ovs, [0.25, 0])
    assert vps_scores([], []).vps.shape == (0,)


rollouts = st.lists(st.tuples(st.floats(0, 1), st.lists(st.integers(0, 3), max_size=6)), min_size=1, max_size=5)


@given(st.lists(rollouts, min_size=1, max_size=5), st.sampled_from(mmr1.TDS), st.randoms(use_true_random=False))
def test_bounds_and_the_order_of_rollouts(prompts, tds, random):
    out = vps_scores([[v for v, _ in p] for p in prompts], [[y for _, y in p] for p in prompts], tds=tds)
    assert ((out.ovs >= 0) & (out.ovs <= 0.25)).all() and (out.tds >= 0).all()
    weights = minmax_weights(out.vps)
    assert ((weights >= 0) & (weights < 1)).all()
    shuffled = [random.sample(p, len(p)) for p in prompts]
    again = vps_scores([[v for v, _ in p] for p in shuffled], [[y for _, y in p] for p in shuffled], tds=tds)
    assert_close(again.vps, out.vps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(tds="self_bleu"), ValueError, r"tds is 'self_bleu'; accepted: .*; did you mean 'self_bleu_code'\?"),
        (dict(alpha=-1), ValueError, "alpha is -1; it must be finite and not negative"),
        (dict(beta=math.nan), ValueError, "beta is nan"),
        (dict(correct=[[1, 1, 0], [1, 0, 0], [1, 1, 1.5]]), ValueError, r"correct has 1.5 at 8; numbers in \[0, 1\]"),
        (dict(correct=[[1, math.nan, 0], [1, 0, 0], [1, 1, 1]]), ValueError, r"correct has nan at 1"),
        (dict(correct=torch.tensor([0.5, -0.1, 1])), ValueError, r"correct has -0.1.* at 1"),
        (dict(correct=[[1, 1], [1, 0, 0], [1, 1, 1]]), ValueError, r"correct has \[2, 3, 3\] values; .* \[3, 3, 3\]"),
        (dict(correct=torch.ones(3, 4)), ValueError, r"correct has shape \[3, 4\]; \[M, K\], \[R\] or \[M\]"),
        (dict(sequences=[S, [], S]), ValueError, r"sequences\[1\] is empty"),
        (dict(sequences=[S, S, [[1.5], [1], [2]]]), TypeError, r"sequences\[2\]\[0\] is torch.float32 \[1\]; a list of token"),
        (dict(sequences=[S, S, [[[1]], [1], [2]]]), TypeError, r"sequences\[2\]\[0\] is torch.int64 \[1, 1\]"),
    ],
)  # fmt: skip
def test_scores_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        vps_scores(**{"correct": CORRECT, "sequences": SEQUENCES, **wrong})


# ---- a batch


def test_split():
    assert batch_split(10, 0.5) == (5, 5) and batch_split(7, 0.5) == (3, 4)
    assert batch_split(100, 0.29) == (29, 71)  # the product is below 29 by rounding
    assert batch_split(10, 0) == (0, 10) and batch_split(10, 1) == (10, 0) and batch_split(10, 0.299) == (2, 8)
    for mixture in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="mixture is"):
            batch_split(10, mixture)
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="batch_size is"):
            batch_split(size)


def interleaved(batch, weighted):
    """The two parts of a batch."""
    both = min(weighted, len(batch) - weighted)
    pairs, rest = batch[: 2 * both], batch[2 * both :]
    return (torch.cat([pairs[::2], rest]), pairs[1::2]) if weighted > both else (pairs[::2], torch.cat([pairs[1::2], rest]))


@pytest.mark.parametrize(("size", "mixture"), [(6, 0.5), (7, 0.5), (5, 0.8), (4, 0.0), (4, 1.0)])
def test_parts_are_interleaved(size, mixture):
    """Prompt 3 alone has a weight: it is the whole weighted part; the other one walks through all prompts in one order."""
    sampler = VasSampler(11, size, mixture=mixture, weighting="raw", seed=5)
    sampler.update(torch.eye(11)[3])
    walked = []
    for step in range(33):
        batch = sampler.sample(step)
        assert batch.dtype == torch.int64 and len(batch) == size
        weighted, uniform = interleaved(batch, sampler.n_weighted)
        assert len(weighted) == sampler.n_weighted and (weighted == 3).all()
        walked += uniform.tolist()
    if walked:
        assert sorted(walked[:11]) == list(range(11)) and walked[:11] != list(range(11))
        assert all(walked[i] == walked[i % 11] for i in range(len(walked)))


def chi_square(counts, expected):
    return float(((counts - expected).square() / expected).sum())


def test_the_weighted_part_is_drawn_by_weight():
    """Of 20,000 draws; the 0.1 % point of chi square with 7 degrees of freedom is 24.3. A weight of 0 is never drawn."""
    scores = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.15, 0.6, 0.3, 0.8, 0.1])
    sampler = VasSampler(9, 100, mixture=1.0, seed=1)
    weights = sampler.update(scores)
    draws = torch.cat([sampler.sample(step) for step in range(200)]).bincount(minlength=9).double()
    assert draws[0] == draws[8] == 0
    assert chi_square(draws[1:8], (20_000 * weights / weights.sum())[1:8]) < 24.3
    raw = VasSampler(9, 100, mixture=1.0, weighting="raw", seed=2)
    raw.update(scores)
    draws = torch.cat([raw.sample(step) for step in range(200)]).bincount(minlength=9).double()
    assert chi_square(draws, 20_000 * scores.double() / scores.sum()) < 26.1


def test_uniform_without_scores_and_without_weights():
    """The 0.1 % point of chi square with 9 degrees of freedom is 27.9."""
    sampler = VasSampler(10, 50, mixture=1.0)
    assert sampler.uniform
    first = torch.cat([sampler.sample(step) for step in range(100)])
    with pytest.warns(UserWarning, match="all weights are 0: the weighted part of a batch is drawn uniformly"):
        weights = sampler.update(torch.full((10,), 0.3))
    assert (weights == 0).all() and sampler.uniform
    assert torch.equal(torch.cat([sampler.sample(step) for step in range(100)]), first)
    assert chi_square(first.bincount(minlength=10).double(), torch.full((10,), 500.0)) < 27.9
    sampler.update(torch.arange(10.0))
    assert not sampler.uniform


def test_a_draw_depends_on_seed_step_and_weights_alone():
    one, other = VasSampler(50, 8, seed=3), VasSampler(50, 8, seed=3)
    scores = torch.rand(50)
    one.update(scores)
    before = one.sample(7)
    for step in (0, 3, 9):
        one.sample(step)
    other.update(scores)
    assert torch.equal(other.sample(7), before) and torch.equal(one.sample(7), before)
    batches = {tuple(VasSampler(50, 8, seed=seed).sample(step).tolist()) for seed in range(6) for step in range(6)}
    assert len(batches) == 36  # no two alike, neighbouring seeds included


def test_momentum():
    scores = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.25]], dtype=F64)
    fresh = torch.stack([minmax_weights(s) for s in scores])
    for mu in (0.0, 0.25, 1.0):
        sampler = VasSampler(3, 4, momentum=mu)
        assert torch.equal(sampler.update(scores[0]), fresh[0])  # the first as they are
        assert_close(sampler.update(scores[1]), mu * fresh[0] + (1 - mu) * fresh[1], rtol=0, atol=1e-15)
        assert sampler.updates == 2
    sampler.weights.fill_(9)
    assert torch.equal(sampler.weights, fresh[0])  # momentum 1 keeps the first; a copy was filled


def test_a_loader_walks_on():
    sampler = VasSampler(10, 4, seed=2)
    sampler.update(torch.rand(10))
    expected = [sampler.sample(step).tolist() for step in range(6)]
    loader = DataLoader(list(range(10)), batch_sampler=sampler)
    assert len(loader) == len(sampler) == 3
    assert [batch.tolist() for batch in loader] == expected[:3] and sampler.step == 3
    assert [batch.tolist() for batch in loader] == expected[3:]


def test_a_state_goes_on_with_the_same_batches():
    options = {"mixture": 0.6, "momentum": 0.3, "seed": 7}
    sampler = VasSampler(30, 8, **options)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(30, generator=generator) for _ in range(4)]
    for s in scores[:2]:
        sampler.update(s)
    iterator = iter(sampler)
    next(iterator)
    state = copy.deepcopy(sampler.state_dict())
    ahead = [next(iterator), sampler.update(scores[2]), next(iterator), sampler.update(scores[3])]
    resumed = VasSampler(30, 8, **options)
    resumed.load_state_dict(state)
    walk = iter(resumed)
    again = [next(walk), resumed.update(scores[2]), next(walk), resumed.update(scores[3])]
    assert again[::2] == ahead[::2] and all(torch.equal(a, b) for a, b in zip(again[1::2], ahead[1::2], strict=True))
    assert resumed.step == sampler.step == 3 and resumed.updates == 4
    state["weights"].zero_()
    assert not resumed.uniform  # a copy was taken


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(version=2), "state is of 'VasSampler', version 2; one of 'VasSampler', version 1"),
        ({"class": "Other"}, "state is of 'Other'"),
        (dict(weights=torch.zeros(4, dtype=F64)), r"state\['weights'\] is torch.float64 \[4\]; torch.float64 \[5\]"),
        (dict(weights=torch.zeros(5)), r"state\['weights'\] is torch.float32 \[5\]"),
        (dict(weights=torch.tensor([0, 1, -1, 0, 0], dtype=F64)), r"state\['weights'\] has numbers that are negative"),
        (dict(weights=torch.tensor([0, 1, math.nan, 0, 0], dtype=F64)), r"state\['weights'\] has numbers that are negative or"),
        (dict(step=-1), r"state\['step'\] is -1; it must not be negative"),
        (dict(updates=-2), r"state\['updates'\] is -2"),
        (dict(step=1.5), r"state\['step'\] is a float; a int is expected"),
        (dict(seed=4), r"state\['seed'\] is 4; this sampler has 0"),
        (dict(mixture=0.25), r"state\['mixture'\] is 0.25; this sampler has 0.5"),
        (dict(weighting="raw"), r"state\['weighting'\] is 'raw'; this sampler has 'minmax'"),
        (dict(more=1), r"missing \[\], unknown \['more'\]"),
    ],
)  # fmt: skip
def test_states_refused(wrong, message):
    sampler = VasSampler(5, 2)
    sampler.update(torch.arange(5.0))
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **wrong})
    assert torch.equal(sampler.weights, before["weights"]) and (sampler.step, sampler.updates) == (0, 1)
    with pytest.raises(ValueError, match=r"missing \['weights'\]"):
        sampler.load_state_dict({name: value for name, value in before.items() if name != "weights"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(n_prompts=0), ValueError, "n_prompts is 0; a positive integer"),
        (dict(n_prompts=2.5), ValueError, "n_prompts is 2.5"),
        (dict(batch_size=0), ValueError, "batch_size is 0"),
        (dict(mixture=1.5), ValueError, r"mixture is 1.5; a number in \[0, 1\]"),
        (dict(mixture=math.nan), ValueError, "mixture is nan"),
        (dict(momentum=-0.5), ValueError, r"momentum is -0.5; a number in \[0, 1\]"),
        (dict(weighting="rank"), ValueError, "weighting is 'rank'; accepted: 'minmax', 'raw'"),
        (dict(seed=1.5), TypeError, "seed is 1.5; an integer"),
    ],
)  # fmt: skip
def test_samplers_refused(options, error, message):
    with pytest.raises(error, match=message):
        VasSampler(**{"n_prompts": 5, "batch_size": 2, **options})


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(4), r"scores has shape \[4\]; \[5\], one for each prompt"),
        (torch.zeros(5, 1), r"scores is \[5, 1\]; a tensor \[M\]"),
        ([0.0] * 5, r"scores is list; a tensor \[M\]"),
        (torch.tensor([0, 1, math.nan, 0, 0]), r"scores\[2\] is nan; a finite number"),
        (torch.tensor([0, 1, 0, math.inf, 0]), r"scores\[3\] is inf"),
        (torch.tensor([0, 1, 0, 0, -0.5]), r"scores\[4\] is -0.5; with weighting 'raw' no score may be negative"),
    ],
)
def test_updates_refused(scores, message):
    sampler = VasSampler(5, 2, weighting="raw")
    with pytest.raises(ValueError, match=message):
        sampler.update(scores)
    assert sampler.updates == 0 and sampler.uniform


@pytest.mark.parametrize("step", [-1, 0.5, True])
def test_steps_refused(step):
    with pytest.raises(ValueError, match=r"step is .*; an integer from 0 on is expected"):
        VasSampler(5, 2).sample(step)
