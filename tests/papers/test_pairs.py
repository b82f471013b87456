"""Preference pairs in every layout, and what every recipe for them promises."""

import dataclasses
import math
import re

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import PairRecipe, Pairs, load_pair_recipe, load_recipe, pair_recipes
from prefkern.papers._pairs import add_nll, nll

F64 = torch.float64
NAN = math.nan
LENGTHS = torch.tensor([5, 2, 3, 1, 4, 5])  # of three chosen responses and three rejected ones
MASK = torch.arange(5) < LENGTHS[:, None]
CU_SEQLENS = torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)]).int()
WITHOUT_EXTRAS = {"sppo": "sppo:mode=hard", "vpo": "vpo:alpha=0.0"}  # what else would ask for some
SIMPLE = [WITHOUT_EXTRAS.get(name, name) for name, recipe in pair_recipes().items() if set(recipe.needs) <= {"ref_logp"}]


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return -torch.rand(6, 5, dtype=F64) - 0.05, -torch.rand(6, 5, dtype=F64) - 0.05


def padded(logp, ref, **extra) -> Pairs:
    """What is not a token is NaN."""
    return Pairs(torch.where(MASK, logp, NAN), MASK, torch.where(MASK, ref, NAN), extra=extra)


def packed(logp, ref, **extra) -> Pairs:
    return Pairs(logp[MASK], None, ref[MASK], CU_SEQLENS, extra)


def sums(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.where(MASK, values, 0.0).sum(1).chunk(2)


# ---- pairs


@pytest.mark.parametrize("layout", [padded, packed])
def test_sums_ratios_and_lengths(layout) -> None:
    logp, ref = tokens()
    pairs = layout(logp, ref)
    assert len(pairs) == 3
    for got, expected in (
        (pairs.log_probs(), sums(logp)), (pairs.ref_log_probs(), sums(ref)), (pairs.log_ratios(), sums(logp - ref)),
        (pairs.sums(pairs.ref_logp, weights=2 * torch.ones_like(pairs.logp)), sums(2 * ref)),
    ):  # fmt: skip
        assert_close(got.chosen, expected[0], rtol=1e-14, atol=0)
        assert_close(got.rejected, expected[1], rtol=1e-14, atol=0)
    assert pairs.lengths().chosen.tolist() == [5, 2, 3] and pairs.lengths().rejected.tolist() == [1, 4, 5]


def test_without_a_reference_its_log_probs_are_zero() -> None:
    logp, _ = tokens()
    pairs = Pairs(logp, MASK)
    assert pairs.ref_log_probs().chosen.tolist() == pairs.ref_log_probs().rejected.tolist() == [0, 0, 0]
    assert_close(pairs.log_ratios().chosen, pairs.log_probs().chosen, rtol=0, atol=0)
    half = Pairs(logp.bfloat16(), MASK)
    assert half.ref_log_probs().chosen.dtype == half.log_probs().chosen.dtype == torch.float32


def test_ratios_do_not_cancel() -> None:
    """Per token 1e-4 apart, in sums of 1e5: float32 sums of each would lose it."""
    ref = torch.full((2, 1000), -100.0)
    pairs = Pairs(ref + 2**-13, None, ref)
    assert_close(pairs.log_ratios().chosen, torch.tensor([1000 * 2**-13]), rtol=1e-6, atol=0)


def test_without_a_mask_every_token_counts() -> None:
    pairs = Pairs(torch.full((4, 3), -1.0))
    assert pairs.log_probs().chosen.tolist() == [-3, -3] and pairs.lengths().rejected.tolist() == [3, 3]


def test_a_reference_is_a_constant() -> None:
    logp, ref = (x.requires_grad_() for x in tokens())
    pairs = Pairs(logp, MASK, ref)
    assert not pairs.ref_log_probs().chosen.requires_grad
    total = pairs.log_ratios().chosen.sum() + pairs.log_ratios().rejected.sum()
    gradients = torch.autograd.grad(total, (logp, ref), allow_unused=True)
    assert gradients[0] is not None and torch.equal(gradients[0], MASK.to(F64)) and gradients[1] is None


def test_fields_and_extras() -> None:
    logp, ref = tokens()
    margin = torch.tensor([1.0, 2.0, 3.0])
    pairs = Pairs(logp, MASK, ref, extra={"margin": margin})
    assert pairs.get("margin") is margin is pairs.require("margin") and pairs.get("mask") is MASK
    assert pairs.get("scores") is None and pairs.get("cu_seqlens") is None
    with pytest.raises(ValueError, match=re.escape("pairs.extra['scores'] is None; a torch.Tensor is expected")):
        pairs.require("scores")
    with pytest.raises(ValueError, match=r"pairs\.ref_logp is None; a torch\.Tensor is expected"):
        Pairs(logp).require("ref_logp")


@pytest.mark.parametrize("pairs", [(torch.zeros(3, 2),), (torch.zeros(4), None, None, torch.tensor([0, 1, 2, 4]))])
def test_odd_numbers_of_responses_are_refused(pairs) -> None:
    with pytest.raises(ValueError, match="logp has 3 responses; chosen and rejected ones, so an even number is expected"):
        Pairs(*pairs)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_lengths_of_empty_responses_are_refused(layout) -> None:
    logp = torch.zeros(4)
    empty = torch.tensor([[True, True], [False, False]])
    pairs = Pairs(logp.view(2, 2), empty) if layout == "padded" else Pairs(logp, None, None, torch.tensor([0, 4, 4]).int())
    with pytest.raises(ValueError, match=r"lengths\[1\] is 0\.0; a response needs at least one token that counts"):
        pairs.lengths()


# ---- likelihood of the chosen responses


def test_likelihoods() -> None:
    logp, lengths = torch.tensor([-6.0, -1.0]), torch.tensor([3, 1])
    assert nll(logp, lengths, "token") == 7 / 4
    assert nll(logp, lengths, "response") == 3 / 2
    assert nll(logp, lengths, "sum") == 7 / 2
    with pytest.raises(ValueError, match="nll_reduction is 'tokens'; accepted: 'token', 'response', 'sum'"):
        nll(logp, lengths, "tokens")


def test_a_likelihood_is_added_where_it_weighs() -> None:
    out = load_pair_recipe("dpo").loss(Pairs(torch.zeros(4, 1), None, torch.zeros(4, 1)))
    logp, lengths = torch.tensor([-6.0, -1.0], requires_grad=True), torch.tensor([3, 1])
    assert add_nll(out, 0, logp, None) is out
    more = add_nll(out, 2.0, logp, lengths)
    assert_close(more.loss.detach(), torch.tensor(math.log(2) + 3.5))
    assert more.metrics["nll"] == 1.75 and not more.metrics["nll"].requires_grad and "nll" not in out.metrics
    assert torch.autograd.grad(more.loss, logp)[0].tolist() == [-0.5, -0.5]
    assert add_nll(out, 1.0, logp, None, "sum").metrics["nll"] == 3.5
    with pytest.raises(ValueError, match="chosen_lengths is None; nll_reduction 'token' needs them"):
        add_nll(out, 1.0, logp, None)
    with pytest.raises(ValueError, match=r"chosen_lengths\[1\] is 0; a response needs at least one token"):
        add_nll(out, 1.0, logp, torch.tensor([3, 0]))


# ---- recipes


@pytest.mark.parametrize("name", SIMPLE)
def test_every_layout_gives_the_same(name) -> None:
    recipe = load_pair_recipe(name)
    logp, ref = tokens()
    x, y, r = logp.clone().requires_grad_(), logp.clone().requires_grad_(), ref.clone().requires_grad_()
    one, other = recipe.loss(padded(x, r)), recipe.loss(packed(y, ref))
    assert one.loss.isfinite() and one.loss.dim() == 0
    assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    assert set(one.metrics) == set(other.metrics) >= {"chosen_reward", "rejected_reward", "accuracy", "pairs"}
    for key, value in one.metrics.items():
        assert value.dim() == 0 and not value.requires_grad, key
        assert_close(value, other.metrics[key], rtol=1e-12, atol=0, msg=key)
    assert one.metrics["pairs"] == 3
    gradient, reference = torch.autograd.grad(one.loss, (x, r), allow_unused=True)
    (expected,) = torch.autograd.grad(other.loss, y)
    assert gradient is not None and reference is None
    assert_close(gradient, expected, rtol=1e-12, atol=1e-16)
    assert not gradient[~MASK].any() and gradient[MASK].any()


@pytest.mark.parametrize("name", SIMPLE)
def test_low_precision_is_summed_in_float32(name) -> None:
    logp, ref = (x.bfloat16() for x in tokens())
    out = load_pair_recipe(name).loss(Pairs(logp, MASK, ref))
    exact = load_pair_recipe(name).loss(Pairs(logp.double(), MASK, ref.double()))
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, exact.loss.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SIMPLE if load_pair_recipe(name).needs])
def test_what_is_missing_is_named(name) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"recipe {load_pair_recipe(name).name!r} needs pairs.ref_logp, which is None")
    ):
        load_pair_recipe(name).loss(Pairs(tokens()[0], MASK))


