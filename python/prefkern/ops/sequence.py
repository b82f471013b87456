"""Sums over the tokens of each sequence, means over its steps, returns and advantage estimates. Kernels: ``csrc/sequence``;
formulas: ``csrc/math/sequence.h``, ``csrc/math/pooling.h``, ``csrc/math/returns.h``."""

from typing import Any, Literal

import torch
from torch import Tensor

from .._names import choice
from ._arguments import accumulator, check_layout, check_tensors, constant, integer, number, same_device
from ._call import call, no_double_backward, validation
from .types import GaeOutput, StepMeans

_OPS = torch.ops.prefkern
_reduce, _reduce_fwd = _OPS.sequence_reduce.default, _OPS.sequence_reduce_fwd.default
_reduce_backward = _OPS.sequence_reduce_backward.default
_pool, _pool_fwd, _pool_backward = _OPS.step_pool.default, _OPS.step_pool_fwd.default, _OPS.step_pool_backward.default
_discounted_returns, _segmented_returns = _OPS.discounted_returns.default, _OPS.segmented_returns.default
_gae = _OPS.gae.default

TRANSFORMS = ("none", "exp")
BOOTSTRAPS = ("repeat", "critic", "zero")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sequence_sum(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    head: Tensor | None = None,
    tail_weight: float | None = None,
    decay: float = 1.0,
) -> Tensor:
    r"""A sum over the tokens of each sequence that count, :math:`\sum_t w_t\, f(x_t - y_t)`, or with weights for their places
    :math:`\sum_t w_t\, h(p_t)\, \gamma^{p_t} f(x_t - y_t)`.

    :math:`p_t` is the number of tokens of the sequence that count before t, :math:`h(p)` is 1 for p < ``head`` and
    ``tail_weight`` from there on, :math:`\gamma` is ``decay``. No tensor of such weights, nor of a span's mask, is made.

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
        starts, ends: int64 or int32 ``[B]``, the positions in each sequence (from its first token on, whether that counts or
            not) where a span begins and behind which it is over; None: the first token, and the end. Only tokens inside count:
            a step of a solution, or what follows the first difference of two responses. :math:`0 \le` starts :math:`\le` ends
            :math:`\le` the sequence's length.
        head: int64 or int32 ``[B]``, not negative, with ``tail_weight``, any finite number: the tokens that count behind the
            first ``head`` ones weigh so much (LD-DPO). They are summed all the same: NaN there shows even with weight 0.
        decay: in ``[0, 1]``; the first token that counts weighs 1 (D2PO). With 0 it is the only one.

    Returns:
        ``[B]`` float32, or float64 for float64 values; 0 for a sequence without tokens.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens``, ``starts``, ``ends``
            and ``head`` are always found on the CPU; on CUDA everything, or the sequence, comes out NaN, or it raises under
            ``prefkern.set_validation(True)``.
    """
    places = (starts, ends, head, tail_weight, decay)
    return _sequence_reduce(values, mask, cu_seqlens, minus, weights, transform, False, *places)


def sequence_mean(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    minus: Tensor | None = None,
    weights: Tensor | None = None,
    transform: Literal["none", "exp"] = "none",
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    head: Tensor | None = None,
    tail_weight: float | None = None,
    decay: float = 1.0,
) -> Tensor:
    """:func:`sequence_sum` divided by the number of tokens of the sequence that count, whatever they weigh; 0 where there are
    none."""
    places = (starts, ends, head, tail_weight, decay)
    return _sequence_reduce(values, mask, cu_seqlens, minus, weights, transform, True, *places)


def _sequence_reduce(
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    minus: Tensor | None,
    weights: Tensor | None,
    transform: Literal["none", "exp"],
    mean: bool,
    starts: Tensor | None,
    ends: Tensor | None,
    head: Tensor | None,
    tail_weight: float | None,
    decay: float,
) -> Tensor:
    check_tensors(values=values)
    given = {"mask": mask, "minus": minus, "weights": weights, "starts": starts, "ends": ends, "head": head}
    check_tensors(**{name: t for name, t in given.items() if t is not None})
    check_layout(cu_seqlens, values, "values")
    transform_id = choice("transform", transform, TRANSFORMS)
    if (head is None) != (tail_weight is None):
        missing, there = ("head", "tail_weight") if head is None else ("tail_weight", "head")
        raise ValueError(f"{there} is given but {missing} is None; they belong together")
    tail = 1.0 if tail_weight is None else number("tail_weight", tail_weight)
    places = (starts, ends, head, tail, number("decay", decay))
    if values.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_spans(values, cu_seqlens, starts, ends, head)
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    constants = (mask, cu_seqlens, constant("minus", minus), constant("weights", weights))
    op = _reduce if values.requires_grad and torch.is_grad_enabled() else _reduce_fwd
    result: Tensor = call(op, values, *constants, transform_id, mean, *places)
    return result


