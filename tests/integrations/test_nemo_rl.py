"""The loss and the estimator for NeMo-RL, called as its workers and its trainer call them.

Where NeMo-RL is not installed its interface is stood in for: the enumerations and the version.
"""

import enum
import importlib
import importlib.util
import pickle
import sys
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from integrations.pages import DOCS, blocks
from integrations.rollouts import COLUMNS, MASK, RECIPES, make
from prefkern import importance_weights
from prefkern.papers import Rollout, load_recipe, recipes

NO_LOSS = {"copg", "disco", "reg_grpo", "trpa", "etr", "tppo", "gtpo"}
NO_ADVANTAGES = {"copg", "disco", "trpa", "tppo", "gtpo"}
PROMPT = 3
MODULE = "prefkern.integrations.nemo_rl"


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


def stand_in(monkeypatch, version="0.7.0", **interfaces):
    """NeMo-RL's interface modules, and ours to be imported anew."""
    contents = {
        "nemo_rl": {"__version__": version},
        "nemo_rl.algorithms": {},
        "nemo_rl.algorithms.loss": {},
        "nemo_rl.algorithms.loss.interfaces": {"LossType": LossType, "LossInputType": LossInputType, **interfaces},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)


@pytest.fixture
def integration(monkeypatch):
    if importlib.util.find_spec("nemo_rl") is None:
        stand_in(monkeypatch, MetricNormalizer=MetricNormalizer)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def spread_out(rows, before=PROMPT):
    """[B, T] of responses as [B, S] with a prompt before them."""
    return torch.cat([torch.zeros(len(rows), before, dtype=rows.dtype), rows], 1)


def train_data(rollout, advantages, generated=None, valid=None):
    """What NeMo-RL hands to a loss; a sample that is not valid does not count."""
    return {
        "input_ids": torch.zeros(8, PROMPT + 6, dtype=torch.long),
        "token_mask": spread_out(rollout.mask.float()),
        "sample_mask": torch.ones(8) if valid is None else valid,
        "advantages": spread_out(advantages),
        "prev_logprobs": spread_out(rollout.old_logp),
        "generation_logprobs": spread_out(rollout.old_logp if generated is None else generated),
        "reference_policy_logprobs": spread_out(rollout.ref_logp),
    }


def run(loss_fn, data, logp, micro_batches=(range(8),)):
    """The summed loss, its gradient and the summed metrics of a step."""
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    leaf = logp.clone().requires_grad_()
    total, metrics = 0, []
    for rows in map(list, micro_batches):
        part = {key: value[rows] for key, value in data.items()}
        loss, log = loss_fn(
            data=part, global_valid_seqs=data["sample_mask"].sum(), global_valid_toks=mask.sum(),
            next_token_logprobs=spread_out(leaf[rows], PROMPT - 1),
        )  # fmt: skip
        total = total + loss
        metrics.append(log)
    (gradient,) = torch.autograd.grad(total, leaf)
    extrema = {"probs_ratio_min": min, "probs_ratio_max": max}
    return total.detach(), gradient, {key: extrema.get(key, sum)([m[key] for m in metrics]) for key in metrics[0]}


def estimate(integration, recipe, rollout, **batch):
    """Advantages of responses, as the trainer gets them."""
    prompts = torch.stack([rollout.group, rollout.group * 0 + 1], 1)
    result = integration.RecipeAdvantages(recipe).compute_advantage(
        prompt_ids=prompts, rewards=rollout.rewards, mask=spread_out(rollout.mask.float()), repeated_batch=batch,
        logprobs_policy=spread_out(rollout.old_logp), logprobs_reference=spread_out(rollout.ref_logp),
    )  # fmt: skip
    assert (result[:, :PROMPT] == 0).all()
    return result[:, PROMPT:]


# ----------------------------------------------------------------------------------------------------- recipes as a whole


