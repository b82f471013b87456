"""Worked pairs that several papers' tests share, in log-probs of whole responses and in tokens."""

import math

import torch
from torch.testing import assert_close

from prefkern.papers import PairRecipe, Pairs

F64 = torch.float64
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = torch.tensor([[-10, -8], [-12, -7], [-11, -7.5], [-11.5, -8]], dtype=F64)
REFS = (REF_CHOSEN, REF_REJECTED)
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.tensor([4, 2]), torch.tensor([3, 5])
MEAN_CHOSEN, MEAN_REJECTED = torch.tensor([[-0.3, -1.2], [-0.9, -2.5]], dtype=F64)
ONES = torch.ones(2, dtype=F64)

LENGTHS = torch.tensor([5, 2, 3, 1, 4, 5])  # of three chosen responses and three rejected ones
MASK = torch.arange(5) < LENGTHS[:, None]
CU_SEQLENS = torch.cat([LENGTHS.new_zeros(1), LENGTHS.cumsum(0)]).int()


def close(actual, expected, atol=1e-10) -> None:
    assert_close(torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=atol)


def gradients(loss, *tensors):
    """What `loss` of copies of these is, as LossOutput, and its derivatives to each."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = loss(*leaves)
    return out, *torch.autograd.grad(out.loss.sum(), leaves)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return -torch.rand(6, 5, dtype=F64) - 0.05, -torch.rand(6, 5, dtype=F64) - 0.05


def sums(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By hand, of each side."""
    return torch.where(MASK, values, 0.0).sum(1).chunk(2)


def assert_layouts_agree(recipe: PairRecipe, expected, per_token=None, per_pair=None):
    """Padded with NaN and packed, the recipe's loss is `expected(logp, ref)` with its gradient per token, and no reference gets
    one."""
    logp, ref = tokens()
    per_token, per_pair = per_token or {}, per_pair or {}
    x, y, z = (logp.clone().requires_grad_() for _ in range(3))
    r = ref.clone().requires_grad_()
    outside = {name: torch.where(MASK, t, math.nan) for name, t in per_token.items()}
    padded = Pairs(torch.where(MASK, x, math.nan), MASK, torch.where(MASK, r, math.nan), extra={**outside, **per_pair})
    packed = Pairs(y[MASK], None, ref[MASK], CU_SEQLENS, {**{name: t[MASK] for name, t in per_token.items()}, **per_pair})
    one, other, by_hand = recipe.loss(padded), recipe.loss(packed), expected(z, ref)
    assert_close(one.loss, by_hand, rtol=1e-10, atol=1e-12)
    assert_close(other.loss, by_hand, rtol=1e-10, atol=1e-12)
    assert set(one.metrics) == set(other.metrics) >= {"chosen_reward", "rejected_reward", "accuracy", "pairs"}
    for key, value in one.metrics.items():
        assert value.dim() == 0 and not value.requires_grad, key
        assert_close(value, other.metrics[key], rtol=1e-12, atol=1e-15, msg=key)
    (wanted,) = torch.autograd.grad(by_hand, z)
    got, reference = torch.autograd.grad(one.loss, (x, r), allow_unused=True)
    assert reference is None
    assert_close(got, wanted, rtol=1e-10, atol=1e-14)
    assert_close(torch.autograd.grad(other.loss, y)[0], wanted, rtol=1e-10, atol=1e-14)
    assert not got[~MASK].any() and got.any()
    return one
