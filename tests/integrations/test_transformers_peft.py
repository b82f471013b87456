"""Models of PEFT without logits: LoRA on the output head, and what else its head can be."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from integrations.tiny_models import HIDDEN, make_batch, make_model
from prefkern.integrations.transformers import disable, enable, token_logprobs

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def no_fallback():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="prefkern:")
        yield


def lora(**options):
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], "task_type": "CAUSAL_LM", **options}
    )


def with_lora(name="llama", *, seed=0, dtype=torch.float32, **options):
    model = peft.get_peft_model(make_model(name, dtype=dtype), lora(**options))
    return randomised(model, seed).eval()


def randomised(model, seed=0):
    """B is 0 at first: an adapter that does nothing would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(model, batch=None, reason=None, atol=2e-6):
    """Loss, log-probs and gradients of the enabled model are its own; gives the gradients."""
    batch = batch or make_batch()
    own = model(**batch)
    expected = gradients(model, own.loss)
    logp = own.logits.double().log_softmax(-1)[:, :-1]
    logp = logp.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0].float()
    enable(model)
    if reason is None:
        found = model(**batch)
        assert found.logits is None
    else:
        with pytest.warns(UserWarning, match=f"makes its logits after all, because .*{reason}"):
            found = model(**batch)
    counts = batch["labels"][:, 1:] != -100
    assert_close(found.log_probs[counts], logp[counts], rtol=0, atol=2 * atol)
    assert_close(found.loss, own.loss, rtol=1e-6, atol=atol)
    grads = gradients(model, found.loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    disable(model)
    return grads


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "granite", "qwen2_moe"])
def test_lora_on_the_head(name, options) -> None:
    model = with_lora(name, **options)
    plain = make_model(name)(**make_batch()).loss
    grads = compare(model)
    heads = [grad for name, grad in grads.items() if "lm_head.lora" in name]
    assert len(heads) == 2
    assert all(grad.abs().max() > 1e-4 for grad in heads)
    assert not any("base_layer" in name for name in grads)
    assert (model(**make_batch()).loss - plain).abs() > 1e-2


def test_the_sum_of_weight_and_update_is_never_made(op_log) -> None:
    model, batch = with_lora("llama"), make_batch()
    enable(model)
    model(**batch).loss.backward()
    assert "linear_logprobs_ext_fwd" in op_log.names()
    _, weight, *_ = op_log.args("linear_logprobs_ext_fwd")
    head = model.get_base_model().lm_head
    assert weight.data_ptr() == head.base_layer.weight.data_ptr()
    assert head.base_layer.weight.grad is None


def test_memory_of_lora(allocations) -> None:
    vocab = 20000
    base = make_model("llama", vocab_size=vocab)
    model = randomised(peft.get_peft_model(base, lora(target_modules=["lm_head"])))
    batch = make_batch(rows=4, length=64, padded=False)
    enable(model, chunk_bytes=1 << 20)

    def step():
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()

    step()
    found = allocations(step)
    assert found.largest < vocab * HIDDEN * 4  # neither another weight nor its gradient
    assert found.peak < 4 * 64 * vocab * 4 / 4  # nor logits


@pytest.fixture
def device():
    return "cpu"


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_several_adapters(scale) -> None:
    model = with_lora()
    model.add_adapter("other", lora(r=2, lora_alpha=2 * 2 * scale))
    randomised(model, 1).eval()
    one = model(**make_batch()).loss
    model.base_model.set_adapter(["default", "other"])
    assert (model(**make_batch()).loss - one).abs() > 1e-3
    grads = compare(model)
    assert sum("lm_head.lora" in name for name in grads) == 4
    model.set_adapter("other")
    assert sum("lm_head.lora" in name for name in compare(model)) == 2


def test_a_bias_of_an_adapter() -> None:
    model = with_lora("phi", lora_bias=True, target_modules=["lm_head"])
    grads = compare(model)
    assert any("lora_B.default.bias" in name for name in grads)


