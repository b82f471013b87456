"""The example behind docs/experiments.md: its parts by value, what each run shows, and the tables of that page."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import dno, egpo, gpm

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "experiments.md"
F64 = torch.float64


@pytest.fixture(scope="module")
def games(load_example):
    return load_example("preference_games")


def close(actual, expected, atol=1e-9) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------------------ the games


def test_win_matrices(games):
    assert_close(
        games.rock_paper_scissors(0.9, 0.8, 0.7),
        torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]], dtype=F64),
    )
    p = games.random_game(10, 3)
    close(p + p.T, torch.ones(10, 10))
    assert torch.equal(p, games.random_game(10, 3)) and not torch.equal(p, games.random_game(10, 4))


def test_exploitability(games):
    fair = games.rock_paper_scissors(0.8, 0.8, 0.8)
    close(games.exploitability(fair, torch.full((3,), 1 / 3, dtype=F64)), 0.0)
    close(games.exploitability(fair, torch.eye(3, dtype=F64)), [0.3, 0.3, 0.3])
    mixed = torch.tensor([0.5, 0.5, 0], dtype=F64)
    close(games.exploitability(fair, mixed), 0.5 * (0.5 + 0.8) - 0.5)


def test_spread(games):
    assert games.spread([3.0], "{:.0f}") == "3"
    assert games.spread([3.0, 1.0, math.inf], "{:.0f}") == "3 (1 to never)"
    assert games.spread([1.0, 2.0, 4.0, 5.0], "{:.1f}") == "3.0 (1.0 to 5.0)"
    assert games.spread([math.nan, 2.0], "{:.0f}") == "2" and games.spread([math.nan], "{:.0f}") == "-"


# ----------------------------------------------------------------------------------------------------- the last iterate


def test_reading_a_curve(games):
    t = torch.arange(0, 500, 2, dtype=F64)
    curves = torch.stack([10 ** (-t / 50), 10 ** (-t / 25), torch.ones_like(t)], 1)
    close(games.evaluations_to(curves, 1e-6, 2), [300, 150, math.inf])
    assert games.best_rate(curves, 2) == 1 and games.best_rate(curves[:10], 2) == 1
    close(games.late_slope(curves[:, 0], 2), -1 / 50)
    assert math.isnan(games.late_slope(curves[:, 2], 2))


def test_methods_take_the_steps_of_their_definitions(games):
    preference, theta = games.random_game(5, 1), torch.randn(5, dtype=F64)
    beta, eta = 0.2, torch.tensor(1.5, dtype=F64)
    arguments = {"beta": beta, "eta": eta}
    ref = torch.zeros(5, dtype=F64)
    once = 0.7 * theta + 1.5 * preference @ theta.softmax(0)
    close(games.mirror_descent_step(theta, ref, preference, **arguments), once)
    close(games.extragradient_step(theta, ref, preference, **arguments), 0.7 * theta + 1.5 * preference @ once.softmax(0))
    mixture = 0.7 * theta
    close(games.nash_md_step(theta, ref, preference, **arguments), mixture + 1.5 * preference @ mixture.softmax(0))


def test_the_fixed_point_of_nash_md_moves_with_its_step_size(games):
    """Its mixture is the Nash policy of a temperature beta / (1 - eta beta), not of beta."""
    preference, beta, rate = games.random_game(6, 2), 0.5, 0.2
    ref = torch.zeros(6, dtype=F64)
    eta = torch.tensor(rate / beta, dtype=F64)
    logits = ref
    for _ in range(500):
        logits = games.nash_md_step(logits, ref, preference, beta=beta, eta=eta)
    assert egpo.dual_gap((1 - rate) * logits, ref, preference, beta=beta / (1 - rate)) < 1e-20
    assert egpo.dual_gap(logits, ref, preference, beta=beta) > 1e-6


@pytest.fixture
def short(games, monkeypatch):
    monkeypatch.setattr(games, "BUDGETS", {0.1: (200, 2), 0.01: (400, 10)})
    return games.extragradient(seeds=2)


def test_egpo_needs_the_fewest_evaluations(games, short):
    runs = {(r["game"], r["beta"], r["method"]): r for r in short.numbers["runs"]}
    assert len(runs) == 12
    for game in ("rock, paper, scissors", "random 10 x 10"):
        for beta in (0.1, 0.01):
            needed = {name: runs[game, beta, name]["evaluations"] for name in games.METHODS}
            for ours, *theirs in zip(needed["EGPO"], needed["mirror descent"], needed["Nash-MD"], strict=True):
                assert ours < min(theirs)
        assert max(runs[game, 0.01, "EGPO"]["evaluations"]) <= 250
        assert min(runs[game, 0.01, "mirror descent"]["evaluations"]) == math.inf  # of 400 evaluations
        assert max(runs[game, 0.01, "EGPO"]["end_at_the_rate_of_egpo"]) < 1e-8
        assert min(runs[game, 0.01, "mirror descent"]["end_at_the_rate_of_egpo"]) > 0.1  # it cycles there
        assert all(slope < -0.01 for slope in runs[game, 0.01, "EGPO"]["slope"])


# ------------------------------------------------------------------------------------------------------------- momentum


def test_log_regret_keeps_its_digits(games):
    reward = torch.tensor([1.0, 0.5, -1], dtype=F64)
    logp = torch.log_softmax(torch.randn(3, dtype=F64), 0)
    close(games.log_regret(logp, reward).exp(), 1 - logp.exp() @ reward)
    close(games.log_regret(torch.tensor([0, -800.0, -2000], dtype=F64), reward), math.log(0.5) - 800)


def test_momentum_of_exact_steps(games):
    for seed in range(3):
        reward = games.bandit(seed)
        curves = {alpha: games.exact_outer_steps(reward, beta=2.0, alpha=alpha) for alpha in games.ALPHAS}
        for alpha in (0.3, 0.6, 0.9):
            ratio = (curves[alpha][-1] - curves[alpha][-31]) / (curves[0.0][-1] - curves[0.0][-31])
            assert ratio == pytest.approx(1 / (1 - alpha), rel=0.02)
            assert (curves[alpha][2:] < curves[0.0][2:]).all()
            control = games.exact_outer_steps(reward, beta=2.0 * (1 - alpha), alpha=0.0)
            assert (control[1:] < curves[alpha][1:]).all()  # a smaller beta does the same, sooner


def test_sampled_runs_do_not_mix(games, monkeypatch):
    monkeypatch.setattr(games, "SAMPLED_STEPS", 2)
    monkeypatch.setattr(games, "INNER_STEPS", 5)
    together = games.sampled_outer_steps(2, 20, [(0.0, 2.0), (0.6, 1.0)])
    assert together.shape == (3, 2, 2)
    close(games.sampled_outer_steps(2, 20, [(0.6, 1.0)])[:, 0], together[:, 1], atol=1e-12)
    close(games.sampled_outer_steps(1, 20, [(0.0, 2.0)])[:, :, 0], together[:, :1, 0], atol=1e-12)
    assert (together[0] == together[0, 0]).all() and (together[2] < together[0]).all()


# ------------------------------------------------------------------------------------------------------------ self-play


def test_rounds_reach_the_minimisers_that_are_known(games):
    preference = games.random_game(5, 0)
    logp = torch.log_softmax(torch.randn(5, dtype=F64), 0)
    close(games.dno_round(preference, 0.5)(logp), dno.dno_target(logp, preference, eta=0.5)[1], atol=1e-6)
    reward = torch.randn(5, dtype=F64)
    fitting = torch.sigmoid(reward[:, None] - reward)
    for on_policy in (False, True):
        step = games.dpo_round(fitting, 0.5, on_policy=on_policy)
        close(step(logp), torch.log_softmax(logp + 0.5 * reward, 0), atol=1e-6)
    # SPPO's minimiser among normalised tables: no direction lowers the loss.
    win, new = preference @ logp.exp(), games.sppo_round(preference, 0.5)(logp)
    slope = logp.exp() * (new - logp - 0.5 * (win - 0.5))
    close(slope - new.exp() * slope.sum(), torch.zeros(5), atol=1e-7)


def test_self_play_on_rock_paper_scissors(games, monkeypatch):
    monkeypatch.setattr(games, "ROUNDS", 40)
    result = games.selfplay(seeds=1)
    runs = result.numbers["play"]
    for method in ("SPPO", "DNO"):
        run = runs[f"{method}, 0.5"]
        assert run["average"][40] < run["average"][0] / 2
        assert min(run["previous"]) > 0.5  # each round beats the one before
        assert min(run["start"]) < 0.5  # but not always the start: the last policy goes round
    for eta in ("0.5", "2"):
        assert runs[f"DPO, pairs of the start, {eta}"]["average"][40] > 0.12
        assert runs[f"DPO, pairs on-policy, {eta}"]["average"][40] < 0.05
    for one in result.numbers["dno"]:
        assert min(one["slack"]) > -1e-7 and min(one["previous"]) >= 0.5
    moved = {name: {side: torch.tensor(v) for side, v in m.items()} for name, m in result.numbers["displaced"].items()}
    assert (moved["SPPO, alike"]["chosen"] < 0).double().mean() < 0.05 and (moved["SPPO, unrelated"]["chosen"] > 0).all()
    assert (moved["DPO, alike"]["chosen"] < 0).double().mean() > 0.4
    # Both fit the same difference, as far as features allow.
    assert (moved["DPO, unrelated"]["chosen"] - moved["DPO, unrelated"]["rejected"]).median() == pytest.approx(2, abs=0.02)


# --------------------------------------------------------------------------------------------------------------- cycles


def test_scores_of_embeddings(games):
    angles = torch.tensor([0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=F64)
    v = 3 * torch.stack([angles.cos(), angles.sin()], -1)[None]
    better, worse = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    close(games.scores(v, better, worse), [[math.sqrt(3) / 2] * 3])
    close(games.scores(v, worse, better), [[-math.sqrt(3) / 2] * 3])
    close(games.scores(torch.tensor([[[2.0], [0.5], [1]]], dtype=F64), better, worse), [[1.5, -0.5, -1]])


def test_all_embeddings_alike_are_where_training_on_a_cycle_stops():
    v = torch.tensor([[0.3, 0.4]] * 3, dtype=F64).requires_grad_()
    loss, metrics = gpm.gpm_loss(v[[0, 1, 2]], v[[1, 2, 0]], tau=0.1)
    close(metrics["prob"], 0.5)
    close(torch.autograd.grad(loss, v)[0], torch.zeros(3, 2).tolist())


def test_what_embeddings_can_fit(games):
    ring, all_pairs = games.PAIRS.values()
    right, probability = games.fit_embeddings(ring, 1, 6)
    assert right.max() <= 2 / 3 + 1e-12
    close(probability, torch.full((6, 3), 0.5), atol=0.05)
    right, _ = games.fit_embeddings(ring, 2, 6)
    assert (right == 1).sum() >= 3
    right, probability = games.fit_embeddings(ring, 4, 6)
    assert (right == 1).all() and probability.min() > 0.99
    assert games.fit_embeddings(all_pairs, 1, 6)[0].max() <= 5 / 6 + 1e-12
    assert games.fit_embeddings(all_pairs, 2, 6)[0].max() <= 5 / 6 + 1e-12
    assert (games.fit_embeddings(all_pairs, 4, 6)[0] == 1).all()


# ----------------------------------------------------------------------------------------------------------- the command


def test_main_writes_its_picture_and_numbers(games, tmp_path, capsys, threads, monkeypatch):
    monkeypatch.setattr(games, "FIT_STEPS", 100)
    threads(2)
    out, numbers = tmp_path / "a.png", tmp_path / "a.json"
    assert games.main(["cycle", "--seeds", "2", "--markdown", "--out", str(out), "--json", str(numbers)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| the cycle | GPM, d = 4 | 1.000 | 1.000 | 2 of 2 |" in printed
    assert len(json.loads(numbers.read_text())["Bradley-Terry, the cycle"]["right"]) == 2
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poker"], "invalid choice: 'poker'"),
        (["cycle", "--seeds", "1"], "--seeds: 1 is less than 2"),
        (["cycle", "--out", "no/such/folder/a.png"], "--out: there is no directory no/such/folder"),
        (["cycle", "--json", "no/such/folder/a.json"], "--json: there is no directory no/such/folder"),
    ],
)
def test_main_refuses(games, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        games.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the page

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def same_cell(stated: str, found: str) -> bool:
    """The same text, and numbers that another processor's rounding explains: runs that cycle magnify it."""
    if NUMBER.sub("#", stated) != NUMBER.sub("#", found):
        return False
    for a, b in zip(NUMBER.findall(stated), NUMBER.findall(found), strict=True):
        x, y = float(a), float(b)
        if "e" in a:
            good = max(x, y) < 1e-12 or abs(x - y) <= 0.5 * max(x, y)
        else:
            good = abs(x - y) <= max(0.05 * abs(x), 0.02 if "." in a else 0)
        if not good:
            return False
    return True


