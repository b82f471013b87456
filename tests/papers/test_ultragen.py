"""UltraGen's sets of attributes, satisfaction rates and pairs: the worked numbers, the definition, and what must be refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern.papers import ultragen
from prefkern.papers.ultragen import Attribute, attribute_sets, build_pairs, csr, csr_by_position, gpo_loss, triplet_margin_loss

F64 = torch.float64
NAN = math.nan


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def close(actual, expected, atol=1e-12):
    assert_close(actual.double(), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol, equal_nan=True)


# ---- sets

E = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8], [-1, 0.1], [0.6, -0.8]])
IS_SOFT = torch.tensor([True, False, True, False, True, False])


def test_sets_worked():
    """The code's minimum picks candidate 1, whose cosine to the seed is 0.8; farthest point does not."""
    for emb in (E, E.double()):
        assert attribute_sets(emb, IS_SOFT, torch.tensor([0]), 2, 2).tolist() == [[0, 4, 1, 5]]
        assert attribute_sets(emb, IS_SOFT, torch.tensor([0]), 2, 2, reduce="max").tolist() == [[0, 4, 5, 3]]
    out = attribute_sets(E, IS_SOFT, torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0, 1]))
    assert out[0].tolist() == [0, -1, -1, -1] and out[1, 0] == 2 and (out[1] >= 0).all()


def brute_force_set(semantic, correlation, is_soft, seed, n_soft, n_hard, k, fold):
    """The procedure as it is told: discard what has no quota, stop when both are met."""
    distance = (correlation - correlation[seed]).norm(dim=1)
    near = sorted((i for i in range(len(semantic)) if i != seed), key=lambda i: (float(distance[i]), i))[: k - 1]
    unit = semantic / semantic.norm(dim=1, keepdim=True)
    chosen, left, room = [seed], [seed, *near][1:], {True: n_soft - 1, False: n_hard}
    scores = {i: float(unit[i] @ unit[seed]) for i in left}
    while any(room.values()):
        j = min(left, key=lambda i: (scores[i], left.index(i)))
        left.remove(j)
        kind = bool(is_soft[j])
        if not room[kind]:
            continue
        chosen.append(j)
        room[kind] -= 1
        for i in left:
            scores[i] = fold(scores[i], float(unit[i] @ unit[j]))
    return chosen


@pytest.mark.parametrize(("reduce", "fold"), [("min", min), ("max", max)])
def test_sets_of_the_nearest_candidates(reduce, fold):
    generator = torch.Generator().manual_seed(0)
    semantic, correlation = (torch.randn(60, d, dtype=F64, generator=generator) for d in (5, 4))
    is_soft = torch.arange(60) % 2 == 0
    seeds = torch.tensor([0, 14, 58])
    n_soft, n_hard = torch.tensor([3, 2, 1]), torch.tensor([4, 1, 3])
    out = attribute_sets(semantic, is_soft, seeds, n_soft, n_hard, correlation=correlation, candidates=25, reduce=reduce)
    for q, seed in enumerate(seeds.tolist()):
        expected = brute_force_set(semantic, correlation, is_soft, seed, int(n_soft[q]), int(n_hard[q]), 25, fold)
        assert out[q].tolist() == expected + [-1] * (7 - len(expected))


def test_candidates_are_the_seed_and_its_neighbours():
    x = torch.tensor([[0.0], [3.0], [1.0], [1.0], [9.0], [1.0]])
    assert ultragen.nearest_candidates(x, torch.tensor([3, 0]), 4).tolist() == [[3, 2, 5, 0], [0, 2, 3, 5]]
    assert ultragen.nearest_candidates(x, torch.tensor([4]), 100).tolist() == [[4, 1, 2, 3, 5, 0]]


def test_sizes_are_uniform():
    """Chi square at its 0.1 % point: 40 degrees of freedom 73.4; 8 degrees of freedom 26.1."""
    sizes = ultragen.sample_set_sizes(8200, generator=torch.Generator().manual_seed(0))
    total = sizes.soft + sizes.hard
    assert total.min() == 10 and total.max() == 50
    assert float((total.bincount(minlength=51)[10:] - 200).double().square().sum() / 200) < 73.4
    soft = sizes.soft.bincount(minlength=10)
    assert soft[0] == 0 and len(soft) == 10 and float((soft[1:] - 8200 / 9).square().sum() / (8200 / 9)) < 26.1
    few = ultragen.sample_set_sizes(500, least=2, most=4)
    assert (few.hard >= 1).all() and (few.soft >= 1).all()
    assert {tuple(x) for x in torch.stack(few, 1).tolist()} == {(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 1)}
    assert ultragen.sample_set_sizes(0).soft.shape == (0,)