def masked_mean_pool(hidden: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """The mean of the hidden states of each sequence's tokens that count: sentence features for a probe or a small head.

    Args:
        hidden: ``[B, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``. float32, bfloat16 or float16 (float64 on the CPU); read
            once, where it lies: of a slice like ``hidden[:, 1:]`` no copy is made. The gradient has its dtype.
        mask: bool, ``[B, T]`` or ``[N]``; True counts. None: every token counts. What lies outside is never looked at, and its
            gradient is exactly 0.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.

    Returns:
        ``[B, H]``, float32, or float64 for float64; 0 for a sequence without tokens that count.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Wrong ``cu_seqlens`` are always found on the
            CPU; on CUDA everything comes out NaN, or it raises under ``prefkern.set_validation(True)``.
    """
    check_tensors(hidden=hidden)
    expected = "[B, T, H], or [N, H] with cu_seqlens"
    if hidden.dim() != (3 if cu_seqlens is None else 2):
        raise ValueError(f"hidden has shape {list(hidden.shape)}; expected {expected}")
    if mask is None:
        mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    check_layout(cu_seqlens, mask, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {str(mask.dtype).removeprefix('torch.')}; accepted: bool")
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(f"mask has shape {list(mask.shape)}; hidden has shape {list(hidden.shape)}; expected {expected}")
    return _step_pool(hidden, mask, cu_seqlens, 1, False)[0].squeeze(1)


def step_mean(
    values: Tensor, step_ids: Tensor, n_steps: int, *, cu_seqlens: Tensor | None = None, clamp: bool = False
) -> StepMeans:
    """The mean over the tokens of each step of a sequence, of numbers (log-ratios) or of hidden states.

    Args:
        values: ``[B, T]`` or ``[B, T, H]``, packed ``[N]`` or ``[N, H]`` with ``cu_seqlens``. float32, bfloat16 or float16
            (float64 on the CPU); read once, where they lie. The only argument with a gradient, which has their dtype.
        step_ids: int64 or int32, ``[B, T]`` or ``[N]``: 1 to ``n_steps``, in any order; 0 for tokens of no step (prompt,
            padding), which are never looked at and get gradient 0.
        n_steps: how many steps the result has; a Python number, so that its shape is known without looking at the ids.
        cu_seqlens: int32 ``[B + 1]``, where packed sequences begin and end.
        clamp: tokens whose id is above ``n_steps`` belong to the last step (TPO merges surplus steps into the last common
            one). Else such an id is an error.

    Returns:
        StepMeans(means, counts): ``[B, n_steps]`` or ``[B, n_steps, H]``, and int64 ``[B, n_steps]``. A step without tokens has
        mean 0 and count 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted. Ids out of range and wrong ``cu_seqlens``
            are always found on the CPU; on CUDA the sequence, or everything, comes out NaN with counts -1, or it raises under
            ``prefkern.set_validation(True)``.
    """
    check_tensors(values=values, step_ids=step_ids)
    check_layout(cu_seqlens, step_ids, "step_ids")
    if step_ids.dtype == torch.bool:
        raise TypeError("step_ids has dtype bool; accepted: int64, int32")
    if not isinstance(clamp, bool):
        raise TypeError(f"clamp is {clamp!r}; a bool is expected")
    steps = integer("n_steps", n_steps)
    if steps < 1:
        raise ValueError(f"n_steps is {steps}; it must be positive")
    if step_ids.is_cuda and validation() and not torch.compiler.is_compiling():
        _validate_steps(step_ids, steps, clamp)
    return StepMeans(*_step_pool(values, step_ids, cu_seqlens, steps, clamp))


def _step_pool(values: Tensor, step_ids: Tensor, cu_seqlens: Tensor | None, n_steps: int, clamp: bool) -> tuple[Tensor, Tensor]:
    op = _pool if values.requires_grad and torch.is_grad_enabled() else _pool_fwd
    result: tuple[Tensor, Tensor] = call(op, values, step_ids, cu_seqlens, n_steps, clamp)
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
    result: Tensor = call(_discounted_returns, constant("rewards", rewards), mask, cu_seqlens, number("gamma", gamma))
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
    result: Tensor = call(_segmented_returns, constant("rewards", rewards), segment, order, number("gamma", gamma))
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
    constants = (constant("values", values), mask, lengths, cu_seqlens, finished, constant("last_values", last_values))
    return GaeOutput(*call(_gae, constant("rewards", rewards), *constants, *options))


def _validate_spans(
    values: Tensor, cu_seqlens: Tensor | None, starts: Tensor | None, ends: Tensor | None, head: Tensor | None
) -> None:
    if starts is None and ends is None and head is None:
        return
    rows = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if any(t is not None and t.shape != (rows,) for t in (starts, ends, head)):  # the op refuses a wrong shape
        return
    sizes = [values.shape[-1]] * rows if cu_seqlens is None else cu_seqlens.diff().tolist()
    limits = sizes if ends is None else ends.tolist()
    for b, (end, size) in enumerate(zip(limits, sizes, strict=True)):
        if not 0 <= end <= size:
            raise ValueError(f"ends[{b}] is {end}; it must lie in [0, {size}]")
    for b, (start, end) in enumerate(zip([] if starts is None else starts.tolist(), limits, strict=False)):
        if not 0 <= start <= end:
            raise ValueError(f"starts[{b}] is {start}; it must lie in [0, {end}]")
    for b, n in enumerate([] if head is None else head.tolist()):
        if n < 0:
            raise ValueError(f"head[{b}] is {n}; it must not be negative")


def _validate_steps(step_ids: Tensor, n_steps: int, clamp: bool) -> None:
    flat = step_ids.reshape(-1)
    bad = (flat < 0) if clamp else (flat < 0) | (flat > n_steps)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"step_ids[{i}] of the flattened tokens is {flat[i].item()}; accepted: 0 (no step) to n_steps = {n_steps}"
            + (", and above" if clamp else "")
        )


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
    transform: int, mean: bool, starts: Tensor | None = None, ends: Tensor | None = None, head: Tensor | None = None,
    tail_weight: float = 1.0, decay: float = 1.0,
) -> Tensor:  # fmt: skip
    same_device("values", values, starts=starts, ends=ends, head=head)
    return values.new_empty((_check_fake_tokens("values", values, cu_seqlens, mask=mask, minus=minus, weights=weights),))