def test_cells_that_are_the_same():
    assert same_cell("0.501 (0.4 to never)", "0.499 (0.4 to never)") and same_cell("7e-32", "0e+00") and same_cell("230", "240")
    assert not same_cell("0.50", "0.55") and not same_cell("1.5 (1 to 2)", "1.5") and not same_cell("3", "4")
    assert not same_cell("3e-06", "1e-06") and not same_cell("yes", "-")


def stated_tables(name: str) -> list[str]:
    block = re.search(rf"<!-- games: {name} -->\n(.*?)\n<!-- games: end -->", PAGE.read_text(), re.DOTALL)
    assert block
    return re.split(r"\n\n(?=[A-Z])", block[1].strip())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extragradient", "momentum", "selfplay", "cycle"])
def test_the_page_states_what_the_run_shows(games, name):
    result = games.EXPERIMENTS[name]()
    stated = stated_tables(name)
    assert len(stated) == len(result.tables)
    for text, table in zip(stated, result.tables, strict=True):
        title, *lines = [line for line in text.splitlines() if line]
        assert title == table.title + ":"
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert cells[0] == list(table.columns)
        for row, found in zip(cells[2:], table.rows, strict=True):
            for column, a, b in zip(table.columns, row, found, strict=True):
                assert same_cell(a, b), f"{table.title}: {row[:3]}, {column}: the page has {a}, the run {b}"
    CLAIMS[name](result.numbers)


