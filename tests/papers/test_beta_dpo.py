"""beta-DPO against worked numbers: batch beta, moving averages, and the law of the selection."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from pair_cases import CHOSEN, F64, REFS, REJECTED, assert_layouts_agree, close, gradients, sums
from prefkern.papers import load_pair_recipe
from prefkern.papers.beta_dpo import GapStatistics, beta_dpo_beta, beta_dpo_loss, beta_dpo_select
from prefkern.papers.dpo import dpo_loss

GAP = torch.tensor([1.0, 3.0, -2.0, 8.0], dtype=F64)
SELECTED = torch.tensor([True, True, False, True])


def zero() -> torch.Tensor:
    return torch.zeros((), dtype=F64)


def test_worked_numbers() -> None:
    beta = beta_dpo_beta(GAP, SELECTED, torch.tensor(0.5, dtype=F64), a=0.6)
    close(beta, 0.31)
    out, slope = gradients(lambda x: beta_dpo_loss(x, torch.zeros_like(x), batch_beta=beta, selected=SELECTED), GAP)
    close(out.loss.detach(), 0.3210357759)
    close(slope, torch.where(SELECTED, -0.31 * torch.sigmoid(-0.31 * GAP) / 3, 0.0))
    close(out.metrics["batch_beta"], 0.31)
    close(out.metrics["chosen_reward"], 0.31 * 4)
    assert out.metrics["pairs"] == 3


def test_worked_moving_averages() -> None:
    statistics = GapStatistics()
    statistics.update(GAP)
    close(statistics.mean, 0.25)
    close(statistics.std, 0.4203173404)
    assert statistics.mean.dim() == statistics.std.dim() == 0
    statistics.update(2 * GAP)
    close(statistics.mean, 0.9 * 0.25 + 0.1 * 5)
    close(statistics.std, (0.9 + 2) * 0.4203173404, atol=1e-9)


def test_one_pair_leaves_the_standard_deviation() -> None:
    statistics = GapStatistics()
    statistics.update(torch.tensor([2.0]))
    close(statistics.mean, 0.2, atol=1e-7)
    assert statistics.std == 0


def test_averages_are_constants_of_the_gaps_type() -> None:
    statistics = GapStatistics(momentum=0.5)
    statistics.update(GAP.float().requires_grad_())
    assert statistics.mean.dtype == torch.float32 and not statistics.mean.requires_grad and statistics.mean == 1.25


def test_state() -> None:
    one, other = GapStatistics(0.8), GapStatistics()
    one.update(GAP)
    state = one.state_dict()
    one.update(GAP)
    other.load_state_dict(state)
    assert other.momentum == 0.8 and other.std != one.std
    close(other.mean, 0.5)
    other.update(GAP)
    assert torch.equal(other.mean, one.mean) and torch.equal(other.std, one.std) and state["mean"] < one.mean
    with pytest.raises(ValueError, match=r"state has keys \['mean'\]; accepted: \['mean', 'momentum', 'std'\]"):
        other.load_state_dict({"mean": state["mean"]})


def test_beta_has_a_floor_and_no_gradient() -> None:
    assert beta_dpo_beta(GAP, None, torch.tensor(100.0, dtype=F64)) == 1e-3
    assert beta_dpo_beta(GAP, None, torch.tensor(100.0, dtype=F64), minimum=0.02) == 0.02
    gap = GAP.clone().requires_grad_()
    beta = beta_dpo_beta(gap, None, zero())
    close(beta, 0.1 * (1 + 0.6 * 2.5))
    assert not beta.requires_grad
    given = torch.tensor(0.3, dtype=F64, requires_grad=True)
    out = beta_dpo_loss(gap, torch.zeros_like(gap), batch_beta=given)
    assert torch.autograd.grad(out.loss, given, allow_unused=True) == (None,)


def test_identities() -> None:
    plain, chosen, rejected = gradients(lambda x, y: dpo_loss(x, y, *REFS, beta=0.2), CHOSEN, REJECTED)
    out, x, y = gradients(lambda x, y: beta_dpo_loss(x, y, *REFS, batch_beta=0.2), CHOSEN, REJECTED)
    close(out.loss.detach(), plain.loss.detach())
    close(x, chosen)
    close(y, rejected)
    for name in ("chosen_reward", "rejected_reward", "reward_margin", "accuracy"):
        close(out.metrics[name], plain.metrics[name])
    close(beta_dpo_beta(GAP, SELECTED, zero(), beta=0.2, a=0.0), 0.2)


# ---- selection


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("pairs", "rho", "kept"), [(10, 0.2, 8), (4, 0.2, 3), (1, 0.2, 1), (3, 0.9, 1), (5, 0.0, 5)])
def test_how_many_are_kept(pairs, rho, kept) -> None:
    gap = torch.randn(pairs, dtype=F64)
    assert beta_dpo_select(gap, zero(), zero() + 1, rho=rho, generator=generator()).sum() == kept


def test_equal_states_give_equal_selections() -> None:
    gap = torch.randn(50, dtype=F64)
    one, other, third = (beta_dpo_select(gap, zero(), zero() + 1, rho=0.5, generator=generator(k)) for k in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)


def test_the_law_of_the_selection() -> None:
    """Two of three without replacement: probabilities of each set, by the order of drawing."""
    gap, mean, std = torch.tensor([0.0, 1.0, 2.0], dtype=F64), torch.tensor(0.5, dtype=F64), torch.tensor(1.0, dtype=F64)
    weights = (-0.5 * ((gap - mean) / std) ** 2).exp().tolist()
    total = sum(weights)
    expected = {
        (i, j): weights[i] / total * weights[j] / (total - weights[i]) + weights[j] / total * weights[i] / (total - weights[j])
        for i, j in itertools.combinations(range(3), 2)
    }
    draws, seeded = 20000, generator(7)
    counts = dict.fromkeys(expected, 0)
    for _ in range(draws):
        drawn = beta_dpo_select(gap, mean, std, rho=0.3, generator=seeded)
        counts[tuple(drawn.nonzero()[:, 0].tolist())] += 1
    for pair, probability in expected.items():
        assert abs(counts[pair] / draws - probability) < 4 * math.sqrt(probability * (1 - probability) / draws)


def test_weights_that_vanish_still_leave_enough_pairs() -> None:
    """exp(-(gap / std)^2 / 2) is 0 in floating point for all but one."""
    gap = torch.tensor([0.0, 1e3, 2e3, 3e3])
    drawn = beta_dpo_select(gap, torch.tensor(0.0), torch.tensor(1.0), rho=0.5, generator=generator())
    assert drawn.tolist() == [True, True, False, False]  # the nearest


def test_without_a_spread_all_weigh_alike() -> None:
    gap, seeded = torch.tensor([0.0, 1e6], dtype=F64), generator()
    first = sum(int(beta_dpo_select(gap, zero(), zero(), rho=0.5, generator=seeded)[0]) for _ in range(400))
    assert 150 < first < 250


# ---- pairs


def test_recipe() -> None:
    mean = torch.tensor(-0.2, dtype=F64)
    for selected in (None, torch.tensor([True, False, True])):
        extra = {"gap_mean": mean} | ({} if selected is None else {"selected": selected})
        keep = torch.ones(3, dtype=torch.bool) if selected is None else selected

        def expected(logp, ref, keep=keep):
            chosen, rejected = sums(logp - ref)
            gap = (chosen - rejected)[keep]
            beta = (0.2 * (1 + 0.6 * (gap.detach().mean() - mean))).clamp_min(1e-3)
            return -logsigmoid(beta * gap).mean()

        out = assert_layouts_agree(load_pair_recipe("beta_dpo:beta=0.2"), expected, per_pair=extra)
        assert out.metrics["pairs"] == keep.sum()


def test_refusals() -> None:
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"momentum is {momentum}; it must be in \[0, 1\)"):
            GapStatistics(momentum)
    with pytest.raises(ValueError, match=r"gap has shape \[0\]; \[P\] with at least one pair is expected"):
        GapStatistics().update(torch.zeros(0))
    with pytest.raises(ValueError, match=r"gap\[1\] is nan; a finite number is expected"):
        GapStatistics().update(torch.tensor([0.0, math.nan]))
    for rho in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"rho is {rho}; it must be in \[0, 1\)"):
            beta_dpo_select(GAP, zero(), zero(), rho=rho)
    with pytest.raises(ValueError, match=r"selected has shape \[3\]; \[4\] is expected"):
        beta_dpo_beta(GAP, SELECTED[:3], zero())
