"""examples/dpo_tiny.py: its parts by value, every loss for a few steps, and what a whole run promises."""

import json
import math
import random

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "held_out": 32, "sft_steps": 20, "pairs": 32, "steps": 20, "batch": 16, "lr": 3e-3}
LOSSES = ("dpo", "simpo", "ipo", "kto", "sppo:eta=10.0", "f_dpo:beta=1.0", "orpo")


@pytest.fixture(scope="module")
def demo(load_example):
    return load_example("dpo_tiny")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # as in the example


@pytest.fixture
def model(demo):
    return demo.build_model(demo.Settings(hidden_size=32))


def test_pairs(demo):
    pairs = demo.make_pairs(300, random.Random(0))
    assert len({pair.string for pair in pairs}) == 300
    for pair in pairs:
        assert pair.chosen == "".join(reversed(pair.string))
        assert demo.SHORTEST <= len(pair.string) <= demo.LONGEST
        assert pair.rejected != pair.chosen
    rejected = {mistake: sum(pair.rejected == mistake(pair.string) for pair in pairs) for mistake in demo.MISTAKES}
    assert min(rejected.values()) > 60
    assert [mistake("dacb") for mistake in demo.MISTAKES] == ["dacb", "bca", "bcadd"]
    held_out = frozenset(pair.string for pair in pairs)
    assert held_out.isdisjoint(pair.string for pair in demo.make_pairs(300, random.Random(0), held_out))


def test_encode(demo):
    tokens, targets = demo.encode(["abc", "dacb"], ["cba", "bca"])
    assert ["".join(demo.VOCABULARY[i] for i in row) for row in tokens] == ["abc>cba. ", "dacb>bca."]
    of_answers = [[(t, demo.VOCABULARY[i]) for t, i in enumerate(row) if i != demo.IGNORE] for row in targets.tolist()]
    assert of_answers == [[(3, "c"), (4, "b"), (5, "a"), (6, ".")], [(4, "b"), (5, "c"), (6, "a"), (7, ".")]]


def test_encoded_pairs_are_chosen_then_rejected(demo):
    encoded = demo.Encoded([demo.Pair("abc", "abc"), demo.Pair("dacb", "bca")])
    texts = ["".join(demo.VOCABULARY[i] for i in row).strip() for row in encoded.tokens[encoded.rows(torch.tensor([1, 0]))]]
    assert texts == ["dacb>bcad.", "abc>cba.", "dacb>bca.", "abc>abc."]


def test_log_probs_are_those_of_the_logits(demo, model):
    tokens, targets = demo.encode(["abc", "dacb"], ["cba", "bcadd"])
    logp = demo.answer_logp(model, tokens, targets)
    with torch.no_grad():
        expected = torch.log_softmax(model(tokens).logits, -1)
    counts = targets != demo.IGNORE
    expected = expected.gather(-1, targets.where(counts, 0).unsqueeze(-1)).squeeze(-1).where(counts, 0.0)
    assert expected.min() < -1
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)


def test_greedy_answers(demo, model):
    prompts = ["abc", "dacb", "hhga"]
    with torch.no_grad():
        model.lm_head.weight *= 5
    for prompt, answer in zip(prompts, demo.greedy_answers(model, prompts), strict=True):
        text = prompt + demo.ASK
        while len(text) < len(prompt) + 1 + demo.LONGEST + 2:
            tokens = torch.tensor([[demo.VOCABULARY.index(c) for c in text]])
            with torch.no_grad():
                text += demo.VOCABULARY[model(tokens).logits[0, -1].argmax()]
        assert answer == text[len(prompt) + 1 :].split(demo.END)[0]


def test_evaluation(demo, monkeypatch, model):
    held_out = demo.Encoded(demo.make_pairs(4, random.Random(0)))
    logp = -torch.ones(held_out.tokens.shape)
    logp[0] = -0.1
    monkeypatch.setattr(demo, "answer_logp", lambda *_: logp.where(held_out.targets != demo.IGNORE, 0.0))
    monkeypatch.setattr(demo, "greedy_answers", lambda *_: [held_out.pairs[0].chosen, "", "a", "b"])
    found = demo.evaluate(model, held_out)
    chosen = [0.1 * (len(held_out.pairs[0].chosen) + 1), *(len(p.chosen) + 1 for p in held_out.pairs[1:])]
    rejected = [len(p.rejected) + 1 for p in held_out.pairs]
    assert found["chosen logp"] == pytest.approx(-sum(chosen) / 4)
    assert found["margin"] == pytest.approx((sum(rejected) - sum(chosen)) / 4)
    assert found["accuracy"] == sum(c < r for c, r in zip(chosen, rejected, strict=True)) / 4
    assert found["per-token accuracy"] == 0.25
    assert found["right answers"] == 0.25


