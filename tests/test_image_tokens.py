"""examples/image_tokens.py: its parts by value, and a short run of both methods."""

import itertools
import json

import pytest
import torch
from torch.testing import assert_close


@pytest.fixture(scope="module")
def demo(load_example):
    return load_example("image_tokens")


@pytest.fixture
def policy(demo):
    return {name: 1.5 * t for name, t in demo.new_policies(2, 6).items()}


def test_prompts(demo):
    assert sorted(demo.SEEN.tolist() + demo.UNSEEN.tolist()) == list(range(16))
    held_out = demo.PROMPTS[demo.UNSEEN]
    assert len(held_out) == 4 and all(sorted(c.tolist()) == [0, 1, 2, 3] for c in held_out.unbind(1))


def test_the_rule(demo):
    right = demo.right_tokens()
    at = {tuple(p): tokens for p, tokens in zip(demo.PROMPTS.tolist(), right.tolist(), strict=True)}
    assert at[2, 1][:5] == [2, 5, 3, 6, 0]
    assert all(at[s, 0][:5:2] == at[s, 3][:5:2] and at[0, s][1:5:2] == at[3, s][1:5:2] for s in range(4))
    tokens = right[[3, 7]].clone()
    tokens[1, :3] = (tokens[1, :3] + 1) % 8
    assert_close(demo.total(demo.exact_reward(), torch.tensor([3, 7]), tokens), torch.tensor([1.0, 0.5]))


def test_log_probs_are_those_of_a_loop(demo, policy):
    prompts, tokens = torch.tensor([4, 15]), torch.tensor([[[1, 7, 0, 3, 3, 2], [5, 5, 6, 0, 1, 4]]]).repeat(2, 1, 1)
    found = demo.token_logps(policy, prompts, tokens).view(2, 2, 6)
    for r, b, t in itertools.product(range(2), range(2), range(6)):
        s, c = demo.PROMPTS[prompts[b]]
        before = demo.START if t == 0 else tokens[r, b, t - 1]
        h = (policy["shape"][r, s] + policy["colour"][r, c] + policy["place"][r, t] + policy["before"][r, before]).tanh()
        logits = policy["head"][r] @ h + policy["bias"][r]
        assert_close(found[r, b, t], logits.log_softmax(0)[tokens[r, b, t]])


def test_expected_rewards_are_what_samples_have(demo, policy):
    table = torch.randn(16, 6, 8)
    prompts = demo.SEEN[:3]
    many = prompts.repeat(20_000)
    tokens = demo.drawn(policy, many, torch.Generator().manual_seed(0))
    rewards = demo.total(table, many, tokens)
    error = rewards.std(1) / len(many) ** 0.5
    assert ((demo.expected(policy, table, prompts) - rewards.mean(1)).abs() < 4 * error).all() and error.max() < 0.02


def test_fitted_rewards(demo):
    """From many images with little ridge: by shape and colour all but the last place on every prompt, by prompt the seen."""
    rule = demo.exact_reward()
    prompts = demo.SEEN.repeat(200)
    tokens = torch.randint(8, (len(prompts), 6))
    rewards = demo.total(rule, prompts, tokens)
    new = demo.PROMPTS.shape[0]
    images, every = torch.randint(8, (50 * new, 6)), torch.arange(new).repeat(50)
    own = demo.fitted_reward(tokens, prompts, rewards, 1e-3, per_prompt=True)
    error = (demo.total(own, every, images) - demo.total(rule, every, images)).abs()
    assert error[torch.isin(every, demo.SEEN)].max() < 0.01 < error[torch.isin(every, demo.UNSEEN)].mean()
    shared = demo.fitted_reward(tokens, prompts, rewards, 1e-3, per_prompt=False)
    shared[:, -1] = rule[:, -1] = 0
    truth, found = (demo.total(t, every, images) for t in (rule, shared))
    assert torch.corrcoef(torch.stack([truth, found]))[0, 1] > 0.95


def test_both_methods_learn_the_seen_prompts(demo):
    base, rule = demo.taught(demo.Settings(teacher_steps=60), 2), demo.exact_reward()
    start = demo.expected(base, rule, demo.SEEN)
    assert (start < 0.45).all() and (start > 0.2).all()
    kept = {name: t.clone() for name, t in base.items()}
    for method, learn in demo.METHODS.items():
        for iterations in (1, 3):
            end = learn(base, rule, 4, iterations, 0.03, 12, 0)
            assert (demo.expected(end, rule, demo.SEEN) > start + 0.05).all(), method
    assert all(torch.equal(kept[name], t) for name, t in base.items())


def test_main(demo, tmp_path, capsys, monkeypatch):
    short = demo.Settings(width=8, teacher_steps=5, rounds=3, sizes=(2,))
    monkeypatch.setattr(demo, "Settings", lambda: short)
    monkeypatch.setattr(demo, "RATES", (0.03,))
    documents = []
    for name in ("a", "b"):
        assert demo.main(["--seeds", "2", "--markdown", "--json", str(tmp_path / name)]) == 0
        printed = capsys.readouterr().out
        assert "| exact | 2 | 3 | " in printed and "| per prompt | 2 | 1 | " in printed
        documents.append(json.loads((tmp_path / name).read_text()))
    assert documents[0] == documents[1] and len(documents[0]["runs"]) == 12
    assert demo.difference([1.0, 2], [0, 0.5]) == "+1.250 ± 0.250"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "1"], "--seeds: 1 is less than 2"), (["--json", "no/such/a"], "--json: there is no directory no/such")],
)
def test_main_refuses(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_page_says_of_eight_candidates(demo, monkeypatch):
    monkeypatch.setattr(demo, "RATES", (0.03, 0.1))
    runs = demo.experiment(demo.Settings(sizes=(8,)), 5)["runs"]
    found = {(run["reward"], run["method"], run["iterations"]): run for run in runs}

    def mean(prompts, *key):
        return sum(found[key][prompts]) / 5

    for reward, iterations in itertools.product(("exact", "fitted", "per prompt"), (1, 3)):
        assert mean("seen", reward, "GRPO", iterations) > mean("seen", reward, "DPO", iterations) + 0.05
    for iterations in (1, 3):
        assert mean("unseen", "exact", "GRPO", iterations) > mean("unseen", "exact", "DPO", iterations) + 0.05
        of_reward = [mean("unseen", reward, "GRPO", iterations) for reward in ("exact", "fitted", "per prompt")]
        assert of_reward == sorted(of_reward, reverse=True)
