"""Reductions over the rows of a group, its pairs, and its normalisation. Kernels: ``csrc/groups``; formulas:
``csrc/math/groups.h``."""

from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import check_tensors, integer, number, same_device
from ._call import call, no_double_backward, undivided, validation
from .types import LevelPairs

_OPS = torch.ops.prefkern
_reduce_grad, _reduce_fwd = _OPS.group_reduce.default, _OPS.group_reduce_fwd.default
_normalize, _normalize_fwd = _OPS.group_normalize.default, _OPS.group_normalize_fwd.default
_pairs, _pairs_fwd = _OPS.level_pairs.default, _OPS.level_pairs_fwd.default
_normalize_backward, _pairs_backward = _OPS.group_normalize_backward.default, _OPS.level_pairs_backward.default

REDUCTIONS = ("sum", "mean", "min", "max", "logsumexp", "count")
_SUM, _MEAN, _, _MAX, _LOGSUMEXP, _COUNT = range(len(REDUCTIONS))


def group_reduce(
    values: Tensor,
    group: Tensor,
    *,
    mask: Tensor | None = None,
    reduce: Literal["sum", "mean", "min", "max", "logsumexp", "count"] = "sum",
) -> Tensor:
    r"""A reduction over the rows of each group that count, given to every row of the group.

    Args:
        values: ``[B]`` float32, bfloat16 or float16 (float64 on the CPU). Gradients flow to them from ``"sum"``, ``"mean"`` and
            ``"logsumexp"``, any number of times.
        group: ``[B]`` int64 or int32, same device. Equal ids belong together; any values, any order, groups of any sizes.
        mask: bool ``[B]``; True counts. None: every row counts. A row outside gets its group's result like the others, but its
            value is never looked at.
        reduce: ``"sum"``, ``"mean"``, ``"min"``, ``"max"``, ``"logsumexp"``, or ``"count"``, the number of rows that count.

    Returns:
        ``[B]`` float32, or float64 for float64 values; summed in double. Where no row of a group counts, sum, mean and count
        are 0, the minimum is inf, maximum and log-sum-exp are -inf. The mean of equal values is exactly this value. NaN among
        the rows that count makes the group's result NaN, except for its count.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(values=values, group=group)
    if mask is not None:
        check_tensors(mask=mask)
    result: Tensor = call(_reduce, _widened(values), group, mask, choice("reduce", reduce, REDUCTIONS))
    return result


def group_normalize(x: Tensor, group: Tensor, *, eps: float, ddof: int = 1, sigma_grad: bool = False) -> Tensor:
    r"""Values relative to their group, :math:`z = (x - m) / (s + \epsilon)`, differentiable.

    m is the mean of the group and s its standard deviation, with the divisor n - ddof. The gradient flows through m, and if
    ``sigma_grad`` is set through s too.

    Args:
        x: ``[B]`` float32, bfloat16 or float16 (float64 on the CPU).
        group: ``[B]`` int64 or int32, same device. Equal ids belong together; any values, any order, groups of any sizes.
        eps: :math:`\epsilon \ge 0`.
        ddof: 1 or 0.
        sigma_grad: whether s is differentiated.

    Returns:
        ``[B]`` float32, or float64 for float64 x. Where all x of a group are equal, and so in a group of one, z is exactly 0, s
        counts as a constant and the gradient is finite; with ``eps = 0`` it is 0 there. NaN makes its group NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
    """
    check_tensors(x=x, group=group)
    options = (number("eps", eps), integer("ddof", ddof), bool(sigma_grad))
    x = _widened(x)
    result: Tensor = call(_normalize if _differentiated(x) else _normalize_fwd, x, group, *options)[0]
    return result


def level_pairs(
    scores: Tensor,
    group: Tensor,
    levels: Tensor,
    *,
    beta: float = 0.1,
    anisotropy: float = 2.5,
    per_response: bool = False,
) -> LevelPairs:
    r"""The loss of all pairs of rows of a group whose levels differ (TRPA): the better level should have the higher score.

    Over all pairs (i, j) with the same group and :math:`\ell_i < \ell_j`, 1 being the best level:

    .. math::
        L = \frac{1}{P} \sum_{(i, j)} -\log \sigma(m_{ij}), \qquad m_{ij} = \kappa_i \beta\, (h_i - h_j)

    where :math:`\kappa_i` is ``anisotropy`` for a winner of level 1 and 1 for others. With ``per_response`` every score has its
    own: :math:`m_{ij} = \beta (\kappa_i h_i - \kappa_j h_j)`. The mean is over the pairs of all groups together.

    Args:
        scores: h, ``[B]`` float32, bfloat16 or float16 (float64 on the CPU). The only argument with a gradient.
        group: ``[B]`` int64 or int32, same device. Equal ids belong together; any values, any order, groups of any sizes.
        levels: ``[B]`` int64 or int32, from 1 on.
        beta, anisotropy: finite.
        per_response: see above.

    Returns:
        LevelPairs(loss, pairs), both 0-d; 0 without any pair. No list of pairs is made: memory is O(B). Summed in double, and
        stable for margins of any size.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A level below 1 is always found on the
            CPU; on CUDA the loss comes out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(scores=scores, group=group, levels=levels)
    if levels.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate(levels)
    scores = _widened(scores)
    options = (number("beta", beta), number("anisotropy", anisotropy), bool(per_response))
    with_grad = _differentiated(scores)
    return LevelPairs(*call(_pairs if with_grad else _pairs_fwd, scores, group, levels, *options, with_grad)[:2])