@pytest.mark.parametrize("micro_batches", [(range(8),), (range(3), range(3, 8)), [[i] for i in range(8)]], ids=[1, 2, 8])
@pytest.mark.parametrize("name", sorted(set(RECIPES) - NO_LOSS - {"ppo"}))
def test_a_recipe_in_nemo_rl_is_the_recipe(integration, name, micro_batches):
    recipe, (rollout, logp, _) = RECIPES[name], make()
    columns = {key: rollout.extra[key] for key in set(recipe.needs) & set(COLUMNS)}
    expected_rollout = rollout
    if name in ("gdpo", "mo_grpo"):
        both = torch.stack([rollout.rewards, rollout.rewards.flip(0)], 1)
        expected_rollout = Rollout(**{**vars(rollout), "rewards": both})
        columns |= {"reward/b": both[:, 1], "reward/a": both[:, 0]}
    advantages = estimate(integration, recipe, rollout, **columns)
    loss_fn = integration.RecipeLoss(recipe)
    loss, gradient, metrics = run(loss_fn, train_data(rollout, advantages), logp, micro_batches)
    leaf = logp.clone().requires_grad_()
    expected = recipe.loss(leaf, recipe.prepare(expected_rollout)).loss
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert expected_gradient.abs().max() > 1e-4
    assert_close(loss, expected.detach(), rtol=1e-7, atol=1e-9)
    assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9)
    assert metrics["loss"] == pytest.approx(loss.item())
    assert metrics["num_valid_samples"] == 8


def test_ppo_takes_token_advantages(integration):
    rollout, logp, _ = make()
    recipe = recipes()["ppo"]
    advantages = recipe.prepare(rollout)["advantages"]
    loss = run(integration.RecipeLoss("ppo"), train_data(rollout, advantages), logp)[0]
    assert_close(loss, recipe.loss(logp, recipe.prepare(rollout)).loss)
    assert_close(estimate(integration, "ppo", rollout, values=spread_out(rollout.extra["values"])), advantages)


@pytest.mark.parametrize("name", sorted(NO_LOSS))
def test_what_cannot_be_is_refused(integration, name):
    with pytest.raises(ValueError, match=f"recipe '{name}' has no loss for NeMo-RL"):
        integration.RecipeLoss(name)
    if name in NO_ADVANTAGES:
        with pytest.raises(ValueError, match=f"recipe '{name}'.*NeMo-RL"):
            integration.RecipeAdvantages(name)
    else:
        rollout, _, _ = make()
        assert_close(estimate(integration, name, rollout), recipes()[name].advantages(rollout)[:, None] * MASK)


# ----------------------------------------------------------------------------------------------------------- by protocol


def test_the_protocol(integration):
    assert integration.RecipeLoss("dapo").loss_type is integration.LossType.TOKEN_LEVEL
    for text in ("grpo", "gspo", "gmpo", "rloo", "dr_grpo:max_length=6", "cgpo:kl_max=1.0"):
        assert integration.RecipeLoss(text).loss_type is integration.LossType.SEQUENCE_LEVEL
    loss_fn = integration.RecipeLoss("grpo")
    assert loss_fn.input_type is integration.LossInputType.LOGPROB
    rollout, logp, _ = make()
    _, _, metrics = run(loss_fn, train_data(rollout, rollout.old_logp), logp)
    assert all(isinstance(value, float) for value in metrics.values())
    if integration.MetricNormalizer is not None:
        assert set(loss_fn.metric_normalizations) == set(metrics)
        assert loss_fn.metric_normalizations["loss"] is integration.MetricNormalizer.SEQUENCES
        assert integration.RecipeLoss("dapo").metric_normalizations["loss"] is integration.MetricNormalizer.TOKENS
        assert loss_fn.metric_normalizations["probs_ratio"] is integration.MetricNormalizer.TOKENS
        assert loss_fn.metric_normalizations["probs_ratio_min"] is integration.MetricNormalizer.NONE


def test_releases_without_metric_normalisers(monkeypatch):
    stand_in(monkeypatch, "0.6.0")
    integration = importlib.import_module(MODULE)
    assert not hasattr(integration.RecipeLoss("grpo"), "metric_normalizations")


def test_it_travels_to_workers(integration):
    rollout, logp, _ = make()
    data = train_data(rollout, rollout.old_logp)
    loss_fn = integration.RecipeLoss("ngrpo:eps_pos=0.3", importance={"clip_max": 2.0})
    assert pickle.loads(pickle.dumps(loss_fn.recipe)) == load_recipe("ngrpo", eps_pos=0.3)
    assert_close(run(pickle.loads(pickle.dumps(loss_fn)), data, logp)[0], run(loss_fn, data, logp)[0])


