"""transformers' Trainer with models that make no logits: the losses and weights of the Trainer as it comes."""

import warnings

import pytest
import torch
import transformers
from torch.testing import assert_close

from integrations.tiny_models import make_batch, make_model
from prefkern.integrations.transformers import ShiftLabels, causal_lm_loss, enable, token_logprobs

pytest.importorskip("accelerate")

STEPS = 4


@pytest.fixture(autouse=True)
def no_fallback():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="prefkern:")
        yield


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def examples():
    batch = make_batch(rows=24, length=10)
    batch["labels"][::3, :6] = -100  # so that micro-batches count different numbers of labels
    return [{name: t[i] for name, t in batch.items()} for i in range(24)]


def train(tmp_path, model, *, accumulation=2, compute_loss_func=None, collator=collate, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=0.2 if "optim" in options else 0.02,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=3,
        **options,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=examples(), data_collator=collator, compute_loss_func=compute_loss_func
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return losses, trainer


def loss_of(model):
    with torch.no_grad():
        return float(model.eval()(**collate(examples())).loss)


def compare(found, own, model, own_model, untrained, atol=2e-5):
    assert loss_of(own_model) < loss_of(untrained) - 0.02
    assert found == pytest.approx(own, abs=2e-4)
    for (name, mine), its in zip(model.named_parameters(), own_model.parameters(), strict=True):
        assert_close(mine, its, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "mixtral"])
def test_enabled(tmp_path, name) -> None:
    own_model, model = make_model(name), make_model(name)
    own, _ = train(tmp_path, own_model, max_grad_norm=0.0)
    enable(model)
    found, trainer = train(tmp_path, model, max_grad_norm=0.0)
    compare(found, own, model, own_model, make_model(name), atol=2e-3)  # Adam makes a step of what is only rounding
    assert model(**make_batch()).log_probs is not None  # and is still enabled
    evaluated = trainer.evaluate(examples()[:6])["eval_loss"]
    own_trainer = transformers.Trainer(model=own_model, args=trainer.args, data_collator=collate)
    assert evaluated == pytest.approx(own_trainer.evaluate(examples()[:6])["eval_loss"], abs=2e-3)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("way", ["logits", "shift_labels", "not enabled"])
def test_as_a_loss_function(tmp_path, way, accumulation) -> None:
    own_model, model = make_model("llama"), make_model("llama")
    own, _ = train(tmp_path, own_model, accumulation=accumulation, optim="sgd")
    if way != "not enabled":
        enable(model)
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(outputs.get("logits") is not None)
        return causal_lm_loss(outputs, labels, num_items_in_batch, inplace_backward=True)

    collator = ShiftLabels(collate) if way == "shift_labels" else collate
    found, _ = train(tmp_path, model, accumulation=accumulation, compute_loss_func=loss, collator=collator, optim="sgd")
    compare(found, own, model, own_model, make_model("llama"))
    assert seen == [way != "shift_labels"] * (STEPS * accumulation)


def test_router_losses_in_a_loss_function() -> None:
    model, batch = make_model("mixtral"), make_batch()
    own = model(**batch)
    labels = batch.pop("labels")
    outputs = model(**batch)
    assert_close(causal_lm_loss(outputs, labels, aux_loss_coef=0.02), own.loss, rtol=1e-6, atol=1e-6)
    assert float(own.loss.detach() - causal_lm_loss(outputs, labels).detach()) > 0.01
    assert_close(causal_lm_loss(outputs, labels, torch.tensor(5)), -own_sum(outputs.logits, labels) / 5)
    with pytest.raises(ValueError, match="labels is None"):
        causal_lm_loss(outputs, None)
    with pytest.raises(ValueError, match="outputs has no logits"):
        causal_lm_loss({}, labels)


def own_sum(logits, labels):
    targets = labels[:, 1:]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logp[targets != -100].sum()


def test_weights_that_are_brought_when_they_are_needed() -> None:
    """accelerate's offloading leaves parameters on the meta device between calls."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model("gemma2"), make_batch()
    with torch.no_grad():
        expected = token_logprobs(model, **batch)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.lm_head.weight.is_meta
        found = token_logprobs(model, **batch)
    assert model.lm_head.weight.is_meta
    assert_close(found.logp, expected.logp)


def test_low_precision_training(tmp_path) -> None:
    own_model, model = make_model("llama"), make_model("llama")
    own, _ = train(tmp_path, own_model, bf16=True)
    enable(model)
    found, _ = train(tmp_path, model, bf16=True)
    assert found == pytest.approx(own, abs=0.05)
    assert loss_of(model) == pytest.approx(loss_of(own_model), abs=0.05)


@pytest.mark.slow
def test_compiled_training(tmp_path) -> None:
    own_model, model = make_model("llama"), make_model("llama")
    own, _ = train(tmp_path, own_model, optim="sgd")
    enable(model)
    found, _ = train(tmp_path, model, optim="sgd", torch_compile=True, torch_compile_backend="eager")
    compare(found, own, model, own_model, make_model("llama"))
    torch._dynamo.reset()
