"""examples/diffusion_tiny.py: its parts by value, every loss for a few steps, and what a whole run promises."""

import json
import math

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

TINY = {
    "width": 16, "layers": 1, "heads": 2, "patch": 4, "train_steps": 60, "train_batch": 16, "pairs": 32, "steps": 8,
    "batch": 16, "eval_every": 4, "held_out": 32, "samples": 8, "sample_steps": 4, "lr": 2e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(load_example):
    return load_example("diffusion_tiny")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# ---- pictures


def test_pictures_are_of_their_class(demo, generator):
    kind = demo.kinds(400)
    pictures = demo.make_pictures(kind, generator)
    assert pictures.shape == (400, 3, 16, 16) and pictures.min() == -1 and pictures.max() <= 1
    assert kind.bincount().tolist() == [100] * 4
    assert (demo.recognise(pictures) == kind).double().mean() > 0.97
    noise = torch.randn(400, 3, 16, 16, generator=generator)
    assert (demo.recognise(noise) == kind).double().mean() < 0.4


def test_coverage(demo):
    """Areas are those of the shapes, and outlines lie at the radius."""
    middle = torch.full((4, 2), 7.5, dtype=torch.float64)
    found = demo.coverage(torch.arange(4), middle, torch.full((4,), 5.0, dtype=torch.float64))
    assert_close(found.sum((1, 2)), 25 * torch.tensor([math.pi, 4, 2, 20 / 9], dtype=torch.float64), rtol=0.16, atol=0)
    assert found[1].tolist() == [[float(3 <= x <= 12 and 3 <= y <= 12) for x in range(16)] for y in range(16)]
    assert found[3, 3, 3] == 0 and found[3, 3, 7] == 1  # between the arms of the cross, and on one


def test_scores(demo):
    red = torch.full((1, 3, 16, 16), -1.0)
    red[:, 0, 4:8, 4:12] = 0.5
    assert_close(demo.warmth(torch.cat([red, red.flip(1), red.roll(1, 1)])), torch.tensor([1.0, -1, 0]))
    assert_close(demo.brightness(red), torch.tensor([0.75]))
    assert_close(demo.area(red), torch.tensor([32 / 256]))


@pytest.mark.parametrize("prefer", ["warm", "bright", "large"])
def test_winners_have_the_higher_score(demo, generator, prefer):
    pairs = demo.make_pairs(40, prefer, generator)
    score = demo.PREFERENCES[prefer]
    assert torch.equal(pairs.scores, torch.stack([score(pairs.winners), score(pairs.losers)]))
    assert (pairs.scores[0] >= pairs.scores[1]).all() and (pairs.scores[0] - pairs.scores[1]).mean() > 0.02
    pictures, kind = pairs.rows(torch.tensor([5, 2])).both()
    assert torch.equal(pictures, torch.stack([pairs.winners[5], pairs.winners[2], pairs.losers[5], pairs.losers[2]]))
    assert kind.tolist() == [1, 2, 1, 2]


# ---- noise and model


def test_levels_of_noise(demo, generator):
    assert_close(
        demo.ABAR[[0, 199, 279, 599]], torch.tensor([0.99915, 0.755238361158, 0.625729392010, 0.161752515005]).double()
    )
    t = demo.levels(50, generator)
    assert sorted((t // 20).tolist()) == list(range(50))
    pictures, noise = torch.ones(1, 3, 16, 16), torch.full((1, 3, 16, 16), 2.0)
    x = demo.add_noise(pictures, noise, torch.tensor([599]))
    assert_close(x, torch.full_like(x, 0.161752515005**0.5 + 2 * (1 - 0.161752515005) ** 0.5))


def test_sampling_with_the_right_noise_ends_at_the_picture(demo, generator):
    pictures = demo.make_pictures(demo.kinds(4), generator)

    def eps(x, t):
        signal, level = demo.mix(t)
        return (x - signal * pictures) / level

    noise = torch.randn(4, 3, 16, 16, generator=generator)
    assert_close(demo.sample(eps, noise, 5), pictures, rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch", [2, 4])
def test_the_model_begins_with_a_share_of_what_it_sees(demo, generator, patch):
    model = demo.DiT(demo.Settings(**{**TINY, "patch": patch}))
    x, t, kind = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([3, 700]), torch.tensor([0, 1])
    assert_close(model(x, t, kind), demo.mix(t)[1] * x)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    first = model(x, t, kind)
    assert first.shape == x.shape
    assert_close(model(x.flip(0), t.flip(0), kind.flip(0)).flip(0), first)
    assert not torch.allclose(model(x, t, kind.flip(0)), first) and not torch.allclose(model(x, t.flip(0), kind), first)
    moved = x.clone()
    moved[:, :, 0, 0] += 1  # is seen everywhere
    assert ((model(moved, t, kind) - first).abs().amax((0, 1)) > 0).all()


# ---- training


def run(demo, *names, prefer="warm", **settings):
    return demo.run(names, prefer, demo.Settings(**{**TINY, **settings}), 0, Console(quiet=True))


def test_every_loss_starts_at_a_coin_and_moves_its_own_way(demo):
    result = run(demo, *demo.LOSSES)
    early, late = sum(result.train_losses[:10]) / 10, demo.mean_of_last(result.train_losses)
    assert early > 0.5 and late < 0.7 * early
    assert [record.loss for record in result.records] == list(demo.LOSSES) == list(result.pictures)[1:]
    for record in result.records:
        assert record.step == [0, 4, 8] and len(record.losses) == 8
        assert record.losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the model is its reference
        assert record.held_out[0] == {"margin": 0, "accuracy": 0, "winner error": 0, "loser error": 0}
        assert all(map(math.isfinite, record.losses))
        way = -1 if record.loss == "npo" else 1
        assert way * record.held_out[-1]["margin"] > 0, record.loss
    assert result.records[0].losses[1:] != result.records[1].losses[1:]


def test_the_reference_stays_as_it_is(demo, generator):
    settings = demo.Settings(**TINY)
    torch.manual_seed(0)
    reference, _ = demo.learn_to_draw(settings, generator)
    before = [p.clone() for p in reference.requires_grad_(False).parameters()]
    pairs = demo.make_pairs(32, "warm", generator)
    held_out = demo.HeldOut(pairs, reference, generator)
    model = demo.copy.deepcopy(reference).requires_grad_(True)
    demo.learn_from_pairs("smpo", model, reference, pairs, held_out, settings, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_margins_of_held_out_pairs(demo, generator):
    """By hand, of a model that finds all of the winners' noise and nothing of the losers'."""
    pairs = demo.make_pairs(8, "warm", generator)
    zero = lambda x, t, kind: torch.zeros_like(x)  # noqa: E731
    held_out = demo.HeldOut(pairs, zero, generator)
    half = held_out.noise.clone()
    half[8:] = 0
    found = held_out.evaluate(lambda x, t, kind: half, 10.0)
    assert found["margin"] == pytest.approx(5 * held_out.noise[:8].square().mean().item(), rel=1e-5)
    assert (found["accuracy"], found["winner error"], found["loser error"]) == (1, -1, 0)
    assert torch.equal(held_out.t[:8], held_out.t[8:]) and torch.equal(held_out.noise[:8], held_out.noise[8:])


def test_comparison(demo, generator):
    cold = torch.full((4, 3, 16, 16), -1.0)
    cold[:, 2] = 1
    mixed = cold.flip(1).clone()
    mixed[3] = cold[3]
    found = demo.compare(cold, mixed, "warm")
    assert (found["before"], found["after"], found["change"], found["rose"]) == (-1, 0.5, 1.5, 0.75)
    assert found["error"] == pytest.approx(1 / 2)  # changes 2, 2, 2, 0


def test_samples_of_npo_lead_away_from_the_model(demo, generator):
    settings = demo.Settings(**{**TINY, "guidance": 3.0, "sample_steps": 1})
    towards = lambda value: lambda x, t, kind: (x - demo.mix(t)[0] * value) / demo.mix(t)[1]  # noqa: E731
    noise = torch.randn(4, 3, 16, 16, generator=generator)
    found = demo.draw_samples("npo", towards(0.1), towards(0.2), noise, settings)
    assert_close(found, torch.full_like(found, 0.4), rtol=0, atol=1e-3)  # 0.1 + 3 (0.2 - 0.1)
    found = demo.draw_samples("smpo", towards(0.1), towards(0.2), noise, settings)
    assert_close(found, torch.full_like(found, 0.1), rtol=0, atol=1e-3)


# ---- the command


def test_tiles(demo):
    pictures = torch.full((8, 3, 16, 16), -1.0)
    pictures[5] = 1  # the second of its class
    found = demo.tiled(pictures)
    assert found.shape == (64, 32, 3)
    assert found.sum() == found[16:32, 16:].sum() == 16 * 16 * 3


def test_main_writes_what_it_found_and_repeats_itself(demo, tmp_path, capsys, monkeypatch, threads):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "QUICK", demo.Settings(**TINY))
    threads(2)
    documents = []
    for name in ("first", "second"):
        out, numbers = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        arguments = ["--quick", "--loss", "npo", "--steps", "2", "--seed", "5", "--prefer", "large", "--beta", "700"]
        assert demo.main([*arguments, "--out", str(out), "--json", str(numbers)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        assert "Before and after, preferred: large (seed 5)" in capsys.readouterr().out
        documents.append(json.loads(numbers.read_text()))
    assert torch.get_num_threads() == 2
    for document in documents:
        assert [record.pop("seconds") > 0 for record in document["runs"]] == [True]
        assert document["settings"]["steps"] == 2 and document["settings"]["beta"] == 700
        assert len(document["train_losses"]) == TINY["train_steps"]
    assert documents[0] == documents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/a.png"], "--out: there is no directory no/such/folder"),
        (["--json", "no/such/folder/a.json"], "--json: there is no directory no/such/folder"),
        (["--steps", "-1"], "--steps: -1 is less than 0"),
        (["--threads", "0"], "--threads: 0 is less than 1"),
        (["--lr", "0"], "--lr: 0.0 is not finite and positive"),
        (["--beta", "nan"], "--beta: nan is not finite and positive"),
        (["--loss", "dpo"], "--loss: invalid choice: 'dpo'"),
        (["--prefer", "blue"], "--prefer: invalid choice: 'blue'"),
    ],
)
def test_main_refuses_before_it_trains(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_whole_run_moves_what_is_preferred_and_keeps_the_shapes(demo, tmp_path):
    numbers = tmp_path / "numbers.json"
    assert demo.main(["--json", str(numbers)]) == 0
    document = json.loads(numbers.read_text())
    losses = document["train_losses"]
    assert sum(losses[:10]) / 10 > 0.6 and demo.mean_of_last(losses) < 0.1
    (record,) = document["runs"]
    held_out, samples = record["held_out"][-1], record["samples"]
    assert held_out["margin"] > 2 and held_out["accuracy"] > 0.75
    assert 0 < held_out["winner error"] < held_out["loser error"]  # both get worse, losers more
    assert samples["change"] > 5 * samples["error"] and samples["change"] > 0.2 and samples["rose"] > 0.9
    assert samples["shapes before"] > 0.4 and samples["shapes after"] > samples["shapes before"] - 0.1
