"""The example of ZO-RankSGD: its parts by value, what each run shows, and the tables of docs/experiments_search.md."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers.zo_ranksgd import rank_gradient, ranking_oracle

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "experiments_search.md"
F64 = torch.float64


@pytest.fixture(scope="module")
def zo(load_example):
    return load_example("zo_alignment")


# ---- cosines


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_directions_are_those_of_the_library(zo, variant):
    xi, slope = torch.randn(4, 10, 20, dtype=F64), torch.randn(20, dtype=F64)
    values = xi @ slope
    for k in (1, 3, 10):
        found = zo.directions(xi, values, k, variant)
        for d, x, v in zip(found, xi, values, strict=True):
            assert_close(d, -rank_gradient(x, ranking_oracle(v, k), variant=variant))
    pair = zo.of_pairs(xi, values, "paper")
    winners = torch.where((values[:, 0::2] < values[:, 1::2]).unsqueeze(-1), xi[:, 0::2], xi[:, 1::2])
    losers = xi[:, 0::2] + xi[:, 1::2] - winners
    assert_close(pair, (winners - losers).mean(1))


def test_the_cosines(zo):
    """Known for 3000 draws of other probes, each with an error of 0.002."""
    numbers = zo.cosine().numbers
    paper = {"(10, 10)": 0.543, "(10, 3)": 0.469, "5 pairs": 0.384, "(10, 1)": 0.356}
    for name, expected in paper.items():
        assert numbers["paper"][name]["mean"] == pytest.approx(expected, abs=0.012)
        assert numbers["paper"][name]["error"] < 0.004
    assert numbers["code"]["(10, 10)"]["mean"] == pytest.approx(0.538, abs=0.012)
    assert numbers["code"]["(10, 3)"]["mean"] == pytest.approx(0.468, abs=0.012)
    lost = numbers["paper"]["(10, 10)"]["mean"] - numbers["code"]["(10, 10)"]["mean"]
    assert 0.002 < lost < 0.01  # the off-by-one costs about one percent
    assert numbers["paper"]["(10, 1)"]["mean"] < numbers["paper"]["5 pairs"]["mean"]
    assert numbers["paper"]["(10, 9)"]["mean"] == pytest.approx(numbers["paper"]["(10, 10)"]["mean"], abs=1e-12)
    rising = [numbers["paper"][f"(10, {k})"]["mean"] for k in range(1, 9)]
    assert rising == sorted(rising)


# ---- f against evaluations


def test_functions(zo):
    assert zo.quadratic(torch.zeros(20, dtype=F64)) == 0 and zo.rosenbrock(torch.ones(3, 20, dtype=F64)).tolist() == [0, 0, 0]
    x = torch.randn(20, dtype=F64)
    banana = sum(100 * (b - a**2) ** 2 + (1 - a) ** 2 for a, b in zip(x[:-1].tolist(), x[1:].tolist(), strict=True))
    assert zo.rosenbrock(x).item() == pytest.approx(banana / 100)


@pytest.mark.parametrize("name", ["(10, 10)", "(10, 1)", "5 pairs", "values, two points"])
def test_every_estimate_descends(zo, name):
    curve = zo.descend(zo.quadratic, 1.0, name, 1.0, 0, 25)
    assert len(curve) == 26 and curve[-1] < 0.6 * curve[0]
    assert zo.descend(zo.quadratic, 1.0, name, 1.0, 0, 25) == curve


def test_transforms_change_nothing(zo):
    assert zo.changed_by_transforms(15) == 0


# ---- the generator


def test_the_judge(zo):
    assert zo.likeness(zo.spot()) == pytest.approx(1) and zo.likeness(1 - zo.spot()) == pytest.approx(-1)
    painter = zo.Painter(0)
    assert sum(p.numel() for p in painter.parameters()) == 337
    picture = painter().detach()
    assert picture.shape == (16, 16) and picture.min() > 0 and picture.max() < 1
    assert torch.equal(picture, zo.Painter(0)().detach()) and not torch.equal(picture, zo.Painter(1)().detach())
    pictures = [picture, zo.spot(), 0.5 * zo.spot() + 0.5 * picture]
    assert zo.Judge().rank(pictures, 2) == [1, 2]
    careless = zo.Judge(slips=10.0)
    assert len({tuple(careless.rank(pictures, 3)) for _ in range(20)}) > 2


def test_a_painter_learns_from_rankings(zo):
    run = zo.aligned(10, seed=0, rounds=40)
    assert run.looks == 40 * 17 and len(run.curve) == 41 and len(run.pictures) == 3
    assert run.curve[-1] > run.curve[0] + 0.2
    assert all(b >= a for a, b in zip(run.curve, run.curve[1:], strict=False))  # a careful judge keeps the incumbent
    assert zo.likeness(run.pictures[-1]) == pytest.approx(run.curve[-1])
    plain = zo.aligned(3, seed=0, rounds=40, pooled=False)
    assert plain.looks == run.looks and plain.curve[-1] > plain.curve[0]


# ---- the command


@pytest.mark.parametrize("name", ["cosine", "race", "align"])
def test_main_writes_its_picture_and_numbers(zo, tmp_path, capsys, threads, name):
    threads(2)
    out, numbers = tmp_path / "a.png", tmp_path / "a.json"
    assert zo.main([name, "--quick", "--markdown", "--out", str(out), "--json", str(numbers)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "| (10, 10) |" in capsys.readouterr().out and json.loads(numbers.read_text())
    assert torch.get_num_threads() == 2


def test_main_draws_a_table(zo, tmp_path, capsys):
    assert zo.main(["cosine", "--quick", "--out", str(tmp_path / "a.png")]) == 0
    assert "5 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poker"], "invalid choice: 'poker'"),
        (["cosine", "--out", "no/such/folder/a.png"], "--out: there is no directory no/such/folder"),
        (["align", "--json", "no/such/folder/a.json"], "--json: there is no directory no/such/folder"),
    ],
)
def test_main_refuses(zo, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        zo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---- the page

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def same_cell(stated: str, found: str) -> bool:
    """The same text, and numbers that another processor's rounding explains: a comparison that turns changes what follows."""
    if NUMBER.sub("#", stated) != NUMBER.sub("#", found):
        return False
    for a, b in zip(NUMBER.findall(stated), NUMBER.findall(found), strict=True):
        x, y = float(a), float(b)
        good = abs(math.log(max(x, 1e-300) / max(y, 1e-300))) < 1.5 if "e" in a else abs(x - y) <= max(0.1 * abs(x), 0.03)
        if not good:
            return False
    return True