def test_conflicts():
    a, b = Attribute("start", "begin with A"), Attribute("start", "begin with B")
    upper, lower = Attribute("case", "all upper"), Attribute("case", "all lower")
    soft, words = Attribute("soft", "a calm tone"), Attribute("words", "100 to 200")
    resolve = ultragen.resolve_conflicts
    assert resolve([soft, a, words, soft, b, a]) == [soft, a, words]
    assert resolve([soft, a, upper, words, b, lower]) == [soft, upper, words]
    assert resolve([lower, b, a, upper], case_drops_start=False) == [lower, b]
    assert resolve([("soft", "x"), ("soft", "x"), ("soft", "y")]) == [("soft", "x"), ("soft", "y")]
    assert resolve([]) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(seeds=torch.tensor([1])), r"seeds\[0\] is 1, a hard attribute; a set begins with a soft one"),
        (dict(seeds=torch.tensor([6])), r"seeds are \[6\]; ids from 0 to 5"),
        (dict(n_soft=4), r"quotas of seed 0 asks for 4 candidates of type 1; there are 3"),
        (dict(n_hard=4), r"quotas of seed 0 asks for 4 candidates of type 0; there are 3"),
        (dict(n_soft=0), r"quotas of seed 0 is 0 for type 1, which the seed is of"),
        (dict(is_soft=IS_SOFT.long()), r"is_soft is torch.int64 \[6\]; bool \[6\]"),
        (dict(semantic=E * torch.tensor([1.0, 1, 0, 1, 1, 1])[:, None]), r"emb\[2\] has no cosine"),
        (dict(correlation=E[:5]), r"correlation has 5 rows; 6, as semantic"),
        (dict(correlation=E, candidates=0), r"k is 0; a positive integer"),
        (dict(correlation=E, candidates=2), r"asks for 2 candidates of type \d; there are [01]"),
        (dict(reduce="mean"), r"reduce is 'mean'"),
    ],
)  # fmt: skip
def test_sets_refused(wrong, message):
    arguments = {"semantic": E, "is_soft": IS_SOFT, "seeds": torch.tensor([0]), "n_soft": 2, "n_hard": 2}
    with pytest.raises(ValueError, match=message):
        attribute_sets(**{**arguments, **wrong})


def test_sizes_refused():
    for wrong in (dict(least=1), dict(least=5, most=4), dict(most_soft=1), dict(sets=-1)):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]} is"):
            ultragen.sample_set_sizes(**{"sets": 3, **wrong})


# ---- the encoder


def test_triplets_worked():
    a, p, n = tensor([1, 2, 2], [0, 3, 4]), tensor([2, 2, 1], [3, 0, 4]), tensor([0, 0, 5], [0, 4, 3])
    loss, metrics = triplet_margin_loss(a, p, n)
    close(loss, 1.0977777777778, 5e-14)
    assert metrics["accuracy"].item() == 0.5
    assert triplet_margin_loss(a.float(), p.float(), n.float()).loss.dtype == torch.float32
    close(triplet_margin_loss(a, p, n, margin=0).loss, 0.32)  # distances .2222 against .6667, and .72 against .08
    assert triplet_margin_loss(a[:0], p[:0], n[:0]).loss.item() == 0
    assert_close(triplet_margin_loss(a * 3, p * 0.1, n * 7).loss, loss)


def test_gradients_of_triplets():
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(4, 3, dtype=F64, generator=generator, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: triplet_margin_loss(*x, margin=0.7).loss, vectors)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(p=torch.zeros(2, 3)), r"p\[0\] has norm 0 or NaN"),
        (dict(n=tensor([1, 2, 3], [1, NAN, 1])), r"n\[1\] has norm 0 or NaN"),
        (dict(n=torch.ones(2, 4)), r"n has shape \[2, 4\]; \[T, d\], all alike"),
        (dict(a=torch.ones(3)), r"a has shape \[3\]"),
        (dict(margin=-1.0), r"margin is -1.0"),
        (dict(margin=NAN), r"margin is nan"),
    ],
)
def test_triplets_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        triplet_margin_loss(**{"a": torch.ones(2, 3), "p": torch.ones(2, 3), "n": torch.ones(2, 3), **wrong})


# ---- rates

SAT, VALID = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def test_rates_worked():
    for sat, valid in ((SAT, VALID), (SAT.bool(), VALID.bool()), (SAT.double(), VALID.double())):
        out = csr(sat, valid)
        exact = 1e-12 if sat.dtype == F64 else 1e-7
        close(out.per_sample, [0.6, 0.5], exact)
        close(out.macro, 0.55, exact)
        close(out.micro, 0.5714285714286, max(exact, 5e-14))
        rate, count = csr_by_position(sat, valid, bins=2)
        close(rate, [0.75, 1 / 3], 1e-7)
        assert count.tolist() == [4, 3]


