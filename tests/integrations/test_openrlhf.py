"""The code of docs/integrations/openrlhf.md, in a stand-in of the modules it changes, against what OpenRLHF computes there."""

import inspect
import re
import sys
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from integrations.pages import DOCS, blocks
from integrations.rollouts import MASK, make, value_and_gradient
from prefkern.papers import load_recipe, recipes

INIT = (
    "clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss", "policy_loss_type", "enable_vllm_is_correction",
    "vllm_is_truncated_threshold", "vllm_is_correction_type",
)  # fmt: skip
FORWARD = (
    "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", "dp_size", "batch_num_tokens",
    "global_batch_size",
)  # fmt: skip
"""Of OpenRLHF's PolicyLoss, in order; both are called by keyword and by position."""


def code(recipe="ngrpo"):
    """The names of the page's module, for a recipe."""
    (block,) = blocks("openrlhf.md", "python")
    assert 'load_recipe("ngrpo")' in block
    names = {}
    exec(block.replace('load_recipe("ngrpo")', f"load_recipe({recipe!r})"), names)
    return names


def theirs(
    leaf, old, advantages, mask, *, eps=(0.2, 0.2), dual=None, by_token=True, weight=1.0, dp_size=1, tokens=None, size=None
):  # fmt: skip
    """OpenRLHF's clipped loss, and its aggregation."""
    ratio = (leaf - old).clamp(-20, 20).exp()
    first, second = ratio * advantages, ratio.clamp(1 - eps[0], 1 + eps[1]) * advantages
    least = torch.minimum(first, second)
    if dual is not None:
        least = torch.where(advantages < 0, torch.maximum(least, dual * advantages), least)
    loss = -least * weight
    if by_token:
        total = mask.sum() if tokens is None else tokens / dp_size
        return (loss * mask).sum() / total
    rows = (loss * mask).sum(1) / (mask.sum(1) + 1e-8)
    return rows.sum() / ((mask.sum(1) > 0).sum() if size is None else size / dp_size)


def test_the_signatures_are_openrlhfs():
    names = code()
    assert tuple(inspect.signature(names["PolicyLoss"]).parameters) == INIT
    assert tuple(inspect.signature(names["PolicyLoss"].forward).parameters)[1:] == FORWARD
    assert tuple(inspect.signature(names["log_probs_from_logits"]).parameters) == ("logits", "labels", "temperature")
    assert tuple(inspect.signature(names["compute_entropy"]).parameters) == ("logits",)