def run(demo, *names, **settings):
    return demo.run(names, demo.Settings(**{**TINY, **settings}), 0, Console(quiet=True))


def test_every_loss_widens_the_margin(demo):
    records = run(demo, *LOSSES)
    assert [record.loss for record in records] == list(LOSSES)
    for record in records:
        assert record.held_out[0] == records[0].held_out[0]  # the same model to begin with
        assert len(record.losses) == TINY["steps"]
        assert record.step == [0, 10, 20]
        assert all(map(math.isfinite, record.losses))
        assert record.held_out[-1]["margin"] > record.held_out[0]["margin"] + 0.15, record.loss
    assert records[0].held_out[-1] != records[1].held_out[-1]


def test_the_reference_is_the_model_before_the_first_step(demo):
    """So the first loss of DPO is that of a coin."""
    (record,) = run(demo, "dpo", steps=3)
    assert record.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert record.losses[-1] < math.log(2)


def test_options_reach_the_loss(demo):
    first, second = run(demo, "simpo", "simpo:gamma=0.5,beta=2.0", steps=2)  # its default ratio is 0.25
    assert first.losses == second.losses
    (other,) = run(demo, "simpo:gamma=1.5", steps=2)
    assert other.losses[0] != first.losses[0]


# ---------------------------------------------------------------------------------------------------------- the command


def test_main_writes_its_curves_and_repeats_itself(demo, tmp_path, capsys, monkeypatch, threads):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "QUICK", demo.Settings(**TINY))
    threads(2)
    documents = []
    for name in ("first", "second"):
        out, numbers = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        arguments = ["--quick", "--loss", "dpo", "--loss", "simpo:beta=2.5", "--steps", "3", "--seed", "5"]
        assert demo.main([*arguments, "--out", str(out), "--json", str(numbers)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        printed = capsys.readouterr().out
        assert "Held-out pairs, before and after (seed 5)" in printed
        documents.append(json.loads(numbers.read_text()))
    assert torch.get_num_threads() == 2
    for document in documents:
        assert [record.pop("seconds") > 0 for record in document["runs"]] == [True, True]
        assert document["settings"]["steps"] == 3
    assert documents[0] == documents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/a.png"], "--out: there is no directory no/such/folder"),
        (["--json", "no/such/folder/a.json"], "--json: there is no directory no/such/folder"),
        (["--steps", "-1"], "--steps: -1 is less than 0"),
        (["--threads", "0"], "--threads: 0 is less than 1"),
        (["--loss", "sipmo"], "did you mean 'simpo'?"),
        (["--loss", "dpo:gamma=1"], "recipe 'dpo' has no option 'gamma'"),
        (["--loss", "grpo"], "--loss: "),
    ],
)
def test_main_refuses_before_it_trains(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_loss_that_needs_more_than_this_task_has(demo, monkeypatch):
    class Needy(demo.PairRecipe):
        name, needs = "needy", ("ref_logp", "scores")

        def pair_loss(self, pairs):
            raise AssertionError(pairs)

    monkeypatch.setattr(demo, "load_pair_recipe", lambda text: Needy())
    with pytest.raises(ValueError, match="recipe 'needy' needs scores, which this task does not have"):
        demo.recipe_from("needy")


@pytest.mark.slow
def test_every_loss_learns(demo, tmp_path):
    numbers = tmp_path / "numbers.json"
    options = [option for name in LOSSES for option in ("--loss", name)]
    assert demo.main([*options, "--json", str(numbers)]) == 0
    for record in json.loads(numbers.read_text())["runs"]:
        before, after = record["held_out"][0], record["held_out"][-1]
        assert before["margin"] < 1
        assert after["margin"] > before["margin"] + 1.5, record["loss"]
        assert after["accuracy"] > 0.9, record["loss"]
        assert after["right answers"] > before["right answers"] + 0.15, record["loss"]
