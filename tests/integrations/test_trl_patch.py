"""TRL's head against prefkern's where TRL calls it, and its trainers with either."""

import inspect
import sys
import types

import pytest
import torch
from torch.testing import assert_close

from integrations.trl_tiny import build, history, save_model, trl
from prefkern.integrations import trl as ours
from prefkern.integrations.trl import _patch

utils = trl.trainer.utils
THEIRS = (utils._ChunkedLogProbFunction,)  # in a tuple: a plain name of a module is replaced by the patch
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
KINDS = ("GRPO", "RLOO", "DPO", "KTO", "SFT")


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    ours.unpatch()
    assert utils._ChunkedLogProbFunction is THEIRS[0]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


# ------------------------------------------------------------------------------------------------------------- the head


def operands(dtype=torch.float32, bias=True, rows=37, hidden=24, vocab=301, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator)
    w = torch.randn(vocab, hidden, generator=generator) / 3
    w[7] = w[5]  # a tie
    b = torch.randn(vocab, generator=generator) if bias else None
    if bias:
        b[7] = b[5]
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[:3] = torch.tensor([5, 7, 0])
    return h.to(dtype), w.to(dtype), None if b is None else b.to(dtype), targets


def run(function, inputs, outputs, temperature=1.0, softcap=None, scale=1.0, entropy_gradient=True, chunk=64):
    """(results, gradients of a weighted sum of log-probs and entropies)"""
    *tensors, targets = inputs
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = function.apply(*leaves, targets, temperature, chunk, softcap, scale, outputs)
    weights = torch.linspace(-1, 2, len(targets))
    loss = (out[0] * weights).sum()
    if out[1] is not None and entropy_gradient:
        loss = loss + (out[1] * weights.flip(0)).sum()
    loss.backward()
    return out, [None if t is None else t.grad for t in leaves]


