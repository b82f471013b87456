"""The linear probe of pairs, its companions, and when a margin saturates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from prefkern import diagnostics
from prefkern.diagnostics import (
    auc,
    linear_probe,
    linear_separability,
    logprob_mismatch,
    margin_saturation_step,
    pool_features,
    surface_features,
)

F64 = torch.float64
CHOSEN = torch.tensor([[2, 0.1], [1.5, -0.4], [2.2, 0.6], [1.8, 0], [2.4, -0.2], [1.6, 0.3]], dtype=F64)
REJECTED = torch.tensor([[0.1, 0.2], [-0.3, -0.5], [0.4, 0.5], [0, 0.1], [1.7, -0.1], [-0.2, 0.4]], dtype=F64)


def close(actual, expected, atol) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def random_pairs(rows, width, shift=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, rows, width, dtype=F64, generator=generator)
    return chosen + shift, rejected


# ---- the probe


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
def test_worked_probe(solver) -> None:
    probe = linear_probe(CHOSEN, REJECTED, solver=solver)
    close(probe.weight, [5.929779803, -0.7816563364], 1e-9)
    close(probe.bias, -6.457619755, 1e-9)
    close(probe.scores(CHOSEN), CHOSEN @ probe.weight + probe.bias, 0)


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
def test_worked_separability(solver) -> None:
    found = linear_separability(CHOSEN, REJECTED, n_folds=3, solver=solver)
    expected = {"accuracy": 0.9166666667, "auc": 0.8611111111, "pair_accuracy": 1.0, "fisher": 0.853909839}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, 1e-9)


@pytest.mark.parametrize(("rows", "width"), [(10, 3), (8, 40), (30, 30)])
def test_the_dual_is_the_primal(rows, width) -> None:
    pairs = random_pairs(rows, width)
    primal, dual = (linear_probe(*pairs, solver=solver) for solver in ("primal", "dual"))
    assert_close(dual.weight, primal.weight, rtol=1e-9, atol=1e-9)
    assert_close(dual.bias, primal.bias, rtol=1e-9, atol=1e-9)


def test_wide_features_take_the_dual(monkeypatch) -> None:
    sizes = []
    solve = diagnostics._solve
    monkeypatch.setattr(diagnostics, "_solve", lambda m, right: sizes.append(len(m)) or solve(m, right))
    linear_probe(*random_pairs(6, 4097))
    linear_probe(*random_pairs(6, 40))
    linear_probe(*random_pairs(2, 4097)[::-1], solver="dual")
    assert sizes == [12, 40, 4]


def test_definition_over_the_folds() -> None:
    chosen, rejected = random_pairs(23, 4)
    s_c, s_r = torch.zeros(23, dtype=F64), torch.zeros(23, dtype=F64)
    for k in range(4):
        out = torch.arange(23) % 4 == k
        c, r = chosen[~out], rejected[~out]
        S = (torch.cov(c.T, correction=0) + torch.cov(r.T, correction=0)) / 2
        w = torch.linalg.solve(S + 1e-2 * S.trace() / 4 * torch.eye(4, dtype=F64), c.mean(0) - r.mean(0))
        middle = (c.mean(0) + r.mean(0)) / 2
        s_c[out], s_r[out] = (chosen[out] - middle) @ w, (rejected[out] - middle) @ w
    found = linear_separability(chosen, rejected, n_folds=4, ridge=1e-2)
    close(found["accuracy"], torch.cat([s_c > 0, s_r < 0]).double().mean(), 1e-12)
    close(found["auc"], (s_c[:, None] > s_r).double().mean(), 1e-12)
    close(found["pair_accuracy"], (s_c > s_r).double().mean(), 1e-12)
    close(found["fisher"], (s_c.mean() - s_r.mean()) ** 2 / ((s_c.var(correction=0) + s_r.var(correction=0)) / 2), 1e-9)


@given(st.integers(0, 99), st.floats(0.01, 100))
def test_invariances(seed, scale) -> None:
    chosen, rejected = random_pairs(14, 3, seed=seed)
    found = linear_separability(chosen, rejected)
    probe, swapped = linear_probe(chosen, rejected), linear_probe(rejected, chosen)
    assert_close(swapped.weight, -probe.weight, rtol=1e-9, atol=1e-9)
    assert 0 <= found["auc"] <= 1
    move = torch.tensor([3.0, -2, 5], dtype=F64)
    others = {
        "swapped": linear_separability(rejected, chosen),
        "moved": linear_separability(chosen + move, rejected + move),
        "scaled": linear_separability(chosen * scale, rejected * scale),
    }
    for other in others.values():
        for name, value in found.items():
            assert other[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_random_labels_are_not_separable() -> None:
    rows = 2000
    found = linear_separability(*random_pairs(rows, 5, shift=0))
    assert abs(found["auc"] - 0.5) < 3 / math.sqrt(rows) and found["fisher"] < 0.02
    assert linear_separability(*random_pairs(200, 5, shift=3))["auc"] > 0.99


def test_identical_sides_and_no_variance() -> None:
    same = linear_separability(CHOSEN, CHOSEN, n_folds=2)
    assert same == {"accuracy": 0.5, "auc": 0.5, "pair_accuracy": 0.0, "fisher": 0.0}
    assert not linear_probe(CHOSEN, CHOSEN).weight.any()
    ones = torch.ones(4, 2, dtype=F64)
    close(linear_probe(ones, -ones, ridge=0.1).weight, [20, 20], 1e-12)  # 2 / rho
    close(linear_probe(ones, -ones, ridge=0.1, solver="dual").weight, [20, 20], 1e-12)
    apart = linear_separability(ones, -ones, n_folds=2)
    assert apart == {"accuracy": 1.0, "auc": 1.0, "pair_accuracy": 1.0, "fisher": math.inf}


def test_one_feature_and_low_precision() -> None:
    one = linear_separability(CHOSEN[:, 0], REJECTED[:, 0], n_folds=3)
    assert one == linear_separability(CHOSEN[:, :1], REJECTED[:, :1], n_folds=3)
    halves = CHOSEN.bfloat16(), REJECTED.bfloat16()
    assert linear_separability(*halves, n_folds=3) == linear_separability(*(h.double() for h in halves), n_folds=3)


def test_pairs_of_a_prompt_share_a_fold() -> None:
    """Labels are random, but all pairs of a prompt have one and the same features: a leak tells them apart, folds by prompt do
    not."""
    generator = torch.Generator().manual_seed(1)
    prompts, copies = 40, 5
    chosen, rejected = torch.randn(2, prompts, 80, dtype=F64, generator=generator).repeat_interleave(copies, 1)
    groups = torch.arange(prompts).repeat_interleave(copies)
    assert linear_separability(chosen, rejected)["accuracy"] > 0.9
    apart = linear_separability(chosen, rejected, groups=groups)
    assert abs(apart["accuracy"] - 0.5) < 0.2
    assert linear_separability(chosen, rejected, groups=[f"prompt {i}" for i in groups.tolist()]) == apart
    each_its_own = linear_separability(chosen, rejected, groups=torch.arange(200) + 7)
    assert each_its_own == linear_separability(chosen, rejected)


def test_on_a_gpu(device) -> None:
    found = linear_separability(CHOSEN.to(device), REJECTED.to(device), n_folds=3, groups=torch.arange(6, device=device))
    close(found["fisher"], 0.853909839, 1e-9)


# ---- AUC, pooling, surface features, saturation


def test_worked_auc() -> None:
    close(auc([0.3, 0.5, 0.5], [0.5, 0.1]), 0.6666666667, 1e-10)
    assert auc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_auc_is_a_count_over_all_pairs(positive, negative) -> None:
    expected = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / (len(positive) * len(negative))
    assert auc(positive, negative) == pytest.approx(expected)
    assert auc(negative, positive) == pytest.approx(1 - expected)


def test_pooling_looks_only_at_what_counts() -> None:
    hidden = torch.arange(24, dtype=F64).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    hidden[~mask] = math.nan
    close(pool_features(hidden, mask), [[4.5, 5.5, 6.5], [12, 13, 14]], 0)
    close(pool_features(hidden, mask, how="last"), [[6, 7, 8], [12, 13, 14]], 0)
    low = pool_features(hidden.bfloat16(), mask)
    assert low.dtype == torch.float32 and low[0].tolist() == [4.5, 5.5, 6.5]


def test_surface_features() -> None:
    chosen, rejected = torch.tensor([[0, 7, 3], [4, 9, 9]]), torch.tensor([[7, 1], [9, 0]])
    masks = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool), torch.tensor([[1, 1], [1, 0]], dtype=torch.bool)
    logp = torch.tensor([[math.nan, -1, -2], [-3, -3, -3.0]]), torch.tensor([[-1, -4], [-5, math.nan]])
    found = surface_features(chosen, masks[0], rejected, masks[1], chosen_logp=logp[0], rejected_logp=logp[1])
    assert [side.tolist() for side in found["length"]] == [[[2], [3]], [[2], [1]]]
    assert [side.tolist() for side in found["first_token"]] == [[[0, 1, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 1]]]  # 4, 7, 9
    assert [side.tolist() for side in found["mean_logp"]] == [[[-1.5], [-3]], [[-2.5], [-5]]]
    assert set(surface_features(chosen, masks[0], rejected, masks[1])) == {"length", "first_token"}
    with pytest.raises(ValueError, match="one of chosen_logp and rejected_logp is None"):
        surface_features(chosen, masks[0], rejected, masks[1], chosen_logp=logp[0])


def test_a_cue_in_length_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randint(5, (2, 60, 30), generator=generator)
    lengths = torch.randint(5, 15, (2, 60), generator=generator) + torch.tensor([[12], [0]])
    masks = [torch.arange(30) < n[:, None] for n in lengths]
    found = surface_features(chosen, masks[0], rejected, masks[1])
    assert linear_separability(*found["length"])["auc"] > 0.95
    assert abs(linear_separability(*found["first_token"])["auc"] - 0.5) < 0.2


def test_margin_saturation() -> None:
    assert margin_saturation_step([0.5, 0.99, 0.995, 1.0]) == 2
    assert margin_saturation_step(torch.tensor([0.5, 0.8]), threshold=0.7, steps=[10, 20]) == 20
    assert margin_saturation_step([0.9, 0.99, math.nan]) is None and margin_saturation_step([]) is None
    with pytest.raises(ValueError, match="steps has 1 entries; 2 are expected"):
        margin_saturation_step([1, 1], steps=[0])


BAD = CHOSEN.clone()
BAD[4, 1] = math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_separability(CHOSEN, REJECTED), "f_chosen has 6 rows; at least 10 are expected"),
        (lambda: linear_separability(CHOSEN, REJECTED, n_folds=1), "n_folds is 1; at least 2"),
        (lambda: linear_separability(BAD, REJECTED, n_folds=3), r"f_chosen\[4\] has a feature that is not finite"),
        (lambda: linear_probe(CHOSEN, BAD), r"f_rejected\[4\] has a feature that is not finite"),
        (lambda: linear_separability(CHOSEN, REJECTED[:5]), r"f_chosen has shape \[6, 2\], f_rejected \[5, 2\]"),
        (lambda: linear_probe(CHOSEN[:0], REJECTED[:0]), r"f_chosen has shape \[0, 2\]"),
        (lambda: linear_probe(CHOSEN, REJECTED, ridge=0), "ridge is 0; it must be positive"),
        (lambda: linear_probe(CHOSEN, REJECTED, solver="duel"), "solver is 'duel'; accepted: .* did you mean 'dual'"),
        (lambda: linear_separability(CHOSEN, REJECTED, n_folds=3, groups=[1]), "groups has 1 entries; 6 are expected"),
        (lambda: linear_separability(CHOSEN, REJECTED, n_folds=3, groups=[1, 2] * 3), "groups has 2 different ids; at least 3"),
        (lambda: auc([], [1]), r"positive has shape \[0\]; a score or more"),
        (lambda: auc([1], [0, math.nan]), r"negative\[1\] is nan"),
        (
            lambda: pool_features(CHOSEN[None], torch.ones(1, 6)),
            r"mask is torch.float32 \[1, 6\] for \[1, 6, 2\]; bool \[B, T\]",
        ),
        (lambda: pool_features(CHOSEN[None], torch.zeros(1, 6, dtype=torch.bool)), r"mask\[0\] has no token that counts"),
        (lambda: pool_features(CHOSEN[None], torch.ones(1, 6, dtype=torch.bool), how="first"), "how is 'first'; accepted"),
    ],
)
def test_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- trainer and rollout

# Ratios 3 and 1 in the first row, 1/4 in the second, none in the third.
ROLLOUT = torch.tensor([[-2.0, -1.0, math.nan], [-0.5, math.inf, 0.0], [math.nan] * 3], dtype=F64)
TRAINER = torch.tensor(
    [[-2.0 + math.log(3), -1.0, 7.0], [-0.5 - math.log(4), math.nan, -math.inf], [-math.inf, 3.0, 0.0]], dtype=F64
)
COUNTS = torch.tensor([[True, True, False], [True, False, False], [False] * 3])


def test_worked_mismatch() -> None:
    found = logprob_mismatch(TRAINER, ROLLOUT, COUNTS, tokens=torch.arange(9).view(3, 3) + 50)
    assert (found.tokens, found.sequences, found.trainer_inf, found.rollout_inf) == (3, 2, 0, 0)
    expected = {
        "mean_abs": 0.828302,
        "max_abs": 1.386294,
        "mean_ratio": 1.416667,
        "k1": 0.095894,
        "k2": 0.521460,
        "k3": 0.512561,
        "outside": 2 / 3,
        "ess": 1.165517,
    }
    for name, value in expected.items():
        close(getattr(found, name), value, 1e-6)
    ratios = found.ratio_quantiles
    close([ratios[q] for q in (0.0, 0.25, 0.5, 0.75, 1.0)], [0.25, 0.625, 1.0, 2.0, 3.0], 1e-12)
    close(found.sequence_ratio[:2], [3.0, 0.25], 1e-12)
    assert found.sequence_ratio[2].isnan()
    assert [(w.row, w.position, w.token) for w in found.worst] == [(1, 0, 53), (0, 0, 50), (0, 1, 51)]
    close([w.difference for w in found.worst], [-math.log(4), math.log(3), 0], 1e-12)
    report = str(found)
    for part in ("3 tokens", "mean abs 0.8283", "k1 0.09589", "outside [0.5, 2]: 66.7 %", "1, 0: -1.8863, -0.5000"):
        assert part in report
    assert "token 53" in report
    assert "-inf" not in report


def test_mismatch_of_nothing_is_nothing() -> None:
    logp = -torch.rand(4, 6)
    found = logprob_mismatch(logp, logp.clone(), torch.ones(4, 6, dtype=torch.bool), top=2)
    assert (found.mean_abs, found.max_abs, found.k1, found.k2, found.k3, found.outside) == (0, 0, 0, 0, 0, 0)
    assert set(found.ratio_quantiles.values()) == {1.0}
    assert (found.mean_ratio, found.ess) == (1.0, 4.0)
    assert len(found.worst) == 2
    assert found.worst[0].token is None


def test_infinite_logprobs_are_named() -> None:
    trainer = torch.tensor([[-1.0, -math.inf, -2.0, -math.inf, -3.0]])
    rollout = torch.tensor([[-1.0, -2.0, -math.inf, -math.inf, -3.5]])
    found = logprob_mismatch(trainer, rollout, torch.ones(1, 5, dtype=torch.bool))
    assert (found.trainer_inf, found.rollout_inf, found.tokens) == (2, 2, 2)
    close(found.max_abs, 0.5, 1e-6)
    close(found.sequence_log_ratio, [0.5], 1e-6)
    assert [w.position for w in found.worst] == [1, 2, 4, 0, 3]
    assert [w.difference for w in found.worst[:2]] == [-math.inf, math.inf]
    assert "-inf in the trainer: 2, in the rollout: 2" in str(found)


def test_k3_is_the_divergence_in_expectation() -> None:
    """Sampled from the rollout's distribution, all three estimate KL(rollout || trainer); k1 and k3 without bias."""
    rollout = torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()
    trainer = torch.tensor([0.4, 0.35, 0.25], dtype=F64).log()
    counts = (5, 3, 2)
    sides = [torch.cat([side[i].repeat(n) for i, n in enumerate(counts)])[None] for side in (trainer, rollout)]
    found = logprob_mismatch(*sides, torch.ones(1, 10, dtype=torch.bool))
    divergence = float((rollout.exp() * (rollout - trainer)).sum())
    close([found.k1, found.k3, found.mean_ratio], [divergence, divergence, 1.0], 1e-12)
    close(found.k2, divergence, 2e-3)


