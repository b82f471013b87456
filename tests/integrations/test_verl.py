"""Recipes under verl's names: through verl's registries, its advantage computation and its actor loss, on the CPU."""

import copy
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import prefkern
from integrations import serving  # before verl's trainer
from integrations.pages import DOCS, blocks, paths
from integrations.rollouts import MASK, RECIPES, as_text, make, value_and_gradient
from integrations.shards import sharded_head
from prefkern.integrations._hooks import token_loss
from prefkern.papers import load_recipe, recipes
from ranks import run_ranks

pytest.importorskip("verl", minversion="0.9.1")
import verl
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.protocol import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1 import utils as v1_utils
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as kernel
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import prefkern.integrations.verl as integration

serving.remove()
F64, F32 = torch.float64, torch.float32
REFUSED = {"copg", "disco", "reg_grpo", "trpa", "etr", "tppo"}
NO_ADVANTAGES = {"copg", "disco", "trpa", "tppo"}


@pytest.fixture(autouse=True)
def as_imported():
    """Every test ends with the names as an import leaves them."""
    registries = (core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY)
    before = [dict(r) for r in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    integration._warned.clear()


@pytest.fixture
def whole_batch():
    integration.pass_batch()
    yield
    integration.unpass_batch()


def actor(global_batch_info=None, **options):
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)
    config.global_batch_info.update(global_batch_info or {})
    return config


def uids(group):
    return np.array([f"uid-{i}" for i in group.tolist()], dtype=object)


def at_the_end(rewards, mask):
    token_level = rewards.new_zeros(mask.shape)
    token_level[torch.arange(len(rewards)), mask.sum(1) - 1] = rewards
    return token_level


def proto(rollout, entropy=None, several=None):
    """verl's batch when it comes to advantages."""
    columns = {key: value for key, value in rollout.extra.items() if value.dim() == 1}
    tensors = {
        "token_level_rewards": at_the_end(rollout.rewards, rollout.mask),
        "response_mask": rollout.mask.long(),
        "old_log_probs": rollout.old_logp,
        "ref_log_prob": rollout.ref_logp,
        "responses": rollout.tokens,
        "values": rollout.extra["values"],
    }
    if entropy is not None:
        tensors["entropys"] = entropy
    others = {key: value.numpy() for key, value in columns.items()} | {"uid": uids(rollout.group)}
    others["text"] = np.array(["abc"] * len(rollout.group), dtype=object)
    return DataProto.from_dict(tensors=tensors, non_tensors=others | (several or {}))


def losses(name, rollout, advantages, logp, config=None, agg="token-mean", weights=None):
    """(loss, gradient, metrics) of a registered loss."""

    def loss(leaf):
        return core_algos.get_policy_loss_fn(name)(
            old_log_prob=rollout.old_logp, log_prob=leaf, advantages=advantages, response_mask=rollout.mask,
            loss_agg_mode=agg, config=config or actor(), rollout_is_weights=weights,
        )  # fmt: skip

    return value_and_gradient(loss, logp)


# --------------------------------------------------------------------------------------------------------- registration


def test_every_recipe_is_registered_under_its_name():
    names = {f"prefkern_{name}" for name in recipes()}
    assert names == {name for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("prefkern_")}
    assert names == {name for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith("prefkern_")}
    for name in recipes():
        assert core_algos.get_adv_estimator_fn(f"prefkern_{name}").recipe == recipes()[name]


def test_registering_again_changes_nothing():
    before = dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    assert set(integration.register()) == {name for name in before if name.startswith("prefkern_")}
    assert all(core_algos.ADV_ESTIMATOR_REGISTRY[name] is fn for name, fn in before.items())
    importlib.reload(integration)
    assert all(core_algos.ADV_ESTIMATOR_REGISTRY[name] is fn for name, fn in before.items())
    integration.register(recipes=["ngrpo:r_max=2.0"])
    once = core_algos.ADV_ESTIMATOR_REGISTRY["prefkern_ngrpo"]
    integration.register(["ngrpo:r_max=2.0"])
    integration.register()
    assert core_algos.ADV_ESTIMATOR_REGISTRY["prefkern_ngrpo"] is once


def test_options_by_a_recipes_own_name_and_by_new_names():
    integration.register(["ngrpo:r_max=2.0,eps_pos=0.3"])
    integration.register({"strict": "grpo:eps_high=0.1"})
    assert core_algos.get_adv_estimator_fn("prefkern_ngrpo").recipe.r_max == 2.0
    assert core_algos.get_policy_loss_fn("prefkern_ngrpo").recipe.eps_pos == 0.3
    assert core_algos.get_policy_loss_fn("prefkern_strict").recipe == load_recipe("grpo", eps_high=0.1)
    assert core_algos.get_policy_loss_fn("prefkern_grpo").recipe.eps_high == 0.2


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="did you mean 'ngrpo'"):
        integration.register(["ngrp"])
    with pytest.raises(ValueError, match=r"no option 'rmax'.*did you mean 'r_max'"):
        integration.register(["ngrpo:rmax=1"])
    with pytest.raises(TypeError, match="a list of such strings"):
        integration.register("ngrpo")
    for name in sorted(NO_ADVANTAGES):
        with pytest.raises(ValueError, match=f"recipe '{name}' has no loss for verl"):
            integration.register([name])
    with pytest.raises(ValueError, match="recipe 'gtpo' has variant 'code'"):
        integration.register(["gtpo:variant=code"])
    core_algos.ADV_ESTIMATOR_REGISTRY["prefkern_taken"] = print
    with pytest.raises(ValueError, match="prefkern_taken has already been registered"):
        integration.register({"taken": "grpo"})


@pytest.mark.parametrize("version", ["0.9.0", "0.8.3.dev1", "0.10.0", "1.0"])
def test_other_versions_are_refused_with_the_range(version, monkeypatch):
    monkeypatch.setattr(verl, "__version__", version)
    for function in (integration.register, integration.patch_head, integration.pass_batch):
        with pytest.raises(ImportError, match=rf"verl is {version}; .* from 0\.9\.1 to before 0\.10"):
            function()


@pytest.fixture
def as_a_plugin(tmp_path):
    """A folder with an installed package that names this module as verl's plugin."""
    info = tmp_path / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nprefkern = prefkern.integrations.verl:register\n")
    return tmp_path


def forget():
    """verl without our names, and our module not imported."""
    for registry in (core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY):
        for name in [name for name in registry if name.startswith("prefkern_")]:
            del registry[name]
    return sys.modules.pop("prefkern.integrations.verl")


@pytest.fixture
def imported_anew():
    module = forget()
    yield
    sys.modules["prefkern.integrations.verl"] = prefkern.integrations.verl = module


