"""Causal language models of transformers without logits: against the same model as it comes."""

import copy
import inspect
import warnings

import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers.modeling_outputs import CausalLMOutputWithPast

import prefkern
from integrations.tiny_models import HIDDEN, MODELS, VOCAB, make_batch, make_model
from prefkern.integrations.transformers import CausalLMLogprobs, disable, enable, token_logprobs

ALONE = [name for name in MODELS if name != "bart"]  # it computes its loss itself
OUTPUTS = ("entropy", "lse", "sum_sq_probs", "mean_logit", "is_top1")


@pytest.fixture(autouse=True)
def no_fallback(request):
    """A fallback is a warning, and fails a test that does not expect it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="prefkern:")
        yield


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expected_logprobs(logits, labels, temperature=1.0):
    """log_probs and entropy, of each label but the first column's."""
    logp = (logits.double()[:, :-1] / temperature).log_softmax(-1)
    targets = labels[:, 1:]
    counts = targets != -100
    taken = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return taken.where(counts, 0.0).float(), (-(logp.exp() * logp).sum(-1)).where(counts, 0.0).float()


# ---- equal to the model's own


@pytest.mark.parametrize("name", ALONE)
def test_loss_and_gradients_are_the_models_own(name) -> None:
    model, batch = make_model(name), make_batch()
    own = model(**batch)
    expected = gradients(model, own.loss)
    enable(model, outputs=("entropy",))
    found = model(**batch)
    assert isinstance(found, CausalLMLogprobs)
    assert found.logits is None
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    logp, entropy = expected_logprobs(own.logits, batch["labels"])
    assert_close(found.log_probs, logp, rtol=0, atol=3e-6)
    assert_close(found.entropy, entropy, rtol=0, atol=3e-6)
    assert_close(found.label_mask, batch["labels"][:, 1:] != -100)
    grads = gradients(model, found.loss)
    assert grads.keys() == expected.keys()
    for parameter, grad in grads.items():
        assert_close(grad, expected[parameter], rtol=1e-4, atol=2e-6, msg=lambda m, p=parameter: f"{p}: {m}")


def test_a_model_that_sees_images() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=make_model("llama").config, vision_config=vision, image_token_index=90)
    model, batch = transformers.LlavaForConditionalGeneration(config).eval(), make_batch()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.2)
    batch["input_ids"] %= 90
    batch["input_ids"][:, 1:5], batch["labels"][:, 1:5] = 90, -100  # the four patches of an image
    batch["pixel_values"] = torch.randn(3, 3, 16, 16)
    batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["input_ids"])
    own = model(**batch)
    logp, _ = expected_logprobs(own.logits, batch["labels"])
    assert_close(token_logprobs(model, **batch).logp, logp, rtol=0, atol=3e-6)
    enable(model)
    found = model(**batch)
    assert found.logits is None
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_router_losses_are_kept(name) -> None:
    model, batch = make_model(name), make_batch()
    own = model(**batch)
    enable(model)
    found = model(**batch)
    assert_close(found.aux_loss, own.aux_loss, rtol=0, atol=0)
    assert float(own.aux_loss.detach()) > 0.5
    assert len(found.router_logits) == len(own.router_logits)
    count = (batch["labels"][:, 1:] != -100).sum()
    assert_close(found.loss, -found.log_probs.sum() / count + 0.02 * own.aux_loss)


def test_what_else_the_model_returns_is_kept() -> None:
    model, batch = make_model("llama"), make_batch()
    own = model(**batch, output_hidden_states=True, use_cache=True)
    enable(model)
    found = model(**batch, output_hidden_states=True, use_cache=True)
    for mine, its in zip(found.hidden_states, own.hidden_states, strict=True):
        assert_close(mine, its, rtol=0, atol=0)
    assert {*own.keys()} - {"logits"} < {*found.keys()}
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_close(as_tuple[0], own.loss, rtol=1e-6, atol=1e-6)
    assert model(**batch, return_dict=True).loss is not None


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_items_in_batch(items) -> None:
    model, batch = make_model("gemma2"), make_batch()
    own = model(**batch, num_items_in_batch=items)
    enable(model)
    found = model(**batch, num_items_in_batch=items)
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert_close(found.loss, -found.log_probs.sum() / 7)


