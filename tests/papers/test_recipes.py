"""What holds for every recipe: packed equals padded, padding is never read, and on tensors without data nothing looks at it."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from every_recipe import COLUMNS, F64, LENGTHS, MASK, RECIPES
from prefkern.papers import Recipe, Rollout, take_rows

CU = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]).int()
TOKEN_FIELDS = ("mask", "old_logp", "ref_logp", "tokens")


def padded() -> tuple[Rollout, torch.Tensor, torch.Tensor]:
    """A rollout, and the policy's log-probs and entropies."""
    old = -torch.rand(8, 6, dtype=F64)
    rollout = Rollout(
        rewards=torch.tensor([1, 0, 0, 1, 0, 0.5, 0, 1], dtype=F64), group=torch.tensor([3, 3, 3, 3, 9, 9, 9, 9]), mask=MASK,
        old_logp=old, ref_logp=old + 0.1 * torch.randn(8, 6, dtype=F64), tokens=torch.randint(0, 3, (8, 6)),
        extra={**COLUMNS, "values": torch.randn(8, 6, dtype=F64)},
    )  # fmt: skip
    return rollout, old + 0.3 * torch.randn(8, 6, dtype=F64), 0.5 * torch.rand(8, 6, dtype=F64)


def packed(rollout: Rollout) -> Rollout:
    """The same without padding."""
    tokens = {name: getattr(rollout, name)[MASK] for name in TOKEN_FIELDS}
    extra = {**rollout.extra, "values": rollout.extra["values"][MASK]}
    return replace(rollout, **{**tokens, "mask": None}, cu_seqlens=CU, extra=extra)


def run(recipe: Recipe, rollout: Rollout, logp: torch.Tensor, entropy: torch.Tensor):
    logp = logp.clone().requires_grad_()
    out = recipe.loss(logp, recipe.prepare(rollout), entropy=entropy)
    out.loss.backward()
    return out, logp.grad


@pytest.mark.parametrize("name", RECIPES)
def test_packed_equals_padded(name) -> None:
    recipe = RECIPES[name]
    rollout, logp, entropy = padded()
    out, gradient = run(recipe, rollout, logp, entropy)
    again, packed_gradient = run(recipe, packed(rollout), logp[MASK], entropy[MASK])
    assert bool(gradient.any())
    assert_close(again.loss, out.loss, rtol=1e-12, atol=1e-14)
    assert_close(packed_gradient, gradient[MASK], rtol=1e-12, atol=1e-14)
    assert not gradient[~MASK].any()
    for key, value in out.metrics.items():
        assert value.dim() == 0 and not value.requires_grad
        assert_close(again.metrics[key], value, rtol=1e-12, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("name", RECIPES)
def test_padding_is_never_read(name) -> None:
    recipe = RECIPES[name]
    rollout, logp, entropy = padded()
    out, gradient = run(recipe, rollout, logp, entropy)
    nan = torch.full_like(logp, torch.nan)
    extra = {**rollout.extra, "values": rollout.extra["values"].where(MASK, nan)}
    dirty = replace(
        rollout, old_logp=rollout.old_logp.where(MASK, nan), ref_logp=rollout.ref_logp.where(MASK, nan), extra=extra
    )
    again, dirty_gradient = run(recipe, dirty, logp.where(MASK, nan), entropy.where(MASK, nan))
    assert torch.equal(again.loss, out.loss)
    assert torch.equal(dirty_gradient, gradient)


@pytest.mark.parametrize("name", RECIPES)
def test_minibatches_of_whole_groups(name) -> None:
    recipe = RECIPES[name]
    rollout, logp, entropy = padded()
    batch = recipe.prepare(rollout)
    for rows in (torch.arange(4), torch.arange(4, 8)):
        part = take_rows(batch, rows)
        assert all(value.shape[0] == 4 for value in part.values())
        assert bool(recipe.loss(logp[rows], part, entropy=entropy[rows]).loss.isfinite())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_nothing_waits_for_data(name, packing, monkeypatch) -> None:
    """Fake tensors raise where a value, or a shape that depends on one, is asked for. Checks are off, as under a compiler."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # the function itself is what Dynamo knows it by
    recipe = RECIPES[name]
    rollout, logp, entropy = padded()
    if packing:
        rollout, logp, entropy = packed(rollout), logp[MASK], entropy[MASK]
    with FakeTensorMode() as mode:
        fields = {
            name: mode.from_tensor(getattr(rollout, name))
            for name in ("rewards", "group", *TOKEN_FIELDS, "cu_seqlens")
            if getattr(rollout, name) is not None
        }
        fake = replace(rollout, **fields, extra={key: mode.from_tensor(value) for key, value in rollout.extra.items()})
        out, gradient = run(recipe, fake, mode.from_tensor(logp), mode.from_tensor(entropy))
        assert out.loss.shape == () and gradient.shape == logp.shape