OPTIONS = {"plain": (1.0,), "temperature": (0.7,), "softcap": (1.3, 5.0), "scale": (0.9, None, 0.25), "all": (1.1, 7.0, 2.0)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("outputs", [("log_probs", *ALL), ("log_probs",), ("entropy", "is_top1")], ids=["all", "logp", "some"])
def test_values_and_gradients(options, bias, outputs):
    inputs = operands(bias=bias)
    expected, expected_gradients = run(THEIRS[0], inputs, outputs, *options)
    mine, gradients = run(_patch.ChunkedLogProbFunction, inputs, outputs, *options)
    for a, b in zip(mine, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_results_mean():
    """Against the definitions in float64."""
    h, w, b, targets = operands()
    logp, entropy, log_sum_sq, mean, top1 = _patch.ChunkedLogProbFunction.apply(h, w, b, targets, 0.8, 64, 6.0, 0.5, ALL)
    z = 6 * torch.tanh((h.double() @ w.double().T + b.double()) * 0.5 / 6) / 0.8
    exact = z.log_softmax(-1)
    assert_close(logp.double(), exact.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-5)
    assert_close(log_sum_sq.double(), (2 * exact).logsumexp(-1), rtol=0, atol=1e-5)
    assert_close(mean.double(), z.mean(-1), rtol=0, atol=1e-5)
    assert torch.equal(top1, z.argmax(-1) == targets)
    assert not (log_sum_sq.requires_grad or mean.requires_grad)


def test_entropy_without_a_gradient_of_its_own():
    inputs = operands()
    _, expected = run(THEIRS[0], inputs, ALL, 1.0, entropy_gradient=False)
    _, mine = run(_patch.ChunkedLogProbFunction, inputs, ALL, 1.0, entropy_gradient=False)
    for a, b in zip(mine, expected, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_first():
    h, w, b, _ = operands()
    h, b = h[:2], b.clone()
    b[5] = b[7] = 40.0
    for function in (THEIRS[0], _patch.ChunkedLogProbFunction):
        assert function.apply(h, w, b, torch.tensor([5, 7]), 1.0, 64)[4].tolist() == [True, False]


def test_no_rows():
    h, w, b, targets = operands(rows=5)
    leaf = h[:0].clone().requires_grad_()
    out = _patch.ChunkedLogProbFunction.apply(leaf, w, b, targets[:0], 1.0, 64)
    assert [len(t) for t in out] == [0] * 5
    out[0].sum().backward()
    assert leaf.grad.shape == leaf.shape


def exact_logp(h, w, b, targets):
    logits = h.double() @ w.double().T + (0 if b is None else b.double())
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("how", ["tensors", "autocast"])
def test_bfloat16_is_nearer_to_the_truth(how):
    """Logits are not rounded here: the error is that of the operands' products in float32."""
    inputs = operands(torch.bfloat16 if how == "tensors" else torch.float32, hidden=96, rows=64)
    rounded = [t if t is None or not t.is_floating_point() else t.bfloat16() for t in inputs]
    truth = exact_logp(rounded[0], rounded[1], inputs[2] if how == "autocast" else rounded[2], inputs[3])
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        errors = [
            (function.apply(*inputs, 1.0, 64, None, 1.0, ())[0].double() - truth).abs().max().item()
            for function in (_patch.ChunkedLogProbFunction, THEIRS[0])
        ]
    assert errors[0] < 1e-4
    assert errors[1] > 1e-3


def test_float32_hidden_states_and_a_bfloat16_weight():
    """TRL computes in the type of the hidden states."""
    h, w, b, targets = operands()
    inputs = (h, w.bfloat16(), b.bfloat16(), targets)
    (expected, *_), theirs = run(THEIRS[0], inputs, (), 1.0)
    (mine, *_), gradients = run(_patch.ChunkedLogProbFunction, inputs, (), 1.0)
    assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for a, b in zip(gradients, theirs, strict=True):
        assert_close(a, b, rtol=2e-2, atol=1e-2 if a.dtype == torch.bfloat16 else 1e-5)


def test_partitioned_weights(monkeypatch):
    """As under ZeRO-3: outside of the context that gathers them they are empty, in the backward too."""
    h, w, b, targets = operands()
    _, expected = run(_patch.ChunkedLogProbFunction, (h, w, b, targets), ALL, 0.9, 8.0)
    leaf, weight, bias = h.clone().requires_grad_(), torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())

    class Gather:
        opened = 0

        def __init__(self, *parameters):
            assert parameters == (weight, bias) or all(p is q for p, q in zip(parameters, (weight, bias), strict=True))

        def __enter__(self):
            Gather.opened += 1
            weight.data, bias.data = w.clone(), b.clone()

        def __exit__(self, *_):
            weight.data, bias.data = w.new_zeros(0), b.new_zeros(0)

    monkeypatch.setattr(_patch, "_weights_are_partitioned", lambda: True)
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", Gather)
    with Gather(weight, bias):
        out = _patch.ChunkedLogProbFunction.apply(leaf, weight, bias, targets, 0.9, 64, 8.0, 1.0, ALL)
    assert weight.numel() == 0
    weights = torch.linspace(-1, 2, len(targets))
    loss = (out[0] * weights).sum() + (out[1] * weights.flip(0)).sum()
    mine = {}
    for name, parameter in (("weight", weight), ("bias", bias)):
        # the engine's hook sees the gradient while the parameter is whole; a plain leaf's .grad would need its shape
        parameter.register_hook(lambda g, name=name: mine.__setitem__(name, g.clone()))
    gradients = torch.autograd.grad(loss, [leaf, weight, bias])
    assert Gather.opened == 2
    for a, b in zip(gradients, expected, strict=True):
        assert_close(a, b)
    assert set(mine) == {"weight", "bias"}


# ------------------------------------------------------------------------------------------------------------ the patch


def test_patch_and_back():
    use_triton, training_step = utils._use_triton, trl.GRPOTrainer.training_step
    assert "training_step" not in trl.trainer.base_trainer._BaseTrainer.__dict__
    handle = ours.patch()
    assert utils._ChunkedLogProbFunction is _patch.ChunkedLogProbFunction
    assert trl.kernels.ChunkedLogProbFunction is _patch.ChunkedLogProbFunction
    assert trl.kernels.chunked_logprob.ChunkedLogProbFunction is THEIRS[0]
    assert handle.calls == 0
    assert repr(handle) == "Patch(calls=0)"
    assert ours.patch() is not handle  # and changes nothing:
    ours.unpatch()
    assert utils._ChunkedLogProbFunction is THEIRS[0]
    assert trl.kernels.ChunkedLogProbFunction is THEIRS[0]
    assert utils._use_triton is use_triton
    assert trl.GRPOTrainer.training_step is training_step
    assert "training_step" not in trl.trainer.base_trainer._BaseTrainer.__dict__
    ours.unpatch()


def test_as_a_context():
    with ours.patch() as outer:
        with ours.patch():
            pass
        assert utils._ChunkedLogProbFunction is _patch.ChunkedLogProbFunction
        h, w, b, targets = operands()
        utils._ChunkedLogProbFunction.apply(h, w, b, targets, 1.0, 64)
        assert outer.calls == 1
    assert utils._ChunkedLogProbFunction is THEIRS[0]
    with pytest.raises(KeyError), ours.patch():
        raise KeyError
    assert utils._ChunkedLogProbFunction is THEIRS[0]


def test_names_that_were_imported_before(monkeypatch):
    module = types.ModuleType("somebodys_trainer")
    module.Head = THEIRS[0]
    monkeypatch.setitem(sys.modules, "somebodys_trainer", module)
    with ours.patch():
        assert module.Head is _patch.ChunkedLogProbFunction
    assert module.Head is THEIRS[0]


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "1.17.0.dev0", "2.0.0"])
def test_versions_that_were_not_tested(monkeypatch, found):
    monkeypatch.setattr(trl, "__version__", found)
    with pytest.raises(ImportError, match=rf"trl is {found}; .* from 1\.16 to before 1\.17"):
        ours.patch()
    assert utils._ChunkedLogProbFunction is THEIRS[0]
    with pytest.raises(ImportError, match="tested with versions"):
        _ = ours.PrefkernGRPOTrainer


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="trl is not installed"):
        ours.patch()