@pytest.mark.parametrize("beside_labels", [False, True])
def test_labels_that_are_shifted_already(beside_labels) -> None:
    model, batch = make_model("llama"), make_batch()
    labels = batch.pop("labels")
    shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    shifted[:, -1] = 5  # of the next device's part
    own = model(**batch, labels=labels, shift_labels=shifted)
    enable(model)
    found = model(**batch, shift_labels=shifted, **({"labels": labels} if beside_labels else {}))
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert found.log_probs.shape == shifted.shape
    assert_close(found.log_probs.sum(), -own.loss * (shifted != -100).sum(), rtol=1e-6, atol=1e-5)
    assert (found.log_probs[:, -1] < 0).all()


def test_no_label_counts() -> None:
    model, batch = make_model("llama"), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).loss.isnan()
    own = model(**batch, num_items_in_batch=4)
    enable(model)
    assert model(**batch).loss.isnan()
    found = model(**batch, num_items_in_batch=4)
    assert found.loss == own.loss == 0
    assert all(not grad.any() for grad in gradients(model, found.loss).values())


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_temperature_and_statistics(name) -> None:
    model, batch = make_model(name), make_batch()
    logits = model(**batch).logits
    enable(model, temperature=0.6, outputs=OUTPUTS)
    found = model(**batch)
    targets = batch["labels"][:, 1:]
    expected = prefkern.logits_logprobs(logits[:, :-1], targets, temperature=0.6, outputs=OUTPUTS)
    assert_close(found.log_probs, expected.logp, rtol=0, atol=3e-6)
    for statistic in OUTPUTS:
        assert_close(found[statistic], getattr(expected, statistic), rtol=1e-5, atol=3e-6)
    assert_close(found.loss, -expected.logp.sum() / (targets != -100).sum(), rtol=1e-5, atol=3e-6)


def test_low_precision_is_exact_where_the_models_own_is_not() -> None:
    model, batch = make_model("llama", dtype=torch.bfloat16), make_batch()
    own = model(**batch, output_hidden_states=True)
    hidden, weight = own.hidden_states[-1].double(), model.lm_head.weight.double()
    expected, _ = expected_logprobs(hidden @ weight.T, batch["labels"])
    enable(model)
    found = model(**batch)
    assert found.log_probs.dtype == torch.float32
    assert_close(found.log_probs, expected, rtol=0, atol=1e-4)
    theirs, _ = expected_logprobs(own.logits, batch["labels"])
    assert (theirs - expected).abs().max() > 1e-3
    assert_close(found.loss, own.loss, rtol=0, atol=2e-2)


def test_logits_that_are_rounded() -> None:
    """As the model's own head writes them in bfloat16."""
    model, batch = make_model("gemma2", dtype=torch.bfloat16), make_batch()
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    raw = (hidden.float() @ model.lm_head.weight.float().T).bfloat16().double()
    expected, _ = expected_logprobs(0.7 * (raw / 0.7).tanh(), batch["labels"])
    enable(model, logits_dtype="bfloat16")
    assert_close(model(**batch).log_probs, expected, rtol=0, atol=1e-5)
    found = token_logprobs(model, **batch, logits_dtype="bfloat16")
    assert_close(found.logp, expected, rtol=0, atol=1e-5)
    assert (token_logprobs(model, **batch).logp - expected).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"logits_dtype is 'bfloat'.*did you mean 'bfloat16'"):
        enable(model, logits_dtype="bfloat")


def test_autocast() -> None:
    model, batch = make_model("llama"), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        own = model(**batch)
        expected = gradients(model, own.loss)
        enable(model)
        found = model(**batch)
        grads = gradients(model, found.loss)
    assert_close(found.loss, own.loss, rtol=0, atol=2e-2)
    assert_close(grads["lm_head.weight"], expected["lm_head.weight"], rtol=0.05, atol=2e-3)


def test_gradient_checkpointing() -> None:
    model, batch = make_model("llama").train(), make_batch()
    expected = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable()
    enable(model)
    found = gradients(model, model(**batch).loss)
    for name, grad in found.items():
        assert_close(grad, expected[name], rtol=1e-4, atol=2e-6)