def test_a_text_without_attributes_has_no_rate():
    sat, valid = torch.tensor([[True, True], [True, False]]), torch.tensor([[False, False], [True, True]])
    out = csr(sat, valid)
    close(out.per_sample, [NAN, 0.5])
    assert out.macro.item() == out.micro.item() == 0.5
    rate, count = csr_by_position(sat, valid, bins=3)
    close(rate, [1, 0, NAN])
    assert count.tolist() == [1, 1, 0]
    close(csr(sat.double().masked_fill(~valid, NAN), valid).per_sample, [NAN, 0.5])  # what is not valid is not looked at
    close(csr(torch.ones(2, 3)).per_sample, [1, 1])
    with pytest.raises(ValueError, match="valid has no attribute of any of 2 texts"):
        csr(sat, torch.zeros_like(valid))


attributes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=6, max_size=6)


@given(st.lists(attributes, min_size=1, max_size=5), st.integers(1, 8))
def test_rates_by_definition(texts, bins):
    sat, valid = torch.tensor(texts).unbind(-1)
    good, count, rates = [0] * bins, [0] * bins, []
    for text in texts:
        held = [s for s, v in text if v]
        rates.append(sum(held) / len(held) if held else NAN)
        for rank, s in enumerate(held):
            b = math.floor(bins * rank / len(held))
            good[b] += s
            count[b] += 1
    rate, found = csr_by_position(sat, valid, bins)
    assert found.tolist() == count
    close(rate, [g / c if c else NAN for g, c in zip(good, count, strict=True)], 1e-7)
    if sum(count):
        out = csr(sat.double(), valid)
        known = [r for r in rates if not math.isnan(r)]
        close(out.per_sample, rates)
        close(out.macro, sum(known) / len(known))
        close(out.micro, sum(good) / sum(count))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: csr(SAT[0]), r"sat has shape \[5\]; \[B, n\]"),
        (lambda: csr(SAT, VALID[:, :3]), r"valid has shape \[2, 3\]; \[2, 5\], as sat"),
        (lambda: csr_by_position(SAT, VALID, 0), r"bins is 0; a positive integer"),
        (lambda: csr_by_position(SAT, VALID, 2.0), r"bins is 2.0"),
    ],
)
def test_rates_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- pairs


def test_pairs_worked():
    sat = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0]])
    valid = torch.tensor([1, 1, 1, 0]).expand(3, 4)
    score = torch.stack([csr(sat, valid).per_sample, torch.full((3,), 0.4)])
    close(score[0], [2 / 3, 1 / 3, 1], 1e-7)
    pairs = build_pairs(score)
    assert (pairs.chosen[0], pairs.rejected[0]) == (2, 1)
    assert pairs.keep.tolist() == [True, False]
    assert build_pairs(score, min_gap=0.7).keep.tolist() == [False, False]
    assert pairs.chosen[1] == pairs.rejected[1] == 0


def test_candidates_without_a_score_make_no_pair():
    pairs = build_pairs(tensor([NAN, 0.2, 0.9], [NAN, 0.5, NAN], [NAN, NAN, NAN], [0.5, 0.1, 0.5]))
    assert pairs.chosen.tolist()[:2] == [2, 1] and pairs.rejected.tolist()[:2] == [1, 1] and pairs.chosen[3] == 0
    assert pairs.keep.tolist() == [True, False, False, True]
    close(pairs.gap, [0.7, NAN, NAN, 0.4])
    for wrong, came in ((torch.zeros(3), r"float32 \[3\]"), (torch.ones(2, 2).long(), r"int64 \[2, 2\]")):
        with pytest.raises(ValueError, match=f"score is torch.{came}; floating"):
            build_pairs(wrong)
    with pytest.raises(ValueError, match="min_gap is -1"):
        build_pairs(torch.zeros(1, 2), min_gap=-1)


def test_dpo_worked():
    chosen, rejected = tensor(-40, -55.5).requires_grad_(), tensor(-60, -50).requires_grad_()
    loss = gpo_loss(chosen, rejected, tensor(-42, -54), tensor(-57, -52.5)).loss
    close(loss, 0.6935461182900, 5e-14)
    loss.backward()
    close(chosen.grad, [-0.0188770334399, -0.0299343830056], 5e-14)
    close(rejected.grad, -chosen.grad)
    keep = torch.tensor([True, False])
    alone = gpo_loss(chosen[:1], rejected[:1], tensor(-42), tensor(-57)).loss
    close(gpo_loss(chosen, rejected, tensor(-42, NAN), tensor(-57, NAN), keep).loss, alone.detach())
    with pytest.raises(ValueError, match="beta"):
        gpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0)
