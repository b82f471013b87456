"""Random ragged batches, the calls on them, and how results are compared.

What lies outside the mask is NaN in our arguments and finite in theirs, so that every comparison also shows that ours
never looks there.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch.testing import assert_close

F64, F32 = torch.float64, torch.float32
DTYPES = (F64, F32)
TOLERANCE = {F64: 1e-9, F32: 1e-5}


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@dataclass
class Batch:
    """Sequences of different lengths with holes in the mask: an empty one, one of a single token, a full one."""

    logp: torch.Tensor
    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    rollout_logp: torch.Tensor
    entropy: torch.Tensor
    weights: torch.Tensor
    token_advantages: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor

    @property
    def weight(self):
        """The mask in the type of the values."""
        return self.mask.to(self.logp.dtype)

    def nan_outside(self):
        """The same batch, NaN where the mask is False."""

        def hide(t):
            return t.masked_fill(~self.mask, float("nan")) if t.shape == self.mask.shape and t.is_floating_point() else t

        return replace(self, **{field.name: hide(getattr(self, field.name)) for field in fields(self)})


def make(seed, dtype=F64, shape=(7, 13), spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=F64)

    def uniform(*size):
        return torch.rand(size, generator=generator, dtype=F64)

    lengths = torch.randint(2, columns, (rows,), generator=generator)
    lengths[:3] = torch.tensor([columns, 1, 0])
    lengths = lengths[torch.randperm(rows, generator=generator)]
    mask = (torch.arange(columns) < lengths[:, None]) & (uniform(rows, columns) < 0.85)
    mask[:, 0] = lengths > 0
    logp = -3 * uniform(rows, columns) - 0.01
    floats = {
        "logp": logp,
        "old_logp": logp + spread * normal(rows, columns),
        "ref_logp": logp + spread * normal(rows, columns),
        "rollout_logp": logp + spread * normal(rows, columns),
        "entropy": 2 * uniform(rows, columns),
        "weights": 2 * uniform(rows, columns),
        "token_advantages": normal(rows, columns),
        "advantages": normal(rows),
    }
    # Multiples of 2^-20 are the same numbers in both types: no token changes sides when theirs is cast.
    rounded = {name: (value * 2**20).round().mul(2.0**-20).to(dtype) for name, value in floats.items()}
    return Batch(**rounded, mask=mask, lengths=lengths)


def value_and_gradient(function, logp):
    """The loss that `function(leaf)` gives, or (loss, anything), and its gradient."""
    leaf = logp.detach().clone().requires_grad_()
    out = function(leaf)
    loss, rest = out if isinstance(out, tuple) else (out, None)
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(leaf) if gradient is None else gradient, rest


def ours(function, batch, positional, *, packed=False, tensors=None, **options):
    """`function(logp, ..., mask)` on padded or packed tokens, NaN outside the mask: loss, gradient, metrics (or None).

    `positional` names fields of the batch that follow logp, `tensors` maps keyword arguments to fields or to tensors.
    """
    hidden = batch.nan_outside()
    inside = torch.arange(batch.mask.shape[1]) < batch.lengths[:, None]

    def argument(value):
        value = getattr(hidden, value) if isinstance(value, str) else value
        return value[inside] if packed and value is not None and value.shape == inside.shape else value

    keywords = {name: argument(value) for name, value in (tensors or {}).items()} | options
    if packed:
        keywords["cu_seqlens"] = torch.cat([torch.zeros(1), batch.lengths.cumsum(0)]).to(torch.int32)
    constants = [argument(name) for name in positional]
    loss, gradient, metrics = value_and_gradient(
        lambda leaf: function(leaf, *constants, argument("mask"), **keywords), argument("logp")
    )
    if packed:
        gradient = torch.zeros(inside.shape, dtype=gradient.dtype).masked_scatter(inside, gradient)
    return loss, gradient, metrics


def close(actual, expected, dtype=F64, scale=None):
    """Equal to 1e-9 (1e-5 in float32), relative to each value and to the largest."""
    tolerance = TOLERANCE[dtype]
    expected = torch.as_tensor(expected)
    if scale is None:
        scale = max(1.0, expected.abs().max().item()) if expected.dim() == 0 else expected.abs().max().item()
    assert_close(actual.to(F64), expected.to(F64), rtol=tolerance, atol=tolerance * scale)


def same(mine, theirs, dtype=F64):
    """Loss and gradient of both, from `ours` and from `value_and_gradient`."""
    close(mine[0], theirs[0], dtype)
    assert mine[1].isfinite().all()
    assert theirs[1].abs().max() > 0
    close(mine[1], theirs[1], dtype)
