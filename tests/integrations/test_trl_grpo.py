"""GRPO with recipes, in TRL's trainer: against TRL's own losses, and end to end."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from integrations.trl_tiny import build, dataset, history, rewards, save_model
from prefkern.integrations.trl import PrefkernGRPOTrainer, patch
from prefkern.papers import Rollout, load_recipe
from ranks import run_ranks


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def other_rewards(completions, **_):
    return [len(set(text.split())) / 6 for text in completions]


def right_or_wrong(completions, **_):
    return [float(i % 3 == 0) for i in range(len(completions))]


def train(path, output, recipe=None, **options):
    """(trainer, what each step logged, weights)"""
    own = {} if recipe is None else {"trainer": PrefkernGRPOTrainer, "trainer_options": {"recipe": recipe}}
    trainer = build("GRPO", path, output / str(recipe).split(":", maxsplit=1)[0], **own, **options)
    logged = history(trainer)
    return trainer, logged, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


SEVERAL = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4, "per_device_train_batch_size": 8}
SAME = {
    "dapo": ("grpo:eps=1e-4,agg=token-mean", {}),
    "dapo, higher": ("grpo:eps=1e-4,agg=token-mean,eps_low=0.01,eps_high=0.02", {"epsilon": 0.01, "epsilon_high": 0.02}),
    "dapo itself": ("dapo:eps=1e-4,dynamic_sampling=False", {"epsilon": 0.2, "epsilon_high": 0.28}),
    "grpo": ("grpo:eps=1e-4,agg=trl-grpo", {"loss_type": "grpo"}),
    "grpo, batch": ("grpo:eps=1e-6,scale=none", {"loss_type": "grpo", "scale_rewards": "none"}),
    "dr_grpo": ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "gspo": (
        "gspo:eps=1e-4,eps_low=0.001,eps_high=0.002",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.001, "epsilon_high": 0.002},
    ),
    "cispo": ("cispo:eps=1e-4,cap=1.001", {"loss_type": "cispo", "epsilon_high": 1.001}),
    "sapo": ("sapo:eps=1e-4", {"loss_type": "sapo"}),
}
WITH = {
    "plain": {"max_steps": 2},
    "several": SEVERAL,
    "kl": SEVERAL | {"beta": 0.2},
    "plain kl": {"beta": 0.2, "use_bias_correction_kl": False},
    "entropy": SEVERAL | {"entropy_coef": 0.1, "top_entropy_quantile": 0.6, "beta": 0.1},
    "adaptive": SEVERAL | {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef_delta": 0.1},
    "off-policy": SEVERAL | {"off_policy_mask_threshold": 1e-3},
    "shifted": {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 4},
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 12},
}
CASES = [(name, "several") for name in SAME] + [("dapo", how) for how in WITH if how != "several"]
CASES += [("grpo", "entropy"), ("dr_grpo", "kl"), ("gspo", "shifted"), ("cispo", "kl")]


@pytest.mark.parametrize(("name", "how"), CASES, ids=lambda x: x)
def test_recipes_that_trl_has_too(name, how, model_path, tmp_path):
    """The same training: losses, metrics, gradient norms, weights."""
    recipe, theirs = SAME[name]
    _, expected, their_weights = train(model_path, tmp_path, **theirs, **WITH[how])
    _, mine, weights = train(model_path, tmp_path, recipe, **WITH[how])
    assert len(mine) == len(expected) >= 2
    for a, b in zip(mine, expected, strict=True):
        missing = set(b.keys() - a.keys())
        assert missing <= {"clip_ratio/low_min", "clip_ratio/high_max", "cispo_clip_ratio"}
        if name == "gspo":  # TRL counts sequences that are clipped, the recipe their tokens
            missing = missing | {key for key in b if key.startswith("clip_ratio/")}
            assert (a["clip_ratio/high_mean"] > 0) == (b["clip_ratio/high_mean"] > 0)
        for key in b.keys() - missing:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-5), key
    assert any(entry["grad_norm"] > 1e-2 for entry in mine)
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


# ----------------------------------------------------------------------------------------------------------- end to end

RECIPES = [
    "grpo", "dapo:max_length=6,cache=3", "dr_grpo", "gspo", "gtpo:threshold=9.0", "gtpo:variant=code,threshold=9.0",
    "ngrpo:r_max=2.0", "gdpo", "dgpo",
    "cispo", "sapo", "gmpo", "gpg", "mo_grpo", "opo", "rloo", "rloo:level=token", "reinforce_pp",
    "reinforce_pp:variant=baseline", "etr", "reg_grpo", "disco:tau=None",
]  # fmt: skip


def loss_by_hand(trainer, recipe, inputs, rewards_per_function):
    """The recipe's loss of a batch that is a whole rollout, from the definition of each part."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    columns = inputs["completion_ids"].shape[1]
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -columns - 1 : -1]
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    rollout = Rollout(
        rewards=rewards_per_function if hasattr(recipe, "weights") else rewards_per_function.sum(1),
        group=torch.arange(len(ids)) // 4, mask=inputs["completion_mask"].bool(), old_logp=logp.detach(),
        tokens=inputs["completion_ids"],
    )  # fmt: skip
    return recipe.loss(logp, recipe.prepare(rollout), entropy=entropy).loss


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, model_path, tmp_path, monkeypatch):
    """Two steps, and the first loss and gradient are the recipe's of what was sampled."""
    seen = []
    compute = PrefkernGRPOTrainer._compute_loss
    scored = PrefkernGRPOTrainer._calculate_rewards

    def recorded_rewards(self, *args):
        found = scored(self, *args)
        seen.append(found.clone())
        return found

    def recorded(self, model, inputs):
        if self.state.global_step > 0:
            return compute(self, model, inputs)
        expected = loss_by_hand(self, self.recipe, inputs, seen[0])
        theirs = torch.autograd.grad(expected, list(self.model.parameters()), allow_unused=True)
        loss = compute(self, model, inputs)
        mine = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True, allow_unused=True)
        assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        assert sum(g.abs().sum() for g in theirs if g is not None) > 1e-3
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6
        return loss

    monkeypatch.setattr(PrefkernGRPOTrainer, "_compute_loss", recorded)
    monkeypatch.setattr(PrefkernGRPOTrainer, "_calculate_rewards", recorded_rewards)
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    functions = [right_or_wrong] if recipe.startswith("disco") else [rewards, other_rewards]
    trainer, logged, _ = train(model_path, tmp_path, recipe, per_device_train_batch_size=8, reward_funcs=functions)
    assert len(logged) == 2
    assert all(entry["grad_norm"] > 1e-3 for entry in logged)
    assert logged[0]["entropy"] > 1
    assert {"reward", *(f"rewards/{f.__name__}/mean" for f in functions), "frac_reward_zero_std"} <= logged[0].keys()
    assert any(key.startswith("recipe/") for key in logged[0])
    if hasattr(load_recipe(recipe), "weights"):
        assert trainer.recipe.weights == (1.0, 1.0)