def test_memory_stays_below_one_tensor_of_logits(allocations) -> None:
    vocab, rows, length = 20000, 4, 64
    model = make_model("llama_tied", vocab_size=vocab)
    batch = make_batch(rows=rows, length=length, padded=False)
    logits = rows * length * vocab * 4

    def step():
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()

    step()
    own = allocations(step)
    assert own.peak > logits
    enable(model, chunk_bytes=1 << 20)
    step()
    found = allocations(step)
    gradient = vocab * HIDDEN * 4
    assert found.largest <= max(gradient, 1 << 20)
    assert found.peak < logits / 2


@pytest.fixture
def device():
    return "cpu"


# ---- untouched


def test_calls_without_labels_are_untouched() -> None:
    model, batch = make_model("qwen2"), make_batch()
    del batch["labels"]
    own = model(**batch)
    prompt = {"input_ids": batch["input_ids"][:1], "max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(**prompt)
    enable(model)
    found = model(**batch)
    assert type(found) is type(own)
    assert_close(found.logits, own.logits, rtol=0, atol=0)
    assert torch.equal(model.generate(**prompt), tokens)
    assert inspect.signature(model.forward) == inspect.signature(make_model("qwen2").forward)
    assert [*model.state_dict()] == [*make_model("qwen2").state_dict()]


def test_arguments_by_position() -> None:
    model, batch = make_model("llama"), make_batch()
    own = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    enable(model)
    found = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)


def test_disabling_leaves_nothing() -> None:
    model, batch = make_model("llama"), make_batch()
    enable(model)
    enable(model).disable()
    assert "forward" not in model.__dict__
    assert model(**batch).logits is not None
    disable(model)
    disable(make_model("llama"))
    head = model.lm_head
    with enable(model, outputs=("entropy",)):
        assert model(**batch).entropy is not None
        with enable(model, temperature=2.0):
            assert model(**batch).entropy is None
        assert model(**batch).entropy is not None
    assert model(**batch).logits is not None
    assert model.lm_head is head
    assert "_loss_function" not in model.__dict__


def test_a_forward_that_others_have_replaced_comes_back() -> None:
    model, batch = make_model("llama"), make_batch()
    calls = []
    before = model.forward

    def theirs(*args, **kwargs):
        calls.append("before")
        return before(*args, **kwargs)

    model.forward = theirs
    enable(model)
    assert model(**batch).log_probs is not None
    ours_bound = model.forward

    def later(*args, **kwargs):
        calls.append("after")
        return ours_bound(*args, **kwargs)

    model.forward = later
    assert model(**batch).log_probs is not None
    disable(model)  # cannot be taken out of the middle: passes through
    assert model(**batch).logits is not None
    enable(model)
    assert model(**batch).log_probs is not None
    assert calls == ["before", "after", "before", "after", "before", "after", "before"]
    model.forward = ours_bound
    disable(model)
    assert model.forward is theirs


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, batch = make_model("llama"), make_batch()
    enable(model)
    head = model.lm_head
    with pytest.raises(ValueError, match=r"labels has shape \[3, 9\], but the head is applied to \[3, 2\] positions"):
        model(**batch, logits_to_keep=2)
    batch["labels"][0, 5] = VOCAB
    with pytest.raises(ValueError, match=r"targets\[4\] is 97"):
        model(**batch)
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + VOCAB, labels=batch["input_ids"])
    assert model.lm_head is head
    assert "_loss_function" not in model.__dict__
    assert model(**make_batch()).log_probs is not None


def test_a_copy_is_enabled_in_its_own_right() -> None:
    model, batch = make_model("llama"), make_batch()
    enable(model)
    expected = model(**batch).loss.detach()
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert_close(other(**batch).loss.detach(), expected)
    disable(model)
    assert other(**batch).log_probs is not None
    disable(other)
    assert "forward" not in other.__dict__


def test_another_head_is_found() -> None:
    model, batch = make_model("llama"), make_batch()
    enable(model)
    model(**batch)
    model.resize_token_embeddings(VOCAB + 6)
    found = model(**batch)
    disable(model)
    assert_close(found.loss, model(**batch).loss, rtol=1e-6, atol=1e-6)


# ---- wrappers and hooks


