"""What holds for every paper, recipes from text, rollouts, and `prefkern papers`."""

import dataclasses
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from prefkern import papers
from prefkern.cli import app
from prefkern.papers import EVIDENCE, NAMES, Rollout, load_pair_recipe, load_recipe, module, pair_recipes, recipes, take_rows

WORDS = {
    "apo_accel": "paper", "bidedpo": "part", "cgpo": "paper", "copg": "paper", "curry_dpo": "paper",
    "dagrpo": "inferred", "dno": "paper", "dpo_survey": "part", "etr": "inferred", "gcpo": "part", "gepo": "part",
    "gp_mini": "part", "image_cot_rl": "part", "lcpo": "paper", "lipo": "paper", "lire": "paper", "mo_grpo": "part",
    "more_is_less": "part", "mpo_mixed": "paper", "otc": "paper", "plackett_luce": "paper", "r_dpo": "paper",
    "reg_grpo": "paper", "rrhf": "paper", "soft_preference": "paper", "spo_self": "inferred", "tpo_tree": "paper",
    "tppo": "part", "ultragen": "part", "v0": "part", "vade": "part", "vpo": "paper",
}  # fmt: skip


# ---- every paper


def test_every_module_is_imported_and_exported() -> None:
    assert set(NAMES) <= set(papers.__all__)
    assert all(getattr(papers, name) is module(name) for name in NAMES)
    assert sorted(papers.about()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_paper_says_what_it_is_and_how_sure(name) -> None:
    about, doc = module(name).about, module(name).__doc__
    assert about.evidence == WORDS.get(name, "code") and about.evidence in EVIDENCE
    assert re.findall(r"^Evidence: (\w+)", doc, re.MULTILINE) == [about.evidence]
    assert re.fullmatch(r"\d{4}\.\d{5}", about.arxiv) and about.arxiv in doc and about.link.endswith(about.arxiv)
    assert about.year - 2000 - int(about.arxiv[:2]) in (0, 1) and about.name and about.title and about.family
    assert about.evidence_text.startswith(EVIDENCE[about.evidence])
    if about.evidence != "code":
        assert about.note, "what the evidence rests on"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_made_of_its_options(name) -> None:
    recipe = getattr(module(name), "recipe", None)
    if recipe is None:
        assert name not in recipes() and name not in pair_recipes()
        return
    known, load = (pair_recipes(), load_pair_recipe) if isinstance(recipe, papers.PairRecipe) else (recipes(), load_recipe)
    assert recipe.name == name and known[name] is recipe
    assert type(recipe)() == recipe == load(name) == load(name, **recipe.options())
    assert load(name + ":" + ",".join(f"{k}={v!r}" for k, v in recipe.options().items())) == recipe
    hash(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"
    json.dumps(recipe.options())


@pytest.mark.parametrize(("name", "needed"), [(name, key) for name, recipe in recipes().items() for key in recipe.needs])
def test_a_recipe_names_the_field_that_is_missing(name, needed) -> None:
    tensor, recipe = torch.zeros(2), recipes()[name]
    own = [f.name for f in dataclasses.fields(Rollout) if f.name not in ("extra", "token_weight")]
    extra = {key: tensor for key in recipe.needs if key not in own}
    complete = Rollout(**dict.fromkeys(own, tensor), extra=extra)
    recipe.check(complete)
    if needed in own:
        rollout, place = dataclasses.replace(complete, **{needed: None}), f"rollout.{needed}"
    else:
        rollout = dataclasses.replace(complete, extra={key: value for key, value in extra.items() if key != needed})
        place = f"rollout.extra[{needed!r}]"
    with pytest.raises(ValueError, match=re.escape(f"recipe {name!r} needs {place}, which is None")):
        recipe.check(rollout)


# ---- recipes from text


def test_values_are_literals_or_else_text() -> None:
    recipe = load_recipe("gdpo:weights=(1.0, 0.5),batch_norm=none, beta = 0.1 ,eps=1e-3")
    assert recipe.options() | {"weights": (1.0, 0.5), "batch_norm": "none", "beta": 0.1, "eps": 1e-3} == recipe.options()
    assert load_recipe("disco:tau=None,count_degenerate=False").tau is None
    assert load_recipe("ngrpo:agg=seq-mean-token-mean").agg == "seq-mean-token-mean"
    assert load_recipe("gdpo:batch_norm='seq'").batch_norm == "seq"


def test_arguments_go_on_top_of_the_text() -> None:
    recipe = load_recipe("ngrpo:r_max=2.0,n_virtual=3", r_max=4.0)
    assert (recipe.r_max, recipe.n_virtual) == (4.0, 3)
    assert recipes()["ngrpo"].r_max == 1.0


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("ngrop", {}, r"recipe is 'ngrop'; accepted: .*; did you mean 'ngrpo'\?"),
        ("NGRPO", {}, r"did you mean 'ngrpo'\?"),
        ("12345", {}, "recipe is '12345'; accepted: [a-z0-9_, ]+$"),
        ("ngrpo:rmax=2", {}, r"recipe 'ngrpo' has no option 'rmax'; accepted: .*; did you mean 'r_max'\?"),
        ("disco", {"temperature": 1}, "recipe 'disco' has no option 'temperature'; accepted: beta, "),
        ("ngrpo:name=x", {}, "has no option 'name'"),
        ("ngrpo:r_max=two", {}, "option 'r_max' of recipe 'ngrpo' is 'two'; accepted: float"),
        ("disco:tau=warm", {}, "option 'tau' of recipe 'disco' is 'warm'; accepted: float or NoneType"),
        ("disco:kl=k4", {}, "option 'kl' of recipe 'disco' is 'k4'; accepted: 'k1', 'k3'"),
        ("tppo", {"bootstrap": "repaet"}, "'repeat', 'critic', 'zero'; did you mean 'repeat'"),
        ("ngrpo:r_max", {}, "recipe is 'ngrpo:r_max': 'r_max' is no option=value"),
        ("ngrpo:r_max=", {}, "'r_max=' is no option=value"),
        ("ngrpo:=2", {}, "'=2' is no option=value"),
        ("simpo:beta=2.5", {}, "recipe is 'simpo'; accepted: .*; load_pair_recipe has it"),
    ],
)
def test_recipes_refused(text, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(text, **options)


def test_an_unknown_paper_is_met_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"paper is 'disko'; accepted: .*; did you mean 'disco'\?"):
        module("disko")


