"""The example behind the prompt pools of docs/experiments_rollouts.md: its parts by value, and what each run shows."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import v0

pytest.importorskip("matplotlib")

F64 = torch.float64


@pytest.fixture(scope="module")
def pools(load_example):
    return load_example("prompt_pool")


def close(actual, expected, atol=1e-9) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------------------------------- pools


def test_a_group_teaches_by_its_variance(pools):
    pool = pools.Pool(50, 3, 0)
    before, ids = pool.p(), torch.tensor([4, 7, 9])
    pool.train(ids, torch.tensor([0.0, 8, 8]), 8)
    assert torch.equal(pool.p(), before)  # all agree
    pool.train(ids, torch.tensor([4.0, 8, 2]), 8)
    close(pool.own[ids], [0.3, 0, 0.3 * 0.75], atol=1e-6)
    same = pool.topic == pool.topic[4]
    assert (pool.p()[same] > before[same]).all()
    assert pool.rollouts == 0 and len(pool) == 50
    assert pool.roll_out(torch.arange(50), 8).max() <= 8 and pool.rollouts == 400


def test_the_filter_counts_what_it_throws_away(pools):
    pool = pools.Pool(300, 5, 1)
    groups = pools.DapoFilter(pool, 16, 8, 0).step()
    assert pool.rollouts == 8 * len(groups.ids) > 8 * 16 and groups.kept.sum() == 16
    assert (pools.signal(groups.successes, 8)[groups.kept] > 0).all()
    hopeless = pools.Pool(300, 5, 1)
    hopeless.difficulty += 100
    groups = pools.DapoFilter(hopeless, 16, 8, 0).step()
    assert hopeless.rollouts == 10 * 16 * 8 and not groups.kept.any()


def test_scoring_rollouts_are_counted(pools):
    pool = pools.Pool(300, 5, 1)
    vas = pools.Vas(pool, 16, 8, 0)
    vas.step()
    assert pool.rollouts == 300 * 8 + 16 * 8
    vas.step()
    assert pool.rollouts == 300 * 8 + 2 * 16 * 8


def test_the_oracle_takes_the_prompts_of_most_utility(pools):
    pool = pools.Pool(100, 5, 2)
    p = pool.p()
    ids = pools.Oracle(pool, 10, 8, 0).choose()
    utility = p * (1 - p) ** 2
    assert utility[ids].min() >= utility[torch.tensor([i for i in range(100) if i not in ids.tolist()])].max()


def test_halves_and_windows(pools):
    run = pools.PoolRun([10, 20, 40], [1, 1, 2], [1.0, 0, 0.5], [0.0] * 3, [0.0] * 3, 3, None, None)
    close(pools.over_halves(run, run.silent, run.groups), [0.5, 0.5])
    assert pools.used(run) == [10, 10, 20]
    close(pools.smoothed([1.0, 3, 5], [1, 1, 3], 2), [1, 2, 4.5])
    assert pools.spread([1.0, 3], "{:.1f}") == "2.0 (1.0 to 3.0)" and pools.spread([], "{}") == "-"


def test_vade_beside_the_others_on_a_small_pool(pools):
    found = pools.pool(seeds=2, quick=True).numbers
    assert set(found) == set(pools.SAMPLERS)
    later = {name: pools.mean([s[1] for s in run["silent"]]) for name, run in found.items()}
    assert later["oracle"] < later["VADE"] < 0.75 * later["uniform"]
    signals = {name: pools.mean([s[1] for s in run["signal"]]) for name, run in found.items()}
    assert signals["VADE"] > 1.2 * signals["DAPO's filter"] and signals["oracle"] > signals["VADE"]
    assert found["DAPO's filter"]["steps"] < found["uniform"]["steps"] == [60, 60]


# --------------------------------------------------------------------------------------------------------------- budgets


def test_budgets_add_up(pools):
    p = pools.arcsine_like(37, torch.Generator().manual_seed(0))
    assert len(p) == 37 and (p > 0).all() and (p < 1).all()
    for allocate in pools.ALLOCATORS.values():
        budgets = allocate(p, 8 * 37)
        assert budgets.sum() == 8 * 37 and budgets.min() >= 2
    assert pools.by_variance(torch.zeros(4, dtype=F64), 32).tolist() == [8] * 4
    draws = pools.arcsine_like(20_000, torch.Generator().manual_seed(1))
    close(draws.mean(), 0.5, atol=0.01)
    close(draws.var(), 0.25 / 2.2, atol=0.003)


def test_expectations_over_a_group(pools):
    p, budgets = torch.tensor([0.3, 0.9], dtype=F64), torch.tensor([4, 2])
    close(pools.mixed_share(budgets, p), (1 - 0.3**4 - 0.7**4 + 1 - 0.81 - 0.01) / 2)
    first = sum(math.comb(4, k) * 0.3**k * 0.7 ** (4 - k) * 2 * math.sqrt(k * (4 - k)) for k in (1, 2, 3))
    close(pools.advantage_mass(budgets, p), (first + 2 * 0.9 * 0.1 * 2) / 2)


def test_what_budgets_do_on_a_small_pool(pools):
    found = pools.budget(seeds=2, quick=True).numbers
    for sigma in ("0", "0.1", "0.3"):
        runs = {name: found[f"{name}, {sigma}"] for name in pools.ALLOCATORS}
        assert all(b >= a for run in runs.values() for a, b in zip(run["start"], run["accuracy"], strict=True))
    exact, greedy = found["V_0, exact, 0"], found["V_0, greedy, 0"]
    assert all(a >= b for a, b in zip(exact["utility"], greedy["utility"], strict=True))
    p = pools.arcsine_like(40, torch.Generator().manual_seed(0))
    close(exact["utility"][0], v0.allocate_budget(p, 320).utility / 40)


# ---------------------------------------------------------------------------------------------------------------- router


def test_the_router_trades_accuracy_for_cost(pools):
    found = pools.router(seeds=2, quick=True).numbers
    cost = [pools.mean(found[f"beta {beta:g}"]["cost"]) for beta in pools.BETAS]
    assert cost[0] == 1 and cost == sorted(cost) and cost[-1] > 3
    accuracy = {name: pools.mean(run["accuracy"]) for name, run in found.items()}
    assert accuracy["beta 1"] > max(accuracy[f"model {m} alone"] for m in (1, 2, 3)) - 0.02
    assert accuracy["oracle of accuracy"] > accuracy["beta 1"]


# ----------------------------------------------------------------------------------------------------------- the command


def test_main_writes_its_picture_and_numbers(pools, tmp_path, capsys, threads):
    threads(2)
    out, numbers = tmp_path / "a.png", tmp_path / "a.json"
    assert pools.main(["router", "--quick", "--seeds", "1", "--markdown", "--out", str(out), "--json", str(numbers)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "| router | mean cost | accuracy |" in capsys.readouterr().out
    assert len(json.loads(numbers.read_text())["beta 1"]["cost"]) == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poker"], "invalid choice: 'poker'"),
        (["pool", "--seeds", "0"], "--seeds: 0 is less than 1"),
        (["pool", "--out", "no/such/folder/a.png"], "--out: there is no directory no/such/folder"),
        (["pool", "--json", "no/such/folder/a.json"], "--json: there is no directory no/such/folder"),
    ],
)
def test_main_refuses(pools, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        pools.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