def test_hooks_on_the_head_run() -> None:
    """What brings a weight into place: here it is gone before and after, and the gradient goes through the hook too."""
    model, batch = make_model("llama"), make_batch()
    batch["labels"][2, 5] = model(**batch).logits[2, 4].argmax()
    own = model(**batch)
    expected = gradients(model, own.loss)
    weight, log = model.lm_head.weight.detach().clone(), []
    enable(model, outputs=OUTPUTS)
    without_hooks = model(**batch)

    def bring(module, _):
        module.weight.data = weight
        log.append("bring")

    def take(module, _, out):
        module.weight.data = torch.full((VOCAB, HIDDEN), torch.nan)
        if out.requires_grad:
            out.register_hook(lambda grad: bring(module, None) or log.append("backward"))
        log.append("take")

    model.lm_head.weight.data = torch.full((VOCAB, HIDDEN), torch.nan)
    model.lm_head.register_forward_pre_hook(bring)
    model.lm_head.register_forward_hook(take)
    found = model(**batch)
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert log == ["bring", "take"]
    for statistic in OUTPUTS:
        assert_close(found[statistic], without_hooks[statistic], rtol=0, atol=0)
    assert found.is_top1[2, 4]
    grads = gradients(model, found.loss)
    assert log == ["bring", "take", "bring", "backward"]
    for name, grad in grads.items():
        assert_close(grad, expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_compiled() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    model, batch = make_model("llama", num_hidden_layers=1), make_batch()
    own = model(**batch)
    expected = gradients(model, own.loss)
    enable(model, outputs=("entropy",))
    compiled = torch.compile(model, backend=counter)
    found = compiled(**batch)
    assert counter.op_count > 80  # the layers are in the graphs
    frames = counter.frame_count
    assert_close(compiled(**batch).loss, own.loss, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == frames
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    for name, grad in gradients(model, found.loss).items():
        assert_close(grad, expected[name], rtol=1e-4, atol=2e-6)
    logp = token_logprobs(compiled, batch["input_ids"], batch["attention_mask"]).logp
    assert_close(logp, token_logprobs(model, batch["input_ids"], batch["attention_mask"]).logp)
    torch._dynamo.reset()


# ---- where it cannot be exact


class Changed(transformers.LlamaForCausalLM):
    """A Llama whose forward is what a test puts into `finish`."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits = self.finish(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class NoLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Flat(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view(*x.shape[:-1], -1)


class Padded(transformers.LlamaForCausalLM):
    """Keeps the first rows of a head with more."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits = self.lm_head(hidden)[..., :90]
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Subclass(nn.Parameter):
    pass


def changed(finish):
    model = Changed(make_model("llama").config).eval()
    model.load_state_dict(make_model("llama").state_dict())
    model.finish = lambda hidden: finish(model, hidden)
    return model


def with_head(kind):
    model = make_model("llama")
    model.lm_head.__class__ = kind
    return model


def with_loss(loss):
    model = make_model("llama")
    model.loss_function = loss
    return model


def smoothed_loss(logits, labels, vocab_size, **_):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


def sized_by_logits():
    model = Padded(make_model("llama").config).eval()
    model.load_state_dict(make_model("llama").state_dict())
    return model


def subclassed():
    model = make_model("llama")
    model.lm_head.weight = torch.Tensor._make_subclass(Subclass, model.lm_head.weight.data, True)
    return model


FALLBACKS = {
    "loss of its own": (lambda: make_model("bart"), "its forward needs them itself"),
    "a cube": (lambda: changed(lambda m, h: m.lm_head(h) ** 3), "changes them by more than a factor and a soft cap"),
    "a shift": (lambda: changed(lambda m, h: m.lm_head(h) + 1), "changes them by more than a factor and a soft cap"),
    "minus": (lambda: changed(lambda m, h: -m.lm_head(h)), "changes them by more than a factor and a soft cap"),
    "zero": (lambda: changed(lambda m, h: m.lm_head(h) * 0), "changes them by more than a factor and a soft cap"),
    "by position": (
        lambda: changed(lambda m, h: m.lm_head(h) * torch.arange(1, h.shape[1] + 1)[:, None]),
        "changes them by more than a factor and a soft cap",
    ),
    "ban of a token": (
        lambda: changed(lambda m, h: m.lm_head(h).index_fill(-1, torch.tensor([1]), -1e4)),
        "changes them by more than a factor and a soft cap",
    ),
    "ban of a late token": (
        lambda: changed(lambda m, h: m.lm_head(h).index_fill(-1, torch.tensor([90]), -1e4)),
        "its forward needs them itself",
    ),
    "twice": (lambda: changed(lambda m, h: m.lm_head(h) + m.lm_head(h)), "applies its output head more than once"),
    "around the head": (
        lambda: changed(lambda m, h: functional.linear(h, m.lm_head.weight)),
        "its loss does not see them as its output head makes them",
    ),
    "size of the vocabulary": (sized_by_logits, "takes the size of the vocabulary from them"),
    "other shape in the head": (lambda: with_head(Flat), "a Flat, changes the shape of what it is given"),
    "no linear": (lambda: with_head(NoLinear), "a NoLinear, does not make them by nn.functional.linear"),
    "more in the head": (lambda: with_head(Doubled), "a Doubled, works on after its product"),
    "loss function": (lambda: with_loss(smoothed_loss), "its loss function is smoothed_loss"),
    "weight of another kind": (subclassed, "its output head's weight is a Subclass"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_fallback(case) -> None:
    make, reason = FALLBACKS[case]
    model, batch = make(), make_batch()
    batch["input_ids"] %= 90
    batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % 90)
    own = model(**batch)
    expected = gradients(model, own.loss)
    enable(model, outputs=("entropy",))
    with pytest.warns(UserWarning, match=f"prefkern: {type(model).__name__} makes its logits after all, because .*{reason}"):
        found = model(**batch)
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert_close(found.logits, own.logits, rtol=0, atol=0)
    logp, entropy = expected_logprobs(own.logits, batch["labels"])
    assert_close(found.log_probs, logp, rtol=1e-6, atol=3e-6)
    assert_close(found.entropy, entropy, rtol=1e-6, atol=3e-6)
    for name, grad in gradients(model, found.loss).items():
        assert_close(grad, expected[name], rtol=1e-4, atol=3e-6)
    again = model(**batch)  # without another warning
    assert_close(again.log_probs, found.log_probs, rtol=0, atol=0)


def test_heads_that_do_something_before_their_product() -> None:
    """A product is a product, whatever makes its factors."""

    class Normalised(nn.Linear):
        def forward(self, x):
            return functional.linear(x * 3, functional.normalize(self.weight))

    model, batch = with_head(Normalised), make_batch()
    own = model(**batch)
    expected = gradients(model, own.loss)
    enable(model)
    found = model(**batch)
    assert found.logits is None
    assert_close(found.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert_close(gradients(model, found.loss)["lm_head.weight"], expected["lm_head.weight"], rtol=1e-4, atol=2e-6)


def test_scale_and_cap_are_read_off_in_any_precision() -> None:
    for finish in (
        lambda m, h: m.lm_head(h).float() * 0.37,
        lambda m, h: (m.lm_head(h) / 0.9).tanh() * 0.9,
        lambda m, h: 2 * ((m.lm_head(h) * 1.7).float() / 0.4).tanh() * 0.2,
    ):
        model, batch = changed(finish), make_batch()
        own = model(**batch)
        enable(model)
        assert_close(model(**batch).loss, own.loss, rtol=1e-6, atol=1e-6)


def test_temperature_of_a_fallback() -> None:
    model, batch = make_model("bart"), make_batch()
    logits = model(**batch).logits
    enable(model, temperature=0.5)
    with pytest.warns(UserWarning, match="its forward needs them itself"):
        found = model(**batch)
    assert_close(found.log_probs, expected_logprobs(logits, batch["labels"], 0.5)[0], rtol=1e-6, atol=3e-6)


# ---- refusals


def test_refusals() -> None:
    model = make_model("llama")
    with pytest.raises(TypeError, match="model is a Linear; a model of transformers is expected"):
        enable(nn.Linear(2, 2))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, which has an encoder"):
        enable(t5)
    with pytest.raises(ValueError, match="model is a DataParallel"):
        enable(nn.DataParallel(model))
    with pytest.raises(ValueError, match="LlamaModel, which cannot generate"):
        enable(model.model)
    with pytest.raises(ValueError, match="outputs has 'entropies'"):
        enable(model, outputs=("entropies",))
    with pytest.raises(ValueError, match="outputs is the string"):
        enable(model, outputs="entropy")
    for temperature in (0.0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature is"):
            enable(model, temperature=temperature)
    with pytest.raises(TypeError, match="temperature is"):
        enable(model, temperature=torch.tensor(1.0))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_versions(run_python, version) -> None:
    found = run_python(
        """
import sys, transformers
transformers.__version__ = sys.argv[1]
try:
    import prefkern.integrations.transformers
except ImportError as error:
    print(error)
""",
        version,
    )
    assert f"transformers is {version}; prefkern's integration is tested with versions from 5.0 to before 6" in found


def test_importing_prefkern_does_not_import_transformers(run_python) -> None:
    assert run_python("import sys, prefkern.integrations; print('transformers' in sys.modules)") == "False"


# ---- token_logprobs


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_token_logprobs(name, enabled) -> None:
    model, batch = make_model(name), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(ids, attention_mask=mask).logits
    logp, entropy = expected_logprobs(logits, ids.masked_fill(mask == 0, -100))
    if enabled:
        enable(model, temperature=3.0)
    found = token_logprobs(model, ids, mask, outputs=("entropy",))
    assert found.lse is None
    assert_close(found.logp, logp, rtol=0, atol=3e-6)
    assert_close(found.entropy, entropy, rtol=0, atol=3e-6)
    expected = gradients(model, expected_logprobs(model(ids, attention_mask=mask).logits, ids)[0][mask[:, 1:] == 1].mean())
    grads = gradients(model, found.logp[mask[:, 1:] == 1].mean())
    assert_close(grads["lm_head.weight" if "lm_head.weight" in grads else "model.embed_tokens.weight"], expected[
        "lm_head.weight" if "lm_head.weight" in grads else "model.embed_tokens.weight"
    ], rtol=1e-4, atol=2e-6)  # fmt: skip
    if enabled:
        assert_close(model(**batch).log_probs, expected_logprobs(logits, batch["labels"], 3.0)[0], rtol=0, atol=3e-6)
    else:
        assert "forward" not in model.__dict__


def test_token_logprobs_of_the_last_tokens() -> None:
    model, batch = make_model("llama"), make_batch(padded=False)
    ids = batch["input_ids"]
    all_of_them = token_logprobs(model, ids, outputs=("entropy",))
    for keep in (1, 4, 8, 20):
        found = token_logprobs(model, ids, logits_to_keep=keep, outputs=("entropy",))
        assert_close(found.logp, all_of_them.logp[:, -keep:])
        assert_close(found.entropy, all_of_them.entropy[:, -keep:])
    labels = ids.roll(-1, 1)
    shifted = token_logprobs(model, ids, shift_labels=labels)
    assert shifted.logp.shape == ids.shape
    assert_close(shifted.logp[:, :-1], all_of_them.logp)
    assert_close(token_logprobs(model, ids, shift_labels=labels, logits_to_keep=3).logp, shifted.logp[:, -3:])


def test_the_head_sees_only_what_is_kept(op_log) -> None:
    model, batch = make_model("llama"), make_batch(padded=False)
    with torch.no_grad():
        token_logprobs(model, batch["input_ids"], logits_to_keep=4)
    hidden, *_ = op_log.args("linear_logprobs_fwd")
    assert hidden.shape == (3 * 5, HIDDEN)  # the last position predicts nothing that is known


def test_token_logprobs_of_labels() -> None:
    model, batch = make_model("llama"), make_batch()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = token_logprobs(model, **batch)
    assert_close(found.logp, expected_logprobs(logits, batch["labels"])[0], rtol=0, atol=3e-6)
    assert (found.logp[0, :2] == 0).all()


def test_padding_on_the_left_is_the_same_without() -> None:
    model = make_model("llama")
    ids = make_batch(rows=1, length=6, padded=False)["input_ids"]
    expected = token_logprobs(model, ids).logp
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for position_ids in (positions, None):
        found = token_logprobs(model, padded, mask, position_ids=position_ids).logp
        assert_close(found[:, :3], torch.zeros(1, 3))  # padding, and the first token
        assert_close(found[:, 3:], expected, rtol=0, atol=3e-6)


def test_packed_sequences_are_the_same_apart() -> None:
    model = make_model("llama")
    first, second = (make_batch(rows=1, length=n, seed=n, padded=False)["input_ids"] for n in (5, 7))
    apart = [token_logprobs(model, ids).logp for ids in (first, second)]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = token_logprobs(model, torch.cat([first, second], 1), position_ids=positions).logp
    assert_close(packed[:, :4], apart[0], rtol=0, atol=3e-6)
    assert packed[0, 4] == 0
    assert_close(packed[:, 5:], apart[1], rtol=0, atol=3e-6)


def test_temperatures_of_tokens() -> None:
    model, ids = make_model("llama"), make_batch(padded=False)["input_ids"]
    temperature = torch.rand(3, 8) + 0.5
    logits = model(ids).logits
    expected = prefkern.logits_logprobs(logits[:, :-1], ids[:, 1:], temperature=temperature).logp
    assert_close(token_logprobs(model, ids, temperature=temperature).logp, expected, rtol=0, atol=3e-6)
    assert_close(
        token_logprobs(model, ids, temperature=temperature[:, -3:], logits_to_keep=3).logp, expected[:, -3:], rtol=0, atol=3e-6
    )
    per_row = token_logprobs(model, ids, temperature=temperature[:, :1]).logp
    assert_close(per_row, prefkern.logits_logprobs(logits[:, :-1], ids[:, 1:], temperature=temperature[:, :1]).logp)


@pytest.mark.parametrize("width", [8, 3])
def test_tokens_that_could_be_drawn(width) -> None:
    """Over what a sampler's top-k left of each place; at two of them nothing counts, and nothing is kept."""
    model, batch = make_model("gemma2"), make_batch(padded=False)
    ids, labels = batch["input_ids"], batch["input_ids"].clone()
    labels[:2, -2] = -100
    logits = model(ids).logits[:, -width - 1 : -1].double()
    targets = labels[:, -width:]
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(5).indices, True)
    kept.scatter_(-1, targets.clamp(min=0)[..., None], True)
    kept[targets == -100] = False
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(-1).flatten().cumsum(0)])
    keep = offsets, kept.flatten(0, 1).nonzero()[:, 1]
    expected = logits.masked_fill(~kept & (targets != -100)[..., None], -torch.inf).log_softmax(-1)
    expected = expected.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets != -100, 0.0).float()
    found = token_logprobs(model, ids, labels=labels, logits_to_keep=width, keep=keep)
    assert_close(found.logp, expected, rtol=0, atol=3e-6)
    assert (found.logp > token_logprobs(model, ids, logits_to_keep=width).logp + 0.1).any()
    shifted = labels.roll(-1, 1)[:, :-1].contiguous()
    found = token_logprobs(model, ids[:, :-1], shift_labels=shifted, logits_to_keep=width, keep=keep)
    assert_close(found.logp, expected, rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match=rf"keep's offsets has shape \[{3 * width + 1}\].*3 x 2 elements.*\[7\]"):
        token_logprobs(model, ids, logits_to_keep=2, keep=keep)
    with pytest.raises(ValueError, match="keep is given, but BartForCausalLM makes its logits, because"):
        token_logprobs(make_model("bart"), ids, labels=labels, logits_to_keep=width, keep=keep)


def test_token_logprobs_falls_back() -> None:
    model, ids = make_model("bart"), make_batch(padded=False)["input_ids"]
    with pytest.warns(UserWarning, match="makes its logits after all"):
        found = token_logprobs(model, ids, logits_to_keep=3)
    assert_close(found.logp, expected_logprobs(model(ids).logits, ids)[0][:, -3:], rtol=0, atol=3e-6)


def test_embeddings_instead_of_tokens() -> None:
    model, batch = make_model("llama"), make_batch()
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    found = token_logprobs(model, None, batch["attention_mask"], labels=batch["labels"], inputs_embeds=embeddings)
    assert_close(found.logp, token_logprobs(model, **batch).logp)


def test_refusals_of_token_logprobs() -> None:
    model, batch = make_model("llama"), make_batch()
    ids, labels = batch["input_ids"], batch["labels"]
    with pytest.raises(ValueError, match="labels and shift_labels are both given"):
        token_logprobs(model, ids, labels=labels, shift_labels=labels)
    with pytest.raises(ValueError, match="input_ids is None"):
        token_logprobs(model, None)
    with pytest.raises(ValueError, match=r"shift_labels has shape \[3, 8\]; \[3, 9\] is expected"):
        token_logprobs(model, ids, shift_labels=labels[:, 1:])
    with pytest.raises(ValueError, match="logits_to_keep is 0"):
        token_logprobs(model, ids, logits_to_keep=0)
    with pytest.raises(ValueError, match=r"temperature has shape \[9\].* \[3, 8\]"):
        token_logprobs(model, ids, temperature=torch.ones(9))
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(model, ids, temperature=0)
    assert "forward" not in model.__dict__
