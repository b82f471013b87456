"""Recipes for pairs that ask for more than log-probs, or do much beside the op: nothing waits for data, compiling does not
break, and what is missing is named."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from pair_cases import CU_SEQLENS, F64, MASK, tokens
from prefkern.papers import Pairs, load_pair_recipe, pair_recipes

PER_TOKEN = {"sum_sq_probs": 0.5 * torch.ones(6, 5, dtype=F64), "position_kl": torch.linspace(0, 1, 30, dtype=F64).view(6, 5)}
PER_PAIR = {
    "chosen_scores": torch.tensor([3.0, 2.0, 1.5]), "rejected_scores": torch.tensor([1.0, 0.5, 1.0]),
    "gap_mean": torch.tensor(0.3, dtype=F64), "selected": torch.tensor([True, False, True]), "kl": torch.tensor(0.4, dtype=F64),
    "nll_logp": torch.tensor([-9.0, -4.0, -5.0], dtype=F64), "nll_lengths": torch.tensor([8, 5, 6]),
}  # fmt: skip
TEXTS = (
    "cpo", "cpo:kind=simpo,alpha=0.25", "orpo", "orpo:nll=given", "kto", "r_dpo", "odpo", "odpo:kind=linear", "ld_dpo", "wpo",
    "wpo:clamp=None", "beta_dpo", "dpop", "tdpo", "tdpo:version=1", "soft_preference",
)  # fmt: skip


def pairs_of(logp, ref, packing=False) -> Pairs:
    if packing:
        extra = {name: t[MASK] for name, t in PER_TOKEN.items()} | PER_PAIR
        return Pairs(logp[MASK], None, ref[MASK], CU_SEQLENS, extra)
    return Pairs(logp, MASK, ref, None, PER_TOKEN | PER_PAIR)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_nothing_waits_for_data(text, packing, monkeypatch) -> None:
    """Fake tensors raise where a value, or a shape that depends on one, is asked for. Checks are off, as under a compiler."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    pairs = pairs_of(*tokens(), packing)
    with FakeTensorMode() as mode:
        x = mode.from_tensor(pairs.logp).requires_grad_()
        given = {name: getattr(pairs, name) for name in ("mask", "ref_logp", "cu_seqlens")}
        fakes = {name: None if t is None else mode.from_tensor(t) for name, t in given.items()}
        extra = {name: mode.from_tensor(t) for name, t in pairs.extra.items()}
        out = load_pair_recipe(text).loss(Pairs(x, **fakes, extra=extra))
        (slope,) = torch.autograd.grad(out.loss, x)
        assert out.loss.shape == () and slope.shape == x.shape
        assert all(value.shape == () for value in out.metrics.values())


@pytest.mark.parametrize("text", ["beta_dpo", "kto", "ld_dpo", "orpo", "wpo"])
def test_they_compile_without_a_break(text) -> None:
    torch._dynamo.reset()
    recipe = load_pair_recipe(text)
    logp, ref = tokens()

    def loss(x):
        return recipe.loss(pairs_of(x, ref)).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = logp.clone().requires_grad_()
    assert_close(compiled(x), loss(x), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(x), x)[0] for of in (compiled, loss)), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("text", TEXTS)
def test_low_precision_is_summed_in_float32(text) -> None:
    logp, ref = (t.bfloat16() for t in tokens())
    out = load_pair_recipe(text).loss(pairs_of(logp, ref))
    exact = load_pair_recipe(text).loss(pairs_of(logp.double(), ref.double()))
    assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "needed"),
    [(name, key) for name in ("beta_dpo", "kto", "odpo", "tdpo", "wpo") for key in pair_recipes()[name].needs],
)
def test_what_is_missing_is_named(name, needed) -> None:
    logp, ref = tokens()
    extra = {key: value for key, value in {**PER_TOKEN, **PER_PAIR}.items() if key != needed}
    pairs = Pairs(logp, MASK, None if needed == "ref_logp" else ref, extra=extra)
    place = "pairs.ref_logp" if needed == "ref_logp" else f"pairs.extra[{needed!r}]"
    with pytest.raises(ValueError, match=re.escape(f"recipe {name!r} needs {place}, which is None")):
        pair_recipes()[name].loss(pairs)
