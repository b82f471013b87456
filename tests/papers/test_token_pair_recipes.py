"""Recipes whose pairs bring more than two log-probs per token: they are the papers' functions on concatenated pairs."""

import pytest
import torch
from torch.testing import assert_close

from prefkern.papers import Pairs, load_pair_recipe, mcts_dpo, step_dpo, tgdpo

F64 = torch.float64
P, LENGTHS = 3, torch.tensor([5, 3, 2, 4, 1, 5])
MASK = torch.arange(5) < LENGTHS[:, None]
CU_SEQLENS = torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)]).int()
SMOOTHING = torch.tensor([0.25, 0.5, 0.0], dtype=F64)


def halves(*tensors: torch.Tensor):
    """The chosen half of each, then the rejected one, as functions of two sides take them."""
    return [half for t in tensors for half in t.chunk(2)]


def of_functions(name: str, logp: torch.Tensor, ref: torch.Tensor, guide: torch.Tensor):
    if name == "tgdpo":
        return tgdpo.tgdpo_loss(*halves(logp, ref, guide, MASK), beta=1.0, alpha=3.0, min_factor=-0.2)
    if name == "step_dpo":
        return step_dpo.step_dpo_loss(*halves(logp, ref, MASK))
    h = torch.where(MASK, logp - ref, 0.0).sum(1)
    return mcts_dpo.smoothed_dpo_loss(*h.chunk(2), SMOOTHING)


@pytest.mark.parametrize("text", ["tgdpo:beta=1.0,alpha=3.0,min_factor=-0.2", "step_dpo", "mcts_dpo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_recipes_are_the_functions(text, layout) -> None:
    logp, ref, guide = (-torch.rand(2 * P, 5, dtype=F64) for _ in range(3))
    leaf = logp.clone().requires_grad_()
    expected = of_functions(text.partition(":")[0], leaf, ref, guide)
    (expected_grad,) = torch.autograd.grad(expected.loss, leaf)
    given = logp.clone().requires_grad_()
    if layout == "padded":
        hide = [torch.where(MASK, t, torch.nan) for t in (given, ref, guide)]
        pairs = Pairs(hide[0], MASK, hide[1], extra={"guide_logp": hide[2], "label_smoothing": SMOOTHING})
    else:
        extra = {"guide_logp": guide[MASK], "label_smoothing": SMOOTHING}
        pairs = Pairs(given[MASK], None, ref[MASK], CU_SEQLENS, extra)
    out = load_pair_recipe(text).loss(pairs)
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(out.loss, given)[0], expected_grad, rtol=1e-12, atol=1e-15)
    assert out.metrics.keys() == expected.metrics.keys()
    for name, value in out.metrics.items():
        assert_close(value, expected.metrics[name], rtol=1e-6, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize(("name", "missing"), [("tgdpo", "guide_logp"), ("mcts_dpo", "label_smoothing")])
def test_what_is_missing_is_named(name, missing) -> None:
    with pytest.raises(ValueError, match=rf"recipe '{name}' needs pairs.extra\['{missing}'\], which is None"):
        load_pair_recipe(name).loss(Pairs(torch.zeros(2, 3), ref_logp=torch.zeros(2, 3)))
