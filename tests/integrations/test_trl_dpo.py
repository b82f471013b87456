"""DPO's trainer with pair recipes: against TRL's own losses, and end to end."""

import pytest
import torch
from torch.testing import assert_close

from integrations.trl_tiny import build, dataset, history, save_model, transformers, trl
from prefkern.integrations.trl import PrefkernDPOTrainer, _options, patch
from prefkern.papers import Pairs, load_pair_recipe


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def train(path, output, recipe=None, trainer=PrefkernDPOTrainer, **options):
    """(trainer, what each step logged, weights)"""
    own = {} if recipe is None else {"trainer": trainer, "trainer_options": {"recipe": recipe}}
    built = build("DPO", path, output / str(recipe).split(":", maxsplit=1)[0], **own, **options)
    logged = history(built)
    return built, logged, torch.cat([p.detach().flatten() for p in built.model.parameters()])


SAME = {
    "dpo": {},
    "dpo:beta=0.4": {"beta": 0.4},
    "ipo": {"loss_type": ["ipo"]},
    "discopop": {"loss_type": ["discopop"]},
    "nca": {"loss_type": ["nca_pair"]},
    "exo:label_smoothing=0.01": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "robust_dpo:label_smoothing=0.2": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "sppo:eta=10.0,mode=hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"]},
    "f_dpo": {"f_divergence_type": "js_divergence"},
    "f_dpo:divergence=forward_kl": {"f_divergence_type": "forward_kl"},
    "ld_dpo:alpha=0.25": {"ld_alpha": 0.25},
}
REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}


