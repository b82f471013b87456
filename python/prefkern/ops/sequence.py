"""Sums over the tokens of each sequence, returns and advantage estimates. Kernels: ``csrc/sequence``; formulas:
``csrc/math/sequence.h``, ``csrc/math/returns.h``."""

from typing import Any, Literal

import torch
from torch import Tensor

from ._arguments import accumulator, check_layout, check_tensors, number, same_device
from ._call import call, choice, no_double_backward, validation
from .types import GaeOutput

_OPS = torch.ops.prefkern
_reduce, _reduce_fwd = _OPS.sequence_reduce.default, _OPS.sequence_reduce_fwd.default
_reduce_backward = _OPS.sequence_reduce_backward.default
_discounted_returns, _segmented_returns = _OPS.discounted_returns.default, _OPS.segmented_returns.default
_gae = _OPS.gae.default

TRANSFORMS = ("none", "exp")
BOOTSTRAPS = ("repeat", "critic", "zero")


def sequence_sum(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
) -> Tensor:
    r"""A sum over the tokens of each sequence that count, :math:`\sum_t w_t\, f(x_t - y_t)`.

    Args:
        values: x, ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. float32, bfloat16 or float16 (float64 on the CPU);
            computed in float32 (float64). The only argument with a gradient: all others are constants, even if they require
            one.
        mask: bool, shaped like ``values``; True counts. None: every token counts. What lies outside is never looked at: NaN
            there changes nothing, and its gradient is exactly 0.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.
        minus: y, shaped like ``values``; None for 0. Subtracted per token, so that two large sums do not cancel.
        weights: w, shaped like ``values``; None for 1.
        transform: f, ``"none"`` or ``"exp"``: with ``minus`` a sum of log-ratios, or of ratios.

    Returns:
        ``[B]`` float32, or float64 for float64 values; 0 for a sequence without tokens.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens`` are always found on the
            CPU; on CUDA everything comes out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    return _sequence_reduce(values, mask, cu_seqlens, minus, weights, transform, False)


def sequence_mean(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
) -> Tensor:
    """:func:`sequence_sum` divided by the number of tokens of the sequence that count; 0 where there are none."""
    return _sequence_reduce(values, mask, cu_seqlens, minus, weights, transform, True)


def _sequence_reduce(
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    minus: Tensor | None,
    weights: Tensor | None,
    transform: Literal["none", "exp"],
    mean: bool,
) -> Tensor:
    check_tensors(values=values)
    check_tensors(**{name: t for name, t in (("mask", mask), ("minus", minus), ("weights", weights)) if t is not None})
    check_layout(cu_seqlens, values, "values")
    transform_id = choice("transform", transform, TRANSFORMS)
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    constants = (mask, cu_seqlens, _constant(minus), _constant(weights))
    op = _reduce if values.requires_grad and torch.is_grad_enabled() else _reduce_fwd
    result: Tensor = call(op, values, *constants, transform_id, mean)
    return result


def discounted_returns(
    rewards: Tensor, mask: Tensor | None = None, *, gamma: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    r"""Discounted returns of the tokens of each sequence, :math:`R_t = r_t + \gamma R_{t+1}` (REINFORCE++).

    A token that does not count is passed over as if it were not there: what comes from behind it is not discounted for it,
    and it gets 0 itself.

    Args:
        rewards: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. float32, bfloat16 or float16 (float64 on the CPU).
            Constants: no gradient flows to them.
        mask: bool, shaped like ``rewards``; True counts. None: every token counts. What lies outside is never looked at.
        gamma: in ``[0, 1]``.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.

    Returns:
        Shaped like ``rewards``, float32, or float64 for float64 rewards; carried along in double.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens`` are always found on the
            CPU; on CUDA everything comes out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(rewards=rewards)
    if mask is not None:
        check_tensors(mask=mask)
    check_layout(cu_seqlens, rewards, "rewards")
    result: Tensor = call(_discounted_returns, _constant(rewards), mask, cu_seqlens, number("gamma", gamma))
    return result


