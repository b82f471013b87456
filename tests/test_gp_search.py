"""The example of mini-GP-UCB: its parts by value, what a short run shows, its command, and the tables of the page about it."""

import json

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("matplotlib")

F64 = torch.float64


@pytest.fixture(scope="module")
def example(load_example):
    return load_example("gp_search")


def close(actual, expected, atol=1e-10) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def test_problems(example):
    for dimensions in (1, 2):
        points = example.grid(dimensions)
        assert (
            points.shape == (400, dimensions) and points.min() == 0 and points.max() == 1 and len(points.unique(dim=0)) == 400
        )
    problem, again = example.sample_path(2, 3), example.sample_path(2, 3)
    assert torch.equal(problem.f, again.f) and not torch.equal(problem.f, example.sample_path(2, 4).f)
    first = problem.reward(7, 20, 3)
    assert torch.equal(first, again.reward(7, 20, 3)) and not torch.equal(first, problem.reward(7, 21, 3))
    many = problem.reward(7, 0, 20000)
    close(many.mean(), problem.f[7], 0.003)
    close(many.std(), example.NOISE, 0.002)


def test_direct_posterior_is_that_of_the_unique_points(example):
    problem = example.sample_path(2, 0)
    picks = [3, 77, 3, 210, 3, 77]
    y = torch.cat([problem.reward(pick, i, 1) for i, pick in enumerate(picks)])
    gp = example.MiniGP(problem.candidates, example.KERNEL, lam=example.LAM, C=1.1, beta=1.0).gp
    gp.update(problem.candidates[picks], y)
    for ours, theirs in zip(
        gp.posterior(problem.candidates),
        example.direct_posterior(problem.candidates[picks], y, problem.candidates),
        strict=True,
    ):
        close(ours, theirs)


def test_a_run_adds_up(example):
    problem = example.sample_path(1, 0)
    run = example.search(problem, example.METHODS[2], 150, look_every=1)
    assert len(run.picks) == len(run.regret) == len(run.unique) == 150
    close(run.regret[-1], (problem.f.max() - problem.f[run.picks]).sum())
    assert run.unique[-1] == len(set(run.picks)) and run.switches <= run.decisions < 150
    assert 1 < run.shrunk <= 1.2**2 + 1e-9


def test_spread(example):
    assert example.spread([3.0], "{:.0f}") == "3"
    assert example.spread([1.0, 2.0, 4.0, 5.0], "{:.1f}") == "3.0 (1.0 to 5.0)"


@pytest.mark.slow
def test_the_command_in_a_hurry(example, tmp_path, capsys, threads):
    threads(2)
    out, numbers = tmp_path / "a.png", tmp_path / "a.json"
    assert example.main(["--quick", "--markdown", "--out", str(out), "--json", str(numbers)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and torch.get_num_threads() == 2
    printed, found = capsys.readouterr().out, json.loads(numbers.read_text())
    assert "| 2-D | mini-GP-UCB, C = 1.2 |" in printed
    assert "the first 100 choices of GP-UCB are those of the matrix of all observations" in printed
    assert set(found["runs"]) == {f"{d}, {m.name}" for d in ("1-D", "2-D") for m in example.METHODS}
    claims(found, factor=2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: 0 is less than 1"),
        (["--budget", "99"], "--budget: 99 is less than 100"),
        (["--out", "no/such/folder/a.png"], "--out: there is no directory no/such/folder"),
        (["--json", "no/such/folder/a.json"], "--json: there is no directory no/such/folder"),
    ],
)
def test_main_refuses(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        example.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def claims(numbers, factor: float) -> None:
    """What the page says, of any number of functions."""
    budget = numbers["budget"]
    for dimensions in ("1-D", "2-D"):
        runs = {name.partition(", ")[2]: run for name, run in numbers["runs"].items() if name.startswith(dimensions)}
        plain = runs["GP-UCB"]
        for name, run in runs.items():
            assert max(run["unique"]) < budget / 4  # they do not grow with the evaluations
            if name == "GP-UCB":
                continue
            C = float(name.rpartition(" ")[2])
            assert max(run["shrunk"]) <= C * C + 1e-9
            assert all(ours < theirs for ours, theirs in zip(run["decisions"], plain["decisions"], strict=True))
            if "UCB" in name:
                assert sum(run["regret"]) < factor * C * sum(plain["regret"])
        decisions = [sum(runs[f"mini-GP-UCB, C = {C}"]["decisions"]) for C in ("1.05", "1.2", "2")]
        assert decisions == sorted(decisions, reverse=True)