def close_logs(mine, theirs, left_out=()):
    assert len(mine) == len(theirs) >= 2
    for a, b in zip(mine, theirs, strict=True):
        assert not b.keys() - a.keys()
        for key in b.keys() - set(left_out):
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("recipe", SAME)
def test_recipes_that_trl_has_too(recipe, model_path, tmp_path):
    """The same training: losses, metrics, gradient norms, weights. Rewards are those of each library's own loss."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    _, expected, their_weights = train(model_path, tmp_path, **SAME[recipe], **options)
    _, mine, weights = train(model_path, tmp_path, recipe, **options)
    left_out = () if recipe.startswith("dpo") else REWARDS
    if recipe.startswith("ld_dpo"):  # TRL's are those with its weights
        left_out = left_out | {"logps/chosen", "logps/rejected"}
    close_logs(mine, expected, left_out)
    assert mine[1]["grad_norm"] > 1e-3
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


def test_reference_log_probs_computed_beforehand(model_path, tmp_path):
    _, expected, their_weights = train(model_path, tmp_path, "dpo")
    trainer, mine, weights = train(model_path, tmp_path / "before", "dpo", precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    close_logs(mine, expected, {"rewards/accuracies"})  # of the sign of 0 in the first step
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)
    assert mine[1]["rewards/chosen"] != 0


FREE = ["simpo:beta=2.5", "orpo", "cpo", "asft", "slic:reference_free=True", "lcpo:kind=simpo,beta=2.0,gamma=0.5"]


@pytest.mark.parametrize("recipe", FREE)
def test_without_a_reference(recipe, model_path, tmp_path):
    """No second model, no forward of one; the loss is the recipe's of the policy's log-probs."""
    with patch() as handle:
        trainer, logged, _ = train(model_path, tmp_path, recipe)
    assert handle.calls == 2
    assert trainer.ref_model is None
    fresh = build("DPO", model_path, tmp_path / "fresh", max_steps=1)
    batch = next(iter(fresh.get_train_dataloader()))
    logits = fresh.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    out = load_pair_recipe(recipe).loss(Pairs(logp, batch["completion_mask"][:, 1:].bool()))
    assert logged[0]["loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    assert logged[0]["rewards/chosen"] == pytest.approx(out.metrics["chosen_reward"].item(), rel=1e-4)
    assert all(entry["grad_norm"] > 1e-3 for entry in logged)


@pytest.mark.parametrize(
    "recipe", ["dpop", "rpo", "apo_anchored", "bco", "ln_dpo", "soft_preference", "r_dpo", "kto", "vpo:mode=offline"]
)
def test_more_recipes_learn(recipe, model_path, tmp_path):
    _, logged, _ = train(model_path, tmp_path, recipe, max_steps=3)
    assert len(logged) == 3
    assert all(entry["grad_norm"] > 1e-4 and entry["loss"] == entry["loss"] for entry in logged)
    assert logged[2]["rewards/chosen"] != logged[0]["rewards/chosen"]


def test_wpo_gets_its_sums(model_path, tmp_path):
    """TRL's weight is not bounded by 1, and is computed from its own head's sums."""
    _, expected, their_weights = train(model_path, tmp_path, use_weighting=True)
    _, mine, weights = train(model_path, tmp_path, "wpo:clamp=None")
    close_logs(mine, expected)
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


def test_extra_that_a_subclass_gives(model_path, tmp_path):
    class WithMargins(PrefkernDPOTrainer):
        def pairs_extra(self, inputs):
            return {"margin": torch.full((len(inputs["input_ids"]) // 2,), 2.0)}

    with pytest.raises(ValueError, match="recipe 'madpo' needs margin, which the trainer does not have"):
        train(model_path, tmp_path, "madpo")
    _, logged, _ = train(model_path, tmp_path, "madpo", trainer=WithMargins)
    assert logged[1]["grad_norm"] > 1e-4


def test_evaluation(model_path, tmp_path):
    trainer = build("DPO", model_path, tmp_path, trainer=PrefkernDPOTrainer, trainer_options={"recipe": "simpo"}, max_steps=1)
    trainer.train()
    metrics = trainer.evaluate(dataset("DPO", rows=8))
    assert metrics["eval_loss"] > 0
    assert metrics["eval_rewards/margins"] == pytest.approx(
        metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"], abs=1e-5
    )


def test_lora(model_path, tmp_path):
    """The reference is the model without its adapter."""
    peft = pytest.importorskip("peft")
    losses = {}
    for recipe in (None, "dpo"):
        torch.manual_seed(0)
        own = {} if recipe is None else {"trainer": PrefkernDPOTrainer}
        options = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}
        options |= {} if recipe is None else {"recipe": recipe}
        trainer = build("DPO", model_path, tmp_path / str(recipe), trainer_options=options, max_steps=3, **own)
        losses[recipe] = history(trainer)
    close_logs(losses["dpo"], losses[None])
    assert losses["dpo"][2]["rewards/margins"] != 0


def test_auxiliary_loss(tmp_path):
    """Of a mixture of experts: in the loss, and among the metrics."""
    path = save_model(
        tmp_path / "moe", family="Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    _, expected, their_weights = train(path, tmp_path)
    _, mine, weights = train(path, tmp_path, "dpo")
    assert "aux_loss" in mine[0]
    assert mine[0]["loss"] > 1
    close_logs(mine, expected)
    assert_close(weights, their_weights, rtol=1e-4, atol=2e-4)


REFUSED = {
    "loss_type": ({"loss_type": ["ipo"]}, "DPOConfig has loss_type=.*'ipo'.*, which recipe 'dpo' decides"),
    "beta": ({"beta": 0.3}, r"DPOConfig has beta=0.3, which recipe 'dpo' decides; 0.1 is expected, and options .*beta=0.1"),
    "label_smoothing": ({"label_smoothing": 0.1}, "label_smoothing"),
    "f_divergence_type": ({"f_divergence_type": "forward_kl"}, "f_divergence_type"),
    "use_weighting": ({"use_weighting": True}, "use_weighting"),
    "ld_alpha": ({"ld_alpha": 0.5}, "ld_alpha"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_the_recipe_decides(case, model_path, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build("DPO", model_path, tmp_path, trainer=PrefkernDPOTrainer, trainer_options={"recipe": "dpo"}, **options)


def test_refusals(model_path, tmp_path):
    def construct(recipe, **options):
        trainer_options = {"recipe": recipe} | options.pop("trainer_options", {})
        return build("DPO", model_path, tmp_path, trainer=PrefkernDPOTrainer, trainer_options=trainer_options, **options)

    with pytest.raises(ValueError, match=r"recipe is 'simp'; accepted: .*did you mean 'simpo'"):
        construct("simp")
    with pytest.raises(ValueError, match="load_recipe has it"):
        construct("gtpo")
    with pytest.raises(ValueError, match="has no option 'betta'"):
        construct("dpo:betta=1")
    with pytest.raises(TypeError, match=r"recipe is 3; a name or a prefkern\.papers\.PairRecipe"):
        construct(3)
    with pytest.raises(ValueError, match="recipe 'ld_dpo' needs those of tokens"):
        construct("ld_dpo", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="recipe 'simpo' needs no reference model"):
        construct("simpo", precompute_ref_log_probs=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    with pytest.raises(ValueError, match="recipe 'orpo' needs no reference model"):
        construct("orpo", trainer_options={"ref_model": reference})
    assert construct(load_pair_recipe("dpo", beta=0.7)).beta == 0.7


def test_models_of_images(model_path, tmp_path):
    class Seeing(PrefkernDPOTrainer):
        _is_vlm = property(lambda self: True, lambda self, value: None)

    with pytest.raises(ValueError, match="model is a vision-language model; PrefkernDPOTrainer takes models of text"):
        build("DPO", model_path, tmp_path, trainer=Seeing, trainer_options={"recipe": "dpo"})


def test_a_configuration_is_left_as_it_is(model_path, tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    PrefkernDPOTrainer(
        model_path, None, args, train_dataset=dataset("DPO"), recipe="simpo",
        processing_class=transformers.AutoTokenizer.from_pretrained(model_path),
    )  # fmt: skip
    assert not args.precompute_ref_log_probs


def test_no_configuration():
    """As TRL: its defaults, in a folder named by the model."""
    named = _options.default_config(str, "somewhere/a-model", "DPO")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model.config._name_or_path = "somewhere/another"
    assert (named, _options.default_config(str, model, "GRPO")) == ("a-model-DPO", "another-GRPO")