def extragradient_claims(numbers) -> None:
    runs = {(r["game"], r["beta"], r["method"]): r for r in numbers["runs"]}
    for (game, beta, method), run in runs.items():
        ours = runs[game, beta, "EGPO"]["evaluations"]
        assert all(1e-3 < rate < 1 for rate in run["rate"])  # the best step sizes are inside the grid
        if method == "EGPO":
            assert all(slope < 0 for slope in run["slope"])
            continue
        factors = [b / a for a, b in zip(ours, run["evaluations"], strict=True)]
        assert min(factors) > 1.4
        if beta == 0.01:
            low, high = {"mirror descent": (14.5, 48), "Nash-MD": (12, 40)}[method]
            assert low < min(factors) and max(factors) < high
            rates = zip(runs[game, beta, "EGPO"]["rate"], run["rate"], strict=True)
            assert all(5 < a / b < 40 for a, b in rates)
        elif method == "mirror descent":
            assert max(factors) < 3
        if method == "Nash-MD":
            assert all(math.isnan(slope) for slope in run["slope"]) and min(run["end"]) > 1e-8
        if beta == 0.01:
            assert min(run["end_at_the_rate_of_egpo"]) > 0.1


def momentum_claims(numbers) -> None:
    exact, sampled = numbers["exact"], numbers["sampled"]
    for alpha in (0.3, 0.6, 0.9):
        run, control = exact[f"alpha {alpha:g}"], exact[f"alpha 0, beta x {1 - alpha:.1f}"]
        assert run["ahead"] and all(slope == pytest.approx(1 / (1 - alpha), rel=0.02) for slope in run["slopes"])
        for ours, theirs in zip(run["curves"], control["curves"], strict=True):
            assert all(b < a for a, b in zip(ours[1:], theirs[1:], strict=True))
        few, many = sampled[f"50, alpha {alpha:g}"], sampled[f"500, alpha {alpha:g}"]
        assert few["above"] > 0  # no gain, and within two standard errors no loss that is certain
        assert few["above"] < 2 * few["error"]
        assert many["above"] < -2 * many["error"]
        for t in (2, 5):
            assert few["mean"][t] < sampled["50, alpha 0"]["mean"][t]
            assert sampled[f"500, alpha 0, beta x {1 - alpha:.1f}"]["mean"][t] < many["mean"][t]
    ends = [sampled[f"500, alpha {alpha:g}"]["mean"][15] for alpha in (0, 0.3, 0.6, 0.9)]
    assert ends == sorted(ends, reverse=True)