for _name in ("sequence_reduce", "sequence_reduce_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_reduce)


@torch.library.register_fake("prefkern::sequence_reduce_backward")
def _fake_reduce_backward(g: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape)


def _fake_pool(values: Tensor, step_ids: Tensor, cu_seqlens: Tensor | None, n_steps: int, clamp: bool) -> tuple[Tensor, Tensor]:
    name, other = ("hidden", "mask") if step_ids.dtype == torch.bool else ("values", "step_ids")
    same_device(name, values, **{other: step_ids})
    rows, dims = _check_fake_tokens(other, step_ids, cu_seqlens), step_ids.dim()
    torch._check(
        values.dim() in (dims, dims + 1),
        lambda: f"{name} has shape {list(values.shape)}; that of {other} is expected, or that with features behind it",
    )
    means = values.new_empty((rows, n_steps, *values.shape[dims:]), dtype=accumulator(values))
    return means, values.new_empty((rows, n_steps), dtype=torch.int64)


for _name in ("step_pool", "step_pool_fwd"):
    torch.library.register_fake(f"prefkern::{_name}", _fake_pool)


@torch.library.register_fake("prefkern::step_pool_backward")
def _fake_pool_backward(
    g: Tensor, counts: Tensor, step_ids: Tensor, cu_seqlens: Tensor | None, clamp: bool, dtype: int
) -> Tensor:
    return g.new_empty((*step_ids.shape, *g.shape[2:]), dtype=_DTYPES[dtype])


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
    tensors, options, spans, weights = inputs[:5], inputs[5:7], inputs[7:10], inputs[10:]
    ctx.save_for_backward(*tensors, *spans)
    ctx.options, ctx.weights = options, weights


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not g.requires_grad:  # create_graph: a second differentiation must not find a constant
        g = g.detach().requires_grad_()
    saved = ctx.saved_tensors
    return (_reduce_backward(g, *saved[:5], *ctx.options, *saved[5:], *ctx.weights), *(None,) * 11)


torch.library.register_autograd("prefkern::sequence_reduce", _backward, setup_context=_setup)
no_double_backward("sequence_reduce_backward")


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, step_ids, cu_seqlens, _, clamp = inputs
    ctx.save_for_backward(output[1], step_ids, cu_seqlens)  # not the values: the gradient does not need them
    ctx.options = (clamp, _DTYPES.index(values.dtype))
    ctx.mark_non_differentiable(output[1])


def _pool_grad(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not g.requires_grad:
        g = g.detach().requires_grad_()
    return (_pool_backward(g, *ctx.saved_tensors, *ctx.options), *(None,) * 4)


torch.library.register_autograd("prefkern::step_pool", _pool_grad, setup_context=_setup_pool)
no_double_backward("step_pool_backward")