def test_with_prefkerns_head(model_path, tmp_path):
    _, expected, their_weights = train(model_path, tmp_path, "gtpo:threshold=9.0")
    with patch() as handle:
        _, mine, weights = train(model_path, tmp_path / "patched", "gtpo:threshold=9.0")
    assert handle.calls == 2
    assert [a["grad_norm"] for a in mine] == pytest.approx([b["grad_norm"] for b in expected], rel=1e-4)
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


def test_gtpo_weights_and_metrics(model_path, tmp_path):
    """What `conflict_runs` needs goes through TRL's shuffling and splitting in step with the tokens."""
    batches = []

    class Seen(PrefkernGRPOTrainer):
        def _compute_loss(self, model, inputs):
            batches.append(inputs)
            return super()._compute_loss(model, inputs)

    build(
        "GRPO", model_path, tmp_path, trainer=Seen, trainer_options={"recipe": "gtpo:threshold=9.0"}, max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, data=dataset("GRPO", rows=4),
    ).train()  # fmt: skip
    whole = {key: torch.cat([b[key] for b in batches]) for key in ("completion_ids", "completion_mask", "recipe/group")}
    order = whole["recipe/group"].argsort(stable=True)
    advantages = torch.cat([b["recipe/advantages"] for b in batches])
    rollout = Rollout(
        rewards=advantages[order], group=whole["recipe/group"][order], mask=whole["completion_mask"][order].bool(),
        tokens=whole["completion_ids"][order],
    )  # fmt: skip
    expected = load_recipe("gtpo").prepare(rollout)
    assert_close(expected["advantages"], advantages[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(expected["weights"], torch.cat([b["recipe/weights"] for b in batches])[order])
    assert len(expected["weights"].unique()) > 1


def test_evaluation(model_path, tmp_path):
    trainer = build(
        "GRPO", model_path, tmp_path, trainer=PrefkernGRPOTrainer, trainer_options={"recipe": "ngrpo"}, max_steps=1,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    metrics = trainer.evaluate(dataset("GRPO", rows=2))
    assert metrics["eval_loss"] != 0
    assert "eval_recipe/ratio_mean" in metrics
    assert metrics["eval_clip_ratio/low_mean"] == 0


def test_logged_advantages_are_the_recipes(model_path, tmp_path):
    trainer, _, _ = train(model_path, tmp_path, "ngrpo", max_steps=1)
    assert len(trainer._logs["advantages"]) == 4
    assert abs(sum(trainer._logs["advantages"])) > 0.1  # TRL's are centred


def test_reward_weights(model_path, tmp_path):
    """Those of GRPOConfig become the recipe's, and the other way round."""
    functions = {"reward_funcs": [rewards, other_rewards]}
    trainer, expected, _ = train(model_path, tmp_path, "gdpo", reward_weights=[0.25, 2.0], **functions)
    assert trainer.recipe.weights == (0.25, 2.0)
    trainer, logged, _ = train(model_path, tmp_path / "other", "gdpo:weights=(0.25, 2.0)", **functions)
    assert trainer.reward_weights.tolist() == [0.25, 2.0]
    for a, b in zip(logged, expected, strict=True):
        assert (a["loss"], a["grad_norm"], a["reward"]) == (b["loss"], b["grad_norm"], b["reward"])
    with pytest.raises(ValueError, match="recipe 'gdpo' has weights, and GRPOConfig has reward_weights"):
        train(model_path, tmp_path, "gdpo:weights=(1.0, 2.0)", reward_weights=[1.0, 2.0], **functions)
    _, sums, _ = train(model_path, tmp_path, "grpo:eps=1e-4,agg=token-mean", reward_weights=[0.25, 2.0], **functions)
    _, theirs, _ = train(model_path, tmp_path, reward_weights=[0.25, 2.0], **functions)
    assert sums[1]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=1e-4)


def test_several_rewards_as_trl_does(model_path, tmp_path):
    """GDPO is TRL's normalize_then_sum."""
    options = {"reward_funcs": [rewards, other_rewards], "reward_weights": [1.0, 0.5], **SEVERAL}
    _, expected, their_weights = train(model_path, tmp_path, multi_objective_aggregation="normalize_then_sum", **options)
    _, mine, weights = train(model_path, tmp_path, "gdpo", **options)
    assert [a["loss"] for a in mine] == pytest.approx([b["loss"] for b in expected], rel=1e-3, abs=1e-6)
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


def some_rewards(completions, **_):
    """None for every third."""
    return [None if i % 3 == 0 else value for i, value in enumerate(rewards(completions))]


@pytest.mark.parametrize("recipe", ["grpo:eps=1e-4,agg=token-mean", "gtpo", "gdpo"])
def test_completions_without_a_reward(recipe, model_path, tmp_path):
    """They are in no group's mean and move nothing; as in TRL."""
    options = {"reward_funcs": some_rewards, "per_device_train_batch_size": 8}
    trainer, mine, weights = train(model_path, tmp_path, recipe, **options)
    assert all(torch.isfinite(torch.tensor(entry["grad_norm"])) for entry in mine)
    advantages = torch.tensor(list(trainer._logs["advantages"]))
    assert (advantages.reshape(-1, 8)[:, ::3] == 0).all()
    if recipe.startswith("grpo"):
        _, expected, their_weights = train(model_path, tmp_path, **options)
        assert [a["loss"] for a in mine] == pytest.approx([b["loss"] for b in expected], rel=1e-3, abs=1e-6)
        assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


def test_a_group_wise_loss_needs_all_rewards(model_path, tmp_path):
    with pytest.raises(ValueError, match="a completion has no reward; recipe 'reg_grpo' needs one of each"):
        train(model_path, tmp_path, "reg_grpo", reward_funcs=some_rewards)


def test_importance_weights_of_the_sampler(model_path, tmp_path, monkeypatch):
    """As vLLM's: TRL multiplies its tokens' losses by them, the recipe's trainer too; and NaN outside the mask is nothing."""
    results = {}
    for recipe in (None, "grpo:eps=1e-4,agg=token-mean"):
        own = {} if recipe is None else {"trainer": PrefkernGRPOTrainer, "trainer_options": {"recipe": recipe}}
        trainer = build("GRPO", model_path, tmp_path / str(recipe is None), **own)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.use_vllm = True
        for width in (1, batch["completion_ids"].shape[1]):
            generator = torch.Generator().manual_seed(width)
            batch["importance_sampling_ratio"] = torch.rand(4, width, generator=generator) * 2
            trainer.model.zero_grad()
            loss = trainer._compute_loss(trainer.model, batch)
            loss.backward()
            results[recipe, width] = loss.detach(), trainer.model.lm_head.weight.grad.clone()
    keys = list(results)
    for mine, theirs in zip(keys[2:], keys[:2], strict=True):
        assert_close(results[mine], results[theirs], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(results[keys[0]][1], results[keys[1]][1])


def test_a_reference_that_is_the_recipes(model_path, tmp_path):
    """CoPG has its own use of the reference: TRL's KL stays out. An equal beta of a recipe's KL goes into its loss."""
    _, logged, _ = train(model_path, tmp_path, "copg", beta=0.1)
    assert "kl" not in logged[0]
    assert logged[1]["grad_norm"] > 1e-3
    options = {"beta": 0.3, "num_iterations": 2, "use_bias_correction_kl": False, "max_steps": 4}
    _, mine, weights = train(model_path, tmp_path, "grpo:eps=1e-4,agg=token-mean,beta=0.3", **options)
    _, expected, their_weights = train(model_path, tmp_path, **options)
    assert [a["loss"] for a in mine] == pytest.approx([b["loss"] for b in expected], rel=1e-3, abs=1e-6)
    assert mine[3]["recipe/kl"] == pytest.approx(expected[3]["kl"], rel=1e-3)
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


def test_rloo_penalty_in_the_reward(model_path, tmp_path):
    """Old log-probs, which TRL leaves out on-policy, are computed where the recipe's advantages need them."""
    _, logged, _ = train(model_path, tmp_path, "rloo:beta=0.05", beta=0.05, max_steps=3)
    assert logged[2]["grad_norm"] > 1e-3


def test_extra_that_a_subclass_gives(model_path, tmp_path):
    class WithScores(PrefkernGRPOTrainer):
        def rollout_extra(self, inputs, output):
            return {"scores": output["completion_ids"].float().mean(1)}

    with pytest.raises(ValueError, match="recipe 'dagrpo' needs scores, which the trainer does not have"):
        build("GRPO", model_path, tmp_path, trainer=PrefkernGRPOTrainer, trainer_options={"recipe": "dagrpo"})
    trainer = build("GRPO", model_path, tmp_path, trainer=WithScores, trainer_options={"recipe": "dagrpo"})
    assert history(trainer)[1]["grad_norm"] > 1e-4


def test_auxiliary_loss(tmp_path):
    path = save_model(
        tmp_path / "moe", family="Mixtral", num_local_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    _, expected, their_weights = train(path, tmp_path)
    _, mine, weights = train(path, tmp_path, "grpo:eps=1e-4,agg=token-mean")
    assert mine[0]["aux_loss"] == pytest.approx(expected[0]["aux_loss"], rel=1e-4)
    assert mine[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-4)
    assert mine[0]["loss"] > 0.5
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


# ------------------------------------------------------------------------------------------------------------- refusals

CHANGED = {
    "loss_type": "grpo", "scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum",
    "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0, "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0, "vespo_k_pos": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_options_that_the_recipe_decides(name, model_path, tmp_path):
    with pytest.raises(ValueError, match=f"GRPOConfig has {name}=.*, which recipe 'gtpo' decides; .*gamma=0.1"):
        train(model_path, tmp_path, "gtpo", **{name: CHANGED[name]})


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("gtpoo", {}, r"recipe is 'gtpoo'; accepted: .*did you mean 'gtpo'"),
        ("simpo", {}, r"load_pair_recipe has it"),
        ("ngrpo:rmax=1", {}, r"has no option 'rmax'"),
        ("gtpo", {"num_iterations": 2}, r"recipe 'gtpo' is for one optimiser step per rollout"),
        ("gpg", {"steps_per_generation": 2}, r"gradient_accumulation_steps is 1, a multiple of .* = 2 is expected"),
        ("reg_grpo", {"gradient_accumulation_steps": 2}, r"'reg_grpo' compares .*steps_per_generation is 2, 1 is expected"),
        ("disco", {"num_generations": 8, "gradient_accumulation_steps": 1, "generation_batch_size": 8}, r"compares"),
        ("copg", {}, r"recipe 'copg' needs a reference model"),
        ("grpo:beta=0.1", {}, r"recipe 'grpo' has beta=0.1 and GRPOConfig has beta=0.0"),
        ("ppo", {}, r"recipe 'ppo' needs values"),
        ("disco", {"top_entropy_quantile": 0.5}, r"no place for token weights, which GRPOConfig\(top_entropy_quantile="),
        ("copg", {"off_policy_mask_threshold": 0.5, "beta": 0.1}, r"GRPOConfig\(off_policy_mask_threshold="),
    ],
)  # fmt: skip
def test_refusals(recipe, options, message, model_path, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(model_path, tmp_path, recipe, **options)


def test_weights_for_other_rewards(model_path, tmp_path):
    with pytest.raises(ValueError, match="recipe 'gdpo' has 2 weights; 1 are expected, one per reward function"):
        train(model_path, tmp_path, "gdpo:weights=(1.0, 2.0)")


def test_models_of_images(model_path, tmp_path):
    class Seeing(PrefkernGRPOTrainer):
        _is_vlm = property(lambda self: True, lambda self, value: None)

    with pytest.raises(ValueError, match="model is a vision-language model; PrefkernGRPOTrainer takes models of text"):
        build("GRPO", model_path, tmp_path, trainer=Seeing, trainer_options={"recipe": "grpo"})


def test_what_is_no_recipe(model_path, tmp_path):
    with pytest.raises(TypeError, match=r"recipe is 3; a name or a prefkern\.papers\.Recipe"):
        build("GRPO", model_path, tmp_path, trainer=PrefkernGRPOTrainer, trainer_options={"recipe": 3})
    trainer = build(
        "GRPO", model_path, tmp_path, trainer=PrefkernGRPOTrainer, trainer_options={"recipe": load_recipe("ngrpo", r_max=2.0)}
    )
    assert trainer.recipe.r_max == 2.0


# ------------------------------------------------------------------------------------------------------ several processes


TRAINED = (None, "grpo:eps=1e-4,agg=token-mean", "grpo:eps=1e-4,agg=trl-grpo")
IN_PARTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.1,
    "max_steps": 4,
}


def rollouts_of_a_rank(rank, path, output, recipes, port):
    """What this rank's trainers made of its half of two groups, which both ranks share."""
    world = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    found = [dict(zip(("logged", "weights"), train(path, output, recipe, **IN_PARTS)[1:], strict=True)) for recipe in TRAINED]
    for recipe in recipes:
        trainer = build(
            "GRPO", path, output, trainer=PrefkernGRPOTrainer, trainer_options={"recipe": recipe},
            per_device_train_batch_size=2, gradient_accumulation_steps=2, generation_kwargs={"max_new_tokens": 3 + 3 * rank},
        )  # fmt: skip
        assert trainer.accelerator.num_processes == world
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 2
        batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        loss = trainer._compute_loss(trainer.model, batch).detach()
        kept = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        found.append(kept | {"loss": loss, "logged": torch.tensor(list(trainer._logs["advantages"]))})
    return found


SHARE = {"gtpo": 1 / 2, "dapo": 1.0}
"""Of the loss in one call that has the whole rollout, where two calls are accumulated: means of sequences are divided by two,
tokens by how many the rollout has."""
STRADDLING = ("gtpo:threshold=9.0", "dapo")


@pytest.fixture(scope="module")
def parts(model_path, tmp_path_factory):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    ranks = run_ranks(rollouts_of_a_rank, 2, model_path, tmp_path_factory.mktemp("ranks"), STRADDLING, port, timeout=300.0)
    return dict(zip((*TRAINED, *STRADDLING), zip(*ranks, strict=True), strict=True))


def test_two_ranks_train_as_in_trl(parts):
    """Tokens are averaged over ranks and accumulated batches; ranks agree on weights and metrics."""
    expected, mine = parts[None], parts[TRAINED[1]]
    assert len(mine[0]["logged"]) == 4
    for a, b in zip(mine[0]["logged"], expected[0]["logged"], strict=True):
        for key in b.keys() - {"clip_ratio/low_min", "clip_ratio/high_max"}:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-5), key
    assert_close(mine[0]["weights"], expected[0]["weights"], rtol=1e-4, atol=2e-4)
    for first, second in (parts[recipe] for recipe in TRAINED):
        assert torch.equal(first["weights"], second["weights"])
    assert parts[TRAINED[2]][0]["logged"][3]["grad_norm"] != pytest.approx(mine[0]["logged"][3]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("recipe", STRADDLING)
def test_groups_that_straddle_ranks(recipe, parts, model_path, tmp_path):
    """As one process that has all of it: advantages, masks, weights of tokens, and the average of the ranks' losses."""
    mine = parts[recipe]
    columns = [part["completion_ids"].shape[1] for part in mine]
    width = max(columns)
    assert columns[0] != columns[1]

    def joined(key):
        return torch.cat([torch.nn.functional.pad(part[key], (0, width - part[key].shape[1])) for part in mine])

    tokens, mask = joined("completion_ids"), joined("completion_mask").bool()
    one = build("GRPO", model_path, tmp_path)
    texts = one.processing_class.batch_decode(
        [row[keep] for row, keep in zip(tokens, mask, strict=True)], skip_special_tokens=True
    )
    rollout = Rollout(torch.tensor(rewards(texts)), torch.arange(8) // 4, mask, tokens=tokens)
    loaded = load_recipe(recipe)
    expected = loaded.prepare(rollout)
    assert expected["advantages"].abs().sum() > 0.1
    assert_close(torch.cat([part["recipe/advantages"] for part in mine]), expected["advantages"], rtol=1e-5, atol=1e-6)
    assert_close(mine[0]["logged"], expected["advantages"], rtol=1e-5, atol=1e-6)
    assert torch.equal(joined("recipe/mask"), expected["mask"])
    assert [part["recipe/items"].item() for part in mine] == [expected["mask"].sum().item()] * 2
    if recipe.startswith("gtpo"):
        inside = torch.cat([(torch.arange(width) < n).expand(4, -1) for n in columns])
        assert torch.equal(joined("recipe/weights")[inside], expected["weights"][inside])
    longest = max(part["prompt_ids"].shape[1] for part in mine)
    prompts, attention = (
        torch.cat([torch.nn.functional.pad(part[key], (longest - part[key].shape[1], 0)) for part in mine])
        for key in ("prompt_ids", "prompt_mask")
    )
    logp, entropy, _ = one._get_per_token_logps_and_entropies(
        one.model, torch.cat([prompts, tokens], 1), torch.cat([attention, mask.long()], 1), width, compute_entropy=True
    )
    whole = loaded.loss(logp, expected, entropy=entropy).loss
    assert_close(sum(part["loss"] for part in mine) / 2, whole * SHARE[recipe[:4]], rtol=1e-4, atol=1e-6)