@pytest.mark.parametrize("by_token", [True, False])
def test_the_clipped_loss_is_nemo_rls(integration, by_token):
    """Its ClippedPGLossFn with dual clip and importance weights, with either loss type, and samples that do not count."""
    rollout, logp, _ = make(1)
    generated = rollout.old_logp + 0.3 * torch.linspace(-1, 1, 48, dtype=logp.dtype).view(8, 6)
    valid = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0])
    advantages = torch.linspace(-1, 1, 8, dtype=logp.dtype)[:, None] * MASK
    recipe = load_recipe("ppo", dual_clip=1.2, agg="token-mean" if by_token else "seq-mean-token-mean")
    loss_fn = integration.RecipeLoss(recipe, importance={"clip_min": 0.0, "clip_max": 1.1, "log_clamp": None})
    data = train_data(rollout, advantages, generated, valid)
    loss, gradient, metrics = run(loss_fn, data, logp, (range(4), range(4, 8)))

    leaf = logp.clone().requires_grad_()
    ratio = (leaf - rollout.old_logp).exp()
    per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    per_token = torch.where(advantages < 0, torch.minimum(per_token, -advantages * 1.2), per_token)
    weighted = per_token * (rollout.old_logp - generated).exp().clamp(0, 1.1)
    mask = MASK * valid[:, None]
    if by_token:
        expected = (weighted * mask).sum() / (mask.sum() + 1e-8)
    else:
        rows = (weighted * MASK).sum(1) / (MASK.sum(1) + 1e-8)
        expected = (rows * valid).sum() / (valid.sum() + 1e-8)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert expected_gradient.abs().max() > 1e-3
    assert_close(loss, expected.detach(), rtol=1e-7, atol=1e-9)
    assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9)

    def mean(values):
        return ((values * mask).sum() / mask.sum()).item()

    kept = mask.bool()
    exact = {
        "probs_ratio": mean(ratio.detach()),
        "probs_ratio_min": ratio.detach()[kept].min().item(),
        "probs_ratio_max": ratio.detach()[kept].max().item(),
        "token_mult_prob_error": mean((generated - rollout.old_logp).abs().exp()),
        "gen_kl_error": mean((rollout.old_logp - generated).exp() - 1 - (rollout.old_logp - generated)),
        "sampling_importance_ratio": mean((rollout.old_logp - generated).exp().clamp(0, 1.1)),
        "approx_entropy": -mean((logp - generated).exp() * logp),
        "num_valid_samples": 6.0,
    }
    for key, value in exact.items():
        assert metrics[key] == pytest.approx(value, rel=1e-7), key
    assert 0 < metrics["clip_fraction_dual"] < 1


@pytest.mark.parametrize("text", ["grpo", "dapo", "gspo:token=True", "gmpo"])
def test_metrics_of_micro_batches_add_up(integration, text):
    rollout, logp, _ = make(2)
    advantages = torch.linspace(-1, 1, 8, dtype=logp.dtype)[:, None] * MASK
    data = train_data(rollout, advantages, rollout.old_logp + 0.1)
    whole = run(integration.RecipeLoss(text), data, logp)[2]
    parts = run(integration.RecipeLoss(text), data, logp, (range(1), range(1, 3), range(3, 8)))[2]
    assert parts == pytest.approx(whole, rel=1e-6)


def test_one_sequence_at_a_time(integration):
    """As its wrapper for packed sequences calls a loss: every tensor cut to the length of the one row."""
    rollout, logp, _ = make()
    advantages = recipes()["grpo"].advantages(rollout)[:, None] * MASK
    data, loss_fn = train_data(rollout, advantages), integration.RecipeLoss("grpo")
    whole = run(loss_fn, data, logp)
    total = 0
    for i, n in enumerate(MASK.sum(1).tolist()):
        part = {key: value[i : i + 1, : PROMPT + n] if value.dim() > 1 else value[i : i + 1] for key, value in data.items()}
        rows = spread_out(logp[i : i + 1, :n], PROMPT - 1)
        total += loss_fn(
            data=part, next_token_logprobs=rows, global_valid_seqs=torch.tensor(8.0), global_valid_toks=MASK.sum()
        )[0]
    assert_close(total, whole[0])


def test_a_micro_batch_that_does_not_count(integration):
    rollout, logp, _ = make()
    data = train_data(rollout, rollout.old_logp, valid=torch.zeros(8))
    for text in ("grpo", "dapo", "gmpo", "rloo"):
        loss, gradient, metrics = run(integration.RecipeLoss(text), data | {"advantages": data["advantages"] * 0}, logp)
        assert loss == 0
        assert (gradient == 0).all()
        assert metrics["num_valid_samples"] == 0
        assert metrics["probs_ratio_min"] == float("inf")
        assert metrics["probs_ratio_max"] == -float("inf")