def test_a_missing_extra_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Margins(PairRecipe):
        name = "margins"
        needs = ("margin",)

        def pair_loss(self, pairs):
            return pairs.require("margin")

    logp, _ = tokens()
    margin = torch.zeros(3)
    assert Margins().loss(Pairs(logp, extra={"margin": margin})) is margin
    with pytest.raises(ValueError, match=re.escape("recipe 'margins' needs pairs.extra['margin'], which is None")):
        Margins().loss(Pairs(logp))


def test_recipes_from_text() -> None:
    recipe = load_pair_recipe("simpo:beta=2.5,gamma=1.0,kind=hinge", sft_weight=0.5)
    assert recipe.options() == {
        "beta": 2.5, "gamma": 1.0, "gamma_beta_ratio": None, "label_smoothing": 0.0, "kind": "hinge", "sft_weight": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("load", "text", "message"),
    [
        (load_pair_recipe, "simop", r"recipe is 'simop'; accepted: .*; did you mean 'simpo'\?"),
        (load_pair_recipe, "grpo", "recipe is 'grpo'; accepted: .*; load_recipe has it"),
        (load_recipe, "dpo", "recipe is 'dpo'; accepted: .*; load_pair_recipe has it"),
        (load_pair_recipe, "dpo:betta=1", r"recipe 'dpo' has no option 'betta'; accepted: beta, .*; did you mean 'beta'\?"),
        (load_pair_recipe, "simpo:kind=hing", r"accepted: 'sigmoid', 'hinge'; did you mean 'hinge'\?"),
    ],
)
def test_texts_refused(load, text, message) -> None:
    with pytest.raises(ValueError, match=message):
        load(text)


@pytest.mark.parametrize("name", ["aot", "asft", "bco", "simpo"])  # those that do most beside the op
def test_they_compile_without_a_break(name) -> None:
    torch._dynamo.reset()
    recipe = load_pair_recipe(name)
    logp, ref = tokens()

    def loss(x):
        return recipe.loss(Pairs(x, MASK, ref)).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = logp.clone().requires_grad_()
    assert_close(compiled(x), loss(x), rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(of(x), x)[0] for of in (compiled, loss)), rtol=1e-12, atol=1e-16)