def test_setup_puts_them_where_they_are_used(monkeypatch):
    modules = ("openrlhf", "openrlhf.models", "openrlhf.models.actor", "openrlhf.trainer", "openrlhf.trainer.ray",
               "openrlhf.trainer.ray.ppo_actor")  # fmt: skip
    for name in modules:
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    names = code()
    names["setup"]()
    actor, trainer = sys.modules["openrlhf.models.actor"], sys.modules["openrlhf.trainer.ray.ppo_actor"]
    assert actor.log_probs_from_logits is names["log_probs_from_logits"]
    assert actor.compute_entropy is names["compute_entropy"]
    assert trainer.PolicyLoss is names["PolicyLoss"]
    (hook,) = blocks("openrlhf.md", "text")
    assert re.search(r"prefkern_openrlhf\.setup", hook) and "`prefkern_openrlhf.py`" in (DOCS / "openrlhf.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies(dtype, temperature):
    names = code()
    logits = (3 * torch.randn(2, 5, 33)).to(dtype)
    kept, labels = logits.clone(), torch.randint(0, 33, (2, 5))
    exact = (logits.double() / temperature).log_softmax(-1)
    actual = names["log_probs_from_logits"](logits, labels, temperature)
    assert actual.dtype == torch.float32
    assert_close(actual.double(), exact.gather(-1, labels[..., None])[..., 0], rtol=0, atol=1e-4)
    assert torch.equal(logits, kept)
    exact = logits.double().log_softmax(-1)
    assert_close(names["compute_entropy"](logits).double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("totals", [{}, {"dp_size": 2, "batch_num_tokens": 80, "global_batch_size": 20}], ids=["", "global"])
@pytest.mark.parametrize(("recipe", "options"), [
    ("dapo", {"eps": (0.2, 0.28)}),
    ("ppo:dual_clip=1.2", {"dual": 1.2}),
    ("grpo", {"by_token": False}),
])  # fmt: skip
def test_the_clipped_loss_is_openrlhfs(recipe, options, totals):
    rollout, logp, _ = make(1)
    advantages = torch.linspace(-1, 1, 8, dtype=logp.dtype)[:, None].expand(8, 6)
    loss_fn = code(recipe)["PolicyLoss"]()
    mine = value_and_gradient(lambda leaf: loss_fn(leaf, rollout.old_logp, advantages, MASK.long(), **totals), logp)
    given = {
        "dp_size": totals.get("dp_size", 1),
        "tokens": totals.get("batch_num_tokens"),
        "size": totals.get("global_batch_size"),
    }
    expected = value_and_gradient(
        lambda leaf: (theirs(leaf, rollout.old_logp, advantages, MASK.double(), **given, **options),), logp
    )
    assert_close(mine[0], expected[0], rtol=1e-7, atol=1e-9)
    assert_close(mine[1], expected[1], rtol=1e-7, atol=1e-9)
    assert mine[3].item() == pytest.approx((rollout.old_logp - logp)[MASK].mean().item())
    assert 0 < mine[2] < 1
    assert mine[4] is None


@pytest.mark.parametrize("kind", ["tis", "icepop", "seq-mask-tis"])
def test_its_corrections_for_the_engine(kind):
    rollout, logp, _ = make(1)
    engine = rollout.old_logp + 0.3 * torch.linspace(-1, 1, 48, dtype=logp.dtype).view(8, 6)
    advantages = torch.linspace(-1, 1, 8, dtype=logp.dtype)[:, None].expand(8, 6)
    low, high = (0.98, 1.05) if kind == "seq-mask-tis" else (0.9, 1.1)
    loss_fn = code("ppo:dual_clip=None")["PolicyLoss"](
        enable_vllm_is_correction=True, vllm_is_truncated_threshold=[low, high], vllm_is_correction_type=kind
    )
    mine = value_and_gradient(lambda leaf: loss_fn(leaf, rollout.old_logp, advantages, MASK.long(), engine), logp)
    ratio = (rollout.old_logp - engine).exp()
    mean = ((rollout.old_logp - engine) * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)
    weight = {
        "tis": ratio.clamp(low, high),
        "icepop": ratio * ((ratio >= low) & (ratio <= high)),
        "seq-mask-tis": ratio * ((mean.exp() >= low) & (mean.exp() <= high)),
    }[kind]
    assert kind == "tis" or 0 < (weight[MASK] == 0).sum() < MASK.sum()
    expected = value_and_gradient(
        lambda leaf: (theirs(leaf, rollout.old_logp, advantages, MASK.double(), weight=weight),), logp
    )
    assert_close(mine[0], expected[0], rtol=1e-7, atol=1e-9)
    assert_close(mine[1], expected[1], rtol=1e-7, atol=1e-9)
    assert mine[4].item() == pytest.approx((engine - rollout.old_logp)[MASK].mean().item())


@pytest.mark.parametrize("name", ["ngrpo", "grpo", "dapo", "opo", "cispo", "sapo", "gpg", "ppo", "gdpo", "mo_grpo"])
def test_recipes_that_the_page_names(name):
    assert name in (DOCS / "openrlhf.md").read_text()
    recipe, (rollout, logp, _) = recipes()[name], make()
    prepared = recipe.prepare(rollout)
    advantages = prepared["advantages"]
    advantages = advantages[:, None].expand(8, 6) if advantages.dim() == 1 else advantages
    loss_fn = code(name)["PolicyLoss"]()
    mine = value_and_gradient(lambda leaf: loss_fn(leaf, rollout.old_logp, advantages, prepared["mask"]), logp)
    expected = value_and_gradient(lambda leaf: recipe.loss(leaf, prepared), logp)
    assert expected[1].abs().max() > 1e-4
    assert_close(mine[0], expected[0])
    assert_close(mine[1], expected[1])


@pytest.mark.parametrize("text", [
    "gmpo", "dr_grpo:max_length=6", "cgpo:kl_max=1.0", "grpo:beta=0.1", "gspo", "rloo", "gtpo", "etr", "copg", "disco",
    "reg_grpo", "trpa", "tppo",
])  # fmt: skip
def test_recipes_that_it_refuses(text):
    names = code(text)
    with pytest.raises(ValueError, match=f"recipe '{load_recipe(text).name}' has no loss here"):
        names["PolicyLoss"]()