@pytest.mark.parametrize("text", ["grpo:beta=0.1", "gmpo:beta=0.1", "reinforce_pp:variant=baseline,beta=0.1"])
def test_a_kl_to_the_reference(integration, text):
    recipe, (rollout, logp, _) = load_recipe(text), make()
    data = train_data(rollout, estimate(integration, text, rollout))
    loss, gradient, metrics = run(integration.RecipeLoss(text), data, logp, (range(5), range(5, 8)))
    leaf = logp.clone().requires_grad_()
    out = recipe.loss(leaf, recipe.prepare(rollout))
    assert_close(loss, out.loss.detach(), rtol=1e-7, atol=1e-9)
    assert_close(gradient, torch.autograd.grad(out.loss, leaf)[0], rtol=1e-7, atol=1e-9)
    assert metrics["kl_penalty"] == pytest.approx(out.metrics["kl"].item())
    del data["reference_policy_logprobs"]
    with pytest.raises(ValueError, match=r"has beta 0\.1, but data has no reference_policy_logprobs"):
        run(integration.RecipeLoss(text), data, logp)


@pytest.mark.parametrize("text", ["rloo:beta=0.1", "reinforce_pp:beta=0.1"])
def test_a_kl_in_the_reward(integration, text):
    rollout, _, _ = make()
    expected = load_recipe(text).advantages(rollout)
    expected = expected if expected.dim() == 2 else expected[:, None] * MASK
    assert_close(estimate(integration, text, rollout), expected * MASK)
    assert (estimate(integration, text.partition(":")[0], rollout) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("importance", [
    {"clip_max": 1.05},
    {"mode": "mask", "clip_min": 0.9, "clip_max": 1.1},
    {"level": "geometric", "mode": "mask", "clip_min": 0.99, "clip_max": 1.02},
])  # fmt: skip
def test_importance_weights(integration, importance):
    rollout, logp, _ = make()
    generated = rollout.old_logp + 0.3 * torch.linspace(-1, 1, 48, dtype=logp.dtype).view(8, 6)
    recipe = recipes()["dapo"]
    weights = importance_weights(rollout.old_logp, generated, MASK, **importance)
    data = train_data(rollout, estimate(integration, "dapo", rollout), generated)
    loss, gradient, _ = run(integration.RecipeLoss("dapo", importance=importance), data, logp)
    prepared = recipe.prepare(Rollout(**{**vars(rollout), "token_weight": weights}))
    assert_close(loss, recipe.loss(logp, prepared).loss, rtol=1e-7, atol=1e-9)
    assert (gradient - run(integration.RecipeLoss("dapo"), data, logp)[1]).abs().max() > 1e-3


def test_wrong_arguments(integration):
    with pytest.raises(ValueError, match="did you mean 'ngrpo'"):
        integration.RecipeLoss("ngrp")
    with pytest.raises(ValueError, match="recipe 'dr_grpo' has max_length None"):
        integration.RecipeLoss("dr_grpo")
    rollout, _, _ = make()
    with pytest.raises(ValueError, match="recipe 'dagrpo' needs 'scores', which is not in the batch"):
        estimate(integration, "dagrpo", rollout)
    with pytest.raises(ValueError, match="recipe 'gdpo' needs several rewards; the batch has 1 keys"):
        estimate(integration, "gdpo", rollout, **{"reward/a": rollout.rewards})


def test_without_nemo_rl(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "nemo_rl", None)
    with pytest.raises(ImportError, match="nemo_rl is not installed"):
        importlib.import_module(MODULE)


@pytest.mark.parametrize("version", ["0.5.0rc0", "0.8.0", "1.0+abc"])
def test_other_versions_are_refused_with_the_range(monkeypatch, version):
    stand_in(monkeypatch, version)
    with pytest.raises(ImportError, match=r"nemo_rl is .* from 0\.6 to before 0\.8"):
        importlib.import_module(MODULE)


def test_the_page(integration, monkeypatch):
    grpo = ModuleType("nemo_rl.algorithms.grpo")
    monkeypatch.setitem(sys.modules, grpo.__name__, grpo)
    monkeypatch.setattr(sys.modules["nemo_rl.algorithms"], "grpo", grpo, raising=False)
    (code,) = blocks("nemo_rl.md", "python")
    names = {}
    exec(code, names)
    rollout, logp, _ = make()
    estimator = grpo._create_advantage_estimator(None)
    assert estimator.recipe == names["loss_fn"].recipe == load_recipe("ngrpo", r_max=2.0)
    loss, _, _ = run(names["loss_fn"], train_data(rollout, estimate(integration, estimator.recipe, rollout)), logp)
    assert loss.isfinite()
    text = (DOCS / "nemo_rl.md").read_text()
    assert all(name in text for name in NO_LOSS)