def test_long_sequences_do_not_overflow() -> None:
    rollout = torch.zeros(2, 2000)
    trainer = torch.stack([torch.ones(2000), torch.zeros(2000)])
    found = logprob_mismatch(trainer, rollout, torch.ones(2, 2000, dtype=torch.bool))
    assert found.ess == 1.0
    close(found.sequence_log_ratio, [2000, 0], 1e-9)


def test_plot_of_a_mismatch(tmp_path) -> None:
    path = tmp_path / "mismatch.png"
    logprob_mismatch(TRAINER, ROLLOUT, COUNTS, plot=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_refusals_of_logprob_mismatch() -> None:
    logp, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"trainer_logp has shape \[3\], rollout_logp \[3\]"):
        logprob_mismatch(logp[0], logp[0], mask[0])
    with pytest.raises(ValueError, match=r"rollout_logp \[2, 2\]"):
        logprob_mismatch(logp, logp[:, :2], mask)
    with pytest.raises(ValueError, match=r"mask is torch.int64 \[2, 3\]"):
        logprob_mismatch(logp, logp, mask.long())
    with pytest.raises(ValueError, match=r"tokens has shape \[3\]"):
        logprob_mismatch(logp, logp, mask, tokens=torch.arange(3))
    with pytest.raises(ValueError, match="top is -1"):
        logprob_mismatch(logp, logp, mask, top=-1)
    with pytest.raises(ValueError, match="mask has no token"):
        logprob_mismatch(logp, logp, ~mask)
    for bad in (math.nan, math.inf):
        wrong = logp.clone()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=rf"rollout_logp\[1, 2\] is {bad}"):
            logprob_mismatch(logp, wrong, mask)
    with pytest.raises(ValueError, match="every token in the mask has a log-prob of -inf"):
        logprob_mismatch(logp - math.inf, logp, mask)