def test_a_hook_that_is_another(monkeypatch):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            raise AssertionError

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(RuntimeError, match=r"takes \['ctx', 'hidden', 'weight', 'targets'\]"):
        ours.patch()


def test_the_signature_is_trls():
    mine = list(inspect.signature(_patch.ChunkedLogProbFunction.apply).parameters)
    assert ["ctx", *mine] == list(inspect.signature(THEIRS[0].forward).parameters)


def test_no_such_name():
    with pytest.raises(AttributeError, match="PrefkernSFTTrainer"):
        _ = ours.PrefkernSFTTrainer


# --------------------------------------------------------------------------------------------------------- the trainers


def steps(kind, path, tmp_path, patched, **options):
    """(what each step logged, the weights afterwards, calls)"""
    with ours.patch() if patched else torch.enable_grad() as handle:
        trainer = build(kind, path, tmp_path / f"{kind}-{patched}", **options)
        logged = history(trainer)
    weights = torch.cat([p.detach().float().flatten() for p in trainer.model.parameters()])
    return logged, weights, handle.calls if patched else None


def close_logs(mine, theirs, rtol, atol):
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == pytest.approx(b[key], rel=rtol, abs=atol), key


EXTRA = {"GRPO": {"beta": 0.1}, "RLOO": {}, "DPO": {"use_weighting": True}, "KTO": {}, "SFT": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_train_as_before(kind, model_path, tmp_path):
    """Two optimiser steps each: losses, metrics, gradient norms and weights."""
    theirs, their_weights, _ = steps(kind, model_path, tmp_path, False, **EXTRA[kind])
    mine, weights, calls = steps(kind, model_path, tmp_path, True, **EXTRA[kind])
    assert len(mine) == 2
    assert calls >= 2
    close_logs(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(entry["grad_norm"] > 1e-3 for entry in mine)
    assert_close(weights, their_weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_trainers_are_nearer_to_float32(kind, model_path, tmp_path):
    """Log-probs and entropies of a bfloat16 model's first step: TRL rounds logits to bfloat16, prefkern does not."""
    options = {"max_steps": 1, "model_init_kwargs": {"dtype": "bfloat16"}}
    path = save_model(tmp_path / "bf16", torch.bfloat16)
    losses = {}

    class Float64Head:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, *_):
            z = hidden.double() @ weight.double().T / temperature
            logp = z.log_softmax(-1)
            chosen = logp.gather(1, targets[:, None])[:, 0].float()
            entropy = -(logp.exp() * logp).sum(-1).float()
            return chosen, entropy, (2 * logp).logsumexp(-1).float(), z.mean(-1).float(), z.argmax(-1) == targets

    with pytest.MonkeyPatch.context() as m:
        m.setattr(utils, "_ChunkedLogProbFunction", Float64Head)
        exact, _, _ = steps(kind, path, tmp_path / "exact", False, **options)
    for patched in (True, False):
        losses[patched], _, _ = steps(kind, path, tmp_path / "bf16-run", patched, **options)
    keys = {"DPO": ["logps/chosen", "logps/rejected"], "KTO": ["logps/chosen"], "SFT": ["loss"]}.get(kind, ["entropy"])
    for key in keys:
        mine, theirs = (abs(losses[patched][0][key] - exact[0][key]) for patched in (True, False))
        assert mine <= 1e-4 * abs(exact[0][key])
        assert mine < theirs


@pytest.mark.parametrize("kind", ["GRPO", "DPO"])
def test_a_step_that_goes_around_the_head(kind, model_path, tmp_path, monkeypatch):
    ours.patch()
    trainer = build(kind, model_path, tmp_path)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", THEIRS[0])
    with pytest.raises(RuntimeError, match=f"{kind}Trainer did a training step in which prefkern's head was not called"):
        trainer.train()


def test_trainers_that_exist_already(model_path, tmp_path):
    trainer = build("SFT", model_path, tmp_path)
    with ours.patch() as handle:
        trainer.train()
    assert handle.calls == 2


def test_only_labelled_rows_are_scored(model_path, tmp_path, monkeypatch):
    rows = []
    head = _patch.linear_logprobs
    monkeypatch.setattr(_patch, "linear_logprobs", lambda h, *a, **k: rows.append(len(h)) or head(h, *a, **k))
    with ours.patch():
        trainer = build("DPO", model_path, tmp_path, max_steps=1)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.train()
    assert rows == [batch["completion_mask"][:, 1:].sum()] * 2


@pytest.mark.parametrize(
    "config",
    [
        {"family": "Gemma2", "final_logit_softcapping": 3.0, "head_dim": 8},
        {"family": "Cohere", "logit_scale": 0.25},
        {"family": "Granite", "logits_scaling": 4.0},
        {"tie_word_embeddings": True},
    ],
    ids=["softcap", "scale", "scaling", "tied"],
)
def test_other_models(config, tmp_path):
    path = save_model(tmp_path / "model", **config)
    options = {"max_steps": 1}
    theirs, their_weights, _ = steps("SFT", path, tmp_path, False, **options)
    mine, weights, _ = steps("SFT", path, tmp_path, True, **options)
    close_logs(mine, theirs, rtol=1e-4, atol=1e-5)
    assert_close(weights, their_weights, rtol=1e-4, atol=1e-4)