def test_merged_and_disabled_adapters() -> None:
    model = with_lora()
    enable(model)
    batch = make_batch()
    active = model(**batch).loss
    with model.disable_adapter():
        plain = model(**batch)
    assert plain.logits is None
    assert_close(plain.loss, make_model("llama")(**batch).loss, rtol=1e-6, atol=1e-6)
    assert (active - plain.loss).abs() > 1e-2
    model.merge_adapter()
    merged = model(**batch)
    assert merged.logits is None
    assert_close(merged.loss, active, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert_close(model(**batch).loss, active, rtol=1e-5, atol=1e-5)
    whole = model.merge_and_unload()
    found = whole(**batch)
    assert found.logits is None
    assert_close(found.loss, active, rtol=1e-5, atol=1e-5)


def test_enabled_before_it_is_wrapped() -> None:
    base, batch = make_model("llama"), make_batch()
    enable(base, outputs=("entropy",))
    model = randomised(peft.get_peft_model(base, lora())).eval()
    own = with_lora()(**batch)
    found = model(**batch)
    assert found.entropy is not None
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)


def test_dropout_falls_back_while_it_is_active() -> None:
    model, batch = with_lora(lora_dropout=0.5).train(), make_batch()
    enable(model)
    with pytest.warns(UserWarning, match="the LoRA adapter 'default' of its output head has a dropout of 0.5"):
        found = model(**batch)
    assert found.logits is not None
    assert model.eval()(**batch).logits is None
    assert model.train()(**batch).logits is not None  # without another warning
    torch.manual_seed(5)
    found = model(**batch)
    disable(model)
    torch.manual_seed(5)
    assert_close(found.loss, model(**batch).loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "the LoRA adapter 'default' of its output head is a DoraLinearVariant"),
        ({"alora_invocation_tokens": [5]}, "the LoRA adapter 'default' of its output head is a ALoraLinearVariant"),
    ],
)
def test_variants_fall_back(options, reason) -> None:
    compare(with_lora(**options), reason=reason)


def test_batches_that_mix_adapters_fall_back() -> None:
    model, batch = with_lora(), make_batch()
    names = ["default", "__base__", "default"]
    own = model(**batch, adapter_names=names)
    enable(model)
    with pytest.warns(UserWarning, match="its output head is a LoRA layer with hooks"):
        found = model(**batch, adapter_names=names)
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert model(**batch).logits is None


def test_other_adapters_of_the_head_fall_back() -> None:
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("llama"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.uniform_(0.5, 1.5)
    compare(model, reason="works on after its product")


def test_a_copy_of_the_head_that_is_trained() -> None:
    model = with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.1)
    grads = compare(model)
    assert any("lm_head.modules_to_save" in name for name in grads)
    enable(model)
    with model.disable_adapter():
        found = model(**make_batch())
    assert found.logits is None
    assert_close(found.loss, make_model("llama")(**make_batch()).loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_tokens_that_are_trained(name) -> None:
    model = with_lora(name, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 8, 20]})
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in parameter_name:
                parameter.add_(0.2)
    grads = compare(model)
    assert any("trainable_tokens" in name for name in grads)


def test_lora_in_low_precision() -> None:
    """PEFT keeps adapters in float32 beside a bfloat16 model."""
    model, batch = with_lora(dtype=torch.bfloat16), make_batch()
    assert model.get_base_model().lm_head.lora_A["default"].weight.dtype == torch.float32
    own = model(**batch)
    expected = gradients(model, own.loss)
    enable(model)
    found = model(**batch)
    assert found.logits is None
    assert_close(found.loss, own.loss, rtol=0, atol=3e-2)
    for name, grad in gradients(model, found.loss).items():
        assert grad.dtype == torch.float32
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name


def test_prompts_that_are_trained() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", tokenizer_name_or_path=None)
    model = peft.get_peft_model(make_model("llama"), config).eval()
    batch = make_batch()
    own = model(**batch)
    enable(model)
    found = model(**batch)
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    targets = batch["labels"][:, 1:]
    logp = own.logits[:, 3:-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    tokens = token_logprobs(model, **batch).logp
    assert_close(tokens, logp.where(targets != -100, 0.0), rtol=0, atol=3e-6)


def test_token_logprobs_with_lora() -> None:
    model, batch = with_lora(), make_batch(padded=False)
    ids = batch["input_ids"]
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert_close(token_logprobs(model, ids).logp, logp, rtol=0, atol=3e-6)
    with model.disable_adapter(), torch.no_grad():
        reference = token_logprobs(model, ids).logp
    assert_close(reference, token_logprobs(make_model("llama"), ids).logp, rtol=0, atol=3e-6)
    assert (reference - logp).abs().max() > 0.1