def test_verls_loader_of_plugins(as_a_plugin, imported_anew, monkeypatch):
    """The loader is in verl/__init__.py, which runs again."""
    monkeypatch.syspath_prepend(str(as_a_plugin))
    monkeypatch.setenv("PREFKERN_VERL_RECIPES", "ngrpo:r_max=3.0; strict=grpo:eps_high=0.1")
    importlib.reload(verl)
    assert core_algos.get_adv_estimator_fn("prefkern_ngrpo").recipe.r_max == 3.0
    assert core_algos.get_policy_loss_fn("prefkern_strict").recipe.eps_high == 0.1
    assert set(recipes()) == {
        name.removeprefix("prefkern_") for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith("prefkern_")
    } - {"strict"}
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    forget()
    importlib.reload(verl)
    assert "prefkern_ngrpo" not in core_algos.POLICY_LOSS_REGISTRY
    assert "prefkern.integrations.verl" not in sys.modules


@pytest.mark.slow
def test_verls_loader_of_plugins_in_a_new_process(as_a_plugin):
    """Where nobody imports prefkern but verl, in the middle of its own import."""
    code = (
        "from integrations import serving\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn as adv, get_policy_loss_fn as loss\n"
        "print(adv('prefkern_ngrpo').recipe.r_max, loss('prefkern_strict').recipe.eps_high, loss('prefkern_gpg').name)\n"
        "from verl.trainer.ppo.v1 import trainer_base, utils\n"
        "from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as head\n"
        "wrapped = (utils.compute_advantage, trainer_base.PPOTrainer._compute_advantage)\n"
        "print(*(f.__wrapped__.__name__ for f in wrapped), head.__module__)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(as_a_plugin), str(DOCS.parents[1] / "tests"), os.environ.get("PYTHONPATH", "")]),
        "PREFKERN_VERL_RECIPES": "ngrpo:r_max=3.0; strict=grpo:eps_high=0.1",
        integration.BATCH_VARIABLE: "1",
        integration.HEAD_VARIABLE: "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    first, second = done.stdout.splitlines()[-2:]
    assert first == "3.0 0.1 prefkern_gpg", done.stderr
    assert second == "compute_advantage _compute_advantage prefkern.integrations._heads", done.stderr


def test_the_environment_switches_batch_and_head_on(monkeypatch):
    original = ray_trainer.compute_advantage
    monkeypatch.setenv("PREFKERN_VERL_PASS_BATCH", "0")
    integration._from_environment()
    assert ray_trainer.compute_advantage is original
    monkeypatch.setenv("PREFKERN_VERL_PASS_BATCH", "1")
    for _ in range(2):
        integration._from_environment()
        assert ray_trainer.compute_advantage is v1_utils.compute_advantage is not original
        assert ray_trainer.compute_advantage.__wrapped__ is original
    integration.unpass_batch()
    assert ray_trainer.compute_advantage is v1_utils.compute_advantage is original
    monkeypatch.delenv("PREFKERN_VERL_PASS_BATCH")
    monkeypatch.setenv("PREFKERN_VERL_PATCH_HEAD", "1")
    integration._from_environment()
    assert kernel.linear_cross_entropy is integration.linear_cross_entropy
    integration.unpatch_head()
    assert kernel.linear_cross_entropy is not integration.linear_cross_entropy


def test_by_verls_list_of_modules(imported_anew):
    from verl.utils.import_utils import import_external_libs

    import_external_libs(["prefkern.integrations.verl"])
    assert "prefkern_ngrpo" in core_algos.POLICY_LOSS_REGISTRY


def test_a_wrong_environment_is_heard_of(monkeypatch):
    """verl catches what a plugin raises; a warning it lets through."""
    monkeypatch.setenv("PREFKERN_VERL_RECIPES", "ngrpo:r_mxa=1")
    with pytest.warns(UserWarning, match="prefkern is not registered with verl: .*'r_mxa'"), pytest.raises(ValueError):
        integration._from_environment()


# ----------------------------------------------------------------------------------------------------- recipes as a whole


@pytest.mark.parametrize("name", sorted(set(RECIPES) - REFUSED))
def test_a_recipe_in_verl_is_the_recipe(name, whole_batch):
    """Its own batch and loss, against verl's advantage computation and the registered loss, in the recipe's aggregation."""
    recipe, (rollout, logp, entropy), algorithm, several = RECIPES[name], make(), {}, {}
    expected_rollout = rollout
    if name in ("gdpo", "mo_grpo"):
        both = torch.stack([rollout.rewards, rollout.rewards.flip(0)], 1)
        expected_rollout = type(rollout)(**{**vars(rollout), "rewards": both})
        algorithm = {"gdpo_reward_keys": ["first", "second"]}
        several = {"first": both[:, 0].numpy(), "second": both[:, 1].numpy()}
    expected = value_and_gradient(lambda leaf: recipe.loss(leaf, recipe.prepare(expected_rollout), entropy=entropy), logp)

    integration.register([as_text(recipe)])
    data = proto(rollout, entropy, several)
    data = ray_trainer.compute_advantage(data, adv_estimator=f"prefkern_{name}", config=AlgoConfig(**algorithm))
    advantages = data.batch["advantages"]
    assert advantages.shape == MASK.shape
    assert (advantages[~MASK] == 0).all()
    own = token_loss(recipe, "verl")
    config = actor({"loss_scale_factor": own.scale})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = losses(f"prefkern_{name}", rollout, advantages, logp, config, own.agg)
    assert expected[1].abs().max() > 1e-4
    assert_close(actual[0], expected[0], rtol=1e-7, atol=1e-9)
    assert_close(actual[1], expected[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_losses_that_cannot_be_are_refused_by_name(name):
    rollout, logp, _ = make()
    with pytest.raises(ValueError, match=f"recipe '{name}' has no loss for verl: .*(group|critic)"):
        losses(f"prefkern_{name}", rollout, rollout.old_logp, logp)
    estimator = core_algos.get_adv_estimator_fn(f"prefkern_{name}")
    arguments = {"token_level_rewards": at_the_end(rollout.rewards, MASK), "response_mask": MASK, "index": uids(rollout.group)}
    if name in NO_ADVANTAGES:
        with pytest.raises(ValueError, match=f"recipe '{name}' has no loss for verl"):
            estimator(**arguments)
    else:
        expected = recipes()[name].advantages(rollout)[:, None] * MASK
        assert_close(estimator(**arguments)[0], expected)


def test_what_a_batch_is_needed_for_is_said():
    rollout, _, _ = make()
    data = proto(rollout)
    for name, missing in (("gtpo", "responses"), ("dagrpo", "scores"), ("ppo", "values")):
        with pytest.raises(ValueError, match=rf"recipe '{name}' needs '{missing}' of the batch.*pass_batch\(\)"):
            ray_trainer.compute_advantage(data, adv_estimator=f"prefkern_{name}", config=AlgoConfig())
    with pytest.raises(ValueError, match="adv_estimator=gae, which is the same"):
        ray_trainer.compute_advantage(data, adv_estimator="prefkern_ppo", config=AlgoConfig())


def test_what_is_not_in_the_batch_is_said(whole_batch):
    rollout, _, _ = make()
    data = proto(rollout)
    for name, missing in (("gtpo", "token entropies"), ("gdpo", "algorithm.gdpo_reward_keys")):
        with pytest.raises(ValueError, match=missing):
            ray_trainer.compute_advantage(data, adv_estimator=f"prefkern_{name}", config=AlgoConfig())
    data.non_tensor_batch["scores"] = np.array([0.5, None] * 4, dtype=object)
    with pytest.raises(ValueError, match=r"scores of verl's batch is \[0\.5, None.*a number for every completion"):
        ray_trainer.compute_advantage(data, adv_estimator="prefkern_dagrpo", config=AlgoConfig())
    del data.non_tensor_batch["scores"]
    with pytest.raises(ValueError, match="recipe 'dagrpo' needs 'scores', which is not in verl's batch"):
        ray_trainer.compute_advantage(data, adv_estimator="prefkern_dagrpo", config=AlgoConfig())
    del data.non_tensor_batch["uid"]
    with pytest.raises(ValueError, match="recipe 'grpo' needs groups, but verl's batch has no uid"):
        ray_trainer.compute_advantage(data, adv_estimator="prefkern_grpo", config=AlgoConfig())


def test_gtpo_without_entropies(whole_batch):
    """Conflict weights alone: on what right and wrong completions share, the right have twice the advantage, the wrong none."""
    rollout, logp, entropy = make()
    integration.register(["gtpo:gamma=0,threshold=1e9"])
    data = ray_trainer.compute_advantage(proto(rollout), adv_estimator="prefkern_gtpo", config=AlgoConfig())
    recipe = load_recipe("gtpo", gamma=0, threshold=1e9)
    prepared = recipe.prepare(rollout)
    assert set(prepared["weights"][MASK].tolist()) == {0.0, 1.0, 2.0}
    assert_close(data.batch["advantages"], prepared["advantages"][:, None] * prepared["weights"] * MASK)
    expected = value_and_gradient(lambda leaf: recipe.loss(leaf, prepared, entropy=entropy), logp)
    actual = losses("prefkern_gtpo", rollout, data.batch["advantages"], logp, agg="seq-mean-token-mean")
    assert_close(actual[1], expected[1], rtol=1e-7, atol=1e-9)


def test_a_group_of_one_has_no_advantage():
    """verl's own has its reward."""
    rewards, mask = torch.tensor([0.3, 1, 0], dtype=F64), torch.ones(3, 2)
    arguments = {
        "token_level_rewards": at_the_end(rewards, mask.long()),
        "response_mask": mask,
        "index": np.array(["a", "b", "b"]),
    }
    ours, theirs = (core_algos.get_adv_estimator_fn(name)(**arguments)[0] for name in ("prefkern_grpo", "grpo"))
    assert ours[0].tolist() == [0, 0]
    assert_close(theirs[0], torch.tensor([0.3, 0.3], dtype=F64), rtol=1e-5, atol=0)
    assert_close(ours[1:], theirs[1:])


def test_groups_that_dapo_drops_have_no_advantage():
    """Where all are right, the punishment of a long one must not become a signal."""
    rollout, _, _ = make()
    integration.register(["dapo:max_length=5,cache=2"])
    rewards = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1.0], dtype=F64)
    advantages, _ = core_algos.get_adv_estimator_fn("prefkern_dapo")(
        at_the_end(rewards, MASK), MASK.long(), config=AlgoConfig(), index=uids(rollout.group)
    )
    assert (advantages[:4] == 0).all()
    assert_close(advantages[5:, 0], torch.tensor([0, -1, 1], dtype=F64) * advantages[7, 0])
    assert advantages[7, 0] > 1


class Queue:
    """verl's queue of transfers between its processes: ragged rows of every field, by key."""

    def __init__(self, rollout, entropy, columns):
        lengths = rollout.mask.sum(1).tolist()
        padded = {
            "response_mask": rollout.mask.long(), "rm_scores": at_the_end(rollout.rewards, rollout.mask),
            "rollout_log_probs": rollout.old_logp, "old_log_probs": rollout.old_logp, "ref_log_prob": rollout.ref_logp,
            "values": rollout.extra["values"], "responses": rollout.tokens, "entropy": entropy,
        }  # fmt: skip
        self.fields = {
            name: torch.nested.as_nested_tensor([row[:n] for row, n in zip(rows, lengths, strict=True)], layout=torch.jagged)
            for name, rows in padded.items()
        }
        self.others = {
            "uid": uids(rollout.group).tolist(),
            "extra_fields": [{"reward_extra_info": {k: v[i].item() for k, v in columns.items()}} for i in range(len(lengths))],
        }
        self.asked = []

    def kv_batch_get(self, *, keys, partition_id, select_fields):
        self.asked.append(select_fields)
        data = TensorDict({name: self.fields[name] for name in select_fields if name in self.fields}, batch_size=len(keys))
        for name in set(select_fields) & set(self.others):
            data[name] = NonTensorStack(*[NonTensorData(value) for value in self.others[name]])
        return data

    def kv_batch_put(self, *, keys, partition_id, fields):
        self.fields |= dict(fields.items())
        return keys


class Keys(list):
    """What the trainer holds of a batch."""

    def __init__(self):
        super().__init__(f"uid{i}_0_0" for i in range(8))
        self.keys, self.partition_id = list(self), "train"


def in_the_new_trainer(monkeypatch, recipe, entropy=None, columns=None, **algorithm):
    """(advantages, fields asked for) of its method, on a queue that has what it keeps."""
    rollout, _, high = make()
    queue = Queue(rollout, high if entropy is None else entropy, columns or {})
    monkeypatch.setattr(trainer_base, "tq", queue)
    integration.register([recipe])
    algorithm = {"adv_estimator": f"prefkern_{recipe.partition(':')[0]}", "gamma": 1.0, "lam": 1.0, "use_kl_in_reward": False,
                 **algorithm}  # fmt: skip
    config = OmegaConf.create({"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": 4}}})
    trainer_base.PPOTrainer._compute_advantage(types.SimpleNamespace(config=config), Keys(), {})
    return queue.fields["advantages"].to_padded_tensor(0.0), queue.asked