def segmented_returns(rewards: Tensor, segment: Tensor, order: Tensor, *, gamma: float) -> Tensor:
    r"""Discounted returns over the rows of each segment, wherever they lie: :math:`G_b = r_b + \gamma G_{b'}`, where b' is the
    row that follows b in its segment.

    With one row for each step of an agent, ``segment`` being the episode and ``order`` the step: GiGPO's step returns.

    Args:
        rewards: ``[B]`` float32, bfloat16 or float16 (float64 on the CPU). Constants: no gradient flows to them.
        segment: ``[B]`` int64 or int32. Equal ids belong together; any values, any order.
        order: ``[B]`` int64 or int32, the place of a row in its segment. Any integers, but no two rows of a segment share
            one.
        gamma: in ``[0, 1]``.

    Returns:
        ``[B]``, float32, or float64 for float64 rewards; carried along in double.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. A place that occurs twice is always found on
            the CPU; on CUDA the rows of its segment come out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(rewards=rewards, segment=segment, order=order)
    if rewards.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_places(segment, order)
    result: Tensor = call(_segmented_returns, _constant(rewards), segment, order, number("gamma", gamma))
    return result


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    finished: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Literal["repeat", "critic", "zero"] = "repeat",
    last_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> GaeOutput:
    r"""Generalised advantage estimates, of sequences that are finished and of such that were cut off (EGAE).

    Over the l tokens of a sequence that count:

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad A_l = 0

    :math:`V_l`, the value of the state behind the last token, is 0 where the sequence is finished, and else up to
    ``bootstrap``.

    Args:
        rewards: ``[B, T]``, or packed ``[N]`` with ``cu_seqlens``. float32, bfloat16 or float16 (float64 on the CPU).
            Constants, as is everything here: no gradient flows.
        values: V, shaped like ``rewards``; any floating dtype.
        mask: bool, shaped like ``rewards``; True counts. None: every token counts. A token that does not count is never looked
            at and passed over as if it were not there.
        lengths: ``[B]`` int64 or int32, in place of a mask of padded sequences: the first so many tokens count.
        finished: bool ``[B]``; None: all are.
        gamma, lam: in ``[0, 1]``.
        bootstrap: :math:`V_l` of an unfinished sequence. ``"repeat"``: :math:`V_{l-1}` once more (T-PPO's EGAE);
            ``"critic"``: ``last_values``; ``"zero"``: 0, as if it were finished.
        last_values: ``[B]``, with ``"critic"`` only; those of finished sequences are not looked at.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.

    Returns:
        GaeOutput(advantages, returns = advantages + values), shaped like ``rewards``, 0 at tokens that do not count.
        float32, or float64 for float64 rewards; carried along in double.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens`` and ``lengths`` are
            always found on the CPU; on CUDA everything, or the sequence, comes out NaN, or it raises under
            ``prefkern.set_validation(True)``.
    """
    check_tensors(rewards=rewards, values=values)
    given = (("mask", mask), ("lengths", lengths), ("finished", finished), ("last_values", last_values))
    check_tensors(**{name: t for name, t in given if t is not None})
    check_layout(cu_seqlens, rewards, "rewards")
    if lengths is not None and lengths.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_lengths(lengths, rewards)
    options = (number("gamma", gamma), number("lam", lam), choice("bootstrap", bootstrap, BOOTSTRAPS))
    constants = (_constant(values), mask, lengths, cu_seqlens, finished, _constant(last_values))
    return GaeOutput(*call(_gae, _constant(rewards), *constants, *options))


def _constant(t: Any) -> Any:
    return t.detach() if t is not None and t.requires_grad else t


def _validate_lengths(lengths: Tensor, rewards: Tensor) -> None:
    bad = (lengths < 0) | (lengths > rewards.shape[-1])
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"lengths[{i}] is {lengths[i].item()}; it must lie in [0, {rewards.shape[-1]}]")


def _validate_places(segment: Tensor, order: Tensor) -> None:
    both = torch.stack([segment.long(), order.long()])
    unique, count = both.unique(dim=1, return_counts=True)
    if unique.shape[1] < both.shape[1]:
        twice = unique[:, count > 1][:, 0].tolist()
        raise ValueError(f"order is {twice[1]} in more than one row of segment {twice[0]}; each needs a place of its own")


# ---- fake implementations and autograd -------------------------------------------------------------------------------


def _check_fake_tokens(name: str, tokens: Tensor, cu_seqlens: Tensor | None, **others: Tensor | None) -> int:
    """How many sequences there are."""
    same_device(name, tokens, cu_seqlens=cu_seqlens, **others)
    expected = 2 if cu_seqlens is None else 1
    torch._check(
        tokens.dim() == expected, lambda: f"{name} has shape {list(tokens.shape)}; expected [B, T], or [N] with cu_seqlens"
    )
    for other, t in others.items():
        torch._check(t is None or t.dim() == expected, lambda other=other: f"{other} must be shaped like {name}")
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_reduce(
    values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, minus: Tensor | None, weights: Tensor | None,
    transform: int, mean: bool,
) -> Tensor:  # fmt: skip
    return values.new_empty((_check_fake_tokens("values", values, cu_seqlens, mask=mask, minus=minus, weights=weights),))


for _name in ("sequence_reduce", "sequence_reduce_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_reduce)


@torch.library.register_fake("prefkern::sequence_reduce_backward")
def _fake_reduce_backward(g: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.register_fake("prefkern::discounted_returns")
def _fake_discounted_returns(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float) -> Tensor:
    _check_fake_tokens("rewards", rewards, cu_seqlens, mask=mask)
    return rewards.new_empty(rewards.shape, dtype=accumulator(rewards))


@torch.library.register_fake("prefkern::segmented_returns")
def _fake_segmented_returns(rewards: Tensor, segment: Tensor, order: Tensor, gamma: float) -> Tensor:
    same_device("rewards", rewards, segment=segment, order=order)
    torch._check(rewards.dim() == 1, lambda: f"rewards has shape {list(rewards.shape)}; expected [B]")
    return rewards.new_empty(rewards.shape, dtype=accumulator(rewards))


@torch.library.register_fake("prefkern::gae")
def _fake_gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None,
    finished: Tensor | None, last_values: Tensor | None, gamma: float, lam: float, bootstrap: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    same_device("rewards", rewards, lengths=lengths, finished=finished, last_values=last_values)
    _check_fake_tokens("rewards", rewards, cu_seqlens, values=values, mask=mask)
    dtype = accumulator(rewards)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not g.requires_grad:  # create_graph: a second differentiation must not find a constant
        g = g.detach().requires_grad_()
    return (_reduce_backward(g, *ctx.saved_tensors, *ctx.options), *(None,) * 6)


torch.library.register_autograd("prefkern::sequence_reduce", _backward, setup_context=_setup)
no_double_backward("sequence_reduce_backward")
