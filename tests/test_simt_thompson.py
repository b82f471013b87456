"""The CUDA kernels of csrc/sampling/beta_thompson*, compiled for the CPU by tests/simt, against the CPU kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefkern import beta_thompson_topk, decayed_beta_update_
from prefkern.reference.thompson import expected_thompson_utility
from simt.harness import GUARD, INF, NAN, close, guards_hold, launches, pointer, same_bits_in_every_order, tensor_like

MODES, UTILITIES = ("thompson", "mean"), ("p1mp2", "p1mp")


def counts(n: int) -> tuple[Tensor, Tensor]:
    alpha, beta = torch.rand(2, n).mul(14).sub(4).exp2().sub(0.0625).clamp_min(0)
    return alpha, beta


def thompson(simt, alpha, beta, *, eligible=None, mode="thompson", utility="p1mp2", seed=0, step=0, draws=True):
    args = simt.ThompsonArgs()
    args.count = len(alpha)
    args.alpha, args.beta, args.eligible = pointer(alpha), pointer(beta), pointer(eligible)
    args.mode, args.utility = getattr(simt.ThompsonMode, mode), getattr(simt.ThompsonUtility, utility)
    args.seed, args.step = seed, step
    out = {"utilities": tensor_like(alpha), "draws": tensor_like(alpha)}
    args.utilities = pointer(out["utilities"])
    args.draws = pointer(out["draws"]) if draws else 0
    simt.cuda_beta_thompson(args)
    return out


def update(simt, alpha, beta, ids, successes, rollouts, lam1=0.2, lam2=0.999):
    """As the op calls it: sorted ids, and where each was."""
    sorted_ids, order = ids.sort(stable=True)
    out = {"alpha": alpha.clone(), "beta": beta.clone()}
    scratch = torch.full((2 * len(ids),), GUARD)
    args = simt.BetaUpdateArgs()
    args.count, args.selected = len(alpha), len(ids)
    args.alpha, args.beta, args.ids, args.order = map(pointer, (out["alpha"], out["beta"], sorted_ids, order))
    args.successes, args.rollouts, args.scratch = map(pointer, (successes, rollouts, scratch))
    args.lam1, args.lam2 = lam1, lam2
    simt.cuda_beta_update(args)
    return out


@pytest.mark.parametrize("size", [1, 255, 5000])
def test_draws_are_those_of_the_cpu(simt, size):
    """The same words, and rounding apart the same draws; a proposal at the very edge may be taken by one of the two."""
    alpha, beta = counts(size)
    out = same_bits_in_every_order(simt, lambda: thompson(simt, alpha, beta, seed=2**63 + 5, step=9))
    cpu = beta_thompson_topk(alpha, beta, size, seed=2**63 + 5, step=9, return_draws=True)
    assert ((out["draws"] - cpu.draws).abs() > 2e-6).sum() <= (size > 1000)
    close(out["utilities"], out["draws"] * (1 - out["draws"]) ** 2, atol=1e-7)
    ids = out["utilities"].sort(descending=True, stable=True).indices[: size // 10]
    assert len(set(ids.tolist()) & set(cpu.ids[: size // 10].tolist())) >= size // 10 - 2


@pytest.mark.parametrize("utility", UTILITIES)
def test_expected_utilities(simt, utility):
    alpha, beta = counts(700)
    out = same_bits_in_every_order(simt, lambda: thompson(simt, alpha, beta, mode="mean", utility=utility))
    close(out["utilities"], expected_thompson_utility(alpha.double(), beta.double(), utility), atol=0)
    close(out["draws"], (alpha.double() + 1) / (alpha.double() + beta.double() + 2), atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_who_may_not_be_chosen_and_wrong_counts(simt, mode):
    alpha, beta = counts(600)
    eligible = torch.rand(600) < 0.5
    clean = thompson(simt, alpha, beta, mode=mode)
    wrong = torch.zeros(600, dtype=torch.bool)
    for i, value in enumerate((NAN, INF, -1.0, 2e30)):
        (alpha, beta)[i % 2][i] = value
        wrong[i], eligible[i] = True, i < 2
    out = same_bits_in_every_order(simt, lambda: thompson(simt, alpha, beta, mode=mode, eligible=eligible))
    assert (out["utilities"][~eligible] == -INF).all()
    assert out["utilities"][eligible & wrong].isnan().all() and out["draws"][wrong].isnan().all()
    assert torch.equal(out["utilities"][eligible & ~wrong], clean["utilities"][eligible & ~wrong])
    assert torch.equal(out["draws"][~wrong], clean["draws"][~wrong])
    without = thompson(simt, alpha, beta, mode=mode, eligible=eligible, draws=False)
    assert torch.equal(without["utilities"].nan_to_num(7), out["utilities"].nan_to_num(7))
    assert (without["draws"] == GUARD).all()


def test_more_prompts_than_the_grid_has_threads(simt):
    alpha = torch.zeros(4096 * 256 + 300)
    out = thompson(simt, alpha, alpha, mode="mean")["utilities"]
    assert (out == out[0]).all() and launches(simt, lambda: thompson(simt, alpha[:0], alpha[:0])) == 0


@pytest.mark.parametrize("selected", [0, 1, 300])
def test_updates_are_those_of_the_cpu(simt, selected):
    alpha, beta = counts(1000)
    ids = torch.randperm(1000)[:selected]
    rollouts = torch.randint(0, 9, (selected,)).float()
    successes = (torch.rand(selected) * rollouts).round()
    out = same_bits_in_every_order(simt, lambda: update(simt, alpha, beta, ids, successes, rollouts))
    decayed_beta_update_(alpha, beta, ids, successes, rollouts)
    close(out["alpha"], alpha, atol=0)
    close(out["beta"], beta, atol=0)


def test_what_the_host_does_not_look_at(simt):
    alpha, beta = torch.ones(6), torch.ones(6)
    ids, successes = torch.tensor([4, 1, 4, 9, -1, 2, 3, 0]), torch.tensor([1.0, 2, 1, 1, 1, 9, NAN, 0])
    rollouts = torch.full((8,), 8.0)
    rollouts[7] = INF
    out = update(simt, alpha, beta, ids, successes, rollouts, lam2=0.5)
    for name, value in (("alpha", 2.2), ("beta", 6.2)):
        assert out[name].isnan().tolist() == [True, False, True, True, True, False]
        close(out[name][[1, 5]], torch.tensor([value, 0.5]))
    assert guards_hold(tensor_like(alpha)) and launches(simt, lambda: update(simt, alpha, beta, ids, successes, rollouts)) == 3
    assert launches(simt, lambda: update(simt, alpha, beta, ids, successes, rollouts, lam2=1.0)) == 2