def selfplay_claims(numbers) -> None:
    play = numbers["play"]
    for method in ("SPPO", "DNO"):
        for eta in ("0.5", "2"):
            run = play[f"{method}, {eta}"]
            assert run["average"][200] < 0.025 and min(run["previous"]) >= 0.5 and min(run["start"]) < 0.49
        assert play[f"{method}, 0.5"]["average"][200] < run["average"][0] / 8
        assert max(play[f"{method}, 0.5"]["last"][100:]) > play[f"{method}, 0.5"]["last"][0]
    for eta in ("0.5", "2"):
        assert play[f"DPO, pairs of the start, {eta}"]["average"][200] > 0.18
        assert play[f"DPO, pairs on-policy, {eta}"]["average"][200] < 0.04
    for one in numbers["dno"]:
        assert min(one["slack"]) > 0 and min(one["previous"]) >= 0.5
        assert one["average"][-1] < one["average"][1]
    assert [one["start"][-1] < 0.5 for one in numbers["dno"]] == [True, True, False, False, False, False]
    assert [one["start"][5] > one["start"][1] for one in numbers["dno"]].count(False) >= 1
    fallen = {name: sum(x < 0 for x in moved["chosen"]) for name, moved in numbers["displaced"].items()}
    assert fallen["SPPO, unrelated"] == 0 and fallen["SPPO, alike"] <= 2
    assert fallen["DPO, unrelated"] >= 10 and fallen["DPO, alike"] >= 100


def cycle_claims(numbers) -> None:
    for what, best in (("the cycle", 2 / 3), ("cycle and the item above it", 5 / 6)):
        assert max(numbers[f"Bradley-Terry, {what}"]["right"]) == pytest.approx(best)
        assert min(numbers[f"GPM, d = 4, {what}"]["right"]) == 1
    stuck = [p for p in numbers["GPM, d = 2, the cycle"]["probability"] if min(p) < 0.9]
    assert len(stuck) == 3
    close(stuck, [[0.5] * 3] * 3, atol=1e-6)
    assert max(numbers["GPM, d = 2, cycle and the item above it"]["right"]) == pytest.approx(5 / 6)


CLAIMS = {
    "extragradient": extragradient_claims,
    "momentum": momentum_claims,
    "selfplay": selfplay_claims,
    "cycle": cycle_claims,
}