def _differentiated(t: Tensor) -> bool:
    return t.requires_grad and torch.is_grad_enabled()


def _reduce(values: Tensor, group: Tensor, mask: Tensor | None, reduction: int) -> Tensor:
    result: Tensor = (_reduce_grad if _differentiated(values) else _reduce_fwd)(values, group, mask, reduction)
    return result


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _validate(levels: Tensor) -> None:
    bad = levels < 1
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"levels[{i}] is {levels[i].item()}; levels begin at 1, the best")


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _check_fake_rows(name: str, rows: Tensor, **others: Tensor | None) -> None:
    same_device(name, rows, **others)
    torch._check(rows.dim() == 1, lambda: f"{name} has shape {list(rows.shape)}; expected [B]")
    for other, t in others.items():
        if t is not None:
            torch._check(
                t.dim() == 1 and t.shape[0] == rows.shape[0], lambda other=other: f"{other} must be shaped like {name}"
            )


def _fake_reduce(values: Tensor, group: Tensor, mask: Tensor | None, reduction: int) -> Tensor:
    _check_fake_rows("values", values, group=group, mask=mask)
    return values.new_empty(values.shape)


def _fake_normalize(x: Tensor, group: Tensor, eps: float, ddof: int, sigma_grad: bool) -> tuple[Tensor, ...]:
    _check_fake_rows("x", x, group=group)
    return tuple(x.new_empty(x.shape) for _ in range(3))


@torch.library.register_fake("prefkern::group_normalize_backward")
def _fake_normalize_backward(g: Tensor, group: Tensor, z: Tensor, scale: Tensor, slope: Tensor) -> Tensor:
    return z.new_empty(z.shape)


def _fake_pairs(
    scores: Tensor, group: Tensor, levels: Tensor, beta: float, anisotropy: float, per_response: bool, with_grad: bool
) -> tuple[Tensor, ...]:
    _check_fake_rows("scores", scores, group=group, levels=levels)
    unnormalised = scores.new_empty(scores.shape if with_grad else (0,))
    return scores.new_empty(()), scores.new_empty((), dtype=torch.int64), unnormalised


@torch.library.register_fake("prefkern::level_pairs_backward")
def _fake_pairs_backward(g_loss: Tensor, unnormalised: Tensor, pairs: Tensor) -> Tensor:
    return unnormalised.new_empty(unnormalised.shape)


for _name, _fake in (("group_reduce", _fake_reduce), ("group_normalize", _fake_normalize), ("level_pairs", _fake_pairs)):
    torch.library.register_fake(f"prefkern::{_name}", _fake)
    torch.library.register_fake(f"prefkern::{_name}_fwd", _fake)


def _setup_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, group, mask, ctx.reduction = inputs
    ctx.save_for_backward(group, mask, values if ctx.reduction == _LOGSUMEXP else None)
    if ctx.reduction not in (_SUM, _MEAN, _LOGSUMEXP):
        ctx.mark_non_differentiable(output)


def _backward_reduce(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    # A row gets what comes to all rows of its group. Of ops with derivatives of their own, so that this has one too.
    group, mask, values = ctx.saved_tensors
    grad = _reduce(g, group, None, _SUM)
    if ctx.reduction == _MEAN:
        grad = grad / _reduce(g.detach(), group, mask, _COUNT).clamp_min(1)
    elif ctx.reduction == _LOGSUMEXP:
        # Not exp(values - result): the result is rounded, and at a large maximum nothing would be left of its logarithm.
        values = values if mask is None else values.masked_fill(~mask, -torch.inf)
        highest = _reduce(values.detach(), group, None, _MAX)
        weights = (values - highest.masked_fill(highest == -torch.inf, 0.0)).exp()
        total = _reduce(weights, group, None, _SUM)
        grad = grad * (weights / total.masked_fill(total == 0, 1.0))
    return (grad if mask is None else grad.masked_fill(~mask, 0.0)), None, None, None


def _setup_normalize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_normalize(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 5
    return (_normalize_backward(undivided(g), *(t.detach() for t in ctx.saved_tensors)), *(None,) * 4)


def _setup_pairs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    if not inputs[-1]:
        raise ValueError("with_grad is False, but scores requires a gradient")
    _, pairs, unnormalised = output
    ctx.save_for_backward(unnormalised, pairs)
    ctx.mark_non_differentiable(pairs, unnormalised)
    ctx.set_materialize_grads(False)


def _backward_pairs(ctx: Any, g_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if g_loss is None:
        return (None,) * 7
    return (_pairs_backward(undivided(g_loss), *ctx.saved_tensors), *(None,) * 6)


torch.library.register_autograd("prefkern::group_reduce", _backward_reduce, setup_context=_setup_reduce)
torch.library.register_autograd("prefkern::group_normalize", _backward_normalize, setup_context=_setup_normalize)
torch.library.register_autograd("prefkern::level_pairs", _backward_pairs, setup_context=_setup_pairs)
no_double_backward("group_normalize_backward")
no_double_backward("level_pairs_backward")