# ---- rollouts and rows


def test_rows_of_a_batch() -> None:
    batch = {"advantages": torch.arange(4.0), "mask": torch.eye(4, dtype=torch.bool), "scale": torch.tensor(3.0)}
    rows = take_rows(batch, torch.tensor([2, 0]))
    assert rows["advantages"].tolist() == [2, 0] and rows["mask"].tolist() == torch.eye(4).bool()[[2, 0]].tolist()
    assert rows["scale"] is batch["scale"]
    kept = take_rows(batch, torch.tensor([True, False, False, True]))
    assert kept["advantages"].tolist() == [0, 3]
    with pytest.raises(ValueError, match="batch has cu_seqlens; rows can only be taken of padded batches"):
        take_rows({**batch, "cu_seqlens": torch.tensor([0, 1])}, torch.tensor([0]))


def test_token_counts() -> None:
    rewards, group = torch.zeros(4), torch.arange(4)
    cu_seqlens = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32)
    mask = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    cases = {
        "padded": (Rollout(rewards, group, torch.arange(5) < torch.tensor([[5], [0], [2], [3]])), [5, 0, 2, 3]),
        "packed": (Rollout(rewards, group, cu_seqlens=cu_seqlens), [3, 0, 1, 4]),
        "packed with a mask": (Rollout(rewards, group, mask, cu_seqlens=cu_seqlens), [2, 0, 0, 3]),
        "given": (Rollout(rewards, group, mask, cu_seqlens=cu_seqlens, lengths=group), [0, 1, 2, 3]),
    }
    for name, (rollout, expected) in cases.items():
        counts = rollout.token_counts()
        assert counts.tolist() == expected and counts.dtype == torch.int64, name
    with pytest.raises(ValueError, match=r"rollout\.mask is None; \[B, T\] is expected, or cu_seqlens, or lengths"):
        Rollout(rewards, group).token_counts()


