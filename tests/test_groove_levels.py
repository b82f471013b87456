"""The example on tabular levels: values by hand, rollouts against them, and what a small run shows."""

import json

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("matplotlib")

F64 = torch.float64


@pytest.fixture(scope="module")
def example(load_example):
    return load_example("groove_levels")


def close(actual, expected, atol=1e-9) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def chain(example, horizon=3, noise=0.0):
    """Action 1 leads to the next state, action 0 stays and pays 0.1; state s pays s for action 1."""
    transition = torch.zeros(1, 5, 2, 5, dtype=F64)
    reward = torch.zeros(1, 5, 2, dtype=F64)
    for s in range(5):
        transition[0, s, 0, s] = transition[0, s, 1, min(s + 1, 4)] = 1
        reward[0, s] = torch.tensor([0.1, s], dtype=F64)
    return example.Levels(transition, reward, torch.tensor([noise], dtype=F64), torch.tensor([horizon]))


def test_values_of_a_chain(example):
    always = torch.tensor([0.0, 1.0], dtype=F64).expand(1, 5, 2)
    for horizon, best in ((1, 0.1), (2, 1.0), (3, 3.0), (7, 0 + 1 + 2 + 3 + 4 + 4 + 4)):
        level = chain(example, horizon)
        close(example.values(level, None), [best])
        close(example.values(level, always), [sum(min(s, 4) for s in range(horizon))])
    close(example.values(chain(example, 2), torch.full((1, 5, 2), 0.5, dtype=F64)), [0.05 + 0.5 * 0.05 + 0.5 * (0.05 + 0.5)])


def test_rollouts_follow_the_level(example):
    g = torch.Generator().manual_seed(0)
    always = torch.tensor([0.0, 1.0], dtype=F64).expand(1, 5, 2)
    e = example.roll(chain(example), always, 4, g)
    assert e.obs[0, 0].tolist()[:7] == [0, 1, 2, 0, 1, 2, 0] and e.done[0, 0].tolist()[:6] == [False, False, True] * 2
    close(example.returns_of(chain(example), always, g), torch.full((1, 64), 3.0))
    noisy = example.returns_of(chain(example, noise=2.0), always, g)
    assert noisy.std() == pytest.approx(2 * 3**0.5, rel=0.3) and noisy.mean() == pytest.approx(3, abs=1.5)


def test_sampled_returns_agree_with_exact_ones(example):
    levels, g = example.make_levels(range(8), 0), torch.Generator().manual_seed(1)
    policy = torch.rand(8, 5, 2, dtype=F64, generator=g).softmax(-1)
    mean = torch.stack([example.returns_of(levels, policy, g).mean(-1) for _ in range(30)]).mean(0)
    error = (levels.noise.square() * levels.horizon + 20).sqrt() / (30 * 64) ** 0.5
    assert ((mean - example.values(levels, policy)).abs() < 4 * error).all()


def test_levels_of_a_number_are_the_same(example):
    a, b = example.make_levels([3, 9], 0), example.make_levels([9], 0)
    assert torch.equal(a.transition[1], b.transition[0]) and a.horizon.tolist() == [20, 5] and a.noise.tolist() == [2, 2]
    assert not torch.equal(b.reward, example.make_levels([9], 1).reward)


def test_learners_learn(example):
    levels, g = example.make_levels(range(8), 0), torch.Generator().manual_seed(0)
    assert example.share(levels, example.a2c(levels, 30, g)) > 0.5
    assert example.share(levels, example.reinforce(levels, 30, g)[0]) > 0.1
    close(example.share(levels, torch.full((8, 5, 2), 0.5, dtype=F64)), 0.0)


def test_spearman(example):
    a = torch.tensor([0.1, 3, 2, 10])
    close(example.spearman(a, a.exp()), 1.0)
    close(example.spearman(a, -a), -1.0)
    close(example.spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 1, 4, 3])), 0.6)


def test_the_meta_gradient_flows(example, monkeypatch):
    monkeypatch.setattr(example, "LIFETIME", 2)
    runs = [example.meta_train(0, 2, by_regret=by_regret) for by_regret in (False, True)]
    for run in runs:
        assert len(run.gradients) == 2 * example.LIFETIME and min(run.gradients) > 0
        moved = [not torch.equal(a, b) for a, b in zip(run.lpg.parameters(), example.small_lpg(0).parameters(), strict=True)]
        assert all(moved)
    again = example.meta_train(0, 2, by_regret=True)
    assert again.losses == runs[1].losses  # a run repeats


def test_main_writes_its_picture_and_numbers(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "QUICK", {"seeds": 2, "each": 3, "updates": 4, "meta_seeds": 1, "lifetimes": 1})
    monkeypatch.setattr(example, "LIFETIME", 1)
    out, numbers = tmp_path / "a.png", tmp_path / "a.json"
    assert example.main(["--quick", "--markdown", "--out", str(out), "--json", str(numbers)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "| algorithmic regret |" in capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert set(found["correlations"]) == set(example.SCORES) and len(found["correlations"]["random"]["all"]) == 2
    assert len(found["rules"]["LPG, levels by regret"]) == 1


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_main_refuses(example, capsys, option):
    with pytest.raises(SystemExit) as stop:
        example.main([option, "no/such/folder/a"])
    assert stop.value.code == 2 and f"{option}: there is no directory no/such/folder" in capsys.readouterr().err