@pytest.mark.parametrize("name", ["grpo", "ngrpo", "opo", "reg_grpo", "reinforce_pp"])
def test_the_new_trainer(name, monkeypatch):
    advantages, asked = in_the_new_trainer(monkeypatch, name)
    rollout, _, _ = make()
    expected = recipes()[name].advantages(rollout)
    assert_close(advantages, (expected if expected.dim() == 2 else expected[:, None]) * MASK)
    assert len(asked) == 1


def test_the_new_trainer_passes_what_it_keeps(monkeypatch, whole_batch):
    """Token ids, entropies, rewards by name and columns that its own method does not ask for."""
    rollout, logp, entropy = make()
    columns = {"a": rollout.rewards, "b": rollout.rewards.flip(0)} | {
        key: value for key, value in rollout.extra.items() if value.dim() == 1
    }
    for text, options, fields in (
        ("gtpo", {}, ["responses", "entropy"]),
        ("gtpo:gamma=0,threshold=1e9", {}, ["responses"]),
        ("gdpo", {"gdpo_reward_keys": ["a", "b"]}, ["extra_fields"]),
        ("otc:c=3.0", {}, ["extra_fields"]),
        ("dagrpo", {}, ["extra_fields"]),
        ("gigpo", {}, ["extra_fields"]),
        ("cgpo:kl_max=5.0", {}, ["extra_fields"]),
        ("ppo", {}, None),
        ("grpo", {}, None),
    ):
        advantages, asked = in_the_new_trainer(monkeypatch, text, columns=columns, **options)
        assert asked[:-1] == ([] if fields is None else [fields])
        recipe, mine = load_recipe(text), rollout
        if text == "gdpo":
            mine = type(rollout)(**{**vars(rollout), "rewards": torch.stack([columns["a"], columns["b"]], 1)})
        prepared = recipe.prepare(mine)
        expected = value_and_gradient(lambda leaf, r=recipe, p=prepared: r.loss(leaf, p, entropy=entropy), logp)
        own = token_loss(recipe, "verl")
        actual = losses(f"prefkern_{recipe.name}", rollout, advantages, logp, agg=own.agg)
        assert expected[1].abs().max() > 1e-4
        assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------- against verl's own