def test_cells_that_are_the_same():
    assert same_cell("3.1e-03 (2e-03 to 5e-03)", "4.0e-03 (2e-03 to 4e-03)") and same_cell("0.543", "0.541")
    assert not same_cell("0.543", "0.44") and not same_cell("3e-05", "3e-06") and not same_cell("-", "90%")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine", "race", "align"])
def test_the_page_states_what_the_run_shows(zo, name):
    block = re.search(rf"<!-- zo: {name} -->\n(.*?)\n<!-- zo: end -->", PAGE.read_text(), re.DOTALL)
    assert block
    result = zo.EXPERIMENTS[name]()
    (table,) = result.tables
    title, *lines = [line for line in block[1].splitlines() if line]
    assert title == table.title + ":"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(table.columns)
    for row, found in zip(cells[2:], table.rows, strict=True):
        for column, a, b in zip(table.columns, row, found, strict=True):
            assert same_cell(a, b), f"{table.title}: {row[:2]}, {column}: the page has {a}, the run {b}"
    CLAIMS[name](result.numbers)


def cosine_claims(numbers) -> None:
    assert numbers["paper"]["(10, 10)"]["mean"] > numbers["paper"]["5 pairs"]["mean"] + 0.1


def race_claims(numbers) -> None:
    assert numbers["changed by a transform"] == 0
    middle = {name: sorted(run["ends"])[1] for name, run in numbers.items() if name.startswith("quadratic")}
    order = ["values, two points", "(10, 10)", "(10, 3)", "(10, 1)"]
    assert sorted(order, key=lambda name: middle[f"quadratic, {name}"]) == order
    for run in numbers.values():
        assert run == 0 or max(run["ends"]) < run["start"] / 20


def align_claims(numbers) -> None:
    for run in numbers.values():
        assert all(curve[-1] > curve[0] + 0.2 for curve in run["curves"])


CLAIMS = {"cosine": cosine_claims, "race": race_claims, "align": align_claims}