def test_a_rollout_gives_fields_and_extras() -> None:
    levels = torch.tensor([1, 2])
    rollout = Rollout(torch.zeros(2), torch.arange(2), extra={"levels": levels})
    assert rollout.get("levels") is levels and rollout.get("rewards") is rollout.rewards
    assert rollout.get("mask") is None and rollout.get("scores") is None


def test_a_batch_holds_constants() -> None:
    rewards, old = torch.rand(2), torch.rand(2, 3, requires_grad=True)
    rollout = Rollout(rewards, torch.zeros(2, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), old)
    batch = load_recipe("grpo").prepare(rollout)
    assert set(batch) == {"advantages", "group", "mask", "old_logp"}
    assert not any(value.requires_grad for value in batch.values())


def test_entropies_that_a_loss_needs() -> None:
    gtpo = load_recipe("gtpo")
    assert gtpo.needs_entropy
    with pytest.raises(ValueError, match="entropy is None; recipe 'gtpo' needs the policy's token entropies"):
        gtpo.checked_entropy(None)
    assert load_recipe("grpo").checked_entropy(None) is None
    given = gtpo.checked_entropy(torch.ones(2, requires_grad=True))
    assert given is not None and not given.requires_grad


# ---- the command


def run(*arguments: str):
    return CliRunner().invoke(app, ["papers", *arguments], env={"COLUMNS": "200"})


def test_the_list_has_every_paper() -> None:
    result = run()
    assert result.exit_code == 0
    for name in NAMES:
        assert re.search(rf"\b{name}\b", result.output) and module(name).about.evidence in result.output
    for meaning in EVIDENCE.values():
        assert meaning in re.sub(r"\s+", " ", result.output)


def test_json_parses() -> None:
    result = run("--json")
    assert result.exit_code == 0
    entries = json.loads(result.output)
    assert [entry["slug"] for entry in entries] == list(NAMES)
    for entry in entries:
        about, recipe = module(entry["slug"]).about, getattr(module(entry["slug"]), "recipe", None)
        assert entry["evidence"] == about.evidence and entry["link"] == about.link and entry["title"] == about.title
        assert (entry["recipe"] is None) == (recipe is None)
    tppo = json.loads(run("tppo", "--json").output)
    assert tppo["needs"] == ["values", "finished", "win_start"] and tppo["recipe"]["lam"] == 0.95 and not tppo["whole_groups"]
    assert json.loads(run("gtpo", "--json").output)["needs"] == ["tokens", "entropy"]


def test_markdown_has_a_row_per_paper() -> None:
    lines = run("--markdown").output.splitlines()
    assert lines[0].startswith("| name | method |") and len(lines) == 2 + len(NAMES)
    for name, line in zip(NAMES, lines[2:], strict=True):
        about = module(name).about
        assert line.startswith(f"| `{name}` | [{about.name}]({about.link}) | {about.family} | {about.evidence}")


@pytest.mark.parametrize("name", NAMES)
def test_one_paper_shows_equations_and_options(name) -> None:
    result = run(name)
    assert result.exit_code == 0
    text = re.sub(r"\s+", " ", result.output)
    about, recipe = module(name).about, getattr(module(name), "recipe", None)
    assert ".. math::" in text and about.link in text and EVIDENCE[about.evidence] in text
    if recipe is None:
        assert "No recipe" in text
        return
    for option, value in recipe.options().items():
        assert re.sub(r"\s+", " ", f"{option} = {value!r}") in text
    assert all(need in text for need in recipe.needs)
    assert ("must hold whole groups" in text) == getattr(recipe, "whole_groups", False)


def test_an_unknown_name_exits_with_the_nearest() -> None:
    result = run("disko")
    assert result.exit_code == 2
    said = re.sub(r"[\s│]+", " ", result.output)
    assert "paper is 'disko'" in said and "did you mean 'disco'?" in said
