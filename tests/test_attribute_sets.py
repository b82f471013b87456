"""The example on sets of attributes: its parts by value, what the runs show, and the tables of the page on experiments."""

import json
import re

import pytest
import torch

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example(load_example):
    return load_example("attribute_sets")


@pytest.fixture(scope="module")
def texts(example):
    topics = torch.where(torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.5, 0.15, 0.85)
    return example.draw_texts(400, topics, torch.Generator().manual_seed(1))


def test_lists_are_true_of_their_texts(example, texts):
    lists = example.attributes_of(texts, 4, torch.Generator().manual_seed(0))
    assert example.satisfied(lists, texts).all()
    assert set(lists.valid.sum(1).tolist()) == {1, 2, 3, 4}
    assert all(len(set(bits.tolist())) == 10 for bits in lists.bits)


def test_an_attribute_is_far_from_its_opposite(example, texts):
    correlation = example.correlation_vectors(texts)
    near = example.ultragen.nearest_candidates(correlation, torch.arange(24), example.CANDIDATES)
    opposite = torch.arange(24) ^ 1
    assert not (near == opposite[:, None]).any()
    torch.testing.assert_close(correlation, -correlation[opposite])
    covariance = torch.cov(texts.double().T, correction=0)
    torch.testing.assert_close(correlation[1::2, 1::2], covariance / covariance.norm(dim=1, keepdim=True) / 2**0.5)


def test_sets_do_not_contradict_themselves_and_are_equally_long(example, texts):
    sets = {m: example.chosen_sets(m, texts, 80, torch.Generator().manual_seed(5)) for m in example.METHODS}
    for prompts in sets.values():
        assert prompts.bits.shape == prompts.values.shape == prompts.valid.shape == (80, 10)
        for bits, valid in zip(prompts.bits, prompts.valid, strict=True):
            kept = bits[valid]
            assert len(kept) >= 2 and len(kept.unique()) == len(kept)
            assert not valid.int().diff().gt(0).any()  # from the first place on
    lengths = {m: prompts.valid.sum(1).double().mean().item() for m, prompts in sets.items()}
    assert lengths["random"] == pytest.approx(lengths["code"], abs=1)


def test_a_policy_is_autoregressive(example):
    """Its log-probs are of a distribution over all texts, and samples follow it: chi square of 16 texts of four bits."""
    policy = example.Policy()
    with torch.no_grad():
        policy.bias[:4] = torch.tensor([0.3, -0.5, 0.0, 0.2])
        policy.bias[4:] = -30  # the other bits are off
        policy.before[:4] = torch.tensor([0.0, 0.8, -0.4, 0.5])
        policy.gain[1, 2] = 1.5
    prompt = example.Prompts(torch.tensor([[0, 2, *range(3, 11)]]), torch.ones(1, 10).long(), torch.arange(10)[None] < 2)
    every = torch.tensor([[bool(k >> t & 1) for t in range(12)] for k in range(16)])
    p = policy.logp(example.repeat(prompt, 16), every).detach().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    sampled = policy.sample(example.repeat(prompt, 4000), torch.Generator().manual_seed(0))
    index = (sampled[:, :4] * 2 ** torch.arange(4)).sum(1)
    expected = 4000 * p / p.sum()
    assert float(((index.bincount(minlength=16) - expected).square() / expected).sum()) < 37.7  # 0.1 %, 15 degrees


def claims(numbers) -> None:
    """What the text on the page says."""
    runs = numbers["runs"]
    for run in runs:
        late = {name: sum(rates["place"][2:]) / 3 for name, rates in run.items()}
        assert late["before"] < 0.65 and run["before"]["place"][0] > 0.85
        for method in ("random", "code", "farthest"):
            assert late[method] > late["before"] + 0.08
            assert run[method]["length"][9] > run["before"]["length"][9] + 0.05
    ends = {name: sum(run[name]["length"][9] for run in runs) / len(runs) for name in runs[0]}
    assert ends["code"] < ends["random"] + 0.02 and abs(ends["farthest"] - ends["code"]) < 0.03


@pytest.mark.slow
def test_a_quick_run(example, tmp_path, capsys):
    out, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    assert example.main(["--quick", "--out", str(out), "--json", str(numbers), "--markdown"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert found["seeds"] == len(found["runs"]) == 2
    claims(found)
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:before|random|code|farthest) \|", said, re.MULTILINE)) == 8


def test_a_wrong_place_for_the_picture(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--out", "/nowhere/at/all.png"])
    assert "there is no directory" in capsys.readouterr().err


@pytest.mark.slow
def test_the_full_run(example, tmp_path):
    numbers = tmp_path / "numbers.json"
    assert example.main(["--out", str(tmp_path / "picture.png"), "--json", str(numbers)]) == 0
    claims(json.loads(numbers.read_text()))