@pytest.mark.parametrize(("text", "theirs", "options"), [
    ("grpo", "grpo", {}),
    ("dr_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
    ("rloo", "rloo", {}),
    ("opo", "opo", {}),
    ("gpg", "gpg", {}),
    ("reinforce_pp", "reinforce_plus_plus", {}),
    ("reinforce_pp:gamma=0.9", "reinforce_plus_plus", {"gamma": 0.9}),
    ("reinforce_pp:variant=baseline", "reinforce_plus_plus_baseline", {}),
    ("gdpo:eps=1e-6,batch_norm=token", "gdpo", {"gdpo_reward_keys": ["score", "shaped"], "gdpo_reward_weights": [1.0, 0.5]}),
    ("ppo:gamma=0.97,lam=0.9", "gae", {"gamma": 0.97, "lam": 0.9}),
])  # fmt: skip
def test_advantages_equal_verls(text, theirs, options, whole_batch):
    rollout, _, _ = make()
    several = {"score": rollout.rewards.numpy(), "shaped": rollout.rewards.flip(0).numpy()}
    integration.register([text])
    config = AlgoConfig(**options)
    common = {"gamma": config.gamma, "lam": config.lam, "norm_adv_by_std_in_grpo": config.norm_adv_by_std_in_grpo}
    results = []
    for name in (theirs, f"prefkern_{text.partition(':')[0]}"):
        data = proto(rollout, several=several)
        data.batch["prompts"] = torch.zeros(8, 2, dtype=torch.long)
        data.batch["attention_mask"] = torch.cat([torch.ones(8, 2).long(), MASK.long()], 1)
        data.batch["response_mask"] = MASK.to(F64)
        if name == theirs and theirs not in ("gae", "grpo"):  # its function takes the setting only from the config
            common.pop("lam", None)
        out = ray_trainer.compute_advantage(data, adv_estimator=name, config=config, **common)
        results.append((out.batch["advantages"] * MASK, out.batch["returns"] * MASK))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert expected.abs().max() > 0.1
        tolerance = 1e-5 if theirs in ("gpg", "gdpo") else 1e-9  # in float32 in verl, whatever the rewards
        assert_close(actual.to(F64), expected.to(F64), rtol=tolerance, atol=tolerance)


BOUNDS = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
EQUALS = {
    "ppo": ("vanilla", "ppo", {}),
    "ppo with other bounds": ("vanilla", "ppo:eps_high=0.28,dual_clip=1.5", BOUNDS | {"clip_ratio_c": 1.5}),
    "gspo": (
        "gspo", "gspo:token=True,eps_low=0.02,eps_high=0.03,ratio_clamp=(None, 10.0)",
        {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03},
    ),
    "sapo": ("sapo", "sapo:tau_pos=1.5,tau_neg=1.6", {"tau_pos": 1.5, "tau_neg": 1.6}),
    "gpg": ("gpg", "gpg", {}),
    "cispo": ("cispo", "cispo:variant=verl,eps_high=0.28", BOUNDS),
}  # fmt: skip
AGGREGATIONS = {  # verl's sapo has only the one, whatever is asked for
    "token-mean": {},
    "token-sum": {},
    "seq-mean-token-sum": {},
    "seq-mean-token-sum-norm": {},
    "seq-mean-token-mean": {},
    "token-mean of a global batch": {"batch_num_tokens": 170, "dp_size": 4},
    "token-sum of a global batch": {"batch_num_tokens": 170, "dp_size": 4},
    "seq-mean-token-sum of a global batch": {"global_batch_size": 24, "dp_size": 4},
    "seq-mean-token-mean of a global batch": {"global_batch_size": 24, "dp_size": 4},
    "seq-mean-token-sum-norm with a factor": {"loss_scale_factor": 100},
    "seq-mean-token-sum-norm of a global batch": {"loss_scale_factor": 100, "global_batch_size": 24, "dp_size": 4},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("name", "case"), [
    (name, case) for name in EQUALS for case in AGGREGATIONS if name != "sapo" or case.startswith("seq-mean-token-mean")
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:prefkern_")
def test_losses_equal_verls(name, case, weighted):
    theirs, text, options = EQUALS[name]
    agg, config = case.split(" ")[0], actor(AGGREGATIONS[case], **options)
    rollout, logp, _ = make(1)
    rollout.old_logp[:, 2] -= 1  # ratios up to 4
    integration.register([text])
    advantages = torch.linspace(-1, 1, MASK.numel(), dtype=F64).view(MASK.shape)
    weights = torch.linspace(0, 2, MASK.numel(), dtype=F64).view(MASK.shape) if weighted else None
    their = [losses(theirs, rollout, advantages, logp, config, agg, weights)]
    ours = losses(f"prefkern_{text.partition(':')[0]}", rollout, advantages, logp, config, agg, weights)
    for actual, expected in zip(ours[:2], their[0][:2], strict=True):
        assert expected.abs().max() > 1e-4
        tolerance = 2e-8 if agg == "seq-mean-token-mean" else 1e-9  # its 1e-8 is lost in float32 with a mask of bools
        assert_close(actual, expected, rtol=tolerance, atol=1e-10)
    for key, value in their[0][2].items():
        assert ours[2][key] == pytest.approx(value, rel=1e-6)
    if name.startswith("ppo"):
        assert min(ours[2]["actor/pg_clipfrac"], ours[2]["actor/pg_clipfrac_lower"]) > 0


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-sum-norm"])
def test_gmpo_is_geo_mean(agg, weighted):
    """The mean over completions, whatever `loss_agg_mode` says, in both."""
    rollout, logp, _ = make(2)
    integration.register(["gmpo:eps_low=0.2,eps_high=0.28"])
    advantages = torch.linspace(-1, 1, 8, dtype=F64)[:, None].expand(MASK.shape) * MASK
    weights = torch.linspace(0.1, 2, MASK.numel(), dtype=F64).view(MASK.shape) if weighted else None
    theirs = losses("geo_mean", rollout, advantages, logp, actor(**BOUNDS), agg, weights)
    ours = losses("prefkern_gmpo", rollout, advantages, logp, actor(**BOUNDS), agg, weights)
    assert_close(ours[0], theirs[0], rtol=3e-8, atol=1e-9)
    assert_close(ours[1], theirs[1], rtol=3e-8, atol=1e-9)
    assert ours[2]["actor/ppo_kl"] == pytest.approx(theirs[2]["actor/ppo_kl"])


@pytest.mark.parametrize("name", ["gmpo", "rloo"])
def test_micro_batches_of_whole_completions_sum_up(name):
    """Losses with one value per completion, over the global batch: what verl's own geo_mean leaves out."""
    rollout, logp, _ = make(3)
    advantages = torch.linspace(-1, 1, 8, dtype=F64)[:, None] * MASK
    whole = losses(f"prefkern_{name}", rollout, advantages, logp, actor({"global_batch_size": 8, "dp_size": 1}))
    total = 0
    for rows in (slice(0, 3), slice(3, 8)):
        part = type(rollout)(**{**vars(rollout), "old_logp": rollout.old_logp[rows], "mask": MASK[rows]})
        info = {"global_batch_size": 8, "dp_size": 1}
        total += losses(f"prefkern_{name}", part, advantages[rows], logp[rows], actor(info))[0]
    assert_close(total, whole[0])
    assert_close(losses(f"prefkern_{name}", rollout, advantages, logp)[0], whole[0])


def test_losses_of_whole_completions_refuse_token_advantages():
    rollout, logp, _ = make()
    for name in ("gmpo", "rloo", "gspo"):
        with pytest.raises(ValueError, match="one value for all tokens of a row"):
            losses(f"prefkern_{name}", rollout, logp, logp, agg="seq-mean-token-mean")


# ------------------------------------------------------------------------------------------------------ settings of both


def test_settings_that_contradict_the_recipe():
    rollout, logp, _ = make()
    for name, options, message in (
        ("grpo", {"clip_ratio_high": 0.28}, "actor.clip_ratio_high is 0.28, but prefkern_grpo uses 0.2"),
        ("grpo", {"clip_ratio_c": 10.0}, "actor.clip_ratio_c is 10.0, but prefkern_grpo uses None"),
        ("ppo", {"clip_ratio_low": 0.1}, "actor.clip_ratio_low is 0.1, but prefkern_ppo uses 0.2"),
        ("sapo", {"tau_neg": 2.0}, "actor.tau_neg is 2.0, but prefkern_sapo uses 1.05"),
        ("gpg", {"clip_ratio_low": 0.1}, "actor.clip_ratio_low is 0.1, but prefkern_gpg uses None"),
    ):
        with pytest.raises(ValueError, match=message):
            losses(f"prefkern_{name}", rollout, rollout.old_logp, logp, actor(**options))
    integration.register(["grpo:eps_high=0.28"])
    losses("prefkern_grpo", rollout, rollout.old_logp, logp, actor(clip_ratio_high=0.28), "seq-mean-token-mean")


def test_another_aggregation_than_the_recipes_is_said_once():
    rollout, logp, _ = make()
    with pytest.warns(
        UserWarning, match="sums up tokens by seq-mean-token-mean, but actor.loss_agg_mode is token-mean"
    ) as seen:
        for _ in range(2):
            losses("prefkern_grpo", rollout, rollout.old_logp, logp)
    assert len(seen) == 1


def test_dr_grpo_divides_by_one_length():
    rollout, logp, _ = make()
    integration.register(["dr_grpo:max_length=100"])
    with pytest.raises(ValueError, match=r"actor\.loss_scale_factor is None, but prefkern_dr_grpo divides by 100"):
        losses("prefkern_dr_grpo", rollout, rollout.old_logp, logp, agg="seq-mean-token-sum-norm")
    config = actor({"loss_scale_factor": 100})
    by_hundred = losses("prefkern_dr_grpo", rollout, rollout.old_logp, logp, config, "seq-mean-token-sum-norm")
    integration.register(["dr_grpo"])
    by_columns = losses("prefkern_dr_grpo", rollout, rollout.old_logp, logp, agg="seq-mean-token-sum-norm")
    assert_close(by_hundred[0] * 100, by_columns[0] * MASK.shape[1])


def test_several_ranks_need_the_size_of_the_global_batch():
    rollout, logp, _ = make()
    for name, agg, missing in (
        ("dapo", "token-mean", "batch_num_tokens"),
        ("grpo", "seq-mean-token-mean", "global_batch_size"),
        ("gmpo", "token-mean", "global_batch_size"),
    ):
        with pytest.raises(ValueError, match=f"{missing} is None in actor.global_batch_info"):
            losses(f"prefkern_{name}", rollout, rollout.old_logp * 0, logp, actor({"dp_size": 2}), agg)


def test_a_kl_is_verls_to_add():
    rollout, logp, _ = make()
    for text in ("grpo:beta=0.04", "rloo:beta=0.05"):
        with pytest.raises(ValueError, match=rf"recipe '{text[:4]}' has beta 0\.0.; verl adds the KL"):
            integration.register([text])
    recipe = load_recipe("grpo", beta=0.04)
    with pytest.raises(ValueError, match=r"recipe 'grpo' has beta 0\.04: verl's loss hook does not receive the reference's"):
        integration.PolicyLoss("mine", recipe)(rollout.old_logp, logp, rollout.old_logp, MASK)
    with pytest.raises(ValueError, match=r"recipe 'grpo' has beta 0\.04; verl adds the KL"):
        integration.Estimator("mine", recipe)(logp, MASK, index=uids(rollout.group))


def test_settings_of_the_algorithm_that_contradict_the_recipe():
    rollout, _, _ = make()
    for name, options, message in (
        ("reinforce_pp", {"gamma": 0.9}, "algorithm.gamma is 0.9, but prefkern_reinforce_pp has gamma 1.0"),
        ("ppo", {"lam": 0.9}, "algorithm.lam is 0.9, but prefkern_ppo has lam 1.0"),
        ("grpo", {"norm_adv_by_std_in_grpo": False}, "algorithm.norm_adv_by_std_in_grpo is False, but prefkern_grpo divides"),
    ):
        with pytest.raises(ValueError, match=message):
            ray_trainer.compute_advantage(proto(rollout), adv_estimator=f"prefkern_{name}", config=AlgoConfig(**options))


# -------------------------------------------------------------------------------------------------------- a whole actor


class Tiny(torch.nn.Module):
    """Embedding, one layer, head."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        torch.manual_seed(5)
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.mix = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids))[0])


PROMPT = 2


def log_probs(model, ids, attention):
    """What verl's engine returns, flat: every token's place, with the log-prob of the token after it."""
    logits = model(ids).log_softmax(-1)
    after = ids.roll(-1, 1)
    logp = logits.gather(-1, after[..., None])[..., 0]
    return logp[attention.bool()]


def worker_batch(ids, attention, rollout_mask, old, ref, advantages, info, weights=None):
    tensors = {
        "prompts": ids[:, :PROMPT], "responses": ids[:, PROMPT:], "attention_mask": attention, "response_mask": rollout_mask,
        "old_log_probs": old, "ref_log_prob": ref, "advantages": advantages,
    }  # fmt: skip
    if weights is not None:
        tensors["rollout_is_weights"] = weights
    data = TensorDict({key: value.clone() for key, value in tensors.items()}, batch_size=len(ids))
    for key, value in ({"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None} | info).items():
        data.set_non_tensor(key, value)
    return data


def train(loss_mode, estimator, steps, agg="token-mean", micro=1, **options):
    """Losses, metrics and parameters of a tiny model after some steps with verl's advantage and loss functions."""
    model = Tiny()
    reference = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(3)
    config = actor(policy_loss=PolicyLossConfig(loss_mode=loss_mode), loss_agg_mode=agg, **options)
    trace = []
    for _ in range(steps):
        ids = torch.randint(0, 11, (8, PROMPT + 6), generator=generator)
        attention = torch.cat([torch.ones(8, PROMPT).long(), MASK.long()], 1)
        rewards = (ids[:, PROMPT:] % 3 == 0).float().where(MASK, 0.0).sum(1)
        data = DataProto.from_dict(
            tensors={"token_level_rewards": at_the_end(rewards, MASK), "response_mask": MASK.long()},
            non_tensors={"uid": uids(torch.arange(8) // 4)},
        )
        data = ray_trainer.compute_advantage(data, adv_estimator=estimator, config=AlgoConfig())
        with torch.no_grad():
            old = torch.zeros(8, 6)
            old[MASK] = flat_response(log_probs(model, ids, attention), attention)
        for _ in range(2):  # the second step is off-policy
            optimiser.zero_grad()
            total, metrics = 0.0, {}
            for rows in torch.arange(8).chunk(micro):
                info = {"batch_num_tokens": int(MASK.sum()), "global_batch_size": 8}
                batch = worker_batch(
                    ids[rows],
                    attention[rows],
                    MASK[rows].long(),
                    old[rows],
                    old[rows] - 0.1,
                    data.batch["advantages"][rows],
                    info,
                )
                loss, metrics = ppo_loss(config, {"log_probs": log_probs(model, ids[rows], attention[rows])}, batch)
                loss.backward()
                total += loss.item()
            optimiser.step()
            trace.append((total, metrics["actor/ppo_kl"].aggregate(), metrics["actor/pg_clipfrac"].aggregate()))
    moved = sum(((p.detach() - q) ** 2).sum() for p, q in zip(model.parameters(), reference, strict=True)).sqrt().item()
    return trace, torch.cat([p.detach().flatten() for p in model.parameters()]), moved


def flat_response(flat, attention):
    """Of all places those before a response token, in order."""
    before = torch.zeros_like(attention, dtype=torch.bool)
    before[:, PROMPT - 1 : -1] = attention[:, PROMPT:].bool()
    return flat[before[attention.bool()]]


@pytest.mark.parametrize(("ours", "theirs", "agg", "options"), [
    ("ppo", "vanilla", "token-mean", {}),
    ("ppo", "vanilla", "seq-mean-token-sum", {"use_kl_loss": True, "kl_loss_coef": 0.1}),
    ("gpg", "gpg", "token-mean", {}),
])  # fmt: skip
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.filterwarnings("ignore:prefkern_")
def test_training_equals_verls(ours, theirs, agg, options, micro):
    """Three rollouts, two steps each, through verl's `compute_advantage` and its workers' `ppo_loss`."""
    if theirs == "gpg":  # returns no metrics
        theirs_name = "vanilla_gpg"
        core_algos.POLICY_LOSS_REGISTRY[theirs_name] = lambda **k: (
            core_algos.get_policy_loss_fn("gpg")(**k)[0], {"actor/ppo_kl": 0.0, "actor/pg_clipfrac": 0.0},
        )  # fmt: skip
    else:
        theirs_name = theirs
    integration.register(["grpo:eps=1e-6"])
    trace, parameters, moved = train(f"prefkern_{ours}", "prefkern_grpo", 3, agg, micro, **options)
    their_trace, their_parameters, _ = train(theirs_name, "grpo", 3, agg, micro, **options)
    assert moved > 0.1
    assert_close(parameters, their_parameters, rtol=1e-4, atol=2e-6)
    for mine, other in zip(trace, their_trace, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6)
        if theirs != "gpg":
            assert mine[1:] == pytest.approx(other[1:], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["ngrpo", "dapo", "sapo", "gspo", "gmpo", "cispo", "rloo", "opo", "dr_grpo"])
def test_training_with_recipes_that_verl_lacks(name):
    """Two updates of verl's, in one micro-batch or two."""
    own = token_loss(recipes()[name], "verl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace, _, moved = train(f"prefkern_{name}", f"prefkern_{name}", 1, own.agg, micro=2)
        whole, _, _ = train(f"prefkern_{name}", f"prefkern_{name}", 1, own.agg, micro=1)
    assert moved > 1e-3
    assert [t[0] for t in trace] == pytest.approx([t[0] for t in whole], rel=1e-4, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------- head


@pytest.fixture
def head():
    integration.patch_head()
    yield
    integration.unpatch_head()


def head_inputs(dtype=F32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 16, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(37, 16, generator=generator) / 2).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 37, (2, 7), generator=generator)


def definition(hidden, weight, labels, temperature):
    logits = (hidden.double() @ weight.double().T) / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_fused_linear_for_ppo(backend, dtype, head):
    hidden, weight, labels = head_inputs(dtype)
    logp, entropy = FusedLinearForPPO(impl_backend=backend)(hidden, weight, labels, temperature=0.7)
    expected = definition(hidden, weight, labels, 0.7)
    assert logp.shape == entropy.shape == labels.shape
    assert logp.dtype == entropy.dtype == F32
    upstream = torch.linspace(-1, 1, 14).view(2, 7)
    for actual, wanted in zip((logp, entropy), expected, strict=True):
        assert_close(actual.double(), wanted, rtol=0, atol=1e-4)
    gradients = torch.autograd.grad((logp * upstream + 0.3 * entropy).sum(), (hidden, weight))
    exact = torch.autograd.grad((expected[0] * upstream + 0.3 * expected[1]).sum(), (hidden, weight))
    for actual, wanted in zip(gradients, exact, strict=True):
        assert_close(actual, wanted, rtol=2e-2 if dtype != F32 else 1e-4, atol=2e-2 if dtype != F32 else 1e-5)


def test_fused_linear_for_ppo_equals_verls():
    hidden, weight, labels = head_inputs()

    def run():
        logp, entropy = FusedLinearForPPO()(hidden, weight, labels, temperature=0.7)
        return logp, entropy, *torch.autograd.grad((logp - 0.1 * entropy).sum(), (hidden, weight))

    theirs = run()
    integration.patch_head()
    try:
        ours = run()
        assert FusedLinearForPPO.forward is integration._fused_forward
    finally:
        integration.unpatch_head()
    assert FusedLinearForPPO.forward is not integration._fused_forward
    for mine, their in zip(ours, theirs, strict=True):
        assert_close(mine, their, rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_is_replaced_where_it_was_imported(monkeypatch):
    original = kernel.linear_cross_entropy
    by_name = type(sys)("verl.some_model")
    by_name.linear_cross_entropy = original
    monkeypatch.setitem(sys.modules, "verl.some_model", by_name)
    integration.patch_head()
    integration.patch_head()
    assert kernel.linear_cross_entropy is by_name.linear_cross_entropy is integration.linear_cross_entropy
    integration.unpatch_head()
    assert kernel.linear_cross_entropy is by_name.linear_cross_entropy is original
    assert list(inspect.signature(integration.linear_cross_entropy).parameters) == [
        name for name in inspect.signature(kernel.LinearCrossEntropy.forward).parameters if name != "ctx"
    ]


def test_linear_cross_entropy(head):
    """Flat log-probs, not their negatives, and entropies, as the kernel it stands in for; that one runs on a GPU only."""
    hidden, weight, labels = head_inputs()
    expected = definition(hidden, weight, labels, 0.7)
    logp, entropy = kernel.linear_cross_entropy(hidden, weight, labels, 0.7, "none", None)
    assert_close(logp.double(), expected[0].flatten(), rtol=0, atol=1e-5)
    assert_close(entropy.double(), expected[1].flatten(), rtol=0, atol=1e-5)
    for reduction, reduce in (("sum", torch.sum), ("mean", torch.mean)):
        logp, entropy = kernel.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
        assert_close(logp.double(), reduce(expected[0]), rtol=1e-5, atol=1e-5)
        assert entropy.shape == (14,)
    with pytest.raises(ValueError, match="reduction is 'max'"):
        kernel.linear_cross_entropy(hidden, weight, labels, 0.7, "max")


def test_a_models_fused_forward(head):
    """verl's forward of a causal LM, for both of its backends."""
    transformers = pytest.importorskip("transformers")
    from verl.models.transformers import dense_common

    config = transformers.LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 37, (1, 9))
    logits = model(input_ids=ids).logits
    expected = (logits / 0.7).log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    for forward in (dense_common.forward_with_torch_backend, dense_common.forward_with_triton_backend):
        out = forward(model, input_ids=ids, temperature=0.7, return_dict=True)
        assert_close(out.log_probs.view(1, 9), expected, rtol=1e-5, atol=1e-5)
        out.log_probs.sum().backward()
        assert model.lm_head.weight.grad.abs().max() > 0
        model.zero_grad()


def test_a_group_of_one_process(head, tmp_path):
    """Megatron passes its group always."""
    hidden, weight, labels = head_inputs()
    expected = definition(hidden, weight, labels, 0.7)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        logp, _ = kernel.linear_cross_entropy(hidden.transpose(0, 1), weight, labels.T.contiguous(), 0.7, "none", group)
        assert_close(logp.view(7, 2).T.double(), expected[0], rtol=0, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif("group" not in inspect.signature(prefkern.linear_logprobs).parameters, reason="no group= yet")
def test_a_weight_in_shards():
    """Of one size, as Megatron pads them."""
    hidden, weight, labels = head_inputs()
    weight, labels = weight.detach()[:36].requires_grad_(), labels.clamp_max(35)
    expected = definition(hidden, weight, labels, 0.7)
    gradients = torch.autograd.grad(expected[0].sum() + 0.1 * expected[1].sum(), (hidden, weight))
    results = run_ranks(sharded_head, 2, hidden.detach(), weight.detach(), labels)
    for logp, entropy, total, _ in results:
        assert_close(logp.double(), expected[0].flatten(), rtol=0, atol=1e-5)
        assert_close(entropy.double(), expected[1].flatten(), rtol=0, atol=1e-5)
        assert_close(total, gradients[0], rtol=1e-4, atol=1e-5)
    assert_close(torch.cat([r[3] for r in results]), gradients[1], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- configuration, docs


@functools.cache
def verls_configuration():
    path = os.path.join(os.path.dirname(verl.__file__), "trainer", "config", "_generated_ppo_trainer.yaml")
    return OmegaConf.load(path)


def whole_configuration(*overrides, sections=None):
    """verl's own, or some sections of it, from its file, with overrides as on its command line."""
    config = verls_configuration()
    given = OmegaConf.from_dotlist(list(overrides))
    for path in flat(given):
        assert OmegaConf.select(config, path, default="absent") != "absent", f"verl has no setting {path}"
    whole = config if sections is None else OmegaConf.masked_copy(config, sections)
    return OmegaConf.merge(copy.deepcopy(whole), given)


def flat(config, before=""):
    """The paths of all values."""
    return [
        path
        for key, value in config.items()
        for path in (flat(value, f"{before}{key}.") if hasattr(value, "items") else [f"{before}{key}"])
    ]


def test_through_verls_configuration():
    from verl.utils.config import omega_conf_to_dataclass

    config = whole_configuration(
        "algorithm.adv_estimator=prefkern_ngrpo", "actor_rollout_ref.actor.policy_loss.loss_mode=prefkern_ngrpo"
    )
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 8
    rollout, logp, _ = make()
    data = ray_trainer.compute_advantage(proto(rollout), adv_estimator=config.algorithm.adv_estimator, config=config.algorithm)
    chosen = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    ids = torch.ones(8, PROMPT + 6, dtype=torch.long)
    attention = torch.cat([torch.ones(8, PROMPT).long(), MASK.long()], 1)
    batch = worker_batch(
        ids, attention, MASK.long(), rollout.old_logp, rollout.ref_logp, data.batch["advantages"],
        {"batch_num_tokens": int(MASK.sum()), "global_batch_size": 8},
    )  # fmt: skip
    places = torch.zeros(attention.shape, dtype=F64)
    places[:, PROMPT - 1 : -1] = logp
    loss, metrics = ppo_loss(chosen, {"log_probs": places[attention.bool()]}, batch)
    recipe = recipes()["ngrpo"]
    assert_close(loss, recipe.loss(logp, recipe.prepare(rollout)).loss)
    assert metrics["actor/pg_loss"].aggregate() == pytest.approx(loss.item())


def selection(estimator, mode, *, whole=False, **settings):
    """A configuration that selects these, as verl's command line makes it."""
    keys = {"adv_estimator": "algorithm.", "gamma": "algorithm.", "use_v1": "trainer."}
    given = {"adv_estimator": f"prefkern_{estimator}", **settings}
    overrides = [f"{keys.get(key, 'actor_rollout_ref.actor.')}{key}={value}" for key, value in given.items()]
    overrides.append(f"actor_rollout_ref.actor.policy_loss.loss_mode=prefkern_{mode}")
    config = whole_configuration(*overrides, sections=None if whole else ["algorithm", "actor_rollout_ref", "trainer"])
    for section, key in ((config.actor_rollout_ref.actor, "ppo_micro_batch_size_per_gpu"),
                         (config.actor_rollout_ref.rollout, "log_prob_micro_batch_size_per_gpu")):  # fmt: skip
        section[key] = 1
    return config


def test_selections_are_refused_before_anything_starts():
    """By verl's own validation of its configuration."""
    from verl.utils import config as verl_config

    def start(*args, **settings):
        integration.validate(selection(*args, **settings))

    def start_verl(*args, **settings):
        config = selection(*args, whole=True, **settings)
        verl_config.validate_config(config, use_reference_policy=False, use_critic=False)

    start_verl("grpo", "gspo", loss_agg_mode="seq-mean-token-mean")
    with pytest.raises(ValueError, match="recipe 'trpa' has no loss for verl"):
        start_verl("grpo", "trpa")
    start("ngrpo", "ngrpo")
    start("reinforce_pp", "ppo")
    start("dgpo", "dgpo")
    start("gtpo", "gtpo", loss_agg_mode="seq-mean-token-mean", use_v1="false")
    for arguments, settings, message in (
        (("grpo", "trpa"), {}, "recipe 'trpa' has no loss for verl: its loss compares the completions of a group"),
        (("reg_grpo", "reg_grpo"), {}, "recipe 'reg_grpo' has no loss for verl"),
        (("grpo", "etr"), {}, "recipe 'etr' has no loss for verl: its clip bounds"),
        (("copg", "grpo"), {}, "recipe 'copg' has no loss for verl"),
        (("grpo", "ngrop"), {}, "loss_mode is 'prefkern_ngrop', which is not registered; did you mean 'prefkern_ngrpo'"),
        (("ngrop", "grpo"), {}, "adv_estimator is 'prefkern_ngrop', which is not registered; did you mean 'prefkern_ngrpo'"),
        (("gtpo", "gtpo"), {}, "recipe 'gtpo' needs responses, entropy of the batch for its advantages"),
        (("gdpo", "gdpo"), {}, "recipe 'gdpo' needs several rewards: name them in algorithm.gdpo_reward_keys"),
        (("otc", "otc"), {}, "recipe 'otc' needs extra_fields of the batch for its advantages"),
        (("ppo", "ppo"), {}, "recipe 'ppo' needs values of the batch for its advantages"),
        (("grpo", "grpo"), {"clip_ratio_high": "0.28"}, "actor.clip_ratio_high is 0.28, but prefkern_grpo uses 0.2"),
        (("reinforce_pp", "grpo"), {"gamma": "0.9"}, "algorithm.gamma is 0.9, but prefkern_reinforce_pp has gamma 1.0"),
    ):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=re.escape(message)):
            warnings.simplefilter("ignore")
            start(*arguments, **settings)
    integration.register(["dr_grpo:max_length=100"])
    options = {"loss_agg_mode": "seq-mean-token-sum-norm"}
    start("dr_grpo", "dr_grpo", loss_scale_factor="100", **options)
    with pytest.raises(ValueError, match=r"actor\.loss_scale_factor is None"):
        start("dr_grpo", "dr_grpo", **options)
    config = selection("grpo", "grpo")
    config.algorithm.adv_estimator = config.actor_rollout_ref.actor.policy_loss.loss_mode = "vanilla"
    config.actor_rollout_ref.actor.clip_ratio_high = 0.3
    integration.validate(config)


def test_the_page(monkeypatch):
    (command, exported) = blocks("verl.md", "bash")
    whole_configuration(*re.findall(r"[\w.]+=[\w-]+(?= |$)", command.split("main_ppo")[1].replace("\\\n", " "), re.MULTILINE))
    assert "VERL_USE_EXTERNAL_MODULES=prefkern.integrations.verl " in command
    name, _, value = exported.removeprefix("export ").strip().partition("=")
    assert name == integration.RECIPES_VARIABLE
    monkeypatch.setenv(name, value.strip('"'))
    integration._from_environment()
    assert core_algos.get_policy_loss_fn("prefkern_ngrpo").recipe.r_max == 2.0
    assert core_algos.get_policy_loss_fn("prefkern_strict").recipe.eps_high == 0.1
    try:
        for code in blocks("verl.md", "python"):
            exec(code, {})
        assert kernel.linear_cross_entropy is integration.linear_cross_entropy
        assert hasattr(ray_trainer.compute_advantage, "__wrapped__")
    finally:
        integration.unpatch_head()
        integration.unpass_batch()
    for path in paths("verl.md") - {"prefkern.integrations.verl"}:
        assert hasattr(integration, path.rpartition(".")[2])
    text = (DOCS / "verl.md").read_text()
    assert integration.BATCH_VARIABLE in text and integration.HEAD_VARIABLE in text
    assert {f"prefkern_{name}" for name in ("ngrpo", "grpo", "ppo", "strict")} <= set(re.findall(r"prefkern_\w+", text))
    for name in REFUSED:
        assert name in text
